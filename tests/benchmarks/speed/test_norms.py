"""Both ways of the table are what they are called, and the network is left as it was."""

from __future__ import annotations

from torch import nn

from backbone.families.unet.norms import PlanarGroupNorm, use_planar_norms
from benchmarks.speed.norms import format_row, make_acts, use_group_norms


def test_group_norms_are_torch_s_inside_and_planar_again_behind() -> None:
    network = use_planar_norms(nn.Sequential(nn.GroupNorm(32, 64)))
    kinds: list[type] = []
    (norm,) = network.children()
    for act in make_acts(network, lambda: kinds.append(type(norm))).values():
        act()
    with use_group_norms(network):
        kinds.append(type(norm))
    assert [*kinds, type(norm)] == [nn.GroupNorm, PlanarGroupNorm, nn.GroupNorm, PlanarGroupNorm]


def test_a_row_has_the_medians_and_the_median_ratio() -> None:
    seconds = {"group_norm": [2.0, 4.0, 6.0], "planar": [1.0, 4.0, 1.0]}
    assert format_row("a norm", seconds) == "| a norm | 4000.00 | 1000.00 | 2.00× |"
