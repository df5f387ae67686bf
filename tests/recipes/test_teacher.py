"""A teacher says on a flow's path what it says on its own, and a step towards it is a training step."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from transformers import CLIPTokenizer

from backbone.diffusion.noise import add_noise, estimate, flow, target, vp
from backbone.io.console import UserError
from backbone.media.transforms import to_tensor
from backbone.models.locate import EMBEDDED, OWN
from backbone.models.model import Backbone
from recipes.moji.training.teacher import Teacher

SCENE = EMBEDDED.parent / "examples" / "scene.png"


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    """`moji`, which predicts v on Stable Diffusion's schedule."""
    return Teacher(EMBEDDED, "cpu")


def test_it_is_asked_at_the_timestep_with_the_same_signal_to_noise_ratio(teacher: Teacher) -> None:
    times = torch.tensor([0, 1, 400, 998, 999])
    assert torch.allclose(teacher.time_at(teacher.log_snr[times]), times.float(), atol=1e-3)
    between = teacher.log_snr[400:402].mean()[None]
    assert 400.4 < teacher.time_at(between).item() < 400.6
    assert teacher.time_at(torch.tensor([50.0, -50.0])).tolist() == [0.0, 999.0]  # beyond its ends


@torch.no_grad()
def test_on_a_flow_s_path_it_says_what_its_network_says_on_its_own(teacher: Teacher) -> None:
    random = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 2, *(24, 16, 16), generator=random)
    tokens = torch.tensor([[0, 5, 7] + 74 * [1], [0, 9, 8] + 74 * [1]])
    time = torch.tensor([150, 700])
    own = vp(torch.sigmoid(teacher.log_snr[time]))
    text = teacher.text_encoder(tokens).last_hidden_state
    noisy = add_noise(clean, noise, own).float()
    said = teacher.unet(noisy, time, text).sample
    wanted = estimate(said, noisy, own, "v_prediction")

    level = flow(own.b / (own.a + own.b))
    found = teacher.predict(add_noise(clean, noise, level), level, tokens)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(ours.float(), theirs.float(), atol=2e-3)


@torch.no_grad()
def test_its_velocity_is_nearer_to_a_scene_s_than_any_constant(teacher: Teacher) -> None:
    model = Backbone.open("moji", device="cpu", precision="fp32")
    clean = model.encode(to_tensor(Image.open(SCENE).convert("RGB"))[None]).mean
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    level = flow(torch.tensor([0.5]))
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer", local_files_only=True)
    caption = SCENE.with_suffix(".txt").read_text().strip()
    tokens = tokenizer([caption], padding="max_length", max_length=77, return_tensors="pt")["input_ids"]
    wanted = target(clean, noise, level, "flow")
    said = target(*teacher.predict(add_noise(clean, noise, level), level, tokens), level, "flow")
    assert (said - wanted).square().mean() < 0.5 * wanted.var()


def test_it_is_never_trained(teacher: Teacher) -> None:
    assert not any(value.requires_grad for value in teacher.unet.parameters())
    assert not any(value.requires_grad for value in teacher.text_encoder.parameters())


def test_a_teacher_of_another_kind_or_other_latents_is_refused() -> None:
    with pytest.raises(UserError, match="moji-flow has no unet/"):
        Teacher(OWN["moji-flow"], "cpu")
    with pytest.raises(UserError, match="latents of 24 channels, not 16"):
        Teacher(EMBEDDED, "cpu", channels=16)
