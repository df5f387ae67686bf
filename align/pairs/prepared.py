"""Reading a folder of `align prepare`: tables with everything that training needs from a source.

    prepared.json   its source, its encoder, its size; whether it is finished
    images/         the latents of every image, by the hash of its contents and its crop
    mirrored/       the latents of the mirror images, with --flip
    prompts/        the conditions of every prompt, once each
    records/        every record with its prompt, its label, the keys of its images; or why it cannot be used

All of it is mapped into memory, and records are columns, so that a run over a million pairs takes little more memory
than one over a thousand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from align.pairs.records import (
    LeftOut,
    describe_counts,
    find_general_problems,
    held_out_prompts,
    normalize_prompt,
)
from backbone.conditions.conditions import Conditions
from backbone.data.table import Numbers, Table
from backbone.io.console import UserError
from backbone.io.files import content_hash
from backbone.models.encode import Encoded, Prompts, encode_texts, prompt_keys
from backbone.models.model import Backbone
from backbone.training.prepared import PROMPTS, PreparedFolder

IMAGES, MIRRORED = "images", "mirrored"
HEX = np.array([f"{byte:02x}" for byte in range(256)], dtype="S2")


class Prepared(PreparedFolder):
    """A finished folder of pairs and single images."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "pairs", "align")
        self.is_pair, self.both_bad = (self.numbers(name).astype(bool) for name in ("pair", "both_bad"))
        self.label = self.numbers("label")

    @cached_property
    def _texts(self) -> tuple[list[str], Numbers]:
        return self.words("prompt")

    @property
    def prompts(self) -> list[str]:
        """All prompts, once each."""
        return self._texts[0]

    @property
    def prompt(self) -> Numbers:
        """The index of each record's prompt [N]."""
        return self._texts[1]

    @cached_property
    def normalized(self) -> list[str]:
        """The normalised prompts, for comparison."""
        return [normalize_prompt(prompt) for prompt in self.prompts]

    def describe(self) -> str:
        """“120 pairs (4 ties) of 40 prompts”."""
        return _describe(self, self.is_pair, self.label, self.prompt)

    def describe_left_out(
        self, *, by_pairs: bool, ties: bool, user: str | None = None, limit: int | None = None
    ) -> str:
        """The selected records that a loss does not learn from, in the words of `LeftOut.describe`.

        Records that could not be used, or had no label, when the folder was made are counted for every user.
        """
        selected = self._select_mask(user, limit)
        tied = selected & self.is_pair & (self.label == 0.5) & (by_pairs | ~self.both_bad)
        counts = int(tied.sum()), int((selected & ~self.is_pair).sum())
        return LeftOut(self.facts.bad, self.facts.unlabelled, *counts).describe(
            str(self.folder), by_pairs=by_pairs, ties=ties
        )

    # For training ----------------------------------------------------------------------------------------

    def refuse_other_use(self, model: Backbone, *, flip: bool, crops: int, seed: int) -> None:
        """`UserError` where the folder was prepared for another model, size or precision, or holds too little."""
        self.refuse_other_encoder(model, flip=flip)
        facts, folder = self.facts, self.folder
        if crops and (facts.random_crop != crops or facts.seed != seed):
            crops_held = (
                f"{facts.random_crop} random crops of seed {facts.seed}" if facts.random_crop else "none"
            )
            raise UserError(
                f"{folder} holds {crops_held}, and --random-crop {crops} asks for those of seed {seed}. Prepare with "
                f"--random-crop {crops} --seed {seed}, or leave it out."
            )

    def image_tables(self, *, flip: bool) -> dict[bool, Table]:
        """The tables of latents, by whether they are mirrored."""
        return {False: self.table(IMAGES), **({True: self.table(MIRRORED)} if flip else {})}

    def conditions(self, model: Backbone, prompts: list[str]) -> Prompts | Conditions:
        """The conditions of prompts, row by row; prompts with learned words are encoded again."""
        table = self.table(PROMPTS)
        rows = table.find(prompt_keys(prompts))
        if model.text_learned or (rows < 0).any():
            return encode_texts(model, prompts)
        return Prompts(Encoded(table, rows))

    def select(
        self, *, by_pairs: bool, ties: bool, user: str | None = None, limit: int | None = None
    ) -> PreparedRecords:
        """The records to learn from: pairs, with or without ties, or single images (`records.to_singles`)."""
        selected = self._select_mask(user, limit)
        pairs, tie = self.is_pair & selected, self.label == 0.5
        counts = (int(pairs.sum()), int((pairs & tie).sum()), int((selected & ~self.is_pair).sum()))
        good = int((self.label[selected & ~self.is_pair] > 0).sum())
        for problem in find_general_problems(str(self.folder), *counts, good):
            raise UserError(problem)
        if by_pairs:
            if not pairs.any():
                raise UserError(
                    f"{self.folder} judges single pictures, and this loss compares pairs. Use --loss kto."
                )
            rows = np.flatnonzero(pairs if ties else pairs & ~tie)
            return PreparedRecords(self, rows, None, self.label[rows])

        # Pairs as single images: the preferred one good, the other bad, or both bad
        singles = np.flatnonzero(selected & ~self.is_pair)
        preferred_pairs = np.flatnonzero(pairs & (~tie | self.both_bad))
        sides = np.tile([0, 1], len(preferred_pairs))
        pair_labels = ((sides == 0) & ~np.repeat(self.both_bad[preferred_pairs], 2)).astype(np.float32)
        return PreparedRecords(
            self,
            np.concatenate([singles, np.repeat(preferred_pairs, 2)]),
            np.concatenate([np.zeros(len(singles), np.int64), sides]),
            np.concatenate([self.label[singles], pair_labels]),
        )

    def _select_mask(self, user: str | None, limit: int | None) -> NDArray[np.bool_]:
        """A mask [N] of the records by `user`, among the first `limit`; `UserError` where there are none."""
        selected = np.ones(len(self.order), bool)
        if user is not None:
            names, user_index = self.words("user")
            if user not in names:
                remedy = (
                    f"It has {', '.join(sorted(filter(None, names))[:10])}"
                    if any(names)
                    else "It names no users"
                )
                raise UserError(f"{self.folder} has no choices by {user}. {remedy}.")
            selected = user_index == names.index(user)
        selected[limit if limit is not None else len(selected) :] = False
        return selected


@dataclass(frozen=True, eq=False)
class PreparedRecords:
    """Records of a prepared folder: `rows` of its table, and one of a pair's `sides` for each (None: both)."""

    folder: Prepared
    rows: Numbers
    sides: Numbers | None
    preference: Numbers

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def prompt(self) -> Numbers:
        """The index of each record's prompt."""
        return self.folder.prompt[self.rows]

    @property
    def keys(self) -> Numbers:
        """The hash of each record's contents, in hexadecimal digits."""
        if self.sides is None:
            raw = self._gather("content")
        else:
            raw = self._gather("contents")[np.arange(len(self)), self.sides]
        return np.ascontiguousarray(HEX[raw]).view("S64").reshape(-1)

    def find_rows(self, images: Table) -> Numbers:
        """The rows of the records' images in a table of latents [M, G]."""
        return self._find(images, self._gather("images"))

    def crop_rows(self, images: Table) -> Numbers:
        """Like `find_rows`, for each random crop [M, R, G]."""
        crops = self.folder.facts.random_crop
        if not crops or not len(self):
            return np.zeros((len(self), 0, 1 if self.sides is not None else 2), np.int64)
        keys = self._gather("cuts")
        return np.stack([self._find(images, keys[:, number]) for number in range(crops)], axis=1)

    def split(self, *, share: float, seed: int) -> tuple[PreparedRecords, PreparedRecords]:
        """Training and held-out records, by prompt as `records.split_held_out` does."""
        normalized = self.folder.normalized
        of_class = self.prompt, self.preference > 0
        classes: list[set[str]] = []
        if self.sides is not None:
            classes = [
                {normalized[index] for index in np.unique(of_class[0][of_class[1] == good])}
                for good in (False, True)
            ]
        present = {normalized[index] for index in np.unique(self.prompt)}
        held_out = held_out_prompts(present, classes, share=share, seed=seed)
        out = np.array([word in held_out for word in normalized], bool)[self.prompt]
        return self._select(~out), self._select(out)

    def describe(self) -> str:
        """“120 pairs (4 ties) of 40 prompts”."""
        pairs = np.full(len(self), self.sides is None)
        return _describe(self.folder, pairs, self.preference, self.prompt)

    def texts(self) -> Iterator[str]:
        """The records' distinct prompts, in order of appearance."""
        _, first = np.unique(self.prompt, return_index=True)
        return (self.folder.prompts[self.prompt[row]] for row in np.sort(first))

    def has_ties(self) -> bool:
        """Whether any record is a tie."""
        return self.sides is None and bool((self.preference == 0.5).any())

    def empty(self) -> PreparedRecords:
        """An empty selection."""
        return self._select(slice(0))

    def fingerprint(self) -> str:
        """The hash of all records' contents, in their order."""
        return content_hash(self.keys.tobytes())

    def choices(self) -> str:
        """The hash of the labels; prompts, and which image is better, are in the records' contents."""
        return content_hash(self.preference.tobytes())

    def _select(self, selection: Numbers | slice) -> PreparedRecords:
        sides = None if self.sides is None else self.sides[selection]
        return PreparedRecords(self.folder, self.rows[selection], sides, self.preference[selection])

    def _gather(self, name: str) -> Numbers:
        values: Numbers = self.folder.records.gather(name, self.folder.order[self.rows]).numpy()
        return values

    def _find(self, images: Table, keys: Numbers) -> Numbers:
        """Rows of a table for keys [M, 2, 32], of the selected side; `UserError` where one is missing."""
        keys = keys if self.sides is None else keys[np.arange(len(self)), self.sides][:, None]
        rows = images.find(keys.reshape(-1, keys.shape[-1])).reshape(keys.shape[:2])
        self.folder.refuse_missing(rows, images)
        return rows


def _describe(folder: Prepared, pairs: Numbers, label: Numbers, prompt: Numbers) -> str:
    prompts = len({folder.normalized[index] for index in np.unique(prompt)})
    ties = int((pairs & (label == 0.5)).sum())
    return describe_counts(int(pairs.sum()), ties, int((~pairs).sum()), prompts)
