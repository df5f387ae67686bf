"""A run's loss on unseen true pictures of its subject, which a rendered world provides.

    python -m benchmarks.judges.unseen peacock runs/peacock-a runs/peacock-b            10 seconds a run on one core

The world renders the concept's glyph in the seven places that its training images leave out, wearing each accessory
and in each style; and, to show what a run has not learned, the training images themselves (*learned*), with the object
three pixels away in the same place (*moved*), eight pixels, which is one latent (*moved by a latent*), and exactly
where it was in another place (*elsewhere*). The denoising loss on these is measured with the token in the prompt: with
the same noise for every run, and without drawing anything, so that two ways to train are told apart by far fewer
images than a classifier needs. *In the object* weights the loss by how much of each latent the glyph covers. The
base's, with the class in place of the token, stands in the first row; `--scale` adds each run at another strength.
Runs must be of one model. Writes `unseen.json` and `unseen.md`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from backbone.adapters.apply import load_concepts
from backbone.adapters.concept import read_concept
from backbone.cli.commands import run_main
from backbone.diffusion.noise import add_noise, generator, target
from backbone.io.console import UserError
from backbone.io.files import write_json, write_text
from backbone.media.transforms import to_tensor
from backbone.models.model import Backbone
from backbone.world.rendering.render import find_font, place_figures, render
from backbone.world.scene import Pose, Scene
from backbone.world.words import Thing, load_vocabulary
from benchmarks.customize.concepts import TOKEN, Kind, make_questions, training_scenes

FIRST_SEED = 1_960_000
SHARES = (0.08, 0.25, 0.4, 0.55, 0.7, 0.85)  # of the levels, from clean to noisy
KINDS = ("place", "accessory", "style", "learned", "moved", "moved by a latent", "elsewhere")
MOVED = {"learned": (0.0,), "moved": (-3.0, 3.0), "moved by a latent": (-8.0, 8.0)}  # pixels to the right
BATCH = 8


@dataclass(frozen=True)
class UnseenPicture:
    """A true picture of a concept: its kind, its prompt with {} for the subject, and the scene."""

    kind: str
    prompt: str
    scene: Scene


@dataclass(frozen=True)
class Loss:
    """The mean squared error of the prediction over the pictures of a kind: everywhere, and in the object."""

    everywhere: float
    in_the_thing: float


def main(
    concept: Annotated[str, typer.Argument(help="One of the world's development concepts.")],
    runs: Annotated[list[Path], typer.Argument(help="Run folders that learned it, of one model.")],
    count: Annotated[int, typer.Option(min=1, help="Pictures in each place.")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    scale: Annotated[
        list[float] | None, typer.Option(help="Measure each run at this LoRA scale too.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the table goes.")] = Path("build/benchmarks/unseen"),
) -> None:
    """Measures the base and every run, and writes the table."""
    classes = load_vocabulary().classes
    if concept not in classes:
        raise UserError(f"There is no concept {concept}. Choose among {', '.join(classes)}.")
    find_font()
    models = {read_concept(run).model for run in runs}
    if len(models) > 1:
        raise UserError(f"These runs are of {' and '.join(sorted(models))}. Compare runs of one model.")
    (model,) = models
    unseen = [*list_true_pictures(concept, count), *list_near_training_images(concept)]
    rows = {"the base": measure(Backbone.open(model, device=device), unseen, classes[concept])}
    for run, strength in product(runs, [1.0, *(scale or [])]):
        backbone = Backbone.open(model, device=device)
        learned = read_concept(run)
        load_concepts(backbone, [learned], scale=strength)
        name = str(run) if strength == 1 else f"{run}, scale {strength:g}"
        rows[name] = measure(backbone, unseen, f"{learned.tokens[TOKEN]} {classes[concept]}")
    facts = {
        name: {kind: (loss.everywhere, loss.in_the_thing) for kind, loss in losses.items()}
        for name, losses in rows.items()
    }
    write_json(
        out / "unseen.json", {"concept": concept, "model": model, "pictures": len(unseen), "rows": facts}
    )
    table = format_markdown(rows)
    write_text(out / "unseen.md", table)
    print(table)


def list_true_pictures(concept: str, count: int) -> list[UnseenPicture]:
    """The concept in each place that it is not learned in, with each accessory, in each style."""
    kinds: tuple[Kind, ...] = ("places", "accessories", "styles")
    questions = {kind: make_questions(kind, "", "{}") for kind in kinds}
    places, thing = questions["places"], Thing(concept)
    unseen = [
        UnseenPicture(
            "place", question.prompt, Scene((thing,), question.expected, seed=FIRST_SEED + 10 * number + k)
        )
        for number in range(count)
        for k, question in enumerate(places)
    ]
    for k, question in enumerate(questions["accessories"]):
        wearing = (Thing(concept, accessory=question.expected),)
        scene = Scene(wearing, places[k].expected, seed=FIRST_SEED + 1000 + k)
        unseen.append(UnseenPicture("accessory", question.prompt, scene))
    for k, question in enumerate(questions["styles"]):
        scene = Scene((thing,), places[k].expected, style=question.expected, seed=FIRST_SEED + 2000 + k)
        unseen.append(UnseenPicture("style", question.prompt, scene))
    return unseen


def list_near_training_images(concept: str) -> list[UnseenPicture]:
    """The training images, and pictures that differ from them in one respect: the thing's position, or the place."""
    pictures = []
    places = [question.expected for question in make_questions("places", "", "{}")]
    for number, scene in enumerate(training_scenes(concept)):
        for kind, ways in MOVED.items():
            for right in ways:
                pictures.append(UnseenPicture(kind, scene.caption(name="{}"), hold_thing(scene, right)))
        for place in (places[number], places[number + 2]):
            moved = replace(hold_thing(scene), place=place)
            pictures.append(UnseenPicture("elsewhere", moved.caption(name="{}"), moved))
    return pictures


def hold_thing(scene: Scene, right: float = 0.0) -> Scene:
    """The scene with its thing held where its seed has it, or this many pixels to the right of there."""
    (figure,) = place_figures(scene, scene.horizon)
    return replace(scene, poses=(Pose(figure.x + right, figure.foot, figure.size, mirrored=figure.mirrored),))


@torch.no_grad()
def measure(model: Backbone, unseen: Sequence[UnseenPicture], phrase: str) -> dict[str, Loss]:
    """The loss of a model on true pictures by kind; `phrase` names the subject in their prompts."""
    renderings = [render(picture.scene) for picture in unseen]
    clean = torch.cat(
        [model.encode(to_tensor(rendering.image)[None]).mean.float() for rendering in renderings]
    )
    masks = torch.stack(
        [torch.from_numpy(np.array(rendering.masks[0], np.float32)) / 255 for rendering in renderings]
    )
    weight = F.adaptive_avg_pool2d(masks[:, None], (clean.shape[-2], clean.shape[-1]))[:, 0]
    text = model.encode_prompts([picture.prompt.format(phrase) for picture in unseen])
    errors = []
    for share in SHARES:
        noise = torch.stack(
            [
                torch.randn(clean.shape[1:], generator=generator("unseen", str(share), k))
                for k in range(len(clean))
            ]
        ).to(clean)
        index = torch.full((len(clean),), int(share * len(model.path.levels)))
        for rows in torch.arange(len(clean)).split(BATCH):
            level = model.path.levels[index[rows]]
            noisy = add_noise(clean[rows], noise[rows], level)
            predicted = model.predict(noisy, index[rows], text[rows])
            targets = target(clean[rows], noise[rows], level, model.path.prediction_type)
            errors.append((predicted - targets).square().mean(1).cpu())
    error = torch.cat(errors).unflatten(0, (len(SHARES), len(clean))).mean(0)
    kinds = [picture.kind for picture in unseen]
    return {
        kind: mean_loss(error, weight, [kind == other for other in kinds]) for kind in KINDS if kind in kinds
    }


def mean_loss(error: Tensor, weight: Tensor, mask: Sequence[bool]) -> Loss:
    """The mean of errors [B, H, W] over the pictures of `mask` [B], everywhere and weighted [B, H, W] in each."""
    rows = torch.tensor(mask)
    inside = (error * weight).sum((1, 2)) / weight.sum((1, 2)).clamp(min=1e-6)
    return Loss(float(error[rows].mean()), float(inside[rows].mean()))


def format_markdown(rows: dict[str, dict[str, Loss]]) -> str:
    """A row for the base and for each run: the loss by kind, everywhere and in the object."""
    kinds = list(next(iter(rows.values())))
    lines = [
        f"| | {' | '.join(f'{kind} | in the object' for kind in kinds)} |",
        "|---" * (1 + 2 * len(kinds)) + "|",
    ]
    for name, losses in rows.items():
        values = [
            f"{value:.3f}" for kind in kinds for value in (losses[kind].everywhere, losses[kind].in_the_thing)
        ]
        lines.append(f"| {name} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_main(main)
