"""How closely samples follow a control network: posed scenes of known layout, and 24 drawings by hand.

    python -m benchmarks.control                                  300 scenes a kind: some hours on two cores
    python -m benchmarks.control --scenes small --kinds sketch    24 scenes, to try it
    python -m benchmarks.control --network runs/sketch --kinds sketch
    python -m benchmarks.control --sweep 0.4 --sweep 0.7 --sweep 1.3        further scales
    python -m benchmarks.control --stops 0.5 --together sketch+depth --other-nouns 0.6 --other-nouns 1

`--stops` are shares of the steps after which the first kind's maps end, `--together` are kinds whose maps act at once,
and with `--other-nouns` single things are asked for under the outline of another one, at these scales of the
first kind: the noun is then the word's, edges and things are the map's.

Scenes are posed (things anywhere, turned, one before the other) from seeds that nothing was trained on, a third of them
on white. Each is drawn from its caption under its true map, a kind at a time, beside the same noise without a map (the
*floor*) and the true picture through the autoencoder (the *bound*). What is compared:

    edges     F1 of Canny's edges with those of the true picture, within a pixel
    things    intersection over union of what is not the ground, on a white one
    order     which of two things is in front where they overlap: the drawn pixels are nearer to the scene as it was
              asked for than to the scene with the two depths exchanged
    pose      the true glyph registered over place, size, angle and mirroring: medians of the errors
    labels    share of the pixels whose label the reader (`recipes.moji.reader`) reads as asked for; – without a reader
    noun, place   by the classifier of `benchmarks.moji`

Shares have Wilson's 95 % interval, means the bootstrap's. The drawings lie in `drawings.json` as strokes: thin,
thick, shaky, open, shifted, of one stroke. Needs the emoji font. Writes `table.md`, `table.json`, `sheet.png`,
`kinds.png`, `drawings.png`; pictures that `--out` holds are not drawn again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from backbone.cli.command_line import settled_command
from backbone.cli.commands import script_app
from backbone.cli.conditions import ROWS
from backbone.cli.options import Option
from backbone.cli.sampling import (
    default_early_scale,
    default_guidance_interval,
    default_sampler,
    describe_guidance_interval,
)
from backbone.conditions.control import Control, ControlNetwork
from backbone.evaluation.statistics import bootstrap_mean, wilson_interval
from backbone.io.console import UserError
from backbone.io.files import content_hash, read_json, write_json, write_text
from backbone.io.progress import progress
from backbone.media.control.maps import as_hints, compute_map
from backbone.media.sheet import Cell, draw_sheet, save_png, split_rows
from backbone.media.transforms import to_image
from backbone.models.control import (
    OpenedControl,
    get_condition_defaults,
    list_embedded_controls,
    open_control,
)
from backbone.models.model import Backbone
from backbone.models.sample import Request, sample
from backbone.world.maps import draw_maps, look_at
from backbone.world.rendering.render import SIZE, Figure, draw_sprite, find_font, render
from backbone.world.scene import BENCHMARK_SEEDS, Pose, Scene, is_fair, sample_posed_scene
from backbone.world.words import Thing, load_vocabulary
from benchmarks.judges.classifier import (
    FOLDER,
    Classifier,
    is_top_glyph,
    load_classifier,
    most_likely,
    prepare_images,
)
from benchmarks.judges.fidelity import Template, decode_renderings, make_template, register
from benchmarks.judges.reader import FOLDER as READER
from benchmarks.judges.reader import Reader, load_reader
from benchmarks.judges.tables import name_drawing
from customize.evaluation.condition_fidelity import measure_agreement

FIRST_SEED = BENCHMARK_SEEDS[0] + 700_000
KINDS = ("sketch", "lines", "edges", "labels", "depth", "pose")
MANY, FEW = 300, 24  # scenes
FLOOR, BOUND = "no condition", "true, round trip"
APART = 17  # of 255: a pixel that differs by more from the white ground, in any channel, is a thing's
TINTED = 215  # of 255: the darkest channel of a ground that still is white
LEAST_OVERLAP = 60  # pixels, with fewer of which no order is judged
ANGLES, SIZES = range(-180, 180, 20), (28, 34, 41, 50, 60, 72, 86)  # of the coarse registration
KEPT = 6  # of its poses, around which it is finer
DRAWINGS = Path(__file__).with_name("drawings.json")
SHEET = 12  # scenes
EXAMPLES = 2  # scenes of each kind on the sheet of kinds
WHAT, HOW, OUTPUT = "What is measured", "Sampling", "Output"
app = script_app()


@dataclass(frozen=True, kw_only=True)
class ControlSettings:
    """Settings of the benchmark."""

    model: Annotated[str, Option("moji, or a pipeline folder of its world.", WHAT)] = "moji"
    network: Annotated[str, Option("A control network.", WHAT, default_text="the model's own")] = ""
    kinds: Annotated[tuple[str, ...], Option("Kinds of maps; repeatable.", WHAT, choices=KINDS)] = KINDS
    scenes: Annotated[str, Option("All scenes, or a small part of them.", WHAT, choices=("all", "small"))] = (
        "all"
    )
    sweep: Annotated[tuple[float, ...], Option("Further scales of the first kind.", WHAT)] = ()
    stops: Annotated[
        tuple[float, ...], Option("Shares of the steps after which the first kind's maps end.", WHAT)
    ] = ()
    together: Annotated[tuple[str, ...], Option("Kinds at once, as in sketch+depth; repeatable.", WHAT)] = ()
    other_nouns: Annotated[
        tuple[float, ...], Option("Scales of the first kind's maps under another noun.", WHAT)
    ] = ()
    registered: Annotated[
        int | None,
        Option(
            "Of how many single things the pose is found, which takes seconds each.",
            WHAT,
            min=1,
            default_text="all",
        ),
    ] = None
    scale: Annotated[
        float | None,
        Option("Conditioning scale of the control network.", HOW, default_text="the network's own"),
    ] = None
    rows: Annotated[
        str,
        Option("Rows of guidance on which maps act.", HOW, choices=ROWS, default_text="the network's own"),
    ] = ""
    steps: Annotated[int, Option("Sampling steps.", HOW, min=1)] = 25
    guidance: Annotated[float, Option("Guidance scale.", HOW)] = 4.0
    classifier: Annotated[Path, Option("The classifier's folder.", WHAT)] = FOLDER
    reader: Annotated[Path, Option("The reader's folder.", WHAT)] = READER
    device: Annotated[str, Option("Where to draw.", HOW, choices=("cpu", "cuda"))] = "cpu"
    out: Annotated[Path, Option("Where the results go.", OUTPUT)] = Path("build/benchmarks/control")

    def __post_init__(self) -> None:
        for names in self.together:
            kinds = names.split("+")
            if len(set(kinds)) < 2 or any(kind not in KINDS for kind in kinds):
                raise UserError(
                    f"--together {names} names no two kinds. Say two of {', '.join(KINDS)}: sketch+depth."
                )


@settled_command(app, ControlSettings)
def main(settings: ControlSettings) -> None:
    """Draws, measures, and writes the tables and the sheets."""
    run(settings)


def run(settings: ControlSettings) -> None:
    """Draws, measures, and writes the tables and the sheets."""
    find_font()
    judges = Judges(
        load_classifier(settings.classifier, device=settings.device), load_reader(settings.reader)
    )
    model = Backbone.open(settings.model, device=settings.device)
    gallery = Gallery(settings, model)
    cases = [make_case(scene) for scene in select_scenes(MANY if settings.scenes == "all" else FEW)]
    rows = {FLOOR: gallery.draw(cases, "")}
    rows |= {kind: gallery.draw(cases, kind) for kind in settings.kinds}
    rows |= {
        f"{settings.kinds[0]}, scale {scale:g}": gallery.draw(cases, settings.kinds[0], scale)
        for scale in settings.sweep
    }
    rows |= {
        f"{settings.kinds[0]}, until {stop:g}": gallery.draw(cases, settings.kinds[0], stop=stop)
        for stop in settings.stops
    }
    rows |= {kinds: gallery.draw(cases, kinds) for kinds in settings.together}
    exact = Backbone.open(settings.model, device=settings.device, precision="fp32")
    round_trips = decode_renderings(exact, [case.scene for case in cases])
    rows[BOUND] = [to_image(picture) for picture in round_trips]
    table = {name: measure(cases, images, judges, name, settings.registered) for name, images in rows.items()}
    others = [replace_noun(case) for case in cases if len(case.scene.figures) == 1]
    for scale in settings.other_nouns:
        images = gallery.draw(others, settings.kinds[0], scale, suffix="other-nouns")
        table[f"{settings.kinds[0]} of another noun, scale {scale:g}"] = measure(others, images, judges, "")
    facts: dict[str, Any] = {
        "model": settings.model, "network": settings.network or "the model's own", "scenes": len(cases),
        "first_seed": FIRST_SEED, "steps": settings.steps, "guidance": settings.guidance,
        "scale": {kind: gallery.network(kind).scale for kind in settings.kinds},
        "sampler": default_sampler(model.defaults), "guided": default_guidance_interval(model.defaults),
        "condition_rows": settings.rows or "the network's own",
        "machine": f"{settings.device}, {model.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    }  # fmt: skip
    drawings = draw_by_hand(gallery, settings) if "sketch" in settings.kinds else []
    write_json(settings.out / "table.json", {**facts, "rows": table, "drawings": drawings})
    text = format_markdown(facts, table, drawings)
    write_text(settings.out / "table.md", text)
    save_sheet(settings.out / "sheet.png", cases[:SHEET], rows)
    save_png(settings.out / "kinds.png", draw_kinds(cases, {kind: rows[kind] for kind in settings.kinds}))
    print(text)


# Scenes and pictures ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A posed scene, its true picture, its maps by kind, and the mask of each thing [128, 128]."""

    scene: Scene
    picture: Image.Image
    maps: Mapping[str, Image.Image]
    masks: Sequence[NDArray[np.bool_]]


def select_scenes(count: int) -> list[Scene]:
    """The first fair posed scenes of this benchmark's seeds, every third on white and without a style."""
    posed_scenes = (sample_posed_scene(seed) for seed in itertools.count(FIRST_SEED))
    scenes = list(itertools.islice(filter(is_fair, posed_scenes), count))
    return [
        replace(scene, place="on a white background", style=None) if number % 3 == 0 else scene
        for number, scene in enumerate(scenes)
    ]


def make_case(scene: Scene) -> Case:
    """A scene with its picture, its maps and its masks."""
    rendering, layers = look_at(scene)
    maps = {**draw_maps(layers), "edges": compute_map("edges", rendering.image)}
    return Case(scene, rendering.image, maps, [np.asarray(mask) > 127 for mask in rendering.masks])


def replace_noun(case: Case) -> Case:
    """The case of one thing with another noun in its prompt; the map and the outline stay."""
    (thing,), nouns = case.scene.things, list(load_vocabulary().nouns)
    other = nouns[(nouns.index(thing.noun) + len(nouns) // 3) % len(nouns)]
    return replace(case, scene=replace(case.scene, things=(replace(thing, noun=other),)))


class KindNetwork(NamedTuple):
    """The network that reads a kind, its scale, its name on disk, and whether it acts on prompted rows alone."""

    network: ControlNetwork
    scale: float
    key: str
    prompted: bool


class Gallery:
    """Pictures drawn under maps, on disk by network, kind and scale; what is missing is drawn."""

    def __init__(self, settings: ControlSettings, model: Backbone) -> None:
        self.settings, self.model = settings, model
        self.opened: dict[str, OpenedControl] = {}

    def network(self, kind: str) -> KindNetwork:
        """The network that reads a kind."""
        name = self.settings.network or str(list_embedded_controls(self.model).get(kind, ""))
        if not name:
            raise UserError(
                f"{self.settings.model} has no control network for {kind}. Name one with --network."
            )
        if name not in self.opened:
            self.opened[name] = open_control(self.model, name)
        weights = "".join(
            content_hash(path) for path in sorted(Path(name).expanduser().rglob("*.safetensors"))
        )
        key = content_hash(weights.encode())[:10] if weights else name.replace("/", "-")
        opened = self.opened[name]
        defaults = get_condition_defaults(self.model, opened.record, kind)
        rows = self.settings.rows or defaults["rows"]
        key = key if rows == "both" else f"{key}-{rows}"
        scale = defaults["scale"] if self.settings.scale is None else self.settings.scale
        return KindNetwork(opened.network, scale, key, rows == "prompted")

    def draw(
        self,
        cases: Sequence[Case],
        kind: str,
        scale: float | None = None,
        *,
        stop: float = 1.0,
        suffix: str = "",
    ) -> list[Image.Image]:
        """A picture of each scene's caption under its map of a kind, or of several (`a+b`); of no kind without.

        Without a `scale`, the settings' scale is used, else each network's own. `suffix` ends the folder's name if
        prompts or maps are not the scenes' own.
        """
        kinds = kind.split("+") if kind else []
        requests = [
            (case.scene.caption(), case.scene.seed, tuple(case.maps[name] for name in kinds))
            for case in cases
        ]
        return self.draw_all(requests, kind, scale, stop=stop, suffix=suffix)

    def draw_all(
        self,
        requests: Sequence[tuple[str, int, tuple[Image.Image, ...]]],
        kind: str,
        scale: float | None = None,
        *,
        stop: float = 1.0,
        suffix: str = "",
    ) -> list[Image.Image]:
        """A picture of each (prompt, key of its noise, a map of each kind)."""
        settings, model = self.settings, self.model
        networks = [self.network(name) for name in (kind.split("+") if kind else [])]
        if scale is not None:
            networks = [network._replace(scale=scale) for network in networks]
        scales = "+".join(dict.fromkeys(f"{network.scale:g}" for network in networks)) or "0"
        keys = "+".join(dict.fromkeys(network.key for network in networks)) or "none"
        defaults = model.defaults
        drawn_by = name_drawing(
            settings.steps, settings.guidance, default_sampler(defaults), default_guidance_interval(defaults)
        )
        folder_name = f"{model.fingerprint[:10]}-{keys}-{kind or 'floor'}-{scales}-{drawn_by}"
        if model.subject_adapters:
            early = default_early_scale(defaults)
            folder_name += f"-early-{early.scale:g}-{early.share:g}"
        folder_name += (f"-until-{stop:g}" if stop < 1 else "") + (f"-{suffix}" if suffix else "")
        paths = [settings.out / "pictures" / folder_name / f"{key}.png" for _, key, _ in requests]
        missing = [pair for pair in zip(requests, paths, strict=True) if not pair[1].exists()]
        with progress(len(missing), f"drawing ({kind or FLOOR})") as bar:
            for (prompt, key, maps), path in missing:
                save_png(path, self.draw_one(prompt, key, list(zip(networks, maps, strict=True)), stop))
                bar.advance(images=1)
        return [Image.open(path).convert("RGB") for path in paths]

    @torch.no_grad()
    def draw_one(
        self,
        prompt: str,
        key: int,
        maps: Sequence[tuple[KindNetwork, Image.Image]],
        stop: float,
    ) -> Image.Image:
        """One picture, from noise of its own key."""
        with self.model.autocast():
            controls = [
                Control.of(
                    kind_network.network,
                    as_hints(hints).to(self.model.device),
                    scale=kind_network.scale,
                    stop=stop,
                    prompted=kind_network.prompted,
                )
                for kind_network, hints in maps
            ]
        settings = self.settings
        images = sample(
            self.model,
            [Request(prompt, (key, 0))],
            steps=settings.steps,
            guidance=settings.guidance,
            seed=0,
            controls=controls,
        )
        return next(iter(images))


# Measures -----------------------------------------------------------------------------------------------------


class Judges(NamedTuple):
    """The networks that read the sampled pictures; the reader may be missing."""

    classifier: Classifier
    reader: Reader | None


def measure(
    cases: Sequence[Case],
    images: Sequence[Image.Image],
    judges: Judges,
    name: str,
    registered: int | None = None,
) -> dict[str, Any]:
    """The row of a column of pictures: each measure as (value, low, high, n); poses of this many things, or of all."""
    predictions = judges.classifier.classify(list(images))
    ordered = [right for case, image in zip(cases, images, strict=True) for right in judge_order(case, image)]
    on_white = [
        pair for pair in zip(cases, images, strict=True) if pair[0].scene.place == "on a white background"
    ]
    single = [pair for pair in zip(cases, predictions, strict=True) if len(pair[0].scene.figures) == 1]
    nouns = [is_top_glyph(prediction, case.scene.things[0].noun) for case, prediction in single]
    places = [
        most_likely(prediction.place) == case.scene.place
        for case, prediction in zip(cases, predictions, strict=True)
    ]
    row: dict[str, Any] = {
        "edges": estimate_mean(
            [edge_f1(case.picture, image) for case, image in zip(cases, images, strict=True)]
        ),
        "things": estimate_mean([thing_iou(case.picture, image) for case, image in on_white]),
        "order": estimate_share(ordered),
        "labels": estimate_mean(label_accuracies(cases, images, judges.reader)),
        "noun": estimate_share(nouns),
        "place": estimate_share(places),
    }
    if name in ("pose", FLOOR, BOUND):
        row["pose"] = measure_poses(cases, images, name, registered)
    return row


def estimate_mean(values: Sequence[float]) -> list[float]:
    """The mean, the bootstrap's 95 % interval of it, and how many values there are; NaN of none."""
    return [*bootstrap_mean(values), len(values)]


def estimate_share(right: Sequence[bool]) -> list[float]:
    """The share that is right, Wilson's 95 % interval of it, and of how many."""
    return [*wilson_interval(sum(right), len(right)), len(right)]


def edge_f1(true: Image.Image, drawn: Image.Image) -> float:
    """F1 of a sampled picture's edges with those of the true one."""
    maps = [as_hints(compute_map("edges", image))[0, 0] for image in (true, drawn)]
    return measure_agreement(maps[0], maps[1]).f1


def thing_iou(true: Image.Image, image: Image.Image) -> float:
    """Intersection over union of the things' pixels."""
    return iou(find_thing_pixels(true), find_thing_pixels(image))


def iou(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """Intersection over union of two masks; of empty ones 1."""
    union = int((first | second).sum())
    return int((first & second).sum()) / union if union else 1.0


def find_thing_pixels(image: Image.Image) -> NDArray[np.bool_]:
    """The pixels [H, W] that differ in any channel from a picture's white ground.

    The ground may have a tint as a whole: it is the median of the picture's border, if that is white enough.
    """
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.maximum(np.median(border, axis=0), TINTED)
    differs: NDArray[np.bool_] = np.abs(pixels - ground).max(2) > APART
    return differs


def label_accuracies(
    cases: Sequence[Case], images: Sequence[Image.Image], reader: Reader | None
) -> list[float]:
    """The share of each picture's pixels whose label is read as the true one; none without a reader."""
    if reader is None:
        return []
    predicted_labels = reader.read(list(images)).labels.numpy()
    return [
        float((np.asarray(case.maps["labels"]) == labels).mean())
        for case, labels in zip(cases, predicted_labels, strict=True)
    ]


def judge_order(case: Case, drawn: Image.Image) -> Iterator[bool]:
    """Whether the right thing is in front, for two things that overlap."""
    if len(case.masks) != 2:
        return
    overlap = case.masks[0] & case.masks[1]
    poses = case.scene.poses
    if overlap.sum() < LEAST_OVERLAP or poses is None:
        return
    first, second = poses
    exchanged = replace(
        case.scene, poses=(replace(first, depth=second.depth), replace(second, depth=first.depth))
    )
    pixels = [
        np.asarray(image, np.float32)[overlap] for image in (drawn, case.picture, render(exchanged).image)
    ]
    if np.abs(pixels[1] - pixels[2]).mean() < 12:  # both look alike there
        return
    yield bool(np.square(pixels[0] - pixels[1]).sum() < np.square(pixels[0] - pixels[2]).sum())


# Poses --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PoseError:
    """The errors of a thing's pose.

    place   distance of the middles, in pixels
    size    difference as a share of the size
    angle   in degrees
    mirror  whether it looks the right way
    turned  whether it was to be turned
    """

    place: float
    size: float
    angle: float
    mirror: bool
    turned: bool


class PlacedTemplate(NamedTuple):
    """A template with the corner that it has when its thing stands at x = foot = 0."""

    template: Template
    left: int
    top: int


def measure_poses(
    cases: Sequence[Case], images: Sequence[Image.Image], name: str, limit: int | None
) -> dict[str, Any]:
    """Medians of the errors of single things, the first `limit` or all, and the share that looks the right way."""
    errors = []
    single = [pair for pair in zip(cases, images, strict=True) if len(pair[0].scene.figures) == 1][:limit]
    with progress(len(single), f"registering ({name})") as bar:
        for case, image in single:
            assert case.scene.poses is not None
            picture = (prepare_images([image])[0] + 1) / 2
            thing, pose = case.scene.things[0], case.scene.poses[0]
            errors.append(compare_poses(pose, find_pose(picture, thing, case.scene.style)))
            bar.advance(images=1)
    turned = [error.angle for error in errors if error.turned]
    return {
        "n": len(errors),
        "place_px": median(error.place for error in errors),
        "size": median(error.size for error in errors),
        "angle": median(error.angle for error in errors),
        "turned_angle": median(turned) if turned else math.nan,
        "mirror": estimate_share([error.mirror for error in errors]),
    }


def find_pose(picture: Tensor, thing: Thing, style: str | None) -> Pose:
    """The pose in which the thing's own glyph explains a picture [3, 128, 128] in 0…1 best.

    All sizes and angles coarsely, then finer around the best of these.
    """
    choices = [(size, angle, mirrored) for size in SIZES for angle in ANGLES for mirrored in (False, True)]
    find = partial(fit_pose, picture, thing, style)
    coarse = sorted(map(find, choices), key=lambda found: found[0])[:KEPT]
    return min((refine(find, *fit) for fit in coarse), key=lambda found: found[0])[1]


def refine(
    find: Callable[[tuple[float, float, bool]], tuple[float, Pose]], error: float, best: Pose
) -> tuple[float, Pose]:
    """A pose and its error, made better in smaller and smaller steps of size and angle."""
    for by_size, by_angle in ((0.09, 10), (0.05, 5), (0.025, 3)):
        candidates = [
            (best.size * (1 + i * by_size), best.angle + j * by_angle, best.mirrored)
            for i in (-1, 0, 1)
            for j in (-1, 0, 1)
            if i or j
        ]
        error, best = min([(error, best), *map(find, candidates)], key=lambda found: found[0])
    return error, best


def fit_pose(
    picture: Tensor, thing: Thing, style: str | None, pose: tuple[float, float, bool]
) -> tuple[float, Pose]:
    """The least error of a glyph of this size, angle and mirroring, and where it lies."""
    size, angle, mirrored = pose
    placed = place_template(thing, round(size), round(angle), mirrored, style)
    fit = register(picture, placed.template)
    return fit.error, Pose(fit.left - placed.left, fit.top - placed.top, size, angle, mirrored)


@lru_cache(maxsize=4096)
def place_template(thing: Thing, size: int, angle: int, mirrored: bool, style: str | None) -> PlacedTemplate:
    """A thing's template, and its corner when the thing is at x = foot = 0."""
    sprite, left, top = draw_sprite(Figure(thing, size, 0, 0, mirrored, 0, angle))
    box = sprite.getbbox() or (0, 0, 1, 1)
    return PlacedTemplate(make_template(sprite.crop(box), style), left + box[0], top + box[1])


def compare_poses(expected: Pose, fitted: Pose) -> PoseError:
    """The difference of two poses; the place is that of the middle."""
    turn = abs((fitted.angle - expected.angle + 180) % 360 - 180)
    away = math.hypot(
        fitted.x - expected.x, (fitted.foot - fitted.size / 2) - (expected.foot - expected.size / 2)
    )
    return PoseError(
        away,
        abs(fitted.size / expected.size - 1),
        turn,
        fitted.mirrored == expected.mirrored,
        expected.angle != 0,
    )


# Drawings by hand ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawing:
    """A drawing by hand: what it shows, in which manner, the pen's width, and its strokes in pixels."""

    prompt: str
    manner: str
    width: int
    strokes: tuple[tuple[tuple[float, float], ...], ...]

    def image(self) -> Image.Image:
        """White strokes on black."""
        large = Image.new("L", (4 * SIZE, 4 * SIZE))
        pen = ImageDraw.Draw(large)
        for stroke in self.strokes:
            pen.line([(4 * x, 4 * y) for x, y in stroke], fill=255, width=4 * self.width, joint="curve")
        ink = np.asarray(large.reduce(4)) > 100
        return Image.fromarray(ink.astype(np.uint8) * 255).convert("RGB")

    def area(self) -> NDArray[np.bool_]:
        """The area that the strokes enclose, each closed from its end to its beginning."""
        image = Image.new("L", (SIZE, SIZE))
        pen = ImageDraw.Draw(image)
        for stroke in self.strokes:
            pen.polygon(list(stroke), fill=255)
            pen.line(list(stroke), fill=255, width=self.width)
        return np.asarray(image) > 0


def load_drawings() -> list[Drawing]:
    """The drawings in the repository."""
    return [
        Drawing(
            entry["prompt"],
            entry["manner"],
            entry["width"],
            tuple(tuple((x, y) for x, y in stroke) for stroke in entry["strokes"]),
        )
        for entry in read_json(DRAWINGS)["drawings"]
    ]


def draw_by_hand(gallery: Gallery, settings: ControlSettings) -> list[dict[str, Any]]:
    """Sample under each drawing, write the sheet, and return the overlap of the things with the strokes' areas."""
    drawings = load_drawings()
    requests = [(drawing.prompt, number, (drawing.image(),)) for number, drawing in enumerate(drawings)]
    images = gallery.draw_all(requests, "sketch")
    rows = [
        {
            "prompt": drawing.prompt,
            "manner": drawing.manner,
            "iou": iou(drawing.area(), find_thing_pixels(image)),
        }
        for drawing, image in zip(drawings, images, strict=True)
    ]
    cells = [
        cell
        for drawing, image, row in zip(drawings, images, rows, strict=True)
        for cell in (Cell(drawing.image(), drawing.manner), Cell(image, f"{row['iou']:.2f} {drawing.prompt}"))
    ]
    save_png(
        settings.out / "drawings.png", draw_sheet(split_rows(cells, 8), title="Drawn by hand", cell=SIZE)
    )
    return rows


# Tables and sheets --------------------------------------------------------------------------------------------


def describe_scales(scales: Mapping[str, float]) -> str:
    """`1`, or `1.25 (sketch), 1 (lines, edges)` if the scales of kinds differ."""
    if len(set(scales.values())) == 1:
        return f"{next(iter(scales.values())):g}"
    kinds_by_scale = {
        scale: [kind for kind, kind_scale in scales.items() if kind_scale == scale]
        for scale in dict.fromkeys(scales.values())
    }
    return ", ".join(f"{scale:g} ({', '.join(kinds)})" for scale, kinds in kinds_by_scale.items())


def save_sheet(path: Path, cases: Sequence[Case], rows: Mapping[str, Sequence[Image.Image]]) -> None:
    """A row for each scene: its true picture, then by every column's map what was drawn."""
    cells: list[list[Cell | Image.Image | None]] = []
    for number, case in enumerate(cases):
        row: list[Cell | Image.Image | None] = [Cell(case.picture, case.scene.caption())]
        for name, images in rows.items():
            for kind in list_kinds(name):
                row.append(case.maps[kind].convert("RGB"))
            row.append(images[number])
        cells.append(row)
    titles = ["true"]
    for name in rows:
        titles += [*list_kinds(name), "drawn by it"] if list_kinds(name) else [name]
    save_png(path, draw_sheet(cells, column_titles=titles, cell=SIZE))


def draw_kinds(cases: Sequence[Case], images_by_kind: Mapping[str, Sequence[Image.Image]]) -> Image.Image:
    """A row for each kind, `EXAMPLES` scenes in each: the map, the picture drawn by it, its edges, the true picture.

    The kinds take turns at the scenes: the first kind shows the first ones, the next kind those that follow.
    """
    cells: list[list[Cell | Image.Image | None]] = []
    turns = itertools.cycle(range(len(cases)))
    for kind, images in images_by_kind.items():
        row: list[Cell | Image.Image | None] = []
        for number in itertools.islice(turns, EXAMPLES):
            case, image = cases[number], images[number]
            row += [
                Cell(case.maps[kind].convert("RGB"), kind),
                Cell(image, case.scene.caption()),
                Cell(
                    compute_map("edges", image).convert("RGB"), f"edges F1 {edge_f1(case.picture, image):.2f}"
                ),
                Cell(case.picture, "rendered"),
            ]
        cells.append(row)
    titles = ["map", "drawn by it", "edges of the drawn", "the true scene"] * EXAMPLES
    note = "The first scenes of the benchmark in turn, none chosen."
    return draw_sheet(cells, title="By a map of each kind", note=note, column_titles=titles, cell=SIZE)


def list_kinds(name: str) -> list[str]:
    """The kinds of maps that a row is drawn by: of `sketch, scale 0.5` and `sketch+depth`."""
    return [kind for kind in name.split(",")[0].split("+") if kind in KINDS]


COLUMNS: dict[str, Callable[[Sequence[float]], str]] = {
    "edges": lambda values: f"{values[0]:.3f} ({values[1]:.3f}–{values[2]:.3f})",
    "things": lambda values: f"{values[0]:.3f} ({values[1]:.3f}–{values[2]:.3f})",
    **dict.fromkeys(
        ("order", "labels", "noun", "place"),
        lambda values: f"{values[0]:.1%} ({values[1]:.0%}–{values[2]:.0%})",
    ),
}


def format_markdown(
    facts: Mapping[str, Any], table: Mapping[str, Mapping[str, Any]], drawings: Sequence[Mapping[str, Any]]
) -> str:
    """The tables."""
    heads = {
        "edges": "edges F1",
        "things": "things IoU",
        "order": "order",
        "labels": "labels",
        "noun": "noun",
        "place": "place",
    }
    counts = [f"{head}, n = {table[FLOOR][name][3]:.0f}" for name, head in heads.items()]
    lines = [
        f"`{facts['model']}`, control network {facts['network']}: {facts['scenes']} posed scenes, {facts['steps']} "
        f"steps, guidance {facts['guidance']:g}{describe_guidance_interval(facts['guided'])}, "
        f"scale {describe_scales(facts['scale'])}, rows of guidance: {facts['condition_rows']}",
        "",
        f"| drawn by | {' | '.join(counts)} |",
        "|---" * (len(heads) + 1) + "|",
    ]
    for name, row in table.items():
        values = [write(row[column]) if row[column][3] else "–" for column, write in COLUMNS.items()]
        lines.append(f"| {name} | {' | '.join(values)} |")
    posed = {name: row["pose"] for name, row in table.items() if "pose" in row}
    lines += [
        "",
        "| pose of single things | place, px | size | angle | angle of turned ones | looks the right way | n |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, pose in posed.items():
        lines.append(
            f"| {name} | {pose['place_px']:.1f} | {pose['size']:.0%} | {pose['angle']:.0f}° "
            f"| {pose['turned_angle']:.0f}° | {pose['mirror'][0]:.0%} | {pose['n']} |"
        )
    if drawings:
        overlaps = [drawing["iou"] for drawing in drawings]
        mean = bootstrap_mean(overlaps)
        lines += [
            "",
            f"Drawings by hand, {len(overlaps)}: IoU {mean.value:.3f} ({mean.low:.3f}–{mean.high:.3f}).",
        ]
    return "\n".join(lines) + "\n"
