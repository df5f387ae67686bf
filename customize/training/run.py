"""A training run from pictures to pictures, and the folder that it leaves behind."""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backbone.adapters.concept import Concept, check_token, choose_rare_words, resolve_placeholder_tokens
from backbone.adapters.embeddings import vector_token_names
from backbone.distributed import processes
from backbone.io.console import UserError, count_of, notify, notify_once
from backbone.io.files import content_hash, read_metadata, write_json, write_text
from backbone.io.run_folder import clear_failed_try, package_versions, refuse_taken, run_name
from backbone.media.pictures import ImageRecord, check_images, list_images
from backbone.media.transforms import crop_square
from backbone.models.locate import is_path
from backbone.models.model import Backbone
from backbone.models.placement import get_placement
from backbone.training.run import CHECKPOINT, Every, drive
from customize.data.captions import describe_brackets, describe_truncated, write_prompt
from customize.data.dataset import Group, prepare
from customize.data.folders import read_images
from customize.data.masks import save_masks
from customize.methods.lora import refuse_other_encoders
from customize.objectives.dreambooth import DreamBooth, share_of
from customize.settings import (
    FILE,
    OWN_WORDS,
    SHEET,
    Settings,
    Subject,
    as_flags,
    read_record,
    read_settings,
    resolved,
)
from customize.training.card import card, push, readme
from customize.training.evaluation import Previews, Validation

MASKS = "masks.png"


def train_concept(
    asked: dict[str, Any],
    subjects: Sequence[Subject],
    *,
    images: list[list[ImageRecord]] | None = None,
    out: Path | None,
    vram: float | None = None,
) -> Path:
    """Train a new concept and give its run folder. `asked` holds what the user set; the rest comes from the model.

    `images` are each subject's, checked already; read here if left out. `vram` is in GiB. An empty class noun is
    guessed, empty token words are chosen. Raises `UserError` for bad images, all of them listed, a bad token, or a run
    folder that is taken.
    """
    began = time.perf_counter()
    processes.init_process(asked.get("device") or "auto")
    pictures = images or read_images(subjects, asked.get("caption_column", ""), asked.get("image_column", ""))
    run = out or Path("runs") / run_name(subjects[0].images)
    refuse_taken(run)
    for folder in asked.get("class_images", ()):
        check_images(list_images(folder))
    model = Backbone.open(
        asked.get("model", "moji"),
        device=asked.get("device", "auto"),
        precision=asked.get("precision", "auto"),
        resolution=asked.get("resolution", 0),
    )
    if misfit := model.describe_misfit([picture.read_size() for folder in pictures for picture in folder]):
        notify_once(misfit)
    nouns = [
        subject.class_noun or guess(model, folder, subject.images)
        for subject, folder in zip(subjects, pictures, strict=True)
    ]
    first = subjects[0]
    named = {
        **({"model": os.path.abspath(model.location.source)} if is_path(asked.get("model", "moji")) else {}),
        "images": first.images,
        "token": first.token,
        "class_noun": nouns[0],
        "subject": tuple(subject.flag() for subject in subjects[1:]),
    }
    if first.token_words:
        named["token_words"] = first.token_words
    settings = resolved(asked | named, model.defaults)
    model = Backbone.open(
        settings.model,
        device=settings.device,
        precision=settings.precision,
        placement=get_placement(settings),
        resolution=settings.resolution,
    )
    if vram is not None:
        from customize.training.memory import budgeted

        processes.require_whole_model("--vram counts for a process alone; it")
        model, settings = budgeted(model, settings, sum(map(len, pictures)), vram)
    vocabulary = model.text_encoder.tokenizer.get_vocab()
    if settings.train_text_encoder:
        refuse_other_encoders(model)
    found: list[Subject] = []
    for subject, noun, folder in zip(subjects, nouns, pictures, strict=True):
        check_token(subject.token, vocabulary)
        if any(subject.token == other.token for other in found):
            raise UserError(f"Two subjects have the token {subject.token}. Give each its own.")
        words = subject.token_words
        if settings.method in OWN_WORDS:
            words = " ".join(vector_token_names(subject.token, settings.num_vectors))
        elif not words:
            key = "".join(content_hash(picture.read()) for picture in folder)
            words = choose_rare_words(vocabulary, key, taken=[other.token_words for other in found])
        found.append(dataclasses.replace(subject, class_noun=noun, token_words=words))
    settings = dataclasses.replace(
        settings, token_words=found[0].token_words, subject=tuple(subject.flag() for subject in found[1:])
    )
    share_of(settings)
    concept, groups = write_prompts(settings, model, pictures)
    processes.barrier()  # now every process has seen that the folder is free
    if processes.is_main_process():
        clear_failed_try(run)
        write_record(run, settings, groups, timings={})
    return carry_on(run, settings, model, concept, groups, began=began)


def resume_concept(run: Path, anew: Mapping[str, Any] | None = None) -> Path:
    """Goes on with a run that was stopped; the weights come out as if it had not been.

    `anew` are settings that change (`customize.training.start.RESUMED`): more steps, another learning rate, another
    device, a new place of the images. The learning rate then follows the course of all steps, as if there had always
    been so many. Raises `UserError` for steps that were taken already.
    """
    settings = dataclasses.replace(read_settings(run), **(anew or {}))
    done = int(read_metadata(run / CHECKPOINT)["step"]) if (run / CHECKPOINT).exists() else 0
    if anew and "steps" in anew and settings.steps <= done:
        raise UserError(f"{run} has taken {done} steps already. Give --steps more than that.")
    processes.init_process(settings.device)
    pictures = read_images(settings.subjects(), settings.caption_column, settings.image_column)
    for sentence in describe_changes(read_record(run).get("images"), pictures):
        notify(sentence)
    model = Backbone.open(
        settings.model,
        device=settings.device,
        precision=settings.precision,
        placement=get_placement(settings),
        resolution=settings.resolution,
    )
    concept, groups = write_prompts(settings, model, pictures)
    if anew:
        notify(f"{run} goes on from step {done} to {settings.steps}.")
        if processes.is_main_process():
            write_record(run, settings, groups, timings={})
    return carry_on(run, settings, model, concept, groups, began=time.perf_counter())


def write_prompts(
    settings: Settings, model: Backbone, pictures: Sequence[list[ImageRecord]]
) -> tuple[Concept, list[Group]]:
    """The run's concept, and each subject's images with their training prompts; says what is odd about captions.

    Raises `UserError` for an instance prompt or a prompt of the sheet with a token that is none of the run's.
    """
    subjects = settings.subjects()
    concept = Concept(
        kind=settings.method,
        model=settings.model,
        fingerprint=model.fingerprint,
        tokens={subject.token: subject.token_words for subject in subjects},
        class_noun=settings.class_noun,
    )
    for prompt in settings.sheet_prompts:
        resolve_placeholder_tokens(prompt, [concept], runs=None)
    groups = []
    for subject, folder in zip(subjects, pictures, strict=True):
        instance = subject.filled(settings.instance_prompt)
        prompts = [write_prompt(picture, instance, subject.token, concept) for picture in folder]
        captioned = [prompt for prompt, picture in zip(prompts, folder, strict=True) if picture.caption]
        odd = [describe_brackets(captioned, concept)] if captioned else []
        odd += describe_truncated(captioned, subject.token_words, subject.token, model.text_encoder)
        for sentence in filter(None, odd):
            notify(sentence)
        groups.append(
            Group(folder, [prompt.resolved for prompt in prompts], subject.filled(settings.class_prompt))
        )
        what = (
            f"gets {count_of(settings.num_vectors, 'new word')} of its own"
            if settings.method in OWN_WORDS
            else f"stands for “{subject.token_words}”"
        )
        notify(f"{count_of(len(folder), 'picture')} of “{subject.called()}”; {subject.token} {what}.")
    return concept, groups


def carry_on(
    run: Path, settings: Settings, model: Backbone, concept: Concept, groups: Sequence[Group], *, began: float
) -> Path:
    """Trains from the last checkpoint, if there is one, to the finished folder."""
    subjects, pictures = settings.subjects(), [list(group.pictures) for group in groups]
    training = DreamBooth(model, prepare(model, groups, settings), settings)
    training.resume(run)
    writes = processes.is_main_process()
    if writes and settings.mask == "auto":
        save_masks(run / MASKS, pictures, training.data.masks or [], flip=settings.flip)
    prepared = time.perf_counter()
    previews = Previews(model, settings, concept)
    validation = Validation(run, training, concept, pictures[0])

    def preview(step: int) -> None:
        with training.averaged():
            previews.save(run / "previews" / f"step-{step:06d}.png", count=4)

    drive(
        training,
        run,
        command="customize train",
        validate=Every(settings.evaluation_steps, validation),
        preview=Every(settings.validation_steps, preview),
        tensorboard=settings.report_to == "tensorboard",
    )
    trained = time.perf_counter()
    if writes:
        header = {
            "limner_token": " ".join(subject.token for subject in subjects),
            "limner_words": " ".join(subject.token_words for subject in subjects),
            "base_model": settings.model,
        }
        dataclasses.replace(concept, **training.write(run, header)).write(run)
        validation.report(settings)
    with training.averaged():
        shown = previews.save(
            run / SHEET, count=8, pictures=[picture for folder in pictures for picture in folder]
        )
    if not writes:
        processes.end_process()
        return run
    ended = time.perf_counter()
    timings = {
        "prepare": prepared - began,
        "train": trained - prepared,
        "show": ended - trained,
        "all": ended - began,
    }
    seconds = {name: round(value, 2) for name, value in timings.items()}
    write_record(run, settings, groups, timings=seconds)
    write_text(run / "README.md", card(settings, model) + readme(run, settings, shown, seconds))
    if settings.push_to_hub:
        notify(f"Uploaded to {push(run, settings.hub_model_id or run.name)}.")
    processes.end_process()
    return run


def guess(model: Backbone, pictures: list[ImageRecord], images: str) -> str:
    """The class of the subject, said aloud: from the name of its folder if that is a noun, else by the scorer.

    Raises `UserError` where the name says nothing and the model has no scorer.
    """
    from backbone.evaluation.clip import classify_subject, load_scorer
    from backbone.world.words import load_vocabulary

    nouns = tuple(load_vocabulary().nouns)
    for word in re.split(r"[^a-z]+", run_name(images).lower()):
        if word in nouns:
            notify(f"The name of {images} says that it shows a {word}. --class says otherwise.")
            return word
    folder = model.location.local("scorer")
    if folder is None:
        raise UserError(
            f"Say what the pictures show with --class (as --class dog): {model.location.name} cannot guess it."
        )
    scorer = load_scorer(folder)
    ranked = classify_subject(scorer, [crop_square(picture.open(), 128) for picture in pictures], nouns)
    best, second = ranked[0], ranked[1]
    seems = f"{best[0]} ({best[1]:.0%}; next {second[0]}, {second[1]:.0%})"
    notify(f"The pictures seem to show a {seems}. --class says otherwise.")
    return str(best[0])


def write_record(
    run: Path, settings: Settings, groups: Sequence[Group], *, timings: Mapping[str, float]
) -> None:
    """Writes the run's `settings.json`: what was resolved, how to repeat it, of which images, with which versions."""
    record = {
        "settings": settings,
        "command": as_flags(settings, run),
        "images": [hash_images(group.pictures) for group in groups],
        "versions": package_versions(),
        "timings": timings,
    }
    write_json(run / FILE, record)


def hash_images(pictures: Sequence[ImageRecord]) -> dict[str, str]:
    """The beginning of the hash of each image's file, by its name in the folder."""
    if not pictures:
        return {}
    common = os.path.commonpath([picture.path.parent for picture in pictures])
    return {os.path.relpath(one.path, common): content_hash(one.read())[:16] for one in pictures}


def describe_changes(kept: Any, pictures: Sequence[list[ImageRecord]]) -> list[str]:
    """A sentence for each subject whose images are not those that its run began with, `kept` in its record."""
    found = []
    for before, folder in zip(kept if isinstance(kept, list) else [], pictures, strict=False):
        now = hash_images(folder)
        if not isinstance(before, dict) or before == now:
            continue
        parts = [
            ("gone", sorted(before.keys() - now.keys())),
            ("new", sorted(now.keys() - before.keys())),
            ("changed", sorted(name for name in before.keys() & now.keys() if before[name] != now[name])),
        ]
        what = "; ".join(f"{word}: {', '.join(names[:5])}" for word, names in parts if names)
        found.append(
            f"The images are not those that the run began with ({what}). It goes on with those of now."
        )
    return found
