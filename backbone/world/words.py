"""The world's vocabulary and the captions of its scenes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

PLACE_WORDS: dict[str, tuple[str, ...]] = {
    "in a park": ("in the park", "on the grass", "on a green lawn"),
    "in the desert": ("in a desert", "in a sandy desert", "among cacti"),
    "on the beach": ("at the beach", "on a beach", "by the sea", "on the sand"),
    "in the snow": ("in snow", "in a snowy field", "in winter"),
    "at night": ("in the night", "under the moon", "under the night sky"),
    "at sunset": ("in the sunset", "at dusk", "in front of a sunset"),
    "in the city": ("in a city", "in town", "on a city street", "in front of buildings"),
    "on a wooden table": ("on a table", "on a wooden floor", "on a desk"),
    "under the sea": ("underwater", "in the ocean", "under water", "in the sea"),
    "in space": ("in outer space", "among the stars", "floating in space"),
    "in a forest": ("in the forest", "in the woods", "among trees"),
    "on a white background": ("against a white background", "on white", "in front of a white background"),
}
STYLE_WORDS: dict[str, tuple[str, ...]] = {
    "a pixel art of": ("pixel art of", "a pixel art picture of", "{}, pixel art", "{} in pixel art style"),
    "a pencil sketch of": ("a sketch of", "a pencil drawing of", "{}, pencil sketch", "a drawing of"),
    "a watercolor of": ("a watercolor painting of", "watercolor of", "{}, watercolor", "a painting of"),
    "a neon drawing of": ("a neon sign of", "neon drawing of", "{}, neon", "{} in neon style"),
}
PHOTO_WORDS = ("a photo of", "a picture of", "an image of", "a photo of")
WEARING_WORDS = ("with", "wearing", "that wears")
BESIDE_WORDS = ("next to", "beside", "and", "near")
IRREGULAR_PLURALS = {
    "fish": "fish", "butterfly": "butterflies", "strawberry": "strawberries", "snowman": "snowmen",
    "cactus": "cactuses", "fox": "foxes", "octopus": "octopuses", "bus": "buses", "nesting dolls": "nesting dolls",
    "violin": "violins", "accordion": "accordions",
}  # fmt: skip


@dataclass(frozen=True)
class Vocabulary:
    """The word lists; nouns, accessories and concepts map to glyphs, colours to hues in degrees.

    The judge knows the nouns, the development concepts and the demo concept. It has never seen the example concept,
    which `customize example` writes. `moji` sees the glyphs of the other nouns as things without a name.
    """

    nouns: dict[str, str]
    other_nouns: dict[str, str]
    colours: dict[str, int]
    accessories: dict[str, str]
    places: tuple[str, ...]
    styles: tuple[str, ...]
    development_concepts: dict[str, str]
    demo_concept: dict[str, str]
    example_concept: dict[str, str]
    classes: dict[str, str]

    def glyph(self, noun: str) -> str:
        """The glyph of a noun or concept; `KeyError` for an unknown word."""
        concepts = {**self.development_concepts, **self.demo_concept, **self.example_concept}
        return {**self.nouns, **concepts, **self.other_nouns}[noun]


@cache
def load_vocabulary() -> Vocabulary:
    """The packaged word lists."""
    lists = json.loads(Path(__file__).with_name("vocabulary.json").read_text(encoding="utf-8"))
    return Vocabulary(
        nouns=lists["nouns"],
        other_nouns=lists["nouns_for_a_larger_edition"],
        colours=lists["colours"],
        accessories=lists["accessories"],
        places=tuple(lists["places"]),
        styles=tuple(lists["styles"]),
        development_concepts=lists["development_concepts"],
        demo_concept=lists["demo_concept"],
        example_concept=lists["example_concept"],
        classes=lists["classes"],
    )


@dataclass(frozen=True)
class Thing:
    """An object: noun, colour (None: the glyph's own), accessory, and whether it is small."""

    noun: str
    colour: str | None = None
    accessory: str | None = None
    small: bool = False

    def phrase(self, *, count: int = 1, wearing: str = "wearing", name: str | None = None) -> str:
        """`a small red dog wearing a crown`, or `two red dogs`; `name` replaces the noun."""
        noun = name or self.noun
        words = [word for word in ("small" if self.small else None, self.colour) if word]
        words.append(pluralize(noun) if count == 2 else noun)
        text = " ".join(words)
        text = f"two {text}" if count == 2 else f"{choose_article(text)} {text}"
        return f"{text} {wearing} {self.accessory}" if self.accessory else text


def pluralize(noun: str) -> str:
    """The plural of a noun of the world."""
    return IRREGULAR_PLURALS.get(noun, noun + "s")


def choose_article(words: str) -> str:
    """`a` or `an`."""
    return "an" if words[0] in "aeiou" and not words.startswith(("one", "uni")) else "a"


def write_caption(
    things: tuple[Thing, ...], *, pair: bool, place: str | None, style: str | None, name: str | None = None
) -> str:
    """The canonical caption: `[style of] [a | two] [small] [colour] noun [wearing …] [next to a noun] place`."""
    text = things[0].phrase(count=2 if pair else 1, name=name)
    if len(things) == 2:
        text += " next to " + things[1].phrase()
    if place:
        text += " " + place
    return f"{style} {text}" if style else text


def paraphrase(
    things: tuple[Thing, ...], *, pair: bool, place: str | None, style: str | None, random: Random
) -> str:
    """A random paraphrase of the canonical caption."""
    text = things[0].phrase(count=2 if pair else 1, wearing=random.choice(WEARING_WORDS))
    if len(things) == 2:
        text += f" {random.choice(BESIDE_WORDS)} " + things[1].phrase()
    if place:
        place_words = random.choice((place, *PLACE_WORDS[place]))
        text = f"{place_words}, {text}" if random.random() < 0.05 else f"{text} {place_words}"
    if style:
        pattern = random.choice((style, *STYLE_WORDS[style]))
        text = pattern.format(text) if "{}" in pattern else f"{pattern} {text}"
    elif random.random() < 0.4:
        text = f"{random.choice(PHOTO_WORDS)} {text}"
    return text
