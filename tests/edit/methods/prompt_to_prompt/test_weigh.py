"""What a weighted word is to the tokens of the others."""

from __future__ import annotations

import itertools

import pytest
import torch
from PIL import ImageStat

from backbone.io.console import UserError
from backbone.models.cache import encode_prompts_cached
from backbone.models.model import Backbone
from backbone.models.sample import Request, sample
from edit.attention.alignment import tokenize_prompt
from edit.inversion.inversion import invert
from edit.methods.prompt_to_prompt.replace import replace
from edit.methods.prompt_to_prompt.settings import ReplaceSettings
from edit.methods.prompt_to_prompt.weigh import refuse_many_weights, remove_phrase, weigh_context

PROMPT, REST = "a green dog in a park", "a dog in a park"


@pytest.fixture(scope="module")
def moji() -> Backbone:
    return Backbone.open("moji", device="cpu")


def weighed(model: Backbone, weights: dict[str, float], prompt: str = PROMPT) -> torch.Tensor:
    text = encode_prompts_cached(model, [prompt])
    found = weigh_context(model, text, [tokenize_prompt(model.text_encoder.segments, prompt)], weights)
    return next(iter(found.text.values()))[0]


def encoded(model: Backbone, prompt: str) -> torch.Tensor:
    return next(iter(encode_prompts_cached(model, [prompt]).text.values()))[0]


def test_at_weight_zero_the_other_tokens_know_nothing_of_a_word(moji: Backbone) -> None:
    found, without, whole = weighed(moji, {"green": 0.0}), encoded(moji, REST), encoded(moji, PROMPT)
    torch.testing.assert_close(found[:2], without[:2])  # the beginning and “a”
    torch.testing.assert_close(found[3:8], without[2:7])  # “dog in a park” and its end, one place further
    torch.testing.assert_close(found[8:], without[8:])  # the padding
    assert torch.equal(found[2], whole[2])  # the word itself, which the attention weighs


def test_other_weights_lie_on_the_line_through_both_and_few_go_far_beyond(moji: Backbone) -> None:
    none, half, whole, strong = (weighed(moji, {"green": weight}) for weight in (0.0, 0.5, 1.0, 3.0))
    assert torch.equal(whole, encoded(moji, PROMPT))
    torch.testing.assert_close(half, (none + whole) / 2)
    torch.testing.assert_close(strong, whole + 0.25 * (whole - none))


def test_several_words_are_weighted_together_in_any_order(moji: Backbone) -> None:
    prompt, weights = "a small green dog in a park", {"small": 0.0, "green": 0.0, "park": 2.0}
    without = encoded(moji, REST)
    for order in (["small", "green"], ["green", "small"]):
        found = weighed(moji, dict.fromkeys(order, 0.0), prompt)
        torch.testing.assert_close(found[4:9], without[2:7])  # “dog in a park” and its end
    first, second = (
        weighed(moji, dict(pairs), prompt) for pairs in (weights.items(), [*weights.items()][::-1])
    )
    torch.testing.assert_close(first, second)
    # “dog in a” of the two words that are left, “park” weighted beside them as in a prompt without the others
    torch.testing.assert_close(first[4:7], weighed(moji, {"park": 2.0}, REST)[2:5])


def test_several_words_are_weighted_as_the_mean_over_every_set_of_them_left_out(moji: Backbone) -> None:
    """Of weights below 1: each word is there with its weight as the chance, by itself."""
    prompt, weights = "a small green dog in a park", {"small": 0.3, "green": 0.6}
    expected = torch.zeros(5, encoded(moji, prompt).shape[-1])  # of “dog in a park” and its end
    for small, green in itertools.product((False, True), repeat=2):
        chance = (0.3 if small else 0.7) * (0.6 if green else 0.4)
        words = f"a {'small ' * small}{'green ' * green}dog in a park"
        expected += chance * encoded(moji, words)[2 + small + green :][:5]
    torch.testing.assert_close(weighed(moji, weights, prompt)[4:9], expected)


def test_more_words_than_can_be_left_out_in_every_way_are_refused_before_anything_is_encoded() -> None:
    prompt = "one two three four five six seven eight nine"
    read = tokenize_prompt(Backbone.open("moji", device="cpu").text_encoder.segments, prompt)
    words = prompt.split()
    refuse_many_weights(read, dict.fromkeys(words[:8], 2.0) | {"nine": 1.0, "ten": 2.0})
    with pytest.raises(UserError, match=r"9 words of .* are reweighted in all steps, and at most 8 are"):
        refuse_many_weights(read, dict.fromkeys(words, 2.0))


def test_phrases_that_are_not_there_or_are_all_there_is_change_nothing(moji: Backbone) -> None:
    assert torch.equal(weighed(moji, {"purple": 0.0}), encoded(moji, PROMPT))
    assert torch.equal(weighed(moji, {PROMPT: 0.0}), encoded(moji, PROMPT))


def test_a_phrase_is_left_out_as_whole_words_wherever_it_stands() -> None:
    assert remove_phrase("a red car, a Red dog and a bored cat", "red") == "a car, a dog and a bored cat"
    assert remove_phrase("a  dog", "cat") == "a  dog"


@pytest.mark.parametrize(
    ("prompt", "phrase"),
    [
        ("the king’s crown in a park", "king's"),
        ("the king's crown in a park", "king’s"),
        ("the red  cat crown in a park", "red cat"),
        ("the Café crown in a park", "cafe\u0301"),
        ("the T‑Shirt crown in a park", "t-shirt"),
    ],
)
def test_a_phrase_that_the_prompt_spells_otherwise_is_left_out_too(
    moji: Backbone, prompt: str, phrase: str
) -> None:
    assert tokenize_prompt(moji.text_encoder.segments, prompt).find(phrase)
    assert remove_phrase(prompt, phrase) == "the crown in a park"


def test_words_with_a_window_of_their_own_are_weighed_by_attention_alone() -> None:
    settings = ReplaceSettings(
        weights={"red": 2.0, "dog": 2.0}, windows={"red": (0.0, 0.5), "dog": (0.0, 1.0)}, cross=0.0
    )
    assert settings.steady_weights == {"dog": 2.0}
    assert ReplaceSettings(weights={"red": 2.0}, cross=1.0).steady_weights == {"red": 2.0}
    assert ReplaceSettings(weights={"red": 2.0}, cross=0.8).steady_weights == {}


def test_a_colour_fades_with_its_weight_and_the_rest_of_the_image_stays(moji: Backbone) -> None:
    prompt = "a green dog on a white background"
    [drawn] = sample(moji, [Request(prompt, (0, 0))], steps=6, guidance=4.0, seed=0)
    inversion = invert(moji, drawn, prompt, steps=6)
    greens = []
    for weight in (0.0, 1.0):
        edited = replace(inversion, prompt, ReplaceSettings(weights={"green": weight})).images[0]
        red, green, _ = ImageStat.Stat(edited).mean
        greens.append(green - red)
    assert greens[0] < 0.5 * greens[1]
