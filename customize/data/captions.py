"""From captions to training prompts: the token put in, what is read as plain text, what the model will not see."""

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

FIELD = re.compile(r"\{\w+\}")  # what is filled in, or was meant to be: {token}, {class}
LONG = 50  # pieces from which a caption may be longer than the 77 tokens that CLIP reads
# What is a token or more: a word, a digit, a mark, and each character of scripts without spaces
PIECES = re.compile(r"[A-Za-z]+|\d|[^\sA-Za-z\d]")


@dataclass(frozen=True)
class TrainingPrompt:
    """What an image is trained under.

    written   with the token
    resolved  with the words that the model reads in its place
    source    the caption's file, or the image's
    """

    written: str
    resolved: str
    source: str


def write_prompt(
    picture: ImageRecord, instance: str, token: str, concept: Concept, *, noun: str = ""
) -> TrainingPrompt:
    """The training prompt of an image: its caption, the instance prompt put in front if it lacks the token.

    `{token}` and, where the class has a `noun`, `{class}` stand for those in captions too, as in the instance prompt.
    Other brackets in a caption are text. Raises `UserError` for an instance prompt with a placeholder that the concept
    does not own.
    """
    if not picture.caption:
        resolved = resolve_placeholder_tokens(instance, [concept], runs=None)
        return TrainingPrompt(instance, resolved, str(picture.path))
    caption = picture.caption
    caption = Subject("", token, noun).filled(caption) if noun else caption.replace("{token}", token)
    written = caption if mentions(caption, token) else f"{instance}, {caption}"
    return TrainingPrompt(written, replace_tokens(written, [concept]), picture.caption_source)


def describe_brackets(prompts: Sequence[TrainingPrompt], concept: Concept) -> str:
    """A sentence on what looks like a token or a field in captions and is none; "" where there is none of the kind."""
    sources: dict[str, str] = {}
    for prompt in prompts:
        for word in [
            *find_foreign_placeholders(prompt.written, concept.tokens),
            *FIELD.findall(prompt.written),
        ]:
            sources.setdefault(word, prompt.source)
    if not sources:
        return ""
    own = " and ".join(concept.tokens)
    named = ", ".join(list(sources)[:5])
    return f"Captions hold {named} (first in {next(iter(sources.values()))}), read as plain text; the token is {own}."


def describe_other_word(captions: Sequence[str], token: str, noun: str = "") -> str:
    """A sentence on a trigger word that all of several captions hold, where none holds the token; "" without one."""
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
        for found, what in find_foreign_syntax(prompt.written):
            kinds.setdefault(what, (found, prompt.source))
    return [
        f"Captions hold “{found}” (first in {source}), read as plain text: {what} are not understood."
        for what, (found, source) in kinds.items()
    ]


def describe_truncated(
    prompts: Sequence[TrainingPrompt], words: str, token: str, text_encoder: TextEncoder
) -> list[str]:
    """A sentence for each prompt of which the model reads only the beginning; `words` stand for the token."""
    segments = [segment for segment in text_encoder.segments if segment.tokenizer is not None]
    if not segments:
        return []
    longest = max(segments, key=lambda segment: segment.tokens)

    def count(text: str) -> int:
        return len(longest.tokenizer(longest.preprocess(text), verbose=False)["input_ids"])

    before = longest.frame[0]  # of a chat's template, which takes room too
    room = longest.tokens + longest.dropped - (count(before) if before else 0)
    found = []
    for prompt in {prompt.source: prompt for prompt in prompts}.values():
        tokens = count(prompt.resolved)
        if tokens <= room:
            continue
        place = prompt.resolved.find(words)  # of the first time that it is named
        late = place >= 0 and count(prompt.resolved[: place + len(words)]) > room
        lost = f", the token {token} not among them" if late else ""
        found.append(
            f"The caption in {prompt.source} has {tokens} tokens and the model reads {room}{lost}. "
            "Shorten it."
        )
    return found
