"""`customize train-motion`: a motion `[M]` from a few clips, as a LoRA of a motion adapter's layers, or all of these.

The split of MotionDirector (Zhao et al. 2023, section 3.2): a LoRA in the spatial layers learns single frames, and is
discarded; another one in the temporal layers learns clips, so that it need not learn their appearance. Its loss has an
appearance-debiased term, from which the common part of all frames is removed by an anchor frame's (eq. 5).
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from backbone.adapters.concept import MOTION, Concept, check_token, mentions, replace_tokens, word_pattern
from backbone.adapters.lora import (
    LORA_WEIGHTS,
    activate_adapters,
    active_adapters,
    add_lora,
    save_lora,
)
from backbone.adapters.motion import Moves, set_in_motion
from backbone.cli.values.build import build
from backbone.cli.values.effects import refuse_idle
from backbone.cli.values.repeat import as_command
from backbone.conditions.conditions import Conditions
from backbone.diffusion.noise import add_noise, generator, target
from backbone.diffusion.transfer import send
from backbone.distributed import processes
from backbone.families.components.loading import WEIGHTS
from backbone.io.console import UserError, format_count, notify
from backbone.io.files import content_hash, write_json
from backbone.io.progress import progress
from backbone.io.run_folder import (
    CHECKPOINT,
    hold_folder,
    make_absolute,
    no_run_folder,
    package_versions,
    refuse_taken,
    run_name,
)
from backbone.media.transforms import crop_square, to_tensor
from backbone.memory.motion import MotionEstimator, MotionWorkload
from backbone.memory.planner import MemorySettings, fit, precision_name
from backbone.models.cache import encode_prompts_cached
from backbone.models.clips.motion import (
    attach_motion,
    find_motion,
    hash_motion,
    make_motion_adapter,
    read_motion_adapter,
    rows_as_clips,
    save_motion_adapter,
)
from backbone.models.locate import make_model_absolute
from backbone.models.model import Backbone
from backbone.models.sample import Frames, Request, sample_latents
from backbone.training.fast import fast_steps
from backbone.training.optimizer import make_adamw
from backbone.training.run import DRAWN_BY, Objective, drive
from backbone.training.settings import (
    RunFolderOptions,
    find_changed_settings,
    find_resumed,
    read_run_settings,
    refuse_gone,
)
from customize.clips.films import CaptionedFilm, list_films
from customize.clips.settings import ADAPTER_FILE, TrainMotionOptions
from customize.data.captions import (
    TrainingPrompt,
    describe_brackets,
    describe_foreign_syntax,
    describe_truncated,
)

PROGRAM = "customize train-motion"
RESUMED = (
    "device",
    "clips",
    "motion",
    "model",
)  # settings that may change with --resume: their files may have moved
LOOKS = "looks"
LAYERS = ("to_q", "to_k", "to_v", "to_out.0")


def train_motion(requested: Mapping[str, Any], folder_options: RunFolderOptions) -> Path:
    """Learn the motion of clips; returns the run folder, a concept of the kind `motion`.

    `requested` are settings by field of `TrainMotionOptions`. Raises `UserError` for clips that cannot be used, an
    adapter of another model, and a folder that is taken.
    """
    run, options, is_resumed = open_run(requested, folder_options)
    hold = hold_folder if is_resumed else processes.hold_new_run
    full = options.method == "full"
    if processes.world_size() > 1:
        raise UserError("customize train-motion learns in one process. Start it without a launcher.")
    films = list_films(options.clips)
    short = [clip.film for clip in films if len(clip.film.frames) < options.frames]
    if short:
        shortest = min(short, key=lambda film: len(film.frames))
        raise UserError(
            f"{shortest.name} has {len(shortest.frames)} frames, and --frames is {options.frames}. Ask for fewer."
        )
    refuse_stills(films)
    # Latents and prompts once, then only the denoiser is needed
    model, placed_options = open_model(options)
    if not full:
        check_token(options.token, model.text_encoder.tokenizer.get_vocab())
    concept = Concept(MOTION, options.model, model.fingerprint, {options.token: options.token_words}, "")
    latents = encode_films(model, films)
    captioned = write_prompts(films, options, concept, model)
    captions, prompts = [prompt.text for prompt in captioned], [prompt.resolved for prompt in captioned]
    conditions = encode_prompts_cached(model, [*prompts, ""])
    prior = draw_prior(model, captions, options)
    model.free("autoencoder", "text_encoder")
    with hold(run):
        kind = WholeMotionLearning if full else MotionLearning
        learning = kind(model, latents, conditions, placed_options, prior)
        learning.sources = {
            "model": model.fingerprints,
            "clips": " ".join(clip.film.content for clip in films),
            "set of captions": content_hash("\n".join(prompts).encode()),
            **({} if full else {"motion adapter": hash_motion(model.denoiser)}),
        }
        learning.resume(run)
        write_json(run / "settings.json", describe(options, run, films))
        notify(f"Learning from {format_count(len(films), 'clip')}: {format_count(options.steps, 'step')}.")
        drive(learning, run, command=PROGRAM)
        learning.write(run, {"limner_token": options.token, "base_model": options.model})
        if not full:
            write_json(run / ADAPTER_FILE, {"adapter": options.motion, "frames": options.frames})
            replace(concept, weights=LORA_WEIGHTS, resolution=model.requested_resolution).write(run)
    return run


def open_model(options: TrainMotionOptions) -> tuple[Backbone, TrainMotionOptions]:
    """The model with the motion adapter to train, or a new one, placed as planned for `options.vram`.

    Returns its settings too, with those that the plan has changed. Raises `UserError` as `open_adapter`, and for a
    device that it does not fit.
    """
    model = Backbone.open(options.model, device=options.device, precision=options.precision)
    adapter, placed_options = open_adapter(model, options), options
    if options.vram is not None:
        workload = MotionWorkload(
            options.frames,
            adapter.config,
            lambda network: find_learned(network, options).values(),
            options.prior == "base",
        )
        start = MemorySettings(precision_name(model), options.gradient_checkpointing, fixed_optimizer=True)
        model, choice = fit(MotionEstimator(model, workload, device=model.device.type), options.vram, start)
        placed_options = replace(options, gradient_checkpointing=choice.checkpointing)
    if options.motion:
        set_in_motion(model, Moves(options.motion))
    else:
        attach_motion(model.denoiser, adapter)
    return model, placed_options


def open_adapter(model: Backbone, options: TrainMotionOptions) -> Any:
    """The named motion adapter, or a new one for this model, which is printed.

    Raises `UserError` for an adapter of another model, a model without a UNet, and too few positions for the frames.
    """
    if options.motion:
        adapter = read_motion_adapter(options.motion)
    else:
        outline: Any = model.family.spec(model.location, model.dtype).denoiser.instantiate()
        if not hasattr(outline, "down_blocks"):
            raise UserError(
                f"Motion is learned in a UNet, and {options.model} is a transformer. Give a --model that has a UNet."
            )
        adapter = make_motion_adapter(outline.config, seed=options.seed, frames=max(32, options.frames))
        count = sum(value.numel() for value in cast(nn.Module, adapter).parameters()) / 1e6
        notify(
            f"A new motion adapter of {count:.1f} M parameters starts from nothing, which a few clips cannot train. "
            "Use --motion to go on with a trained one."
        )
    longest = int(cast(Any, adapter).config.motion_max_seq_length)
    if options.frames > longest:
        raise UserError(
            f"{options.motion} has positions for {longest} frames, and --frames is {options.frames}. Ask for fewer."
        )
    return adapter


def encode_films(model: Backbone, films: Sequence[CaptionedFilm]) -> list[Tensor]:
    """The latents [C, F, h, w] of clips."""
    latents = []
    with progress(len(films), "encoding clips", brief=True) as bar:
        for captioned in films:
            pixels = [to_tensor(crop_square(frame, model.resolution)) for frame in captioned.film.frames]
            latents.append(model.encode_clip(torch.stack(pixels)).cpu())
            bar.advance()
    return latents


@dataclass(frozen=True, eq=False)
class Prior:
    """The base's clips of the class: latents [C, F, h, w] each, and their prompts' conditions."""

    clips: Sequence[Tensor]
    conditions: Conditions


def draw_prior(model: Backbone, prompts: Sequence[str], options: TrainMotionOptions) -> Prior | None:
    """The base's clips of the same prompts without the token; None without prior preservation."""
    if options.prior != "base" or not options.prior_loss_weight:
        return None
    words = list(dict.fromkeys(without_token(prompt, options.token) for prompt in prompts))
    class_prompts = [words[i % len(words)] for i in range(options.prior_clips)]
    requests = [Request(prompt, (i, 0)) for i, prompt in enumerate(class_prompts)]
    latents: list[Tensor] = []
    with progress(len(requests), "drawing clips of the class") as bar:
        for clips in sample_latents(
            model,
            requests,
            steps=int(model.defaults["steps"]),
            guidance=float(model.defaults["guidance"]),
            seed=options.seed,
            batch=1,
            frames=Frames(options.frames),
            advance=bar.advance_images,
        ):
            latents += list(clips.cpu())
    return Prior(latents, encode_prompts_cached(model, class_prompts))


def write_prompts(
    films: Sequence[CaptionedFilm], options: TrainMotionOptions, concept: Concept, model: Backbone
) -> list[TrainingPrompt]:
    """Each clip's training prompt: its caption or the prompt, with the token if one is learned.

    Prints which syntax is read as plain text, and which prompts are truncated.
    """
    prompts = []
    for clip in films:
        source = f"{clip.film.name}'s caption" if clip.caption else "--prompt"
        caption = (clip.caption or options.prompt).replace("{token}", options.token)
        if options.method == "full":
            caption = without_token(caption, options.token)
            prompts.append(TrainingPrompt(caption, caption, source))
        else:
            caption = with_token(caption, options.token)
            prompts.append(TrainingPrompt(caption, replace_tokens(caption, [concept]), source))
    unread = options.prompt != TrainMotionOptions.prompt and all(clip.caption for clip in films)
    for sentence in (
        "--prompt has no effect: every clip has a caption." if unread else "",
        describe_brackets(prompts, concept),
        *describe_foreign_syntax(prompts),
        *describe_truncated(prompts, options.token_words, options.token, model.text_encoder),
    ):
        if sentence:
            notify(sentence)
    return prompts


def refuse_stills(films: Sequence[CaptionedFilm]) -> None:
    """`UserError` for clips in which nothing moves: all their frames are equal."""
    for film in [captioned.film for captioned in films]:
        if len({frame.tobytes() for frame in film.frames}) == 1:
            raise UserError(f"All frames of {film.name} are equal, so there is no motion in it. Take it out.")


def with_token(prompt: str, token: str) -> str:
    """A prompt with the token appended, unless it contains it."""
    if mentions(prompt, token):
        return prompt
    return f"{prompt}, {token}" if prompt.strip() else token


def without_token(prompt: str, token: str) -> str:
    """A prompt without the token and the comma next to it."""
    parts = (re.sub(word_pattern(token), "", part) for part in prompt.split(","))
    return ", ".join(" ".join(part.split()) for part in parts if part.strip())


def open_run(
    requested: Mapping[str, Any], folder_options: RunFolderOptions
) -> tuple[Path, TrainMotionOptions, bool]:
    """(the run's folder, its settings, whether it is resumed (`find_resumed`)).

    Raises `UserError` for a folder that is taken, for a resumed folder without a checkpoint, and for settings that
    differ from such a run's own.
    """
    default_folder = Path("runs") / run_name(requested["clips"]) if requested.get("clips") else None
    run = None if folder_options.resume is None else find_resumed(folder_options, PROGRAM, default_folder)
    if run is None:
        options = build(TrainMotionOptions, requested)
        refuse_idle(options, requested)
        run = folder_options.out or Path("runs") / run_name(options.clips)
        refuse_taken(run, [options.clips])
        return run, build(TrainMotionOptions, as_saved(vars(options))), False
    if not (run / CHECKPOINT).is_file():
        if not run.is_dir():
            raise no_run_folder(run)
        raise UserError(f"{run} holds no run of train-motion that was stopped. Start it with --clips.")
    saved = read_run_settings(TrainMotionOptions, run, PROGRAM)
    options = replace(
        saved, **find_changed_settings(saved, as_saved(requested), folder_options, run, allowed=RESUMED)
    )
    refuse_gone(run, options)
    return run, options, True


def as_saved(requested: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as a run saves them: with absolute paths, so that it works from any folder."""
    saved = dict(requested)
    for name in ("clips", "motion"):
        if saved.get(name):
            saved[name] = make_absolute(str(saved[name]))
    if saved.get("model"):
        saved["model"] = make_model_absolute(str(saved["model"]))
    return saved


def describe(options: TrainMotionOptions, run: Path, films: Sequence[CaptionedFilm]) -> dict[str, Any]:
    """The run's record."""
    return {
        "settings": options,
        "command": as_command(PROGRAM, options, out=run),
        "clips": {captioned.film.name: captioned.film.content[:16] for captioned in films},
        "versions": package_versions(),
    }


class MotionLearning(Objective):
    """The trained layers, and the two losses of a step."""

    settings: TrainMotionOptions
    drawn_by = ("steps", "guidance", *DRAWN_BY)  # of the clips of the class

    def __init__(
        self,
        model: Backbone,
        clips: Sequence[Tensor],
        conditions: Conditions,
        settings: TrainMotionOptions,
        prior: Prior | None = None,
    ) -> None:
        """`clips` are latents [C, F, h, w] of any lengths, `conditions` their prompts' and the empty one's."""
        self.model, self.clips, self.conditions, self.settings = model, clips, conditions, settings
        self.prior = prior
        self.figures = {}
        # A motion adapter's LoRA, which makes it follow words
        self.other_adapters = active_adapters(model.denoiser)
        self.parameters = find_learned(model.denoiser, settings)
        self.appearance = [value for name, value in self.parameters.items() if f".{LOOKS}." in name]
        self._activate([LOOKS, MOTION], [True] * len(self.parameters))  # adding one put the others to rest
        if settings.gradient_checkpointing:
            cast(Any, model.denoiser).enable_gradient_checkpointing()
        rate = cast(float, settings.learning_rate)
        groups: list[dict[str, Any]] = [{"params": list(self.parameters.values()), "lr": rate}]
        self.optimizer = make_adamw(groups, weight_decay=settings.weight_decay)

    @property
    def images(self) -> int:
        return self.settings.frames * (1 if self.prior is None else 2) + 1

    def learning(self) -> AbstractContextManager[None]:
        return fast_steps(self.model.denoiser)

    def losses(self, step: int) -> Iterator[Tensor]:
        random = generator(self.settings.seed, step)
        # A clip, where its frames begin, and one frame; sometimes without its prompt
        number, start, frame = torch.randint(1 << 30, (3,), generator=random).tolist()
        clip = self.clips[number % len(self.clips)]
        rows = [number % len(self.clips)]
        if float(torch.rand((), generator=random)) < self.settings.prompt_dropout:
            rows = [len(self.clips)]
        text = self.conditions[rows]
        # Appearance, from one frame, in the spatial layers
        picture = clip[None, :, frame % clip.shape[1]]
        predicted, targets = self.predict(picture, text, random)
        yield (predicted - targets).square().mean()
        # Motion, in the temporal layers: the spatial ones are frozen
        first = start % (clip.shape[1] - self.settings.frames + 1)
        moving = clip[None, :, first : first + self.settings.frames]
        for value in self.appearance:
            value.requires_grad_(False)
        predicted, targets = self.predict(moving, text, random)
        anchor = frame % self.settings.frames
        motion_error = remove_appearance(predicted, anchor) - remove_appearance(targets, anchor)
        # Gradient checkpointing recomputes the forward pass, which needs the same frames and adapters
        with rows_as_clips(self.model.denoiser, self.settings.frames):
            yield (
                predicted - targets
            ).square().mean() + self.settings.debiased * motion_error.square().mean()
        if self.prior is not None:
            with rows_as_clips(self.model.denoiser, self.settings.frames), self.activate_only([MOTION]):
                yield self.settings.prior_loss_weight * self.measure_drift(self.prior, random)
        for value in self.appearance:
            value.requires_grad_(True)

    def measure_drift(self, prior: Prior, random: torch.Generator) -> Tensor:
        """The squared error [] of the temporal layers' predictions of a clip of the class, against the base's own."""
        number = int(torch.randint(len(prior.clips), (), generator=random))
        clip, text = prior.clips[number][None], prior.conditions[[number]]
        state = random.get_state()
        with torch.no_grad(), self.activate_only([]):
            base, _ = self.predict(clip, text, random)
        random.set_state(state)
        with self.activate_only([MOTION]):
            predicted, _ = self.predict(clip, text, random)
        return (predicted - base).square().mean()

    @contextmanager
    def activate_only(self, names: Sequence[str]) -> Iterator[None]:
        """Inside the `with`, of the trained adapters only these are active; `requires_grad` is unchanged."""
        previous, learns = self.names, [value.requires_grad for value in self.parameters.values()]
        try:
            self._activate(names, learns)
            yield
        finally:
            self._activate(previous, learns)

    def _activate(self, names: Sequence[str], learns: Sequence[bool]) -> None:
        self.names = names
        activate_adapters(self.model.denoiser, [*self.other_adapters, *names])
        for value, learn in zip(self.parameters.values(), learns, strict=True):
            value.requires_grad_(learn)

    def predict(self, clean: Tensor, text: Conditions, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """(prediction, target) for a noised picture [1, C, h, w] or clip [1, C, F, h, w]."""
        model = self.model
        index = torch.randint(len(model.path.levels.a), (1,), generator=random)
        noise = send(torch.randn(clean.shape, generator=random), model.device)
        clean, level = send(clean.float(), model.device), model.path.levels[index]
        noisy = add_noise(clean, noise, level)
        targets = target(clean, noise, level, model.path.prediction_type)
        return model.predict(noisy, index, text), targets

    def write(self, run: Path, header: dict[str, str]) -> dict[str, Any]:
        save_lora(run / LORA_WEIGHTS, self.model.denoiser, MOTION, metadata=header)
        return {"weights": LORA_WEIGHTS}


class WholeMotionLearning(MotionLearning):
    """Like `MotionLearning`, for all weights of the motion adapter, which are saved."""

    def write(self, run: Path, header: dict[str, str]) -> dict[str, Any]:
        motion = find_motion(self.model.denoiser)
        assert motion is not None
        lora_file = Path(self.settings.motion).expanduser() / LORA_WEIGHTS
        if self.settings.motion and lora_file.is_file():  # the LoRA that makes it follow words
            shutil.copyfile(lora_file, run / LORA_WEIGHTS)
        save_motion_adapter(run, motion.adapter)
        return {"weights": WEIGHTS}


def find_learned(denoiser: nn.Module, settings: TrainMotionOptions) -> dict[str, Tensor]:
    """The trained tensors of a UNet with a motion adapter, by name, all fp32.

    A LoRA for the appearance in the spatial layers and one for the motion in the temporal ones, or these themselves.
    """
    names = [name for name, _ in denoiser.named_modules() if name.endswith(LAYERS)]
    over_time = [name for name in names if ".motion_modules." in name]
    over_space = [name for name in names if ".attentions." in name and name not in over_time]
    lora_settings: dict[str, Any] = {
        "rank": settings.rank,
        "alpha": float(settings.rank),
        "seed": settings.seed,
    }
    appearance = add_lora(denoiser, LOOKS, targets=over_space, **lora_settings)
    if settings.method == "lora":
        return appearance | add_lora(denoiser, MOTION, targets=over_time, **lora_settings)
    motion = find_motion(denoiser)
    assert motion is not None
    adapter = cast(nn.Module, motion.adapter).float().requires_grad_(True)
    return appearance | {f"{MOTION}.{name}": value for name, value in adapter.named_parameters()}


def remove_appearance(prediction: Tensor, anchor: int, beta: float = 1.0) -> Tensor:
    """√(β² + 1)·ε_i − β·ε_anchor for every frame i of [B, C, F, h, w] (Zhao et al. 2023, eq. 5)."""
    return math.sqrt(beta**2 + 1) * prediction - beta * prediction[:, :, anchor : anchor + 1]
