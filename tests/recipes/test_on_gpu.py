"""Training all parts of `moji` in one go: it runs, goes on, and what it leaves is small and loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from backbone.io.console import UserError
from backbone.io.files import read_json, read_tensors, write_json, write_tensors
from backbone.models.locate import EMBEDDED
from backbone.models.model import Backbone
from recipes.moji.on_gpu import LARGEST, GpuSettings, main, split_weights


def test_weights_in_pieces_are_the_weights(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {f"layer.{number}": torch.randn(300, 100) for number in range(9)}
    write_tensors(path, tensors, {"format": "pt"})
    pieces = split_weights(path, 400_000)
    assert len(pieces) > 2 and not path.exists()
    assert all(piece.stat().st_size <= 400_000 for piece in pieces)
    index = read_json(tmp_path / "model.safetensors.index.json")["weight_map"]
    for name, value in tensors.items():
        assert torch.equal(read_tensors(tmp_path / index[name])[0][name], value)
    assert split_weights(pieces[0], 400_000) == [pieces[0]]


def test_an_autoencoder_of_another_kind_is_refused(tmp_path: Path) -> None:
    other = read_json(EMBEDDED / "vae" / "config.json") | {"block_out_channels": [32, 64, 64, 64]}
    (tmp_path / "vae").mkdir()
    write_json(tmp_path / "vae" / "config.json", other)
    with pytest.raises(UserError, match=r"no autoencoder of this recipe .block_out_channels differs"):
        main(GpuSettings(out=tmp_path / "out", workdir=tmp_path / "work", device="cpu", vae=tmp_path / "vae"))


@pytest.mark.slow
def test_every_part_is_trained_written_in_pieces_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        main(GpuSettings(out=tmp_path / "out", workdir=tmp_path / "work", device="cpu", tiny=True))
    said = (tmp_path / "out" / "log.txt").read_text()
    assert '"step": "denoiser", "of": 2, "began_at": 0' in said
    # From where the learning rate had not fallen yet
    assert '"step": "denoiser", "of": 3, "began_at": 1' in said
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in files) <= LARGEST
    for name in ("moji", "moji-flow"):
        model = Backbone.open(str(tmp_path / "out" / name), device="cpu", precision="fp32")
        assert sum(value.numel() for value in model.denoiser.parameters()) > 10**6
        assert model.decode(torch.zeros(1, *model.latent_shape)).isfinite().all()
