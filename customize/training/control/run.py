"""A run of `customize train-control`, from pairs to a folder that diffusers opens.

runs/sketch/t2i_adapter/ or controlnet/    the network, as diffusers saves it
runs/sketch/condition.json                 the maps that it reads, and the model that it was trained on
runs/sketch/best/                          the same of the step that was best on pairs held out
runs/sketch/settings.json, log.jsonl       its settings, and every step
runs/sketch/condition_fidelity.jsonl       the loss on held-out pairs with the map and without, and how edges agree
runs/sketch/previews/, sheet.png           map | sample | map of the sample
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor

from backbone.adapters.concept import BEST
from backbone.cli.conditions import RequestedMap
from backbone.conditions.control import Control, ControlNetwork
from backbone.distributed import processes
from backbone.families.unet.row_lora import RowLora
from backbone.io.console import notify
from backbone.io.files import append_jsonl, read_json
from backbone.io.progress import progress
from backbone.io.prompts import describe_mirrored
from backbone.io.run_folder import CHECKPOINT, read_log, refuse_taken, run_name, trim_log
from backbone.media.control.maps import COMPUTED, MapTarget, Palette, as_hints, compute_map, read_map
from backbone.media.sheet import Cell, draw_sheet, save_png
from backbone.media.sources.record import ImageRecord
from backbone.media.transforms import to_image, to_tensor
from backbone.models.cache import encode_prompts_cached
from backbone.models.locate import OWN
from backbone.models.model import Backbone
from backbone.models.sample import Request, sample
from backbone.training.checkpoint import refuse_other_sources
from backbone.training.models import open_configs, open_model
from backbone.training.run import Every, drive
from backbone.training.settings import resume_settings
from backbone.world.rendering.record import load_labels
from customize.control_settings import (
    ADAPTER_LORA,
    PROGRAM,
    ControlSettings,
    as_command,
    read_settings,
    resolve_settings,
)
from customize.data.changes import describe_changes, hash_images
from customize.data.control_pairs import ControlColumns, ControlPair, check_control_pairs, read_control_pairs
from customize.evaluation.condition_fidelity import (
    Agreement,
    HeldOutMaps,
    average_agreements,
    measure_edge_agreement,
    measure_loss,
)
from customize.objectives.control import ControlTraining, PairData
from customize.objectives.control_networks import make_network
from customize.settings import FILE, SHEET
from customize.training.control.memory import fit_to_vram
from customize.training.preflight import say_of_captions
from customize.training.record import write_record

FIDELITY = "condition_fidelity.jsonl"
PREVIEWS = "previews"
HELD = 16  # most pairs that are held out, and at most a tenth of all
SHOWN = 4  # held-out pairs in previews


@dataclass(frozen=True)
class HeldOutFidelity:
    """The loss on pairs held out after a step: with the map, and without it, which training does not change."""

    step: int
    loss: float
    loss_without_map: float


def train_control(requested: Mapping[str, Any], *, out: Path | None, vram: float | None = None) -> Path:
    """Train a control network and return its run folder. `requested` holds what the user set; `vram` is in GiB.

    Raises `UserError` for pairs that cannot be used, all of them listed, and for a run folder that is taken.
    """
    began = time.perf_counter()
    processes.init_process(requested.get("device") or "auto")
    run = out or Path("runs") / run_name(requested["images"])
    refuse_taken(run, [requested["images"]])
    opened, requested = open_configs(requested, compilable=requested.get("kind") != ADAPTER_LORA)
    settings = resolve_settings(requested, opened.defaults)
    pairs = open_pairs(settings, (opened.resolution, opened.resolution))
    model = open_model(settings)
    if vram is not None:
        model, settings = fit_to_vram(model, settings, vram)
    network = make_network(model, settings)
    if "rank" in requested and (warning := describe_other_rank(network, settings)):
        notify(warning)
    say_of_captions([pair.image for pair in pairs], model)
    captions = ((pair.caption, pair.image.caption_source) for pair in pairs)
    if settings.flip and (warning := describe_mirrored(captions)):
        notify(warning)
    with processes.hold_new_run(run) as writes:
        if writes:
            write_record(run, settings, model, command=as_command(settings, run), images=hash_pairs(pairs))
        return run_training(run, settings, model, network, pairs, began=began)


def describe_other_rank(network: ControlNetwork, settings: ControlSettings) -> str:
    """A sentence where the LoRA of `--begin-from` has another rank than `--rank`; else ""."""
    lora = getattr(network.module, "lora", None)
    if not settings.begin_from or not isinstance(lora, RowLora) or lora.rank == settings.rank:
        return ""
    return (
        f"--rank has no effect: the LoRA of {settings.begin_from} is trained on, whose rank is {lora.rank}."
    )


def resume_control(run: Path, overrides: Mapping[str, Any] | None = None) -> Path:
    """Resume a run that was stopped; the weights are the same as those of an uninterrupted run.

    `overrides` are settings that change (`customize.training.control.commands.RESUMED`).
    """
    settings, last_step = resume_settings(read_settings(run), run, overrides)
    processes.init_process(settings.device)
    with processes.hold_folder(run):
        model = open_model(settings)
        refuse_other_sources(run / CHECKPOINT, {"model": model.fingerprints})
        pairs = open_pairs(settings, (model.resolution, model.resolution))
        for sentence in describe_changes(read_json(run / FILE).get("images"), list_columns(pairs)):
            notify(sentence)
        network = make_network(model, settings)
        if overrides:
            notify(f"{run} goes on from step {last_step} to {settings.steps}.")
            if processes.is_main_process():
                write_record(
                    run, settings, model, command=as_command(settings, run), images=hash_pairs(pairs)
                )
        return run_training(run, settings, model, network, pairs, began=time.perf_counter())


def open_pairs(settings: ControlSettings, size: tuple[int, int]) -> list[ControlPair]:
    """The pairs of a run, checked; and the maps of its previews."""
    columns = ControlColumns(
        settings.image_column, settings.conditioning_image_column, settings.caption_column
    )
    pairs = read_control_pairs(settings.images, settings.condition, columns)
    check_control_pairs(
        pairs,
        settings.condition,
        size,
        palette=choose_palette(settings),
        wordless=settings.prompt_dropout == 1,
    )
    for path, _ in settings.validation_pairs():
        read_named_map(path, settings, size)
    return pairs


def choose_palette(settings: ControlSettings) -> Palette | None:
    """The label palette of the embedded models' world; None for other models, whose labels are up to the user."""
    return load_labels() if settings.condition == "labels" and settings.model in OWN else None


def read_named_map(path: str, settings: ControlSettings, size: tuple[int, int]) -> Tensor:
    """A map named by the user for previews, as a tensor [3, H, W]."""
    requested = RequestedMap(settings.condition, path)
    return as_hints(read_map(requested, MapTarget(size, choose_palette(settings))))[0]


def run_training(
    run: Path,
    settings: ControlSettings,
    model: Backbone,
    network: ControlNetwork,
    pairs: Sequence[ControlPair],
    *,
    began: float,
) -> Path:
    """Train from the last checkpoint, if there is one, to the finished folder."""
    # Data, objective, previews and validation
    held_out = hold_out_pairs(pairs)
    learned = list(pairs[: len(pairs) - len(held_out)]) if len(held_out) < len(pairs) else list(pairs)
    data = PairData(model, learned, settings.condition, flip=settings.flip)
    training = ControlTraining(model, network, data, settings)
    training.sources = {"model": model.fingerprints}
    previews = Previews(model, training, choose_preview_maps(settings, held_out, model))
    validation = Validation(run, training, encode_held_out(model, held_out, settings.condition))
    model.free("text_encoder")
    training.resume(run)
    validation.restore()
    prepared = time.perf_counter()
    drive(
        training,
        run,
        command=PROGRAM,
        validate=Every(settings.evaluation_steps, validation),
        preview=Every(
            settings.validation_steps, lambda step: previews.save(run / PREVIEWS / f"step-{step:06d}.png")
        ),
        tensorboard=settings.report_to == "tensorboard",
    )

    # The finished folder
    times = {"prepare": prepared - began, "train": time.perf_counter() - prepared}
    if processes.is_main_process():
        training.write(run, {})
        agreement = previews.save(run / SHEET)
        if agreement is not None:
            notify(
                f"Edges of {len(held_out[:SHOWN])} images that it drew agree with their maps: F1 {agreement.f1:.2f} "
                f"(precision {agreement.precision:.2f}, recall {agreement.recall:.2f})."
            )
        times["all"] = time.perf_counter() - began
        write_record(run, settings, model, command=as_command(settings, run), timings=times)
    processes.end_process()
    return run


def hold_out_pairs(pairs: Sequence[ControlPair]) -> Sequence[ControlPair]:
    """The last tenth of the pairs, at most `HELD`; with few pairs the first ones, which are trained on too."""
    count = min(HELD, len(pairs) // 10)
    return pairs[len(pairs) - count :] if count else pairs[:HELD]


def encode_held_out(model: Backbone, pairs: Sequence[ControlPair], kind: str) -> HeldOutMaps:
    """The held-out pairs, encoded."""
    size = model.resolution, model.resolution
    data = PairData(model, list(pairs), kind, flip=False)
    rows = torch.arange(len(pairs))
    clean = data.posteriors.gather(rows).mean
    conditions = data.conditions[rows].to(model.device)
    return HeldOutMaps(clean, torch.stack([pair.read_map(kind, size) for pair in pairs]), conditions)


class Validation:
    """Measures the loss on pairs held out, with the map and without, and keeps the network that is best there."""

    def __init__(self, run: Path, training: ControlTraining, held_out: HeldOutMaps) -> None:
        self.run, self.training, self.held_out = run, training, held_out
        self.history: list[HeldOutFidelity] = []
        self.loss_without_map: float | None = None

    def restore(self) -> None:
        """Read the validations of an interrupted run up to the step that it resumes from."""
        path, last_step = self.run / FIDELITY, self.training.done
        if processes.is_main_process():
            trim_log(path, last_step)
        self.history = read_log(path, HeldOutFidelity, done=last_step)
        self.loss_without_map = self.history[0].loss_without_map if self.history else None

    def __call__(self, step: int) -> str:
        """Measure the network at this step, at most once."""
        if not processes.is_participant() or any(fidelity.step == step for fidelity in self.history):
            return ""
        model, seed = self.training.model, self.training.settings.seed
        if self.loss_without_map is None:
            self.loss_without_map = measure_loss(model, None, self.held_out, seed=seed)
        with self.training.averaged():
            loss = measure_loss(model, self.training.network, self.held_out, seed=seed)
        best = step > 0 and all(loss < fidelity.loss for fidelity in self.history if fidelity.step)
        self.history.append(HeldOutFidelity(step, loss, self.loss_without_map))
        if processes.is_main_process():
            append_jsonl(self.run / FIDELITY, asdict(self.history[-1]))
            if best:
                self.training.write(self.run / BEST, {})
        return ""


class PreviewMap(NamedTuple):
    """The inputs of a preview: a prompt and a map [3, H, W] in 0…1 of a kind."""

    prompt: str
    kind: str
    map: Tensor


def choose_preview_maps(
    settings: ControlSettings, held_out: Sequence[ControlPair], model: Backbone
) -> list[PreviewMap]:
    """The maps that the user named for previews, or those of the first held-out pairs."""
    kind, size = settings.condition, (model.resolution, model.resolution)
    named = settings.validation_pairs()
    if named:
        return [PreviewMap(prompt, kind, read_named_map(path, settings, size)) for path, prompt in named]
    return [PreviewMap(pair.caption, kind, pair.read_map(kind, size)) for pair in held_out[:SHOWN]]


class Previews:
    """Samples under maps, shown with the maps and with the maps of the samples."""

    def __init__(self, model: Backbone, training: ControlTraining, shown: Sequence[PreviewMap]) -> None:
        self.model, self.training, self.shown = model, training, shown
        encode_prompts_cached(
            model, [*(example.prompt for example in shown), ""]
        )  # while the text encoder is loaded

    def save(self, path: Path) -> Agreement | None:
        """Write a sheet of map | sample | map of the sample; return the agreement of edges where they are computed."""
        if not processes.is_participant():
            return None
        images = self.draw()
        if not processes.is_main_process():
            return None
        settings = self.training.settings
        rows: list[list[Cell | Image | None]] = []
        agreements = []
        for (prompt, kind, expected), image in zip(self.shown, images, strict=True):
            rows.append([Cell(render_hints(expected), kind), Cell(image, prompt)])
            if kind in COMPUTED:
                agreements.append(measure_edge_agreement(expected, (to_tensor(image) + 1) / 2))
                rows[-1].append(Cell(compute_map(kind, image), f"F1 {agreements[-1].f1:.2f}"))
        sampling = f"{settings.sample_steps} steps, guidance {settings.guidance:g}"
        note = f"{settings.kind}, {path.stem}; {settings.model}, {sampling}"
        titles = ["map", "drawn by it", "map of the drawn"][: max(map(len, rows))]
        title = f"By {', '.join(dict.fromkeys(example.kind for example in self.shown))}"
        save_png(path, draw_sheet(rows, title=title, note=note, column_titles=titles))
        return average_agreements(agreements) if agreements else None

    def draw(self) -> list[Image]:
        """Sample an image for each map, one at a time."""
        network, settings = self.training.network, self.training.settings
        was_training = network.module.training
        images: list[Image] = []
        network.module.eval()
        with self.training.averaged(), progress(len(self.shown), "drawing a preview", brief=True) as bar:
            for number, preview in enumerate(self.shown):
                with torch.no_grad(), self.model.autocast():
                    control = Control.of(network, preview.map[None].to(self.model.device))
                images += sample(
                    self.model,
                    [Request(preview.prompt, (number, 0))],
                    steps=settings.sample_steps,
                    guidance=settings.guidance,
                    seed=settings.seed,
                    controls=(control,),
                    advance=bar.advance_images,
                )
        network.module.train(was_training)
        return images


def render_hints(hints: Tensor) -> Image:
    """A map [3, H, W] in 0…1 as a picture."""
    return to_image(hints * 2 - 1)


def list_columns(pairs: Sequence[ControlPair]) -> list[list[ImageRecord]]:
    """Two columns: the images, and their maps."""
    return [[pair.image for pair in pairs], [pair.map for pair in pairs if pair.map is not None]]


def hash_pairs(pairs: Sequence[ControlPair]) -> list[dict[str, str]]:
    """The hashes of the images with their captions, and of the maps, by their names."""
    return [hash_images(column) for column in list_columns(pairs)]
