"""Edits of scenes: a scene before and after, and the instruction that says what to do.

    edit = sample_edit(7)                       # WorldEdit("colour", …, "make the dog red")
    before, after = edit.rendered()             # all else is the same, pixel for pixel

The true answer of every instruction is known, so what edits by instruction is trained and measured on these.
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

OF_ONE = ("noun", "colour", "accessory added", "accessory removed", "place", "style")  # thing in a scene
OF_TWO = ("one of two", "thing removed", "thing added")
KINDS = (*OF_ONE, *OF_TWO)
GREY_STYLES = ("a pencil sketch of",)  # in which no colour can be seen
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
    """An edit: the scene before and after, the thing that each of them is drawn without, and the instruction."""

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
    """What an edit's instruction is: the canonical one, or one of several where `random` chooses.

    `thing` is the number of the thing that changes, or comes or goes.
    """
    old, new = (
        before.things[min(thing, len(before.things) - 1)],
        after.things[min(thing, len(after.things) - 1)],
    )
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
    """The edit of a seed, its kind and its words among those of the world; None where its scene does not suit."""
    random = Random(f"{seed}/instruction")
    scene = sample_scene(seed)
    kind = random.choice(OF_TWO if len(scene.things) == 2 else OF_ONE)
    if scene.pair:
        return None
    if kind == "colour" and scene.style in GREY_STYLES:
        return None
    thing = random.randrange(len(scene.things))
    before, after = _sides(kind, scene, thing, random)
    if not (is_fair(before) and is_fair(after)):
        return None
    if (
        kind == "place"
        and after.place not in FLOATING
        and any(p.foot < after.horizon for p in after.poses or ())
    ):
        return None  # what swam would hang in the air
    told = write_instruction(kind, before, after, thing=thing, random=random)
    return WorldEdit(
        kind,
        before,
        after,
        told,
        hidden_before=thing if kind == "thing added" else None,
        hidden_after=thing if kind == "thing removed" else None,
    )


def sample_edits(seeds: Iterable[int], count: int, *, kinds: Sequence[str] = KINDS) -> list[WorldEdit]:
    """The first `count` edits that the seeds make, of these kinds."""
    made = (edit for seed in seeds if (edit := sample_edit(seed)) is not None and edit.kind in kinds)
    return list(islice(made, count))


def move_scene(scene: Scene, place: str) -> Scene:
    """The scene in another place, its things where they are: every place by itself has a ground of its own."""
    figures = place_figures(scene, scene.horizon)
    poses = tuple(
        Pose(one.x, one.foot, one.size, one.angle, one.mirrored, 0.5 if one.depth is None else one.depth)
        for one in figures
    )
    return replace(scene, place=place, poses=poses)


def _sides(kind: str, scene: Scene, number: int, random: Random) -> tuple[Scene, Scene]:
    """The scene before and after an edit of its thing of this number."""
    words, thing = load_vocabulary(), scene.things[number]

    def other(among: Iterable[str], *than: str | None) -> str:
        return random.choice([word for word in among if word not in than])

    match kind:
        case "place":
            return scene, move_scene(scene, other(words.places, scene.place))
        case "style":
            return scene.plain(), replace(scene, style=other(words.styles))
        case "thing removed" | "thing added":
            return scene, scene
        case "noun":
            old = replace(thing, accessory=None)
            new = replace(old, noun=other(words.nouns, thing.noun))
        case "one of two":
            old, new = thing, replace(thing, noun=other(words.nouns, *(each.noun for each in scene.things)))
        case "colour":
            old, new = thing, replace(thing, colour=other(words.colours, thing.colour))
        case "accessory added":
            old = replace(thing, accessory=None, small=False)
            new = replace(old, accessory=other(words.accessories))
        case _:
            old = replace(thing, accessory=other(words.accessories), small=False)
            new = replace(old, accessory=None)

    # The scene with either thing in this place
    sides = []
    for changed in (old, new):
        things = [changed if k == number else each for k, each in enumerate(scene.things)]
        sides.append(replace(scene, things=tuple(things)))
    return sides[0], sides[1]
