"""Read training images as other trainers lay them out: kohya's `10_sks dog/` folders, and `concepts_list.json`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backbone.adapters.concept import mentions, word_pattern
from backbone.io.console import UserError, format_count, notify, on_one_line, quote
from backbone.io.files import read_json
from backbone.io.run_folder import is_prepared
from backbone.io.written import written_path
from backbone.media.sources.names import IMAGE_SUFFIXES
from backbone.media.sources.pictures import check_images, describe_unused, find_lists, list_images
from backbone.media.sources.record import ImageRecord
from customize.settings import INSTANCE_PROMPT, Settings, Subject

KOHYA_FOLDER = re.compile(r"(\d+(?:\.\d+)?)_(.*[^\s_].*)")
CONCEPT_KEYS = (
    "instance_data_dir",
    "instance_prompt",
    "class_prompt",
    "class_data_dir",
)  # of a concepts_list.json
ARTICLES = frozenset({"a", "an", "the"})
FUNCTION_WORDS = frozenset(  # neither tokens nor part of a class
    {
        *ARTICLES, "of", "in", "on", "at", "with", "by", "and", "or", "from", "to", "for", "as", "is",
        "are", "under", "over", "near", "next", "beside", "behind", "wearing", "holding", "sitting",
        "standing", "lying", "running", "style", "photo", "picture", "image", "painting", "drawing", "my",
        "his", "her", "its", "their",
    }
)  # fmt: skip
LINKS = FUNCTION_WORDS - {"style", "photo", "picture", "image", "painting", "drawing"}  # which may be a class
IDENTIFIER = (
    re.compile(  # identifiers rather than words: in brackets, without vowels, in capitals, with digits
        r"\[[^\[\]\s]+\]|<[^<>\s]+>|[b-df-hj-np-tv-xz]{2,6}|ohwx|olis|[A-Z]{2,6}|(?=\w*[A-Za-z])(?=\w*\d)\w+"
    )
)
NO_IDENTIFIER = re.compile(r"\d+(?:k|d|mm|cm|px|mp)|hd|uhd|hdr|dslr|raw|cgi?|bw|vr", re.IGNORECASE)


@dataclass(frozen=True)
class ConceptFolder:
    """Images of one concept, how often each is repeated, its token and its class.

    `token_words` or `class_noun` is empty if the source does not name it. `instance_prompt` contains {token} and
    {class}, `class_prompt` {class}; the prompts and the folder of class images are None if the source has none.
    """

    folder: Path
    repeats: float
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


def read_subjects(
    path: str | Path, *, token: str = "", class_noun: str = "", token_words: str = ""
) -> tuple[list[Subject], dict[str, Any]]:
    """Subjects for `customize train` from such a source, and settings that its prompts and class images imply.

    The source's token is both what users write and what the model reads; a given token or class overrides it. Subjects
    are sampled equally often, which is the usual purpose of repeats. Raises `UserError` if a token or class is
    missing, one is given for several subjects, or the prompts differ.
    """
    concepts = read_concepts(path)
    _refuse_parts_of_one(concepts)
    _refuse_class_as_subject(concepts)
    for flag, value in (("--token", token), ("--class", class_noun), ("--token-words", token_words)):
        if value and len(concepts) > 1:
            raise UserError(
                f"{path} holds {len(concepts)} subjects and says what they are called, so {flag} has no effect. "
                "Leave it out, or train them one by one."
            )
    for entry in concepts:
        if not (token or entry.token_words) or not (class_noun or entry.class_noun):
            raise UserError(
                f"{entry.folder} does not say its token and its class. Name both: with --token and --class, by a "
                "folder “10_sks dog”, or by a concepts_list.json whose instance_prompt is “a sks dog” and "
                "class_prompt “a dog”."
            )
    # Values that all subjects share become settings: instance prompt, class prompt, class images
    layout: dict[str, Any] = {}
    templates = {entry.instance_prompt or INSTANCE_PROMPT for entry in concepts}
    if len(templates) > 1:
        raise UserError(
            f"The instance prompts of {path} differ in more than token and class. Train them one by one."
        )
    if templates != {INSTANCE_PROMPT}:
        layout["instance_prompt"] = templates.pop()
    classes = {entry.class_prompt for entry in concepts}
    if len(classes) > 1:
        notify(f"The class prompts of {path} differ in more than their class and are not used.")
    elif classes != {None}:
        layout["class_prompt"] = classes.pop()
    _say_unused_images(Path(path).expanduser(), [entry.folder for entry in concepts])

    # Class images of all subjects, or of none
    folders = [str(entry.class_folder) for entry in concepts if entry.class_folder is not None]
    if folders and len(folders) < len(concepts):
        raise UserError(
            f"Some entries of {path} have a class_data_dir and others have none. Give one to all, or to none."
        )
    if folders:
        layout["class_images"] = tuple(folders)
    subjects = [
        Subject(
            str(entry.folder),
            token or entry.token_words,
            class_noun or entry.class_noun,
            token_words or ("" if token else entry.token_words),
        )
        for entry in concepts
    ]
    return subjects, layout


def _refuse_parts_of_one(concepts: Sequence[ConceptFolder]) -> None:
    """`UserError` for two folders with one token: a subject's images belong in one folder."""
    first_by_token: dict[str, ConceptFolder] = {}
    for entry in concepts:
        earlier = first_by_token.setdefault(entry.token_words, entry)
        if earlier is not entry and entry.token_words:
            raise UserError(
                f"{earlier.folder} and {entry.folder} have one token, {entry.token_words}. If they show one "
                "subject, put their images into one folder, where all count equally; else give each a token of its own."
            )


def _refuse_class_as_subject(concepts: Sequence[ConceptFolder]) -> None:
    """`UserError` for a folder named after the class of another: kohya's regularisation images."""
    for entry in concepts:
        name = f"{entry.token_words} {entry.class_noun}".strip().lower()
        for other in concepts:
            if name and name == other.class_noun.lower():
                raise UserError(
                    f"{entry.folder} is called as the class of {other.folder}, as a folder of class images is, and no "
                    f"subject. Give each by itself: --images {quote(other.folder)} --class-images {quote(entry.folder)}"
                )


def _say_unused_images(path: Path, used: Sequence[Path]) -> None:
    """Print which images of a folder of concepts belong to no concept."""
    if not path.is_dir() or path in used:
        return
    neighbours = [
        f"{folder.name}/" for folder in sorted(path.iterdir()) if folder.is_dir() and folder not in used
    ]
    loose = sum(file.suffix.lower() in IMAGE_SUFFIXES for file in path.iterdir() if file.is_file())
    parts = [name for name in neighbours if not name.startswith(".") and _has_images(path / name)]
    if loose:
        parts.insert(0, f"{loose} image{'s' if loose > 1 else ''} beside the numbered folders")
    if parts:
        notify(f"Not used in {path}: {', '.join(parts)}.")


def is_concept_source(path: str | Path, *, token: str = "", class_noun: str = "") -> bool:
    """Whether a path has a layout that `read_concepts` reads, rather than being a plain folder of images.

    If `token` and `class_noun` are given, a folder of images is plain whatever its name; one of them is enough if the
    folder's name is only a number and a word (`01_front`).
    """
    path = Path(path).expanduser()
    if path.is_file():
        return path.suffix.lower() == ".json"  # other JSON files are refused by `read_concepts`
    if not path.is_dir():
        return False
    if _has_images(path):
        if token and class_noun:
            return False
        if KOHYA_FOLDER.fullmatch(path.name):
            name = _parse_folder(path)
            is_token = name.class_noun or IDENTIFIER.fullmatch(name.token_words)
            return bool(name.class_noun or not token) and bool(is_token or not class_noun)
    subfolders = [
        folder for folder in path.iterdir() if folder.is_dir() and KOHYA_FOLDER.fullmatch(folder.name)
    ]
    return (path / "concepts_list.json").is_file() or any(_has_images(folder) for folder in subfolders)


def _parse_folder(folder: Path) -> ConceptFolder:
    """`10_sks dog` → 10 repeats, token `sks`, class `dog`: the first word is the token, the rest the class."""
    match = KOHYA_FOLDER.fullmatch(folder.name)
    assert match is not None
    repeats, words = float(match[1]), match[2].replace("_", " ").split()
    if not repeats:
        raise UserError(f"{folder} counts its pictures 0 times. Let its name begin with 1 or more.")
    token = words[0].rstrip(",;") or words[0]  # as in tags, “10_sks, dog”
    return ConceptFolder(folder, repeats, token, " ".join(words[1:]))


def _read_list(path: Path) -> list[ConceptFolder]:
    document = read_json(path, Any)
    entries: list[Any] = document if isinstance(document, list) else []
    is_concept_list = bool(entries)
    if is_concept_list and path.name != "concepts_list.json":
        is_concept_list = all(isinstance(entry, dict) and "instance_data_dir" in entry for entry in entries)
    if not is_concept_list:
        raise UserError(
            f'{path} is not a list of concepts. Write it as [{{"instance_data_dir": …, "instance_prompt": …}}, …], or '
            "give the folder of the images."
        )
    return [
        _parse_entry(entry, f"Entry {number} of {path}", path.parent)
        for number, entry in enumerate(entries, 1)
    ]


def _parse_entry(entry: Any, location: str, base: Path) -> ConceptFolder:
    """One object of a concepts_list.json; `location` names it in errors, and relative paths are relative to `base`."""
    if not isinstance(entry, dict):
        raise UserError(f"{location} is not an object. Write it in {{…}}.")
    texts: dict[str, str] = {}
    if idle := [key for key in entry if key not in CONCEPT_KEYS and entry[key] not in (None, "")]:
        notify(
            f"{location} says {', '.join(map(str, idle))}, which {'has' if len(idle) == 1 else 'have'} no effect."
        )
    for key in CONCEPT_KEYS:
        value = entry.get(key) or ""
        if not isinstance(value, str):
            raise UserError(f"{location} has a {key} that is not text. Put it in quotes.")
        texts[key] = value
    for key in ("instance_data_dir", "instance_prompt"):
        if not texts[key].strip():
            raise UserError(f"{location} has no {key}. Add it.")
    folder = base / Path(texts["instance_data_dir"]).expanduser()
    if not folder.is_dir():
        raise UserError(f"{location} names {folder}, which is not a folder. Correct its instance_data_dir.")
    token, noun = find_token_and_class(texts["instance_prompt"], texts["class_prompt"])
    # The token, and the class behind it, become placeholders.
    prompt = texts["instance_prompt"]
    if not token:
        token, noun = guess_token_and_class(prompt)
    classes = base / Path(texts["class_data_dir"]).expanduser() if texts["class_data_dir"] else None
    general = re.sub(word_pattern(noun), "{class}", texts["class_prompt"], count=1) if noun else ""
    general = general or texts["class_prompt"]
    return ConceptFolder(folder, 1, token, noun, as_template(prompt, token, noun), general or None, classes)


def as_template(prompt: str, token: str, noun: str) -> str:
    """An instance prompt with its token replaced by {token}, and the class behind it by {class}."""
    if not token:
        return prompt
    start, separator, end = prompt.partition("{token}")
    if not separator:
        match = re.search(word_pattern(token), prompt)
        if match is None:
            return prompt
        start, end = prompt[: match.start()], prompt[match.end() :]
    if noun and "{class}" not in end:
        end = re.sub(rf"\b{re.escape(noun)}\b", "{class}", end, count=1)
    return start + "{token}" + end


def looks_like_identifier(word: str) -> bool:
    """Whether a word is an identifier, like sks, ohwx, TOK or p3rs0n, rather than a word or a tag like 1girl or 4k."""
    return bool(IDENTIFIER.fullmatch(word)) and not (word[:1].isdigit() or NO_IDENTIFIER.fullmatch(word))


def guess_token_and_class(
    instance_prompt: str, class_noun: str = "", class_prompt: str = ""
) -> tuple[str, str]:
    """(token, class) of an instance prompt such as “a photo of sks dog”; empty if it is not clear.

    The token is the word that the class prompt lacks, or the one word that looks like a rare identifier (sks, ohwx,
    TOK, [V], <dog>, zwx2), else the word before the class. The class is the words after it to a preposition or comma.
    """
    if class_prompt and "{" not in class_prompt:
        token, noun = find_token_and_class(instance_prompt, class_prompt)
        if token and " " not in token:
            return token, class_noun or noun

    # Words that look like a rare identifier, and those that stand before the class
    words = instance_prompt.split()
    plain = [word.strip(",.;:!?") for word in words]
    rare = [
        number
        for number, word in enumerate(plain)
        if IDENTIFIER.fullmatch(word) and not NO_IDENTIFIER.fullmatch(word)
    ]
    noun_words = class_noun.lower().split()
    before_class = [
        number - 1
        for number in range(1, len(words))
        if noun_words and [word.lower() for word in plain[number : number + len(noun_words)]] == noun_words
    ]
    if len({plain[number] for number in rare}) == 1:
        index = rare[0]
    elif set(rare) & set(before_class):
        index = min(set(rare) & set(before_class))
    elif len(before_class) == 1 and not rare and plain[before_class[0]].lower() not in FUNCTION_WORDS:
        index = before_class[0]
    else:
        return "", class_noun

    # The class extends to a preposition or a mark
    last = index  # of the words up to a preposition or a mark
    while (
        last + 1 < len(words) and words[last] == plain[last] and plain[last + 1].lower() not in FUNCTION_WORDS
    ):
        last += 1
    return plain[index], class_noun or " ".join(plain[index + 1 : last + 1])


def find_token_and_class(instance_prompt: str, class_prompt: str) -> tuple[str, str]:
    """(token, class) from an instance prompt and a class prompt; empty if these do not show them.

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
        if word.lower().strip(",.") not in shared - LINKS:
            break
        noun.append(word.strip(",."))
    return " ".join(words[first : last + 1]).strip(",."), " ".join(noun)


def _has_images(folder: Path) -> bool:
    return any(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.iterdir() if path.is_file())


def open_prepared(source: str) -> list[ImageRecord]:
    """The images of a folder of `customize prepare`, already checked; prints which were left out."""
    from customize.data.prepared import PreparedImages  # which imports torch

    prepared = PreparedImages(Path(source))
    if sentence := prepared.describe_left_out():
        notify(sentence)
    return prepared.pictures


def read_images(
    subjects: Sequence[Subject], caption_column: str = "", image_column: str = ""
) -> list[list[ImageRecord]]:
    """The images of each subject, checked once; prints which files of their folders are not used.

    Raises `UserError` that lists all images that cannot be used.
    """
    columns = {"caption_column": caption_column or None, "image_column": image_column or None}
    prepared = [is_prepared(subject.images) for subject in subjects]
    if all(prepared) and any(columns.values()):
        raise UserError(
            f"{subjects[0].images} is prepared, captions and all, so no column is read. Name none, or say it to "
            "customize prepare."
        )
    folders = [
        open_prepared(subject.images) if is_encoded else list_images(subject.images, **columns)
        for subject, is_encoded in zip(subjects, prepared, strict=True)
    ]
    unknown = [folder for folder, is_encoded in zip(folders, prepared, strict=True) if not is_encoded]
    check_images([image for folder in unknown for image in folder])
    for subject, folder in zip(subjects, folders, strict=True):
        if not is_prepared(subject.images):
            for sentence in (
                *describe_unused(subject.images, folder),
                *describe_layout(subject.images, folder, subject.token),
                *describe_copies(folder),
            ):
                notify(sentence)
    if len(folders) > 1 and (shared := describe_shared(subjects, folders)):
        notify(shared)
    return folders


def describe_copies(images: Sequence[ImageRecord]) -> list[str]:
    """A sentence if files of different names hold the same image byte for byte, which then counts more than others."""
    by_content: dict[str, set[str]] = {}
    for image in images:
        if image.row is None:
            by_content.setdefault(image.content_hash, set()).add(str(image.path))
    copies = [sorted(names) for names in by_content.values() if len(names) > 1]
    if not copies:
        return []
    more = f", and {len(copies) - 1} more so" if copies[1:] else ""
    return [
        f"{' and '.join(copies[0][:3])} are the same image{more}: it counts {len(copies[0])} times. Keep one."
    ]


def describe_layout(source: str, images: Sequence[ImageRecord], token: str = "[V]") -> list[str]:
    """Sentences on what the layout of a subject's folder may be meant to say: several subjects, captions in names."""
    root = written_path(source)
    files = [image.path for image in images if image.row is None]
    parents = {path.parent for path in files}  # of one image that is named itself: above the root
    folders = sorted(parent.relative_to(root) for parent in parents if parent.is_relative_to(root))
    found = []
    if len(folders) > 1 and not find_lists(root):
        shown = ", ".join(f"{folder}/" for folder in folders[:3]) + (", …" if folders[3:] else "")
        found.append(
            f"The images of {len(folders)} folders in {source} ({shown}) are learned as one subject. If they show "
            "several, name each folder by itself: --images for one, --subject for others."
        )
    if images and (row := images[0].row) is not None:
        found += _describe_labels(source, row.table)
    captions = [path.stem for path in files if _reads_like_caption(path.stem, token)]
    if not any(image.caption for image in images) and len(captions) > len(images) / 2:
        found.append(
            f"Images are called as captions are (“{on_one_line(captions[0])}”), and names are not read. If they are "
            "captions, write each into a .txt file of the image's name."
        )
    return found


def _describe_labels(source: str, table: Any) -> list[str]:
    """A sentence for each column of a table by which its rows are of several classes, as `datasets` marks them."""
    sentences = []
    for column, kind in (getattr(table, "features", None) or {}).items():
        is_label = type(kind).__name__ == "ClassLabel"
        labels = sorted({label for label in table[column] if label is not None}) if is_label else []
        if len(labels) > 1:
            named = ", ".join(kind.int2str(labels[:3]))
            sentences.append(
                f"The rows of {source} are of {len(labels)} classes in their column {column} ({named}"
                f"{', …' if labels[3:] else ''}), and are learned as one subject. If they show several, give a table "
                "or a folder of one alone."
            )
    return sentences


def _reads_like_caption(stem: str, token: str) -> bool:
    """Whether a file's name is of three words or more, the token or an article among them."""
    words = stem.replace("_", " ")
    plain = re.findall(r"[^\W\d]+", words.lower())
    return len(plain) > 2 and (bool(ARTICLES & set(plain)) or mentions(words, token))


def describe_shared(subjects: Sequence[Subject], folders: Sequence[Sequence[ImageRecord]]) -> str:
    """A sentence on images that two subjects share, by their contents; "" if there are none."""
    first: dict[str, tuple[str, ImageRecord]] = {}
    shared: dict[tuple[str, str], list[Path]] = {}
    for subject, folder in zip(subjects, folders, strict=True):
        for image in folder:
            token, _ = first.setdefault(image.content_hash, (subject.token, image))
            if token != subject.token:
                shared.setdefault((token, subject.token), []).append(image.path)
    return " ".join(
        f"{format_count(len(paths), 'image')} of {token} {'is' if len(paths) == 1 else 'are'} of {other} too (first: "
        f"{paths[0]}): what they share is learned for both."
        for (token, other), paths in shared.items()
    )


def list_class_images(settings: Settings) -> list[list[ImageRecord]]:
    """Each subject's class images of the user, in the order of their names; none if they are generated."""
    return [list_images(folder)[: settings.num_class_images or None] for folder in settings.class_images]


def read_class_images(folders: Sequence[str], subjects: Sequence[Sequence[ImageRecord]]) -> None:
    """Check the class images of the subjects once; prints which files of their folders are not used, captions too.

    Raises `UserError` for images that cannot be used, and for an image of a subject among them: the class would be the
    subject.
    """
    subject_images = {
        image.path.resolve(): image for pictures in subjects for image in pictures if image.row is None
    }
    for folder in folders:
        images = list_images(folder)
        check_images(images)
        if repeated := [
            image.path for image in images if image.row is None and image.path.resolve() in subject_images
        ]:
            raise UserError(
                f"{repeated[0]} is an image of the subject and a class image too, so the class would be taught to be "
                "the subject. Give --class-images other images of the class."
            )
        captioned = [image.caption_source for image in images if image.caption]
        if captioned:
            notify(
                f"Class images are kept under the class prompt: {format_count(len(captioned), 'caption')} not used "
                f"(first: {captioned[0]})."
            )
        for sentence in describe_unused(folder, images):
            notify(sentence)
