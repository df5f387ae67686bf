"""`Backbone`: opening, encoding, predicting, freeing, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file

from backbone.io.console import UserError, printed_once
from backbone.io.files import read_json, write_json
from backbone.models.fingerprint import Fingerprints, earlier_fingerprint
from backbone.models.model import Backbone
from backbone.models.sample import Request, sample_latents
from tests.parity import by_both


@pytest.fixture
def tiny(kept: Backbone) -> Backbone:
    """Nothing here changes it."""
    return kept


def test_sampling_matches_diffusers_own_pipeline(tiny_folder: Path, tiny: Backbone) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder, local_files_only=True)
    theirs, ours = by_both(pipeline, tiny, "a dog in the snow", steps=5, seed=3)
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    assert torch.allclose(ours, theirs, atol=2e-4)


def test_velocity_models_sample_as_diffusers_does(tmp_path: Path) -> None:
    from tests.tiny import tiny_pipeline

    folder = tiny_pipeline(tmp_path / "v", prediction_type="v_prediction")
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    model = Backbone.open(str(folder), device="cpu", precision="fp32")
    assert model.path.prediction_type == "v_prediction"
    theirs, ours = by_both(pipeline, model, "a cat", guidance=2.0)
    assert torch.allclose(ours, theirs, atol=2e-4)


def test_a_picture_does_not_depend_on_the_batch_it_was_drawn_in(tiny: Backbone) -> None:
    requests = [Request("a dog", (i, j)) for i in range(2) for j in range(2)]
    together = torch.cat(
        list(sample_latents(tiny, requests, steps=3, guidance=2.0, seed=1, sampler="ancestral"))
    )
    alone = next(sample_latents(tiny, requests[3:], steps=3, guidance=2.0, seed=1, sampler="ancestral"))
    assert torch.allclose(together[3:], alone, atol=1e-5)


def test_pictures_come_back_through_the_autoencoder_with_their_shape(tiny: Backbone) -> None:
    pictures = torch.rand(2, 3, tiny.resolution, tiny.resolution) * 2 - 1
    posterior = tiny.encode(pictures)
    assert posterior.mean.shape == (2, *tiny.latent_shape)
    assert tiny.decode(posterior.mean).shape == pictures.shape


def test_large_pictures_are_decoded_one_after_the_other(
    tiny: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = torch.randn(5, *tiny.latent_shape, generator=torch.Generator().manual_seed(0))
    together, sizes = tiny.decode(latents), []
    decode = tiny.decode_with_gradients

    def counted(some: torch.Tensor) -> torch.Tensor:
        sizes.append(len(some))
        return decode(some)

    monkeypatch.setattr(tiny, "decode_with_gradients", counted)
    monkeypatch.setattr("backbone.models.model.DECODED_AT_ONCE", 2 * tiny.resolution**2)
    assert torch.allclose(tiny.decode(latents), together, atol=1e-5)
    assert sizes == [2, 2, 1]


def test_freed_parts_load_again_with_the_same_weights(tiny: Backbone) -> None:
    before = tiny.encode_prompts(["a dog"]).text["hidden"]
    tiny.free("text_encoder", "autoencoder")
    assert "text_encoder" not in tiny.__dict__
    assert torch.equal(tiny.encode_prompts(["a dog"]).text["hidden"], before)


def test_a_long_prompt_is_cut_and_said_so(tiny: Backbone, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.encode_prompts(["a dog " * 60])
    assert "it will not see" in capsys.readouterr().err
    tiny.encode_prompts(["a cat " * 6000])
    assert len(capsys.readouterr().err) < 1000


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("nowhere/at/all", "There is no model"),
        ("no-such-thing", r"There is no model no-such-thing\. Name one of"),
        ("SDXL", "Did you mean sdxl"),
        ("sd1.5", "Did you mean sd15"),
        ("sd3.5", "Did you mean sd3"),
        ("flux.1-dev", r"Did you mean flux\?"),
        ("flux2_klein_9b", r"Did you mean flux2-klein-9b\?"),
        ("Z-Image-Turbo", "Did you mean z-image-turbo"),
        ("stable-diffusion-1.5", "Did you mean sd15"),
    ],
)
def test_a_model_that_is_nowhere_is_a_clear_mistake(model: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Backbone.open(model)


def test_a_folder_that_is_no_model_is_a_clear_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model_index\.json"):
        Backbone.open(str(tmp_path))


def test_a_family_that_is_not_served_is_named(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    with pytest.raises(UserError, match="KandinskyPipeline"):
        Backbone.open(str(tmp_path))


def test_a_model_without_its_denoiser_is_a_clear_mistake(tmp_path: Path, tiny_folder: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "unet")
    with pytest.raises(UserError, match="unet"):
        _ = Backbone.open(str(tmp_path / "broken"), device="cpu", precision="fp32").denoiser


def test_what_lies_beside_the_parts_is_not_the_model(tmp_path: Path, tiny_folder: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(tiny_folder, copied)
    write_json(copied / "limner.json", {"steps": 3})
    write_json(copied / "scorer" / "config.json", {})
    assert Backbone.open(str(copied)).fingerprint == Backbone.open(str(tiny_folder)).fingerprint
    settings = copied / "scheduler" / "scheduler_config.json"
    write_json(settings, {**read_json(settings), "beta_end": 0.5})
    assert Backbone.open(str(copied)).fingerprint != Backbone.open(str(tiny_folder)).fingerprint


def test_the_fingerprint_is_of_linked_parts_too(tmp_path: Path, tiny_folder: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for part in tiny_folder.iterdir():
        (linked / part.name).symlink_to(part.resolve())
    (linked / "unet").unlink()
    shutil.copytree(tiny_folder / "unet", tmp_path / "unet")
    (linked / "unet").symlink_to(tmp_path / "unet")
    (tmp_path / "unet" / "again").symlink_to(linked)  # leads to where it lies
    assert Backbone.open(str(linked)).fingerprint == Backbone.open(str(tiny_folder)).fingerprint
    settings = tmp_path / "unet" / "config.json"
    write_json(settings, {**read_json(settings), "changed": 1})
    assert Backbone.open(str(linked)).fingerprint != Backbone.open(str(tiny_folder)).fingerprint


def test_the_fingerprint_tells_weights_apart(tmp_path: Path, tiny_folder: Path) -> None:
    from tests.tiny import tiny_pipeline

    other = tiny_pipeline(tmp_path / "other", seed=1)
    assert Backbone.open(str(tiny_folder)).fingerprint == Backbone.open(str(tiny_folder)).fingerprint
    assert Backbone.open(str(other)).fingerprint != Backbone.open(str(tiny_folder)).fingerprint


def test_a_change_inside_a_large_file_is_another_model(tmp_path: Path, tiny_folder: Path) -> None:
    """As of a merge that changes attention alone: the size and both ends of the file are as they were."""
    models = []
    for folder, factor in (("one", 1.0), ("other", 1.5)):
        shutil.copytree(tiny_folder, tmp_path / folder)
        weights = {f"layers.{k}.weight": torch.full((400, 400), float(k)) for k in range(5)}
        weights["layers.2.weight"] *= factor
        save_file(weights, tmp_path / folder / "unet" / "diffusion_pytorch_model.safetensors")
        models.append(Backbone.open(str(tmp_path / folder)))
    before, after = models
    assert earlier_fingerprint(before.location) == earlier_fingerprint(after.location)  # what it was
    assert before.fingerprint != after.fingerprint


def test_the_fingerprint_is_the_same_however_weights_are_cut_into_files(
    tmp_path: Path, tiny_folder: Path
) -> None:
    cut = shutil.copytree(tiny_folder, tmp_path / "cut")
    path = cut / "unet" / "diffusion_pytorch_model.safetensors"
    network = UNet2DConditionModel.from_pretrained(cut / "unet")
    path.unlink()
    network.save_pretrained(cut / "unet", max_shard_size="40KB")
    (cut / "unet" / "config.json").write_bytes((tiny_folder / "unet" / "config.json").read_bytes())
    assert len(list((cut / "unet").glob("*.safetensors"))) > 2
    assert Backbone.open(str(cut)).fingerprint == Backbone.open(str(tiny_folder)).fingerprint


def test_a_record_from_before_knows_its_model(tiny: Backbone) -> None:
    assert tiny.has_fingerprint(earlier_fingerprint(tiny.location))
    assert tiny.has_fingerprint(tiny.fingerprint)
    assert not tiny.has_fingerprint("0" * 64)


def test_the_fingerprint_of_records_from_before_is_computed_where_today_s_does_not_fit() -> None:
    asked: list[int] = []
    known = Fingerprints("now", lambda: asked.append(1) or "before")  # type: ignore[func-returns-value]
    assert known[0] == "now" and "now" in known and len(known) == 2 and not asked
    assert "before" in known and "other" not in known and asked == [1]
    assert [*known] == ["now", "before"] == known[:]


def test_a_prediction_at_an_index_is_the_networks_at_that_levels_time(tiny: Backbone) -> None:
    conditions = tiny.encode_prompts(["a dog", ""])
    noisy = torch.randn(2, *tiny.latent_shape, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([3, 700])
    time = tiny.path.levels.time
    assert time is not None
    with torch.no_grad():
        predicted = tiny.predict(noisy, index, conditions)
        literal = tiny.family.network(tiny.denoiser, conditions)(noisy, time[index])
    assert predicted.dtype is torch.float32
    assert torch.equal(predicted, literal)


def test_more_steps_than_a_model_was_trained_with_are_one_sentence(tiny: Backbone) -> None:
    with pytest.raises(
        UserError, match=r"cannot take 1001 steps: a schedule takes 1 to 1000 steps.* Give others"
    ):
        tiny.schedule(1001)


@pytest.mark.parametrize(
    ("pipeline", "runtime"),
    [
        ("OnnxStableDiffusionPipeline", "ONNX Runtime"),
        ("ORTStableDiffusionXLPipeline", "ONNX Runtime"),
        ("OVStableDiffusionPipeline", "OpenVINO"),
        ("FlaxStableDiffusionPipeline", "Flax"),
    ],
)
def test_a_folder_exported_for_another_runtime_is_refused_with_what_to_use(
    tmp_path: Path, pipeline: str, runtime: str
) -> None:
    write_json(tmp_path / "model_index.json", {"_class_name": pipeline})
    with pytest.raises(UserError, match=f"a {pipeline}, exported for {runtime}, .* Use the diffusers model"):
        Backbone.open(str(tmp_path), device="cpu")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("flux1-dev-Q4_K_S.gguf", "GGUF"),
        ("unet.onnx", "a model for ONNX Runtime"),
        ("unet.mlpackage/Manifest.json", "a model for Core ML"),
        ("v1-5-pruned.ckpt", "a pickle by its name"),
    ],
)
def test_a_folder_that_holds_only_files_of_another_kind_is_told_which(
    tmp_path: Path, name: str, kind: str
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"\x08\x07")
    with pytest.raises(UserError, match=f"{name.split('/')[0]} is {kind}"):
        Backbone.open(str(tmp_path), device="cpu")


@pytest.mark.parametrize("suffix", ["onnx", "engine", "tflite", "msgpack"])
def test_a_file_of_another_runtime_is_refused_with_what_to_use(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"unet.{suffix}"
    path.write_bytes(b"\x08\x07")
    with pytest.raises(UserError, match=r"which is not read\. Use the safetensors that it was made from\."):
        Backbone.open(str(path), device="cpu")


def test_a_text_encoder_with_fewer_layers_in_its_config_is_said_in_a_line_and_not_in_a_table(
    tiny_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    printed_once.clear()
    shutil.copytree(tiny_folder, own := tmp_path / "own")
    config = own / "text_encoder" / "config.json"
    layers = read_json(config)["num_hidden_layers"]
    write_json(config, {**read_json(config), "num_hidden_layers": layers - 1})
    model = Backbone.open(str(own), device="cpu", precision="fp32")
    assert len(model.text_encoder.slots[0].model.encoder.layers) == layers - 1
    message = " ".join(capfd.readouterr().err.split())
    assert "The text_encoder of" in message and "that its config.json has no use for" in message
    assert "UNEXPECTED" not in message
