"""Token alignment of two prompts: which words are kept, replaced, added, removed.

Prompt-to-prompt (Hertz et al. 2022) transfers attention from a source prompt's tokens to a target prompt's. The
transfer is described by tensors, for one pair of prompts and the T positions of the encoded prompts:

    mapping      M [T_source, T_target]  column j: from which source tokens target token j takes its attention
    from_source  a [T_target]            1 where it takes it, 0 for inserted tokens, which keep their own
    weight       e [T_target]            how strongly a word counts, 1 unless set
    window       α [S, T_target]         1 at the steps where the attention is taken from the source

Replacing, refining and reweighting are not modes to choose: replaced words have shares in M, inserted ones have
a = 0, weighted ones e ≠ 1, in any combination. Words are what the tokenizer says they are, never `split(" ")`, with
punctuation apart; of Chinese and Japanese, which put no spaces between words, each token is one, and a row of kana.
Where a model reads a prompt with several tokenizers, one behind the other (`TextSegment`), a word's tokens are those
of all of them, and each takes attention from its own change.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from backbone.adapters.concept import LETTER
from backbone.families.base import TextSegment
from backbone.io.console import UserError
from backbone.io.prompts import compose

EMOJI = "\ufe0f"  # variation selector: the character before it is an emoji
TYPOGRAPHY = str.maketrans("’‘ʼ‐‑", "'''--")  # typographic apostrophes and hyphens
SCRIPTS = {  # of Chinese and Japanese, written without spaces between words
    "han": "\u2e80-\u2fdf\u3005-\u3007\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff",
    "hiragana": "\u3041-\u309f",
    "katakana": "\u30a0-\u30ff\u31f0-\u31ff",  # with its mark of a long vowel
}
ANY_SCRIPT = f"[{''.join(SCRIPTS.values())}]"

Change = Literal["kept", "replaced", "added", "removed"]
Window = tuple[float, float]
"""From where to where on the way down, as shares of the steps: (0, 0.8) is the first four fifths."""


@dataclass(frozen=True)
class Word:
    """A word as the first tokenizer cuts it: its text in lower case, and where its tokens stand."""

    text: str
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Section:
    """Positions [first, last) of an encoded prompt that one tokenizer filled.

    words  the position of the first word's first token: the tokens before it begin every prompt
    end    the position of the token that ends the prompt; `last` where it was cut off. Behind it there is padding
    tail   how many tokens end the prompt: one, or those of a chat's template
    """

    first: int
    words: int
    end: int
    last: int
    tail: int = 1


@dataclass(frozen=True)
class TokenizedPrompt:
    """An encoded prompt: its words, and the sections that its tokens lie in."""

    text: str
    words: tuple[Word, ...]
    sections: tuple[Section, ...]

    @property
    def length(self) -> int:
        """T, with padding."""
        return self.sections[-1].last

    def find(self, phrase: str) -> tuple[Word, ...]:
        """The words of every occurrence of the phrase (one word or more); empty without any."""
        letters = _plainly("".join(compose(phrase).lower().split()))
        matches: list[Word] = []
        for start in range(len(self.words)):
            text = ""
            for end in range(start, len(self.words)):
                text += _plainly(self.words[end].text)
                if text == letters:
                    matches += self.words[start : end + 1]
                if len(text) >= len(letters):
                    break
        return tuple(dict.fromkeys(matches))


def _plainly(text: str) -> str:
    """A text with ASCII apostrophes and hyphens."""
    return text.translate(TYPOGRAPHY)


@dataclass(frozen=True)
class Span:
    """Consecutive words with one change; one side is empty where words were added or removed."""

    change: Change
    source: tuple[Word, ...]
    target: tuple[Word, ...]


@dataclass(frozen=True)
class Alignment:
    """A source and a target prompt as spans of words, in reading order."""

    source: TokenizedPrompt
    target: TokenizedPrompt
    spans: tuple[Span, ...]

    @cached_property
    def mapping(self) -> Tensor:
        """M [T_source, T_target]: entry (i, j) is the share of source token i's attention that target token j takes.

        Words of equal token counts take each other's tokens one by one; otherwise all the attention of the source's
        tokens is spread evenly over the target's. The tokens that begin and end a prompt take each other's, padding
        what stands at its own position.
        """
        mapping = torch.zeros(self.source.length, self.target.length)
        # Section by section: what one tokenizer cut takes attention from its own kind only
        for source, target in zip(self.source.sections, self.target.sections, strict=True):
            for span in self.spans:
                for old, new in _token_pairs(span):
                    before, after = _positions_in(source, old), _positions_in(target, new)
                    if len(before) == len(after):
                        mapping[before, after] = 1
                    elif before and after:
                        mapping[torch.tensor(before)[:, None], torch.tensor(after)] = 1 / len(after)
            # End-of-text tokens take each other's attention, unless a prompt was cut off before its own
            tail = source.tail if source.tail == target.tail else 1
            for place in range(tail):
                if source.end + place < source.last and target.end + place < target.last:
                    mapping[source.end + place, target.end + place] = 1
            # Begin-of-text tokens and the padding common to both prompts stay at their positions
            padding = range(max(source.end, target.end) + tail, source.last)
            for position in (*range(source.first, source.words), *padding):
                mapping[position, position] = 1
        return mapping

    @cached_property
    def from_source(self) -> Tensor:
        """a [T_target]: 1 where a token takes the source's attention, 0 where it keeps its own."""
        return (self.mapping != 0).any(0).float()

    def changes(self) -> Iterator[Span]:
        """The spans that differ between the prompts."""
        return (span for span in self.spans if span.change != "kept")

    def find_both(self, phrase: str) -> tuple[tuple[Word, ...], tuple[Word, ...]]:
        """The words that a phrase names in the source and in the target.

        A word that stands in one prompt alone brings what took its place, or whose place it took, in the other. Both
        are empty where the phrase stands in neither.
        """
        source, target = self.source.find(phrase), self.target.find(phrase)
        for span in self.spans:
            if span.change == "replaced" and not target and set(span.source) & set(source):
                return source, span.target
            if span.change == "replaced" and not source and set(span.target) & set(target):
                return span.source, target
        return source, target

    def __str__(self) -> str:
        return self.describe({})

    def describe(self, placeholders: Mapping[str, str]) -> str:
        """Three lines: the source's words, what became of them, the target's words; a fourth where they are the same.

        `placeholders` maps words that the model reads, as a concept's, to what the user writes.
        """
        columns = [["source", "", "target"]]  # of the table, three cells each
        for span in self.spans:
            label = "" if span.change == "kept" else str(span.change)
            if span.change == "replaced":
                before = len(_positions_in(self.source.sections[0], _positions(span.source)))
                after = len(_positions_in(self.target.sections[0], _positions(span.target)))
                label += f" ({before}→{after} tokens)" if before != after else ""
            texts = [
                restore_placeholders(_text_of(words), placeholders) for words in (span.source, span.target)
            ]
            columns.append([texts[0], label, texts[1]])
        widths = [max(map(len, column)) for column in columns]
        padded = [
            [cell.ljust(width) for cell in column] for column, width in zip(columns, widths, strict=True)
        ]
        lines = [" │ ".join(line).rstrip() for line in zip(*padded, strict=True)]
        if not any(self.changes()):
            lines.append("Both prompts say the same, so no word changes anything but by its weight.")
        return "\n".join(lines)


def restore_placeholders(text: str, placeholders: Mapping[str, str]) -> str:
    """A text with the words that the model reads, in any case, replaced by the user's placeholders."""
    for words, token in placeholders.items():
        text = whole_words(words).sub(token.replace("\\", r"\\"), text)
    return text


def whole_words(phrase: str) -> re.Pattern[str]:
    """The pattern of a phrase in any case, as whole words.

    In scripts without spaces it matches anywhere.
    """
    return re.compile(rf"(?<!{LETTER}){re.escape(phrase)}(?!{LETTER})", re.IGNORECASE)


def read_prompt(tokenizer: Any, text: str) -> TokenizedPrompt:
    """A prompt tokenized by a tokenizer of `transformers`, padded and truncated to its model's length.

    Raises `UserError` for a prompt without words.
    """
    return tokenize_prompt([TextSegment(tokenizer, tokenizer.model_max_length)], text)


def tokenize_prompt(segments: Sequence[TextSegment], text: str) -> TokenizedPrompt:
    """A prompt tokenized for a model whose text tokens are these segments, concatenated.

    The first tokenizer defines the words; each piece of the others belongs to the word that it covers most of.

    Raises `UserError` for a prompt without words.
    """
    text = compose(text)
    cuts: list[_Cut] = []
    sections: list[Section] = []
    for segment in segments:
        section, section_cuts = _tokenize_section(segment, text, sections[-1].last if sections else 0)
        cuts = _merge_tokenizers(cuts, section_cuts)
        sections.append(section)
    if not cuts:
        raise UserError("A prompt is empty. Say in words what the picture shows and what it should show.")
    words = tuple(Word(cut.text, tuple(cut.positions)) for cut in cuts)
    return TokenizedPrompt(text, words, tuple(sections))


def align(
    source: TokenizedPrompt, target: TokenizedPrompt, *, swaps: Sequence[tuple[str, str]] = ()
) -> Alignment:
    """The alignment that keeps the most words, in order, and among those has the fewest changes.

    Words between two kept ones take each other's place: one by one where both prompts have as many there, else all
    of them together. `swaps` are phrases (of the source, of the target) that take each other's place whatever stands
    around them.

    Raises `UserError` when the prompts share nothing, or a swap cannot be made.
    """
    first, second = _units(source, [swap[0] for swap in swaps]), _units(target, [swap[1] for swap in swaps])
    matches = _common([key for _, key in first], [key for _, key in second])
    _check_matches(source, target, swaps, matched={first[i][1] for i, _ in matches})
    spans: list[Span] = []
    i = j = 0
    for i_next, j_next in [*matches, (len(first), len(second))]:
        # The words between the last match and this one took each other's place, or were added or removed
        spans += _spans_between(
            [word for words, _ in first[i:i_next] for word in words],
            [word for words, _ in second[j:j_next] for word in words],
        )
        # The match itself; behind the last one there is none
        if i_next < len(first):
            change: Change = "kept" if isinstance(first[i_next][1], str) else "replaced"
            spans.append(Span(change, first[i_next][0], second[j_next][0]))
        i, j = i_next + 1, j_next + 1
    return Alignment(source, target, tuple(_merge_kept(spans)))


def _check_matches(
    source: TokenizedPrompt,
    target: TokenizedPrompt,
    swaps: Sequence[tuple[str, str]],
    *,
    matched: Set[str | tuple[str, int]],
) -> None:
    """`UserError` for a swap that is not among the matched keys, and for prompts that share no word."""
    for number, (old, new) in enumerate(swaps):
        if ("swap", number) not in matched:
            raise UserError(
                f"“{old}” cannot be swapped for “{new}”: other swaps stand in another order. Leave one of them out."
            )
    shared = any(character.isalnum() for key in matched if isinstance(key, str) for character in key)
    if not shared and not swaps:
        raise UserError(
            f"The prompts “{source.text}” and “{target.text}” share no words, so nothing says what should stay. "
            "Describe the picture in both and change only the words that should change, say --swap OLD=NEW, or use "
            "edit flow-edit, which compares no words."
        )


def require(prompts: Sequence[TokenizedPrompt], phrase: str) -> None:
    """Raise `UserError` for a phrase that is in none of the prompts; it names the most similar word."""
    if any(prompt.find(phrase) for prompt in prompts):
        return
    words = sorted({word.text for prompt in prompts for word in prompt.words if word.text.isalnum()})
    matches = difflib.get_close_matches(phrase.lower(), words, n=1)
    remedy = f"Did you mean “{matches[0]}”?" if matches else f"Choose among {', '.join(words)}."
    parts = [part.strip() for part in re.split("[,;|]", phrase) if part.strip()]
    if len(parts) > 1 and all(any(prompt.find(part) for prompt in prompts) for part in parts):
        remedy = f"Say each by itself: the option stands once for “{parts[0]}”, and again for “{parts[1]}”."
    searched = "the prompt" if len(prompts) == 1 else "any of the prompts"
    shown = ", ".join(f"“{text}”" for text in dict.fromkeys(prompt.text for prompt in prompts[:3]))
    raise UserError(f"The word “{phrase}” is not in {searched} {shown}. {remedy}")


def token_weights(prompt: TokenizedPrompt, weights: Mapping[str, float]) -> Tensor:
    """e [T]: a phrase's weight at its tokens, 1 elsewhere. Phrases that are not in the prompt do nothing."""
    e = torch.ones(prompt.length)
    for phrase, weight in weights.items():
        for word in prompt.find(phrase):
            e[list(word.positions)] = weight
    return e


def token_windows(
    prompt: TokenizedPrompt, steps: int, default: Window, windows: Mapping[str, Window]
) -> Tensor:
    """α [S, T]: 1 at the steps inside a token's window, 0 outside; phrases may have windows of their own."""
    alpha = steps_inside(steps, default)[:, None].repeat(1, prompt.length)
    for phrase, window in windows.items():
        for word in prompt.find(phrase):
            alpha[:, list(word.positions)] = steps_inside(steps, window)[:, None]
    return alpha


def steps_inside(steps: int, window: Window) -> Tensor:
    """[S]: 1 at the steps that begin inside the window, 0 at the others."""
    start, end = window
    share = torch.arange(steps, dtype=torch.float64) / steps
    return ((share >= start - 1e-9) & (share < end - 1e-9)).float()


def token_mask(words: Sequence[Word], length: int) -> Tensor:
    """[T]: 1 at the tokens of these words."""
    mask = torch.zeros(length)
    for word in words:
        mask[list(word.positions)] = 1
    return mask


# Helpers ----------------------------------------------------------------------------------------------------


@dataclass
class _Cut:
    """A word while a prompt is read: its text, the characters [start, end) that it covers, its tokens' positions."""

    text: str
    start: int
    end: int
    positions: list[int]


def _tokenize_section(segment: TextSegment, prompt: str, first: int) -> tuple[Section, list[_Cut]]:
    """One segment of a prompt, whose tokens begin at position `first`."""
    last = first + segment.tokens
    empty = Section(first, last, last, last)
    if segment.tokenizer is None:
        return empty, []

    # A chat template may surround the prompt; the tokenizer's offsets say where each token's text is
    words, (before, after) = segment.preprocess(prompt), segment.frame
    text = before + words + after
    encoding = segment.tokenizer(
        text, padding="max_length", truncation=True, max_length=segment.tokens + segment.dropped, verbose=False,
        return_offsets_mapping=True,
    )  # fmt: skip

    # Tokens → words: one cut for each word of the prompt, with the positions of its tokens
    cuts: list[_Cut] = []
    number = None  # of the tokenizer's word that the last cut is of
    waiting: list[int] = []  # tokens of spaces, which belong to the word behind them
    tail = 0  # tokens of the template behind the prompt
    for position, (word, (start, end)) in enumerate(
        zip(encoding.word_ids(), encoding["offset_mapping"], strict=True), first - segment.dropped
    ):
        if word is None and not (after and end > start):  # begin, end, padding
            continue
        if start >= len(before) + len(words) and after:
            tail += 1
            continue
        if end <= len(before) and before:
            continue
        waiting.append(position)
        # Some tokenizers count the space before a word as the word's; a token of nothing else waits for the next one
        start += len(text[start:end]) - len(text[start:end].lstrip())
        if start >= end:
            continue
        is_new_word = word != number and not (cuts and _is_same_word(text, cuts[-1].end, start))
        if is_new_word or (start >= cuts[-1].end and _is_word_boundary(text, start)):
            cuts.append(_Cut("", start, end, []))
        number = word
        cuts[-1].positions += waiting
        cuts[-1].end, waiting = max(end, cuts[-1].end), []

    # Texts and places in the prompt itself
    for cut in cuts:
        cut.text = text[cut.start : cut.end].lower()
        cut.start, cut.end = cut.start - len(before), cut.end - len(before)
    if not cuts:
        return empty, []
    return Section(first, cuts[0].positions[0], cuts[-1].positions[-1] + 1, last, max(tail, 1)), cuts


def _is_same_word(text: str, end: int, start: int) -> bool:
    """Whether what begins at a character is of the word that ends before `end`, though a tokenizer counts another.

    CLIP's cuts at the marks on and around letters: vowels of Hindi and Thai, and the dot that it makes of a capital İ;
    and behind a text program's apostrophe, though not behind a keyboard's (“cat’s”).
    """
    if start != end:
        return start < end
    before, after = text[end - 1].lower()[-1], text[start]
    if before in "’ʼ" and after.isalnum():
        return text[max(end - 2, 0) : end - 1].isalnum()
    return _is_mark(after) or (_is_mark(before) and before != EMOJI and after.isalnum())


def _is_word_boundary(text: str, at: int) -> bool:
    """Whether a word ends before this character though no space does it: between letters and punctuation.

    Tokenizers of T5's change cut at spaces alone. What follows an apostrophe inside a word stays with it ("dog", "'s"),
    and marks stay with what they stand on.
    """
    before = next((one for one in reversed(text[:at]) if not _is_mark(one)), "")
    if before in ("'", "’") and text[max(at - 2, 0) : at - 1].isalnum():
        return False
    if not before.strip() or _is_mark(text[at]):
        return False
    return before.isalnum() != text[at].isalnum() or _is_between_scripts(before, text[at])


def _is_between_scripts(before: str, character_after: str) -> bool:
    """Whether a word may end between two characters of an unspaced text: at each of Han, and at the ends of kana."""
    first, second = (
        next((name for name, its in SCRIPTS.items() if re.match(f"[{its}]", character)), "")
        for character in (before, character_after)
    )
    return "han" in (first, second) or first != second


def _is_mark(character: str) -> bool:
    """Whether a character is a combining mark."""
    return unicodedata.category(character).startswith("M")


def _merge_tokenizers(words: list[_Cut], others: list[_Cut]) -> list[_Cut]:
    """The words with the tokens of what another tokenizer cut; what covers none of them is a word of its own."""
    alone = []
    for other in others:
        shared = [min(word.end, other.end) - max(word.start, other.start) for word in words]
        if max(shared, default=0) > 0:
            words[shared.index(max(shared))].positions += other.positions
        else:
            alone.append(other)
    return [*words, *alone]


def _positions_in(section: Section, positions: Sequence[int]) -> list[int]:
    """Those of the positions that lie in a section."""
    return [position for position in positions if section.first <= position < section.last]


_Unit = tuple[tuple[Word, ...], str | tuple[str, int]]
"""Words that are aligned as one, and the key by which they match: their text, or the number of a swap."""


def _units(prompt: TokenizedPrompt, phrases: Sequence[str]) -> list[_Unit]:
    """The words of a prompt, each phrase's first place as one unit."""
    units: list[_Unit] = [((word,), _plainly(word.text)) for word in prompt.words]
    for number, phrase in enumerate(phrases):
        require([prompt], phrase)
        if phrase.lower() in (other.lower() for other in phrases[:number]):
            raise UserError(f"“{phrase}” stands in two swaps. Leave one of them out.")
        words = _first_place(prompt, phrase)
        start = next((k for k, unit in enumerate(units) if unit[0] == words[:1]), None)
        if start is None or tuple(w for unit in units[start : start + len(words)] for w in unit[0]) != words:
            raise UserError(f"“{phrase}” overlaps another swap. Leave one of them out.")
        units[start : start + len(words)] = [(words, ("swap", number))]
    return units


def _first_place(prompt: TokenizedPrompt, phrase: str) -> tuple[Word, ...]:
    matches = prompt.find(phrase)
    wanted, text = _plainly("".join(compose(phrase).lower().split())), ""
    for count, word in enumerate(matches, start=1):
        text += _plainly(word.text)
        if text == wanted:
            return matches[:count]
    raise AssertionError(phrase)


def _common(first: Sequence[Any], second: Sequence[Any]) -> list[tuple[int, int]]:
    """Pairs of equal keys in order: the most of them, then the fewest interruptions, then the earliest.

    Needleman & Wunsch 1970 with gaps that cost once however long they are; a swap outweighs all words.
    """
    # best[i, j, inside a gap] = ((matches, −gaps), move) of the best alignment of first[i:] and second[j:], and its
    # first move: match both, skip one of the first, skip one of the second, or be done
    end, match, skip_first, skip_second = range(4)
    best: dict[tuple[int, int, bool], tuple[tuple[int, int], int]] = {}

    # Backwards from the ends of both
    for i in range(len(first), -1, -1):
        for j in range(len(second), -1, -1):
            for inside in (False, True):
                options = []
                if i == len(first) and j == len(second):
                    options.append(((0, 0), end))
                if i < len(first) and j < len(second) and first[i] == second[j]:
                    (count, gaps), _ = best[i + 1, j + 1, False]
                    options.append(((count + (1 if isinstance(first[i], str) else 1000), gaps), match))
                for move, (k, m) in ((skip_first, (i + 1, j)), (skip_second, (i, j + 1))):
                    if k <= len(first) and m <= len(second):
                        (count, gaps), _ = best[k, m, True]
                        options.append(((count, gaps - (not inside)), move))
                best[i, j, inside] = max(options, key=lambda option: option[0])

    # Along the best moves from the beginning
    pairs, i, j, inside = [], 0, 0, False
    while (move := best[i, j, inside][1]) != end:
        if move == match:
            pairs.append((i, j))
        i, j, inside = i + (move != skip_second), j + (move != skip_first), move != match
    return pairs


def _spans_between(source: list[Word], target: list[Word]) -> list[Span]:
    """The spans for the words between two kept ones."""
    if source and len(source) == len(target):
        return [Span("replaced", (old,), (new,)) for old, new in zip(source, target, strict=True)]
    change: Change = "replaced" if source and target else "removed" if source else "added"
    return [Span(change, tuple(source), tuple(target))] if source or target else []


def _merge_kept(spans: Sequence[Span]) -> list[Span]:
    """The spans with adjacent kept words merged into one."""
    joined: list[Span] = []
    for span in spans:
        if joined and span.change == joined[-1].change == "kept":
            joined[-1] = Span("kept", joined[-1].source + span.source, joined[-1].target + span.target)
        else:
            joined.append(span)
    return joined


def _token_pairs(span: Span) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Token positions that take each other's attention: (source's, target's)."""
    if span.change == "kept":
        yield from ((old.positions, new.positions) for old, new in zip(span.source, span.target, strict=True))
    elif span.change == "replaced":
        yield tuple(_positions(span.source)), tuple(_positions(span.target))


def _positions(words: Sequence[Word]) -> list[int]:
    return [position for word in words for position in word.positions]


def _text_of(words: Sequence[Word]) -> str:
    """Words as text; those of scripts without spaces are joined without one."""
    text = " ".join(word.text for word in words)
    return re.sub(f"(?<={ANY_SCRIPT}) (?={ANY_SCRIPT})", "", text)
