"""The start of `customize train`, before torch is imported: errors in the settings and the images are raised here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backbone.adapters.concept import mentions, word_pattern
from backbone.cli.options import fields_of
from backbone.cli.values.effects import find_unmet, refuse_idle, require_packages
from backbone.io.console import UserError, notify, quote
from backbone.io.files import read_json
from backbone.io.progress import progress
from backbone.io.run_folder import make_absolute, run_name
from customize.settings import (
    FILE,
    OWN_WORDS,
    PrepareImages,
    Settings,
    Subject,
    read_subject,
    resolve_settings,
)

if TYPE_CHECKING:
    from customize.data.prepared import PreparedImages

DEFAULT_TOKEN = "[V]"
PLACEHOLDER = re.compile(r"\{(\w*)\}")  # of a template; wildcards as {red|blue} are text
# Settings that may change with --resume; what is learned from and on may have moved
RESUMED = (
    "steps",
    "learning_rate",
    "images",
    "pairs",
    "device",
    "model",
    "class_images",
    "scorer",
    "subject",
)


def start(asked: Mapping[str, Any], *, out: Path | None = None, vram: float | None = None) -> Path:
    """Train with the settings that were given, by field of `Settings`; returns the run folder.

    `vram` is the device's memory in GiB to plan for. Raises `UserError` for settings that contradict each other and
    for images that cannot be read, all of them listed, before any weights load.
    """
    if asked.get("pairs"):
        return start_edits(asked, out=out, vram=vram)
    subjects, settings = subjects_of(asked)
    placeholder = {
        "images": "",
        "token": "",
        "class_noun": "",
        "subject": [one.flag() for one in subjects[1:]],
    }
    if settings.get("begin_from"):
        settings["begin_from"] = make_absolute(settings["begin_from"])
    wanted = resolve_settings({**placeholder, **settings}, {})
    refuse_idle(wanted, asked)
    refuse_other_beginning(wanted)
    require_packages(wanted)
    from customize.data.folders import read_images

    images = read_images(subjects, settings.get("caption_column", ""), settings.get("image_column", ""))
    with progress(None, "starting", brief=True):  # torch and diffusers
        from customize.training.run import train_concept

    if out is None and "images" in asked and Path(asked["images"]).expanduser().is_dir():
        out = Path("runs") / run_name(asked["images"])  # not the name of a folder in it
    return train_concept(settings, subjects, images=images, out=out, vram=vram)


def refuse_transferred(run: Path) -> None:
    """`UserError` for a run of `customize transfer`, which goes on by its own command."""
    record = read_json(run / FILE)
    if "transfer" in record:
        raise UserError(
            f"{run} is a run of `customize transfer`. Go on with it by: {record['command']} --resume {quote(run)}"
        )


def start_edits(asked: Mapping[str, Any], *, out: Path | None = None, vram: float | None = None) -> Path:
    """Train on edit pairs with the settings that were given; returns the run folder.

    Raises `UserError` for settings that contradict each other, and for pairs that cannot be trained on, all of them
    listed, before any weights load.
    """
    from customize.data.edit_pairs import hold_out, read_edit_pairs, usable_pairs

    settings = dict(asked)
    for name in ("pairs", "scorer", "begin_from"):
        if settings.get(name):
            settings[name] = make_absolute(settings[name])
    wanted = resolve_settings({"images": "", "token": "", "class_noun": "", **settings}, {})
    refuse_idle(wanted, asked)
    refuse_other_beginning(wanted)
    require_packages(wanted)
    pairs = usable_pairs(read_edit_pairs(asked["pairs"]), skip_bad=wanted.skip_bad)
    hold_out(pairs, wanted.held_out)
    with progress(None, "starting", brief=True):  # torch and diffusers
        from customize.training.edits import train_edits

    return train_edits(settings, pairs, out=out or Path("runs") / run_name(asked["pairs"]), vram=vram)


def refuse_other_beginning(wanted: Settings) -> None:
    """`UserError` unless what is to be begun from is a run that learned the same kind of thing."""
    if not wanted.begin_from:
        return
    from backbone.adapters.concept import EDITS, read_concept

    if Path(wanted.begin_from).is_file():
        raise UserError(
            f"--begin-from {wanted.begin_from} is a file, and a run folder is needed. Make one: customize import "
            f"{quote(wanted.begin_from)} --out runs/before"
        )
    kind, found = EDITS if wanted.pairs else wanted.method, read_concept(wanted.begin_from).kind
    if found != kind:
        raise UserError(
            f"{wanted.begin_from} was trained by {found}, and this run trains by {kind}. Name a run of {kind}, or "
            "leave --begin-from out."
        )


def as_kept(asked: Mapping[str, Any], own: Settings) -> dict[str, Any]:
    """The given settings in the form in which a run saves them: absolute paths, {token} in the instance prompt."""
    from customize.data.folders import as_template

    kept = dict(asked)
    for name in ("images", "pairs", "scorer", "begin_from"):
        if kept.get(name):
            kept[name] = make_absolute(kept[name])
    if "class_images" in kept:
        kept["class_images"] = tuple(make_absolute(folder) for folder in kept["class_images"])
    if "subject" in kept:
        kept["subject"] = _moved_subjects(kept["subject"], own)
    if "model" in kept:
        from backbone.models.locate import absolute_model

        kept["model"] = absolute_model(kept["model"])
    if "instance_prompt" in kept:
        kept["instance_prompt"] = as_template(kept["instance_prompt"], own.token, own.class_noun)
    return kept


def _moved_subjects(flags: Sequence[str], own: Settings) -> tuple[str, ...]:
    """A run's further subjects with their images where these lie now; `UserError` for another token or class."""
    kept, now = own.subjects()[1:], [read_subject(flag) for flag in flags]
    named = [[(one.token, one.class_noun) for one in some] for some in (kept, now)]
    if named[0] != named[1]:
        said = ", ".join(f"{token} {noun}" for token, noun in named[0]) or "none"
        raise UserError(
            f"--subject beside --resume says where images lie now, of the run's own subjects ({said}). Name these."
        )
    return tuple(
        replace(one, images=make_absolute(there.images)).flag() for one, there in zip(kept, now, strict=True)
    )


def subjects_of(asked: Mapping[str, Any]) -> tuple[list[Subject], dict[str, Any]]:
    """The subjects to learn, and the settings with those that another trainer's folder layout implies.

    Folders are made absolute, so that the run can be resumed from anywhere. Raises `UserError` where no images are
    named, a flag contradicts the layout, or the instance prompt does not show which word is the token.
    """
    from customize.data.folders import as_template

    rest = dict(asked)
    images, token = rest.pop("images", None), rest.pop("token", None)
    if token is not None and not token.strip():
        raise UserError("The token is empty. Give a word, as in --token sks, or leave it out for [V].")
    noun, words = rest.pop("class_noun", ""), rest.pop("token_words", "")
    more = [read_subject(flag) for flag in rest.pop("subject", ())]
    if images is None:
        if not more:
            raise UserError(
                "Say where the images are: --images FOLDER (customize example dog/ writes some to try), or --pairs "
                "FOLDER with images before and after an edit."
            )
        for name, value in (("token", token), ("class", noun), ("token-words", words)):
            if value:
                raise UserError(
                    f"--{name} belongs to --images, which is not there. Add it, or leave that out."
                )
        named: list[Subject] = []
    else:
        named, rest = first_subjects(str(images), token or "", noun, words, rest)
    subjects = [replace(one, images=make_absolute(one.images)) for one in [*named, *more]]
    if "instance_prompt" in rest:
        first = subjects[0]
        rest["instance_prompt"] = as_template(rest["instance_prompt"], first.token, first.class_noun)
    refuse_prompts(subjects, rest)
    if "scorer" in rest:
        rest["scorer"] = make_absolute(rest["scorer"])
    if "preview_on" in rest:
        rest["preview_on"] = make_absolute(rest["preview_on"])
    if "class_images" in rest:
        rest["class_images"] = tuple(map(make_absolute, rest["class_images"]))
    return subjects, rest


def first_subjects(
    images: str, token: str, noun: str, words: str, rest: Mapping[str, Any]
) -> tuple[list[Subject], dict[str, Any]]:
    """The subjects of `--images`, and the settings with those that its folder layout implies."""
    from customize.data.folders import is_concept_source, read_subjects

    prompts: dict[str, Any] = {}
    if is_concept_source(images, token=token, class_noun=noun):
        subjects, prompts = read_subjects(images, token=token, class_noun=noun, token_words=words)
        for subject in subjects:
            notify(f"{subject.images}: {subject.token} {subject.class_noun}, all subjects equally often.")
        known = fields_of(Settings)
        every = {name: one.default for name, one in known.items()} | dict(rest)
        for name, key in (("class_images", "class_data_dir"), ("class_prompt", "class_prompt")):
            if name in prompts and name not in rest and find_unmet(known[name], every) is not None:
                said = " It is for --prior class-images." if name == "class_images" else ""
                notify(f"The {key} of {images} has no effect with these settings, and is left aside.{said}")
                del prompts[name]
    else:
        subjects = [name_subject(Subject(images, token, noun, words), rest)]
    return subjects, {**prompts, **rest}


def name_subject(subject: Subject, rest: Mapping[str, Any]) -> Subject:
    """The subject with a token: the one that was given, the one that stands in the instance prompt, or [V]."""
    from customize.data.folders import guess_token_and_class

    prompt = rest.get("instance_prompt", "")
    if subject.token or not prompt or "{token}" in prompt or mentions(prompt, DEFAULT_TOKEN):
        return replace(subject, token=subject.token or DEFAULT_TOKEN)
    token, noun = guess_token_and_class(prompt, subject.class_noun, rest.get("class_prompt", ""))
    if not token:
        raise UserError(
            f"The instance prompt “{prompt}” does not show which word is the subject's. Name it with --token, or "
            "write {token} in its place."
        )
    own = rest.get("method", "lora") in OWN_WORDS  # which learns an embedding for the token
    notify(
        f"In the instance prompt “{prompt}” the token is {token}{f' and the class {noun}' if noun else ''}."
    )
    return replace(
        subject, token=token, class_noun=noun, token_words=subject.token_words or ("" if own else token)
    )


def _without(subject: Subject) -> str:
    """A subject's class without its token; “dog” where nothing else is left."""
    return " ".join(re.sub(word_pattern(subject.token), " ", subject.class_noun).split()) or "dog"


def refuse_prompts(subjects: Sequence[Subject], rest: Mapping[str, Any]) -> None:
    """`UserError` for an instance prompt without the token, or a class prompt with one: nothing would be learned.

    So are an empty one of both, a class that is the token, and a placeholder that nothing fills.
    """
    first = subjects[0]
    if first.class_noun and mentions(first.class_noun, first.token):
        raise UserError(
            f"The class {first.class_noun} holds the token {first.token}, which is the subject's alone. "
            + (
                f"Give the subject another, as --token sks, beside --class {quote(first.class_noun)}."
                if first.class_noun.lower() == first.token.lower()
                else f"Say what kind of thing it is without it, as --class {quote(_without(first))}."
            )
        )
    for one in subjects:
        if one.class_noun and mentions(one.token_words, one.class_noun):
            raise UserError(
                f"The words “{one.token_words}” hold the class {one.class_noun}, which stands behind the token in "
                "prompts anyway. Name the subject's own words alone, as --token-words sks, or none."
            )
    for name, example in (("instance_prompt", f"a photo of {first.called()}"), ("class_prompt", "a dog")):
        if name in rest and not rest[name].strip():
            raise UserError(
                f"The {name.replace('_', ' ')} is empty. Say what there is, as in “{example}”, or leave it out."
            )
    general_prompts = [("class prompt", rest.get("class_prompt") or "")]
    general_prompts += [("prior prompt", one) for one in rest.get("prior_prompts") or ()]
    for what, said in [("instance prompt", rest.get("instance_prompt") or ""), *general_prompts]:
        if odd := [name for name in PLACEHOLDER.findall(said) if name not in ("token", "class")]:
            raise UserError(
                f"The {what} “{said}” has {{{odd[0]}}}, and {{token}} and {{class}} alone are filled in. Leave it out."
            )
    prompt = rest.get("instance_prompt", "")
    if prompt and "{token}" not in prompt:
        raise UserError(
            f"The instance prompt “{prompt}” lacks the token {first.token}. Write it in, as in “a photo of "
            f"{first.called()}”, or {{token}} in its place."
        )
    for what, general in general_prompts:
        own = [one.token for one in subjects if mentions(general, one.token)]
        if own or "{token}" in general:
            raise UserError(
                f"The {what} “{general}” holds the token {(own or [first.token])[0]}, which is the subject's alone. "
                "Leave it out."
            )


def start_preparing(asked: PrepareImages) -> PreparedImages:
    """Encode a source of images to disk, as `customize prepare` does; returns the prepared folder.

    Raises `UserError` for a source without images, before torch is imported.
    """
    from backbone.media.sources.pictures import list_images
    from backbone.media.sources.stream import Named, find_stream, stream_images

    columns = {"caption_column": asked.caption_column or None, "image_column": asked.image_column or None}
    stream = find_stream(Named(asked.images, asked.dataset_config_name, asked.split), out=asked.out)
    pictures = list_images(asked.images, **columns) if stream is None else stream_images(stream, **columns)
    with progress(None, "starting", brief=True):  # torch and diffusers
        from backbone.distributed import processes
        from backbone.models.model import Backbone
        from backbone.training.prepared import Cuts
        from customize.training.prepare import prepare_images

    processes.init_process(asked.device)
    model = Backbone.open(
        asked.model or "moji", device=asked.device, precision=asked.precision, resolution=asked.resolution
    )
    prepared = prepare_images(
        pictures,
        asked.images,
        model,
        asked.out,
        cuts=Cuts(asked.flip, aspect_buckets=asked.aspect_buckets),
        skip_bad=asked.skip_bad,
        workers=asked.num_proc,
        rows={name: value for name, value in columns.items() if value},
    )
    processes.end_process()
    return prepared
