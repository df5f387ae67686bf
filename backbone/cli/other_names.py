"""Our names of other programs' flags and commands, to suggest if an unknown one is typed."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence

CHOOSE = " Choose one of them."
_STEPS = " It counts optimiser steps: epochs times the images or pairs, divided by the batch."
_OF_CONCEPTS = " It is the strength of the concepts."
_IMPORT = " It takes a run; make one of a file: customize import FILE --out runs/NAME"
# Other names → the flags that may be meant (the first that the command has), and a note
FLAGS: Mapping[str, tuple[tuple[str, ...], str]] = {
    **dict.fromkeys(("lr", "rate", "lr-unet", "train-learning-rate"), (("learning-rate",), "")),
    **dict.fromkeys(
        ("lr-text-encoder", "learning-rate-te", "text-encoder-learning-rate"), (("text-encoder-lr",), "")
    ),
    "lr-scheduler-type": (("lr-scheduler",), ""),
    **dict.fromkeys(("optim", "optimiser"), (("optimizer",), "")),
    **dict.fromkeys(
        ("epochs", "epoch", "max-train-epochs", "num-train-epochs", "num-epochs"), (("steps",), _STEPS)
    ),
    "validation-epochs": (("validation-steps",), _STEPS),
    **dict.fromkeys(
        (
            *("iterations", "max-steps", "train-steps", "num-steps", "total-steps", "num-inference-steps"),
            *("num-ddim-steps", "ddim-steps", "num-diffusion-steps", "t-steps"),
        ),
        (("steps",), ""),
    ),
    "sample-num-steps": (("sample-steps",), ""),
    **dict.fromkeys(("save-steps", "save-every", "checkpoint-every"), (("checkpointing-steps",), "")),
    **dict.fromkeys(("eval-steps", "eval-every"), (("evaluation-steps",), "")),
    "sample-prompts": (("validation-prompt",), " It takes one prompt, and may be repeated."),
    **dict.fromkeys(("use-ema", "ema"), (("ema-decay",), " As in --{flag} 0.999.")),
    **dict.fromkeys(
        ("repeats", "num-repeats", "dataset-repeats"),
        (("steps",), " Images are learned equally often for as many steps as it says."),
    ),
    **dict.fromkeys(("batch-size", "bs", "train-batch", "per-device-train-batch-size"), (("batch",), "")),
    "gradient-accumulation-steps": (
        ("micro-batch",),
        " It is the pairs of one forward pass, whose gradients accumulate to --batch.",
    ),
    "max-data-loader-n-workers": (("workers",), ""),
    **dict.fromkeys(
        ("image", "data", "dataset", "data-dir", "dataset-dir", "image-dir", "images-dir", "image-folder"),
        (("images", "pairs"), ""),
    ),
    **dict.fromkeys(
        ("base-model", "base", "ckpt", "checkpoint-path", "model-path", "model-name"), (("model",), "")
    ),
    **dict.fromkeys(
        (
            *("lora", "loras", "lora-path", "lora-weights", "adapter-path", "network-weights"),
            *("embedding", "embeddings", "textual-inversion"),
        ),
        (("concept",), _IMPORT),
    ),
    "strength": (("scale",), _OF_CONCEPTS),
    **dict.fromkeys(("lora-strength", "weight", "lora-weight", "network-mul"), (("scale",), "")),
    **dict.fromkeys(("denoising-strength", "denoise-strength", "denoise"), (("strength",), "")),
    **dict.fromkeys(
        (
            *(
                "cfg",
                "guidance-weight",
                "guidance-scale",
                "true-cfg-scale",
                "cfg-text",
                "sample-guidance-scale",
            ),
            *("cfg-tar", "tar-guidance-scale"),
        ),
        (("guidance",), ""),
    ),
    **dict.fromkeys(
        ("skip", "skip-steps", "t-start", "tstart"),
        (("strength",), " It is the share of the steps that are taken: 1 − skip / steps."),
    ),
    "n-max": (("strength",), " It is n_max / steps."),
    "n-avg": (("draws",), ""),
    "eta": (("sampler",), " --{flag} ancestral adds fresh noise at every step (η = 1), ddim none (η = 0)."),
    "min-timestep": (("timestep-bias-begin", "least-noise"), ""),
    "max-timestep": (("timestep-bias-end",), ""),
    **dict.fromkeys(("cfg-src", "src-guidance-scale"), (("source-guidance",), "")),
    "cfg-image": (("image-guidance",), ""),
    **dict.fromkeys(
        (
            "num-images",
            "n-images",
            "num-samples",
            "n-samples",
            "samples",
            "number",
            "num",
            "n-iter",
            "num-images-per-prompt",
            "num-image-per-prompt",
        ),
        (("count", "per-prompt"), ""),
    ),
    **dict.fromkeys(
        ("size", "image-size", "res"),
        (("resolution", "width"), " It is a number of pixels, as in --{flag} 768."),
    ),
    "w": (("width",), ""),
    "h": (("height",), ""),
    **dict.fromkeys(("alpha", "network-alpha"), (("lora-alpha",), "")),
    **dict.fromkeys(("dim", "lora-rank", "network-rank", "lora-dim", "lora-r"), (("rank",), "")),
    **dict.fromkeys(
        ("target-modules", "lora-target-modules"), (("lora-layers",), " It takes attention or all.")
    ),
    "debiased-estimation-loss": (("loss-weighting",), " As in --{flag} debiased."),
    **dict.fromkeys(("num-vectors-per-token", "n-vectors"), (("num-vectors",), "")),
    **dict.fromkeys(("init-word", "init-token"), (("initializer-token",), "")),
    **dict.fromkeys(("token-string", "token-abstraction"), (("token",), "")),
    **dict.fromkeys(
        (
            *("output", "output-name", "output-path", "save-dir", "save-to", "name"),
            *("outfile", "output-file", "save-path"),
        ),
        (("out",), ""),
    ),
    "huggingface-repo-id": (("hub-model-id",), " It goes with --push-to-hub."),
    "config-file": (("config",), ""),
    "torch-compile": (("compile",), ""),
    **dict.fromkeys(
        ("lowvram", "medvram", "low-vram", "enable-model-cpu-offload", "enable-sequential-cpu-offload"),
        (("vram",), " It takes the GiB of the device, as in --{flag} 8."),
    ),
    "enable-vae-tiling": (("vae-tiling",), ""),
    **dict.fromkeys(("scheduler", "sampler-name", "sampling-method"), (("sampler", "lr-scheduler"), "")),
    **dict.fromkeys(("gpu", "gpus", "cuda"), (("device",), " As in --{flag} cuda:0.")),
    **dict.fromkeys(
        ("dtype", "torch-dtype", "fp16", "bf16", "half"), (("precision",), " As in --{flag} bf16.")
    ),
    "fp8-base": (("quantize",), " As in --{flag} 8bit."),
    **dict.fromkeys(
        ("load-in-4bit", "load-in-8bit", "quantization", "quantize-base"),
        (("quantize",), " As in --{flag} nf4."),
    ),
    **dict.fromkeys(("neg", "negative-prompts", "negative-prompt", "uncond"), (("negative",), "")),
    **dict.fromkeys(
        ("text", "caption", "positive", "positive-prompt"), (("prompts", "prompt", "instruction"), "")
    ),
    "src-prompt": (("source",), ""),
    **dict.fromkeys(("tar-prompt", "tgt-prompt"), (("target", "prompt", "instruction"), "")),
    **dict.fromkeys(("blend-word", "blend-words", "lb-words"), (("blend",), "")),
    **dict.fromkeys(
        ("equalizer", "equalizer-params", "eq-params"), (("reweight",), " As in --{flag} silver=2.")
    ),
    "mask-image": (("mask",), ""),
    "generator": (("seed",), " It is a whole number."),
    "prompt": (("target", "instruction", "prompts"), ""),
    "target": (("prompt", "instruction", "prompts"), ""),
    "instruction": (("prompt", "target"), ""),
    **dict.fromkeys(("frames", "num-frames"), (("count",), "")),
    **dict.fromkeys(
        ("reward-fn", "reward-function", "reward-model", "choice-model"),
        (("online", "scorer"), " It takes a scorer."),
    ),
    **dict.fromkeys(("loss-fn", "objective", "algo", "algorithm"), (("loss", "method"), "")),
}
_ENCODED_ONCE = "Latents and prompts are encoded once and kept, always"
_ATTENTION = "PyTorch chooses its fastest attention and products by itself"
_SAFETENSORS = (
    "Weights are read and written as safetensors, always; customize export writes them for other tools"
)
_CAPTIONS = "Captions are learned as they stand"
_ADAPTER = (
    "A file says itself which kind of adapter it holds, and --method and --adapter choose what is trained"
)
_MODEL = "What a model predicts, its noise levels and its family are read from its own files"
_BETAS = "AdamW has the usual β and ε (0.9, 0.999, 1e-8)"
_RATE = "The rate follows --lr-scheduler, cosine or constant, and has no cycles and powers"
_CHECKPOINTS = "A run keeps its newest checkpoint, and best/ where it has a scorer"
_LOGS = "Metrics are written into the run folder (log.jsonl)"
_BUCKETS = "Buckets follow from --resolution and --aspect-buckets"
_LOGIN = "The hub is asked with your own login (hf auth login, or HF_TOKEN)"
_PRODIGY = "Prodigy runs with decoupled decay, bias correction and a safeguarded warm-up, always"
_NOISE = "Noise is independent at every pixel, but for --noise-offset"
_LOSS = "The loss is the squared error, always"
_FIXED_NOISE = "How much noise a step adds is the method's: none, but in edit-friendly inversions"
# Flags of other programs for what is always so here, or never → the reason
NEEDLESS: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "cache-latents",
            "cache-latents-to-disk",
            "cache-text-encoder-outputs",
            "cache-text-encoder-outputs-to-disk",
            "pre-compute-text-embeddings",
        ),
        _ENCODED_ONCE,
    ),
    **dict.fromkeys(
        ("enable-xformers-memory-efficient-attention", "xformers", "sdpa", "mem-eff-attn", "allow-tf32"),
        _ATTENTION,
    ),
    **dict.fromkeys(("save-model-as", "use-safetensors"), _SAFETENSORS),
    **dict.fromkeys(("network-module", "network-args"), _ADAPTER),
    **dict.fromkeys(
        (
            *(
                "shuffle-caption",
                "keep-tokens",
                "keep-tokens-separator",
                "caption-separator",
                "weighted-captions",
            ),
            *("caption-prefix", "caption-suffix", "caption-dropout-rate", "caption-tag-dropout-rate"),
        ),
        _CAPTIONS,
    ),
    **dict.fromkeys(
        ("v2", "v-parameterization", "prediction-type", "sdxl", "is-turbo", "zero-terminal-snr"), _MODEL
    ),
    "variant": "Weights of a variant (fp16) are found by themselves",
    **dict.fromkeys(("adam-beta1", "adam-beta2", "adam-epsilon"), _BETAS),
    **dict.fromkeys(
        (
            *("lr-num-cycles", "lr-power", "lr-decay-steps"),
            *("lr-scheduler-num-cycles", "lr-scheduler-power", "lr-scheduler-args"),
        ),
        _RATE,
    ),
    **dict.fromkeys(
        ("prodigy-decouple", "prodigy-use-bias-correction", "prodigy-safeguard-warmup"), _PRODIGY
    ),
    **dict.fromkeys(
        (
            *("checkpoints-total-limit", "save-total-limit", "save-last-n-steps", "save-last-n-epochs"),
            *("save-state", "save-state-on-train-end"),
        ),
        _CHECKPOINTS,
    ),
    **dict.fromkeys(
        ("logging-dir", "log-prefix", "log-tracker-name", "tracker-name", "wandb-run-name", "run-name"), _LOGS
    ),
    **dict.fromkeys(
        ("bucket-no-upscale", "min-bucket-reso", "max-bucket-reso", "bucket-reso-steps"), _BUCKETS
    ),
    **dict.fromkeys(("hub-token", "hf-token", "huggingface-token", "use-auth-token"), _LOGIN),
    **dict.fromkeys(
        ("masked-loss", "alpha-mask"),
        "Masks beside the images (img.mask.png) weight the loss where there are some",
    ),
    **dict.fromkeys(
        ("full-fp16", "full-bf16"), "Trained weights are fp32, always; --precision is the frozen model's"
    ),
    **dict.fromkeys(
        ("no-half-vae", "upcast-vae"),
        "The autoencoder is loaded in fp32 where its settings say that fp16 overflows",
    ),
    "network-train-unet-only": "The text encoders are trained with --train-text-encoder alone",
    **dict.fromkeys(("safety-checker", "disable-safety-checker"), "No safety checker is loaded"),
    "caption-extension": "Captions are read from .txt and .caption files, whichever there are",
    "clip-skip": "Prompts are read at the layer of the text encoder that the model's own files say",
    **dict.fromkeys(
        ("multires-noise-iterations", "multires-noise-discount", "ip-noise-gamma", "adaptive-noise-scale"),
        _NOISE,
    ),
    **dict.fromkeys(("huber-schedule", "huber-c", "huber-scale", "loss-type"), _LOSS),
    "revision": "Of a model on the hub the main branch is read (for another, name the folder of hf download)",
    "local-rank": "accelerate launch tells every process its number",
    "n-min": "Every step after the first edited one is edited (n_min = 0)",
    "eta": _FIXED_NOISE,
    "scale-lr": "The learning rate is as it is given, whatever the batch",
}
# Flags with which other programs change an image
IMAGE_FLAGS = frozenset(
    {"image", "init-image", "init-img", "input-image", "mask", "mask-image", "denoising-strength", "denoise"}
)
SDEDIT = "edit sdedit IMAGE --prompt WORDS"  # the command that does so here
COMMANDS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("generate", "gen", "infer", "inference", "draw", "predict", "txt2img", "text2img", "t2i"),
        ("sample",),
    ),
    **dict.fromkeys(
        (
            "dreambooth",
            "finetune",
            "fine-tune",
            "tune",
            "fit",
            "lora",
            "train-lora",
            "dpo",
            "kto",
            "ddpo",
            "rlhf",
        ),
        ("train",),
    ),
    **dict.fromkeys(("img2img", "i2i", "image2image", "inpaint", "inpainting"), ("sdedit",)),
    **dict.fromkeys(("pix2pix", "instruct-pix2pix", "kontext"), ("instruct",)),
    **dict.fromkeys(
        ("masactrl", "plug-and-play", "pnp", "prompt-to-prompt", "p2p", "null-text", "replace"),
        ("invert-and-replace",),
    ),
    **dict.fromkeys(("erase", "object-removal"), ("remove",)),
    **dict.fromkeys(("convert", "to-kohya", "to-comfyui", "to-diffusers"), ("export",)),
    **dict.fromkeys(("eval", "benchmark", "score"), ("evaluate", "rank")),
    **dict.fromkeys(("annotate", "rate", "vote"), ("label",)),
}


def describe_flag(flag: str, command: str, names: Mapping[str, str]) -> str:
    """The message about an unknown flag that has another name here or is not needed; "" for other flags.

    `names` maps the command's flags, without their hyphens, to the name that its help shows.
    """
    word = flag.strip("-").replace("_", "-").lower()
    candidates, note = FLAGS.get(word, ((), ""))
    name = next((names[candidate] for candidate in candidates if candidate in names), "")
    if name:
        return f"{flag} is no flag of {command}. Write --{name}.{note.format(flag=name)}"
    reason = NEEDLESS.get(word)
    return f"{flag} is no flag of {command}. {reason}: leave it out." if reason else ""


def find_setting(key: str, names: Collection[str]) -> tuple[str, str]:
    """The setting that another program calls by this key, and a note; ("", "") if there is none."""
    candidates, note = FLAGS.get(key.replace("_", "-").lower(), ((), ""))
    name = next((setting for flag in candidates if (setting := flag.replace("-", "_")) in names), "")
    return name, "" if "{flag}" in note or not name else note


def find_command(name: str, names: Collection[str]) -> str:
    """The command that another program calls by this name; "" if there is none."""
    return next(
        (command for command in COMMANDS.get(name.lower().replace("_", "-"), ()) if command in names), ""
    )


def suggest_setting(key: str, names: Sequence[str]) -> str:
    """A suggestion for an unknown key, which is another program's or misspelt, to follow a sentence."""
    name, note = find_setting(key, names)
    if not name and key.replace("_", "-").lower() in IMAGE_FLAGS and "sampler" in names:
        return f" It draws from words. To change an image: {SDEDIT} (in Python edit.sdedit)"
    if not name and (reason := NEEDLESS.get(key.replace("_", "-").lower())):
        return f" {reason}: leave it out."
    return f" That is {name} here.{note}" if name else find_nearest(key, names)


def find_nearest(word: str, names: Sequence[str]) -> str:
    """“ Did you mean …?”, to follow a sentence; without a similar word CHOOSE, or "" for a long list."""
    matches = difflib.get_close_matches(word.lower(), names, n=1)
    return f" Did you mean {matches[0]}?" if matches else CHOOSE if len(names) < 12 else ""
