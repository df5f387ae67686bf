"""The text side of models that read a prompt with a language model: Z-Image, FLUX.2, Qwen-Image, Krea 2.

The prompt stands in a chat's template, and the network attends to hidden states of chosen layers. Padding is cut off,
or computed and kept where the network was trained with it; the template's first tokens may be dropped. The output
always has the same length, with a mask beside it where padding was cut off, so that prompts are batched and cached
like any other text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone.conditions.conditions import Text
from backbone.families.base import ModuleSpec, TextEncoderSlot, TextSegment
from backbone.families.components import loading, tokenization
from backbone.families.location import Location
from backbone.io.console import UserError, shorten
from backbone.io.weights import refuse_damaged

MARK = "\ue000"  # stands for the prompt while its place in a template is looked up
QWEN = ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
NO_THOUGHTS = "<think>\n\n</think>\n\n"


@dataclass(frozen=True)
class Reading:
    """How a family reads its language model.

    layers   the hidden states that are taken, 0 the embeddings, −1 the last one; their features lie side by side
    tokens   T, the most tokens that the network is given
    padded   whether padding is computed and given to the network like words
    dropped  tokens at the start that the network is not given
    stacked  whether the layers are a dimension of their own, [B, T, layers, D]
    """

    layers: tuple[int, ...]
    tokens: int
    padded: bool = False
    dropped: int = 0
    stacked: bool = False


class LanguageModelEncoder(tokenization.MultiTextEncoder):
    """Hidden states of a language model that reads the prompt in a template."""

    def __init__(
        self,
        slot: TextEncoderSlot,
        reading: Reading,
        *,
        write: Callable[[str], str],
        name: str,
        width: int | None = None,
    ) -> None:
        """`write` puts a prompt into the template; `name` and `width` (features of a token) are the network's.

        Raises `UserError` for a language model with too few layers or another width.
        """
        super().__init__([slot])
        self.reading, self.write = reading, write
        start, mark, end = write(MARK).partition(MARK)
        if not mark:
            raise UserError(
                f"The chat template of {name} leaves the prompt out. Restore its tokenizer/, or download the "
                "model again."
            )
        self.frame = start, end
        config = text_config(slot.model.config)
        if min(reading.layers) < 0 and isinstance(getattr(slot.model, "norm", None), nn.Identity):
            raise UserError(
                f"The {slot.name} of {name} was cut off behind a layer in the middle, and its last ones are read. Give "
                "the one that the model was published with."
            )
        if max(reading.layers) > config.num_hidden_layers:
            raise UserError(
                f"The {slot.name} of {name} has {config.num_hidden_layers} layers, and layer {max(reading.layers)} is "
                "read: it is the text encoder of another model. Give the one that the model was published with."
            )
        features = config.hidden_size * (1 if reading.stacked else len(reading.layers))
        if width is not None and features != width:
            raise UserError(
                f"The {slot.name} of {name} gives {features} numbers a token and the transformer takes {width}: it is "
                "the text encoder of another model. Give the one that the model was published with."
            )

    @property
    def segments(self) -> tuple[TextSegment, ...]:
        """The prompt's, in its template."""
        return (
            TextSegment(self.tokenizer, self.reading.tokens, frame=self.frame, dropped=self.reading.dropped),
        )

    def __call__(self, prompts: Sequence[str]) -> Text:
        """hidden [B, T, D] and, where padding was cut off, mask [B, T]; warns of truncated prompts."""
        (slot,), reading = self.slots, self.reading
        length = reading.tokens + reading.dropped
        self.warn_truncation(prompts, length)
        texts = [self.write(prompt) for prompt in prompts]
        padding: Literal["max_length", "longest"] = "max_length" if reading.padded else "longest"
        tokens = tokenization.tokenize(slot, texts, length, padding=padding, special=False)
        hidden = read_layers(slot.model, reading, tokens)

        # The template's beginning is dropped, and padding unless the network reads it
        if reading.padded:
            return {"hidden": hidden[:, reading.dropped :]}
        rows = [
            row[mask.bool()][reading.dropped :]
            for row, mask in zip(hidden, tokens["attention_mask"], strict=True)
        ]
        return pad_rows(rows, reading.tokens)

    def warn_truncation(self, prompts: Sequence[str], length: int) -> None:
        """Warn of each prompt that is longer than the model reads, once per prompt, quoting what is dropped."""
        start_length = len(
            self.tokenizer(self.frame[0], add_special_tokens=False, verbose=False)["input_ids"]
        )
        for row, prompt in enumerate(prompts):
            tokenization.refuse_half_characters([prompt])
            words = self.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
            if start_length + len(words) > length:
                dropped = self.tokenizer.decode(words[length - start_length :])
                tokenization.say_cut(
                    row,
                    f"The prompt has {len(words)} tokens and this model reads {length - start_length}: it will not see "
                    f"“{shorten(dropped)}”.",
                )


def read_layers(model: Any, reading: Reading, tokens: dict[str, Tensor], **options: Any) -> Tensor:
    """Hidden states of the layers that are read: [B, T, D], side by side, or stacked to [B, T, layers, D]."""
    states = model(
        input_ids=tokens["input_ids"],
        attention_mask=tokens["attention_mask"],
        output_hidden_states=True,
        use_cache=False,
        **options,
    ).hidden_states
    stacked = torch.stack([states[layer] for layer in reading.layers], dim=2).float()
    return stacked if reading.stacked else stacked.flatten(2)


def pad_rows(rows: Sequence[Tensor], length: int) -> Text:
    """Rows [tokens, …] of unequal length as hidden [B, T, …], each followed by zeros, and mask [B, T]."""
    hidden = torch.stack([F.pad(row, (*(0, 0) * (row.ndim - 1), 0, length - len(row))) for row in rows])
    positions = torch.arange(length, device=hidden.device)
    mask = torch.stack([(positions < len(row)).long() for row in rows])
    return {"hidden": hidden, "mask": mask}


def unpad_rows(text: Text, dtype: torch.dtype) -> list[Tensor]:
    """The inverse of `pad_rows`, for networks that take ragged prompts; on `meta` every row has all its tokens."""
    hidden, mask = text["hidden"].to(dtype), text["mask"]
    lengths = [mask.shape[1]] * len(mask) if mask.is_meta else mask.sum(1).tolist()
    return [row[:length] for row, length in zip(hidden, lengths, strict=True)]


def load_language_model(
    kind: Any, tokenizer_kind: Any, location: Location, dtype: torch.dtype
) -> TextEncoderSlot:
    """Load a language model in `dtype`, without its head and vision tower, with its tokenizer."""
    tokenizer = loading.load_pretrained(tokenizer_kind, location, "tokenizer")
    model = loading.load_pretrained(kind, location, "text_encoder", dtype=dtype).get_decoder()
    return TextEncoderSlot("text_encoder", tokenizer, model)


def chat_writer(
    tokenizer: Any, location: Location, published: tuple[str, str], *, system: str = "", **options: Any
) -> Callable[[str], str]:
    """A function that puts a prompt into the tokenizer's own chat template, or the `published` one where it has none.

    With a `system` message before it, the template's request for an answer is left out. `options` are the template's.
    Raises `UserError` for a template that cannot be followed.
    """
    if not tokenizer.chat_template:
        return lambda prompt: prompt.join(published)

    def write(prompt: str) -> str:
        messages: list[dict[str, Any]] = [{"role": "user", "content": prompt}]
        if system:
            turns = (("system", system), ("user", prompt))
            messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
        with refuse_damaged(location.name, "chat template"):
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=not system, **options
            )
        return cast(str, text)

    return write


def text_config(config: Any) -> Any:
    """The config of the language model itself, inside a vision-language model's config or alone."""
    return getattr(config, "text_config", config)


def text_spec(kind: Any, location: Location, dtype: torch.dtype) -> ModuleSpec:
    """The spec of a language model (`kind` is its class), from its config or a vision-language model's."""
    config = location.config("text_encoder")

    def build() -> nn.Module:
        with refuse_damaged(location.name, "text_encoder"):
            return cast(nn.Module, kind(kind.config_class.from_dict(config.get("text_config", config))))

    return ModuleSpec(build, dtype)
