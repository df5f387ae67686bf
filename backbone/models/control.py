"""Opening control networks for a model: from a run, a diffusers folder, the hub, or new ones to train.

network, record, *_ = open_control(model, "runs/sketch")
conditions = replace(text, controls=(Control.of(network, maps),))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
from PIL import Image
from torch import Tensor, nn

from backbone.cli.conditions import ANY, AUTO, ControlOptions, RequestedControl, RequestedMap
from backbone.conditions.control import Control, ControlNetwork
from backbone.families.base import ModuleSpec, diffusers_spec
from backbone.families.components.loading import WEIGHTS, load_network
from backbone.families.control import ControlledFamily, FilesFamily
from backbone.families.location import Location, find_hub_file
from backbone.families.unet.row_lora import make_row_lora, read_row_lora
from backbone.io.console import UserError, notify
from backbone.io.files import PICKLE_SUFFIXES, read_header, read_json
from backbone.io.progress import progress
from backbone.io.run_folder import CONDITION_FILE, LORA_WEIGHTS
from backbone.io.weights import hash_weights, read_weights_header
from backbone.io.written import written_path
from backbone.media.control.maps import MapTarget, as_hints, prepare_map, read_map, read_maps
from backbone.media.parameters import last_name
from backbone.models.defaults import ConditionDefaults, read_section
from backbone.models.model import Backbone
from backbone.models.sample import is_guidance_distilled

PARTS = ("t2i_adapter", "controlnet")  # subfolders of a run; one of them holds the network
Options = TypeVar("Options", bound=ControlOptions)
EMBEDDED = "control"  # a model's subfolder of control networks that come with it


@dataclass(frozen=True)
class ControlRecord:
    """`condition.json`: what a control network was trained on.

    kinds     of maps; one network may read several
    maps      version of the maps' maker
    palette   colour of each label
    base      fingerprint of the model that it was trained on, and its name
    defaults  scale (`scales`: by the kind of a map), start, stop and rows that work well
    """

    kinds: tuple[str, ...] = ()
    maps: int = 1
    palette: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    base: str = ""
    model: str = ""
    defaults: dict[str, Any] = field(default_factory=dict)


class OpenedControl(NamedTuple):
    """A control network, its record, the run, folder or hub id it was opened from, and the hash of its weights."""

    network: ControlNetwork
    record: ControlRecord
    name: str
    weights: str


def make_control_network(
    model: Backbone, kind: str, *, denoiser: nn.Module | None = None, lora_rank: int = 0, **config: Any
) -> ControlNetwork:
    """A control network to train, fp32: a random `t2i-adapter`, or a `controlnet` copied from the denoiser's encoder.

    `config` goes to diffusers' `T2IAdapter` or `ControlNetModel.from_unet`. `denoiser` replaces the model's
    own network by another of the same kind, such as one on `meta`. `lora_rank` gives a T2I-Adapter a LoRA of it.
    Raises `UserError` for a model without a UNet.
    """
    from diffusers import ControlNetModel, T2IAdapter

    family = require_controlled_family(model)
    if T2IAdapter not in family.control_classes:
        raise UserError(f"New control networks are made for UNets alone, and {model.location.name} has none.")
    network: Any = model.denoiser if denoiser is None else denoiser
    device = next(network.parameters()).device
    module: Any
    if kind == "t2i-adapter":
        # Widths of the UNet's levels, and the factor from pixels to its first features
        widths = list(network.config.block_out_channels)
        defaults: dict[str, Any] = {"channels": widths, "downscale_factor": model.factor}
        # SDXL's: features after the first halving
        if network.config.down_block_types[0] == "DownBlock2D":
            defaults = {
                "channels": [*widths, *[widths[-1]] * 3][: max(4, len(widths))],
                "downscale_factor": 2 * model.factor,
                "adapter_type": "full_adapter_xl",
            }
        module = T2IAdapter(**defaults | config)
        if lora_rank:
            module.add_module("lora", make_row_lora(network, lora_rank))
    else:
        assert kind == "controlnet"
        module = ControlNetModel.from_unet(network, load_weights_from_unet=device.type != "meta", **config)
    return family.control_network(module.float().to(device).train(), network, _make_encoder(model))


def open_control(model: Backbone, name: str, *, dtype: torch.dtype | None = None) -> OpenedControl:
    """Open a control network by its run, folder or hub id, in the model's precision or this one, frozen.

    Raises `UserError` for a network of another family or model, a pickle, and anything that is no control network.
    """
    family = require_controlled_family(model)
    source = find_control(name)
    try:
        module = _load_network(model, family, source, dtype or model.dtype)
        network = family.control_network(module, model.denoiser, _make_encoder(model))
        _refuse_other_scale(module, model.factor)
    except UserError as error:
        if not str(error).startswith(("was ", "is ")):
            raise
        raise UserError(f"{name} {error}. Name one that was made for {model.location.name}.") from error
    record = source.record
    if record.base and not model.has_fingerprint(record.base):
        notify(
            f"{name} was trained on {record.model or 'another model'} with other weights than {model.location.name} "
            "has: images may follow it less closely."
        )
    return OpenedControl(network, record, name, source.hash_weights())


def _refuse_other_scale(module: nn.Module, factor: int) -> None:
    """`UserError` for a UNet's control network whose residuals have another size than this model's latents."""
    config = cast(Any, module).config
    reduction = factor  # a transformer's control network encodes maps as the model encodes pictures
    if layers := config.get("conditioning_embedding_out_channels"):
        reduction = 2 ** (len(layers) - 1)
    elif scale := config.get("downscale_factor"):
        reduction = scale // 2 if config.get("adapter_type") == "full_adapter_xl" else scale
    if reduction != factor:
        raise UserError(
            f"was made for another model: it makes a map {reduction} times smaller, and this model a picture {factor} "
            "times"
        )


# Conditions -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Condition:
    """An opened condition: the control of one row, its map as the network reads it, and its facts for records.

    maps  those of a clip, one a frame
    """

    control: Control
    map: Image.Image
    facts: dict[str, Any]
    maps: tuple[Image.Image, ...] = ()

    def brief(self) -> dict[str, Any]:
        """The facts to store in an image that is passed on: files and folders by their last names."""
        return {
            name: last_name(value) if isinstance(value, str) else value
            for name, value in self.facts.items()
            if name != "weights"
        }


def open_conditions(
    model: Backbone,
    requested: Sequence[RequestedControl],
    size: tuple[int, int],
    *,
    picture: Image.Image | None = None,
    drawn_on: tuple[int, int] | None = None,
    opened: dict[str, OpenedControl] | None = None,
) -> tuple[Condition, ...]:
    """Open the conditions for pictures of `size` (width, height). `KIND=auto` makes its map from `picture`.

    Maps may also have the size of the image they were `drawn_on`, from which the picture was cropped. `opened`
    keeps networks for the next call. Maps are checked before any weights are loaded.

    Raises `UserError` as `read_map` and `open_control` do, for kinds that no network of the model reads, and for guess
    mode where it has no effect.
    """
    return _open_all(
        model,
        requested,
        size,
        drawn_on,
        lambda request, target: (read_map(request, target, picture=picture),),
        {} if opened is None else opened,
    )


def open_clip_conditions(
    model: Backbone,
    requested: Sequence[RequestedControl],
    size: tuple[int, int],
    frames: int,
    *,
    film: Sequence[Image.Image] = (),
    drawn_on: tuple[int, int] | None = None,
    opened: dict[str, OpenedControl] | None = None,
) -> tuple[Condition, ...]:
    """Open the conditions for clips of this many frames: a map a frame, from a folder or clip, or a still for all.

    `KIND=auto` makes its maps from the frames of `film`. Raises `UserError` as `open_conditions` does, and where the
    numbers of maps and frames differ.
    """
    conditions = _open_all(
        model,
        requested,
        size,
        drawn_on,
        lambda request, target: read_maps(request, target, frames, film=film),
        {} if opened is None else opened,
    )
    return tuple(replace(condition, control=condition.control.as_clip()) for condition in conditions)


def condition_clips(
    model: Backbone, kind: str, maps: Sequence[Image.Image], size: tuple[int, int]
) -> Condition:
    """Condition clips on given maps, one a frame, with the model's own network for their kind.

    Raises `UserError` where the model has none.
    """
    opened = open_control(model, _find_embedded(model, kind))
    fitting = [image if image.size == size else image.resize(size) for image in maps]
    condition = _make_condition(model, RequestedControl(RequestedMap(kind, "planned")), opened, fitting)
    return replace(condition, control=condition.control.as_clip())


def condition_on(
    model: Backbone,
    requested: RequestedControl,
    image: Image.Image,
    size: tuple[int, int],
    opened: OpenedControl,
) -> Condition:
    """Condition pictures of `size` (width, height) on a given map, with an opened network.

    `requested.map.path` names the map in messages. Raises `UserError` where the image is no map of its kind.
    """
    target = MapTarget(size, opened.record.palette or None)
    return _make_condition(model, requested, opened, [prepare_map(requested.map, target, image)])


def _open_all(
    model: Backbone,
    requested: Sequence[RequestedControl],
    size: tuple[int, int],
    drawn_on: tuple[int, int] | None,
    read: Callable[[RequestedMap, MapTarget], Sequence[Image.Image]],
    opened: dict[str, OpenedControl],
) -> tuple[Condition, ...]:
    """Open the conditions; `read` gives the maps of one, which become the rows of its control."""
    names = [name for _, name in name_networks(model, requested)]
    sources = {name: find_control(name) for name in names}
    ready = []
    for request, name in zip(requested, names, strict=True):
        settled = _settle_kind(request, sources[name])
        target = MapTarget(size, sources[name].record.palette or None, drawn_on)
        ready.append((settled, name, read(settled.map, target)))
    for name in sources:
        opened[name] = opened.get(name) or open_control(model, name)
    return tuple(_make_condition(model, settled, opened[name], maps) for settled, name, maps in ready)


def _make_condition(
    model: Backbone, requested: RequestedControl, opened: OpenedControl, images: Sequence[Image.Image]
) -> Condition:
    defaults = get_condition_defaults(model, opened.record, requested.map.kind)
    options: dict[str, Any] = {
        name: defaults[name] if getattr(requested, name) in (None, "") else getattr(requested, name)
        for name in defaults
    }
    if requested.guess and not opened.network.takes_guess:
        raise UserError(
            f"{opened.name} is no ControlNet of a UNet, so guess mode has no effect on it. Leave --guess-mode out."
        )
    if requested.rows:
        refuse_rows(model, requested, opened)
    hints = torch.cat([as_hints(image) for image in images]).to(model.device)
    network = opened.network.for_kind(requested.map.kind)
    control = make_control(network, hints, {**options, "guess": requested.guess})
    facts = {**describe_map(requested.map), "network": opened.name, **options, "guess": requested.guess}
    facts["weights"] = opened.weights
    return Condition(control, images[0], facts, tuple(images) if len(images) > 1 else ())


def get_condition_defaults(model: Backbone, record: ControlRecord, kind: str) -> dict[str, Any]:
    """Default scale, start, stop and rows of guidance of a control network on maps of a kind."""
    defaults: dict[str, Any] = {"scale": 1.0, "start": 0.0, "stop": 1.0, "rows": "both"}
    defaults |= {**model.defaults.get("condition", {}), **record.defaults}
    scales = defaults.pop("scales", {})
    return {**defaults, "scale": scales.get(kind, defaults["scale"])}


def refuse_rows(model: Backbone, requested: RequestedControl, opened: OpenedControl) -> None:
    """`UserError` where the choice of guidance rows for a condition has no effect."""
    if is_guidance_distilled(model):
        raise UserError(
            f"{model.location.name} is guidance-distilled: there is one prediction alone that control could act on. "
            "Leave --condition-rows out."
        )
    if requested.rows == "both" and (requested.guess or opened.network.prompted_only):
        name = "Guess mode" if requested.guess else opened.name
        raise UserError(f"{name} acts on prompted rows alone. Leave --condition-rows both out.")


def make_control(network: ControlNetwork, maps: Tensor, facts: Mapping[str, Any]) -> Control:
    """The control of maps [B, 3, H, W] with the scale, start, stop, rows and guess in a condition's facts."""
    settings = {name: facts[name] for name in ("scale", "start", "stop", "guess")}
    return Control.of(network, maps, prompted=facts["rows"] == "prompted", **settings)


def gather_controls(conditions: Sequence[Condition]) -> tuple[Control, ...]:
    """The controls of conditions; those of a union ControlNet that act at the same steps share one call."""
    groups = ([condition.control for condition in group] for group in group_conditions(conditions))
    return tuple(
        cast(Any, group[0].network).join_controls(group) if len(group) > 1 else group[0] for group in groups
    )


def group_conditions(conditions: Sequence[Condition]) -> list[tuple[Condition, ...]]:
    """The conditions by the call that they share, in their order."""
    groups: list[list[Condition]] = []
    for condition in conditions:
        control = condition.control
        can_join = hasattr(control.network, "join_controls") and float(control.scale[0]) > 0
        group = next(
            (
                candidate
                for candidate in groups
                if can_join and _fit_in_one_call(candidate[0].control, control)
            ),
            None,
        )
        if group is None:
            groups.append([condition])
        else:
            group.append(condition)
    return [tuple(group) for group in groups]


def _fit_in_one_call(first: Control, second: Control) -> bool:
    same_network = first.network.module is second.network.module and float(first.scale[0]) > 0
    return same_network and first.acts_like(second)


def with_map(condition: Condition, image: Image.Image) -> Condition:
    """The same condition with another map."""
    control = condition.control
    hints = control.network.read(as_hints(image).to(control.hints[0].device))
    return replace(condition, control=replace(control, hints=hints), map=image)


def describe_conditions(conditions: Sequence[Condition]) -> dict[str, Any]:
    """The facts of conditions, for records; {} without conditions."""
    return {"conditions": [condition.facts for condition in conditions]} if conditions else {}


def write_out_strengths(model: Backbone, options: Options, conditions: Sequence[Condition]) -> Options:
    """The options with what they left to the control networks: how strongly, when and on which rows these act.

    `conditions` are those of the options' maps, in their order. For the command that repeats a run.
    """
    assert len(conditions) == len(options.condition)
    if not conditions:
        return options
    changes: dict[str, Any] = {}
    for name in ("scale", "start", "stop"):
        if not getattr(options, f"condition_{name}"):
            values = tuple(condition.facts[name] for condition in conditions)
            changes[f"condition_{name}"] = values if len(set(values)) > 1 else values[:1]
    rows = {condition.facts["rows"] for condition in conditions}
    acts_as_said = all(
        condition.control.prompted == (condition.facts["rows"] == "prompted") for condition in conditions
    )
    if len(rows) == 1 and acts_as_said and not is_guidance_distilled(model):
        changes["condition_rows"] = rows.pop()
    return replace(options, **changes)


def refuse_other_control(facts: Mapping[str, Any], source: str | Path) -> None:
    """`UserError` where the network of a record's condition has other weights than when `source` was written."""
    name, weights = str(facts["network"]), facts.get("weights")
    if weights and find_control(name).hash_weights() != weights:
        raise UserError(
            f"The control network {name} has other weights than when {source} was written. Put the old ones back, or "
            "make it anew."
        )


def describe_map(requested: RequestedMap) -> dict[str, Any]:
    """The facts of a map, for records."""
    return {
        "kind": requested.kind,
        "map": requested.path or AUTO,
        **({"how": requested.mode} if requested.path and requested.mode else {}),
    }


def _find_embedded(model: Backbone, kind: str) -> str:
    """The folder of the model's own network for a kind of map; `UserError` where it has none."""
    embedded = list_embedded_controls(model)
    if kind == ANY:
        raise UserError(
            "Without --controlnet nothing says what kind of map it is. Say it, as in --condition sketch=drawing.png."
        )
    if kind not in embedded:
        summary = (
            f"has networks for {', '.join(sorted(embedded))}"
            if embedded
            else "brings no control networks with it"
        )
        raise UserError(
            f"{model.location.name} {summary}, so nothing reads {kind} maps. Name a network with --controlnet."
        )
    return str(embedded[kind])


def _settle_kind(requested: RequestedControl, source: ControlSource) -> RequestedControl:
    """The request, with its network's kind if it names none; `UserError` for a kind that the network does not read."""
    name, record = source.name, source.record
    if requested.map.kind == ANY and len(record.kinds) == 1:
        return replace(requested, map=replace(requested.map, kind=record.kinds[0]))
    if record.kinds and requested.map.kind not in record.kinds:
        raise UserError(
            f"{name} was trained on {', '.join(record.kinds)}, not on {requested.map.kind}. Give such a map, or name "
            "another network with --controlnet."
        )
    return requested


def list_embedded_controls(model: Backbone) -> dict[str, Path]:
    """The control networks that come with a model: the folder for each kind of map."""
    folder = model.location.local(EMBEDDED)
    records = sorted(folder.glob(f"*/{CONDITION_FILE}")) if folder else []
    return {kind: path.parent for path in records for kind in read_json(path, ControlRecord).kinds}


def require_controlled_family(model: Backbone) -> ControlledFamily:
    """The model's family; `UserError` where it has no control networks."""
    if not isinstance(model.family, ControlledFamily):
        raise UserError(
            f"No control network is read for {model.family.name}. Leave --condition out, or name another model."
        )
    return model.family


def _make_encoder(model: Backbone) -> Any:
    """A function from pictures in −1…1 to latents, for networks that read maps as latents; some lack the shift."""

    def encode(pictures: Tensor, *, shifted: bool) -> Tensor:
        latents, space = model.encode(pictures).mean, model.latent_space
        return latents if shifted else latents + space.shift * space.scale

    return encode


class ControlSource(NamedTuple):
    """A control network's folder with its config.json, or its file, and the record in its condition.json."""

    name: str
    path: Path
    record: ControlRecord

    def hash_weights(self) -> str:
        """The hash of its weights, sampled (`backbone.models.fingerprint`)."""
        files = sorted(self.path.glob("[!.]*.safetensors")) if self.path.is_dir() else [self.path]
        return hash_weights(files)


def find_control(name: str) -> ControlSource:
    """Find a control network without loading its weights; `UserError` where there is none."""
    path = written_path(name)
    if path.suffix.lower() in PICKLE_SUFFIXES or path.is_file():
        # It explains why pickles are refused
        return ControlSource(name, read_weights_header(path).path, ControlRecord())
    if path.is_dir():
        record = (
            read_json(path / CONDITION_FILE, ControlRecord)
            if (path / CONDITION_FILE).exists()
            else ControlRecord()
        )
        record = replace(
            record,
            defaults=read_section(ConditionDefaults, record.defaults, path / CONDITION_FILE, "defaults"),
        )
        for part in ("", *PARTS):
            if (path / part / "config.json").exists():
                return ControlSource(name, path / part, record)
        raise UserError(
            f"{path} holds no control network: it has no config.json and no folder {' or '.join(PARTS)}. Name the "
            "folder that `save_pretrained` or `customize train-control` wrote."
        )
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not path.parent.exists():
        return ControlSource(name, _fetch(name), ControlRecord())
    raise UserError(
        f"There is no control network {name}. Name a run, a diffusers folder, a file, or a hub id."
    )


def _fetch(repository: str) -> Path:
    """The cache's folder with a hub repository's config and safetensors weights."""
    config = find_hub_file(repository, "config.json")
    if config is None:
        raise UserError(f"{repository} has no config.json on the hub, so it is no control network.")
    revision = config.parent.name
    for name in (WEIGHTS, "diffusion_pytorch_model.fp16.safetensors"):
        if find_hub_file(repository, name, revision) is not None:
            return config.parent
    raise UserError(f"{repository} has no safetensors weights on the hub. Name another control network.")


@dataclass(frozen=True)
class ControlOutline:
    """A control network that is not loaded: its spec unless it is one file, and how many numbers its file holds."""

    spec: ModuleSpec | None
    numbers: int = 0


def make_outline_control(model: Backbone, name: str) -> ControlOutline:
    """Outline a control network from its config or its file's header; `UserError` as in `open_control`."""
    source = find_control(name)
    if not source.path.is_dir():
        shapes = read_header(source.path).shapes.values()
        return ControlOutline(None, sum(math.prod(shape) for shape in shapes))
    kind, location, part = _find_class(model, require_controlled_family(model).control_classes, source)
    lora = source.path / LORA_WEIGHTS
    lora_shapes = read_header(lora).shapes if lora.exists() else {}
    spec = diffusers_spec(kind, location, part, model.dtype)
    return ControlOutline(spec, sum(math.prod(shape) for shape in lora_shapes.values()))


def name_networks(model: Backbone, requested: Sequence[RequestedControl]) -> list[tuple[str, str]]:
    """The kind of each map and its network: the requested one, or the model's own.

    Raises `UserError` where there is no network, and for a kind that it does not read.
    """
    if not requested:
        return []
    require_controlled_family(model)
    names = [request.network or _find_embedded(model, request.map.kind) for request in requested]
    settled = (
        _settle_kind(request, find_control(name)) for request, name in zip(requested, names, strict=True)
    )
    return [(request.map.kind, name) for request, name in zip(settled, names, strict=True)]


def _load_network(
    model: Backbone, family: ControlledFamily, source: ControlSource, dtype: torch.dtype
) -> nn.Module:
    """Load a network from a folder, if the family supports its class, or from a file, if the family reads files."""
    with progress(None, f"loading {source.name}", brief=True):
        if source.path.is_dir():
            network = _load_folder(model, family.control_classes, source, dtype)
        elif isinstance(family, FilesFamily):
            network = family.load_control_file(read_header(source.path), model.denoiser, dtype)
        else:
            raise UserError(
                f"{source.name} is one file, and control networks of {model.family.name} are read from diffusers "
                "folders. Name the folder or hub id."
            )
    network = network.eval().requires_grad_(False).to(model.device)
    return cast(nn.Module, cast(Any, network).to(memory_format=torch.channels_last))  # as the denoiser's


def _load_folder(
    model: Backbone, classes: Sequence[Any], source: ControlSource, dtype: torch.dtype
) -> nn.Module:
    kind, location, part = _find_class(model, classes, source)
    network: nn.Module = load_network(kind, location, part, dtype)
    if (source.path / LORA_WEIGHTS).exists():
        network.add_module("lora", read_row_lora(source.path / LORA_WEIGHTS, model.denoiser).to(dtype))
    return network


def _find_class(model: Backbone, classes: Sequence[Any], source: ControlSource) -> tuple[Any, Location, str]:
    """The class of a folder's network, its config's location and folder; `UserError` for one not among `classes`."""
    location = Location(source.name, str(source.path.parent), {})
    part = source.path.name
    class_name = location.config(part).get("_class_name", "")
    kind = next((network_class for network_class in classes if network_class.__name__ == class_name), None)
    if kind is None:
        raise UserError(
            f"{source.name} is a {class_name or 'network of unknown kind'}, and {model.location.name} is controlled by "
            f"{' or '.join(network_class.__name__ for network_class in classes)}. Name one of these."
        )
    return kind, location, part
