"""Opening control networks for a model: from a run, a diffusers folder, the hub, or new ones to train.

network, record, *_ = open_control(model, "runs/sketch")
conditions = replace(text, controls=(Control.of(network, maps),))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from PIL import Image
from torch import Tensor, nn

from backbone.cli.conditions import ANY, AUTO, AskedControl, AskedMap
from backbone.conditions.control import Control, ControlNetwork
from backbone.families.base import ModuleSpec, diffusers_spec
from backbone.families.components.loading import WEIGHTS, load_network
from backbone.families.control import ControlledFamily, FilesFamily
from backbone.families.location import Location, find_hub_file
from backbone.families.unet.row_lora import new_row_lora, read_row_lora
from backbone.io.console import UserError, notify
from backbone.io.files import PICKLE_SUFFIXES, read_header, read_json
from backbone.io.progress import progress
from backbone.io.run_folder import CONDITION_FILE, LORA_WEIGHTS
from backbone.io.weights import read_weights_header
from backbone.io.written import written_path
from backbone.media.control.maps import MapTarget, as_hints, prepare_map, read_map, read_maps
from backbone.media.parameters import last_name
from backbone.models.defaults import ConditionDefaults, read_section
from backbone.models.fingerprint import hash_weights
from backbone.models.model import Backbone
from backbone.models.sample import is_guidance_distilled

PARTS = ("t2i_adapter", "controlnet")  # folders beside a condition.json, of which one is there
EMBEDDED = "control"  # folder beside a model's parts with the networks that come with it


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
    """A control network, what is known of it, where it is from, and the hash of its weights."""

    network: ControlNetwork
    record: ControlRecord
    name: str
    weights: str


def new_control(
    model: Backbone, kind: str, *, denoiser: nn.Module | None = None, lora_rank: int = 0, **config: Any
) -> ControlNetwork:
    """A control network to train, fp32: `t2i-adapter`, random, or `controlnet`, a copy of the denoiser's encoder.

    `config` goes to diffusers' `T2IAdapter` or `ControlNetModel.from_unet`. `denoiser` is another network of the same
    kind, in the place of the model's own: one on `meta`, say. With `lora_rank` a LoRA of it belongs to a T2I-Adapter.
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
        usual: dict[str, Any] = {"channels": widths, "downscale_factor": model.factor}
        # SDXL's: features behind the first halving
        if network.config.down_block_types[0] == "DownBlock2D":
            usual = {
                "channels": [*widths, *[widths[-1]] * 3][: max(4, len(widths))],
                "downscale_factor": 2 * model.factor,
                "adapter_type": "full_adapter_xl",
            }
        module = T2IAdapter(**usual | config)
        if lora_rank:
            module.add_module("lora", new_row_lora(network, lora_rank))
    else:
        assert kind == "controlnet"
        module = ControlNetModel.from_unet(network, load_weights_from_unet=device.type != "meta", **config)
    return family.control_network(module.float().to(device).train(), network, _encode(model))


def open_control(model: Backbone, name: str, *, dtype: torch.dtype | None = None) -> OpenedControl:
    """A control network by its run, folder or hub id, in the model's precision or this one, frozen.

    Raises `UserError` for a network of another family or model, a pickle, and what is no control network.
    """
    family = require_controlled_family(model)
    location = find_control(name)
    try:
        module = _load(model, family, location, dtype or model.dtype)
        network = family.control_network(module, model.denoiser, _encode(model))
        _refuse_other_scale(module, model.factor)
    except UserError as error:
        if not str(error).startswith(("was ", "is ")):
            raise
        raise UserError(f"{name} {error}. Name one that was made for {model.location.name}.") from error
    record = location.record
    if record.base and not model.has_fingerprint(record.base):
        notify(
            f"{name} was trained on {record.model or 'another model'} and is used with other weights, "
            f"{model.location.name}'s: it may be followed less closely."
        )
    return OpenedControl(network, record, name, location.hash_weights())


def _refuse_other_scale(module: nn.Module, factor: int) -> None:
    """`UserError` for a network of UNets whose answers are of another size than this model's latents."""
    config = cast(Any, module).config
    smaller = factor  # those of transformers encode their maps as the model does its pictures
    if layers := config.get("conditioning_embedding_out_channels"):
        smaller = 2 ** (len(layers) - 1)
    elif scale := config.get("downscale_factor"):
        smaller = scale // 2 if config.get("adapter_type") == "full_adapter_xl" else scale
    if smaller != factor:
        raise UserError(
            f"was made for another model: it makes a map {smaller} times smaller, and this model a picture {factor} "
            "times"
        )


# Conditions as they are asked for ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Condition:
    """A condition that was asked for, opened: the control of one row, its map as the network reads it, and facts.

    maps  of a clip, one a frame
    """

    control: Control
    map: Image.Image
    facts: dict[str, Any]
    maps: tuple[Image.Image, ...] = ()

    def brief(self) -> dict[str, Any]:
        """The facts for an image that is passed on: files and folders by their last names."""
        return {
            name: last_name(value) if isinstance(value, str) else value
            for name, value in self.facts.items()
            if name != "weights"
        }


def open_conditions(
    model: Backbone,
    asked: Sequence[AskedControl],
    size: tuple[int, int],
    *,
    picture: Image.Image | None = None,
    drawn_on: tuple[int, int] | None = None,
    opened: dict[str, OpenedControl] | None = None,
) -> tuple[Condition, ...]:
    """The conditions for pictures of `size` (width, height). `picture` is where `KIND=auto` finds its map.

    Maps may also have the shape of the image that they were `drawn_on`, from which the picture was cropped. `opened`
    keeps networks for the next call. Maps are looked at before any weights are loaded.

    Raises `UserError` for what `read_map` and `open_control` refuse, kinds that no network of the model reads, and
    guess mode where it has no effect.
    """
    return _open(
        model,
        asked,
        size,
        drawn_on,
        lambda one, target: (read_map(one, target, picture=picture),),
        {} if opened is None else opened,
    )


def open_clip_conditions(
    model: Backbone,
    asked: Sequence[AskedControl],
    size: tuple[int, int],
    frames: int,
    *,
    film: Sequence[Image.Image] = (),
    drawn_on: tuple[int, int] | None = None,
    opened: dict[str, OpenedControl] | None = None,
) -> tuple[Condition, ...]:
    """The conditions for clips of this many frames: a map for each, from a folder, a clip, or one still for all.

    `film` are the frames in which `KIND=auto` finds its maps. Raises `UserError` as `open_conditions`, and for another
    number of maps than frames.
    """
    found = _open(
        model,
        asked,
        size,
        drawn_on,
        lambda one, target: read_maps(one, target, frames, film=film),
        {} if opened is None else opened,
    )
    return tuple(replace(one, control=one.control.as_clip()) for one in found)


def condition_clips(
    model: Backbone, kind: str, maps: Sequence[Image.Image], size: tuple[int, int]
) -> Condition:
    """The condition of clips on maps that are at hand, one a frame, by the model's own network for their kind.

    Raises `UserError` where the model has none.
    """
    opened = open_control(model, _find_embedded(model, kind))
    fitting = [one if one.size == size else one.resize(size) for one in maps]
    found = _condition(model, AskedControl(AskedMap(kind, "planned")), opened, fitting)
    return replace(found, control=found.control.as_clip())


def condition_on(
    model: Backbone, asked: AskedControl, image: Image.Image, size: tuple[int, int], opened: OpenedControl
) -> Condition:
    """The condition of pictures of `size` (width, height) on a map that is at hand, by a network that is open.

    `asked.map.path` is what the map is called in sentences. Raises `UserError` for what is no map of its kind.
    """
    target = MapTarget(size, opened.record.palette or None)
    return _condition(model, asked, opened, [prepare_map(asked.map, target, image)])


def _open(
    model: Backbone,
    asked: Sequence[AskedControl],
    size: tuple[int, int],
    drawn_on: tuple[int, int] | None,
    read: Callable[[AskedMap, MapTarget], Sequence[Image.Image]],
    opened: dict[str, OpenedControl],
) -> tuple[Condition, ...]:
    """The conditions, a row for each map that `read` gives of one."""
    named = [name for _, name in name_networks(model, asked)]
    networks = {name: find_control(name) for name in named}
    ready = []
    for said, name in zip(asked, named, strict=True):
        one = _settle_kind(said, networks[name])
        target = MapTarget(size, networks[name].record.palette or None, drawn_on)
        ready.append((one, name, read(one.map, target)))
    for name in networks:
        opened[name] = opened.get(name) or open_control(model, name)
    return tuple(_condition(model, one, opened[name], images) for one, name, images in ready)


def _condition(
    model: Backbone, asked: AskedControl, opened: OpenedControl, images: Sequence[Image.Image]
) -> Condition:
    defaults = get_condition_defaults(model, opened.record, asked.map.kind)
    options: dict[str, Any] = {
        name: defaults[name] if getattr(asked, name) in (None, "") else getattr(asked, name)
        for name in defaults
    }
    if asked.guess and not opened.network.takes_guess:
        raise UserError(
            f"{opened.name} is no ControlNet of a UNet, so guess mode has no effect on it. Leave --guess-mode out."
        )
    if asked.rows:
        refuse_rows(model, asked, opened)
    hints = torch.cat([as_hints(image) for image in images]).to(model.device)
    network = opened.network.for_kind(asked.map.kind)
    control = make_control(network, hints, {**options, "guess": asked.guess})
    facts = {**describe_asked(asked.map), "network": opened.name, **options, "guess": asked.guess}
    facts["weights"] = opened.weights
    return Condition(control, images[0], facts, tuple(images) if len(images) > 1 else ())


def get_condition_defaults(model: Backbone, record: ControlRecord, kind: str) -> dict[str, Any]:
    """Default scale, start, stop and rows of guidance of a control network on maps of a kind."""
    defaults: dict[str, Any] = {"scale": 1.0, "start": 0.0, "stop": 1.0, "rows": "both"}
    defaults |= {**model.defaults.get("condition", {}), **record.defaults}
    scales = defaults.pop("scales", {})
    return {**defaults, "scale": scales.get(kind, defaults["scale"])}


def refuse_rows(model: Backbone, asked: AskedControl, opened: OpenedControl) -> None:
    """`UserError` where it makes no difference on which rows of guidance a condition is asked to act."""
    if is_guidance_distilled(model):
        raise UserError(
            f"{model.location.name} is guidance-distilled: there is one prediction alone that control could act on. "
            "Leave --condition-rows out."
        )
    if asked.rows == "both" and (asked.guess or opened.network.prompted_only):
        why = "Guess mode" if asked.guess else opened.name
        raise UserError(f"{why} acts on prompted rows alone. Leave --condition-rows both out.")


def make_control(network: ControlNetwork, maps: Tensor, how: Mapping[str, Any]) -> Control:
    """The control of maps [B, 3, H, W] as a condition's facts say how it acts: scale, start, stop, rows, guess."""
    settings = {name: how[name] for name in ("scale", "start", "stop", "guess")}
    return Control.of(network, maps, prompted=how["rows"] == "prompted", **settings)


def gather_controls(conditions: Sequence[Condition]) -> tuple[Control, ...]:
    """The controls of conditions; those of one union ControlNet at the same steps go through one call."""
    groups: list[list[Control]] = []
    for control in (condition.control for condition in conditions):
        joins = hasattr(control.network, "together") and float(control.scale[0]) > 0
        group = next((some for some in groups if joins and _fit_in_one_call(some[0], control)), None)
        if group is None:
            groups.append([control])
        else:
            group.append(control)
    return tuple(
        cast(Any, group[0].network).together(group) if len(group) > 1 else group[0] for group in groups
    )


def _fit_in_one_call(one: Control, other: Control) -> bool:
    same = one.network.module is other.network.module and float(one.scale[0]) > 0
    return same and one.acts_like(other)


def with_map(condition: Condition, image: Image.Image) -> Condition:
    """The same condition with another map."""
    control = condition.control
    hints = control.network.read(as_hints(image).to(control.hints[0].device))
    return replace(condition, control=replace(control, hints=hints), map=image)


def describe_conditions(conditions: Sequence[Condition]) -> dict[str, Any]:
    """The facts of conditions, for records; nothing without any."""
    return {"conditions": [condition.facts for condition in conditions]} if conditions else {}


def refuse_other_control(facts: Mapping[str, Any], source: str | Path) -> None:
    """`UserError` where the network of a record's condition has other weights than when `source` was written."""
    name, weights = str(facts["network"]), facts.get("weights")
    if weights and find_control(name).hash_weights() != weights:
        raise UserError(
            f"The control network {name} has other weights than when {source} was written. Put the old ones back, or "
            "make it anew."
        )


def describe_asked(asked: AskedMap) -> dict[str, Any]:
    """The facts of a map, for records."""
    return {
        "kind": asked.kind,
        "map": asked.path or AUTO,
        **({"how": asked.how} if asked.path and asked.how else {}),
    }


def _find_embedded(model: Backbone, kind: str) -> str:
    """The folder of the model's own network for a kind; `UserError` where it has none."""
    own = list_embedded_controls(model)
    if kind == ANY:
        raise UserError(
            "Without --controlnet nothing says what kind of map it is. Say it, as in --condition sketch=drawing.png."
        )
    if kind not in own:
        has = f"has networks for {', '.join(sorted(own))}" if own else "brings no control networks with it"
        raise UserError(
            f"{model.location.name} {has}, so nothing reads {kind} maps. Name a network with --controlnet."
        )
    return str(own[kind])


def _settle_kind(asked: AskedControl, found: FoundControl) -> AskedControl:
    """The same with the kind that its network reads, where none was said; `UserError` for a kind that it does not."""
    name, record = found.name, found.record
    if asked.map.kind == ANY and len(record.kinds) == 1:
        return replace(asked, map=replace(asked.map, kind=record.kinds[0]))
    if record.kinds and asked.map.kind not in record.kinds:
        raise UserError(
            f"{name} was trained on {', '.join(record.kinds)}, not on {asked.map.kind}. Give such a map, or name "
            "another network with --controlnet."
        )
    return asked


def list_embedded_controls(model: Backbone) -> dict[str, Path]:
    """The control networks that come with a model: the folder for each kind of map."""
    folder = model.location.local(EMBEDDED)
    records = sorted(folder.glob(f"*/{CONDITION_FILE}")) if folder else []
    return {kind: path.parent for path in records for kind in read_json(path, ControlRecord).kinds}


def require_controlled_family(model: Backbone) -> ControlledFamily:
    """The model's family; `UserError` for one without control networks."""
    if not isinstance(model.family, ControlledFamily):
        raise UserError(
            f"No control network is read for {model.family.name}. Leave --condition out, or name another model."
        )
    return model.family


def _encode(model: Backbone) -> Any:
    """Pictures in −1…1 to latents, for networks that read a map as latents; some had them without the shift."""

    def encode(pictures: Tensor, *, shifted: bool) -> Tensor:
        latents, space = model.encode(pictures).mean, model.latent_space
        return latents if shifted else latents + space.shift * space.scale

    return encode


class FoundControl(NamedTuple):
    """Where a control network lies: the folder with its config.json or one file, and what its condition.json says."""

    name: str
    place: Path
    record: ControlRecord

    def hash_weights(self) -> str:
        """The hash of its weights, sampled (`backbone.models.fingerprint`)."""
        files = sorted(self.place.glob("[!.]*.safetensors")) if self.place.is_dir() else [self.place]
        return hash_weights(files)


def find_control(name: str) -> FoundControl:
    """Look a control network up, without its weights; `UserError` for what is none."""
    path = written_path(name)
    if path.suffix.lower() in PICKLE_SUFFIXES or path.is_file():
        # Which says why a pickle is not read
        return FoundControl(name, read_weights_header(path).path, ControlRecord())
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
                return FoundControl(name, path / part, record)
        raise UserError(
            f"{path} holds no control network: it has no config.json and no folder {' or '.join(PARTS)}. Name the "
            "folder that `save_pretrained` or `customize train-control` wrote."
        )
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not path.parent.exists():
        return FoundControl(name, _fetch(name), ControlRecord())
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
    """A control network that is not loaded: how to construct it if not from a file, and the numbers that files hold."""

    spec: ModuleSpec | None
    numbers: int = 0


def outline_control(model: Backbone, name: str) -> ControlOutline:
    """A control network by its config alone, or by its file's header; `UserError` as `open_control`."""
    network = find_control(name)
    if not network.place.is_dir():
        shapes = read_header(network.place).shapes.values()
        return ControlOutline(None, sum(math.prod(shape) for shape in shapes))
    kind, location, part = _class_of(model, require_controlled_family(model).control_classes, network)
    lora = network.place / LORA_WEIGHTS
    beside = read_header(lora).shapes if lora.exists() else {}
    spec = diffusers_spec(kind, location, part, model.dtype)
    return ControlOutline(spec, sum(math.prod(shape) for shape in beside.values()))


def name_networks(model: Backbone, asked: Sequence[AskedControl]) -> list[tuple[str, str]]:
    """The kind of each map and its network: the one that was named, or the model's own.

    Raises `UserError` where there is none, and for a kind that it does not read.
    """
    if not asked:
        return []
    require_controlled_family(model)
    named = [one.network or _find_embedded(model, one.map.kind) for one in asked]
    known = (_settle_kind(one, find_control(name)) for one, name in zip(asked, named, strict=True))
    return [(one.map.kind, name) for one, name in zip(known, named, strict=True)]


def _load(model: Backbone, family: ControlledFamily, found: FoundControl, dtype: torch.dtype) -> nn.Module:
    """The network in a folder, if it is of one of the family's classes, or in a file, if its UNet's files are read."""
    with progress(None, f"loading {found.name}", brief=True):
        if found.place.is_dir():
            network = _load_folder(model, family.control_classes, found, dtype)
        elif isinstance(family, FilesFamily):
            network = family.load_control_file(read_header(found.place), model.denoiser, dtype)
        else:
            raise UserError(
                f"{found.name} is one file, and control networks of {model.family.name} are read from diffusers "
                "folders. Name the folder or hub id."
            )
    network = network.eval().requires_grad_(False).to(model.device)
    return cast(nn.Module, cast(Any, network).to(memory_format=torch.channels_last))  # as the denoiser's


def _load_folder(
    model: Backbone, classes: Sequence[Any], found: FoundControl, dtype: torch.dtype
) -> nn.Module:
    kind, location, part = _class_of(model, classes, found)
    network: nn.Module = load_network(kind, location, part, dtype)
    if (found.place / LORA_WEIGHTS).exists():
        network.add_module("lora", read_row_lora(found.place / LORA_WEIGHTS, model.denoiser).to(dtype))
    return network


def _class_of(model: Backbone, classes: Sequence[Any], found: FoundControl) -> tuple[Any, Location, str]:
    """The class of a folder's network, and where its config lies; `UserError` for one that is not among `classes`."""
    location = Location(found.name, str(found.place.parent), {})
    part = found.place.name
    said = location.config(part).get("_class_name", "")
    kind = next((one for one in classes if one.__name__ == said), None)
    if kind is None:
        raise UserError(
            f"{found.name} is a {said or 'network of unknown kind'}, and {model.location.name} is controlled by "
            f"{' or '.join(one.__name__ for one in classes)}. Name one of these."
        )
    return kind, location, part
