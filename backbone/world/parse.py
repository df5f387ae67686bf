"""Parsing words of the world into a scene: the inverse of the captions of `backbone.world.words`, paraphrases too."""

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
    another number of poses than things.
    """
    vocabulary, remaining = load_vocabulary(), " ".join(words.lower().replace(",", " ").split())
    styles = {style: (style, *STYLE_WORDS[style]) for style in vocabulary.styles}
    places = {place: (place, *PLACE_WORDS[place]) for place in vocabulary.places}
    style, remaining = _take_phrase(remaining, styles, r"^(?:{}) ")
    _, remaining = _take_phrase(remaining, {"": PHOTO_WORDS}, r"^(?:{}) ")
    place, remaining = _take_phrase(remaining, places, r" (?:{})$")
    parts = re.split(rf" (?:{'|'.join(BESIDE_WORDS)}) ", remaining)
    pair = parts[0].startswith("two ")
    if len(parts) > (1 if pair else 2):
        raise UserError(f"“{words}” has more than two things, and a scene has one or two. Leave some out.")
    things = tuple(_parse_thing(part, vocabulary, pair=pair) for part in parts)
    scene = Scene(things, place or "on a white background", style, pair, seed, poses)
    if poses is not None and len(poses) != len(scene.figures):
        raise UserError(
            f"There are {len(poses)} poses for {len(scene.figures)} things in “{words}”. Give each thing one."
        )
    return scene


def parse_pose(text: str) -> Pose:
    """A pose written as `x=40,foot=100,size=50,angle=30,depth=0.7,mirrored`; x, foot and size are required."""
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


def _take_phrase(text: str, choices: dict[str, tuple[str, ...]], frame: str) -> tuple[str | None, str]:
    """The choice with a phrase that fits the `frame` (a pattern), longest first, and the text without the phrase."""
    spelled = [
        (phrase, name) for name, phrases in choices.items() for phrase in phrases if "{}" not in phrase
    ]
    for phrase, name in sorted(spelled, key=lambda pair: -len(pair[0])):
        if match := re.search(frame.format(re.escape(phrase)), text):
            return name, (text[: match.start()] + text[match.end() :]).strip()
    return None, text


def _parse_thing(text: str, vocabulary: Vocabulary, *, pair: bool) -> Thing:
    """`a small red dog wearing a crown`, or `two red dogs`."""
    body, *worn = re.split(rf" (?:{'|'.join(WEARING_WORDS)}) ", text, maxsplit=1)
    accessory = worn[0] if worn else None
    if accessory is not None and accessory not in vocabulary.accessories:
        raise UserError(
            f"“{accessory}” is nothing to wear. Write one of {', '.join(vocabulary.accessories)}."
        )
    words = re.sub(r"^(?:an?|the|two) ", "", body).split(" ")
    small = words[0] == "small"
    words = words[int(small) :]
    colour = words[0] if words and words[0] in vocabulary.colours else None
    noun = " ".join(words[int(colour is not None) :])
    nouns = [
        *vocabulary.nouns,
        *vocabulary.development_concepts,
        *vocabulary.demo_concept,
        *vocabulary.example_concept,
    ]
    known_noun = next((name for name in nouns if noun == (pluralize(name) if pair else name)), None)
    if known_noun is None:
        raise UserError(
            f"“{noun}” is no thing of moji's world. It has {', '.join(list(vocabulary.nouns)[:8])} … in the colours "
            f"{', '.join(vocabulary.colours)}; write as in “a red dog in the snow”."
        )
    return Thing(known_noun, colour, accessory, small)
