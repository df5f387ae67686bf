"""A motion that is planned from a prompt's words, where no motion adapter was trained to hear them.

    plan_motion("a dog in a park, moving left", frames=16)    # "a dog in a park", "left", 16 maps of poses

The path is the one that the words mean in `backbone.world.clip`. A control network that reads poses then places the
thing in every frame, noise that all frames share keeps the rest where it is, and `link_frames` keeps the thing alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from PIL import Image

from backbone.conditions.control import Control
from backbone.io.console import UserError, notify
from backbone.models.control import Condition, condition_clips
from backbone.models.model import Backbone
from backbone.world.clip import Clip, trace_thing
from backbone.world.maps import draw_sticks
from backbone.world.motions import MOTIONS, cut_camera, cut_motion
from backbone.world.parse import parse_scene
from backbone.world.rendering.record import Stick
from backbone.world.rendering.render import Figure, place_figures, span_stick
from backbone.world.scene import Scene
from backbone.world.words import Thing

POSE = "pose"
ANYTHING = Scene((Thing("dog"),), "in a park")  # stands where a thing of moji's world stands
SLENDER = 0.9  # width over height of a thing that nothing is known of


@dataclass(frozen=True, eq=False)
class PlannedClip:
    """What the picture model reads, and where the thing is in each frame; no condition where no words say a motion."""

    prompt: str
    condition: Condition | None = None

    @property
    def controls(self) -> tuple[Control, ...]:
        """What it is drawn under."""
        return () if self.condition is None else (self.condition.control,)


def plan_clip(
    model: Backbone, prompt: str, frames: int, size: tuple[int, int], known: Mapping[str, str]
) -> PlannedClip:
    """The clip of a prompt by a model that has a network for poses; what is planned, and what is not, is said."""
    without_camera, camera = cut_camera(prompt)
    if camera:
        notify(f"“{prompt}”: the camera stands still without a motion adapter (--motion).")
    rest, move, maps = plan_motion(without_camera, frames, known=known)
    if not move:
        if not camera:
            notify(f"“{prompt}” names no motion (“moving left”, “growing” …), so the clip stands still.")
        return PlannedClip(rest)
    notify(f"“{prompt}”: drawn as “{rest}”, {MOTIONS[move][0]} by a pose in each frame.")
    return PlannedClip(rest, condition_clips(model, POSE, maps, size))


def plan_motion(
    prompt: str, frames: int, *, known: Mapping[str, str] | None = None
) -> tuple[str, str, tuple[Image.Image, ...]]:
    """(the prompt without its words of motion, the motion, a map of poses for each frame); "" and no maps without one.

    Maps are 128 × 128. `known` says what stands for words that moji's world does not have, as for a concept's token. Of
    two things the first one moves, or the one that the words name (“the dog moving left”); of a pair both.
    """
    said = cut_motion(prompt)
    if not said.move:
        return prompt, "", ()
    scene = imagine(said.rest, known or {})
    figures = place_figures(scene, scene.horizon)
    named = next((k for k, one in enumerate(scene.things) if one.noun == said.whose), 0)
    moving = range(len(figures)) if scene.pair else (named,)
    clip = Clip(scene, said.move, speed=said.speed, frames=frames)
    tracks = [trace_thing(clip, figure, k in moving) for k, figure in enumerate(figures)]
    maps = [
        draw_sticks([_stick(one, *track[frame]) for one, track in zip(figures, tracks, strict=True)])
        for frame in range(frames)
    ]
    return said.rest, said.move, tuple(maps)


def imagine(words: str, known: Mapping[str, str]) -> Scene:
    """The scene that words describe; one thing where the world does not have them."""
    for word, noun in known.items():
        words = " ".join(words.replace(word, noun).split())
    try:
        return parse_scene(words)
    except UserError:
        return ANYTHING


def _stick(figure: Figure, x: float, y: float, grown: float, turn: float) -> Stick:
    size = figure.size * float(grown)
    posed = replace(figure, size=size, x=float(x), foot=float(y) + size / 2, angle=float(turn))
    return span_stick(posed, SLENDER * size, size)
