"""MojiEdit: how well `edit` changes what the prompt changes and nothing else, on scenes whose true edit is known.

    python -m benchmarks.edit                          all methods, 200 scenes: hours on two cores
    python -m benchmarks.edit --count 40 --methods "the default" --methods "DDIM + P2P"

Modelled on PIE-Bench (Ju et al. 2024), with what it lacks: every scene is rendered before and after its edit, from
seeds that nothing was trained on, so the true answer and the true mask are known. Kinds of edits: noun, colour,
accessory added, accessory removed, place, style, one noun of two, reweight. Success is the classifier's prediction,
with Wilson 95 % intervals; the control `resample` draws the target prompt freely and says what the base model can draw
at all, `no edit` hands the source back. The background is what the true edit leaves as it was; of place edits it is the
thing, style edits are measured by structure alone, and a reweight succeeds when the classifier's probability of the
colour rises over the weights ¼, 1 and 3. Background metrics come over the background's own pixels and as PIE-Bench's
code takes them (`backbone.evaluation.image_metrics`). “The default” is `edit.replace` as it comes; “+ P2P” are
inversions with prompt-to-prompt as published (Hertz et al. 2022: cross-attention for 0.8, self-attention for 0.4 of the
steps, a local blend at the words of the edited thing, threshold 0.3), “our settings” the same inversions with the
default's. “Edges=auto” is the default under the source's own edges, if the model has a network that reads them
and the edit leaves outlines as they are. “By instruction” follows an instruction in place of the prompts, with the
editor that `--editor` names (a run of `customize train --pairs`, as `recipes.moji.adapters.edit` makes one). Needs the
emoji font and the classifier. Writes `table.md`, `table.json`, `rows.jsonl` and `sheet.png`.

Pictures that `--out` holds are not made again, and figures always are, from the pictures on disk: a better classifier
renews the tables without an edit. Several processes can share one `--out` with other `--methods`; the tables are of
all that lies there. After a change of the code that edits, take another `--out`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Annotated, Any, cast

import torch
from PIL import Image, ImageChops, ImageFilter

from backbone.adapters.concept import is_run
from backbone.cli.command_line import settled_command
from backbone.cli.commands import script_app
from backbone.cli.conditions import RequestedControl, parse_map
from backbone.cli.flags import DATA, MODEL, OUTPUT, SAMPLING, SCORING, PlaceOptions
from backbone.cli.options import Option
from backbone.cli.sampling import ALL_STEPS
from backbone.evaluation import image_metrics as measure
from backbone.evaluation.clip import Scorer
from backbone.evaluation.statistics import bootstrap_mean, wilson_interval
from backbone.io.console import UserError
from backbone.io.files import read_json, write_json, write_text
from backbone.io.progress import progress
from backbone.media.sheet import GREEN, RED, Cell, draw_sheet, save_png
from backbone.media.sources.decode import open_rgb
from backbone.media.transforms import mask_to_tensor, to_image, to_tensor
from backbone.models.control import list_embedded_controls
from backbone.models.model import Backbone
from backbone.models.sample import Request, sample
from backbone.world.edits import GREY_STYLES, write_instruction
from backbone.world.rendering.render import find_font, render
from backbone.world.scene import BENCHMARK_SEEDS, Scene, is_fair, sample_scene
from backbone.world.words import Thing, load_vocabulary
from benchmarks.judges.classifier import (
    FOLDER,
    NONE,
    TWO_DIFFERENT,
    Classifier,
    Prediction,
    is_top_glyph,
    load_classifier,
    most_likely,
)
from benchmarks.judges.tables import format_percent
from edit.inversion.inversion import Inversion, invert, read_inversion, select_settings
from edit.layout import RequestedLayout, open_layout
from edit.methods.flow_edit import flow_edit
from edit.methods.instruct import Keep, instruct
from edit.methods.prompt_to_prompt.replace import replace as prompt_to_prompt
from edit.methods.prompt_to_prompt.settings import PRESETS, ReplaceSettings
from edit.methods.sdedit import sdedit
from edit.run.figures import find_scorer
from edit.run.open import Opening, load_model
from edit.settings import Method

KINDS = (
    "noun",
    "colour",
    "accessory added",
    "accessory removed",
    "place",
    "style",
    "one of two",
    "reweight",
)
WEIGHTS = (0.25, 1.0, 3.0)
STRENGTHS = (0.3, 0.45, 0.6, 0.75, 0.9)
DEFAULT = "the default"
EDGES = "the default, edges=auto"
OUTLINED = ("colour", "accessory added", "accessory removed", "style")  # edits that leave a thing's outline
BY_INSTRUCTION = "by instruction"
INSTRUCTED_STEPS = 20  # at most 60 evaluations of the network
RIVALS = ("DDIM + P2P", "null-text + P2P", "DDIM, our settings", "null-text, our settings")
PUBLISHED = ReplaceSettings(cross=0.8, self_attention=0.4, threshold=0.3, blend_from=0.2)
IDENTITY: Mapping[str, tuple[Method, ReplaceSettings]] = {
    "the default": ("direct", ReplaceSettings()),
    "direct + P2P, no blend": ("direct", ReplaceSettings(cross=0.8, self_attention=0.4, blend=())),
    "plain DDIM": ("ddim", ReplaceSettings(cross=0.0, self_attention=0.0, blend=())),
}
SAME_STATES: tuple[Method, ...] = ("direct", "ddim", "negative-prompt")  # DDIM inversion's
TOGETHER = 10  # scenes of one call, for a method that can draw several at once
PRESERVED = ("noun", "colour", "accessory added", "accessory removed", "one of two")
FIRST_SEED = BENCHMARK_SEEDS[0] + 300_000
SHEET = 24  # scenes of the sheet
FEW = 4  # most methods with which two scenes fit into a row of it
app = script_app()


@dataclass(frozen=True, kw_only=True)
class EditBenchmark(PlaceOptions):
    """Settings of the benchmark: scenes, methods and model."""

    count: Annotated[int, Option("Scenes, evenly over the eight kinds.", DATA, min=8)] = 200
    methods: Annotated[
        tuple[str, ...], Option("Methods to run; repeatable.", DATA, default_text="all", metavar="NAME")
    ] = ()
    model: Annotated[str, Option("moji, or a diffusers folder of its world.", MODEL)] = "moji"
    steps: Annotated[
        int,
        Option(
            "Steps of every inversion and edit by prompts; by instruction they are fixed.", SAMPLING, min=1
        ),
    ] = 50
    guidance: Annotated[
        float | None, Option("Guidance scale of the targets.", SAMPLING, default_text="by model")
    ] = None
    editor: Annotated[
        str | None,
        Option(
            "Edits by instruction: a run of customize train --pairs, or a model. Another one, another --out.",
            MODEL,
            default_text="none",
        ),
    ] = None
    identity: Annotated[int, Option("Scenes of the identity edit; 0: none.", DATA, min=0)] = 20
    classifier: Annotated[Path, Option("The classifier's folder.", SCORING)] = FOLDER
    device: Annotated[str, Option("cpu or cuda.", MODEL)] = "cpu"
    out: Annotated[Path, Option("Where the results go.", OUTPUT)] = Path("build/benchmarks/edit")


@settled_command(app, EditBenchmark)
def main(options: EditBenchmark) -> None:
    """Edits, classifies, and writes the tables and the sheet."""
    find_font()
    device, out = options.device, options.out
    classifier = load_classifier(options.classifier, device=device)
    methods = list_methods()
    if options.editor is not None:
        methods |= list_instructed(options.editor, device, options.precision)
    names = options.methods or list(methods)
    for name in names:
        if name not in methods:
            raise UserError(f"There is no method {name}. Choose among {', '.join(methods)}.")
    backbone = Backbone.open(options.model, device=device, precision=options.precision)
    cases = list(make_cases(options.count))
    identity_cases = [replace(case, kind="identity", after=case.before) for case in cases[: options.identity]]
    work = Work(out, backbone, SharedSettings(options.steps, options.guidance))
    for name in names:
        work.edit(name, cases, methods[name])
    for name, (method, settings) in IDENTITY.items():
        attempt = make_prompt_to_prompt(method, replace(settings, guidance=7.5))
        work.edit(f"identity, {name}", identity_cases, for_each_case(attempt))
    present = [name for name in methods if work.has_attempts(name, cases)]
    rows = measure_all(work, cases, present, classifier, find_scorer(backbone))
    summary = summarize(rows, present)
    comparisons = [compare_paired(rows, DEFAULT, rival) for rival in (BY_INSTRUCTION, *RIVALS)]
    compared = [comparison for comparison in comparisons if comparison is not None]
    facts = {
        "model": options.model, "scenes": len(cases), "first_seed": FIRST_SEED, "steps": options.steps,
        "guidance": backbone.defaults["guidance"] if options.guidance is None else options.guidance,
        "identity_edit": measure_identity_edits(work, identity_cases),
        "machine": f"{device}, {backbone.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    }  # fmt: skip
    write_text(out / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_json(out / "table.json", {**facts, "summary": summary, "paired": compared})
    text = format_markdown(facts, summary, compared)
    write_text(out / "table.md", text)
    save_sheet(out / "sheet.png", work, cases, rows, present)
    print(text)


# Cases --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """An edit: the scene before and after, and which of its things changes (None: none of them alone)."""

    kind: str
    before: Scene
    after: Scene
    thing: int | None = 0

    @property
    def source(self) -> str:
        """The caption before."""
        return self.before.caption()

    @property
    def target(self) -> str:
        """The caption after."""
        return self.after.caption()

    def rendered(self) -> tuple[Image.Image, Image.Image, Image.Image | None]:
        """The picture before, the true picture after, and a mask: white where the edit may change something.

        White is what differs between the two renderings, and the changing thing with a margin for its shadow. A place
        edit must keep the thing, so there all else is white; a style changes everything (None).
        """
        before, after = render(self.before), render(self.after)
        if self.kind == "style":
            return before.image, after.image, None
        if self.kind == "place":
            things = before.masks[0]
            for mask in before.masks[1:]:
                things = ImageChops.lighter(things, mask)
            inner = things.point(mark_half).filter(ImageFilter.MinFilter(3))
            return before.image, after.image, ImageChops.invert(inner)
        assert self.thing is not None
        mask = ImageChops.lighter(before.masks[self.thing], after.masks[self.thing])
        mask = mask.point(mark_visible).filter(ImageFilter.MaxFilter(9))
        differs = ImageChops.difference(before.image, after.image).convert("L").point(mark_visible)
        return before.image, after.image, ImageChops.lighter(mask, differs)


def make_cases(count: int) -> Iterator[Case]:
    """`count` cases, the kinds in turn, each from the next seed of its own that makes one."""
    seeds = {
        kind: iter(range(FIRST_SEED + 20_000 * k, FIRST_SEED + 20_000 * (k + 1)))
        for k, kind in enumerate(KINDS)
    }
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        yield next(case for seed in seeds[kind] if (case := make_case(kind, seed)) is not None)


def make_case(kind: str, seed: int) -> Case | None:
    """The edit of this kind that a seed makes; None if its scene does not suit."""
    words, random = load_vocabulary(), Random(f"{seed}/edit")
    scene = sample_scene(seed)
    if kind == "one of two":
        if len(scene.things) != 2:
            return None
        index = random.randrange(2)
        new = replace(
            scene.things[index], noun=_choose_other(random, words.nouns, [t.noun for t in scene.things])
        )
        things = (new, scene.things[1]) if index == 0 else (scene.things[0], new)
        return _keep_fair(Case(kind, scene, replace(scene, things=things), index))
    if len(scene.things) != 1 or scene.pair:
        return None
    thing = scene.things[0]
    match kind:
        case "noun":
            before = replace(thing, accessory=None)
            after = replace(before, noun=_choose_other(random, words.nouns, [thing.noun]))
        case "colour":
            if scene.style in GREY_STYLES:
                return None
            before, after = thing, replace(thing, colour=_choose_other(random, words.colours, [thing.colour]))
        case "accessory added":
            before = replace(thing, accessory=None, small=False)
            after = replace(before, accessory=_choose_other(random, words.accessories, []))
        case "accessory removed":
            before = replace(thing, accessory=_choose_other(random, words.accessories, []), small=False)
            after = replace(before, accessory=None)
        case "place":
            return _keep_fair(
                Case(
                    kind,
                    scene,
                    replace(scene, place=_choose_other(random, words.places, [scene.place])),
                    None,
                )
            )
        case "style":
            plain = scene.plain()
            return _keep_fair(
                Case(kind, plain, replace(plain, style=_choose_other(random, words.styles, [])), None)
            )
        case "reweight":
            if scene.style in GREY_STYLES:
                return None
            before = after = replace(thing, colour=thing.colour or _choose_other(random, words.colours, []))
        case _:
            raise AssertionError(kind)
    return _keep_fair(Case(kind, replace(scene, things=(before,)), replace(scene, things=(after,))))


def _choose_other(
    random: Random, among: Sequence[str] | Mapping[str, Any], excluded: Sequence[str | None]
) -> str:
    return random.choice([word for word in among if word not in excluded])


def _keep_fair(case: Case) -> Case | None:
    return case if is_fair(case.before) and is_fair(case.after) else None


def mark_half(value: int) -> int:
    """255 from half of a byte's range on, else 0."""
    return 255 if value >= 128 else 0


def mark_visible(value: int) -> int:
    """255 for a difference that can be seen, else 0."""
    return 255 if value >= 8 else 0


# Methods ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SharedSettings:
    """Settings that all methods share."""

    steps: int
    guidance: float | None


@dataclass(frozen=True)
class Attempt:
    """The edited pictures (three of a reweight, else one), and what each took on average."""

    pictures: Sequence[Image.Image]
    seconds: float
    evaluations: float


@dataclass(frozen=True)
class Work:
    """A folder of attempts: `pictures/METHOD/NUMBER-K.png`, then `NUMBER.json`, which says what they were made for.

    The trajectories of DDIM inversion lie in `inversions/`, since several methods begin with the same ones.
    """

    out: Path
    model: Backbone
    settings: SharedSettings

    def edit(self, name: str, cases: Sequence[Case], attempt: TryAll) -> None:
        """Make the missing edits of one method."""
        missing = [k for k, case in enumerate(cases) if self.read(name, k, case) is None]
        with progress(len(cases), name, done=len(cases) - len(missing)) as bar:
            for first in range(0, len(missing), TOGETHER):
                batch = missing[first : first + TOGETHER]
                for k, new_attempt in zip(batch, attempt(self, [cases[k] for k in batch]), strict=True):
                    if new_attempt is not None:
                        self.write(name, k, cases[k], new_attempt)
                    bar.advance(images=1)

    def write(self, name: str, number: int, case: Case, attempt: Attempt) -> None:
        """Write an attempt."""
        record = self.locate_record(name, number)
        for k, picture in enumerate(attempt.pictures):
            save_png(record.with_name(f"{record.stem}-{k}.png"), picture)
        count = {
            "pictures": len(attempt.pictures),
            "seconds": attempt.seconds,
            "evaluations": attempt.evaluations,
        }
        write_json(record, {**self.describe_case(case), **count})

    def read(self, name: str, number: int, case: Case) -> Attempt | None:
        """The saved attempt; None if there is none, or it was made for another case."""
        record = self.locate_record(name, number)
        if not record.exists():
            return None
        saved = read_json(record)
        if {key: saved[key] for key in self.describe_case(case)} != self.describe_case(case):
            return None
        files = [record.with_name(f"{record.stem}-{k}.png") for k in range(saved["pictures"])]
        return Attempt([open_rgb(file) for file in files], saved["seconds"], saved["evaluations"])

    def has_attempts(self, name: str, cases: Sequence[Case]) -> bool:
        """Whether an attempt of this method was kept for one of these cases."""
        return any(self.read(name, k, case) is not None for k, case in enumerate(cases))

    def locate_record(self, name: str, number: int) -> Path:
        """The path of an attempt's `.json`, which is written last."""
        folder = "-".join("".join(c if c.isalnum() or c == "." else " " for c in name.lower()).split())
        return self.out / "pictures" / folder / f"{number:03d}.json"

    def describe_case(self, case: Case) -> dict[str, Any]:
        """The settings that an attempt depends on."""
        case_facts = {"seed": case.before.seed, "source": case.source, "target": case.target}
        return {**case_facts, "model": self.model.fingerprint, **asdict(self.settings)}

    def load_or_invert(self, case: Case, method: Method) -> tuple[Inversion, float]:
        """An inversion of the scene before its edit, from the disk if it is there, and the seconds that it took."""
        source = render(case.before).image
        is_shared = method in SAME_STATES
        name = f"{case.before.seed}-{self.settings.steps}-{self.model.fingerprint[:12]}.safetensors"
        file = self.out / "inversions" / name
        if is_shared and file.exists():
            inversion = read_inversion(file, self.model)
            if inversion.prompt == case.source:
                return replace(inversion, method=method), float(inversion.facts["seconds"])
        began = time.perf_counter()
        inversion_method = "direct" if is_shared else method
        guidance = select_settings(inversion_method, guidance=self.settings.guidance)
        inversion = invert(
            self.model, source, case.source, method=inversion_method, steps=self.settings.steps, **guidance
        )
        seconds = time.perf_counter() - began
        if is_shared:
            replace(inversion, facts={**inversion.facts, "seconds": seconds}).write(file)
        return replace(inversion, method=method), seconds


Try = Callable[[Work, Case], Attempt | None]
TryAll = Callable[[Work, Sequence[Case]], Iterator[Attempt | None]]


def for_each_case(attempt: Try) -> TryAll:
    """A method that edits one picture at a time."""
    return lambda work, cases: (attempt(work, case) for case in cases)


def list_methods() -> dict[str, TryAll]:
    """Every method by name; methods that cannot reweight return None for it."""
    methods: dict[str, Try] = {
        DEFAULT: make_prompt_to_prompt("direct"),
        "direct + P2P": make_prompt_to_prompt("direct", PUBLISHED),
        "DDIM + P2P": make_prompt_to_prompt("ddim", PUBLISHED),
        "null-text + P2P": make_prompt_to_prompt("null-text", PUBLISHED),
        "DDIM, our settings": make_prompt_to_prompt("ddim"),
        "null-text, our settings": make_prompt_to_prompt("null-text"),
        "negative-prompt": make_prompt_to_prompt("negative-prompt"),
        "edit-friendly": make_prompt_to_prompt("edit-friendly"),
        "renoise": make_prompt_to_prompt("renoise"),
        "reversible": make_prompt_to_prompt("reversible"),
        "masactrl": make_prompt_to_prompt("direct", PRESETS["masactrl"]),
        "plug-and-play": make_prompt_to_prompt("direct", PRESETS["plug-and-play"]),
        "flow-edit": run_flow_edit,
    }
    methods |= {f"SDEdit {strength:g}": make_sdedit(strength) for strength in STRENGTHS}
    methods |= {EDGES: hold_edges, "no edit": keep_source}
    return {
        **{name: for_each_case(attempt) for name, attempt in methods.items()},
        "resample": resample_targets,
    }


def make_prompt_to_prompt(method: Method, settings: ReplaceSettings | None = None) -> Try:
    """Inversion by a method, then `edit.replace`."""
    base = settings or ReplaceSettings()

    def attempt(work: Work, case: Case) -> Attempt | None:
        if case.kind == "reweight" and not base.carries_words:
            return None
        case_settings = base if base.guidance is not None else replace(base, guidance=work.settings.guidance)
        if base == PUBLISHED:
            case_settings = replace(case_settings, blend=blend_words(case))
        inversion, seconds = work.load_or_invert(case, method)
        began = time.perf_counter()
        pictures, evaluations = [], inversion.nfe
        for changes in make_reweighting(case):
            edited = prompt_to_prompt(inversion, case.target, replace(case_settings, **changes))
            pictures += edited.images
            evaluations += edited.nfe
        seconds += time.perf_counter() - began
        return Attempt(pictures, seconds / len(pictures), evaluations / len(pictures))

    return attempt


def hold_edges(work: Work, case: Case) -> Attempt | None:
    """The default under the source's own edges; None for edits that change outlines, and models without a network."""
    if case.kind not in OUTLINED or "edges" not in list_embedded_controls(work.model):
        return None
    source, began = render(case.before).image, time.perf_counter()
    layout = open_layout(work.model, source, RequestedLayout((RequestedControl(parse_map("edges=auto")),)))
    inversion = invert(work.model, source, case.source, steps=work.settings.steps, layout=layout)
    edited = prompt_to_prompt(inversion, case.target, ReplaceSettings(guidance=work.settings.guidance))
    return Attempt(edited.images, time.perf_counter() - began, inversion.nfe + edited.nfe)


def list_instructed(editor: str, device: str, precision: str) -> dict[str, TryAll]:
    """Edits by instruction in place of prompts, with the background restored in latents, and as drawn."""
    source: dict[str, Any] = {"concepts": [editor]} if is_run(Path(editor)) else {"model": editor}
    model = load_model(Opening(**source, device=device, precision=precision), image_count=1).model
    return {
        BY_INSTRUCTION: for_each_case(make_instructed(model, "latents")),
        f"{BY_INSTRUCTION}, as drawn": for_each_case(make_instructed(model, "none")),
    }


def make_instructed(model: Backbone, keep: Keep) -> Try:
    """The instruction of a case, followed; if everything changes there is no background to keep."""

    def attempt(work: Work, case: Case) -> Attempt | None:
        if case.kind == "reweight":
            return None
        instruction = write_instruction(case.kind, case.before, case.after, thing=case.thing or 0)
        began = time.perf_counter()
        arguments: dict[str, Any] = {
            "steps": INSTRUCTED_STEPS,
            "guidance": work.settings.guidance,
            "seed": case.before.seed,
        }
        source = render(case.before).image
        try:
            result = instruct(
                model, source, [instruction], keep="none" if case.kind == "style" else keep, **arguments
            )
        except UserError:  # nearly everything has changed
            result = instruct(model, source, [instruction], keep="none", **arguments)
        return Attempt(result.images, time.perf_counter() - began, result.nfe)

    return attempt


def blend_words(case: Case) -> tuple[str, ...]:
    """The words whose region prompt-to-prompt may change: the edited thing's, as in PIE-Bench.

    None for a place or a style: everything may change.
    """
    if case.thing is None:
        return ()
    return tuple({scene.things[case.thing].noun: None for scene in (case.before, case.after)})


def make_reweighting(case: Case) -> list[dict[str, Any]]:
    """The settings of each picture that a case asks for."""
    if case.kind != "reweight":
        return [{}]
    colour = case.after.things[0].colour
    assert colour is not None
    return [{"weights": {colour: weight}, "cross": 1.0} for weight in WEIGHTS]


def make_sdedit(strength: float) -> Try:
    """SDEdit at a strength."""

    def attempt(work: Work, case: Case) -> Attempt | None:
        if case.kind == "reweight":
            return None
        began = time.perf_counter()
        result = sdedit(
            work.model, render(case.before).image, case.target, strength=strength, steps=work.settings.steps,
            guidance=work.settings.guidance, seed=case.before.seed,
        )  # fmt: skip
        return Attempt(result.images, time.perf_counter() - began, result.nfe)

    return attempt


def run_flow_edit(work: Work, case: Case) -> Attempt | None:
    """FlowEdit."""
    if case.kind == "reweight":
        return None
    began = time.perf_counter()
    result = flow_edit(
        work.model, render(case.before).image, case.source, [case.target], steps=work.settings.steps,
        guidance=work.settings.guidance, seed=case.before.seed,
    )  # fmt: skip
    return Attempt(result.images, time.perf_counter() - began, result.nfe)


def keep_source(work: Work, case: Case) -> Attempt | None:
    """The source itself."""
    return None if case.kind == "reweight" else Attempt([render(case.before).image], 0.0, 0.0)


def resample_targets(work: Work, cases: Sequence[Case]) -> Iterator[Attempt | None]:
    """The target prompts drawn freely, in one batch, by the edits' steps: what the base model can draw at all."""
    model, settings = work.model, work.settings
    guidance = float(model.defaults["guidance"]) if settings.guidance is None else settings.guidance
    requests = [Request(case.target, (case.before.seed, 0)) for case in cases if case.kind != "reweight"]
    began = time.perf_counter()
    images = list(
        sample(
            model,
            requests,
            steps=settings.steps,
            guidance=guidance,
            guided=ALL_STEPS,
            sampler="ddim",
            seed=0,
            batch=max(1, len(requests)),
        )
    )
    seconds = (time.perf_counter() - began) / max(1, len(images))
    pictures = iter(images)
    for case in cases:
        rows = settings.steps * (1 if guidance == 1 else 2)
        yield None if case.kind == "reweight" else Attempt([next(pictures)], seconds, rows)


# Measuring ----------------------------------------------------------------------------------------------------


def measure_all(
    work: Work, cases: Sequence[Case], methods: Sequence[str], classifier: Classifier, scorer: Scorer | None
) -> list[dict[str, Any]]:
    """The rows of every attempt that was kept."""
    rows = []
    with progress(len(cases), "measuring") as bar:
        for number, case in enumerate(cases):
            rendered = case.rendered()
            bound = measure_bound(work.model, rendered[0], rendered[2])
            for name in methods:
                attempt = work.read(name, number, case)
                if attempt is not None:
                    predictions = classifier.classify(attempt.pictures)
                    rows.append(
                        {
                            "method": name,
                            "number": number,
                            **measure_attempt(case, attempt, rendered, predictions, scorer),
                            "autoencoder_background_psnr_db": bound,
                        }
                    )
            bar.advance(images=1)
    return rows


def measure_attempt(
    case: Case,
    attempt: Attempt,
    rendered: tuple[Image.Image, Image.Image, Image.Image | None],
    predictions: Sequence[Prediction],
    scorer: Scorer | None,
) -> dict[str, Any]:
    """All metrics of one attempt; `rendered` is the source, the true edit, and the mask of its changes."""
    source, truth, changed = rendered
    before, after = to_tensor(source), to_tensor(resize_to(attempt.pictures[-1], source))
    mask = None if changed is None else mask_to_tensor(changed)[0]
    figures = measure.measure_edit(before, after, changed=mask, scorer=scorer, target=case.target)
    psnr_true = None if case.kind == "reweight" else measure.psnr(to_tensor(truth), after)
    return {
        "kind": case.kind,
        "seed": case.before.seed,
        "source": case.source,
        "target": case.target,
        "success": is_success(case, predictions),
        "psnr_to_the_true_edit_db": psnr_true,
        "seconds": attempt.seconds,
        "evaluations": attempt.evaluations,
        **figures,
    }


def resize_to(picture: Image.Image, source: Image.Image) -> Image.Image:
    """A picture in the source's size: a model of another resolution gives it in its own."""
    if picture.size == source.size:
        return picture
    return picture.resize(source.size, Image.Resampling.BICUBIC)


def is_success(case: Case, predictions: Sequence[Prediction]) -> bool:
    """Whether the classifier sees in the picture what the target says; of a reweight, whether the colour grows."""
    thing, prediction = case.after.things[case.thing or 0], predictions[-1]
    if case.kind == "reweight":
        shares = [reading.colour[cast(str, thing.colour)] for reading in predictions]
        return all(later > earlier for earlier, later in pairwise(shares))
    right = has_things(case.after.things, prediction)
    match case.kind:
        case "colour":
            return right and most_likely(prediction.colour) == thing.colour
        case "accessory added" | "accessory removed":
            return right and most_likely(prediction.accessory) == (thing.accessory or NONE)
        case "place":
            return right and most_likely(prediction.place) == case.after.place
        case "style":
            return right and most_likely(prediction.style) == case.after.style
        case _:
            return right


def has_things(things: Sequence[Thing], prediction: Prediction) -> bool:
    """Whether the classifier sees these things: the one on top, or both."""
    if len(things) == 1:
        return is_top_glyph(prediction, things[0].noun)
    return most_likely(prediction.count) == TWO_DIFFERENT and prediction.two_glyphs == {
        thing.noun for thing in things
    }


@torch.no_grad()
def measure_bound(model: Backbone, source: Image.Image, changed: Image.Image | None) -> float | None:
    """The background's decibels that the autoencoder alone leaves."""
    picture = to_tensor(source)
    mask = None if changed is None else mask_to_tensor(changed)[0]
    round_trip = model.decode(model.encode(picture[None]).mean)[0].cpu()
    return measure.background_metrics(picture, round_trip, mask)["background_psnr_db"]


def measure_identity_edits(work: Work, cases: Sequence[Case]) -> dict[str, float | None]:
    """Mean decibels of edits whose target is the source prompt, at guidance 7.5, beside plain DDIM's and the bound.

    By the default nothing may change, since the prompts do not differ. Without a blend nothing of the target's row is
    overwritten, so it can differ from the source even though the source's own row does not.
    """
    decibels: dict[str, list[float | None]] = {name: [] for name in (*IDENTITY, "the autoencoder alone")}
    for number, case in enumerate(cases):
        source = render(case.before).image
        picture = to_tensor(source)
        for name in IDENTITY:
            attempt = work.read(f"identity, {name}", number, case)
            if attempt is not None:
                decibels[name].append(
                    measure.psnr(picture, to_tensor(resize_to(attempt.pictures[0], source)))
                )
        round_trip = to_image(work.model.decode(work.model.encode(picture[None]).mean)[0])
        decibels["the autoencoder alone"].append(measure.psnr(picture, to_tensor(round_trip)))
    return {name: measure.mean_of_defined(values) for name, values in decibels.items()}


def summarize(rows: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> list[dict[str, Any]]:
    """A line for every method and kind, and for each method over all kinds."""
    table = []
    names = (
        "background_psnr_db",
        "background_pie_psnr_db",
        "background_ssim",
        "background_pie_ssim",
        "background_mse",
        "structure_distance",
        "psnr_to_the_true_edit_db",
        "seconds",
        "evaluations",
        "autoencoder_background_psnr_db",
        "scorer_whole",
        "scorer_edited_region",
    )
    for method in methods:
        for kind in (*KINDS, "all"):
            method_rows = [row for row in rows if row["method"] == method and kind in (row["kind"], "all")]
            if not method_rows:
                continue
            right = sum(row["success"] for row in method_rows)
            line = {
                "method": method,
                "kind": kind,
                "n": len(method_rows),
                "success": right / len(method_rows),
            }
            _, line["low"], line["high"] = wilson_interval(right, len(method_rows))
            table.append(
                {
                    **line,
                    **{
                        name: measure.mean_of_defined([row.get(name) for row in method_rows])
                        for name in names
                    },
                }
            )
    return table


def compare_paired(rows: Sequence[Mapping[str, Any]], ours: str, theirs: str) -> dict[str, Any] | None:
    """Ours minus theirs on the same scenes, success and background dB, with 95 % bootstrap intervals over scenes."""
    sides = [{row["number"]: row for row in rows if row["method"] == name} for name in (ours, theirs)]
    numbers = sorted(set(sides[0]) & set(sides[1]))
    if not numbers:
        return None
    comparison: dict[str, Any] = {"ours": ours, "theirs": theirs, "n": len(numbers)}
    success = [float(sides[0][k]["success"]) - float(sides[1][k]["success"]) for k in numbers]
    comparison["success"] = bootstrap_mean(success)
    decibels = [
        sides[0][k]["background_psnr_db"] - sides[1][k]["background_psnr_db"]
        for k in numbers
        if sides[0][k]["kind"] in PRESERVED and sides[0][k]["background_psnr_db"] is not None
    ]
    comparison["background_psnr_db"] = bootstrap_mean(decibels) if decibels else None
    return comparison


# Output -------------------------------------------------------------------------------------------------------


def format_markdown(
    facts: Mapping[str, Any], summary: Sequence[Mapping[str, Any]], compared: Sequence[Mapping[str, Any]]
) -> str:
    """The tables as Markdown."""
    lines = [
        f"`{facts['model']}`: {facts['scenes']} scenes from seed {facts['first_seed']}, {facts['steps']} steps, "
        f"guidance {facts['guidance']:g} ({facts['machine']})",
        "",
        "| method | kind | n | success | 95 % | background dB | bound dB | PIE dB | SSIM | structure ×10³ | "
        "to the true edit dB | s | evaluations |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for line in summary:
        cells = [
            format_number(line["background_psnr_db"]), format_number(line["autoencoder_background_psnr_db"]),
            format_number(line["background_pie_psnr_db"]), format_number(line["background_ssim"], 3),
            format_number(line["structure_distance"], 2, times=1000), format_number(line["psnr_to_the_true_edit_db"]),
            format_number(line["seconds"], 2), format_number(line["evaluations"], 0),
        ]  # fmt: skip
        share = f"{format_percent(line['success'])} | {format_percent(line['low'])}–{format_percent(line['high'])}"
        lines.append(f"| {line['method']} | {line['kind']} | {line['n']} | {share} | {' | '.join(cells)} |")
    for comparison in compared:
        mean, low, high = comparison["success"]
        text = (
            f"{comparison['ours']} minus {comparison['theirs']} (n = {comparison['n']}): "
            f"success {mean:+.3f} ({low:+.3f} to {high:+.3f})"
        )
        if comparison["background_psnr_db"] is not None:
            mean, low, high = comparison["background_psnr_db"]
            text += f", background {mean:+.2f} dB ({low:+.2f} to {high:+.2f})"
        lines += ["", text + "."]
    identity = facts["identity_edit"]
    if any(value is not None for value in identity.values()):
        parts = ", ".join(f"{name} {format_number(value)} dB" for name, value in identity.items())
        lines += ["", f"Identity edit at guidance 7.5, the target's row: {parts}."]
    return "\n".join([*lines, ""])


def format_number(value: float | None, digits: int = 1, *, times: float = 1.0) -> str:
    return "–" if value is None else f"{times * value:.{digits}f}"


def save_sheet(
    path: Path,
    work: Work,
    cases: Sequence[Case],
    rows: Sequence[Mapping[str, Any]],
    methods: Sequence[str],
) -> None:
    """The first scenes, none chosen: source, true edit, every method, framed by what the classifier said.

    With few methods two scenes stand in a row.
    """
    predictions = {(row["method"], row["number"]): row["success"] for row in rows}
    lines: list[list[Cell | Image.Image | None]] = []
    for k, case in enumerate(cases[:SHEET]):
        source, truth, _ = case.rendered()
        line: list[Cell | Image.Image | None] = [
            Cell(source, case.source),
            Cell(truth, f"true: {case.target}"),
        ]
        for name in methods:
            attempt = work.read(name, k, case)
            frame = GREEN if predictions.get((name, k)) else RED
            line.append(None if attempt is None else Cell(attempt.pictures[-1], name, frame))
        lines.append(line)
    note = "Every scene in order, none chosen. Green: the classifier sees what the target says."
    if len(methods) <= FEW:
        lines = [[cell for line in lines[k : k + 2] for cell in line] for k in range(0, len(lines), 2)]
    save_png(path, draw_sheet(lines, title="MojiEdit", note=note, cell=128))
