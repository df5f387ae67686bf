"""Random pipeline folders, one for each family of models, small enough to build in every test run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    MotionAdapter,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImage21Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from backbone.models.locate import EMBEDDED

WORDS = ("a", "dog", "cat", "in", "the", "snow", "red")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
RARE = ("bcd", "fgh", "jkl", "mnp", "qrs")


def tiny_pipeline(folder: Path, *, seed: int = 0, prediction_type: str = "epsilon") -> Path:
    """Writes a whole pipeline with random weights: 64 × 64 pictures, 8 × 8 latents of 4 channels."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    unet = tiny_unet()
    vae, text = tiny_autoencoder(), CLIPTextModel(clip_settings(tokenizer))
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type=prediction_type,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return with_defaults(folder)


def tiny_instruct_pix2pix(folder: Path) -> Path:
    """The same of a model that edits by instruction: its UNet reads an image's latents beside the noisy ones."""
    from diffusers import StableDiffusionInstructPix2PixPipeline

    tiny_pipeline(folder)
    plain = StableDiffusionPipeline.from_pretrained(folder)
    torch.manual_seed(1)
    pipeline = StableDiffusionInstructPix2PixPipeline(
        vae=plain.vae,
        text_encoder=plain.text_encoder,
        tokenizer=plain.tokenizer,
        unet=UNet2DConditionModel.from_config({**plain.unet.config, "in_channels": 8}),
        scheduler=plain.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return with_defaults(folder)


def tiny_stable_diffusion_xl(folder: Path) -> Path:
    """The same of Stable Diffusion XL: two text encoders of unlike widths, the published scheduler's settings."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=2,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=16 + 24,
        attention_head_dim=(2, 4),
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 12,
    )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
    )
    StableDiffusionXLPipeline(
        vae=tiny_autoencoder(),
        text_encoder=CLIPTextModel(clip_settings(tokenizer)),
        text_encoder_2=CLIPTextModelWithProjection(clip_settings(tokenizer, width=24)),
        tokenizer=tokenizer,
        tokenizer_2=tiny_tokenizer(pad_token="!"),
        unet=unet,
        scheduler=scheduler,
        add_watermarker=False,
    ).save_pretrained(folder)
    return with_defaults(folder)


def tiny_stable_diffusion_3(folder: Path, *, t5: bool = True, **scheduler: Any) -> Path:
    """The same of Stable Diffusion 3.5: two CLIPs and, if wanted, T5; one layer with dual attention."""
    torch.manual_seed(0)
    first, second = tiny_tokenizer(), tiny_tokenizer(pad_token="!")
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=48,
        caption_projection_dim=16,
        pooled_projection_dim=12 + 12,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    StableDiffusion3Pipeline(
        vae=tiny_autoencoder(
            shift_factor=0.0609, scaling_factor=1.5305, use_quant_conv=False, use_post_quant_conv=False
        ),
        text_encoder=CLIPTextModelWithProjection(clip_settings(first, end=2)),
        text_encoder_2=CLIPTextModelWithProjection(clip_settings(second, width=24)),
        text_encoder_3=tiny_t5(48) if t5 else None,
        tokenizer=first,
        tokenizer_2=second,
        tokenizer_3=tiny_t5_tokenizer() if t5 else None,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**({"shift": 3.0} | scheduler)),
    ).save_pretrained(folder)
    return with_defaults(folder)


def tiny_flux(folder: Path, *, guidance: bool = True) -> Path:
    """The same of FLUX.1: `dev`, which is told a guidance and shifts by the picture's size, or else `schnell`."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 4, 8),
    )
    shifts = {"shift": 3.0, "use_dynamic_shifting": True} if guidance else {"shift": 1.0}
    FluxPipeline(
        vae=tiny_autoencoder(
            shift_factor=0.1159, scaling_factor=0.3611, use_quant_conv=False, use_post_quant_conv=False
        ),
        text_encoder=CLIPTextModel(clip_settings(tokenizer, end=2)),
        text_encoder_2=tiny_t5(32),
        tokenizer=tokenizer,
        tokenizer_2=tiny_t5_tokenizer(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**shifts),
    ).save_pretrained(folder)
    return with_defaults(folder)


def tiny_chroma(folder: Path) -> Path:
    """The same of Chroma: FLUX's blocks, T5 alone, dynamic shifting as FLUX's."""
    torch.manual_seed(0)
    transformer = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=16,
        approximator_hidden_dim=24,
        approximator_layers=2,
    )
    ChromaPipeline(
        vae=tiny_autoencoder(
            shift_factor=0.1159, scaling_factor=0.3611, use_quant_conv=False, use_post_quant_conv=False
        ),
        text_encoder=tiny_t5(32),
        tokenizer=tiny_t5_tokenizer(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    ).save_pretrained(folder)
    return with_defaults(folder)


def tiny_pixart(folder: Path) -> Path:
    """The same of PixArt-Σ, with a scheduler whose steps are DDIM's."""
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        cross_attention_dim=16,
        caption_channels=32,
        use_additional_conditions=False,
    )
    scheduler = DDIMScheduler(
        beta_start=0.0001, beta_end=0.01, beta_schedule="linear", clip_sample=False, set_alpha_to_one=True
    )
    PixArtSigmaPipeline(
        vae=tiny_autoencoder(scaling_factor=0.13025),
        text_encoder=tiny_t5(32),
        tokenizer=tiny_t5_tokenizer(),
        transformer=transformer,
        scheduler=scheduler,
    ).save_pretrained(folder)
    return with_defaults(folder)


def tiny_z_image(folder: Path, *, shift: float = 6.0) -> Path:
    """The same of Z-Image: 5 × 5 latents would fill no 32 tokens, nor do these 4 × 4 tokens."""
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=24,
        axes_dims=[4, 6, 6],
        axes_lens=[1024, 16, 16],
    )
    for name in ("x_pad_token", "cap_pad_token"):  # which are zeros at first
        torch.nn.init.normal_(getattr(transformer, name))
    ZImagePipeline(
        vae=tiny_autoencoder(
            shift_factor=0.1159, scaling_factor=0.3611, use_quant_conv=False, use_post_quant_conv=False
        ),
        text_encoder=tiny_qwen3(24),
        tokenizer=tiny_qwen_tokenizer(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
    ).save_pretrained(folder)
    return with_defaults(folder)


def tiny_flux2_klein(folder: Path, *, distilled: bool = False) -> Path:
    """The same of FLUX.2 klein: 8 × 8 latents of 16 channels, which are patches of the autoencoder's 4."""
    torch.manual_seed(0)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * 8,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    Flux2KleinPipeline(
        vae=vae,
        text_encoder=tiny_qwen3(8, layers=28),
        tokenizer=tiny_qwen_tokenizer(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        is_distilled=distilled,
    ).save_pretrained(folder)
    return with_defaults(folder)


def tiny_flux2_dev(folder: Path) -> Path:
    """The same of FLUX.2 dev, which is told the guidance scale and reads Mistral."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    tiny_flux2_klein(folder)
    torch.manual_seed(1)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * 8,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=True,
    )
    text = {
        "model_type": "mistral",
        "vocab_size": len(tiny_mistral_tokenizer()) + 5,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 31,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 2048,
        "sliding_window": None,
    }
    eye = {
        "model_type": "pixtral",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "head_dim": 8,
        "image_size": 16,
        "patch_size": 8,
    }
    Flux2Pipeline(
        vae=AutoencoderKLFlux2.from_pretrained(folder / "vae"),
        text_encoder=Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=eye)),
        tokenizer=tiny_mistral_tokenizer(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    ).save_pretrained(folder)
    return with_defaults(folder)


def tiny_mistral_tokenizer() -> Any:
    """Bytes and a few words, padded on the left; the chat template of Mistral in short."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_qwen_tokenizer().backend_tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=1024,
    )
    marks = ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
    tokenizer.add_special_tokens({"additional_special_tokens": list(marks)})
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% set words = m['content'][0]['text'] %}"
        "{% if m['role'] == 'system' %}[SYSTEM_PROMPT]{{ words }}[/SYSTEM_PROMPT]"
        "{% else %}[INST]{{ words }}[/INST]{% endif %}{% endfor %}"
    )
    return tokenizer


def tiny_qwen_image(folder: Path) -> Path:
    """The same of Qwen-Image: latents of one frame, normalised by channel; levels that are stretched to an end."""
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    QwenImagePipeline(
        vae=tiny_video_autoencoder(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**tiny_vision_language(16))),
        tokenizer=tiny_qwen_tokenizer(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=1.0, use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
    ).save_pretrained(folder)
    return with_picture_size(folder)


def tiny_qwen_edit(folder: Path, *, plus: bool = False) -> Path:
    """The same of Qwen-Image-Edit, or of its later editions: its text encoder looks at images."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tiny_qwen_image(folder)
    tokenizer = tiny_qwen_tokenizer()
    marks = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(marks)})
    numbers: dict[str, Any] = {mark: tokenizer.convert_tokens_to_ids(mark) for mark in marks}
    settings = tiny_vision_language(16)
    settings["text_config"]["vocab_size"] = len(tokenizer) + 5
    torch.manual_seed(2)
    encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            **settings,
            image_token_id=numbers["<|image_pad|>"],
            vision_start_token_id=numbers["<|vision_start|>"],
        )
    )
    encoder.save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    Qwen2VLImageProcessorPil().save_pretrained(folder / "processor")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": f"QwenImageEdit{'Plus' if plus else ''}Pipeline"}
    index |= {"processor": ["transformers", "Qwen2VLProcessor"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def tiny_qwen_image21(folder: Path) -> Path:
    """The same of Qwen-Image 2.1: latents are not packed, pictures have a fourth channel, text is causal."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    torch.manual_seed(0)
    transformer = QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    for name, value in transformer.named_parameters():
        if name.endswith("text_norm.weight"):  # which is zeros at first
            torch.nn.init.normal_(value, std=0.1)
    vae = AutoencoderKLQwenImage21(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[0.5, 1.5, 1.0, 0.7],
        scale_factor_spatial=8,
    )
    tokenizer = tiny_qwen_tokenizer()
    marks = ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(marks)})
    settings = tiny_vision_language(16)
    settings["text_config"]["vocab_size"] = len(tokenizer) + 5
    settings["vision_config"] |= {"patch_size": 8}  # as large as the latents, of which four make a token
    settings |= {"image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>")}
    components = {
        "transformer": transformer,
        "vae": vae,
        "text_encoder": Qwen3VLForConditionalGeneration(Qwen3VLConfig(**settings)),
        "processor": tokenizer,  # a processor needs packages for pictures, and saves its tokenizer so
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
    }
    index: dict[str, Any] = {"_class_name": "QwenImage21Pipeline"}
    for name, component in components.items():
        component.save_pretrained(folder / name)
        library = "transformers" if name in ("text_encoder", "processor") else "diffusers"
        index[name] = [library, type(component).__name__]
    processor = Qwen2VLImageProcessorPil(patch_size=8, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor.save_pretrained(folder / "processor")
    (folder / "model_index.json").write_text(json.dumps(index))
    return with_picture_size(folder)


def tiny_krea2(folder: Path, *, turbo: bool = False) -> Path:
    """The same of Krea 2: keys and values that heads share, three layers of its text encoder."""
    torch.manual_seed(0)
    transformer = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        timestep_embed_dim=16,
        text_hidden_dim=16,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )
    for name, value in transformer.named_parameters():
        if name.endswith("scale_shift_table"):  # which are zeros at first
            torch.nn.init.normal_(value, std=0.1)
    Krea2Pipeline(
        vae=tiny_video_autoencoder(),
        text_encoder=Qwen3VLModel(Qwen3VLConfig(**tiny_vision_language(16))),
        tokenizer=tiny_qwen_tokenizer(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=6400),
        text_encoder_select_layers=(0, 2, 3),
        is_distilled=turbo,
    ).save_pretrained(folder)
    return with_picture_size(folder)


def tiny_video_autoencoder() -> Any:
    """Qwen-Image's: 64 × 64 pictures to 8 × 8 latents of 4 channels."""
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[0.5, 1.5, 1.0, 0.7],
    )
    return vae


def tiny_vision_language(width: int) -> dict[str, Any]:
    """Settings of a Qwen-VL of three layers, whose eye nobody uses."""
    text = {
        "vocab_size": len(tiny_qwen_tokenizer()) + 5,
        "hidden_size": width,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 2048,
        "rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]},
    }
    eye = {
        "depth": 1,
        "hidden_size": 8,
        "out_hidden_size": width,
        "num_heads": 1,
        "intermediate_size": 8,
        "deepstack_visual_indexes": [0],
        "fullatt_block_indexes": [0],
    }
    return {"text_config": text, "vision_config": eye}


def tiny_moji(folder: Path, *, side: int = 128) -> Path:
    """`moji` with a small random denoiser and autoencoder, and few steps of everything; its words and scorer stay.

    `side` is that of its pictures in pixels, eight times that of its latents.
    """
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    for part in EMBEDDED.iterdir():
        if part.name not in ("unet", "vae", "control", "limner.json"):
            (folder / part.name).symlink_to(part)
    unet = tiny_unet(sample_size=side // 8, in_channels=8, out_channels=8, cross_attention_dim=256)
    unet.save_pretrained(folder / "unet")
    control = folder / "control" / "world"
    adapter = T2IAdapter(channels=list(unet.config.block_out_channels), num_res_blocks=1, downscale_factor=8)
    adapter.save_pretrained(control / "t2i_adapter")
    record = json.loads((EMBEDDED / "control" / "world" / "condition.json").read_text())
    (control / "condition.json").write_text(json.dumps({**record, "base": ""}))
    tiny_autoencoder(latent_channels=8, sample_size=side).save_pretrained(folder / "vae")
    defaults = json.loads((EMBEDDED / "limner.json").read_text())
    few = {"steps": 2, "train_steps": 2, "rank": 2, "batch": 1, "prior_batch": 1}
    defaults["sheet_prompts"] = defaults["sheet_prompts"][:2]
    defaults["draft"] |= {"steps": 4, "batch": 1, "reward_steps": 1, "sample_steps": 2}
    (folder / "limner.json").write_text(json.dumps(defaults | few))
    return folder


# What they are made of --------------------------------------------------------------------------------------


def with_picture_size(folder: Path) -> Path:
    """With pictures of 64 pixels a side, of which the published configs say nothing."""
    config = folder / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "sample_size": 64}))
    return with_defaults(folder)


def with_defaults(folder: Path) -> Path:
    """Few steps, for whoever trains or samples without saying how many."""
    defaults = {"steps": 3, "guidance": 2.0, "train_steps": 4, "learning_rate": 1e-3, "rank": 2, "batch": 2}
    (folder / "limner.json").write_text(json.dumps(defaults))
    return folder


def tiny_unet(**settings: Any) -> Any:
    """Of the Stable Diffusion family: 8 × 8 latents of 4 channels, text of width 16."""
    usual: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**usual | settings)


def tiny_motion_adapter(**settings: Any) -> Any:
    """Of the tiny UNet: what its layers add is not zero."""
    torch.manual_seed(2)
    usual: dict[str, Any] = {
        "block_out_channels": (16, 32),
        "motion_layers_per_block": 1,
        "motion_num_attention_heads": 2,
        "motion_norm_num_groups": 8,
        "motion_max_seq_length": 8,
    }
    return MotionAdapter(**usual | settings)


def tiny_stable_video(folder: Path) -> Path:
    """The same of Stable Video Diffusion: 64 × 64 pictures, clips of 4 frames, the published scheduler's settings."""
    from diffusers import (
        AutoencoderKLTemporalDecoder,
        StableVideoDiffusionPipeline,
        UNetSpatioTemporalConditionModel,
    )
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    unet = UNetSpatioTemporalConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        block_out_channels=(32, 64),
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=96,
        layers_per_block=1,
        cross_attention_dim=16,
        num_attention_heads=(2, 4),
        num_frames=4,
    )
    vae = AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 4,
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=1,
        latent_channels=4,
        sample_size=64,
    )
    tower = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=224,
        patch_size=56,
    )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        sigma_max=700.0,
        sigma_min=0.002,
        steps_offset=1,
        timestep_spacing="leading",
        timestep_type="continuous",
        use_karras_sigmas=True,
    )
    StableVideoDiffusionPipeline(
        vae=vae,
        image_encoder=CLIPVisionModelWithProjection(tower),
        unet=unet,
        scheduler=scheduler,
        feature_extractor=CLIPImageProcessor(),
    ).save_pretrained(folder)
    return folder


def tiny_autoencoder(**settings: Any) -> Any:
    """64 × 64 pictures to 8 × 8 latents of 4 channels."""
    usual: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (8, 8, 8, 8),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 64,
    }
    return AutoencoderKL(**usual | settings)


def clip_settings(tokenizer: CLIPTokenizer, *, width: int = 16, end: int | None = None) -> CLIPTextConfig:
    """Of a CLIP text encoder of two layers, whose pooled output is projected to 12 numbers.

    `end` is what the settings say of the end's token, where it is not what the tokenizer says: 2 in published ones.
    """
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        projection_dim=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id if end is None else end,
        pad_token_id=tokenizer.pad_token_id,
    )


def tiny_t5(width: int) -> T5EncoderModel:
    """A T5 text encoder of one layer."""
    settings = T5Config(
        vocab_size=len(tiny_t5_tokenizer()), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    return T5EncoderModel(settings)


def tiny_t5_tokenizer() -> T5Tokenizer:
    """Letters, a few words and a few rare ones."""
    letters = [(chr(code), -9.0) for code in range(33, 127)]
    words = [(f"▁{word}", -1.0) for word in (*WORDS, *RARE)]
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *words, *letters]
    return T5Tokenizer(vocab=scores, extra_ids=0, model_max_length=512)


def tiny_qwen3(width: int, *, layers: int = 3) -> Qwen3Model:
    """A Qwen3 whose table of embeddings is larger than its vocabulary, as the published ones' are."""
    settings = Qwen3Config(
        vocab_size=len(tiny_qwen_tokenizer()) + 5,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=2048,
    )
    return Qwen3Model(settings)


def tiny_qwen_tokenizer() -> Qwen2Tokenizer:
    """Bytes, a few words and a few rare ones, with the space before them; the chat template of Qwen3 in short."""
    letters = sorted(ByteLevel.alphabet())
    merges: list[Any] = []
    tokens = [*letters]
    for word in (*(f"Ġ{word}" for word in (*WORDS, *RARE)), "user", "assistant", "system"):
        left = word[0]
        for letter in word[1:]:
            merges.append((left, letter))
            tokens.append(left + letter)
            left += letter
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    marks = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
    vocabulary |= {mark: len(vocabulary) + number for number, mark in enumerate(marks)}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=list(dict.fromkeys(merges)), model_max_length=1024)
    tokenizer.add_special_tokens({"additional_special_tokens": list(marks[1:3])})
    tokenizer.add_tokens(list(marks[3:]))
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_tokenizer(**settings: Any) -> CLIPTokenizer:
    """Letters, a few words and a few rare ones."""
    alphabet = [chr(code) for code in range(33, 127)] + ["Ġ"]
    merges: list[Any] = []
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    for word in (*WORDS, *RARE):
        left = ""
        for number, letter in enumerate(word):
            right = letter + "</w>" if number == len(word) - 1 else letter
            if left:
                merges.append((left, right))
                tokens.append(left + right)
            left += right
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    ids = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=ids, merges=list(dict.fromkeys(merges)), model_max_length=77, **settings)


def tiny_eye(folder: Path, kind: str) -> Path:
    """A random DINO or DINOv2 in a folder as transformers writes it."""
    from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 8,
    }
    settings: dict[str, Any] = {"size": 32, "do_resize": True}  # as facebook/dino-vits16 says it: no cut
    if kind == "vit":
        config = ViTConfig(**shape, intermediate_size=32, image_size=32)
        ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    else:
        Dinov2Model(Dinov2Config(**shape, mlp_ratio=1, image_size=56)).save_pretrained(folder)
        settings = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder
