"""Prompt-to-prompt over an inversion: several target prompts at once, in one batch with the source.

    edited = replace(inversion, ["a dog in a park", "a red cat in a park"], blend=["cat"])

A step asks the denoiser about the source with its prompt (one row) and about every target with and without its (two
rows each); the targets' attention is made from the source's while their windows last (Hertz et al. 2022, algorithm 1).
The source's row is then overwritten by the stored trajectory (`edit.inversion.inversion`), so its unconditional
prediction is never asked for, and once no window is open the row itself is left out: S steps with N targets cost at
most S·(1 + 2·N).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from backbone.diffusion.noise import Estimate, guide
from backbone.families.base import TextEncoder
from backbone.io.console import UserError
from backbone.media.transforms import to_image
from backbone.models.cache import encode_prompts_cached
from backbone.models.model import Backbone
from edit.attention.alignment import (
    Alignment,
    Run,
    align,
    columns,
    heard_prompt,
    inside,
    require,
    weights,
    window,
)
from edit.attention.control import Control, Cross, Maps, SelfAttention, cross
from edit.attention.install import controlled
from edit.attention.separate import features_of
from edit.inversion.inversion import Counted, Inversion, refuse_negative, told
from edit.masks import composed, differences, latent_mask, mask_of
from edit.methods.prompt_to_prompt.regions import (
    _places,
    _says,
    blended_words,
    only_colours,
    places_of,
    told_apart,
)
from edit.methods.prompt_to_prompt.settings import AUTO, Settings, over, usual
from edit.methods.sdedit import spaced


@dataclass(frozen=True, eq=False)
class Edited:
    """What `replace` gives back, N targets of one inversion.

    path         [S' + 1, 1 + N, C, H, W], the source's and the targets' states from where the edit began
    masks        [N, H, W], 1 where the targets were let differ from the source in the end; None if everywhere
    heatmaps     word → [1 + N, h, w], the share of each place's attention that it had in the source and the targets
    estimates    [F, N, C, H, W], what the targets were thought to become, along the way
    evaluations  samples that the denoiser was asked about, the inversion not counted
    guidance     that the targets had
    """

    inversion: Inversion
    targets: tuple[str, ...]
    alignments: tuple[Alignment, ...]
    settings: Settings
    path: Tensor
    masks: Tensor | None
    heatmaps: Mapping[str, Tensor]
    estimates: Tensor
    evaluations: int
    guidance: float

    @property
    def latents(self) -> Tensor:
        """The targets' latents [N, C, H, W]."""
        return self.path[-1, 1:].float()

    @property
    def source(self) -> Tensor:
        """Where the source's row arrived [C, H, W]."""
        return self.path[-1, 0].float()

    @cached_property
    def decoded(self) -> Tensor:
        """The source's row and the targets [1 + N, 3, 8H, 8W], the targets where they were let differ."""
        source, *edits = self.inversion.model.decode(torch.cat([self.source[None], self.latents]))
        return torch.cat([source[None], composed(torch.stack(edits), source, self.masks)])

    @property
    def pictures(self) -> list[Image.Image]:
        """The edits, in the order of the targets."""
        return [to_image(picture) for picture in self.decoded[1:]]

    @property
    def reconstruction(self) -> Image.Image:
        """The source's row."""
        return to_image(self.decoded[0])


def replace(
    inversion: Inversion,
    target: str | Sequence[str],
    *,
    progress: Callable[[], Any] = lambda: None,
    **wishes: Any,
) -> Edited:
    """Edits the picture of an inversion towards one target prompt, or several at once, in the model's words.

    `wishes` are the fields of `Settings`, over what works with the model (`edit` in its `limner.json`); `progress` is
    called after every step.

    Raises `UserError` for prompts that share no words with the source's, words that no prompt has, a mask of another
    size, and what the model cannot do.
    """
    targets = (target,) if isinstance(target, str) else tuple(target)
    settings = Settings(**over(usual(inversion.model), wishes))
    return _Edit(inversion, targets, settings, aligned(inversion, targets, settings)).run(progress)


def possible(model: Backbone, settings: Settings) -> None:
    """`UserError` for features of a model that has none, and for a negative prompt that nobody would hear."""
    if settings.features and features_of(model.denoiser) is None:
        raise UserError(
            f"plug-and-play takes the features of a UNet, and the denoiser of {model.location.name} is none. "
            "Choose --control prompt-to-prompt or masactrl."
        )
    refuse_negative(model, settings.negative)


def aligned(inversion: Inversion, targets: Sequence[str], settings: Settings) -> tuple[Alignment, ...]:
    """The alignment of the source's prompt with each target; `UserError` for words that no prompt has."""
    return align_all(inversion.model.text_encoder, inversion.prompt, targets, settings)


def align_all(
    encoder: TextEncoder, source: str, targets: Sequence[str], settings: Settings
) -> tuple[Alignment, ...]:
    """The same from the prompts alone."""
    if not targets:
        raise UserError("There is no target prompt. Say what the picture should show.")
    first, *others = (heard_prompt(encoder.segments, prompt) for prompt in (source, *targets))
    for word in [*settings.weights, *settings.windows]:
        require(others, word)
    for word in [*(word for word in settings.blend if word != AUTO), *settings.keep, *settings.heatmaps]:
        require([first, *others], word)
    for old, new in settings.swaps:
        require([first], old)
        require(others, new)
    found = []
    for other in others:
        if settings.carries_words:
            swaps = [swap for swap in settings.swaps if other.find(swap[1])]
            found.append(align(first, other, swaps=swaps))
        else:
            found.append(Alignment(first, other, (Run("replaced", first.words, other.words),)))
    return tuple(found)


class _Edit:
    """One call of `replace`: what is fixed before the walk, and the walk."""

    def __init__(
        self,
        inversion: Inversion,
        targets: tuple[str, ...],
        settings: Settings,
        alignments: tuple[Alignment, ...],
    ) -> None:
        self.inversion, self.targets, self.settings, self.alignments = (
            inversion,
            targets,
            settings,
            alignments,
        )
        self.model, self.count = inversion.model, len(targets)
        possible(self.model, settings)
        self.steps, self.first = inversion.steps, inversion.start(settings.strength)
        self.guidance = self._guidance()
        self.crosses = self._crosses()
        self.own_mask = self._own_mask()
        self.words = self._words()
        self.pairs = self._pairs()
        self.obeying = self._obeying()
        self.selfs: list[SelfAttention] = [
            settings.attention if any(some) else "own" for some in self.obeying
        ]
        self.features = inside(self.steps, (0.0, self.settings.features)).tolist()
        wanted = [
            step
            for step in range(self.steps)
            if self.crosses[step] or self.selfs[step] != "own" or self.features[step]
        ]
        if self.words is not None:
            wanted.append(min(int(settings.blend_from * self.steps), self.steps - 1))
        self.last = max(wanted, default=-1) if inversion.overwrites else self.steps - 1

    @torch.no_grad()
    def run(self, progress: Callable[[], Any]) -> Edited:
        """The walk from the first rung to the clean one."""
        inversion, settings, first = self.inversion, self.settings, self.first
        self.text = encode_prompts_cached(self.model, [inversion.prompt, *self.targets])
        self.usual = encode_prompts_cached(self.model, [settings.negative])
        if inversion.method == "negative-prompt":
            self.usual = {name: value[:1] for name, value in self.text.items()}
        self.told = told(
            self.model, self.text, self.guidance if self.source_is_guided else 1.0, self.guidance
        )
        states = inversion.states
        now = states[first][None].repeat(1 + self.count, *[1] * (states.ndim - 1))
        attention = self.model.family.attention(self.model.denoiser, self.text)
        size = (now.shape[-2], now.shape[-1])
        maps = (
            None
            if self.words is None
            else Maps(self.words.to(now.device), size, most=attention.max_map_queries)
        )
        control = Control(
            self.count,
            self_tokens=attention.max_map_queries,
            layers=attention.detail_layers if settings.layers == "late" else ("",),
            reach=settings.reach,
            maps=maps,
        )
        path, estimates, masks, asked = [now], [], self._everywhere(), 0
        if self.pairs and first < self.steps:
            apart, asked = differences(inversion, list(self.pairs.values()), first=first)
            self.apart = dict(zip(self.pairs, apart, strict=True))
            if not self.named.any():
                masks = self._masks(None)
        kept = spaced(first, self.steps, settings.frames)
        with ExitStack() as obeying:
            obeying.enter_context(controlled(self.model.denoiser, control, attention))
            for number in range(first, self.steps):
                if number > self.last:
                    obeying.close()
                control.cross, control.self_attention = self.crosses[number], self.selfs[number]
                control.obeying = self.obeying[number]
                control.features = "source" if self.features[number] else "own"
                estimate, rows = self._ask(now, number)
                asked += rows
                now = self._step(number, now, estimate)
                if maps is not None and number <= self.last:
                    maps.settle()
                    if self.named.any() and number >= settings.blend_from * self.steps:
                        masks = self._masks(maps)
                if masks is not None:
                    now = torch.cat([now[:1], now[:1] + masks[:, None].to(now) * (now[1:] - now[:1])])
                path.append(now)
                if number in kept:
                    estimates.append(estimate.clean[-self.count :].float())
                progress()
        empty = now.new_zeros(0, *now[1:].shape)
        return Edited(
            inversion=inversion,
            targets=self.targets,
            alignments=self.alignments,
            settings=settings,
            path=torch.stack(path),
            masks=masks,
            heatmaps=self._heatmaps(maps),
            estimates=torch.stack(estimates) if estimates else empty,
            evaluations=asked,
            guidance=self.guidance,
        )

    def _ask(self, now: Tensor, number: int) -> tuple[Estimate, int]:
        """The estimates of the source, where it is needed, and the targets, guided; and how many samples that took.

        Rows: the source (while it is needed), the targets, then those without a prompt, of the source only if it is
        walked and guidance changes it, and of nobody where the network is told the guidance.
        """
        level = self.inversion.schedule[number]
        empty = self.inversion.empty(number, self.usual)
        drop = 1 if number > self.last else 0
        said = now[drop:]
        text = {name: value[drop:] for name, value in (self.told or self.text).items()}
        if self.guidance == 1 or self.told is not None:
            predict = Counted(self.model.predictor(text))
            return predict(said, level), predict.rows
        alone = 0 if drop or self.source_is_guided else 1  # the source's row has a prompt and nothing else
        unsaid = said[alone:]
        both = {
            name: torch.cat([value, empty[name].expand(len(unsaid), *value.shape[1:])])
            for name, value in text.items()
        }
        predict = Counted(self.model.predictor(both))
        answer = predict(torch.cat([said, unsaid]), level)
        with_, without = (Estimate(*(half[rows] for half in answer))
                          for rows in (slice(len(said)), slice(len(said), None)))  # fmt: skip
        led = guide(Estimate(*(half[alone:] for half in with_)), without, self.guidance)
        guided = Estimate(*(torch.cat([own[:alone], half]) for own, half in zip(with_, led, strict=True)))
        return guided, predict.rows

    def _step(self, number: int, now: Tensor, estimate: Estimate) -> Tensor:
        """The next states [1 + N, ...]: the source's from the trajectory, or walked as the targets are."""
        some = slice(None) if not self.inversion.overwrites else slice(1, None)
        halves = Estimate(*(half[-len(now[some]) :] for half in estimate))
        there = self.inversion.step_of_targets(number, now[some], halves)
        if self.inversion.overwrites:
            there = torch.cat([self.inversion.states[number + 1][None].to(there), there])
        return there

    @property
    def source_is_guided(self) -> bool:
        """Whether the source's row is walked with guidance that changes it (guided by its own prompt it is not)."""
        return not self.inversion.overwrites and self.inversion.method != "negative-prompt"

    def _guidance(self) -> float:
        made_for, asked = self.inversion.guidance, self.settings.guidance
        if made_for is not None and asked is not None and asked != made_for:
            raise UserError(
                f"This null-text inversion was made for guidance {made_for:g}, not {asked:g}. "
                f"Leave --guidance out, or invert again with it."
            )
        usual = float(self.model.defaults["guidance"]) if made_for is None else made_for
        return usual if asked is None else asked

    def _crosses(self) -> list[Cross | None]:
        """The cross-attention's edit of every step; equal steps share one."""
        device = self.model.device
        mapping = torch.stack([alignment.mapping for alignment in self.alignments]).to(device)
        taken = torch.stack([alignment.taken for alignment in self.alignments]).to(device)
        others = [alignment.target for alignment in self.alignments]
        weight = torch.stack([weights(other, self.settings.weights) for other in others]).to(device)
        usual = (0.0, self.settings.cross)
        open_ = torch.stack([window(other, self.steps, usual, self.settings.windows) for other in others], 1)
        found: list[Cross | None] = []
        for number in range(self.steps):
            same = number > 0 and torch.equal(open_[number], open_[number - 1])
            found.append(found[-1] if same else cross(mapping, taken, weight, open_[number].to(device)))
        return found

    def _obeying(self) -> list[tuple[bool, ...]]:
        """Which targets have the source's self-attention at every step."""
        settings, open_ = self.settings, []
        for alignment in self.alignments:
            share = settings.self_attention
            if settings.colour_self_attention is not None and only_colours(alignment):
                share = settings.colour_self_attention
            lasts = (share, 1.0) if settings.attention == "contents" else (0.0, share)
            open_.append(inside(self.steps, lasts).tolist())
        return [tuple(map(bool, some)) for some in zip(*open_, strict=True)]

    # Where the targets may differ

    def _own_mask(self) -> Tensor | None:
        """The user's mask at the latent's size [H, W], 0 or 1; None without one."""
        if self.settings.mask is None:
            return None
        height, width = self.inversion.picture.shape[-2:]
        original = self.inversion.facts.get("size")
        mask = mask_of(self.settings.mask, shown=(width, height), original=original)
        return latent_mask(mask, self.inversion.states.shape[-2:]).to(self.model.device)

    def _words(self) -> Tensor | None:
        """Columns of the maps to be read [1 + N, 2·N + K, T]: to blend and to keep for each target, K heat maps."""
        settings = self.settings
        length = self.alignments[0].source.length
        found = torch.zeros(1 + self.count, 2 * self.count + len(settings.heatmaps), length)
        for n, alignment in enumerate(self.alignments):
            blended = blended_words(alignment, settings.blend)
            for channel, (source, target) in (
                (2 * n, blended),
                (2 * n + 1, _places(alignment, settings.keep)),
            ):
                found[0, channel], found[1 + n, channel] = columns(source, length), columns(target, length)
        for k, phrase in enumerate(settings.heatmaps):
            prompts = [self.alignments[0].source, *(alignment.target for alignment in self.alignments)]
            for row, prompt in enumerate(prompts):
                found[row, 2 * self.count + k] = columns(prompt.find(phrase), length)
        return found if found.any() else None

    @property
    def named(self) -> Tensor:
        """Whether words to blend and to keep were named [2·N], in the order of `_words`."""
        nothing = torch.zeros(2 * self.count, dtype=torch.bool)
        return nothing if self.words is None else self.words.any(-1).any(0)[: 2 * self.count]

    def _everywhere(self) -> Tensor | None:
        return None if self.own_mask is None else self.own_mask.expand(self.count, -1, -1)

    def _masks(self, maps: Maps | None) -> Tensor | None:
        """Where each target may differ [N, H, W]: where the prompts differ or words to blend stand, in either picture,
        not where those to keep do, and inside the user's mask. None if everywhere."""
        said = self.named.tolist()
        if not any(said) and not self.pairs:
            return self._everywhere()
        size = (self.inversion.states.shape[-2], self.inversion.states.shape[-1])
        read = None if maps is None else maps.read()
        masks = []
        for n in range(self.count):
            mask = torch.zeros(size, device=self.model.device, dtype=torch.bool)
            if n in self.pairs:
                mask = mask | (self.apart[n] > self.settings.threshold)
            if said[2 * n]:
                assert read is not None
                grown = F.max_pool2d(read[[0, 1 + n], 2 * n : 2 * n + 1], 3, stride=1, padding=1)
                mask = mask | places_of(grown, size, self.settings.threshold).any(0)
            if n not in self.pairs and not said[2 * n]:
                mask = ~mask
            if said[2 * n + 1]:
                assert read is not None
                kept = places_of(read[[0, 1 + n], 2 * n + 1 : 2 * n + 2], size, self.settings.threshold)
                mask = mask & ~kept.any(0)
            masks.append(mask.float() if self.own_mask is None else mask * self.own_mask)
        return torch.stack(masks)

    def _pairs(self) -> dict[int, tuple[str, str]]:
        """The prompts whose difference says where a target may differ, by the number of the target."""
        found = {}
        for n, alignment in enumerate(self.alignments):
            if AUTO in self.settings.blend and not _says(alignment, AUTO):
                pair = told_apart(alignment, self.settings.weights)
                if pair is not None:
                    found[n] = pair
        return found

    def _heatmaps(self, maps: Maps | None) -> dict[str, Tensor]:
        if maps is None:
            return {}
        read = maps.read()[:, 2 * self.count :]
        return {phrase: read[:, k].cpu() for k, phrase in enumerate(self.settings.heatmaps)}
