"""The attribute classifier of the benchmarks: a small ResNet that names what an image of `moji`'s world shows.

It is independent of the models that it evaluates: trained by `recipes.moji.classifier` on other scenes than the model
and the scorer, without any text, and with the glyphs of the development concepts, since it must tell whether the right
one appears. Weights and labels lie in `benchmarks/judges/classifier/`; `classifier.json` also holds its own
accuracies, which bound what its predictions are worth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from backbone.io.console import UserError
from backbone.io.files import read_json, read_tensors
from backbone.world.words import load_vocabulary

FOLDER = Path(__file__).with_name("classifier")
WEIGHTS, FACTS = "classifier.safetensors", "classifier.json"
SIDE = 128  # pixels
NONE = "none"
ONE, TWO_OF_A_KIND, TWO_DIFFERENT = "one", "two of a kind", "two different"
Reading = Mapping[str, float]


@dataclass(frozen=True)
class Prediction:
    """Class probabilities of one image: each head's labels with probabilities, most likely first.

    `glyphs` shares its probability among the things that are there: about ½ each for two different ones.
    """

    glyphs: Reading
    place: Reading
    colour: Reading
    accessory: Reading
    style: Reading
    count: Reading
    size: Reading

    @property
    def glyph(self) -> str:
        """The most likely glyph."""
        return most_likely(self.glyphs)

    @property
    def two_glyphs(self) -> frozenset[str]:
        """The two most likely glyphs."""
        return frozenset(list(self.glyphs)[:2])


def most_likely(reading: Reading) -> str:
    """The most likely label of a head."""
    return next(iter(reading))


def is_top_glyph(prediction: Prediction, glyph: str) -> bool:
    """Whether this glyph is the top one among all glyphs, development concepts and the demo's included.

    Raises `UserError` for a glyph that the classifier does not know.
    """
    if glyph not in prediction.glyphs:
        raise UserError(
            f"The classifier does not know {glyph!r}. It knows: {', '.join(sorted(prediction.glyphs))}."
        )
    return prediction.glyph == glyph


@dataclass(frozen=True)
class Classifier:
    """The network and the labels of each head, in the order of its logits."""

    network: Network
    labels: Mapping[str, Sequence[str]]

    @torch.no_grad()
    def classify(self, images: Sequence[Image.Image], *, batch: int = 64) -> list[Prediction]:
        """Classify images; those of another size are scaled to 128 × 128."""
        predictions: list[Prediction] = []
        for first in range(0, len(images), batch):
            logits = self.network(prepare_images(images[first : first + batch]).to(self.network.device))
            shares = {head: value.float().softmax(-1).cpu() for head, value in logits.items()}
            for row in range(len(next(iter(shares.values())))):
                predictions.append(
                    Prediction(
                        **{head: sort_labels(self.labels[head], shares[head][row]) for head in self.labels}
                    )
                )
        return predictions

    @torch.no_grad()
    def features(self, images: Sequence[Image.Image], *, batch: int = 64) -> Tensor:
        """What the heads read [B, 512], for distances between sets of images."""
        groups = (images[first : first + batch] for first in range(0, len(images), batch))
        device = self.network.device
        return torch.cat([self.network.features(prepare_images(group).to(device)).cpu() for group in groups])


def load_classifier(folder: str | Path = FOLDER, *, device: torch.device | str = "cpu") -> Classifier:
    """Load the trained classifier. Raises `UserError` when its files are missing or do not fit together."""
    folder = Path(folder)
    if not (folder / WEIGHTS).is_file() or not (folder / FACTS).is_file():
        raise UserError(
            f"{folder} lacks {WEIGHTS} or {FACTS}. Train the classifier with `python -m recipes.moji.classifier`."
        )
    labels: dict[str, list[str]] = read_json(folder / FACTS)["labels"]
    tensors, _ = read_tensors(folder / WEIGHTS)
    network = Network({head: len(names) for head, names in labels.items()})
    expected = {
        name: value.shape for name, value in network.state_dict().items() if not name.endswith("_tracked")
    }
    if expected != {name: value.shape for name, value in tensors.items()}:
        raise UserError(
            f"{folder / WEIGHTS} does not fit the labels in {FACTS}. Take both from the same training."
        )
    network.load_state_dict({name: value.float() for name, value in tensors.items()}, strict=False)
    network = network.to(device).eval().requires_grad_(False)
    return Classifier(network, labels)


def list_labels() -> dict[str, list[str]]:
    """The labels of every head; the glyphs are the nouns, the development concepts and the demo's."""
    words = load_vocabulary()
    return {
        "glyphs": [*words.nouns, *words.development_concepts, *words.demo_concept],
        "place": list(words.places),
        "colour": [NONE, *words.colours],
        "accessory": [NONE, *words.accessories],
        "style": [NONE, *words.styles],
        "count": [ONE, TWO_OF_A_KIND, TWO_DIFFERENT],
        "size": ["usual", "small"],
    }


def prepare_images(images: Sequence[Image.Image]) -> Tensor:
    """Pictures as float32 [B, 3, 128, 128] in −1…1."""
    squares = [image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC) for image in images]
    batch = torch.from_numpy(np.stack([np.asarray(square, dtype=np.float32) for square in squares]))
    return (batch / 127.5 - 1).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def sort_labels(labels: Sequence[str], shares: Tensor) -> Reading:
    """Labels with their probabilities [N], most likely first."""
    return dict(sorted(zip(labels, shares.tolist(), strict=True), key=lambda pair: -pair[1]))


class Network(nn.Module):
    """A residual network (He et al. 2016) of 2.5 M parameters with a linear head for every kind of label."""

    def __init__(
        self, heads: Mapping[str, int], *, stem: int = 24, widths: Sequence[int] = (48, 96, 192, 256),
        blocks: Sequence[int] = (1, 1, 2, 1),
    ) -> None:  # fmt: skip
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, stem, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(stem), nn.ReLU()
        )
        stages: list[nn.Module] = []
        channels = stem
        for width, count in zip(widths, blocks, strict=True):
            for number in range(count):
                stages.append(Block(channels, width, stride=2 if number == 0 else 1))
                channels = width
        self.stages = nn.Sequential(*stages)
        self.heads = nn.ModuleDict({name: nn.Linear(2 * channels, count) for name, count in heads.items()})

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """Pictures [B, 3, 128, 128] in −1…1 to the logits [B, N] of every head."""
        features = self.features(pictures)
        return {name: head(features) for name, head in self.heads.items()}

    def features(self, pictures: Tensor) -> Tensor:
        """What the heads read [B, 512]: means and maxima of the last stage's maps."""
        maps = self.stages(self.stem(pictures))
        return torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], 1)


class Block(nn.Module):
    """Two 3 × 3 convolutions beside a shortcut."""

    def __init__(self, in_channels: int, width: int, *, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, width, 3, stride=stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, maps: Tensor) -> Tensor:
        inner = F.relu(self.first_norm(self.first(maps)))
        return F.relu(self.second_norm(self.second(inner)) + self.shortcut(maps))
