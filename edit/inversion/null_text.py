"""Null-text inversion: an embedding of "no prompt" for every step, with which guided steps retrace a trajectory."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from backbone.diffusion.noise import Estimate, Predict, Schedule, guide
from backbone.diffusion.samplers import deterministic_step
from backbone.families.base import Text
from backbone.models.model import Backbone
from backbone.training.attention import quick_to_train

LEARNING_RATE = 1e-2
TOLERANCE = 1e-5


def null_texts(
    model: Backbone,
    states: Tensor,
    schedule: Schedule,
    *,
    conditional: Predict,
    empty: Text,
    guidance: float,
    iterations: int = 10,
) -> tuple[Tensor, int]:
    """The embeddings [S, T, D], and how many samples the denoiser was asked about.

    Mokady et al. 2023, algorithm 1, on `states` [S + 1, 1, C, H, W]: at each step Adam moves the embedding, warm from
    the step before, until the guided step from where we are lands on the trajectory. As in the authors' code the
    learning rate falls from 1e-2 by half over the walk, and a step ends early below 1e-5 + 2e-5 for each fiftieth
    behind it. Kept is the best embedding that was tried, the warm one included. The denoiser's weights take no
    gradient, and its conditional prediction is asked once a step.
    """
    steps = len(schedule) - 1
    now, embedding, asked, found = states[0], empty["hidden"].clone(), 0, []
    with quick_to_train(model.denoiser):
        for number, (here, there) in enumerate(pairwise(schedule)):
            with torch.no_grad():
                said = conditional(now, here)
            asked += len(now)
            goal, tolerance = states[number + 1], TOLERANCE * (1 + 100 * number / steps)
            moving = embedding.clone().requires_grad_(True)
            optimizer = torch.optim.Adam([moving], lr=LEARNING_RATE * (1 - number / (2 * steps)))
            smallest, landed = float("inf"), now
            for iteration in range(iterations + 1):
                last = iteration == iterations
                with torch.set_grad_enabled(not last):
                    unsaid = model.predictor({**empty, "hidden": moving})(now, here)
                    reached = deterministic_step(now, _guided(said, unsaid, guidance), here, there)
                    loss = (reached - goal).square().mean()
                asked += len(now)
                if float(loss.detach()) < smallest:
                    smallest, landed, embedding = (
                        float(loss.detach()),
                        reached.detach(),
                        moving.detach().clone(),
                    )
                if last or smallest < tolerance:
                    break
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            now = landed
            found.append(embedding[0])
    return torch.stack(found), asked


def _guided(said: Estimate, unsaid: Estimate, guidance: float) -> Estimate:
    return guide(said, unsaid, guidance)
