"""A thing's phrase in a prompt, and the prompt without it. No heavy imports.

    remove_thing("a cat wearing a crown next to a dog in a park", "cat")    "a dog in a park"
    remove_thing("a dog next to a small black cat in a park", "cat")        "a dog in a park"
    remove_thing("a watercolor of a cat in a park", "cat")                  "a watercolor in a park"

No parser: English captions are short, and closed lists of words (articles, prepositions, things that are worn) say
where a phrase begins, what belongs to it and what joins it to its neighbours.
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
AND = frozenset(["and", "or", "&", ",", ";", "plus", "—", "–", "-"])
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
PARTICIPLES = frozenset([  # that follow a thing and say how or where it is
    "parked", "perched", "curled", "dressed", "clad", "covered", "filled", "surrounded", "seated", "seen", "made",
    "placed", "located", "decorated", "topped", "tied", "held", "worn", "hung", "mounted", "wrapped", "hidden",
    "stretched", "crouched", "tucked", "lined", "stacked", "built", "carved", "painted", "drawn", "lit",
    "illuminated", "framed", "set", "shown", "posed", "pictured", "followed", "ridden", "driven", "pulled",
])  # fmt: skip
PARTICLES = frozenset(["up", "down", "out"])  # “curled up”
MEDIA = frozenset([  # which show the thing after “of”
    "photo", "photograph", "picture", "image", "painting", "drawing", "sketch", "watercolor", "portrait", "rendering",
    "illustration", "etching", "engraving", "view", "shot", "close-up",
])  # fmt: skip
HOLDING = frozenset([  # which hold or count the thing after “of”
    "plate", "bowl", "cup", "glass", "mug", "bottle", "jar", "pot", "vase", "basket", "box", "bag", "crate", "tray",
    "bucket", "piece", "slice", "pile", "heap", "stack", "bunch", "bouquet", "pair", "group", "row", "herd", "flock",
    "crowd", "field",
])  # fmt: skip
POSSESSIVES = frozenset(["its", "his", "her", "their", "my", "your"])
PRONOUNS = frozenset(["it", "them", "him"])
BODY = frozenset([  # where things that are worn or held are
    "mouth", "beak", "head", "neck", "hand", "hands", "arm", "arms", "back", "shoulder", "shoulders", "lap", "face",
    "nose", "ear", "ears", "eyes", "hair", "wrist", "waist", "finger", "fingers", "paw", "paws", "claws", "feet",
    "legs", "tail", "teeth", "body", "side",
])  # fmt: skip
SIDES = frozenset([  # of an image
    "left", "right", "foreground", "background", "middle", "center", "centre", "corner", "top", "bottom", "distance",
])  # fmt: skip
POSSESSIVE = re.compile(r"(?<=\w)['’]s$|(?<=s)['’]$", re.IGNORECASE)  # the mark of “the cat's”, “the dogs'”
WEIGHTED = re.compile(r"\(([^()]*?)(?::\s*\d*\.?\d+)?\)")  # in other programs' prompts
NOUNS = frozenset([  # that end in -ing or -ed and are no verbs
    "drawing", "painting", "rendering", "etching", "engraving", "building", "ceiling", "clothing", "earring",
    "evening", "morning", "lightning", "pudding", "dumpling", "duckling", "railing", "string", "spring", "swing",
    "thing", "wedding", "awning", "breed", "steed", "thoroughbred", "seaweed", "tweed", "hundred", "moped", "flatbed",
])  # fmt: skip

JOINING = AND | BESIDE | PLACES | OF | WEARING | VERBS | {"there", "that", "who", "which"}


def names_thing(phrase: str) -> bool:
    """Whether a phrase has a word that can name a thing, unlike articles and words that join things (“in”)."""
    joins = JOINING | DETERMINERS | STOPS | {word for words in JOINING for word in words.split()}
    return any(token.lower() not in joins for token in _tokenize(phrase))


def remove_thing(prompt: str, phrase: str) -> str:
    """The prompt without every occurrence of a phrase (in any case) that names a thing, with its article, adjectives,
    what it wears, and what joins it to the rest. "" where nothing is left; the prompt itself where it is not in it.
    """
    phrase_tokens = [token.lower() for token in _tokenize(phrase)]
    if not phrase_tokens:
        return prompt
    tokens = _tokenize(_open_brackets(prompt, phrase))
    removed = False
    for first in range(len(tokens) - len(phrase_tokens), -1, -1):
        candidate = [token.lower() for token in tokens[first : first + len(phrase_tokens)]]
        if candidate == phrase_tokens or (
            candidate[-1:] and [*candidate[:-1], re.sub(r"['’]s?$", "", candidate[-1])] == phrase_tokens
        ):
            tokens = _take_out(tokens, first, first + len(phrase_tokens))
            removed = True
    # As in a language without spaces; never a part of another word, as of “cats” or “cat-like”
    if not removed:
        part = re.escape(phrase.strip())
        if re.search(f"[{UNSPACED}]", phrase):
            return " ".join(re.sub(part, "", prompt, flags=re.IGNORECASE).split())
        return " ".join(re.sub(rf"(?<![\w-]){part}(?![\w-])", " ", prompt, flags=re.IGNORECASE).split())
    return _detokenize(tokens)


def _open_brackets(prompt: str, phrase: str) -> str:
    """The prompt without the brackets around a phrase, with or without a weight: “(a cat:1.2)”, “(with a hat)”."""
    brackets = re.compile(
        rf"\(([^()]*(?<![\w-]){re.escape(phrase.strip())}(?![\w-])[^()]*?)(?::\s*\d*\.?\d+)?\)", re.IGNORECASE
    )
    for _ in range(3):  # ((cat))
        prompt = brackets.sub(r"\1", prompt)
    return prompt


def find_things(prompt: str) -> list[str]:
    """The nouns of a prompt that name things, without places (“in a park”) and words of how they are drawn."""
    tokens, nouns = _tokenize(WEIGHTED.sub(r"\1", prompt)), []
    start = 0
    while start < len(tokens):
        length = _measure_phrase(tokens, start)
        if not length:
            start += 1
            continue
        end = start + length
        joined = _find_connector_before(tokens[:start])
        placed = bool(joined) and _key(joined) in PLACES
        if not placed and _key(tokens[end : end + 1]) not in OF and names_thing(tokens[end - 1]):
            nouns.append(tokens[end - 1])
        start = end
    return nouns


def _take_out(tokens: list[str], first: int, last: int) -> list[str]:
    """The tokens without the thing whose noun stands at [first, last)."""
    if last < len(tokens) and not _ends_phrase(tokens, last):
        # The word describes the next one (“cat” of a cat toy, “red” of a red cat): it is removed alone
        remaining = tokens[:first] + tokens[last:]
        if first and remaining[first - 1].lower() in ("a", "an"):
            remaining[first - 1] = "an" if remaining[first][0].lower() in "aeiou" else "a"
        return remaining

    # The whole phrase: article and adjectives, “of …”, what it wears or where it is
    start, end = _find_phrase_start(tokens, first), _find_modifiers_end(tokens, last)
    if start and POSSESSIVE.search(tokens[start - 1]):  # of “the cat's hat” the cat stays
        tokens = [*tokens[: start - 1], POSSESSIVE.sub("", tokens[start - 1]), *tokens[start:]]
    while _key(tokens[end : end + 1]) in OF and (length := _measure_phrase(tokens, end + 1)):
        # “a glass of water” is removed whole, of “a painting of a cat” the cat stays
        end += 1 if tokens[end - 1].lower() in MEDIA else 1 + length
    worn = start > 0 and tokens[start - 1].lower() in WEARING | {"with"}
    end += _measure_place(tokens[end : end + 3], worn=worn)

    # The comma or “and” that joined it is removed with it, on the side where the rest still reads well
    head, tail = tokens[:start], tokens[end:]
    joint_before, joint_after = _find_connector_before(head), _find_connector_after(tail)
    joins = bool(joint_after) and _key(joint_after) in AND | BESIDE
    if not head[: len(head) - len(joint_before)]:
        # It came first: what joined the next thing to it is removed
        return tail[len(joint_after) :] if joins else tail
    if joins and _key(joint_before) == "," and _key(joint_after) in AND:
        return head[:-1] + tail  # “a cat, a dog and a bird”
    held = _key(joint_before) in OF and _key(head[: -len(joint_before)][-1:]) in HOLDING
    if held and _key(joint_after) in BESIDE:
        return head[: -len(joint_before)] + tail  # “a plate of food with a fork”
    if joins and _takes_its_place(joint_before, joint_after, tail[len(joint_after) :]):
        return head + tail[len(joint_after) :]
    return head[: len(head) - len(joint_before)] + tail


def _measure_place(tokens: Sequence[str], *, worn: bool) -> int:
    """How many tokens say where just this thing is: “on the left”, “on it”, of things worn or held “on its head”; 0 if
    none."""
    words = [token.lower() for token in tokens]
    if len(words) > 1 and words[0] in PLACES and words[1] in PRONOUNS:
        return 2
    if len(words) < 3 or words[0] not in PLACES:
        return 0
    is_side = words[1] == "the" and words[2] in SIDES
    return 3 if is_side or (worn and words[1] in POSSESSIVES and words[2] in BODY) else 0


def _takes_its_place(
    joint_before: Sequence[str], joint_after: Sequence[str], following: Sequence[str]
) -> bool:
    """Whether the thing after the connector `joint_after` also fits after the connector `joint_before`."""
    if not joint_before or not following or _key(following[:1]) in PLACES | AND | OF:
        return False
    if any(
        token.lower() in WEARING or _is_verb(joint_before, index) for index, token in enumerate(joint_before)
    ):
        return _key(joint_after) in AND and _find_noun(following) in WORN
    if _key(joint_after) in AND:
        return _key(joint_after) != "," or following[0].lower() in DETERMINERS
    return _key(joint_before) in OF | BESIDE | AND


def _find_phrase_start(tokens: Sequence[str], noun: int) -> int:
    """The index where a noun's phrase begins: at its article, or after a word that cannot belong to it."""
    start = noun
    for index in range(noun - 1, -1, -1):
        word = tokens[index].lower()
        if word in DETERMINERS:
            # “two of the cats” is one phrase
            preceding = [token.lower() for token in tokens[max(index - 2, 0) : index]]
            return (
                index - 2
                if len(preceding) == 2 and preceding[0] in DETERMINERS and preceding[1] in OF
                else index
            )
        if _is_boundary(tokens, index) or POSSESSIVE.search(word):
            break
        start = index
    else:
        return start
    return start


def _is_boundary(tokens: Sequence[str], index: int) -> bool:
    """Whether a phrase cannot extend to the left across this word."""
    word = tokens[index].lower()
    if word in AND | BESIDE | PLACES | OF | WEARING | STOPS | VERBS or word in (
        "next",
        "top",
        "front",
        "that",
    ):
        return True
    if set(word) <= STOPS:
        return True
    previous = tokens[index - 1].lower() if index else ""
    # “a dog chasing cats” against “a sleeping cat”, “a brightly painted car”
    within = previous in DETERMINERS | ADJECTIVES | AND or previous.endswith("ly")
    return _is_verb(tokens, index) and bool(previous) and not within


def _is_verb(tokens: Sequence[str], index: int) -> bool:
    """Whether a word is a participle: what a thing does (“sitting”), or what was done to it (“parked”, “chased by”)."""
    word, following = tokens[index].lower(), [token.lower() for token in tokens[index + 1 : index + 2]]
    if len(word) < 5 or word in NOUNS:
        return word in PARTICIPLES
    was_done = word.endswith("ed") and bool(following) and following[0] in BESIDE | PLACES
    return word.endswith("ing") or word in PARTICIPLES or was_done


def _ends_phrase(tokens: Sequence[str], index: int) -> bool:
    """Whether a phrase ends before this word."""
    word = tokens[index].lower()
    boundaries = AND | BESIDE | PLACES | OF | WEARING | STOPS | VERBS | DETERMINERS
    return (
        word in boundaries
        or set(word) <= STOPS
        or _is_verb(tokens, index)
        or word in ("next", "close", "together", "that", "who", "which")
    )


def _find_modifiers_end(tokens: Sequence[str], end: int) -> int:
    """The index where a noun's modifiers end: what it does and what it wears."""
    first = end
    while end < len(tokens):
        word = tokens[end].lower()
        if word in ("that", "who", "which") or (
            word not in WEARING and (word in VERBS or _is_verb(tokens, end))
        ):
            end += 1  # “that”, “sitting”: the place that follows stays in the prompt
            end += end < len(tokens) and tokens[end].lower() in PARTICLES
            continue
        worn = word in WEARING or word == "with" or (word == "and" and end > first)
        length = _measure_phrase(tokens, end + 1)
        if not worn or not length:
            break
        noun = tokens[end + length].lower()
        if word not in WEARING and noun not in WORN:
            break
        end += 1 + length
    return end


def _measure_phrase(tokens: Sequence[str], start: int) -> int:
    """How many tokens the phrase of a thing has that begins at `start`; 0 if none does."""
    length = 0
    while start + length < len(tokens) and (
        tokens[start + length].lower() in DETERMINERS or not _ends_phrase(tokens, start + length)
    ):
        if length and tokens[start + length].lower() in DETERMINERS:
            break
        length += 1
    return length


def _find_noun(tokens: Sequence[str]) -> str:
    """The last word of the phrase at the beginning of these tokens."""
    length = _measure_phrase(tokens, 0)
    return tokens[length - 1].lower() if length else ""


def _find_connector_before(tokens: Sequence[str]) -> list[str]:
    """The last words that join what follows: “next to”, “wearing”, “sitting on”, “in front of”, “there is”."""
    length = 0
    while length < len(tokens):
        for words in (3, 2, 1):
            candidate = tokens[len(tokens) - length - words : len(tokens) - length]
            if len(candidate) == words and " ".join(candidate).lower() in JOINING:
                length += words
                break
        else:
            index = len(tokens) - 1 - length
            if _is_verb(tokens, index) and index and _is_boundary(tokens, index):
                length += 1
                continue
            break
        if _key(candidate) in OF:  # “a photo of”: the words before it are a phrase of their own
            break
    return list(tokens[len(tokens) - length :])


def _find_connector_after(tokens: Sequence[str]) -> list[str]:
    """The first words that join a further thing."""
    joined: list[str] = []
    while len(joined) < len(tokens):
        following = tokens[len(joined) :]
        words = next((n for n in (2, 1) if " ".join(following[:n]).lower() in AND | BESIDE), 0)
        if not words:
            break
        joined += following[:words]
    return joined


def _key(tokens: Sequence[str]) -> str:
    """Words of a connector in lower case; of several connectors the last."""
    words = [token.lower() for token in tokens]
    for length in (3, 2):
        if " ".join(words[-length:]) in BESIDE | PLACES:
            return " ".join(words[-length:])
    return words[-1] if words else ""


def _tokenize(text: str) -> list[str]:
    """Words and punctuation apart."""
    return re.findall(r"[,;.!?:]+(?=\s|$)|(?:[^\s,;.!?:]|[,;.!?:](?![,;.!?:]*(?:\s|$)))+", text)


def _detokenize(tokens: Sequence[str]) -> str:
    """The tokens as text: no punctuation but the last stop is left without words before it."""
    kept: list[str] = []
    for token in tokens:
        is_stop, before = set(token) <= STOPS, set("".join(kept[-1:]))
        # Of two stops the first one stays, and a stop for a comma before it
        if is_stop and before and before <= STOPS:
            continue
        if is_stop and before and before <= {",", ";"}:
            kept.pop()
        kept.append(token)
    text = " ".join(kept)
    text = re.sub(r"\s+([,;.!?:])", r"\1", text)
    text = re.sub(r"([,;])(?:\s*[,;])+", r"\1", text)
    return re.sub(r"^[\s,;.!?:]+|[\s,;]+$", "", text)
