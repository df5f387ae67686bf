"""Edits of scenes: a scene before and after, and the instruction between them.

    edit = sample_edit(7)                       # WorldEdit("colour", …, "make the dog red")
    before, after = edit.rendered()             # all else is the same, pixel for pixel

The true result of every instruction is known, so models that edit by instruction are trained and measured on these.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from random import Random

from PIL import Image

from backbone.world.rendering.render import FLOATING, place_figures, render
from backbone.world.scene import Pose, Scene, is_fair, sample_scene
from backbone.world.words import choose_article, load_vocabulary

# Kinds of edits of scenes with one thing, and with two
OF_ONE = ("noun", "colour", "accessory added", "accessory removed", "place", "style")
OF_TWO = ("one of two", "thing removed", "thing added")
KINDS = (*OF_ONE, *OF_TWO)
GREY_STYLES = ("a pencil sketch of",)  # which show no colour
WORDINGS = {  # of each kind of edit, the canonical one first
    "noun": (
        "turn the {old} into {new}",
        "replace the {old} with {new}",
        "make the {old} {new}",
        "make it {new}",
    ),
    "colour": ("make the {thing} {colour}", "paint the {thing} {colour}", "make it {colour}"),
    "accessory added": ("give the {thing} {worn}", "put {worn} on the {thing}", "add {worn}"),
    "accessory removed": ("take off the {bare}", "remove the {bare}", "take the {bare} off the {thing}"),
    "place": ("put the {thing} {place}", "put it {place}", "move the {thing} {place}", "make it {place}"),
    "style": ("make it {style}", "turn it into {style}", "draw it as {style}"),
    "one of two": ("turn the {old} into {new}", "replace the {old} with {new}", "make the {old} {new}"),
    "thing removed": ("remove the {old}", "take the {old} away", "delete the {old}"),
    "thing added": ("add {new} next to the {thing}", "put {new} beside the {thing}", "add {new}"),
}


@dataclass(frozen=True)
class WorldEdit:
    """An edit: the scene before and after, the instruction, and the number of the thing that is hidden in each."""

    kind: str
    before: Scene
    after: Scene
    instruction: str
    hidden_before: int | None = None
    hidden_after: int | None = None

    def rendered(self) -> tuple[Image.Image, Image.Image]:
        """The image before, and the true edit."""
        return (
            render(self.before, without=self.hidden_before).image,
            render(self.after, without=self.hidden_after).image,
        )


def write_instruction(
    kind: str, before: Scene, after: Scene, *, thing: int = 0, random: Random | None = None
) -> str:
    """The instruction of an edit: the canonical one, or with `random` one of several.

    `thing` is the number of the thing that changes, or is added or removed.
    """
    old = before.things[min(thing, len(before.things) - 1)]
    new = after.things[min(thing, len(after.things) - 1)]
    other = before.things[1 - thing] if len(before.things) == 2 else old
    worn = new.accessory or old.accessory or ""
    wordings = WORDINGS[kind]
    return (wordings[0] if random is None else random.choice(wordings)).format(
        thing=(other if kind == "thing added" else old).noun,
        old=old.noun,
        new=f"{choose_article(new.noun)} {new.noun}",
        colour=new.colour,
        worn=worn,
        bare=worn.removeprefix("a ").removeprefix("an "),
        place=after.place,
        style=(after.style or "").removesuffix(" of"),
    )


def sample_edit(seed: int) -> WorldEdit | None:
    """The edit of a seed, of a random kind with random words; None if its scene does not suit."""
    random = Random(f"{seed}/instruction")
    scene = sample_scene(seed)
    kind = random.choice(OF_TWO if len(scene.things) == 2 else OF_ONE)
    if scene.pair:
        return None
    if kind == "colour" and scene.style in GREY_STYLES:
        return None
    thing = random.randrange(len(scene.things))
    before, after = _make_scenes(kind, scene, thing, random)
    if not (is_fair(before) and is_fair(after)):
        return None
    if (
        kind == "place"
        and after.place not in FLOATING
        and any(p.foot < after.horizon for p in after.poses or ())
    ):
        return None  # a swimming thing would hang in the air
    instruction = write_instruction(kind, before, after, thing=thing, random=random)
    return WorldEdit(
        kind,
        before,
        after,
        instruction,
        hidden_before=thing if kind == "thing added" else None,
        hidden_after=thing if kind == "thing removed" else None,
    )


def sample_edits(seeds: Iterable[int], count: int, *, kinds: Sequence[str] = KINDS) -> list[WorldEdit]:
    """The first `count` edits that the seeds make, of these kinds."""
    edits = (edit for seed in seeds if (edit := sample_edit(seed)) is not None and edit.kind in kinds)
    return list(islice(edits, count))


def move_scene(scene: Scene, place: str) -> Scene:
    """The scene in another place, with its things where they are: each place has its own horizon."""
    figures = place_figures(scene, scene.horizon)
    poses = tuple(
        Pose(f.x, f.foot, f.size, f.angle, f.mirrored, 0.5 if f.depth is None else f.depth) for f in figures
    )
    return replace(scene, place=place, poses=poses)


def _make_scenes(kind: str, scene: Scene, number: int, random: Random) -> tuple[Scene, Scene]:
    """The scene before and after an edit of its thing `number`."""
    vocabulary, thing = load_vocabulary(), scene.things[number]

    def choose_other(among: Iterable[str], *excluded: str | None) -> str:
        return random.choice([word for word in among if word not in excluded])

    match kind:
        case "place":
            return scene, move_scene(scene, choose_other(vocabulary.places, scene.place))
        case "style":
            return scene.plain(), replace(scene, style=choose_other(vocabulary.styles))
        case "thing removed" | "thing added":
            return scene, scene
        case "noun":
            old = replace(thing, accessory=None)
            new = replace(old, noun=choose_other(vocabulary.nouns, thing.noun))
        case "one of two":
            nouns = (other.noun for other in scene.things)
            old, new = thing, replace(thing, noun=choose_other(vocabulary.nouns, *nouns))
        case "colour":
            old, new = thing, replace(thing, colour=choose_other(vocabulary.colours, thing.colour))
        case "accessory added":
            old = replace(thing, accessory=None, small=False)
            new = replace(old, accessory=choose_other(vocabulary.accessories))
        case _:
            old = replace(thing, accessory=choose_other(vocabulary.accessories), small=False)
            new = replace(old, accessory=None)

    # The scene with either thing in this place
    scenes = []
    for changed in (old, new):
        things = [changed if k == number else other for k, other in enumerate(scene.things)]
        scenes.append(replace(scene, things=tuple(things)))
    return scenes[0], scenes[1]
