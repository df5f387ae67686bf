"""The scorer of `moji`: a small CLIP model of its world.

    python -m recipes.moji.data.pictures                the training pictures, once
    python -m recipes.moji.data.tokenizer               the tokenizer, once
    python -m recipes.moji.scorer                  about 40 minutes on one core, after some of preparation

Contrastive training (Radford et al. 2021) on rendered scenes and their captions, worded anew each time. Half of
a batch stands in one place and every picture also meets captions in which one fact is wrong, so that place
and style alone do not win. Captions that say the same thing are right for each other (Yang et al. 2022).
Linear heads that are thrown away afterwards name the things of a picture and of each of its patches: they
teach a small transformer to see in minutes. Inner matrices step by Muon. Only `nouns` occur: the scorer meets
no concept that a benchmark personalises.

Continues from its last checkpoint; writes the EMA weights as a transformers folder in fp16, and prints its
retrieval among 100 captions and its class guesses on held-out scenes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
)
from transformers.utils import logging

from backbone.cli.command_line import settled_command
from backbone.cli.commands import script_app
from backbone.cli.options import Option
from backbone.evaluation.clip import Scorer, embed_classes, load_scorer, rank_classes
from backbone.io.console import run_app
from backbone.io.files import write_json
from backbone.training.loop import Average
from backbone.training.optimizer import warm_cosine
from backbone.world.rendering.render import SIZE, place_figures
from backbone.world.rendering.textures import Pixels
from backbone.world.scene import BENCHMARK_SEEDS, Scene, is_fair, sample_scene
from backbone.world.words import load_vocabulary, paraphrase, write_caption
from recipes.moji.autoencoder import precision, to_tensor
from recipes.moji.data.pictures import SHARD, load
from recipes.moji.data.rendered import decode_round_trips, has_autoencoder, render_once, roughen, shift
from recipes.moji.training.muon import Muon
from recipes.moji.training.run import TRAINING, RecipeSettings, Training

HELD_OUT = 2000  # the last shard of scenes is never trained on, as for the denoiser
LARGEST_SCALE = 4.6052  # ln 100 (Radford et al. 2021, § 2.5)
LATENT_NOISE = 0.3  # largest deviation of noise on latents, whose own is 1
WIDTH = 192  # of the vision tower
WRONG = 3  # captions with a wrong fact for each picture
FARTHEST = 8  # pixels of a shift
TOWERS = ("text_model.", "vision_model.", "text_projection", "visual_projection", "logit_scale")
app = script_app()


@dataclass(frozen=True, kw_only=True)
class ScorerSettings(RecipeSettings):
    """Settings of the training of the scorer."""

    start: Annotated[Path | None, Option("A finished scorer's folder, to begin from.", TRAINING)] = None
    patch: Annotated[
        int, Option("Side of a patch in pixels: 16, or 8 for three times the work.", TRAINING, min=1)
    ] = 16
    decoded: Annotated[
        int, Option("How many pictures also come as the autoencoder decodes them.", TRAINING, min=0)
    ] = 4_000
    help_weight: Annotated[
        float, Option("Weight of the auxiliary heads, which are dropped after training.", TRAINING)
    ] = 0.5


@settled_command(app, ScorerSettings)
def main(settings: ScorerSettings) -> None:
    """Trains, or goes on training, and writes `scorer/` in the work directory."""
    logging.disable_progress_bar()
    workdir, device = settings.workdir, settings.device
    torch.manual_seed(settings.seed)
    tokenizer = CLIPTokenizer.from_pretrained(workdir / "tokenizer", local_files_only=True)
    model = build(tokenizer, patch=settings.patch)
    if settings.start is not None:
        model.load_state_dict(CLIPModel.from_pretrained(settings.start, local_files_only=True).state_dict())
    nn.Module.to(model, device)
    heads = Heads(WIDTH).to(device)
    parameters = dict(model.named_parameters()) | {
        f"heads.{key}": value for key, value in heads.named_parameters()
    }
    groups = group_parameters(parameters, settings.matrix_rate)
    optimizer = Muon(groups, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    training = Training(settings, workdir / "scorer.safetensors", parameters, optimizer, decay=0.998)
    examination = Examination.prepare(workdir)
    data = TrainingScenes.prepare(workdir, decoded=settings.decoded, device=device)

    def losses(step: int) -> Iterator[Tensor]:
        batch = data.draw_batch(settings.batch, Random(f"{settings.seed}/{step}/scorer"))
        with precision(torch.device(device)):
            features = model.vision_model(pixel_values=batch.pictures.to(device))
            images = model.visual_projection(features.pooler_output)
            ids = tokenizer(batch.captions + batch.wrong, padding=True, return_tensors="pt")["input_ids"]
            texts = model.get_text_features(ids.to(device)).pooler_output
            guesses = heads(features.pooler_output, features.last_hidden_state[:, 1:])
        logits = model.logit_scale.clamp(max=LARGEST_SCALE).exp() * normalize(images) @ normalize(texts).T
        contrast = contrastive_loss(logits, batch.right.to(device))
        yield contrast + settings.help_weight * heads.loss(guesses, batch)

    def write(step: int) -> None:
        export(training.average, tokenizer, workdir, patch=settings.patch)
        metrics = examination.measure(load_scorer(workdir / "scorer"))
        print(json.dumps({"step": step, **metrics}), flush=True)

    lr_schedule = warm_cosine(settings.steps, warmup=min(200, settings.steps // 5), floor=0.01)
    training.run(losses, lr_schedule, every=500, on_save=write)
    if training.done >= settings.steps:
        write(training.done)


def build(tokenizer: CLIPTokenizer, *, patch: int = 16) -> CLIPModel:
    """About 3.2 M parameters: a vision transformer of 5 layers of width 192, a text transformer of 2 of width 128.

    The special ids are the tokenizer's: with CLIP's own every caption would be pooled at its first token.
    """
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_attention_heads=2,
        num_hidden_layers=2,
        projection_dim=128,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_attention_heads=3,
        num_hidden_layers=5,
        projection_dim=128,
        image_size=SIZE,
        patch_size=patch,
    )
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=128)
    # SDPA trains slower on CPU
    model: CLIPModel = CLIPModel._from_config(config, attn_implementation="eager")
    return model


def group_parameters(parameters: dict[str, nn.Parameter], matrix_rate: float) -> list[dict[str, Any]]:
    """Optimiser groups: the towers' inner matrices for Muon, other matrices with weight decay, vectors without.

    The temperature counts as a vector.
    """
    inner = {name: value for name, value in parameters.items() if value.ndim == 2 and ".layers." in name}
    other_matrices = [value for name, value in parameters.items() if value.ndim > 1 and name not in inner]
    vectors = [value for value in parameters.values() if value.ndim <= 1]
    return [
        {"params": list(inner.values()), "momentum": 0.95, "lr": matrix_rate},
        {"params": other_matrices},
        {"params": vectors, "weight_decay": 0.0},
    ]


def normalize(vectors: Tensor) -> Tensor:
    return F.normalize(vectors.float(), dim=-1)


def contrastive_loss(logits: Tensor, right: Tensor) -> Tensor:
    """Picture to text and text to picture, each with all right answers sharing the target equally.

    logits [B, N] with the B captions first and wrong ones after them; right [B, B], true where caption j
    suits picture i. The wrong captions are only ever to be refused, so the second direction leaves them out.
    """
    count = len(logits)
    suits = right.to(logits)
    to_text = F.pad(suits / suits.sum(1, keepdim=True), (0, logits.shape[1] - count))
    to_picture = (suits / suits.sum(0, keepdim=True)).T
    return 0.5 * (F.cross_entropy(logits, to_text) + F.cross_entropy(logits[:, :count].T, to_picture))


# Training data ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """B pictures, a caption and some wrong ones for each, and what the throw-away heads should say."""

    pictures: Tensor  # [B, 3, 128, 128] in −1…1
    captions: list[str]
    wrong: list[str]
    right: Tensor  # [B, B], true where caption j suits picture i
    nouns: Tensor  # [B, 2] indices of the two figures' nouns; −1 if there is only one
    colour: Tensor  # [B] 0 for none
    accessory: Tensor  # [B] 0 for none
    figures: Tensor  # [B, 2, 3] middle (x, y) and radius of each figure in pixels, moved as the picture is


class TrainingScenes:
    """Rendered scenes to train on: pictures, the scenes' labels, and where the figures stand."""

    def __init__(self, shards: Sequence[Pixels], decoded: Pixels | None, *, device: str) -> None:
        self.shards, self.decoded, self.device = list(shards), decoded, device
        self.scenes = [sample_scene(seed) for seed in range(sum(map(len, self.shards)))]
        words = load_vocabulary()
        nouns, colours, accessories = (list(part) for part in (words.nouns, words.colours, words.accessories))
        self.nouns = np.full((len(self.scenes), 2), -1)
        self.figures = np.zeros((len(self.scenes), 2, 3), dtype=np.float32)
        self.colour = np.zeros(len(self.scenes), dtype=np.int64)
        self.accessory = np.zeros(len(self.scenes), dtype=np.int64)
        self.in_place: dict[str, list[int]] = {place: [] for place in words.places}
        for index, scene in enumerate(self.scenes):
            first = scene.things[0]
            self.colour[index] = 1 + colours.index(first.colour) if first.colour else 0
            self.accessory[index] = 1 + accessories.index(first.accessory) if first.accessory else 0
            self.in_place[scene.place].append(index)
            for place, (noun, x, y, radius) in enumerate(locate_figures(scene)):
                self.nouns[index, place] = nouns.index(noun)
                self.figures[index, place] = x, y, radius

    @classmethod
    def prepare(cls, workdir: Path, *, decoded: int, device: str) -> TrainingScenes:
        """All shards but the held-out one; the first pictures also decoded, when there is an autoencoder."""
        shards = load(workdir, "scenes")
        shards = shards[: -(HELD_OUT // SHARD)] or shards
        decoded_pictures = None
        if decoded and has_autoencoder(workdir):
            first = np.concatenate(shards[: -(-decoded // SHARD)])[:decoded]
            decoded_pictures = decode_round_trips(
                workdir, "scenes", first, latent_noise=LATENT_NOISE, device=device
            )
        return cls(shards, decoded_pictures, device=device)

    def draw_batch(self, count: int, random: Random) -> Batch:
        """Half of the pictures from one place, the others from anywhere."""
        indices = self.choose(count, random)
        scenes = [self.scenes[index] for index in indices]
        far = (-FARTHEST, FARTHEST)
        moves = [(random.randint(*far), random.randint(*far), random.random() < 0.5) for _ in indices]
        pictures = np.stack([shift(self.picture(index, random), right=right, down=down, mirrored=mirrored)
                             for index, (right, down, mirrored) in zip(indices, moves, strict=True)])  # fmt: skip
        figures = self.figures[indices].copy()
        mirrored = np.array([move[2] for move in moves])
        figures[mirrored, :, 0] = SIZE - figures[mirrored, :, 0]
        figures[..., :2] += np.array([move[:2] for move in moves], dtype=np.float32)[:, None]
        places = [None if random.random() < 0.08 else scene.place for scene in scenes]
        return Batch(
            pictures=roughen(to_tensor(pictures), random),
            captions=[make_caption(scene, place, random) for scene, place in zip(scenes, places, strict=True)],
            wrong=[make_caption(change_one_fact(scene, random), place, random)
                   for scene, place in zip(scenes, places, strict=True) for _ in range(WRONG)],
            right=match_captions(scenes, places),
            nouns=torch.from_numpy(self.nouns[indices]),
            colour=torch.from_numpy(self.colour[indices]),
            accessory=torch.from_numpy(self.accessory[indices]),
            figures=torch.from_numpy(figures),
        )  # fmt: skip

    def choose(self, count: int, random: Random) -> list[int]:
        """Indices of scenes, half of them from one place, none twice."""
        same_place = self.in_place[random.choice(list(self.in_place))]
        indices = random.sample(same_place, min(count // 2, len(same_place)))
        used = set(indices)
        while len(indices) < count:
            index = random.randrange(len(self.scenes))
            if index not in used:
                used.add(index)
                indices.append(index)
        return indices

    def picture(self, index: int, random: Random) -> Pixels:
        """The picture of a scene; mostly the decoded one, if there is one."""
        if self.decoded is not None and index < len(self.decoded) and random.random() < 0.7:
            return np.asarray(self.decoded[index])
        return np.asarray(self.shards[index // SHARD][index % SHARD])


def locate_figures(scene: Scene) -> list[tuple[str, float, float, float]]:
    """Noun, middle (x, y) and radius in pixels of every figure of a scene, without drawing it."""
    return [(thing.noun, figure.x, figure.foot - figure.size / 2, figure.size / 2)
            for thing, figure in zip(scene.figures, place_figures(scene, scene.horizon), strict=True)]  # fmt: skip


def make_caption(scene: Scene, place: str | None, random: Random) -> str:
    """The canonical caption or a paraphrase."""
    if random.random() < 0.4:
        return write_caption(scene.things, pair=scene.pair, place=place, style=scene.style)
    return paraphrase(scene.things, pair=scene.pair, place=place, style=scene.style, random=random)


def change_one_fact(scene: Scene, random: Random) -> Scene:
    """The scene with another noun (mostly), colour, accessory, number or style: it makes a wrong caption."""
    words = load_vocabulary()
    first, *others = scene.things
    kind = random.choices(("noun", "colour", "accessory", "number", "style"), (5, 2, 2, 1, 1))[0]
    if kind == "accessory" and (others or scene.pair):
        kind = "noun"
    if kind == "number" and (others or first.accessory or first.small):
        kind = "noun"
    if kind == "style":
        return replace(scene, style=choose_other(scene.style, (None, *words.styles), random))
    if kind == "number":
        return replace(scene, pair=not scene.pair)
    if kind == "colour":
        changed = replace(first, colour=choose_other(first.colour, (None, *words.colours), random))
    elif kind == "accessory":
        changed = replace(first, accessory=choose_other(first.accessory, (None, *words.accessories), random))
    else:
        index = random.randrange(len(scene.things))
        used = {thing.noun for thing in scene.things}
        noun = random.choice([noun for noun in words.nouns if noun not in used])
        things = list(scene.things)
        things[index] = replace(things[index], noun=noun)
        return replace(scene, things=tuple(things))
    return replace(scene, things=(changed, *others))


def choose_other(value: str | None, values: Sequence[str | None], random: Random) -> str | None:
    """A value other than this one."""
    return random.choice([other for other in values if other != value])


def match_captions(scenes: Sequence[Scene], places: Sequence[str | None]) -> Tensor:
    """Which captions suit which pictures, bool [B pictures, B captions].

    Those with the same things, number and style, and with the picture's place or none.
    """
    facts: dict[object, int] = {}
    same = np.array(
        [facts.setdefault((scene.things, scene.pair, scene.style), len(facts)) for scene in scenes]
    )
    place_fits = np.array([[place is None or place == scene.place for place in places] for scene in scenes])
    return torch.from_numpy((same[:, None] == same[None]) & place_fits)


class Heads(nn.Module):
    """Linear guesses that help the vision tower to learn and are then thrown away."""

    def __init__(self, width: int) -> None:
        super().__init__()
        words = load_vocabulary()
        self.nouns = len(words.nouns)
        self.noun = nn.Linear(width, self.nouns)
        self.colour = nn.Linear(width, 1 + len(words.colours))
        self.accessory = nn.Linear(width, 1 + len(words.accessories))
        self.patch = nn.Linear(width, self.nouns + 1)  # the last class is the ground

    def forward(self, pooled: Tensor, patches: Tensor) -> dict[str, Tensor]:
        """Logits of pooled vectors [B, W] and of patches [B, P, W]."""
        logits = {name: getattr(self, name)(pooled) for name in ("noun", "colour", "accessory")}
        return {**logits, "patch": self.patch(patches)}

    def loss(self, guesses: dict[str, Tensor], batch: Batch) -> Tensor:
        """Cross-entropies of nouns (two things share), colour, accessory and the patches' nouns."""
        guesses = {name: value.float() for name, value in guesses.items()}
        device = guesses["noun"].device
        one_hot = F.one_hot(batch.nouns.clamp(min=0), self.nouns) * (batch.nouns >= 0)[..., None]
        share = one_hot.sum(1) / one_hot.sum((1, 2))[:, None]
        truth = patch_nouns(
            batch.nouns, batch.figures, round(guesses["patch"].shape[1] ** 0.5), ground=self.nouns
        )
        weight = torch.ones(self.nouns + 1)
        weight[self.nouns] = 0.15
        return (
            F.cross_entropy(guesses["noun"], share.to(device))
            + 0.5 * F.cross_entropy(guesses["colour"], batch.colour.to(device))
            + 0.5 * F.cross_entropy(guesses["accessory"], batch.accessory.to(device))
            + F.cross_entropy(
                guesses["patch"].flatten(0, 1), truth.flatten().to(device), weight=weight.to(device)
            )
        )


def patch_nouns(nouns: Tensor, figures: Tensor, side: int, *, ground: int) -> Tensor:
    """The noun under the middle of each patch [B, side²], row by row; `ground` outside all circles.

    nouns [B, 2] with −1 for no second figure; figures [B, 2, 3] middle (x, y) and radius in pixels.
    """
    middle = (torch.arange(side) + 0.5) * (SIZE / side)
    y, x = torch.meshgrid(middle, middle, indexing="ij")
    distance = (x.flatten() - figures[..., :1]) ** 2 + (y.flatten() - figures[..., 1:2]) ** 2  # [B, 2, side²]
    outside = (distance / figures[..., 2:].clamp(min=1e-3) ** 2).masked_fill(nouns[..., None] < 0, torch.inf)
    nearest, index = outside.min(1)
    return torch.where(nearest <= 1, nouns.gather(1, index), ground)


# Examination ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Examination:
    """Held-out scenes: 1,000 of any kind for retrieval, 400 of one plain thing for class guesses."""

    pictures: Pixels
    captions: list[str]
    plain_pictures: Pixels
    plain_nouns: list[str]

    @classmethod
    def prepare(cls, workdir: Path) -> Examination:
        """Its scenes, rendered if they are not on disk."""
        scenes = [sample_scene(seed) for seed in BENCHMARK_SEEDS[:1000]]
        candidates = (sample_scene(seed) for seed in BENCHMARK_SEEDS[1000:])
        plain: list[Scene] = []
        while len(plain) < 400:
            scene = next(candidates)
            if is_plain(scene) and is_fair(scene):
                plain.append(scene)
        return cls(
            render_once(workdir, "scorer-held-out", scenes),
            [scene.caption() for scene in scenes],
            render_once(workdir, "scorer-plain", plain),
            [scene.things[0].noun for scene in plain],
        )

    def measure(self, scorer: Scorer) -> dict[str, float]:
        """Shares of right answers: retrieval among 100, both ways, and the noun of one plain thing."""
        images = scorer.embed_images([Image.fromarray(picture) for picture in self.pictures])
        texts = scorer.embed_texts(self.captions)
        to_text, to_picture = [], []
        for first in range(0, len(images), 100):
            group = slice(first, first + 100)
            scores = images[group] @ texts[group].T
            captions = self.captions[group]
            to_text += [
                captions[best] == caption
                for caption, best in zip(captions, scores.argmax(1).tolist(), strict=True)
            ]
            to_picture += [
                captions[best] == caption
                for caption, best in zip(captions, scores.argmax(0).tolist(), strict=True)
            ]
        nouns = list(load_vocabulary().nouns)
        vectors = embed_classes(scorer, nouns)
        plain = scorer.embed_images([Image.fromarray(picture) for picture in self.plain_pictures])
        guesses = [rank_classes(scorer, image[None], nouns, vectors)[0][0] for image in plain]
        hits = [guess == noun for guess, noun in zip(guesses, self.plain_nouns, strict=True)]
        return {
            "caption_among_100": round(float(np.mean(to_text)), 4),
            "picture_among_100": round(float(np.mean(to_picture)), 4),
            "noun_of_plain_thing": round(float(np.mean(hits)), 4),
            "logit_scale": round(float(scorer.model.logit_scale.exp()), 2),
        }


def is_plain(scene: Scene) -> bool:
    """One thing of usual size in its own colour, wearing nothing, in no style."""
    thing = scene.things[0]
    single = len(scene.things) == 1 and not scene.pair
    return single and not (scene.style or thing.colour or thing.accessory or thing.small)


@torch.no_grad()
def export(average: Average, tokenizer: CLIPTokenizer, workdir: Path, *, patch: int) -> None:
    """Writes the averaged weights as an ordinary transformers folder in fp16, tokenizer included."""
    model = build(tokenizer, patch=patch)
    model.load_state_dict(
        {key: value for key, value in average.values.items() if key.startswith(TOWERS)}, strict=False
    )
    model.logit_scale.clamp_(max=LARGEST_SCALE)
    folder = workdir / "scorer"
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_bytes((workdir / "tokenizer" / name).read_bytes())
    half = [0.5, 0.5, 0.5]
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=half,
        image_std=half,
    )
    write_json(folder / "preprocessor_config.json", processor.to_dict())


if __name__ == "__main__":
    run_app(app)
