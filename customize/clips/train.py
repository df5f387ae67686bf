"""`customize train-motion`: a motion `[M]` from a few clips, as a LoRA of a motion adapter's layers, or all of these.

The split of MotionDirector (Zhao et al. 2023, section 3.2): a LoRA in the layers over space learns single frames, and
is thrown away; beside it one in the layers over time learns clips, so that it need not learn their looks. Its loss has
a part without them: what all frames have in common is taken off by that of one frame (eq. 5).
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
from backbone.io.console import UserError, count_of, notify
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
from backbone.memory.motion import LearnedMotion, MotionEstimator
from backbone.memory.planner import MemorySettings, fit, precision_name
from backbone.models.cache import encode_prompts_cached
from backbone.models.clips.motion import (
    attach_motion,
    clip_of,
    hash_motion,
    motion_of,
    new_motion_adapter,
    read_motion_adapter,
    save_motion_adapter,
)
from backbone.models.locate import absolute_model
from backbone.models.model import Backbone
from backbone.models.sample import Frames, Request, sample_latents
from backbone.training.fast import fast_steps
from backbone.training.optimizer import make_adamw
from backbone.training.run import Objective, drive
from backbone.training.settings import (
    RunFolderOptions,
    changed_settings,
    find_resumed,
    read_run_settings,
    refuse_gone,
)
from customize.clips.films import Captioned, list_films
from customize.clips.settings import ADAPTER_FILE, TrainMotionOptions
from customize.data.captions import (
    TrainingPrompt,
    describe_brackets,
    describe_foreign_syntax,
    describe_truncated,
)

PROGRAM = "customize train-motion"
RESUMED = ("device", "clips", "motion", "model")  # what may be said anew beside --resume: it may have moved
LOOKS = "looks"
LAYERS = ("to_q", "to_k", "to_v", "to_out.0")


def train_motion(given: Mapping[str, Any], said: RunFolderOptions) -> Path:
    """Learn the motion of clips, and give the run folder, which is a concept of the kind `motion`.

    `given` are settings by field of `TrainMotionOptions`. Raises `UserError` for clips that cannot be used, an adapter
    of another model, and a folder that is taken.
    """
    run, asked, goes_on = open_run(given, said)
    held = hold_folder if goes_on else processes.hold_new_run
    whole = asked.method == "full"
    if processes.world_size() > 1:
        raise UserError("customize train-motion learns in one process. Start it without a launcher.")
    films = list_films(asked.clips)
    short = [one.film for one in films if len(one.film.frames) < asked.frames]
    if short:
        least = min(short, key=lambda film: len(film.frames))
        raise UserError(
            f"{least.name} has {len(least.frames)} frames, and --frames is {asked.frames}. Ask for fewer."
        )
    refuse_stills(films)
    # Latents and prompts once, then only the denoiser is needed
    model, settled = open_model(asked)
    if not whole:
        check_token(asked.token, model.text_encoder.tokenizer.get_vocab())
    concept = Concept(MOTION, asked.model, model.fingerprint, {asked.token: asked.token_words}, "")
    latents = encode_films(model, films)
    told = write_prompts(films, asked, concept, model)
    captions, prompts = [one.written for one in told], [one.resolved for one in told]
    conditions = encode_prompts_cached(model, [*prompts, ""])
    kept = draw_prior(model, captions, asked)
    model.free("autoencoder", "text_encoder")
    with held(run):
        kind = WholeMotionLearning if whole else MotionLearning
        learning = kind(model, latents, conditions, settled, kept)
        learning.sources = {
            "model": model.fingerprints,
            "clips": " ".join(one.film.content for one in films),
            "set of captions": content_hash("\n".join(prompts).encode()),
            **({} if whole else {"motion adapter": hash_motion(model.denoiser)}),
        }
        learning.resume(run)
        write_json(run / "settings.json", describe(asked, run, films))
        notify(f"Learning from {count_of(len(films), 'clip')}: {count_of(asked.steps, 'step')}.")
        drive(learning, run, command=PROGRAM)
        learning.write(run, {"limner_token": asked.token, "base_model": asked.model})
        if not whole:
            write_json(run / ADAPTER_FILE, {"adapter": asked.motion, "frames": asked.frames})
            replace(concept, weights=LORA_WEIGHTS, resolution=model.asked_resolution).write(run)
    return run


def open_model(asked: TrainMotionOptions) -> tuple[Backbone, TrainMotionOptions]:
    """The model with the motion adapter that learns, or a new one, as the plan for `asked.vram` places it.

    Its settings beside: with what that plan saves. Raises `UserError` as `open_adapter`, and for a device that it does
    not fit.
    """
    model = Backbone.open(asked.model, device=asked.device, precision=asked.precision)
    adapter, settled = open_adapter(model, asked), asked
    if asked.vram is not None:
        learned = LearnedMotion(
            asked.frames,
            adapter.config,
            lambda network: find_learned(network, asked).values(),
            asked.prior == "base",
        )
        start = MemorySettings(precision_name(model), asked.gradient_checkpointing, fixed_optimizer=True)
        model, choice = fit(MotionEstimator(model, learned, device=model.device.type), asked.vram, start)
        settled = replace(asked, gradient_checkpointing=choice.checkpointing)
    if asked.motion:
        set_in_motion(model, Moves(asked.motion))
    else:
        attach_motion(model.denoiser, adapter)
    return model, settled


def open_adapter(model: Backbone, asked: TrainMotionOptions) -> Any:
    """The motion adapter that was named, or a new one for this model, which is said.

    Raises `UserError` for an adapter of another model, a model without a UNet, and too few positions for the frames.
    """
    if asked.motion:
        adapter = read_motion_adapter(asked.motion)
    else:
        outline: Any = model.family.spec(model.location, model.dtype).denoiser.instantiate()
        if not hasattr(outline, "down_blocks"):
            raise UserError(
                f"Motion is learned in a UNet, and {asked.model} is a transformer. Give a --model that has a UNet."
            )
        adapter = new_motion_adapter(outline.config, seed=asked.seed, frames=max(32, asked.frames))
        count = sum(value.numel() for value in cast(nn.Module, adapter).parameters()) / 1e6
        notify(
            f"A new motion adapter of {count:.1f} M parameters starts from nothing, and a few clips are too little to "
            "train it. With --motion an adapter that has been trained goes on."
        )
    longest = int(cast(Any, adapter).config.motion_max_seq_length)
    if asked.frames > longest:
        raise UserError(
            f"{asked.motion} has positions for {longest} frames, and --frames is {asked.frames}. Ask for fewer."
        )
    return adapter


def encode_films(model: Backbone, films: Sequence[Captioned]) -> list[Tensor]:
    """The latents [C, F, h, w] of clips."""
    latents = []
    with progress(len(films), "encoding clips", brief=True) as bar:
        for one in films:
            pixels = [to_tensor(crop_square(frame, model.resolution)) for frame in one.film.frames]
            latents.append(model.encode_clip(torch.stack(pixels)).cpu())
            bar.advance()
    return latents


@dataclass(frozen=True, eq=False)
class Prior:
    """Clips that the base drew of the class: latents [C, F, h, w] each, and their prompts' conditions."""

    clips: Sequence[Tensor]
    conditions: Conditions


def draw_prior(model: Backbone, prompts: Sequence[str], asked: TrainMotionOptions) -> Prior | None:
    """Clips of the same words without the token, drawn by the model as it is; None where nothing is to be kept."""
    if asked.prior != "base" or not asked.prior_loss_weight:
        return None
    words = list(dict.fromkeys(without_token(prompt, asked.token) for prompt in prompts))
    chosen = [words[i % len(words)] for i in range(asked.prior_clips)]
    requests = [Request(prompt, (i, 0)) for i, prompt in enumerate(chosen)]
    found: list[Tensor] = []
    with progress(len(requests), "drawing clips of the class") as bar:
        for clips in sample_latents(
            model,
            requests,
            steps=int(model.defaults["steps"]),
            guidance=float(model.defaults["guidance"]),
            seed=asked.seed,
            batch=1,
            frames=Frames(asked.frames),
            advance=bar.advance_images,
        ):
            found += list(clips.cpu())
    return Prior(found, encode_prompts_cached(model, chosen))


def write_prompts(
    films: Sequence[Captioned], asked: TrainMotionOptions, concept: Concept, model: Backbone
) -> list[TrainingPrompt]:
    """What each clip is learned under: its caption or the prompt, with the token, or without where none is learned.

    Says what of them is read as plain text, and which are cut off.
    """
    prompts = []
    for one in films:
        source = f"{one.film.name}'s caption" if one.caption else "--prompt"
        said = (one.caption or asked.prompt).replace("{token}", asked.token)
        if asked.method == "full":
            said = without_token(said, asked.token)
            prompts.append(TrainingPrompt(said, said, source))
        else:
            said = with_token(said, asked.token)
            prompts.append(TrainingPrompt(said, replace_tokens(said, [concept]), source))
    unread = asked.prompt != TrainMotionOptions.prompt and all(one.caption for one in films)
    for sentence in (
        "--prompt has no effect: every clip has a caption." if unread else "",
        describe_brackets(prompts, concept),
        *describe_foreign_syntax(prompts),
        *describe_truncated(prompts, asked.token_words, asked.token, model.text_encoder),
    ):
        if sentence:
            notify(sentence)
    return prompts


def refuse_stills(films: Sequence[Captioned]) -> None:
    """`UserError` for clips in which nothing moves: all their frames are equal."""
    for film in [one.film for one in films]:
        if len({frame.tobytes() for frame in film.frames}) == 1:
            raise UserError(f"All frames of {film.name} are equal, so there is no motion in it. Take it out.")


def with_token(prompt: str, token: str) -> str:
    """A prompt with the token behind it, where it does not hold it."""
    if mentions(prompt, token):
        return prompt
    return f"{prompt}, {token}" if prompt.strip() else token


def without_token(prompt: str, token: str) -> str:
    """What a prompt says of the class: without the token, and without a comma beside it."""
    parts = (re.sub(word_pattern(token), "", part) for part in prompt.split(","))
    return ", ".join(" ".join(part.split()) for part in parts if part.strip())


def open_run(given: Mapping[str, Any], said: RunFolderOptions) -> tuple[Path, TrainMotionOptions, bool]:
    """The run's folder and settings, new ones or those of a run that goes on, and whether it does (`find_resumed`).

    Raises `UserError` for a folder that is taken, for one that holds no run that was stopped, and for settings beside
    such a run's own.
    """
    default_folder = Path("runs") / run_name(given["clips"]) if given.get("clips") else None
    run = None if said.resume is None else find_resumed(said, PROGRAM, default_folder)
    if run is None:
        asked = build(TrainMotionOptions, given)
        refuse_idle(asked, given)
        run = said.out or Path("runs") / run_name(asked.clips)
        refuse_taken(run, [asked.clips])
        return run, build(TrainMotionOptions, as_kept(vars(asked))), False
    if not (run / CHECKPOINT).is_file():
        if not run.is_dir():
            raise no_run_folder(run)
        raise UserError(f"{run} holds no run of train-motion that was stopped. Start it with --clips.")
    own = read_run_settings(TrainMotionOptions, run, PROGRAM)
    asked = replace(own, **changed_settings(own, as_kept(given), said, run, allowed=RESUMED))
    refuse_gone(run, asked)
    return run, asked, True


def as_kept(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with whole paths, as a run keeps them: so it goes on, and is drawn with, from any folder."""
    kept = dict(given)
    for name in ("clips", "motion"):
        if kept.get(name):
            kept[name] = make_absolute(str(kept[name]))
    if kept.get("model"):
        kept["model"] = absolute_model(str(kept["model"]))
    return kept


def describe(asked: TrainMotionOptions, run: Path, films: Sequence[Captioned]) -> dict[str, Any]:
    """The run's record."""
    return {
        "settings": asked,
        "command": as_command(PROGRAM, asked, out=run),
        "clips": {one.film.name: one.film.content[:16] for one in films},
        "versions": package_versions(),
    }


class MotionLearning(Objective):
    """What is learned, and the two losses of a step."""

    settings: TrainMotionOptions

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
        self.beside = active_adapters(model.denoiser)  # by which an adapter hears its words
        self.parameters = find_learned(model.denoiser, settings)
        self.looks = [value for name, value in self.parameters.items() if f".{LOOKS}." in name]
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
        # What the clip looks like, from one frame, in the layers over space
        picture = clip[None, :, frame % clip.shape[1]]
        said, wanted = self.predict(picture, text, random)
        yield (said - wanted).square().mean()
        # How it moves, in the layers over time: those over space are held
        first = start % (clip.shape[1] - self.settings.frames + 1)
        moving = clip[None, :, first : first + self.settings.frames]
        for value in self.looks:
            value.requires_grad_(False)
        said, wanted = self.predict(moving, text, random)
        anchor = frame % self.settings.frames
        apart = without_looks(said, anchor) - without_looks(wanted, anchor)
        # A backward pass that computes it again has to meet the same frames and adapters
        with clip_of(self.model.denoiser, self.settings.frames):
            yield (said - wanted).square().mean() + self.settings.debiased * apart.square().mean()
        if self.prior is not None:
            with clip_of(self.model.denoiser, self.settings.frames), self.working([MOTION]):
                yield self.settings.prior_loss_weight * self.drift(self.prior, random)
        for value in self.looks:
            value.requires_grad_(True)

    def drift(self, prior: Prior, random: torch.Generator) -> Tensor:
        """The squared error [] of predictions of a clip of the class, by layers over time alone, to the base's own."""
        number = int(torch.randint(len(prior.clips), (), generator=random))
        clip, text = prior.clips[number][None], prior.conditions[[number]]
        state = random.get_state()
        with torch.no_grad(), self.working([]):
            wanted, _ = self.predict(clip, text, random)
        random.set_state(state)
        with self.working([MOTION]):
            said, _ = self.predict(clip, text, random)
        return (said - wanted).square().mean()

    @contextmanager
    def working(self, names: Sequence[str]) -> Iterator[None]:
        """Inside the `with` these adapters alone work; what learns stays what learns."""
        before, learns = self.names, [value.requires_grad for value in self.parameters.values()]
        try:
            self._activate(names, learns)
            yield
        finally:
            self._activate(before, learns)

    def _activate(self, names: Sequence[str], learns: Sequence[bool]) -> None:
        self.names = names
        activate_adapters(self.model.denoiser, [*self.beside, *names])
        for value, own in zip(self.parameters.values(), learns, strict=True):
            value.requires_grad_(own)

    def predict(self, clean: Tensor, text: Conditions, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """What the network predicts of a noised picture [1, C, h, w] or clip [1, C, F, h, w], and what it should."""
        model = self.model
        index = torch.randint(len(model.path.levels.a), (1,), generator=random)
        noise = send(torch.randn(clean.shape, generator=random), model.device)
        clean, level = send(clean.float(), model.device), model.path.levels[index]
        noisy = add_noise(clean, noise, level)
        wanted = target(clean, noise, level, model.path.prediction_type)
        return model.predict(noisy, index, text), wanted

    def write(self, run: Path, header: dict[str, str]) -> dict[str, Any]:
        save_lora(run / LORA_WEIGHTS, self.model.denoiser, MOTION, metadata=header)
        return {"weights": LORA_WEIGHTS}


class WholeMotionLearning(MotionLearning):
    """The same of all weights of the motion adapter, which is what is kept."""

    def write(self, run: Path, header: dict[str, str]) -> dict[str, Any]:
        motion = motion_of(self.model.denoiser)
        assert motion is not None
        words = Path(self.settings.motion).expanduser() / LORA_WEIGHTS
        if self.settings.motion and words.is_file():  # by which it was trained to hear words
            shutil.copyfile(words, run / LORA_WEIGHTS)
        save_motion_adapter(run, motion.adapter)
        return {"weights": WEIGHTS}


def find_learned(denoiser: nn.Module, settings: TrainMotionOptions) -> dict[str, Tensor]:
    """What learns of a UNet that a motion adapter is attached to, by name, all fp32.

    A LoRA of the looks in the layers over space, and one of the motion in those over time, or these themselves.
    """
    names = [name for name, _ in denoiser.named_modules() if name.endswith(LAYERS)]
    over_time = [name for name in names if ".motion_modules." in name]
    over_space = [name for name in names if ".attentions." in name and name not in over_time]
    how: dict[str, Any] = {"rank": settings.rank, "alpha": float(settings.rank), "seed": settings.seed}
    looks = add_lora(denoiser, LOOKS, targets=over_space, **how)
    if settings.method == "lora":
        return looks | add_lora(denoiser, MOTION, targets=over_time, **how)
    motion = motion_of(denoiser)
    assert motion is not None
    whole = cast(nn.Module, motion.adapter).float().requires_grad_(True)
    return looks | {f"{MOTION}.{name}": value for name, value in whole.named_parameters()}


def without_looks(prediction: Tensor, anchor: int, beta: float = 1.0) -> Tensor:
    """√(β² + 1)·ε_i − β·ε_anchor for every frame i of [B, C, F, h, w] (Zhao et al. 2023, eq. 5)."""
    return math.sqrt(beta**2 + 1) * prediction - beta * prediction[:, :, anchor : anchor + 1]
