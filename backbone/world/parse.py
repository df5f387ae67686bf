"""Words of the world to a scene: the captions of `backbone.world.words` read backwards, paraphrases too."""

from __future__ import annotations

import re

from backbone.io.console import UserError
from backbone.world.scene import Pose, Scene
from backbone.world.words import (
    BESIDE_WORDS,
    PHOTO_WORDS,
    PLACE_WORDS,
    STYLE_WORDS,
    WEARING_WORDS,
    Thing,
    Vocabulary,
    load_vocabulary,
    pluralize,
)

POSE = re.compile(r"(x|foot|size|angle|depth)=(-?\d+(?:\.\d+)?)")
LIMITS = {"x": (-32, 160), "foot": (0, 192), "size": (8, 128), "angle": (-360, 360), "depth": (0, 1)}


def parse_scene(words: str, *, seed: int = 0, poses: tuple[Pose, ...] | None = None) -> Scene:
    """The scene that words describe: `a pencil sketch of a small red dog wearing a crown next to a cat at night`.

    Without a place it is on a white background. Raises `UserError` for words that the world does not have, and for
    poses that are not one a thing.
    """
    known, rest = load_vocabulary(), " ".join(words.lower().replace(",", " ").split())
    style, rest = _cut(rest, {one: (one, *STYLE_WORDS[one]) for one in known.styles}, r"^(?:{}) ")
    _, rest = _cut(rest, {"": PHOTO_WORDS}, r"^(?:{}) ")
    place, rest = _cut(rest, {one: (one, *PLACE_WORDS[one]) for one in known.places}, r" (?:{})$")
    parts = re.split(rf" (?:{'|'.join(BESIDE_WORDS)}) ", rest)
    pair = parts[0].startswith("two ")
    if len(parts) > (1 if pair else 2):
        raise UserError(f"“{words}” has more than two things, and a scene has one or two. Leave some out.")
    things = tuple(_thing(part, known, pair=pair) for part in parts)
    scene = Scene(things, place or "on a white background", style, pair, seed, poses)
    if poses is not None and len(poses) != len(scene.figures):
        raise UserError(
            f"There are {len(poses)} poses for {len(scene.figures)} things in “{words}”. Give each thing one."
        )
    return scene


def parse_pose(text: str) -> Pose:
    """A pose as `x=40,foot=100,size=50,angle=30,depth=0.7,mirrored`; x, foot and size have to be there."""
    mirrored, values = False, {}
    for part in text.replace(" ", "").split(","):
        if part == "mirrored":
            mirrored = True
        elif (match := POSE.fullmatch(part)) and match[1] not in values:
            values[match[1]] = float(match[2])
        else:
            raise UserError(f"“{part}” is no part of a pose. Write: x=40,foot=100,size=50,angle=30,mirrored.")
    for name in ("x", "foot", "size"):
        if name not in values:
            raise UserError(f"The pose “{text}” says no {name}. Write: x=40,foot=100,size=50.")
    for name, value in values.items():
        low, high = LIMITS[name]
        if not low <= value <= high:
            raise UserError(f"In the pose “{text}” {name} is {value:g}. Give {low} to {high}.")
    return Pose(**values, mirrored=mirrored)


def _cut(text: str, choices: dict[str, tuple[str, ...]], frame: str) -> tuple[str | None, str]:
    """The choice whose words stand in the frame, the longest first, and the text without them."""
    spelled = [(word, one) for one, many in choices.items() for word in many if "{}" not in word]
    for word, one in sorted(spelled, key=lambda pair: -len(pair[0])):
        if match := re.search(frame.format(re.escape(word)), text):
            return one, (text[: match.start()] + text[match.end() :]).strip()
    return None, text


def _thing(text: str, known: Vocabulary, *, pair: bool) -> Thing:
    """`a small red dog wearing a crown`, or `two red dogs`."""
    body, *worn = re.split(rf" (?:{'|'.join(WEARING_WORDS)}) ", text, maxsplit=1)
    accessory = worn[0] if worn else None
    if accessory is not None and accessory not in known.accessories:
        raise UserError(f"“{accessory}” is nothing to wear. Write one of {', '.join(known.accessories)}.")
    words = re.sub(r"^(?:an?|the|two) ", "", body).split(" ")
    small = words[0] == "small"
    words = words[int(small) :]
    colour = words[0] if words and words[0] in known.colours else None
    noun = " ".join(words[int(colour is not None) :])
    nouns = [*known.nouns, *known.development_concepts, *known.demo_concept, *known.example_concept]
    found = next((one for one in nouns if noun == (pluralize(one) if pair else one)), None)
    if found is None:
        raise UserError(
            f"“{noun}” is no thing of moji's world. It has {', '.join(list(known.nouns)[:8])} … in the colours "
            f"{', '.join(known.colours)}; write as in “a red dog in the snow”."
        )
    return Thing(found, colour, accessory, small)
