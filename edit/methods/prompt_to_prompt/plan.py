"""The plan of attention control for each step of an edit."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

import torch

from edit.attention.alignment import Alignment, steps_inside, token_weights, token_windows
from edit.attention.control import AttentionControl, Cross, SelfAttention, make_cross
from edit.methods.prompt_to_prompt.regions import changes_only_colours, changes_only_styles
from edit.methods.prompt_to_prompt.settings import ReplaceSettings


@dataclass(frozen=True, eq=False)
class ControlPlan:
    """Attention control for each of S steps and N targets.

    attention   the part of the source's self-attention that is used: layout or contents
    cross       [S], the targets' cross-attention; None where it is their own
    controlled  [S, N], which targets have the source's self-attention
    features    [S], whether the targets have the source's residual features
    reweighed   [S], which targets [N] have another cross-attention than their own; () for none
    """

    attention: SelfAttention
    cross: Sequence[Cross | None]
    controlled: Sequence[tuple[bool, ...]]
    features: Sequence[bool]
    reweighed: Sequence[Sequence[bool]]

    def apply(self, control: AttentionControl, step: int) -> None:
        """Set the processors' control for a step."""
        control.cross = self.cross[step]
        control.controlled_targets = self.controlled[step]
        control.self_attention = self.attention if any(self.controlled[step]) else "own"
        control.features = "source" if self.features[step] else "own"

    def last_steps(self) -> list[int]:
        """The last step at which each target [N] takes anything from the source; −1 where it takes nothing."""
        last = [-1] * len(self.controlled[0])
        for step, taking in enumerate(zip(self.controlled, self.features, self.reweighed, strict=True)):
            controlled, features, reweighed = taking
            for n in range(len(last)):
                if controlled[n] or features or (reweighed and reweighed[n]):
                    last[n] = step
        return last


def plan_control(
    alignments: Sequence[Alignment],
    settings: ReplaceSettings,
    steps: int,
    device: torch.device,
    *,
    whole_scene: Set[int] = frozenset(),
) -> ControlPlan:
    """The plan of S steps for the alignments of N targets; `settings` are resolved.

    `whole_scene` are the numbers of targets that are predicted differently in most of the picture.
    """
    controlled = []
    for number, alignment in enumerate(alignments):
        until = settings.self_attention
        if settings.colour_self_attention is not None and changes_only_colours(alignment, settings.weights):
            until = settings.colour_self_attention
        if settings.style_self_attention is not None and changes_only_styles(alignment):
            until = settings.style_self_attention
        if settings.place_self_attention is not None and number in whole_scene:
            until = settings.place_self_attention
        assert until is not None, "settings are resolved"
        window = (until, 1.0) if settings.attention == "contents" else (0.0, until)
        controlled.append(steps_inside(steps, window).bool().tolist())
    cross, reweighed = _plan_cross_attention(alignments, settings, steps, device)
    return ControlPlan(
        attention=settings.attention,
        cross=cross,
        reweighed=reweighed,
        controlled=list(zip(*controlled, strict=True)),
        features=steps_inside(steps, (0.0, settings.features)).bool().tolist(),
    )


def _plan_cross_attention(
    alignments: Sequence[Alignment], settings: ReplaceSettings, steps: int, device: torch.device
) -> tuple[list[Cross | None], list[list[bool]]]:
    """The targets' cross-attention [S], shared by equal steps, and which targets' attention it changes [S, N]."""
    assert settings.cross is not None, "settings are resolved"
    targets = [alignment.target for alignment in alignments]
    # M [N, T_source, T_target], a and e [N, T_target], α [S, N, T_target]
    # In CPU memory, where `make_cross` decides which terms are left out
    mapping = torch.stack([alignment.mapping for alignment in alignments])
    from_source = torch.stack([alignment.from_source for alignment in alignments])
    weight = torch.stack([token_weights(target, settings.weights) for target in targets])
    default = (0.0, settings.cross)
    window = torch.stack([token_windows(target, steps, default, settings.windows) for target in targets], 1)
    planned: list[Cross | None] = []
    changed: list[list[bool]] = []
    for step in range(steps):
        same = step > 0 and torch.equal(window[step], window[step - 1])
        if same:
            planned.append(planned[-1])
            changed.append(changed[-1])
            continue
        cross = make_cross(mapping, from_source, weight, window[step])
        planned.append(None if cross is None else cross.to(device))
        changed.append([] if cross is None else cross.changed())
    return planned, changed
