"""Before/after pairs with their instructions, as people lay them out.

    pairs/source/1.png, pairs/target/1.png, pairs/target/1.txt       two folders with the same names
    pairs/metadata.jsonl      {"source": "a.png", "target": "b.png", "instruction": "make it snow", "references": [...]}
    pairs/prompt.json         {"source": "source/0.png", "target": "target/0.png", "prompt": "…"}, as ControlNet's
    runs/edit-cat             a run folder of `edit`, or a folder of them

Names of columns and folders are those of diffusers' scripts, InstructPix2Pix, ai-toolkit, musubi and DiffSynth. Nothing
is decoded here; `check_edit_pairs` opens every image and reports problems of pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backbone.io.console import UserError, format_count, notify, notify_once, on_one_line
from backbone.io.files import read_json
from backbone.io.progress import progress
from backbone.io.prompts import is_caption
from backbone.io.records import read_as, resolve_inside
from backbone.media.duplicates import almost_equal, perceptual_hash
from backbone.media.sources.columns import find_column
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

# Names of columns and of folders, as `plain_name` returns them; the first that exists is used
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
REGISTERED = 48  # most pairs of a training that are registered …
CLOSELY = 256  # … at this many pixels
HELD_OUT = 8  # most held-out pairs by default
EQUAL = 48.0  # dB: closer images are the same
Bits = tuple[NDArray[np.bool_], NDArray[np.bool_]]  # hashes of an image before an edit and after it
ALIKE = 0.15  # least share of equal pixels in a pair that shows one scene


@dataclass(frozen=True)
class EditPair:
    """An image before and after an edit, with the instruction and further reference images."""

    source: ImageRecord
    target: ImageRecord
    instruction: str
    references: tuple[ImageRecord, ...] = ()
    beside_source: bool = False  # whether the instruction's file is in the sources' folder

    @property
    def name(self) -> str:
        """Its name in messages: the target's file."""
        return str(self.target.path)


def read_edit_pairs(folder: str | Path) -> list[EditPair]:
    """The pairs of a folder, in the order of its list or of the names.

    Raises `UserError` for a folder without pairs, for images without a partner, and for a list that names missing
    files.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"{folder} is no folder. Name one with source/ and target/, or with a metadata.jsonl."
        )
    pairs = _read_folder(folder)
    say_unused(
        folder, [image for pair in pairs for image in (pair.source, pair.target, *pair.references)], LISTS
    )
    return pairs


def say_unused(folder: Path, images: Sequence[ImageRecord], lists: Sequence[str]) -> None:
    """Print which masks of pairs and which other files of their folder are not used."""
    masks = [image.mask for image in images if image.mask]
    if masks:
        notify(f"Pairs are learned whole: {format_count(len(masks), 'mask')} not used (first: {masks[0]}).")
    listed = [ImageRecord(path) for path in find_lists(folder, lists)]
    if (folder / RECORD).is_file() or any(folder.glob(f"*/{RECORD}")):
        return  # runs of `edit` hold more than their images
    for sentence in describe_unused(folder, [*listed, *images]):
        notify(sentence)


def _read_folder(folder: Path) -> list[EditPair]:
    if listed := find_lists(folder, LISTS):
        return list(_read_list(listed[0]))
    runs = (
        [folder]
        if (folder / RECORD).is_file()
        else sorted(path.parent for path in folder.glob(f"*/{RECORD}"))
    )
    if runs:
        return [pair for run in runs for pair in _read_run(run)]
    return _read_two_folders(folder)


def plain_name(name: str) -> str:
    """A column's or folder's name in lower case and the singular, without separators and a trailing number.

    `control_image_file_name` is `control_image`.
    """
    word = find_column(name.strip().rstrip("0123456789")).lower()
    return "".join(letter for letter in word if letter.isalnum()).rstrip("0123456789").removesuffix("s")


def _read_list(path: Path) -> Iterator[EditPair]:
    """The pairs of a list; each line names two images in its folder, and its instruction, or a .txt there has it."""
    listed = ListedImages()
    for location, entry in read_image_list(path):
        keys = sorted(entry, key=_by_number)
        columns = {plain_name(key): entry[key] for key in reversed(keys)}
        source, target = (_find_first(columns, names) for names in (SOURCES, TARGETS))
        if isinstance(source, list):  # ai-toolkit's and musubi's: the first of several images
            source, *more_sources = source or [None]
        else:
            more_sources = [
                entry[key] for key in keys if _counts_up(key) and entry[key] not in (source, None, "")
            ]
        references = _find_first(columns, REFERENCES) or []
        references = [references] if isinstance(references, str) else references
        references = [*read_as(list[Any], references, location, "references"), *more_sources]
        for image, side, example in ((source, "source", SOURCES[0]), (target, "target", TARGETS[0])):
            if not isinstance(image, str) or not image:
                raise UserError(
                    f"{location} names no {side} image (its keys are {', '.join(entry)}). Write it as "
                    f'{{"source": "before.png", "target": "after.png", "instruction": "make it snow"}} ("{example}").'
                )
        source_image, target_image = (
            listed.record(find_listed(path, name, location)) for name in (source, target)
        )
        instruction = read_as(
            str, _find_first(columns, INSTRUCTIONS) or target_image.caption or "", location, "instruction"
        )
        further = [read_as(str, name, location, "references") for name in references]
        files = {*SOURCES, *TARGETS, *REFERENCES}
        other_columns = [key for key in entry if plain_name(key) not in files and isinstance(entry[key], str)]
        if not instruction and other_columns:
            notify_once(
                f"{path} has no instruction, prompt, caption or text, so no words come from it. It has "
                f"{', '.join(other_columns)}: call one of them instruction."
            )
        yield EditPair(
            source_image,
            target_image,
            " ".join(instruction.split()),
            tuple(listed.record(find_listed(path, name, location)) for name in further),
        )


def _by_number(key: str) -> tuple[str, int]:
    """Sort `control_path_2` before `control_path_10`, and `control_path` before both."""
    word = key.rstrip("0123456789")
    return word, int(key[len(word) :][:9] or -1)


def _counts_up(key: str) -> bool:
    """Whether a column is a further source: `control_path_1`."""
    return plain_name(key) in SOURCES and key[-1].isdigit()


def _find_first(columns: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((columns[name] for name in names if columns.get(name) not in (None, "")), None)


def find_listed(listed: Path, name: str, location: str) -> Path:
    """The file of this name, relative to a list; `UserError` if there is none."""
    path = find_in_list(listed, name, location)
    if not path.is_file():
        raise UserError(
            f"{location} names {name}, and there is no such file beside it. Put it there, or take the line out."
        )
    return path


def _read_run(run: Path) -> list[EditPair]:
    """The pairs of a run of `edit`: the source and every edit, with the instruction or the words that were changed.

    In a sequence of instructions each pair starts from the result of the previous one.
    """
    record = read_json(run / RECORD)
    edits = read_as(list[dict[str, Any]], record.get("edits") or [], run / RECORD, "edits")
    settings = read_as(dict[str, Any], record.get("settings") or {}, run / RECORD, "settings")
    before, instructed = settings.get("source"), record.get("command") == "instruct"
    pairs, source = [], run / "source.png"
    for edit in edits:
        target = resolve_inside(run, read_as(str, edit.get("file"), run / RECORD, "file"), run / RECORD)
        prompt = read_as(str, edit.get("prompt") or "", run / RECORD, "prompt")
        instruction = prompt if instructed or not before else f"turn {before} into {prompt}"
        pairs.append(EditPair(ImageRecord(source), ImageRecord(target), instruction))
        source = target if instructed else source
    return pairs


def list_partners(first: Path, second: Path) -> tuple[dict[str, ImageRecord], dict[str, ImageRecord]]:
    """The images of two folders, by name; `UserError` for a name that only one of them has."""
    first_files, second_files = list_by_name(first), list_by_name(second)
    if unmatched := sorted({*first_files} ^ {*second_files}):
        raise UserError(
            f"{format_count(len(unmatched), 'name')} of {first.parent} in only one of {first.name}/ and {second.name}/ "
            f"(first: {unmatched[0]}). Give each its partner with the same name."
        )
    return first_files, second_files


def _read_two_folders(folder: Path) -> list[EditPair]:
    """The pairs of two subfolders with the same file names; captions are in the targets' folder, or the sources'."""
    subfolders = {
        plain_name(path.name): path
        for path in sorted(folder.iterdir(), key=lambda path: _by_number(path.name), reverse=True)
        if path.is_dir()
    }
    source, target = (_find_first(subfolders, names) for names in (SOURCES, TARGETS))
    if source is None or target is None:
        folder_names = ", ".join(sorted(path.name for path in subfolders.values())) or "none"
        raise UserError(
            f"{folder} has no two folders with images before and after (its folders: {folder_names}) and no "
            "metadata.jsonl. Call them source/ and target/."
        )
    source_images, target_images = list_partners(source, target)
    further = [
        list_by_name(path)
        for path in sorted(folder.iterdir(), key=lambda path: _by_number(path.name))
        if path.is_dir() and path != source and plain_name(path.name) in (*REFERENCES, plain_name(source.name))
        and path != target
    ]  # fmt: skip
    return [
        EditPair(
            source_images[name],
            target_image,
            target_image.caption or source_images[name].caption or "",
            tuple(images[name] for images in further if name in images),
            beside_source=not target_image.caption and bool(source_images[name].caption),
        )
        for name, target_image in target_images.items()
    ]


# Checking -----------------------------------------------------------------------------------------------------


def check_edit_pairs(pairs: Sequence[EditPair]) -> tuple[list[str], list[str]]:
    """(errors, warnings): sentences, each with the file.

    Opens every image. The images of a pair must have one aspect ratio, differ, and be aligned to the pixel, and the
    pair must have an instruction; errors are of pairs that `select_usable_pairs` refuses.
    """
    wrong = check_instructions(pairs)
    doubtful: list[str] = []
    by_instruction: dict[str, list[tuple[str, Bits]]] = {}
    with progress(len(pairs), "comparing", brief=True) as bar:
        for pair in pairs:
            try:
                comparison = compare_pair(pair)
            except BadImageError as error:
                comparison = PairProblems(wrong=[f"{error.name} {error.reason}."])
            wrong += [*comparison.wrong, *comparison.drifted]
            doubtful += comparison.doubtful
            if comparison.hashes is not None:
                alike = by_instruction.setdefault(pair.instruction.lower(), [])
                doubtful += [
                    f"{pair.name} and {name} are almost the same pair. Keep one of them."
                    for name, hashes in alike
                    if all(map(almost_equal, hashes, comparison.hashes))
                ][:1]
                alike.append((pair.name, comparison.hashes))
            bar.advance_images(1)
    return wrong, doubtful


@dataclass(frozen=True)
class PairProblems:
    """Problems of a pair's images: errors, drift, warnings.

    `hashes` are the hashes of its two images, where they were compared closely.
    """

    wrong: Sequence[str] = ()
    drifted: Sequence[str] = ()
    doubtful: Sequence[str] = ()
    hashes: Bits | None = None


def select_usable_pairs(pairs: Sequence[EditPair], *, skip_bad: bool = False) -> list[EditPair]:
    """The pairs, if all are usable; with `skip_bad` the usable ones.

    Raises `UserError` that lists all unusable pairs, and for instructions that teach nothing. At most REGISTERED pairs,
    evenly spaced, are checked for alignment to the pixel.
    """
    if problems := check_instructions(pairs):
        raise UserError("\n".join(problems))
    bad: dict[str, str] = {}
    doubtful: list[str] = []
    for drift, sample in ((False, pairs), (True, pairs[:: max(1, math.ceil(len(pairs) / REGISTERED))])):
        if bad and not skip_bad:
            break  # errors are reported before anything is registered
        with progress(len(sample), "registering" if drift else "comparing", brief=True) as bar:
            for pair in sample:
                comparison = PairProblems() if pair.name in bad else _find_problems(pair, drift=drift)
                if problems := [*comparison.wrong, *comparison.drifted]:
                    bad[pair.name] = problems[0]
                doubtful += comparison.doubtful if drift else []
                bar.advance_images(1)
    if bad and (not skip_bad or len(bad) == len(pairs)):
        lines = "\n".join(f"  {on_one_line(sentence)}" for sentence in bad.values())
        raise UserError(
            f"{format_count(len(bad), 'pair')} of {len(pairs)} cannot be learned from (--skip-bad leaves them out):\n"
            f"{lines}"
        )
    if doubtful:
        more = f" ({len(doubtful) - 1} more such: customize check --pairs lists them)" if doubtful[1:] else ""
        notify(f"Warning: {doubtful[0]}{more}")
    if bad:
        notify(
            f"{format_count(len(bad), 'pair')} of {len(pairs)} left out (first: {next(iter(bad.values()))})"
        )
    return [pair for pair in pairs if pair.name not in bad]


def _find_problems(pair: EditPair, *, drift: bool) -> PairProblems:
    """Problems of a pair, including an image that cannot be read."""
    try:
        return compare_pair(pair, drift=drift, most=CLOSELY)
    except BadImageError as error:
        return PairProblems(wrong=[f"{error.name} {error.reason}."])


def hold_out(pairs: Sequence[EditPair], count: int) -> tuple[list[EditPair], list[EditPair]]:
    """(training pairs, `count` held-out pairs, evenly spaced); −1: a tenth, at least one of five or more.

    Raises `UserError` if no training pair is left.
    """
    count = min(HELD_OUT, max(len(pairs) // 10, int(len(pairs) >= 5))) if count < 0 else count
    if count >= len(pairs):
        raise UserError(
            f"{len(pairs)} pairs are there and --held-out {count} takes all of them. Hold out fewer, or add pairs."
        )
    rows = {int((k + 0.5) * len(pairs) / count) for k in range(count)}
    held_out = [pair for row, pair in enumerate(pairs) if row in rows]
    return [pair for row, pair in enumerate(pairs) if row not in rows], held_out


def compare_pair(pair: EditPair, *, drift: bool = True, most: int = COMPARED) -> PairProblems:
    """Problems of a pair's images, compared at `most` pixels on the longer side; with `drift` they are registered too.

    Raises `BadImageError` for an image that cannot be read.
    """
    from backbone.evaluation.image_metrics import psnr
    from backbone.media.registration import register_to_source
    from backbone.media.transforms import crop_and_resize, to_tensor

    source, target = pair.source.open(), pair.target.open()
    for reference in pair.references:
        reference.open()
    (width, height), (wide, high) = source.size, target.size
    if abs(wide * height / (high * width) - 1) > 0.01:
        return PairProblems(
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
    first, second = (to_tensor(crop_and_resize(image, size)) for image in (source, target))
    if psnr(first, second) > EQUAL:
        return PairProblems(
            wrong=[f"{pair.name} shows no edit: it is {pair.source.path}. Take the pair out."],
            doubtful=doubtful,
        )
    if not drift:
        return PairProblems(doubtful=doubtful)

    # A drift of the whole image would be learned as a part of the edit
    registered = register_to_source(second, first)
    shift, drifted = registered.drift((size[1], size[0])), []
    if registered.share < ALIKE:
        doubtful.append(
            f"{pair.name} and its source agree in {registered.share:.0%} of the image: perhaps they are no pair."
        )
    elif shift > max(SHIFTED * max(size) / COMPARED, BLURRED):
        right, down = registered.shift
        drifted.append(
            f"{pair.name} lies {right:+.1f} px to the right of its source and {down:+.1f} px down, at scale "
            f"{registered.scale:.4f} (of {size[0]} × {size[1]}): a model learns the drift too. "
            "`edit keep-background` undoes it."
        )
    hashes = perceptual_hash(source), perceptual_hash(target)
    return PairProblems(drifted=drifted, doubtful=doubtful, hashes=hashes)


def check_instructions(pairs: Sequence[EditPair]) -> list[str]:
    """Warnings about the instructions."""
    sentences = []
    bare = [pair for pair in pairs if not pair.instruction]
    if bare:
        sentences.append(
            f"{len(bare)} of {len(pairs)} pairs say nothing of the edit (first: {bare[0].name}). Put a sentence into a "
            ".txt beside each target, or into the list."
        )
    if pairs and all(pair.beside_source for pair in pairs):
        before, after = pairs[0].source.path.parent.name, pairs[0].target.path.parent.name
        sentences.append(
            f"The instructions lie beside the images of {before}/, which are those before the edit, and an instruction "
            f"stands beside what it makes. Swap the two folders if {before}/ holds the edited images; else put the "
            f"instructions into {after}/."
        )
    instructions = [pair.instruction for pair in pairs if pair.instruction]
    if len(instructions) > 1 and len(set(instructions)) == 1:
        sentences.append(
            f"All pairs have the instruction “{instructions[0]}”: what the model learns answers to any words."
        )
    captions = [instruction for instruction in sorted(set(instructions)) if is_caption(instruction)]
    if instructions and 2 * len(captions) > len(set(instructions)):
        sentences.append(
            f"“{captions[0]}” describes an image and says not what to do. Write instructions: “make it snow”."
        )
    return sentences
