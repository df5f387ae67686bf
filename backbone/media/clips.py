"""Clips as files: animated WebP, GIF or PNG, frames in a folder or stacked in .npy, films with PyAV; and as strips.

A clip is read whole, in order, and no frame is dropped in silence. Frames are RGB pictures of one size.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import median_low
from typing import Any

import numpy as np
from PIL import Image, ImageSequence

from backbone.io.console import UserError, notify
from backbone.io.files import content_hash, write_bytes
from backbone.io.written import written_path
from backbone.media.sheet import save_png
from backbone.media.sources.decode import (
    DECODER_ERRORS,
    Convert,
    count_frames,
    flatten_on_white,
    is_see_through,
)
from backbone.media.sources.pictures import list_images

ANIMATED = (".webp", ".gif", ".png", ".apng", ".avif")
FILMS = (".mp4", ".webm", ".mov", ".mkv", ".avi", ".m4v")
DEFAULT_FPS = 8.0
STRIP = 8  # frames of a strip, at most
MOST_FRAMES = 10_000
INSTALL = 'pip install "limner[video]"'
STACK = ".npy"


@dataclass(frozen=True, eq=False)
class Film:
    """Frames in order, their rate (`fps`), the name of their source and the hash of its content."""

    frames: tuple[Image.Image, ...]
    fps: float
    name: str = ""
    content: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.frames[0].size


# Reading -----------------------------------------------------------------------------------------------------


def read_film(source: str | Path, *, convert: Convert = flatten_on_white) -> Film:
    """A clip from an animated file, a folder of frames in natural order, a stack of frames in .npy, or a film.

    `convert` turns a stored image into RGB: by default a picture, for maps `lay_on_white`.
    Raises `UserError` for a source that is no clip, has one frame only, or has frames of different sizes.
    """
    path = written_path(source)
    if path.is_dir():
        records = list_images(str(path))
        if records[0].path.parent != path and records[0].row is None:
            raise UserError(
                f"{source} holds no frames itself, but folders of images: {records[0].path.parent.name} … Give one of "
                "these."
            )
        if records[0].row is None:
            files = [record.path for record in records]
            clips = [file for file in files if file.suffix.lower() in ANIMATED and count_frames(file) > 1]
            if clips:
                raise UserError(
                    f"{source} holds clips ({clips[0].name} moves) and no frames. Give one of them."
                )
            _check_frame_numbers(files, path)
        see_through: list[bool] = []

        def convert_and_check(frame: Image.Image) -> Image.Image:
            see_through.append(is_see_through(frame))
            return convert(frame)

        frames = [record.open(convert=convert_and_check) for record in records]
        if any(see_through):
            notify(f"{source}: its transparent parts are white.")
        film = Film(tuple(frames), DEFAULT_FPS, str(source), _hash_frames(frames))
    elif path.suffix.lower() in FILMS:
        film = _read_video(path)
    elif path.suffix.lower() == STACK:
        film = _read_stack(path)
    else:
        film = _read_animation(path, convert)
    if len(film.frames) < 2:
        if path.suffix and path.with_suffix("").is_dir():  # equal frames are one in a WebP
            return replace(read_film(path.with_suffix(""), convert=convert), fps=film.fps, name=str(source))
        raise UserError(
            f"{source} has one frame, and a clip has two or more. Give a clip, or edit it as a picture."
        )
    sizes = {frame.size for frame in film.frames}
    if len(sizes) > 1:
        number = next(i for i, frame in enumerate(film.frames) if frame.size != film.size)
        first, second = (f"{width} × {height}" for width, height in (film.size, film.frames[number].size))
        raise UserError(
            f"The frames of {source} differ in size: frame 0 has {first} pixels and frame {number} {second}. Make "
            "them alike."
        )
    return film


def _check_frame_numbers(files: Sequence[Path], folder: Path) -> None:
    """Say which numbers are missing among the frames of a folder; `UserError` if two files are one frame.

    Every second or third frame of a clip is a clip.
    """
    names = [re.fullmatch(r"(.*?)(\d*)", file.stem) for file in files]
    keys = [(match[1], int(match[2][-18:] or -1)) for match in names if match]
    for (key, file), (next_key, next_file) in pairwise(zip(keys, files, strict=True)):
        if key == next_key:
            raise UserError(f"{file} and {next_file.name} are one frame by their names. Keep one of them.")
    numbers = [number for _, number in keys]
    if len({prefix for prefix, _ in keys}) > 1 or -1 in numbers:
        return
    step = min((following - number for number, following in pairwise(numbers)), default=1)
    missing = [
        str(skipped)
        for number, following in pairwise(numbers)
        for skipped in range(number + step, min(following, number + MOST_FRAMES), step)
    ]
    if missing:
        notify(
            f"{folder} has no frame {', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}: the frames beside a "
            "gap follow one another."
        )


def _read_animation(path: Path, convert: Convert) -> Film:
    if not path.is_file():
        raise UserError(f"There is no clip {path}. Check the spelling, and the folder that it is named from.")
    try:
        with Image.open(path) as opened:
            if getattr(opened, "n_frames", 1) > MOST_FRAMES:
                raise UserError(
                    f"{path} has {getattr(opened, 'n_frames', 1)} frames; {MOST_FRAMES} are the most. Cut it."
                )
            frames, durations, see_through = [], [], False
            for frame in ImageSequence.Iterator(opened):
                see_through |= is_see_through(frame)
                frames.append(convert(frame))
                durations.append(float(frame.info.get("duration") or 1000 / DEFAULT_FPS))
    except DECODER_ERRORS as error:
        kind = "a film of an unknown kind" if path.suffix.lower() not in ANIMATED else "damaged"
        raise UserError(
            f"{path} cannot be read as a clip ({kind}: {str(error)[:80]}). Take an animated WebP or GIF, or a folder "
            "of frames."
        ) from error
    if see_through:
        notify(f"{path}: its transparent parts are white.")
    return Film(*_even_out(tuple(frames), durations, path), str(path), content_hash(path))


def _even_out(
    frames: tuple[Image.Image, ...], durations: Sequence[float], path: Path, unit: float = 0.0
) -> tuple[tuple[Image.Image, ...], float]:
    """Frames of equal duration, and their rate: longer ones are repeated, and a line is printed.

    durations  of each frame, in ms
    unit       the common duration, in ms; 0: the shortest one
    """
    shortest = unit or min(durations)
    repeats = [max(1, round(duration / shortest)) for duration in durations]
    if max(repeats) > 1:
        total = sum(repeats)
        if total > MOST_FRAMES:
            raise UserError(
                f"{path} has frames that last {shortest:g} and {max(durations):g} ms. Make them last alike."
            )
        notify(
            f"{path}: its {len(frames)} frames have unequal durations, so it is read as {total} frames of {shortest:g} "
            "ms each."
        )
        frames = tuple(frame for frame, count in zip(frames, repeats, strict=True) for _ in range(count))
    return frames, round(1000 / shortest, 3)


def _read_stack(path: Path) -> Film:
    """Frames [F, H, W, 3] or [F, H, W], whole numbers of 0 to 255, as numpy.save writes them."""
    if not path.is_file():
        raise UserError(f"There is no clip {path}. Check the spelling, and the folder that it is named from.")
    try:
        with path.open("rb") as file:
            frames = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{path} cannot be read as an array ({str(error)[:80]}). Write it with numpy.save."
        ) from error
    shape: tuple[int, ...] = tuple(getattr(frames, "shape", ()))
    if getattr(frames, "dtype", None) != np.uint8 or not (
        len(shape) == 3 or (len(shape) == 4 and shape[3] == 3)
    ):
        description = f"{getattr(frames, 'dtype', 'something')} {list(shape)}"
        raise UserError(
            f"{path} holds {description}, and a clip is uint8 [frames, height, width, 3], or without the 3 of grey "
            "ones."
        )
    if len(frames) > MOST_FRAMES or 0 in shape:
        raise UserError(
            f"{path} has {len(frames)} frames of {shape[2]} × {shape[1]} pixels. Give 2 to {MOST_FRAMES}."
        )
    images = tuple(Image.fromarray(frame).convert("RGB") for frame in frames)
    return Film(images, DEFAULT_FPS, str(path), content_hash(path))


def _read_video(path: Path) -> Film:
    if not path.is_file():
        raise UserError(f"There is no film {path}. Check the spelling, and the folder that it is named from.")
    av = import_av(f"{path} is a film, which")
    try:
        with av.open(str(path)) as container:
            # a film's cover is a stream of one frame
            stream = max(container.streams.video, key=lambda video: video.frames, default=None)
            if stream is None:
                raise UserError(f"{path} holds sound and no pictures. Give a film.")
            fps, aspect = float(stream.average_rate or DEFAULT_FPS), float(stream.sample_aspect_ratio or 1)
            frames: list[Image.Image] = []
            starts: list[float] = []
            for frame in container.decode(stream):
                if len(frames) == MOST_FRAMES:
                    raise UserError(f"{path} has more than {MOST_FRAMES} frames, which are the most. Cut it.")
                frames.append(
                    _turn_upright(frame.to_image().convert("RGB"), aspect, getattr(frame, "rotation", 0))
                )
                starts.append(len(starts) / fps if frame.time is None else float(frame.time))
            header_lengths = float(container.duration or 0) / av.time_base, stream.frames
    except (av.FFmpegError, OSError) as error:
        reason = (error.strerror or str(error)).lower() if path.stat().st_size else "it is empty"
        raise UserError(
            f"{path} cannot be read as a film ({reason[:80]}). Copy it again, or convert it to .mp4 or frames."
        ) from error
    if not frames:
        raise UserError(f"{path} holds no frames. Copy it again.")
    durations = [1000 * (end - start) for start, end in pairwise(starts)]
    typical = median_low(durations) if durations else 0.0
    _say_if_cut(path, *header_lengths, len(frames), starts[-1] - starts[0] + typical / 1000)
    if typical > 0 and max(durations) >= 1.5 * typical:  # of a phone, or a recorded screen
        return Film(
            *_even_out(tuple(frames), [*durations, typical], path, typical), str(path), content_hash(path)
        )
    return Film(tuple(frames), fps, str(path), content_hash(path))


def _say_if_cut(path: Path, duration: float, promised: int, count: int, end: float) -> None:
    """Say that a film's header promises more than the file holds: a download that ended early, or a cut film.

    duration, promised  seconds and frames by the header
    count, end          frames and seconds that were read
    """
    if promised > count:
        notify(f"{path} declares {promised} frames and holds {count}: it may be truncated.")
    elif duration - end > max(0.5, 0.1 * duration):
        notify(f"{path} declares {duration:.1f} s and its frames end at {end:.1f} s: it may be truncated.")


def _turn_upright(frame: Image.Image, aspect: float, rotation: int) -> Image.Image:
    """A film's frame as players show it: its pixels are `aspect` times as wide as high, its `rotation` in degrees.

    Phones store films in the sensor's orientation, and note the rotation.
    """
    if aspect != 1:
        frame = frame.resize((max(1, round(frame.width * aspect)), frame.height), Image.Resampling.LANCZOS)
    turns = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}
    turn = turns.get(rotation % 360)
    return frame if turn is None else frame.transpose(turn)


def import_av(subject: str) -> Any:
    """PyAV; `UserError` with this subject if it is not installed."""
    if find_spec("av") is None:
        raise UserError(f"{subject} needs the package av, which is not installed. Run: {INSTALL}")
    return import_module("av")


def _hash_frames(frames: Sequence[Image.Image]) -> str:
    return content_hash("".join(content_hash(frame.tobytes()) for frame in frames).encode())


# Writing -----------------------------------------------------------------------------------------------------


def encode_webp(frames: Sequence[Image.Image], fps: float) -> bytes:
    """Encode frames as a lossless animated WebP that loops."""
    buffer = io.BytesIO()
    options: dict[str, Any] = {"lossless": True, "quality": 60, "method": 2, "minimize_size": False}
    frames[0].save(
        buffer,
        "WEBP",
        save_all=True,
        append_images=list(frames[1:]),
        duration=max(1, round(1000 / fps)),
        loop=0,
        **options,
    )
    return buffer.getvalue()


def write_film(base: Path, frames: Sequence[Image.Image], fps: float, *, mp4: bool = False) -> None:
    """Write `base`.webp, its frames as `base`/0000.png …, and on request `base`.mp4."""
    write_bytes(base.with_suffix(".webp"), encode_webp(frames, fps))
    for number, frame in enumerate(frames):
        save_png(base / f"{number:04d}.png", frame)
    if mp4:
        write_bytes(base.with_suffix(".mp4"), encode_mp4(frames, fps))


def encode_mp4(frames: Sequence[Image.Image], fps: float) -> bytes:
    """Encode frames as H.264 in MP4; `UserError` if PyAV is not installed."""
    from fractions import Fraction

    av, buffer = import_av("An .mp4"), io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height = (side // 2 * 2 for side in frames[0].size)
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "16"}
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_image(frame)):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return buffer.getvalue()


def choose_strip(frames: Sequence[Image.Image]) -> dict[int, Image.Image]:
    """At most STRIP frames by their numbers, evenly spaced, with the first and the last."""
    count = min(STRIP, len(frames))
    numbers = sorted({round(i * (len(frames) - 1) / max(1, count - 1)) for i in range(count)})
    return {number: frames[number] for number in numbers}
