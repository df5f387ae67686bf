"""CLIP and DINO metrics: image and prompt similarity, diversity, prior preservation, zero-shot classification.

Works with any CLIP folder in transformers' format (Radford et al. 2021); the embedded scorer is a small one trained on
`moji`'s world. A `VisionEncoder` (DINO, DINOv2) gives image similarity only. Images are preprocessed with Pillow alone.
Metrics are functions of unit vectors, so that each image and text is embedded once; values of two scorers cannot be
compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from backbone.io.console import UserError
from backbone.io.files import content_hash, read_json
from backbone.io.records import parse_json, read_as
from backbone.io.weights import (
    check_tokenizer,
    check_weights,
    find_variant,
    hash_weights,
    load_whole,
    refuse_damaged,
)
from backbone.world.words import choose_article, load_vocabulary

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer

Item = TypeVar("Item")
# transformers' names of DINO and its followers
VISION_MODEL_TYPES = ("vit", "dinov2", "dinov2_with_registers")
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SETTINGS = (".json", ".txt")  # files of settings and vocabulary
LARGEST_CROP = 4096  # pixels
CLASS_TEMPLATES = ("{}", "a photo of {}", "a picture of {}")


@dataclass(frozen=True)
class Scorer:
    """A CLIP model, its tokenizer, and its image preprocessing.

    shortest_edge  pixels that the shortest side is resized to before the centre crop of `crop_size`; None: `crop_size`
    """

    model: CLIPModel
    tokenizer: CLIPTokenizer
    crop_size: int = 128
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    shortest_edge: int | None = None
    similarity_name = "CLIP-I"

    @torch.no_grad()
    def embed_images(self, images: Sequence[Image.Image], *, batch: int = 64) -> Tensor:
        """Unit vectors [B, D], float32, one per image; [0, D] for none."""
        parts = [self._image_vectors(self.preprocess(chunk)) for chunk in _chunks(images, batch)]
        return torch.cat(parts) if parts else self._empty()

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], *, batch: int = 256) -> Tensor:
        """Unit vectors [B, D], float32, one per text; texts are truncated to the model's positions."""
        parts = [self._text_vectors(list(chunk)) for chunk in _chunks(texts, batch)]
        return torch.cat(parts) if parts else self._empty()

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        """Images → [B, 3, S, S] on the model's device: resized (bicubic), cropped to S = `crop_size`, normalised."""
        return preprocess(images, self).to(self.model.device, self.model.dtype)

    @property
    def logit_scale(self) -> float:
        """The factor of cosines before a softmax over texts: 1/temperature, as the model learned it."""
        return float(self.model.logit_scale.exp())

    def _image_vectors(self, prepared: Tensor) -> Tensor:
        return F.normalize(self.model.get_image_features(prepared).pooler_output.float(), dim=-1)

    def _text_vectors(self, texts: list[str]) -> Tensor:
        max_length = self._config.text_config.max_position_embeddings
        encoded = self.tokenizer(
            texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt"
        )
        features = self.model.get_text_features(encoded["input_ids"].to(self.model.device))
        return F.normalize(features.pooler_output.float(), dim=-1)

    def _empty(self) -> Tensor:
        return torch.empty(0, self._config.projection_dim, device=self.model.device)

    @property
    def _config(self) -> Any:
        return self.model.config


@dataclass(frozen=True)
class VisionEncoder:
    """A vision transformer without text, DINO (Caron et al. 2021) or DINOv2, and its image preprocessing.

    An image's vector is the last hidden state of the class token, as in the DINO metric of Ruiz et al. 2023 (§ 4.1).
    """

    model: Any
    crop_size: int = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    shortest_edge: int | None = None
    similarity_name = "DINO"

    @torch.no_grad()
    def embed_images(self, images: Sequence[Image.Image], *, batch: int = 64) -> Tensor:
        """Unit vectors [B, D], float32, one per image; [0, D] for none."""
        chunks = (preprocess(chunk, self) for chunk in _chunks(images, batch))
        parts = [
            self.model(chunk.to(self.model.device, self.model.dtype)).last_hidden_state[:, 0]
            for chunk in chunks
        ]
        if not parts:
            return torch.empty(0, self.model.config.hidden_size, device=self.model.device)
        return F.normalize(torch.cat(parts).float(), dim=-1)


def preprocess(images: Sequence[Image.Image], encoder: Scorer | VisionEncoder) -> Tensor:
    """Images → float32 [B, 3, crop_size, crop_size]: shortest side resized (bicubic), centre-cropped, normalised."""
    squares = np.stack(
        [
            np.asarray(_center_crop(image, encoder.crop_size, encoder.shortest_edge), dtype=np.float32)
            for image in images
        ]
    )
    mean, std = (np.array(value, dtype=np.float32) for value in (encoder.mean, encoder.std))
    normal = (squares / np.float32(255) - mean) / std
    return torch.from_numpy(normal).permute(0, 3, 1, 2).contiguous()


def load_image_encoder(path: str | Path) -> Scorer | VisionEncoder:
    """Load a CLIP scorer or a DINO from a local folder, in float32 on the CPU.

    Raises `UserError` if the folder holds neither, or no safetensors; nothing is downloaded.
    """
    from transformers import AutoModel, ViTModel

    folder = Path(path)
    kind = _read_model_type(folder)
    if kind == "clip":
        return load_scorer(folder)
    if kind not in VISION_MODEL_TYPES:
        raise UserError(
            f"{folder} holds a model of type {kind!r}, neither CLIP nor DINO. Name a folder of one of them."
        )
    if kind == "vit":  # DINO's has no pooler
        model = _load_model(ViTModel, folder, add_pooling_layer=False)
    else:
        model = _load_model(AutoModel, folder, trust_remote_code=False)
    model = model.eval().requires_grad_(False)
    # The others read pictures of any size
    side = model.config.image_size if kind == "vit" else VisionEncoder.crop_size
    return VisionEncoder(model, **_read_preprocessor(folder, side, VisionEncoder.mean, VisionEncoder.std))


def load_scorer(path: str | Path, *, device: torch.device | str = "cpu") -> Scorer:
    """Load a CLIP scorer from a local folder (config, safetensors, tokenizer, preprocessor), in float32.

    Raises `UserError` if the folder is no CLIP model or holds no safetensors; nothing is downloaded.
    """
    from transformers import CLIPModel, CLIPTokenizer

    folder = Path(path)
    kind = _read_model_type(folder)
    if kind != "clip":
        raise UserError(
            f"{folder} holds a model of type {kind!r}, not a CLIP model. Name a folder of a CLIP model."
        )
    model = _load_model(CLIPModel, folder).to(device).eval().requires_grad_(False)
    for file in folder.glob("[!.]*.json"):
        parse_json(file.read_bytes(), file)
    with refuse_damaged(str(folder), "tokenizer"):
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    check_tokenizer(tokenizer, f"The tokenizer of {folder}")
    side = model.config.vision_config.image_size
    return Scorer(model, tokenizer, **_read_preprocessor(folder, side, CLIP_MEAN, CLIP_STD))


def hash_scorer_folder(folder: str | Path) -> str:
    """A hash of a scorer's weights, sampled, and of its settings and vocabulary; "" where there is none."""
    files = sorted(Path(folder).glob("[!.]*"))
    settings = [f"{path.name}:{content_hash(path)}" for path in files if path.suffix in SETTINGS]
    weights = hash_weights(path for path in files if path.suffix == ".safetensors")
    return content_hash("\n".join([*sorted(settings), weights]).encode()) if files else ""


def _read_model_type(folder: Path) -> Any:
    """The `model_type` of a folder's config; `UserError` if there is none."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no scorer (config.json is missing). Name a folder of a CLIP model.")
    return read_json(folder / "config.json").get("model_type")


def _load_model(kind: Any, folder: Path, **options: Any) -> Any:
    """A network of transformers, from whole safetensors files of this folder alone; `UserError` otherwise."""
    from transformers.utils import logging

    check_weights(folder)
    logging.disable_progress_bar()
    load = partial(
        kind.from_pretrained,
        folder,
        local_files_only=True,
        use_safetensors=True,
        dtype=torch.float32,
        output_loading_info=True,
        variant=find_variant(folder),
        **options,
    )
    return load_whole(load, str(folder), "scorer")


def clip_i(generated: Tensor, real: Tensor) -> float:
    """CLIP-I: mean cosine over all pairs of generated [B, D] and real images [R, D] (Ruiz et al. 2023, § 4.1)."""
    return float((generated @ real.T).mean())


def text_scores(images: Tensor, texts: Tensor) -> Tensor:
    """The cosine [B] of each image [B, D] with its own text [B, D]; CLIP-T is their mean (Ruiz et al. 2023, § 4.1)."""
    return (images * texts).sum(-1)


def prompt_precision(images: Tensor, texts: Tensor, *, logit_scale: float) -> Tensor:
    """The probability [B] that CLIP gives an image's own text [B, D] among the texts of all of these images [B, D].

    R-precision (Park et al. 2021) without its threshold. A trait that all images share, as an unusual subject, takes
    part in every cosine and cancels out: it lowers CLIP-T, and not this.
    """
    return (logit_scale * images @ texts.T).softmax(-1).diagonal()


def diversity(images: Tensor) -> float:
    """Mean cosine distance, 1 − cos, over all pairs of images [B, D] of one prompt; 0 if all are alike.

    Replaces the DIV of Ruiz et al. 2023 (§ 4.3), which averages LPIPS: this is a distance of embeddings, on another
    scale. Raises `UserError` for fewer than two images.
    """
    count = len(images)
    if count < 2:
        raise UserError(
            f"Diversity compares images with each other, and there is {count}. Generate two or more."
        )
    across = (images @ images.T).sum() - images.square().sum()
    return float(1 - across / (count * (count - 1)))


def prior_drift(class_images: Tensor, subject: Tensor) -> float:
    """PRES: mean cosine between generated images of the class [B, D] and real images of the subject [R, D].

    Lower is better: it rises as the class forgets everything but the subject (Ruiz et al. 2023, § 4.3).
    """
    return clip_i(class_images, subject)


def classify_subject(
    scorer: Scorer, images: Sequence[Image.Image], candidates: Sequence[str]
) -> list[tuple[str, float]]:
    """Class nouns with probabilities, most likely first, of images that all show one subject.

    Zero-shot classification with a prompt ensemble (Radford et al. 2021, § 3.1.4). All candidates share the prompts,
    one for each place of the world among them, so that the effect of the background cancels.
    """
    if not images or not candidates:
        raise UserError(
            "A class is guessed from images and candidate nouns, and one of them is empty. Give both."
        )
    return rank_classes(scorer, scorer.embed_images(images), candidates, embed_classes(scorer, candidates))


def rank_classes(
    scorer: Scorer, images: Tensor, candidates: Sequence[str], vectors: Tensor
) -> list[tuple[str, float]]:
    """`classify_subject` of image vectors [B, D] and class vectors [N, D]."""
    logits = scorer.model.logit_scale.detach().float().exp() * (images @ vectors.T).mean(0)
    pairs = zip(candidates, logits.softmax(0).tolist(), strict=True)
    return sorted(pairs, key=lambda pair: -pair[1])


def embed_classes(scorer: Scorer, candidates: Sequence[str]) -> Tensor:
    """A unit vector per class noun [N, D]: the mean over its prompts."""
    prompts = [list(_class_prompts(noun)) for noun in candidates]
    vectors = scorer.embed_texts([prompt for group in prompts for prompt in group])
    return F.normalize(vectors.unflatten(0, (len(prompts), -1)).mean(1), dim=-1)


def _class_prompts(noun: str) -> Iterator[str]:
    phrase = f"{choose_article(noun)} {noun}"
    for template in CLASS_TEMPLATES:
        yield template.format(phrase)
    for place in load_vocabulary().places:
        yield f"{phrase} {place}"


def _center_crop(image: Image.Image, crop_size: int, shortest_edge: int | None) -> Image.Image:
    image = image.convert("RGB")
    scale = (shortest_edge or crop_size) / min(image.size)
    width, height = (max(crop_size, round(length * scale)) for length in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - crop_size) // 2, (height - crop_size) // 2
    return image.crop((left, top, left + crop_size, top + crop_size))


def _read_preprocessor(
    folder: Path, side: int, mean: Sequence[float], std: Sequence[float]
) -> dict[str, Any]:
    """Sizes, mean and standard deviation from `preprocessor_config.json`, by default `side`, `mean` and `std`."""
    path = folder / "preprocessor_config.json"
    settings = read_json(path) if path.is_file() else {}
    mean, std = (
        read_as(tuple[float, float, float], settings.get(key, list(default)), path, key)
        for key, default in (("image_mean", mean), ("image_std", std))
    )
    shortest = _read_pixels(settings.get("size"), side)
    crop = settings.get("crop_size") if settings.get("do_center_crop", True) else None
    crop_size = _read_pixels(crop, shortest)
    return {
        "crop_size": crop_size,
        "mean": mean,
        "std": std,
        "shortest_edge": max(crop_size, shortest),
    }


def _read_pixels(size: Any, default: int) -> int:
    """A size in pixels in any of transformers' notations."""
    if isinstance(size, dict):
        size = size.get("shortest_edge", size.get("height"))
    pixels = read_as(int, size or default, "The scorer's preprocessor_config.json", "size")
    if not 1 <= pixels <= LARGEST_CROP:
        raise UserError(
            f"{pixels} pixels is no size of a scorer's images. Restore its preprocessor_config.json."
        )
    return pixels


def _chunks(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]
