"""Image scorers: (images, their prompts) → a score for each, higher is better.

| name                    | what it scores                                                                       |
|-------------------------|--------------------------------------------------------------------------------------|
| `moji`                  | prompt fidelity by the embedded CLIP: cosine of image and prompt                      |
| a folder                | the same by a CLIP in transformers' format (CLIP, PickScore); with                    |
|                         | `aesthetic.safetensors` (`weight` [1, D], `bias` [1]), that linear head on its images |
| `like:PICTURES`         | subject fidelity: CLIP-I with the images of a folder, by the embedded CLIP, or by     |
|                         | another as `like:PICTURES:FOLDER`                                                     |
| FILE.py                 | your own function `score(pictures, prompts)`, which returns a number for each          |

Scores of two scorers have different scales; `combine_scores` standardises and adds them. Subject and prompt fidelity
together, with pairs on which both agree, is how DreamBoothDPO (Ayupov et al. 2025) makes preferences of a customised
model.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from PIL.Image import Image
from torch import Tensor

from backbone.cli.values.convert import is_code
from backbone.evaluation.clip import Scorer, hash_scorer_folder, load_scorer, text_scores
from backbone.io.console import UserError, is_out_of_memory
from backbone.io.files import content_hash, read_tensors
from backbone.media.sources.pictures import check_images, list_images
from backbone.models.locate import EMBEDDED

ImageScorer: TypeAlias = Callable[[Sequence[Image], Sequence[str]], Tensor]
"""(B images, B prompts) → scores [B], float32 on the CPU."""

AESTHETIC_HEAD = "aesthetic.safetensors"
SUBJECT_PREFIX = "like:"


def open_scorer(name: str) -> ImageScorer:
    """Open the scorer of this name; `UserError` where there is none, and later for scores that are no numbers."""
    score = _open_scorer(name)

    def finite(images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        scores = score(images, prompts)
        if not bool(torch.isfinite(scores).all()):
            raise UserError(
                f"{name} gives scores that are not finite numbers, so its weights are damaged. Download or train it "
                "again."
            )
        return scores

    return finite


def _open_scorer(name: str) -> ImageScorer:
    if name.startswith(SUBJECT_PREFIX):
        pictures, _, scorer_name = name.removeprefix(SUBJECT_PREFIX).partition(":")
        return _make_subject_fidelity_scorer(load_clip_scorer(scorer_name or "moji"), pictures)
    path = Path(name).expanduser()
    if is_code(name):
        return _load_python_scorer(path)
    scorer = load_clip_scorer(name)
    head = path / AESTHETIC_HEAD
    return _load_aesthetic_scorer(scorer, head) if head.is_file() else _make_prompt_fidelity_scorer(scorer)


def hash_scorer(name: str) -> str:
    """A hash of what a scorer of this name decides by: its file, its weights, and the images it compares with."""
    if is_code(name):
        path = Path(name).expanduser()
        return content_hash(path) if path.is_file() else ""
    images: list[str] = []
    if name.startswith(SUBJECT_PREFIX):
        folder, _, name = name.removeprefix(SUBJECT_PREFIX).partition(":")
        images = sorted(image.content_hash for image in list_images(folder))
    weights = hash_scorer_folder(EMBEDDED / "scorer" if name in ("", "moji") else Path(name).expanduser())
    return content_hash("\n".join([*images, weights]).encode())


def refuse_not_differentiable(name: str) -> None:
    """Raise `UserError` unless this scorer is a network that compares images with prompts."""
    if (
        is_code(name)
        or name.startswith(SUBJECT_PREFIX)
        or (Path(name).expanduser() / AESTHETIC_HEAD).is_file()
    ):
        raise UserError(
            f"draft follows the gradient of a CLIP's prompt score, and {name} is another kind of scorer. "
            "Use --loss ddpo, or moji, or a CLIP model's folder."
        )


def load_clip_scorer(name: str) -> Scorer:
    """Load the CLIP behind a scorer's name, for embeddings; `UserError` where there is none."""
    if name == "moji":
        return load_scorer(EMBEDDED / "scorer")
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"There is no scorer {name}. Name moji, a CLIP model's folder, like:PICTURES or a .py file."
        )
    return load_scorer(folder)


def combine_scores(scores: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Weighted sum [B] of several scorers' scores [B], each standardised to mean 0 and deviation 1.

    Raises `UserError` for another number of weights, and for weights that are not finite or all 0.
    """
    if len(scores) != len(weights):
        raise UserError(f"{len(weights)} weights for {len(scores)} scorers: one each is needed.")
    if not all(map(math.isfinite, weights)) or not any(weights):
        raise UserError(
            f"Scorers weigh {', '.join(f'{weight:g}' for weight in weights)}. Give finite numbers, not all 0."
        )
    return torch.stack(
        [
            weight * (score - score.mean()) / score.std(correction=0).clamp(min=1e-12)
            for score, weight in zip(scores, weights, strict=True)
        ]
    ).sum(0)


def _make_prompt_fidelity_scorer(scorer: Scorer) -> ImageScorer:
    """CLIP score: cosine of image and prompt."""

    def score(images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        unique = list(dict.fromkeys(prompts))
        texts = scorer.embed_texts(unique)[[unique.index(prompt) for prompt in prompts]]
        return text_scores(scorer.embed_images(images), texts).cpu()

    return score


def _make_subject_fidelity_scorer(scorer: Scorer, folder: str) -> ImageScorer:
    """CLIP-I: mean cosine with the images of a folder."""
    subject_images = list_images(folder)
    check_images(subject_images)
    subject = scorer.embed_images([image.open() for image in subject_images])

    def score(images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        return (scorer.embed_images(images) @ subject.T).mean(1).cpu()

    return score


def _load_aesthetic_scorer(scorer: Scorer, path: Path) -> ImageScorer:
    """A linear head on the image embeddings, as LAION's aesthetic predictor; the prompt is ignored."""
    tensors, _ = read_tensors(path)
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    if set(shapes) != {"weight", "bias"} or len(shapes["weight"]) != 2 or shapes["weight"][0] != 1:
        raise UserError(f"{path} is not a linear head: it needs weight [1, D] and bias [1].")
    if shapes["bias"] != (1,):
        raise UserError(
            f"{path} is not a linear head: its bias is {list(shapes['bias'])}, and [1] is wanted."
        )
    weight, bias = tensors["weight"].float(), tensors["bias"].float()

    def score(images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        vectors = scorer.embed_images(images).cpu()
        if vectors.shape[1] != weight.shape[1]:
            raise UserError(
                f"{path} is for vectors of {weight.shape[1]} numbers; this model's have {vectors.shape[1]}."
            )
        return (vectors @ weight.T + bias)[:, 0]

    return score


@contextmanager
def _explain_failure(path: Path) -> Iterator[None]:
    """Turn whatever the user's code raises into a `UserError`, except out of memory and Ctrl-C."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"{path} failed ({type(error).__name__}: {error}). Repair it; LIMNER_TRACEBACK=1 shows where."
        ) from error


def _load_python_scorer(path: Path) -> ImageScorer:
    """The function `score` of the user's own Python file, which is executed.

    Callers make sure that the user has named the file in this very call, and not a folder or a record.
    """
    if not path.is_file():
        raise UserError(f"There is no file {path}. Check the spelling.")
    specification = importlib.util.spec_from_file_location(f"limner_scorer_{path.stem}", path)
    assert specification is not None and specification.loader is not None
    module: Any = importlib.util.module_from_spec(specification)
    with _explain_failure(path):
        specification.loader.exec_module(module)
    function = getattr(module, "score", None)
    if not callable(function):
        raise UserError(
            f"{path} has no function `score(pictures, prompts)`. Write one that gives a number for each."
        )

    def score(images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        with _explain_failure(path):
            numbers = torch.tensor([float(number) for number in function(list(images), list(prompts))])
        if len(numbers) != len(images) or not bool(torch.isfinite(numbers).all()):
            raise UserError(f"{path}'s `score` must give a finite number for each of {len(images)} pictures.")
        return numbers

    return score
