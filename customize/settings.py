"""What a run was asked for, resolved: every choice that changes the weights, in one frozen value."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backbone.io.console import UserError
from backbone.io.files import read_json
from backbone.models.model import Backbone

FILE = "settings.json"
SHEET = "sheet.png"
INSTANCE_PROMPT = "a {token} {class}"
LISTS = ("sheet_prompts", "rank_pattern", "concept")


@dataclass(frozen=True)
class Subject:
    """One thing to learn: its pictures, its token with the words behind it, and what it is."""

    images: str
    token: str
    class_noun: str
    token_words: str = ""

    def called(self) -> str:
        """How a prompt calls it: `[V] dog`."""
        return tidy(f"{self.token} {self.class_noun}")

    def filled(self, template: str) -> str:
        """A prompt with the token and the class filled in."""
        return tidy(template.replace("{token}", self.token).replace("{class}", self.class_noun))

    def flag(self) -> str:
        """As `--concept` takes it."""
        return ":".join(part for part in (self.images, self.token, self.class_noun, self.token_words) if part)


def read_subject(flag: str) -> Subject:
    """A subject from FOLDER:TOKEN:CLASS, with :WORDS behind it or not; `UserError` for anything else."""
    drive = flag[:2] if re.match(r"[A-Za-z]:[\\/]", flag) else ""  # of a path on Windows
    parts = flag.removeprefix(drive).split(":")
    if len(parts) not in (3, 4) or not all(part.strip() for part in parts):
        raise UserError(f"--concept {flag} is not FOLDER:TOKEN:CLASS, like cat/:[W]:cat. Write it so.")
    return Subject(drive + parts[0], *parts[1:])


@dataclass(frozen=True)
class Settings:
    """The settings of `customize train`. A run is a function of these, the pictures and the model."""

    images: str
    token: str
    class_noun: str
    model: str = "moji"
    instance_prompt: str = INSTANCE_PROMPT
    class_prompt: str = "a {class}"
    token_words: str = ""
    concept: tuple[str, ...] = ()  # further subjects, as `Subject.flag` writes them
    method: str = "lora"
    steps: int = 400
    batch: int = 6
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    prior: str = "base"
    prior_batch: int = 2
    prior_loss_weight: float = 1.0
    prior_draws: int = 64
    num_class_images: int = 48
    learning_rate: float = 1e-3
    lr_warmup_steps: int = 20
    lr_scheduler: str = "cosine"
    optimizer: str = "adamw"
    ema_decay: float = 0.0
    adapter: str = "lora"
    rank: int = 16
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    lora_layers: str = "all"
    rank_pattern: tuple[str, ...] = ()
    train_text_encoder: bool = False
    text_encoder_lr: float = 1e-4
    num_vectors: int = 1
    initializer_token: str = ""
    words_learning_rate: float = 5e-3
    words_share: float = 0.4
    loss_weighting: str = "none"
    snr_gamma: float = 5.0
    noise_offset: float = 0.0
    flip: bool = False
    aspect_buckets: bool = False
    mask: str = "files"
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    precision: str = "auto"
    device: str = "auto"
    quantize: str = ""
    cpu_offload: float = 0.0
    vae_tiling: bool = False
    text_on_cpu: bool = False
    one_by_one: bool = False
    seed: int = 0
    checkpointing_steps: int = 100
    validation_steps: int = 500
    evaluation_steps: int = 125
    patience: int = 0
    scorer: str = ""
    report_to: str = "jsonl"
    push_to_hub: bool = False
    hub_model_id: str = ""
    sheet_prompts: tuple[str, ...] = ()
    sample_steps: int = 25
    guidance: float = 4.0

    def subjects(self) -> list[Subject]:
        """Everything that is learned, the first one in front."""
        first = Subject(self.images, self.token, self.class_noun, self.token_words)
        return [first, *(read_subject(flag) for flag in self.concept)]

    def ranks(self) -> dict[str, int]:
        """The layers with a rank of their own, from `PATTERN=RANK`; `UserError` for anything else."""
        found = {}
        for entry in self.rank_pattern:
            pattern, _, rank = entry.rpartition("=")
            if not pattern or not rank.isdigit() or int(rank) < 1:
                raise UserError(f"--rank_pattern {entry} is not PATTERN=RANK, like attn2=8. Write it so.")
            found[pattern] = int(rank)
        return found

    def called(self) -> str:
        """How a prompt calls the first subject: `[V] dog`."""
        return self.subjects()[0].called()


def read_settings(run: Path) -> Settings:
    """The settings of a run folder; `UserError` when it has none or they are of another version."""
    path = run / FILE
    if not path.is_file():
        raise UserError(f"{run} is not a run of `customize train` ({FILE} is missing). Name another folder.")
    said: dict[str, Any] = read_json(path)["settings"]
    try:
        lists = {name: tuple(said.get(name, ())) for name in LISTS}
        return Settings(**{**said, **lists})
    except TypeError as error:
        raise UserError(f"{path} was written by another version ({error}). Start the run anew.") from error


def as_flags(settings: Settings, out: Path) -> str:
    """The command that repeats a run."""
    flags = ["customize train", f"--images {_quoted(settings.images)}", f"--token {_quoted(settings.token)}"]
    names = {"class_noun": "class", "batch": "train_batch_size", "steps": "max_train_steps"}
    usual = Settings(images="", token="", class_noun="")
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name in ("images", "token", *LISTS):
            continue
        if field.name == "flip":
            flags.append("--flip" if value else "--no-flip")
        elif isinstance(value, bool):
            flags += [f"--{field.name}"] if value else []
        elif value != getattr(usual, field.name) or field.name in ("class_noun", "steps", "seed"):
            flags.append(f"--{names.get(field.name, field.name)} {_quoted(str(value))}")
    flags += [f"--concept {_quoted(flag)}" for flag in settings.concept]
    flags += [f"--rank_pattern {_quoted(pattern)}" for pattern in settings.rank_pattern]
    flags += [f"--validation_prompt {_quoted(prompt)}" for prompt in settings.sheet_prompts]
    return " ".join([*flags, f"--out {_quoted(str(out))}"])


def tidy(prompt: str) -> str:
    """One space between words; `an` before a vowel, `a` before a bracketed token."""
    return " ".join(prompt.split())


def _quoted(text: str) -> str:
    import shlex

    return shlex.quote(text)


def resolved(model: Backbone, asked: dict[str, Any], *, images: str, token: str, class_noun: str) -> Settings:
    """The settings that a run will use: what the user asked for over what works with the model."""
    usual = model.defaults
    rates = METHOD_RATES | {"lora": usual["learning_rate"]} | usual.get("learning_rates", {})
    from_model = {
        "steps": usual["train_steps"] * (2 if asked.get("patience") else 1),  # room to stop in
        "learning_rate": rates.get(asked.get("method") or "lora", usual["learning_rate"]),
        "rank": usual["rank"],
        "batch": usual["batch"],
        "flip": usual.get("flip", False),
        "sample_steps": usual["steps"],
        "guidance": usual["guidance"],
        "sheet_prompts": tuple(usual.get("sheet_prompts", SHEET_PROMPTS)),
        "lora_layers": usual.get("lora_layers", "attention"),
        "prior_batch": usual.get("prior_batch", 1),
        "loss_weighting": usual.get("loss_weighting", "none"),
        "evaluation_steps": 50 if asked.get("patience") else 125,
    }
    wanted = {key: value for key, value in asked.items() if value is not None and value != ()}
    merged = {**from_model, **wanted}
    merged.setdefault("lora_alpha", float(merged["rank"]))
    return Settings(**merged, images=images, token=token, class_noun=class_noun)


METHOD_RATES = {"full": 5e-6, "custom-diffusion": 1e-5}  # where the weights themselves move: as published


SHEET_PROMPTS = (
    "a photo of a {} in the snow",
    "a photo of a {} on the beach",
    "a photo of a {} in a city",
    "a photo of a {} in the jungle",
    "a photo of a red {}",
    "a watercolor painting of a {}",
    "a pencil sketch of a {}",
    "a photo of a {} on a wooden table",
)
