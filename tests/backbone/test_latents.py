"""An autoencoder's config that gives no scale of latents is damaged, and is refused by the key."""

from __future__ import annotations

from typing import Any

import pytest

from backbone.families.components.latents import latent_space
from backbone.io.console import UserError
from tests.tiny import tiny_autoencoder


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"scaling_factor": 0.0}, "scaling_factor is 0. Restore vae/config.json"),
        ({"scaling_factor": 0}, "scaling_factor is 0. Restore vae/config.json"),
        ({"latents_mean": [0.0] * 3, "latents_std": [1.0] * 3}, "are no 4 numbers"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0, 1.0, 0.0, 1.0]}, "are no 4 numbers"),
    ],
)
def test_a_config_without_a_scale_of_latents_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        latent_space(tiny_autoencoder(**settings))


def test_a_config_that_names_no_scale_has_that_of_one() -> None:
    autoencoder = tiny_autoencoder()
    autoencoder.register_to_config(scaling_factor=None)
    assert latent_space(autoencoder).scale == 1.0
