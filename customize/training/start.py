"""The first steps of `customize.train`, before torch is imported: mistakes in what was asked are answered here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backbone.io.console import UserError, notify
from backbone.io.options import fields_of, refuse_idle, unmet
from customize.settings import Settings, Subject, read_subject, resolved


def start(asked: Mapping[str, Any], *, out: Path | None = None, vram: float | None = None) -> Path:
    """Train from settings as they were asked for, by field of `Settings`; gives the run folder.

    `vram` is the device's memory in GiB to plan for. Raises `UserError` for settings that contradict each other and
    for images that cannot be read, all of them listed, before any weights load.
    """
    subjects, settings = subjects_of(asked)
    placeholder = {
        "images": "",
        "token": "",
        "class_noun": "",
        "subject": [one.flag() for one in subjects[1:]],
    }
    refuse_idle(resolved({**placeholder, **settings}, {}), asked)
    from customize.data.folders import read_images

    images = read_images(subjects, settings.get("caption_column", ""), settings.get("image_column", ""))
    from customize.training.run import train_concept

    return train_concept(settings, subjects, images=images, out=out, vram=vram)


def subjects_of(asked: Mapping[str, Any]) -> tuple[list[Subject], dict[str, Any]]:
    """What is to be learned, and the settings with what a layout of other trainers says beside it.

    Raises `UserError` where nothing is named, or a flag says otherwise than the layout.
    """
    from customize.data.folders import is_concept_source, read_subjects

    rest = dict(asked)
    images, token = rest.pop("images", None), rest.pop("token", None)
    noun, words = rest.pop("class_noun", ""), rest.pop("token_words", "")
    more = [read_subject(flag) for flag in rest.pop("subject", ())]
    if images is None:
        if not more:
            raise UserError(
                "Say where the images are: --images FOLDER (customize example dog/ writes some to try)."
            )
        for name, value in (("token", token), ("class", noun), ("token-words", words)):
            if value:
                raise UserError(
                    f"--{name} belongs to --images, which is not there. Add it, or leave that out."
                )
        return more, rest
    if not is_concept_source(images):
        return [Subject(images, token or "[V]", noun, words), *more], rest
    found, prompts = read_subjects(images)
    for flag, value, own in (
        ("--token", token, found[0].token),
        ("--class", noun, found[0].class_noun),
        ("--token-words", words, found[0].token_words),
    ):
        if value and (value != own or len(found) > 1):
            raise UserError(
                f"{images} says what its subjects are called, so {flag} has no effect. Leave it out."
            )
    for subject in found:
        notify(f"{subject.images}: {subject.token} {subject.class_noun}, all subjects equally often.")
    known = fields_of(Settings)
    every = {name: one.default for name, one in known.items()} | rest
    for name, key in (("class_images", "class_data_dir"), ("class_prompt", "class_prompt")):
        if name in prompts and name not in rest and unmet(known[name], every) is not None:
            said = " It is for --prior class-images." if name == "class_images" else ""
            notify(f"The {key} of {images} has no effect with these settings, and is left aside.{said}")
            del prompts[name]
    return [*found, *more], {**prompts, **rest}
