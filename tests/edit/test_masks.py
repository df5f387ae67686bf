"""Masks as people paint them: what of the latent they let change, and which let nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from backbone.io.console import UserError
from backbone.models.model import Backbone
from edit.masks import fit_mask, load_latent_mask
from edit.pictures import EncodedImage, ImageLike, SourceImage, encode_image, read_mask, show_image
from edit.run.run import perform
from tests.edit.models import photo

SIZE = (128, 128)
BOX = (10, 35, 61, 97)  # 0.2 of the image


@pytest.fixture
def tiny(kept: Backbone) -> Backbone:
    """Nothing here changes it."""
    return kept


def places(mask: ImageLike, size: tuple[int, int] = SIZE, latent: int = 16) -> Tensor:
    """What a mask lets change of a latent [latent, latent] of an image that is shown as it is."""
    image = EncodedImage(
        torch.zeros(3, 8 * latent, 8 * latent), torch.zeros(1, 4, latent, latent), {"size": size}
    )
    found = load_latent_mask(mask, image)
    assert found is not None
    return found


def painted(mode: str, ground: int | tuple[int, ...], ink: int | tuple[int, ...]) -> Image.Image:
    image = Image.new(mode, SIZE, ground)
    ImageDraw.Draw(image).rectangle(BOX, fill=ink)
    return image


def palette() -> Image.Image:
    image = painted("P", 0, 1)
    image.putpalette([0, 0, 0, 200, 0, 0])
    return image


CONVENTIONS: dict[str, Callable[[], Image.Image]] = {
    "white on transparent black": lambda: painted("RGBA", (0, 0, 0, 0), (255,) * 4),
    "white on transparent white": lambda: painted("RGBA", (255, 255, 255, 0), (255,) * 4),
    "0 and 1": lambda: painted("L", 0, 1),
    "black and white": lambda: painted("L", 0, 255),
    "one bit": lambda: painted("1", 0, 1),
    "16 bit, 0 and 255": lambda: Image.fromarray(np.asarray(painted("L", 0, 255)).astype(np.uint16)),
    "16 bit, 0 and 65535": lambda: Image.fromarray(np.asarray(painted("L", 0, 255)).astype(np.uint16) * 257),
    "a palette": palette,
}


@pytest.mark.parametrize("name", CONVENTIONS)
def test_a_mask_is_read_in_the_convention_that_it_was_written_in(tmp_path: Path, name: str) -> None:
    drawn = CONVENTIONS[name]()
    drawn.save(tmp_path / "mask.png")
    usual = places(painted("L", 0, 255))
    assert float(usual.mean()) == pytest.approx(0.2, abs=0.03)
    assert torch.equal(places(tmp_path / "mask.png"), usual)
    assert torch.equal(places(drawn), usual)


@pytest.mark.parametrize(("size", "width"), [(SIZE, 2), (SIZE, 1), ((2400, 2400), 2)])
def test_a_thin_line_lets_change_what_it_crosses(size: tuple[int, int], width: int) -> None:
    line = Image.new("L", size, 0)
    y = size[1] * 5 // 16 + 1
    ImageDraw.Draw(line).rectangle((0, y, size[0], y + width - 1), fill=255)
    found = places(line, size)
    assert bool(found[5].all()) and float(found.sum()) == 16


def test_the_edge_of_what_is_filled_is_where_half_a_place_is_white() -> None:
    half = Image.new("L", SIZE, 0)
    half.paste(255, (0, 0, 8 * 5 + 3, 128))  # three eighths of the sixth column
    assert float(places(half).sum()) == 5 * 16
    half.paste(255, (0, 0, 8 * 5 + 5, 128))
    assert float(places(half).sum()) == 6 * 16


def test_of_a_mask_of_several_frames_it_is_said_that_the_first_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = [Image.new("L", (8, 8), grey) for grey in (255, 0)]
    frames[0].save(tmp_path / "mask.gif", save_all=True, append_images=frames[1:])
    read_mask(tmp_path / "mask.gif")
    assert "mask.gif has 2 frames or pages, of which the first counts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mask", "found"),
    [
        (Image.new("L", SIZE, 0), "black everywhere"),
        (Image.new("RGBA", SIZE, (255, 255, 255, 0)), "black everywhere"),
        (painted("L", 0, 120), "brightest place is 120 of 255"),
    ],
)
def test_a_mask_that_lets_nothing_change_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mask: Image.Image, found: str
) -> None:
    monkeypatch.chdir(tmp_path)
    mask.save("mask.png")
    with pytest.raises(UserError, match=rf"mask.png lets nothing change: .*{found}"):
        places("mask.png")
    photo(*SIZE).save("photo.png")
    options = {"image": "photo.png", "prompt": "a cat", "mask": "mask.png", "model": "no such model"}
    with pytest.raises(UserError, match="lets nothing change"):
        perform("sdedit", options, out=Path("out"))
    assert not Path("out").exists()


@pytest.mark.parametrize("size", [(1200, 900), (900, 1600), (64, 6000), (97, 65)])
def test_a_photograph_of_any_size_is_encoded_and_its_mask_fits(tiny: Backbone, size: tuple[int, int]) -> None:
    encoded = encode_image(tiny, Image.new("RGB", size, "red"))
    assert encoded.pixels.shape[1] * encoded.pixels.shape[2] == pytest.approx(64 * 64, rel=0.3)
    white = load_latent_mask(Image.new("L", size, 255), encoded)
    assert white is not None and bool(white.all()) and white.shape == encoded.latent.shape[-2:]


def test_a_mask_of_another_size_and_the_image_s_shape_is_scaled_and_of_another_shape_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    drawn = painted("L", 0, 255)
    (width, height), expected = SIZE, places(drawn)
    assert "is scaled" not in capsys.readouterr().err
    for factor in (3, 2):
        size = (factor * width, factor * height)
        assert torch.equal(places(drawn.resize(size, Image.Resampling.NEAREST)), expected)
        said = f"{size[0]} × {size[1]} pixels is scaled to the image's {width} × {height}"
        assert said in " ".join(capsys.readouterr().err.split())
    with pytest.raises(UserError, match="Draw it on the image"):
        places(drawn.resize((width, height * 2)))


@pytest.mark.parametrize("box", [(0, 0, 40, 64), (700, 30, 700, 30)])
def test_a_mask_of_which_the_model_is_shown_nothing_is_refused(box: tuple[int, int, int, int]) -> None:
    size = (1500, 500) if box[2] < 64 else (4000, 4000)
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).rectangle(box, fill=255)
    with pytest.raises(UserError, match=r"cropped off, or vanishes, .* as 128 × 128 pixels"):
        places(mask, size)


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ((1200, 900), ""),
        ((512, 257), ""),
        ((1500, 500), "39% of it is cropped off"),
        ((8, 3000), "99% of it"),
        ((64, 64), ""),
        ((32, 32), "is enlarged 4 times, to the size at which the model works"),
    ],
)
def test_what_is_cropped_off_or_made_up_of_an_image_is_said(
    size: tuple[int, int], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model: Any = SimpleNamespace(resolution=128, factor=8)
    show_image(model, SourceImage(Image.new("RGB", size), f"{size}", ""))
    heard = " ".join(capsys.readouterr().err.split())
    assert said in heard if said else not heard


@pytest.mark.parametrize("size", [(160, 160), (120, 160), (20, 15)])
def test_a_mask_of_another_shape_or_far_too_coarse_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=f"The mask is {size[0]} × {size[1]} pixels"):
        fit_mask(Image.new("L", size, 255), (64, 64), (160, 120))
