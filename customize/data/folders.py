"""Read training images as other trainers lay them out: kohya's `10_sks dog/` folders, and `concepts_list.json`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backbone.io.console import UserError, notify
from backbone.io.files import read_json
from backbone.media.pictures import IMAGE_SUFFIXES, ImageRecord, check_images, list_images
from customize.settings import INSTANCE_PROMPT, Subject

KOHYA_FOLDER = re.compile(r"(\d+)_(.+)")
ARTICLES = frozenset({"a", "an", "the"})


@dataclass(frozen=True)
class ConceptFolder:
    """Images of one concept, how often each is repeated, its token and its class.

    `token_words` or `class_noun` is empty where the source does not name it. `instance_prompt` has {token} and {class}
    in it, `class_prompt` {class}; the prompts and the folder of class images are None where the source gives none.
    """

    folder: Path
    repeats: int
    token_words: str
    class_noun: str
    instance_prompt: str | None = None
    class_prompt: str | None = None
    class_folder: Path | None = None


def read_concepts(path: str | Path) -> list[ConceptFolder]:
    """Read the concepts of a folder with subfolders like `10_sks dog`, of one such folder, or of `concepts_list.json`.

    Raises `UserError` for any other source.
    """
    path = Path(path).expanduser()
    if path.is_file() and path.suffix.lower() == ".json":
        return _read_list(path)
    if path.is_dir():
        if KOHYA_FOLDER.fullmatch(path.name) and _has_images(path):
            return [_parse_folder(path)]
        if (path / "concepts_list.json").is_file():
            return _read_list(path / "concepts_list.json")
        subfolders = sorted(
            folder for folder in path.iterdir() if folder.is_dir() and KOHYA_FOLDER.fullmatch(folder.name)
        )
        concepts = [_parse_folder(folder) for folder in subfolders if _has_images(folder)]
        if concepts:
            return concepts
    elif not path.exists():
        raise FileNotFoundError(2, "No such file or directory", str(path))
    raise UserError(
        f"{path} has no folders like “10_sks dog” with pictures in them, and is no concepts_list.json. "
        "Give a plain folder of pictures with --images."
    )


def read_subjects(path: str | Path) -> tuple[list[Subject], dict[str, Any]]:
    """Subjects for `customize train` from such a source, and settings that its prompts and class images imply.

    The source's token is both what users write and what the model reads. Subjects are sampled equally often, which is
    what repeats are used for. Raises `UserError` where a token or class is missing or the prompts differ.
    """
    concepts = read_concepts(path)
    for entry in concepts:
        if not entry.token_words or not entry.class_noun:
            raise UserError(
                f"{entry.folder} does not say its token and its class. Name both: a folder “10_sks dog”, or a "
                "concepts_list.json whose instance_prompt is “a sks dog” and class_prompt “a dog”."
            )
    asked: dict[str, Any] = {}
    templates = {entry.instance_prompt or INSTANCE_PROMPT for entry in concepts}
    if len(templates) > 1:
        raise UserError(
            f"The instance prompts of {path} differ in more than token and class. Train them one by one."
        )
    if templates != {INSTANCE_PROMPT}:
        asked["instance_prompt"] = templates.pop()
    classes = {entry.class_prompt for entry in concepts}
    if len(classes) > 1:
        notify(f"The class prompts of {path} differ in more than their class, and are left aside.")
    elif classes != {None}:
        asked["class_prompt"] = classes.pop()
    folders = [str(entry.class_folder) for entry in concepts if entry.class_folder is not None]
    if folders and len(folders) < len(concepts):
        raise UserError(
            f"Some entries of {path} have a class_data_dir and others have none. Give one to all, or to none."
        )
    if folders:
        asked["class_images"] = tuple(folders)
    subjects = [
        Subject(str(entry.folder), entry.token_words, entry.class_noun, entry.token_words)
        for entry in concepts
    ]
    return subjects, asked


def is_concept_source(path: str | Path) -> bool:
    """Whether a path has a layout that `read_concepts` reads, rather than being a plain folder of images."""
    path = Path(path).expanduser()
    if path.is_file():
        return path.name == "concepts_list.json"
    if not path.is_dir():
        return False
    if KOHYA_FOLDER.fullmatch(path.name) and _has_images(path):
        return True
    subfolders = [
        folder for folder in path.iterdir() if folder.is_dir() and KOHYA_FOLDER.fullmatch(folder.name)
    ]
    return (path / "concepts_list.json").is_file() or any(_has_images(folder) for folder in subfolders)


def _parse_folder(folder: Path) -> ConceptFolder:
    """`10_sks dog` → 10 repeats, token `sks`, class `dog`: the first word is the token, the rest the class."""
    match = KOHYA_FOLDER.fullmatch(folder.name)
    assert match is not None
    repeats, words = int(match[1]), match[2].replace("_", " ").split()
    if repeats < 1:
        raise UserError(f"{folder} counts its pictures {repeats} times. Let its name begin with 1 or more.")
    return ConceptFolder(folder, repeats, words[0], " ".join(words[1:]))


def _read_list(path: Path) -> list[ConceptFolder]:
    entries: Any = read_json(path)
    if not isinstance(entries, list) or not entries:
        raise UserError(f'{path} is not a list of concepts. Write it as [{{"instance_data_dir": …}}, …].')
    return [
        _parse_entry(entry, f"Entry {number} of {path}", path.parent)
        for number, entry in enumerate(entries, 1)
    ]


def _parse_entry(entry: Any, where: str, beside: Path) -> ConceptFolder:
    """One object of a concepts_list.json; `where` names it in errors, and relative paths are relative to `beside`."""
    if not isinstance(entry, dict):
        raise UserError(f"{where} is not an object. Write it in {{…}}.")
    texts: dict[str, str] = {}
    for key in ("instance_data_dir", "instance_prompt", "class_prompt", "class_data_dir"):
        value = entry.get(key) or ""
        if not isinstance(value, str):
            raise UserError(f"{where} has a {key} that is not text. Put it in quotes.")
        texts[key] = value
    for key in ("instance_data_dir", "instance_prompt"):
        if not texts[key].strip():
            raise UserError(f"{where} has no {key}. Add it.")
    folder = beside / Path(texts["instance_data_dir"]).expanduser()
    if not folder.is_dir():
        raise UserError(f"{where} names {folder}, which is not a folder. Correct its instance_data_dir.")
    token, noun = find_token_and_class(texts["instance_prompt"], texts["class_prompt"])
    # The token, and the class behind it, become placeholders.
    prompt = texts["instance_prompt"]
    if token:
        prompt = prompt.replace(token, "{token}", 1)
        if noun:
            prompt = re.sub(rf"(\{{token\}}.*?)\b{re.escape(noun)}\b", r"\1{class}", prompt, count=1)
    classes = beside / Path(texts["class_data_dir"]).expanduser() if texts["class_data_dir"] else None
    general = re.sub(rf"\b{re.escape(noun)}\b", "{class}", texts["class_prompt"], count=1) if noun else ""
    return ConceptFolder(folder, 1, token, noun, prompt, general or texts["class_prompt"] or None, classes)


def find_token_and_class(instance_prompt: str, class_prompt: str) -> tuple[str, str]:
    """(token, class) from an instance prompt and a class prompt; empty where these do not show them.

    “photo of zwx dog” and “photo of a dog” give (zwx, dog): the token is the words that only the instance prompt has,
    the class the shared words that follow them.
    """
    if not class_prompt.strip():
        return "", ""
    shared = {word.lower().strip(",.") for word in class_prompt.split()}
    words = instance_prompt.split()
    unshared = [
        number for number, word in enumerate(words) if word.lower().strip(",.") not in shared | ARTICLES
    ]
    if not unshared:
        return "", ""
    first = last = unshared[0]
    while last + 1 in unshared:
        last += 1
    noun = []
    for word in words[last + 1 :]:
        if word.lower().strip(",.") not in shared - ARTICLES:
            break
        noun.append(word.strip(",."))
    return " ".join(words[first : last + 1]).strip(",."), " ".join(noun)


def _has_images(folder: Path) -> bool:
    return any(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.iterdir() if path.is_file())


def read_images(
    subjects: Sequence[Subject], caption_column: str = "", image_column: str = ""
) -> list[list[ImageRecord]]:
    """The images of each subject, checked once; `UserError` lists all that cannot be used."""
    columns = {"caption_column": caption_column or None, "image_column": image_column or None}
    folders = [list_images(subject.images, **columns) for subject in subjects]
    check_images([image for folder in folders for image in folder])
    return folders
