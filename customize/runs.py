"""A training run from pictures to pictures, and the folder that it leaves behind."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL.Image import Image

from backbone import processes
from backbone.concept import Concept, check_token, rare_words, spoken
from backbone.console import UserError, progress, say
from backbone.files import append_jsonl, content_hash, read_header, write_json, write_text
from backbone.images import Picture, check, read_folder, square
from backbone.loop import Report
from backbone.model import Backbone
from backbone.new_words import FILE as WORDS
from backbone.new_words import words_of
from backbone.runs import clear_failed_try, refuse_taken, stopping, trim_log, versions
from backbone.sample import Request, sample
from backbone.sheet import Cell, in_rows, save_png, sheet
from backbone.thrift import measures_of
from customize.dreambooth import Group, Training, prepare, preserves, share_of
from customize.hub import card, push
from customize.learn import METHODS, OWN_WORDS, refuse_other_encoders
from customize.masks import save_masks
from customize.settings import FILE, Settings, Subject, as_flags, read_settings, resolved
from customize.watch import Watch

LOG = "log.jsonl"
SHEET = "sheet.png"
MASKS = "masks.png"


def train_concept(
    asked: dict[str, Any], subjects: Sequence[Subject], *, out: Path | None, vram: float | None = None
) -> Path:
    """Trains a new concept and gives its run folder. `asked` holds what the user set; the rest comes from the model.

    `vram` is in GiB.

    A class that is empty is guessed, words that are empty are found. Raises `UserError` for bad pictures, all
    of them listed, a bad token, or a run folder that is taken.
    """
    began = time.perf_counter()
    processes.join(asked.get("device") or "auto")
    pictures = _pictures_of(subjects, asked.get("caption_column", ""), asked.get("image_column", ""))
    run = out or Path("runs") / run_name(subjects[0].images)
    refuse_taken(run)
    for folder in asked.get("class_images", ()):
        check(read_folder(folder))
    model = Backbone.open(
        asked.get("model", "moji"),
        device=asked.get("device", "auto"),
        precision=asked.get("precision", "auto"),
        resolution=asked.get("resolution", 0),
    )
    nouns = [
        subject.class_noun or guess(model, folder, subject.images)
        for subject, folder in zip(subjects, pictures, strict=True)
    ]
    first = subjects[0]
    named = {
        "images": first.images,
        "token": first.token,
        "class_noun": nouns[0],
        "subject": tuple(subject.flag() for subject in subjects[1:]),
    }
    if first.token_words:
        named["token_words"] = first.token_words
    settings = resolved(asked | named, model.defaults)
    model = Backbone.open(
        settings.model,
        device=settings.device,
        precision=settings.precision,
        measures=measures_of(settings),
        resolution=settings.resolution,
    )
    if vram is not None:
        from customize.budget import budgeted

        processes.refuse_shards("--vram counts for a process alone; it")
        model, settings = budgeted(model, settings, sum(map(len, pictures)), vram)
    vocabulary = model.text_encoder.tokenizer.get_vocab()
    if settings.train_text_encoder:
        refuse_other_encoders(model)
    found: list[Subject] = []
    for subject, noun, folder in zip(subjects, nouns, pictures, strict=True):
        check_token(subject.token, vocabulary)
        if any(subject.token == other.token for other in found):
            raise UserError(f"Two subjects have the token {subject.token}. Give each its own.")
        words = subject.token_words
        if settings.method in OWN_WORDS:
            words = " ".join(words_of(subject.token, settings.num_vectors))
        elif not words:
            key = "".join(content_hash(picture.read()) for picture in folder)
            words = rare_words(vocabulary, key, taken=[other.token_words for other in found])
        found.append(dataclasses.replace(subject, class_noun=noun, token_words=words))
    settings = dataclasses.replace(
        settings, token_words=found[0].token_words, subject=tuple(subject.flag() for subject in found[1:])
    )
    share_of(settings)
    processes.barrier()  # now every process has seen that the folder is free
    if processes.is_writer():
        clear_failed_try(run)
        write_record(run, settings, timings={})
    return carry_on(run, settings, model, pictures, began=began)


def resume_concept(run: Path) -> Path:
    """Goes on with a run that was stopped; the weights come out as if it had not been."""
    settings = read_settings(run)
    processes.join(settings.device)
    pictures = _pictures_of(settings.subjects(), settings.caption_column, settings.image_column)
    model = Backbone.open(
        settings.model,
        device=settings.device,
        precision=settings.precision,
        measures=measures_of(settings),
        resolution=settings.resolution,
    )
    return carry_on(run, settings, model, pictures, began=time.perf_counter())


def _pictures_of(subjects: Sequence[Subject], caption_column: str, image_column: str) -> list[list[Picture]]:
    """The images of each subject; `UserError` that lists all which cannot be used."""
    found = [
        read_folder(subject.images, caption_column=caption_column or None, image_column=image_column or None)
        for subject in subjects
    ]
    check([picture for folder in found for picture in folder])
    return found


def carry_on(
    run: Path, settings: Settings, model: Backbone, pictures: Sequence[list[Picture]], *, began: float
) -> Path:
    """Trains from the last checkpoint, if there is one, to the finished folder."""
    subjects = settings.subjects()
    concept = Concept(
        kind=settings.method,
        model=settings.model,
        fingerprint=model.fingerprint,
        tokens={subject.token: subject.token_words for subject in subjects},
        class_noun=settings.class_noun,
    )
    groups = []
    for subject, folder in zip(subjects, pictures, strict=True):
        instance = subject.filled(settings.instance_prompt)
        prompts = [spoken(captioned(picture, instance, subject.token), [concept]) for picture in folder]
        groups.append(Group(folder, prompts, subject.filled(settings.class_prompt)))
        what = (
            f"gets {settings.num_vectors} new words of its own"
            if settings.method in OWN_WORDS
            else f"stands for “{subject.token_words}”"
        )
        say(f"{len(folder)} pictures of “{subject.called()}”; {subject.token} {what}.")
    training = Training(model, prepare(model, groups, settings), settings)
    training.resume(run)
    writes = processes.is_writer()
    if writes:
        trim_log(run / LOG, training.done)
        if settings.mask == "auto":
            save_masks(run / MASKS, pictures, training.material.masks or [], flip=settings.flip)
    prepared = time.perf_counter()
    previews = Previews(model, settings, concept)
    watch = Watch(run, training, concept, pictures[0])
    with (
        stopping() as stop,
        notebook(run, settings, done=training.done) as note,
        progress(settings.steps, "training", done=training.done) as bar,
    ):
        watch.look()
        for report in training.steps():
            if writes:
                append_jsonl(run / LOG, dataclasses.asdict(report))
            note(report)
            bar.advance(images=settings.batch, loss=report.loss, learning_rate=report.learning_rate)
            finished = report.step == settings.steps
            halt = processes.any_of(bool(stop))
            if halt or finished or report.step % settings.checkpointing_steps == 0:
                training.save(run)
            if halt:
                raise KeyboardInterrupt(
                    f"Stopped and saved at step {report.step} of {settings.steps}. "
                    f"Continue with: customize train --resume {run}"
                )
            if report.step % settings.validation_steps == 0 and not finished:
                with training.averaged():
                    previews.save(run / "previews" / f"step-{report.step:06d}.png", count=4)
            if processes.any_of(watch.due(report.step) and watch.look()) and not finished:
                training.save(run)
                break
    trained = time.perf_counter()
    if writes:
        header = {
            "limner_token": " ".join(subject.token for subject in subjects),
            "limner_words": " ".join(subject.token_words for subject in subjects),
            "base_model": settings.model,
        }
        dataclasses.replace(concept, **training.write(run, header)).write(run)
        watch.report(settings)
    with training.averaged():
        shown = previews.save(
            run / SHEET, count=8, pictures=[picture for folder in pictures for picture in folder]
        )
    if not writes:
        processes.leave()
        return run
    ended = time.perf_counter()
    timings = {
        "prepare": prepared - began,
        "train": trained - prepared,
        "show": ended - trained,
        "all": ended - began,
    }
    seconds = {name: round(value, 2) for name, value in timings.items()}
    write_record(run, settings, timings=seconds)
    write_text(run / "README.md", card(settings, model) + readme(run, settings, shown, seconds))
    if settings.push_to_hub:
        say(f"Uploaded to {push(run, settings.hub_model_id or run.name)}.")
    processes.leave()
    return run


@contextmanager
def notebook(run: Path, settings: Settings, *, done: int) -> Iterator[Callable[[Report], None]]:
    """Where reports go beside `log.jsonl`: TensorBoard's files under `tensorboard/`, or nowhere.

    What TensorBoard has of steps after `done`, from before the run was stopped, is struck out.
    """
    if settings.report_to == "jsonl" or not processes.is_writer():
        yield lambda report: None
        return
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError as error:
        raise UserError("--report-to tensorboard needs its package. Run: pip install tensorboard") from error
    with SummaryWriter(str(run / "tensorboard"), purge_step=done + 1, flush_secs=10) as writer:

        def note(report: Report) -> None:
            for name in ("loss", "gradient_norm", "learning_rate"):
                writer.add_scalar(name, getattr(report, name), report.step)

        yield note


class Previews:
    """Draws the run's prompts with the adapter in training."""

    def __init__(self, model: Backbone, settings: Settings, concept: Concept) -> None:
        self.model, self.settings = model, settings
        names = [subject.called() for subject in settings.subjects()]
        self.prompts = [
            prompt.replace("{}", names[number % len(names)])
            for number, prompt in enumerate(settings.sheet_prompts)
        ]
        self.requests = [Request(spoken(prompt, [concept]), (i, 0)) for i, prompt in enumerate(self.prompts)]

    def save(self, path: Path, *, count: int, pictures: list[Picture] | None = None) -> list[str]:
        """Writes a sheet of the first `count` prompts, the subject's pictures above them; gives the prompts.

        Of several processes the writer does, and the others draw along where the model is cut up.
        """
        if not processes.takes_part():
            return []
        drawn: list[Image] = list(
            sample(
                self.model,
                self.requests[:count],
                steps=self.settings.sample_steps,
                guidance=self.settings.guidance,
                seed=self.settings.seed,
            )
        )
        own = [square(picture.open(), self.model.resolution) for picture in (pictures or [])[:8]]
        cells = [Cell(picture, prompt) for picture, prompt in zip(drawn, self.prompts, strict=False)]
        rows = ([list(own)] if own else []) + in_rows(cells, 4)
        titles = ["The subject", "What the model draws now"] if own else []
        settings = self.settings
        how = f"{settings.sample_steps} steps, guidance {settings.guidance:g}, seed {settings.seed}"
        note = f"{settings.model}, {how}"
        if processes.is_writer():
            save_png(path, sheet(rows, title=self.settings.called(), note=note, row_titles=titles))
        return self.prompts[:count]


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


def write_record(run: Path, settings: Settings, *, timings: dict[str, float]) -> None:
    """Writes the run's `settings.json`: what was resolved, how to repeat it, and with which versions."""
    command = as_flags(settings, run)
    write_json(
        run / FILE, {"settings": settings, "command": command, "versions": versions(), "timings": timings}
    )


def readme(run: Path, settings: Settings, prompts: list[str], seconds: dict[str, float]) -> str:
    """The run's README.md."""
    first = settings.subjects()[0]
    instance, prior = first.filled(settings.instance_prompt), first.filled(settings.class_prompt)
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
        *(
            f"Also `{other.token}`, a {other.class_noun}, from `{other.images}`."
            for other in settings.subjects()[1:]
        ),
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


def load_words_in_diffusers(path: Path) -> list[str]:
    """The lines that give learned words to diffusers' pipeline: every text encoder its own, where there are several."""
    stored = [name.rsplit("/", 1) for name in read_header(path).shapes]
    if all(len(parts) == 1 for parts in stored):
        return [f'pipeline.load_textual_inversion("{path}")']
    lines = ["from safetensors.torch import load_file", "", f'words = load_file("{path}")']
    for token, side in stored:
        tokenizer = side.replace("text_encoder", "tokenizer")
        lines.append(
            f'pipeline.load_textual_inversion(words["{token}/{side}"], token="{token}", '
            f"text_encoder=pipeline.{side}, tokenizer=pipeline.{tokenizer})"
        )
    return lines


def in_diffusers(run: Path, settings: Settings, instance: str) -> list[str]:
    """How the concept is used in diffusers, as far as it reads these files."""
    lines = []
    if settings.method in OWN_WORDS:
        lines += load_words_in_diffusers(run / WORDS)
    if settings.method in ("lora", "pivotal") and settings.adapter in ("lora", "dora"):
        lines.append(f'pipeline.load_lora_weights("{run}")')
    elif settings.method != "textual-inversion":
        return ["For other programs, bake it into a pipeline: `customize merge --help`."]
    # diffusers itself writes out a word of several vectors, but only one in small letters
    itself = settings.method in OWN_WORDS and settings.token == settings.token.lower()
    prompt = instance if itself else instance.replace(settings.token, settings.token_words)
    return ["In diffusers:", "", "```python", *lines, f'pipeline("{prompt}")', "```"]
