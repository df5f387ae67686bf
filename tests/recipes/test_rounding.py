"""A folder whose weights are put on the grid says what it said, in less room."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
import torch

from backbone.io.console import UserError
from backbone.io.files import read_tensors
from backbone.models.locate import EMBEDDED
from backbone.models.model import Backbone
from recipes.moji.rounding import FILES, main
from recipes.moji.training.run import FEW, FINE_GRID, GRID
from tests.tiny import tiny_pipeline


def test_every_matrix_lies_on_its_grid_and_all_else_is_as_it_was(tmp_path: Path) -> None:
    exact, out = tmp_path / "exact", tmp_path / "rounded"
    tiny_pipeline(exact)
    main(exact, out)
    for name in FILES:
        (tensors, said), (before, said_before) = read_tensors(out / name), read_tensors(exact / name)
        assert said == said_before and tensors.keys() == before.keys()
        for key, value in tensors.items():
            if value.ndim == 1:
                assert torch.equal(value, before[key])
                continue
            rows, grid = value.float().flatten(1), FINE_GRID if value.numel() < FEW else GRID
            step = torch.exp2((rows.square().mean(1, keepdim=True).sqrt() / grid).log2().round() - 1)
            assert torch.equal(
                rows, (rows / step).round() * step
            )  # a step finer, should the deviation have moved
            assert value.dtype == before[key].dtype and not torch.equal(value, before[key])
    for path in (path for path in exact.rglob("*") if path.is_file()):
        relative = path.relative_to(exact)
        assert relative.as_posix() in FILES or (out / relative).read_bytes() == path.read_bytes()


def test_the_carried_weights_are_rounded_and_say_the_same_once_more(tmp_path: Path) -> None:
    """What is on the grid stays there but for rows whose deviation lies between two grids."""
    main(EMBEDDED, tmp_path / "again")
    for name in FILES:
        kept, packed = 0, 0
        tensors, again = read_tensors(EMBEDDED / name)[0], read_tensors(tmp_path / "again" / name)[0]
        for key, value in tensors.items():
            kept += int((again[key] == value).sum())
            packed += len(zlib.compress(value.numpy().tobytes(), 1))
        size = sum(value.numel() for value in tensors.values())
        assert kept > 0.99 * size and packed < 0.65 * 2 * size


@torch.no_grad()
def test_a_rounded_denoiser_predicts_what_it_predicted(tmp_path: Path) -> None:
    tiny_pipeline(tmp_path / "exact")
    main(tmp_path / "exact", tmp_path / "rounded")
    said = []
    for name in ("exact", "rounded"):
        model = Backbone.open(str(tmp_path / name), device="cpu", precision="fp32")
        noisy = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
        predict = model.predictor(model.encode_prompts(["a dog", "a cat"]))
        said.append(predict(noisy, model.schedule(4)[1]).noise)
    off = (said[0] - said[1]).square().mean() / said[0].square().mean()
    assert 0 < off < 1e-4


def test_the_folder_that_is_rounded_is_not_written_over(tmp_path: Path) -> None:
    tiny_pipeline(tmp_path / "exact")
    with pytest.raises(UserError, match="Name another by --out"):
        main(tmp_path / "exact", tmp_path / "exact" / ".." / "exact")
