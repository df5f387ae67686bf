"""The scale of losses whose gradients are computed in fp16.

A gradient of the mean over a latent's numbers is a millionth or less in most layers, and fp16 has nothing between
6e-8 and 0. So losses are multiplied before the backward pass, and the gradients, in fp32, divided by the same number.
"""

from __future__ import annotations

import torch

MOST = 2.0**16
LOWERED = 4.0  # how much less after an overflow
GROWS_EVERY = 1000  # steps


class LossScale:
    """The power of two by which losses are multiplied (Micikevicius et al. 2018, section 3.2).

    A step whose gradients overflow is computed again with a lower scale, so that none is left out; every GROWS_EVERY
    steps a lowered one is raised. So it is a function of the steps taken, and a checkpoint holds it.
    """

    def __init__(self, value: float = MOST) -> None:
        self.value = min(max(value, 1.0), MOST)

    def lower(self) -> bool:
        """Lower it after an overflow; False where it is 1 already, so that it is not to blame."""
        if self.value <= 1:
            return False
        self.value = max(1.0, self.value / LOWERED)
        return True

    def end_step(self, step: int) -> None:
        """Raise it if this step is one of every GROWS_EVERY."""
        if step % GROWS_EVERY == 0:
            self.value = min(MOST, self.value * LOWERED)


def make_loss_scale(dtype: torch.dtype, value: float = MOST) -> LossScale | None:
    """The scale for a network that computes in `dtype`; None where gradients do not need one."""
    return LossScale(value) if dtype is torch.float16 else None
