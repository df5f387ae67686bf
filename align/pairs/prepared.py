"""What `align prepare` leaves behind, read again: a folder of tables with everything that training asks of a source.

    prepared.json   of which source, by which encoder, at which size; whether it is finished
    images/         the latents of every image, under the hash of its contents and of how it was cut
    mirrored/       the same of the mirror images, with --flip
    prompts/        the conditions of every prompt, once each
    records/        every record with its prompt, its label, the keys of its images; or what is wrong with it

All of it is mapped into memory, and records are columns, so that a run over a million pairs takes little more memory
than one over a thousand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from align.pairs.records import PREPARED as FILE
from align.pairs.records import describe_counts, general_problems, held_out_prompts, normalize_prompt
from backbone.conditions.conditions import Conditions
from backbone.data.table import Numbers, Table
from backbone.io.console import UserError
from backbone.io.files import content_hash, read_json
from backbone.models.encode import Encoded, Prompts, encode_texts, encoder_facts, prompt_keys
from backbone.models.model import Backbone

FORMAT = 1
IMAGES, MIRRORED, PROMPTS, RECORDS = "images", "mirrored", "prompts", "records"
HEX = np.array([f"{byte:02x}" for byte in range(256)], dtype="S2")


@dataclass(frozen=True)
class PreparedFacts:
    """`prepared.json`: what the folder was made from and for.

    encoder   what latents depend on (`encoder_facts`)   size   of the images, pixels a side
    records   of the source, of which `bad` cannot be used
    """

    kind: str
    source: str
    model: str
    size: int
    records: int
    format: int = FORMAT
    encoder: dict[str, str] = field(default_factory=dict)
    rows: dict[str, Any] = field(default_factory=dict)  # user, limit, split: which rows of the source
    flip: bool = False
    random_crop: int = 0
    seed: int = 0  # of the random crops
    bad: int = 0
    finished: bool = False


def read_facts(folder: Path, *, kind: str = "pairs") -> PreparedFacts:
    """The facts of a prepared folder; `UserError` for one of another kind or version."""
    facts = read_json(folder / FILE, PreparedFacts)
    if facts.format != FORMAT:
        raise UserError(f"{folder} was prepared by another version. Prepare it again, into another folder.")
    if facts.kind != kind:
        raise UserError(f"{folder} was prepared from {facts.kind}, not from {kind}. Name another folder.")
    return facts


def describe_encoder(facts: PreparedFacts) -> str:
    """The model, size and precision of a folder, for messages."""
    return f"{facts.model} at {facts.size} px in {facts.encoder.get('precision', '?')}"


class Prepared:
    """A finished folder. Raises `UserError` for one that is not finished, or of which a shard is gone or damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder = folder.expanduser()
        self.facts = read_facts(folder)
        self.again = f"Run `align prepare` with --out {folder} again: only what is missing is done."
        if not self.facts.finished:
            raise UserError(f"{folder} is not prepared to its end. {self.again}")
        self.records = self._table(RECORDS)
        if not len(self.records):
            raise UserError(f"{folder / RECORDS} holds nothing. {self.again}")
        order = np.argsort(self.records.numbers("number"), kind="stable")
        usable = ~self.records.numbers("bad").astype(bool)[order]
        self.order = order[usable]  # rows of the table, in the order of the source
        self.is_pair, self.both_bad = (self._flags(name) for name in ("pair", "both_bad"))
        self.label = self.records.numbers("label")[self.order]

    def _table(self, name: str) -> Table:
        table = Table(self.folder / name)
        table.refuse_incomplete(self.again)
        return table

    def _flags(self, name: str) -> Numbers:
        return self.records.numbers(name)[self.order].astype(bool)

    @cached_property
    def _texts(self) -> tuple[list[str], Numbers]:
        return self._words("prompt")

    def _words(self, name: str) -> tuple[list[str], Numbers]:
        """The different texts of a column, and which of them each record has."""
        encoded = self.records.strings(name).combine_chunks().take(self.order).dictionary_encode()
        return encoded.dictionary.to_pylist(), encoded.indices.to_numpy()

    @property
    def prompts(self) -> list[str]:
        """All prompts, once each."""
        return self._texts[0]

    @property
    def prompt(self) -> Numbers:
        """Which of them each record has [N]."""
        return self._texts[1]

    @cached_property
    def normalized(self) -> list[str]:
        """The prompts as they are compared."""
        return [normalize_prompt(prompt) for prompt in self.prompts]

    def describe(self) -> str:
        """“120 pairs (4 ties) of 40 prompts”."""
        return _describe(self, self.is_pair, self.label, self.prompt)

    # For training ----------------------------------------------------------------------------------------

    def refuse_other_encoder(self, model: Backbone, *, flip: bool, crops: int, seed: int) -> None:
        """`UserError` where the folder was prepared for another model, size or precision, or holds too little."""
        facts, folder = self.facts, self.folder
        if facts.size != model.resolution or facts.encoder != encoder_facts(model):
            other = f"{model.location.name} at {model.resolution} px in {encoder_facts(model)['precision']}"
            raise UserError(
                f"{folder} was prepared for {describe_encoder(facts)}, and this would be {other}"
                f"{'' if describe_encoder(facts) != other else ', with other weights or another placement'}. "
                "Prepare for it, or train that one."
            )
        if flip and not facts.flip:
            raise UserError(f"{folder} holds no mirrored images. Prepare with --flip, or leave it out.")
        if crops and (facts.random_crop != crops or facts.seed != seed):
            held = f"{facts.random_crop} random crops of seed {facts.seed}" if facts.random_crop else "none"
            raise UserError(
                f"{folder} holds {held}, and --random-crop {crops} asks for those of seed {seed}. Prepare with "
                f"--random-crop {crops} --seed {seed}, or leave it out."
            )

    def image_tables(self, *, flip: bool) -> dict[bool, Table]:
        """The tables of latents, by whether they are mirrored."""
        return {False: self._table(IMAGES), **({True: self._table(MIRRORED)} if flip else {})}

    def conditions(self, model: Backbone, prompts: list[str]) -> Prompts | Conditions:
        """The conditions of prompts, row for row; what learned words change is encoded anew."""
        table = self._table(PROMPTS)
        rows = table.find(prompt_keys(prompts))
        if model.text_learned or (rows < 0).any():
            return encode_texts(model, prompts)
        return Prompts(Encoded(table, rows))

    def select(
        self, *, by_pairs: bool, ties: bool, user: str | None = None, limit: int | None = None
    ) -> PreparedRecords:
        """What is learned from: pairs, with or without ties, or single images (`records.to_singles`)."""
        asked = np.ones(len(self.order), bool)
        if user is not None:
            names, which = self._words("user")
            if user not in names:
                known = (
                    f"It has {', '.join(sorted(filter(None, names))[:10])}"
                    if any(names)
                    else "It names no users"
                )
                raise UserError(f"{self.folder} has no choices by {user}. {known}.")
            asked = which == names.index(user)
        asked[limit if limit is not None else len(asked) :] = False
        pairs, tie = self.is_pair & asked, self.label == 0.5
        counts = (int(pairs.sum()), int((pairs & tie).sum()), int((asked & ~self.is_pair).sum()))
        good = int((self.label[asked & ~self.is_pair] > 0).sum())
        for problem in general_problems(str(self.folder), *counts, good):
            raise UserError(problem)
        if by_pairs:
            if not pairs.any():
                raise UserError(
                    f"{self.folder} judges single pictures, and this loss compares pairs. Use --loss kto."
                )
            rows = np.flatnonzero(pairs if ties else pairs & ~tie)
            return PreparedRecords(self, rows, None, self.label[rows])
        singles = np.flatnonzero(asked & ~self.is_pair)
        judged = np.flatnonzero(pairs & (~tie | self.both_bad))
        sides = np.tile([0, 1], len(judged))
        wanted = ((sides == 0) & ~np.repeat(self.both_bad[judged], 2)).astype(np.float32)
        return PreparedRecords(
            self,
            np.concatenate([singles, np.repeat(judged, 2)]),
            np.concatenate([np.zeros(len(singles), np.int64), sides]),
            np.concatenate([self.label[singles], wanted]),
        )


@dataclass(frozen=True, eq=False)
class PreparedRecords:
    """Some records of a prepared folder: `rows` of its records, which of a pair's two `sides` (None: both)."""

    folder: Prepared
    rows: Numbers
    sides: Numbers | None
    preference: Numbers

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def prompt(self) -> Numbers:
        """Which of the folder's prompts each record has."""
        return self.folder.prompt[self.rows]

    @property
    def keys(self) -> Numbers:
        """Each record's contents, hashed, in hexadecimal digits."""
        if self.sides is None:
            raw = self._gather("content")
        else:
            raw = self._gather("contents")[np.arange(len(self)), self.sides]
        return np.ascontiguousarray(HEX[raw]).view("S64").reshape(-1)

    def rows_of(self, images: Table) -> Numbers:
        """The rows of the records' images in a table of latents [M, G]."""
        return self._find(images, self._gather("images"))

    def cut_rows(self, images: Table) -> Numbers:
        """The same of each random crop [M, R, G]."""
        crops = self.folder.facts.random_crop
        if not crops or not len(self):
            return np.zeros((len(self), 0, 1 if self.sides is not None else 2), np.int64)
        keys = self._gather("cuts")
        return np.stack([self._find(images, keys[:, number]) for number in range(crops)], axis=1)

    def split(self, *, share: float, seed: int) -> tuple[PreparedRecords, PreparedRecords]:
        """Training and held-out records, by prompt as `records.split_held_out` does."""
        words = self.folder.normalized
        of_class = self.prompt, self.preference > 0
        classes: list[set[str]] = []
        if self.sides is not None:
            classes = [
                {words[one] for one in np.unique(of_class[0][of_class[1] == good])} for good in (False, True)
            ]
        there = {words[one] for one in np.unique(self.prompt)}
        held = held_out_prompts(there, classes, share=share, seed=seed)
        out = np.array([word in held for word in words], bool)[self.prompt]
        return self._part(~out), self._part(out)

    def describe(self) -> str:
        """“120 pairs (4 ties) of 40 prompts”."""
        pairs = np.full(len(self), self.sides is None)
        return _describe(self.folder, pairs, self.preference, self.prompt)

    def texts(self) -> Iterator[str]:
        """The records' prompts, once each, as they come."""
        _, first = np.unique(self.prompt, return_index=True)
        return (self.folder.prompts[self.prompt[row]] for row in np.sort(first))

    def none(self) -> PreparedRecords:
        """None of them."""
        return self._part(slice(0))

    def fingerprint(self) -> str:
        """The hash of all records' contents, in their order."""
        return content_hash(self.keys.tobytes())

    def _part(self, chosen: Numbers | slice) -> PreparedRecords:
        sides = None if self.sides is None else self.sides[chosen]
        return PreparedRecords(self.folder, self.rows[chosen], sides, self.preference[chosen])

    def _gather(self, name: str) -> Numbers:
        found: Numbers = self.folder.records.gather(name, self.folder.order[self.rows]).numpy()
        return found

    def _find(self, images: Table, keys: Numbers) -> Numbers:
        """Rows of a table for keys [M, 2, 32], of the side that counts; `UserError` where one is missing."""
        keys = keys if self.sides is None else keys[np.arange(len(self)), self.sides][:, None]
        rows = images.find(keys.reshape(-1, keys.shape[-1])).reshape(len(self), -1)
        if (rows < 0).any():
            raise UserError(
                f"{images.folder} holds no latents for {int((rows < 0).sum())} images of {self.folder.folder}. "
                f"{self.folder.again}"
            )
        return rows


def _describe(folder: Prepared, pairs: Numbers, label: Numbers, prompt: Numbers) -> str:
    prompts = len({folder.normalized[one] for one in np.unique(prompt)})
    ties = int((pairs & (label == 0.5)).sum())
    return describe_counts(int(pairs.sum()), ties, int((~pairs).sum()), prompts)
