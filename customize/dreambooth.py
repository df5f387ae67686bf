"""DreamBooth: a few pictures of a subject, a word that comes to mean it, a class that keeps its meaning.

Ruiz et al. 2023 bind a rare token to the subject by training on “a [V] dog”, and keep “a dog” what it was by a second,
prior-preservation term (eq. 2). What is trained is a question of its own (`customize.learn`): a low-rank adapter, the
token's embedding, some or all of the weights. The prior term needs no class pictures by default: at noised pictures of
the subject, under the class prompt, the network must say what the untouched one said, from a bank of answers computed
once. With `--prior class-images` it learns from pictures of the class that the base draws, as in the paper.

The phases follow each other so that the encoders and the denoiser are never in memory together:
check the pictures, encode pictures and prompts (remembered on disk), free the encoders, bank the base, train, show.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from backbone import processes
from backbone.attention import quick_to_train
from backbone.bank import Bank, bank_of, stratified_levels
from backbone.cache import encoded, encoded_prompts, remembered
from backbone.console import UserError
from backbone.families import Text
from backbone.files import content_hash
from backbone.images import Picture, bucket_sizes, fitted, mask_to_tensor, nearest_size, read_folder
from backbone.loop import (
    Average,
    Report,
    Schedule,
    generator,
    load_checkpoint,
    save_checkpoint,
    train,
    warm_constant,
    warm_cosine,
)
from backbone.model import Backbone, Posterior
from backbone.noise import Kind, Level, add_noise, debiased, min_snr, target
from backbone.sample import Request, sample_latents
from customize.learn import OWN_WORDS, changes_denoiser, pieces
from customize.masks import mask_seen
from customize.settings import Settings

CHECKPOINT = "checkpoint.safetensors"
CLASS_STEPS = 20  # of the sampler that draws the class
CLASS_IMAGES = 48  # where neither a number nor a folder is given


@dataclass(frozen=True)
class Group:
    """The pictures of one subject with their prompts and its class prompt, all in the model's words."""

    pictures: Sequence[Picture]
    prompts: Sequence[str]
    class_prompt: str


@dataclass(frozen=True)
class Material:
    """What training reads, of all subjects one behind the other.

    posteriors     one for each picture, mirrored ones behind a subject's [1, C, H, W]
    prompts        one for each posterior
    names          what each posterior is a picture of, for messages
    share          how often each is drawn [N]: the same for every subject
    masks          where each picture counts [1, H, W] in 0…1, or None
    buckets        the posteriors of one size, which can share a batch
    class_prompts  one for each subject
    drawn          latents of class images [K, C, H, W], drawn by the base or the user's own, or None
    drawn_classes  which class prompt each of them is about [K], or None
    text           `prompts` and then `class_prompts` encoded, or None while the text side itself is trained
    """

    posteriors: list[Posterior]
    prompts: list[str]
    names: list[str]
    share: Tensor
    masks: list[Tensor] | None
    buckets: list[Bucket]
    class_prompts: list[str]
    drawn: Tensor | None
    text: Text | None
    drawn_classes: Tensor | None = None

    @property
    def has_prior(self) -> bool:
        """Whether there is anything to preserve the classes by."""
        return self.drawn is not None or any(bucket.bank is not None for bucket in self.buckets)


@dataclass(frozen=True)
class Bucket:
    """Pictures of one size.

    rows     which of the posteriors they are [N]
    bank     the untouched model's answers to class prompts at these pictures, K draws, or None
    classes  which class prompt each draw is about [K]
    """

    rows: Tensor
    bank: Bank | None = None
    classes: Tensor | None = None


def prepare(model: Backbone, groups: Sequence[Group], settings: Settings) -> Material:
    """Encodes pictures and prompts, then asks the base about the classes, and frees the encoders."""
    posteriors: list[Posterior] = []
    prompts: list[str] = []
    names: list[str] = []
    masks: list[Tensor | None] = []
    owners: list[int] = []
    for number, group in enumerate(groups):
        sizes = sizes_of(group.pictures, model.resolution) if settings.aspect_buckets else None
        for flip in (False, True) if settings.flip else (False,):
            posteriors += encoded_together(model, group.pictures, flip=flip, sizes=sizes)
            masks += masks_of(group.pictures, sizes, flip=flip)
            prompts += group.prompts
            names += [str(picture.path) for picture in group.pictures]
            owners += [number] * len(group.pictures)
    classes = [group.class_prompt for group in groups]
    with processes.writer_first():
        class_text = encoded_prompts(model, classes)
        text = None if trains_text(settings) else encoded_prompts(model, [*prompts, *classes])
        empty = encoded_prompts(model, [""]) if settings.mask == "auto" else {}
    buckets = buckets_of(posteriors)
    drawn = drawn_classes = None
    if preserves(settings) and settings.prior == "class-images":
        if len({posterior.mean.shape for posterior in posteriors}) > 1:
            raise UserError(
                "Class pictures are square, and with --aspect-buckets the subject's are not. Use --prior base."
            )
        with processes.writer_first():
            each = [class_latents(model, prompt, settings, number) for number, prompt in enumerate(classes)]
        drawn = torch.cat(each)
        drawn_classes = torch.cat([torch.full((len(one),), number) for number, one in enumerate(each)])
    model.free("autoencoder", "text_encoder")
    if preserves(settings) and settings.prior == "base":
        with processes.writer_first():
            buckets = [banked(model, bucket, posteriors, class_text, owners, settings) for bucket in buckets]
    if settings.mask == "auto":
        with processes.writer_first():
            masks = found_masks(model, masks, posteriors, class_text, empty, owners)
    share = torch.tensor([1 / owners.count(owner) for owner in owners])
    at_latents = sized(masks, [posterior.mean.shape[-2:] for posterior in posteriors])
    return Material(
        posteriors, prompts, names, share, at_latents, buckets, classes, drawn, text, drawn_classes
    )


def encoded_together(
    model: Backbone, pictures: Sequence[Picture], *, flip: bool, sizes: Sequence[tuple[int, int]] | None
) -> list[Posterior]:
    """`encoded`, after each process has encoded its part of the pictures."""

    def encode(row: int) -> None:
        encoded(model, [pictures[row]], flip=flip, sizes=sizes and [sizes[row]])

    processes.prepared(encode, range(len(pictures)))
    return encoded(model, pictures, flip=flip, sizes=sizes)


def found_masks(
    model: Backbone,
    masks: Sequence[Tensor | None],
    posteriors: Sequence[Posterior],
    text: Text,
    empty: Text,
    owners: Sequence[int],
) -> list[Tensor | None]:
    """The masks that came with the pictures, and for the others where the base sees the subject's class."""
    own = [{name: value[owner : owner + 1] for name, value in text.items()} for owner in owners]
    return [
        mask_seen(model, posterior, said, empty) if mask is None else mask
        for mask, posterior, said in zip(masks, posteriors, own, strict=True)
    ]


def sizes_of(pictures: Sequence[Picture], resolution: int) -> list[tuple[int, int]]:
    """The size (W, H) at which each picture is trained on: of its own shape, roughly."""
    sizes = bucket_sizes(resolution)
    return [nearest_size(picture.open().size, sizes) for picture in pictures]


def buckets_of(posteriors: Sequence[Posterior]) -> list[Bucket]:
    """The posteriors by their sizes."""
    found: dict[tuple[int, ...], list[int]] = {}
    for row, posterior in enumerate(posteriors):
        found.setdefault(tuple(posterior.mean.shape), []).append(row)
    return [Bucket(torch.tensor(rows)) for rows in found.values()]


def banked(
    model: Backbone,
    bucket: Bucket,
    posteriors: list[Posterior],
    text: Text,
    owners: Sequence[int],
    settings: Settings,
) -> Bucket:
    """The bucket with the base's answers to every subject's class prompt at its own noised pictures."""
    banks, classes = [], []
    rows = bucket.rows.tolist()
    for number in sorted({owners[row] for row in rows}):
        own = {name: value[number : number + 1] for name, value in text.items()}
        some = [posteriors[row] for row in rows if owners[row] == number]
        banks.append(bank_of(model, some, own, draws=settings.prior_draws, seed=settings.seed))
        classes.append(torch.full((settings.prior_draws,), number))
    columns = ([getattr(bank, name) for bank in banks] for name in ("noisy", "level", "prediction"))
    return replace(bucket, bank=Bank(*(torch.cat(column) for column in columns)), classes=torch.cat(classes))


class Batch(NamedTuple):
    """Noisy latents [B, C, H, W], indices of their levels [B], targets [B, C, H, W], weights [B, 1, H, W]."""

    noisy: Tensor
    levels: Tensor
    wanted: Tensor
    weight: Tensor


class Training:
    """A concept in training: `steps` yields the reports, `save` and `resume` keep it exactly."""

    def __init__(self, model: Backbone, material: Material, settings: Settings) -> None:
        self.model, self.material, self.settings = model, material, settings
        self.pieces = pieces(model, settings)
        self.parameters = {name: value for piece in self.pieces for name, value in piece.parameters.items()}
        self.optimizer = optimizer(self.pieces, settings)
        self.average = Average(self.parameters, decay=settings.ema_decay) if settings.ema_decay else None
        self.share = share_of(settings)
        self.done = 0

    def steps(self) -> Iterator[Report]:
        """Trains, a report each optimiser step."""
        if self.settings.gradient_checkpointing:
            cast(Any, self.model.denoiser).enable_gradient_checkpointing()
        with quick_to_train(self.model.denoiser):
            for report in train(
                self.losses,
                self.parameters,
                optimizer=self.optimizer,
                schedule=schedule(self.settings),
                steps=self.settings.steps,
                done=self.done,
                clip=self.settings.max_grad_norm,
                average=self.average,
                reduce=processes.averaging(),
            ):
                self.done = report.step
                yield report

    def losses(self, step: int) -> Iterator[Tensor]:
        """The losses of this process's share of one step's micro-batches."""
        share = (step - 1) / self.settings.steps
        for piece in self.pieces:
            for value in piece.parameters.values():
                value.requires_grad_(piece.begins <= share < piece.ends)
        for micro in range(self.settings.gradient_accumulation_steps)[self.share.micros]:
            key = (self.settings.seed, step) if micro == 0 else (self.settings.seed, step, micro)
            yield self.loss(generator(*key), step)

    def loss(self, random: torch.Generator, step: int) -> Tensor:
        """Ruiz et al. 2023, eq. 2: the subject's error plus λ times the change of the class; of this process's rows."""
        settings, material = self.settings, self.material
        bucket = self.bucket(random)
        subject, rows = self.subject_batch(bucket, random)
        parts = [subject]
        if material.has_prior:
            prior, prior_rows = self.prior_batch(bucket, random)
            parts.append(prior)
            rows = torch.cat([rows, prior_rows])
        columns = (torch.cat(column)[self.share.rows] for column in zip(*parts, strict=True))
        (noisy, index, wanted, weight), rows = columns, rows[self.share.rows]
        with self.model.autocast():
            text = self.text(rows)
        time = self.model.path.levels.time
        assert time is not None
        with self.model.autocast(), self.dropout(step):
            prediction = self.model.family.network(self.model.denoiser, text)(
                noisy, time[index].to(noisy.device)
            )
        error = (prediction.float() - wanted).square() * weight.to(wanted)
        each = error.flatten(1).mean(1)
        self.refuse_infinite(each.detach(), rows, step)
        return each.sum() * (self.share.scale / settings.batch)

    def refuse_infinite(self, errors: Tensor, rows: Tensor, step: int) -> None:
        """`UserError` naming the pictures whose error is not finite."""
        bad = [int(row) for row, fine in zip(rows, errors.isfinite().tolist(), strict=True) if not fine]
        if not bad:
            return
        names, prompts = self.material.names, self.material.class_prompts
        culprits = [names[row] if row < len(names) else f"“{prompts[row - len(names)]}”" for row in bad]
        raise UserError(
            f"Training stopped at step {step}: the loss is not finite at {', '.join(dict.fromkeys(culprits))}. "
            "Lower --learning-rate or choose --precision fp32; the last checkpoint holds finite weights."
        )

    def bucket(self, random: torch.Generator) -> Bucket:
        """The pictures that a batch is drawn from, as often as all of them together are."""
        buckets = self.material.buckets
        if len(buckets) == 1:
            return buckets[0]
        share = torch.stack([self.material.share[bucket.rows].sum() for bucket in buckets])
        return buckets[int(torch.multinomial(share, 1, generator=random))]

    def subject_batch(self, bucket: Bucket, random: torch.Generator) -> tuple[Batch, Tensor]:
        """Noised pictures of the subjects, and which of them they are [B]."""
        settings, material, levels = self.settings, self.material, self.model.path.levels
        share = material.share[bucket.rows]
        chosen = bucket.rows[torch.multinomial(share, settings.batch, replacement=True, generator=random)]
        clean = torch.cat([material.posteriors[int(i)].sample(random) for i in chosen])
        noise = torch.randn(clean.shape, generator=random).to(clean.device)
        if settings.noise_offset:
            shift = torch.randn(clean.shape[:2], generator=random)[..., None, None].to(clean.device)
            noise = noise + settings.noise_offset * shift
        index = stratified_levels(settings.batch, len(levels), random)
        level, kind = levels[index], self.model.path.kind
        weight = weighting(level, kind, settings)[:, None, None, None].expand(-1, 1, *clean.shape[-2:])
        if material.masks is not None:
            weight = weight * torch.stack([material.masks[int(row)] for row in chosen])
        wanted = target(clean, noise, level, kind)
        return Batch(add_noise(clean, noise, level), index, wanted, weight), chosen

    def prior_batch(self, bucket: Bucket, random: torch.Generator) -> tuple[Batch, Tensor]:
        """Noised pictures for the class prompts, and which rows of the prompts those are [P].

        Targets are the base's own predictions, or the noise on pictures of the class that it drew.
        """
        material, count = self.material, self.settings.prior_batch
        if bucket.bank is not None and bucket.classes is not None:
            draw = torch.randint(len(bucket.bank), (count,), generator=random)
            noisy = bucket.bank.noisy[draw].to(self.model.device)
            index, wanted = bucket.bank.level[draw], bucket.bank.prediction[draw].to(noisy)
            about = bucket.classes[draw]
        else:
            assert material.drawn is not None and material.drawn_classes is not None
            draw = torch.randint(len(material.drawn), (count,), generator=random)
            clean = material.drawn[draw].to(self.model.device)
            noise = torch.randn(clean.shape, generator=random).to(clean)
            index = stratified_levels(count, len(self.model.path.levels), random)
            level = self.model.path.levels[index]
            noisy = add_noise(clean, noise, level)
            wanted = target(clean, noise, level, self.model.path.kind)
            about = material.drawn_classes[draw]
        share = self.settings.prior_loss_weight * self.settings.batch / count  # λ, over fewer pictures
        weight = torch.full((count, 1, *noisy.shape[-2:]), share)
        return Batch(noisy, index, wanted, weight), len(material.prompts) + about

    def text(self, rows: Tensor) -> Text:
        """The prompts of these rows [B], counted through the pictures' and then the classes'."""
        material = self.material
        if material.text is not None:
            return {name: value[rows.to(value.device)] for name, value in material.text.items()}
        every = [*material.prompts, *material.class_prompts]
        said = [every[int(row)] for row in rows]
        different = list(dict.fromkeys(said))
        found = self.model.text_encoder(different)
        places = torch.tensor([different.index(prompt) for prompt in said])
        return {name: value[places.to(value.device)] for name, value in found.items()}

    @contextmanager
    def dropout(self, step: int) -> Iterator[None]:
        """The network with the adapter's dropout, drawn from the step alone; without dropout as it is."""
        if not self.settings.lora_dropout:
            yield
            return
        self.model.denoiser.train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(self.settings.seed, step, "dropout").initial_seed())
            yield
        self.model.denoiser.eval()

    def save(self, run: Path) -> None:
        """Writes the checkpoint from which `resume` goes on bit for bit."""
        if not processes.is_writer():
            return
        save_checkpoint(
            run / CHECKPOINT,
            step=self.done,
            parameters=self.parameters,
            optimizer=self.optimizer,
            average=self.average,
        )

    def resume(self, run: Path) -> None:
        """Goes on where `save` was called last; from the start when it never was."""
        if (run / CHECKPOINT).exists():
            self.done, _ = load_checkpoint(
                run / CHECKPOINT,
                parameters=self.parameters,
                optimizer=self.optimizer,
                average=self.average,
            )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights inside the `with`, where an average is kept."""
        if self.average is None:
            yield
            return
        with self.average.applied():
            yield

    def write(self, run: Path, header: dict[str, str]) -> dict[str, Any]:
        """Writes what was learned; gives the fields of `Concept` that name the files."""
        files: dict[str, Any] = {}
        with self.averaged():
            for piece in self.pieces:
                files |= piece.save(run, header)
        return files


# What the settings stand for ---------------------------------------------------------------------------------


def share_of(settings: Settings) -> processes.Share:
    """What this process does of a step. Raises `UserError` for settings that these processes cannot share."""
    if settings.method in ("full", "custom-diffusion"):
        processes.refuse_shards(f"--method {settings.method}")
    if settings.adapter == "dora":
        processes.refuse_shards("DoRA, which measures the base's weights,")
    share = processes.share(settings.gradient_accumulation_steps, settings.batch)
    if settings.lora_dropout and share.scale > 1:
        raise UserError(
            "--lora-dropout leaves out parts of a whole batch, so that a batch cannot be cut up for "
            f"{share.scale} processes. Add --gradient-accumulation-steps {share.scale} with a smaller "
            "--batch, or leave out the dropout."
        )
    return share


def trains_text(settings: Settings) -> bool:
    """Whether prompts must be encoded anew in every step."""
    return settings.train_text_encoder or settings.method in OWN_WORDS


def preserves(settings: Settings) -> bool:
    """Whether there is a prior-preservation term."""
    asked = settings.prior != "off" and settings.prior_batch > 0 and settings.prior_loss_weight > 0
    return asked and changes_denoiser(settings)


def weighting(level: Level, kind: Kind, settings: Settings) -> Tensor:
    """The weight of each sample's error [B], by its noise level."""
    match settings.loss_weighting:
        case "none":
            return torch.ones(len(level))
        case "min-snr":  # Hang et al. 2023
            return min_snr(level, settings.snr_gamma, kind)
        case "debiased":  # Yu et al. 2023
            return debiased(level, kind)
    raise UserError(
        f"There is no weighting {settings.loss_weighting}. Choose one of none, min-snr, debiased."
    )


def schedule(settings: Settings) -> Schedule:
    """The learning rate's course by its name."""
    match settings.lr_scheduler:
        case "cosine":
            return warm_cosine(settings.steps, warmup=settings.lr_warmup_steps, floor=0.05)
        case "constant":
            return warm_constant(warmup=settings.lr_warmup_steps)
    raise UserError(f"There is no schedule {settings.lr_scheduler}. Choose cosine or constant.")


def optimizer(every: Sequence[Any], settings: Settings) -> Optimizer:
    """The optimiser by its name, a group of parameters for every piece."""
    groups = [
        {"params": list(piece.parameters.values()), "lr": piece.learning_rate}
        for piece in every
        if piece.parameters
    ]
    match settings.optimizer:
        case "adamw":
            return torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
        case "adamw8bit":
            try:
                from bitsandbytes.optim import AdamW8bit
            except ImportError as error:
                raise UserError("adamw8bit needs bitsandbytes. Run: pip install bitsandbytes") from error
            return cast(Optimizer, AdamW8bit(groups, weight_decay=settings.weight_decay))
        case "prodigy":  # Mishchenko & Defazio 2024: finds the step size; rates are factors of it
            try:
                from prodigyopt import Prodigy
            except ImportError as error:
                raise UserError("prodigy needs prodigyopt. Run: pip install prodigyopt") from error
            prodigy = Prodigy(
                groups,
                weight_decay=settings.weight_decay,
                use_bias_correction=True,
                safeguard_warmup=True,
                decouple=True,
            )
            return cast(Optimizer, prodigy)
    raise UserError(f"There is no optimiser {settings.optimizer}. Choose one of adamw, adamw8bit, prodigy.")


def masks_of(
    pictures: Sequence[Picture], sizes: Sequence[tuple[int, int]] | None, *, flip: bool
) -> list[Tensor | None]:
    """The pictures' masks [1, H, W] in 0…1, cropped as the pictures are; None for a picture that has none.

    Raises `UserError` for a mask that is black all over.
    """
    found: list[Tensor | None] = []
    for picture, size in zip(pictures, sizes or [(512, 512)] * len(pictures), strict=True):
        mask = picture.open_mask()
        if mask is None:
            found.append(None)
            continue
        tensor = mask_to_tensor(fitted(mask, size))
        if float(tensor.mean()) < 1e-3:
            raise UserError(
                f"The mask {picture.mask} is black all over, so nothing of {picture.path} would be learned. "
                "Paint white what is to be learned."
            )
        found.append(tensor.flip(-1) if flip else tensor)
    return found


def sized(masks: Sequence[Tensor | None], sizes: Sequence[Sequence[int]]) -> list[Tensor] | None:
    """Masks at the latents' sizes (H, W), each of mean 1 so that all pictures weigh the same; None if none."""
    if all(mask is None for mask in masks):
        return None
    found = []
    for mask, (height, width) in zip(masks, sizes, strict=True):
        small = F.adaptive_avg_pool2d(torch.ones(1, height, width) if mask is None else mask, (height, width))
        found.append(small / small.mean())
    return found


def class_latents(model: Backbone, class_prompt: str, settings: Settings, subject: int) -> Tensor:
    """Latents of a subject's class images [K, C, H, W]: the user's own, and what is missing as the base draws it.

    What is drawn is remembered and never decoded. Own images come in the order of their names.
    """
    own: list[Tensor] = []
    if settings.class_images:
        found = read_folder(settings.class_images[subject])[: settings.num_class_images or None]
        own = [posterior.mean for posterior in encoded_together(model, found, flip=False, sizes=None)]
    missing = (settings.num_class_images or (0 if own else CLASS_IMAGES)) - len(own)
    drawn = [drawn_latents(model, class_prompt, settings, missing)] if missing else []
    return torch.cat([*(latent.float().cpu() for latent in own), *drawn])


def drawn_latents(model: Backbone, class_prompt: str, settings: Settings, count: int) -> Tensor:
    """Latents of the class as the base draws it [K, C, H, W], drawn once and remembered; never decoded."""
    guidance = settings.guidance
    at = (model.latent_shape,) if model.asked_resolution else ()
    facts = (model.fingerprint, class_prompt, count, CLASS_STEPS, guidance, settings.seed, model.dtype, *at)

    def draw() -> dict[str, Tensor]:
        requests = [Request(class_prompt, (k, 0)) for k in range(count)]
        parts = sample_latents(
            model,
            requests,
            steps=CLASS_STEPS,
            guidance=guidance,
            seed=settings.seed,
            batch=settings.class_batch,
        )
        return {"latents": torch.cat([part.float().cpu() for part in parts])}

    key = content_hash("\n".join(map(str, facts)).encode())
    return remembered("class", key, draw)["latents"]
