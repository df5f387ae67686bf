"""The folder that `align sample` writes: `pictures/`, and `samples.json` with prompts and sampling settings."""

from __future__ import annotations

import os
import re
from pathlib import Path

from align.pairs.records import SAMPLES, SamplesRecord
from backbone.io.console import UserError, looks_like_prompt, quote_text
from backbone.io.files import read_json
from backbone.io.prompts import Prompt

FORMAT = 1
PICTURES = "pictures"
IMAGE_NAME = re.compile(r"p(\d{5,9})-s(\d{2,9})\.png$")


def image_name(i: int, j: int) -> str:
    """Path of sample j of prompt i, relative to the folder."""
    return f"{PICTURES}/p{i:05d}-s{j:02d}.png"


def sample_index(name: str) -> int:
    """j of `image_name(i, j)`."""
    match = IMAGE_NAME.search(name)
    assert match is not None
    return int(match[2])


def count_images(prompt: Prompt, per_prompt: int) -> int:
    """Number of images that compete for a prompt: `per_prompt` of its own, and one of each hard negative."""
    return per_prompt + len(prompt.hard_negatives)


def prompt_and_noise(prompt: Prompt, j: int, per_prompt: int) -> tuple[str, int]:
    """(prompt text, noise index) of image j: j < per_prompt are the prompt's own, then come its hard negatives.

    Hard negatives reuse the noise of the prompt's own images in turn.
    """
    if j < per_prompt:
        return prompt.text, j
    return prompt.hard_negatives[j - per_prompt], (j - per_prompt) % per_prompt


def read_samples(folder: Path) -> tuple[list[Prompt], list[list[str]]]:
    """Read a folder's prompts and, for each of them, the images that exist already.

    Raises `UserError` for a folder that `align sample` did not write, or where no prompt has two images yet.
    """
    path = folder / SAMPLES
    if not folder.exists() and looks_like_prompt(folder):
        raise UserError(
            f"A folder of images is wanted, and “{folder}” reads as a prompt. Draw its images first: align sample "
            f"--prompts {quote_text(str(folder))} --out FOLDER"
        )
    if not folder.exists():
        raise UserError(
            f"There is no folder {folder}. Check the spelling, and the folder that it is named from."
        )
    if not path.is_file():
        raise UserError(
            f"{folder} is not a folder of `align sample` ({SAMPLES} is missing). Name another one."
        )
    record = read_json(path, SamplesRecord)
    if record.format != FORMAT or record.per_prompt < 1:
        raise UserError(
            f"{path} is not a list of samples that this version reads. Draw them again, or update Limner."
        )
    prompts = [Prompt(entry.prompt, entry.category, tuple(entry.hard_negatives)) for entry in record.prompts]
    existing = set(os.listdir(folder / PICTURES)) if (folder / PICTURES).is_dir() else set()
    pictures: list[list[str]] = [[] for _ in prompts]
    for i, j in sorted(
        (int(match[1]), int(match[2])) for name in existing if (match := IMAGE_NAME.match(name))
    ):
        if i < len(prompts) and j < count_images(prompts[i], record.per_prompt):
            pictures[i].append(image_name(i, j))
    if all(len(names) < 2 for names in pictures):
        raise UserError(f"{folder} holds no two pictures of one prompt. Run `align sample` to its end.")
    return prompts, pictures
