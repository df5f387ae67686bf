"""Words of motion and of the camera: what a thing does, what the camera does, how fast, and three ways to say each."""

from __future__ import annotations

import re
from dataclasses import dataclass
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
WHERE_SAID = (  # words of motion: behind a comma, the thing that moves before them, or behind the thing itself
    r"(?:, the (\w[\w ]*?) |,? )(?:is )?{}(?: (slowly|fast))?(?=$|[,.]| (?:in|on|at|under|over|through|across)\b)"
)
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


def find_moves(prompt: str) -> tuple[str, str]:
    """The motion and the camera's move that a prompt's words name, "" for none; the longest phrase decides."""
    said = f" {' '.join(prompt.lower().replace(',', ' ').split())} "
    camera, rest = _longest(said, CAMERAS)
    motion, _ = _longest(rest, MOTIONS)
    return motion, camera


@dataclass(frozen=True)
class SaidMotion:
    """What a prompt says of a motion, of `MOTIONS` and `SPEEDS`, and the prompt without these words.

    whose  the thing that moves, where the words name one (“the dog moving left”)
    """

    rest: str
    move: str = ""
    speed: str = ""
    whose: str = ""


def cut_motion(prompt: str) -> SaidMotion:
    """Take the words of motion out of a prompt: `a dog moving left fast in a park` → `a dog in a park`, left, fast."""
    move, match = _find_said(prompt, MOTIONS)
    if match is None:
        return SaidMotion(prompt)
    return SaidMotion(_without(prompt, match), move, (match[2] or "").lower(), (match[1] or "").lower())


def cut_camera(prompt: str) -> tuple[str, str]:
    """Take the words of the camera out of a prompt: `a dog, camera zooming in` → `a dog`, zoom-in."""
    camera, match = _find_said(prompt, CAMERAS)
    return (prompt if match is None else _without(prompt, match)), camera


def _find_said(prompt: str, known: dict[str, tuple[str, ...]]) -> tuple[str, re.Match[str] | None]:
    """What a prompt says, by the longest phrase, and where."""
    said = [(words, move) for move, ways in known.items() for words in ways]
    for words, move in sorted(said, key=lambda pair: -len(pair[0])):
        if match := re.search(WHERE_SAID.format(words), prompt, re.IGNORECASE):
            return move, match
    return "", None


def _without(prompt: str, match: re.Match[str]) -> str:
    return (prompt[: match.start()] + prompt[match.end() :]).strip(" ,")


def _longest(said: str, known: dict[str, tuple[str, ...]]) -> tuple[str, str]:
    found = max(
        ((phrase, move) for move, phrases in known.items() for phrase in phrases if f" {phrase} " in said),
        key=lambda pair: len(pair[0]),
        default=None,
    )
    return (found[1], said.replace(f" {found[0]} ", " ")) if found else ("", said)
