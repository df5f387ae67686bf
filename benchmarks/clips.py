"""Whether clips do what their words say: direction, stillness, flicker, and what a judge names in every frame.

    python -m benchmarks.clips --motion moji-motion --clips 300        an hour on two cores

Clips of the world's benchmark seeds are drawn from their captions and measured beside two others: the floor, where the
adapter is left out and every frame is a picture by itself, and the bound, the true clip through the autoencoder (which
needs the emoji font). What moves is measured from the pixels alone, by a similarity fitted to each pair of frames
(Lucas & Kanade 1981): of the whole frame, weighted by what changes, for things, of its border for the camera. A
direction is right where its part is the word's, and by more than the least that counts. Writes `table.md` and
`table.json`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image

from backbone.adapters.motion import Moves, set_in_motion
from backbone.evaluation.motion import DRIFT, PARTS, is_right, measure_moved
from backbone.evaluation.statistics import bootstrap_mean, wilson_interval
from backbone.io.console import progress, run_app
from backbone.io.files import write_json, write_text
from backbone.media.transforms import to_image
from backbone.models.model import Backbone
from backbone.models.sample import Frames, Request, sample_latents
from backbone.world.clip import Clip, render_clip
from backbone.world.motions import CAMERAS, MOTIONS
from backbone.world.scene import BENCHMARK_SEEDS, Scene, is_fair, sample_scene
from benchmarks.judges.classifier import Classifier, load_classifier


@dataclass(frozen=True)
class Row:
    """What is measured of a clip."""

    move: str
    right: bool | None  # None where no word names a direction
    still: bool | None  # None where something is to move
    flicker: float
    nouns: float
    places: float


# Measuring ---------------------------------------------------------------------------------------------------


def measure(clip: Clip, frames: Sequence[Image.Image], judge: Classifier) -> Row:
    """Everything of one clip."""
    said = clip.camera or clip.move
    moved = measure_moved(frames, camera=bool(clip.camera))
    pixels = np.stack([np.asarray(frame, dtype=np.float32) for frame in frames])
    seen = judge.classify(list(frames))
    glyph = clip.scene.things[0].noun
    return Row(
        move=said,
        right=is_right(said, moved) if said in PARTS else None,
        still=None if said else bool(np.hypot(moved.x, moved.y) < DRIFT * len(frames)),
        flicker=float(np.abs(np.diff(pixels, axis=0)).mean()),
        nouns=float(np.mean([one.glyph == glyph for one in seen])),
        places=float(np.mean([next(iter(one.place)) == clip.scene.place for one in seen])),
    )


# Clips -------------------------------------------------------------------------------------------------------


def select_clips(count: int, frames: int) -> list[Clip]:
    """So many clips of the benchmark's seeds, of one thing each: every directed word as often, every sixth still."""
    words = [*(move for move in MOTIONS if move in PARTS), *CAMERAS]
    found: list[Clip] = []
    for seed in BENCHMARK_SEEDS:
        if len(found) == count:
            return found
        scene: Scene = sample_scene(seed)
        if len(scene.things) > 1 or scene.pair or scene.style or not is_fair(scene):
            continue
        word = "" if len(found) % 6 == 5 else words[(len(found) - len(found) // 6) % len(words)]
        found.append(
            Clip(scene, word if word in MOTIONS else "", word if word in CAMERAS else "", frames=frames)
        )
    return found


def main(
    model: Annotated[str, typer.Option(help="The picture model.")] = "moji",
    motion: Annotated[str, typer.Option(help="The motion adapter; none: the floor and the bound.")] = "",
    clips: Annotated[int, typer.Option(help="How many clips.")] = 300,
    frames: Annotated[int, typer.Option(help="Frames of each.")] = 16,
    steps: Annotated[int, typer.Option(help="Steps of the sampler.")] = 25,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance.")] = 4.0,
    out: Annotated[Path, typer.Option(help="Where the results go.")] = Path("build/benchmarks/clips"),
) -> None:
    """Draws, measures and writes the table."""
    chosen, judge = select_clips(clips, frames), load_classifier()
    floor = Backbone.open(model, device="cpu")
    ways: dict[str, Callable[[int, Clip], list[Image.Image]]] = {
        "true clips, decoded": lambda _, clip: through_autoencoder(floor, clip),
        "without an adapter": lambda i, clip: draw(floor, i, clip, steps, guidance),
    }
    if motion:
        moving = Backbone.open(model, device="cpu")
        set_in_motion(moving, Moves(motion))
        ways[motion] = lambda i, clip: draw(moving, i, clip, steps, guidance)
    rows: dict[str, list[Row]] = defaultdict(list)
    with progress(len(chosen) * len(ways), "measuring clips") as bar:
        for number, clip in enumerate(chosen):
            for name, way in ways.items():
                rows[name].append(measure(clip, way(number, clip), judge))
                bar.advance()
    write_text(out / "table.md", table_of(rows))
    write_json(out / "table.json", {name: [row.__dict__ for row in found] for name, found in rows.items()})
    typer.echo((out / "table.md").read_text())


def through_autoencoder(model: Backbone, clip: Clip) -> list[Image.Image]:
    """The bound: what the autoencoder makes of the true clip."""
    frames = np.stack([np.asarray(frame) for frame in render_clip(clip).frames])
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
    return [to_image(frame) for frame in model.decode_clip(model.encode_clip(pixels)).cpu()]


def draw(model: Backbone, number: int, clip: Clip, steps: int, guidance: float) -> list[Image.Image]:
    """A clip drawn from its caption."""
    request = [Request(clip.caption(), (number, 0))]
    (latents,) = sample_latents(
        model, request, steps=steps, guidance=guidance, seed=0, frames=Frames(clip.frames)
    )
    return [to_image(frame) for frame in model.decode_clip(latents[0]).cpu()]


def table_of(rows: Mapping[str, Sequence[Row]]) -> str:
    """Shares with 95 % intervals, in per cent; flicker is the mean change of a pixel from frame to frame, of 255."""
    lines = [
        "| clips | things' direction | camera's direction | stillness | noun | place | flicker |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in rows.items():
        things = [row.right for row in found if row.right is not None and row.move in MOTIONS]
        camera = [row.right for row in found if row.right is not None and row.move in CAMERAS]
        still = [row.still for row in found if row.still is not None]
        means = [
            bootstrap_mean([getattr(row, key) for row in found]) for key in ("nouns", "places", "flicker")
        ]
        cells = [_share(flags) for flags in (things, camera, still)]
        cells += [f"{100 * one.value:.1f} ({100 * one.low:.1f}–{100 * one.high:.1f})" for one in means[:2]]
        lines.append(f"| {name} | {' | '.join(cells)} | {means[2].value:.2f} |")
    return "\n".join(lines) + "\n"


def _share(flags: Sequence[bool]) -> str:
    if not flags:
        return "–"
    found = wilson_interval(sum(flags), len(flags))
    return f"{100 * found.value:.1f} ({100 * found.low:.1f}–{100 * found.high:.1f}) of {len(flags)}"


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(main)
    run_app(app)
