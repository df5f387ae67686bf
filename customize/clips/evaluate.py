"""`customize evaluate-clip`: metrics of clips from their pixels, and whether they show what their prompts say.

Clips are those of a folder, or are sampled by a run of train-motion or by a motion adapter. Every metric has an
interval over the clips; undefined metrics are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from backbone.adapters.concept import Concept, read_concept
from backbone.cli.values.repeat import as_command
from backbone.evaluation.clip import Scorer, VisionEncoder, load_image_encoder, text_scores
from backbone.evaluation.flow import warped_flicker
from backbone.evaluation.image_metrics import psnr
from backbone.evaluation.motion import (
    DRIFT,
    PARTS,
    SIDE,
    Movement,
    corner_error,
    draw_track,
    matches_move,
    measure_movement,
    trace_movement,
    track_correlation,
)
from backbone.evaluation.statistics import Interval, bootstrap_mean, wilson_interval
from backbone.io.console import UserError
from backbone.io.files import PICKLE_SUFFIXES, read_json, write_json
from backbone.io.progress import progress
from backbone.io.records import resolve_inside
from backbone.io.report import command_block, heading, image_figure, paragraph, table, write_report
from backbone.io.run_folder import CONCEPT_FILE, fill_new_folder
from backbone.media.clips import ANIMATED, FILMS, Film, choose_strip, encode_webp, read_film
from backbone.media.control.camera import CameraPath, read_camera, trace_corners
from backbone.media.sheet import Cell, draw_sheet, save_png
from backbone.media.sources.decode import open_named
from backbone.media.transforms import crop_and_resize, to_tensor
from backbone.models.model import Backbone
from backbone.world.motions import CAMERAS, find_moves
from backbone.world.words import choose_article, load_vocabulary
from customize.clips.draw import PATH_FILE, RECORD, draw_clips
from customize.clips.films import list_films
from customize.clips.settings import ADAPTER_FILE, ClipOptions, EvaluateClipOptions, refuse_other_camera

TABLE, EVALUATION = "table.json", "evaluation"
DIRECTED = ("moving left", "moving right", "moving up", "growing", "camera panning left", "camera zooming in")
WEIGHTS = (".safetensors", *PICKLE_SUFFIXES)
NOUNS = ("dog", "cat", "car")
SHARES = {  # of clips, or of their frames, by what they are called
    "direction": "direction right",
    "stillness": "still without words of motion",
    "nouns": "noun named, of frames",
    "alike": "noun named in all frames",
    "colours": "colour named, of frames",
    "places": "place named, of frames",
}
MEANS = {
    "flicker": "flicker, of 255",
    "along": "flicker along the flow, of 255",
    "jitter": "jitter, of 255",
    "identity": "similarity to the first frame",
    "words": "similarity to the words",
    "track": "correlation with the learned track",
    "first_frame_db": "first frame, dB",
    "corners": "corners off the camera's path, px",
}


@dataclass(frozen=True, eq=False)
class ExpectedClip:
    """A clip and what it should show.

    words    its prompt, "" without one
    picture  its expected first frame
    camera   the path that the camera should follow, as given
    path     the same, read, if its file still exists
    """

    film: Film
    words: str = ""
    picture: Image.Image | None = None
    camera: str = ""
    path: CameraPath | None = None


@dataclass(frozen=True)
class ClipMetrics:
    """The metrics of a clip; None if a metric is undefined.

    moved           pixels, log of the growth, degrees; scaled to pictures of 128 pixels a side
    direction       whether it agrees with the prompt's word of motion
    stillness       whether it stands still, if the prompt has no word of motion
    flicker         mean change of a pixel from frame to frame
    along           the same along the flow, so that motion does not count
    jitter          the same for the change itself, so that even motion hardly counts
    identity        cosine of the frames' vectors with the first one's
    words           cosine of the frames' vectors with the words'
    nouns, places   share of the frames in which the scorer names them; so are colours
    alike           whether it names the noun in all of them
    track           correlation with what was to be learned
    first_frame_db  PSNR of the first frame to the picture
    corners         how far the camera is from its path, where the first frame's corners are
    """

    file: str
    prompt: str
    moved: Movement
    flicker: float
    along: float
    jitter: float
    direction: bool | None = None
    stillness: bool | None = None
    identity: float | None = None
    words: float | None = None
    nouns: float | None = None
    places: float | None = None
    track: float | None = None
    first_frame_db: float | None = None
    corners: float | None = None
    alike: bool | None = None
    colours: float | None = None


@dataclass(frozen=True)
class ClipRecord:
    """A clip in the record of customize clip."""

    file: str
    prompt: str = ""


@dataclass(frozen=True)
class ClipsRecord:
    """The part of that record that is read: the clips, and their camera's path."""

    clips: list[ClipRecord] = field(default_factory=list)
    camera: str = ""


# Measuring ---------------------------------------------------------------------------------------------------


def evaluate_clip(options: EvaluateClipOptions) -> Path:
    """Measure clips, and write `table.json`, `sheet.png` and `report.html`; the folder.

    Raises `UserError` for a place that holds no clips and cannot draw any.
    """
    path = Path(options.what).expanduser()
    if not path.exists() and path.suffix.lower() in (*ANIMATED, *FILMS):
        read_film(path)  # says that there is none
    run = (path / ADAPTER_FILE).is_file()
    parent = path.parent if path.exists() else Path()
    name = path.stem if path.is_file() else path.name
    default = path / EVALUATION if run else parent / f"{name}-{EVALUATION}"  # no clip among the clips
    encoder = load_encoder(options)
    drawing = plan_drawing(path, options)
    with fill_new_folder(options.out, default) as (folder, unfinished):
        expected_clips = gather(path if drawing is None else drawing(unfinished / "clips"), options)
        learned = read_learned_tracks(path)
        scores = ScoredWords(encoder)
        rows = []
        with progress(len(expected_clips), "measuring clips") as bar:
            for clip in expected_clips:
                rows.append(measure(clip, scores, learned))
                bar.advance()
        publish(unfinished, expected_clips, rows, options)
    return folder


def measure(clip: ExpectedClip, scores: ScoredWords, learned: Sequence[Any] = ()) -> ClipMetrics:
    """All metrics of one clip."""
    film, words = clip.film, clip.words
    frames = [frame.resize((SIDE, SIDE), Image.Resampling.LANCZOS) for frame in film.frames]
    move, camera = find_moves(words)
    if clip.camera:  # of several words in a path none is the whole
        camera_words = [word for word in CAMERAS if word in clip.camera.lower()]
        move, camera = "", camera_words[0] if len(camera_words) == 1 else ""
    named_move = camera or move
    movement = measure_movement(frames, camera=bool(camera or clip.camera))
    pixels = np.stack([np.asarray(frame, dtype=np.float32) for frame in film.frames])
    changes = np.diff(pixels, axis=0)
    row = ClipMetrics(
        Path(film.name).name,
        words,
        movement,
        flicker=float(np.abs(changes).mean()),
        along=warped_flicker(frames),
        jitter=float(np.abs(np.diff(changes, axis=0)).mean()) if len(changes) > 1 else 0.0,
        direction=matches_move(named_move, movement) if named_move in PARTS else None,
        stillness=bool(np.hypot(movement.x, movement.y) < DRIFT * len(frames))
        if words and not named_move and not clip.camera
        else None,
        track=max(
            (track_correlation(trace_movement(frames), track, SIDE) for track in learned), default=None
        ),
    )
    if clip.picture is not None:
        picture = to_tensor(crop_and_resize(clip.picture, film.size))
        row = replace(row, first_frame_db=psnr(to_tensor(film.frames[0]), picture))
    if clip.path is not None:
        row = replace(row, corners=corner_error(frames, trace_corners(clip.path)))
    return replace(row, **scores.measure(film.frames, words))


class ScoredWords:
    """A scorer's metrics of frames; none without a scorer. Words are embedded once."""

    def __init__(self, encoder: Scorer | VisionEncoder | None) -> None:
        self.encoder = encoder
        self.known: dict[tuple[str, ...], Tensor] = {}

    def embed_words(self, words: Sequence[str]) -> Tensor:
        """Unit vectors [N, D] of words."""
        assert isinstance(self.encoder, Scorer)
        key = tuple(words)
        if key not in self.known:
            self.known[key] = self.encoder.embed_texts(key)
        return self.known[key]

    def measure(self, frames: Sequence[Image.Image], words: str) -> dict[str, Any]:
        """Likeness to the first frame and to the words, and how often noun and place of moji's world are named."""
        if self.encoder is None:
            return {}
        vectors = self.encoder.embed_images(list(frames))
        figures = {"identity": float((vectors[1:] @ vectors[0]).mean())}
        if not words or not isinstance(self.encoder, Scorer):
            return figures
        text = self.embed_words([words]).expand_as(vectors)
        figures["words"] = float(text_scores(vectors, text).mean())
        vocabulary = load_vocabulary()
        padded = f" {words.lower().replace(',', ' ')} "
        noun, place = (
            max((word for word in phrases_known if f" {word} " in padded), key=len, default="")
            for phrases_known in (vocabulary.nouns, vocabulary.places)
        )
        if noun:
            nouns = [
                f"{choose_article(candidate)} {candidate} {place}".strip() for candidate in vocabulary.nouns
            ]
            figures["nouns"] = self.measure_share(vectors, nouns, list(vocabulary.nouns).index(noun))
            figures["alike"] = figures["nouns"] == 1
            template = f"{choose_article(noun)} {{}} {noun} {place}".strip()
            colour = next((word for word in vocabulary.colours if f" {word} {noun} " in padded), "")
            if colour:
                phrases = [template.format(word) for word in vocabulary.colours]
                figures["colours"] = self.measure_share(
                    vectors, phrases, list(vocabulary.colours).index(colour)
                )
        if noun and place:
            places = [f"{choose_article(noun)} {noun} {candidate}" for candidate in vocabulary.places]
            figures["places"] = self.measure_share(vectors, places, vocabulary.places.index(place))
        return figures

    def measure_share(self, vectors: Tensor, phrases: Sequence[str], right: int) -> float:
        """The share of vectors [F, D] that are nearest to the right one of these words."""
        best = (vectors @ self.embed_words(phrases).T).argmax(1)
        return float((best == right).float().mean())


# Sources of clips --------------------------------------------------------------------------------------------


def gather(folder: Path, options: EvaluateClipOptions) -> list[ExpectedClip]:
    """The clips of a folder with their words: of customize clip by its record, of others by the texts beside them."""
    picture = None if options.image is None else open_named(options.image)
    record = folder / RECORD
    clips_record = read_json(record, ClipsRecord) if record.is_file() else ClipsRecord()
    if folder.is_file():
        films = [(read_film(folder), options.caption)]
    elif clips_record.clips:
        films = [
            (read_film(resolve_inside(folder, clip.file, record)), clip.prompt) for clip in clips_record.clips
        ]
    else:
        films = [(clip.film, clip.caption or options.caption) for clip in list_films(str(folder))]
    lines = folder / PATH_FILE
    camera = options.camera or clips_record.camera
    path_source = options.camera or (str(lines) if clips_record.camera and lines.is_file() else "")

    def read_path(film: Film) -> CameraPath | None:
        return read_camera(path_source, len(film.frames), film.size) if path_source else None

    return [ExpectedClip(film, words, picture, camera, read_path(film)) for film, words in films]


def plan_drawing(path: Path, options: EvaluateClipOptions) -> Callable[[Path], Path] | None:
    """A function that draws clips into a folder by a run of train-motion or a motion adapter; None for existing clips.

    Raises `UserError` for what is neither, and for options that would have no effect.
    """
    run = (path / ADAPTER_FILE).is_file() and (path / CONCEPT_FILE).is_file()
    adapter = (path / "config.json").is_file() or path.suffix in WEIGHTS or not path.exists()
    if not run and not adapter:
        for flag, value in (
            ("--prompts", options.prompts),
            ("--model", options.model),
            ("--steps", options.steps),
        ):
            if value:
                raise UserError(f"{path} holds clips, and {flag} is for clips that are drawn. Leave it out.")
        return None
    if options.caption:
        raise UserError(
            "--caption says what clips without one show. For clips that are drawn, give --prompts."
        )
    concepts: list[Concept] = [read_concept(path)] if run else []
    for prompt in options.prompts if options.camera else ():
        refuse_other_camera(prompt, options.camera)
    if options.prompts:
        prompts = list(options.prompts)
    elif run or options.camera:
        tail = f", {next(iter(concepts[0].tokens))}" if run else ""
        prompts = [f"{choose_article(noun)} {noun} in a park{tail}" for noun in NOUNS]
    else:
        tails = ["", *(f", {words}" for words in DIRECTED)]
        prompts = [
            f"{choose_article(noun)} {noun} in a park{tail}"
            for noun, tail in zip(cycle(NOUNS), tails, strict=False)
        ]
    motion = str(read_json(path / ADAPTER_FILE).get("adapter", "")) if run else options.what
    settings = ClipOptions(
        model=options.model, motion=motion, frames=options.frames, count=options.count, steps=options.steps,
        guidance=options.guidance, seed=options.seed, device=options.device, precision=options.precision,
        camera=options.camera,
    )  # fmt: skip
    return lambda folder: draw_clips(prompts, replace(settings, out=folder), concepts=concepts)


def read_learned_tracks(path: Path) -> list[Any]:
    """The tracks of a train-motion run's training clips, if these still exist."""
    if not (path / ADAPTER_FILE).is_file():
        return []
    clips = read_json(path / "settings.json").get("settings", {}).get("clips", "")
    if not isinstance(clips, str) or not Path(clips).expanduser().is_dir():
        return []
    size = (SIDE, SIDE)
    return [
        trace_movement([frame.resize(size) for frame in captioned.film.frames])
        for captioned in list_films(clips)
    ]


def load_encoder(options: EvaluateClipOptions) -> Scorer | VisionEncoder | None:
    """The named scorer, or the model's own; None if it has none."""
    if options.scorer is not None:
        return load_image_encoder(options.scorer)
    default = Backbone.open(options.model or "moji", device="cpu").location.local("scorer")
    return None if default is None else load_image_encoder(default)


# Output ------------------------------------------------------------------------------------------------------


def summarize(rows: Sequence[ClipMetrics]) -> dict[str, Interval]:
    """Each metric over the clips for which it is defined: Wilson intervals for shares, bootstrap for means."""
    intervals = {}
    for name in (*SHARES, *MEANS):
        values = [value for row in rows if (value := getattr(row, name)) is not None]
        if not values:
            continue
        is_share = all(isinstance(value, bool) for value in values)
        intervals[name] = wilson_interval(sum(values), len(values)) if is_share else bootstrap_mean(values)
    return intervals


def describe(figures: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """Rows of the table: a metric's name, its value with the interval, the number of clips."""
    lines = []
    for name, figure in figures.items():
        scale, unit = (100, " %") if name in SHARES else (1, "")
        value, low, high = (f"{scale * figure[key]:.3g}" for key in ("value", "low", "high"))
        lines.append(({**SHARES, **MEANS}[name], f"{value}{unit} ({low}–{high})", figure["clips"]))
    return lines


def publish(
    folder: Path,
    expected_clips: Sequence[ExpectedClip],
    rows: Sequence[ClipMetrics],
    options: EvaluateClipOptions,
) -> None:
    """Write the table, a sheet of strips, and a report in which the clips play."""
    # The table, with the command that makes it again
    command = as_command("customize evaluate-clip", replace(options, out=None, as_json=False))
    figures = {
        name: {**interval._asdict(), "clips": sum(getattr(row, name) is not None for row in rows)}
        for name, interval in summarize(rows).items()
    }
    clips = [{**asdict(row), "moved": row.moved._asdict()} for row in rows]
    write_json(folder / TABLE, {"command": command, "figures": figures, "clips": clips})

    # A strip of frames of each clip, with the track of what moves
    titles = [clip.words or Path(clip.film.name).name for clip in expected_clips]
    strips = [
        [
            *(Cell(frame, f"frame {i}") for i, frame in choose_strip(clip.film.frames).items()),
            Cell(draw_track(clip.film.frames), "track"),
        ]
        for clip in expected_clips
    ]
    page = draw_sheet(strips, row_titles=titles, cell=128)
    save_png(folder / "sheet.png", page)

    # The report: figures, the clips as they play, and each clip's numbers
    parts = [table(("", "95 % interval", "clips"), describe(figures)), heading("Clips")]
    with TemporaryDirectory() as temporary:
        for clip, title in zip(expected_clips, titles, strict=True):
            playing = Path(temporary) / "playing.webp"
            playing.write_bytes(encode_webp(clip.film.frames, clip.film.fps))
            parts.append(image_figure(playing, title))
    columns = ("clip", "x px", "y px", "growth", "turn °", *({**SHARES, **MEANS}[name] for name in figures))
    lines = []
    for row, title in zip(rows, titles, strict=True):
        values = [getattr(row, name) for name in figures]
        movement = (row.moved.x, row.moved.y, float(np.exp(row.moved.growth)), row.moved.turn)
        lines.append((title, *movement, *("–" if value is None else value for value in values)))
    parts += [heading("Frames"), image_figure(page, "strips"), heading("Clip by clip"), table(columns, lines)]
    parts += [
        paragraph(f"Pixels are of pictures of {SIDE} a side."),
        heading("Again"),
        command_block(command),
    ]
    write_report(folder / "report.html", f"Clips: {options.what}", parts)
