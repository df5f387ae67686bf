"""The encoded training data: latents, prompts, masks, aspect buckets, cached base predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from backbone.distributed import processes
from backbone.families.base import Text
from backbone.io.console import UserError
from backbone.io.files import content_hash
from backbone.media.pictures import Picture, read_folder
from backbone.media.transforms import bucket_sizes, fitted, mask_to_tensor, nearest_size
from backbone.models.cache import encode_images_cached, encode_prompts_cached, load_or_compute
from backbone.models.model import Backbone, Posterior
from backbone.models.sample import Request, sample_latents
from backbone.training.base_predictions import Bank, bank_of
from customize.data.masks import predict_mask
from customize.methods.registry import changes_denoiser
from customize.settings import OWN_WORDS, Settings

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
        class_text = encode_prompts_cached(model, classes)
        text = None if trains_text(settings) else encode_prompts_cached(model, [*prompts, *classes])
        empty = encode_prompts_cached(model, [""]) if settings.mask == "auto" else {}
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
    """`encode_images_cached`, after each process has encoded its part of the pictures."""

    def encode(row: int) -> None:
        encode_images_cached(model, [pictures[row]], flip=flip, sizes=sizes and [sizes[row]])

    processes.prepared(encode, range(len(pictures)))
    return encode_images_cached(model, pictures, flip=flip, sizes=sizes)


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
        predict_mask(model, posterior, said, empty) if mask is None else mask
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
        own = [posterior.mean for posterior in encode_images_cached(model, found)]
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
    return load_or_compute("class", key, draw)["latents"]
