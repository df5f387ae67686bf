"""The classifier of `moji`'s benchmarks: a small ResNet naming things, place, colour, accessory, style, number.

    python -m recipes.moji.classifier --steps 10000     on one core 1 h 30 min, after some minutes of preparation

Its scenes are its own (seeds 400,000 to 999,999), drawn with more colours, accessories and styles than the model's;
their glyphs are the nouns, the development concepts and the demo's, and no other. No text is involved. Some
pictures also come as the autoencoder decodes them from slightly noisy latents, since it will classify such
pictures. Continues from its last checkpoint; writes the EMA weights and, beside them, labels and accuracies on
held-out scenes, plain and decoded.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from backbone.cli.command_line import settled_command
from backbone.cli.commands import script_app
from backbone.cli.options import Option
from backbone.io.console import run_app
from backbone.io.files import content_hash, write_json, write_tensors
from backbone.training.loop import Average
from backbone.training.optimizer import warm_cosine
from backbone.world.edits import GREY_STYLES
from backbone.world.rendering.textures import Pixels
from backbone.world.scene import BENCHMARK_SEEDS, Scene, is_fair, sample_scene
from backbone.world.words import Thing, load_vocabulary
from benchmarks.judges.classifier import (
    FACTS,
    NONE,
    ONE,
    TWO_DIFFERENT,
    TWO_OF_A_KIND,
    WEIGHTS,
    Classifier,
    Network,
    Prediction,
    list_labels,
    load_classifier,
    most_likely,
)
from recipes.moji.autoencoder import precision, to_tensor
from recipes.moji.data.rendered import (
    AUTOENCODER,
    decode_round_trips,
    has_autoencoder,
    render_once,
    roughen,
    shift,
)
from recipes.moji.training.muon import Muon
from recipes.moji.training.run import TRAINING, RecipeSettings, Training

FIRST_SEED = 400_000
HELD_OUT = BENCHMARK_SEEDS[100_000:102_000]
SHARD = 2000
LATENT_NOISE = 0.3  # largest deviation of noise on latents, whose own is 1
STYLED = 0.4  # share of scenes without a style that get one
HARD_STYLES = ("a pencil sketch of", "a neon drawing of") * 2
FARTHEST = 6  # pixels of a shift
IMPORTANCE = {
    "glyphs": 1.0,
    "place": 0.5,
    "colour": 0.7,
    "accessory": 0.7,
    "style": 0.3,
    "count": 0.5,
    "size": 0.2,
}
UNKNOWN = -100  # the target that cross-entropy ignores
app = script_app()


@dataclass(frozen=True, kw_only=True)
class ClassifierSettings(RecipeSettings):
    """Settings of the training of the classifier."""

    steps: int = 10_000
    learning_rate: float = 2e-3
    matrix_rate: float = 3e-3
    start: Annotated[Path | None, Option("A finished classifier's folder, to begin from.", TRAINING)] = None
    scenes: Annotated[int, Option("How many scenes to render.", TRAINING, min=1)] = 60_000
    decoded: Annotated[
        int, Option("How many of them also as the autoencoder decodes them.", TRAINING, min=0)
    ] = 12_000
    decoded_share: Annotated[
        float, Option("Share of decoded pictures in a batch.", TRAINING, min=0, max=1)
    ] = 0.3


@settled_command(app, ClassifierSettings)
def main(settings: ClassifierSettings) -> None:
    """Trains, or goes on training, and writes `classifier/` in the work directory."""
    workdir, device = settings.workdir, settings.device
    torch.manual_seed(settings.seed)
    labels = list_labels()
    network = Network({head: len(names) for head, names in labels.items()})
    if settings.start is not None:
        network.load_state_dict(load_classifier(settings.start).network.state_dict())
    network = network.to(device).train()
    parameters = dict(network.named_parameters())
    statistics = {name: value for name, value in network.named_buffers() if value.is_floating_point()}
    weights: dict[str, Tensor] = {**parameters, **statistics}
    inner = {name: value for name, value in parameters.items() if value.ndim == 4 and "stages" in name}
    others = [value for name, value in parameters.items() if name not in inner]
    groups: list[dict[str, Any]] = [
        {"params": others},
        {"params": list(inner.values()), "lr": settings.matrix_rate, "momentum": 0.95},
    ]
    optimizer = Muon(groups, lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.03)
    training = Training(settings, workdir / "classifier.safetensors", weights, optimizer, decay=0.998)
    cases = Cases.prepare(
        workdir,
        settings.scenes,
        decoded=settings.decoded,
        decoded_share=settings.decoded_share,
        device=device,
    )
    held_out = [make_scene(number) for number in HELD_OUT]
    examination = Examination(workdir, held_out, device)

    def losses(step: int) -> Iterator[Tensor]:
        pictures, truth = cases.batch(settings.batch, Random(f"{settings.seed}/{step}/judge"))
        pictures = pictures.to(device).contiguous(memory_format=torch.channels_last)
        with precision(pictures.device):
            logits = network(pictures)
        yield classification_loss(logits, {head: value.to(device) for head, value in truth.items()})

    def write(step: int) -> None:
        export(training.average, workdir, step=step, cases=cases, examination=examination)

    lr_schedule = warm_cosine(settings.steps, warmup=min(150, settings.steps // 5), floor=0.01)
    training.run(losses, lr_schedule, every=500, clip=5.0, on_save=write)
    if training.done >= settings.steps:
        write(training.done)


def classification_loss(logits: dict[str, Tensor], truth: dict[str, Tensor]) -> Tensor:
    """The weighted sum of the heads' cross-entropies; the glyphs' target is the share [B, N] of each."""
    terms = []
    for head, value in logits.items():
        target = truth[head]
        loss = F.cross_entropy(value.float(), target, reduction="none")
        mask = 1.0 if target.is_floating_point() else (target != UNKNOWN).float()
        terms.append(IMPORTANCE[head] * (loss * mask).mean())
    return torch.stack(terms).sum()


# Scenes -----------------------------------------------------------------------------------------------------


def make_scene(seed: int, *, styled: float = 0.0) -> Scene:
    """The classifier's scene of a seed, with any of its glyphs.

    A single thing is coloured or dressed more often than for the model. What a benchmark never asks for (a tree in a
    park) stands on white instead. Of scenes without a style the share `styled` gets one, mostly one in which a glyph is
    hard to see.
    """
    words = load_vocabulary()
    scene = sample_scene(seed, nouns=tuple(list_labels()["glyphs"]))
    if len(scene.things) == 1 and not scene.pair:
        random = scene.random("judge")
        (thing,) = scene.things
        if random.random() < 0.3:
            thing = replace(thing, colour=random.choice(tuple(words.colours)))
        if random.random() < 0.3:
            thing = replace(thing, accessory=random.choice(tuple(words.accessories)))
        scene = replace(scene, things=(thing,))
    if scene.style is None and scene.random("judge's style").random() < styled:
        scene = replace(scene, style=scene.random("which style").choice([*words.styles, *HARD_STYLES]))
    return scene if is_fair(scene) else replace(scene, place="on a white background")


def list_true_labels(scene: Scene) -> dict[str, str | frozenset[str] | None]:
    """The right label of every head; for glyphs the set of them; None if a picture cannot show it."""
    thing: Thing = scene.things[0]
    kinds = frozenset(thing.noun for thing in scene.things)
    return {
        "glyphs": kinds,
        "place": scene.place,
        "colour": None if scene.style in GREY_STYLES else thing.colour or NONE,
        "accessory": thing.accessory or NONE,
        "style": scene.style or NONE,
        "count": TWO_OF_A_KIND if scene.pair else TWO_DIFFERENT if len(kinds) == 2 else ONE,
        "size": "small" if thing.small else "usual",
    }


class Cases:
    """Rendered scenes with their labels as numbers; some pictures also decoded."""

    def __init__(
        self,
        scenes: Sequence[Scene],
        shards: Sequence[Pixels],
        decoded: Pixels | None,
        *,
        decoded_share: float,
    ) -> None:
        self.shards, self.decoded = list(shards), decoded
        self.decoded_share = decoded_share if decoded is not None else 0.0
        self.count = len(scenes)
        self.truth = encode_labels(scenes)

    @classmethod
    def prepare(cls, workdir: Path, count: int, *, decoded: int, decoded_share: float, device: str) -> Cases:
        """Renders and decodes what is missing."""
        assert count % SHARD == 0, f"scenes come in shards of {SHARD}"
        scenes = [make_scene(seed, styled=STYLED) for seed in range(FIRST_SEED, FIRST_SEED + count)]
        shards = [
            render_once(workdir, f"judge-styled-{FIRST_SEED + first}", scenes[first : first + SHARD])
            for first in range(0, count, SHARD)
        ]
        decoded_pictures = None
        if decoded and has_autoencoder(workdir):
            first = np.concatenate(shards[: -(-decoded // SHARD)])[:decoded]
            decoded_pictures = decode_round_trips(
                workdir, f"judge-styled-{FIRST_SEED}", first, latent_noise=LATENT_NOISE, device=device
            )
        return cls(scenes, shards, decoded_pictures, decoded_share=decoded_share)

    def batch(self, count: int, random: Random) -> tuple[Tensor, dict[str, Tensor]]:
        """Pictures [B, 3, 128, 128] in −1…1, moved and roughened, and the labels of every head."""
        indices, pictures = [], []
        for _ in range(count):
            if self.decoded is not None and random.random() < self.decoded_share:
                index = random.randrange(len(self.decoded))
                picture = self.decoded[index]
            else:
                index = random.randrange(self.count)
                picture = self.shards[index // SHARD][index % SHARD]
            right, down = random.randint(-FARTHEST, FARTHEST), random.randint(-FARTHEST, FARTHEST)
            pictures.append(shift(picture, right=right, down=down, mirrored=random.random() < 0.5))
            indices.append(index)
        return roughen(to_tensor(np.stack(pictures)), random), {
            head: v[indices] for head, v in self.truth.items()
        }


def encode_labels(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """The labels as tensors: the share of each glyph [B, N], and for the other heads the label's index [B]."""
    labels = list_labels()
    index_of = {head: {name: index for index, name in enumerate(names)} for head, names in labels.items()}
    shares = torch.zeros(len(scenes), len(labels["glyphs"]))
    indices: dict[str, list[int]] = {head: [] for head in labels if head != "glyphs"}
    for row, scene in enumerate(scenes):
        right = list_true_labels(scene)
        kinds = right.pop("glyphs")
        assert isinstance(kinds, frozenset)
        for kind in kinds:
            shares[row, index_of["glyphs"][kind]] = 1 / len(kinds)
        for head, label in right.items():
            indices[head].append(UNKNOWN if label is None else index_of[head][str(label)])
    return {"glyphs": shares, **{head: torch.tensor(values) for head, values in indices.items()}}


# Examination ------------------------------------------------------------------------------------------------


class Examination:
    """Held-out scenes, plain and as the autoencoder decodes them: accuracies of the classifier on both."""

    def __init__(self, workdir: Path, scenes: Sequence[Scene], device: str) -> None:
        self.scenes = list(scenes)
        clean = render_once(workdir, f"judge-{HELD_OUT[0]}", self.scenes)
        self.pictures = {"clean": clean}
        if has_autoencoder(workdir):
            half = np.array(clean[: len(clean) // 2])
            self.pictures["decoded"] = decode_round_trips(
                workdir, f"judge-{HELD_OUT[0]}", half, latent_noise=0.0, device=device
            )

    def __call__(self, classifier: Classifier) -> dict[str, Any]:
        """For each kind of picture: their number, the accuracies, and the pairs of glyphs most often confused."""
        results = {}
        for kind, pictures in self.pictures.items():
            predictions = classifier.classify([Image.fromarray(picture) for picture in pictures])
            results[kind] = {
                "pictures": len(pictures),
                **measure_accuracies(self.scenes[: len(predictions)], predictions),
            }
        return results


def measure_accuracies(scenes: Sequence[Scene], predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Shares of right predictions per head, of glyphs also by number and style, and which glyphs are confused."""
    right: dict[str, list[bool]] = {}
    confused: Counter[tuple[str, str]] = Counter()
    for scene, prediction in zip(scenes, predictions, strict=True):
        expected = list_true_labels(scene)
        kinds = expected.pop("glyphs")
        assert isinstance(kinds, frozenset)
        hit = prediction.two_glyphs == kinds if len(kinds) == 2 else prediction.glyph in kinds
        right.setdefault("glyphs", []).append(hit)
        right.setdefault(f"glyphs, {expected['count']}", []).append(hit)
        right.setdefault(f"glyphs, style {expected['style']}", []).append(hit)
        if len(kinds) == 1 and not hit:
            confused[next(iter(kinds)), prediction.glyph] += 1
        for head, label in expected.items():
            if label is not None:
                right.setdefault(head, []).append(most_likely(getattr(prediction, head)) == label)
        for head in ("colour", "accessory"):
            if expected[head] not in (None, NONE):
                right.setdefault(f"{head}, where there is one", []).append(
                    most_likely(getattr(prediction, head)) == expected[head]
                )
    shares = {name: round(float(np.mean(values)), 4) for name, values in sorted(right.items())}
    pairs = [
        {"is": true, "seen as": predicted, "times": times}
        for (true, predicted), times in confused.most_common(20)
    ]
    return {
        "accuracy": shares,
        "n": {name: len(values) for name, values in sorted(right.items())},
        "confused": pairs,
    }


@torch.no_grad()
def export(average: Average, workdir: Path, *, step: int, cases: Cases, examination: Examination) -> None:
    """Writes the averaged weights (matrices in fp16), and labels and accuracies beside them."""
    folder = workdir / "classifier"
    tensors = {name: value.half() if value.ndim > 1 else value for name, value in average.values.items()}
    write_tensors(folder / WEIGHTS, tensors, {"step": str(step)})
    facts: dict[str, Any] = {
        "labels": list_labels(),
        "step": step,
        "training_seeds": [FIRST_SEED, FIRST_SEED + cases.count - 1],
        "decoded_pictures": 0 if cases.decoded is None else len(cases.decoded),
        "held_out_seeds": [HELD_OUT[0], HELD_OUT[-1]],
    }
    if has_autoencoder(workdir):
        facts["autoencoder"] = content_hash(workdir / AUTOENCODER)
    write_json(folder / FACTS, facts)
    facts["held_out"] = examination(load_classifier(folder))
    write_json(folder / FACTS, facts)
    short = {kind: result["accuracy"] for kind, result in facts["held_out"].items()}
    print(json.dumps({"step": step, **short}), flush=True)


if __name__ == "__main__":
    run_app(app)
