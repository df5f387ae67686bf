"""Words of motion and of the camera: a thing's move, the camera's move, the speed, and four phrases for each.

Clips are captioned with these. Many others are understood as well: `walking to the left`, `flies up`, `jumping`,
`the camera pans right`, `dolly in`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
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
# Further phrases that are understood: verbs with a direction, as participle and in the third person …
GOING = {
    "moving": "moves", "going": "goes", "sliding": "slides", "gliding": "glides", "drifting": "drifts",
    "floating": "floats", "flying": "flies", "driving": "drives", "riding": "rides", "sailing": "sails",
    "swimming": "swims", "racing": "races", "rolling": "rolls", "heading": "heads", "crawling": "crawls",
}  # fmt: skip
WALKING = {
    "walking": "walks", "running": "runs", "trotting": "trots", "strolling": "strolls", "marching": "marches",
    "galloping": "gallops", "jogging": "jogs", "wandering": "wanders",
}  # fmt: skip
PANNING = (
    "pan", "panning", "camera pans", "the camera pans", "camera panning", "camera moves", "the camera moves",
    "camera moving", "tilt", "camera tilts", "camera tilting",
)  # fmt: skip
# Verbs that need no direction: by default to the left, which most moving things face
ANY_WAY = (*WALKING, "driving", "riding", "racing", "swimming", "sailing", "flying", "crawling")
WAYS = {
    "left": ("left", "to the left", "leftwards"),
    "right": ("right", "to the right", "rightwards"),
    "up": ("up", "upwards"),
    "down": ("down", "downwards"),
}
# … and others that need no direction
FURTHER: dict[str, tuple[str, ...]] = {
    "up": ("climbing", "ascending", "taking off", "lifting off"),
    "down": ("falling", "falling down", "descending", "dropping"),
    "grow": ("approaching", "coming nearer", "coming towards us", "getting larger", "becoming bigger"),
    "shrink": ("becoming smaller", "getting tiny"),
    "clockwise": ("spinning", "spinning around", "rotating", "turning around", "twirling", "whirling"),
    "bounce": ("jumping", "leaping", "bouncing up and down"),
    "swing": ("swaying", "swaying from side to side", "waddling"),
    "shake": ("shivering", "quivering", "vibrating"),
    "pulse": ("breathing", "breathing in and out"),
    "zoom-in": (
        "camera zooms in",
        "zooming in",
        "dolly in",
        "camera dollies in",
        "push in",
        "camera moves closer",
    ),
    "zoom-out": ("camera zooms out", "zooming out", "dolly out", "camera dollies out", "pull back"),
    "roll-left": ("camera rolls left", "camera rolling to the left"),
    "roll-right": ("camera rolls right", "camera rolling to the right"),
}
SPEEDS: dict[str, float] = {"": 1.0, "slowly": 0.55, "fast": 1.6}
# Words of a pace, and the speed that each means
PACES = {"slowly": "slowly", "slow": "slowly", "fast": "fast", "quickly": "fast"}
OPPOSITES = {  # the move of a clip that is played backwards; the others look the same both ways
    "left": "right",
    "up": "down",
    "grow": "shrink",
    "clockwise": "counterclockwise",
    "pan-left": "pan-right",
    "pan-up": "pan-down",
    "zoom-in": "zoom-out",
    "roll-left": "roll-right",
}
# The text that may stand before words that can be cut (a comma, the thing that moves), and behind them
BEFORE = re.compile(r"(?:, the (\w[\w ]*?) |,? )(?:is |that )?(?:(slowly|quickly) )?$", re.IGNORECASE)
ENDS = r"$|[,.]| (?:in|on|at|under|over|through|across)\b"
AND = re.compile(r",? (?:and|then|and then)$", re.IGNORECASE)  # between two things that somebody does
BEHIND = re.compile(rf"(?: ({'|'.join(PACES)}))?(?={ENDS})", re.IGNORECASE)
OPPOSITES |= {other: move for move, other in OPPOSITES.items()}


def opposite(move: str) -> str:
    """The motion or camera move of a clip that is played backwards."""
    return OPPOSITES.get(move, move)


def phrase_motion(move: str, *, speed: str = "", noun: str = "", random: Random | None = None) -> str:
    """`moving left`, `the dog moving left slowly`; with `random` one of the paraphrases."""
    phrases = MOTIONS[move]
    words = phrases[0] if random is None else random.choice(phrases)
    return " ".join(part for part in (f"the {noun}" if noun else "", words, speed) if part)


def phrase_camera(move: str, *, speed: str = "", random: Random | None = None) -> str:
    """`camera panning left`; with `random` one of the paraphrases."""
    phrases = CAMERAS[move]
    words = phrases[0] if random is None else random.choice(phrases)
    return " ".join(part for part in (words, speed) if part)


@dataclass(frozen=True)
class MoveWords:
    """Words in a prompt that name a move of `MOTIONS` or `CAMERAS`: prompt[start:end]."""

    move: str
    start: int
    end: int


def find_move_words(prompt: str, *, any_way: bool = False) -> list[MoveWords]:
    """The words of motion and of the camera in a prompt, the longest first; none lies in another (“camera rising”).

    With `any_way` also verbs without a direction (“a dog walking in the snow”), as to the left.
    """
    phrases, pattern = _compile_phrases(any_way)
    words = [
        MoveWords(phrases[" ".join(match[0].lower().split())], match.start(), match.end())
        for match in pattern.finditer(prompt)
    ]
    return sorted(words, key=lambda span: span.start - span.end)


@cache
def _compile_phrases(any_way: bool) -> tuple[dict[str, str], re.Pattern[str]]:
    """Every phrase with its move, and a pattern of whole words; if nothing can be cut out, only captions match."""
    captions = {words: move for move, ways in (MOTIONS | CAMERAS).items() for words in ways}
    further = {words: move for move, ways in FURTHER.items() for words in ways}
    third_person = GOING | WALKING
    if any_way:
        further |= {form: "left" for verb in ANY_WAY for form in (verb, third_person[verb])}
    verbs = (*third_person, *third_person.values())
    directions = {direction: way for way, spellings in WAYS.items() for direction in spellings}
    ends = {"away": "shrink", "in circles": "circle"}
    paced = (f"{verb}{pace}" for verb in verbs for pace in ("", " slowly", " quickly"))
    phrases = (
        further
        | {f"{verb} {direction}": way for verb in paced for direction, way in directions.items()}
        | {f"{verb} {end}": move for verb in verbs for end, move in ends.items()}
        | {f"{pan} {direction}": f"pan-{way}" for pan in PANNING for direction, way in directions.items()}
        | captions
    )
    # A phrase that is no caption's and continues with another word (“a falling star”) is no motion
    boundary = rf"(?=(?: (?:{'|'.join(PACES)}))?(?:{ENDS}))"
    pattern = "|".join(
        (
            rf"(?:{_match_any(verbs)}\s+(?:(?:(?:slowly|quickly)\s+)?{_match_any(directions)}|{_match_any(ends)})){boundary}",
            rf"{_match_any(PANNING)}\s+{_match_any(directions)}{boundary}",
            *(
                _match_any([words]) + ("" if words in captions else boundary)
                for words in sorted({**further, **captions}, key=len, reverse=True)
            ),
        )
    )
    return phrases, re.compile(rf"(?<![\w-])(?:{pattern})(?![\w-])", re.IGNORECASE)


def _match_any(phrases: Iterable[str]) -> str:
    """A pattern of any of these phrases, the longest first, with any blanks between their words."""
    longest_first = sorted(phrases, key=len, reverse=True)
    return "(?:" + "|".join(re.escape(words).replace(r"\ ", r"\s+") for words in longest_first) + ")"


def list_motion_words(prompt: str) -> list[str]:
    """The words of motion in a prompt, wherever they stand, with all their directions (“going left and right”)."""
    return [match[0] for match in _compile_motions().finditer(prompt)]


@cache
def _compile_motions() -> re.Pattern[str]:
    """A pattern of a verb with all its directions, or of a caption's words of motion."""
    third_person = GOING | WALKING
    verb = _match_any([*third_person, *third_person.values(), *PANNING])
    spellings = [direction for directions in WAYS.values() for direction in directions]
    way = _match_any([*spellings, "away", "in circles", "back and forth"])
    going = rf"{verb}\s+(?:(?:slowly|quickly)\s+)?{way}(?:(?:,|,? and|,? then|,? and then)\s+{way})*"
    captions = [words for table in (MOTIONS, CAMERAS) for phrases in table.values() for words in phrases]
    return re.compile(rf"(?<![\w-])(?:{going}|{_match_any(captions)})(?![\w-])", re.IGNORECASE)


def find_moves(prompt: str) -> tuple[str, str]:
    """The motion and the camera's move that a prompt names, "" for none; the longest phrase decides."""
    moves = [words.move for words in find_move_words(prompt)]
    motion, camera = (next((move for move in moves if move in table), "") for table in (MOTIONS, CAMERAS))
    return motion, camera


@dataclass(frozen=True)
class CutMotion:
    """A move of `MOTIONS` (or `CAMERAS`) that was cut out of a prompt.

    prompt  the prompt without the words of the move
    speed   of `SPEEDS`
    thing   the thing that moves, if the words name one (“the dog moving left”)
    walks   whether the words say that it goes on foot
    """

    prompt: str
    move: str = ""
    speed: str = ""
    thing: str = ""
    walks: bool = False


def cut_motion(prompt: str) -> CutMotion:
    """Cut the words of motion out of a prompt: `a dog moving left fast in a park` → `a dog in a park`, left, fast.

    Words that cannot be cut out of their sentence (“the rising sun”) stay, and are no motion.
    """
    return _cut_moves(prompt, MOTIONS)


def cut_camera(prompt: str) -> CutMotion:
    """Cut the words of the camera out of a prompt: `a dog, camera zooming in slowly` → `a dog`, zoom-in, slowly."""
    return _cut_moves(prompt, CAMERAS)


def _cut_moves(prompt: str, moves: Collection[str]) -> CutMotion:
    """Cut the longest words of these moves that can be cut."""
    for words in find_move_words(prompt, any_way=True):
        before = BEFORE.search(prompt[: words.start])
        behind = BEHIND.match(prompt, words.end)
        if words.move in moves and before and behind:
            prefix = prompt[: before.start()]
            phrase = _compile_motions().match(prompt, words.start)
            continues = phrase is not None and phrase.end() > behind.end()
            if continues or (AND.search(prefix) and list_motion_words(prefix)):
                continue  # “moving left, then right”, “moving left and jumping”
            remaining = (AND.sub("", prefix) + prompt[behind.end() :]).strip(" ,")
            verb, *further = prompt[words.start : words.end].lower().split()
            paces = [word.lower() for word in (behind[1], before[2], *further) if word]
            speed = next((PACES[word] for word in paces if word in PACES), "")
            walks = verb in (*WALKING, *WALKING.values())
            return CutMotion(remaining, words.move, speed, (before[1] or "").lower(), walks)
    return CutMotion(prompt)
