"""A clip that follows its edited first frame: by attention, by a motion adapter, by a SparseCtrl."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from backbone.io.console import UserError
from backbone.io.files import read_json
from backbone.media.clips import Film, encode_webp, read_film
from backbone.models.clips.motion import attach_motion
from backbone.models.clips.sparse import build_sparsectrl
from backbone.models.model import Backbone
from edit.cli import app
from edit.methods.clip import ClipEdit, invert_film
from edit.methods.first_frame import (
    FirstFrame,
    find_changed,
    noise_first_frame,
    propagate_change,
    propagate_first_frame,
    read_first_frame,
)
from edit.pictures import read_image
from tests.tiny import tiny_motion_adapter

SOURCE = "a dog in the snow"


@pytest.fixture(scope="module")
def film() -> Film:
    """Three frames in which a square walks over noise."""
    noise = torch.randint(0, 255, (64, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    frames = []
    for number in range(3):
        pixels = noise.clone()
        pixels[20:40, 10 * number : 10 * number + 20] = torch.tensor([200, 40, 40], dtype=torch.uint8)
        frames.append(Image.fromarray(pixels.numpy()))
    return Film(tuple(frames), 8.0, "walk.webp", "0")


@pytest.fixture(scope="module")
def edited(film: Film) -> Image.Image:
    """The first frame with its square in blue."""
    picture = film.frames[0].copy()
    picture.paste((30, 40, 220), (0, 20, 20, 40))
    return picture


@pytest.mark.parametrize(
    ("linked", "method"),
    [
        ("by an adapter", "direct"),
        ("by attention", "edit-friendly"),
        pytest.param("by attention", "direct", marks=pytest.mark.slow),
        pytest.param("by an adapter", "reversible", marks=pytest.mark.slow),
    ],
)
def test_frames_follow_an_edited_first_frame_and_nothing_follows_from_an_unchanged_one(
    linked: str, method: Any, tiny: Backbone, film: Film, edited: Image.Image
) -> None:
    if linked == "by an adapter":
        attach_motion(tiny.denoiser, tiny_motion_adapter())
    inversion = invert_film(tiny, film, SOURCE, method=method, steps=4)
    first = read_first_frame(inversion, read_image(edited))
    held = noise_first_frame(inversion, first)
    torch.testing.assert_close(held[-1].float(), first.latent, atol=1e-5, rtol=0)
    result = propagate_first_frame(inversion, first, SOURCE, ClipEdit(threshold=0))
    assert torch.equal(result.pixels[0, 0], first.pixels)
    change = (result.latents[0] - inversion.clean).abs().amax((0, 2, 3))
    assert change.min() > 1e-4
    same = FirstFrame(inversion.image[0], inversion.states[-1][:, 0].float())
    kept = propagate_first_frame(inversion, same, SOURCE, ClipEdit())
    torch.testing.assert_close(kept.latents[0], inversion.clean, atol=1e-3, rtol=0)


def test_a_change_is_carried_to_where_the_thing_has_gone() -> None:
    clip = torch.randn(4, 1, 12, 12, generator=torch.Generator().manual_seed(0)).repeat(1, 3, 1, 1)
    thing = 3 * torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(1))
    for frame in range(3):
        clip[:, frame, 4:8, 1 + 3 * frame : 5 + 3 * frame] = thing
    change = torch.zeros(4, 12, 12)
    change[:, 4:8, 1:5] = 1
    carried = propagate_change(clip, change)
    assert torch.equal(carried[:, 0], change)
    inside = carried[:, 2, 5:7, 8:10]  # the thing's middle, which nothing behind it resembles
    # what the thing uncovers was nowhere in the first frame: a place or two there find anything
    assert inside.min() > 0.9 and carried[:, 2, :, :5].abs().mean() < 0.15
    place = find_changed(carried, 0.25)[0]
    assert place[0].all() and place[2, 5:7, 8:10].all() and not place[2].all()


def call(*words: str | Path) -> Any:
    return CliRunner().invoke(app, ["clip", *map(str, words)])


@pytest.fixture(scope="module")
def places(
    tiny_folder: Path, film: Film, edited: Image.Image, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The clip, its edited first frame, others that will not do, a motion adapter and a SparseCtrl."""
    folder = tmp_path_factory.mktemp("first")
    (folder / "walk.webp").write_bytes(encode_webp(film.frames, film.fps))
    edited.save(folder / "edited.png")
    film.frames[0].save(folder / "same.png")
    edited.crop((0, 0, 64, 32)).save(folder / "wide.png")
    tiny_motion_adapter().save_pretrained(folder / "motion")
    model = Backbone.open(str(tiny_folder), device="cpu", precision="fp32")
    for name, longest in (("sparse", 8), ("short", 2)):
        network: Any = build_sparsectrl(model.denoiser, motion_max_seq_length=longest)
        for key, value in network.named_parameters():
            if key.startswith("controlnet_"):
                torch.nn.init.normal_(value, std=0.1, generator=torch.Generator().manual_seed(0))
        network.save_pretrained(folder / name)
    return folder


def test_the_command_carries_a_first_frame_with_a_sparsectrl_and_without(
    tiny_folder: Path, places: Path, tmp_path: Path
) -> None:
    usual = ("--model", tiny_folder, "--device", "cpu", "--precision", "fp32", "--steps", "2")
    asked = (places / "walk.webp", "--source", SOURCE, "--first", places / "edited.png", *usual)
    frames = {}
    for name, more in {
        "linked": (),
        "sparse": ("--motion", places / "motion", "--sparsectrl", places / "sparse", "--target", "a cat"),
    }.items():
        answer = call(*asked, *more, "--out", tmp_path / name)
        assert answer.exit_code == 0, answer.exception
        frames[name] = [one.tobytes() for one in read_film(tmp_path / name / "edit_0.webp").frames]
    assert frames["linked"] != frames["sparse"]
    with Image.open(places / "edited.png") as edited:
        assert {each[0] for each in frames.values()} == {edited.tobytes()}
    record = read_json(tmp_path / "sparse" / "run.json")
    assert "--first" in record["command"] and record["edits"][0]["prompt"] == "a cat"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--first", "{edited}"), "--first has no effect without --source"),
        (("--source", SOURCE, "--first", "{same}"), "is the clip's first frame as it is"),
        (("--source", SOURCE, "--first", "{wide}"), "64 × 32 pixels and the clip's frames 64 × 64"),
        (("--source", SOURCE, "--first", "{none}"), "none.png"),
        (("--source", SOURCE, "--first", "{edited}", "--sparsectrl", "x"), "without --motion"),
        (("--source", SOURCE, "--first", "{edited}", "--target", "a cat", "--target", "a"), "shows one edit"),
        (("--source", SOURCE), "target prompt"),
        (
            ("--source", SOURCE, "--first", "{edited}", "--motion", "{motion}", "--sparsectrl", "{short}"),
            "positions for 2 frames, and the clip has 3",
        ),
    ],
)
def test_a_first_frame_that_cannot_be_followed_is_said_and_nothing_is_written(
    words: tuple[str, ...], said: str, tiny_folder: Path, places: Path, tmp_path: Path
) -> None:
    names = {name: places / f"{name}.png" for name in ("edited", "same", "wide", "none")}
    names |= {name: places / name for name in ("motion", "short")}
    given = [word.format(**names) for word in words]
    usual = ("--model", tiny_folder, "--device", "cpu", "--precision", "fp32", "--steps", "2")
    answer = call(places / "walk.webp", *given, *usual, "--out", tmp_path / "out")
    message = str(answer.exception) if isinstance(answer.exception, UserError) else answer.output
    assert answer.exit_code != 0 and said in message and not (tmp_path / "out").exists()


def test_a_first_frame_may_have_the_clip_s_own_shape() -> None:
    inversion: Any = SimpleNamespace(
        image=torch.zeros(3, 3, 48, 80),
        facts={"size": [96, 64]},
        model=SimpleNamespace(encode=lambda pixels: SimpleNamespace(mean=pixels)),
    )
    for size in ((96, 64), (192, 128), (80, 48)):
        found = read_first_frame(inversion, read_image(Image.new("RGB", size, "red")))
        assert found.pixels.shape == (3, 48, 80)
    with pytest.raises(UserError, match="another shape"):
        read_first_frame(inversion, read_image(Image.new("RGB", (64, 64), "red")))
