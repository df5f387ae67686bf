"""What the other words of a prompt say of a word that is given a weight.

A text encoder lets every token know the ones before it, or all of them: behind “green violin” the violin, the end of
the text and the padding know of the green, and a picture stays green whatever weight the attention to “green” has
(Hertz et al. 2022 weigh the attention alone, section 4.3). So the encoded prompt h of a word of weight w is led, at the
tokens of the other words, along the line from h₀, which these tokens are without the word:

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
from edit.attention.alignment import Alignment, TokenizedPrompt, align, tokenize_prompt, whole_words

BEYOND = 0.125  # of what a weight exceeds 1 by


def weigh_context(
    model: Backbone, text: Conditions, prompts: Sequence[TokenizedPrompt], weights: Mapping[str, float]
) -> Conditions:
    """The encoded prompts [N, ...] with what all tokens but a phrase's own know of the phrase weighted.

    Phrases of weight 1, that are not in a prompt, and that are all of it, change nothing. What the encoders make of a
    prompt as a whole (its pooled embedding) stays.
    """
    for phrase, weight in weights.items():
        rests = [without_phrase(prompt.text, phrase) for prompt in prompts]
        there = [
            number
            for number, (prompt, rest) in enumerate(zip(prompts, rests, strict=True))
            if weight != 1 and prompt.find(phrase) and any(character.isalnum() for character in rest)
        ]
        if not there:
            continue
        # The prompt without the phrase: what the other tokens' states would be
        encoded = encode_prompts_cached(model, [rests[number] for number in there]).text
        # states ← without + share·(with − without)
        share = weight if weight <= 1 else 1 + BEYOND * (weight - 1)
        for row, number in enumerate(there):
            rest = tokenize_prompt(model.text_encoder.segments, rests[number])
            kept = align(rest, prompts[number])
            led = {
                name: _lead_row(states, number, kept, encoded[name][row], share)
                for name, states in text.text.items()
                if states.ndim == 3 and states.shape[1] == prompts[number].length
            }
            text = replace(text, text={**text.text, **led})
    return text


def without_phrase(prompt: str, phrase: str) -> str:
    """A prompt without a phrase, wherever it stands; the prompt itself where it stands nowhere."""
    rest = " ".join(whole_words(phrase).sub(" ", prompt).split())
    return rest if rest != " ".join(prompt.split()) else prompt


def _lead_row(states: Tensor, number: int, kept: Alignment, without: Tensor, share: float) -> Tensor:
    """States [N, T, D], those of row `number` led where `kept` aligns them with some of `without` [T₀, D]."""
    known = send(kept.from_source, states.device).bool()[:, None]
    there = send(kept.mapping, states.device).T @ without.to(torch.float32)
    row = states[number].to(torch.float32)
    led = torch.where(known, there + share * (row - there), row).to(states.dtype)
    return torch.cat([states[:number], led[None], states[number + 1 :]])
