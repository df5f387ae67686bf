"""Concepts: tokens become rare words; a token that nobody owns is a mistake with a remedy."""

from __future__ import annotations

import os
import re
import shlex
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from backbone.adapters.concept import (
    Concept,
    check_token,
    choose_rare_word,
    explain_no_run,
    find_foreign_syntax,
    list_concept_runs,
    mentions,
    name_call,
    needs_whole_base,
    read_concept,
    replace_tokens,
    resolve_placeholder_tokens,
    resolve_prompts,
    say_uncalled,
)
from backbone.io.console import UserError
from backbone.io.files import write_tensors
from tests.tiny import RARE, tiny_tokenizer


def concept(token: str = "[V]", words: str = "bcd") -> Concept:
    return Concept("lora", "moji", "f", {token: words}, "dog", "w.safetensors")


def test_a_token_becomes_its_words_wherever_it_stands() -> None:
    assert resolve_placeholder_tokens("a [V] dog and [V]", [concept()]) == "a bcd dog and bcd"


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("a sks dog, a dog asleep between two desks", "a jkw dog, a dog asleep between two desks"),
        ("sks's dog, (sks), “sks”, sks-like", "jkw's dog, (jkw), “jkw”, jkw-like"),
        ("sks2, asks, sks_dog, ßsks", "sks2, asks, sks_dog, ßsks"),
        ("一只sks狗", "一只jkw狗"),
        ("หมาsksในหิมะ", "หมาjkwในหิมะ"),
    ],
)
def test_a_plain_token_counts_as_a_whole_word_only(prompt: str, wanted: str) -> None:
    assert resolve_placeholder_tokens(prompt, [concept("sks", "jkw")]) == wanted


def test_a_token_in_brackets_needs_no_space_and_words_are_not_replaced_again() -> None:
    assert resolve_placeholder_tokens("my[V]dog", [concept()]) == "my bcd dog"
    chained = [concept("[V]", "bcd"), concept("bcd", "fgh")]
    assert resolve_placeholder_tokens("a [V] and a bcd", chained) == "a bcd and a fgh"


def test_other_programs_weights_are_said_to_be_text_and_their_loras_have_a_place(
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights = ("(red:1.3)", "((red))", "red++", "(red hat)1.2", "(red hat)--", "red::2", "red ::-1")
    others = ("--w 512", "--n ugly", "{red|blue}", "BREAK", "|||", "__colors/red__", "embedding:ugly")
    for words in (*weights, *others):
        prompt = f"a dog {words}"
        assert resolve_placeholder_tokens(prompt, []) == prompt
        assert f"“{words}” is read as plain text" in capsys.readouterr().err
    resolve_placeholder_tokens(r"a dog, name \(series\)", [])
    assert r"“\(” is read as plain text: brackets behind a backslash" in capsys.readouterr().err
    for prompt in (
        "a (red) dog",
        "a dog -- in a park",
        "a dog {red}",
        "a dog, 1+1",
        "a well--lit dog",
        "a __ dog (2)",
    ):
        resolve_placeholder_tokens(prompt, [])
        assert capsys.readouterr().err == ""
    assert resolve_placeholder_tokens("[a red dog:a cat:0.5]", []) == "[a red dog:a cat:0.5]"
    assert "words that change on the way" in capsys.readouterr().err
    with pytest.raises(UserError, match="leave the brackets out, which weaken no word here"):
        resolve_placeholder_tokens("a [red] dog", [])
    for switched in ("[red:blue:0.5]", "[red::8]", "[red:0.3]", "[red|blue]"):
        with pytest.raises(UserError, match=r"change on the way, or by turns, .* write one of them"):
            resolve_placeholder_tokens(f"a {switched} dog", [])
        assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="--concept RUN and --scale"):
        resolve_placeholder_tokens("a dog <lora:x:1>", [])


def test_two_concepts_keep_their_own_words() -> None:
    both = [concept("[V]", "bcd"), concept("[V2]", "fgh")]
    assert resolve_placeholder_tokens("a [V] dog beside a [V2] cat", both) == "a bcd dog beside a fgh cat"


def test_a_token_without_an_owner_names_the_newest_run_that_has_it(tmp_path: Path) -> None:
    for age, name in ((200, "old"), (100, "new")):
        (tmp_path / name).mkdir()
        concept().write(tmp_path / name)
        os.utime(tmp_path / name / "concept.json", (10_000 - age, 10_000 - age))
    with pytest.raises(UserError, match=r"--concept .*new"):
        resolve_placeholder_tokens("a [V] dog", [], runs=tmp_path)


def test_somebody_else_s_closed_run_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("closed", "own"):
        (tmp_path / name).mkdir()
        concept().write(tmp_path / name)
    read = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.parent.name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert [run.name for run, _ in list_concept_runs(tmp_path)] == ["own"]


def test_a_plain_word_that_a_run_owns_is_recognised_too(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    concept("sks").write(tmp_path / "run")
    with pytest.raises(UserError, match="sks"):
        resolve_placeholder_tokens("a sks dog", [], runs=tmp_path)
    assert resolve_placeholder_tokens("a dog with asks", [], runs=tmp_path) == "a dog with asks"


def test_a_token_that_no_run_has_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Train it first"):
        resolve_placeholder_tokens("a <thing> dog", [], runs=tmp_path)


def test_a_concept_comes_back_from_its_file(tmp_path: Path) -> None:
    concept().write(tmp_path)
    assert read_concept(tmp_path).tokens == {"[V]": "bcd"}
    assert read_concept(tmp_path).weights_path == tmp_path / "w.safetensors"


def test_a_folder_without_a_concept_is_a_clear_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no concept"):
        read_concept(tmp_path)


def test_rare_words_are_single_tokens_and_follow_from_the_key() -> None:
    vocabulary = tiny_tokenizer().get_vocab()
    words = {choose_rare_word(vocabulary, str(key)) for key in range(40)}
    assert words == set(RARE)
    assert choose_rare_word(vocabulary, "x") == choose_rare_word(vocabulary, "x")
    assert choose_rare_word(vocabulary, "x", taken=RARE[:-1]) == RARE[-1]


def test_an_ordinary_word_cannot_be_a_token() -> None:
    vocabulary = tiny_tokenizer().get_vocab()
    with pytest.raises(UserError, match="ordinary word"):
        check_token("dog", vocabulary)
    for token in ("[V]", "<dog>", "V*", "<s0><s1>"):
        check_token(token, vocabulary)
    for token in ("sks,", "“sks”", "'sks'", "(sks)", "sks."):
        with pytest.raises(UserError, match=r"has marks around it\. Write it as sks alone"):
            check_token(token, vocabulary)
    with pytest.raises(UserError, match="has braces"):
        check_token("{token}", vocabulary)


@pytest.mark.parametrize(
    ("names", "changed", "whole"),
    [
        (("unet.a.lora_A.weight", "unet.a.lora_B.weight"), "", False),
        (("unet.a.lora_A.weight", "unet.a.lora_B.weight", "unet.a.lora_magnitude_vector.weight"), "", True),
        (("lora_unet_a.lokr_w1", "lora_unet_a.lokr_w2"), "", True),
        (("unet.a.lora_A.weight", "unet.a.lora_B.weight"), "delta.safetensors", True),
        ((), "", False),
    ],
)
def test_low_rank_factors_alone_leave_a_base_in_few_bits(
    names: tuple[str, ...], changed: str, whole: bool, tmp_path: Path
) -> None:
    if names:
        write_tensors(tmp_path / "w.safetensors", {name: torch.zeros(2) for name in names})
    one = replace(concept(), changed=changed, folder=tmp_path)
    assert needs_whole_base(one) is whole


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("a[V]dog", "a bcd dog"),
        ("two [V]s and 3[V]", "two bcd s and 3 bcd"),
        ("[V]'s dog, [V]-like", "bcd's dog, bcd-like"),
        ("一只[V]狗", "一只bcd狗"),
        ("หมา[V]ในหิมะ", "หมาbcdในหิมะ"),
    ],
)
def test_words_never_grow_together_with_what_stands_beside_a_token(prompt: str, read: str) -> None:
    assert replace_tokens(prompt, [concept()]) == read


def test_a_token_of_two_meanings_is_refused_where_a_prompt_has_it() -> None:
    both = [replace(concept(words=words), folder=Path(words)) for words in ("bcd", "fgh")]
    with pytest.raises(UserError, match=r"\[V\] is a token of bcd and of fgh.*customize merge bcd fgh"):
        resolve_placeholder_tokens("a [V] dog", both, runs=None)
    assert resolve_placeholder_tokens("a dog", both, runs=None) == "a dog"
    assert (
        resolve_placeholder_tokens("a [V]", [both[0], replace(both[0], folder=Path("x"))], runs=None)
        == "a bcd"
    )
    learned = [replace(concept(words="[V] [V]/1"), folder=Path(name)) for name in "ab"]
    with pytest.raises(UserError, match="is a token of a and of b"):
        resolve_placeholder_tokens("a [V]", learned, runs=None)


def test_two_concepts_of_the_same_words_are_said_where_a_prompt_has_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    both = [
        replace(concept(token, "sks"), folder=Path(name)) for token, name in (("[V]", "dog"), ("[W]", "cat"))
    ]
    assert resolve_placeholder_tokens("a cat on a mat", both, runs=None) == "a cat on a mat"
    assert capsys.readouterr().err == ""
    assert resolve_placeholder_tokens("a [V] cat on it", both, runs=None) == "a sks cat on it"
    assert (
        "dog and cat have both learned “sks”, so [W] in a prompt draws a mix of the two"
        in capsys.readouterr().err
    )


def test_a_strength_behind_a_run_is_answered_with_how_it_is_given(tmp_path: Path) -> None:
    (tmp_path / "dog").mkdir()
    concept().write(tmp_path / "dog")
    for strength in ("0.5", "-.3"):
        with pytest.raises(UserError, match=rf"customize merge .*dog:{strength} OTHER:1"):
            read_concept(f"{tmp_path / 'dog'}:{strength}")
    with pytest.raises(UserError, match="Check the spelling"):
        read_concept(f"{tmp_path / 'dig'}:0.5")


@pytest.mark.parametrize("token", ["[V]", "<$V>", 'the"one"', "`x`", "wow!"])
def test_the_command_that_draws_a_concept_is_what_a_shell_reads(token: str) -> None:
    said = name_call(token, "dog", Path("my runs/dog"))
    assert shlex.split(said)[2:] == [f"a {token} dog in the snow", "--concept", "my runs/dog"]
    assert ('"' in said) == (
        token == "[V]" or '"' in token
    )  # else in quotes within which a shell reads nothing
    assert name_call("[V]", "", Path("dog")) == 'customize sample "a [V] … in the snow" --concept dog'


def test_a_plain_token_begins_a_sentence_with_a_capital_and_brackets_are_as_they_are_written() -> None:
    concept = Concept(
        kind="lora", model="moji", fingerprint="f", tokens={"sks": "bcd", "[V]": "fgh"}, class_noun=""
    )
    assert resolve_placeholder_tokens("Sks dog beside DESKS", [concept], runs=None) == "bcd dog beside DESKS"
    assert mentions("SKS!", "sks") and not mentions("a [v] dog", "[V]")
    with pytest.raises(UserError, match=r"owns the token \[v\]"):
        resolve_placeholder_tokens("a [v] dog", [concept], runs=None)
    two = Concept(
        kind="lora", model="moji", fingerprint="f", tokens={"sks": "bcd", "SKS": "fgh"}, class_noun=""
    )
    assert resolve_placeholder_tokens("sks SKS", [two], runs=None) == "bcd fgh"


@pytest.mark.parametrize(
    ("token", "written"),
    [
        ("[V]", "［V］"),
        ("[V]", "[V ]"),
        ("[V]", "[ V ]"),
        ("[V]", "【V】"),
        ("[V]", "［V]"),
        ("<cat>", "< cat >"),
    ],
)
def test_a_token_in_other_brackets_is_refused_and_not_drawn_as_text(token: str, written: str) -> None:
    concept = Concept(kind="lora", model="moji", fingerprint="f", tokens={token: "bcd"}, class_noun="")
    with pytest.raises(UserError, match=re.escape(f"is not {token}. Write {token}.")):
        resolve_placeholder_tokens(f"a {written} dog", [concept], runs=None)
    assert resolve_placeholder_tokens(f"a ({token}) [{token}]", [concept], runs=None) == "a (bcd) [bcd]"


@pytest.mark.parametrize("old", [False, True])
def test_words_that_are_saved_in_a_model_s_own_tokenizer_may_stand_in_prompts(
    old: bool, tmp_path: Path
) -> None:
    if old:  # as transformers wrote them before its version 5
        (tmp_path / "tokenizer").mkdir()
        (tmp_path / "tokenizer" / "added_tokens.json").write_text('{"[V]": 214, "[V]_1": 215, "<end>": 3}')
    else:
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens(["[V]", "[V]_1"])
        tokenizer.save_pretrained(tmp_path / "tokenizer")
    prompt = "a [V] [V]_1 dog"
    assert resolve_placeholder_tokens(prompt, [], runs=None, model=str(tmp_path)) == prompt
    own = concept("[W]")
    assert resolve_placeholder_tokens("a [W] [V]", [replace(own, model=str(tmp_path))]) == "a bcd [V]"
    for model in (str(tmp_path), "moji", "org/name"):
        with pytest.raises(UserError, match=r"No given concept owns the token \[X\]"):
            resolve_placeholder_tokens("a [X] dog", [], runs=None, model=model)
    with pytest.raises(UserError, match="owns the token <\\|endoftext"):
        resolve_placeholder_tokens("a dog<|endoftext|>", [], runs=None, model=str(tmp_path))


def test_a_concept_that_no_prompt_names_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    tokens = {"[V]": "bcd", "[W]": "fgh"}
    one = Concept(
        kind="lora", model="moji", fingerprint="f", tokens=tokens, class_noun="dog", folder=Path("a")
    )
    style = replace(one, tokens={"[S]": "mnp"}, class_noun="", folder=Path("b"))
    assert resolve_prompts(["a dog", "a [W] dog"], [one, style]) == ["a dog", "a fgh dog"]
    assert not capsys.readouterr().err
    assert resolve_prompts(["a dog", "a cat"], [one, style]) == ["a dog", "a cat"]
    assert "No prompt has [V] or [W], the token of a, so its subject hardly shows" in capsys.readouterr().err
    say_uncalled(["a bcd dog"], [one])  # as an inversion has it
    assert not capsys.readouterr().err


@pytest.mark.parametrize("part", ["a", "(", "((a", "__a", " :", "(a:1", "[a:", "{a|", "[", "中"])
def test_a_long_text_of_marks_or_of_one_word_is_looked_through_at_once(part: str) -> None:
    began = time.perf_counter()
    find_foreign_syntax((part * 20_000)[:20_000])
    assert time.perf_counter() - began < 2  # a minute, where every place is a beginning of every kind


def test_a_folder_of_runs_names_them(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        Concept("lora", "moji", "f", {"[V]": "bcd"}, "dog").write(tmp_path / "runs" / name)
    assert re.search(
        r"no concept itself, but runs: \S+/a, \S+/b\. Name one", explain_no_run(tmp_path / "runs")
    )
