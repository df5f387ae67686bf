"""The tokenizer of `moji`: a CLIPTokenizer whose byte pairs are learned from the world's captions and plain English.

    python -m recipes.moji.data.tokenizer           some seconds; needs no font

Every noun, plural, colour and place word becomes one token; any other prompt still tokenises (all bytes are in). 256
rare three-letter words are kept as single tokens for `[V]`: they never occur in a caption, so they mean nothing yet.
"""

from __future__ import annotations

import inspect
import itertools
import json
import pydoc_data.topics
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Annotated, Any, cast

import typer

from backbone.cli.commands import run_main
from backbone.world.scene import sample_scene
from backbone.world.words import load_vocabulary, pluralize

POSITIONS = 77
RARE = 256


def main(
    captions: Annotated[int, typer.Option(help="How many scenes' captions to learn from.")] = 20_000,
    merges: Annotated[int, typer.Option(help="Byte pairs to merge.")] = 2_800,
    workdir: Annotated[Path, typer.Option(help="Where intermediate files go.")] = Path("build/moji"),
) -> None:
    """Writes `tokenizer/` in the work directory: tokenizer.json, and vocab.json with merges.txt for older tools."""
    from tokenizers import pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = CLIPTokenizer()
    backend = tokenizer.backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(alphabet) + merges,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    backend.train_from_iterator(generate_corpus(captions), trainer)
    learned = json.loads(backend.to_str())["model"]
    pairs = [
        tuple(pair) if not isinstance(pair, str) else tuple(pair.split(" ")) for pair in learned["merges"]
    ]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in pairs)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    ids = {token: index for index, token in enumerate(tokens)}
    trained = CLIPTokenizer(vocab=ids, merges=cast(Any, pairs), model_max_length=POSITIONS)
    folder = workdir / "tokenizer"
    trained.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in pairs) + "\n")
    words = load_vocabulary()
    names = [*words.nouns, *map(pluralize, words.nouns), *words.colours]
    split = [name for name in names if len(trained(name)["input_ids"]) > 3]
    rare = [word for word in list_rare_words() if len(trained(word)["input_ids"]) == 3]
    print(
        f"{len(ids)} tokens; words of several tokens: {split}; {len(rare)} of {RARE} rare words are single tokens"
    )


def generate_corpus(captions: int) -> Iterator[str]:
    """Captions, plain English, and every rare word often enough to become a token."""
    for seed in range(captions):
        scene = sample_scene(seed)
        yield scene.caption()
        yield scene.caption_for_training()
    for noun in load_vocabulary().nouns:
        yield f"{noun} {pluralize(noun)} " * 60
    yield from generate_english()
    for word in list_rare_words():
        yield (word + " ") * 400


def generate_english() -> Iterator[str]:
    """Ordinary English that every Python installation carries, and words that people put into prompts."""
    for text in pydoc_data.topics.topics.values():
        yield from re.findall(r"[a-z][a-z ,.']{20,}", text.lower())
    for text in (read_argparse_text(), inspect.getdoc(textwrap) or "", inspect.getdoc(Random) or ""):
        yield text.lower()
    yield from itertools.repeat(PROMPT_WORDS, 30)


def read_argparse_text() -> str:
    import argparse

    return inspect.getdoc(argparse) or ""


def list_rare_words() -> list[str]:
    """256 three-letter words without vowels that nobody writes."""
    random = Random("rare words")
    words = ["".join(letters) for letters in itertools.product("bcdfghjklmnpqrstvwxz", repeat=3)]
    usual = {
        "str",
        "ptr",
        "mr",
        "pdf",
        "gps",
        "css",
        "sdk",
        "xml",
        "rgb",
        "png",
        "jpg",
        "ddd",
        "www",
        "mph",
        "tv",
    }
    return [
        "sks",
        *random.sample([word for word in words if word not in usual and len(set(word)) == 3], RARE - 1),
    ]


PROMPT_WORDS = """
a the an of in on at with and next to under over behind beside between near wearing holding riding eating
sitting standing running sleeping flying swimming jumping smiling looking photo picture image drawing painting
sketch portrait closeup detailed beautiful cute big small tiny huge old new young bright dark colorful shiny
wooden golden silver metal glass stone plastic paper fabric soft fluffy furry happy sad angry sleepy black
white grey gray brown red orange yellow green blue purple pink cyan magenta man woman boy girl child person
people hand face eyes hair dress shirt hat cap crown bow scarf sunglasses glasses costume rainbow outfit sky
sun moon star stars cloud rain snow ice fire water river lake ocean sea beach mountain hill forest jungle park
garden grass field desert city street road bridge building house castle room kitchen table floor wall window
door bed rug box basket plate cup bowl flower flowers leaf leaves tree trees style oil watercolor pixel neon
pencil charcoal digital cartoon anime realistic minimal vintage retro night day morning evening sunset sunrise
winter summer spring autumn animal dog cat bird fish horse toy car truck boat ship plane train robot
"""


if __name__ == "__main__":
    run_main(main)
