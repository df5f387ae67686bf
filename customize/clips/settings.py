"""The options of `customize clip`, `train-motion` and `evaluate-clip`. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from backbone.cli.conditions import KINDS, RGB, ClipControlOptions
from backbone.cli.flags import (
    DATA,
    DRAWING,
    MODEL,
    OUTPUT,
    SAMPLING,
    SCORING,
    WITH_CONCEPTS,
    JsonOptions,
    PlaceOptions,
    PromptWords,
    model_option,
    out_option,
)
from backbone.cli.options import Option
from backbone.cli.sampling import (
    MOST_IMAGES,
    MOST_STEPS,
    DrawingOptions,
    EarlyScale,
    default_sampler_of_clips,
)
from backbone.cli.values.build import check_values
from backbone.io.console import UserError
from backbone.io.prompts import parse_prompt
from backbone.world.motions import CAMERAS, cut_camera, cut_motion, find_moves
from customize.clips.picture_settings import PictureOptions

MOTION, TRAINING = "Motion", "Training"
ADAPTER_FILE = "motion.json"  # in a run of train-motion: which adapter its LoRA belongs to
SHORTEST, SLOWEST = 2, 0.1  # frames, frames per second
OF_A_LORA: dict[str, tuple[Any, ...]] = {"method": ("lora",)}
DEFAULT_RATES = {"lora": 5e-4, "full": 1e-4}  # learning rates, by method
DEFAULT_FRAMES, DEFAULT_FPS = 16, 8.0  # of clips that words describe


@dataclass(frozen=True, kw_only=True)
class ClipOptions(PictureOptions, ClipControlOptions, DrawingOptions, JsonOptions):
    """Options of `customize clip`.

    Raises `UserError`, naming the argument, for what does not fit.
    """

    READ: ClassVar[tuple[str, ...]] = (*KINDS, RGB)
    NEEDS: ClassVar[Mapping[str, Any]] = {"scale": (WITH_CONCEPTS, {"lora": (), "images": ()})}

    words: PromptWords = ()
    prompts: Annotated[
        tuple[str, ...],
        Option("Prompts given as an option; repeatable.", DRAWING, aliases=("prompt",), metavar="PROMPTS"),
    ] = ()
    frames: Annotated[
        int,
        Option(
            "Frames of a clip.",
            MOTION,
            aliases=("num-frames", "video-length"),
            min=SHORTEST,
            max=1024,
            default_text="16; SVD: by model",
        ),
    ] = 0
    fps: Annotated[
        float, Option("Frames per second.", MOTION, min=SLOWEST, max=240, default_text="8; SVD: 7")
    ] = 0.0
    motion: Annotated[
        str,
        Option(
            "A motion adapter: a folder, an original AnimateDiff .safetensors, or a hub id.",
            MOTION,
            aliases=("motion-adapter", "motion-module"),
            metavar="ADAPTER",
        ),
    ] = ""
    lora: Annotated[
        tuple[Path, ...],
        Option(
            "A motion LoRA: a file or a run of train-motion; with SVD, a LoRA for SVD, whose strength is --scale.",
            MOTION,
            aliases=("motion-lora",),
            needs=({"motion": ()}, {"images": ()}),
            metavar="FILE",
        ),
    ] = ()
    motion_scale: Annotated[
        float,
        Option("Scale of the motion LoRAs; 0: without them.", MOTION, needs=({"lora": ()}, {"concepts": ()})),
    ] = 1.0
    redraw: Annotated[
        bool,
        Option(
            "Without --motion: draw every frame anew, by its pose, instead of moving a cut-out over one drawing.",
            MOTION,
        ),
    ] = False
    track: Annotated[
        Path | None,
        Option(
            "Without --motion: move along this track (.json: x, y, growth, turn), or as what moves in this clip.",
            MOTION,
            metavar="CLIP",
        ),
    ] = None
    camera: Annotated[
        str,
        Option(
            "The camera's path: words (pan-left, zoom-in=1.3, roll-left=20deg, ease), a .json, or a .txt of "
            "RealEstate10K's lines; without --motion over one drawing.",
            MOTION,
            aliases=("camera-path", "trajectory-file", "pose-file"),
            metavar="PATH",
        ),
    ] = ""
    camera_adapter: Annotated[
        Path | None,
        Option(
            "The camera encoder (CameraCtrl) that reads the path, a .safetensors.",
            MOTION,
            aliases=("pose-adaptor-ckpt",),
            metavar="FILE",
            default_text="camera.safetensors beside the motion adapter",
            needs={"camera": ()},
        ),
    ] = None
    camera_scale: Annotated[
        float,
        Option("Scale of the camera encoder; 0: without it.", MOTION, min=0, needs={"camera": ()}),
    ] = 1.0
    context_length: Annotated[
        int,
        Option(
            "Frames that the network sees together, in overlapping windows; 0: all.",
            MOTION,
            min=0,
            needs={"motion": ()},
            off=0,
        ),
    ] = 0
    context_stride: Annotated[
        int,
        Option("Frames between two windows.", MOTION, min=1, needs={"context_length": ()}),
    ] = 4
    free_noise: Annotated[
        bool,
        Option(
            "FreeNoise: windows in attention over time alone, under noise that comes again in another order; "
            "else the whole network sees one window after the other.",
            MOTION,
            needs={"context_length": ()},
        ),
    ] = False
    shared_noise: Annotated[
        float | None,
        Option(
            "Share of the starting noise that all frames have in common.",
            MOTION,
            min=0,
            max=1,
            default_text="0; without --motion 1",
        ),
    ] = None
    decode_chunk_size: Annotated[
        int, Option("Frames decoded together; 0: as many as fit.", SAMPLING, min=0)
    ] = 0
    batch: Annotated[
        int,
        Option(
            "Clips drawn together; what is drawn does not depend on it.",
            SAMPLING,
            aliases=("batch-size",),
            min=1,
        ),
    ] = 1
    mp4: Annotated[bool, Option("Also write an .mp4 of each clip (needs PyAV).", OUTPUT)] = False
    out: Annotated[Path | None, out_option("The folder to write, new or empty.", "clips, clips-2 …")] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        moves = self.moves_in_picture
        self.check_pictures(
            words=not self.by_picture_alone,
            camera=bool(moves and self.camera) or any(camera for _, camera in moves),
            thing=bool(moves and self.track) or any(thing for thing, _ in moves),
        )
        if self.condition and self.over_picture:
            raise UserError(
                "--condition guides what is drawn, and the picture of --image is there already. Leave one out, "
                "or let a SparseCtrl read the picture: --sparsectrl."
            )
        self._check_track()
        if not self.by_picture_alone:
            object.__setattr__(self, "frames", self.frames or DEFAULT_FRAMES)
            object.__setattr__(self, "fps", self.fps or DEFAULT_FPS)
        self._check_scales()
        if self.redraw and (self.motion or self.condition or self.images):
            flag = "--motion" if self.motion else "--condition" if self.condition else "--image"
            raise UserError(f"--redraw is for motions that words alone say, not for {flag}. Leave one out.")
        if self.context_length and self.context_length < SHORTEST:
            raise UserError(
                f"--context-length {self.context_length} is no clip. Give {SHORTEST} or more, or 0."
            )
        if self.context_length and self.context_stride >= self.context_length:
            raise UserError(
                f"Windows of {self.context_length} frames, {self.context_stride} apart, do not overlap. Give a "
                f"--context-stride below {self.context_length}."
            )
        if self.motion and 0 < self.frames <= self.context_length:
            raise UserError(
                f"--context-length {self.context_length} has no effect on clips of {self.frames} frames, which are one "
                "window. Leave it out, or ask for more --frames."
            )
        if self.camera and self.context_length and self.context_length < self.frames:
            raise UserError(
                "A camera's path is drawn in one window. Leave --context-length out, or ask for fewer --frames."
            )

    def _check_track(self) -> None:
        """`UserError` for a track together with other options that say how things move."""
        if self.track is None:
            return
        rival = "--motion" if self.motion else "--condition" if self.condition else ""
        if rival or self.by_picture_alone:
            rival = rival or "no prompt"
            raise UserError(f"--track moves a thing that a prompt names, and here is {rival}. Leave one out.")
        for prompt in (*self.words, *self.prompts):
            if move := cut_motion(prompt).move:
                raise UserError(
                    f"“{prompt}” says {move}, and --track {self.track} moves it otherwise. Leave one out."
                )

    def _check_scales(self) -> None:
        """`UserError` for a scale of absent LoRAs: a motion adapter's for SVD, concepts' for a motion adapter."""
        if self.by_picture_alone and self.motion_scale != 1:
            raise UserError("--motion-scale is for motion LoRAs, and this one is for SVD. Give --scale.")
        if self.scale != 1 and not self.by_picture_alone and not self.concepts:
            raise UserError(
                "--scale is for concepts, and this LoRA is for a motion adapter. Give --motion-scale."
            )

    def with_defaults(self, defaults: Mapping[str, Any]) -> Self:
        """As for images, with the sampler for clips and full strength of concepts in the first steps.

        With prompts, the choice of the sampler is left to the number of frames.
        """
        resolved = super().with_defaults(
            {**defaults, "sampler": default_sampler_of_clips(defaults), "early_scale": EarlyScale().scale}
        )
        return resolved if self.by_picture_alone else replace(resolved, sampler=self.sampler)

    @property
    def together(self) -> int:
        """Frames in one call of the network."""
        return self.frames if self.free_noise else min(self.frames, self.context_length or self.frames)

    @property
    def by_free_noise(self) -> bool:
        """Whether temporal attention uses windows (FreeNoise)."""
        return self.free_noise and 0 < self.context_length < self.frames

    @property
    def common_noise(self) -> float:
        """The share of the starting noise that frames have in common: all of it where no adapter links them."""
        if self.shared_noise is not None:
            return self.shared_noise
        return 0.0 if self.motion else 1.0

    @property
    def moves_in_picture(self) -> list[tuple[str, str]]:
        """The motion and the camera's move, "" for none, that each prompt says of a picture without an adapter."""
        if not self.images or self.sparsectrl or self.motion:
            return []
        return [(cut_motion(prompt).move, cut_camera(prompt).move) for prompt in (*self.words, *self.prompts)]

    @property
    def over_picture(self) -> bool:
        """Whether the first frame is a picture in which a thing moves, or over which the camera moves."""
        moves = self.moves_in_picture
        return bool(moves) and (bool(self.camera or self.track) or any(any(move) for move in moves))

    @property
    def by_picture_alone(self) -> bool:
        """Whether a picture is the model's only condition; its frames and speed are then the model's own."""
        return bool(self.images) and not self.words and not self.prompts


@dataclass(frozen=True, kw_only=True)
class TrainMotionOptions(PlaceOptions):
    """Settings of `customize train-motion`; of its run's folder are `RunFolderOptions`."""

    clips: Annotated[
        str,
        Option(
            "A folder of clips (animated files, films, or folders of frames), or a list of them, as .jsonl.",
            DATA,
            aliases=("videos", "instance-data-root"),
            metavar="CLIPS",
            default_text="those of --resume",
        ),
    ] = ""
    motion: Annotated[
        str,
        Option(
            "The motion adapter to train on; without one, --method full starts a new one.",
            MOTION,
            aliases=("motion-adapter",),
            metavar="ADAPTER",
            default_text="that of --resume",
        ),
    ] = ""
    method: Annotated[
        str,
        Option(
            "What is trained: a LoRA on the temporal layers (lora), or all of their weights, a motion adapter (full).",
            MOTION,
            choices=("lora", "full"),
            switches={"whole": "full"},
        ),
    ] = "lora"
    model: Annotated[str, model_option("moji")] = "moji"
    token: Annotated[
        str,
        Option("What you will write in prompts for the motion.", MOTION, metavar="TOKEN", needs=OF_A_LORA),
    ] = "[M]"
    token_words: Annotated[str, Option("The words that the model reads for it.", MOTION, needs=OF_A_LORA)] = (
        "moving in its own way"
    )
    prompt: Annotated[str, Option("Caption of clips without one.", DATA)] = "a clip, [M]"
    frames: Annotated[int, Option("Frames of a training clip.", TRAINING, min=SHORTEST)] = 16
    steps: Annotated[int, Option("Optimiser steps.", TRAINING, aliases=("max-train-steps",), min=1)] = 300
    learning_rate: Annotated[
        float | None,
        Option(
            "Peak learning rate, reached after the warm-up.",
            TRAINING,
            min=0,
            default_text=f"{DEFAULT_RATES['lora']:g}; of --method full {DEFAULT_RATES['full']:g}",
        ),
    ] = None
    lr_scheduler: Annotated[
        str,
        Option(
            "Learning-rate schedule after the warm-up: cosine decay to 0, or constant.",
            TRAINING,
            choices=("constant", "cosine"),
        ),
    ] = "constant"
    lr_warmup_steps: Annotated[int, Option("Steps of linear learning-rate warm-up.", TRAINING, min=0)] = 10
    weight_decay: Annotated[float, Option("Weight decay of AdamW.", TRAINING, min=0)] = 1e-2
    max_grad_norm: Annotated[
        float, Option("Clip the gradient's norm to this; 0: no clipping.", TRAINING, min=0)
    ] = 1.0
    rank: Annotated[
        int, Option("Rank of the LoRAs, temporal and spatial.", TRAINING, aliases=("network-dim",), min=1)
    ] = 16
    debiased: Annotated[
        float, Option("Weight of the appearance-debiased temporal loss; 0: none.", TRAINING, min=0)
    ] = 1.0
    prompt_dropout: Annotated[
        float, Option("Share of the steps trained with the empty prompt.", TRAINING, min=0, max=1)
    ] = 0.1
    prior: Annotated[
        str,
        Option(
            "Prior preservation of clips without the token: by the base model's predictions on clips that it drew, or "
            "off.",
            TRAINING,
            choices=("base", "off"),
            switches={"with-prior-preservation": "base"},
            needs=OF_A_LORA,
            off="off",
        ),
    ] = "base"
    prior_loss_weight: Annotated[
        float,
        Option("Weight of prior preservation; 0: none.", TRAINING, needs={"prior": ("base",)}, off=0, min=0),
    ] = 1.0
    prior_clips: Annotated[
        int,
        Option(
            "Clips that the base model draws for prior preservation, before training.",
            TRAINING,
            aliases=("num-class-images",),
            needs={"prior": ("base",), "prior_loss_weight": ()},
            min=1,
        ),
    ] = 4
    checkpointing_steps: Annotated[int, Option("Save a checkpoint every N steps.", OUTPUT, min=1)] = 100
    seed: Annotated[int, Option("Seed of everything random.", TRAINING)] = 0
    gradient_checkpointing: Annotated[
        bool, Option("Recompute activations in the backward pass: less memory, a third more time.", MODEL)
    ] = False
    vram: Annotated[
        float | None,
        Option("Fit the run into this many GiB of device memory.", MODEL, min=0.1),
    ] = None

    def __post_init__(self) -> None:
        check_values(self)
        if self.method == "full":
            object.__setattr__(self, "prior", "off")
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", DEFAULT_RATES[self.method])
        for flag, value in (("--clips", self.clips), ("--motion", self.motion or self.method == "full")):
            if not value:
                raise UserError(f"{flag} is missing. Give it, or go on with a run: --resume RUN.")
        if (
            self.prior == "base"
            and self.prior_loss_weight
            and not self.prompt.replace(self.token, "").strip(" ,")
        ):
            raise UserError(
                f"--prompt {self.prompt} is {self.token} alone, so there are no words of a class to keep. Say what "
                "moves too, as in “a clip, [M]”, or give --prior off."
            )
        if not self.token.strip() or not self.token_words.strip():
            raise UserError("A motion needs a token and words for it. Give --token [M], and --token-words.")


@dataclass(frozen=True, kw_only=True)
class EvaluateClipOptions(PlaceOptions, JsonOptions):
    """Options of `customize evaluate-clip`."""

    what: Annotated[
        str,
        Option(
            "A folder of clips, one clip, a run of train-motion, or a motion adapter.",
            DATA,
            argument=True,
            metavar="CLIPS",
        ),
    ]
    caption: Annotated[
        str, Option("Caption of clips without one.", DATA, metavar="PROMPT", convert=parse_prompt)
    ] = ""
    image: Annotated[
        Path | None, Option("The picture that all clips start from.", DATA, metavar="PICTURE")
    ] = None
    camera: Annotated[
        str,
        Option(
            "The path that the camera of all clips was to follow, as in customize clip; drawn clips follow it.",
            DATA,
            aliases=("camera-path", "trajectory-file", "pose-file"),
            metavar="PATH",
            default_text="the path that customize clip drew them on",
        ),
    ] = ""
    prompts: Annotated[
        tuple[str, ...],
        Option(
            "Prompts of the clips that a run or an adapter draws; repeatable.",
            DRAWING,
            aliases=("prompt",),
            metavar="PROMPTS",
            default_text="nouns of moji's world, with the run's token or words of motion",
        ),
    ] = ()
    model: Annotated[str | None, model_option("the run's, else moji")] = None
    frames: Annotated[int, Option("Frames of a drawn clip.", MOTION, min=SHORTEST, max=1024)] = 16
    count: Annotated[int, Option("Clips drawn for each prompt.", DRAWING, min=1, max=MOST_IMAGES)] = 1
    steps: Annotated[
        int | None,
        Option("Steps of the sampler.", SAMPLING, default_text="by model", min=1, max=MOST_STEPS),
    ] = None
    guidance: Annotated[
        float | None,
        Option(
            "Scale of classifier-free guidance; 1: no guidance.", SAMPLING, default_text="by model", min=0
        ),
    ] = None
    seed: Annotated[int, Option("Clip j of prompt i depends on the seed, i and j only.", SAMPLING)] = 0
    scorer: Annotated[
        Path | None,
        Option("A folder of CLIP or DINO.", SCORING, metavar="FOLDER", default_text="the model's own"),
    ] = None
    out: Annotated[
        Path | None,
        out_option("The folder to write the table to, new or empty.", "CLIPS-evaluation, or RUN/evaluation"),
    ] = None

    def __post_init__(self) -> None:
        check_values(self)


def refuse_other_camera(prompt: str, camera: str) -> None:
    """`UserError` if a prompt names another camera move than the path."""
    move = find_moves(prompt)[1]
    words = [word for word in CAMERAS if word in camera.lower()]
    if move and words and move not in words:
        raise UserError(
            f"“{prompt}” says {move} and --camera {camera}: they contradict each other. Say the same, or leave one out."
        )
