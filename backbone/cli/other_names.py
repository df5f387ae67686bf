"""Our names of other programs' flags and commands, to suggest if an unknown one is typed."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence

CHOOSE = " Choose one of them."
_STEPS = " It counts optimiser steps, and there are no epochs: images times epochs, by the images of a batch."
# Other names → the flags that may be meant (the first that the command has), and a note
FLAGS: Mapping[str, tuple[tuple[str, ...], str]] = {
    **dict.fromkeys(("lr", "rate", "lr-unet"), (("learning-rate",), "")),
    **dict.fromkeys(
        ("epochs", "epoch", "max-train-epochs", "num-train-epochs", "num-epochs"), (("steps",), _STEPS)
    ),
    "validation-epochs": (("validation-steps",), _STEPS),
    **dict.fromkeys(
        ("iterations", "max-steps", "train-steps", "num-steps", "total-steps", "num-inference-steps"),
        (("steps",), ""),
    ),
    **dict.fromkeys(
        ("repeats", "num-repeats", "dataset-repeats"),
        (("steps",), " Images are learned equally often for as many steps as it says."),
    ),
    **dict.fromkeys(("batch-size", "bs", "train-batch"), (("batch",), "")),
    **dict.fromkeys(
        ("image", "data", "dataset", "data-dir", "dataset-dir", "image-dir", "images-dir", "image-folder"),
        (("images", "pairs"), ""),
    ),
    **dict.fromkeys(
        ("base-model", "base", "ckpt", "checkpoint-path", "model-path", "model-name"), (("model",), "")
    ),
    **dict.fromkeys(
        ("lora", "loras", "lora-path", "lora-weights", "adapter-path"),
        (("concept",), " It takes a run; make one of a file: customize import FILE --out runs/NAME"),
    ),
    **dict.fromkeys(("lora-strength", "strength", "weight", "lora-weight"), (("scale",), "")),
    **dict.fromkeys(("cfg", "guidance-weight", "guidance-scale"), (("guidance",), "")),
    **dict.fromkeys(
        (
            "num-images",
            "n-images",
            "num-samples",
            "n-samples",
            "samples",
            "number",
            "num",
            "num-images-per-prompt",
        ),
        (("count", "per-prompt"), ""),
    ),
    **dict.fromkeys(
        ("size", "image-size", "res"),
        (("resolution", "width"), " It is a number of pixels, as in --{flag} 768."),
    ),
    **dict.fromkeys(("alpha", "network-alpha"), (("lora-alpha",), "")),
    **dict.fromkeys(("dim", "lora-rank", "network-rank", "lora-dim"), (("rank",), "")),
    **dict.fromkeys(("output", "output-name", "output-path", "save-dir", "save-to", "name"), (("out",), "")),
    **dict.fromkeys(("scheduler", "sampler-name", "sampling-method"), (("sampler", "lr-scheduler"), "")),
    **dict.fromkeys(("gpu", "gpus", "cuda"), (("device",), " As in --{flag} cuda:0.")),
    **dict.fromkeys(("dtype", "fp16", "bf16", "half"), (("precision",), " As in --{flag} bf16.")),
    **dict.fromkeys(
        ("load-in-4bit", "load-in-8bit", "quantization", "quantize-base"),
        (("quantize",), " As in --{flag} nf4."),
    ),
    **dict.fromkeys(("neg", "negative-prompts", "negative-prompt", "uncond"), (("negative",), "")),
    **dict.fromkeys(("text", "caption"), (("prompts", "prompt", "instruction"), "")),
    "mask-image": (("mask",), ""),
    "generator": (("seed",), " It is a whole number."),
    "prompt": (("target", "instruction", "prompts"), ""),
    "target": (("prompt", "instruction", "prompts"), ""),
    "instruction": (("prompt", "target"), ""),
    **dict.fromkeys(("frames", "num-frames"), (("count",), "")),
    **dict.fromkeys(("loss-fn", "objective", "algo", "algorithm"), (("loss", "method"), "")),
}
_ENCODED_ONCE = "Latents and prompts are encoded once and kept, always"
_ATTENTION = "PyTorch chooses its fastest attention and products by itself"
_SAFETENSORS = "Weights are written as safetensors, always; customize export writes them for other tools"
_CAPTIONS = "Captions are learned as they stand"
# Flags of other programs for what is always so here, or never → the reason
NEEDLESS: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "cache-latents",
            "cache-latents-to-disk",
            "cache-text-encoder-outputs",
            "cache-text-encoder-outputs-to-disk",
        ),
        _ENCODED_ONCE,
    ),
    **dict.fromkeys(
        ("enable-xformers-memory-efficient-attention", "xformers", "sdpa", "mem-eff-attn", "allow-tf32"),
        _ATTENTION,
    ),
    **dict.fromkeys(("save-model-as", "use-safetensors"), _SAFETENSORS),
    **dict.fromkeys(("network-module", "network-args"), "What is trained is said by --method and --adapter"),
    **dict.fromkeys(("shuffle-caption", "keep-tokens", "caption-dropout-rate"), _CAPTIONS),
    "caption-extension": "Captions are read from .txt and .caption files, whichever there are",
    "clip-skip": "Prompts are read at the layer of the text encoder that the model's own files say",
    "scale-lr": "The learning rate is as it is given, whatever the batch",
}
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
    if reason := NEEDLESS.get(word):
        return f"{flag} is no flag of {command}. {reason}: leave it out."
    return f"{flag} is no flag of {command}. Write --{name}.{note.format(flag=name)}" if name else ""


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
    if not name and (reason := NEEDLESS.get(key.replace("_", "-").lower())):
        return f" {reason}: leave it out."
    return f" That is {name} here.{note}" if name else find_nearest(key, names)


def find_nearest(word: str, names: Sequence[str]) -> str:
    """“ Did you mean …?”, to follow a sentence; without a similar word CHOOSE, or "" for a long list."""
    matches = difflib.get_close_matches(word.lower(), names, n=1)
    return f" Did you mean {matches[0]}?" if matches else CHOOSE if len(names) < 12 else ""
