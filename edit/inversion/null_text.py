"""Null-text inversion: an embedding of "no prompt" for each step, so that guided steps retrace a trajectory."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from backbone.conditions.conditions import Conditions
from backbone.diffusion.noise import Predict, Schedule
from backbone.diffusion.samplers import deterministic_step
from backbone.models.model import Backbone
from backbone.training.attention import fast_attention_backward
from backbone.training.loss_scale import LossScale, make_loss_scale

LEARNING_RATE = 1e-2
TOLERANCE = 1e-5


def optimize_null_texts(
    model: Backbone,
    states: Tensor,
    schedule: Schedule,
    *,
    conditional: Predict,
    empty: Conditions,
    guidance: float,
    iterations: int = 10,
) -> tuple[Tensor, int]:
    """The embeddings [S, T, D], and the NFE.

    Mokady et al. 2023, algorithm 1, on `states` [S + 1, 1, C, H, W]: at each step Adam optimises the embedding,
    starting from that of the step before, until the guided step from the current state lands on the trajectory. The
    best embedding tried is kept, the starting one included. The denoiser's weights take no gradient, and its
    conditional prediction is made once a step.
    """
    steps, scale = len(schedule) - 1, make_loss_scale(model.dtype)
    noisy, embedding, nfe, embeddings = states[0], empty.text["hidden"].clone(), 0, []
    with fast_attention_backward(model.denoiser):
        for step, (level, next_level) in enumerate(pairwise(schedule)):
            # ε(x_t, prompt), which does not depend on the embedding
            with torch.no_grad():
                with_prompt = conditional(noisy, level)
            nfe += len(noisy)
            # As in the authors' code: the learning rate falls by half over the steps, and a step ends early below
            # 1e-5 + 2e-5 for each fiftieth after it
            goal, tolerance = states[step + 1], TOLERANCE * (1 + 100 * step / steps)
            trained = embedding.clone().requires_grad_(True)
            optimizer = torch.optim.Adam([trained], lr=LEARNING_RATE * (1 - step / (2 * steps)))
            smallest, landed = float("inf"), noisy
            # minimise ‖x_{t−1}(guided by the embedding) − x*_{t−1}‖² over the embedding
            for iteration in range(iterations + 1):
                last = iteration == iterations  # measures the last update, and takes no gradient
                with torch.set_grad_enabled(not last):
                    unconditional = model.predictor(replace(empty, text={**empty.text, "hidden": trained}))(
                        noisy, level
                    )
                    reached = deterministic_step(
                        noisy,
                        model.path.guide(with_prompt, unconditional, guidance, level),
                        level,
                        next_level,
                    )
                    loss = (reached - goal).square().mean()
                nfe += len(noisy)
                if (error := float(loss.detach())) < smallest:
                    smallest, landed = error, reached.detach()
                    embedding = trained.detach().clone()
                if last or smallest < tolerance:
                    break
                compute_gradient(loss, trained, scale)
                optimizer.step()
            noisy = landed  # the next step starts where this one ends, not on the trajectory
            embeddings.append(embedding[0])
    return torch.stack(embeddings), nfe


def compute_gradient(loss: Tensor, trained: Tensor, scale: LossScale | None) -> None:
    """The gradient of a loss [] in `trained`, without what fp16 loses of a small one."""
    while True:
        value = 1.0 if scale is None else scale.value
        (gradient,) = torch.autograd.grad(loss * value, trained, retain_graph=scale is not None)
        if scale is None or bool(gradient.isfinite().all()) or not scale.lower():
            trained.grad = gradient / value
            return
