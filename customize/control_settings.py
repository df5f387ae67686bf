"""The settings of `customize train-control`: every choice that changes the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from backbone.cli.conditions import KINDS, SYNONYMS
from backbone.cli.options import Option
from backbone.cli.values import repeat
from backbone.io.console import UserError
from backbone.io.prompts import parse_prompt
from backbone.io.run_folder import run_name
from backbone.training.settings import ReportTo, TrainingSettings, read_run_settings, resolve

PROGRAM = "customize train-control"
ADAPTER, ADAPTER_LORA, CONTROLNET, CONTROL_LORA = NETWORKS = (
    "t2i-adapter",
    "t2i-adapter-lora",  # with a LoRA of the denoiser beside it
    "controlnet",
    "control-lora",
)
RATES = {
    ADAPTER: 1e-5,
    ADAPTER_LORA: 1e-4,
    CONTROLNET: 1e-5,
    CONTROL_LORA: 1e-4,
}  # for models without defaults: as published
ADAPTERS = (ADAPTER, ADAPTER_LORA)
WITH_ADAPTER = {"kind": ADAPTERS}
WITHOUT_HOOKS = (ADAPTER, CONTROLNET, CONTROL_LORA)


@dataclass(frozen=True, kw_only=True)
class ControlSettings(TrainingSettings):
    """The settings of `customize train-control`. A run is a function of these, the pairs and the model."""

    NEEDS: ClassVar[Mapping[str, Any]] = {
        "rank": {"kind": (ADAPTER_LORA, CONTROL_LORA)},
        "lora_alpha": {"kind": (CONTROL_LORA,)},
        # A LoRA's hooks last for one call: they are missing when the backward pass recomputes it, and when compiled
        "gradient_checkpointing": {"kind": WITHOUT_HOOKS},
        "compile": {"kind": WITHOUT_HOOKS, "quantize": ("",), "cpu_offload": (0.0,)},
        # A ControlNet copies the weights as they are
        **dict.fromkeys(("quantize", "cpu_offload"), WITH_ADAPTER),
        "lora_layers": {"kind": ("none",)},  # its layers are those of the copied encoder, all of them
    }

    images: Annotated[
        str,
        Option(
            "Images with their maps: metadata.jsonl, source/ and target/, or x.png beside x.KIND.png.",
            "Data",
            aliases=("train-data-dir", "dataset-name", "instance-data-dir"),
            metavar="FOLDER",
        ),
    ]
    condition: Annotated[
        str,
        Option(
            "The kind of map. Sketches, lines and edges are found in the images where no map is given.",
            "Data",
            choices=KINDS,
            words={word: {"condition": kind} for word, kind in SYNONYMS.items()},
        ),
    ]
    image_column: Annotated[
        str,
        Option(
            "Column that holds the image or its file.",
            "Data",
            default_text="file_name or image",
            metavar="NAME",
        ),
    ] = ""
    conditioning_image_column: Annotated[
        str,
        Option(
            "Column that holds the map or its file.",
            "Data",
            default_text="conditioning_image",
            metavar="NAME",
        ),
    ] = ""
    caption_column: Annotated[
        str,
        Option(
            "Column that holds the caption.", "Data", default_text="text, prompt or caption", metavar="NAME"
        ),
    ] = ""
    kind: Annotated[
        str,
        Option(
            "The kind of network to train.", "Method", flag="kind", aliases=("network",), choices=NETWORKS
        ),
    ] = ADAPTER
    begin_from: Annotated[
        str,
        Option(
            "Start from the weights of this control network.",
            "Method",
            aliases=("controlnet-model-name-or-path", "adapter-model-name-or-path"),
            default_text="a new one",
            metavar="FOLDER",
        ),
    ] = ""
    lora_alone: Annotated[
        bool,
        Option(
            "Learn the LoRA alone: the adapter that --begin-from names stays as it is.",
            "Method",
            needs={"kind": (ADAPTER_LORA,), "begin_from": ()},
        ),
    ] = False
    adapter_size: Annotated[
        str,
        Option(
            "Size of a T2I-Adapter.",
            "Method",
            choices=("full", "light"),
            needs={**WITH_ADAPTER, "begin_from": ("",)},  # which has a size
        ),
    ] = "full"
    gradient_accumulation_steps: Annotated[
        int, Option("Batches accumulated for one optimiser step.", "Training", min=1)
    ] = 1
    prompt_dropout: Annotated[
        float,
        Option(
            "Share of the prompts replaced by the empty prompt.",
            "Training",
            aliases=("proportion-empty-prompts",),
            min=0,
            max=1,
        ),
    ] = 0.3
    map_dropout: Annotated[
        float, Option("Share of the maps replaced by a black one.", "Training", min=0, max=1)
    ] = 0.05
    noisy_share: Annotated[
        float,
        Option(
            "Share of the samples from the noisier half of the levels, where layouts are decided; it falls to none "
            "over the last third.",
            "Training",
            min=0,
            max=1,
        ),
    ] = 0.7
    flip: bool = False
    learning_rate: float = 1e-5
    lr_warmup_steps: int = 30
    validation_steps: Annotated[
        int,
        Option(
            "Draw a preview beside the maps every N steps; 0: none.",
            "Evaluation",
            aliases=("sample-every-n-steps",),
            by_model=True,
            min=0,
        ),
    ] = 100
    validation_image: Annotated[
        tuple[str, ...],
        Option(
            "A map for the previews; repeatable.",
            "Evaluation",
            default_text="held-out pairs",
            metavar="PNG",
        ),
    ] = ()
    validation_prompt: Annotated[
        tuple[str, ...],
        Option(
            "The prompt of each of them; repeatable.",
            "Evaluation",
            needs={"validation_image": ()},
            metavar="PROMPT",
            convert=parse_prompt,
        ),
    ] = ()
    report_to: ReportTo = "jsonl"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.flip and self.condition == "pose":
            raise UserError(
                "A mirrored pose has the colours of the left limbs on the right ones, so --flip would teach them the "
                "wrong way round. Leave it out."
            )
        if self.map_dropout >= 1:
            raise UserError(
                "With --map-dropout 1 every map is black, and the network learns none. Give less."
            )
        if len(self.validation_prompt) not in (0, 1, len(self.validation_image)):
            raise UserError(
                f"There are {len(self.validation_prompt)} --validation-prompt for {len(self.validation_image)} "
                "--validation-image. Give one for all, or one each."
            )
        if self.validation_image and not self.validation_prompt:
            raise UserError("--validation-image draws by a prompt too. Give it with --validation-prompt.")

    def validation_pairs(self) -> list[tuple[str, str]]:
        """(map's file, prompt) of each preview."""
        prompts = self.validation_prompt * (
            len(self.validation_image) if len(self.validation_prompt) == 1 else 1
        )
        return list(zip(self.validation_image, prompts, strict=True))


def resolve_settings(requested: Mapping[str, Any], defaults: Mapping[str, Any]) -> ControlSettings:
    """The settings of a run: the user's, over the model's defaults (its `limner.json`)."""
    requested = {name: value for name, value in requested.items() if value is not None and value != ()}
    kind = requested.get("kind", ADAPTER)
    model_defaults = defaults.get("control", {})
    steps = int(requested.get("steps", model_defaults.get("steps", 5000)))
    from_model = {
        "steps": steps,
        "batch": model_defaults.get("batch", 4),
        "learning_rate": model_defaults.get("learning_rates", {}).get(kind, RATES.get(kind, 1e-5)),
        "rank": model_defaults.get("rank", 32 if kind == CONTROL_LORA else 16),
        "flip": False,
        "sample_steps": defaults.get("steps", ControlSettings.sample_steps),
        "guidance": defaults.get("guidance", ControlSettings.guidance),
        "lora_layers": "all",
        "loss_weighting": "none",
        "evaluation_steps": min(250, max(50, steps // 10)),
        "validation_steps": min(500, max(100, steps // 4)),
    }
    return resolve(ControlSettings, from_model, requested)


def default_folder(images: str, condition: str) -> Path:
    """The default of --out: a folder in runs/, named after the folder of the images and the kind of the maps."""
    name = run_name(images)
    return Path("runs") / (f"{name}-{condition}" if Path(images).expanduser().is_dir() else name)


def read_settings(run: Path) -> ControlSettings:
    """The settings of a run folder; `UserError` when it has none or they are of another command."""
    return read_run_settings(ControlSettings, run, PROGRAM)


def as_command(settings: ControlSettings, out: Path) -> str:
    """The command that repeats a run."""
    return repeat.as_command(PROGRAM, settings, out=out)
