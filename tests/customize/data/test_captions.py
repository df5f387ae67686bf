"""Captions become training prompts: the token in, foreign brackets left as text, what is not read said."""

from __future__ import annotations

from pathlib import Path

import pytest

from backbone.adapters.concept import Concept, resolve_placeholder_tokens
from backbone.io.console import UserError
from backbone.media.sources.record import ImageRecord
from backbone.models.model import Backbone
from customize.data.captions import (
    LONG,
    PIECES,
    describe_brackets,
    describe_foreign_syntax,
    describe_other_word,
    describe_truncated,
    write_prompt,
)


def concept(token: str = "[V]", words: str = "jkw") -> Concept:
    return Concept("lora", "moji", "f", {token: words}, "dog")


def picture(caption: str | None) -> ImageRecord:
    file = Path("dog/1.txt") if caption else None
    return ImageRecord(Path("dog/1.png"), caption, caption_file=file)


@pytest.mark.parametrize(
    ("token", "caption", "wanted"),
    [
        ("[V]", None, "a jkw dog"),
        ("[V]", "a [V] dog on grass", "a jkw dog on grass"),
        ("[V]", "a dog on grass", "a jkw dog, a dog on grass"),
        ("sks", "a dog asleep between two desks", "a jkw dog, a dog asleep between two desks"),
        ("[V]", "1girl, >_<, <o>_<o>, [smile]", "a jkw dog, 1girl, >_<, <o>_<o>, [smile]"),
    ],
)
def test_a_caption_holds_the_token_as_a_whole_word_or_gets_it(
    token: str, caption: str | None, wanted: str
) -> None:
    assert write_prompt(picture(caption), f"a {token} dog", token, concept(token)).resolved == wanted


def test_a_caption_s_placeholders_are_filled_as_the_instance_prompt_s() -> None:
    told = picture("a {token} {class} on grass")
    for token in ("[V]", "sks"):
        prompt = write_prompt(told, f"a {token} dog", token, concept(token), noun="dog")
        assert (prompt.text, prompt.resolved) == (f"a {token} dog on grass", "a jkw dog on grass")
    assert (
        write_prompt(told, "a [V]", "[V]", concept()).resolved == "a jkw {class} on grass"
    )  # a style has none


def test_what_other_runs_are_called_does_not_matter_to_captions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "other").mkdir(parents=True)
    concept("sks").write(tmp_path / "runs" / "other")
    monkeypatch.chdir(tmp_path)
    for caption in ("a sks dog", None):
        prompt = write_prompt(picture(caption), "a [V] sks dog", "[V]", concept())
        assert prompt.resolved.endswith("sks dog")


def test_brackets_that_no_concept_owns_are_named_once_with_their_file_and_refused_in_the_instance_prompt() -> (
    None
):
    prompts = [
        write_prompt(picture(text), "a [V] dog", "[V]", concept())
        for text in ("[trigger] dog in {place}", "<o>_<o>, [V], {token}", "{Token}")
    ]
    line = describe_brackets(prompts, concept())
    named = "[trigger], {place}, <o>, {Token}"
    assert line == f"Captions hold {named} (first in dog/1.txt), read as plain text; the token is [V]."
    assert describe_brackets(prompts[:0], concept()) == ""
    with pytest.raises(UserError, match=r"\[W\]"):
        write_prompt(picture(None), "a [W] dog", "[V]", concept())


@pytest.mark.parametrize(
    ("captions", "said"),
    [
        (("ohwx dog, on grass", "photo of ohwx dog", "ohwx"), "“ohwx”"),
        (("a TOK dog", "TOK, on grass"), "“TOK”"),
        (("a TOK dog", "a {token} dog"), ""),  # one holds the token
        (("1girl, smile", "1girl, hat"), ""),
        (("a dog on grass", "a dog"), ""),
        (("a TV on grass", "a TV"), ""),  # which is the class
        (("a tv on grass",), ""),
    ],
)
def test_a_trigger_word_of_all_captions_that_is_not_the_token_is_said(
    captions: tuple[str, ...], said: str
) -> None:
    line = describe_other_word(captions, "[V]", "TV")
    assert (said in line and "say --token" in line) if said else not line


def test_a_token_of_several_brackets_is_no_stranger() -> None:
    own = concept("<s0><s1>", "<s0><s1>")
    prompts = [write_prompt(picture("<s0><s1> on <x>"), "a <s0><s1> dog", "<s0><s1>", own)]
    assert describe_brackets(prompts, own).startswith("Captions hold <x> (")
    assert resolve_placeholder_tokens("a <s0><s1> dog", [own], runs=None) == "a <s0><s1> dog"


def test_other_trainers_syntax_in_captions_is_named_once_of_each_kind_with_its_file() -> None:
    texts = ("a (red:1.3) dog BREAK in a {park|street}", "a ((big)) dog BREAK", "a dog (big), 50 % off")
    prompts = [write_prompt(picture(text), "a [V] dog", "[V]", concept()) for text in texts]
    lines = describe_foreign_syntax(prompts)
    assert [line.split("”")[0] for line in lines] == [
        "Captions hold “(red:1.3)",
        "Captions hold “{park|street}",
        "Captions hold “BREAK",
    ]
    assert all("(first in dog/1.txt), read as plain text" in line for line in lines)
    assert describe_foreign_syntax(prompts[2:]) == []


def test_a_caption_without_spaces_may_be_long_too(tiny: Backbone) -> None:
    for text in ("一只狗在公园里" * 12, "1girl,blue_eyes,long_hair," * 12):
        assert len(PIECES.findall(text)) > LONG
        prompt = write_prompt(picture(text), "a [V] dog", "[V]", concept())
        assert describe_truncated([prompt], "jkw", "[V]", tiny.text_encoder)


def test_a_caption_too_long_names_its_file_and_the_token_that_is_lost(tiny: Backbone) -> None:
    long = "a dog in the snow " * 40
    for caption, lost in ((f"[V] {long}", False), (f"{long} [V]", True)):
        prompt = write_prompt(picture(caption), "a [V] dog", "[V]", concept())
        (line,) = describe_truncated([prompt, prompt], "jkw", "[V]", tiny.text_encoder)
        assert line.startswith("The caption in dog/1.txt has 20") and "reads 77" in line
        assert ("the token [V] not among them" in line) == lost
    short = write_prompt(picture("a [V] dog"), "", "[V]", concept())
    assert describe_truncated([short], "jkw", "[V]", tiny.text_encoder) == []
