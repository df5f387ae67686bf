"""Token alignment of two prompts: which words are kept, replaced, added, removed.

Prompt-to-prompt (Hertz et al. 2022) transfers attention from a source prompt's tokens to a target prompt's. The
transfer is described by tensors, for one pair of prompts and the T positions of the encoded prompts:

    mapping      M [T_source, T_target]  column j: from which source tokens target token j takes its attention
    from_source  a [T_target]            1 where it takes attention, 0 for inserted tokens, which keep their own
    weight       e [T_target]            how strongly a word counts, 1 unless set
    window       α [S, T_target]         1 at the steps where the attention is taken from the source

Replacing, refining and reweighting are not modes to choose: replaced words have shares in M, inserted ones have
a = 0, weighted ones e ≠ 1, in any combination. Words are what the tokenizer says they are, never `split(" ")`, with
punctuation apart; of Chinese and Japanese, which put no spaces between words, each token is one, and a row of kana.
Where a model reads a prompt with several tokenizers, one after another (`TextSegment`), a word's tokens are those
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
ALIKE = {"'": "'’‘ʼ", "-": "-‐‑"}  # apostrophes and hyphens, with their typographic forms
TYPOGRAPHY = str.maketrans({form: mark for mark, forms in ALIKE.items() for form in forms})
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
        letters = _normalize_text("".join(compose(phrase).lower().split()))
        matches: list[Word] = []
        for start in range(len(self.words)):
            text = ""
            for end in range(start, len(self.words)):
                text += _normalize_text(self.words[end].text)
                if text == letters:
                    matches += self.words[start : end + 1]
                if len(text) >= len(letters):
                    break
        return tuple(dict.fromkeys(matches))


def _normalize_text(text: str) -> str:
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
        # Section by section: the words of one tokenizer take attention from their own kind only
        for source, target in zip(self.source.sections, self.target.sections, strict=True):
            for span in self.spans:
                for old, new in _pair_tokens(span):
                    old_positions, new_positions = _positions_in(source, old), _positions_in(target, new)
                    if len(old_positions) == len(new_positions):
                        mapping[old_positions, new_positions] = 1
                    elif old_positions and new_positions:
                        rows = torch.tensor(old_positions)[:, None]
                        mapping[rows, torch.tensor(new_positions)] = 1 / len(new_positions)
            # End-of-text tokens take each other's attention, unless a prompt was cut off before its own
            tail = source.tail if source.tail == target.tail else 1
            for offset in range(tail):
                if source.end + offset < source.last and target.end + offset < target.last:
                    mapping[source.end + offset, target.end + offset] = 1
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

        For a word of one prompt alone, the other side is the words that replace it. Both are empty where the phrase is
        in neither prompt.
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
        """Three lines: the source's words, their changes, the target's words; a fourth where the prompts are equal.

        `placeholders` maps words that the model reads, as a concept's, to what the user writes.
        """
        columns = [["source", "", "target"]]  # of the table, three cells each
        for span in self.spans:
            label = "" if span.change == "kept" else str(span.change)
            if span.change == "replaced":
                old_count = len(_positions_in(self.source.sections[0], _list_positions(span.source)))
                new_count = len(_positions_in(self.target.sections[0], _list_positions(span.target)))
                label += f" ({old_count}→{new_count} tokens)" if old_count != new_count else ""
            texts = [
                restore_placeholders(_join_words(words), placeholders) for words in (span.source, span.target)
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


def words_of_prompt(phrase: str) -> re.Pattern[str]:
    """The pattern of a phrase as `TokenizedPrompt.find` finds it, in any case, spacing and typography; whole words."""
    letters = [_normalize_text(letter) for letter in compose(phrase) if not letter.isspace()]
    pattern = r"\s*".join(f"[{re.escape(ALIKE.get(letter, letter))}]" for letter in letters)
    start, end = (letters[0], letters[-1]) if letters else ("", "")
    return re.compile(
        (f"(?<!{LETTER})" if re.match(LETTER, start) else "")
        + pattern
        + (f"(?!{LETTER})" if re.match(LETTER, end) else ""),
        re.IGNORECASE,
    )


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
    pieces: list[_Piece] = []
    sections: list[Section] = []
    for segment in segments:
        section, section_pieces = _tokenize_section(segment, text, sections[-1].last if sections else 0)
        pieces = _merge_tokenizers(pieces, section_pieces)
        sections.append(section)
    if not pieces:
        raise UserError("A prompt is empty. Say in words what the picture shows and what it should show.")
    words = tuple(Word(piece.text, tuple(piece.positions)) for piece in pieces)
    return TokenizedPrompt(text, words, tuple(sections))


def align(
    source: TokenizedPrompt, target: TokenizedPrompt, *, swaps: Sequence[tuple[str, str]] = ()
) -> Alignment:
    """The alignment that keeps the most words, in order, and among those has the fewest changes.

    Words between two kept ones replace each other: one by one where both prompts have equally many there, else all of
    them together. `swaps` are phrases (of the source, of the target) that replace each other wherever they stand.

    Raises `UserError` when the prompts share nothing, or a swap cannot be made.
    """
    first, second = (
        _split_units(source, [swap[0] for swap in swaps]),
        _split_units(target, [swap[1] for swap in swaps]),
    )
    matches = _match_keys([key for _, key in first], [key for _, key in second])
    _check_matches(source, target, swaps, matched={first[i][1] for i, _ in matches})
    spans: list[Span] = []
    i = j = 0
    for i_next, j_next in [*matches, (len(first), len(second))]:
        # The words between the last match and this one were replaced, added or removed
        spans += _make_spans(
            [word for words, _ in first[i:i_next] for word in words],
            [word for words, _ in second[j:j_next] for word in words],
        )
        # The match itself; after the last one there is none
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
    quoted = ", ".join(f"“{text}”" for text in dict.fromkeys(prompt.text for prompt in prompts[:3]))
    raise UserError(f"The word “{phrase}” is not in {searched} {quoted}. {remedy}")


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
class _Piece:
    """A word under construction: its text, the characters [start, end) that it covers, its tokens' positions."""

    text: str
    start: int
    end: int
    positions: list[int]


def _tokenize_section(segment: TextSegment, prompt: str, first: int) -> tuple[Section, list[_Piece]]:
    """One segment of a prompt, whose tokens begin at position `first`."""
    last = first + segment.tokens
    empty = Section(first, last, last, last)
    if segment.tokenizer is None:
        return empty, []

    # A chat template may surround the prompt; the tokenizer's offsets say where each token's text is
    body, (prefix, suffix) = segment.preprocess(prompt), segment.frame
    text = prefix + body + suffix
    encoding = segment.tokenizer(
        text, padding="max_length", truncation=True, max_length=segment.tokens + segment.dropped, verbose=False,
        return_offsets_mapping=True,
    )  # fmt: skip

    # Tokens → words: one piece for each word of the prompt, with the positions of its tokens
    pieces: list[_Piece] = []
    number = None  # the tokenizer's number of the word of the last piece
    pending: list[int] = []  # tokens of spaces, which belong to the word after them
    tail = 0  # tokens of the template after the prompt
    for position, (word, (start, end)) in enumerate(
        zip(encoding.word_ids(), encoding["offset_mapping"], strict=True), first - segment.dropped
    ):
        if word is None and not (suffix and end > start):  # begin, end, padding
            continue
        if start >= len(prefix) + len(body) and suffix:
            tail += 1
            continue
        if end <= len(prefix) and prefix:
            continue
        pending.append(position)
        # Some tokenizers count the space before a word as the word's; a token of nothing else waits for the next one
        start += len(text[start:end]) - len(text[start:end].lstrip())
        if start >= end:
            continue
        is_new_word = word != number and not (pieces and _is_same_word(text, pieces[-1].end, start))
        if is_new_word or (start >= pieces[-1].end and _is_word_boundary(text, start)):
            pieces.append(_Piece("", start, end, []))
        number = word
        pieces[-1].positions += pending
        pieces[-1].end, pending = max(end, pieces[-1].end), []

    # Texts and positions in the prompt itself
    for piece in pieces:
        piece.text = text[piece.start : piece.end].lower()
        piece.start, piece.end = piece.start - len(prefix), piece.end - len(prefix)
    if not pieces:
        return empty, []
    return Section(first, pieces[0].positions[0], pieces[-1].positions[-1] + 1, last, max(tail, 1)), pieces


def _is_same_word(text: str, end: int, start: int) -> bool:
    """Whether the character at `start` continues the word that ends before `end`, though the tokenizer begins another.

    CLIP's tokenizer cuts at marks on and around letters (vowels of Hindi and Thai, the dot that it makes of a capital
    İ), after a typographic apostrophe (“cat’s”), though not after a keyboard's, and around every digit (“10”, “4k”).
    """
    if start != end:
        return start < end
    previous, following = text[end - 1].lower()[-1], text[start]
    if previous in "’ʼ" and following.isalnum():
        return text[max(end - 2, 0) : end - 1].isalnum()
    if any(map(str.isnumeric, (previous, following))) and (previous + following).isalnum():
        return bool(re.fullmatch(f"{LETTER}{{2}}", previous + following))
    return _is_mark(following) or (_is_mark(previous) and previous != EMOJI and following.isalnum())


def _is_word_boundary(text: str, at: int) -> bool:
    """Whether a word ends before this character without a space: between letters and punctuation.

    Tokenizers like T5's cut at spaces alone. What follows an apostrophe inside a word stays with it ("dog", "'s"), and
    marks stay with their letter.
    """
    previous = next((character for character in reversed(text[:at]) if not _is_mark(character)), "")
    if previous in ("'", "’") and text[max(at - 2, 0) : at - 1].isalnum():
        return False
    if not previous.strip() or _is_mark(text[at]):
        return False
    return previous.isalnum() != text[at].isalnum() or _is_between_scripts(previous, text[at])


def _is_between_scripts(previous: str, following: str) -> bool:
    """Whether a word may end between two characters of an unspaced text: at each of Han, and at the ends of kana."""
    first, second = (
        next((name for name, characters in SCRIPTS.items() if re.match(f"[{characters}]", character)), "")
        for character in (previous, following)
    )
    return "han" in (first, second) or first != second


def _is_mark(character: str) -> bool:
    """Whether a character is a combining mark."""
    return unicodedata.category(character).startswith("M")


def _merge_tokenizers(words: list[_Piece], pieces: list[_Piece]) -> list[_Piece]:
    """The words with the tokens of another tokenizer's pieces; a piece that covers no word is a word of its own."""
    unmatched = []
    for piece in pieces:
        shared = [min(word.end, piece.end) - max(word.start, piece.start) for word in words]
        if max(shared, default=0) > 0:
            words[shared.index(max(shared))].positions += piece.positions
        else:
            unmatched.append(piece)
    return [*words, *unmatched]


def _positions_in(section: Section, positions: Sequence[int]) -> list[int]:
    """The positions that lie in a section."""
    return [position for position in positions if section.first <= position < section.last]


_Unit = tuple[tuple[Word, ...], str | tuple[str, int]]
"""Words that are aligned as one, and the key by which they match: their text, or the number of a swap."""


def _split_units(prompt: TokenizedPrompt, phrases: Sequence[str]) -> list[_Unit]:
    """The words of a prompt, with each phrase's first occurrence as one unit."""
    units: list[_Unit] = [((word,), _normalize_text(word.text)) for word in prompt.words]
    for number, phrase in enumerate(phrases):
        require([prompt], phrase)
        if phrase.lower() in (earlier.lower() for earlier in phrases[:number]):
            raise UserError(f"“{phrase}” stands in two swaps. Leave one of them out.")
        words = _find_first(prompt, phrase)
        start = next((k for k, unit in enumerate(units) if unit[0] == words[:1]), None)
        if start is None or tuple(w for unit in units[start : start + len(words)] for w in unit[0]) != words:
            raise UserError(f"“{phrase}” overlaps another swap. Leave one of them out.")
        units[start : start + len(words)] = [(words, ("swap", number))]
    return units


def _find_first(prompt: TokenizedPrompt, phrase: str) -> tuple[Word, ...]:
    matches = prompt.find(phrase)
    letters, text = _normalize_text("".join(compose(phrase).lower().split())), ""
    for count, word in enumerate(matches, start=1):
        text += _normalize_text(word.text)
        if text == letters:
            return matches[:count]
    raise AssertionError(phrase)


def _match_keys(first: Sequence[Any], second: Sequence[Any]) -> list[tuple[int, int]]:
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


def _make_spans(source: list[Word], target: list[Word]) -> list[Span]:
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


def _pair_tokens(span: Span) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Token positions that take each other's attention: (source's, target's)."""
    if span.change == "kept":
        yield from ((old.positions, new.positions) for old, new in zip(span.source, span.target, strict=True))
    elif span.change == "replaced":
        yield tuple(_list_positions(span.source)), tuple(_list_positions(span.target))


def _list_positions(words: Sequence[Word]) -> list[int]:
    return [position for word in words for position in word.positions]


def _join_words(words: Sequence[Word]) -> str:
    """Words as text; those of scripts without spaces are joined without one."""
    text = " ".join(word.text for word in words)
    return re.sub(f"(?<={ANY_SCRIPT}) (?={ANY_SCRIPT})", "", text)
