"""A thing's phrase in a prompt, and the prompt without it. No heavy imports.

    without("a cat wearing a crown next to a dog in a park", "cat")    "a dog in a park"
    without("a dog next to a small black cat in a park", "cat")        "a dog in a park"
    without("a watercolor of a cat in a park", "cat")                  "a watercolor in a park"

No parser: English captions are short, and closed lists of words (articles, prepositions, what is worn) say where a
phrase begins, what belongs to it and what joined it to its neighbours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from backbone.adapters.concept import UNSPACED

DETERMINERS = frozenset([
    "a", "an", "the", "one", "two", "three", "four", "five", "six", "some", "several", "many", "few", "his",
    "her", "its", "their", "my", "your", "our", "this", "that", "these", "those", "another", "each", "every",
    "both", "no",
])  # fmt: skip
AND = frozenset(["and", "or", "&", ",", ";", "plus"])
BESIDE = frozenset([
    "beside", "besides", "near", "with", "alongside", "by", "next to", "close to", "together with",
])  # fmt: skip
PLACES = frozenset([
    "in", "on", "at", "under", "over", "above", "below", "behind", "inside", "outside", "among", "between",
    "against", "across", "around", "through", "from", "into", "onto", "along", "beneath", "underneath", "toward",
    "towards", "before", "after", "during", "off", "without", "for", "to", "in front of", "on top of",
])  # fmt: skip
OF = frozenset(["of"])
WEARING = frozenset(["wearing", "wears", "holding", "holds", "carrying", "carries", "having", "has"])
STOPS = frozenset([".", "!", "?", ":"])
ADJECTIVES = frozenset([
    "red", "orange", "yellow", "green", "blue", "purple", "violet", "pink", "brown", "black", "white", "grey",
    "gray", "golden", "gold", "silver", "turquoise", "teal", "cyan", "dark", "light", "pale", "bright", "small",
    "big", "large", "tiny", "huge", "little", "tall", "short", "long", "old", "young", "new", "fluffy", "furry",
    "cute", "happy", "sad", "angry", "beautiful", "pretty", "fat", "thin", "round", "wooden", "metal", "glass",
    "stone", "plastic",
])  # fmt: skip
WORN = frozenset([
    "crown", "hat", "cap", "helmet", "hood", "scarf", "bow", "tie", "sunglasses", "glasses", "goggles", "mask",
    "collar", "coat", "jacket", "shirt", "dress", "shoes", "boots", "gloves", "backpack", "ribbon", "necklace",
    "headphones", "eyes", "ears", "tail", "fur", "hair", "beard", "wings", "horns", "paws", "legs", "stripes",
    "spots", "smile",
])  # fmt: skip
VERBS = frozenset([
    "sits", "stands", "lies", "runs", "walks", "sleeps", "plays", "eats", "jumps", "looks", "flies", "swims",
    "is", "are", "was", "were",
])  # fmt: skip
NOUNS = frozenset([  # in -ing, and no verbs
    "drawing", "painting", "rendering", "etching", "engraving", "building", "ceiling", "clothing", "earring",
    "evening", "morning", "lightning", "pudding", "dumpling", "duckling", "railing", "string", "spring", "swing",
    "thing", "wedding", "awning",
])  # fmt: skip

JOINING = AND | BESIDE | PLACES | OF | WEARING | VERBS | {"there", "that", "who", "which"}


def names_thing(phrase: str) -> bool:
    """Whether a word of a phrase can be said of a thing; not so of articles and of what joins things (“in”)."""
    joins = JOINING | DETERMINERS | STOPS | {word for words in JOINING for word in words.split()}
    return any(token.lower() not in joins for token in _cut(phrase))


def without(prompt: str, phrase: str) -> str:
    """The prompt without every place where a phrase (in any case) names a thing: its article and adjectives, what it
    wears, and what joined it to the rest. "" where nothing is left; the prompt itself where the phrase is not in it.
    """
    wanted = [token.lower() for token in _cut(phrase)]
    tokens = _cut(prompt)
    if not wanted:
        return prompt
    found = False
    for first in range(len(tokens) - len(wanted), -1, -1):
        here = [token.lower() for token in tokens[first : first + len(wanted)]]
        if here == wanted or (here[-1:] and [*here[:-1], re.sub(r"['’]s$", "", here[-1])] == wanted):
            tokens = _take_out(tokens, first, first + len(wanted))
            found = True
    if not found:  # in a language without spaces, say; no part of another word, as of “cats” or “cat-like”
        whole = rf"(?<![\w-]){re.escape(phrase.strip())}(?![\w-])"
        part = re.escape(phrase.strip()) if re.search(f"[{UNSPACED}]", phrase) else whole
        return " ".join(re.sub(part, " ", prompt, flags=re.IGNORECASE).split())
    return _join(tokens)


def things(prompt: str) -> list[str]:
    """The nouns of a prompt that name things: not what says where they are (“in a park”), nor how they are drawn."""
    tokens, found = _cut(prompt), []
    start = 0
    while start < len(tokens):
        length = _length_of_phrase(tokens, start)
        if not length:
            start += 1
            continue
        end = start + length
        joined = _connector_before(tokens[:start])
        placed = bool(joined) and _key(joined) in PLACES
        if (
            not placed
            and _key(tokens[end : end + 1]) not in OF
            and tokens[end - 1].lower() not in DETERMINERS
        ):
            found.append(tokens[end - 1])
        start = end
    return found


def _take_out(tokens: list[str], first: int, last: int) -> list[str]:
    """The tokens without the thing whose noun stands at [first, last)."""
    if last < len(tokens) and not _ends_phrase(tokens, last):
        # The word says more of another one (“cat” of a cat toy, “red” of a red cat): it goes alone
        rest = tokens[:first] + tokens[last:]
        if first and rest[first - 1].lower() in ("a", "an"):
            rest[first - 1] = "an" if rest[first][0].lower() in "aeiou" else "a"
        return rest
    start, end = _begin_of_phrase(tokens, first), _end_of_modifiers(tokens, last)
    before, after = tokens[:start], tokens[end:]
    ahead, behind = _connector_before(before), _connector_after(after)
    joins = bool(behind) and _key(behind) in AND | BESIDE
    if not before[: len(before) - len(ahead)]:
        # It came first: what joined the next thing to it goes
        return after[len(behind) :] if joins else after
    if joins and _key(ahead) == "," and _key(behind) in AND:
        return before[:-1] + after  # “a cat, a dog and a bird”
    if joins and _takes_its_place(ahead, behind, after[len(behind) :]):
        return before + after[len(behind) :]
    return before[: len(before) - len(ahead)] + after


def _takes_its_place(ahead: Sequence[str], behind: Sequence[str], following: Sequence[str]) -> bool:
    """Whether the thing behind the connector `behind` stands as well behind the connector `ahead`."""
    if not ahead or not following or _key(following[:1]) in PLACES | AND | OF:
        return False
    if any(token.lower() in WEARING or _is_verb(token) for token in ahead):
        return _key(behind) in AND and _noun(following) in WORN
    if _key(behind) in AND:
        return _key(behind) != "," or following[0].lower() in DETERMINERS
    return _key(ahead) in OF | BESIDE | AND


def _begin_of_phrase(tokens: Sequence[str], noun: int) -> int:
    """Where the phrase of a noun begins: at its article, or behind what cannot belong to it."""
    start = noun
    for place in range(noun - 1, -1, -1):
        word = tokens[place].lower()
        if word in DETERMINERS:
            # Of “two of the cats” all goes
            return place
        if _is_boundary(tokens, place):
            break
        start = place
    else:
        return start
    return start


def _is_boundary(tokens: Sequence[str], place: int) -> bool:
    """Whether no phrase goes on to the left across this word."""
    word = tokens[place].lower()
    if word in AND | BESIDE | PLACES | OF | WEARING | STOPS | VERBS or word in (
        "next",
        "top",
        "front",
        "that",
    ):
        return True
    before = tokens[place - 1].lower() if place else ""
    # “a dog chasing cats” against “a sleeping cat”
    return _is_verb(word) and bool(before) and before not in DETERMINERS | ADJECTIVES | AND


def _is_verb(word: str) -> bool:
    """Whether a word is what a thing does: “sitting”."""
    return len(word) > 4 and word.lower().endswith("ing") and word.lower() not in NOUNS


def _ends_phrase(tokens: Sequence[str], place: int) -> bool:
    """Whether a phrase ends before this word."""
    word = tokens[place].lower()
    known = AND | BESIDE | PLACES | OF | WEARING | STOPS | VERBS | DETERMINERS
    return word in known or _is_verb(word) or word in ("next", "close", "together", "that", "who", "which")


def _end_of_modifiers(tokens: Sequence[str], end: int) -> int:
    """Where what belongs to a noun ends: what it does and what it wears."""
    first = end
    while end < len(tokens):
        word = tokens[end].lower()
        if word in ("that", "who", "which") or (word not in WEARING and (word in VERBS or _is_verb(word))):
            end += 1  # “that”, “sitting”: where it does so is what is left
            continue
        worn = word in WEARING or word == "with" or (word == "and" and end > first)
        length = _length_of_phrase(tokens, end + 1)
        if not worn or not length:
            break
        noun = tokens[end + length].lower()
        if word not in WEARING and noun not in WORN:
            break
        end += 1 + length
    return end


def _length_of_phrase(tokens: Sequence[str], start: int) -> int:
    """How many tokens the phrase of a thing has that begins here; 0 if none does."""
    length = 0
    while start + length < len(tokens) and (
        tokens[start + length].lower() in DETERMINERS or not _ends_phrase(tokens, start + length)
    ):
        if length and tokens[start + length].lower() in DETERMINERS:
            break
        length += 1
    return length


def _noun(tokens: Sequence[str]) -> str:
    """The last word of the phrase that tokens begin with."""
    length = _length_of_phrase(tokens, 0)
    return tokens[length - 1].lower() if length else ""


def _connector_before(before: Sequence[str]) -> list[str]:
    """The last words that join what follows: “next to”, “wearing”, “sitting on”, “in front of”, “there is”."""
    length = 0
    while length < len(before):
        for words in (3, 2, 1):
            some = before[len(before) - length - words : len(before) - length]
            if len(some) == words and " ".join(some).lower() in JOINING:
                length += words
                break
        else:
            place = len(before) - 1 - length
            if _is_verb(before[place]) and place and _is_boundary(before, place):
                length += 1
                continue
            break
        if _key(some) in OF:  # “a photo of”: what stands before is whole
            break
    return list(before[len(before) - length :])


def _connector_after(after: Sequence[str]) -> list[str]:
    """The first words that join a further thing."""
    joined: list[str] = []
    while len(joined) < len(after):
        rest = after[len(joined) :]
        words = next((n for n in (2, 1) if " ".join(rest[:n]).lower() in AND | BESIDE), 0)
        if not words:
            break
        joined += rest[:words]
    return joined


def _key(tokens: Sequence[str]) -> str:
    """Words of a connector in lower case; of several connectors the last."""
    words = [token.lower() for token in tokens]
    for length in (3, 2):
        if " ".join(words[-length:]) in BESIDE | PLACES:
            return " ".join(words[-length:])
    return words[-1] if words else ""


def _cut(text: str) -> list[str]:
    """Words and punctuation apart."""
    return re.findall(r"[,;.!?:]+(?=\s|$)|(?:[^\s,;.!?:]|[,;.!?:](?!\s|$))+", text)


def _join(tokens: Sequence[str]) -> str:
    """The tokens as text: no punctuation but the last stop is left without words before it."""
    text = " ".join(tokens)
    text = re.sub(r"\s+([,;.!?:])", r"\1", text)
    text = re.sub(r"([,;])(?:\s*[,;])+", r"\1", text)
    return re.sub(r"^[\s,;.!?:]+|[\s,;]+$", "", text)
