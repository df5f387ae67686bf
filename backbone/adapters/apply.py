"""Load concepts from run folders into a model: adapters, token embeddings, weight differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch

from backbone.adapters.concept import EDITS, Concept
from backbone.adapters.config import check_tensors
from backbone.adapters.embeddings import load_embeddings
from backbone.adapters.lora import activate_adapters, has_text_encoder_weights, load_lora
from backbone.distributed.processes import require_whole_model
from backbone.io.console import UserError, notify_once, suggest_value
from backbone.io.files import read_header, read_tensors
from backbone.io.run_folder import CONCEPT_FILE
from backbone.models.model import Backbone

USUAL_SCALE, MOST_SCALE = 1.5, 5.0  # the largest usual strength of concepts, and one that is surely a mistake


def load_concepts(model: Backbone, concepts: Sequence[Concept], *, scale: float = 1.0) -> list[str]:
    """Load concepts into a model and return the names of their adapters.

    `scale` multiplies adapters (LoRA scale) and weight differences; several concepts add up.

    Raises `UserError` for a concept of another model or a scale that is not finite, before anything is changed.
    """
    if not math.isfinite(scale):
        raise UserError(f"The scale of the concepts is {scale}, which is no strength. Give a finite number.")
    if concepts:
        say_far_scale(scale, "concepts")
        _say_idle_scale(scale, concepts)
    folders = [concept.folder.resolve() for concept in concepts]
    for concept in concepts:
        check_concept_fits(concept, model)
        if folders.count(concept.folder.resolve()) > 1:
            raise UserError(
                f"{concept.folder} is given twice, which would double its strength. Name it once; --scale is its "
                "strength."
            )
    names = []
    for number, concept in enumerate(concepts):
        if concept.changed:
            add_weight_differences(model, concept, scale=scale)
        if concept.words:
            _load_words(model, concept)
        if concept.weights:
            names.append(f"concept_{number}")
            _load_adapter(model, concept, names[-1], scale=scale)
    if names:
        activate_adapters(model.denoiser, names)
        if model.text_learned:
            for slot in model.text_encoder.slots:
                activate_adapters(slot.model, names)
    return names


def _load_words(model: Backbone, concept: Concept) -> None:
    """Load the embeddings of a concept's learned tokens; a merged run also has tokens for words of the model."""
    if not concept.learned_tokens:
        raise UserError(
            f"{concept.folder / CONCEPT_FILE} names {concept.words}, and none of its tokens is learned there. "
            "Train the concept again."
        )
    for token in concept.learned_tokens:
        load_embeddings(concept.folder / concept.words, model.text_encoder, token)
    model.text_learned = True


def _load_adapter(model: Backbone, concept: Concept, name: str, *, scale: float) -> None:
    """Load a concept's adapter under this name, into the text encoders too if its file has weights of them."""
    if not read_header(concept.weights_path).shapes:
        raise UserError(f"{concept.weights_path} holds no layers. Train the concept again.")
    with_text = has_text_encoder_weights(concept.weights_path)
    text = {slot.name: slot.model for slot in model.text_encoder.slots} if with_text else {}
    load_lora(concept.weights_path, model.denoiser, name, scale=scale, text_encoders=text)
    model.text_learned |= with_text
    if concept.tokens and concept.kind != EDITS:
        model.subject_adapters.add(name)


def say_far_scale(scale: float, adapters: str) -> None:
    """Warn where adapters are so strong that nothing of what they learned is visible."""
    if abs(scale) > MOST_SCALE:
        notify_once(
            f"At {scale:g} times the strength that they were learned at, {adapters} tear images apart: 0.5 to 1.5 is "
            f"usual.{suggest_value(scale, USUAL_SCALE)}"
        )


def _say_idle_scale(scale: float, concepts: Sequence[Concept]) -> None:
    """Say where a scale of 0 leaves out all weights, or another one has no weights to act on."""
    if scale == 0:
        notify_once("At scale 0 nothing of the concepts' weights is used, only words that they learned.")
    elif scale != 1 and not any(concept.weights or concept.changed for concept in concepts):
        notify_once(f"The scale {scale:g} has no effect: these concepts are learned words, and no weights.")


def say_idle_early_scale(concepts: Sequence[Concept], early_scale: float | None) -> None:
    """Say where a strength in the first steps is requested and no concept has an adapter of a subject."""
    if (
        concepts
        and early_scale not in (None, 1)
        and not any(concept.weights and concept.tokens for concept in concepts)
    ):
        notify_once(
            f"--early-scale {early_scale:g} has no effect: it is for adapters that carry a subject, and these concepts "
            "have none."
        )


@torch.no_grad()
def add_weight_differences(model: Backbone, concept: Concept, *, scale: float = 1.0) -> None:
    """Add `scale` times the weight differences of a concept to the denoiser's weights.

    Raises `UserError` for a file without layers, and for one of another model.
    """
    path = concept.folder / concept.changed
    differences, _ = read_tensors(path)
    if not differences:
        raise UserError(f"{path} holds no layers. Train the concept again.")
    check_tensors(path, differences)
    weights = dict(model.denoiser.named_parameters())
    if any(name not in weights or weights[name].shape != value.shape for name, value in differences.items()):
        raise UserError(f"{path} was made for another model. Give the --model that it was trained on.")
    for name, value in differences.items():
        weights[name].add_(scale * value.to(weights[name].device, torch.float32))


def carry_over(concept: Concept, base: Backbone, few_step: Backbone) -> Concept:
    """A concept of the base as a concept of a few-step model with the same architecture (`open_few_step`)."""
    check_concept_fits(concept, base)
    return replace(concept, model=few_step.location.name, fingerprint=few_step.fingerprint)


def check_concept_fits(concept: Concept, model: Backbone) -> None:
    """Raise `UserError` for a concept of another model, a damaged one, and one that would change sharded weights."""
    if concept.kind == "motion":
        raise UserError(
            f"{concept.folder} is a motion, which a picture cannot have. Draw clips with it: customize clip."
        )
    if concept.changed:
        require_whole_model(f"{concept.folder} changes the base's own weights, which")
        if model.placement.quantize:
            raise UserError(
                f"{concept.folder} changes the base's own weights, which cannot lie in {model.placement.quantize}. "
                "Leave out --quantize."
            )
    for path in concept.files:
        if not path.is_file():
            raise UserError(
                f"{path} is missing, which {concept.folder / CONCEPT_FILE} names. Copy the whole run "
                "folder, or train the concept again."
            )
    if concept.kind == EDITS and not model.edits_by_instruction:
        raise UserError(
            f"{concept.folder} does to an image what an instruction says, and draws nothing without one. Use it with "
            "edit instruct."
        )
    if not concept.files:
        raise UserError(f"{concept.folder / CONCEPT_FILE} names no weights. Train the concept again.")
    if not model.has_fingerprint(concept.fingerprint):
        raise UserError(
            f"{concept.folder} was trained on {concept.model} with other weights than {model.location.name} has. "
            "Give the --model that it was trained on, or train it again."
        )
    for path in concept.files:
        _check_values(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _check_values(path: Path, modified: int) -> None:
    """`check_tensors` of a file, once for each version of it: commands check before they create a folder."""
    check_tensors(path, read_tensors(path)[0])
