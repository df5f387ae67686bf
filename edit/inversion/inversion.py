"""An inversion: an image as a trajectory of latents, from which edits of it begin.

    inversion = invert(model, "photo.png", "a cat in a park")
    inversion.write("cat.safetensors")
    inversion = read_inversion("cat.safetensors", model)

| method            | trajectory                        | an edit's source row          | NFE of S steps               |
|-------------------|-----------------------------------|-------------------------------|------------------------------|
| `direct`          | DDIM inversion                    | the trajectory itself         | S                            |
| `ddim`            | DDIM inversion                    | sampled with guidance         | S                            |
| `null-text`       | DDIM inversion                    | sampled, embeddings optimised | up to S·(2 + iterations + 1) |
| `negative-prompt` | DDIM inversion                    | sampled, guided by itself     | S                            |
| `edit-friendly`   | independent noise at every level  | the trajectory itself         | S                            |
| `renoise`         | implicit inversion (fixed points) | the trajectory itself         | 3·S to (2 + rounds)·S        |
| `reversible`      | a two-step rule                   | the trajectory itself         | S                            |

Overwriting the source row by its stored trajectory equals adding Direct Inversion's offset (Ju et al. 2024,
algorithm 1) at no cost: its unconditional prediction is never needed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from backbone.adapters.concept import Concept
from backbone.cli.keywords import takes
from backbone.cli.values.build import build
from backbone.conditions.conditions import Conditions
from backbone.diffusion.noise import Estimate, Level, Predict, Schedule, generator
from backbone.diffusion.samplers import deterministic_step
from backbone.io.console import UserError
from backbone.io.files import content_hash, read_metadata, read_tensors, write_tensors
from backbone.io.records import parse_json, read_as
from backbone.media.transforms import to_image
from backbone.models.cache import encode_prompts_cached
from backbone.models.clips.motion import find_motion, hash_motion
from backbone.models.fingerprint import Fingerprints
from backbone.models.model import Backbone
from backbone.models.sample import is_guidance_distilled
from edit.checks import check_prompt, refuse_no_inversion, refuse_unopened
from edit.inversion.null_text import optimize_null_texts
from edit.inversion.trajectories import (
    corrected_step,
    corrections,
    invert_ddim,
    invert_implicit,
    invert_two_step,
    noise_independently,
    two_step,
)
from edit.layout import NO_LAYOUT, SOURCE, Layout, WrittenCondition, encode_map, read_layout
from edit.pictures import EncodedImage, ImageLike, encode_image
from edit.sampling import CountNFE, make_noise_schedule, resolve_guidance
from edit.settings import Method

METHODS: tuple[Method, ...] = get_args(Method)
SAMPLED: tuple[Method, ...] = ("ddim", "null-text", "negative-prompt")
FORMAT = "2"


@dataclass(frozen=True, eq=False, repr=False)
class Inversion:
    """An image's trajectory to noise under one model.

    prompt      what the image shows, in the model's words
    schedule    the noise levels [S + 1], noisiest first
    states      [S + 1, C, H, W], of a clip [S + 1, C, F, H, W], noisiest first; float64 for `reversible`, else float32
    image       [3, 8H, 8W] in −1…1, of a clip [F, 3, 8H, 8W], as it was encoded
    identity    of the model with its loaded concepts (`identify`)
    nfe         number of function evaluations: samples that the denoiser evaluated
    noise       the noise map of each ancestral step [S, C, H, W] (`edit-friendly`), else None
    empties     the embeddings of "no prompt" [S, T, D] (`null-text`), else None
    guidance    the scale that `empties` were optimised for
    facts       of the image: name, size, content hash
    layout      control maps under which it was made, and those of its edits
    """

    model: Backbone
    method: Method
    prompt: str
    schedule: Schedule
    states: Tensor
    image: Tensor
    identity: str
    nfe: int
    seed: int = 0
    noise: Tensor | None = None
    empties: Tensor | None = None
    guidance: float | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    layout: Layout = NO_LAYOUT

    @property
    def steps(self) -> int:
        """S."""
        return len(self.schedule) - 1

    @property
    def clean(self) -> Tensor:
        """The image's latent [C, H, W]."""
        return self.states[-1].float()

    @property
    def encoded(self) -> EncodedImage:
        """The image and its latent [1, C, H, W], as an `EncodedImage`."""
        return EncodedImage(self.image, self.clean[None], self.facts)

    @property
    def overwrites(self) -> bool:
        """Whether an edit's source row is the stored trajectory; if not, it is sampled like the targets."""
        return self.method not in SAMPLED

    def start(self, strength: float) -> int:
        """The step at which an edit of this strength begins: 0 at `strength` 1, S at 0."""
        first = self.steps - int(self.steps * strength + 1e-9)
        return max(first, 1) if self.method == "reversible" else first

    def step(self, number: int, previous: Tensor | None, noisy: Tensor, estimate: Estimate) -> Tensor:
        """The next states [B, C, H, W] from `noisy`; `reversible` also needs `previous`, those of one step before."""
        level, next_level = self.schedule[number], self.schedule[number + 1]
        if self.method == "reversible":
            assert previous is not None
            return two_step(previous, noisy, estimate, self.schedule[number - 1], level, next_level)
        if self.noise is not None:
            return corrected_step(noisy, estimate, level, next_level, self.noise[number].expand_as(noisy))
        return deterministic_step(noisy, estimate, level, next_level)

    def step_targets(self, number: int, noisy: Tensor, estimate: Estimate) -> Tensor:
        """An edit's states [B, C, H, W] after a step.

        Targets of `reversible` take DDIM steps: the two-step rule has no damping, so changes by guidance would
        oscillate with growing amplitude.
        """
        if self.method == "reversible":
            return deterministic_step(noisy, estimate, self.schedule[number], self.schedule[number + 1])
        return self.step(number, None, noisy, estimate)

    def unconditional(self, number: int, default: Conditions) -> Conditions:
        """The encoded "no prompt" [1, ...] of a step."""
        if self.empties is None:
            return default
        return dataclasses.replace(default, text={**default.text, "hidden": self.empties[number][None]})

    def write(self, path: str | Path) -> None:
        """Write everything into one safetensors file; `UserError` unless `path` is a path."""
        if not isinstance(path, (str, Path)):
            raise UserError(f"{type(path).__name__} is no path. Name the file to write, as cat.safetensors.")
        tensors = {
            "states": self.states,
            "image": _to_bytes(self.image),
            "a": self.schedule.a,
            "b": self.schedule.b,
        }
        optional = {"time": self.schedule.time, "noise": self.noise, "empties": self.empties}
        tensors |= {name: value for name, value in optional.items() if value is not None}
        fields = {name: getattr(self, name) for name in WRITTEN} | {"facts": dict(self.facts)}
        conditions = self.layout.of_side(SOURCE)
        if conditions:
            fields["conditions"] = [condition.facts for condition in conditions]
            tensors |= {f"map_{number}": encode_map(condition) for number, condition in enumerate(conditions)}
        metadata = {"limner_inversion": FORMAT, "fields": json.dumps(fields)}
        write_tensors(path, tensors, {**metadata, "model": self.model.location.name})

    def __repr__(self) -> str:
        name = self.facts.get("name") or "an image"
        return f"Inversion({name}, {self.prompt!r}, {self.method}, {self.steps} steps, NFE {self.nfe})"


@dataclass(frozen=True)
class WrittenFields:
    """The metadata of an inversion's file."""

    method: Method
    prompt: str
    identity: str
    nfe: int
    seed: int = 0
    guidance: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    conditions: list[WrittenCondition] = field(default_factory=list)


WRITTEN = ("method", "prompt", "identity", "nfe", "seed", "guidance")


@dataclass(frozen=True, kw_only=True)
class InversionSettings:
    """How an image is inverted.

    guidance    null-text: the guidance scale that its embeddings are optimised for; None: the model's default
    seed        edit-friendly: of its noise
    iterations  null-text: iterations of Adam at each step
    """

    method: Method = "direct"
    steps: int = 50
    guidance: float | None = None
    seed: int = 0
    iterations: int = 10


USED_BY: dict[str, Method] = {"guidance": "null-text", "iterations": "null-text", "seed": "edit-friendly"}


def select_settings(method: Method, **settings: Any) -> dict[str, Any]:
    """The settings that the inversion method uses."""
    return {name: value for name, value in settings.items() if USED_BY.get(name, method) == method}


@takes(InversionSettings)
def invert(
    model: Backbone,
    image: ImageLike | EncodedImage,
    prompt: str,
    *,
    identity: str | None = None,
    layout: Layout = NO_LAYOUT,
    progress: Callable[[], Any] = lambda: None,
    **settings: Any,
) -> Inversion:
    """Invert an image, or an encoded clip, that shows what the prompt says (in the model's words).

    `settings` are the fields of `InversionSettings`, by name. `identity` is that of the model with the concepts that
    were loaded into it (`identify`); without any it is the model's own. The image keeps its shape, up to 2 : 1, at
    about the model's own number of pixels. `layout` holds the control maps under which it is inverted and edited.
    `progress` is called as often as `count_rounds` says: for each prediction of the inversion, and each step
    of null-text's optimisation.

    Raises `UserError` for an image that cannot be read, an empty prompt, an unknown method or number of steps, a
    setting that the method does not use, and for null-text without guidance.
    """
    # What this method and this model can do
    options = build(InversionSettings, settings)
    refuse_unopened(model)
    check_method(model, options.method, options.steps)
    for name, method in USED_BY.items():
        if settings.get(name) is not None and options.method != method:
            raise UserError(
                f"{name} is a setting of the method {method} alone, and this one is {options.method}. Leave {name} out."
            )
    if options.method == "null-text" and resolve_guidance(model, options.guidance) == 1:
        raise UserError(
            "At guidance 1 nothing is predicted without a prompt, which null-text would optimise. Raise --guidance, or "
            "choose --method direct."
        )
    check_prompt(prompt, "source prompt")

    # x0 as the autoencoder's mean, and the prediction under the source prompt at guidance 1
    encoded = image if isinstance(image, EncodedImage) else encode_image(model, image)
    schedule = make_noise_schedule(model, options.steps, encoded.latent)
    text = layout.attach(encode_prompts_cached(model, [prompt]), schedule, [SOURCE])
    predict = CountNFE(model.predictor(text), progress)
    with torch.no_grad():
        states, noise = _invert_by(options.method, encoded.latent, predict, schedule, options.seed)

    # Null-text optimises an embedding of "no prompt" for each step, on top of DDIM inversion
    nfe, made_for, empties = predict.nfe, None, None
    if options.method == "null-text":
        made_for = resolve_guidance(model, options.guidance)
        empty = layout.attach(encode_prompts_cached(model, [""]), schedule, [SOURCE], unprompted=[0])
        empties, calls = optimize_null_texts(
            model,
            states,
            schedule,
            conditional=predict,
            empty=empty,
            guidance=made_for,
            iterations=options.iterations,
        )
        nfe += calls
    return Inversion(
        model=model, method=options.method, prompt=prompt, schedule=schedule, states=states[:, 0],
        image=encoded.pixels, identity=identity or identify(model), nfe=nfe, seed=options.seed, noise=noise,
        empties=empties, guidance=made_for, facts=encoded.facts, layout=layout,
    )  # fmt: skip


def check_method(model: Backbone, method: Method, steps: int) -> None:
    """`UserError` for an unknown method or number of steps, or one that the model cannot do."""
    if method not in METHODS:
        raise UserError(f"There is no inversion called {method}. Choose one of {', '.join(METHODS)}.")
    least = 3 if method == "reversible" else 2  # the two-step rule starts from two states
    if 0 < steps < least:
        raise UserError(
            f"{steps} {'step is' if steps == 1 else 'steps are'} too few to invert an image by {method}. Take at least "
            f"{least}, better 20."
        )
    if method == "null-text" and is_guidance_distilled(model):
        raise UserError(
            f"{model.location.name} is guidance-distilled and has no prediction without a prompt, which "
            "null-text would optimise. Choose --method direct."
        )


def _invert_by(
    method: Method, clean: Tensor, predict: Predict, schedule: Schedule, seed: int
) -> tuple[Tensor, Tensor | None]:
    """The trajectory [S + 1, 1, ...] from a clean latent, and with edit-friendly inversion its noise [S, ...]."""
    match method:
        case "edit-friendly":
            states = noise_independently(clean, schedule, generator=generator(seed, "edit-friendly"))
            return states, corrections(states, predict, schedule)[:, 0]
        case "renoise":
            return invert_implicit(clean, predict, schedule), None
        case "reversible":
            return invert_two_step(clean.double(), predict, schedule), None
        case _:
            return invert_ddim(clean, predict, schedule), None


def count_rounds(method: Method, steps: int) -> int | None:
    """How often `invert` calls `progress`; None where that depends on the image."""
    return {"renoise": None, "null-text": 2 * steps}.get(method, steps)


@torch.no_grad()
def reconstruct(inversion: Inversion, *, guidance: float = 1.0) -> Tensor:
    """Sample from the noisiest state without the stored trajectory; returns the latent [C, H, W] at the end.

    Its error at guidance 1 is the inversion's; at higher guidance, guidance adds to it.
    """
    refuse_no_inversion(inversion)
    model, schedule = inversion.model, inversion.schedule
    text, empty = (encode_prompts_cached(model, [prompt]) for prompt in (inversion.prompt, ""))
    text = inversion.layout.attach(text, schedule, [SOURCE])
    if inversion.method == "negative-prompt":
        guidance = 1.0  # with its own prompt as the negative one, guidance has no effect
    first = inversion.start(1.0)
    previous = inversion.states[first - 1][None] if first > 0 else None
    noisy = inversion.states[first][None]
    for number in range(first, inversion.steps):
        predict = model.guided_predictor(text, inversion.unconditional(number, empty), guidance)
        previous, noisy = noisy, inversion.step(number, previous, noisy, predict(noisy, schedule[number]))
    return noisy[0]


def read_inversion(
    path: str | Path, model: Backbone, *, accepted: Sequence[str] = (), of_clip: bool = False
) -> Inversion:
    """Read the inversion of an image, or with `of_clip` of a clip, from its file.

    `accepted` are the `identities` of the model with its concepts; if left out, those of the model alone.

    Raises `UserError` for another kind of file, or an inversion with another model or other concepts.
    """
    refuse_unopened(model)
    if not isinstance(path, (str, Path)):
        raise UserError(f"{type(path).__name__} is no path of an inversion. Give the path, then the model.")
    tensors, metadata = read_tensors(path)
    fields = _read_fields(path, metadata)
    if "states" in tensors and (tensors["states"].ndim == 5) != of_clip:
        kind, command = ("an image", "invert-and-replace") if of_clip else ("a clip", "clip")
        raise UserError(f"{path} is the inversion of {kind}. Edit it with edit {command}.")

    # An inversion is valid only for the weights that it was made with
    accepted = accepted or identities(model)
    if fields["identity"] not in accepted:
        raise UserError(
            f"{path} was made with {metadata['model']}, other weights, concepts or another scale than are given "
            f"now. Give the --model, --concept{', --motion' * of_clip} and --scale that it was made with, or invert "
            f"the {'clip' if of_clip else 'image'} again."
        )
    fields["identity"] = accepted[0]
    _check_tensors(path, tensors, model)

    # Tensors to the model's device; the image was stored in 8 bits
    schedule = Level(tensors["a"], tensors["b"], tensors.get("time"))
    on_device: dict[str, Any] = {
        name: tensors[name].to(model.device) for name in ("states", "noise", "empties") if name in tensors
    }
    image = tensors["image"].float().div(127.5).sub(1)
    layout = read_layout(model, fields.pop("conditions"), tensors, path)
    return Inversion(model=model, schedule=schedule, image=image, layout=layout, **on_device, **fields)


def read_source_prompt(path: str | Path) -> str:
    """The prompt of an inversion's file, from its header alone; `UserError` for another kind of file."""
    return str(_read_fields(path, read_metadata(path))["prompt"])


def identify(model: Backbone, concepts: Sequence[Concept] = (), *, scale: float = 1.0) -> str:
    """A fingerprint of a model with concepts loaded at a `scale`, from the contents of their files.

    It includes the weights of an attached motion adapter.
    """
    return identities(model, concepts, scale=scale)[0]


def identities(model: Backbone, concepts: Sequence[Concept] = (), *, scale: float = 1.0) -> Fingerprints:
    """The fingerprint of `identify`, followed by its forms in older records."""
    parts = []
    if find_motion(model.denoiser) is not None:
        parts.append(hash_motion(model.denoiser))
    if concepts and scale != 1:
        parts.append(f"scale {scale:g}")
    parts += [content_hash(path) for concept in concepts for path in concept.files]

    def identity(number: int) -> str:
        return content_hash("\n".join([model.fingerprints[number], *parts]).encode())

    return Fingerprints(identity(0), partial(identity, 1))


def _read_fields(path: str | Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if metadata.get("limner_inversion") != FORMAT:
        raise UserError(
            f"{path} is no inversion that this version reads. Update Limner, or make one: edit invert."
        )
    text = parse_json(metadata.get("fields", "null"), path)
    return dataclasses.asdict(read_as(WrittenFields, text, path))


def _check_tensors(path: str | Path, tensors: Mapping[str, Tensor], model: Backbone) -> None:
    """Raise `UserError` unless an inversion's tensors are complete, fit each other and the model, and are finite."""
    if missing := sorted({"states", "image", "a", "b"} - set(tensors)):
        raise UserError(f"{path} is damaged: it holds no {missing[0]}. Make it again with `edit invert`.")
    levels, latent = len(tensors["a"].flatten()), tuple(tensors["states"].shape[1:])
    shapes = {
        "a": (levels,), "b": (levels,), "time": (levels,), "states": (levels, *latent),
        "noise": (levels - 1, *latent),
        "image": (*latent[1:-2], 3, *(side * model.factor for side in latent[-2:])),
    }  # fmt: skip
    for name, tensor in tensors.items():
        if name in shapes and (
            tuple(tensor.shape) != shapes[name] or len(latent) not in (3, 4) or levels < 2
        ):
            raise UserError(
                f"{path} is damaged: {name} is {tuple(tensor.shape)}. Make it again with `edit invert`."
            )
        if name in shapes and name != "time" and tensor.is_floating_point() == (name == "image"):
            raise UserError(
                f"{path} is damaged: {name} has the type {tensor.dtype}. Make it again with `edit invert`."
            )
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{path} is damaged: {name} is not finite. Make it again with `edit invert`.")


def _to_bytes(image: Tensor) -> Tensor:
    """[3, H, W], or of a clip [F, 3, H, W], in −1…1 as uint8."""
    import numpy as np

    if image.ndim == 4:
        return torch.stack([_to_bytes(frame) for frame in image])
    return torch.from_numpy(np.array(to_image(image))).permute(2, 0, 1).contiguous()
