"""Prompts to tokens: several text encoders as one, tokenizers that fit their encoder, what is cut off."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor

from backbone.diffusion.transfer import send
from backbone.families.base import TextEncoderSlot
from backbone.io.console import UserError, notify_once, shorten
from backbone.io.weights import check_tokenizer


class MultiTextEncoder:
    """Several text encoders as one `TextEncoder`; those in `frozen` neither learn tokens nor carry adapters."""

    def __init__(self, slots: Sequence[TextEncoderSlot], frozen: Sequence[TextEncoderSlot] = ()) -> None:
        self.slots = tuple(slots)
        self.all_slots = (*slots, *frozen)
        self.tokenizer = self.slots[0].tokenizer
        for slot in self.all_slots:
            fit_tokenizer(slot)
            slot.model.eval().requires_grad_(False)

    def to(self, device: torch.device) -> Any:
        for slot in self.all_slots:
            slot.model.to(device)
        return self


def fit_tokenizer(slot: TextEncoderSlot) -> None:
    """Limit a tokenizer to as many tokens as its encoder has positions: a config may allow more, or say nothing.

    Raises `UserError` for a tokenizer that reads no prompt, and for special tokens without an embedding in the encoder.
    """
    label = f"The tokenizer of {slot.name}"
    remedy = "Restore its tokenizer_config.json, or download the model again."
    check_tokenizer(slot.tokenizer, label)
    embeddings = slot.model.get_input_embeddings().weight.shape[0]
    for number, token in zip(slot.tokenizer.all_special_ids, slot.tokenizer.all_special_tokens, strict=True):
        if number >= embeddings:
            raise UserError(
                f"{label} has the token {token}, and the encoder has no embedding of it. {remedy}"
            )
    length = slot.tokenizer.model_max_length
    slot.tokenizer.model_max_length = min(
        length, getattr(slot.model.config, "max_position_embeddings", length)
    )


def tokenize(
    slot: TextEncoderSlot,
    prompts: Sequence[str],
    length: int | None = None,
    *,
    padding: Literal["max_length", "longest"] = "max_length",
    special: bool = True,
) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` [B, T], truncated to `length` (the tokenizer's own if None) and padded.

    Padded to `length`, or to the longest of the prompts. With `special` the tokenizer adds its special tokens; a
    template has its own.
    """
    refuse_half_characters(prompts)
    encoded = slot.tokenizer(
        list(prompts),
        padding=padding,
        truncation=True,
        max_length=length or slot.tokenizer.model_max_length,
        add_special_tokens=special,
        return_tensors="pt",
    )
    refuse_unknown_tokens(slot, encoded["input_ids"])
    device = slot.model.device
    return {name: send(encoded[name], device) for name in ("input_ids", "attention_mask")}


def refuse_unknown_tokens(slot: TextEncoderSlot, tokens: Tensor) -> None:
    """`UserError` for tokens [B, T] without an embedding: words that were added to a tokenizer alone.

    A table that has learned words after its own rows is not checked.
    """
    largest, table = int(tokens.max()), slot.model.get_input_embeddings()
    if largest >= getattr(table, "num_embeddings", largest + 1):
        raise UserError(
            f"The tokenizer of {slot.name} has the token {slot.tokenizer.convert_ids_to_tokens(largest)}, and the "
            "encoder has no embedding of it. Leave it out of prompts, or restore the tokenizer."
        )


def refuse_half_characters(prompts: Sequence[str]) -> None:
    """`UserError` for prompts that are no text in UTF-8, as a terminal with another encoding sends them."""
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"The prompt {prompt[:60]!r} is no text in UTF-8. Write it anew.") from error


def warn_truncation(slot: TextEncoderSlot, prompts: Sequence[str], length: int | None = None) -> None:
    """Warn of each prompt that is longer than the encoder reads, once per prompt, quoting what is dropped."""
    refuse_half_characters(prompts)
    length = length or slot.tokenizer.model_max_length
    for row, prompt in enumerate(prompts):
        tokens = slot.tokenizer(prompt, verbose=False)["input_ids"]
        if len(tokens) > length:
            dropped = slot.tokenizer.decode(tokens[length - 1 : -1])
            say_cut(
                row,
                f"The prompt has {len(tokens)} tokens and this model reads {length}: it will not see "
                f"“{shorten(dropped)}”.",
            )


_cuts: ContextVar[dict[int, str] | None] = ContextVar("cuts", default=None)


def say_cut(row: int, sentence: str) -> None:
    """Say once what a model will not see of the prompt in this row; inside `collect_cuts` it is only recorded."""
    if (cuts := _cuts.get()) is not None:
        cuts[row] = sentence
    else:
        notify_once(sentence)


@contextmanager
def collect_cuts() -> Iterator[dict[int, str]]:
    """Inside the `with`, the sentences about truncated prompts are collected by row instead of printed.

    A cache of encodings stores them too, and prints them whenever an encoding is used.
    """
    cuts: dict[int, str] = {}
    token = _cuts.set(cuts)
    try:
        yield cuts
    finally:
        _cuts.reset(token)
