"""Edited transformers equal the formula written out with whole maps, make none themselves, and are restored."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from backbone.adapters.lora import activate_adapters, add_lora, lora_parameters
from backbone.conditions.conditions import Conditions
from backbone.io.console import UserError
from backbone.models.model import Backbone
from edit.attention.control import AttentionControl, Cross, Maps, make_cross
from edit.attention.install import attention_layers, control_attention
from tests.edit.conftest import NEWER, SLOWLY, TRANSFORMERS, Open

PROMPTS = ["a cat in the snow", "a red cat in the snow", "a dog in the snow", ""]
TARGETS = 2
SIZE = (6, 10)  # of the latents: 3 × 5 tokens of the picture, or as many where a latent is one
PLACES = 15

every = pytest.mark.parametrize("name", [*TRANSFORMERS, *SLOWLY])


# The formula, on whole maps ---------------------------------------------------------------------------------


@dataclass
class Edit:
    """What a reference does: M, a, e, α of the words, whose self-attention the targets have, and which of the picture's
    keys no query finds."""

    words: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    whose: str = "own"
    hidden: tuple[int, ...] = ()
    maps: list[Tensor] = field(default_factory=list)  # from pictures to words of every layer that has words

    def of_words(self, maps: Tensor, lead: Tensor) -> Tensor:
        """Prompt-to-prompt on the words' columns [N, heads, P, T], as its paper writes it."""
        if self.words is None:
            return maps
        mapping, *rest = self.words
        a, e, alpha = (x[:, None, None] for x in rest)
        replaced = torch.einsum("hqi,nij->nhqj", lead, mapping)
        return (replaced * a + maps * (1 - a)) * e * alpha + maps * (1 - alpha)


class Whole:
    """A layer of diffusers with a materialised map, edited."""

    mask: Tensor | None = None  # which tokens each row has, [B, tokens]
    causal = False  # whether words see those before them, and no picture

    def __init__(self, edit: Edit, words: int) -> None:
        self.edit, self.words = edit, words

    def joint(self, query: Tensor, key: Tensor, value: Tensor, picture: slice, text: slice) -> Tensor:
        """Queries, keys, values [B, heads, tokens, D] → what is attended to [B, tokens, C]."""
        some = slice(1, 1 + TARGETS)
        query, key, value = (x.clone() for x in (query, key, value))
        if self.edit.whose != "own":
            changed = [query, key] if self.edit.whose == "layout" else [key, value]
            for x in changed:
                x[some, :, picture] = x[:1, :, picture]
        logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        logits[..., [picture.start + key for key in self.edit.hidden]] = -torch.inf
        if self.mask is not None:
            blind = (
                slice(picture.start, None) if self.causal else slice(None)
            )  # what is behind it no word sees
            logits[:, :, blind] = logits[:, :, blind].masked_fill(~self.mask[:, None, None], -torch.inf)
        if self.causal:
            seen = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
            seen[picture] = True
            logits = logits.masked_fill(~seen, -torch.inf)
        maps = logits.softmax(-1)
        if text.stop > text.start:
            self.edit.maps.append(maps[: 1 + TARGETS, :, picture, text].clone())
            own, lead = maps[some, :, picture, text], maps[0, :, picture, text]
            maps[some, :, picture, text] = self.edit.of_words(own, lead)
        return cast(Tensor, (maps @ value).transpose(1, 2).flatten(2))


def split(x: Tensor, heads: int, norm: Any = None) -> Tensor:
    x = x.unflatten(-1, (heads, -1)).transpose(1, 2)
    return x if norm is None else cast(Tensor, norm(x))


class WholePictureFirst(Whole):
    """Of Stable Diffusion 3."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
    ) -> Any:
        x, said, n = hidden_states, encoder_hidden_states, attn.heads
        query, key = split(attn.to_q(x), n, attn.norm_q), split(attn.to_k(x), n, attn.norm_k)
        value = split(attn.to_v(x), n)
        if said is None:
            found = self.joint(query, key, value, slice(0, PLACES), slice(0, 0))
            return attn.to_out[0](found)
        query = torch.cat([query, split(attn.add_q_proj(said), n, attn.norm_added_q)], 2)
        key = torch.cat([key, split(attn.add_k_proj(said), n, attn.norm_added_k)], 2)
        value = torch.cat([value, split(attn.add_v_proj(said), n)], 2)
        found = self.joint(query, key, value, slice(0, PLACES), slice(PLACES, PLACES + self.words))
        words = found[:, PLACES:]
        return attn.to_out[0](found[:, :PLACES]), words if attn.context_pre_only else attn.to_add_out(words)


class WholeTextFirst(Whole):
    """Of FLUX.1."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        x, said, n = hidden_states, encoder_hidden_states, attn.heads
        query, key = split(attn.to_q(x), n, attn.norm_q), split(attn.to_k(x), n, attn.norm_k)
        value = split(attn.to_v(x), n)
        if said is not None:
            query = torch.cat([split(attn.add_q_proj(said), n, attn.norm_added_q), query], 2)
            key = torch.cat([split(attn.add_k_proj(said), n, attn.norm_added_k), key], 2)
            value = torch.cat([split(attn.add_v_proj(said), n), value], 2)
        query, key = apply_rotary_emb(query, image_rotary_emb), apply_rotary_emb(key, image_rotary_emb)
        found = self.joint(query, key, value, slice(self.words, None), slice(0, self.words))
        if said is None:
            return found
        return attn.to_out[0](found[:, self.words :]), attn.to_add_out(found[:, : self.words])


class WholeCross(Whole):
    """Of PixArt: self-attention, or attention from the picture to the words."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        x, n = hidden_states, attn.heads
        said = x if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = split(attn.to_q(x), n), split(attn.to_k(said), n), split(attn.to_v(said), n)
        if encoder_hidden_states is None:
            return cast(Tensor, attn.to_out[0](self.joint(query, key, value, slice(0, PLACES), slice(0, 0))))
        assert attention_mask is not None
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        maps = (scores + attention_mask[:, None]).softmax(-1)
        self.edit.maps.append(maps[: 1 + TARGETS].clone())
        maps[1 : 1 + TARGETS] = self.edit.of_words(maps[1 : 1 + TARGETS], maps[0])
        return cast(Tensor, attn.to_out[0]((maps @ value).transpose(1, 2).flatten(2)))


class WholeOneSequence(Whole):
    """Of Z-Image: the picture's tokens, what fills them up to 32, the words; the noise's refiner has none of them."""

    filled = 32

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Any:
        assert freqs_cis is not None
        x, n, turns = hidden_states, attn.heads, freqs_cis[:, None]
        query, key = split(attn.to_q(x), n, attn.norm_q), split(attn.to_k(x), n, attn.norm_k)
        query, key = (
            torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns).flatten(3)
            for x in (query, key)
        )
        self.mask = attention_mask
        text = slice(self.filled, self.filled + self.words)
        found = self.joint(query, key, split(attn.to_v(x), n), slice(0, PLACES), text)
        return attn.to_out[0](found)


class WholeParallel(Whole):
    """Of FLUX.2, whose single blocks compute attention beside their feed-forward part."""

    def __call__(self, attn: Any, hidden_states: Tensor, *more: Any) -> Any:
        x, turns, n = hidden_states, more[-1], attn.heads
        if not hasattr(attn, "to_qkv_mlp_proj"):
            return WholeTextFirst.__call__(cast(WholeTextFirst, self), attn, x, *more)
        joined = attn.to_qkv_mlp_proj(x)
        query, key, value, rest = joined.split([x.shape[-1]] * 3 + [joined.shape[-1] - 3 * x.shape[-1]], -1)
        query, key = split(query, n, attn.norm_q), split(key, n, attn.norm_k)
        query, key = apply_rotary_emb(query, turns), apply_rotary_emb(key, turns)
        found = self.joint(query, key, split(value, n), slice(self.words, None), slice(0, self.words))
        return attn.to_out(torch.cat([found, attn.mlp_act_fn(rest)], -1))


class WholeQwen(Whole):
    """Of Qwen-Image: words first, and only as many of a row as it has."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        x, said, n = hidden_states, encoder_hidden_states, attn.heads

        def turned(tokens: Tensor, angles: Tensor) -> Tensor:
            pairs = torch.view_as_complex(tokens.unflatten(-1, (-1, 2)))
            return torch.view_as_real(pairs * angles).flatten(3)

        query = turned(split(attn.to_q(x), n, attn.norm_q), image_rotary_emb[0])
        key = turned(split(attn.to_k(x), n, attn.norm_k), image_rotary_emb[0])
        words = (
            split(attn.add_q_proj(said), n, attn.norm_added_q),
            split(attn.add_k_proj(said), n, attn.norm_added_k),
        )
        query = torch.cat([turned(words[0], image_rotary_emb[1]), query], 2)
        key = torch.cat([turned(words[1], image_rotary_emb[1]), key], 2)
        value = torch.cat([split(attn.add_v_proj(said), n), split(attn.to_v(x), n)], 2)
        if encoder_hidden_states_mask is not None:
            self.mask = F.pad(encoder_hidden_states_mask, (0, x.shape[1]), value=True)
        found = self.joint(query, key, value, slice(self.words, None), slice(0, self.words))
        return attn.to_out[0](found[:, self.words :]), attn.to_add_out(found[:, : self.words])


class WholeKrea2(Whole):
    """Of Krea 2: words first, padding among them; keys and values that heads share; a gate."""

    def __call__(self, attn: Any, hidden_states: Tensor, mask: Tensor, turns: Any) -> Any:
        x, heads, shared = hidden_states, attn.num_kv_heads, attn.num_heads // attn.num_kv_heads
        query = apply_rotary_emb(split(attn.to_q(x), attn.num_heads, attn.norm_q), turns)
        key = apply_rotary_emb(split(attn.to_k(x), heads, attn.norm_k), turns).repeat_interleave(shared, 1)
        value = split(attn.to_v(x), heads).repeat_interleave(shared, 1)
        self.mask = mask[:, 0, 0]
        found = self.joint(query, key, value, slice(self.words, None), slice(0, self.words))
        return attn.to_out[0](found * attn.to_gate(x).sigmoid())


class WholeChroma(WholeTextFirst):
    """Of Chroma: FLUX.1's with a mask of the prompts."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        self.mask = None if attention_mask is None else attention_mask[:, 0, -1] > 0
        return super().__call__(attn, hidden_states, encoder_hidden_states, None, image_rotary_emb)


class WholeCausal(Whole):
    """Of Qwen-Image 2.1: words first, which see those before them; the picture stands where its row's words end."""

    causal = True

    def __call__(self, attn: Any, hidden_states: Tensor, **named: Any) -> Any:
        x, n, words = hidden_states, attn.heads, self.words
        self.mask = named["key_valid"]
        turns = named["rotary_emb"].repeat(len(x), 1, 1)
        if self.mask is not None:
            behind = (~self.mask).sum(1)
            places = torch.arange(2) / 2  # of a first coordinate of four numbers
            turns[:, words:, :2] *= torch.exp(-1j * behind[:, None] * 10000.0**-places)[:, None]

        def turned(tokens: Tensor) -> Tensor:
            pairs = torch.view_as_complex(tokens.unflatten(-1, (-1, 2)))
            return torch.view_as_real(pairs * turns[:, None]).flatten(3)

        query, key = split(attn.to_q(x), n, attn.norm_q), split(attn.to_k(x), n, attn.norm_k)
        value = split(attn.to_v(x), n)
        found = self.joint(turned(query), turned(key), value, slice(words, None), slice(0, words))
        return attn.to_out[0](found)


WHOLE: dict[str, Callable[[Edit, int], Whole]] = {
    "qwen-image": WholeQwen,
    "krea2": WholeKrea2,
    "chroma": WholeChroma,
    "qwen-image-2.1": WholeCausal,
    "flux2-dev": WholeParallel,
    "flux2-klein": WholeParallel,
    "z-image": WholeOneSequence,
    "sd3": WholePictureFirst,
    "flux-dev": WholeTextFirst,
    "pixart": WholeCross,
}


# The same question to both ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A model and what it is asked: four rows (the source, two targets, one without a prompt), not square."""

    model: Backbone
    text: Conditions
    noisy: Tensor

    @property
    def words(self) -> int:
        """How many text tokens there are in the network."""
        by_count = {"Z-Image": 32, "Qwen-Image": 1, "Qwen-Image 2.1": 1, "Chroma": 1}
        text, multiple = self.text.text, by_count.get(self.model.family.name)
        if multiple is None:
            return text["hidden"].shape[1]
        return -(-int(text["mask"].sum(1).max()) // multiple) * multiple

    @property
    def grid(self) -> tuple[int, int]:
        """The picture's tokens (rows, columns)."""
        return SIZE if self.model.family.name == "Qwen-Image 2.1" else (3, 5)

    @torch.no_grad()
    def plainly(self) -> Tensor:
        """The prediction."""
        level = self.model.path.levels
        assert level.time is not None
        return self.model.family.network(self.model.denoiser, self.text)(self.noisy, level.time[600])

    def by(self, control: AttentionControl) -> Tensor:
        """The prediction under a control."""
        attention = self.model.family.attention(self.model.denoiser, self.text)
        with control_attention(self.model.denoiser, control, attention):
            return self.plainly()

    def written_out(self, name: str, edit: Edit) -> Tensor:
        """The prediction with whole maps."""
        layers = attention_layers(self.model.denoiser)
        before = {key: layer.processor for key, layer in layers.items()}
        for key, layer in layers.items():
            if not key.startswith(("context_refiner", "text_fusion")):  # over words alone
                layer.processor = WHOLE[name](edit, 0 if key.startswith("noise_refiner") else self.words)
        try:
            return self.plainly()
        finally:
            for key, layer in layers.items():
                layer.processor = before[key]

    def control(self, **options: Any) -> AttentionControl:
        """Of two targets, in layers of any size."""
        return AttentionControl(TARGETS, self_tokens=None, **options)


def asked(model: Backbone) -> Asked:
    random = torch.Generator().manual_seed(0)
    size = (3, 5) if model.family.name == "FLUX.2" else SIZE
    noisy = torch.randn(len(PROMPTS), model.latent_shape[0], *size, generator=random)
    ragged = model.family.name in ("Z-Image", "Qwen-Image 2.1")
    prompts = [*PROMPTS[:2], PROMPTS[2] + " in the snow" * 10 * ragged, PROMPTS[3]]
    return Asked(model, model.encode_prompts(prompts), noisy)


def wearing_a_lora(model: Backbone) -> Backbone:
    """The same, opened anew, with an adapter on every projection that changes something."""
    model = Backbone.open(str(model.location.folder), device="cpu", precision="fp32")
    targets = model.family.lora_targets["attention"]
    add_lora(model.denoiser, "other", rank=2, alpha=4.0, targets=targets)
    for value in lora_parameters(model.denoiser, "other").values():
        value.data = torch.randn(value.shape, generator=torch.Generator().manual_seed(2)) / 2
        value.requires_grad_(False)
    activate_adapters(model.denoiser, ["other"])
    return model


def given(tokens: int, case: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """M, a, e, α at random; `case` says which of them do something."""
    random = torch.Generator().manual_seed(1)
    mapping = torch.rand(TARGETS, tokens, tokens, generator=random)
    mapping = mapping * (torch.rand(mapping.shape, generator=random) < 4 / tokens)
    taken = (torch.rand(TARGETS, tokens, generator=random) < 0.7).float()
    weight = 1 + torch.rand(TARGETS, tokens, generator=random)
    window = (torch.rand(TARGETS, tokens, generator=random) < 0.5).float()
    ones = torch.ones(TARGETS, tokens)
    return {
        "replace": (mapping, ones, ones, ones),
        "refine": (mapping, taken, ones, ones),
        "reweight": (torch.eye(tokens).expand_as(mapping), ones, weight, ones),
        "windows": (mapping, taken, weight, window),
    }[case]


def processors_of(network: torch.nn.Module) -> dict[str, Any]:
    return {name: layer.processor for name, layer in attention_layers(network).items()}


def deviation(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())


# The tests --------------------------------------------------------------------------------------------------


@every
def test_the_reference_is_the_network(family: Open, name: str) -> None:
    question = asked(family(name))
    assert deviation(question.written_out(name, Edit()), question.plainly()) < 1e-5


@pytest.mark.parametrize(
    ("case", "whose", "lora"),
    [
        ("replace", "own", False),
        ("refine", "own", False),
        ("reweight", "own", False),
        ("windows", "layout", False),
        ("windows", "contents", False),
        ("windows", "layout", True),
        ("", "layout", False),
        ("", "contents", True),
    ],
)
@every
def test_an_edited_transformer_is_the_formula_on_whole_maps(
    family: Open, name: str, case: str, whose: str, lora: bool
) -> None:
    model = wearing_a_lora(family(name)) if lora else family(name)
    question = asked(model)
    words = given(question.words, case) if case else None
    control = question.control(cross=make_cross(*words) if words else None, self_attention=whose)
    found, expected = question.by(control), question.written_out(name, Edit(words, whose))
    assert deviation(found, expected) < 1e-5
    assert deviation(found[1:3], question.plainly()[1:3]) > 1e-4, "and something is changed"


@pytest.mark.parametrize("name", NEWER)
def test_an_edited_transformer_of_a_newer_family_is_the_formula(family: Open, name: str) -> None:
    """The fullest of the cases above."""
    question = asked(family(name))
    words = given(question.words, "windows")
    found = question.by(question.control(cross=make_cross(*words), self_attention="layout"))
    assert deviation(found, question.written_out(name, Edit(words, "layout"))) < 1e-5
    assert deviation(found[1:3], question.plainly()[1:3]) > 1e-4, "and something is changed"


@every
def test_what_is_hidden_is_found_by_no_query(family: Open, name: str) -> None:
    question = asked(family(name))
    hidden = torch.zeros(SIZE)
    hidden[2:4, 4:8] = 1  # two of 3 × 5 tokens
    found = question.by(question.control(hidden=hidden))
    _, columns = question.grid
    keys = (
        (7, 8) if columns == 5 else tuple(row * columns + column for row in (2, 3) for column in range(4, 8))
    )
    assert deviation(found, question.written_out(name, Edit(hidden=keys))) < 1e-5
    assert deviation(found, question.plainly()) > 1e-5


@every
def test_maps_of_words_are_columns_of_the_whole_maps(family: Open, name: str) -> None:
    """Also under an edit, and reading them changes nothing."""
    question = asked(family(name))
    words = given(question.words, "windows")
    random = torch.Generator().manual_seed(3)
    columns = (torch.rand(1 + TARGETS, 20, question.words, generator=random) < 0.3).float()
    control = question.control(cross=make_cross(*words), self_attention="layout")
    unread = question.by(control)
    control.maps = Maps(columns, SIZE, max_queries=None)
    assert deviation(question.by(control), unread) < 1e-6
    edit = Edit(words, "layout")
    question.written_out(name, edit)
    whole = torch.stack([maps.mean(1) for maps in edit.maps]).mean(0)  # [1 + N, places, T]
    expected = (whole @ columns.transpose(1, 2)).transpose(1, 2).unflatten(-1, question.grid)
    assert deviation(control.maps.read(), expected) < 1e-5


@every
def test_attention_is_taken_in_the_named_layers_alone(family: Open, name: str) -> None:
    question = asked(family(name))
    late = question.model.family.attention(question.model.denoiser, question.text).detail_layers
    found = [
        question.by(question.control(self_attention="layout", layers=layers))
        for layers in (("",), late, ("nowhere.",))
    ]
    assert deviation(found[2], question.plainly()) < 1e-6
    assert deviation(found[0][1], found[1][1]) > 1e-5 < deviation(found[1][1], found[2][1])


@every
def test_rows_outside_the_edit_predict_what_they_predicted(family: Open, name: str) -> None:
    question = asked(family(name))
    control = question.control(
        cross=make_cross(*given(question.words, "windows")), self_attention="layout", reach="prompted"
    )
    assert deviation(question.by(control)[[0, 3]], question.plainly()[[0, 3]]) < 1e-6


@every
def test_the_network_is_bit_for_bit_as_before_after_an_edit_and_after_an_error(
    family: Open, name: str
) -> None:
    question = asked(family(name))
    network = question.model.denoiser
    processors, before = processors_of(network), question.plainly()
    weights = {key: value.clone() for key, value in network.state_dict().items()}
    assert torch.equal(question.by(question.control()), before), "a control that asks for nothing"
    question.by(
        question.control(cross=make_cross(*given(question.words, "replace")), self_attention="contents")
    )
    with pytest.raises(RuntimeError, match=r"must match|size"):  # an edit of fewer tokens than there are
        question.by(question.control(cross=Cross(torch.ones(TARGETS, 5, 5), None)))
    after = processors_of(network)
    assert list(after) == list(processors) and all(after[key] is processors[key] for key in after)
    assert all(torch.equal(value, weights[key]) for key, value in network.state_dict().items())
    assert torch.equal(question.plainly(), before)


class Found(TorchDispatchMode):
    """Notes operations that make a map, and tensors as large as one."""

    def __init__(self, words: int, places: int = PLACES, *, width: int = 0) -> None:
        """`width` is that of a head; its tokens [tokens, width], turned by halves, are no map of as many words."""
        super().__init__()  # type: ignore[no-untyped-call]
        sides = (places, words, places + words)
        self.shapes = {
            (queries, keys) for queries in sides for keys in sides if keys not in (width, width // 2)
        }
        self.shapes -= {(words, words)}
        self.found: list[str] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        some = [x for x in (result if isinstance(result, tuple) else (result,)) if isinstance(x, Tensor)]
        maps = [x for x in some if x.dim() > 3 and x.shape[1] > 1]  # [B, heads, …]; a mask is of all heads
        if "softmax" in str(operation) or any(tuple(x.shape[-2:]) in self.shapes for x in maps):
            self.found.append(str(operation))
        return result


@every
def test_no_map_is_materialised_not_even_to_read_words(family: Open, name: str) -> None:
    question = asked(family(name))
    words = given(question.words, "windows")
    width = getattr(question.model.denoiser.config, "attention_head_dim", 0)
    for whose in ("own", "layout", "contents"):
        maps = Maps(torch.ones(1 + TARGETS, 3, question.words), SIZE, max_queries=None)
        control = question.control(cross=make_cross(*words), self_attention=whose, maps=maps)
        with Found(question.words, math.prod(question.grid), width=width) as counted:
            question.by(control)
        assert counted.found == []
    with Found(question.words, math.prod(question.grid), width=width) as counted:
        question.written_out(name, Edit(words))
    assert counted.found, "and the counter finds them where they are"


def test_attention_of_another_kind_is_refused(family: Open) -> None:
    """A family's layers are understood by the class of their processors and by nothing else."""
    model = family("sd3")
    with (
        pytest.raises(UserError, match="JointAttnProcessor2_0"),
        control_attention(model.denoiser, AttentionControl(1)),
    ):
        raise AssertionError
