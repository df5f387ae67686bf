"""Pretraining of the text encoder of `moji`: every fact in a caption.

    python -m recipes.moji.text_encoder                 about 4 minutes on two cores

Four fifths of a prompt's 77 positions are padding, and a denoiser that begins to look at all of them alike would learn
what words mean only very slowly. So the encoder first learns, by linear heads that are thrown away, to carry the facts
of the caption (things, colour, accessory, place, style, number) in its end and padding positions. The denoiser then
trains it further. No picture is involved.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from transformers import CLIPTokenizer

from backbone.cli.commands import run_main
from backbone.training.loop import Average, Update, train
from backbone.training.optimizer import warm_cosine
from backbone.world.scene import Scene, sample_scene
from backbone.world.words import load_vocabulary, paraphrase, write_caption
from recipes.moji.denoiser import build_text_encoder

SEEN_POSITIONS = 8  # end and padding positions that the heads read in each caption


def main(
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 900,
    batch: Annotated[int, typer.Option(help="Captions a step.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    workdir: Annotated[Path, typer.Option(help="Where intermediate files go.")] = Path("build/moji"),
) -> None:
    """Trains, and writes `text_encoder/` in the work directory."""
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(workdir / "tokenizer", local_files_only=True)
    encoder = build_text_encoder(tokenizer)
    questions = {name: list(dict.fromkeys(values)) for name, values in list_answers().items()}
    heads = nn.ModuleDict({name: nn.Linear(256, len(values)) for name, values in questions.items()})
    parameters = dict(encoder.named_parameters()) | {f"heads.{k}": v for k, v in heads.named_parameters()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    average = Average(parameters, decay=0.99)
    right: list[float] = []

    def losses(step: int) -> Iterator[Tensor]:
        random = Random(f"{seed}/{step}/text")
        captions = [caption_with_facts(random) for _ in range(batch)]
        ids = tokenizer([text for text, _ in captions], padding="max_length", return_tensors="pt")[
            "input_ids"
        ]
        with torch.autocast("cpu", torch.bfloat16):
            hidden = encoder(ids).last_hidden_state.float()
        end = (ids == tokenizer.eos_token_id).int().argmax(1)
        later = torch.tensor([[random.randint(int(e), 76) for _ in range(SEEN_POSITIONS - 1)] for e in end])
        positions = torch.cat([end[:, None], later], 1)
        states = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))
        total, correct = torch.zeros(()), []
        for name, values in questions.items():
            truth = torch.tensor([values.index(facts[name]) for _, facts in captions])
            guesses = heads[name](states)
            total = total + F.cross_entropy(guesses.flatten(0, 1), truth.repeat_interleave(SEEN_POSITIONS))
            correct.append(float((guesses.argmax(-1) == truth[:, None]).float().mean()))
        right.append(sum(correct) / len(correct))
        yield total

    lr_schedule = warm_cosine(steps, warmup=100, floor=0.02)
    for report in train(
        losses,
        parameters,
        optimizer=optimizer,
        lr_schedule=lr_schedule,
        steps=steps,
        update=Update(average=average),
    ):
        if report.step % 50 == 0:
            facts = {"step": report.step, "loss": round(report.loss, 4), "right": round(right[-1], 3)}
            print(json.dumps(facts), flush=True)
    encoder.load_state_dict({k: v for k, v in average.values.items() if not k.startswith("heads.")})
    encoder.save_pretrained(workdir / "text_encoder")


def list_answers() -> dict[str, list[str]]:
    """The possible answers to each question."""
    words = load_vocabulary()
    nouns = list(words.nouns)
    return {
        "noun": nouns,
        "second": ["none", *nouns],
        "colour": ["none", *words.colours],
        "accessory": ["none", *words.accessories],
        "place": ["none", *words.places],
        "style": ["none", *words.styles],
        "number": ["one", "two of a kind", "two different"],
        "size": ["usual", "small"],
    }


def caption_with_facts(random: Random) -> tuple[str, dict[str, str]]:
    """A caption of a random scene, and the facts in it."""
    scene = sample_scene(random.randrange(1_000_000))
    place = None if random.random() < 0.08 else scene.place
    if random.random() < 0.5:
        text = write_caption(scene.things, pair=scene.pair, place=place, style=scene.style)
    else:
        text = paraphrase(scene.things, pair=scene.pair, place=place, style=scene.style, random=random)
    return text, scene_facts(scene, place)


def scene_facts(scene: Scene, place: str | None) -> dict[str, str]:
    """The facts in a caption of the scene that names this place."""
    first = scene.things[0]
    different = len(scene.things) == 2
    return {
        "noun": first.noun,
        "second": scene.things[1].noun if different else "none",
        "colour": first.colour or "none",
        "accessory": first.accessory or "none",
        "place": place or "none",
        "style": scene.style or "none",
        "number": "two of a kind" if scene.pair else "two different" if different else "one",
        "size": "small" if first.small else "usual",
    }


if __name__ == "__main__":
    run_main(main)
