"""Weighting a word in the context of the other tokens of a prompt.

In a text encoder every token sees the ones before it, or all of them: after “green violin” the violin, the end of the
text and the padding encode the green, and a picture stays green whatever weight the attention to “green” has (Hertz et
al. 2022 weight only the attention, section 4.3). So the encoded prompt h with a word of weight w is moved, at the
tokens of the other words, along the line from h₀, the encoding of these tokens without the word:

    h₀ + g(w)·(h − h₀)     g(w) = w up to 1, and 1 + (w − 1)/8 above, since far out the states are of no prompt
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from backbone.conditions.conditions import Conditions
from backbone.diffusion.transfer import send
from backbone.models.cache import encode_prompts_cached
from backbone.models.model import Backbone
from edit.attention.alignment import Alignment, TokenizedPrompt, align, tokenize_prompt, words_of_prompt

BEYOND = 0.125  # factor for a weight's excess over 1


def weigh_context(
    model: Backbone, text: Conditions, prompts: Sequence[TokenizedPrompt], weights: Mapping[str, float]
) -> Conditions:
    """The encoded prompts [N, ...] in which a phrase's influence on all other tokens is weighted.

    A phrase of weight 1, one that is not in a prompt, and one that is the whole prompt change nothing. The pooled
    embedding stays.
    """
    for phrase, weight in weights.items():
        remainders = [remove_phrase(prompt.text, phrase) for prompt in prompts]
        weighted = [
            number
            for number, (prompt, remainder) in enumerate(zip(prompts, remainders, strict=True))
            if weight != 1 and prompt.find(phrase) and any(character.isalnum() for character in remainder)
        ]
        if not weighted:
            continue
        # The prompt without the phrase: what the other tokens' states would be
        encoded = encode_prompts_cached(model, [remainders[number] for number in weighted]).text
        # states ← reduced + share·(states − reduced)
        share = weight if weight <= 1 else 1 + BEYOND * (weight - 1)
        for row, number in enumerate(weighted):
            remainder = tokenize_prompt(model.text_encoder.segments, remainders[number])
            alignment = align(remainder, prompts[number])
            changed = {
                name: _reweigh_row(states, number, alignment, encoded[name][row], share)
                for name, states in text.text.items()
                if states.ndim == 3 and states.shape[1] == prompts[number].length
            }
            text = replace(text, text={**text.text, **changed})
    return text


def remove_phrase(prompt: str, phrase: str) -> str:
    """A prompt with all occurrences of a phrase removed; the prompt itself where there are none."""
    remaining = " ".join(words_of_prompt(phrase).sub(" ", prompt).split())
    return remaining if remaining != " ".join(prompt.split()) else prompt


def _reweigh_row(states: Tensor, number: int, alignment: Alignment, reduced: Tensor, share: float) -> Tensor:
    """States [N, T, D] with row `number` moved where `alignment` aligns its tokens with tokens of `reduced` [T₀, D]."""
    has_source = send(alignment.from_source, states.device).bool()[:, None]
    mapped = send(alignment.mapping, states.device).T @ reduced.to(torch.float32)
    row = states[number].to(torch.float32)
    changed = torch.where(has_source, mapped + share * (row - mapped), row).to(states.dtype)
    return torch.cat([states[:number], changed[None], states[number + 1 :]])
