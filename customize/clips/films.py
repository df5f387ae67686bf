"""Training clips for a motion with their captions: a folder of them, or a list.

    clips/            one.webp, one.txt; two.mp4; three/0000.png …, three.txt
    clips/metadata.jsonl     {"file_name": "one.webp", "text": "a dog, [M]"}, as of images
    clips/captions.json      {"one.mp4": ["a dog, [M]"]}                            (diffusion-pipe's)
    clips.jsonl              {"video_path": "clips/one.mp4", "caption": "a dog, [M]"}       (musubi-tuner's)

Names are of files or folders beside their list, and never outside of its folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from backbone.io.console import UserError, format_count, notify, on_one_line
from backbone.io.files import read_json
from backbone.io.records import read_as, resolve_inside
from backbone.media.clips import FILMS, STACK, Film, read_film
from backbone.media.sources.columns import join_lines
from backbone.media.sources.names import CAPTION_SUFFIXES, SYSTEM_FILES, list_visible, normalize_name
from backbone.media.sources.pictures import (
    MASK_STEM,
    METADATA,
    read_captions,
    read_listed,
)

LISTS = (".jsonl", ".json", ".csv")
SEVERAL = "captions.json"
FILM_SUFFIXES = (
    ".webp",
    ".gif",
    ".png",
    ".apng",
    ".avif",
    ".mp4",
    ".webm",
    ".mov",
    ".mkv",
    ".avi",
    ".m4v",
    ".npy",
)


@dataclass(frozen=True)
class CaptionedFilm:
    """A clip and its caption, "" without one."""

    film: Film
    caption: str


def list_films(source: str) -> list[CaptionedFilm]:
    """The clips of a folder (animated files, films and folders of frames, captioned as images are) or of a list.

    A folder that holds only frames is one clip; other files next to the clips are printed. Raises `UserError` for a
    folder or a list without any.
    """
    path = Path(source).expanduser()
    if path.is_file() and path.suffix.lower() in LISTS:
        captions = read_listed(path)
        if not captions:
            raise UserError(
                f'{source} names no clips. Write {{"video_path": "1.mp4", "caption": "…"}} in each line.'
            )
        for clip_path in captions:
            if not clip_path.exists():
                raise UserError(
                    f"{source} names {clip_path.relative_to(path.parent)}, and there is none. Put it beside the list."
                )
        return [
            CaptionedFilm(film, caption)
            for film, caption in zip(read_films(list(captions)), captions.values(), strict=True)
        ]
    if not path.is_dir():
        problem = f"{source} is a file" if path.is_file() else f"There is no folder {source}"
        raise UserError(f"{problem}. Name a folder that holds clips, or a list of them ({', '.join(LISTS)}).")

    # A folder: clips beside one another, or the frames of one
    entries = list_visible(path)
    paths = [entry for entry in entries if entry.is_dir() or entry.suffix.lower() in FILM_SUFFIXES]
    stills = [
        entry for entry in paths if entry.is_file() and entry.suffix.lower() in (".png", ".jpg", ".jpeg")
    ]
    if paths and len(stills) == len(paths):
        return [CaptionedFilm(read_film(path), "")]
    paths = drop_repeated_frames(paths, path)
    if not paths:
        raise UserError(f"{source} holds no clips. Put animated WebPs or GIFs there, or folders of frames.")

    # Captions, and what is neither a clip nor a caption
    captions = read_captions(path, paths) | read_several_captions(path / SEVERAL, paths)
    captioned = {normalize_name(film.name if film.is_dir() else film.stem) for film in paths}
    unused = [
        entry.name
        for entry in entries
        if not entry.is_dir()
        and entry not in paths
        and entry.name.lower() not in (*METADATA, SEVERAL, *SYSTEM_FILES)
        and not (entry.suffix.lower() in CAPTION_SUFFIXES and normalize_name(entry.stem) in captioned)
    ]
    if unused:
        more = f" and {len(unused) - 5} more" if unused[5:] else ""
        notify(f"Not used in {source}: {', '.join(unused[:5])}{more}.")
    return [CaptionedFilm(film, captions[file]) for file, film in zip(paths, read_films(paths), strict=True)]


def read_films(paths: Sequence[Path]) -> list[Film]:
    """The clips at these paths; one `UserError` lists every clip that cannot be read, with the reason."""
    films, wrong = [], []
    for path in paths:
        try:
            films.append(read_film(path))
        except UserError as error:
            wrong.append(on_one_line(str(error)))
    if wrong:
        raise UserError("\n".join(wrong))
    return films


def drop_repeated_frames(paths: Sequence[Path], folder: Path) -> list[Path]:
    """The clips of a folder, without frames whose clip is also there as a file, as `customize clip` writes both.

    Masks are left out. Raises `UserError` for two files of one clip, and for a folder that holds films.
    """
    files: dict[str, Path] = {}
    for path in [entry for entry in paths if entry.is_file() and not MASK_STEM.fullmatch(entry.stem)]:
        name = normalize_name(path.stem)
        if name in files:
            raise UserError(f"{files[name]} and {path.name} are one clip by their names. Keep one of them.")
        files[name] = path
    folders = [entry for entry in paths if entry.is_dir() and entry.name.lower() not in SYSTEM_FILES]
    frames = [entry.name for entry in folders if normalize_name(entry.name) in files]
    if frames:
        also = f" and so are those of {format_count(len(frames) - 1, 'other clip')}" if frames[1:] else ""
        notify(
            f"The frames in {folder / frames[0]}/ are those of a file beside it, and not learned twice{also}."
        )
    unfilmed = [entry for entry in folders if entry.name not in frames]
    for entry in unfilmed:
        if films := [file.name for file in list_visible(entry) if file.suffix.lower() in (*FILMS, STACK)]:
            raise UserError(
                f"{entry} holds clips ({films[0]}), and clips are read from one folder. Move them to {folder}, or give "
                f"{entry}."
            )
    return [entry for entry in paths if entry in files.values() or entry in unfilmed]


def read_several_captions(listed: Path, paths: Iterable[Path]) -> dict[Path, str]:
    """The first caption of each clip that a captions.json names.

    Raises `UserError` for another record, and for a clip that is not there.
    """
    if not listed.is_file():
        return {}
    clip_paths, captions_by_path, listed_twice = set(paths), dict[Path, str](), 0
    for name, value in read_as(dict[str, str | list[str]], read_json(listed), listed).items():
        film = resolve_inside(listed.parent, name, listed)
        if film not in clip_paths:
            raise UserError(
                f"{listed} names {name}, and there is no such clip beside it. Take it out, or put it there."
            )
        captions = [value] if isinstance(value, str) else value
        listed_twice += len(captions) > 1
        captions_by_path[film] = join_lines(next(iter(captions), ""), f"{name} in {listed}") or ""
    if listed_twice:
        notify(
            f"{listed} has several captions for {format_count(listed_twice, 'clip')}: the first of each is learned."
        )
    return captions_by_path
