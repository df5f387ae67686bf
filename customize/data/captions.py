"""From captions to training prompts: inserting the token, and warnings about plain text and truncation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from backbone.adapters.concept import (
    PLACEHOLDER,
    Concept,
    find_foreign_placeholders,
    find_foreign_syntax,
    mentions,
    replace_tokens,
    resolve_placeholder_tokens,
)
from backbone.io.console import quote
from backbone.media.sources.record import ImageRecord
from customize.data.folders import looks_like_identifier
from customize.settings import Subject

if TYPE_CHECKING:
    from backbone.families.base import TextEncoder

FIELD = re.compile(r"\{\w+\}")  # a placeholder, or meant as one: {token}, {class}
LONG = 50  # pieces from which a caption may be longer than the 77 tokens that CLIP reads
# What is a token or more: a word, a digit, a mark, and each character of scripts without spaces
PIECES = re.compile(r"[A-Za-z]+|\d|[^\sA-Za-z\d]")


@dataclass(frozen=True)
class TrainingPrompt:
    """The training prompt of an image.

    text   with the token
    resolved  with the words that the model reads in its place
    source    the caption's file, or the image's
    """

    text: str
    resolved: str
    source: str


def write_prompt(
    picture: ImageRecord, instance: str, token: str, concept: Concept, *, noun: str = ""
) -> TrainingPrompt:
    """The training prompt of an image: its caption, the instance prompt put in front if it lacks the token.

    `{token}` and, if the class has a `noun`, `{class}` are filled in in captions too, as in the instance prompt.
    Other brackets in a caption are text. Raises `UserError` for an instance prompt with a placeholder that the concept
    does not own.
    """
    if not picture.caption:
        resolved = resolve_placeholder_tokens(instance, [concept], runs=None)
        return TrainingPrompt(instance, resolved, str(picture.path))
    caption = picture.caption
    caption = Subject("", token, noun).fill(caption) if noun else caption.replace("{token}", token)
    text = caption if mentions(caption, token) else f"{instance}, {caption}"
    return TrainingPrompt(text, replace_tokens(text, [concept]), picture.caption_source)


def describe_brackets(prompts: Sequence[TrainingPrompt], concept: Concept) -> str:
    """A sentence on text in captions that looks like a token or a placeholder and is not; "" if there is none."""
    sources: dict[str, str] = {}
    for prompt in prompts:
        for word in [
            *find_foreign_placeholders(prompt.text, concept.tokens),
            *FIELD.findall(prompt.text),
        ]:
            sources.setdefault(word, prompt.source)
    if not sources:
        return ""
    tokens = " and ".join(concept.tokens)
    examples = ", ".join(list(sources)[:5])
    first = next(iter(sources.values()))
    return f"Captions hold {examples} (first in {first}), read as plain text; the token is {tokens}."


def describe_other_word(captions: Sequence[str], token: str, noun: str = "") -> str:
    """A sentence on a trigger word that all captions contain, if none contains the token; else ""."""
    filled = [caption.replace("{token}", token) for caption in captions]
    if len(filled) < 2 or any(mentions(caption, token) for caption in filled):
        return ""
    words = [set(re.split(r"[\s,.;:!?]+", caption)) for caption in filled]
    shared = [word for word in words[0].intersection(*words[1:]) if looks_like_identifier(word)]
    if len(shared) != 1 or PLACEHOLDER.fullmatch(shared[0]) or mentions(noun, shared[0]):
        return ""
    return (
        f"All captions hold “{shared[0]}” and none the token {token}, which is put before each: both words are "
        f"learned. If {shared[0]} is the subject's own word, say --token {quote(shared[0])}."
    )


def describe_foreign_syntax(prompts: Sequence[TrainingPrompt]) -> list[str]:
    """A sentence for each kind of other trainers' syntax in captions, which is plain text here."""
    kinds: dict[str, tuple[str, str]] = {}
    for prompt in prompts:
        for excerpt, kind in find_foreign_syntax(prompt.text):
            kinds.setdefault(kind, (excerpt, prompt.source))
    return [
        f"Captions hold “{excerpt}” (first in {source}), read as plain text: {kind} are not understood."
        for kind, (excerpt, source) in kinds.items()
    ]


def describe_truncated(
    prompts: Sequence[TrainingPrompt], words: str, token: str, text_encoder: TextEncoder
) -> list[str]:
    """A sentence for each prompt that is truncated; `words` stand for the token."""
    segments = [segment for segment in text_encoder.segments if segment.tokenizer is not None]
    if not segments:
        return []
    longest = max(segments, key=lambda segment: segment.tokens)

    def count(text: str) -> int:
        return len(longest.tokenizer(longest.preprocess(text), verbose=False)["input_ids"])

    template = longest.frame[0]  # its tokens count too
    room = longest.tokens + longest.dropped - (count(template) if template else 0)
    warnings = []
    for prompt in {prompt.source: prompt for prompt in prompts}.values():
        tokens = count(prompt.resolved)
        if tokens <= room:
            continue
        position = prompt.resolved.find(words)  # of its first occurrence
        late = position >= 0 and count(prompt.resolved[: position + len(words)]) > room
        lost = f", the token {token} not among them" if late else ""
        warnings.append(
            f"The caption in {prompt.source} has {tokens} tokens and the model reads {room}{lost}. "
            "Shorten it."
        )
    return warnings
