"""Convert adapters between tools: `customize export`, `customize import` and `customize info`."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backbone.adapters.concept import EDITS, PLACEHOLDER, Concept, check_token, name_call
from backbone.adapters.embeddings import EMBEDDINGS_FILE, save_embeddings
from backbone.adapters.lora import LORA_WEIGHTS, LYCORIS_WEIGHTS, has_text_encoder_weights, load_lora
from backbone.io.console import UserError, format_count, notify, quote, shorten
from backbone.io.files import PICKLE_SUFFIXES, atomic_write
from backbone.io.prompts import CONTROL
from backbone.models.locate import locate
from backbone.models.model import Backbone, Task
from customize.formats.adapter import (
    BASE_NAMES,
    FOR_COMFYUI,
    PIPELINES,
    AdapterFile,
    BaseFamily,
    FileFormat,
    in_genitive,
)
from customize.formats.bundles import BUNDLED, fit_bundle, holds_words_alone, read_bundle
from customize.formats.factors import LayerUpdate
from customize.formats.metadata import build_metadata, read_run_concept, say_other_best, write_import_record
from customize.formats.model_weights import (
    WEIGHT_SUFFIX,
    LayerWeights,
    ModelWeights,
    count_components,
    refuse_mismatch,
)
from customize.formats.origin import say_other_origin, without_skipped_layers
from customize.formats.read import find_adapter_file, read_adapter, read_any_adapter
from customize.formats.words import (
    WordFile,
    export_beside,
    export_words,
    find_word_file,
    import_words,
    read_words,
)
from customize.formats.write import check_folder, check_output, fill_output, write_adapter

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYERS_SHOWN = 8  # layers that `describe_adapter` lists
VALUE_WIDTH = 100  # characters of a metadata value that it shows


def export_adapter(
    source: Path,
    out: Path,
    file_format: FileFormat,
    *,
    base: BaseFamily | None = None,
    model: str | None = None,
    precision: str | None = None,
) -> str:
    """Write the adapter of a run folder or file in a tool's format and verify it; returns a sentence to print.

    Learned words are written too (`customize.formats.words`). Raises `UserError` for what the format cannot represent.
    """
    check_output(out)
    say_other_best(source)
    dtype = DTYPES[precision] if precision else None
    if (words := read_words(source)) is not None:
        if base or model:
            raise UserError(f"--{'base' if base else 'model'} has no effect on learned words. Leave it out.")
        return export_words(source, *words, out, file_format, dtype=dtype)
    adapter, concept = read_adapter(source), read_run_concept(source)
    if concept is not None and concept.changed:
        raise UserError(
            f"{source} also changes the base's own weights ({concept.changed}), which no adapter's file holds. Write a "
            "whole model: customize merge --bake."
        )
    model_name = model or (concept.model if concept else None)
    family = base or (_find_family(model_name) if model_name else None) or adapter.base
    _refuse_other_base(adapter, base, source)
    _say_what_tools_misread(adapter, file_format, family)
    adapter = _shape_projections(adapter, family)
    needs_base = file_format == "comfyui" and "dora" in adapter.algorithms
    weights = _open_base_weights(adapter, model_name, source) if needs_base else None
    with atomic_write(out) as unfinished:  # the file appears together with its embeddings
        worst = write_adapter(
            unfinished,
            adapter,
            file_format,
            metadata=build_metadata(adapter, source=source, title=out.stem, base=family),
            base=family,
            weights=weights,
            dtype=dtype,
        )
        if concept is not None and concept.words:
            for path in export_beside(concept, out, file_format):
                notify(f"{out} does not hold its learned words: load {path} beside it, as an embedding.")
    return (
        f"{out} in {in_genitive(file_format)} format: {format_count(len(adapter.layers), 'layer')}. Read back, every "
        f"layer changes the model {'exactly ' if not worst else ''}as before"
        f"{f' (largest relative difference {worst:.0e})' if worst else ''}."
    )


def _refuse_other_base(adapter: AdapterFile, base: BaseFamily | None, source: Path) -> None:
    """`UserError` for a --base whose denoiser is a transformer where a UNet is adapted, or the reverse."""
    if base is None or base == "other":
        return
    reads_unet = base in ("sd1", "sd2", "sdxl", "svd")
    start, network = ("transformer.", "transformer") if reads_unet else ("unet.", "UNet")
    if any(name.startswith(start) for name in adapter.layers):
        raise UserError(
            f"{source} adapts a {network}, and {BASE_NAMES[base]} has none. Say another --base, or leave it out."
        )


def _open_base_weights(adapter: AdapterFile, model: str | None, source: Path) -> LayerWeights:
    """The base's weights of the adapter's layers; `UserError` for a base that is not named, or has other layers."""
    if model is None:
        raise UserError(
            "DoRA in ComfyUI's format depends on the base's weights. Name it with --model, or export --to kohya."
        )
    weights = ModelWeights(locate(model))
    layers = {name: layer.shape for name, layer in adapter.layers.items()}
    refuse_mismatch(layers, weights.shapes, str(source), model)
    return LayerWeights(weights)


# Families for which diffusers reads kohya's form with code of their own
NEWER = ("zimage", "flux2", "qwen", "krea2", "qwen21")


def _say_what_tools_misread(adapter: AdapterFile, file_format: FileFormat, family: BaseFamily) -> None:
    """Print which tools do not load this adapter in this format, or load it incorrectly."""
    if file_format != "diffusers" and family == "other":
        notify(
            "The layers are not those of a Stable Diffusion that these tools know (moji's are not): the file is right "
            "in format, "
            "but they have no model to load it on."
        )
    if file_format == "kohya" and "dora" in adapter.algorithms:
        notify(
            "LyCORIS reads these DoRA scales. ComfyUI takes them for something else: export --to comfyui for it."
        )
    if file_format == "comfyui" and any(
        name == "transformer.proj_out" and layer.alpha != layer.rank for name, layer in adapter.layers.items()
    ):
        notify(
            "Its α of the last layer, proj_out, is misread by diffusers 0.42 in ComfyUI's format: export --to "
            "diffusers for it."
        )
    if file_format == "comfyui" and family in NEWER:
        notify(
            f"diffusers 0.42 misreads ComfyUI's format of {BASE_NAMES[family]}: export --to diffusers for it."
        )
    if file_format == "kohya" and any(name.startswith("transformer.") for name in adapter.layers):
        _say_what_diffusers_leaves_out(adapter, family)
    if (
        file_format == "kohya"
        and family not in NEWER
        and len({layer.alpha for layer in adapter.layers.values()}) > 1
    ):
        notify(
            "Its layers differ in α, which diffusers 0.42 misreads in kohya's format: export --to diffusers for it."
        )


def _say_what_diffusers_leaves_out(adapter: AdapterFile, family: BaseFamily) -> None:
    """Print which of a transformer's layers diffusers does not load from kohya's format."""
    outside = [
        name
        for name in adapter.layers
        if name.startswith("transformer.") and "transformer_blocks." not in name
    ]
    if family in ("sd3", "krea2"):
        notify(
            f"diffusers 0.42 does not know kohya's names of {BASE_NAMES[family]}: export --to diffusers for it."
        )
    elif outside and family not in ("zimage", "qwen", "qwen21"):
        notify(
            f"diffusers 0.42 leaves out {len(outside)} of its layers in kohya's format, those outside the blocks, "
            f"as {outside[0]}: export --to diffusers for it."
        )


def _shape_projections(adapter: AdapterFile, family: BaseFamily) -> AdapterFile:
    """A UNet's `proj_in` and `proj_out` in the family's form: 1 × 1 convolutions in SD 1.x, linear in SD 2 and XL."""
    if family not in ("sd1", "sd2", "sdxl"):
        return adapter
    ends = (1, 1) if family == "sd1" else ()
    layers = {
        name: layer.reshape((*layer.shape, *ends))
        if re.search(r"attentions\.\d+\.proj_(in|out)$", name)
        else layer
        for name, layer in adapter.layers.items()
    }
    return replace(adapter, layers=layers)


def _find_family(model: str) -> BaseFamily | None:
    """The family of a model by its pipeline's class; None if the model is not at hand or of another."""
    try:
        pipeline = str(locate(model).index.get("_class_name", ""))
    except UserError:
        return None
    return PIPELINES.get(pipeline)


def import_adapter(
    file: Path,
    out: Path,
    *,
    model: str | None,
    token: str | None = None,
    token_words: str | None = None,
    class_noun: str = "",
) -> str:
    """Write another tool's adapter or learned word to a run folder, or to a .safetensors file; a sentence to print.

    A run folder needs the base model, which must have the adapter's layers, and an adapter's trigger words. The token
    is the run's own, or what a file of a learned word calls it, else [V], where none is named.
    Raises `UserError`, before anything is written, if these are unknown or do not fit, and for options that a file
    has no use for.
    """
    if token is not None and not token.strip():
        raise UserError("The token is empty. Give a word, as in --token sks, or leave it out for [V].")
    token = token and token.strip()

    # A file of a learned word alone (textual inversion)
    if (word_file := find_word_file(file)) is not None:
        if token_words:
            raise UserError(f"{file} holds a learned word, so --token-words has no effect. Leave it out.")
        return import_words(word_file, out, model=model, token=token, class_noun=class_noun)

    # An adapter with learned words in it (pivotal tuning), or such a file without an adapter
    bundled = read_bundle(find_adapter_file(file))
    if bundled and token and not token_words:
        bundled = _rename_word(bundled, token, file)
    if bundled and holds_words_alone(find_adapter_file(file)):
        if len(bundled) > 1 or token_words:
            reason = "so --token-words has no effect" if token_words else "and a run is made of one"
            raise UserError(
                f"{file} holds learned words alone ({', '.join(bundled)}), {reason}. Leave it out."
            )
        (word,) = bundled.values()
        return import_words(
            file, out, model=model, token=token or word.token, class_noun=class_noun, words=word
        )

    # An adapter: to a run folder, or from file to file
    to_run = out.suffix.lower() not in (".safetensors", *PICKLE_SUFFIXES)
    adapter = (read_any_adapter if to_run else read_adapter)(file, ignore=BUNDLED)
    if to_run:
        names = _ImportNames(token, token_words, class_noun)
        return _import_run(file, adapter, bundled, out, model=model, names=names)
    if bundled:
        raise UserError(f"{file} holds learned words too ({', '.join(bundled)}). Name a folder with --out.")
    check_output(out)
    options = {"model": model, "token": token, "token-words": token_words, "class": class_noun}
    if idle := [f"--{flag}" for flag, value in options.items() if value]:
        raise UserError(f"{out} is a file, on which {idle[0]} has no effect. Leave it out, or name a folder.")
    metadata = build_metadata(adapter, source=file, title=out.stem)
    worst = write_adapter(out, adapter, "peft", metadata=metadata)
    return f"{out}: {format_count(len(adapter.layers), 'layer')} (largest relative difference {worst:.0e})."


class _ImportNames(NamedTuple):
    """The user's names for an import: the token in prompts, the words that it was trained with, the class."""

    token: str | None
    words: str | None
    class_noun: str


def _import_run(
    file: Path,
    adapter: AdapterFile,
    bundled: Mapping[str, WordFile],
    out: Path,
    *,
    model: str | None,
    names: _ImportNames,
) -> str:
    """Write an adapter, with the words that its file bundles, to a run folder; returns a sentence to print."""
    if adapter.base == "svd":
        raise UserError(
            f"{file} adapts {BASE_NAMES['svd']}, which reads no words, so no run is made of it. Draw clips with it as "
            f"it is: customize clip --image PICTURE --model svd --lora {quote(file)}"
        )

    # The model, and which words of a prompt call the concept
    check_folder(out, [file])
    metadata = build_metadata(adapter, source=file, title=out.stem)
    model_name = model or metadata.get("base_model")
    if not model_name:
        raise UserError(f"{file} does not say which model it is for. Name it with --model.")
    words_of_tokens: dict[str, str] = {}
    if names.words or not bundled:
        words_of_tokens = _map_tokens(file, metadata, names)

    # The model must have the adapter's layers, in their shapes
    opened = _open_base(file, adapter, model_name)
    weights = ModelWeights(opened.location)
    layers = {name: layer.shape for name, layer in adapter.layers.items()}
    refuse_mismatch(layers, weights.shapes, str(file), model_name)
    say_other_origin(file, adapter, opened)
    adapter = without_skipped_layers(file, adapter, opened)
    if FOR_COMFYUI in adapter.metadata:
        adapter = restore_magnitudes(adapter, LayerWeights(weights))
    adapter = fit_to_model(adapter, weights.shapes, file)
    for name in words_of_tokens:
        check_token(name, opened.text_encoder.tokenizer.get_vocab())
        if name in bundled:
            raise UserError(f"{file} has a learned word {name} of its own. Say another --token.")
    vectors, learned = fit_bundle(bundled, opened, file)

    # The run folder: weights, learned words, record
    concept = Concept(
        kind=EDITS if _was_learned_from_edits(adapter) else "pivotal" if learned else "lora",
        model=model_name,
        fingerprint=opened.fingerprint,
        tokens=words_of_tokens | learned,
        class_noun=names.class_noun or metadata.get("limner_class", ""),
        words=EMBEDDINGS_FILE if vectors else "",
        folder=out,
    )
    with fill_output(out) as unfinished:
        if vectors:
            entries = {"format": "pt", "base_model": model_name}
            save_embeddings(unfinished / EMBEDDINGS_FILE, vectors, metadata=entries)
        weights_name = _write_loadable(unfinished, adapter, opened, metadata)
        write_import_record(unfinished, replace(concept, weights=weights_name), file)
    counted, token = format_count(len(adapter.layers), "layer"), next(iter(concept.tokens))
    return f"{out}: {counted}. Next: {name_call(token, concept.class_noun, out)}"


def _rename_word(words: Mapping[str, WordFile], token: str, file: Path) -> dict[str, WordFile]:
    """A file's only learned word, renamed to `token`; `UserError` if it has several."""
    if len(words) > 1:
        raise UserError(
            f"{file} has {len(words)} learned words of their own names ({', '.join(words)}), so --token has no effect "
            "without --token-words. Leave it out."
        )
    return {token: next(iter(words.values()))}


def _map_tokens(file: Path, metadata: Mapping[str, str], names: _ImportNames) -> dict[str, str]:
    """Token → words: the user's, else those of the run or its header, else [V].

    Raises `UserError` if no words are known, and for one token in place of several.
    """
    own_tokens = _read_own_tokens(file, metadata)
    if not names.words:
        _refuse_learned(file, metadata, own_tokens)
    if len(own_tokens) > 1 and not names.words:
        if names.token:
            raise UserError(
                f"{file} has {len(own_tokens)} tokens of their own names ({', '.join(own_tokens)}), so --token has no "
                "effect without --token-words. Leave it out."
            )
        return own_tokens
    token = names.token or next(iter(own_tokens), "[V]")
    return {token: _read_trigger_words(file, metadata, names.words)}


def _refuse_learned(file: Path, metadata: Mapping[str, str], own_tokens: Mapping[str, str]) -> None:
    """`UserError` for words that a run learned in addition to its adapter, but that are not in its file."""
    concept = read_run_concept(file)
    if concept is not None:
        learned = concept.learned_tokens if concept.words else []
    else:
        begun = [token for token, words in own_tokens.items() if words.split()[:1] == [token]]
        learned = metadata.get("limner_learned", "").split() or list(filter(PLACEHOLDER.fullmatch, begun))
    if learned:
        location = (
            f"of the run, whose {concept.words} an import leaves out. Draw with --concept {quote(file)} itself"
            if concept is not None
            else "that lie in a file of their own. Draw with --concept and the run that it was written of"
        )
        raise UserError(
            f"{file} was trained with learned words ({', '.join(learned)}) {location}, or name other words with "
            "--token-words."
        )


def _read_own_tokens(file: Path, metadata: Mapping[str, str]) -> dict[str, str]:
    """Token → words of a run, or of the header of its weights; {} without either."""
    if (concept := read_run_concept(file)) is not None:
        return concept.tokens
    tokens, words = (metadata.get(f"limner_{kind}", "").split() for kind in ("token", "words"))
    if any(map(CONTROL.search, tokens)):
        raise UserError(
            f"The header of {file} has a token that holds control characters. Give it with --token."
        )
    if len(tokens) == 1 and words:
        return {tokens[0]: " ".join(words)}
    return dict(zip(tokens, words, strict=True)) if len(tokens) == len(words) else {}


def _read_trigger_words(file: Path, metadata: Mapping[str, str], declared: str | None) -> str:
    """The `declared` words, else the metadata's trigger words; `UserError` if these are no text."""
    keys = ("limner_words", "modelspec.trigger_phrase")
    sources = [declared or "", *(metadata.get(key, "") for key in keys)]
    words = next((candidate for candidate in (" ".join(text.split()) for text in sources) if candidate), "")
    if CONTROL.search(words):
        raise UserError(
            f"The trigger words {words[:60]!r} hold control characters. Give them anew with --token-words."
        )
    if not words:
        folders = _folders_of_images(metadata)
        named = f" (its images lay in {folders}, where the words may stand)" if folders else ""
        raise UserError(
            f"{file} does not say its trigger words{named}. Give them with --token-words, as --token-words sks; of "
            "one that has none (LCM-LoRA, a slider) any word will do, and prompts need none."
        )
    return words


def _folders_of_images(metadata: Mapping[str, str]) -> str:
    """The names of the folders that a LoRA learned from, as kohya's scripts and ai-toolkit record them; "" of others.

    Such a name is `10_sks dog`.
    """
    found: dict[str, None] = {}
    for key in ("ss_dataset_dirs", "ss_tag_frequency"):
        try:
            entries = json.loads(metadata.get(key, ""))
        except (ValueError, RecursionError):
            continue
        if isinstance(entries, dict):
            found |= dict.fromkeys(name for name in entries if not CONTROL.search(name))
    return ", ".join(f"“{shorten(name, 40)}”" for name in list(found)[:3])


def _open_base(file: Path, adapter: AdapterFile, model: str) -> Backbone:
    """The base model, without loading weights; `UserError` for one that does not perform the learned task."""
    edits = _was_learned_from_edits(adapter)
    task: Task = "edit" if edits else "text-to-image"
    try:
        return Backbone.open(model, device="cpu", precision="fp32", task=task)
    except UserError as error:
        raise UserError(f"{file} was learned from edits. {error}" if edits else str(error)) from error


def _was_learned_from_edits(adapter: AdapterFile) -> bool:
    return adapter.metadata.get("limner_kind") == EDITS


def _write_loadable(out: Path, adapter: AdapterFile, opened: Backbone, metadata: Mapping[str, str]) -> str:
    """Write the adapter into a folder and load it into the model once; returns the file's name."""
    name = LORA_WEIGHTS if set(adapter.algorithms) <= {"lora", "dora"} else LYCORIS_WEIGHTS
    write_adapter(out / name, adapter, "peft", metadata=metadata)
    slots = {slot.name: slot.model for slot in opened.text_encoder.slots}
    load_lora(
        out / name, opened.denoiser, "import",
        text_encoders=slots if has_text_encoder_weights(out / name) else {},
    )  # fmt: skip
    return name


def restore_magnitudes(adapter: AdapterFile, weights: Mapping[str, Tensor]) -> AdapterFile:
    """A DoRA in ComfyUI's format with its original magnitudes, computed from its base's weights by layer."""
    layers = {
        name: replace(layer, magnitude=layer.magnitude.float() * layer.measure_growth(weights[name]))
        if layer.magnitude is not None and layer.magnitude.ndim == 1
        else layer
        for name, layer in adapter.layers.items()
    }
    metadata = {key: value for key, value in adapter.metadata.items() if key != FOR_COMFYUI}
    return replace(adapter, layers=layers, metadata=metadata)


def fit_to_model(adapter: AdapterFile, shapes: Mapping[str, tuple[int, ...]], file: Path) -> AdapterFile:
    """The adapter in a form that a run holds on a model of these tensors: factors shaped as its layers, one algorithm.

    A matrix becomes a 1 × 1 kernel and the reverse; where peft has no form (a DoRA of a LoHa, several algorithms in one
    network) a layer becomes the LoRA with the same ΔW. Raises `UserError` for DoRA over inputs, which no run holds.
    """
    over_inputs = [
        name
        for name, layer in adapter.layers.items()
        if layer.magnitude is not None and layer.magnitude.ndim == 2
    ]
    if over_inputs:
        raise UserError(
            f"The DoRA scales in {file} run over the inputs of {len(over_inputs)} layers, as {over_inputs[0]}, "
            "which is right for OneTrainer and LyCORIS, but no run folder holds. Put it into a whole model with "
            f"`customize merge {quote(file)} --bake`."
        )
    mixed = len({layer.algorithm for layer in adapter.layers.values()}) > 1
    fitted: dict[str, LayerUpdate] = {}
    converted = 0
    for name, layer in adapter.layers.items():
        shape = shapes[name + WEIGHT_SUFFIX]
        if layer.algorithm != "lora" and (layer.magnitude is not None or mixed):
            layer, converted = layer.to_lora(shape[2:]), converted + 1
        fitted[name] = layer.reshape(shape)
    if converted:
        notify(
            f"{converted} of {len(fitted)} layers are held as the LoRA with the same change: peft has no form for them."
        )
    return replace(adapter, layers=fitted)


def inspect_adapter(source: Path) -> dict[str, Any]:
    """Format, algorithms, base, ranks, α, layers, dtypes, ‖ΔW‖ and metadata of an adapter."""
    path = find_adapter_file(source)
    adapter = read_any_adapter(path)
    energies = {name: layer.squared_norm() for name, layer in adapter.layers.items()}
    counts = count_components(adapter.layers)
    by_component = {
        component: sum(value for name, value in energies.items() if name.startswith(component + "."))
        for component in counts
    }
    largest = sorted(energies, key=lambda name: -energies[name])[:LAYERS_SHOWN]
    recorded = adapter.metadata.get("base_model") if adapter.base == "other" else None
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "format": adapter.file_format,
        "algorithms": list(adapter.algorithms),
        "base": recorded or adapter.base_name,
        "ranks": _count_values(layer.rank for layer in adapter.layers.values()),
        "alphas": _count_values(layer.alpha for layer in adapter.layers.values()),
        "layers": dict(counts),
        "precisions": _list_dtypes(adapter),
        "norms": {component: energy**0.5 for component, energy in by_component.items()},
        "largest_norms": {name: energies[name] ** 0.5 for name in largest},
        "metadata": {
            key: value
            for key, value in sorted(adapter.metadata.items())
            if key not in ("format", "lora_adapter_metadata")
        },
    }


def describe_adapter(facts: Mapping[str, Any]) -> str:
    """The facts of `inspect_adapter` as lines of text."""
    lines = [
        f"file       {facts['file']} ({facts['bytes'] / 1e6:.1f} MB)",
        f"format     {facts['format']}",
        f"algorithm  {', '.join(facts['algorithms'])}",
        f"base       {facts['base']}",
        f"rank       {_format_counts(facts['ranks'])}",
        f"alpha      {_format_counts(facts['alphas'])}",
        f"layers     {', '.join(f'{name} {count}' for name, count in facts['layers'].items())}",
        f"precision  {', '.join(facts['precisions'])}",
    ]
    lines += [f"‖ΔW‖       {component} {norm:.4g}" for component, norm in facts["norms"].items()]
    lines += [
        "largest ‖ΔW‖",
        *(f"  {norm:.4g}  {name}" for name, norm in facts["largest_norms"].items()),
    ]
    if facts["metadata"]:
        lines += ["metadata", *(f"  {key}: {_shorten(value)}" for key, value in facts["metadata"].items())]
    return "\n".join(lines)


def _count_values(values: Iterable[float]) -> list[dict[str, float]]:
    """Each value with the number of layers that have it, the commonest first."""
    return [{"value": value, "layers": count} for value, count in Counter(values).most_common()]


def _format_counts(values: Sequence[Mapping[str, float]]) -> str:
    if len(values) == 1:
        return f"{values[0]['value']:g}"
    commonest = ", ".join(f"{value['value']:g} ({value['layers']} layers)" for value in values[:4])
    return commonest + (" …" if len(values) > 4 else "")


def _list_dtypes(adapter: AdapterFile) -> list[str]:
    dtypes = {
        str(value.dtype).removeprefix("torch.")
        for layer in adapter.layers.values()
        for value in layer.factors.values()
    }
    return sorted(dtypes)


def _shorten(value: str) -> str:
    value = " ".join(value.split())
    return value if len(value) <= VALUE_WIDTH else f"{value[:VALUE_WIDTH]} … ({len(value)} characters)"
