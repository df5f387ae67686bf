"""An inversion: a picture as a trajectory of latents, from which edits of it begin.

    inversion = invert(model, "photo.png", "a cat in a park")
    inversion.write("cat.safetensors")
    inversion = read_inversion("cat.safetensors", model)

| method            | trajectory           | an edit's source row         | evaluations of S steps       |
|-------------------|----------------------|------------------------------|------------------------------|
| `direct`          | DDIM inversion       | the trajectory itself        | S                            |
| `ddim`            | DDIM inversion       | walked with guidance         | S                            |
| `null-text`       | DDIM inversion       | walked, embeddings optimised | up to S·(2 + iterations + 1) |
| `negative-prompt` | DDIM inversion       | walked, guided by itself     | S                            |
| `edit-friendly`   | fresh noise, rungwise | the trajectory itself       | S                            |
| `renoise`         | fixed points         | the trajectory itself        | 3·S to (2 + rounds)·S        |
| `reversible`      | a two-step rule      | the trajectory itself        | S                            |

Overwriting the source row by its stored trajectory equals adding Direct Inversion's offset (Ju et al. 2024,
algorithm 1) at no cost: its unconditional prediction is never needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from PIL import Image
from torch import Tensor

from backbone.adapters.concept import Concept
from backbone.diffusion.noise import Estimate, Level, Predict, Schedule, generator
from backbone.diffusion.samplers import deterministic_step
from backbone.families.base import Text
from backbone.io.console import UserError
from backbone.io.files import content_hash, read_tensors, write_tensors
from backbone.media.transforms import to_image, to_tensor
from backbone.models.cache import encode_prompts_cached
from backbone.models.model import Backbone
from edit.inversion.null_text import null_texts
from edit.inversion.trajectories import (
    corrected_step,
    corrections,
    independent,
    inverted,
    leap,
    leapt,
    renoised,
)
from edit.pictures import prepared

Method = Literal["direct", "ddim", "null-text", "negative-prompt", "edit-friendly", "renoise", "reversible"]
METHODS: tuple[Method, ...] = get_args(Method)
WALKED: tuple[Method, ...] = ("ddim", "null-text", "negative-prompt")
FORMAT = "1"


@dataclass(frozen=True, eq=False)
class Inversion:
    """A picture's way to noise under one model.

    prompt      what the model was told that the picture shows, in its own words
    states      [S + 1, C, H, W], noisiest first; float64 for `reversible`, else float32
    picture     [3, 8H, 8W] in −1…1, as the autoencoder was shown it
    noise       what each ancestral step lacks [S, C, H, W] (`edit-friendly`), else None
    empties     the embeddings of "no prompt" [S, T, D] (`null-text`), else None
    guidance    what `empties` were optimised for
    identity    of the model with the concepts that it wore
    facts       of the picture that it came from: name, size, content hash
    """

    model: Backbone
    method: Method
    prompt: str
    schedule: Schedule
    states: Tensor
    picture: Tensor
    identity: str
    evaluations: int
    seed: int = 0
    noise: Tensor | None = None
    empties: Tensor | None = None
    guidance: float | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """S."""
        return len(self.schedule) - 1

    @property
    def clean(self) -> Tensor:
        """The picture's latent [C, H, W]."""
        return self.states[-1].float()

    @property
    def overwrites(self) -> bool:
        """Whether an edit's source row is the stored trajectory; elsewhere it is walked like the targets."""
        return self.method not in WALKED

    def start(self, strength: float) -> int:
        """The rung at which an edit of this strength begins: 0 of `strength` 1, S of 0."""
        first = self.steps - int(self.steps * strength + 1e-9)
        return max(first, 1) if self.method == "reversible" else first

    def step(self, number: int, before: Tensor | None, now: Tensor, estimate: Estimate) -> Tensor:
        """The states [B, C, H, W] at rung `number + 1`, from those at `number` and, for `reversible`, those before."""
        here, there = self.schedule[number], self.schedule[number + 1]
        if self.method == "reversible":
            assert before is not None
            return leap(before, now, estimate, self.schedule[number - 1], here, there)
        if self.noise is not None:
            return corrected_step(now, estimate, here, there, self.noise[number].expand_as(now))
        return deterministic_step(now, estimate, here, there)

    def step_of_targets(self, number: int, now: Tensor, estimate: Estimate) -> Tensor:
        """An edit's states [B, C, H, W] at rung `number + 1`.

        Targets of `reversible` go by DDIM's rule: the two-step rule damps nothing, so what guidance changes would swing
        ever wider from step to step.
        """
        if self.method == "reversible":
            return deterministic_step(now, estimate, self.schedule[number], self.schedule[number + 1])
        return self.step(number, None, now, estimate)

    def empty(self, number: int, usual: Text) -> Text:
        """What stands for "no prompt" at a step [1, ...]."""
        if self.empties is None:
            return usual
        return {**usual, "hidden": self.empties[number][None]}

    def write(self, path: str | Path) -> None:
        """Writes everything into one safetensors file."""
        tensors = {
            "states": self.states,
            "picture": to_bytes(self.picture),
            "a": self.schedule.a,
            "b": self.schedule.b,
        }
        optional = {"time": self.schedule.time, "noise": self.noise, "empties": self.empties}
        tensors |= {name: value for name, value in optional.items() if value is not None}
        said = {name: getattr(self, name) for name in SAID}
        metadata = {"limner_inversion": FORMAT, "said": json.dumps({**said, "facts": dict(self.facts)})}
        write_tensors(path, tensors, {**metadata, "model": self.model.location.name})


SAID = ("method", "prompt", "identity", "evaluations", "seed", "guidance")


def invert(
    model: Backbone,
    image: Image.Image | str | Path,
    prompt: str,
    *,
    method: Method = "direct",
    steps: int = 50,
    guidance: float | None = None,
    seed: int = 0,
    iterations: int = 10,
    concepts: Sequence[Concept] = (),
    scale: float = 1.0,
) -> Inversion:
    """Inverts a picture that shows what the prompt says (in the model's words).

    `guidance` and `iterations` (Adam's, a step) are for null-text alone, `seed` for edit-friendly alone; `concepts`
    are those that the model wears. The picture keeps its shape, up to 2 : 1, at about the model's own number of pixels.

    Raises `UserError` for a picture that cannot be read, an empty prompt, or a method or number of steps that is not.
    """
    if method not in METHODS:
        raise UserError(f"There is no inversion called {method}. Choose one of {', '.join(METHODS)}.")
    if not prompt.strip():
        raise UserError("The source prompt is empty. Say in words what the picture shows.")
    if method == "null-text" and is_told(model):
        raise UserError(
            f"{model.location.name} is told its guidance and has no prediction without a prompt, which null-text would "
            "optimise. Choose --method direct."
        )
    guidance = float(model.defaults["guidance"]) if guidance is None else guidance
    shown, facts = prepared(model, image)
    schedule = ladder_of(model, steps, shown)
    picture = to_tensor(shown)
    clean = model.encode(picture[None]).mean
    text = encode_prompts_cached(model, [prompt])
    predict = Counted(model.predictor(text))
    noise = empties = None
    with torch.no_grad():
        match method:
            case "edit-friendly":
                states = independent(clean, schedule, generator=generator(seed, "edit-friendly"))
                noise = corrections(states, predict, schedule)[:, 0]
            case "renoise":
                states = renoised(clean, predict, schedule)
            case "reversible":
                states = leapt(clean.double(), predict, schedule)
            case _:
                states = inverted(clean, predict, schedule)
    asked = predict.rows
    if method == "null-text":
        empties, more = null_texts(
            model,
            states,
            schedule,
            conditional=predict,
            empty=encode_prompts_cached(model, [""]),
            guidance=guidance,
            iterations=iterations,
        )
        asked += more
    return Inversion(
        model=model,
        method=method,
        prompt=prompt,
        schedule=schedule,
        states=states[:, 0],
        picture=to_tensor(shown),
        identity=identity(model, concepts, scale=scale),
        evaluations=asked,
        seed=seed,
        noise=noise,
        empties=empties,
        guidance=guidance if method == "null-text" else None,
        facts=facts,
    )


@torch.no_grad()
def replayed(inversion: Inversion, *, guidance: float = 1.0) -> Tensor:
    """The latent [C, H, W] where a walk down from the noisiest state arrives, nothing overwritten.

    At guidance 1 this is what the method's exactness means; above it, how much guidance drives it off.
    """
    model, schedule = inversion.model, inversion.schedule
    text, empty = (encode_prompts_cached(model, [prompt]) for prompt in (inversion.prompt, ""))
    if inversion.method == "negative-prompt":
        guidance = 1.0  # guided by its own prompt it is not guided
    first = inversion.start(1.0)
    before, now = (inversion.states[rung][None] if rung >= 0 else None for rung in (first - 1, first))
    assert now is not None
    for number in range(first, inversion.steps):
        predict = model.guided_predictor(text, inversion.empty(number, empty), guidance)
        before, now = now, inversion.step(number, before, now, predict(now, schedule[number]))
    return now[0]


def read_inversion(
    path: str | Path, model: Backbone, *, concepts: Sequence[Concept] = (), scale: float = 1.0
) -> Inversion:
    """An inversion from its file; `UserError` for another kind of file, or one of another model or other concepts."""
    tensors, metadata = read_tensors(path)
    if metadata.get("limner_inversion") != FORMAT:
        raise UserError(f"{path} is no inversion that this version reads. Make one with `edit invert`.")
    said = json.loads(metadata["said"])
    if said["identity"] != identity(model, concepts, scale=scale):
        raise UserError(
            f"{path} was made with {metadata['model']}, other weights, concepts or another scale than are given "
            "now. Give the --model, --concept and --scale that it was made with, or invert the picture again."
        )
    schedule = Level(tensors["a"], tensors["b"], tensors.get("time"))
    on: dict[str, Any] = {
        name: tensors[name].to(model.device) for name in ("states", "noise", "empties") if name in tensors
    }
    picture = tensors["picture"].float().div(127.5).sub(1)
    return Inversion(model=model, schedule=schedule.to(model.device), picture=picture, **on, **said)


def prompt_of(metadata: Mapping[str, str]) -> str:
    """The prompt of an inversion's file, from its metadata; `UserError` for another kind of file."""
    if metadata.get("limner_inversion") != FORMAT:
        raise UserError("This is no inversion that this version reads. Make one with `edit invert`.")
    return str(json.loads(metadata["said"])["prompt"])


# Helpers ----------------------------------------------------------------------------------------------------


class Counted:
    """A `Predict` that counts the samples that the denoiser was asked about."""

    def __init__(self, predict: Predict) -> None:
        self.predict = predict
        self.rows = 0

    def __call__(self, noisy: Tensor, level: Level) -> Estimate:
        self.rows += len(noisy)
        return self.predict(noisy, level)


def ladder_of(model: Backbone, steps: int, picture: Image.Image | None = None) -> Schedule:
    """The model's ladder of S steps for a picture; `UserError` for a number of steps that it does not have."""
    size = None if picture is None else (picture.height // model.factor, picture.width // model.factor)
    try:
        return model.schedule(steps, size=size)
    except ValueError as error:
        raise UserError(f"{model.location.name} cannot be walked in {steps} steps: {error}") from error


def rows_of(model: Backbone, text: Text, guidance: float) -> int:
    """How many samples the denoiser is asked about for one guided prediction: two, or one where one is enough."""
    return (
        1 if guidance == 1 or model.family.embed_guidance(model.denoiser, text, guidance) is not None else 2
    )


def told(model: Backbone, text: Text, source_guidance: float, guidance: float) -> Text | None:
    """The prompts, the source's first, each with its guidance, for a network that is told it; None for all others."""
    halves = []
    for rows, strength in ((slice(0, 1), source_guidance), (slice(1, None), guidance)):
        some = {name: value[rows] for name, value in text.items()}
        one = model.family.embed_guidance(model.denoiser, some, strength)
        if one is None:
            return None
        halves.append(one)
    return {name: torch.cat([half[name] for half in halves]) for name in halves[0]}


def is_told(model: Backbone) -> bool:
    """Whether the network is told its guidance, and so never asked without the prompt."""
    return model.family.embed_guidance(model.denoiser, encode_prompts_cached(model, [""]), 1.0) is not None


def refuse_negative(model: Backbone, negative: str) -> None:
    """`UserError` for a negative prompt where the network is asked once, with the prompt alone."""
    if negative and is_told(model):
        raise UserError(
            f"{model.location.name} is asked with the prompt alone, so it cannot stay away from “{negative}”. "
            "Leave --negative out."
        )


def identity(model: Backbone, concepts: Sequence[Concept] = (), *, scale: float = 1.0) -> str:
    """Tells a model wearing concepts, `scale` times as strong, from all others, from the contents of the files."""
    parts = [model.fingerprint]
    if concepts and scale != 1:
        parts.append(f"scale {scale:g}")
    for concept in concepts:
        for name in (concept.weights, concept.words, concept.changed):
            if name:
                parts.append(content_hash(concept.folder / name))
    return content_hash("\n".join(parts).encode())


def to_bytes(picture: Tensor) -> Tensor:
    """[3, H, W] in −1…1 as uint8."""
    import numpy as np

    return torch.from_numpy(np.array(to_image(picture))).permute(2, 0, 1).contiguous()
