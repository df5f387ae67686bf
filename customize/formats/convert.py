"""An adapter from one tool to another: `customize export`, `customize import` and `customize info`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbone.adapters.concept import Concept, check_token
from backbone.adapters.embeddings import split_by_encoder
from backbone.adapters.lora import LORA_WEIGHTS, LYCORIS_WEIGHTS
from backbone.io.console import UserError, notify
from backbone.io.files import make_empty_folder, read_tensors, write_tensors, write_text
from backbone.models.locate import locate
from backbone.models.model import Backbone
from customize.formats.adapter import BASES, Adapter, Base, Form
from customize.formats.header import concept_of, header_for
from customize.formats.model_weights import LayerWeights, Weights, components, refuse_misfit
from customize.formats.read import adapter_file, read_adapter
from customize.formats.write import write_adapter

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ENCODERS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
SHOWN = 8  # layers that `describe` lists
LONGEST = 100  # characters of a header entry that it shows


def export_adapter(
    source: Path,
    out: Path,
    form: Form,
    *,
    base: Base | None = None,
    model: str | None = None,
    precision: str | None = None,
) -> str:
    """Writes the adapter of a run folder or file in a tool's form, verified; gives the sentence that says so.

    Raises `UserError` for what the form cannot hold.
    """
    checked_target(out)
    adapter, concept = read_adapter(source), concept_of(source)
    family = base or adapter.base
    if form != "diffusers" and family == "other":
        notify(
            "The layers are of no Stable Diffusion that these tools know (moji's are such): the file is right in form, "
            "but they have no model to load it on."
        )
    weights: Mapping[str, Tensor] | None = None
    if form == "comfyui" and "dora" in adapter.kinds:
        place = model or (concept.model if concept else None)
        if place is None:
            raise UserError(
                "DoRA in ComfyUI's form depends on the base's weights. Name it with --model, or export --to kohya."
            )
        own = Weights(locate(place))
        refuse_misfit({name: layer.shape for name, layer in adapter.layers.items()}, own, str(source))
        weights = LayerWeights(own)
    if form == "kohya" and "dora" in adapter.kinds:
        notify(
            "LyCORIS reads these DoRA scales. ComfyUI takes them for something else: export --to comfyui for it."
        )
    if form == "kohya" and len({layer.alpha for layer in adapter.layers.values()}) > 1:
        notify(
            "Its layers differ in α, which diffusers 0.42 misreads in kohya's form: export --to diffusers for it."
        )
    worst = write_adapter(
        out,
        adapter,
        form,
        header=header_for(adapter, source=source, title=out.stem, base=family),
        base=family,
        weights=weights,
        dtype=DTYPES[precision] if precision else None,
    )
    if concept is not None and concept.words:
        for path in export_words(concept, out, form):
            notify(f"Its words are not in {out}: load {path} beside it as an embedding.")
    return (
        f"{out} in {form}'s form: {len(adapter.layers)} layers, read back and compared "
        f"(largest relative difference of a layer's change {worst:.0e})."
    )


def export_words(concept: Concept, out: Path, form: Form) -> list[Path]:
    """The files of a concept's learned words for a tool; those of several text encoders are written beside `out`.

    kohya's tools and ComfyUI call the encoders `clip_l` and `clip_g` there; a token has a file of its own.
    """
    stored = concept.folder / concept.words
    tensors, _ = read_tensors(stored)
    found = []
    for token in concept.tokens:
        sides = split_by_encoder(tensors, token)
        if form == "diffusers" or not set(sides) <= set(ENCODERS) or len(sides) == 1:
            return [stored]
        path = out.with_name(f"{out.stem}-{re.sub(r'[^A-Za-z0-9]', '', token) or 'word'}.safetensors")
        write_tensors(path, {ENCODERS[side]: rows for side, rows in sides.items()}, {"token": token})
        found.append(path)
    return found


def import_adapter(
    file: Path,
    out: Path,
    *,
    model: str | None,
    token: str = "[V]",
    token_words: str | None = None,
    class_noun: str = "",
) -> str:
    """Writes another tool's adapter as ours, into a run folder or a file; gives the sentence that says so.

    A run folder needs the model, whose layers must be those of the adapter, and the words that it was trained with.
    Raises `UserError` where these are not known or do not fit, before anything is written.
    """
    adapter = read_adapter(file)
    header = header_for(adapter, source=file, title=out.stem)
    if out.suffix == ".safetensors":
        worst = write_adapter(out, adapter, "own", header=header)
        return f"{out}: {len(adapter.layers)} layers (largest relative difference {worst:.0e})."
    place = model or adapter.header.get("base_model")
    if place is None:
        raise UserError(f"{file} does not say which model it is for. Name it with --model.")
    words = (
        token_words or adapter.header.get("limner_words") or adapter.header.get("modelspec.trigger_phrase")
    )
    if not words:
        raise UserError(
            f"{file} does not say its trigger words. Give them with --token-words, as --token-words sks."
        )
    opened = Backbone.open(place, device="cpu", precision="fp32")
    refuse_misfit(
        {name: layer.shape for name, layer in adapter.layers.items()}, Weights(opened.location), str(file)
    )
    check_token(token, opened.text_encoder.tokenizer.get_vocab())
    make_empty_folder(out)
    name = LORA_WEIGHTS if set(adapter.kinds) <= {"lora", "dora"} else LYCORIS_WEIGHTS
    write_adapter(out / name, adapter, "own", header=header)
    write_text(
        out / "README.md",
        f"# {out.name}\n\nImported from `{file.name}` for `{place}`.\n\n"
        f"Write `{token}` in a prompt; the model reads “{words}”.\n",
    )
    Concept(
        kind="lora",
        model=place,
        fingerprint=opened.fingerprint,
        tokens={token: words},
        class_noun=class_noun or adapter.header.get("limner_class", ""),
        weights=name,
        folder=out,
    ).write(out)
    return f'{out}: {len(adapter.layers)} layers. Next: customize sample "a {token} …" --concept {out}'


def facts_of(source: Path) -> dict[str, Any]:
    """What an adapter is: its form, kinds, base, ranks, layers, the norms of its changes, and its header."""
    path = adapter_file(source)
    adapter = read_adapter(path)
    squares = {name: layer.squared_norm() for name, layer in adapter.layers.items()}
    counts = components(adapter.layers)
    inside = {
        component: sum(value for name, value in squares.items() if name.startswith(component + "."))
        for component in counts
    }
    largest = sorted(squares, key=lambda name: -squares[name])[:SHOWN]
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "form": adapter.form,
        "kinds": list(adapter.kinds),
        "base": BASES[adapter.base],
        "ranks": _counted(layer.rank for layer in adapter.layers.values()),
        "alphas": _counted(layer.alpha for layer in adapter.layers.values()),
        "layers": dict(counts),
        "precisions": _precisions(adapter),
        "norms": {component: value**0.5 for component, value in inside.items()},
        "largest_changes": {name: squares[name] ** 0.5 for name in largest},
        "header": {
            key: value
            for key, value in sorted(adapter.header.items())
            if key not in ("format", "lora_adapter_metadata")
        },
    }


def describe(facts: Mapping[str, Any]) -> str:
    """What `facts_of` found, in lines for a person."""
    lines = [
        f"file       {facts['file']} ({facts['bytes'] / 1e6:.1f} MB)",
        f"form       {facts['form']}",
        f"kind       {', '.join(facts['kinds'])}",
        f"base       {facts['base']}",
        f"rank       {_common(facts['ranks'])}",
        f"alpha      {_common(facts['alphas'])}",
        f"layers     {', '.join(f'{name} {count}' for name, count in facts['layers'].items())}",
        f"precision  {', '.join(facts['precisions'])}",
    ]
    lines += [f"‖ΔW‖       {component} {norm:.4g}" for component, norm in facts["norms"].items()]
    lines += [
        "largest changes",
        *(f"  {norm:.4g}  {name}" for name, norm in facts["largest_changes"].items()),
    ]
    if facts["header"]:
        lines += ["header", *(f"  {key}: {_short(value)}" for key, value in facts["header"].items())]
    return "\n".join(lines)


def checked_target(out: Path) -> None:
    """`UserError` for a place that no adapter's file can be written to, before any work is done."""
    if out.suffix != ".safetensors":
        raise UserError(f"{out} must end in .safetensors. Name the file to write so.")
    if out.is_dir():
        raise UserError(f"{out} is a folder. Name a file in it.")


def _counted(values: Iterable[float]) -> list[dict[str, float]]:
    """Each value with the number of layers that have it, the commonest first."""
    return [{"value": value, "layers": count} for value, count in Counter(values).most_common()]


def _common(values: Sequence[Mapping[str, float]]) -> str:
    if len(values) == 1:
        return f"{values[0]['value']:g}"
    shown = ", ".join(f"{one['value']:g} ({one['layers']} layers)" for one in values[:4])
    return shown + (" …" if len(values) > 4 else "")


def _precisions(adapter: Adapter) -> list[str]:
    found = {
        str(value.dtype).removeprefix("torch.")
        for layer in adapter.layers.values()
        for value in layer.factors.values()
    }
    return sorted(found)


def _short(value: str) -> str:
    value = " ".join(value.split())
    return value if len(value) <= LONGEST else f"{value[:LONGEST]} … ({len(value)} characters)"
