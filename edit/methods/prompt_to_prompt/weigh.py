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
from backbone.io.console import UserError
from backbone.models.cache import encode_prompts_cached
from backbone.models.model import Backbone
from edit.attention.alignment import Alignment, TokenizedPrompt, align, tokenize_prompt, words_of_prompt

BEYOND = 0.125  # factor for a weight's excess over 1
MOST_WORDS = 8  # of one prompt, which is encoded without every set of them: 2⁸ times


def weigh_context(
    model: Backbone, text: Conditions, prompts: Sequence[TokenizedPrompt], weights: Mapping[str, float]
) -> Conditions:
    """The encoded prompts [N, ...] in which a phrase's influence on all other tokens is weighted.

    A phrase of weight 1, one that is not in a prompt, and one that is the whole prompt change nothing. The pooled
    embedding stays.
    """
    for number, prompt in enumerate(prompts):
        row = _sequences(text, number, prompt)
        weighted = _weigh(model, prompt, row, list(weights.items()))
        if weighted is not row:
            changed = {name: _replace_row(text.text[name], number, value) for name, value in weighted.items()}
            text = replace(text, text={**text.text, **changed})
    return text


def refuse_many_weights(prompt: TokenizedPrompt, weights: Mapping[str, float]) -> None:
    """`UserError` where more words of a prompt are weighted than `weigh_context` takes."""
    words = [phrase for phrase, weight in weights.items() if weight != 1 and prompt.find(phrase)]
    if len(words) > MOST_WORDS:
        raise UserError(
            f"{len(words)} words of “{prompt.text}” are reweighted in all steps, and at most {MOST_WORDS} are: the "
            f"prompt is encoded without every set of them. Leave some out, or give them a --window, as "
            f"{words[-1]}=0:0.9, in which attention alone is weighted."
        )


def _sequences(text: Conditions, number: int, prompt: TokenizedPrompt) -> dict[str, Tensor]:
    """The states [T, D] of a prompt's tokens among the encoded prompts [N, ...], by name."""
    return {
        name: states[number]
        for name, states in text.text.items()
        if states.ndim == 3 and states.shape[1] == prompt.length
    }


def _weigh(
    model: Backbone, prompt: TokenizedPrompt, states: dict[str, Tensor], weights: Sequence[tuple[str, float]]
) -> dict[str, Tensor]:
    """A prompt's states with phrases weighted; `states` itself where nothing changes.

    h₀ of a phrase has the other phrases at their weights too, so that their order does not matter.
    """
    if not weights:
        return states
    *others, (phrase, weight) = weights
    states = _weigh(model, prompt, states, others)
    # The prompt without the phrase: what the other tokens' states would be
    remainder_text = remove_phrase(prompt.text, phrase)
    is_alone = not any(character.isalnum() for character in remainder_text)
    if weight == 1 or is_alone or not prompt.find(phrase):
        return states
    remainder = tokenize_prompt(model.text_encoder.segments, remainder_text)
    encoded = _sequences(encode_prompts_cached(model, [remainder_text]), 0, remainder)
    reduced = _weigh(model, remainder, encoded, others)
    # states ← reduced + share·(states − reduced)
    share = weight if weight <= 1 else 1 + BEYOND * (weight - 1)
    alignment = align(remainder, prompt)
    return {name: _move(value, alignment, reduced[name], share) for name, value in states.items()}


def remove_phrase(prompt: str, phrase: str) -> str:
    """A prompt with all occurrences of a phrase removed; the prompt itself where there are none."""
    remaining = " ".join(words_of_prompt(phrase).sub(" ", prompt).split())
    return remaining if remaining != " ".join(prompt.split()) else prompt


def _move(states: Tensor, alignment: Alignment, reduced: Tensor, share: float) -> Tensor:
    """States [T, D] moved where `alignment` aligns their tokens with tokens of `reduced` [T₀, D]; in float32."""
    has_source = send(alignment.from_source, states.device).bool()[:, None]
    mapped = send(alignment.mapping, states.device).T @ reduced.to(torch.float32)
    states = states.to(torch.float32)
    return torch.where(has_source, mapped + share * (states - mapped), states)


def _replace_row(states: Tensor, number: int, row: Tensor) -> Tensor:
    """States [N, T, D] with another row."""
    return torch.cat([states[:number], row.to(states.dtype)[None], states[number + 1 :]])
