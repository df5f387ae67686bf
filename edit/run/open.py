"""How an edit begins: the model with its concepts, the picture's inversion, and settings in the model's words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from backbone.adapters.concept import Concept, read_concept, resolve_placeholder_tokens, summarize_concepts
from backbone.distributed.device import PRECISIONS
from backbone.io.console import UserError, notify
from backbone.io.files import read_metadata
from backbone.models.model import Backbone
from edit import checks
from edit.inversion.inversion import Inversion, identity, invert, read_inversion
from edit.methods.prompt_to_prompt.settings import PRESETS, Settings, over, usual

FRAMES = 12


@dataclass(frozen=True)
class Opened:
    """A model with the concepts that it wears, `scale` times as strong, and how it was opened."""

    model: Backbone
    concepts: tuple[Concept, ...]
    scale: float = 1.0

    def said(self, prompt: str) -> str:
        """A person's prompt in the model's words."""
        return resolve_placeholder_tokens(prompt, self.concepts)

    def facts(self) -> dict[str, Any]:
        """For the record."""
        return {
            "model": self.model.location.name,
            "fingerprint": self.model.fingerprint,
            "concepts": summarize_concepts(self.concepts),
            "scale": self.scale,
            "device": str(self.model.device),
            "precision": next(name for name, dtype in PRECISIONS.items() if dtype is self.model.dtype),
            "identity": identity(self.model, self.concepts, scale=self.scale),
        }


def open_model(
    *,
    model: str | None = None,
    concepts: Sequence[str] = (),
    scale: float = 1.0,
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
    if learned:
        from backbone.adapters.apply import load_concepts  # and peft with it, which takes a while

        load_concepts(opened, learned, scale=scale)
    return Opened(opened, learned, scale)


def inverted(
    opened: Opened,
    image: str | None,
    source: str | None,
    inversion: str | None = None,
    *,
    method: str = "direct",
    steps: int = 50,
    guidance: float | None = None,
    seed: int = 0,
    iterations: int = 0,
) -> Inversion:
    """The inversion of a file, or of a picture with its prompt."""
    if inversion is not None:
        found = read_inversion(inversion, opened.model, concepts=opened.concepts, scale=opened.scale)
        if source is not None and opened.said(source) != found.prompt:
            raise UserError(f"{inversion} is of “{found.prompt}”, not of “{source}”. Leave --source out.")
        return found
    if image is None:
        raise UserError("There is nothing to edit. Give a picture, or an inversion with --inversion FILE.")
    prompt = checks.prompt(source or "", "source prompt")
    notify(f"Inverting {image} ({method}, {steps} steps) …")
    return invert(
        opened.model, image, opened.said(prompt), method=cast(Any, method), steps=steps, guidance=guidance, seed=seed,
        iterations=iterations, concepts=opened.concepts, scale=opened.scale,
    )  # fmt: skip


def settings_of(
    opened: Opened, *, control: str = "prompt-to-prompt", film: bool = False, **asked: Any
) -> Settings:
    """What `edit invert-and-replace` was asked for, in the model's words, over the settings of its kind of control.

    None stands for what was not asked. Raises `UserError` for a control that is not.
    """
    if control not in PRESETS:
        raise UserError(f"There is no control {control}. Choose one of {', '.join(PRESETS)}.")
    wishes = over(usual(opened.model), PRESETS[control])
    wishes = over(wishes, {name: value for name, value in asked.items() if value is not None})
    for name in ("blend", "keep", "heatmaps"):
        if name in wishes:
            wishes[name] = tuple(opened.said(word) for word in wishes[name])
    for name in ("weights", "windows"):
        if name in wishes:
            wishes[name] = {opened.said(word): value for word, value in wishes[name].items()}
    if "windows" in wishes:
        wishes["windows"] = {
            word: (float(first), float(last)) for word, (first, last) in wishes["windows"].items()
        }
    if "swaps" in wishes:
        wishes["swaps"] = tuple((opened.said(old), opened.said(new)) for old, new in wishes["swaps"])
    if "negative" in wishes:
        wishes["negative"] = opened.said(wishes["negative"])
    return Settings(**wishes, frames=FRAMES if film else 0)
