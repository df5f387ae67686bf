"""The start of an edit: the model with its concepts, the image's inversion, and settings in the model's words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from PIL.Image import Image

from backbone.adapters.concept import (
    EDITS,
    OWN_EDITOR,
    Concept,
    needs_whole_base,
    read_concept,
    resolve_placeholder_tokens,
    summarize_concepts,
    trained_resolution,
)
from backbone.cli.conditions import RequestedControl
from backbone.distributed.device import PRECISIONS
from backbone.io.console import UserError, notify
from backbone.io.files import read_metadata
from backbone.io.progress import progress
from backbone.media.transforms import to_image
from backbone.models.control import OpenedControl, find_control
from backbone.models.fingerprint import Fingerprints
from backbone.models.model import Backbone, Task
from edit.checks import check_prompt
from edit.inversion.inversion import (
    Inversion,
    count_rounds,
    identities,
    invert,
    read_inversion,
    select_settings,
)
from edit.layout import NOTHING_REQUESTED, Layout, RequestedLayout, open_layout
from edit.masks import fit_mask
from edit.methods.prompt_to_prompt.settings import PRESETS, ReplaceSettings
from edit.pictures import ImageLike, read_image, show_image
from edit.settings import Method

FRAMES = 12  # of trajectory.gif


@dataclass(frozen=True)
class ModelWithConcepts:
    """A model and the concepts that were loaded into it, at a `scale`."""

    model: Backbone
    concepts: tuple[Concept, ...] = ()
    scale: float = 1.0
    controls: dict[str, OpenedControl] = field(default_factory=dict)

    def layout(self, image: ImageLike, requested: RequestedLayout) -> Layout:
        """The conditions of an edit of an image; each network is opened once."""
        return open_layout(self.model, image, requested, opened=self.controls)

    @cached_property
    def identity(self) -> str:
        """The fingerprint of the model with its concepts."""
        return self.identities[0]

    @cached_property
    def identities(self) -> Fingerprints:
        """The identity, followed by its forms in older records."""
        return identities(self.model, self.concepts, scale=self.scale)

    def resolve(self, prompt: str) -> str:
        """The user's prompt in the model's words, with placeholder tokens resolved."""
        return resolve_placeholder_tokens(prompt, self.concepts, model=self.model.location.name)

    @property
    def placeholders(self) -> dict[str, str]:
        """The words that the model reads → the concept's token that the user writes."""
        return {words: token for concept in self.concepts for token, words in concept.tokens.items()}

    def facts(self) -> dict[str, Any]:
        """For the record."""
        return {
            "model": self.model.location.name,
            "fingerprint": self.model.fingerprint,
            "concepts": summarize_concepts(self.concepts),
            "scale": self.scale,
            "device": str(self.model.device),
            "precision": next(name for name, dtype in PRECISIONS.items() if dtype is self.model.dtype),
            "identity": self.identity,
        }


@dataclass(frozen=True, kw_only=True)
class Opening:
    """Options for opening the model: its name, concepts and placement.

    Without a name it is the one that the first concept or the inversion was made with. `vram` is the device's memory in
    GiB to plan for where images are read beside an instruction.
    """

    model: str | None = None
    concepts: Sequence[str] = ()
    scale: float = 1.0
    precision: str | None = None
    device: str | None = None
    compile: bool = False
    inversion: str | None = None
    vram: float | None = None


# The options that only opening the model reads; an inversion's file is the edit's as well.
OPENING = tuple(name for name in Opening.__dataclass_fields__ if name != "inversion")


def load_model(opening: Opening, *, image_count: int = 0) -> ModelWithConcepts:
    """Load the model with its concepts, to read `image_count` images beside an instruction; 0: none."""
    concepts = tuple(read_concept(folder) for folder in opening.concepts)
    name = opening.model or (concepts[0].model if concepts else None)
    if name is None and opening.inversion is not None:
        name = read_metadata(opening.inversion).get("model")
    editors = [concept for concept in concepts if concept.kind == EDITS]
    if image_count and not editors and (name or "moji") == "moji" and OWN_EDITOR.is_dir():
        notify("moji follows instructions with moji-edit (another one: --concept RUN, or --model).")
        editors = [read_concept(OWN_EDITOR)]
        concepts += tuple(editors)
    task: Task = "text-to-image" if not image_count else "learn-to-edit" if editors else "edit"
    backbone = Backbone.open(
        name or "moji",
        device=opening.device or "auto",
        precision=opening.precision or "auto",
        compile=opening.compile,
        task=task,
        resolution=trained_resolution(editors) if image_count else 0,
    )
    if opening.vram is not None:
        backbone = fit_editor(
            backbone, image_count, opening.vram, whole_base=any(map(needs_whole_base, concepts))
        )
    if concepts:
        from backbone.adapters.apply import load_concepts  # imports peft, which is slow

        load_concepts(backbone, concepts, scale=opening.scale)
    return ModelWithConcepts(backbone, concepts, opening.scale)


def fit_editor(model: Backbone, image_count: int, vram: float, *, whole_base: bool) -> Backbone:
    """Place the model to edit by instruction on a device of `vram` GiB; `UserError` where it does not fit."""
    from backbone.memory.drawing import DrawingWorkload, fit_drawing

    height, width = model.latent_shape[-2:]
    guidance = float(model.defaults["guidance"])
    return fit_drawing(
        model,
        DrawingWorkload(1, (height, width), guidance, references=image_count, whole_base=whole_base),
        vram,
    )


@dataclass(frozen=True)
class Start:
    """The starting point of an edit: an inversion's file; or an image, its prompt, and how to invert it."""

    image: ImageLike | None = None
    source: str | None = None
    inversion: str | None = None
    method: Method = "direct"
    steps: int = 50
    seed: int = 0
    iterations: int = 10
    requested: RequestedLayout = NOTHING_REQUESTED

    def check_mask(self, loaded: ModelWithConcepts, mask: ImageLike | None) -> Image | None:
        """The mask as the model is shown it, if the image is known before anything is inverted.

        `UserError` for one that does not fit the image.
        """
        if mask is None or self.image is None or self.inversion is not None:
            return None
        image = read_image(self.image)
        return fit_mask(mask, show_image(loaded.model, image).size, image.image.size)

    def open(self, loaded: ModelWithConcepts, *, guidance: float | None = None) -> Inversion:
        """Read or make the inversion; `guidance` is null-text's. `UserError` if it is of another prompt."""
        if self.inversion is not None:
            inversion = read_inversion(self.inversion, loaded.model, accepted=loaded.identities)
            if self.source is not None and loaded.resolve(self.source) != inversion.prompt:
                raise UserError(
                    f"{self.inversion} was made with the prompt “{inversion.prompt}”, not “{self.source}”. "
                    "Leave --source out."
                )
            layout = merge_layouts(
                inversion,
                self.requested.targets,
                lambda drawn: loaded.layout(to_image(inversion.image), RequestedLayout(drawn)),
                self.inversion,
            )
            return replace(inversion, layout=layout)
        if self.image is None:
            raise UserError("There is nothing to edit. Give an image, or an inversion with --inversion FILE.")
        prompt = check_prompt(self.source or "", "source prompt")
        notify(f"Inverting {getattr(self.image, 'name', self.image)} ({self.method}, {self.steps} steps) …")
        with progress(count_rounds(self.method, self.steps), "inverting", brief=True) as bar:
            return invert(
                loaded.model, self.image, loaded.resolve(prompt), method=self.method, steps=self.steps,
                identity=loaded.identity, layout=loaded.layout(self.image, self.requested), progress=bar.advance,
                **select_settings(self.method, guidance=guidance, seed=self.seed, iterations=self.iterations),
            )  # fmt: skip


def merge_layouts(
    inversion: Inversion,
    targets: Sequence[RequestedControl],
    open_drawn: Callable[[tuple[RequestedControl, ...]], Layout],
    name: str,
) -> Layout:
    """An inversion's own conditions, in which the targets' requested ones replace those of the same kinds.

    Raises `UserError` for a map to be computed from a source that was inverted without it, or under it otherwise.
    """
    source_facts = {condition.facts["kind"]: condition.facts for condition in inversion.layout.conditions}
    for control in targets:
        if not control.map.path and control.map.kind not in source_facts:
            raise UserError(
                f"{name} was inverted without {control.map.kind}. Invert the source again with --condition "
                f"{control.map}, or give a map of the targets."
            )
        if not control.map.path:
            _refuse_other_strength(control, source_facts[control.map.kind], name)
    target_layout = open_drawn(tuple(control for control in targets if control.map.path))
    kinds = {condition.facts["kind"] for condition in target_layout.conditions}
    sides = tuple((True, condition.facts["kind"] not in kinds) for condition in inversion.layout.conditions)
    return Layout((*inversion.layout.conditions, *target_layout.conditions), (*sides, *target_layout.sides))


def _refuse_other_strength(control: RequestedControl, facts: Mapping[str, Any], name: str) -> None:
    """`UserError` where a map of the source is to act otherwise than when the source was inverted into `name`."""
    values = {
        "scale": control.scale,
        "start": control.start,
        "stop": control.stop,
        "rows": control.rows or None,
    }
    for option, value in values.items():
        if value is not None and value != facts.get(option, "both"):
            raise UserError(
                f"{name} was inverted under {control.map.kind} with --condition-{option} {facts.get(option, 'both')}, "
                f"which holds for the edit too, so {value} has no effect. Leave it out, or invert the source again."
            )
    other = control.network and find_control(control.network).hash_weights() != facts.get("weights")
    if other or (control.guess and not facts["guess"]):
        flag = f"--controlnet {control.network}" if other else "--guess-mode"
        raise UserError(
            f"{name} was inverted under {control.map.kind} by {facts['network']}, so {flag} has no effect. Leave it "
            "out, or invert the source again."
        )


START = tuple(Start.__dataclass_fields__)


def pick(options: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The options with these names."""
    return {name: options[name] for name in names if name in options}


def replace_settings(
    loaded: ModelWithConcepts, *, control: str = "prompt-to-prompt", film: bool = False, **options: Any
) -> ReplaceSettings:
    """The settings of `edit invert-and-replace`, in the model's words, over the defaults of its kind of control.

    None stands for options that were not given. Raises `UserError` for an unknown control.
    """
    if control not in PRESETS:
        raise UserError(f"There is no control {control}. Choose one of {', '.join(PRESETS)}.")
    changes = {name: value for name, value in options.items() if value is not None}
    for name in ("blend", "keep", "heatmaps"):
        if name in changes:
            changes[name] = tuple(loaded.resolve(word) for word in changes[name])
    if "weights" in changes:
        changes["weights"] = {loaded.resolve(word): weight for word, weight in changes["weights"].items()}
    if "windows" in changes:
        changes["windows"] = {
            loaded.resolve(word): (float(first), float(last))
            for word, (first, last) in changes["windows"].items()
        }
    if "swaps" in changes:
        changes["swaps"] = tuple((loaded.resolve(old), loaded.resolve(new)) for old, new in changes["swaps"])
    if "negative" in changes:
        changes["negative"] = loaded.resolve(changes["negative"])
    return replace(PRESETS[control], frames=FRAMES if film else 0, **changes).resolve(loaded.model)
