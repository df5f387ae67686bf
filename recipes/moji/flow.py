"""`moji-flow`: a small transformer of Stable Diffusion 3's kind that learns `moji`'s world as a rectified flow.

    python -m recipes.moji.data.pictures --scenes 48000      as for `moji`: scenes, tokenizer, the autoencoder's latents
    python -m recipes.moji.denoiser encode
    OMP_NUM_THREADS=1 python -m recipes.moji.flow train --processes 2
    python -m recipes.moji.flow export                     a folder that diffusers' StableDiffusion3Pipeline loads

The network predicts the velocity ε − x0 of x = (1 − t)·x0 + t·ε, at logit-normal t (Esser et al. 2024, section 3.1).
Of the two text encoders the first is `moji`'s, rounded as all that is exported; the second, smaller one is trained
along. There is no T5: the pipeline puts 256 zeros in its tokens' place. The text has no positions in this network, so
tokens that begin alike stay alike, and training carries one for all of them, whose attention weight counts 256 times:
the same function for a third of the work (`RepeatedZeroTokenProcessor`). Prompts are cut at 32 tokens; the longest
caption of the world needs fewer. Continues from its last checkpoint, and begins from another pipeline's
weights whatever its latents (`--begin-from`), as `recipes.moji.denoiser` does; it may learn from `moji`'s own
predictions (`--teacher`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, cast

import torch
import typer
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from backbone.cli.command_line import settled_command
from backbone.cli.commands import script_app
from backbone.cli.options import Option
from backbone.diffusion.losses import squared_error
from backbone.diffusion.noise import add_noise, flow, generator, target
from backbone.distributed.spawn import run_workers
from backbone.families.sd3.family import use_repeated_zero_token
from backbone.io.console import run_app
from backbone.io.files import read_json, write_json, write_text
from backbone.models.locate import EMBEDDED
from recipes.moji.autoencoder import precision
from recipes.moji.denoiser import CARRIED, WORKDIR, Latents, LatentSettings, LatentTraining
from recipes.moji.denoiser import DEFAULTS as MOJI_DEFAULTS
from recipes.moji.training.carried import carry_over_transformer
from recipes.moji.training.run import TRAINING, fill, make_readable, read_trained, round_to_grid
from recipes.moji.training.teacher import Teacher

TOKENS = 32  # of a prompt, begin and end included
WIDTHS = 256, 128  # of the two text encoders
TAUGHT = 0.9  # share of the teacher's prediction in the target, if there is a teacher
UNTRIED = ("draft", "early_scale", "early_steps")  # settings of `moji` that this model was not tried with
DEFAULTS = {
    **{name: value for name, value in MOJI_DEFAULTS.items() if name not in UNTRIED},
    "steps": 28,
    "guidance": 4.0,
    "learning_rate": 8e-4,  # at three times that a concept displaces accessories and its class
    "learning_rates": {"full": 3e-4, "pairs": 1e-3},
    "loss_weighting": "none",
}
CARD = """# moji-flow

A small rectified-flow transformer (`SD3Transformer2DModel`) of `moji`'s rendered world, 128 × 128 pixels. It is an
ordinary diffusers folder without T5 (`StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None,
tokenizer_3=None)`), in fp16 safetensors. The matrices lie on a grid, so that the files compress well.
The weights are those of optimiser step {step}.
Data, autoencoder and first text encoder are `moji`'s; see its card. Prompts are truncated to 32 tokens.
Made by `recipes/moji/flow.py`. Apache-2.0; the glyphs are Noto Color Emoji by Google, SIL Open Font License 1.1.
"""
app = script_app()


@dataclass(frozen=True, kw_only=True)
class FlowSettings(LatentSettings):
    """Settings of the training of the flow."""

    steps: int = 10_000
    simple_steps: int = 6_000
    shift: Annotated[
        float, Option("Shift of the noise levels that are drawn; above 1, noisier.", TRAINING, min=0.1)
    ] = 1.0
    begin_from: Annotated[Path | None, Option("A pipeline folder whose weights to begin with.", TRAINING)] = (
        None
    )
    teacher: Annotated[
        Path | None, Option("A folder of `moji`'s kind whose predictions to learn from.", TRAINING)
    ] = None


@settled_command(app, FlowSettings)
def train(settings: FlowSettings) -> None:
    """Trains, or goes on training."""
    run_workers(train_flow, (settings,), processes=settings.processes)


def train_flow(rank: int, settings: FlowSettings) -> None:
    """One process of the training; the first one saves and reports."""
    torch.manual_seed(settings.seed)
    data = Latents(settings.workdir, load_tokenizer(EMBEDDED), settings.device)
    channels = data.mean.shape[1]
    network = build_transformer(channels).to(settings.device)
    use_repeated_zero_token(network)
    first = load_first_encoder().eval().requires_grad_(False)
    second = build_second_encoder(load_tokenizer(EMBEDDED))
    for encoder in (first, second):
        nn.Module.to(encoder, settings.device)
    if settings.begin_from is not None and not (settings.workdir / "flow.safetensors").exists():
        begin_from(settings.begin_from, network, second, data)
    teacher = Teacher(settings.teacher, settings.device, channels=channels) if settings.teacher else None
    training = LatentTraining(
        settings, "flow", list_trained_parameters(network, second), list_inner_matrices(network)
    )

    def losses(step: int) -> Iterator[Tensor]:
        random = generator(settings.seed, step, rank)
        clean, tokens = data.batch(settings.batch, random, settings.shares(step))
        logit = torch.randn(settings.batch, generator=random) + math.log(settings.shift)
        level = flow(logit.sigmoid().to(settings.device))
        noise = torch.randn(clean.shape, generator=random).to(settings.device)
        noisy = add_noise(clean, noise, level)
        targets = target(clean, noise, level, "flow")
        with precision(clean.device):
            if teacher:
                teacher_targets = target(*teacher.predict(noisy, level, tokens), level, "flow")
                targets = targets.lerp(teacher_targets, TAUGHT)
            hidden, pooled = join_encodings(
                first, second, tokens[:, :TOKENS], trained_rows=settings.text_rows
            )
            velocity = network(
                hidden_states=noisy,
                timestep=1000 * level.b,
                encoder_hidden_states=append_absent(hidden, 1),
                pooled_projections=pooled,
            ).sample
        yield squared_error(velocity, targets).mean()

    training.follow(losses, rank)


@torch.no_grad()
def begin_from(
    source: Path,
    network: SD3Transformer2DModel,
    second: CLIPTextModelWithProjection,
    data: Latents,
) -> None:
    """Carries the network and second encoder of the pipeline folder `source` over to fresh ones."""
    pretrained = CLIPTextModelWithProjection.from_pretrained(source / "text_encoder_2", local_files_only=True)
    second.load_state_dict(pretrained.state_dict())
    pictures, clean, tokens = data.take_first(CARRIED)
    encoded = [
        join_encodings(load_first_encoder(), second, batch[:, :TOKENS], trained_rows=0)
        for batch in tokens.split(16)
    ]
    hidden, pooled = (torch.cat(parts).float() for parts in zip(*encoded, strict=True))
    carry_over_transformer(network, source, pictures, clean, append_absent(hidden, 1), pooled)


@app.command()
def export(
    out: Annotated[Path, typer.Option(help="The pipeline folder to write.")] = Path("build/moji/flow"),
    averaged: Annotated[bool, typer.Option(help="EMA weights, or the last ones.")] = True,
    beside: Annotated[
        Path | None,
        typer.Option(help="The pipeline folder that this training began from: take a mean with its weights."),
    ] = None,
    share: Annotated[float, typer.Option(help="Of the trained weights in that mean.", min=0, max=1)] = 0.75,
    workdir: Annotated[Path, WORKDIR] = Path("build/moji"),
) -> None:
    """Writes an ordinary diffusers folder in fp16.

    A mean of a network and of what it was trained on to often draws better than either (Wortsman et al. 2022).
    """
    trained, header = read_trained(workdir / "flow.safetensors", averaged=averaged)
    channels = read_json(workdir / "vae" / "config.json")["latent_channels"]
    network, second = build_transformer(channels), build_second_encoder(load_tokenizer(EMBEDDED))
    step = header["step"]
    if beside is not None:
        step += f", averaged ({share:g} of them) with the weights before that training"
        before = read_flow_weights(beside)
        trained = {name: before[name].lerp(value.float(), share) for name, value in trained.items()}
    fill(list_trained_parameters(network, second), round_to_grid(trained))
    write_pipeline(network, second, out, vae=workdir / "vae")
    write_text(out / "README.md", CARD.format(step=step))
    print(f"{out}: step {step}")


def read_flow_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a pipeline folder that `train` trains, in float32, by the names that they have there."""
    network = SD3Transformer2DModel.from_pretrained(folder / "transformer", local_files_only=True)
    second = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2", local_files_only=True)
    return {name: value.detach().float() for name, value in list_trained_parameters(network, second).items()}


def write_pipeline(
    network: SD3Transformer2DModel, second: CLIPTextModelWithProjection, out: Path, *, vae: Path
) -> None:
    """The whole pipeline folder, fp16, with `moji`'s tokenizer and first encoder and this autoencoder."""
    autoencoder = AutoencoderKL.from_pretrained(vae, local_files_only=True)
    autoencoder.register_to_config(shift_factor=0.0)  # which this pipeline adds whether there is one or not
    pipeline = StableDiffusion3Pipeline(
        transformer=network,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0),
        vae=autoencoder,
        text_encoder=load_first_encoder(),
        tokenizer=load_tokenizer(EMBEDDED),
        text_encoder_2=second,
        tokenizer_2=load_tokenizer(EMBEDDED),
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipeline.to(dtype=torch.float16).save_pretrained(out)
    for path in out.glob("*/config.json"):  # leave out the paths that parts were loaded from
        settings = {key: value for key, value in read_json(path).items() if key != "_name_or_path"}
        # transformers loads in the precision that config.json names, diffusers in float32: all are to load as float32
        write_json(path, settings | ({"dtype": "float32"} if "dtype" in settings else {}))
    write_json(out / "limner.json", DEFAULTS)
    make_readable(out)


# Parts ------------------------------------------------------------------------------------------------------


def build_transformer(channels: int = 24) -> SD3Transformer2DModel:
    """12 M parameters: five joint blocks of width 256 over 8 × 8 patches of 2 × 2 latents and the prompt's tokens."""
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=channels,
        out_channels=channels,
        num_layers=5,
        attention_head_dim=64,
        num_attention_heads=4,
        caption_projection_dim=256,
        joint_attention_dim=sum(WIDTHS),
        pooled_projection_dim=sum(WIDTHS),
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """`moji`'s tokenizer, which cuts at 32 tokens."""
    tokenizer = CLIPTokenizer.from_pretrained(
        folder / "tokenizer", model_max_length=TOKENS, local_files_only=True
    )
    return cast(CLIPTokenizer, tokenizer)


def load_first_encoder() -> CLIPTextModelWithProjection:
    """`moji`'s text encoder, on the grid; its projection changes nothing."""
    pretrained = CLIPTextModel.from_pretrained(EMBEDDED / "text_encoder", local_files_only=True)
    settings = pretrained.config.to_dict() | {"projection_dim": WIDTHS[0]}
    encoder = CLIPTextModelWithProjection(CLIPTextConfig(**settings))
    weights = round_to_grid(rename_weights(pretrained))
    encoder.load_state_dict({f"text_model.{k}": v for k, v in weights.items()}, strict=False)
    with torch.no_grad():
        encoder.text_projection.weight.copy_(torch.eye(WIDTHS[0]))
    return encoder


def rename_weights(encoder: CLIPTextModel) -> dict[str, Tensor]:
    """Its weights by names that do not begin with `text_model.`, whichever way this version spells them."""
    return {name.removeprefix("text_model."): value for name, value in encoder.state_dict().items()}


def build_second_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """2 layers of width 128."""
    settings = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTHS[1],
        projection_dim=WIDTHS[1],
        intermediate_size=4 * WIDTHS[1],
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(settings)


def list_trained_parameters(network: nn.Module, second: nn.Module) -> dict[str, nn.Parameter]:
    """All trained parameters, by name."""
    parameters = {f"transformer.{name}": value for name, value in network.named_parameters()}
    return parameters | {f"text_encoder_2.{name}": value for name, value in second.named_parameters()}


def list_inner_matrices(network: nn.Module) -> list[nn.Parameter]:
    """The blocks' matrices but those of the adaptive norms, which begin at zero."""
    return [
        value
        for name, value in network.named_parameters()
        if value.ndim == 2 and name.startswith("transformer_blocks.") and ".norm1" not in name
    ]


def join_encodings(
    first: CLIPTextModelWithProjection,
    second: CLIPTextModelWithProjection,
    tokens: Tensor,
    *,
    trained_rows: int,
) -> tuple[Tensor, Tensor]:
    """Tokens [B, T] to hidden states [B, T, 384] and pooled ones [B, 384], of both encoders' last layers but one.

    They are joined as in the pipeline. Gradients reach the second encoder from the first rows only.
    """
    hidden, pooled = [], []
    for encoder, rows in ((first, 0), (second, min(trained_rows, len(tokens)))):
        parts = []
        if rows:
            parts.append(encoder(tokens[:rows], output_hidden_states=True))
        if rows < len(tokens):
            with torch.no_grad():
                parts.append(encoder(tokens[rows:], output_hidden_states=True))
        hidden.append(torch.cat([part.hidden_states[-2] for part in parts]))
        pooled.append(torch.cat([part.text_embeds for part in parts]))
    return torch.cat(hidden, -1), torch.cat(pooled, -1)


def append_absent(hidden: Tensor, count: int) -> Tensor:
    """Hidden states [B, T, D] followed by this many tokens of zeros."""
    return torch.cat([hidden, hidden.new_zeros(len(hidden), count, hidden.shape[-1])], 1)


if __name__ == "__main__":
    run_app(app)
