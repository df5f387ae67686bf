"""Before/after pairs with their instructions, as people lay them out.

    pairs/source/1.png, pairs/target/1.png, pairs/target/1.txt       two folders with the same names
    pairs/metadata.jsonl      {"source": "a.png", "target": "b.png", "instruction": "make it snow", "references": [...]}
    pairs/prompt.json         {"source": "source/0.png", "target": "target/0.png", "prompt": "…"}, as ControlNet's
    runs/edit-cat             a run folder of `edit`, or a folder of them

Names of columns and folders are those of diffusers' scripts, InstructPix2Pix, ai-toolkit, musubi and DiffSynth. Nothing
is decoded here; `check_edit_pairs` opens every image and says what is wrong with a pair.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backbone.io.console import UserError, count_of, notify, notify_once, on_one_line
from backbone.io.files import read_json
from backbone.io.progress import progress
from backbone.io.prompts import is_caption
from backbone.io.records import read_as, resolve_inside
from backbone.media.duplicates import almost_equal, perceptual_hash
from backbone.media.sources.columns import column_of
from backbone.media.sources.decode import BadImageError
from backbone.media.sources.names import find_in_list
from backbone.media.sources.pictures import (
    METADATA,
    PROMPT_LIST,
    ListedImages,
    describe_unused,
    find_lists,
    list_by_name,
    read_image_list,
)
from backbone.media.sources.record import ImageRecord

# Names of columns and of folders, as `plain_name` has them; the first that is there counts
SOURCES = (
    "source", "input", "before", "original", "inputimage", "originalimage", "sourceimage", "sourceimg", "control",
    "controlpath", "controlimage", "condition", "conditioning", "conditioningimage", "editimage",
)  # fmt: skip
TARGETS = (
    "target", "output", "after", "edited", "editedimage", "outputimage", "targetimage", "targetimg", "imagepath",
    "image", "filename",
)  # fmt: skip
INSTRUCTIONS = ("instruction", "editprompt", "editinstruction", "prompt", "caption", "text")
REFERENCES = ("reference", "referenceimage")
LISTS = (*METADATA, "dataset.jsonl", "dataset.json", "train.jsonl", "train.json", PROMPT_LIST)
RECORD = "run.json"  # of a run of `edit`
SHIFTED = 1.0  # pixels, of 512 of the longer side, from which a pair is not registered …
BLURRED = 0.5  # … and pixels of its own: in a small picture another style's soft edges pull the fit that far
COMPARED = 512
REGISTERED = 48  # of the pairs of a training are looked at so closely …
CLOSELY = 256  # … at this many pixels
HELD_OUT = 8  # pairs at most, where no number is asked for
EQUAL = 48.0  # dB: closer images are the same
Bits = tuple[NDArray[np.bool_], NDArray[np.bool_]]  # hashes of an image before an edit and after it
ALIKE = 0.15  # of the pixels agree at least in a pair that shows one scene


@dataclass(frozen=True)
class EditPair:
    """An image before and after an edit, with what was asked for and images that it was to follow."""

    source: ImageRecord
    target: ImageRecord
    instruction: str
    references: tuple[ImageRecord, ...] = ()
    beside_source: bool = False  # whether the instruction lies beside the image before, of two folders

    @property
    def name(self) -> str:
        """How messages call it: the target's file."""
        return str(self.target.path)


def read_edit_pairs(folder: str | Path) -> list[EditPair]:
    """The pairs of a folder, in the order of its list or of the names.

    Raises `UserError` for a folder without pairs, for images without a partner, and for a list that names other files.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"{folder} is no folder. Name one with source/ and target/, or with a metadata.jsonl."
        )
    pairs = _read_folder(folder)
    say_unused(folder, [one for pair in pairs for one in (pair.source, pair.target, *pair.references)], LISTS)
    return pairs


def say_unused(folder: Path, images: Sequence[ImageRecord], lists: Sequence[str]) -> None:
    """Say which masks of pairs are not used, and what else a folder of pairs holds beside its list and images."""
    masks = [one.mask for one in images if one.mask]
    if masks:
        notify(
            f"Pairs are learned from as a whole: {count_of(len(masks), 'mask')} not used (first: {masks[0]})."
        )
    listed = [ImageRecord(path) for path in find_lists(folder, lists)]
    if (folder / RECORD).is_file() or any(folder.glob(f"*/{RECORD}")):
        return  # runs of `edit` hold more than their images
    for sentence in describe_unused(folder, [*listed, *images]):
        notify(sentence)


def _read_folder(folder: Path) -> list[EditPair]:
    if listed := find_lists(folder, LISTS):
        return list(_from_list(listed[0]))
    runs = (
        [folder]
        if (folder / RECORD).is_file()
        else sorted(path.parent for path in folder.glob(f"*/{RECORD}"))
    )
    if runs:
        return [pair for run in runs for pair in _from_run(run)]
    return _from_folders(folder)


def plain_name(name: str) -> str:
    """A column's or folder's name in lower case and the singular, without separators and the number behind it.

    `control_image_file_name` is `control_image`.
    """
    word = column_of(name.strip().rstrip("0123456789")).lower()
    return "".join(letter for letter in word if letter.isalnum()).rstrip("0123456789").removesuffix("s")


def _from_list(path: Path) -> Iterator[EditPair]:
    """The pairs of a list; every line has to name two images beside it, and may leave its words to a .txt there."""
    listed = ListedImages()
    for where, entry in read_image_list(path):
        keys = sorted(entry, key=_by_number)
        named = {plain_name(key): entry[key] for key in reversed(keys)}
        source, target = (_first(named, names) for names in (SOURCES, TARGETS))
        if isinstance(source, list):  # ai-toolkit's and musubi's: the first of several images
            source, *more = source or [None]
        else:
            more = [entry[key] for key in keys if _counts_up(key) and entry[key] not in (source, None, "")]
        references = _first(named, REFERENCES) or []
        references = [references] if isinstance(references, str) else references
        references = [*read_as(list[Any], references, where, "references"), *more]
        for image, what, example in ((source, "source", SOURCES[0]), (target, "target", TARGETS[0])):
            if not isinstance(image, str) or not image:
                raise UserError(
                    f"{where} names no {what} image (its keys are {', '.join(entry)}). Write it as "
                    f'{{"source": "before.png", "target": "after.png", "instruction": "make it snow"}} ("{example}").'
                )
        before, after = (listed.record(find_listed(path, name, where)) for name in (source, target))
        told = read_as(str, _first(named, INSTRUCTIONS) or after.caption or "", where, "instruction")
        further = [read_as(str, name, where, "references") for name in references]
        files = {*SOURCES, *TARGETS, *REFERENCES}
        others = [key for key in entry if plain_name(key) not in files and isinstance(entry[key], str)]
        if not told and others:
            notify_once(
                f"{path} has no instruction, prompt, caption or text, so no words come from it. It has "
                f"{', '.join(others)}: call one of them instruction."
            )
        yield EditPair(
            before,
            after,
            " ".join(told.split()),
            tuple(listed.record(find_listed(path, name, where)) for name in further),
        )


def _by_number(key: str) -> tuple[str, int]:
    """Sort `control_path_2` before `control_path_10`, and `control_path` before both."""
    word = key.rstrip("0123456789")
    return word, int(key[len(word) :][:9] or -1)


def _counts_up(key: str) -> bool:
    """Whether a column is a further source: `control_path_1`."""
    return plain_name(key) in SOURCES and key[-1].isdigit()


def _first(named: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((named[name] for name in names if named.get(name) not in (None, "")), None)


def find_listed(listed: Path, name: str, where: str) -> Path:
    """The file of this name beside a list; `UserError` where there is none."""
    path = find_in_list(listed, name, where)
    if not path.is_file():
        raise UserError(
            f"{where} names {name}, and there is no such file beside it. Put it there, or take the line out."
        )
    return path


def _from_run(run: Path) -> list[EditPair]:
    """What `edit` made of an image: the source and every edit, with the instruction or the words that were changed.

    Of instructions that followed one another each pair begins with what the one before it made.
    """
    record = read_json(run / RECORD)
    edits = read_as(list[dict[str, Any]], record.get("edits") or [], run / RECORD, "edits")
    settings = read_as(dict[str, Any], record.get("settings") or {}, run / RECORD, "settings")
    before, told = settings.get("source"), record.get("command") == "instruct"
    pairs, source = [], run / "source.png"
    for edit in edits:
        target = resolve_inside(run, read_as(str, edit.get("file"), run / RECORD, "file"), run / RECORD)
        prompt = read_as(str, edit.get("prompt") or "", run / RECORD, "prompt")
        instruction = prompt if told or not before else f"turn {before} into {prompt}"
        pairs.append(EditPair(ImageRecord(source), ImageRecord(target), instruction))
        source = target if told else source
    return pairs


def list_partners(first: Path, second: Path) -> tuple[dict[str, ImageRecord], dict[str, ImageRecord]]:
    """The images of two folders side by side, by name; `UserError` where a name is in one of them alone."""
    here, there = list_by_name(first), list_by_name(second)
    if alone := sorted({*here} ^ {*there}):
        raise UserError(
            f"{count_of(len(alone), 'name')} of {first.parent} in only one of {first.name}/ and {second.name}/ "
            f"(first: {alone[0]}). Give each its partner with the same name."
        )
    return here, there


def _from_folders(folder: Path) -> list[EditPair]:
    """Two subfolders with the same names in them; captions stand beside the targets, or beside the sources."""
    subfolders = {
        plain_name(path.name): path
        for path in sorted(folder.iterdir(), key=lambda path: _by_number(path.name), reverse=True)
        if path.is_dir()
    }
    source, target = (_first(subfolders, names) for names in (SOURCES, TARGETS))
    if source is None or target is None:
        there = ", ".join(sorted(path.name for path in subfolders.values())) or "none"
        raise UserError(
            f"{folder} has no two folders with images before and after (its folders: {there}) and no metadata.jsonl. "
            "Call them source/ and target/."
        )
    before, after = list_partners(source, target)
    further = [
        list_by_name(path)
        for path in sorted(folder.iterdir(), key=lambda path: _by_number(path.name))
        if path.is_dir() and path != source and plain_name(path.name) in (*REFERENCES, plain_name(source.name))
        and path != target
    ]  # fmt: skip
    return [
        EditPair(
            before[name],
            one,
            one.caption or before[name].caption or "",
            tuple(images[name] for images in further if name in images),
            beside_source=not one.caption and bool(before[name].caption),
        )
        for name, one in after.items()
    ]


# Checking -----------------------------------------------------------------------------------------------------


def check_edit_pairs(pairs: Sequence[EditPair]) -> tuple[list[str], list[str]]:
    """(what has to be mended, what may be a mistake): sentences, each with the file.

    Opens every image. A pair has to have one shape, differ, lie pixel on pixel, and say what was done; what has to be
    mended is what `usable_pairs` refuses.
    """
    wrong = check_instructions(pairs)
    doubtful: list[str] = []
    seen: dict[str, list[tuple[str, Bits]]] = {}
    with progress(len(pairs), "comparing", brief=True) as bar:
        for pair in pairs:
            try:
                comparison = compare_pair(pair)
            except BadImageError as error:
                comparison = Found(wrong=[f"{error.name} {error.reason}."])
            wrong += [*comparison.wrong, *comparison.drifted]
            doubtful += comparison.doubtful
            if comparison.looks is not None:
                alike = seen.setdefault(pair.instruction.lower(), [])
                doubtful += [
                    f"{pair.name} and {name} are almost the same pair. Keep one of them."
                    for name, looks in alike
                    if all(map(almost_equal, looks, comparison.looks))
                ][:1]
                alike.append((pair.name, comparison.looks))
            bar.advance_images(1)
    return wrong, doubtful


@dataclass(frozen=True)
class Found:
    """What is wrong with a pair's images: what has to be mended, how it drifted, what may be a mistake.

    `looks` are the hashes of its two images, where they were compared closely.
    """

    wrong: Sequence[str] = ()
    drifted: Sequence[str] = ()
    doubtful: Sequence[str] = ()
    looks: Bits | None = None


def usable_pairs(pairs: Sequence[EditPair], *, skip_bad: bool = False) -> list[EditPair]:
    """The pairs, all of which can be learned from; with `skip_bad` those of them that can.

    Raises `UserError` for pairs that cannot, all of them listed, and for instructions that teach nothing. Whether a
    pair lies pixel on pixel is looked at in at most REGISTERED of them, evenly spaced.
    """
    if problems := check_instructions(pairs):
        raise UserError("\n".join(problems))
    bad: dict[str, str] = {}
    doubtful: list[str] = []
    for drift, some in ((False, pairs), (True, pairs[:: max(1, math.ceil(len(pairs) / REGISTERED))])):
        if bad and not skip_bad:
            break  # what has to be mended anyway is said before anything is registered
        with progress(len(some), "registering" if drift else "comparing", brief=True) as bar:
            for pair in some:
                comparison = Found() if pair.name in bad else _look(pair, drift=drift)
                if problems := [*comparison.wrong, *comparison.drifted]:
                    bad[pair.name] = problems[0]
                doubtful += comparison.doubtful if drift else []
                bar.advance_images(1)
    if bad and (not skip_bad or len(bad) == len(pairs)):
        lines = "\n".join(f"  {on_one_line(sentence)}" for sentence in bad.values())
        raise UserError(
            f"{count_of(len(bad), 'pair')} of {len(pairs)} cannot be learned from (--skip-bad leaves them out):\n"
            f"{lines}"
        )
    if doubtful:
        more = f" ({len(doubtful) - 1} more such: customize check --pairs lists them)" if doubtful[1:] else ""
        notify(f"Warning: {doubtful[0]}{more}")
    if bad:
        notify(f"{count_of(len(bad), 'pair')} of {len(pairs)} left out (first: {next(iter(bad.values()))})")
    return [pair for pair in pairs if pair.name not in bad]


def _look(pair: EditPair, *, drift: bool) -> Found:
    """What is wrong with a pair, an image that cannot be read among it."""
    try:
        return compare_pair(pair, drift=drift, most=CLOSELY)
    except BadImageError as error:
        return Found(wrong=[f"{error.name} {error.reason}."])


def hold_out(pairs: Sequence[EditPair], count: int) -> tuple[list[EditPair], list[EditPair]]:
    """(pairs to learn from, `count` that are held out, evenly spaced); −1: a tenth, of five or more at least one.

    Raises `UserError` where none is left to learn from.
    """
    count = min(HELD_OUT, max(len(pairs) // 10, int(len(pairs) >= 5))) if count < 0 else count
    if count >= len(pairs):
        raise UserError(
            f"{len(pairs)} pairs are there and --held-out {count} takes all of them. Hold out fewer, or add pairs."
        )
    rows = {int((k + 0.5) * len(pairs) / count) for k in range(count)}
    held = [pair for row, pair in enumerate(pairs) if row in rows]
    return [pair for row, pair in enumerate(pairs) if row not in rows], held


def compare_pair(pair: EditPair, *, drift: bool = True, most: int = COMPARED) -> Found:
    """What is wrong with a pair's images, with `drift` their registration too, at `most` pixels of the longer side.

    Raises `BadImageError` for one that cannot be read.
    """
    from backbone.evaluation.image_metrics import psnr
    from backbone.media.registration import register_to_source
    from backbone.media.transforms import crop_and_resize, to_tensor

    source, target = pair.source.open(), pair.target.open()
    for reference in pair.references:
        reference.open()
    (width, height), (wide, high) = source.size, target.size
    if abs(wide * height / (high * width) - 1) > 0.01:
        return Found(
            wrong=[
                f"{pair.name} is {wide} × {high} and {pair.source.path} {width} × {height}: other shapes. Crop them "
                "alike."
            ]
        )
    doubtful = []
    if source.size != target.size:
        doubtful.append(
            f"{pair.name} is {wide} × {high} and its source {width} × {height}; the larger one is scaled down."
        )

    # Both at one size, small enough to compare quickly
    scale = min(1.0, most / max(wide, high, width, height))
    size = max(8, round(min(wide, width) * scale)), max(8, round(min(high, height) * scale))
    first, second = (to_tensor(crop_and_resize(one, size)) for one in (source, target))
    if psnr(first, second) > EQUAL:
        return Found(
            wrong=[f"{pair.name} shows no edit: it is {pair.source.path}. Take the pair out."],
            doubtful=doubtful,
        )
    if not drift:
        return Found(doubtful=doubtful)

    # A drift of the whole image, which would be learned as a part of the edit
    registered = register_to_source(second, first)
    moved, drifted = registered.drift((size[1], size[0])), []
    if registered.share < ALIKE:
        doubtful.append(
            f"{pair.name} and its source agree in {registered.share:.0%} of the image: perhaps they are no pair."
        )
    elif moved > max(SHIFTED * max(size) / COMPARED, BLURRED):
        right, down = registered.shift
        drifted.append(
            f"{pair.name} lies {right:+.1f} px to the right of its source and {down:+.1f} px down, at scale "
            f"{registered.scale:.4f} (of {size[0]} × {size[1]}): a model learns the drift too. "
            "`edit keep-background` undoes it."
        )
    looks = perceptual_hash(source), perceptual_hash(target)
    return Found(drifted=drifted, doubtful=doubtful, looks=looks)


def check_instructions(pairs: Sequence[EditPair]) -> list[str]:
    """What may be a mistake in the instructions."""
    sentences = []
    bare = [pair for pair in pairs if not pair.instruction]
    if bare:
        sentences.append(
            f"{len(bare)} of {len(pairs)} pairs say nothing of the edit (first: {bare[0].name}). Put a sentence into a "
            ".txt beside each target, or into the list."
        )
    if pairs and all(pair.beside_source for pair in pairs):
        before, after = (one.path.parent.name for one in (pairs[0].source, pairs[0].target))
        sentences.append(
            f"The instructions lie beside the images of {before}/, which are those before the edit, and an instruction "
            f"stands beside what it makes. Swap the two folders if {before}/ holds the edited images; else put the "
            f"instructions into {after}/."
        )
    told = [pair.instruction for pair in pairs if pair.instruction]
    if len(told) > 1 and len(set(told)) == 1:
        sentences.append(
            f"All pairs have the instruction “{told[0]}”: what the model learns answers to any words."
        )
    captions = [one for one in sorted(set(told)) if is_caption(one)]
    if told and 2 * len(captions) > len(set(told)):
        sentences.append(
            f"“{captions[0]}” describes an image and says not what to do. Write instructions: “make it snow”."
        )
    return sentences
