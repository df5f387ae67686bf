"""What a folder of `align sample` holds: `samples.json` says how its pictures were drawn, `pictures/` has them."""

from __future__ import annotations

from pathlib import Path

from align.pairs.prompts import Prompt
from align.pairs.records import SAMPLES
from backbone.io.console import UserError
from backbone.io.files import read_json

FORMAT = 1
PICTURES = "pictures"


def image_name(i: int, j: int) -> str:
    """The file of sample j of prompt i, relative to the folder."""
    return f"{PICTURES}/p{i:05d}-s{j:02d}.png"


def count_images(prompt: Prompt, per_prompt: int) -> int:
    """How many pictures compete for a prompt: its own, and one of each hard negative."""
    return per_prompt + len(prompt.hard_negatives)


def prompt_and_noise(prompt: Prompt, j: int, per_prompt: int) -> tuple[str, int]:
    """What picture j of a prompt shows, and which sample's noise it is drawn from.

    Behind the prompt's own pictures 0 … per_prompt − 1 stand its hard negatives, from the noise of those in turn.
    """
    if j < per_prompt:
        return prompt.text, j
    return prompt.hard_negatives[j - per_prompt], (j - per_prompt) % per_prompt


def read_samples(folder: Path) -> tuple[list[Prompt], list[list[str]]]:
    """The prompts of a pairs folder and, for each, the pictures that are there already.

    `UserError` when the folder is none of `align sample`, or when no prompt has two pictures yet.
    """
    path = folder / SAMPLES
    if not path.is_file():
        raise UserError(
            f"{folder} is not a folder of `align sample` ({SAMPLES} is missing). Name another one."
        )
    said = read_json(path)
    if not isinstance(said, dict) or said.get("format") != FORMAT:
        raise UserError(f"{path} is not a list of samples that this version reads. Draw them again.")
    prompts = [
        Prompt(str(entry["prompt"]), str(entry.get("category", "")), tuple(entry.get("hard_negatives", ())))
        for entry in said["prompts"]
    ]
    pictures = [
        [
            name
            for j in range(count_images(prompts[i], int(said["per_prompt"])))
            if (folder / (name := image_name(i, j))).exists()
        ]
        for i in range(len(prompts))
    ]
    if all(len(names) < 2 for names in pictures):
        raise UserError(f"{folder} holds no two pictures of one prompt. Run `align sample` to its end.")
    return prompts, pictures
