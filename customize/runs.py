"""A training run from pictures to pictures, and the folder that it leaves behind."""

from __future__ import annotations

import dataclasses
import json
import platform
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

from PIL.Image import Image

from backbone.concept import Concept, check_token, rare_words, spoken
from backbone.console import UserError, progress, say
from backbone.files import append_jsonl, content_hash, read_jsonl, write_json, write_text
from backbone.images import Picture, check, read_folder, square
from backbone.model import Backbone
from backbone.new_words import FILE as WORDS
from backbone.new_words import words_of
from backbone.sample import Request, sample
from backbone.sheet import Cell, in_rows, save_png, sheet
from customize.dreambooth import Training, prepare, preserves
from customize.learn import METHODS, OWN_WORDS
from customize.settings import FILE, Settings, as_flags, read_settings
from customize.watch import Watch

LOG = "log.jsonl"
SHEET = "sheet.png"
PACKAGES = ("atelier-diffusion", "torch", "diffusers", "transformers", "peft", "accelerate")


def train_concept(
    asked: dict[str, Any],
    pictures: list[Picture],
    *,
    images: str,
    token: str,
    class_noun: str | None,
    out: Path | None,
) -> Path:
    """Trains a new concept and gives its run folder. `asked` holds what the user set; the rest comes from the model.

    `pictures` are those of `images`, checked. Raises `UserError` for a bad token or a run folder that is taken.
    """
    began = time.perf_counter()
    run = out or Path("runs") / run_name(images)
    if (run / FILE).exists():
        raise UserError(
            f"{run} already holds a run. Continue it with --resume {run}, or choose another --out."
        )
    model = Backbone.open(
        asked.get("model", "moji"),
        device=asked.get("device", "auto"),
        precision=asked.get("precision", "auto"),
    )
    if class_noun is None:
        class_noun = guess(model, pictures, images)
    settings = resolved(model, asked, images=images, token=token, class_noun=class_noun)
    check_token(token, model.text_encoder.tokenizer.get_vocab())
    if settings.method not in METHODS:
        raise UserError(f"There is no method {settings.method}. Choose one of {', '.join(METHODS)}.")
    if settings.method in OWN_WORDS:
        settings = dataclasses.replace(
            settings, token_words=" ".join(words_of(settings.token, settings.num_vectors))
        )
    elif not settings.token_words:
        key = "".join(content_hash(picture.read()) for picture in pictures)
        words = rare_words(model.text_encoder.tokenizer.get_vocab(), key)
        settings = dataclasses.replace(settings, token_words=words)
    run.mkdir(parents=True, exist_ok=True)
    write_record(run, settings, timings={})
    return carry_on(run, settings, model, pictures, began=began)


def resume_concept(run: Path) -> Path:
    """Goes on with a run that was stopped; the weights come out as if it had not been."""
    settings = read_settings(run)
    pictures = read_folder(settings.images)
    check(pictures)
    model = Backbone.open(settings.model, device=settings.device, precision=settings.precision)
    return carry_on(run, settings, model, pictures, began=time.perf_counter())


def carry_on(
    run: Path, settings: Settings, model: Backbone, pictures: list[Picture], *, began: float
) -> Path:
    """Trains from the last checkpoint, if there is one, to the finished folder."""
    concept = Concept(
        kind=settings.method,
        model=settings.model,
        fingerprint=model.fingerprint,
        tokens={settings.token: settings.token_words},
        class_noun=settings.class_noun,
    )
    instance, prior = settings.prompts()
    prompts = [spoken(captioned(picture, instance, settings.token), [concept]) for picture in pictures]
    what = (
        f"gets {settings.num_vectors} new words of its own"
        if settings.method in OWN_WORDS
        else f"stands for “{settings.token_words}”"
    )
    say(f"{len(pictures)} pictures of “{settings.called()}”; {settings.token} {what}.")
    training = Training(model, prepare(model, pictures, [*prompts, prior], settings), settings)
    training.resume(run)
    trim_log(run, training.done)
    prepared = time.perf_counter()
    previews = Previews(model, settings, concept)
    watch = Watch(run, training, concept, pictures)
    with stopping() as stop, progress(settings.steps, "training", done=training.done) as bar:
        watch.look()
        for report in training.steps():
            append_jsonl(run / LOG, dataclasses.asdict(report))
            bar.advance(images=settings.batch, loss=report.loss, learning_rate=report.learning_rate)
            finished = report.step == settings.steps
            if stop or finished or report.step % settings.checkpointing_steps == 0:
                training.save(run)
            if stop:
                raise KeyboardInterrupt(
                    f"Stopped and saved at step {report.step} of {settings.steps}. "
                    f"Continue with: customize train --resume {run}"
                )
            if report.step % settings.validation_steps == 0 and not finished:
                with training.averaged():
                    previews.save(run / "previews" / f"step-{report.step:06d}.png", count=4)
            if watch.due(report.step) and watch.look() and not finished:
                training.save(run)
                break
    trained = time.perf_counter()
    header = {
        "atelier_token": settings.token,
        "atelier_words": settings.token_words,
        "base_model": settings.model,
    }
    dataclasses.replace(concept, **training.write(run, header)).write(run)
    watch.report(settings)
    with training.averaged():
        shown = previews.save(run / SHEET, count=8, subjects=pictures)
    ended = time.perf_counter()
    timings = {
        "prepare": prepared - began,
        "train": trained - prepared,
        "show": ended - trained,
        "all": ended - began,
    }
    seconds = {name: round(value, 2) for name, value in timings.items()}
    write_record(run, settings, timings=seconds)
    write_text(run / "README.md", readme(run, settings, shown, seconds))
    return run


class Previews:
    """Draws the run's prompts with the adapter in training."""

    def __init__(self, model: Backbone, settings: Settings, concept: Concept) -> None:
        self.model, self.settings = model, settings
        self.prompts = [prompt.replace("{}", settings.called()) for prompt in settings.sheet_prompts]
        self.requests = [Request(spoken(prompt, [concept]), (i, 0)) for i, prompt in enumerate(self.prompts)]

    def save(self, path: Path, *, count: int, subjects: list[Picture] | None = None) -> list[str]:
        """Writes a sheet of the first `count` prompts, the subject's pictures above them; gives the prompts."""
        drawn: list[Image] = list(
            sample(
                self.model,
                self.requests[:count],
                steps=self.settings.sample_steps,
                guidance=self.settings.guidance,
                seed=self.settings.seed,
            )
        )
        own = [square(picture.open(), self.model.resolution) for picture in (subjects or [])[:8]]
        cells = [Cell(picture, prompt) for picture, prompt in zip(drawn, self.prompts, strict=False)]
        rows = ([list(own)] if own else []) + in_rows(cells, 4)
        titles = ["The subject", "What the model draws now"] if own else []
        settings = self.settings
        how = f"{settings.sample_steps} steps, guidance {settings.guidance:g}, seed {settings.seed}"
        note = f"{settings.model}, {how}"
        save_png(path, sheet(rows, title=self.settings.called(), note=note, row_titles=titles))
        return self.prompts[:count]


@contextmanager
def stopping() -> Iterator[list[int]]:
    """A list that is empty until Ctrl-C or SIGTERM comes; the second one interrupts at once."""
    caught: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
        say("Saving, then stopping …")

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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


def guess(model: Backbone, pictures: list[Picture], images: str) -> str:
    """The class of the subject, said aloud: from the name of its folder if that is a noun, else by the scorer.

    Raises `UserError` where the name says nothing and the model has no scorer.
    """
    from backbone.scorers import guess_class, load_scorer
    from backbone.world.words import vocabulary

    nouns = tuple(vocabulary().nouns)
    for word in re.split(r"[^a-z]+", run_name(images).lower()):
        if word in nouns:
            say(f"The name of {images} says that it shows a {word}. --class says otherwise.")
            return word
    folder = model.location.local("scorer")
    if folder is None:
        raise UserError(
            f"Say what the pictures show with --class (as --class dog): {model.location.name} cannot guess it."
        )
    scorer = load_scorer(folder)
    ranked = guess_class(scorer, [square(picture.open(), 128) for picture in pictures], nouns)
    best, second = ranked[0], ranked[1]
    seems = f"{best[0]} ({best[1]:.0%}; next {second[0]}, {second[1]:.0%})"
    say(f"The pictures seem to show a {seems}. --class says otherwise.")
    return str(best[0])


def captioned(picture: Picture, instance: str, token: str) -> str:
    """The training prompt of a picture: its own caption where it has one, the token put in front if it lacks it."""
    if not picture.caption:
        return instance
    return picture.caption if token in picture.caption else f"{instance}, {picture.caption}"


def run_name(images: str) -> str:
    """A run's name from its pictures: the folder's, or the file's without its ending."""
    path = Path(images).expanduser().resolve()
    return (path.stem if path.is_file() else path.name) or "run"


def trim_log(run: Path, done: int) -> None:
    """Forgets log lines of steps that will be taken again."""
    path = run / LOG
    if not path.exists():
        return
    kept = [json.dumps(line) + "\n" for line in read_jsonl(path) if line["step"] <= done]
    write_text(path, "".join(kept))  # at once, so that a kill leaves the old log or the new one


def write_record(run: Path, settings: Settings, *, timings: dict[str, float]) -> None:
    """Writes the run's `settings.json`: what was resolved, how to repeat it, and with which versions."""
    command = as_flags(settings, run)
    write_json(
        run / FILE, {"settings": settings, "command": command, "versions": versions(), "timings": timings}
    )


def versions() -> dict[str, str]:
    """Of Python and the packages that matter."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def readme(run: Path, settings: Settings, prompts: list[str], seconds: dict[str, float]) -> str:
    """The run's README.md."""
    instance, prior = settings.prompts()
    preserved = f" “{prior}” kept what it was." if preserves(settings) else ""
    lines = [
        f"# {settings.called()}",
        "",
        f"A concept learned by `customize train` from `{settings.images}` on `{settings.model}`: "
        f"{described(settings)}, {settings.steps} steps of {settings.batch} in {seconds['train']:.0f} s "
        f"({seconds['all']:.0f} s in all).",
        "",
        f"Write `{settings.token}` in a prompt; the model reads “{settings.token_words}”. Trained on “{instance}”."
        + preserved,
        "",
        f"![the subject above, samples below]({SHEET})",
        "",
        "Again:",
        "",
        f"    {as_flags(settings, run)}",
        "",
        "Pictures:",
        "",
        f'    customize sample "{prompts[0] if prompts else instance}" --concept {run}',
        "",
        *in_diffusers(run, settings, instance),
        "",
    ]
    return "\n".join(lines)


def described(settings: Settings) -> str:
    """What was trained, in a phrase."""
    if settings.method in ("lora", "pivotal"):
        what = f"{settings.adapter} of rank {settings.rank}"
        return what if settings.method == "lora" else f"{settings.num_vectors} new words, then {what}"
    return METHODS[settings.method]


def in_diffusers(run: Path, settings: Settings, instance: str) -> list[str]:
    """How the concept is used in diffusers, as far as it reads these files."""
    lines = []
    if settings.method in OWN_WORDS:
        lines.append(f'pipeline.load_textual_inversion("{run / WORDS}")')
    if settings.method in ("lora", "pivotal") and settings.adapter in ("lora", "dora"):
        lines.append(f'pipeline.load_lora_weights("{run}")')
    elif settings.method != "textual-inversion":
        return ["For other programs, bake it into a pipeline: `customize merge --help`."]
    # diffusers itself writes out a word of several vectors, but only one in small letters
    itself = settings.method in OWN_WORDS and settings.token == settings.token.lower()
    prompt = instance if itself else instance.replace(settings.token, settings.token_words)
    return ["In diffusers:", "", "```python", *lines, f'pipeline("{prompt}")', "```"]
