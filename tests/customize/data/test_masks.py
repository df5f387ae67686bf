"""Masks that the model finds: where the class's name changes its prediction, cut in two, a little larger."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from backbone.conditions.conditions import Conditions
from backbone.families.base import Network
from backbone.media.sources.pictures import list_images
from backbone.media.transforms import to_tensor
from backbone.models.model import Backbone, Posterior
from backbone.models.placement import Placement
from backbone.world.rendering.render import render
from backbone.world.scene import Scene
from backbone.world.words import Thing
from customize.data.dataset import SubjectGroup, make_training_data
from customize.data.masks import dilate, otsu, predict_mask, prediction_difference, save_masks
from customize.settings import Settings, as_command


def test_otsu_s_threshold_parts_two_heaps_whatever_their_sizes() -> None:
    values = torch.tensor([[[1.0, 1.2, 0.9, 5.0], [1.1, 0.8, 1.0, 5.5]]])
    assert otsu(values).tolist() == [[[0, 0, 0, 1], [0, 0, 0, 1]]]
    assert torch.equal(otsu(100 * values + 7), otsu(values))
    random = torch.Generator().manual_seed(0)
    heaps = torch.cat([torch.randn(900, generator=random), 8 + torch.randn(100, generator=random)])
    assert torch.equal(otsu(heaps), (heaps > 4).float())


def test_where_nothing_stands_out_everything_counts() -> None:
    assert otsu(torch.full((1, 4, 4), 3.0)).all()


def test_a_mask_grows_by_one_on_every_side() -> None:
    mask = torch.zeros(1, 5, 6)
    mask[0, 2, 2] = 1
    wanted = torch.zeros(1, 5, 6)
    wanted[0, 1:4, 1:4] = 1
    assert torch.equal(dilate(mask), wanted)


def seeing(model: Backbone, region: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A network whose prediction changes with the text in this region [H, W] alone; how many samples it is asked."""
    asked: list[int] = []

    def network(denoiser: Any, conditions: Conditions) -> Network:
        def predict(noisy: Tensor, time: Tensor) -> Tensor:
            asked.append(len(noisy))
            # behind a norm the plain mean is zero but for rounding
            strength = conditions.text["hidden"].abs().mean((1, 2))
            return noisy + region * strength[:, None, None, None]

        return predict

    monkeypatch.setattr(model.family, "network", network)
    return asked


def test_the_mask_is_where_the_class_changes_the_prediction(
    tiny: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    channels, height, width = tiny.latent_shape
    region = torch.zeros(height, width)
    region[1:3, 2:5] = 1
    asked = seeing(tiny, region, monkeypatch)
    picture = Posterior(torch.randn(1, channels, height, width), torch.zeros(1, channels, height, width))
    text, empty = (Conditions({"hidden": value}) for value in (torch.ones(1, 3, 4), torch.zeros(1, 3, 4)))
    found = prediction_difference(tiny, picture, text, empty)
    assert float(found.mean()) == pytest.approx(1)
    assert torch.equal(otsu(found)[0], region)
    assert torch.equal(predict_mask(tiny, picture, text, empty), dilate(region[None]))
    asked.clear()
    # Remembered
    assert torch.equal(predict_mask(tiny, picture, text, empty), dilate(region[None])) and not asked
    other = Posterior(picture.mean + 1, picture.std)
    predict_mask(tiny, other, text, empty)
    assert asked == [2] * 6
    monkeypatch.setattr(tiny, "placement", Placement(quantize="8bit"))
    predict_mask(tiny, other, text, empty)
    assert asked == [2] * 12


def test_pictures_with_a_mask_file_keep_it(
    tiny: Backbone, subject: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = list_images(str(subject))
    half = Image.new("L", pictures[0].open().size)
    half.paste(255, (0, 0, half.width // 2, half.height))
    half.save(subject / f"{Path(str(pictures[0].path)).stem}.mask.png")
    pictures = list_images(str(subject))
    region = torch.zeros(tiny.latent_shape[1:])
    region[:2, :2] = 1
    seeing(tiny, region, monkeypatch)
    settings = Settings(images="", token="[V]", class_noun="dog", prior="off", mask="auto", flip=True)
    groups = [SubjectGroup(pictures, ["a rkh dog"] * len(pictures), "a dog")]
    found = make_training_data(tiny, groups, settings).masks
    assert found is not None and len(found) == 2 * len(pictures)
    assert torch.equal(found[0] > 0, found[len(pictures)].flip(-1) > 0)  # the file's, mirrored
    assert all(torch.equal(mask > 0, dilate(region[None]) > 0) for mask in (found[1], found[-1]))
    assert all(float(mask.mean()) == pytest.approx(1) for mask in found)
    assert make_training_data(tiny, groups, replace(settings, mask="files")).masks is not None
    save_masks(tmp_path / "masks.png", [pictures], found, most=9)
    assert Image.open(tmp_path / "masks.png").width > 3 * 32
    assert "--mask auto" in as_command(settings, tmp_path)


@pytest.mark.font
def test_moji_sees_nearly_all_of_a_thing_and_little_else() -> None:
    model = Backbone.open("moji", device="cpu", precision="fp32")
    text, empty = model.encode_prompts(["a dog"]), model.encode_prompts([""])
    for place in ("on the beach", "in the city", "on a white background"):
        shown = render(Scene((Thing("dog"),), place, seed=1_000_205))
        truth = torch.from_numpy(np.asarray(shown.masks[0], dtype=np.float32) / 255)[None]
        inside = F.adaptive_avg_pool2d(truth, model.latent_shape[-1]) > 0.3
        found = predict_mask(model, model.encode(to_tensor(shown.image)[None]), text, empty) > 0
        assert float((found & inside).sum() / inside.sum()) > 0.95
        assert float((found & ~inside).float().mean()) < 0.3
