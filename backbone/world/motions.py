"""Words of motion and of the camera: what a thing does, what the camera does, how fast, and three ways to say each."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from random import Random

MOTIONS: dict[str, tuple[str, ...]] = {  # the canonical phrase first
    "left": ("moving left", "going to the left", "sliding left", "that moves to the left"),
    "right": ("moving right", "going to the right", "sliding right", "that moves to the right"),
    "up": ("moving up", "rising", "going upwards", "that floats up"),
    "down": ("moving down", "sinking", "going downwards", "that comes down"),
    "grow": ("growing", "getting bigger", "coming closer", "that becomes large"),
    "shrink": ("shrinking", "getting smaller", "going far away", "that becomes tiny"),
    "clockwise": ("spinning clockwise", "turning clockwise", "rotating clockwise", "that spins clockwise"),
    "counterclockwise": (
        "spinning counterclockwise",
        "turning counterclockwise",
        "rotating counterclockwise",
        "that spins counterclockwise",
    ),
    "bounce": ("bouncing", "jumping up and down", "hopping", "that bounces"),
    "swing": ("swinging", "rocking to and fro", "tilting from side to side", "that swings"),
    "circle": ("moving in a circle", "going round and round", "circling", "that flies in circles"),
    "shake": ("shaking", "trembling", "wobbling", "that shivers"),
    "pulse": ("pulsing", "growing and shrinking", "throbbing", "that breathes in and out"),
    "zigzag": ("zigzagging", "moving in a zigzag", "running in zigzags", "that zigzags"),
}
CAMERAS: dict[str, tuple[str, ...]] = {
    "pan-left": ("camera panning left", "the camera moves left", "pan left", "camera sliding to the left"),
    "pan-right": (
        "camera panning right",
        "the camera moves right",
        "pan right",
        "camera sliding to the right",
    ),
    "pan-up": ("camera panning up", "the camera moves up", "pan up", "camera rising"),
    "pan-down": ("camera panning down", "the camera moves down", "pan down", "camera sinking"),
    "zoom-in": ("camera zooming in", "the camera zooms in", "zoom in", "slow push-in"),
    "zoom-out": ("camera zooming out", "the camera zooms out", "zoom out", "slow pull-out"),
    "roll-left": (
        "camera rolling left",
        "the camera rolls left",
        "roll left",
        "camera tilting over to the left",
    ),
    "roll-right": (
        "camera rolling right",
        "the camera rolls right",
        "roll right",
        "camera tilting over to the right",
    ),
}
SPEEDS: dict[str, float] = {"": 1.0, "slowly": 0.55, "fast": 1.6}
OPPOSITES = {  # what a clip shows that is played backwards; the others look the same both ways
    "left": "right",
    "up": "down",
    "grow": "shrink",
    "clockwise": "counterclockwise",
    "pan-left": "pan-right",
    "pan-up": "pan-down",
    "zoom-in": "zoom-out",
    "roll-left": "roll-right",
}
# What may stand before words that can be cut (a comma, the thing that moves, or the thing itself), and behind them.
BEFORE = re.compile(r"(?:, the (\w[\w ]*?) |,? )(?:is )?$", re.IGNORECASE)
BEHIND = re.compile(r"(?: (slowly|fast))?(?=$|[,.]| (?:in|on|at|under|over|through|across)\b)", re.IGNORECASE)
OPPOSITES |= {other: one for one, other in OPPOSITES.items()}


def opposite(move: str) -> str:
    """What a motion or a camera's move is when the clip is played backwards."""
    return OPPOSITES.get(move, move)


def say_motion(move: str, *, speed: str = "", noun: str = "", random: Random | None = None) -> str:
    """`moving left`, `the dog moving left slowly`; one of its paraphrases where there is a `random`."""
    phrases = MOTIONS[move]
    words = phrases[0] if random is None else random.choice(phrases)
    return " ".join(part for part in (f"the {noun}" if noun else "", words, speed) if part)


def say_camera(move: str, *, speed: str = "", random: Random | None = None) -> str:
    """`camera panning left`; one of its paraphrases where there is a `random`."""
    phrases = CAMERAS[move]
    words = phrases[0] if random is None else random.choice(phrases)
    return " ".join(part for part in (words, speed) if part)


@dataclass(frozen=True)
class MoveWords:
    """Words in a prompt that name a move of `MOTIONS` or `CAMERAS`: prompt[start:end]."""

    move: str
    start: int
    end: int


def find_said(prompt: str) -> list[MoveWords]:
    """The words of motion and of the camera in a prompt, the longest first; none lies in another (“camera rising”)."""
    phrases, pattern = _phrases()
    found = [
        MoveWords(phrases[" ".join(match[0].lower().split())], match.start(), match.end())
        for match in pattern.finditer(prompt)
    ]
    return sorted(found, key=lambda said: said.start - said.end)


@cache
def _phrases() -> tuple[dict[str, str], re.Pattern[str]]:
    """Every phrase with its move, and what finds them as whole words."""
    phrases = {words: move for move, ways in (MOTIONS | CAMERAS).items() for words in ways}
    longest_first = sorted(phrases, key=len, reverse=True)
    either = "|".join(re.escape(words).replace(r"\ ", r"\s+") for words in longest_first)
    return phrases, re.compile(rf"(?<![\w-])(?:{either})(?![\w-])", re.IGNORECASE)


def find_moves(prompt: str) -> tuple[str, str]:
    """The motion and the camera's move that a prompt's words name, "" for none; the longest phrase decides."""
    moves = [said.move for said in find_said(prompt)]
    motion, camera = (next((move for move in moves if move in known), "") for known in (MOTIONS, CAMERAS))
    return motion, camera


@dataclass(frozen=True)
class SaidMotion:
    """What a prompt says of a motion, of `MOTIONS` (or `CAMERAS`) and `SPEEDS`, and the prompt without these words.

    whose  the thing that moves, where the words name one (“the dog moving left”)
    """

    rest: str
    move: str = ""
    speed: str = ""
    whose: str = ""


def cut_motion(prompt: str) -> SaidMotion:
    """Take the words of motion out of a prompt: `a dog moving left fast in a park` → `a dog in a park`, left, fast.

    What cannot be taken out of its sentence (“the rising sun”) stays, and is no motion.
    """
    return _cut(prompt, MOTIONS)


def cut_camera(prompt: str) -> SaidMotion:
    """Take the words of the camera out of a prompt: `a dog, camera zooming in slowly` → `a dog`, zoom-in, slowly."""
    return _cut(prompt, CAMERAS)


def _cut(prompt: str, known: Collection[str]) -> SaidMotion:
    """The longest words of these moves that can be cut, and the prompt without them."""
    for said in find_said(prompt):
        before = BEFORE.search(prompt[: said.start])
        behind = BEHIND.match(prompt, said.end)
        if said.move in known and before and behind:
            rest = (prompt[: before.start()] + prompt[behind.end() :]).strip(" ,")
            speed, whose = ((match[1] or "").lower() for match in (behind, before))
            return SaidMotion(rest, said.move, speed, whose)
    return SaidMotion(prompt)
