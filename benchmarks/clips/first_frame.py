"""How well edits of clips, by words or from an edited first frame, match true edits.

    python -m benchmarks.clips.first_frame --clips 10        half an hour on two cores (needs the emoji font)
    python -m benchmarks.clips.first_frame --clips 10 --motion moji-motion

Clips of the world in which one thing moves are edited to the same clip of another thing or colour, whose every frame is
known. The first frame of that is given; compared are the frames behind it: as they were (the source), edited by words
alone, carried from the first frame, without other words and with them, at several strengths, and that frame whose thing
moves along the source's track (`customize clip --image --track`), beside the bound, the true clip through the
autoencoder. PSNR is that of the place where either thing is, and of the rest; the noun is what
the judge of the benchmarks names, of the frames; how many pixels the track is off from the true edit's, both measured
alike; flicker is what is left of it along the flow. Writes `table.md`, `table.json`, and strips.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from PIL import Image
from torch import Tensor

from backbone.adapters.motion import Moves, set_in_motion
from backbone.cli.commands import run_main
from backbone.evaluation.flow import warped_flicker
from backbone.evaluation.motion import SIDE, trace_movement, track_error
from backbone.evaluation.statistics import bootstrap_mean
from backbone.io.console import UserError
from backbone.io.files import write_json, write_text
from backbone.io.progress import progress
from backbone.media.clips import Film
from backbone.media.transforms import to_image, to_tensor
from backbone.models.model import Backbone
from backbone.world.clip import Clip, render_clip
from backbone.world.edits import sample_edit
from backbone.world.motions import MOTIONS, cut_motion
from backbone.world.scene import BENCHMARK_SEEDS
from benchmarks.judges.classifier import Classifier, load_classifier
from customize.clips.planned.in_picture import find_named
from customize.clips.planned.plan import Shot, plan_in_picture
from customize.clips.planned.track import measure_track
from edit.inversion.inversion import Inversion
from edit.methods.clip import ClipEdit, edit_clip, invert_film
from edit.methods.first_frame import propagate_first_frame, read_first_frame
from edit.pictures import read_image

ALONG = "first frame, moved along the track"
STRENGTHS = (0.6, 0.8)
KINDS = ("noun", "colour")


@dataclass(frozen=True, eq=False)
class Case:
    """A clip and its true edit, frames in −1…1 [F, 3, H, W], and where either's thing is [F, 1, H, W]."""

    source: Clip
    target: Clip
    before: Tensor
    after: Tensor
    place: Tensor


def sample_cases(count: int, frames: int) -> Iterator[Case]:
    """Yield this many clips of one thing that moves, with a true edit of it."""
    moves = [move for move in MOTIONS if move in ("left", "right", "up", "down", "grow", "shrink")]
    sampled = 0
    for seed in BENCHMARK_SEEDS:
        edit = sample_edit(seed)
        if edit is None or edit.kind not in KINDS or len(edit.before.figures) != 1:
            continue
        clips = [
            Clip(scene, moves[sampled % len(moves)], frames=frames) for scene in (edit.before, edit.after)
        ]
        rendered = [render_clip(clip) for clip in clips]
        pixels = [torch.stack([to_tensor(frame) for frame in rendering.frames]) for rendering in rendered]
        masks = [
            torch.stack([torch.from_numpy(np.array(masks[0])) for masks in rendering.masks])
            for rendering in rendered
        ]
        place = ((masks[0] > 0) | (masks[1] > 0))[:, None]
        yield Case(clips[0], clips[1], pixels[0], pixels[1], place)
        sampled += 1
        if sampled == count:
            return


def measure_psnr_in(first: Tensor, second: Tensor, region: Tensor) -> float:
    """PSNR in dB of frames in −1…1 [F, 3, H, W], over the pixels where `region` [F, 1, H, W] is true."""
    error = ((first - second) / 2).square().mean(1, keepdim=True)[region].mean()
    return float(-10 * error.clamp(min=1e-10).log10())


def iterate_edits(inversion: Inversion, case: Case) -> Iterator[tuple[str, Tensor]]:
    """Yield each way's name and its frames."""
    words = case.target.caption()
    yield "words", edit_clip(inversion, [words], ClipEdit()).pixels[0]
    first = read_first_frame(inversion, read_image(to_image(case.after[0])))
    for strength in STRENGTHS:
        for name, prompt in (("first frame", inversion.prompt), ("first frame and words", words)):
            result = propagate_first_frame(inversion, first, prompt, ClipEdit(strength=strength))
            yield f"{name}, strength {strength:g}", result.pixels[0]


def move_along(model: Backbone, case: Case) -> Tensor:
    """Frames of the edited first frame, its thing moved along the source's track; still where none is found."""
    picture, count = to_image(case.after[0]), len(case.after)
    shot = Shot(cut_motion(case.target.caption()).prompt)
    track = measure_track([to_image(frame) for frame in case.before])
    try:
        plan = plan_in_picture(shot, count, picture, partial(find_named, model, picture), track=track)
    except UserError:
        return case.after[:1].expand(count, -1, -1, -1)
    return torch.stack([to_tensor(frame) for frame in plan.look_at([])])


class Figures(NamedTuple):
    """Of all frames but the first: dB in the region and around it, share with the noun; of all: pixels, of 255."""

    place: float
    around: float
    noun: float
    track: float
    flicker: float


TITLES = ("the thing, dB", "around it, dB", "noun, %", "track, px off", "flicker")


def measure(
    model: Backbone, case: Case, steps: int, classifier: Classifier
) -> tuple[dict[str, Figures], list[Tensor]]:
    """The figures and all frames of each method."""
    film = Film(tuple(to_image(frame) for frame in case.before), 8.0, "clip", "")
    with torch.no_grad():
        bound = model.decode_clip(model.encode_clip(case.after)).cpu()
    inversion = invert_film(model, film, case.source.caption(), steps=steps)
    figures, strips = {}, [case.after]
    noun, true_track = case.target.scene.things[0].noun, trace_movement(list(map(to_image, case.after)))
    ways = (
        ("source", case.before),
        ("bound", bound),
        *iterate_edits(inversion, case),
        (ALONG, move_along(model, case)),
    )
    for name, frames in ways:
        strips.append(frames)
        edited, truth, region = (value[1:] for value in (frames, case.after, case.place))
        images = [to_image(frame).resize((SIDE, SIDE)) for frame in frames]
        hits = [float(prediction.glyph == noun) for prediction in classifier.classify(images[1:])]
        figures[name] = Figures(
            measure_psnr_in(edited, truth, region),
            measure_psnr_in(edited, truth, ~region),
            100 * float(np.mean(hits)),
            track_error(trace_movement(images), true_track),
            warped_flicker(images),
        )
    return figures, strips


def main(
    model: Annotated[str, typer.Option(help="The picture model.")] = "moji",
    motion: Annotated[
        str, typer.Option(help="The motion adapter; none: frames look at the first and the one before.")
    ] = "",
    clips: Annotated[int, typer.Option(help="Number of clips.")] = 10,
    frames: Annotated[int, typer.Option(help="Frames of a clip.")] = 6,
    steps: Annotated[int, typer.Option(help="Steps of the inversion and of the edit.")] = 25,
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("build/first-frame"),
) -> None:
    """Measure, and write the tables and a strip of each way."""
    opened, classifier = Backbone.open(model, device="cpu", precision="fp32"), load_classifier()
    set_in_motion(opened, Moves(motion))
    rows: list[dict[str, Figures]] = []
    with progress(clips, "editing clips") as bar:
        for case in sample_cases(clips, frames):
            measured, strips = measure(opened, case, steps, classifier)
            write_strips(out / f"{len(rows):03d}.png", strips)
            rows.append(measured)
            bar.advance()
    table = {
        name: {
            part: bootstrap_mean([getattr(row[name], part) for row in rows])._asdict()
            for part in Figures._fields
        }
        for name in rows[0]
    }
    facts = {"clips": len(rows), "frames": frames, "steps": steps, "motion": motion}
    write_json(out / "table.json", {**facts, "rows": table})
    lines = [f"| | {' | '.join(TITLES)} |", "|---" * (len(TITLES) + 1) + "|"]
    for name, figures in table.items():
        cells = [f"{mean['value']:.1f} ({mean['low']:.1f}–{mean['high']:.1f})" for mean in figures.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    write_text(out / "table.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


def write_strips(path: Path, strips: list[Tensor]) -> None:
    """A row of frames for each way, the true edit first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = torch.cat([torch.cat(list(frames), -1) for frames in strips], -2)
    to_image(rows).resize((rows.shape[-1] // 2, rows.shape[-2] // 2), Image.Resampling.BOX).save(path)


if __name__ == "__main__":
    run_main(main)
