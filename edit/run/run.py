"""A run of `edit` from wishes to a folder: what each command does, and how it is done again.

A command is a function of a model and JSON-able wishes to what it has `Done`, so that a record holds all that repeats
it:

    perform("sdedit", {"image": "photo.png", "prompt": "a cat in the snow"}, out=None)
    replay(Path("runs/edit-photo/run.json"), out=None)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from backbone.adapters.concept import read_concept
from backbone.evaluation import image_metrics as measure
from backbone.evaluation.clip import Scorer, load_scorer
from backbone.io.console import UserError, notify, progress
from backbone.io.files import content_hash, make_empty_folder, make_numbered_folder, read_json
from backbone.io.run_folder import peak_memory
from backbone.media.sheet import Cell
from backbone.media.transforms import mask_to_tensor, to_image, to_tensor
from backbone.models.model import Backbone
from edit import checks
from edit.inversion.inversion import Inversion, identity
from edit.masks import as_mask
from edit.methods.compose import compose
from edit.methods.flow_edit import flow_edit
from edit.methods.interpolate import interpolate
from edit.methods.prompt_to_prompt.edit import Edited, align_all, aligned, possible, replace
from edit.methods.remove import remove, without
from edit.methods.sdedit import Drawn, sdedit
from edit.run.open import FRAMES, Opened, inverted, open_model, settings_of
from edit.run.report import INVERSION, RECORD, Result, beside, heat, publish

OPENING = ("model", "concepts", "scale", "precision", "device")
JUDGING = ("metrics", "scorer")
FILES = ("image", "inversion", "mask", "first", "second")


@dataclass(frozen=True, eq=False)
class Done:
    """What a command did, before it is measured and written. Pictures are [3, 8H, 8W] in −1…1.

    picture         as the model was shown it
    edits           with their captions
    counts, facts   of the command, for the record
    inversion       the one that was made for it, which is kept beside the edits
    masks           [H, W] for each edit, 1 where it was let differ; None for everywhere
    reconstruction  what an edit that changes nothing would give, if the method has one
    compared        whether it says something to measure the edits against the picture
    """

    title: str
    picture: Tensor
    edits: Sequence[Tensor]
    captions: Sequence[str]
    counts: Mapping[str, Any]
    facts: Mapping[str, Any] = field(default_factory=dict)
    inversion: Inversion | None = None
    masks: Tensor | None = None
    reconstruction: Tensor | None = None
    heatmaps: Mapping[str, Sequence[Cell]] = field(default_factory=dict)
    frames: Sequence[Image.Image] = ()
    alignments: Sequence[str] = ()
    compared: bool = True


def perform(name: str, wishes: Mapping[str, Any], *, out: Path | None, said: str = "") -> Path:
    """Runs a command and gives the folder that it wrote: `out`, or runs/edit-NAME-OF-PICTURE.

    Raises `UserError` for every mistake of the wishes, and a folder that is taken.
    """
    began = time.perf_counter()
    if out is not None:
        make_empty_folder(out)
    _reset_peak()
    own = {wish: value for wish, value in wishes.items() if wish not in (*OPENING, *JUDGING)}
    opening, judging = (
        {wish: wishes[wish] for wish in some if wish in wishes} for some in (OPENING, JUDGING)
    )
    try:
        opened = open_model(**opening, inversion=wishes.get("inversion"))
        done = COMMANDS[name](opened, **own)
        result = result_of(opened, done, **judging)
    except UserError:
        if out is not None and not any(out.iterdir()):
            out.rmdir()  # a mistake leaves no folder behind
        raise
    files = [str(wishes[wish]) for wish in FILES if wishes.get(wish) is not None]
    folder = out or make_numbered_folder(Path("runs") / f"edit-{Path(files[0] if files else name).stem}")
    if done.inversion is not None:
        done.inversion.write(folder / INVERSION)
    finished = changed(
        result,
        facts={**result.facts, "files": {file: content_hash(Path(file)) for file in files}},
        counts={**result.counts, "seconds": round(time.perf_counter() - began, 3), "peak_memory_mb": _peak()},
    )
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
    scale = float(wishes.get("scale", 1.0))
    if identity(Backbone.open(said["model"], device=device), learned, scale=scale) != said["identity"]:
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
    opened: Opened,
    *,
    targets: Sequence[str],
    image: str | None = None,
    source: str | None = None,
    inversion: str | None = None,
    method: str = "direct",
    iterations: int = 10,
    steps: int = 50,
    seed: int = 0,
    **asked: Any,
) -> Done:
    """`edit invert-and-replace`; `asked` are those of `settings_of`."""
    targets = checks.prompts(targets, "target prompt")
    settings = settings_of(opened, **asked)
    spoken_targets = [opened.said(target) for target in targets]
    if inversion is None:
        shown = opened.said(checks.prompt(source or "", "source prompt"))
        align_all(opened.model.text_encoder, shown, spoken_targets, settings)
    possible(opened.model, settings)
    found = inverted(
        opened, image, source, inversion, method=method, steps=steps, guidance=settings.guidance, seed=seed,
        iterations=iterations,
    )  # fmt: skip
    for target, alignment in zip(targets, aligned(found, spoken_targets, settings), strict=True):
        notify(f"→ {target}\n{alignment}" if len(targets) > 1 else str(alignment))
    with progress(found.steps - found.start(settings.strength), "editing") as bar:
        edited = replace(found, spoken_targets, progress=bar.advance, **settings.__dict__)
    return of_edited(edited, targets, source or found.prompt, made=inversion is None)


def run_sdedit(
    opened: Opened,
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
) -> Done:
    """`edit sdedit`."""
    with progress(int(steps * checks.share("strength", strength)), "drawing") as bar:
        drawn = sdedit(
            opened.model, image, opened.said(prompt), strength=strength, steps=steps, guidance=guidance,
            negative=opened.said(negative), mask=mask, count=count, seed=seed, frames=FRAMES if film else 0,
            progress=bar.advance,
        )  # fmt: skip
    return of_drawn(drawn, [prompt] * count, f"SDEdit: {prompt}, strength {strength:g}")


def run_flow_edit(
    opened: Opened,
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
) -> Done:
    """`edit flow-edit`."""
    with progress(int(steps * checks.share("strength", strength)), "editing") as bar:
        drawn = flow_edit(
            opened.model, image, opened.said(source), [opened.said(target) for target in targets], strength=strength,
            steps=steps, guidance=guidance, source_guidance=source_guidance, draws=draws, mask=mask, seed=seed,
            frames=FRAMES if film else 0, progress=bar.advance,
        )  # fmt: skip
    return of_drawn(drawn, targets, f"FlowEdit: {source}")


def run_remove(
    opened: Opened,
    *,
    word: str = "",
    image: str | None = None,
    source: str | None = None,
    inversion: str | None = None,
    prompt: str | None = None,
    mask: str | None = None,
    strength: float = 1.0,
    threshold: float = 0.25,
    steps: int = 50,
    guidance: float | None = None,
    negative: str = "",
    count: int = 1,
    seed: int = 0,
    film: bool = False,
) -> Done:
    """`edit remove`."""
    if not word.strip() and mask is None:
        raise UserError("Neither a word to remove nor a mask is given. Say --remove WORD, or --mask PNG.")
    found = inverted(opened, image, source, inversion, steps=steps, seed=seed)
    with progress(found.steps - found.start(checks.share("strength", strength)), "removing") as bar:
        drawn = remove(
            found, opened.said(word), prompt=None if prompt is None else opened.said(prompt), mask=mask,
            strength=strength, threshold=threshold, guidance=guidance, negative=opened.said(negative), count=count,
            seed=seed, frames=FRAMES if film else 0, progress=bar.advance,
        )  # fmt: skip
    shown = source or found.prompt
    seen = prompt if prompt is not None else without(shown, word)
    title = f"without {word or 'what the mask covers'}: {shown}"
    return of_drawn(drawn, [seen] * count, title, made=found if inversion is None else None)


def run_compose(
    opened: Opened,
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
) -> Done:
    """`edit compose`."""
    found = inverted(opened, image, source, inversion, steps=steps, seed=seed)
    with progress(found.steps - found.start(checks.share("strength", strength)), "composing") as bar:
        drawn = compose(
            found, [(opened.said(prompt), float(weight)) for prompt, weight in toward], strength=strength, mask=mask,
            frames=FRAMES if film else 0, progress=bar.advance,
        )  # fmt: skip
    caption = ", ".join(f"{prompt} × {float(weight):g}" for prompt, weight in toward)
    return of_drawn(drawn, [caption], f"composed: {caption}", made=found if inversion is None else None)


def run_interpolate(
    opened: Opened,
    *,
    first: str,
    second: str,
    first_prompt: str,
    second_prompt: str,
    count: int = 7,
    steps: int = 50,
    seed: int = 0,
) -> Done:
    """`edit interpolate`."""
    ends = [
        inverted(opened, image, prompt, steps=steps, seed=seed)
        for image, prompt in ((first, first_prompt), (second, second_prompt))
    ]
    with progress(steps, "interpolating") as bar:
        latents, asked = interpolate(*ends, count=count, progress=bar.advance)
    pictures = list(opened.model.decode(latents))
    images = [to_image(picture) for picture in pictures]
    return Done(
        title=f"from {first_prompt} to {second_prompt}",
        picture=ends[0].picture,
        edits=pictures,
        captions=[first_prompt, *(f"{k}/{count - 1}" for k in range(1, count - 1)), second_prompt],
        counts={"denoiser_evaluations": asked + sum(end.evaluations for end in ends), "steps": steps},
        frames=[*images, *images[-2:0:-1]],
        compared=False,
    )


COMMANDS: Mapping[str, Callable[..., Done]] = {
    "invert-and-replace": run_replace,
    "sdedit": run_sdedit,
    "flow-edit": run_flow_edit,
    "remove": run_remove,
    "compose": run_compose,
    "interpolate": run_interpolate,
}


# What was done, decoded -------------------------------------------------------------------------------------


def of_drawn(drawn: Drawn, captions: Sequence[str], title: str, *, made: Inversion | None = None) -> Done:
    """An edit without attention control, and the inversion that was made for it."""
    bound, *edits = drawn.decoded
    counts = {"denoiser_evaluations": drawn.evaluations}
    if made is not None:
        counts["denoiser_evaluations"] += made.evaluations
        counts["of_them_for_the_inversion"] = made.evaluations
    return Done(
        title=title,
        picture=drawn.picture,
        edits=edits,
        captions=captions,
        counts={**counts, "autoencoder_psnr_db": measure.psnr(drawn.picture, bound)},
        facts={"picture": dict(drawn.facts)},
        inversion=made,
        masks=None if drawn.mask is None else drawn.mask.expand(len(edits), -1, -1),
        frames=_frames(drawn.model, drawn.estimates),
    )


def of_edited(edited: Edited, targets: Sequence[str], title: str, *, made: bool) -> Done:
    """A prompt-to-prompt edit; `made` says whether its inversion was made for it."""
    found = edited.inversion
    model = found.model
    reconstruction, *edits = edited.decoded
    exact = torch.equal(edited.source, found.clean)
    bound = reconstruction if exact else model.decode(found.clean[None])[0]
    return Done(
        title=title,
        picture=found.picture,
        edits=edits,
        captions=targets,
        counts={
            "denoiser_evaluations": found.evaluations + edited.evaluations,
            "of_them_for_the_inversion": found.evaluations,
            "steps": found.steps,
            "reconstruction_psnr_db": measure.psnr(found.picture, reconstruction),
            "autoencoder_psnr_db": measure.psnr(found.picture, bound),
        },
        facts={
            "picture": dict(found.facts),
            "inversion_method": found.method,
            "guidance": edited.guidance,
        },
        inversion=found if made else None,
        masks=edited.masks,
        reconstruction=reconstruction,
        heatmaps=_heatmaps(edited, [found.picture, *edits], ["source", *targets]),
        frames=_frames(model, edited.estimates),
        alignments=[str(alignment) for alignment in edited.alignments],
    )


def _heatmaps(edited: Edited, pictures: Sequence[Tensor], said: Sequence[str]) -> dict[str, list[Cell]]:
    """Every word's maps, laid over the pictures whose prompts say it."""
    images = [to_image(picture) for picture in pictures]
    return {
        word: [
            Cell(heat(one, over, float(one.max())), caption)
            for one, over, caption in zip(maps, images, said, strict=True)
            if bool(one.any())
        ]
        for word, maps in edited.heatmaps.items()
    }


def _frames(model: Backbone, estimates: Tensor) -> list[Image.Image]:
    """The film: what the edits were thought to become, side by side."""
    return [beside([to_image(picture) for picture in model.decode(row)]) for row in estimates]


# What was done, measured ------------------------------------------------------------------------------------


def result_of(opened: Opened, done: Done, *, metrics: bool = True, scorer: str | None = None) -> Result:
    """What is written of it, with figures if they are wanted."""
    source = to_image(done.picture)
    masks: list[Image.Image | None] = [None] * len(done.edits)
    if done.masks is not None:
        masks = [as_mask(places, source.size) for places in done.masks]
    return Result(
        title=done.title,
        source=source,
        edits=[to_image(edit) for edit in done.edits],
        captions=done.captions,
        facts={**opened.facts(), **done.facts},
        counts=done.counts,
        measured=_measured(opened, done, masks, scorer) if metrics and done.compared else [],
        reconstruction=None if done.reconstruction is None else to_image(done.reconstruction),
        masks=masks,
        heatmaps=done.heatmaps,
        frames=done.frames,
        alignments=done.alignments,
    )


def _measured(
    opened: Opened, done: Done, masks: Sequence[Image.Image | None], scorer: str | None
) -> list[dict[str, float | None]]:
    """The figures of every edit."""
    judge = scorer_of(opened.model, scorer)
    shown = to_tensor(to_image(done.picture))
    return [
        measure.measure_edit(
            shown,
            edit.cpu(),
            changed=None if mask is None else mask_to_tensor(mask)[0],
            scorer=judge,
            target=prompt,
        )
        for edit, mask, prompt in zip(done.edits, masks, done.captions, strict=True)
    ]


def scorer_of(model: Backbone, named: str | None = None) -> Scorer | None:
    """The scorer that was named, or the model's own; None where there is neither."""
    folder = Path(named) if named else model.location.local("scorer")
    return None if folder is None else load_scorer(folder)


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak() -> float | None:
    """The most memory that this process has had, in MB: on the GPU where there is one."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 1e6, 1)
    most = peak_memory()
    return None if most is None else round(most / 1e6, 1)
