"""The encoded training data: latents, prompts, masks, aspect buckets, cached base predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from backbone.conditions.conditions import Conditions
from backbone.distributed import processes
from backbone.io.console import UserError
from backbone.io.files import content_hash
from backbone.media.pictures import Picture
from backbone.media.transforms import bucket_sizes, fitted, mask_to_tensor, nearest_size
from backbone.models.cache import encode_images_cached, encode_prompts_cached, load_or_compute
from backbone.models.model import Backbone, Posterior
from backbone.models.sample import Request, sample_latents
from backbone.training.base_predictions import BasePredictions, base_predictions
from customize.data.masks import predict_mask
from customize.methods.registry import OWN_WORDS, changes_denoiser
from customize.settings import Settings

CLASS_STEPS = 20  # of the sampler that generates class images


@dataclass(frozen=True)
class Group:
    """The images of one subject with their prompts and its class prompt, placeholder tokens resolved."""

    pictures: Sequence[Picture]
    prompts: Sequence[str]
    class_prompt: str


@dataclass(frozen=True)
class TrainingData:
    """The encoded dataset, of all subjects one behind the other.

    posteriors     [1, C, H, W], one for each image, a subject's mirrored ones behind its own
    prompts        one for each posterior
    names          the image file of each posterior, for messages
    frequency      how often each is drawn [N], up to a factor: all subjects equally often
    masks          loss weight at each place of each image [1, H, W], mean 1, or None
    buckets        the posteriors of one size, which can share a batch
    class_prompts  one for each subject
    class_latents  latents of generated class images [G × K, C, H, W], K for each of the G classes, or None
    conditions     `prompts` and then `class_prompts` encoded; None while the text encoder itself is trained
    """

    posteriors: list[Posterior]
    prompts: list[str]
    names: list[str]
    frequency: Tensor
    masks: list[Tensor] | None
    buckets: list[Bucket]
    class_prompts: list[str]
    class_latents: Tensor | None
    conditions: Conditions | None

    @property
    def has_prior(self) -> bool:
        """Whether the loss has a prior-preservation term."""
        return self.class_latents is not None or any(bucket.base is not None for bucket in self.buckets)


@dataclass(frozen=True)
class Bucket:
    """Images of one size.

    rows     which of the posteriors they are [N]
    base     K cached predictions of the base model under class prompts, for these images noised; or None
    classes  which class prompt each of them is under [K]
    """

    rows: Tensor
    base: BasePredictions | None = None
    classes: Tensor | None = None


def prepare(model: Backbone, groups: Sequence[Group], settings: Settings) -> TrainingData:
    """Encodes images and prompts and frees the encoders, then caches the base model's predictions for the prior."""
    posteriors: list[Posterior] = []
    prompts: list[str] = []
    names: list[str] = []
    masks: list[Tensor | None] = []
    owners: list[int] = []
    # images, and their mirror images, to posteriors; what belongs to one stands at the same place in every list
    for number, group in enumerate(groups):
        sizes = sizes_of(group.pictures, model.resolution) if settings.aspect_buckets else None
        for flip in (False, True) if settings.flip else (False,):
            posteriors += encode_in_parallel(model, group.pictures, flip=flip, sizes=sizes)
            masks += masks_of(group.pictures, sizes, flip=flip)
            prompts += group.prompts
            names += [str(picture.path) for picture in group.pictures]
            owners += [number] * len(group.pictures)
    # prompts to conditions, while the text encoder is loaded
    classes = [group.class_prompt for group in groups]
    with processes.writer_first():
        class_conditions = encode_prompts_cached(model, classes)
        conditions = None if trains_text(settings) else encode_prompts_cached(model, [*prompts, *classes])
        empty = encode_prompts_cached(model, [""]) if settings.mask == "auto" else None
    buckets = buckets_of(posteriors)
    class_latents = None
    if preserves(settings) and settings.prior == "class-images":
        if len({posterior.mean.shape for posterior in posteriors}) > 1:
            raise UserError(
                "Class pictures are square, and with --aspect_buckets the subject's are not. Use --prior base."
            )
        with processes.writer_first():
            class_latents = torch.cat([sample_class_latents(model, prompt, settings) for prompt in classes])
    # from here on the denoiser alone is needed
    model.free("autoencoder", "text_encoder")
    if preserves(settings) and settings.prior == "base":
        with processes.writer_first():
            buckets = [
                with_base_predictions(model, bucket, posteriors, class_conditions, owners, settings)
                for bucket in buckets
            ]
    if empty is not None:
        with processes.writer_first():
            masks = predict_missing_masks(model, masks, posteriors, class_conditions, empty, owners)
    return TrainingData(
        posteriors=posteriors,
        prompts=prompts,
        names=names,
        frequency=torch.tensor([1 / owners.count(owner) for owner in owners]),
        masks=at_latent_size(masks, [posterior.mean.shape[-2:] for posterior in posteriors]),
        buckets=buckets,
        class_prompts=classes,
        class_latents=class_latents,
        conditions=conditions,
    )


def encode_in_parallel(
    model: Backbone, pictures: Sequence[Picture], *, flip: bool, sizes: Sequence[tuple[int, int]] | None
) -> list[Posterior]:
    """`encode_images_cached`, after each process has warmed the disk cache with its share of the images."""

    def encode(row: int) -> None:
        encode_images_cached(model, [pictures[row]], flip=flip, sizes=sizes and [sizes[row]])

    processes.prepared(encode, range(len(pictures)))
    return encode_images_cached(model, pictures, flip=flip, sizes=sizes)


def predict_missing_masks(
    model: Backbone,
    masks: Sequence[Tensor | None],
    posteriors: Sequence[Posterior],
    classes: Conditions,
    empty: Conditions,
    owners: Sequence[int],
) -> list[Tensor | None]:
    """The masks that came with the images, and the base model's own for images that have none."""
    return [
        predict_mask(model, posterior, classes[[owner]], empty) if mask is None else mask
        for mask, posterior, owner in zip(masks, posteriors, owners, strict=True)
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


def with_base_predictions(
    model: Backbone,
    bucket: Bucket,
    posteriors: list[Posterior],
    classes: Conditions,
    owners: Sequence[int],
    settings: Settings,
) -> Bucket:
    """The bucket with the base's predictions for each subject's noised images under its class prompt."""
    parts, numbers = [], []
    rows, count = bucket.rows.tolist(), settings.prior_draws
    for number in sorted({owners[row] for row in rows}):
        own = [posteriors[row] for row in rows if owners[row] == number]
        parts.append(base_predictions(model, own, classes[[number]], count=count, seed=settings.seed))
        numbers.append(torch.full((count,), number))
    return replace(bucket, base=BasePredictions.cat(parts), classes=torch.cat(numbers))


def trains_text(settings: Settings) -> bool:
    """Whether prompts must be encoded anew in every step."""
    return settings.train_text_encoder or settings.method in OWN_WORDS


def preserves(settings: Settings) -> bool:
    """Whether there is a prior-preservation term."""
    asked = settings.prior != "off" and settings.prior_batch > 0 and settings.prior_loss_weight > 0
    return asked and changes_denoiser(settings)


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


def at_latent_size(masks: Sequence[Tensor | None], sizes: Sequence[Sequence[int]]) -> list[Tensor] | None:
    """Masks at the latents' sizes (H, W), each of mean 1 so that all pictures weigh the same; None if none."""
    if all(mask is None for mask in masks):
        return None
    found = []
    for mask, (height, width) in zip(masks, sizes, strict=True):
        small = F.adaptive_avg_pool2d(torch.ones(1, height, width) if mask is None else mask, (height, width))
        found.append(small / small.mean())
    return found


def sample_class_latents(model: Backbone, class_prompt: str, settings: Settings) -> Tensor:
    """Latents of class images that the base generates [K, C, H, W], cached on disk; never decoded."""
    count, guidance = settings.num_class_images, settings.guidance
    facts = (model.fingerprint, class_prompt, count, CLASS_STEPS, guidance, settings.seed, model.dtype)

    def draw() -> dict[str, Tensor]:
        requests = [Request(class_prompt, (k, 0)) for k in range(count)]
        parts = sample_latents(model, requests, steps=CLASS_STEPS, guidance=guidance, seed=settings.seed)
        return {"latents": torch.cat([part.float().cpu() for part in parts])}

    key = content_hash("\n".join(map(str, facts)).encode())
    return load_or_compute("class", key, draw)["latents"]
