"""Where two prompts see a picture differently: the difference of their predictions along its trajectory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from backbone.cache import encoded_prompts
from edit.inversion import Inversion

# Of the way down: late enough to see where a thing is, early enough to see what.
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)
FLOOR = 0.1  # share of the places that are taken to differ by nothing


@torch.no_grad()
def differences(
    inversion: Inversion, pairs: Sequence[tuple[str, str]], *, first: int = 0
) -> tuple[Tensor, int]:
    """How much the second prompt of each pair differs from the first [N, H, W] at every place, 1 at most; and how
    many samples the denoiser was asked about: one for each different prompt at each of five rungs.

    After Couairon et al. 2023 (DiffEdit, section 3.2), with the states that the inversion went through, from rung
    `first` on, in place of fresh noise: at each rung, the mean over channels of |ε̂ − ε̂'|, above what a tenth of the
    places stays below, divided by its greatest value; added up over the rungs, and smoothed over 3 × 3 places.
    """
    model, steps = inversion.model, inversion.steps
    prompts = list(dict.fromkeys(prompt for pair in pairs for prompt in pair))
    rungs = torch.tensor(sorted({first + int(share * (steps - first)) for share in SHARES}))
    states = inversion.states.float()[rungs.to(inversion.states.device)]
    levels = inversion.ladder[rungs.to(inversion.ladder.a.device).repeat_interleave(len(prompts))]
    text = {name: value.repeat(len(rungs), *[1] * (value.ndim - 1))
            for name, value in encoded_prompts(model, prompts).items()}  # fmt: skip
    rows = states.repeat_interleave(len(prompts), 0)
    noise = model.predictor(text)(rows, levels).noise.unflatten(0, (len(rungs), len(prompts)))
    found = []
    for one, other in pairs:
        apart = (noise[:, prompts.index(other)] - noise[:, prompts.index(one)]).abs().mean(1)
        floor = apart.flatten(1).quantile(FLOOR, dim=1)[:, None, None]
        apart = (apart - floor).clamp(min=0)
        apart = apart / apart.amax((1, 2), keepdim=True).clamp(min=1e-12)
        smooth = F.avg_pool2d(F.pad(apart.sum(0)[None, None], (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        found.append(smooth[0, 0] / smooth.amax().clamp(min=1e-12))
    return torch.stack(found), len(rows)
