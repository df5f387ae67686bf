"""The settings of `customize train`: every choice that changes the weights, in one frozen dataclass."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from backbone.cli.flags import DATA, JsonOptions
from backbone.cli.options import Option
from backbone.cli.sampling import LONGEST_SIDE
from backbone.cli.values import repeat
from backbone.io.console import UserError, notify_once
from backbone.io.prompts import drop_invisible, parse_prompt
from backbone.training.settings import FILE as FILE
from backbone.training.settings import (
    PrepareOptions,
    ReportTo,
    RunOptions,
    TrainingSettings,
    read_run_settings,
    resolve,
)
from backbone.world.words import choose_article

SHEET = "sheet.png"
INSTANCE_PROMPT = "a {token} {class}"
CLASS_PROMPT = "a {class}"
SQUARES = (
    "Write one number, the side of a square; --aspect-buckets trains other shapes of about as many pixels."
)
QUOTES = "\"'`“”‘’„«»"


@dataclass(frozen=True)
class Subject:
    """A subject to learn: its images, its token, the words that the text encoder reads for it, and its class noun."""

    images: str
    token: str
    class_noun: str
    token_words: str = ""

    def __post_init__(self) -> None:
        noun = tidy(self.class_noun).lstrip(QUOTES).rstrip(f"{QUOTES}.,;:!?")
        noun = re.sub(r"(?i)^(?:an?|the|my|our|your|his|her|their) (?=\S)", "", noun)
        for name, value in (("token", drop_invisible(self.token)), ("class_noun", noun)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "token_words", tidy(self.token_words))

    def name_in_prompt(self) -> str:
        """Its name in a prompt: `[V] dog`."""
        return tidy(f"{self.token} {self.class_noun}")

    def fill(self, template: str) -> str:
        """A prompt with the token and the class filled in, with “an” before a class that begins with a vowel."""
        if self.class_noun:
            article = choose_article(self.class_noun.lower())
            template = re.sub(
                r"\b(?:(A)|a)n? +(?=\{class\})",
                lambda found: f"{article.title() if found[1] else article} ",
                template,
            )
        return tidy(template.replace("{token}", self.token).replace("{class}", self.class_noun))

    def flag(self) -> str:
        """The subject as `--subject` reads it."""
        return ":".join(part for part in (self.images, self.token, self.class_noun, self.token_words) if part)


def read_subject(flag: str) -> Subject:
    """A subject from FOLDER:TOKEN:CLASS, with :WORDS behind it or not; `UserError` for anything else."""
    drive = flag[:2] if re.match(r"[A-Za-z]:[\\/]", flag) else ""  # the drive of a path on Windows
    parts = flag.removeprefix(drive).split(":")
    for count in (2, 3):  # a folder's own name may hold colons
        folder = ":".join(parts[:-count])
        if ":" in folder and Path(drive + folder).expanduser().exists():
            parts = [folder, *parts[-count:]]
            break
    if len(parts) not in (3, 4) or not all(part.strip() for part in parts):
        raise UserError(f"--subject {flag} is not FOLDER:TOKEN:CLASS, like cat/:[W]:cat. Write it so.")
    return Subject(drive + parts[0], *parts[1:])


def name_method(value: str) -> str:
    """A method's name; `UserError` for a kind of adapter, which has its own option."""
    if value.lower() in ADAPTERS[1:]:
        raise UserError(
            f"--method is {value}, which is a kind of adapter here. Write --adapter {value.lower()}."
        )
    return value


METHODS = {  # what each of them trains; the classes are in `customize.methods.registry`
    "lora": "an adapter on the denoiser (DreamBooth with LoRA, DoRA, LoHa or LoKr)",
    "full": "all of the denoiser's weights (DreamBooth)",
    "textual-inversion": "an embedding for the token, nothing else",
    "pivotal": "an embedding for the token first, then an adapter",
    "custom-diffusion": "the cross-attention's keys and values, and an embedding for the token",
}
# Methods that learn embeddings for the token
OWN_WORDS = ("textual-inversion", "pivotal", "custom-diffusion")
ADAPTERS = ("lora", "dora", "loha", "lokr")
WITH_ADAPTER = {"method": ("lora", "pivotal")}
WITH_WORDS = {"method": OWN_WORDS}
BESIDE_A_BASE = {"method": ("lora", "pivotal", "textual-inversion")}  # whose weights stay as they are
A_CONCEPT = {"pairs": ("",)}  # a subject with a token is learned, not edits from pairs
OF_PAIRS: dict[str, tuple[Any, ...]] = {"pairs": ()}
MOVES_DENOISER = {"method": ("lora", "full", "pivotal", "custom-diffusion")}  # so a class has to be preserved
KEEPS_A_CLASS = {**A_CONCEPT, **MOVES_DENOISER}
METHOD_RATES = {  # learning rates as published, where the weights themselves are trained
    "full": 5e-6,
    "custom-diffusion": 1e-5,
    "pairs": 1e-4,
    "pairs-full": 5e-5,  # as diffusers' scripts for InstructPix2Pix
}
PATIENCE = 3  # evaluations, with --steps auto
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


@dataclass(frozen=True, kw_only=True)
class Settings(TrainingSettings):
    """The settings of `customize train`. The trained weights are a function of these, the images and the model."""

    NEEDS: ClassVar[Mapping[str, Any]] = {
        **dict.fromkeys(("rank", "lora_alpha", "lora_layers"), WITH_ADAPTER),
        "quantize": {**BESIDE_A_BASE, "adapter": ("lora", "dora")},  # peft's others ask a layer for its shape
        "cpu_offload": BESIDE_A_BASE,
    }

    images: Annotated[
        str,
        Option(
            "A folder of images, the id of a dataset on the hub, or kohya's folders (10_sks dog).",
            "Data",
            aliases=("instance-data-dir", "train-data-dir", "dataset-name", "concepts-list"),
            needs=A_CONCEPT,
            several="Put one subject's images into one folder; name other subjects with --subject.",
            metavar="FOLDER",
        ),
    ]
    token: Annotated[
        str,
        Option(
            "What you will write in prompts for the subject.",
            "Concept",
            aliases=("trigger-word", "placeholder-token", "modifier-token"),
            default_text="[V]",
            needs=A_CONCEPT,
            several="Name other subjects with --subject.",
            metavar="TOKEN",
        ),
    ]
    class_noun: Annotated[
        str,
        Option(
            "What the subject is, in a word (dog).",
            "Concept",
            flag="class",
            default_text="guessed from the images",
            needs=A_CONCEPT,
            metavar="NOUN",
        ),
    ]
    pairs: Annotated[
        str,
        Option(
            "A folder of images before and after an edit, with instructions, in place of --images.",
            "Data",
            needs={"method": ("lora", "full")},
            metavar="FOLDER",
        ),
    ] = ""
    held_out: Annotated[
        int,
        Option(
            "Pairs held out for evaluation; 0: none.",
            "Data",
            aliases=("num-validation-images",),
            default_text="a tenth of them, 1 to 8",
            needs=OF_PAIRS,
            min=0,
        ),
    ] = -1
    skip_bad: Annotated[
        bool,
        Option("Skip pairs that cannot be trained on, and count them.", "Data", needs=OF_PAIRS),
    ] = False
    conditioning_dropout: Annotated[
        float,
        Option(
            "Probability to drop the instruction, the same for the image, and the same for both.",
            "Loss",
            aliases=("conditioning-dropout-prob",),
            needs=OF_PAIRS,
            min=0,
            max=0.33,
        ),
    ] = 0.05
    image_guidance: Annotated[
        float,
        Option(
            "Image guidance scale of the edits drawn for evaluation.",
            "Evaluation",
            aliases=("image-guidance-scale",),
            needs=OF_PAIRS,
            min=0,
        ),
    ] = 1.5
    subject: Annotated[
        tuple[str, ...],
        Option("One more subject; repeatable.", "Concept", needs=A_CONCEPT, metavar="FOLDER:TOKEN:CLASS"),
    ] = ()
    token_words: Annotated[
        str,
        Option(
            "The words that the text encoder reads for the token, such as sks.",
            "Concept",
            default_text="chosen",
            needs={**A_CONCEPT, "method": ("lora", "full")},
        ),
    ] = ""
    instance_prompt: Annotated[
        str, Option("Caption of images without one.", "Concept", needs=A_CONCEPT, convert=parse_prompt)
    ] = INSTANCE_PROMPT
    class_prompt: Annotated[
        str,
        Option(
            "Prompt of the class, for prior preservation and masks.",
            "Concept",
            needs=(
                {"prior": ("base", "class-images"), **KEEPS_A_CLASS},
                {"mask": ("auto",), **A_CONCEPT},
            ),
            convert=parse_prompt,
        ),
    ] = CLASS_PROMPT
    caption_column: Annotated[
        str,
        Option(
            "The column or key of the metadata that holds the caption.",
            "Data",
            default_text="text, prompt or caption",
            needs=A_CONCEPT,
            metavar="NAME",
        ),
    ] = ""
    image_column: Annotated[
        str,
        Option(
            "The column or key that holds the image or its file.",
            "Data",
            default_text="file_name or image",
            needs=A_CONCEPT,
            metavar="NAME",
        ),
    ] = ""
    resolution: Annotated[
        int,
        Option(
            "Train on images of this many pixels a side.",
            "Data",
            default_text="the model's own",
            min=1,
            max=LONGEST_SIDE,
            several=SQUARES,
        ),
    ] = 0
    random_crop: Annotated[
        int,
        Option(
            "Train on N random crops of each image too.",
            "Data",
            by_model=True,
            needs=A_CONCEPT,
            min=0,
        ),
    ] = 0
    aspect_buckets: Annotated[
        bool,
        Option(
            "Train in buckets of aspect ratios (1:2 to 2:1) instead of square crops.",
            "Data",
            aliases=("enable-bucket",),
        ),
    ] = False
    mask: Annotated[
        str,
        Option(
            "Loss masks: from files; auto: for images without one, where the model's prediction depends on the class.",
            "Data",
            choices=("files", "auto"),
            needs=A_CONCEPT,
        ),
    ] = "files"
    method: Annotated[
        str,
        Option(
            "What is trained; pivotal: an embedding, then an adapter; custom-diffusion: cross-attention and an "
            "embedding.",
            "Method",
            choices=tuple(METHODS),
            convert=name_method,
        ),
    ] = "lora"
    begin_from: Annotated[
        str,
        Option(
            "Start from the trained weights of this run of customize train.",
            "Method",
            aliases=("network-weights",),
            metavar="RUN",
            default_text="new ones",
            needs={"method": ("lora", "full")},
        ),
    ] = ""
    train_text_encoder: Annotated[
        bool,
        Option("Train an adapter on the text encoders too.", "Method", needs=WITH_ADAPTER),
    ] = False
    text_encoder_lr: Annotated[
        float,
        Option("Learning rate of the text encoders.", "Method", needs={"train_text_encoder": ()}, min=0),
    ] = 1e-4
    num_vectors: Annotated[
        int, Option("Embedding vectors per token.", "Method", needs=WITH_WORDS, min=1, max=32)
    ] = 1
    initializer_token: Annotated[
        str,
        Option(
            "The word whose embedding the token's starts from.",
            "Method",
            default_text="the class",
            needs=WITH_WORDS,
        ),
    ] = ""
    words_learning_rate: Annotated[
        float,
        Option("Learning rate of the token's embedding.", "Method", by_model=True, needs=WITH_WORDS, min=0),
    ] = 5e-3
    words_share: Annotated[
        float,
        Option(
            "pivotal: share of the steps that train the embedding.",
            "Method",
            needs={"method": ("pivotal",)},
            min=0,
            max=1,
        ),
    ] = 0.4
    learning_rate: Annotated[
        float,
        Option(
            "Peak learning rate, reached after the warm-up; with --pairs usually 1e-4 (moji: 1e-3).",
            "Training",
            aliases=("unet-lr",),
            by_model=True,
            needs=MOVES_DENOISER,
            min=0,
        ),
    ] = 1e-3
    steps: Annotated[
        int,
        Option(
            "Optimiser steps; auto: stop when the evaluation no longer improves.",
            "Training",
            aliases=("max-train-steps",),
            by_model=True,
            min=1,
            words={"auto": {"patience": PATIENCE}},
            metavar="INTEGER|auto",
        ),
    ] = 400
    batch: int = 6
    gradient_accumulation_steps: Annotated[
        int, Option("Batches accumulated for one optimiser step.", "Training", min=1)
    ] = 1
    optimizer: Annotated[
        str,
        Option(
            "The optimiser; prodigy finds the step size itself, so learning rates are factors of it, usually 1.",
            "Training",
            aliases=("optimizer-type",),
            choices=("adamw", "adamw8bit", "prodigy"),
            packages={"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"},
            switches={"use-8bit-adam": "adamw8bit"},
        ),
    ] = "adamw"
    ema_decay: Annotated[
        float,
        Option(
            "Decay of an exponential moving average of the weights.",
            "Training",
            min=0,
            max=0.99999,
            default_text="no",
        ),
    ] = 0.0
    adapter: Annotated[
        str,
        Option(
            "Kind of adapter.",
            "Adapter",
            choices=ADAPTERS,
            switches={"use-dora": "dora"},
            needs=WITH_ADAPTER,
        ),
    ] = "lora"
    lora_dropout: Annotated[
        float,
        Option(
            "Dropout inside the adapter.",
            "Adapter",
            aliases=("network-dropout",),
            needs=WITH_ADAPTER,
            off=0,
            min=0,
            max=0.99,
        ),
    ] = 0.0
    lora_layers: str = "all"
    rank_pattern: Annotated[
        tuple[str, ...],
        Option(
            "Another rank for the layers that match a pattern, as attn2=8; repeatable.",
            "Adapter",
            needs=WITH_ADAPTER,
            metavar="PATTERN=RANK",
        ),
    ] = ()
    prior: Annotated[
        str,
        Option(
            "Prior preservation: by the base model's predictions, by class images, or off.",
            "Loss",
            choices=("base", "class-images", "off"),
            switches={"with-prior-preservation": "class-images"},
            needs=KEEPS_A_CLASS,
            off="off",
        ),
    ] = "base"
    prior_loss_weight: Annotated[
        float,
        Option(
            "Weight of prior preservation; 0: none.",
            "Loss",
            needs={"prior": ("base", "class-images"), **KEEPS_A_CLASS},
            off=0,
            min=0,
        ),
    ] = 1.0
    prior_batch: Annotated[
        int,
        Option(
            "Class samples beside each batch, for prior preservation.",
            "Loss",
            by_model=True,
            needs={"prior": ("base", "class-images"), "prior_loss_weight": (), **KEEPS_A_CLASS},
            min=0,
        ),
    ] = 2
    prior_draws: Annotated[
        int,
        Option(
            "Base-model predictions computed once and reused (latent, noise, timestep).",
            "Loss",
            by_model=True,
            needs={"prior": ("base",), "prior_loss_weight": (), **KEEPS_A_CLASS},
            min=1,
        ),
    ] = 64
    prior_prompts: Annotated[
        tuple[str, ...],
        Option(
            "A further prompt whose predictions are preserved, such as “a {class} wearing a hat”; repeatable. “” for "
            "none.",
            "Loss",
            by_model=True,
            needs={"prior": ("base",), "prior_loss_weight": (), **KEEPS_A_CLASS},
            metavar="PROMPT",
            convert=parse_prompt,
        ),
    ] = ()
    class_images: Annotated[
        tuple[str, ...],
        Option(
            "Folder of your own class images, instead of drawn ones; one for each subject.",
            "Loss",
            aliases=("class-data-dir", "reg-data-dir"),
            needs={"prior": ("class-images",), "prior_loss_weight": (), **KEEPS_A_CLASS},
            implies={"prior": "class-images"},
            metavar="FOLDER",
        ),
    ] = ()
    num_class_images: Annotated[
        int,
        Option(
            "Number of class images; missing ones are drawn.",
            "Loss",
            default_text="48, or all of the folder",
            needs={"prior": ("class-images",), "prior_loss_weight": (), **KEEPS_A_CLASS},
            min=1,
        ),
    ] = 0
    class_batch: Annotated[
        int,
        Option(
            "Class images drawn in one batch.",
            "Loss",
            aliases=("sample-batch-size",),
            needs={
                "prior": ("class-images",),
                "prior_loss_weight": (),
                **KEEPS_A_CLASS,
                "one_by_one": (False,),
            },
            min=1,
        ),
    ] = 8
    snr_gamma: Annotated[
        float,
        Option(
            "γ of min-SNR weighting.",
            "Loss",
            aliases=("min-snr-gamma",),
            needs={"loss_weighting": ("min-snr",)},
            implies={"loss_weighting": "min-snr"},
            min=0.01,  # at 0 no level has any weight
        ),
    ] = 5.0
    timestep_bias_strategy: Annotated[
        str,
        Option(
            "Timesteps to sample more often; later: the noisier ones.",
            "Loss",
            choices=("none", "later", "earlier", "range"),
        ),
    ] = "none"
    timestep_bias_begin: Annotated[
        int,
        Option(
            "range: the first timestep to sample more often.",
            "Loss",
            needs={"timestep_bias_strategy": ("range",)},
            min=0,
            max=1000,
        ),
    ] = 0
    timestep_bias_end: Annotated[
        int,
        Option(
            "range: the end of these timesteps, itself not among them.",
            "Loss",
            needs={"timestep_bias_strategy": ("range",)},
            min=0,
            max=1000,
        ),
    ] = 1000
    timestep_bias_portion: Annotated[
        float,
        Option(
            "later, earlier: the share of the timesteps to sample more often.",
            "Loss",
            needs={"timestep_bias_strategy": ("later", "earlier")},
            min=0.01,
            max=0.99,
        ),
    ] = 0.25
    timestep_bias_multiplier: Annotated[
        float,
        Option(
            "How many times as often they are sampled.",
            "Loss",
            needs={"timestep_bias_strategy": ("later", "earlier", "range")},
            min=0,
        ),
    ] = 2.0
    noise_offset: Annotated[
        float,
        Option("Strength of the noise offset: a constant added to each channel's noise.", "Loss", min=0),
    ] = 0.0
    evaluation_steps: Annotated[
        int,
        Option(
            "Evaluate every N steps; 0: never.",
            "Evaluation",
            aliases=("evaluate-every",),
            default_text="by model, usually 125; with --steps auto 50",
            by_model=True,
            min=0,
        ),
    ] = 125
    patience: Annotated[
        int,
        Option(
            "Early stopping after N evaluations without improvement; 0: never.",
            "Evaluation",
            needs={"evaluation_steps": ()},
            off=0,
            min=0,
        ),
    ] = 0
    scorer: Annotated[
        str,
        Option(
            "Folder of a CLIP or DINO model for the evaluation.",
            "Evaluation",
            default_text="the model's own",
            needs={"evaluation_steps": ()},
            metavar="FOLDER",
        ),
    ] = ""
    validation_steps: Annotated[
        int,
        Option(
            "Draw a preview sheet every N steps.",
            "Evaluation",
            default_text="half of the steps, 100 to 500",
            by_model=True,
            min=1,
        ),
    ] = 500
    preview_on: Annotated[
        str,
        Option(
            "A few-step model distilled from this one: also preview and evaluate on it, and choose best/ by it.",
            "Evaluation",
            default_text="no",
            metavar="MODEL",
            needs={**A_CONCEPT, "quantize": ("",), "cpu_offload": (0.0,)},
        ),
    ] = ""
    preview_on_steps: Annotated[
        int,
        Option(
            "Sampler steps on the few-step model.",
            "Evaluation",
            default_text="its own",
            needs={"preview_on": ()},
            min=0,
        ),
    ] = 0
    preview_on_guidance: Annotated[
        float | None,
        Option(
            "Guidance scale on the few-step model.",
            "Evaluation",
            default_text="its own",
            needs={"preview_on": ()},
            min=0,
        ),
    ] = None
    sheet_prompts: Annotated[
        tuple[str, ...],
        Option(
            "A prompt of the preview sheet, {} for the subject; repeatable.",
            "Evaluation",
            flag="validation-prompt",
            by_model=True,
            needs=A_CONCEPT,
            metavar="PROMPT",
            convert=parse_prompt,
        ),
    ] = ()
    report_to: ReportTo = "jsonl"
    push_to_hub: Annotated[bool, Option("Upload the finished run to the hub, as private.", "Output")] = False
    hub_model_id: Annotated[
        str,
        Option(
            "Repository on the hub to upload to.",
            "Output",
            default_text="the run's name",
            needs={"push_to_hub": ()},
            metavar="ORG/NAME",
        ),
    ] = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.ranks()
        self._check_timestep_bias()
        if self.train_text_encoder and self.text_encoder_lr == 0:
            notify_once("The text encoder's learning rate is 0: it learns nothing.")
        if self.method in ("textual-inversion", "pivotal") and self.words_learning_rate == 0:
            notify_once("The learning rate of the token's embedding is 0: it learns nothing.")
        if self.pairs:
            return
        count = len(self.subjects())
        if self.class_images and len(self.class_images) != count:
            raise UserError(
                f"--class-images names {len(self.class_images)} folders for {count} subjects. Give each one its own."
            )

    def _check_timestep_bias(self) -> None:
        """`UserError` for a range of timesteps that is empty or all of them, and for a bias that changes nothing."""
        if self.timestep_bias_strategy == "none":
            return
        first, end = self.timestep_bias_begin, self.timestep_bias_end
        if self.timestep_bias_strategy == "range" and (first >= end or (first, end) == (0, 1000)):
            extent = "all" if first < end else "none"
            raise UserError(
                f"The range of --timestep-bias-strategy, from {first} to {end}, holds {extent} of the timesteps 0 to "
                "1000. Give --timestep-bias-begin and --timestep-bias-end."
            )
        if self.timestep_bias_multiplier == 1:
            raise UserError(
                "--timestep-bias-multiplier 1 draws all timesteps alike. Give another one, or leave out "
                "--timestep-bias-strategy."
            )

    def subjects(self) -> list[Subject]:
        """All subjects, the one of --images first; none if edits are learned."""
        if self.pairs:
            return []
        first = Subject(self.images, self.token, self.class_noun, self.token_words)
        return [first, *(read_subject(flag) for flag in self.subject)]

    def ranks(self) -> dict[str, int]:
        """Pattern of layers → their own rank, from `PATTERN=RANK`; `UserError` for anything else."""
        by_pattern: dict[str, int] = {}
        for entry in self.rank_pattern:
            pattern, _, rank = entry.rpartition("=")
            if not pattern or not rank.isdecimal() or int(rank) < 1:
                raise UserError(f"--rank-pattern {entry} is not PATTERN=RANK, like attn2=8. Write it so.")
            if by_pattern.setdefault(pattern, int(rank)) != int(rank):
                raise UserError(
                    f"--rank-pattern gives {pattern} the ranks {by_pattern[pattern]} and {int(rank)}. Leave out one "
                    "of them."
                )
        return by_pattern

    @property
    def further_prompts(self) -> tuple[str, ...]:
        """The non-empty prior prompts, if the base's predictions are preserved; “” stands for none."""
        return tuple(prompt for prompt in self.prior_prompts if prompt.strip() and self.prior == "base")

    def name_in_prompt(self) -> str:
        """The first subject's name in a prompt: `[V] dog`."""
        return self.subjects()[0].name_in_prompt()


def describe_first_subject(settings: Settings) -> str:
    """A message where a run has several subjects, the first of which alone is measured; else ""."""
    first, *others = settings.subjects()
    if not others:
        return ""
    names = ", ".join(subject.name_in_prompt() for subject in others)
    return f"Evaluations measure the first subject alone, {first.name_in_prompt()}, and not {names}."


@dataclass(frozen=True, kw_only=True)
class TrainOptions(RunOptions):
    """Options of `customize train` that are not saved with its settings."""

    center_crop: Annotated[
        bool,
        Option("images are cut at their centre, as always", "Data", hidden=True),
    ] = True

    def __post_init__(self) -> None:
        if not self.center_crop:
            raise UserError("Images are cut at their centre. Leave out --no-center-crop.")


@dataclass(frozen=True, kw_only=True)
class PrepareImages(PrepareOptions, JsonOptions):
    """Options of `customize prepare`."""

    images: Annotated[
        str,
        Option(
            "A folder of images, .parquet, .tar or a dataset's id.",
            DATA,
            aliases=("instance-data-dir", "train-data-dir", "dataset-name"),
            metavar="FOLDER",
        ),
    ]
    resolution: Annotated[
        int,
        Option(
            "Pixels a side.",
            DATA,
            default_text="the model's own",
            min=1,
            max=LONGEST_SIDE,
            several=SQUARES,
        ),
    ] = 0
    aspect_buckets: Annotated[
        bool,
        Option(
            "Train in buckets of aspect ratios (1:2 to 2:1) instead of square crops.",
            DATA,
            aliases=("enable-bucket",),
        ),
    ] = False
    caption_column: Annotated[
        str,
        Option(
            "Column that holds the caption.", DATA, default_text="text, prompt or caption", metavar="NAME"
        ),
    ] = ""
    image_column: Annotated[
        str,
        Option(
            "Column that holds the image or its file.",
            DATA,
            default_text="file_name or image",
            metavar="NAME",
        ),
    ] = ""


def resolve_settings(
    requested: Mapping[str, Any], defaults: Mapping[str, Any], *, captioned: bool = False
) -> Settings:
    """The settings of a run: the user's, over the model's defaults (its `limner.json`).

    The model's further prior prompts are used only if every image is `captioned`: with images whose prompts do not say
    where the subject is, preserving them prevents the subject from being learned. Raises `UserError` for an unknown
    setting.
    """
    requested = {name: value for name, value in requested.items() if value is not None and value != ()}
    method, patient = requested.get("method", "lora"), bool(requested.get("patience"))
    kind = {"lora": "pairs", "full": "pairs-full"}.get(method, method) if requested.get("pairs") else method
    rates = METHOD_RATES | defaults.get("learning_rates", {})
    longer = 2 if patient else 1  # early stopping ends the run sooner
    steps = longer * defaults.get("train_steps", Settings.steps)
    from_model = {
        "steps": steps,
        "validation_steps": min(500, max(100, int(requested.get("steps", steps)) // 2)),
        "learning_rate": rates.get(kind, defaults.get("learning_rate", Settings.learning_rate)),
        "words_learning_rate": Settings.words_learning_rate,
        "rank": defaults.get("rank", Settings.rank),
        "batch": defaults.get("batch", Settings.batch),
        "flip": defaults.get("flip", False),
        "random_crop": 0 if requested.get("pairs") else defaults.get("random_crop", 0),
        "sample_steps": defaults.get("steps", Settings.sample_steps),
        "guidance": defaults.get("guidance", Settings.guidance),
        "sheet_prompts": tuple(defaults.get("sheet_prompts", SHEET_PROMPTS)),
        "lora_layers": defaults.get("lora_layers", "attention"),
        "prior_batch": defaults.get("prior_batch", 1),
        "prior_draws": defaults.get("prior_draws", Settings.prior_draws),
        "prior_prompts": tuple(defaults.get("prior_prompts", ())) if captioned else (),
        "loss_weighting": defaults.get("loss_weighting", "none"),
        "evaluation_steps": 50 if patient else defaults.get("evaluation_steps", Settings.evaluation_steps),
    }
    if kind == "textual-inversion":  # which learns nothing else
        from_model["words_learning_rate"] = rates.get(kind, Settings.words_learning_rate)
    if requested.get("optimizer") == "prodigy":  # which finds the step size; learning rates are factors of it
        from_model |= {"learning_rate": 1.0, "text_encoder_lr": 1.0, "words_learning_rate": 1.0}
    return resolve(Settings, from_model, requested)


def read_settings(run: Path) -> Settings:
    """The settings of a run folder; `UserError` when it has none or they are of another version."""
    settings = read_run_settings(Settings, run, "customize train")
    if not settings.pairs and not all(subject.token.strip() for subject in settings.subjects()):
        raise UserError(f"{run / FILE} is damaged (token is empty). Start the run anew.")
    return settings


def read_subject_settings(run: Path, model: str | None = None) -> Settings:
    """Like `read_settings`, for a run that learned a subject; `UserError` for one that learned edits from pairs.

    `model` is the one that it was trained from, if that has moved.
    """
    settings = read_settings(run)
    settings = settings if model is None else replace(settings, model=model)
    if settings.pairs:
        raise UserError(
            f"{run} learned what instructions do to images, and no subject. How near its edits come to the true ones "
            f"is in {run}/report.html."
        )
    return settings


def as_command(settings: Settings, out: Path) -> str:
    """The command that repeats a run."""
    return repeat.as_command("customize train", settings, out=out)


def tidy(prompt: str) -> str:
    """One space between words."""
    return " ".join(prompt.split())
