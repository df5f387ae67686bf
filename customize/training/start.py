"""The start of `customize train`, before torch is imported: errors in the settings and the images are raised here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backbone.adapters.concept import mentions, word_pattern
from backbone.cli.options import list_fields
from backbone.cli.values.effects import find_unmet, refuse_idle, require_packages
from backbone.io.console import UserError, notify, quote
from backbone.io.files import read_json
from backbone.io.progress import progress
from backbone.io.run_folder import make_absolute, refuse_taken, run_name
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
PLACEHOLDER = re.compile(r"\{(\w*)\}")  # of a template; wildcards like {red|blue} are text
# Settings that may change with --resume; the data and the model may have moved
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


def start(requested: Mapping[str, Any], *, out: Path | None = None, vram: float | None = None) -> Path:
    """Train with the settings that were given, by field of `Settings`; returns the run folder.

    `vram` is the device's memory in GiB to plan for. Raises `UserError` for settings that contradict each other and
    for images that cannot be read, all of them listed, before any weights load.
    """
    if requested.get("pairs"):
        return start_edits(requested, out=out, vram=vram)
    subjects, settings = resolve_subjects(requested)
    placeholder = {
        "images": "",
        "token": "",
        "class_noun": "",
        "subject": [subject.flag() for subject in subjects[1:]],
    }
    if settings.get("begin_from"):
        settings["begin_from"] = make_absolute(settings["begin_from"])
    resolved = resolve_settings({**placeholder, **settings}, {})
    refuse_idle(resolved, requested)
    refuse_other_beginning(resolved)
    require_packages(resolved)
    source = subjects[0].images
    if "images" in requested and Path(requested["images"]).expanduser().is_dir():
        source = requested["images"]  # not the name of a folder in it
    run = out or Path("runs") / run_name(source)
    refuse_taken(
        run, [subject.images for subject in subjects]
    )  # before images are read and torch is imported
    from customize.data.folders import read_images

    images = read_images(subjects, settings.get("caption_column", ""), settings.get("image_column", ""))
    with progress(None, "starting", brief=True):  # torch and diffusers
        from customize.training.run import train_concept

    return train_concept(settings, subjects, images=images, out=run, vram=vram)


def refuse_transferred(run: Path) -> None:
    """`UserError` for a run of `customize transfer`, which is resumed by its own command."""
    record = read_json(run / FILE)
    if "transfer" in record:
        raise UserError(
            f"{run} is a run of `customize transfer`. Go on with it by: {record['command']} --resume {quote(run)}"
        )


def start_edits(requested: Mapping[str, Any], *, out: Path | None = None, vram: float | None = None) -> Path:
    """Train on edit pairs with the settings that were given; returns the run folder.

    Raises `UserError` for settings that contradict each other, and for pairs that cannot be trained on, all of them
    listed, before any weights load.
    """
    from customize.data.edit_pairs import hold_out, read_edit_pairs, select_usable_pairs

    settings = dict(requested)
    for name in ("pairs", "scorer", "begin_from"):
        if settings.get(name):
            settings[name] = make_absolute(settings[name])
    resolved = resolve_settings({"images": "", "token": "", "class_noun": "", **settings}, {})
    refuse_idle(resolved, requested)
    refuse_other_beginning(resolved)
    require_packages(resolved)
    run = out or Path("runs") / run_name(requested["pairs"])
    refuse_taken(run, [requested["pairs"]])
    pairs = select_usable_pairs(read_edit_pairs(requested["pairs"]), skip_bad=resolved.skip_bad)
    hold_out(pairs, resolved.held_out)
    with progress(None, "starting", brief=True):  # torch and diffusers
        from customize.training.edits import train_edits

    return train_edits(settings, pairs, out=run, vram=vram)


def refuse_other_beginning(settings: Settings) -> None:
    """`UserError` unless `begin_from` is a run that was trained by the same method."""
    if not settings.begin_from:
        return
    from backbone.adapters.concept import EDITS, read_concept

    if Path(settings.begin_from).is_file():
        raise UserError(
            f"--begin-from {settings.begin_from} is a file, and a run folder is needed. Make one: customize import "
            f"{quote(settings.begin_from)} --out runs/before"
        )
    kind, trained = EDITS if settings.pairs else settings.method, read_concept(settings.begin_from).kind
    if trained != kind:
        raise UserError(
            f"{settings.begin_from} was trained by {trained}, and this run trains by {kind}. Name a run of {kind}, or "
            "leave --begin-from out."
        )


def as_saved(requested: Mapping[str, Any], saved: Settings) -> dict[str, Any]:
    """The given settings in the form in which a run saves them: absolute paths, {token} in the instance prompt."""
    from customize.data.folders import as_template

    settings = dict(requested)
    for name in ("images", "pairs", "scorer", "begin_from"):
        if settings.get(name):
            settings[name] = make_absolute(settings[name])
    if "class_images" in settings:
        settings["class_images"] = tuple(make_absolute(folder) for folder in settings["class_images"])
    if "subject" in settings:
        settings["subject"] = _move_subjects(settings["subject"], saved)
    if "model" in settings:
        from backbone.models.locate import make_model_absolute

        settings["model"] = make_model_absolute(settings["model"])
    if "instance_prompt" in settings:
        settings["instance_prompt"] = as_template(settings["instance_prompt"], saved.token, saved.class_noun)
    return settings


def _move_subjects(flags: Sequence[str], saved: Settings) -> tuple[str, ...]:
    """A run's further subjects with the new folders of their images; `UserError` for another token or class."""
    recorded, renewed = saved.subjects()[1:], [read_subject(flag) for flag in flags]
    recorded_names, renewed_names = (
        [(subject.token, subject.class_noun) for subject in subjects] for subjects in (recorded, renewed)
    )
    if recorded_names != renewed_names:
        names = ", ".join(f"{token} {noun}" for token, noun in recorded_names) or "none"
        raise UserError(
            f"--subject beside --resume says where images lie now, of the run's own subjects ({names}). Name these."
        )
    return tuple(
        replace(subject, images=make_absolute(moved.images)).flag()
        for subject, moved in zip(recorded, renewed, strict=True)
    )


def resolve_subjects(requested: Mapping[str, Any]) -> tuple[list[Subject], dict[str, Any]]:
    """The subjects to learn, and the settings, with those that another trainer's folder layout implies.

    Folders are made absolute, so that the run can be resumed from anywhere. Raises `UserError` if no images are
    named, a flag contradicts the layout, or the instance prompt does not show which word is the token.
    """
    from customize.data.folders import as_template

    # The subject of --images (or several, by its folder layout), then those of --subject
    settings = dict(requested)
    images, token = settings.pop("images", None), settings.pop("token", None)
    if token is not None and not token.strip():
        raise UserError("The token is empty. Give a word, as in --token sks, or leave it out for [V].")
    noun, words = settings.pop("class_noun", ""), settings.pop("token_words", "")
    further = [read_subject(flag) for flag in settings.pop("subject", ())]
    if images is None:
        if not further:
            raise UserError(
                "Say where the images are: --images FOLDER (customize example dog/ writes some to try), or --pairs "
                "FOLDER with images before and after an edit."
            )
        for name, value in (("token", token), ("class", noun), ("token-words", words)):
            if value:
                raise UserError(
                    f"--{name} belongs to --images, which is not there. Add it, or leave that out."
                )
        listed: list[Subject] = []
    else:
        listed, settings = read_first_subjects(str(images), token or "", noun, words, settings)
    subjects = [replace(subject, images=make_absolute(subject.images)) for subject in [*listed, *further]]

    # The prompt as a template, and absolute paths
    if "instance_prompt" in settings:
        first = subjects[0]
        settings["instance_prompt"] = as_template(settings["instance_prompt"], first.token, first.class_noun)
    refuse_prompts(subjects, settings)
    if "scorer" in settings:
        settings["scorer"] = make_absolute(settings["scorer"])
    if "preview_on" in settings:
        settings["preview_on"] = make_absolute(settings["preview_on"])
    if "class_images" in settings:
        settings["class_images"] = tuple(map(make_absolute, settings["class_images"]))
    return subjects, settings


def read_first_subjects(
    images: str, token: str, noun: str, words: str, settings: Mapping[str, Any]
) -> tuple[list[Subject], dict[str, Any]]:
    """The subjects of `--images`, and the settings, with those that its folder layout implies."""
    from customize.data.folders import is_concept_source, read_subjects

    prompts: dict[str, Any] = {}
    if is_concept_source(images, token=token, class_noun=noun):
        subjects, prompts = read_subjects(images, token=token, class_noun=noun, token_words=words)
        for subject in subjects:
            notify(f"{subject.images}: {subject.token} {subject.class_noun}, all subjects equally often.")
        fields = list_fields(Settings)
        values = {name: field.default for name, field in fields.items()} | dict(settings)
        for name, key in (("class_images", "class_data_dir"), ("class_prompt", "class_prompt")):
            if name in prompts and name not in settings and find_unmet(fields[name], values) is not None:
                hint = " It is for --prior class-images." if name == "class_images" else ""
                notify(f"The {key} of {images} has no effect with these settings and is not used.{hint}")
                del prompts[name]
    else:
        subjects = [name_subject(Subject(images, token, noun, words), settings)]
    return subjects, {**prompts, **settings}


def name_subject(subject: Subject, settings: Mapping[str, Any]) -> Subject:
    """The subject with a token: its own, the one in the instance prompt, or [V].

    Raises `UserError` if the instance prompt does not show which word is the token.
    """
    from customize.data.folders import guess_token_and_class

    prompt = settings.get("instance_prompt", "")
    if subject.token or not prompt or "{token}" in prompt or mentions(prompt, DEFAULT_TOKEN):
        return replace(subject, token=subject.token or DEFAULT_TOKEN)
    token, noun = guess_token_and_class(prompt, subject.class_noun, settings.get("class_prompt", ""))
    if not token:
        raise UserError(
            f"The instance prompt “{prompt}” does not show which word is the subject's. Name it with --token, or "
            "write {token} in its place."
        )
    learns_words = settings.get("method", "lora") in OWN_WORDS  # the method learns an embedding for the token
    notify(
        f"In the instance prompt “{prompt}” the token is {token}{f' and the class {noun}' if noun else ''}."
    )
    return replace(
        subject,
        token=token,
        class_noun=noun,
        token_words=subject.token_words or ("" if learns_words else token),
    )


def _drop_token(subject: Subject) -> str:
    """A subject's class without its token; “dog” if nothing is left."""
    return " ".join(re.sub(word_pattern(subject.token), " ", subject.class_noun).split()) or "dog"


def refuse_prompts(subjects: Sequence[Subject], settings: Mapping[str, Any]) -> None:
    """`UserError` for an instance prompt without the token, or a class prompt with one: nothing would be learned.

    Also for an empty one of either, for an unknown placeholder, and as `refuse_class_nouns`.
    """
    refuse_class_nouns(subjects)
    first = subjects[0]
    for name, example in (
        ("instance_prompt", f"a photo of {first.name_in_prompt()}"),
        ("class_prompt", "a dog"),
    ):
        if name in settings and not settings[name].strip():
            raise UserError(
                f"The {name.replace('_', ' ')} is empty. Write one, as “{example}”, or leave it out."
            )
    general_prompts = [("class prompt", settings.get("class_prompt") or "")]
    general_prompts += [("prior prompt", prompt) for prompt in settings.get("prior_prompts") or ()]
    for kind, prompt_text in [("instance prompt", settings.get("instance_prompt") or ""), *general_prompts]:
        if odd := [name for name in PLACEHOLDER.findall(prompt_text) if name not in ("token", "class")]:
            raise UserError(
                f"The {kind} “{prompt_text}” has {{{odd[0]}}}, and {{token}} and {{class}} alone are filled in. "
                "Leave it out."
            )
    prompt = settings.get("instance_prompt", "")
    if prompt and "{token}" not in prompt:
        raise UserError(
            f"The instance prompt “{prompt}” lacks the token {first.token}. Write it in, as in “a photo of "
            f"{first.name_in_prompt()}”, or {{token}} in its place."
        )
    for kind, text in general_prompts:
        tokens = [subject.token for subject in subjects if mentions(text, subject.token)]
        if tokens or "{token}" in text:
            raise UserError(
                f"The {kind} “{text}” holds the token {(tokens or [first.token])[0]}, which is the subject's alone. "
                "Leave it out."
            )


def refuse_class_nouns(subjects: Sequence[Subject]) -> None:
    """`UserError` for a class that contains the token or braces, and for token words that contain the class."""
    first = subjects[0]
    if first.class_noun and mentions(first.class_noun, first.token):
        raise UserError(
            f"The class {first.class_noun} holds the token {first.token}, which is the subject's alone. "
            + (
                f"Give the subject another, as --token sks, beside --class {quote(first.class_noun)}."
                if first.class_noun.lower() == first.token.lower()
                else f"Say what kind of thing it is without it, as --class {quote(_drop_token(first))}."
            )
        )
    for subject in subjects:
        if "{" in subject.class_noun or "}" in subject.class_noun:
            raise UserError(
                f"The class {subject.class_noun} has braces, which stand for what is filled in. Say what kind of thing "
                "it is, as --class dog."
            )
        if subject.class_noun and mentions(subject.token_words, subject.class_noun):
            raise UserError(
                f"The words “{subject.token_words}” hold the class {subject.class_noun}, which stands behind the token "
                "in prompts anyway. Name the subject's own words alone, as --token-words sks, or none."
            )


def start_preparing(options: PrepareImages) -> PreparedImages:
    """Encode a source of images to disk, as `customize prepare` does; returns the prepared folder.

    Raises `UserError` for a source without images, before torch is imported.
    """
    from backbone.media.sources.pictures import list_images
    from backbone.media.sources.stream import HubDataset, find_stream, stream_images

    columns = {"caption_column": options.caption_column or None, "image_column": options.image_column or None}
    stream = find_stream(
        HubDataset(options.images, options.dataset_config_name, options.split), out=options.out
    )
    pictures = list_images(options.images, **columns) if stream is None else stream_images(stream, **columns)
    with progress(None, "starting", brief=True):  # torch and diffusers
        from backbone.distributed import processes
        from backbone.models.model import Backbone
        from backbone.training.prepared import Cropping
        from customize.training.prepare import prepare_images

    processes.init_process(options.device)
    model = Backbone.open(
        options.model or "moji",
        device=options.device,
        precision=options.precision,
        resolution=options.resolution,
    )
    prepared = prepare_images(
        pictures,
        options.images,
        model,
        options.out,
        cropping=Cropping(options.flip, aspect_buckets=options.aspect_buckets),
        skip_bad=options.skip_bad,
        workers=options.num_proc,
        rows={name: value for name, value in columns.items() if value},
    )
    processes.end_process()
    return prepared
