"""A run of `edit` from wishes to a folder: what each command does, and how it is done again.

A command is a function of JSON-able wishes to a `Result`, so that a record holds all that repeats it:

    perform("sdedit", {"image": "photo.png", "prompt": "a cat in the snow"}, out=None)
    replay(Path("runs/edit-photo/run.json"), out=None)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from backbone.concept import Concept, described, read_concept, spoken
from backbone.console import UserError, progress, say
from backbone.files import content_hash, empty_folder, fresh_folder, read_json, read_metadata
from backbone.images import mask_to_tensor, to_image, to_tensor
from backbone.learned import put_on
from backbone.model import PRECISIONS, Backbone
from backbone.scorers import Scorer, load_scorer
from backbone.sheet import Cell
from edit import checks, measure
from edit.between import between
from edit.directly import flow_edit
from edit.guided import lead
from edit.inversion import Inversion, identity, invert, read_inversion
from edit.noised import Drawn, sdedit
from edit.output import INVERSION, RECORD, Result, beside, publish
from edit.pictures import as_mask, heat
from edit.prompt import PRESETS, Edited, Settings, align_all, aligned, possible, replace
from edit.removal import remove, without

FRAMES = 12


@dataclass(frozen=True)
class Opened:
    """A model with the concepts that it wears, and how it was opened."""

    model: Backbone
    concepts: tuple[Concept, ...]

    def said(self, prompt: str) -> str:
        """A person's prompt in the model's words."""
        return spoken(prompt, self.concepts)

    def facts(self) -> dict[str, Any]:
        """For the record."""
        return {
            "model": self.model.location.name,
            "fingerprint": self.model.fingerprint,
            "concepts": described(self.concepts),
            "device": str(self.model.device),
            "precision": next(name for name, dtype in PRECISIONS.items() if dtype is self.model.dtype),
        }


def perform(name: str, wishes: Mapping[str, Any], *, out: Path | None, said: str = "") -> Path:
    """Runs a command and gives the folder that it wrote: `out`, or runs/edit-NAME-OF-PICTURE.

    Raises `UserError` for every mistake of the wishes, and a folder that is taken.
    """
    began = time.perf_counter()
    if out is not None:
        empty_folder(out)
    _reset_peak()
    try:
        result, inversion = COMMANDS[name](**wishes)
    except UserError:
        if out is not None and not any(out.iterdir()):
            out.rmdir()  # a mistake leaves no folder behind
        raise
    named = wishes.get("image") or wishes.get("first") or wishes.get("inversion") or name
    folder = out or fresh_folder(Path("runs") / f"edit-{Path(str(named)).stem}")
    if inversion is not None:
        inversion.write(folder / INVERSION)
    counts = {**result.counts, "seconds": round(time.perf_counter() - began, 3), "peak_memory_mb": _peak()}
    finished = Result(**{**result.__dict__, "counts": counts})
    publish(folder, finished, name=name, wishes=wishes, said=said)
    return folder


def replay(record: Path, *, out: Path | None) -> Path:
    """Repeats the run of a `run.json` (or of its folder), with the model, picture and precision that it had.

    Raises `UserError` for another kind of file, or when the model's weights or the picture have changed since.
    """
    path = record / RECORD if record.is_dir() else record
    said = read_json(path)
    if not isinstance(said, dict) or said.get("command") not in COMMANDS:
        raise UserError(f"{path} is no record of an edit. Name the {RECORD} of a run folder.")
    wishes = {**said["settings"], "precision": said["precision"]}
    for name, digest in said.get("files", {}).items():
        if not Path(name).is_file() or content_hash(Path(name)) != digest:
            raise UserError(
                f"{name} is missing or has changed since {path} was written. Put the old file back."
            )
    device = str(wishes.get("device") or "auto")
    learned = [read_concept(folder) for folder in wishes.get("concepts", ())]
    if identity(Backbone.open(said["model"], device=device), learned) != said["identity"]:
        raise UserError(
            f"{said['model']} or a concept has other weights than when {path} was written. Put the old ones back."
        )
    try:
        return perform(said["command"], wishes, out=out, said=f"edit replay {path}")
    except TypeError as error:
        raise UserError(
            f"{path} holds settings that this version does not know ({error}). Edit anew."
        ) from error


# The commands -----------------------------------------------------------------------------------------------


def run_replace(
    *,
    targets: Sequence[str],
    image: str | None = None,
    source: str | None = None,
    inversion: str | None = None,
    method: str = "direct",
    iterations: int = 10,
    control: str = "prompt-to-prompt",
    steps: int = 50,
    guidance: float | None = None,
    negative: str = "",
    seed: int = 0,
    weights: Mapping[str, float] | None = None,
    windows: Mapping[str, Sequence[float]] | None = None,
    swaps: Sequence[Sequence[str]] = (),
    blend: Sequence[str] | None = None,
    keep: Sequence[str] = (),
    mask: str | None = None,
    cross: float | None = None,
    self_attention: float | None = None,
    threshold: float | None = None,
    strength: float = 1.0,
    heatmaps: Sequence[str] = (),
    film: bool = False,
    metrics: bool = True,
    scorer: str | None = None,
    **opening: Any,
) -> tuple[Result, Inversion | None]:
    """`edit invert-and-replace`."""
    targets = checks.prompts(targets, "target prompt")
    opened = open_model(inversion=inversion, **opening)
    settings = _settings(
        opened, control=control, guidance=guidance, negative=negative, weights=weights, windows=windows, swaps=swaps,
        blend=blend, keep=keep, mask=mask, cross=cross, self_attention=self_attention, threshold=threshold,
        strength=strength, heatmaps=heatmaps, film=film,
    )  # fmt: skip
    spoken_targets = [opened.said(target) for target in targets]
    if inversion is None:
        shown = opened.said(checks.prompt(source or "", "source prompt"))
        align_all(opened.model.text_encoder, shown, spoken_targets, settings)
    possible(opened.model, settings)
    found = inverted(opened, image, source, inversion, method, steps, guidance, seed, iterations)
    for target, alignment in zip(targets, aligned(found, spoken_targets, settings), strict=True):
        say(f"→ {target}\n{alignment}" if len(targets) > 1 else str(alignment))
    with progress(found.steps - found.start(strength), "editing") as bar:
        edited = replace(found, spoken_targets, progress=bar.advance, **settings.__dict__)
    sources = {"image": image, "inversion": inversion, "mask": mask}
    return _of_edited(
        opened, edited, targets, source or found.prompt, sources, metrics=metrics, scorer=scorer
    ), (found if inversion is None else None)


def run_sdedit(
    *,
    image: str,
    prompt: str,
    strength: float = 0.6,
    steps: int = 50,
    guidance: float | None = None,
    negative: str = "",
    mask: str | None = None,
    count: int = 1,
    seed: int = 0,
    film: bool = False,
    metrics: bool = True,
    scorer: str | None = None,
    **opening: Any,
) -> tuple[Result, None]:
    """`edit sdedit`."""
    opened = open_model(**opening)
    with progress(int(steps * checks.share("strength", strength)), "drawing") as bar:
        drawn = sdedit(
            opened.model, image, opened.said(prompt), strength=strength, steps=steps, guidance=guidance,
            negative=opened.said(negative), mask=mask, count=count, seed=seed, frames=FRAMES if film else 0,
            progress=bar.advance,
        )  # fmt: skip
    title = f"SDEdit: {prompt}, strength {strength:g}"
    sources = {"image": image, "mask": mask}
    return of_drawn(opened, drawn, [prompt] * count, title, sources, metrics=metrics, scorer=scorer), None


def run_flow_edit(
    *,
    image: str,
    source: str,
    targets: Sequence[str],
    strength: float = 0.66,
    steps: int = 50,
    guidance: float | None = None,
    source_guidance: float = 1.0,
    draws: int = 1,
    mask: str | None = None,
    seed: int = 0,
    film: bool = False,
    metrics: bool = True,
    scorer: str | None = None,
    **opening: Any,
) -> tuple[Result, None]:
    """`edit flow-edit`."""
    opened = open_model(**opening)
    with progress(int(steps * checks.share("strength", strength)), "editing") as bar:
        drawn = flow_edit(
            opened.model, image, opened.said(source), [opened.said(target) for target in targets], strength=strength,
            steps=steps, guidance=guidance, source_guidance=source_guidance, draws=draws, mask=mask, seed=seed,
            frames=FRAMES if film else 0, progress=bar.advance,
        )  # fmt: skip
    title = f"FlowEdit: {source}"
    sources = {"image": image, "mask": mask}
    return of_drawn(opened, drawn, targets, title, sources, metrics=metrics, scorer=scorer), None


def run_remove(
    *,
    word: str = "",
    image: str | None = None,
    source: str | None = None,
    inversion: str | None = None,
    prompt: str | None = None,
    mask: str | None = None,
    strength: float = 1.0,
    threshold: float = 0.4,
    steps: int = 50,
    guidance: float | None = None,
    negative: str = "",
    count: int = 1,
    seed: int = 0,
    film: bool = False,
    metrics: bool = True,
    scorer: str | None = None,
    **opening: Any,
) -> tuple[Result, Inversion | None]:
    """`edit remove`."""
    if not word.strip() and mask is None:
        raise UserError("Neither a word to remove nor a mask is given. Say --remove WORD, or --mask PNG.")
    opened = open_model(inversion=inversion, **opening)
    found = inverted(opened, image, source, inversion, "direct", steps, None, seed, 0)
    with progress(found.steps - found.start(checks.share("strength", strength)), "removing") as bar:
        drawn = remove(
            found, opened.said(word), prompt=None if prompt is None else opened.said(prompt), mask=mask,
            strength=strength, threshold=threshold, guidance=guidance, negative=opened.said(negative), count=count,
            seed=seed, frames=FRAMES if film else 0, progress=bar.advance,
        )  # fmt: skip
    seen = prompt if prompt is not None else without(source or found.prompt, word)
    sources = {"image": image, "inversion": inversion, "mask": mask}
    title = f"without {word or 'what the mask covers'}: {source or found.prompt}"
    result = of_drawn(opened, drawn, [seen] * count, title, sources, metrics=metrics, scorer=scorer)
    return _with_inversion(result, found, inversion), found if inversion is None else None


def run_lead(
    *,
    toward: Sequence[Sequence[Any]],
    image: str | None = None,
    source: str | None = None,
    inversion: str | None = None,
    strength: float = 0.7,
    steps: int = 50,
    mask: str | None = None,
    seed: int = 0,
    film: bool = False,
    metrics: bool = True,
    scorer: str | None = None,
    **opening: Any,
) -> tuple[Result, Inversion | None]:
    """`edit lead`."""
    opened = open_model(inversion=inversion, **opening)
    found = inverted(opened, image, source, inversion, "direct", steps, None, seed, 0)
    with progress(found.steps - found.start(checks.share("strength", strength)), "leading") as bar:
        drawn = lead(
            found, [(opened.said(prompt), float(weight)) for prompt, weight in toward], strength=strength, mask=mask,
            frames=FRAMES if film else 0, progress=bar.advance,
        )  # fmt: skip
    caption = ", ".join(f"{prompt} × {float(weight):g}" for prompt, weight in toward)
    sources = {"image": image, "inversion": inversion, "mask": mask}
    result = of_drawn(opened, drawn, [caption], f"led: {caption}", sources, metrics=metrics, scorer=scorer)
    return _with_inversion(result, found, inversion), found if inversion is None else None


def run_between(
    *,
    first: str,
    second: str,
    first_prompt: str,
    second_prompt: str,
    count: int = 7,
    steps: int = 50,
    seed: int = 0,
    **opening: Any,
) -> tuple[Result, None]:
    """`edit between`."""
    opened = open_model(**opening)
    ends = [
        inverted(opened, image, prompt, None, "direct", steps, None, seed, 0)
        for image, prompt in ((first, first_prompt), (second, second_prompt))
    ]
    with progress(steps, "between") as bar:
        latents, asked = between(*ends, count=count, progress=bar.advance)
    pictures = [to_image(picture) for picture in opened.model.decode(latents)]
    captions = [first_prompt, *(f"{k}/{count - 1}" for k in range(1, count - 1)), second_prompt]
    counts = {"denoiser_evaluations": asked + sum(end.evaluations for end in ends), "steps": steps}
    result = Result(
        title=f"from {first_prompt} to {second_prompt}",
        source=to_image(ends[0].picture),
        edits=pictures,
        captions=captions,
        facts=_facts(opened, {"first": first, "second": second}),
        counts=counts,
        frames=[*pictures, *pictures[-2:0:-1]],
    )
    return result, None


COMMANDS: Mapping[str, Callable[..., tuple[Result, Inversion | None]]] = {
    "invert-and-replace": run_replace,
    "sdedit": run_sdedit,
    "flow-edit": run_flow_edit,
    "remove": run_remove,
    "lead": run_lead,
    "between": run_between,
}


# Steps that the commands share ------------------------------------------------------------------------------


def open_model(
    *,
    model: str | None = None,
    concepts: Sequence[str] = (),
    precision: str | None = None,
    device: str | None = None,
    inversion: str | None = None,
) -> Opened:
    """The model with its concepts; without a name the one that the inversion or the first concept was made with."""
    learned = tuple(read_concept(folder) for folder in concepts)
    name = model or (learned[0].model if learned else None)
    if name is None and inversion is not None:
        name = read_metadata(inversion).get("model")
    opened = Backbone.open(name or "moji", device=device or "auto", precision=precision or "auto")
    put_on(opened, learned)
    return Opened(opened, learned)


def inverted(
    opened: Opened,
    image: str | None,
    source: str | None,
    inversion: str | None,
    method: str,
    steps: int,
    guidance: float | None,
    seed: int,
    iterations: int,
) -> Inversion:
    """The inversion of a file, or of a picture with its prompt."""
    if inversion is not None:
        found = read_inversion(inversion, opened.model, concepts=opened.concepts)
        if source is not None and opened.said(source) != found.prompt:
            raise UserError(f"{inversion} is of “{found.prompt}”, not of “{source}”. Leave --source out.")
        return found
    if image is None:
        raise UserError("There is nothing to edit. Give a picture, or an inversion with --inversion FILE.")
    prompt = checks.prompt(source or "", "source prompt")
    say(f"Inverting {image} ({method}, {steps} steps) …")
    return invert(
        opened.model, image, opened.said(prompt), method=cast(Any, method), steps=steps, guidance=guidance, seed=seed,
        iterations=iterations, concepts=opened.concepts,
    )  # fmt: skip


def of_drawn(
    opened: Opened,
    drawn: Drawn,
    captions: Sequence[str],
    title: str,
    sources: Mapping[str, str | None],
    *,
    metrics: bool,
    scorer: str | None,
) -> Result:
    """The result of an edit without attention control."""
    model, source = opened.model, to_image(drawn.picture)
    bound, *edits = model.decode(torch.cat([drawn.clean[None], drawn.latents]))
    masks: list[Image.Image | None] = [None] * len(edits)
    if drawn.mask is not None:
        masks = [as_mask(drawn.mask, source.size)] * len(edits)
    return Result(
        title=title,
        source=source,
        edits=[to_image(edit) for edit in edits],
        captions=captions,
        facts={**_facts(opened, sources), "picture": dict(drawn.facts)},
        counts={
            "denoiser_evaluations": drawn.evaluations,
            "autoencoder_psnr_db": measure.psnr(drawn.picture, bound),
        },
        measured=_measured(opened, drawn.picture, edits, masks, captions, metrics=metrics, scorer=scorer),
        masks=masks,
        frames=_frames(model, drawn.estimates),
    )


def _of_edited(
    opened: Opened,
    edited: Edited,
    targets: Sequence[str],
    prompt: str,
    sources: Mapping[str, str | None],
    *,
    metrics: bool,
    scorer: str | None,
) -> Result:
    """The result of a prompt-to-prompt edit."""
    model, found = opened.model, edited.inversion
    source = to_image(found.picture)
    exact = torch.equal(edited.source, found.clean)
    wanted = [found.clean[None], *([] if exact else [edited.source[None]]), edited.latents]
    decoded = list(model.decode(torch.cat([latents.to(model.device) for latents in wanted])))
    bound, reconstruction, edits = decoded[0], decoded[0 if exact else 1], decoded[-len(targets) :]
    masks: list[Image.Image | None] = [None] * len(edits)
    if edited.masks is not None:
        masks = [as_mask(places, source.size) for places in edited.masks]
    images = [to_image(edit) for edit in edits]
    heatmaps = {}
    for word, maps in edited.heatmaps.items():
        shown = zip(maps, [source, *images], ["source", *targets], strict=True)
        heatmaps[word] = [
            Cell(heat(m, over, float(m.max())), said) for m, over, said in shown if bool(m.any())
        ]
    return Result(
        title=prompt,
        source=source,
        edits=images,
        captions=targets,
        facts={
            **_facts(opened, sources),
            "picture": dict(found.facts),
            "inversion_method": found.method,
            "guidance": edited.guidance,
        },
        counts={
            "denoiser_evaluations": found.evaluations + edited.evaluations,
            "of_them_for_the_inversion": found.evaluations,
            "steps": found.steps,
            "reconstruction_psnr_db": measure.psnr(found.picture, reconstruction),
            "autoencoder_psnr_db": measure.psnr(found.picture, bound),
        },
        measured=_measured(opened, found.picture, edits, masks, targets, metrics=metrics, scorer=scorer),
        reconstruction=to_image(reconstruction),
        masks=masks,
        heatmaps=heatmaps,
        frames=_frames(model, edited.estimates),
        alignments=[str(alignment) for alignment in edited.alignments],
    )


def _settings(opened: Opened, *, control: str, film: bool, **asked: Any) -> Settings:
    """The settings of an edit from what was asked for, in the model's words, over those of its kind of control."""
    if control not in PRESETS:
        raise UserError(f"There is no control {control}. Choose one of {', '.join(PRESETS)}.")
    wishes = dict(PRESETS[control]) | {name: value for name, value in asked.items() if value is not None}
    for name in ("blend", "keep", "heatmaps"):
        wishes[name] = tuple(opened.said(word) for word in wishes.get(name, Settings.blend))
    for name in ("weights", "windows"):
        wishes[name] = {opened.said(word): value for word, value in wishes.get(name, {}).items()}
    wishes["windows"] = {word: (float(start), float(end)) for word, (start, end) in wishes["windows"].items()}
    wishes["swaps"] = tuple((opened.said(old), opened.said(new)) for old, new in wishes["swaps"])
    wishes["negative"] = opened.said(wishes["negative"])
    return Settings(**wishes, frames=FRAMES if film else 0)


def settings_of(opened: Opened, wishes: Mapping[str, Any]) -> Settings:
    """The settings that the wishes of `edit invert-and-replace` make."""
    names = (
        "control", "guidance", "negative", "weights", "windows", "swaps", "blend", "keep", "mask", "cross",
        "self_attention", "threshold", "strength", "heatmaps", "film",
    )  # fmt: skip
    return _settings(opened, **{name: wishes[name] for name in names})


def _with_inversion(result: Result, found: Inversion, file: str | None) -> Result:
    """The same, the inversion's evaluations counted where it was made for this run."""
    made = 0 if file is not None else found.evaluations
    counts = dict(result.counts)
    counts["denoiser_evaluations"] += made
    return Result(**{**result.__dict__, "counts": {**counts, "of_them_for_the_inversion": made}})


def _facts(opened: Opened, files: Mapping[str, str | None]) -> dict[str, Any]:
    hashes = {name: content_hash(Path(name)) for name in files.values() if name is not None}
    return {**opened.facts(), "identity": identity(opened.model, opened.concepts), "files": hashes}


def _measured(
    opened: Opened,
    picture: Tensor,
    edits: Sequence[Tensor],
    masks: Sequence[Image.Image | None],
    prompts: Sequence[str],
    *,
    metrics: bool,
    scorer: str | None,
) -> list[dict[str, float | None]]:
    """The figures of every edit; none if they are not wanted."""
    if not metrics:
        return []
    judge = scorer_of(opened.model, scorer)
    shown = to_tensor(to_image(picture))
    return [
        measure.figures(
            shown,
            edit.cpu(),
            changed=None if mask is None else mask_to_tensor(mask)[0],
            scorer=judge,
            target=prompt,
        )
        for edit, mask, prompt in zip(edits, masks, prompts, strict=True)
    ]


def scorer_of(model: Backbone, named: str | None = None) -> Scorer | None:
    """The scorer that was named, or the model's own; None where there is neither."""
    folder = Path(named) if named else model.location.local("scorer")
    return None if folder is None else load_scorer(folder)


def _frames(model: Backbone, estimates: Tensor) -> list[Image.Image]:
    """The film: what the edits were thought to become, side by side."""
    return [beside([to_image(picture) for picture in model.decode(row)]) for row in estimates]


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak() -> float | None:
    """The most memory that this process has had, in MB: on the GPU where there is one."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 1e6, 1)
    try:
        import resource
    except ImportError:  # Windows
        return None
    import sys

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(most / (1e6 if sys.platform == "darwin" else 1e3), 1)
