"""The denoiser and the text encoder of `moji`, trained together on the autoencoder's latents.

    python -m recipes.moji.data.pictures --scenes 24000 --askew 6000 --others 6000
    python -m recipes.moji.denoiser encode                 latents of all scenes, once: 5 minutes on two cores
    OMP_NUM_THREADS=1 python -m recipes.moji.denoiser train --processes 2      28 pictures/s on two cores
    python -m recipes.moji.denoiser export                 the whole pipeline folder, fp16
    python -m recipes.moji.denoiser compare OLD/ NEW/      the loss of both on held-out scenes

v-prediction (Salimans & Ho 2022) with weight 1: with many latent channels ε-prediction has to carry the noise itself
through a top level hardly wider than they are. With `--prediction epsilon` (Ho et al. 2020) the weights are min-SNR-5
(Hang et al. 2023) over a: half way to the weight of the velocity's error, since with ε's alone the noisiest levels,
where places and things are decided, learn nearly nothing in so short a training. Inner weights step by Muon
(`recipes.moji.training.muon`): from the same checkpoint, 250 steps of it took the error on held-out scenes down 1.7
times as far as AdamW's, at 1.3 times the time. Half of the training begins with plain pictures of one thing, which
teach the nouns; the share falls to none. `--hard-share` of it is drawn from the scenes that are learned last.
`--begin-from` a pipeline of the same architecture keeps what that knows, whatever its latents
(`recipes.moji.training.carried`). Continues from its last checkpoint, or, for a longer run, from the last one before
the learning rate fell (`denoiser-stable.safetensors`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from backbone.cli.command_line import settled_command
from backbone.cli.commands import script_app
from backbone.cli.options import Option
from backbone.diffusion.losses import denoising_score_matching, min_snr
from backbone.diffusion.noise import PredictionType, add_noise, generator, target, vp
from backbone.distributed.spawn import run_workers
from backbone.io.console import UserError, run_app
from backbone.io.files import read_json, read_tensors, write_json, write_tensors, write_text
from backbone.models.locate import EMBEDDED
from backbone.training.attention import fast_attention_backward
from backbone.training.optimizer import warm_stable_decay
from backbone.world.scene import Scene, sample_scene
from recipes.moji.autoencoder import CHANNELS, SCALING_FACTOR, precision, to_tensor
from recipes.moji.data.pictures import SCENES, SHARD, list_shards, load_captions
from recipes.moji.training.carried import carry_over
from recipes.moji.training.muon import Muon
from recipes.moji.training.run import (
    TRAINING,
    RecipeSettings,
    Training,
    losses_on_grid,
    make_readable,
    read_trained,
    round_to_grid,
)

HELD_OUT = 2000  # the last shard of usual scenes is never trained on
CARRIED = 320  # pictures that a denoiser is carried over by
COMPARED = (60, 250, 450, 650, 850)  # timesteps at which losses are compared
EMPTY_SHARE = 0.1  # captions replaced by the empty one, for classifier-free guidance
CARD = """# moji

A small latent diffusion model of a rendered world: emoji glyphs in drawn places, with colours, accessories and styles,
128 × 128 pixels. It is an ordinary diffusers folder (`StableDiffusionPipeline.from_pretrained`), with all weights in
fp16 safetensors. This edition's denoiser and text encoder come from optimiser step {step}.

- **Data.** Scenes rendered by `backbone/world` from seeds 0 to 999,999: 71 nouns, 7 colours, 5 accessories, 12 places,
  4 styles. No photographs and no people. The autoencoder also saw synthetic textures.
- **Not in the data.** The glyphs of the benchmarks' concepts and of the packaged example dog.
- **Limits.** The model accepts any prompt, but understands only the words of `backbone/world/vocabulary.json` and their
  paraphrases. It draws small objects, accessories and neon or pencil drawings worst; fine detail is soft.
- **Licence.** Apache-2.0. The glyphs are Noto Color Emoji by Google, SIL Open Font License 1.1; the font is not
  included.
- **Made by** the recipes in `recipes/moji`, which state what each part costs. `docs/moji.md` in the project's
  repository has the experiments, a sweep of settings, and the judge's own accuracies.
"""
DEFAULTS = {  # what works with this model; Backbone.defaults reads it
    "steps": 25,
    "guidance": 4.0,
    "guidance_stop": 0.6,  # `python -m benchmarks.judges.fidelity --guidance-stop 1`
    "sampler": "ancestral",
    "early_scale": 0.5,  # what concepts wear: benchmarks/results/customize.md
    "early_steps": 0.25,
    "train_steps": 500,
    "evaluation_steps": 250,
    "learning_rate": 3e-3,
    "learning_rates": {"full": 2e-4, "pairs": 1e-3},
    "rank": 16,
    "batch": 3,
    "prior_batch": 1,
    "lora_layers": "all",
    "loss_weighting": "none",
    "align": {
        "learning_rate": 1e-4,  # `python -m recipes.align.preference`; at twice that prompts are lost
        "lr_scheduler": "cosine",
        "beta": 1e4,  # at 500 a few pairs spoil the images that they prefer
        "loss_weighting": "debiased",
        "least_noise": 0.2,
        "safeguard": 0.6,
    },
    "draft": {  # recipes.align.reward
        "learning_rate": 8e-4,
        "lr_scheduler": "cosine",
        "steps": 85,
        "batch": 8,
        "reward_steps": 5,
        "sample_steps": 15,
    },
    "edit": {
        "cross": 0.0,
        "self_attention": 0.2,
        "colour_self_attention": 0.5,
        "style_self_attention": 0.8,
        "place_self_attention": 0.4,
    },
    "sheet_prompts": [
        "a {} in the snow",
        "a {} in a park",
        "a {} at night",
        "a {} under the sea",
        "a {} wearing a crown in a park",
        "a red {} in a forest",
        "a pencil sketch of a {} in the snow",
        "two {}s in space",
    ],
}
app = script_app()
WORKDIR = typer.Option(help="Where intermediate files go.")


@dataclass(frozen=True, kw_only=True)
class LatentSettings(RecipeSettings):
    """Settings of a training on latents and captions: the denoiser's and the flow's."""

    batch: int = 32
    learning_rate: float = 7e-4
    processes: Annotated[int, Option("Training processes; on a CPU one for each core.", TRAINING, min=1)] = 1
    text_rows: Annotated[int, Option("Captions in a batch that also train the text encoder.", TRAINING)] = 8
    simple_steps: Annotated[
        int, Option("Step by which scenes of a single plain thing have left the data.", TRAINING, min=1)
    ] = 8_000
    hard_share: Annotated[
        float,
        Option(
            "Share of a batch that is drawn from the hard scenes alone (accessories, two things, small, neon, pencil).",
            TRAINING,
            min=0,
            max=1,
        ),
    ] = 0.0
    small_share: Annotated[
        float, Option("Share of a batch that is drawn from scenes of a small thing.", TRAINING, min=0, max=1)
    ] = 0.0
    askew_share: Annotated[
        float, Option("Share of scenes whose things are held in any way.", TRAINING, min=0, max=1)
    ] = 0.0
    other_share: Annotated[
        float, Option("Share of scenes of things without a name.", TRAINING, min=0, max=1)
    ] = 0.0
    decay: Annotated[
        int, Option("Steps of linear learning-rate decay to zero, at the end.", TRAINING, min=1)
    ] = 600
    warmup: Annotated[int, Option("Steps of linear learning-rate warm-up.", TRAINING)] = 300
    rounded: Annotated[
        bool, Option("Train the weights as they are exported: on a grid, which packs well.", TRAINING)
    ] = False

    def shares(self, step: int) -> dict[str, float]:
        """The shares of the kinds of scenes in a step's batch, as `Latents.batch` takes them."""
        simple = max(0.0, 0.8 * (1 - step / self.simple_steps))
        return {
            "hard": self.hard_share, "small": self.small_share, "simple": simple,
            "askew": self.askew_share, "others": self.other_share,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DenoiserSettings(LatentSettings):
    """Settings of the training of the denoiser."""

    steps: int = 12_000
    optimizer: Annotated[
        str, Option("Optimiser of the hidden matrices.", TRAINING, choices=("muon", "adamw"))
    ] = "muon"
    text_steps: Annotated[int, Option("Freeze the text encoder after this step.", TRAINING)] = 6_000
    prediction: Annotated[
        str, Option("What the network predicts.", TRAINING, choices=("v_prediction", "epsilon"))
    ] = "v_prediction"
    begin_from: Annotated[Path | None, Option("A pipeline folder whose weights to begin with.", TRAINING)] = (
        None
    )


@settled_command(app, DenoiserSettings)
def train(settings: DenoiserSettings) -> None:
    """Trains, or goes on training."""
    run_workers(train_denoiser, (settings,), processes=settings.processes)


class LatentTraining(Training):
    """A training on latents, which goes on from the last checkpoint `NAME.safetensors`."""

    def __init__(
        self,
        settings: LatentSettings,
        name: str,
        parameters: Mapping[str, nn.Parameter],
        inner: Sequence[Tensor],
        *,
        slow: Sequence[Tensor] = (),
    ) -> None:
        """`inner` weights are stepped by Muon, `slow` ones at half the learning rate."""
        special = {id(value) for value in (*inner, *slow)}
        groups: list[dict[str, Any]] = [
            {"params": [value for value in parameters.values() if id(value) not in special]}
        ]
        if slow:
            groups.append({"params": list(slow), "lr": settings.learning_rate / 2})
        if inner:
            groups.append({"params": list(inner), "momentum": 0.95, "lr": settings.matrix_rate})
        optimizer = Muon(groups, lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        checkpoint = settings.workdir / f"{name}.safetensors"
        super().__init__(
            settings, checkpoint, parameters, optimizer, decay=0.9985, decay_steps=settings.decay
        )
        self.parameters, self.rounded = parameters, settings.rounded
        self.lr_schedule = warm_stable_decay(settings.steps, warmup=settings.warmup, decay=settings.decay)

    def follow(self, losses: Callable[[int], Iterator[Tensor]], rank: int) -> None:
        """Steps until the end or the minutes are over; the first process reports and saves."""
        step_losses = losses_on_grid(losses, self.parameters) if self.rounded else losses
        self.run(step_losses, self.lr_schedule, every=250, aloud=rank == 0)


def train_denoiser(rank: int, settings: DenoiserSettings) -> None:
    """One process of the training; the first one saves and reports."""
    torch.manual_seed(settings.seed)
    kind = parse_prediction(settings.prediction)
    tokenizer = CLIPTokenizer.from_pretrained(settings.workdir / "tokenizer")
    data = Latents(settings.workdir, tokenizer, settings.device)
    unet = build_unet(data.mean.shape[1])
    text_encoder = build_text_encoder(tokenizer)
    encoder_folder = (
        settings.begin_from or settings.workdir
    ) / "text_encoder"  # the first one: recipes.moji.text_encoder
    if encoder_folder.is_dir():
        pretrained = CLIPTextModel.from_pretrained(encoder_folder, local_files_only=True)
        text_encoder.load_state_dict(pretrained.state_dict())
    alpha_bar = build_scheduler().alphas_cumprod
    density = timestep_density(alpha_bar)
    if settings.begin_from is not None and not (settings.workdir / "denoiser.safetensors").exists():
        pictures, clean, tokens = data.take_first(CARRIED)
        with torch.no_grad():
            text = torch.cat([text_encoder(batch).last_hidden_state for batch in tokens.split(16)])
        carry_over(
            unet, settings.begin_from, pictures, clean, text, alpha_bar=alpha_bar, density=density, kind=kind
        )  # fmt: skip
    unet = unet.to(settings.device, memory_format=torch.channels_last)
    nn.Module.to(text_encoder, settings.device)
    parameters = {f"unet.{key}": value for key, value in unet.named_parameters()}
    parameters |= {f"text_encoder.{key}": value for key, value in text_encoder.named_parameters()}
    inner = inner_weights(unet) if settings.optimizer == "muon" else []
    denoising = LatentTraining(settings, "denoiser", parameters, inner, slow=list(text_encoder.parameters()))
    denoising.facts = {"prediction": settings.prediction}
    alpha_bar = alpha_bar.to(settings.device)

    def losses(step: int) -> Iterator[Tensor]:
        random = generator(settings.seed, step, rank)
        clean, tokens = data.batch(settings.batch, random, settings.shares(step))
        index = torch.multinomial(density, settings.batch, replacement=True, generator=random).to(
            settings.device
        )
        noise = torch.randn(clean.shape, generator=random).to(settings.device)
        level = vp(alpha_bar[index])
        noisy = add_noise(clean, noise, level).contiguous(memory_format=torch.channels_last)
        with precision(noisy.device):
            rows = min(settings.text_rows, settings.batch) if step <= settings.text_steps else 0
            with torch.no_grad():
                states = [text_encoder(tokens[rows:]).last_hidden_state] if rows < settings.batch else []
            if rows:
                states.insert(0, text_encoder(tokens[:rows]).last_hidden_state)
            text = torch.cat(states)
            predicted = unet(noisy, index, text).sample
        weight = min_snr(level, 5.0) / level.a.clamp(min=0.08) if kind == "epsilon" else None
        error = denoising_score_matching(
            predicted, clean, noise=noise, level=level, prediction_type=kind, weight=weight
        )
        yield error.mean()

    with fast_attention_backward(unet):  # flash attention's backward is slow on a CPU
        denoising.follow(losses, rank)


@app.command()
def encode(
    batch: Annotated[int, typer.Option(help="Scenes encoded together.")] = 50,
    shards: Annotated[int, typer.Option(help=f"How many, of {SHARD} scenes each.")] = 10**6,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    workdir: Annotated[Path, WORKDIR] = Path("build/moji"),
) -> None:
    """Encodes all rendered scenes, or the first of them; finished shards are kept."""
    vae = AutoencoderKL.from_pretrained(workdir / "vae").to(device, memory_format=torch.channels_last).eval()
    (workdir / "latents").mkdir(exist_ok=True)
    for source in list_shards(workdir, *SCENES)[:shards]:
        path = latents_path(workdir, source)
        if path.exists():
            continue
        shard = np.load(source, mmap_mode="r")
        means, deviations = [], []
        for first in range(0, len(shard), batch):
            pictures = to_tensor(np.array(shard[first : first + batch])).to(device)
            pictures = pictures.contiguous(memory_format=torch.channels_last)
            with torch.no_grad(), precision(pictures.device):
                posterior = vae.encode(pictures).latent_dist
            means.append(posterior.mean.float().cpu() * SCALING_FACTOR)
            deviations.append(posterior.std.float().cpu() * SCALING_FACTOR)
        tensors = {"mean": torch.cat(means).half(), "std": torch.cat(deviations).half()}
        write_tensors(path, {key: value.contiguous() for key, value in tensors.items()}, {})
        print(
            path,
            f"mean {tensors['mean'].float().mean():.3f} std {tensors['mean'].float().std():.3f}",
            flush=True,
        )


def latents_path(workdir: Path, shard: Path) -> Path:
    """Where the latents of a shard of pictures are."""
    return workdir / "latents" / f"{shard.stem}.safetensors"


@app.command()
def export(
    out: Annotated[Path, typer.Option(help="The pipeline folder to write.")] = Path("build/moji/pipeline"),
    averaged: Annotated[bool, typer.Option(help="EMA weights, or the last ones.")] = True,
    workdir: Annotated[Path, WORKDIR] = Path("build/moji"),
) -> None:
    """Writes an ordinary diffusers folder in fp16."""
    trained, header = read_trained(workdir / "denoiser.safetensors", averaged=averaged)
    trained = round_to_grid(trained)
    tokenizer = CLIPTokenizer.from_pretrained(workdir / "tokenizer")
    vae = AutoencoderKL.from_pretrained(workdir / "vae")
    unet, text_encoder = build_unet(vae.config.latent_channels), build_text_encoder(tokenizer)
    for name, model in (("unet", unet), ("text_encoder", text_encoder)):
        start = f"{name}."
        model.load_state_dict(
            {key.removeprefix(start): value for key, value in trained.items() if key.startswith(start)}
        )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(json.loads(header["facts"]).get("prediction", "epsilon")),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(dtype=torch.float16).save_pretrained(out)
    for path in out.glob("*/config.json"):  # without the paths that parts were loaded from
        write_json(path, {key: value for key, value in read_json(path).items() if key != "_name_or_path"})
    # transformers loads in the precision that config.json names, diffusers in float32: both are to load as float32
    settings = read_json(out / "text_encoder" / "config.json")
    write_json(out / "text_encoder" / "config.json", {**settings, "dtype": "float32"})
    for name in ("vocab.json", "merges.txt"):
        (out / "tokenizer" / name).write_bytes((workdir / "tokenizer" / name).read_bytes())
    write_json(out / "limner.json", DEFAULTS)
    if (workdir / "scorer").is_dir():
        shutil.copytree(workdir / "scorer", out / "scorer", dirs_exist_ok=True)
    make_readable(out)
    write_text(out / "README.md", CARD.format(step=header["step"]))
    print(f"{out}: step {header['step']}")


@app.command()
@torch.no_grad()
def compare(
    models: Annotated[
        list[Path], typer.Argument(help="Pipeline folders, or their unet/; without a text encoder moji's.")
    ],
    count: Annotated[int, typer.Option(min=1, help="How many of the held-out scenes.")] = 240,
    workdir: Annotated[Path, WORKDIR] = Path("build/moji"),
) -> None:
    """The loss of denoisers on scenes that were held out, with the same noise: all, and the hard ones among them."""
    shard = list_shards(workdir, "scenes")[-1]
    first = first_seed(shard)
    clean = read_tensors(latents_path(workdir, shard))[0]["mean"][:count].float()
    hard = torch.tensor([is_hard(sample_scene(first + row)) for row in range(len(clean))])
    tokenizer = CLIPTokenizer.from_pretrained(workdir / "tokenizer")
    captions = [pair[0] for pair in load_captions(shard)[:count]]
    ids = tokenizer(captions, padding="max_length", truncation=True, max_length=77, return_tensors="pt")[
        "input_ids"
    ]
    scheduler = build_scheduler()
    for model in models:
        folder = model.parent if model.name == "unet" else model
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True).float()
        encoder_folder = folder if (folder / "text_encoder").is_dir() else EMBEDDED
        encoder = CLIPTextModel.from_pretrained(
            encoder_folder / "text_encoder", local_files_only=True
        ).float()
        text = torch.cat([encoder(batch).last_hidden_state for batch in ids.split(24)])
        rows = []
        for number, time in enumerate(COMPARED):
            noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(number))
            level, index = vp(scheduler.alphas_cumprod[time]), torch.tensor(time)
            noisy, targets = add_noise(clean, noise, level), target(clean, noise, level, "v_prediction")
            parts = zip(noisy.split(24), text.split(24), strict=True)
            predicted = torch.cat([unet(batch, index, words).sample for batch, words in parts])
            rows.append((predicted - targets).square().mean((1, 2, 3)))
        losses = torch.stack(rows)
        by_time = ", ".join(
            f"{time}: {loss:.4f}" for time, loss in zip(COMPARED, losses.mean(1).tolist(), strict=True)
        )
        print(
            f"{folder}: {losses.mean():.4f}, hard {losses[:, hard].mean():.4f}, "
            f"others {losses[:, ~hard].mean():.4f}; at timestep {by_time}",
            flush=True,
        )


class Latents:
    """Encoded scenes with their captions; `batch` draws some, half of them with the canonical caption."""

    def __init__(self, workdir: Path, tokenizer: CLIPTokenizer, device: str) -> None:
        means, stds, captions, rows = [], [], [], 0
        self.rows: dict[str, Tensor] = {}
        for kind in SCENES:
            shards = [path for path in list_shards(workdir, kind) if latents_path(workdir, path).exists()]
            seeds: list[int] = []
            for shard in shards:
                encoded = read_tensors(latents_path(workdir, shard))[0]
                count = len(encoded["mean"])
                if kind == "scenes" and shard == shards[-1]:
                    count -= min(HELD_OUT, count)
                means.append(encoded["mean"][:count])
                stds.append(encoded["std"][:count])
                captions += [caption for pair in load_captions(shard)[:count] for caption in pair]
                seeds += range(first_seed(shard), first_seed(shard) + count)
            self.rows[kind] = torch.arange(rows, rows + len(seeds))
            if kind == "scenes":
                scenes = [sample_scene(seed) for seed in seeds]
                for name, matches in (("simple", is_simple), ("hard", is_hard), ("small", is_small)):
                    self.rows[name] = torch.tensor([matches(scene) for scene in scenes]).nonzero()[:, 0]
            rows += len(seeds)
        self.mean, self.std = torch.cat(means), torch.cat(stds)
        encoded_captions = tokenizer(
            [*captions, ""], padding="max_length", truncation=True, max_length=77, return_tensors="pt"
        )
        self.tokens = encoded_captions["input_ids"].to(torch.int16)
        self.device = device
        self.shards = list_shards(workdir, *SCENES)

    def batch(
        self, count: int, random: torch.Generator, shares: Mapping[str, float]
    ) -> tuple[Tensor, Tensor]:
        """Latents [B, C, 16, 16] of unit deviation, drawn from their posteriors, and token ids [B, 77].

        `shares` says which share is drawn from the rows of a kind, "simple", "hard" and "small" ones of the usual
        scenes among them; what is left is drawn from all usual scenes.
        """
        usual = self.rows["scenes"]
        indices = usual[torch.randint(len(usual), (count,), generator=random)]
        for kind, share in shares.items():
            if share > 0:
                rows = self.rows[kind]
                if not len(rows):
                    raise UserError(
                        f"No {kind} scenes: render some by recipes.moji.data.pictures, and encode."
                    )
                candidates = rows[torch.randint(len(rows), (count,), generator=random)]
                indices = torch.where(torch.rand(count, generator=random) < share, candidates, indices)
        caption = 2 * indices + torch.randint(2, (count,), generator=random)
        caption[torch.rand(count, generator=random) < EMPTY_SHARE] = len(self.tokens) - 1
        mean, std = self.mean[indices].float(), self.std[indices].float()
        clean = mean + std * torch.randn(mean.shape, generator=random)
        return clean.to(self.device), self.tokens[caption].long().to(self.device)

    def take_first(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The first pictures [B, 3, 128, 128], their mean latents, and the ids of their canonical captions."""
        pictures = to_tensor(np.array(np.load(self.shards[0], mmap_mode="r")[:count]))
        return pictures, self.mean[:count].float(), self.tokens[: 2 * count : 2].long()


def first_seed(shard: Path) -> int:
    """The seed of a shard's first scene."""
    return int(shard.stem.rpartition("-")[2])


def is_simple(scene: Scene) -> bool:
    """Whether a scene shows one plain thing."""
    return len(scene.figures) == 1 and not scene.style and not scene.things[0].accessory


def is_hard(scene: Scene) -> bool:
    """Whether a scene contains what is learned last: an accessory, two different things, a small one, thin lines."""
    thin = scene.style is not None and any(word in scene.style for word in ("neon", "pencil"))
    return thin or len(scene.things) > 1 or is_small(scene) or any(thing.accessory for thing in scene.things)


def is_small(scene: Scene) -> bool:
    """Whether a thing is small: few latents show it, so the loss of a picture says little of it."""
    return any(thing.small for thing in scene.things)


def parse_prediction(prediction: str) -> PredictionType:
    """The prediction type of this name; `UserError` for one that the recipe does not train."""
    match prediction:
        case "v_prediction" | "epsilon":
            return prediction
        case _:
            raise UserError(f"--prediction is v_prediction or epsilon, not {prediction!r}.")


def timestep_density(alpha_bar: Tensor) -> Tensor:
    """How often each timestep is drawn: 70 % log-normal in σ = b/a around 1 (Karras et al. 2022), 30 % uniform."""
    log_sigma = 0.5 * ((1 - alpha_bar) / alpha_bar).log().cpu()
    width = torch.gradient(log_sigma)[0]
    normal = torch.exp(-0.5 * (log_sigma / 1.1) ** 2) * width
    return 0.7 * normal / normal.sum() + 0.3 / len(normal)


def build_unet(channels: int = CHANNELS) -> UNet2DConditionModel:
    """26 M parameters, cross-attention at 16², 8² and 4²."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=channels,
        out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(64, 160, 320),
        layers_per_block=1,
        cross_attention_dim=256,
        attention_head_dim=(1, 2, 4),  # the number of heads, in this class's historical naming
    )


def inner_weights(unet: UNet2DConditionModel) -> list[Tensor]:
    """Every matrix and convolution but the first, the last and the time's."""
    outer = ("conv_in.", "conv_out.", "time_embedding.")
    return [v for k, v in unet.named_parameters() if v.ndim >= 2 and not k.startswith(outer)]


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """4 layers of width 256; the special ids are the tokenizer's, not CLIP's."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_scheduler(prediction: str = "v_prediction") -> DDIMScheduler:
    """Stable Diffusion's noise schedule, every setting written out."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
        timestep_spacing="leading",
    )


if __name__ == "__main__":
    run_app(app)
