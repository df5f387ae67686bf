"""Words of motion and of the camera: what a thing does, what the camera does, how fast, and four ways to say each.

Beside these, in which clips are captioned, many others are understood: `walking to the left`, `flies up`, `jumping`,
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
# What is understood beside them: verbs with a direction, as participle and in the third person …
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
# Of these it is no matter which way, where no words say it: to the left, which most of what goes faces
ANY_WAY = (*WALKING, "driving", "riding", "racing", "swimming", "sailing", "flying", "crawling")
WAYS = {
    "left": ("left", "to the left", "leftwards"),
    "right": ("right", "to the right", "rightwards"),
    "up": ("up", "upwards"),
    "down": ("down", "downwards"),
}
# … and others that say by themselves what is meant
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
# Words of a pace, and which of these each of them is
PACES = {"slowly": "slowly", "slow": "slowly", "fast": "fast", "quickly": "fast"}
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
BEFORE = re.compile(r"(?:, the (\w[\w ]*?) |,? )(?:is |that )?(?:(slowly|quickly) )?$", re.IGNORECASE)
ENDS = r"$|[,.]| (?:in|on|at|under|over|through|across)\b"
AND = re.compile(r",? (?:and|then|and then)$", re.IGNORECASE)  # between two things that somebody does
BEHIND = re.compile(rf"(?: ({'|'.join(PACES)}))?(?={ENDS})", re.IGNORECASE)
OPPOSITES |= {other: one for one, other in OPPOSITES.items()}


def opposite(move: str) -> str:
    """What a motion or a camera's move is when the clip is played backwards."""
    return OPPOSITES.get(move, move)


def phrase_motion(move: str, *, speed: str = "", noun: str = "", random: Random | None = None) -> str:
    """`moving left`, `the dog moving left slowly`; one of its paraphrases where there is a `random`."""
    phrases = MOTIONS[move]
    words = phrases[0] if random is None else random.choice(phrases)
    return " ".join(part for part in (f"the {noun}" if noun else "", words, speed) if part)


def phrase_camera(move: str, *, speed: str = "", random: Random | None = None) -> str:
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


def find_said(prompt: str, *, any_way: bool = False) -> list[MoveWords]:
    """The words of motion and of the camera in a prompt, the longest first; none lies in another (“camera rising”).

    With `any_way` those too that say no direction (“a dog walking in the snow”), as to the left.
    """
    phrases, pattern = _phrases(any_way)
    found = [
        MoveWords(phrases[" ".join(match[0].lower().split())], match.start(), match.end())
        for match in pattern.finditer(prompt)
    ]
    return sorted(found, key=lambda said: said.start - said.end)


@cache
def _phrases(any_way: bool) -> tuple[dict[str, str], re.Pattern[str]]:
    """Every phrase with its move, and what finds them as whole words; `FURTHER` ones only where they could be cut."""
    captions = {words: move for move, ways in (MOTIONS | CAMERAS).items() for words in ways}
    further = {words: move for move, ways in FURTHER.items() for words in ways}
    third = GOING | WALKING
    if any_way:
        further |= {form: "left" for verb in ANY_WAY for form in (verb, third[verb])}
    verbs, tos = (*third, *third.values()), {to: way for way, tos in WAYS.items() for to in tos}
    ends = {"away": "shrink", "in circles": "circle"}
    paced = (f"{verb}{pace}" for verb in verbs for pace in ("", " slowly", " quickly"))
    phrases = (
        further
        | {f"{going} {to}": way for going in paced for to, way in tos.items()}
        | {f"{verb} {end}": move for verb in verbs for end, move in ends.items()}
        | {f"{pan} {to}": f"pan-{way}" for pan in PANNING for to, way in tos.items()}
        | captions
    )
    # What is no caption's and goes on with a further word (“a falling star”) is no word of motion
    alone = rf"(?=(?: (?:{'|'.join(PACES)}))?(?:{ENDS}))"
    pattern = "|".join(
        (
            rf"(?:{_either(verbs)}\s+(?:(?:(?:slowly|quickly)\s+)?{_either(tos)}|{_either(ends)})){alone}",
            rf"{_either(PANNING)}\s+{_either(tos)}{alone}",
            *(
                _either([words]) + ("" if words in captions else alone)
                for words in sorted({**further, **captions}, key=len, reverse=True)
            ),
        )
    )
    return phrases, re.compile(rf"(?<![\w-])(?:{pattern})(?![\w-])", re.IGNORECASE)


def _either(phrases: Iterable[str]) -> str:
    """A pattern of any of these, the longest first, whatever blanks are between their words."""
    longest_first = sorted(phrases, key=len, reverse=True)
    return "(?:" + "|".join(re.escape(words).replace(r"\ ", r"\s+") for words in longest_first) + ")"


def name_motions(prompt: str) -> list[str]:
    """The words of a prompt that speak of motion, wherever they stand: “going to the left and to the right” too."""
    return [match[0] for match in _speaks_of_motion().finditer(prompt)]


@cache
def _speaks_of_motion() -> re.Pattern[str]:
    """Find a verb with all its directions; else words of a motion that say by themselves what is meant."""
    third = GOING | WALKING
    ways = _either([*(to for tos in WAYS.values() for to in tos), "away", "in circles", "back and forth"])
    more = rf"(?:(?:,|,? and|,? then|,? and then)\s+{ways})*"
    going = rf"{_either([*third, *third.values(), *PANNING])}\s+(?:(?:slowly|quickly)\s+)?{ways}{more}"
    others = _either([words for table in (MOTIONS, CAMERAS) for said in table.values() for words in said])
    return re.compile(rf"(?<![\w-])(?:{going}|{others})(?![\w-])", re.IGNORECASE)


def find_moves(prompt: str) -> tuple[str, str]:
    """The motion and the camera's move that a prompt's words name, "" for none; the longest phrase decides."""
    moves = [said.move for said in find_said(prompt)]
    motion, camera = (next((move for move in moves if move in known), "") for known in (MOTIONS, CAMERAS))
    return motion, camera


@dataclass(frozen=True)
class SaidMotion:
    """What a prompt says of a motion, of `MOTIONS` (or `CAMERAS`) and `SPEEDS`, and the prompt without these words.

    whose  the thing that moves, where the words name one (“the dog moving left”)
    walks  whether it is said to go on foot
    """

    rest: str
    move: str = ""
    speed: str = ""
    whose: str = ""
    walks: bool = False


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
    for said in find_said(prompt, any_way=True):
        before = BEFORE.search(prompt[: said.start])
        behind = BEHIND.match(prompt, said.end)
        if said.move in known and before and behind:
            ahead = prompt[: before.start()]
            whole = _speaks_of_motion().match(prompt, said.start)
            goes_on = whole is not None and whole.end() > behind.end()
            if goes_on or (AND.search(ahead) and name_motions(ahead)):
                continue  # “moving left, then right”, “moving left and jumping”
            rest = (AND.sub("", ahead) + prompt[behind.end() :]).strip(" ,")
            verb, *further = prompt[said.start : said.end].lower().split()
            paces = [word.lower() for word in (behind[1], before[2], *further) if word]
            speed = next((PACES[word] for word in paces if word in PACES), "")
            walks = verb in (*WALKING, *WALKING.values())
            return SaidMotion(rest, said.move, speed, (before[1] or "").lower(), walks)
    return SaidMotion(prompt)
