"""Concepts put on a model, from run folders: their adapters, their words, and the weights that they change."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from backbone.adapters.concept import Concept
from backbone.adapters.embeddings import load_embeddings
from backbone.adapters.lora import activate_adapters, has_text_encoder_weights, load_lora
from backbone.distributed.processes import require_whole_model
from backbone.io.console import UserError
from backbone.io.files import read_tensors
from backbone.models.model import Backbone


def load_concepts(model: Backbone, concepts: Sequence[Concept], *, scale: float = 1.0) -> list[str]:
    """Puts concepts on a model, their changes `scale` times as strong; gives the adapters' names.

    Several adapters add up; so do several changes of the denoiser's own weights.

    Raises `UserError` for a concept of another model, before anything is changed.
    """
    for concept in concepts:
        check_concept_fits(concept, model)
    names = []
    for number, concept in enumerate(concepts):
        if concept.changed:
            add_weight_differences(model, concept, scale=scale)
        if concept.words:
            for token, words in concept.tokens.items():
                if words.split()[:1] != [token]:  # rare words of the model's own, in a merge of runs
                    continue
                load_embeddings(concept.folder / concept.words, model.text_encoder, token)
            model.text_learned = True
        if concept.weights:
            names.append(f"concept_{number}")
            with_text = has_text_encoder_weights(concept.weights_path)
            text = {slot.name: slot.model for slot in model.text_encoder.slots} if with_text else {}
            load_lora(concept.weights_path, model.denoiser, names[-1], scale=scale, text_encoders=text)
            model.text_learned |= with_text
    if names:
        activate_adapters(model.denoiser, names)
        if model.text_learned:
            for slot in model.text_encoder.slots:
                activate_adapters(slot.model, names)
    return names


@torch.no_grad()
def add_weight_differences(model: Backbone, concept: Concept, *, scale: float = 1.0) -> None:
    """Adds to the denoiser's weights the differences that a concept's file holds, `scale` times."""
    path = concept.folder / concept.changed
    differences, _ = read_tensors(path)
    own = dict(model.denoiser.named_parameters())
    if any(name not in own or own[name].shape != value.shape for name, value in differences.items()):
        raise UserError(f"{path} was made for another model. Give the --model that it was trained on.")
    for name, value in differences.items():
        own[name].add_(scale * value.to(own[name].device, torch.float32))


def check_concept_fits(concept: Concept, model: Backbone) -> None:
    """`UserError` when a concept was trained on other weights than the model's, or changes weights that are cut up."""
    if concept.changed:
        require_whole_model(f"{concept.folder} changes the base's own weights, which")
    if concept.fingerprint != model.fingerprint:
        raise UserError(
            f"{concept.folder} was trained on {concept.model} with other weights than {model.location.name} has. "
            "Give the --model that it was trained on, or train it again."
        )
