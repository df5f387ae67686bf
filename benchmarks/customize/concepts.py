"""How well `customize train` learns a subject in its default two minutes: the twelve development concepts of the world.

    python -m benchmarks.customize                   about an hour on two cores; needs the emoji font
    python -m benchmarks.customize --concepts peacock --concepts canoe
    python -m benchmarks.customize methods           eight ways to learn, four concepts each
    python -m benchmarks.customize rates             learning rates of two of them, on one concept
    python -m benchmarks.customize script --script train_dreambooth_lora.py       beside diffusers' script

Every concept is a glyph that the base has never seen. Its five training pictures are plain renders in five places, with
captions that say where (`a {token} {class} on the beach`); the real commands `customize train` and `customize sample`
then draw it in the other seven, wearing each of five things, in each of four styles, and draw its class without the
token. The classifier names the glyph among all that it knows, the place, the accessory and the style. The baseline is
the untrained base model, with the same words from the same noise. Wilson 95 % intervals over the pictures, and a
bootstrap over concepts, which differ more than pictures do.

`script` is diffusers' own file, which takes one prompt for all pictures, run as it is on the same ones with its prior
preservation (100 class pictures, drawn by `customize sample`, which is faster than its own way), our rank, batch and
schedule, and the learning rate that is best for it among those of `script-rates`; its weights come in by `customize
import`. Its seconds are of training alone; “as many seconds” are as many steps as are left of our run's time once the
class pictures are drawn.

Runs and pictures that `--out` holds are not made again, and predictions always are, from the pictures on disk: a better
classifier renews the tables in a minute, with `--known` also those of work in progress. Several processes can share one
`--out`. Use another for other flags.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, cast

import numpy as np
from PIL import Image

from backbone.adapters.concept import read_concept
from backbone.cli.command_line import settled_command
from backbone.cli.commands import script_app
from backbone.cli.flags import DATA, MODEL, OUTPUT, SAMPLING, SCORING
from backbone.cli.options import Option
from backbone.cli.values.build import check_values
from backbone.evaluation.statistics import wilson_interval
from backbone.io.console import UserError, notify
from backbone.io.files import read_json, write_json, write_text
from backbone.media.sheet import GREEN, RED, Cell, draw_sheet, save_png, split_rows
from backbone.models.model import Backbone
from backbone.world.concepts import TRAINING_PLACES, concept_scenes
from backbone.world.rendering.render import find_font, render
from backbone.world.scene import Scene
from backbone.world.words import choose_article, load_vocabulary
from benchmarks.judges.classifier import (
    FACTS,
    FOLDER,
    Classifier,
    Prediction,
    is_top_glyph,
    load_classifier,
    most_likely,
)
from benchmarks.judges.tables import bootstrap, concept_interval, format_interval, format_percent
from benchmarks.speed.script import to_flags

TOKEN = "[V]"
Kind = Literal["places", "accessories", "styles", "class"]
KINDS: tuple[Kind, ...] = ("places", "accessories", "styles", "class")
DEFAULT = "LoRA, the defaults"
METHODS = {
    DEFAULT: "",
    "LoRA, no prior": "--prior off",
    "LoRA, class pictures": "--prior class-images",
    "LoRA, masks found": "--mask auto",
    "DoRA": "--use_dora",
    "pivotal": "--method pivotal",
    "textual inversion": "--method textual-inversion --words_learning_rate 2e-2",
    "full weights": "--method full --learning_rate 2e-4",
}
RATES = {
    **{
        f"textual inversion at {rate}": f"--method textual-inversion --words_learning_rate {rate}"
        for rate in ("5e-3", "2e-2")
    },
    **{f"full weights at {rate}": f"--method full --learning_rate {rate}" for rate in ("5e-5", "2e-4")},
}
SECONDS = "seconds.json"  # of a run by the script
METHOD_CONCEPTS = ("lobster", "telescope", "sloth", "fire engine")  # no setting was chosen on these
OURS = "--rank 16 --train_batch_size 3 --lr_scheduler cosine --lr_warmup_steps 20 --mixed_precision bf16"
SHOWN = 64  # pixels of an image in the overview
CLASS_PICTURES = 100  # as many as the script takes
SCRIPTED = {
    "the script, as many steps": f"{OURS} --learning_rate 4e-3 --max_train_steps 500",
    "the script, as many seconds": f"{OURS} --learning_rate 4e-3 --max_train_steps 200",
}
SCRIPT_RATES = {
    f"the script at {rate}": f"{OURS} --learning_rate {rate} --max_train_steps 500"
    for rate in ("5e-4", "2e-3", "4e-3", "8e-3")
}
WAYS = {
    "concepts": {DEFAULT: ""}, "methods": METHODS, "rates": RATES, "script": {DEFAULT: "", **SCRIPTED},
    "script-rates": SCRIPT_RATES,
}  # fmt: skip
Table = Literal["concepts", "methods", "rates", "script", "script-rates"]

app = script_app()


@dataclass(frozen=True)
class Trial:
    """One concept, learned in one way."""

    concept: str
    method: str
    flags: str
    seed: int = 0

    @property
    def by_script(self) -> bool:
        """Whether diffusers' script learns it."""
        return self.method in SCRIPTED or self.method in SCRIPT_RATES

    @property
    def name(self) -> str:
        """The name of its folders."""
        words = [self.concept, str(self.seed), *([] if self.method == DEFAULT else [self.method])]
        return "-".join(words).replace(" ", "-").replace(",", "")

    @property
    def noun(self) -> str:
        """The noun of its class."""
        return load_vocabulary().classes[self.concept]


@dataclass(frozen=True)
class Question:
    """A prompt, and what the classifier should see in its pictures: a label of the question's own head."""

    prompt: str
    expected: str


@dataclass(frozen=True)
class Tally:
    """Of n images, how many show the prompt's attribute (`right`), the concept's glyph, and both, by the classifier."""

    right: int
    glyph: int
    n: int
    both: int = 0

    @property
    def share(self) -> float:
        return self.right / self.n


@dataclass(frozen=True)
class Result:
    """Tallies of one trial by kind of question, after training and of the base model where it was sampled."""

    trial: Trial
    after: Mapping[str, Tally]
    base: Mapping[str, Tally]
    seconds: float
    megabytes: float


@dataclass(frozen=True, kw_only=True)
class ConceptSettings:
    """Settings of every benchmark that learns the development concepts; runs in `out` are shared."""

    concepts: Annotated[
        tuple[str, ...],
        Option("Concepts to train; repeatable.", DATA, default_text="all twelve", metavar="NAME"),
    ] = ()
    flags: Annotated[str, Option("More flags for customize train, in one string.", "Training")] = ""
    model: Annotated[str, Option("The base model.", MODEL)] = "moji"
    classifier: Annotated[Path, Option("The classifier's folder.", SCORING)] = FOLDER
    out: Annotated[Path, Option("Where results go.", OUTPUT)] = Path("build/benchmarks/customize")

    def __post_init__(self) -> None:
        check_values(self)


@dataclass(frozen=True, kw_only=True)
class TableSettings(ConceptSettings):
    """The table, its concepts, and the number of images."""

    table: Annotated[
        str, Option(", ".join(WAYS) + ".", DATA, argument=True, metavar="TABLE", choices=tuple(WAYS))
    ] = "concepts"
    concepts: Annotated[
        tuple[str, ...],
        Option("Concepts to train; repeatable.", DATA, default_text="by table: 12, 4 or 1", metavar="NAME"),
    ] = ()
    script: Annotated[Path | None, Option("diffusers' train_dreambooth_lora.py.", DATA)] = None
    seed: Annotated[int, Option("Seed of training and of the images.", "Training")] = 0
    count: Annotated[int, Option("Images in each of the seven places.", SAMPLING, min=1)] = 3
    others: Annotated[int, Option("Images of each other prompt.", SAMPLING, min=1)] = 2
    known: Annotated[bool, Option("Only what --out has all images of; trains nothing.", OUTPUT)] = False

    @property
    def counts(self) -> dict[Kind, int]:
        """Pictures of each kind of prompt."""
        return dict.fromkeys(KINDS, self.others) | {"places": self.count}


@settled_command(app, TableSettings)
def main(settings: TableSettings) -> None:
    """Train and sample what is missing, classify every image, and write the table."""
    table, out, script = cast(Table, settings.table), settings.out, settings.script
    trials = list_trials(table, settings.concepts, flags=settings.flags, seed=settings.seed)
    if table.startswith("script") and not settings.known and not (script and script.is_file()):
        raise UserError(
            "This table needs --script: examples/dreambooth/train_dreambooth_lora.py of diffusers."
        )
    if settings.known:
        trials = [trial for trial in trials if is_finished(trial, out)]
    find_font()
    classifier = load_classifier(settings.classifier)
    results = []
    for trial in run_trials(trials, out, settings.counts, settings.model, script):
        results.append(classify_trial(trial, out, classifier))
        save_sheet(out, trial, classifier)
        notify(
            f"{trial.name}: {', '.join(f'{k} {format_percent(t.share)}' for k, t in results[-1].after.items())}"
        )
    results.sort(key=lambda result: trials.index(result.trial))
    if table == "concepts" and results:
        save_overview(out, [result.trial for result in results])
    text = format_table(results) if table == "concepts" else format_comparison(results)
    facts = {
        "model": settings.model,
        "flags": settings.flags,
        "classifier": read_json(settings.classifier / FACTS).get("step"),
        "results": [asdict(result) for result in results],
    }
    name = "table" if table == "concepts" else table
    write_json(out / f"{name}.json", facts)
    write_text(out / f"{name}.md", text)
    print(text)


def list_trials(table: Table, concepts: Sequence[str] | None, *, flags: str, seed: int) -> list[Trial]:
    """The trials of a table. Raises `UserError` for an unknown concept."""
    development = load_vocabulary().development_concepts
    default_concepts = {"methods": METHOD_CONCEPTS, "rates": ("peacock",), "script-rates": ("peacock",)}.get(
        table, tuple(development)
    )
    for concept in concepts or ():
        if concept not in development:
            raise UserError(f"There is no concept {concept}. Choose among {', '.join(development)}.")
    return [
        Trial(concept, way, f"{variant} {flags}".strip(), seed)
        for concept in concepts or default_concepts
        for way, variant in WAYS[table].items()
    ]


# Runs and pictures ------------------------------------------------------------------------------------------


def run_trials(
    trials: Sequence[Trial], out: Path, counts: Mapping[Kind, int], model: str, script: Path | None = None
) -> Iterator[Trial]:
    """Yield every trial when its run and pictures exist; those in progress in another process come last."""
    remaining = list(trials)
    while remaining:
        for trial in list(remaining):
            with try_claim(out / "claims" / trial.name) as claimed:
                if not claimed:
                    continue
                train_and_draw(trial, out, counts, model, script)
            remaining.remove(trial)
            yield trial
        if remaining:
            time.sleep(5)


@contextmanager
def wait_for_claim(path: Path) -> Iterator[None]:
    """Inside the `with`, no other process works on this path; waits for it."""
    while True:
        with try_claim(path) as claimed:
            if claimed:
                yield
                return
        time.sleep(5)


@contextmanager
def try_claim(path: Path) -> Iterator[bool]:
    """Whether no other process works on this path; the claim ends with the `with`, or with the process."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def train_and_draw(
    trial: Trial, out: Path, counts: Mapping[Kind, int], model: str, script: Path | None = None
) -> None:
    """The run of a trial, and its pictures and the base's of every kind, where they are missing."""
    folder = out / "runs" / trial.name
    if trial.by_script:
        train_by_script(trial, out, model, script)
    else:
        train_by_command(trial, out, model)
    for kind in KINDS:
        phrase = "" if kind == "class" else f"{TOKEN} {trial.noun}"
        draw(
            trial,
            kind,
            phrase,
            tuned_folder(trial, kind, out),
            counts[kind],
            ["--concept", str(folder)],
            model,
        )
        if kind == "class" or trial.method == DEFAULT:
            words = read_concept(folder).tokens[TOKEN]
            draw(trial, kind, f"{words} {trial.noun}", base_folder(trial, kind, out), counts[kind], [], model)


def train_by_command(trial: Trial, out: Path, model: str) -> None:
    """The run of a trial by `customize train`, unless it exists."""
    folder = out / "runs" / trial.name
    if (folder / "README.md").exists():  # which a run writes last
        return
    shutil.rmtree(folder, ignore_errors=True)  # its time should be a whole one's
    images = ["--images", str(write_training_images(trial.concept, out))]
    subject_flags = ["--token", TOKEN, "--class", trial.noun, "--model", model, "--seed", str(trial.seed)]
    run_customize("train", *images, *subject_flags, "--out", str(folder), *shlex.split(trial.flags))


def train_by_script(trial: Trial, out: Path, model: str, script: Path | None) -> None:
    """The script's weights as a run of ours, unless they are there: with the words of the run by the defaults."""
    folder, work = out / "runs" / trial.name, out / "script" / trial.name
    if (folder / SECONDS).exists():
        return
    assert script is not None
    for path in (folder, work):
        shutil.rmtree(path, ignore_errors=True)
    with wait_for_claim(out / "claims" / f"class {trial.noun}"):
        class_folder = sample_class(trial.noun, out, model)
    words = read_concept(out / "runs" / Trial(trial.concept, DEFAULT, "", trial.seed).name).tokens[TOKEN]
    backbone = Backbone.open(model, device="cpu")
    flags: dict[str, object] = {
        "pretrained_model_name_or_path": backbone.location.source,
        "instance_data_dir": write_training_images(trial.concept, out, captions=False),
        "instance_prompt": f"a {words} {trial.noun}", "class_data_dir": class_folder, "class_prompt": f"a {trial.noun}",
        "num_class_images": CLASS_PICTURES, "output_dir": work, "seed": trial.seed,
        "resolution": backbone.resolution,
    }  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.speed.script", "alone", str(script), "--"]
    began = time.perf_counter()
    subprocess.run(
        [*command, "--with_prior_preservation", *to_flags(flags), *shlex.split(trial.flags)], check=True
    )
    seconds = time.perf_counter() - began
    names = ["--token", TOKEN, "--token_words", words, "--class", trial.noun, "--model", model]
    run_customize("import", str(work / "pytorch_lora_weights.safetensors"), "--out", str(folder), *names)
    write_json(folder / SECONDS, seconds)


def sample_class(noun: str, out: Path, model: str) -> Path:
    """A folder of pictures of a class, as the base draws it, without its sheet."""
    folder, drawing = out / "classes" / noun.replace(" ", "-"), out / "classes" / "drawn"
    if not folder.exists():
        number = ["--count", str(CLASS_PICTURES), "--model", model]
        shutil.rmtree(drawing / noun, ignore_errors=True)  # of a call that was stopped
        run_customize("sample", f"a {noun}", *number, "--out", str(drawing / noun))
        (drawing / noun / "pictures").mkdir()
        for path in sorted((drawing / noun).glob("p??-s*.png")):
            path.rename(path.parent / "pictures" / path.name)
        (drawing / noun / "pictures").rename(folder)
    return folder


def is_finished(trial: Trial, out: Path) -> bool:
    """Whether a trial's pictures are all there, and the base's that they are compared with."""
    folders = [*(tuned_folder(trial, kind, out) for kind in KINDS), base_folder(trial, "class", out)]
    return all((folder / "sheet.png").exists() for folder in folders)


def training_scenes(concept: str) -> list[Scene]:
    """The five scenes that a concept is learned from."""
    number = list(load_vocabulary().development_concepts).index(concept)
    return concept_scenes(concept, first_seed=1_900_000 + 10 * number)


def write_training_images(concept: str, out: Path, *, captions: bool = True) -> Path:
    """The folder of a concept's five training pictures, with or without captions that say where it stands."""
    folder = out / ("pictures" if captions else "pictures-alone") / concept.replace(" ", "-")
    for k, scene in enumerate(training_scenes(concept)):
        if not (folder / f"{k}.png").exists():
            save_png(folder / f"{k}.png", render(scene).image)
        if captions:
            write_text(folder / f"{k}.txt", f"a {{token}} {{class}} {scene.place}\n")
    return folder


def make_questions(kind: Kind, noun: str, phrase: str) -> list[Question]:
    """Prompts of a kind for a thing of this name, with the label that the classifier should find."""
    words = load_vocabulary()
    places = [place for place in words.places if place not in TRAINING_PLACES]
    match kind:
        case "places":
            return [Question(f"a {phrase} {place}", place) for place in places]
        case "accessories":
            return [
                Question(f"a {phrase} wearing {thing} {places[k]}", thing)
                for k, thing in enumerate(words.accessories)
            ]
        case "styles":
            return [
                Question(f"{style} a {phrase} {places[k]}", style) for k, style in enumerate(words.styles)
            ]
        case "class":
            return [Question(f"{choose_article(noun)} {noun} {place}", noun) for place in places]


def tuned_folder(trial: Trial, kind: Kind, out: Path) -> Path:
    """Where pictures with the concept lie."""
    return out / "after" / trial.name / kind


def base_folder(trial: Trial, kind: Kind, out: Path) -> Path:
    """Where the base's own pictures lie, the same ones for every method."""
    return out / "base" / Trial(trial.concept, DEFAULT, "", trial.seed).name / kind


def draw(
    trial: Trial, kind: Kind, phrase: str, folder: Path, count: int, options: Sequence[str], model: str
) -> None:
    """The pictures of a kind of question, by the real command, unless they are there."""
    prompts = [question.prompt for question in make_questions(kind, trial.noun, phrase)]
    if (folder / "sheet.png").exists():  # which is written last
        return
    shutil.rmtree(folder, ignore_errors=True)  # of a call that was stopped
    numbers = ["--count", str(count), "--seed", str(trial.seed), "--model", model]
    run_customize("sample", *prompts, *numbers, "--out", str(folder), *options)


def run_customize(*arguments: str) -> None:
    """The real command in a process of its own."""
    subprocess.run([sys.executable, "-m", "customize.cli", *arguments], check=True)


# Classification ----------------------------------------------------------------------------------------------


def classify_trial(trial: Trial, out: Path, classifier: Classifier) -> Result:
    """A trial's result, from its files."""
    folder = out / "runs" / trial.name
    files = read_concept(folder).files
    base_folders = {kind: base_folder(trial, kind, out) for kind in KINDS}
    return Result(
        trial,
        {kind: tally_folder(trial, kind, tuned_folder(trial, kind, out), classifier) for kind in KINDS},
        {
            kind: tally_folder(trial, kind, path, classifier)
            for kind, path in base_folders.items()
            if path.exists()
        },
        read_json(folder / SECONDS, float)
        if trial.by_script
        else read_json(folder / "settings.json")["timings"]["all"],
        sum(file.stat().st_size for file in files) / 1e6,
    )


def tally_folder(trial: Trial, kind: Kind, folder: Path, classifier: Classifier) -> Tally:
    """Classify a folder of images and count."""
    questions, predictions = classify_folder(trial, kind, folder, classifier)
    right = [
        READ_LABEL[kind](prediction) == question.expected
        for question, prediction in zip(questions, predictions, strict=True)
    ]
    glyph = [is_top_glyph(prediction, trial.concept) for prediction in predictions]
    both = sum(is_right and has_glyph for is_right, has_glyph in zip(right, glyph, strict=True))
    return Tally(sum(right), sum(glyph), len(predictions), both)


def classify_folder(
    trial: Trial, kind: Kind, folder: Path, classifier: Classifier
) -> tuple[list[Question], list[Prediction]]:
    """The question and the prediction of every picture in a folder."""
    all_questions = make_questions(kind, trial.noun, f"{TOKEN} {trial.noun}")
    paths = sorted(folder.glob("p??-s??.png"))
    questions = [all_questions[int(path.name[1:3])] for path in paths]
    return questions, classifier.classify([Image.open(path).convert("RGB") for path in paths])


READ_LABEL: dict[str, Callable[[Prediction], str]] = {
    "places": lambda prediction: most_likely(prediction.place),
    "accessories": lambda prediction: most_likely(prediction.accessory),
    "styles": lambda prediction: most_likely(prediction.style),
    "class": lambda prediction: prediction.glyph,
}


def save_sheet(out: Path, trial: Trial, classifier: Classifier) -> None:
    """A sheet of all pictures with the concept, framed by the classifier's verdict."""
    cells: list[Cell | Image.Image | None] = []
    for kind in KINDS:
        folder = tuned_folder(trial, kind, out)
        paths = sorted(folder.glob("p??-s??.png"))
        for path, question, prediction in zip(
            paths, *classify_folder(trial, kind, folder, classifier), strict=True
        ):
            label = READ_LABEL[kind](prediction)
            right = label == question.expected and (
                kind == "class" or is_top_glyph(prediction, trial.concept)
            )
            seen_text = prediction.glyph if kind == "class" else f"{prediction.glyph}, {label}"
            cells.append(
                Cell(
                    Image.open(path).convert("RGB"),
                    f"{question.expected}: {seen_text}",
                    GREEN if right else RED,
                )
            )
    note = "Asked: seen. Green: the classifier sees the concept's glyph (the class at the end) and what was asked."
    title = f"{trial.concept}, {trial.method}"
    save_png(
        out / "sheets" / f"{trial.name}.png",
        draw_sheet(split_rows(cells, 11), title=title, note=note, cell=112),
    )


def save_overview(out: Path, trials: Sequence[Trial]) -> None:
    """A row of each trial: one of its images, and the first one drawn of every prompt in a place or of a thing worn."""
    kinds: tuple[Kind, ...] = ("places", "accessories")
    rows: list[list[Cell | Image.Image | None]] = []
    for trial in trials:
        paths = [write_training_images(trial.concept, out) / "0.png"]
        paths += [
            path for kind in kinds for path in sorted(tuned_folder(trial, kind, out).glob("p??-s00.png"))
        ]
        rows.append([Image.open(path).convert("RGB") for path in paths])
    answers = [question.expected for kind in kinds for question in make_questions(kind, "dog", "dog")]
    page = draw_sheet(
        rows,
        title="Subjects that the model had never seen",
        note="customize train, five captioned images each; the first image of every prompt, none chosen",
        column_titles=["one of the five", *answers],
        cell=SHOWN,
    )
    save_png(out / "subjects.png", page)


# Tables -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """A column: its name, and how it is read off a trial's tallies; None if the prompts do not have it."""

    name: str
    count: Callable[[Mapping[str, Tally]], tuple[int, int] | None]


def count_right(kind: str) -> Callable[[Mapping[str, Tally]], tuple[int, int] | None]:
    """A function of tallies: the right images and all images of a kind."""
    return lambda tallies: (tallies[kind].right, tallies[kind].n) if kind in tallies else None


def count_glyphs(tallies: Mapping[str, Tally]) -> tuple[int, int] | None:
    """Pictures in places that show the concept's glyph."""
    return (tallies["places"].glyph, tallies["places"].n) if "places" in tallies else None


def count_styled_glyphs(tallies: Mapping[str, Tally]) -> tuple[int, int] | None:
    """Pictures with an accessory or in a style that show the concept's glyph."""
    styled = [tallies[kind] for kind in ("accessories", "styles") if kind in tallies]
    return (sum(t.glyph for t in styled), sum(t.n for t in styled)) if styled else None


def count_all_right(tallies: Mapping[str, Tally]) -> tuple[int, int] | None:
    """Pictures of the concept that show its glyph and what was asked for."""
    of_concept = [tallies[kind] for kind in KINDS if kind in tallies and kind != "class"]
    return (sum(t.both for t in of_concept), sum(t.n for t in of_concept)) if of_concept else None


def count_styles(tallies: Mapping[str, Tally]) -> tuple[int, int] | None:
    """Accessories and styles together."""
    styled = [tallies[kind] for kind in ("accessories", "styles") if kind in tallies]
    return (sum(t.right for t in styled), sum(t.n for t in styled)) if styled else None


FIGURES = (
    Figure("glyph", count_glyphs),
    Figure("place", count_right("places")),
    Figure("accessory or style", count_styles),
    Figure("accessory", count_right("accessories")),
    Figure("style", count_right("styles")),
    Figure("glyph in those two", count_styled_glyphs),
    Figure("glyph and what was asked, of all", count_all_right),
    Figure("class without the token", count_right("class")),
)


def format_table(results: Sequence[Result]) -> str:
    """Markdown: all concepts with intervals beside the base, then a row for every concept."""
    lines = [
        f"| {len(results)} concepts | trained | 95 %, pictures | 95 %, over concepts | n | base, same words |",
        "|---|---|---|---|---|---|",
    ]
    for figure in FIGURES:
        counts = [count for result in results if (count := figure.count(result.after))]
        base_counts = [count for result in results if (count := figure.count(result.base))]
        right, n = sum_counts(counts)
        base_right, base_n = sum_counts(base_counts)
        low, high = concept_interval([right_here / n_here for right_here, n_here in counts])
        _, *interval = wilson_interval(right, n)
        lines.append(
            f"| {figure.name} | {format_percent(right / n)} | {format_interval(*interval)} | "
            f"{format_interval(low, high)} | {n} | "
            f"{format_percent(base_right / base_n) if base_n else '–'} |"
        )
    preserved, low, high = measure_preservation(results)
    lines += [
        f"| class kept, of what the base has | {format_percent(preserved)} | | {format_interval(low, high)} | | |",
        "",
        "| concept | " + " | ".join(figure.name for figure in FIGURES) + " | training |",
        "|---" * (len(FIGURES) + 2) + "|",
    ]
    lines += [
        f"| {result.trial.concept} | {' | '.join(format_shares([result]))} | {result.seconds:.0f} s |"
        for result in results
    ]
    return "\n".join([*lines, ""])


def format_comparison(results: Sequence[Result]) -> str:
    """Markdown: a row for every way of learning, over the concepts that it has results of."""
    columns = [figure.name for figure in FIGURES]
    lines = [
        f"| method | concepts | {' | '.join(columns)} | class kept | seconds | MB |",
        "|---" * (len(FIGURES) + 5) + "|",
    ]
    for method in dict.fromkeys(result.trial.method for result in results):
        of_method = [result for result in results if result.trial.method == method]
        seconds = float(np.median([result.seconds for result in of_method]))
        size = max(result.megabytes for result in of_method)
        cells = [
            str(len(of_method)),
            *format_shares(of_method),
            format_percent(measure_preservation(of_method)[0]),
            f"{seconds:.0f}",
            f"{size:.2f}",
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def format_shares(results: Sequence[Result]) -> list[str]:
    """Every figure over all pictures of these results."""
    cells = []
    for figure in FIGURES:
        right, n = sum_counts([count for result in results if (count := figure.count(result.after))])
        cells.append(format_percent(right / n) if n else "–")
    return cells


def sum_counts(pairs: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Sums of right ones and of all."""
    return sum(right for right, _ in pairs), sum(n for _, n in pairs)


def measure_preservation(results: Sequence[Result]) -> tuple[float, float, float]:
    """Class pictures that show the class, over those of the base; with the bootstrap's interval over concepts."""
    pairs = np.array([(result.after["class"].share, result.base["class"].share) for result in results])
    low, high = bootstrap(pairs, lambda sample: sample[:, 0].sum() / max(float(sample[:, 1].sum()), 1e-9))
    return float(pairs[:, 0].sum() / max(float(pairs[:, 1].sum()), 1e-9)), low, high
