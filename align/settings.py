"""What a training run was asked for, resolved: every choice that changes the weights, in one frozen value."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backbone.io.console import UserError
from backbone.io.files import read_json

FILE = "settings.json"
EVALUATIONS = "evaluations.jsonl"
SUMMARY = "summary.json"
REPORT = "report.html"
EVALUATION = "evaluation.json"
ROUNDS = "rounds"  # of a run with --online: a folder of `align sample` each
REWARDS = "rewards.jsonl"  # of a run with --online: a line each round
PAIR_LOSSES = ("dpo", "ipo", "hinge", "kto", "mapo", "dspo", "sft")
REWARD_LOSSES = ("draft", "ddpo")  # of a scorer's numbers, with --online alone
LOSSES = (*PAIR_LOSSES, *REWARD_LOSSES)
REFERENCES = ("bank", "live", "copy")
WEIGHTINGS = (
    "none",
    "min-snr",
    "debiased",
)  # `align.objectives.preference.LEVEL_WEIGHTS` has their functions
BETAS = {  # where 2000 is too much
    "mapo": 500.0,  # its authors'
    "ipo": 200.0,  # it asks for a margin of 1/β, and at 2000 has it at once
}
BY_MODEL = (  # what `align` in a model's `limner.json` may say, so that a repeating command always does
    "beta",
    "loss_weighting",
    "least_noise",
    "safeguard",
    "steps",
    "batch",
    "learning_rate",
    "rank",
    "lora_alpha",
    "lora_layers",
)
FLAGS = {"batch": "train_batch_size", "loss": "loss_type", "beta": "beta_dpo"}


@dataclass(frozen=True)
class Settings:
    """The settings of `align train`. A run is a function of these, the preferences and the model.

    `beta` means the same for every loss (`align.objectives.losses`). `loss_weighting` weighs errors by their noise
    level before the loss compares them, and no level below the share `least_noise` of the noise path is trained on.
    With `random_crop` = N a draw cuts all pictures of a record at one of N places instead of the centre.

    `reference` is `bank` (the base's errors at `draws` fixed draws of each pair, computed at the first visit and read
    afterwards), `live` (computed each time, with the new adapter off) or `copy` (computed each time, by a frozen
    second network). `batch` counts pairs.

    With `online`, a scorer's name, there are no `pairs`: in each of `rounds` the model draws `prompts`, `per_prompt`
    pictures of each, and learns from how the scorer ranks them; `draft` and `ddpo` learn from its numbers instead,
    and then `batch` counts pictures.
    """

    pairs: str
    model: str = "moji"
    concepts: tuple[str, ...] = ()
    user: str = ""
    limit: int = 0
    split: str = "train"
    ties: str = "drop"
    held_out: float = 0.1
    skip_bad: bool = False
    any_model: bool = False
    loss: str = "dpo"
    beta: float = 2000.0
    label_smoothing: float = 0.0
    sft_weight: float = 0.0
    safeguard: float = -1.0
    mapo_weight: float = 0.1
    dspo_pull: float = 1.0
    full: bool = False
    reference: str = "bank"
    draws: int = 16
    prompt_dropout: float = 0.1
    flip: bool = False
    random_crop: int = 0
    loss_weighting: str = "none"
    least_noise: float = 0.0
    steps: int = 300
    batch: int = 4
    micro_batch: int = 0
    gradient_checkpointing: bool = False
    learning_rate: float = 1e-4
    lr_warmup_steps: int = 20
    lr_scheduler: str = "constant"
    rank: int = 16
    lora_alpha: float = 16.0
    lora_layers: str = "attention"
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    evaluation_steps: int = 50
    evaluation_draws: int = 4
    winner_tolerance: float = 0.05
    on_winner_rise: str = "warn"
    checkpointing_steps: int = 50
    online: str = ""
    prompts: str = ""
    rounds: int = 4
    per_prompt: int = 4
    reward_steps: int = 1
    clip_range: float = 1e-4
    sample_steps: int = 0
    guidance: float = -1.0
    precision: str = "auto"
    device: str = "auto"
    quantize: str = ""
    cpu_offload: float = 0.0
    vae_tiling: bool = False
    text_on_cpu: bool = False
    one_by_one: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("loss", self.loss, LOSSES)
        _one_of("reference", self.reference, REFERENCES)
        _one_of("ties", self.ties, ("drop", "model"))
        _one_of("on_winner_rise", self.on_winner_rise, ("warn", "stop"))
        _one_of("loss_weighting", self.loss_weighting, WEIGHTINGS)
        _one_of("lr_scheduler", self.lr_scheduler, ("constant", "cosine"))
        if not 0 <= self.held_out < 1:
            raise UserError(f"--held-out is a share of the prompts below 1, not {self.held_out}.")
        if not 0 <= self.least_noise < 1:
            raise UserError(
                f"--least-noise is a share of the noise path below 1, not {self.least_noise}. Leave it out for all."
            )
        if not 0 <= self.label_smoothing <= 0.5:
            raise UserError(f"--label-smoothing is between 0 and 0.5, not {self.label_smoothing}.")
        if self.safeguard > 1:
            raise UserError(f"--safeguard is Diffusion-SDPO's μ, between 0 and 1, not {self.safeguard}.")
        if self.full and self.reference == "live":
            raise UserError(
                "With --full the base is gone once training begins. Use --reference bank or copy."
            )
        if not self.full and self.reference == "copy":
            raise UserError("A LoRA's base is there with the adapter off. Use --reference bank or live.")
        if self.loss == "dspo" and self.reference == "bank":
            raise UserError(
                "DSPO needs the base's predictions, not its errors alone. Use --reference live (or copy)."
            )
        if self.ties == "model" and self.loss not in ("dpo", "ipo", "hinge"):
            raise UserError(f"{self.loss} cannot say what a tie is. Use --ties drop.")
        if self.safeguard >= 0 and self.loss == "kto":
            raise UserError(
                "The safeguard holds a pair's loser back; KTO knows no pairs. Use another --loss-type."
            )
        self._check_online()

    def _check_online(self) -> None:
        if self.loss in REWARD_LOSSES and not self.online:
            raise UserError(
                f"{self.loss} learns from a scorer's numbers. Add --online SCORER and --prompts FILE."
            )
        if not self.online:
            return
        if self.full:
            raise UserError(
                "--online trains a LoRA: its reference is the adapter switched off. Leave out --full."
            )
        if self.reference != "live":
            raise UserError("--online asks the base at every round's new pairs. Leave out --reference.")
        if self.steps < self.rounds:
            raise UserError(f"{self.steps} steps do not fill {self.rounds} rounds. Lower --rounds.")

    @property
    def by_pairs(self) -> bool:
        """Whether the loss looks at pairs rather than at single pictures."""
        return self.loss != "kto"


def resolved(asked: Mapping[str, Any], usual: Mapping[str, Any]) -> Settings:
    """The settings of a run: what the user asked for over what works with the model.

    That is `align` in `limner.json`, and `draft` there for what reward gradients want otherwise.
    """
    from_model = {
        "rank": usual.get("rank", 16),
        "lora_layers": usual.get("lora_layers", "attention"),
        **usual.get("align", {}),
    }
    if asked.get("loss") == "draft":
        from_model |= usual.get("draft", {})
    if asked.get("loss") in BETAS:
        from_model.pop("beta", None)  # which was chosen for another loss
    if asked.get("loss") == "kto":
        from_model.pop("safeguard", None)  # KTO knows no pairs
    merged = {**from_model, **{name: value for name, value in asked.items() if value is not None}}
    merged.setdefault("lora_alpha", float(merged["rank"]))
    merged.setdefault("beta", BETAS.get(merged.get("loss", "dpo"), 2000.0))
    if "reference" not in merged and merged.get("loss") == "dspo":
        merged["reference"] = "copy" if merged.get("full") else "live"
    if merged.get("online"):
        merged.setdefault("reference", "live")  # a round's pairs are seldom visited twice
        merged.setdefault("sample_steps", int(usual.get("steps", 0)))
        merged.setdefault("guidance", float(usual.get("guidance", -1)))
    return Settings(**merged)


def read_settings(run: Path) -> Settings:
    """The settings of a run folder; `UserError` when it has none or they are of another version."""
    path = run / FILE
    if not path.is_file():
        raise UserError(f"{run} is not a run of `align train` ({FILE} is missing). Name another folder.")
    said: dict[str, Any] = read_json(path).get("settings", {})
    try:
        return Settings(**{**said, "concepts": tuple(said.get("concepts", ()))})
    except TypeError as error:
        raise UserError(
            f"{path} was not written by this version of `align train` ({error}). Start the run anew."
        ) from error


def as_command(settings: Settings, out: Path) -> str:
    """The command that repeats a run, whatever is usual for its model by then."""
    words = ["align train", *([shlex.quote(settings.pairs)] if settings.pairs else [])]
    usual = Settings(pairs="")
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        flag = "--" + FLAGS.get(field.name, field.name).replace("_", "-")
        usually = field.name not in BY_MODEL and value == getattr(usual, field.name)
        if field.name == "pairs" or usually:
            continue
        if field.name == "concepts":
            words += [f"--concept {shlex.quote(concept)}" for concept in value]
        elif isinstance(value, bool):
            words.append(flag)
        else:
            words.append(f"{flag} {shlex.quote(str(value))}")
    return " ".join([*words, f"--out {shlex.quote(str(out))}"])


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"There is no {name.replace('_', ' ')} {value}. Choose one of {', '.join(known)}.")
