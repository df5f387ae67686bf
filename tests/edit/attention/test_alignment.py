"""How two prompts are laid side by side."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch

from backbone.io.console import UserError
from edit.attention.alignment import (
    Alignment,
    TokenizedPrompt,
    align,
    read_prompt,
    require,
    steps_inside,
    token_mask,
    token_weights,
    token_windows,
)
from edit.methods.prompt_to_prompt.weigh import remove_phrase
from tests.tiny import tiny_tokenizer

TOKENIZER: Any = tiny_tokenizer()  # a, dog, cat, in, the, snow, red are one token each; "hat" is three


def prompt(text: str) -> TokenizedPrompt:
    return read_prompt(TOKENIZER, text)


def aligned(source: str, target: str, *swaps: tuple[str, str]) -> Alignment:
    return align(prompt(source), prompt(target), swaps=swaps)


def fates(alignment: Alignment) -> list[tuple[str, str, str]]:
    return [
        (
            span.change,
            " ".join(word.text for word in span.source),
            " ".join(word.text for word in span.target),
        )
        for span in alignment.spans
    ]


def test_words_are_the_tokenizers_with_punctuation_apart_and_every_token_in_one_of_them() -> None:
    read = prompt("A hat, in  the dog's SNOW!!")
    assert [word.text for word in read.words] == ["a", "hat", ",", "in", "the", "dog", "'s", "snow", "!!"]
    positions = list(itertools.chain.from_iterable(word.positions for word in read.words))
    assert positions == list(range(1, read.sections[0].end))
    assert len(read.words[1].positions) == 3
    assert read.length == 77


def test_a_prompt_laid_beside_itself_maps_every_token_to_itself() -> None:
    alignment = aligned("a red hat, in the snow", "a red hat, in the snow")
    assert torch.equal(alignment.mapping, torch.eye(77))
    assert torch.equal(alignment.from_source, torch.ones(77))
    assert list(alignment.changes()) == []


def test_a_replaced_word_takes_the_old_words_place_and_the_rest_stays() -> None:
    alignment = aligned("a cat in the snow", "a dog in the snow")
    assert fates(alignment) == [
        ("kept", "a", "a"),
        ("replaced", "cat", "dog"),
        ("kept", "in the snow", "in the snow"),
    ]
    assert torch.equal(alignment.mapping, torch.eye(77))


def test_words_after_one_of_another_token_count_still_find_their_own_column() -> None:
    """Where the reference writes m[j, j] instead of m[i, j], they take a shifted one."""
    alignment = aligned("a cat in the snow", "a hat in the snow")
    mapping = alignment.mapping
    hat = alignment.target.words[1].positions
    assert mapping[2, list(hat)].tolist() == pytest.approx([1 / 3] * 3)
    for old, new in zip(alignment.source.words[2:], alignment.target.words[2:], strict=True):
        assert mapping[old.positions[0], new.positions[0]] == 1
    assert mapping[alignment.source.sections[0].end, alignment.target.sections[0].end] == 1
    assert mapping[76, 76] == 1


def test_many_tokens_give_all_their_attention_to_one() -> None:
    alignment = aligned("a hat in the snow", "a cat in the snow")
    assert alignment.mapping[list(alignment.source.words[1].positions), 2].tolist() == [1, 1, 1]


def test_an_inserted_word_keeps_its_own_attention_and_shifts_nothing() -> None:
    alignment = aligned("a cat in the snow", "a red cat in the snow")
    assert fates(alignment)[1] == ("added", "", "red")
    assert alignment.from_source[2] == 0
    assert alignment.mapping[2, 3] == 1, "cat, one position later"
    assert alignment.from_source.sum() == 76


def test_a_removed_word_gives_its_attention_to_nobody() -> None:
    alignment = aligned("a red cat in the snow", "a cat in the snow")
    assert fates(alignment)[1] == ("removed", "red", "")
    assert alignment.mapping[2].sum() == 0
    assert alignment.from_source[alignment.target.sections[0].end + 1] == 0, (
        "padding that stands where the source ended keeps its own"
    )


def test_replacing_refining_and_removing_happen_together() -> None:
    alignment = aligned("a cat in the red snow, the dog", "a red dog in the snow, the dog")
    assert fates(alignment) == [
        ("kept", "a", "a"),
        ("replaced", "cat", "red dog"),
        ("kept", "in the", "in the"),
        ("removed", "red", ""),
        ("kept", "snow , the dog", "snow , the dog"),
    ]


def test_repeated_words_are_matched_in_order_with_the_fewest_interruptions() -> None:
    assert fates(aligned("a cat in a cat in a cat", "a cat in a dog in a cat")) == [
        ("kept", "a cat in a", "a cat in a"),
        ("replaced", "cat", "dog"),
        ("kept", "in a cat", "in a cat"),
    ]
    assert fates(aligned("a cat in a cat", "a cat")) == [
        ("kept", "a cat", "a cat"),
        ("removed", "in a cat", ""),
    ]


def test_punctuation_and_case_and_spaces_change_nothing() -> None:
    assert fates(aligned("a Cat  in the snow.", "a cat, in the snow")) == [
        ("kept", "a cat", "a cat"),
        ("added", "", ","),
        ("kept", "in the snow", "in the snow"),
        ("removed", ".", ""),
    ]


def test_attention_is_neither_made_nor_lost_where_no_word_is_added_or_removed() -> None:
    """Every source token that takes part gives exactly its attention away."""
    vocabulary = ["a", "dog", "cat", "in", "the", "snow", "red", "hat", ",", "ship"]
    chance = random.Random(0)
    for _ in range(200):
        source = [chance.choice(vocabulary) for _ in range(chance.randint(1, 8))]
        target = [word if chance.random() < 0.7 else chance.choice(vocabulary) for word in source]
        if not set(source) & set(target) - {","}:
            continue
        try:
            alignment = aligned(" ".join(source), " ".join(target))
        except UserError:
            continue
        mapping = alignment.mapping
        given = {
            position
            for span in alignment.spans
            if span.target
            for word in span.source
            for position in word.positions
        }
        for position in given:
            tokens = mapping[:, mapping[position] > 0].sum(1)
            assert tokens[position] == pytest.approx(1.0, abs=1e-5)
        assert ((alignment.from_source == 0) == (mapping.sum(0) == 0)).all()


def test_turning_an_alignment_around_turns_its_fates_around() -> None:
    there, back = (
        aligned("a cat in the snow", "a red dog in snow"),
        aligned("a red dog in snow", "a cat in the snow"),
    )
    turned = {"kept": "kept", "replaced": "replaced", "added": "removed", "removed": "added"}
    assert [(turned[change], new, old) for change, old, new in fates(there)] == fates(back)


def test_a_swap_is_made_whatever_stands_around_it() -> None:
    plain = aligned("a cat in the snow", "a red dog in the snow")
    swapped = aligned("a cat in the snow", "a red dog in the snow", ("cat", "dog"))
    assert ("replaced", "cat", "red dog") in fates(plain)
    assert fates(swapped)[1:3] == [("added", "", "red"), ("replaced", "cat", "dog")]


def test_a_swap_of_several_words_goes_as_one() -> None:
    swapped = aligned("a red cat in the snow", "a hat in the snow", ("red cat", "hat"))
    assert ("replaced", "red cat", "hat") in fates(swapped)
    assert swapped.mapping[2:4, 2:5].flatten().tolist() == pytest.approx([1 / 3] * 6)


def test_a_word_brings_what_took_its_place() -> None:
    alignment = aligned("a cat in the snow", "a dog in the snow")
    for word in ("cat", "dog"):
        source, target = alignment.find_both(word)
        assert ([w.text for w in source], [w.text for w in target]) == (["cat"], ["dog"])
    assert [w.text for w in alignment.find_both("snow")[1]] == ["snow"]
    assert alignment.find_both("ship") == ((), ())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a cat in İzmir", ["a", "cat", "in", "i\u0307zmir"]),
        ("लाल बिल्ली, हरा", ["लाल", "बिल्ली", ",", "हरा"]),
        ("แมว สีแดง", ["แมว", "สีแดง"]),
        ("a ❤️, a cat", ["a", "❤️,", "a", "cat"]),
        ("a cafe\u0301", ["a", "café"]),
    ],
)
def test_marks_belong_to_the_letters_that_they_stand_on(text: str, words: list[str]) -> None:
    found = prompt(text)
    assert [word.text for word in found.words] == words
    positions = [position for word in found.words for position in word.positions]
    assert positions == [*range(positions[0], positions[-1] + 1)]
    assert all(found.find(word) for word in words) and found.find(text.split()[-1])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("10 cats and 1 dog", ["10", "cats", "and", "1", "dog"]),
        ("a 4k photo, 1990s", ["a", "4k", "photo", ",", "1990s"]),
        ("3.5 of 10%", ["3", ".", "5", "of", "10", "%"]),
        ("猫2匹", ["猫", "2", "匹"]),
    ],
)
def test_a_number_is_a_word_and_none_of_its_digits_is(text: str, words: list[str]) -> None:
    assert [word.text for word in prompt(text).words] == words


def test_a_digit_that_is_a_word_is_found_as_one_alone() -> None:
    read = prompt("10 cats and 1 dog")
    (one,) = read.find("1")
    assert token_mask(read.find("10"), read.length).nonzero().flatten().tolist() == [1, 2]
    assert one is read.words[3] and read.find("0") == ()
    (change,) = aligned("10 cats", "12 cats").changes()
    assert [word.text for word in (*change.source, *change.target)] == ["10", "12"]


def test_a_letter_and_its_mark_say_what_one_character_says() -> None:
    apart, one = "a cafe\u0301 in the snow", "a café in the snow"
    assert fates(aligned(apart, one)) == fates(aligned(one, one))
    assert prompt(one).find("cafe\u0301") == prompt(apart).find("café") != ()


def test_apostrophes_and_hyphens_of_text_programs_are_those_of_a_keyboard() -> None:
    for text in ("the king’s t‑shirt", "the king's t-shirt"):
        read = prompt(text)
        assert "".join(word.text for word in read.find("king's")) == text.split()[1]
        assert read.find("King’s") == read.find("king's") != ()
        assert read.find("t-shirt") == read.find("T‑Shirt") != ()
    mixed = align(prompt("a king's red t-shirt"), prompt("a king’s blue t‑shirt"))
    assert [[word.text for word in span.source] for span in mixed.changes()] == [["red"]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("公园里的猫", ["公", "园", "里", "的", "猫"]),
        ("公園にいる白い猫", ["公", "園", "にいる", "白", "い", "猫"]),
        ("コーヒーを飲む猫", ["コーヒー", "を", "飲", "む", "猫"]),
        ("a 猫 in the park", ["a", "猫", "in", "the", "park"]),
        ("jkw狗", ["jkw", "狗"]),
        ("공원에 있는 고양이", ["공원에", "있는", "고양이"]),
    ],
)
def test_words_of_writing_without_spaces_are_told_apart(text: str, words: list[str]) -> None:
    read = prompt(text)
    assert [word.text for word in read.words] == words
    assert sorted(position for word in read.words for position in word.positions) == list(
        range(1, read.sections[0].end)
    )


def test_a_word_without_spaces_around_it_is_replaced_weighted_and_found() -> None:
    source, target = prompt("公园里的猫"), prompt("公园里的狗")
    alignment = align(source, target)
    assert [(span.change, len(span.source)) for span in alignment.spans] == [("kept", 4), ("replaced", 1)]
    assert str(alignment).splitlines()[0] == "source │ 公园里的 │ 猫"
    assert [word.text for word in source.find("公园")] == ["公", "园"]
    assert alignment.find_both("猫") == (source.words[-1:], target.words[-1:])
    assert token_weights(source, {"猫": 2.0})[source.words[-1].positions[0]] == 2
    assert remove_phrase("公园里的猫", "公园") == "里的猫"


def test_a_phrase_is_found_wherever_it_stands() -> None:
    read = prompt("a red cat in the snow, a red hat")
    assert len(read.find("red")) == 2
    assert [word.text for word in read.find("Red Cat")] == ["red", "cat"]
    assert read.find("edc") == ()


def test_the_printed_alignment_shows_both_prompts_and_what_became_of_the_words() -> None:
    lines = str(aligned("a cat in the snow", "a red hat in the snow")).splitlines()
    assert [[cell.strip() for cell in line.split("│")] for line in lines] == [
        ["source", "a", "cat", "in the snow"],
        ["", "", "replaced (1→4 tokens)", ""][: len(lines[1].split("│"))],
        ["target", "a", "red hat", "in the snow"],
    ]


def test_prompts_that_say_the_same_are_told_to_change_nothing() -> None:
    assert "Both prompts say the same" in str(aligned("a cat in the snow", "A cat  in the snow"))
    assert "say the same" not in str(aligned("a cat in the snow", "a cat in snow"))


def test_the_printed_alignment_speaks_the_words_that_were_typed() -> None:
    alignment = aligned("a red dog in the snow", "a JKL cat in the snow")
    source, _, target = alignment.describe({"jkl": "[V]", "red": "<r>", "no": "yes"}).splitlines()
    assert [cell.strip() for cell in source.split("│")][1:] == ["a", "<r>", "dog", "in the snow"]
    assert [cell.strip() for cell in target.split("│")][1:] == ["a", "[V]", "cat", "in the snow"]


def test_weights_stand_at_the_words_tokens_alone() -> None:
    read = prompt("a red hat in the snow")
    found = token_weights(read, {"hat": 2.0, "ship": 5.0})
    assert found[list(read.words[2].positions)].tolist() == [2, 2, 2]
    assert found.sum() == 77 + 3


def test_a_window_covers_its_share_of_the_steps() -> None:
    assert steps_inside(10, (0.0, 0.8)).tolist() == [1] * 8 + [0] * 2
    assert steps_inside(50, (0.2, 0.4)).sum() == 10
    assert steps_inside(10, (0.0, 0.0)).sum() == 0
    assert steps_inside(3, (0.0, 1.0)).sum() == 3


def test_words_may_have_windows_of_their_own() -> None:
    read = prompt("a cat in the snow")
    found = token_windows(read, 10, (0.0, 0.8), {"cat": (0.0, 0.2)})
    assert found.shape == (10, 77)
    assert found[:, 2].sum() == 2
    assert found[:, 3].sum() == 8


def test_columns_mark_the_tokens_of_words() -> None:
    read = prompt("a hat")
    assert token_mask(read.find("hat"), 77).nonzero().flatten().tolist() == [2, 3, 4]


@pytest.mark.parametrize(
    ("source", "target", "complaint"),
    [
        ("cat", "dog", "share no words"),
        ("cat , snow", "dog , hat", "share no words"),
        ("", "a dog", "empty"),
        ("a cat", "  ", "empty"),
    ],
)
def test_prompts_that_cannot_be_aligned_are_refused(source: str, target: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        aligned(source, target)


def test_a_word_that_is_missing_is_answered_with_the_nearest() -> None:
    prompts = [prompt("a cat in the snow"), prompt("a dog in the snow")]
    require(prompts, "dog")
    with pytest.raises(UserError, match="Did you mean “snow”"):
        require(prompts, "snwo")
    with pytest.raises(UserError, match="Choose among a, cat, dog, in, snow, the"):
        require(prompts, "helicopter")
    with pytest.raises(UserError, match="Choose among a, dog"):  # and not “Did you mean a?”
        require([prompt("a dog")], "cat")
    with pytest.raises(
        UserError, match="Say each by itself: the option stands once for “cat”, and again for “dog”"
    ):
        require(prompts, "cat, dog")
    with pytest.raises(UserError, match="Did you mean “cat”"):
        aligned("a cat in the snow", "a dog in the snow", ("car", "dog"))


def test_a_word_that_stands_in_two_swaps_is_named() -> None:
    for second in (("dog", "cat"), ("dog", "beach"), ("beach", "Cat")):
        with pytest.raises(UserError, match=r"^“(dog|Cat)” stands in two swaps"):
            aligned("a dog on a beach", "a cat on a beach", ("dog", "cat"), second)


def test_swaps_that_cross_or_overlap_are_refused() -> None:
    with pytest.raises(UserError, match="another order"):
        aligned("a cat in a hat", "a ship in a dog", ("cat", "dog"), ("hat", "ship"))
    with pytest.raises(UserError, match="overlaps"):
        aligned("a red cat in the snow", "a hat in the snow dog", ("red cat", "hat"), ("cat", "dog"))
