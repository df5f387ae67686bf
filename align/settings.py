"""The settings of `align`; for a training run every choice that changes the weights, in one frozen dataclass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from backbone.cli.flags import DATA, SAMPLING, SCORING, JsonOptions, PlaceOptions
from backbone.cli.options import Option
from backbone.cli.sampling import MOST_STEPS, CountOption, DrawingOptions, SamplingSettings
from backbone.cli.values import repeat
from backbone.io.console import UserError
from backbone.io.files import read_json
from backbone.io.records import RunRecord
from backbone.models.defaults import FILE as FILE_OF_MODEL
from backbone.models.defaults import OF_ALIGN, read_section
from backbone.training.settings import FILE as FILE
from backbone.training.settings import (
    SCHEDULES,
    WEIGHTINGS,
    PrepareOptions,
    TrainingSettings,
    read_run_settings,
    resolve,
)

EVALUATIONS = "evaluations.jsonl"
SUMMARY = "summary.json"
REPORT = "report.html"
EVALUATION = "evaluation.json"
ROUNDS = "rounds"  # of a run with --online: one folder of `align sample` per round
REWARDS = "rewards.jsonl"  # of a run with --online: one line per round
SOURCE_HELP = (
    "Of align sample or prepare, chosen/ and rejected/ (w/, l/), a .jsonl, .csv, .parquet, .tar or a hub id."
)
PAIR_LOSSES = ("dpo", "ipo", "hinge", "kto", "mapo", "dspo", "sft")
REWARD_LOSSES = ("draft", "ddpo")  # of a scorer's numbers, with --online alone
LOSSES = (*PAIR_LOSSES, *REWARD_LOSSES)
REFERENCES = ("cached", "live", "copy")
BETAS = {  # of losses for which 2000 is too large
    "mapo": 500.0,  # its authors'
    "ipo": 200.0,  # it aims at a margin of 1/β, which at 2000 is reached at once
}
OF_PAIRS = {"loss": PAIR_LOSSES}
OFFLINE = {"online": ("",)}
# For pairs that are given: in a round all images are the model's own, uncropped, and no two are equally good
GIVEN_PAIRS = {**OF_PAIRS, **OFFLINE}
A_LORA = {"full": (False,)}
WITH_BETA = ("dpo", "ipo", "hinge", "kto", "mapo", "dspo")
COMPARES = ("dpo", "ipo", "hinge", "mapo", "dspo")  # the two images of a pair
WITHOUT_REFERENCE = ("mapo", "sft")
IN_ROUNDS = {"online": (), "loss": (*PAIR_LOSSES, "ddpo")}


@dataclass(frozen=True, kw_only=True)
class Settings(TrainingSettings):
    """The settings of `align train`. A run is a function of these, the preferences and the model.

    `beta` means the same for every loss (`align.objectives.losses`). `loss_weighting` weighs errors by their noise
    level before the loss compares them, and no level below the share `least_noise` of the noise path is trained on.
    With `random_crop` = N a draw crops all images of a record at one of N positions instead of the centre.

    `reference` is `cached` (the base's errors at `draws` fixed draws of each pair, computed at the first visit and read
    afterwards), `live` (computed each time, with the new adapter off) or `copy` (computed each time, by a frozen
    second network). `batch` counts pairs.

    With `online`, a scorer's name, there are no `pairs`: in each of `rounds` the model draws `prompts`, `per_prompt`
    images of each, and learns from how the scorer ranks them; `draft` and `ddpo` learn from its numbers instead,
    and then `batch` counts images.
    """

    NEEDS: ClassVar[Mapping[str, Any]] = {
        **dict.fromkeys(("rank", "lora_alpha", "lora_layers", "quantize", "cpu_offload"), A_LORA),
        "gradient_checkpointing": OF_PAIRS,
    }

    pairs: Annotated[str, Option(SOURCE_HELP, "Data", argument=True, metavar="PAIRS")] = ""
    concepts: Annotated[
        tuple[str, ...],
        Option(
            "A run folder of customize or align train to build on; repeatable.",
            "Data",
            flag="concept",
            metavar="RUN",
        ),
    ] = ()
    user: Annotated[
        str,
        Option("Only this person's choices.", "Data", default_text="everybody's", needs=OFFLINE),
    ] = ""
    limit: Annotated[
        int,
        Option(
            "Read only this many rows, the first ones; a dataset is then streamed.",
            "Data",
            default_text="all",
            needs=OFFLINE,
            min=1,
        ),
    ] = 0
    split: Annotated[str, Option("Split of a dataset on the hub.", "Data", needs=OFFLINE)] = "train"
    skip_bad: Annotated[bool, Option("Skip bad records instead of stopping.", "Data", needs=OFFLINE)] = False
    any_model: Annotated[
        bool, Option("Learn from images that another model drew.", "Data", needs=OFFLINE)
    ] = False
    held_out: Annotated[
        float, Option("Share of the prompts held out for evaluation.", "Data", needs=OF_PAIRS, min=0, max=1)
    ] = 0.1
    flip: Annotated[
        bool,
        Option("Train on mirrored pairs too.", "Data", aliases=("random-flip",), needs=OF_PAIRS),
    ] = False
    random_crop: Annotated[
        int,
        Option(
            "Crop both images of a pair at one of N places.",
            "Data",
            default_text="at the centre",
            needs=GIVEN_PAIRS,
            off=0,
            min=0,
        ),
    ] = 0
    prompt_dropout: Annotated[
        float,
        Option(
            "Share of the noise samples trained with the empty prompt; 0: none.",
            "Data",
            aliases=("proportion-empty-prompts",),
            needs=OF_PAIRS,
            off=0,
            min=0,
            max=1,
        ),
    ] = 0.1
    loss: Annotated[
        str,
        Option(
            "The loss; draft (reward gradients) and ddpo (policy gradients) need --online.",
            "Preference",
            aliases=("loss-type",),
            choices=LOSSES,
        ),
    ] = "dpo"
    beta: Annotated[
        float,
        Option(
            "β: larger keeps the model closer to the base; means the same for every loss.",
            "Preference",
            aliases=("beta-dpo",),
            by_model=True,
            default_text="by model; 2000, mapo 500, ipo 200",
            needs={"loss": WITH_BETA},
            min=0,
        ),
    ] = 2000.0
    ties: Annotated[
        str,
        Option(
            "Skip ties, or train their two images to be equally likely.",
            "Preference",
            choices=("drop", "model"),
            needs=GIVEN_PAIRS,
        ),
    ] = "drop"
    label_smoothing: Annotated[
        float,
        Option(
            "Assumed share of wrong labels; 0: none.",
            "Preference",
            needs={"loss": ("dpo", "ipo", "hinge", "mapo", "sft")},
            off=0,
            min=0,
            max=0.5,
        ),
    ] = 0.0
    sft_weight: Annotated[
        float,
        Option(
            "Weight of the winners' denoising error, added to the loss (SFT).",
            "Preference",
            needs={"loss": COMPARES},
            off=0,
            min=0,
        ),
    ] = 0.0
    safeguard: Annotated[
        float,
        Option(
            "Diffusion-SDPO's μ; below 0: off.",
            "Preference",
            by_model=True,
            needs={"loss": COMPARES},
            off=-1,
            max=1,
        ),
    ] = -1.0
    mapo_weight: Annotated[
        float, Option("Weight of MaPO's margin.", "Preference", needs={"loss": ("mapo",)}, min=0)
    ] = 0.1
    dspo_pull: Annotated[
        float,
        Option(
            "Weight of DSPO's term towards the base model.", "Preference", needs={"loss": ("dspo",)}, min=0
        ),
    ] = 1.0
    reference: Annotated[
        str,
        Option(
            "Where the base model's errors come from: cached: fixed noise samples, computed once; live: every step "
            "anew; copy: a frozen copy.",
            "Preference",
            choices=REFERENCES,
            default_text="cached; dspo and --online: live",
            needs=OF_PAIRS,
        ),
    ] = "cached"
    draws: Annotated[int, Option("Noise samples of each pair.", "Preference", needs=OF_PAIRS, min=1)] = 16
    least_noise: Annotated[
        float,
        Option(
            "Train only on noise levels above this share of the noise path.",
            "Preference",
            by_model=True,
            needs=OF_PAIRS,
            off=0,
            min=0,
            max=1,
        ),
    ] = 0.0
    online: Annotated[
        str,
        Option(
            "Train online, in rounds: draw images, rank them by this scorer, train on the pairs.",
            "Online",
            default_text="off",
            metavar="SCORER",
            code=True,
        ),
    ] = ""
    prompts: Annotated[
        str,
        Option("File of prompts to draw, one on each line.", "Online", needs={"online": ()}, metavar="FILE"),
    ] = ""
    rounds: Annotated[int, Option("Rounds of drawing and training.", "Online", needs=IN_ROUNDS, min=1)] = 4
    per_prompt: Annotated[
        int, Option("Images of each prompt in a round.", "Online", needs=IN_ROUNDS, min=2)
    ] = 4
    reward_steps: Annotated[
        int,
        Option(
            "draft: K, the last sampler steps that gradients flow through.",
            "Online",
            by_model=True,
            needs={"loss": ("draft",)},
            min=1,
        ),
    ] = 1
    clip_range: Annotated[
        float,
        Option("ddpo: clipping range of the likelihood ratio.", "Online", needs={"loss": ("ddpo",)}, min=0),
    ] = 1e-4
    sample_steps: Annotated[
        int,
        Option(
            "Sampler steps.", "Online", default_text="by model", needs={"online": ()}, min=1, max=MOST_STEPS
        ),
    ] = 0
    guidance: Annotated[
        float,
        Option(
            "Guidance scale; 1: no guidance.",
            "Online",
            aliases=("guidance-scale",),
            default_text="by model",
            needs={"online": ()},
            min=0,
        ),
    ] = -1.0
    full: Annotated[bool, Option("Train all weights of the denoiser instead of a LoRA.", "Method")] = False
    steps: Annotated[
        int, Option("Optimiser steps.", "Training", aliases=("max-train-steps",), by_model=True, min=1)
    ] = 300
    batch: Annotated[
        int, Option("Pairs in a batch.", "Training", aliases=("train-batch-size",), by_model=True, min=1)
    ] = 4
    micro_batch: Annotated[
        int,
        Option(
            "Pairs in one forward pass; gradients accumulate to the batch.",
            "Training",
            default_text="the whole batch",
            min=1,
        ),
    ] = 0
    lr_scheduler: Annotated[
        str,
        Option(
            "Learning-rate schedule after the warm-up: cosine decay to 0, or constant.",
            "Training",
            by_model=True,
            choices=SCHEDULES,
        ),
    ] = "constant"
    loss_weighting: Annotated[
        str,
        Option(
            "Weight of the errors per timestep.", "Loss", by_model=True, choices=WEIGHTINGS, needs=OF_PAIRS
        ),
    ] = "none"
    evaluation_steps: Annotated[
        int,
        Option(
            "Evaluate every N steps; --online: after each round.",
            "Evaluation",
            aliases=("evaluate-every",),
            needs=OFFLINE,
            min=1,
        ),
    ] = 50
    evaluation_draws: Annotated[
        int, Option("Noise samples of each held-out pair.", "Evaluation", needs=OF_PAIRS, min=1)
    ] = 4
    winner_tolerance: Annotated[
        float,
        Option(
            "How far the winners' denoising error may rise above the base model's, as a share of it.",
            "Evaluation",
            needs=OF_PAIRS,
            min=0,
        ),
    ] = 0.05
    on_winner_rise: Annotated[
        str,
        Option("What to do when it rises further.", "Evaluation", choices=("warn", "stop"), needs=OF_PAIRS),
    ] = "warn"
    checkpointing_steps: Annotated[
        int,
        Option(
            "Save a checkpoint every N steps; --online: after each round.",
            "Output",
            aliases=("save-every-n-steps",),
            needs=(OFFLINE, {"loss": REWARD_LOSSES}),
            min=1,
        ),
    ] = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.held_out == 1:
            raise UserError(
                "With --held-out 1 nothing is left to learn from. Give a share of the prompts below 1."
            )
        if self.beta == 0 and self.loss in WITH_BETA:
            raise UserError(
                f"With --beta 0 {self.loss} compares nothing, so nothing would be learned. Give a positive --beta."
            )
        if self.label_smoothing == 0.5:
            raise UserError(
                "With --label-smoothing 0.5 as many labels are taken for wrong as for right, so nothing would be "
                "learned from them. Give less."
            )
        if self.least_noise == 1:
            raise UserError(
                "With --least-noise 1 no noise is left to train at. Give a share of the path below 1."
            )
        if self.full and self.reference == "live":
            raise UserError(
                "With --full the base is gone once training begins. Use --reference cached or copy."
            )
        if not self.full and self.reference == "copy":
            raise UserError("A LoRA's base is there with the adapter off. Use --reference cached or live.")
        if self.loss == "dspo" and self.reference == "cached":
            raise UserError(
                "DSPO needs the base's predictions, not its errors alone. Use --reference live (or copy)."
            )
        if self.ties == "model" and self.loss not in ("dpo", "ipo", "hinge"):
            raise UserError(f"{self.loss} cannot say what a tie is. Use --ties drop.")
        if self.safeguard >= 0 and self.loss == "kto":
            raise UserError(
                "The safeguard holds a pair's loser back; KTO learns from single images. Use another --loss."
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
        if self.reference != "live" and self.loss in PAIR_LOSSES:
            raise UserError("--online asks the base at every round's new pairs. Leave out --reference.")
        if self.steps < self.rounds:
            raise UserError(f"{self.steps} steps do not fill {self.rounds} rounds. Lower --rounds.")

    @property
    def by_pairs(self) -> bool:
        """Whether the loss is of pairs rather than of single pictures."""
        return self.loss != "kto"


@dataclass(frozen=True, kw_only=True)
class PreparePairs(PrepareOptions, JsonOptions):
    """Options of `align prepare`."""

    pairs: Annotated[str, Option(SOURCE_HELP, DATA, argument=True, metavar="PAIRS")]
    user: Annotated[str, Option("Only this person's choices.", DATA, default_text="everybody's")] = ""
    limit: Annotated[
        int, Option("Read only this many rows, the first ones.", DATA, default_text="all", min=1)
    ] = 0
    any_model: Annotated[bool, Option("Learn from images that another model drew.", DATA)] = False
    random_crop: Annotated[
        int,
        Option(
            "Crop both images of a pair at this many random places too.",
            DATA,
            default_text="at the centre",
            min=0,
        ),
    ] = 0
    seed: Annotated[int, Option("Seed of the random crops.", DATA, needs={"random_crop": ()})] = 0


@dataclass(frozen=True, kw_only=True)
class PairSampling(DrawingOptions):
    """How `align sample` draws several images of each prompt.

    redraw   SDEdit strength: a prompt's samples from the second on are its first one, noised to this share of the
             steps and denoised again, so that they share one layout; 0 samples each from its own noise
    """

    count: int = 4
    redraw: Annotated[
        float,
        Option(
            "After the first, a prompt's images are that one noised again and drawn anew in this share of the "
            "steps: one layout, other details. 0: each from its own noise.",
            SAMPLING,
            min=0,
            max=1,
        ),
    ] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.redraw and self.count == 1:
            raise UserError(
                "--redraw draws a prompt's images after the first anew, and with --count 1 there are none. Leave out "
                "one of the two."
            )

    def facts(self) -> dict[str, Any]:
        """The settings that images depend on, `redraw` only if it is not 0."""
        return super().facts() | ({"redraw": self.redraw} if self.redraw else {})


@dataclass(frozen=True, kw_only=True)
class ComparisonSettings(SamplingSettings, PlaceOptions, CountOption):
    """How two models are compared: images and scorers.

    scale   LoRA scales of the tuned side; the first is the one that counts, each further one is another side
    tie     difference of scores up to which two images are a tie
    """

    seed: Annotated[int, Option("Both sides begin with the same noise.", SAMPLING)] = 0
    count: int = 2
    scale: Annotated[
        tuple[float, ...],
        Option(
            "Strength of the tuned side's training. Repeated: further sides, the first is the one that counts.",
            SAMPLING,
            aliases=("lora-scale", "network-mul"),
        ),
    ] = (1.0,)
    scorers: Annotated[
        tuple[str, ...],
        Option(
            "moji, a CLIP folder, like:IMAGES, or a file.py; repeatable.",
            SCORING,
            flag="scorer",
            metavar="SCORER",
            code=True,
        ),
    ] = ("moji",)
    tie: Annotated[float, Option("Scores that differ by no more than this are even.", SCORING, min=0)] = 0.0


def resolve_settings(requested: Mapping[str, Any], defaults: Mapping[str, Any]) -> Settings:
    """The settings of a run: the user's, over the model's defaults.

    These are `align` in its `limner.json`, and `draft` there for settings that differ with reward gradients. Raises
    `UserError` for an unknown setting, and for settings that contradict each other.
    """
    of_align, of_draft = (
        read_section(Settings, defaults.get(section, {}), f"The model's {FILE_OF_MODEL}", section)
        for section in OF_ALIGN
    )
    from_model = {
        "rank": defaults.get("rank", 16),
        "lora_layers": defaults.get("lora_layers", "attention"),
        **of_align,
    }
    if requested.get("loss") == "draft":
        from_model |= of_draft
    if requested.get("loss") in BETAS:
        from_model.pop("beta", None)  # it was tuned for another loss
    if requested.get("loss") == "kto":
        from_model.pop("safeguard", None)  # KTO has no pairs
    requested = {name: value for name, value in requested.items() if value is not None}
    merged = {**from_model, **requested}
    merged.setdefault("beta", BETAS.get(merged.get("loss", "dpo"), 2000.0))
    if "reference" not in merged and merged.get("loss") == "dspo":
        merged["reference"] = "copy" if merged.get("full") else "live"
    if merged.get("online"):
        merged.setdefault("reference", "live")  # a round's pairs are seldom visited twice
        merged.setdefault("sample_steps", int(defaults.get("steps", 0)))
        merged.setdefault("guidance", float(defaults.get("guidance", -1)))
    return resolve(Settings, merged, requested)


def refuse_out_of_reach(settings: Settings, requested: Mapping[str, Any]) -> None:
    """`UserError` for a requested number that has no effect with the other settings, including the model's."""
    problem = ""
    if "micro_batch" in requested and settings.micro_batch > settings.batch:
        problem = f"--micro-batch {settings.micro_batch} is more than the batch of {settings.batch}"
    if (
        "reward_steps" in requested
        and settings.loss == "draft"
        and settings.reward_steps > settings.sample_steps
    ):
        problem = (
            f"--reward-steps {settings.reward_steps} is more than the sampler's {settings.sample_steps} steps"
        )
    if "clip_range" in requested and settings.loss == "ddpo" and settings.steps < 2 * settings.rounds:
        problem = (
            f"--clip-range bounds how far the policy goes from the one that drew, and in one step a round "
            f"(--steps {settings.steps}, --rounds {settings.rounds}) it is that one"
        )
    if "reference" in requested and settings.loss in WITHOUT_REFERENCE and not settings.full:
        problem = (
            f"{settings.loss} learns without the base's errors, wherever --reference {settings.reference} has "
            "them"
        )

    # With weight 0 MaPO and DSPO learn from the winners alone
    pair_weight = {"mapo": settings.mapo_weight, "dspo": settings.dspo_pull}.get(settings.loss)
    idle = [name for name in ("beta", "safeguard") if name in requested and pair_weight == 0]
    if idle and not settings.label_smoothing:
        weight = "--mapo-weight 0" if settings.loss == "mapo" else "--dspo-pull 0"
        problem = f"With {weight} the winners alone are learned, and --{idle[0]} is of what is compared"
    stops = "on_winner_rise" in requested and settings.on_winner_rise == "stop" and not settings.online
    if stops and settings.evaluation_steps >= settings.steps:
        problem = (
            f"--on-winner-rise stop looks every {settings.evaluation_steps} steps (--evaluation-steps), and there are "
            f"{settings.steps}"
        )
    if problem:
        raise UserError(f"{problem}: it has no effect. Leave it out.")


def read_settings(run: Path) -> Settings:
    """The settings of a run folder; `UserError` when it has none or they are of another version."""
    return read_run_settings(Settings, run, "align train")


def is_preference_run(run: Path) -> bool:
    """Whether `align train` wrote this run folder, as its record says."""
    return (run / FILE).is_file() and read_json(run / FILE, RunRecord).command.startswith("align train")


def as_command(settings: Settings, out: Path) -> str:
    """The command that repeats a run, independent of later changes of the model's defaults."""
    return repeat.as_command("align train", settings, out=out)
