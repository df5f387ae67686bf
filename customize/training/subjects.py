"""The subjects of a run: class noun, the words that the text encoder reads for the token, and prompts."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from backbone.adapters.concept import (
    Concept,
    check_token,
    choose_rare_word,
    read_concept,
    resolve_placeholder_tokens,
    word_pattern,
)
from backbone.adapters.embeddings import name_vector_tokens
from backbone.io.console import UserError, format_count, notify
from backbone.io.prompts import describe_mirrored
from backbone.io.run_folder import run_name
from backbone.media.sources.record import ImageRecord
from backbone.media.transforms import crop_square
from backbone.models.model import Backbone
from customize.data.captions import (
    TrainingPrompt,
    describe_brackets,
    describe_foreign_syntax,
    describe_other_word,
    describe_truncated,
    write_prompt,
)
from customize.data.dataset import SubjectGroup
from customize.settings import INSTANCE_PROMPT, OWN_WORDS, Settings, Subject

SURE = 0.9  # probability above which a guess is not called unsure
LOOKED_AT = 64  # most images from which a class is guessed


def name_classes(
    model: Backbone, subjects: Sequence[Subject], pictures: Sequence[list[ImageRecord]]
) -> list[Subject]:
    """The subjects, each with its class noun: its own, or a guess."""
    return [
        dataclasses.replace(
            subject,
            class_noun=subject.class_noun or guess_class(model, folder, subject.images, subject.token),
        )
        for subject, folder in zip(subjects, pictures, strict=True)
    ]


def choose_words(
    model: Backbone, subjects: Sequence[Subject], pictures: Sequence[list[ImageRecord]], settings: Settings
) -> list[Subject]:
    """The subjects, each with the words for its token: its own, those of the run of `--begin-from`, or rare ones.

    Raises `UserError` for a bad token, or for two tokens that stand for the same words.
    """
    # What the run of --begin-from has learned its tokens as: these words keep their meaning
    vocabulary = model.text_encoder.tokenizer.get_vocab()
    learned = read_concept(settings.begin_from).tokens if settings.begin_from else {}
    subjects_with_words: list[Subject] = []
    for subject, folder in zip(subjects, pictures, strict=True):
        check_token(subject.token, vocabulary)
        for other in subjects_with_words:
            if subject.token == other.token:
                raise UserError(f"Two subjects have the token {subject.token}. Give each its own.")
            if re.fullmatch(word_pattern(other.token), subject.token):
                raise UserError(
                    f"{other.token} and {subject.token} are one word in prompts, where capitals do not count. Give "
                    "each subject its own."
                )

        # Its own words, those that the earlier run learned, new ones of its own, or rare words of the vocabulary
        words = subject.token_words or learned.get(subject.token, "")
        if learned and words not in learned.values():
            known = ", ".join(
                f"{token}, which stands for “{known_words}”" for token, known_words in learned.items()
            )
            notify(
                f"{settings.begin_from} has learned {known}: {subject.token} stands for other words here, so it begins "
                "without what that run has learned."
            )
        if settings.method in OWN_WORDS:
            words = " ".join(name_vector_tokens(subject.token, settings.num_vectors))
        elif not words:
            key = "".join(picture.content_hash for picture in folder)
            taken = [other.token_words for other in (*subjects, *subjects_with_words)]
            taken += learned.values()
            words = choose_rare_word(vocabulary, key, taken=taken)
        rivals = [other.token for other in subjects_with_words if other.token_words == words]
        if rivals:
            raise UserError(
                f"{rivals[0]} and {subject.token} both stand for “{words}”, so the model could not tell them apart. "
                "Give each its own words, or leave them out."
            )
        subjects_with_words.append(dataclasses.replace(subject, token_words=words))
    return subjects_with_words


def list_subject_fields(subjects: Sequence[Subject]) -> dict[str, Any]:
    """The fields of `Settings` for these subjects; token words that are not chosen yet are left out."""
    first = subjects[0]
    fields: dict[str, Any] = {
        "images": first.images,
        "token": first.token,
        "class_noun": first.class_noun,
        "subject": tuple(subject.flag() for subject in subjects[1:]),
    }
    return fields | ({"token_words": first.token_words} if first.token_words else {})


def make_group(
    subject: Subject, folder: list[ImageRecord], settings: Settings, concept: Concept, model: Backbone
) -> SubjectGroup:
    """A subject's images with their prompts, as the model reads them.

    Prints what the token stands for, unknown tokens in captions, and captions that are truncated. Raises `UserError`
    for a class prompt with a token that is not the run's.
    """
    instance = subject.fill(settings.instance_prompt)
    noun = subject.class_noun
    prompts = [write_prompt(picture, instance, subject.token, concept, noun=noun) for picture in folder]
    for sentence in list_prompt_warnings(subject, folder, prompts, settings, concept, model):
        notify(sentence)
    message = (
        f"gets {format_count(settings.num_vectors, 'new word')} of its own"
        if settings.method in OWN_WORDS
        else f"stands for “{subject.token_words}”"
    )
    notify(
        f"{format_count(len(folder), 'picture')} of “{subject.name_in_prompt()}”; {subject.token} {message}."
    )
    class_prompt, *further = [
        resolve_placeholder_tokens(subject.fill(prompt_text), [concept], runs=None)
        for prompt_text in (settings.class_prompt, *settings.further_prompts)
    ]
    return SubjectGroup(
        folder, [prompt.resolved for prompt in prompts], class_prompt, subject.images, further
    )


def list_prompt_warnings(
    subject: Subject,
    folder: list[ImageRecord],
    prompts: Sequence[TrainingPrompt],
    settings: Settings,
    concept: Concept,
    model: Backbone,
) -> list[str]:
    """A sentence for everything in a subject's captions that the model reads otherwise than their author may expect.

    `prompts` are those of the images in `folder`, in the same order.
    """
    instance = subject.fill(settings.instance_prompt)
    captions = [image.caption for image in folder if image.caption]
    captioned = [prompt for prompt, image in zip(prompts, folder, strict=True) if image.caption]

    # Brackets, other programs' syntax, another class noun, and what the text encoder truncates
    warnings = [describe_brackets(captioned, concept)] if captioned else []
    warnings += describe_foreign_syntax(captioned)
    warnings.append(describe_other_word(captions, subject.token, subject.class_noun))
    warnings += describe_truncated(captioned, subject.token_words, subject.token, model.text_encoder)

    # Settings that captions make idle or false
    is_idle = folder and not any(instance in prompt.text for prompt in prompts)
    if settings.instance_prompt != INSTANCE_PROMPT and is_idle:
        warnings.append(
            f"All captions hold {subject.token}, so no image is learned under the instance prompt “{instance}”: it is "
            "for images without a caption, and before captions without the token."
        )
    if settings.flip:
        warnings.append(describe_mirrored((prompt.text, prompt.source) for prompt in captioned))
    return list(filter(None, warnings))


def guess_class(model: Backbone, pictures: Sequence[ImageRecord], images: str, token: str) -> str:
    """The class of the subject, from a name, else the scorer's guess; it is printed.

    Raises `UserError` if no name says it and the model has no scorer.
    """
    from backbone.evaluation.clip import classify_subject, load_scorer
    from backbone.world.words import choose_article, load_vocabulary, pluralize

    nouns = tuple(load_vocabulary().nouns)
    nouns_by_form = {form: noun for noun in nouns for form in (pluralize(noun), noun)}
    if found := _find_named(nouns_by_form, pictures, images, token):
        source, noun = found
        notify(f"{source} that it shows {choose_article(noun)} {noun} (change it with --class).")
        return noun
    folder = model.location.local("scorer")
    if folder is None:
        raise UserError(
            f"Say what the pictures show with --class (as --class dog): {model.location.name} cannot guess it."
        )
    scorer = load_scorer(folder)
    ranked = classify_subject(
        scorer, [crop_square(picture.open(), 128) for picture in pictures[:LOOKED_AT]], nouns
    )
    best, second = ranked[0], ranked[1]
    seems = f"{best[0]} ({best[1]:.0%}; next {second[0]}, {second[1]:.0%})"
    doubt = " That is no sure guess: stop, and name it." if best[1] < SURE else ""
    notify(f"The images seem to show a {seems} (change it with --class).{doubt}")
    return str(best[0])


def _find_named(
    nouns_by_form: Mapping[str, str], pictures: Sequence[ImageRecord], images: str, token: str
) -> tuple[str, str] | None:
    """(source, class): the folder's name, the captions or the images' names name the class; None if none does.

    `nouns_by_form` are the nouns by their accepted forms. In a caption the class is the noun after the token; else, as
    in names of images, the only noun that all of them contain.
    """

    def list_nouns(text: str) -> list[str]:
        return [nouns_by_form[word] for word in re.split(r"[^a-z]+", text.lower()) if word in nouns_by_form]

    if folder_nouns := list_nouns(run_name(images)):
        return f"The name of {images} says", folder_nouns[0]
    captions = [picture.caption for picture in pictures if picture.caption]
    nouns = [
        noun
        for caption in captions
        for noun in list_nouns(caption.partition(token)[2].strip().partition(" ")[0])
    ]
    files = [picture.path.stem for picture in pictures if picture.row is None]
    for source, texts in (("captions", captions), ("names", files)):
        shared = set.intersection(*(set(list_nouns(text)) for text in texts)) if texts else set()
        if texts is captions and len(set(nouns)) == 1 and len(nouns) > len(captions) / 2:
            shared = set(nouns)
        if len(shared) == 1:
            return f"The {source} of the images in {images} say", shared.pop()
    return None
