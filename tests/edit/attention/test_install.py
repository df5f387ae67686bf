"""Edited attention equals the formula written out with whole maps, makes none itself, and leaves nothing behind."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from backbone.adapters.lora import add_lora, lora_parameters
from backbone.conditions.conditions import Conditions
from backbone.io.console import UserError
from backbone.models.model import Backbone
from edit.attention.control import AttentionControl, Cross, Maps, Reach, grid, make_cross
from edit.attention.install import control_attention
from edit.attention.separate import Processor

TOKENS = 11


class Layers(nn.Module):
    """Two attention layers where a UNet's block would have them."""

    def __init__(self, width: int, heads: int, text: int) -> None:
        super().__init__()
        self.alone = Attention(width, heads=heads, dim_head=width // heads)
        self.words = Attention(width, cross_attention_dim=text, heads=heads, dim_head=width // heads)


class Found(TorchDispatchMode):
    """Notes every tensor as large as a map, and every operation that makes maps."""

    def __init__(self, queries: int, keys: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shape = (queries, keys)
        self.found: list[str] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        name = str(operation)
        whole = [x for x in (result if isinstance(result, tuple) else (result,)) if isinstance(x, Tensor)]
        if "softmax" in name or any(tuple(x.shape[-2:]) == self.shape for x in whole):
            self.found.append(name)
        return result


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def given(targets: int, *, seed: int = 0, steps_in: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A mapping, taken, weight and window at random [N, T, T], [N, T] × 3."""
    random = seeded(seed)
    mapping = torch.rand(targets, TOKENS, TOKENS, generator=random)
    mapping = mapping * (torch.rand(mapping.shape, generator=random) < 0.3)
    taken = (torch.rand(targets, TOKENS, generator=random) < 0.7).float()
    weight = 1 + torch.rand(targets, TOKENS, generator=random)
    window = (torch.rand(targets, TOKENS, generator=random) < steps_in).float()
    return mapping, taken, weight, window


def maps_of(attn: Any, x: Tensor, text: Tensor) -> Tensor:
    """softmax(q·kᵀ·scale) [B, heads, Q, K], materialised."""
    query, key = (y.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for y in (attn.to_q(x), attn.to_k(text)))
    return cast(Tensor, (query @ key.transpose(-1, -2) * attn.scale).softmax(-1))


def applied(attn: Any, maps: Tensor, text: Tensor) -> Tensor:
    value = attn.to_v(text).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
    return cast(Tensor, attn.to_out[0]((maps @ value).transpose(1, 2).flatten(2)))


def edited_maps(
    maps: Tensor, targets: int, mapping: Tensor, taken: Tensor, weight: Tensor, window: Tensor
) -> Tensor:
    """Prompt-to-prompt on whole maps, as its paper writes it: replaced, refined and reweighted inside the window."""
    source, own = maps[:1], maps[1 : 1 + targets]
    replaced = torch.einsum("bhqi,nij->nhqj", source, mapping)
    a, e, alpha = (x[:, None, None] for x in (taken, weight, window))
    new = (replaced * a + own * (1 - a)) * e
    return torch.cat([source, new * alpha + own * (1 - alpha), maps[1 + targets :]])


@pytest.fixture(params=[(24, 1), (24, 3), (32, 8)], ids=lambda p: f"width {p[0]}, {p[1]} heads")
def layers(request: pytest.FixtureRequest) -> Layers:
    torch.manual_seed(0)
    width, heads = request.param
    return Layers(width, heads, text=20).eval().requires_grad_(False)


def rows(layers: Layers, targets: int, free: int, queries: int = 15) -> tuple[Tensor, Tensor]:
    random = seeded(1)
    batch, width = 1 + targets + free, layers.alone.query_dim
    return torch.randn(batch, queries, width, generator=random), torch.randn(
        batch, TOKENS, 20, generator=random
    )


def wrapped(layers: Layers) -> Layers:
    """The same with a LoRA that changes something."""
    add_lora(layers, "other", rank=2, alpha=2.0, targets=("to_q", "to_k", "to_v", "to_out.0"))
    for value in lora_parameters(layers, "other").values():
        value.data = torch.randn(value.shape, generator=seeded(2)) / 4
        value.requires_grad_(False)
    return layers


CASES: dict[str, Callable[..., Any]] = {
    "replace": lambda m, a, e, w: (m, torch.ones_like(a), torch.ones_like(e), torch.ones_like(w)),
    "refine": lambda m, a, e, w: (m, a, torch.ones_like(e), torch.ones_like(w)),
    "reweight": lambda m, a, e, w: (
        torch.eye(TOKENS).expand_as(m),
        torch.ones_like(a),
        e,
        torch.ones_like(w),
    ),
    "windows": lambda m, a, e, w: (m, a, e, w),
    "outside": lambda m, a, e, w: (m, a, e, torch.zeros_like(w)),
}


@pytest.mark.parametrize("lora", [False, True], ids=["", "lora"])
@pytest.mark.parametrize(("targets", "free"), [(1, 1), (3, 0), (2, 3)])
@pytest.mark.parametrize("case", CASES)
def test_edited_cross_attention_is_the_formula(
    layers: Layers, case: str, targets: int, free: int, lora: bool
) -> None:
    layers = wrapped(layers) if lora else layers
    x, text = rows(layers, targets, free)
    data = CASES[case](*given(targets, steps_in=0.5))
    control = AttentionControl(targets, cross=make_cross(*data))
    said = Processor(control, layers.words.processor)(layers.words, x, text)
    whole = edited_maps(maps_of(layers.words, x, text), targets, *data)
    assert torch.allclose(said, applied(layers.words, whole, text), atol=1e-5)


@pytest.mark.parametrize("lora", [False, True], ids=["", "lora"])
@pytest.mark.parametrize(("targets", "free"), [(1, 1), (3, 2)])
def test_self_attention_takes_the_sources_layout(layers: Layers, targets: int, free: int, lora: bool) -> None:
    layers = wrapped(layers) if lora else layers
    x, _ = rows(layers, targets, free)
    control = AttentionControl(targets, self_attention="layout")
    said = Processor(control, layers.alone.processor)(layers.alone, x)
    maps = maps_of(layers.alone, x, x)
    maps[1 : 1 + targets] = maps[:1]
    assert torch.allclose(said, applied(layers.alone, maps, x), atol=1e-5)


def test_self_attention_takes_the_sources_contents(layers: Layers) -> None:
    x, _ = rows(layers, 2, 1)
    said = Processor(AttentionControl(2, self_attention="contents"), layers.alone.processor)(layers.alone, x)
    seen = x.clone()
    seen[1:3] = x[:1]
    assert torch.allclose(said, applied(layers.alone, maps_of(layers.alone, x, seen), seen), atol=1e-5)


@pytest.mark.parametrize("reach", ["prompted", "all"])
@pytest.mark.parametrize("free", [0, 3, 4], ids=["unguided", "source unguided", "source guided"])
def test_a_target_that_does_not_obey_has_its_own_self_attention(
    layers: Layers, reach: Reach, free: int
) -> None:
    x, _ = rows(layers, 3, free)
    control = AttentionControl(
        3, self_attention="layout", reach=reach, controlled_targets=(True, False, True)
    )
    said = Processor(control, layers.alone.processor)(layers.alone, x)
    all_controlled = Processor(replace(control, controlled_targets=None), layers.alone.processor)(
        layers.alone, x
    )
    none_obeys = Processor(AttentionControl(3), layers.alone.processor)(layers.alone, x)
    own = [2, len(x) - 2] if free else [2]  # the second target's row, and its row without a prompt
    others = [row for row in range(len(x)) if row not in own]
    assert torch.allclose(said[own], none_obeys[own], atol=1e-5)
    assert torch.allclose(said[others], all_controlled[others], atol=1e-5)
    assert not torch.allclose(said[1], none_obeys[1], atol=1e-3)


@pytest.mark.parametrize("free", [2, 3], ids=["source unguided", "source guided"])
def test_rows_without_a_prompt_may_take_it_too(layers: Layers, free: int) -> None:
    """From the source's row of their own kind, where there is one."""
    x, _ = rows(layers, 2, free)
    control = AttentionControl(2, self_attention="contents", reach="all")
    said = Processor(control, layers.alone.processor)(layers.alone, x)
    seen = x.clone()
    seen[1:3] = x[:1]
    seen[-2:] = x[:1] if free == 2 else x[3:4]
    assert torch.allclose(said, applied(layers.alone, maps_of(layers.alone, x, seen), seen), atol=1e-5)


def test_what_is_hidden_is_found_by_no_query(layers: Layers) -> None:
    x, text = rows(layers, 1, 1, queries=15)
    hidden = torch.zeros(6, 10)  # a layer of 3 × 5
    hidden[2, 4:6] = 1  # the third key of the second line
    hidden[0, 0] = 1
    control = AttentionControl(1, hidden=hidden)
    visible = [key for key in range(15) if key not in (0, 5 + 2)]
    found = control.visible_keys(15)
    assert found is not None and found.tolist() == visible
    said = Processor(control, layers.alone.processor)(layers.alone, x)
    seen = x[:, visible]
    assert torch.allclose(said, applied(layers.alone, maps_of(layers.alone, x, seen), seen), atol=1e-5)
    words = Processor(control, layers.words.processor)(layers.words, x, text)
    assert torch.equal(words, layers.words(x, text))
    assert AttentionControl(1, hidden=torch.ones(6, 10)).visible_keys(15) is None  # none would be left


def test_only_the_named_layers_are_changed(layers: Layers) -> None:
    x, _ = rows(layers, 1, 1)
    control = AttentionControl(1, self_attention="layout", layers=("up_blocks",))
    for name, changed in (("up_blocks.0.attn1", True), ("down_blocks.0.attn1", False)):
        found = Processor(control, layers.alone.processor, name)(layers.alone, x)
        assert torch.equal(found, layers.alone(x)) is not changed


def test_self_attention_of_many_queries_stays(layers: Layers) -> None:
    x, _ = rows(layers, 1, 1)
    control = AttentionControl(1, self_attention="layout", self_tokens=14)
    said = Processor(control, layers.alone.processor)(layers.alone, x)
    assert torch.equal(said, layers.alone(x))


@pytest.mark.parametrize("words", [1, 3, 40], ids="{} words".format)
def test_maps_of_words_are_the_columns_of_the_whole_map(layers: Layers, words: int) -> None:
    """Also for more words than a head is wide."""
    x, text = rows(layers, 2, 1)
    columns = (torch.rand(3, words, TOKENS, generator=seeded(3)) < 0.3).float()
    control = AttentionControl(2, cross=make_cross(*given(2)), maps=Maps(columns, (3, 5)))
    processor = Processor(control, layers.words.processor)
    with_maps = processor(layers.words, x, text)
    assert control.maps is not None
    whole = maps_of(layers.words, x, text)[:3].mean(1)
    expected = (whole @ columns.transpose(1, 2)).transpose(1, 2).unflatten(-1, (3, 5))
    assert torch.allclose(control.maps.read(), expected, atol=1e-5)
    control.maps = None
    assert torch.allclose(processor(layers.words, x, text), with_maps, atol=1e-6), "reading changes nothing"


def test_an_attention_mask_is_followed(layers: Layers) -> None:
    x, text = rows(layers, 1, 1)
    mask = torch.zeros(3, 1, TOKENS)
    mask[:, :, 7:] = -10_000.0
    data = CASES["windows"](*given(1, steps_in=0.5))
    said = Processor(AttentionControl(1, cross=make_cross(*data)), layers.words.processor)(
        layers.words, x, text, mask
    )
    attn: Any = layers.words
    scores = attn.to_q(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) @ attn.to_k(text).unflatten(
        -1, (attn.heads, -1)
    ).permute(0, 2, 3, 1)
    maps = (scores * attn.scale + mask[:, None]).softmax(-1)
    assert torch.allclose(said, applied(attn, edited_maps(maps, 1, *data), text), atol=1e-5)


@pytest.mark.parametrize(
    "data", [CASES["replace"], CASES["refine"], CASES["windows"]], ids=["replace", "refine", "windows"]
)
def test_no_map_is_materialised_where_none_is_asked_for(data: Callable[..., Any]) -> None:
    layers = Layers(64, 2, text=20).eval().requires_grad_(False)
    x, text = rows(layers, 2, 2, queries=96)
    control = AttentionControl(2, cross=make_cross(*data(*given(2, steps_in=0.5))), self_attention="layout")
    with Found(96, TOKENS) as across:
        Processor(control, layers.words.processor)(layers.words, x, text)
    with Found(96, 96) as alone:
        Processor(control, layers.alone.processor)(layers.alone, x)
    assert across.found == alone.found == []


def test_reading_words_materialises_no_map_either() -> None:
    layers = Layers(64, 2, text=20).eval().requires_grad_(False)
    x, text = rows(layers, 1, 1, queries=96)
    maps = Maps(torch.ones(2, 1, TOKENS), (8, 12))
    with Found(96, TOKENS) as across:
        Processor(AttentionControl(1, maps=maps), layers.words.processor)(layers.words, x, text)
    assert across.found == []


def test_the_counter_finds_a_map_that_is_materialised() -> None:
    layers = Layers(64, 2, text=20).eval().requires_grad_(False)
    x, text = rows(layers, 1, 1, queries=96)
    with Found(96, TOKENS) as across:
        maps_of(layers.words, x, text)
    assert across.found


def test_a_term_that_is_zero_is_left_out() -> None:
    mapping, taken, weight, window = given(2)
    whole = make_cross(mapping, torch.ones_like(taken), weight, torch.ones_like(window))
    assert isinstance(whole, Cross) and whole.from_target is None
    assert make_cross(mapping, taken, weight, torch.zeros_like(window)) is None


def said(model: Backbone, control: AttentionControl | None = None) -> Tensor:
    """The denoiser's prediction on four rows, not square."""
    random = seeded(4)
    noisy = torch.randn(4, model.latent_shape[0], 6, 10, generator=random)
    text = Conditions({"hidden": torch.randn(4, 77, 16, generator=random)})
    with torch.no_grad():
        if control is None:
            return model.family.network(model.denoiser, text)(noisy, torch.tensor(500))
        with control_attention(model.denoiser, control):
            return model.family.network(model.denoiser, text)(noisy, torch.tensor(500))


def whole_cross(targets: int) -> Cross | None:
    ones = torch.ones(targets, 77)
    return make_cross(torch.eye(77).expand(targets, 77, 77), ones, ones, ones)


def test_a_control_that_asks_for_nothing_changes_nothing(kept: Backbone) -> None:
    assert torch.equal(said(kept, AttentionControl(2)), said(kept))


def test_features_of_the_source_reach_the_targets_alone(kept: Backbone) -> None:
    before, edited = said(kept), said(kept, AttentionControl(2, features="source"))
    assert torch.allclose(edited[[0, 3]], before[[0, 3]], atol=1e-6)
    assert not torch.allclose(edited[1], before[1], atol=1e-3)
    assert torch.equal(said(kept), before), "and nothing stays behind"


def test_rows_outside_the_edit_predict_what_they_predicted(kept: Backbone) -> None:
    before, edited = (
        said(kept),
        said(kept, AttentionControl(2, cross=whole_cross(2), self_attention="layout")),
    )
    assert torch.allclose(edited[[0, 3]], before[[0, 3]], atol=1e-6)
    assert not torch.allclose(edited[1], before[1], atol=1e-3)


def test_the_model_is_bit_for_bit_as_before_after_an_edit_and_after_an_error(kept: Backbone) -> None:
    denoiser = cast(Any, kept.denoiser)
    before, weights = said(kept), {name: value.clone() for name, value in denoiser.state_dict().items()}
    processors = dict(denoiser.attn_processors)
    said(kept, AttentionControl(1, cross=whole_cross(1), self_attention="contents"))
    with pytest.raises(RuntimeError), control_attention(denoiser, AttentionControl(1)):
        raise RuntimeError
    with pytest.raises(RuntimeError, match=r"must match|size"):  # an edit of fewer tokens than the prompt has
        said(kept, AttentionControl(1, cross=Cross(torch.ones(1, 5, 5), None)))
    after = denoiser.attn_processors
    assert all(after[name] is processors[name] for name in processors) and len(after) == len(processors)
    assert all(torch.equal(value, weights[name]) for name, value in denoiser.state_dict().items())
    assert torch.equal(said(kept), before)


def test_attention_that_is_not_plain_is_refused(tiny: Backbone) -> None:
    denoiser = cast(Any, tiny.denoiser)
    plain = dict(denoiser.attn_processors)
    names = itertools.islice(plain, 1)
    denoiser.set_attn_processor({**plain, next(names): IPAdapterAttnProcessor2_0(16, 16)})
    try:
        with (
            pytest.raises(UserError, match="IPAdapterAttnProcessor2_0"),
            control_attention(denoiser, AttentionControl(1)),
        ):
            raise AssertionError
    finally:
        denoiser.set_attn_processor(plain)


def test_maps_settle_on_the_resolution_nearest_to_sixteen_squared() -> None:
    maps = Maps(torch.ones(2, 1, TOKENS), (64, 64))
    for side in (64, 32, 16, 8):
        if maps.reads(side * side):
            maps.add(torch.rand(2, side * side, 1))
    maps.settle()
    assert maps.tokens == 256
    assert [maps.reads(n) for n in (1024, 256, 64)] == [False, True, False]
    assert maps.read().shape == (2, 1, 16, 16)


@pytest.mark.parametrize(
    ("latent", "tokens", "size"),
    [
        ((16, 16), 64, (8, 8)),
        ((18, 14), 63, (9, 7)),
        ((18, 14), 20, (5, 4)),
        ((8, 12), 96, (8, 12)),
        ((8, 8), 60, None),
    ],
)
def test_queries_lie_in_the_plane_as_the_latent_was_halved(
    latent: tuple[int, int], tokens: int, size: tuple[int, int] | None
) -> None:
    assert grid(latent, tokens) == size
