"""Training on a scorer's values directly, without pairs: gradients through the reward, or policy gradients.

`draft` (Clark et al. 2024, DRaFT-K) samples with the model, keeps the gradient of the last K steps, of the decoder and
of the scorer, and ascends the reward. It needs a scorer that is a network.

`ddpo` (Black et al. 2024, eq. 6) needs numbers alone: it takes the stochastic sampler for a policy whose every step
is Gaussian, and makes the steps of pictures that scored above their prompt's mean more likely, by clipped importance
ratios as in PPO.

Both can exploit the scorer's weaknesses (reward hacking). Evaluate them by another scorer.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from align.objectives.preference import ADAPTER, add_trained_lora, find_share
from align.settings import Settings
from backbone.adapters.concept import Concept, expand_tokens
from backbone.adapters.lora import LORA_WEIGHTS, save_lora
from backbone.diffusion.noise import Predict
from backbone.diffusion.transfer import send
from backbone.distributed import processes
from backbone.io.prompts import Prompt
from backbone.models.cache import encode_prompts_cached
from backbone.models.compiled import CompiledBlocks
from backbone.models.model import Backbone
from backbone.models.sample import draw_initial_noise
from backbone.training.fast import fast_steps
from backbone.training.optimizer import make_adamw
from backbone.training.run import Objective


@dataclass
class RewardTraining(Objective):
    """The common part of both: a LoRA, its optimiser, prompts that are encoded once.

    A step's prompts and noise follow from its number, so a run goes on bit for bit where it was saved.
    """

    model: Backbone
    prompts: Sequence[Prompt]
    settings: Settings
    base: Sequence[str] = ()
    concepts: Sequence[Concept] = ()
    figures: dict[str, Tensor | float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        settings = self.settings
        self.share = find_share(settings)
        texts = [expand_tokens(prompt.text, self.concepts) for prompt in self.prompts]
        with processes.main_process_first():
            self.conditions = encode_prompts_cached(self.model, [*texts, ""])
        self.model.free("text_encoder")
        self.parameters = add_trained_lora(self.model, settings, self.base)
        self.optimizer = make_adamw(
            [{"params": list(self.parameters.values()), "lr": settings.learning_rate}],
            weight_decay=settings.weight_decay,
        )
        self.compiled = CompiledBlocks([self.model.denoiser]) if settings.compile else None
        self.schedule = self.model.schedule(settings.sample_steps)

    @property
    def images(self) -> int:
        """The number of images that a step samples, or trains on."""
        return self.settings.batch

    def learning(self) -> AbstractContextManager[None]:
        """Fast steps of the denoiser."""
        return fast_steps(self.model.denoiser)

    def write(self, run: Path, header: dict[str, str]) -> dict[str, str]:
        """Write the LoRA; return the fields of `Concept` that name the files."""
        save_lora(run / LORA_WEIGHTS, self.model.denoiser, ADAPTER, metadata=header)
        return {"weights": LORA_WEIGHTS}

    def predictor(self, numbers: Sequence[int]) -> Predict:
        """The model's guided prediction for these prompts, one a sample."""
        empty = self.conditions[[len(self.prompts)]].repeat(len(numbers))
        return self.model.guided_predictor(self.conditions[numbers], empty, self.settings.guidance)

    def draw_start(self, keys: Sequence[tuple[int, int]]) -> Tensor:
        """The initial noise [B, …] of a picture, one for each key."""
        noise = torch.stack([draw_initial_noise(self.model, self.settings.seed, *key) for key in keys])
        first = self.schedule[0]
        return send(noise, self.model.device) * float((first.a**2 + first.b**2).sqrt())

    def _list_micro_batches(self) -> list[range]:
        """This process's share of a step's rows, in micro-batches."""
        count = self.settings.batch
        size = self.settings.micro_batch or count
        parts = [range(first, min(first + size, count)) for first in range(0, count, size)]
        return [part[self.share.rows] for part in parts[self.share.micros]]
