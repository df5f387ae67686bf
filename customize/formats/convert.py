"""An adapter from one tool to another: `customize export`, `customize import` and `customize info`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from backbone.adapters.concept import Concept, check_token
from backbone.adapters.embeddings import words_by_side
from backbone.adapters.lora import OTHER_WEIGHTS, WEIGHTS
from backbone.io.console import UserError, say
from backbone.io.files import empty_folder, read_tensors, write_tensors, write_text
from backbone.models.locate import locate
from backbone.models.model import Backbone
from customize.formats.adapter import BASE_NAMES, AdapterFile, BaseFamily, FileFormat
from customize.formats.metadata import build_metadata, read_run_concept
from customize.formats.model_weights import LayerWeights, ModelWeights, count_components, refuse_mismatch
from customize.formats.read import find_adapter_file, read_adapter
from customize.formats.write import write_adapter

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KOHYA_ENCODERS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
LAYERS_SHOWN = 8  # layers that `describe` lists
VALUE_WIDTH = 100  # characters of a metadata entry that it shows


def export_adapter(
    source: Path,
    out: Path,
    file_format: FileFormat,
    *,
    base: BaseFamily | None = None,
    model: str | None = None,
    precision: str | None = None,
) -> str:
    """Writes the adapter of a run folder or file in a tool's format, verified; gives the sentence that says so.

    Raises `UserError` for what the format cannot hold.
    """
    check_output(out)
    adapter, concept = read_adapter(source), read_run_concept(source)
    family = base or adapter.base
    if file_format != "diffusers" and family == "other":
        say(
            "The layers are of no Stable Diffusion that these tools know (moji's are such): the file is right "
            "in format, "
            "but they have no model to load it on."
        )
    weights: Mapping[str, Tensor] | None = None
    if file_format == "comfyui" and "dora" in adapter.algorithms:
        place = model or (concept.model if concept else None)
        if place is None:
            raise UserError(
                "DoRA in ComfyUI's format depends on the base's weights. Name it with --model, or export --to kohya."
            )
        own = ModelWeights(locate(place))
        refuse_mismatch({name: layer.shape for name, layer in adapter.layers.items()}, own, str(source))
        weights = LayerWeights(own)
    if file_format == "kohya" and "dora" in adapter.algorithms:
        say(
            "LyCORIS reads these DoRA scales. ComfyUI takes them for something else: export --to comfyui for it."
        )
    if file_format == "kohya" and len({layer.alpha for layer in adapter.layers.values()}) > 1:
        say(
            "Its layers differ in α, which diffusers 0.42 misreads in kohya's format: export --to diffusers for it."
        )
    worst = write_adapter(
        out,
        adapter,
        file_format,
        metadata=build_metadata(adapter, source=source, title=out.stem, base=family),
        base=family,
        weights=weights,
        dtype=DTYPES[precision] if precision else None,
    )
    if concept is not None and concept.words:
        for path in export_embeddings(concept, out, file_format):
            say(f"Its words are not in {out}: load {path} beside it as an embedding.")
    return (
        f"{out} in {file_format}'s format: {len(adapter.layers)} layers, read back and compared "
        f"(largest relative difference of a layer's change {worst:.0e})."
    )


def export_embeddings(concept: Concept, out: Path, file_format: FileFormat) -> list[Path]:
    """The files of a concept's learned words for a tool; those of several text encoders are written beside `out`.

    kohya's tools and ComfyUI call the encoders `clip_l` and `clip_g` there; a token has a file of its own.
    """
    stored = concept.folder / concept.words
    tensors, _ = read_tensors(stored)
    found = []
    for token in concept.tokens:
        sides = words_by_side(tensors, token)
        if file_format == "diffusers" or not set(sides) <= set(KOHYA_ENCODERS) or len(sides) == 1:
            return [stored]
        path = out.with_name(f"{out.stem}-{re.sub(r'[^A-Za-z0-9]', '', token) or 'word'}.safetensors")
        write_tensors(path, {KOHYA_ENCODERS[side]: rows for side, rows in sides.items()}, {"token": token})
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
    metadata = build_metadata(adapter, source=file, title=out.stem)
    if out.suffix == ".safetensors":
        worst = write_adapter(out, adapter, "peft", metadata=metadata)
        return f"{out}: {len(adapter.layers)} layers (largest relative difference {worst:.0e})."
    place = model or adapter.metadata.get("base_model")
    if place is None:
        raise UserError(f"{file} does not say which model it is for. Name it with --model.")
    words = (
        token_words
        or adapter.metadata.get("limner_words")
        or adapter.metadata.get("modelspec.trigger_phrase")
    )
    if not words:
        raise UserError(
            f"{file} does not say its trigger words. Give them with --token_words, as --token_words sks."
        )
    opened = Backbone.open(place, device="cpu", precision="fp32")
    refuse_mismatch(
        {name: layer.shape for name, layer in adapter.layers.items()},
        ModelWeights(opened.location),
        str(file),
    )
    check_token(token, opened.text_encoder.tokenizer.get_vocab())
    empty_folder(out)
    name = WEIGHTS if set(adapter.algorithms) <= {"lora", "dora"} else OTHER_WEIGHTS
    write_adapter(out / name, adapter, "peft", metadata=metadata)
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
        class_noun=class_noun or adapter.metadata.get("limner_class", ""),
        weights=name,
        folder=out,
    ).write(out)
    return f'{out}: {len(adapter.layers)} layers. Next: customize sample "a {token} …" --concept {out}'


def describe_adapter(source: Path) -> str:
    """What an adapter is, in lines for a person."""
    path = find_adapter_file(source)
    adapter = read_adapter(path)
    layers = adapter.layers
    squares = {name: layer.squared_norm() for name, layer in layers.items()}
    counts = count_components(layers)
    lines = [
        f"file       {path} ({path.stat().st_size / 1e6:.1f} MB)",
        f"format       {adapter.file_format}",
        f"kind       {', '.join(adapter.algorithms)}",
        f"base       {BASE_NAMES[adapter.base]}",
        f"rank       {_format_counts(Counter(layer.rank for layer in layers.values()))}",
        f"alpha      {_format_counts(Counter(layer.alpha for layer in layers.values()))}",
        f"layers     {', '.join(f'{name} {count}' for name, count in counts.items())}",
        f"precision  {_list_dtypes(adapter)}",
    ]
    for component in counts:
        inside = sum(value for name, value in squares.items() if name.startswith(component + "."))
        lines.append(f"‖ΔW‖       {component} {inside**0.5:.4g}")
    largest = sorted(squares, key=lambda name: -squares[name])[:LAYERS_SHOWN]
    lines += ["largest changes", *(f"  {squares[name] ** 0.5:.4g}  {name}" for name in largest)]
    said = {
        key: value
        for key, value in sorted(adapter.metadata.items())
        if key not in ("format", "lora_adapter_metadata")
    }
    if said:
        lines += ["metadata", *(f"  {key}: {_shorten(value)}" for key, value in said.items())]
    return "\n".join(lines)


def check_output(out: Path) -> None:
    """`UserError` for a place that no adapter's file can be written to, before any work is done."""
    if out.suffix != ".safetensors":
        raise UserError(f"{out} must end in .safetensors. Name the file to write so.")
    if out.is_dir():
        raise UserError(f"{out} is a folder. Name a file in it.")


def _format_counts(values: Counter[int] | Counter[float]) -> str:
    if len(values) == 1:
        return f"{next(iter(values)):g}"
    common = ", ".join(f"{value:g} ({count} layers)" for value, count in values.most_common(4))
    return common + (" …" if len(values) > 4 else "")


def _list_dtypes(adapter: AdapterFile) -> str:
    found = {
        str(value.dtype).removeprefix("torch.")
        for layer in adapter.layers.values()
        for value in layer.factors.values()
    }
    return ", ".join(sorted(found))


def _shorten(value: str) -> str:
    value = " ".join(value.split())
    return value if len(value) <= VALUE_WIDTH else f"{value[:VALUE_WIDTH]} … ({len(value)} characters)"
