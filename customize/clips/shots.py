"""Planning the clips of `customize clip`: the camera's shots, what moves in them, and its track."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from backbone.adapters.concept import Concept
from backbone.io.console import UserError, notify, notify_once
from backbone.io.files import write_json
from backbone.media.control.camera import CameraPath
from backbone.models.control import list_embedded_controls
from backbone.models.model import Backbone
from backbone.models.sample import find_latent_size
from backbone.world.motions import cut_motion
from customize.clips.first_picture import open_first_picture, plan_pictures, write_masks
from customize.clips.planned.in_picture import scale_to_model
from customize.clips.planned.plan import POSE, PlannedClip, Shot, aim_camera, describe_plan, plan_clip
from customize.clips.planned.track import as_json, read_track
from customize.clips.settings import ClipOptions

LONGEST = 1024  # pixels a side of a clip of a picture
TRACK_FILE = "track.json"  # the given track of what moves


def aim_cameras(
    model: Backbone,
    prompts: Sequence[str],
    options: ClipOptions,
    size: tuple[int, int],
    path: CameraPath | None,
) -> list[Shot]:
    """The shot of each prompt: the prompt alone where an adapter, or maps, say what moves.

    Raises `UserError` for a path that leaves what can be drawn, and a drawing for which the network has no places.
    """
    if options.motion or options.condition:
        return [Shot(prompt) for prompt in prompts]
    around, tracked = options.over_picture, options.track is not None
    return [
        aim_camera(prompt, options.frames, size, model.factor, path, around=around, tracked=tracked)
        for prompt in prompts
    ]


def choose_size(model: Backbone, options: ClipOptions, picture: Image.Image | None) -> tuple[int, int]:
    """The size (width, height) of a frame in pixels: as asked for, the model's own, or of the shape of a first picture.

    Where no camera may look past the picture nothing is drawn, and frames are as large as it is, up to `LONGEST`.
    """
    rows, columns = find_latent_size(model, options.size)
    if options.size != (None, None) or not options.over_picture:
        return columns * model.factor, rows * model.factor
    assert picture is not None
    picture_size = picture.size
    if options.camera or any(camera for _, camera in options.moves_in_picture):
        return scale_to_model(model, picture_size)
    scale = min(1.0, LONGEST / max(picture_size))
    wide, high = (max(1, round(side * scale)) for side in picture_size)
    if scale < 1:
        notify(
            f"{options.images[0].name} is {picture_size[0]} × {picture_size[1]}, and the clip {wide} × {high}."
        )
    return wide, high


def find_largest_latents(
    model: Backbone, options: ClipOptions, shots: Sequence[Shot], size: tuple[int, int]
) -> tuple[int, int]:
    """The latents' size (H, W) of the largest thing that is drawn; `UserError` for more places than the network has."""
    # Of a picture that no camera looks past nothing is drawn
    still = (None, None) if options.over_picture else size
    sizes = [find_latent_size(model, still if shot.views is None else shot.views.canvas) for shot in shots]
    return max(sizes, key=lambda sides: sides[0] * sides[1])


def plan_clips(
    model: Backbone,
    prompts: Sequence[str],
    shots: Sequence[Shot],
    options: ClipOptions,
    concepts: Sequence[Concept],
    size: tuple[int, int],
    picture: Image.Image | None,
) -> list[PlannedClip]:
    """The picture model's text for each shot: the prompt alone where an adapter or maps say what moves.

    Elsewhere the words of motion become poses, if the model has a network that reads them; or they move what is in a
    picture.
    """
    if options.motion or options.condition:
        return [PlannedClip(shot.words, options.frames) for shot in shots]
    track = None if options.track is None else read_track(options.track, options.frames)
    if options.over_picture:
        assert picture is not None
        first = open_first_picture(options, picture, size)
        return plan_pictures(model, prompts, shots, options, concepts, first, track)
    if track is not None and POSE not in list_embedded_controls(model):
        raise UserError(
            f"{model.location.name} has no network that reads poses, so nothing is drawn along --track. Give a "
            "picture in which a thing moves so: --image."
        )
    unread = any(shot.views is None or cut_motion(shot.words).move for shot in shots)
    if unread and POSE not in list_embedded_controls(model):
        notify_once(
            f"No motion adapter is named, and {model.location.name} has no network that reads poses: the words of "
            "motion are read as any others. Give a map for each frame with --condition, or an adapter with --motion."
        )

    # Words of motion become poses, a map for each frame
    nouns = {token: "" for concept in concepts for token in concept.tokens}
    plans = [
        plan_clip(model, shot, options.frames, size, nouns, redraw=options.redraw, track=track)
        for shot in shots
    ]
    if options.redraw and not any(plan.move for plan in plans):
        notify("--redraw is not used: no words of motion are planned here.")
    if options.shared_noise is not None and all(plan.frames == 1 for plan in plans):
        notify("--shared-noise is not used: every clip here is of one drawing.")
    for prompt, plan in zip(prompts, plans, strict=True):
        if plan.views is not None or POSE in list_embedded_controls(model):
            for sentence in describe_plan(prompt, plan):
                notify(sentence)
    return plans


def write_plans(folder: Path, plans: Sequence[PlannedClip]) -> None:
    """Write where things were cut out of a picture (`write_masks`), and the track along which they go."""
    write_masks(folder, plans)
    if plans[0].track is not None:  # one for all
        write_json(folder / TRACK_FILE, as_json(plans[0].track))
