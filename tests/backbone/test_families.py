"""Every family against diffusers' own pipeline, on a random pipeline of its own: predictions, samples, adapters."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from diffusers import (
    AutoencoderKLQwenImage21,
    ChromaPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    FluxPipeline,
    Krea2Pipeline,
    PixArtSigmaPipeline,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    QwenImagePipeline,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    ZImagePipeline,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch import Tensor
from transformers import Qwen2Tokenizer, Qwen3VLForConditionalGeneration

from backbone.adapters.apply import load_concepts
from backbone.adapters.concept import choose_rare_word, read_concept
from backbone.adapters.embeddings import add_tokens, embed_tokens
from backbone.adapters.lora import LORA_WEIGHTS, add_lora
from backbone.diffusion.noise import SingularLevel, estimate
from backbone.families.components import loading as parts
from backbone.families.flux import family as flux
from backbone.families.pixart import family as pixart
from backbone.io.console import UserError
from backbone.io.files import read_header, read_json, read_tensors, write_json, write_tensors
from backbone.models.encode import count_images_at_once
from backbone.models.model import Backbone
from backbone.models.sample import Request, draw_initial_noise, sample_latents
from customize.settings import Subject
from customize.training.run import train_concept
from tests import tiny

STEPS, FEW, GUIDANCE, PROMPT, SCALE = 20, 4, 4.0, "a dog in the snow", 40.0


# diffusers' own predictions ---------------------------------------------------------------------------------


def said_by_xl(pipeline: Any, noisy: Tensor, time: Tensor) -> Any:
    hidden, _, pooled, _ = pipeline.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    side = (64, 64)
    sizes = pipeline._get_add_time_ids(side, (0, 0), side, hidden.dtype, text_encoder_projection_dim=12)
    added = {"text_embeds": pooled, "time_ids": sizes}
    return pipeline.unet(noisy, time, hidden, added_cond_kwargs=added).sample


def said_by_3(pipeline: Any, noisy: Tensor, time: Tensor) -> Any:
    hidden, _, pooled, _ = pipeline.encode_prompt(PROMPT, None, None, do_classifier_free_guidance=False)
    return pipeline.transformer(
        hidden_states=noisy,
        timestep=time[None],
        encoder_hidden_states=hidden,
        pooled_projections=pooled,
    ).sample


def said_by_flux(pipeline: Any, noisy: Tensor, time: Tensor, *, tokens: int) -> Any:
    hidden, pooled, text_ids = pipeline.encode_prompt(PROMPT, max_sequence_length=tokens)
    told = pipeline.transformer.config.guidance_embeds
    said = pipeline.transformer(
        hidden_states=pipeline._pack_latents(noisy, *noisy.shape),
        timestep=time[None] / 1000,
        guidance=torch.ones(1) if told else None,
        encoder_hidden_states=hidden,
        pooled_projections=pooled,
        txt_ids=text_ids,
        img_ids=pipeline._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32),
    ).sample
    return pipeline._unpack_latents(said, 64, 64, 8)


def said_by_pixart(pipeline: Any, noisy: Tensor, time: Tensor) -> Any:
    hidden, mask, _, _ = pipeline.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    said = pipeline.transformer(
        noisy,
        encoder_hidden_states=hidden,
        encoder_attention_mask=mask,
        timestep=time[None],
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    ).sample
    return said.chunk(2, dim=1)[0]


def said_by_z_image(pipeline: Any, noisy: Tensor, time: Tensor) -> Any:
    hidden, _ = pipeline.encode_prompt([PROMPT], do_classifier_free_guidance=False)
    (said,) = pipeline.transformer([noisy[0][:, None]], (1000 - time[None]) / 1000, hidden).sample
    return -said[:, 0][None]


def said_by_flux2(pipeline: Any, noisy: Tensor, time: Tensor) -> Any:
    hidden, text_ids = pipeline.encode_prompt(PROMPT)
    told = pipeline.transformer.config.guidance_embeds
    said = pipeline.transformer(
        hidden_states=pipeline._pack_latents(noisy),
        timestep=time[None] / 1000,
        guidance=torch.ones(1) if told else None,
        encoder_hidden_states=hidden,
        txt_ids=text_ids,
        img_ids=pipeline._prepare_latent_ids(noisy),
    ).sample
    return said.transpose(1, 2).unflatten(2, noisy.shape[2:])


def given_by_flux2(pipeline: Any, latents: Tensor) -> Tensor:
    """What the pipeline gives is the autoencoder's latent, of which ours is normalised patches."""
    bn, patches = pipeline.vae.bn, pipeline._patchify_latents(latents)
    deviation = (bn.running_var + pipeline.vae.config.batch_norm_eps).sqrt()
    return cast(Tensor, (patches - bn.running_mean[:, None, None]) / deviation[:, None, None])


def said_by_qwen(pipeline: Any, noisy: Tensor, time: Tensor) -> Any:
    hidden, mask = pipeline.encode_prompt(PROMPT)
    said = pipeline.transformer(
        hidden_states=pipeline._pack_latents(noisy, *noisy.shape),
        timestep=time[None] / 1000,
        encoder_hidden_states=hidden,
        encoder_hidden_states_mask=mask,
        img_shapes=[[(1, 4, 4)]],
    ).sample
    return pipeline._unpack_latents(said, 64, 64, 8)[:, :, 0]


def said_by_krea2(pipeline: Any, noisy: Tensor, time: Tensor) -> Any:
    hidden, mask = pipeline.encode_prompt(PROMPT)
    said = pipeline.transformer(
        hidden_states=pipeline._pack_latents(noisy, *noisy.shape),
        encoder_hidden_states=hidden,
        timestep=time[None] / 1000,
        position_ids=pipeline.prepare_position_ids(512, 4, 4, "cpu"),
        encoder_attention_mask=mask,
    ).sample
    return pipeline._unpack_latents(said, 64, 64)[:, :, 0]


def said_by_chroma(pipeline: Any, noisy: Tensor, time: Tensor) -> Any:
    hidden, text_ids, mask, _, _, _ = pipeline.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    said = pipeline.transformer(
        hidden_states=pipeline._pack_latents(noisy, *noisy.shape),
        timestep=time[None] / 1000,
        encoder_hidden_states=hidden,
        txt_ids=text_ids,
        img_ids=pipeline._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32),
        attention_mask=pipeline._prepare_attention_mask(1, 16, torch.float32, mask),
    ).sample
    return pipeline._unpack_latents(said, 64, 64, 8)


def said_by_qwen21(pipeline: Any, noisy: Tensor, time: Tensor) -> Any:
    hidden, mask, slots = pipeline.encode_prompt(PROMPT)
    said = pipeline.transformer(
        hidden_states=noisy.flatten(2).transpose(1, 2),
        timestep=time[None] / 1000,
        encoder_hidden_states=hidden,
        encoder_hidden_states_mask=mask,
        img_shapes=[[(1, 8, 8)]],
        img_mask=torch.cat([slots, slots.new_ones(1, 16)], dim=1),
    ).sample
    return said[:, -64:].transpose(1, 2).unflatten(2, (8, 8))


class Processor:
    """A tokenizer in the place of Qwen3-VL's processor, which needs packages for pictures."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: list[str], **more: Any) -> Any:
        return self.tokenizer(text, **more)

    def apply_chat_template(self, messages: Any, **more: Any) -> list[list[int]]:
        said = "".join(f"<|im_start|>{m['role']}\n{m['content'][0]['text']}<|im_end|>\n" for m in messages)
        return [self.tokenizer(said)["input_ids"]]


class WholeQwen21:
    """diffusers' pipeline of Qwen-Image 2.1, which compresses 8 times here and not 16."""

    @staticmethod
    def from_pretrained(folder: Path, **more: Any) -> Any:
        kinds: dict[str, Any] = {
            "scheduler": FlowMatchEulerDiscreteScheduler,
            "vae": AutoencoderKLQwenImage21,
            "text_encoder": Qwen3VLForConditionalGeneration,
            "transformer": QwenImage21Transformer2DModel,
        }
        found = {name: kind.from_pretrained(folder, subfolder=name) for name, kind in kinds.items()}
        tokenizer = Qwen2Tokenizer.from_pretrained(folder / "processor")
        pipeline = QwenImage21Pipeline(processor=Processor(tokenizer), **found)
        pipeline.vae_scale_factor = 8
        return pipeline


class MaskingChroma(ChromaPipeline):  # type: ignore[misc]
    """diffusers' pipeline with a mask of yes and no, which leaves padding out; as numbers it is added to the logits."""

    def _get_t5_prompt_embeds(self, *arguments: Any, **more: Any) -> Any:
        hidden, mask = super()._get_t5_prompt_embeds(*arguments, **more)
        return hidden, mask.bool()


@dataclass(frozen=True)
class Case:
    """A family: how its random pipeline is written, diffusers' class for it, and what that predicts.

    asked   more settings of its training
    said    more arguments of diffusers' call
    theirs  our latents as diffusers' pipeline takes and gives them
    given   (pipeline, what it gives) → latents as it takes them
    words   of the text, what comes from encoders that can learn words
    """

    name: str
    write: Callable[[Path], Path]
    pipeline: Any
    predict: Callable[[Any, Tensor, Tensor], Tensor]
    asked: dict[str, Any] = field(default_factory=dict)
    said: dict[str, Any] = field(default_factory=dict)
    theirs: Callable[[Tensor], Tensor] = lambda latents: latents
    given: Callable[[Any, Tensor], Tensor] = lambda pipeline, latents: latents
    words: tuple[str, ...] = ("hidden", "pooled")

    def __str__(self) -> str:
        return self.name


BOTH = {"train_text_encoder": True}
CASES = [
    Case("xl", tiny.tiny_stable_diffusion_xl, StableDiffusionXLPipeline, said_by_xl, asked=BOTH),
    Case(
        "sd3",
        tiny.tiny_stable_diffusion_3,
        StableDiffusion3Pipeline,
        said_by_3,
        said={"negative_prompt": "a red cat"},
        words=("pooled",),
    ),
    Case(
        "sd3-without-t5",
        partial(tiny.tiny_stable_diffusion_3, t5=False, use_dynamic_shifting=True),
        StableDiffusion3Pipeline,
        said_by_3,
        asked=BOTH,
    ),
    Case(
        "flux-dev",
        tiny.tiny_flux,
        FluxPipeline,
        partial(said_by_flux, tokens=512),
        asked=BOTH,
        theirs=flux.pack_latents,
        words=("pooled",),
    ),
    Case(
        "flux-schnell",
        partial(tiny.tiny_flux, guidance=False),
        FluxPipeline,
        partial(said_by_flux, tokens=256),
        said={"max_sequence_length": 256},
        theirs=flux.pack_latents,
        words=("pooled",),
    ),
    Case(
        "pixart",
        tiny.tiny_pixart,
        PixArtSigmaPipeline,
        said_by_pixart,
        said={"use_resolution_binning": False, "clean_caption": False},
        words=("hidden",),
    ),
    Case(
        "z-image",
        tiny.tiny_z_image,
        ZImagePipeline,
        said_by_z_image,
        said={"guidance_scale": GUIDANCE - 1, "negative_prompt": "a red cat in the red snow, " * 4},
        words=("hidden", "mask"),
    ),
    Case(
        "flux2-klein",
        tiny.tiny_flux2_klein,
        Flux2KleinPipeline,
        said_by_flux2,
        given=given_by_flux2,
        words=("hidden",),
    ),
    Case(
        "flux2-klein-distilled",
        partial(tiny.tiny_flux2_klein, distilled=True),
        Flux2KleinPipeline,
        said_by_flux2,
        given=given_by_flux2,
        words=("hidden",),
    ),
    Case(
        "qwen-image",
        tiny.tiny_qwen_image,
        QwenImagePipeline,
        said_by_qwen,
        said={"negative_prompt": "a red cat", "true_cfg_scale": GUIDANCE, "guidance_scale": None},
        theirs=flux.pack_latents,
        words=("hidden", "mask"),
    ),
    Case(
        "krea2",
        tiny.tiny_krea2,
        Krea2Pipeline,
        said_by_krea2,
        said={"guidance_scale": GUIDANCE - 1, "negative_prompt": "a red cat"},
        theirs=flux.pack_latents,
        words=("hidden", "mask"),
    ),
    Case(
        "krea2-turbo",
        partial(tiny.tiny_krea2, turbo=True),
        Krea2Pipeline,
        said_by_krea2,
        said={"guidance_scale": GUIDANCE - 1},
        theirs=flux.pack_latents,
        words=("hidden", "mask"),
    ),
]
CASES.append(
    Case(
        "flux2-dev",
        tiny.tiny_flux2_dev,
        Flux2Pipeline,
        said_by_flux2,
        given=lambda pipeline, tokens: tokens.transpose(1, 2).unflatten(2, (8, 8)),
        words=("hidden",),
    )
)
CASES.append(
    Case(
        "qwen-image-2.1",
        tiny.tiny_qwen_image21,
        WholeQwen21,
        said_by_qwen21,
        said={
            "negative_prompt": "a red cat in the red snow",
            "true_cfg_scale": GUIDANCE,
            "guidance_scale": None,
        },
        theirs=lambda latents: latents.flatten(2).transpose(1, 2),
        words=("hidden", "mask"),
    )
)
CASES.append(
    Case(
        "chroma",
        tiny.tiny_chroma,
        MaskingChroma,
        said_by_chroma,
        said={"negative_prompt": "a red cat in the red snow"},
        theirs=flux.pack_latents,
        words=("hidden", "mask"),
    )
)
NAMED = {case.name: case for case in CASES}
VARIANTS = ("flux2-klein-distilled", "krea2-turbo")
SLOW = ("qwen-image", "krea2", "chroma", "flux2-dev", "qwen-image-2.1", *VARIANTS)


def marked(slow: Sequence[str]) -> pytest.MarkDecorator:
    """The cases, some of them run by the long suite alone."""
    params = [pytest.param(case, marks=[pytest.mark.slow] * (case.name in slow)) for case in CASES]
    return pytest.mark.parametrize("case", params, ids=str)


# What differs from a sibling in the text encoders or in guidance alone
SIBLINGS = ("sd3-without-t5", "flux-schnell")
every, proof, loads = marked(SLOW), marked(VARIANTS), marked((*SLOW, *SIBLINGS))
trained_alike = marked((*SLOW, "sd3", "flux-schnell"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The random pipelines, each written once."""
    place = tmp_path_factory.mktemp("families")
    return Written(place)


class Written(dict[str, Path]):
    """The folder of each case, written when it is asked for."""

    def __init__(self, place: Path) -> None:
        super().__init__()
        self.place = place

    def __missing__(self, name: str) -> Path:
        self[name] = NAMED[name].write(self.place / name)
        return self[name]


# Parity with diffusers --------------------------------------------------------------------------------------


@loads
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_and_buffers_are_those_that_diffusers_loads(
    case: Case, precision: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "CHUNK_ELEMENTS", 10_000)
    monkeypatch.delattr(parts, "load_pretrained")
    model = Backbone.open(str(folders[case.name]), device="cpu", precision=precision)
    denoiser = "unet" if (folders[case.name] / "unet").exists() else "transformer"
    for part, ours in ((denoiser, model.denoiser), ("vae", model.autoencoder)):
        dtype = next(ours.parameters()).dtype
        kind: Any = type(ours)
        theirs = kind.from_pretrained(folders[case.name], subfolder=part, torch_dtype=dtype)
        expected = {**dict(theirs.named_parameters()), **dict(theirs.named_buffers())}
        found = {**dict(ours.named_parameters()), **dict(ours.named_buffers())}
        assert list(found) == list(expected)
        for name, value in expected.items():
            assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def test_an_autoencoder_with_the_names_of_old_files_is_left_to_diffusers(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["xl"], tmp_path / "old")
    file = folder / "vae" / parts.WEIGHTS
    tensors, _ = read_tensors(file)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def renamed(name: str) -> str:
        for new, said in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{said}.")
        return name

    write_tensors(file, {renamed(name): value for name, value in tensors.items()})
    assert any("query" in name for name in read_header(file).shapes)
    before, after = (
        Backbone.open(str(place), device="cpu").autoencoder.state_dict() for place in (folders["xl"], folder)
    )
    assert list(before) == list(after)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@proof
def test_a_guided_sample_is_diffusers_own(case: Case, folders: dict[str, Path]) -> None:
    assert_same_sample(case, folders, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_twenty_guided_steps_are_diffusers_own(case: Case, folders: dict[str, Path]) -> None:
    assert_same_sample(case, folders, STEPS)


def assert_same_sample(case: Case, folders: dict[str, Path], steps: int) -> None:
    """So many guided steps from the same noise, and one prediction."""
    model, pipeline = kept(folders[case.name]), loaded(case, folders)
    request = Request(PROMPT, (0, 0), case.said.get("negative_prompt", ""))
    said = {"guidance_scale": GUIDANCE} | case.said
    if case.pipeline is WholeQwen21:  # which has no guidance by another name
        del said["guidance_scale"]
    ours = next(sample_latents(model, [request], steps=steps, guidance=GUIDANCE, seed=3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = pipeline(
            prompt=PROMPT,
            latents=case.theirs(draw_initial_noise(model, 3, 0, 0)[None]),
            num_inference_steps=steps,
            height=model.resolution,
            width=model.resolution,
            output_type="latent",
            **said,
        ).images
    assert float(theirs.std()) > 0.1
    torch.testing.assert_close(case.theirs(ours), case.given(pipeline, theirs), rtol=0, atol=1e-4)
    torch.testing.assert_close(
        predicted(model), predicted_by_diffusers(case, pipeline, model), rtol=0, atol=1e-5
    )


@trained_alike
def test_training_exports_an_adapter_that_diffusers_loads(
    case: Case, folders: dict[str, Path], tmp_path: Path, subject: Path
) -> None:
    run = trained(folders[case.name], subject, tmp_path / "run", **case.asked)
    model, pipeline = opened(folders[case.name]), loaded(case, folders)
    before = predicted(model)
    load_concepts(model, [read_concept(run)], scale=SCALE)
    ours = predicted(model)
    assert float((ours - before).abs().max()) > 1e-3
    wear(pipeline, run)
    torch.testing.assert_close(ours, predicted_by_diffusers(case, pipeline, model), rtol=0, atol=1e-5)


# What a family promises -------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("layers", ["attention", "all"])
def test_every_set_of_layers_takes_an_adapter(case: Case, layers: str, folders: dict[str, Path]) -> None:
    model = kept(folders[case.name])
    spec = model.family.spec(model.location, torch.float32).denoiser
    network = spec.instantiate()
    targets = model.family.lora_targets[layers]
    found = add_lora(network, "some", rank=1, alpha=1, targets=targets)
    for target in targets:  # of lists that count blocks only those that this model has
        if not re.search(r"\.\d+\.", target):
            assert any(f"{target}.lora_A" in name for name in found), target


@every
def test_a_new_word_begins_as_the_one_that_it_was_made_from(case: Case, folders: dict[str, Path]) -> None:
    encoder = opened(folders[case.name]).text_encoder
    before = encoder([PROMPT, "a red cat"])
    add_tokens(encoder, embed_tokens(encoder, "dog", count=1), tokens=["[V]"])
    after, learned = encoder([PROMPT, "a red cat"]), encoder([PROMPT.replace("dog", "[V]"), "a red cat"])
    for name in before:
        assert torch.equal(after[name], before[name])
    for name in case.words:
        torch.testing.assert_close(learned[name], before[name], rtol=0, atol=1e-6)


@every
def test_pictures_come_back_through_the_autoencoder_with_their_shape(
    case: Case, folders: dict[str, Path]
) -> None:
    model = kept(folders[case.name])
    pictures = torch.rand(1, 3, 64, 64) * 2 - 1
    posterior = model.encode(pictures)
    assert model.latent_shape[-2:] == (8, 8) and model.resolution == 64
    assert posterior.mean.shape == (1, *model.latent_shape)
    assert model.decode(posterior.mean).shape == pictures.shape


def test_no_prompt_is_zeros_where_the_model_says_so(folders: dict[str, Path], tmp_path: Path) -> None:
    encoder = kept(folders["xl"]).text_encoder
    assert all(bool((value[0] == 0).all() and (value[1] != 0).any()) for value in encoder(["", "a"]).values())
    other = shutil.copytree(folders["xl"], tmp_path / "other")
    index = read_json(other / "model_index.json")
    write_json(other / "model_index.json", {**index, "force_zeros_for_empty_prompt": False})
    pipeline = StableDiffusionXLPipeline.from_pretrained(other, local_files_only=True)
    _, hidden, _, pooled = pipeline.encode_prompt("a")
    ours = opened(other).encode_prompts([""])
    torch.testing.assert_close(ours.text["hidden"], hidden)
    torch.testing.assert_close(ours.text["pooled"], pooled)


def test_an_autoencoder_is_in_bf16_and_in_fp16_only_where_that_does_not_overflow(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def dtype(folder: Path, precision: str) -> torch.dtype:
        model = Backbone.open(str(folder), device="cpu", precision=precision)
        return next(model.autoencoder.parameters()).dtype

    for name in ("sd3-without-t5", "flux-dev"):
        assert dtype(folders[name], "bf16") is torch.bfloat16
    assert dtype(folders["xl"], "bf16") is torch.float32  # as diffusers' scripts have it
    assert "fp32" not in capsys.readouterr().err
    assert dtype(folders["xl"], "fp16") is torch.float32
    assert "works in fp32: in fp16 it overflows." in capsys.readouterr().err
    other = shutil.copytree(folders["xl"], tmp_path / "other")
    config = read_json(other / "vae" / "config.json")
    write_json(other / "vae" / "config.json", {**config, "force_upcast": False})
    assert dtype(other, "fp16") is torch.float16 and dtype(other, "bf16") is torch.bfloat16
    assert "overflows" not in capsys.readouterr().err


def test_a_flow_is_converted_at_its_noisiest_end(folders: dict[str, Path]) -> None:
    model = kept(folders["sd3"])
    noise, top = torch.randn(2, *model.latent_shape), model.schedule(4)[0]
    assert float(top.a) == 0 and float(top.b) == 1
    found = model.predictor(model.encode_prompts([PROMPT, ""]))(noise, top)
    torch.testing.assert_close(found.noise, noise)
    said = model.family.network(model.denoiser, model.encode_prompts([PROMPT, ""]))(noise, top.time)  # type: ignore[arg-type]
    torch.testing.assert_close(found.clean, noise - said)
    with pytest.raises(SingularLevel):
        estimate(noise, noise, top, "epsilon")


@pytest.mark.parametrize(("name", "longest"), [("sd3-without-t5", 1.0), ("flux-dev", 1 / 6)])
def test_a_flow_shifts_its_ladder_by_the_picture_s_size(
    folders: dict[str, Path], name: str, longest: float
) -> None:
    model, size = kept(folders[name]), (24, 40)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    mu = calculate_shift(size[0] * size[1] // 4)
    sigmas = torch.linspace(1, longest, 6).tolist() if longest < 1 else None
    scheduler.set_timesteps(None if sigmas else 6, sigmas=sigmas, mu=mu)
    torch.testing.assert_close(model.schedule(6, size=size).b.float(), scheduler.sigmas)
    assert not torch.allclose(model.schedule(6).b.float(), scheduler.sigmas)


def test_guidance_is_told_to_a_network_that_was_distilled_for_it(folders: dict[str, Path]) -> None:
    model = kept(folders["flux-dev"])
    text, empty = model.encode_prompts([PROMPT]), model.encode_prompts([""])
    noisy, level = torch.randn(1, *model.latent_shape), model.path.levels[300]
    answers = [model.guided_predictor(text, empty, scale)(noisy, level).clean for scale in (1.0, 3.5)]
    plain = model.predictor(text)(noisy, level).clean
    torch.testing.assert_close(answers[0], plain)
    assert not torch.allclose(answers[1], plain)
    other = kept(folders["flux-schnell"])
    text = other.encode_prompts([PROMPT])
    torch.testing.assert_close(
        other.guided_predictor(text, text, 3.5)(noisy, level).clean, other.predictor(text)(noisy, level).clean
    )


def test_a_guidance_that_a_network_does_not_read_is_said_to_have_no_effect(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model = kept(folders["flux-schnell"])
    text = model.encode_prompts([PROMPT])
    model.guided_predictor(text, text, 1.0)
    assert "no effect" not in capsys.readouterr().err
    model.guided_predictor(text, text, 7.25)
    assert "reads no guidance, as schnell: 7.25 has no effect" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    [
        "z-image",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("qwen-image", "krea2", "chroma")),
        "qwen-image-2.1",
    ],
)
@torch.no_grad()
def test_prompts_of_unlike_length_are_read_together_as_alone(name: str, folders: dict[str, Path]) -> None:
    model = kept(folders[name])
    noisy, time = question(model)
    text = model.encode_prompts([PROMPT, "a dog", ""])
    together = model.family.network(model.denoiser, text)(noisy.expand(3, -1, -1, -1), time)
    for row in range(3):
        alone = model.family.network(model.denoiser, text[row : row + 1])(noisy, time)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-5)
    assert float((together[0] - together[1]).abs().max()) > 1e-4


@every
def test_as_many_images_are_encoded_at_once_on_a_gpu_as_its_memory_takes(
    case: Case, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = opened(folders[case.name])
    model.device = torch.device("cuda")
    sizes = []
    for gib in (1, 80):
        card = SimpleNamespace(total_memory=gib << 30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, card=card: card)
        sizes.append(count_images_at_once(model, (1024, 1024)))
    assert 1 <= sizes[0] < sizes[1] <= 64


def test_packing_latents_is_undone_by_unpacking() -> None:
    latents = torch.randn(2, 16, 6, 10)
    assert flux.pack_latents(latents).shape == (2, 15, 64)
    assert torch.equal(flux.unpack_latents(flux.pack_latents(latents), 6, 10), latents)


def test_t5_has_rare_words_too(folders: dict[str, Path]) -> None:
    vocabulary = kept(folders["pixart"]).text_encoder.tokenizer.get_vocab()
    assert choose_rare_word(vocabulary, "key") in tiny.RARE


def test_small_letters_leave_learned_words_alone() -> None:
    assert pixart.lowercase_except("A [V] Dog", ["[V]"]) == "a [V] dog"
    assert pixart.lowercase_except("A [V] Dog", []) == "a [v] dog"


def test_a_clip_without_an_end_token_in_its_config_pools_at_its_tokenizer_s(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(folders["sd3"], tmp_path / "copy")
    path = copy / "text_encoder" / "config.json"
    write_json(path, {**read_json(path), "eos_token_id": None})
    kept, without = (opened(folder).encode_prompts(["a dog"]).text for folder in (folders["sd3"], copy))
    assert all(torch.equal(kept[name], without[name]) for name in kept)


# What it refuses --------------------------------------------------------------------------------------------


@every
def test_a_folder_without_a_part_is_a_clear_mistake(
    case: Case, folders: dict[str, Path], tmp_path: Path
) -> None:
    broken = shutil.copytree(folders[case.name], tmp_path / "broken")
    for path in sorted(path for path in broken.iterdir() if path.is_dir() and path.name != "scheduler"):
        shutil.move(path, tmp_path / path.name)
        part = {"vae": "autoencoder", "unet": "denoiser", "transformer": "denoiser"}
        with pytest.raises(UserError, match=rf"{path.name}\b"):
            getattr(opened(broken), part.get(path.name, "text_encoder"))
        shutil.move(tmp_path / path.name, path)


@pytest.mark.parametrize(
    ("name", "source", "part", "asked"),
    [
        ("xl", "sd3", "scheduler", "path"),
        ("sd3", "xl", "scheduler", "path"),
        ("sd3", "flux-dev", "transformer", "denoiser"),
        ("flux-dev", "pixart", "transformer", "denoiser"),
    ],
)
def test_a_part_of_another_family_is_a_clear_mistake(
    folders: dict[str, Path], tmp_path: Path, name: str, source: str, part: str, asked: str
) -> None:
    mixed = shutil.copytree(folders[name], tmp_path / "mixed")
    shutil.rmtree(mixed / part)
    shutil.copytree(folders[source] / part, mixed / part)
    with pytest.raises(UserError, match=part):
        getattr(opened(mixed), asked)


# Helpers ----------------------------------------------------------------------------------------------------


@cache
def kept(folder: Path) -> Backbone:
    """Opened once: a test leaves it as it is."""
    return opened(folder)


def opened(folder: Path) -> Backbone:
    return Backbone.open(str(folder), device="cpu", precision="fp32")


def loaded(case: Case, folders: dict[str, Path]) -> Any:
    """diffusers' own pipeline; what its index says is absent has to be said again."""
    index = read_json(folders[case.name] / "model_index.json")
    absent = {name: None for name, entry in index.items() if entry == [None, None]}
    pipeline = case.pipeline.from_pretrained(folders[case.name], local_files_only=True, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def question(model: Backbone) -> tuple[Tensor, Tensor]:
    """A noisy latent [1, C, H, W] and a time []."""
    assert model.path.levels.time is not None
    return draw_initial_noise(model, 1, 0, 0)[None], model.path.levels.time[600]


@torch.no_grad()
def predicted(model: Backbone) -> Tensor:
    """What the network says."""
    return model.family.network(model.denoiser, model.encode_prompts([PROMPT]))(*question(model))


@torch.no_grad()
def predicted_by_diffusers(case: Case, pipeline: Any, model: Backbone) -> Tensor:
    """What the network of diffusers' own pipeline says to the same question."""
    return case.predict(pipeline, *question(model))


def trained(folder: Path, subject: Path, run: Path, **asked: Any) -> Path:
    """Three steps of `customize train`."""
    settings = {"model": str(folder), "device": "cpu", "precision": "fp32", "steps": 3, "prior_draws": 2}
    one = Subject(images=str(subject), token="[V]", class_noun="dog", token_words="fgh")
    return train_concept({**settings, "sheet_prompts": ("a {}",), **asked}, [one], out=run)


def wear(pipeline: Any, run: Path) -> None:
    """Puts a run's adapter on diffusers' pipeline, by peft itself where the pipeline has no loader of its own."""
    if hasattr(pipeline, "load_lora_weights"):
        pipeline.load_lora_weights(str(run), weight_name=LORA_WEIGHTS, adapter_name="dog")
        pipeline.set_adapters("dog", SCALE)
        return
    tensors, header = read_tensors(run / LORA_WEIGHTS)
    said = {
        key.removeprefix("transformer."): value
        for key, value in json.loads(header["lora_adapter_metadata"]).items()
    }
    config = LoraConfig(
        r=said["r"], lora_alpha=said["lora_alpha"] * SCALE, target_modules=said["target_modules"]
    )
    worn = get_peft_model(pipeline.transformer, config)
    state = {key.replace("transformer.", "base_model.model.", 1): value for key, value in tensors.items()}
    found: Any = set_peft_model_state_dict(worn, state)
    assert not found.unexpected_keys
