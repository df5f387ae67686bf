"""Cost of a step of `customize train` here and in diffusers' LoRA script, both sides in one run.

    python -m benchmarks.speed.customize                    SD 1.5's shape, 512², bf16, two cores: about an hour
    python -m benchmarks.speed.customize --shape moji       the embedded model's: a few minutes
    python -m benchmarks.speed.customize --device cuda      for a GPU

The other side is a plain re-statement of what diffusers' `train_dreambooth_lora.py` does in a step: decode the
pictures, turn them upright, scale and crop them, encode them and draw from the posterior, encode the prompts, noise,
ask the network with a LoRA of rank 4 on attention under autocast, mean squared error (and the half of the class
pictures), backward, clip, AdamW, read the loss. Its best flags are there as well: the text encoded once, and bf16, in
which both sides work by default; the script's own default is fp32. It has a network of its own, loaded and
laid out in memory as the script does it. Parity comes first: on the same latents, noise and levels both sides have one
loss and one gradient. Then steps of every kind are timed in turn, and totals are composed from counted steps, not run:
for a cold run of 800 steps with prior preservation at each one's defaults,

    script    200 · (50 · evaluation + decoding) + 800 · script, prior           evaluations are guided: two rows each
    here      5 · encoding + text + 64 · bank + 800 · here, prior

`bare` is forward, loss and backward of the adapted network alone, on tensors that are there: what no trainer can go
below. On a CPU our steps (and `bare`) compute attention in the way whose backward pass is faster
(`backbone.training.attention`), for latents of up to 32 × 32; on SD 1.5's shape both sides attend alike. The script's
class pictures are as large as the model's and its own 1.25 times; loading the parts is counted on neither side.
Weights are random where the shape is not `moji`'s: they cost the same time. Where other work shares the machine,
`--clock cpu` counts processor seconds instead of waiting; it means something with one thread (OMP_NUM_THREADS=1). The
script itself, which confirms this statement of it, and peak memory are in `benchmarks.speed.script`.
"""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
import typer
from PIL import Image, ImageOps
from torch import Tensor

from backbone.adapters.lora import disable_adapters
from backbone.cli.commands import run_main
from backbone.conditions.conditions import Conditions
from backbone.diffusion.noise import generator
from backbone.io.console import UserError, notify
from backbone.io.files import write_json, write_text
from backbone.media.transforms import to_tensor
from backbone.models.model import Backbone, Posterior
from backbone.training.attention import fast_attention_backward
from backbone.training.base_predictions import BasePredictions, draw_stratified_levels
from backbone.training.run import take_steps
from benchmarks.speed.shapes import (
    CLOCKS,
    CLOCKS_OF,
    ClockFlag,
    Parts,
    ResultsFlag,
    describe_machine,
    encode_pictures,
    load_like_script,
    make_random_images,
    open_parts,
    time_in_turns,
    write_model_folder,
    write_section,
)
from customize.data.dataset import Bucket, TrainingData
from customize.objectives.dreambooth import Batch, DreamBooth
from customize.settings import Settings

STEPS, PICTURES, CLASS_PICTURES, CLASS_STEPS, CLASS_BATCH, GUIDANCE = 800, 5, 200, 50, 4, 7.5
BANK_BATCH = 8
PROMPT, CLASS_PROMPT = "a photo of sks dog", "a photo of dog"
KINDS = ("script", "script, text once", "here", "bare")
ALL_KINDS = (*KINDS, *(f"{kind}, prior" for kind in KINDS))


def main(
    shape: Annotated[str, typer.Option(help="sd15, sdxl or moji.")] = "sd15",
    batch: Annotated[int, typer.Option(min=1, help="Pictures a step; as many again of the class.")] = 1,
    warm: Annotated[int, typer.Option(min=1, help="Timed steps of each kind, after one that is not.")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    precision: Annotated[str, typer.Option(help="Of the frozen weights: fp32, bf16 or fp16.")] = "bf16",
    clock: ClockFlag = "wall",
    results: ResultsFlag = None,
    out: Annotated[Path, typer.Option(help="Where the results go.")] = Path(
        "build/benchmarks/customize_speed"
    ),
) -> None:
    """Parity, then steps of every kind in turn, then the totals."""
    with write_model_folder(shape) as model:
        theirs = load_like_script(model, device, precision)
        bench = Bench.of(open_parts(model, device, precision), batch, theirs)
        parity = measure_parity(bench.training)
        notify(
            f"parity: loss differs by {parity.loss:.1e}, gradients by {parity.gradient:.1e} of their largest entry"
        )
        seconds = time_in_turns(
            bench.acts(), warm, device, clock=CLOCKS_OF[clock],
            say=lambda turn, name, elapsed: notify(f"{turn}/{warm} {name}: {elapsed:.3f} s"),
        )  # fmt: skip
    median = {name: statistics.median(values) for name, values in seconds.items()}
    flags = ["--shape", shape, "--batch", str(batch), "--device", device, "--precision", precision]
    facts: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.speed.customize", *flags, "--warm", str(warm), "--clock", clock]),
        "shape": shape, "batch": batch, "warm_steps": warm, "precision": precision, "clock": clock,
        "machine": describe_machine(device), "parity": parity._asdict(), "seconds": median, "all_seconds": seconds,
        "totals": sum_totals(median),
    }  # fmt: skip
    text = format_markdown(facts)
    write_json(out / f"{shape}-{device}.json", facts)
    write_text(out / f"{shape}-{device}.md", text)
    if results is not None:
        write_section(results, f"`{shape}`, {batch} a step, {device}", text)
    print(text)


@dataclass
class Bench:
    """Both sides, with adapters of one shape."""

    parts: Parts
    training: DreamBooth
    script: Script
    with_prior: TrainingData
    without_prior: TrainingData

    @classmethod
    def of(cls, parts: Parts, batch: int, theirs: Parts | None = None) -> Bench:
        """Prepare everything for steps of `batch` pictures; the script has its own parts (`theirs`), or shares ours."""
        with_prior = make_material(parts.model)
        without_prior = replace(with_prior, buckets=[Bucket(with_prior.buckets[0].rows)])
        training = DreamBooth(parts.model, with_prior, make_settings(batch))
        script = Script(parts, training)
        if theirs is not None:
            script = Script(
                theirs, DreamBooth(theirs.model, make_material(theirs.model), make_settings(batch))
            )
        return cls(parts, training, script, with_prior, without_prior)

    def acts(self) -> dict[str, Callable[[], object]]:
        """All timed functions, by name."""
        acts: dict[str, Callable[[], object]] = {
            kind: partial(self.step, kind) for kind in ALL_KINDS if not kind.startswith("bare")
        }
        acts["bare"] = BareStep(self.training, self.without_prior).step
        acts["bare, prior"] = BareStep(self.training, self.with_prior).step
        acts["evaluation"] = self.script.evaluate
        acts["decoding"] = self.script.decode
        acts["encoding"] = self.encode
        acts["text"] = partial(self.parts.encode, [PROMPT, CLASS_PROMPT])
        acts["bank"] = self.base_predictions
        return acts

    def step(self, kind: str) -> None:
        """An optimiser step of this kind."""
        prior = kind.endswith("prior")
        self.training.data = self.with_prior if prior else self.without_prior
        if kind.startswith("script"):
            self.script.step(prior=prior, text_once="text once" in kind)
            return
        if kind.startswith("bare"):
            BareStep(self.training, self.training.data).step()
            return
        self.training.settings = replace(self.training.settings, steps=self.training.done + 1)
        for _ in take_steps(self.training):
            pass

    def encode(self) -> None:
        """One of the subject's pictures, encoded."""
        encode_pictures(self.parts, self.script.pictures[:1], self.script.random)

    @torch.no_grad()
    def base_predictions(self) -> None:
        """The base model's predictions for a batch of noised images."""
        base = cast(BasePredictions, self.with_prior.buckets[0].base)
        class_prompt = cast(Conditions, self.with_prior.conditions)[-1:]
        self.parts.model.predict(
            base.noisy[:BANK_BATCH], base.level[:BANK_BATCH], class_prompt.repeat(BANK_BATCH)
        )


# The script's side ------------------------------------------------------------------------------------------


class Script:
    """diffusers' step, stated plainly, on the same model and adapter."""

    def __init__(self, parts: Parts, training: DreamBooth) -> None:
        from diffusers import DDPMScheduler

        self.parts, self.training = parts, training
        side, self.batch = parts.model.resolution, training.settings.batch
        self.pictures = make_random_images(round(1.25 * side), self.batch)
        self.class_pictures = make_random_images(side, self.batch)
        self.random = torch.Generator().manual_seed(0)
        self.noise_scheduler: Any = DDPMScheduler.from_config(parts.model.location.config("scheduler"))
        conditions = cast(Conditions, training.data.conditions)  # as if encoded before
        self.conditions = conditions.to(parts.model.device)

    def step(self, *, prior: bool, text_once: bool) -> float:
        """One optimiser step; returns the loss, as the script logs it at every step."""
        training, device = self.training, self.parts.model.device
        latents = self.latents([*self.pictures, *(self.class_pictures if prior else ())])
        noise = torch.randn(latents.shape, generator=self.random).to(latents)
        total = self.noise_scheduler.config.num_train_timesteps
        at = torch.randint(0, total, (len(latents),), generator=self.random).to(device)
        loss = self.loss(
            latents, noise, at, self.encode_prompts(prior=prior, text_once=text_once), prior=prior
        )
        loss.backward()
        parameters = list(training.parameters.values())
        torch.nn.utils.clip_grad_norm_(parameters, training.settings.max_grad_norm)
        training.optimizer.step()
        training.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def loss(
        self, latents: Tensor, noise: Tensor, at: Tensor, conditions: Conditions, *, prior: bool
    ) -> Tensor:
        """The mean squared error of what the model predicts, ε or v; with a prior, plus the second half's, weighted."""
        noisy = self.noise_scheduler.add_noise(latents, noise, at)
        predicted = predict(self.parts.model, noisy, at, conditions)
        is_velocity = self.noise_scheduler.config.prediction_type == "v_prediction"
        target = self.noise_scheduler.get_velocity(latents, noise, at) if is_velocity else noise
        if not prior:
            return F.mse_loss(predicted, target)
        (subject, class_), (subject_target, class_target) = predicted.chunk(2), target.chunk(2)
        weight = self.training.settings.prior_loss_weight
        return F.mse_loss(subject, subject_target) + weight * F.mse_loss(class_, class_target)

    @torch.no_grad()
    def latents(self, files: Sequence[bytes]) -> Tensor:
        """Files decoded, upright, scaled, cropped at random and encoded; drawn from their posteriors."""
        side, vae = self.parts.model.resolution, cast(Any, self.parts.autoencoder)
        opened_ = [self.prepare_picture(content, side) for content in files]
        posterior = vae.encode(torch.stack(opened_).to(next(vae.parameters()))).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=self.random).to(posterior.mean)
        latents: Tensor = (posterior.mean + posterior.std * noise) * vae.config.scaling_factor
        return latents.float()

    def prepare_picture(self, content: bytes, side: int) -> Tensor:
        """A picture [3, side, side] in −1…1."""
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
        scale = side / min(upright.size)
        width, height = (max(side, round(length * scale)) for length in upright.size)
        scaled = upright.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (
            int(torch.randint(0, length - side + 1, (), generator=self.random)) for length in (width, height)
        )
        return to_tensor(scaled.crop((left, top, left + side, top + side)))

    @torch.no_grad()
    def encode_prompts(self, *, prior: bool, text_once: bool) -> Conditions:
        """The batch's prompts, encoded again unless `text_once`."""
        if not text_once:
            prompts = [PROMPT] * self.batch + [CLASS_PROMPT] * (self.batch if prior else 0)
            return self.parts.encode(prompts).to(self.parts.model.device)
        subject = self.conditions[:1].repeat(self.batch)
        return Conditions.cat([subject, self.conditions[-1:].repeat(self.batch)]) if prior else subject

    @torch.no_grad()
    def evaluate(self) -> None:
        """One guided evaluation for a batch of class pictures: twice as many rows."""
        model = self.parts.model
        noisy = torch.zeros(2 * CLASS_BATCH, *model.latent_shape, device=model.device)
        class_prompt = self.conditions[-1:].repeat(len(noisy))
        middle = read_timesteps(model)[torch.full((len(noisy),), len(read_timesteps(model)) // 2)]
        with disable_adapters(model.denoiser):
            prompted, unprompted = predict(model, noisy, middle, class_prompt).chunk(2)
        unprompted + GUIDANCE * (prompted - unprompted)

    @torch.no_grad()
    def decode(self) -> None:
        """A batch of class pictures decoded."""
        vae = cast(Any, self.parts.autoencoder)
        latents = torch.zeros(CLASS_BATCH, *self.parts.model.latent_shape).to(next(vae.parameters()))
        vae.decode(latents / vae.config.scaling_factor)


def predict(model: Backbone, noisy: Tensor, at: Tensor, conditions: Conditions) -> Tensor:
    """The network's prediction under autocast, float32, as a script asks for it."""
    with model.autocast():
        predicted = model.family.network(model.denoiser, conditions)(noisy, at.to(noisy.device))
    return predicted.float()


def read_timesteps(model: Backbone) -> Tensor:
    """The time of every noise level, as the network takes it."""
    times = model.path.levels.time
    assert times is not None
    return times


# Our side ---------------------------------------------------------------------------------------------------


def make_settings(batch: int) -> Settings:
    """The script's own choices where it has some: LoRA of rank 4 on attention, AdamW at 1e-4, no weights of levels."""
    return Settings(
        images="", token="[V]", class_noun="dog", batch=batch, prior_batch=batch, learning_rate=1e-4,
        lr_scheduler="constant", lr_warmup_steps=0, rank=4, lora_alpha=4.0, lora_layers="attention",
        loss_weighting="none",
    )  # fmt: skip


def make_material(model: Backbone) -> TrainingData:
    """Training data of random latents, texts and base predictions."""
    random, draws = generator(0, "material"), make_settings(1).prior_draws
    shape = model.latent_shape

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random)

    posteriors = [Posterior(normal(1, *shape), 0.1 * normal(1, *shape).abs()) for _ in range(PICTURES)]
    shapes = model.family.spec(model.location, model.dtype).text_shapes
    text = {name: normal(PICTURES + 1, *size) for name, size in shapes.items()}
    levels = draw_stratified_levels(draws, len(model.path.levels), random)
    base = BasePredictions(normal(draws, *shape), levels, normal(draws, *shape))
    bucket = Bucket(torch.arange(PICTURES), base, torch.zeros(draws, dtype=torch.long))
    names = [f"picture {number}" for number in range(PICTURES)]
    return TrainingData(
        posteriors, [PROMPT] * PICTURES, names, torch.full((PICTURES,), 1 / PICTURES), None, [bucket],
        [CLASS_PROMPT], None, None, Conditions(text),
    )  # fmt: skip


class BareStep:
    """Forward, loss and backward of the adapted network on one batch that is there."""

    def __init__(self, training: DreamBooth, material: TrainingData) -> None:
        self.training, model = training, training.model
        data_before, training.data = training.data, material
        random = generator(0, "bare")
        batch = training.draw_subject_batch(material.buckets[0], random)
        if material.has_prior:
            batch = Batch.cat([batch, training.draw_prior_batch(material.buckets[0], random)])
        training.data = data_before
        self.noisy, self.wanted = batch.noisy.to(model.device), batch.target.to(model.device)
        self.at = read_timesteps(model)[batch.level].to(model.device)
        self.conditions = cast(Conditions, material.conditions)[batch.rows].to(model.device)

    def step(self) -> None:
        """A step that leaves no state behind."""
        model = self.training.model
        with fast_attention_backward(model.denoiser):
            predicted = predict(model, self.noisy, self.at, self.conditions)
            F.mse_loss(predicted, self.wanted).backward()
        for value in self.training.parameters.values():
            value.grad = None


# Parity -----------------------------------------------------------------------------------------------------


class Parity(NamedTuple):
    """Our loss; the differences of the script's loss and gradient, the latter relative to its largest entry."""

    here: float
    loss: float
    gradient: float


def measure_parity(training: DreamBooth, *, size: float = 1e-3) -> Parity:
    """Both sides with class pictures on the same latents, noise and levels, the adapter moved off zero by `size`.

    Raises `UserError` for a model that predicts neither ε nor v, the script's targets.
    """
    model, data_before = training.model, training.data
    if model.path.prediction_type not in ("epsilon", "v_prediction"):
        raise UserError(
            "The script's loss is about predicted noise or v. Choose a model that predicts one of them."
        )
    start = {name: value.detach().clone() for name, value in training.parameters.items()}
    with torch.no_grad():
        for number, value in enumerate(training.parameters.values()):
            value.add_(size * torch.randn(value.shape, generator=generator(0, "parity", number)).to(value))
    training.data = data = take_one_image(data_before)
    subject = training.draw_subject_batch(data.buckets[0], random := generator(0, "parity"))
    prior = training.draw_prior_batch(data.buckets[0], random)
    parameters = list(training.parameters.values())
    our_loss = training.loss(generator(0, "parity"), 1)
    # Before there is a second graph in memory
    ours = torch.autograd.grad(our_loss, parameters, allow_unused=True)
    count = training.settings.batch
    pair = (data.posteriors[0].mean, cast(Tensor, data.class_latents))
    clean = torch.cat([latent.expand(count, -1, -1, -1) for latent in pair]).to(model.device)
    noise = torch.cat([subject.target, prior.target]).to(model.device)
    index = torch.cat([subject.level, prior.level])
    if model.path.prediction_type == "v_prediction":  # v = a·ε − b·x0
        a, b = model.path.levels[index].broadcast_like(clean)
        noise = (noise + b * clean) / a
    prompts = cast(Conditions, data.conditions).to(model.device)
    conditions = Conditions.cat([prompts[:1].repeat(count), prompts[-1:].repeat(count)])
    script = Script(Parts(model, torch.nn.Identity(), lambda prompts: Conditions({})), training)
    their_loss = script.loss(
        clean, noise, read_timesteps(model)[index].long().to(model.device), conditions, prior=True
    )
    theirs = torch.autograd.grad(their_loss, parameters, allow_unused=True)
    training.data = data_before
    with torch.no_grad():
        for name, value in training.parameters.items():
            value.copy_(start[name])
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    largest = max(float(a.abs().max()) for a, _ in pairs)
    difference = max(float((a - b).abs().max()) for a, b in pairs)
    return Parity(
        float(our_loss.detach()),
        abs(float(our_loss.detach()) - float(their_loss.detach())),
        difference / largest,
    )


def take_one_image(material: TrainingData) -> TrainingData:
    """One picture of the subject and one of its class, both exactly known."""
    first, class_image = material.posteriors[0], material.posteriors[1]
    conditions = cast(Conditions, material.conditions)[[0, -1]]
    sure = Posterior(first.mean, torch.zeros_like(first.std))
    return replace(
        material, posteriors=[sure], prompts=[PROMPT], names=["picture"], frequency=torch.ones(1),
        buckets=[Bucket(torch.zeros(1, dtype=torch.long))], class_latents=class_image.mean,
        class_rows=torch.zeros(1, dtype=torch.long),
        conditions=conditions,
    )  # fmt: skip


# Figures ----------------------------------------------------------------------------------------------------


def sum_totals(seconds: dict[str, float]) -> dict[str, float]:
    """Seconds of the cold run of 800 steps with prior preservation, by its parts, for both sides."""
    class_seconds = CLASS_PICTURES / CLASS_BATCH * (CLASS_STEPS * seconds["evaluation"] + seconds["decoding"])
    draws = make_settings(1).prior_draws
    preparation = PICTURES * seconds["encoding"] + seconds["text"] + draws / BANK_BATCH * seconds["bank"]
    return {
        "script: class pictures": class_seconds,
        "script": class_seconds + STEPS * seconds["script, prior"],
        "script, text once": class_seconds + STEPS * seconds["script, text once, prior"],
        "here: preparation": preparation,
        "here": preparation + STEPS * seconds["here, prior"],
    }


def format_markdown(facts: dict[str, Any]) -> str:
    """The tables as Markdown."""
    seconds, totals = facts["seconds"], facts["totals"]
    lines = [
        f"`{facts['command']}`",
        "",
        f"{facts['precision']}, {facts['batch']} a step, {facts['warm_steps']} warm steps of each kind in turn, "
        f"medians of {CLOCKS[facts['clock']]} ({facts['machine']}). Parity: loss {facts['parity']['here']:.4f}, to "
        f"{facts['parity']['loss']:.1e}; gradient to {facts['parity']['gradient']:.1e}.",
        "",
        "| a step | seconds | script / this | with prior | script / this |",
        "|---|---|---|---|---|",
    ]
    for kind in KINDS:
        cells = [kind]
        for suffix in ("", ", prior"):
            value = seconds[kind + suffix]
            cells += [f"{value:.3f}", f"{seconds['script' + suffix] / value:.2f}×"]
        lines.append(f"| {' | '.join(cells)} |")
    ratios = [seconds[f"here{suffix}"] / seconds[f"bare{suffix}"] for suffix in ("", ", prior")]
    best = totals["script, text once"]
    lines += [
        "",
        f"A step here takes {ratios[0]:.2f} times the bare one, with the prior {ratios[1]:.2f} times.",
        "",
        f"Cold run of {STEPS} steps with prior preservation, composed of counted steps, not run:",
        "",
        "| side | seconds | of it before the first step | script / this |",
        "|---|---|---|---|",
        f"| script | {totals['script']:.0f} | {totals['script: class pictures']:.0f} | 1.00× |",
        f"| script, text once | {best:.0f} | {totals['script: class pictures']:.0f} "
        f"| {totals['script'] / best:.2f}× |",
        f"| here | {totals['here']:.0f} | {totals['here: preparation']:.0f} "
        f"| {totals['script'] / totals['here']:.2f}× |",
    ]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    run_main(main)
