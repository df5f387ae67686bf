"""Merge adapters, resize them to another rank, and extract one from a fine-tuned model.

customize merge A:0.8 B:0.5 --out AB              Σ strength·ΔW, exactly: ranks add up
customize merge A:0.8 B:0.5 --rank 8 --out AB     its best approximation of rank 8 (Eckart–Young), with the error
customize merge A B --bake --model MODEL --out P  a diffusers folder with W + Σ strength·ΔW
customize resize A --rank 4                       one adapter at another rank
customize extract TUNED BASE --rank 16            W_tuned − W_base as a LoRA
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from backbone.adapters.apply import say_far_scale
from backbone.adapters.concept import Concept
from backbone.adapters.config import check_tensors
from backbone.io.console import UserError, format_count, notify, quote
from backbone.io.files import read_tensors
from backbone.io.progress import progress
from backbone.io.written import written_path
from backbone.models.fingerprint import make_fingerprints
from backbone.models.locate import locate
from customize.formats.adapter import AdapterFile, BaseFamily
from customize.formats.factors import LayerUpdate, Truncation, fit_lora, sum_loras, truncate_lora
from customize.formats.layers.known import is_known
from customize.formats.layers.names import is_text_encoder, split_component
from customize.formats.metadata import read_run_concept, say_other_best
from customize.formats.model_weights import WEIGHT_SUFFIX, ModelWeights
from customize.formats.origin import say_other_noise
from customize.formats.read import read_adapter

# `0.8`, `runs/dog=0.8`, `runs/dog@0.8`: a strength in other programs' ways
ODD_STRENGTH = re.compile(r"(?:(?P<path>[^=@]+)[=@])?(?P<number>[+-]?(?:\d+\.?\d*|\.\d+))")
UNCHANGED = 1e-7  # ‖ΔW‖/‖W‖ up to which a weight counts as equal in two checkpoints


@dataclass(frozen=True)
class MergeInput:
    """One adapter or run to merge, and its strength.

    weight_deltas   W' − W of a run that trained whole weights, by tensor name (`unet.conv_in.weight`)
    words           learned embedding vectors, by token or token/text encoder
    """

    source: Path
    strength: float
    adapter: AdapterFile
    concept: Concept | None = None
    weight_deltas: Mapping[str, Tensor] = field(default_factory=dict)
    words: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class RankReduction:
    """What truncation kept: `kept` of the `total` energy ‖ΔW‖², in `layers` layers of ranks `lowest` to `highest`."""

    kept: float
    total: float
    layers: int
    lowest: int
    highest: int
    outside: float = 0.0  # energy of biases, norms and embeddings, which an adapter cannot hold

    @property
    def energy_kept(self) -> float:
        """Share of the energy of all changes that is kept, 0…1."""
        total = self.total + self.outside
        return self.kept / total if total else 1.0

    @property
    def error(self) -> float:
        """Relative error ‖ΔW − approximation‖ / ‖ΔW‖."""
        return math.sqrt(max(0.0, 1 - self.energy_kept))

    def __str__(self) -> str:
        ranks = (
            f"rank {self.lowest}" if self.lowest == self.highest else f"ranks {self.lowest} to {self.highest}"
        )
        share = self.outside / (self.total + self.outside or 1)
        lost = f" {share:.2%} of it is in biases, norms and embeddings, which no LoRA holds."
        return (
            f"{format_count(self.layers, 'layer')} at {ranks} {'keeps' if self.layers == 1 else 'keep'} "
            f"{self.energy_kept:.2%} of the energy "
            f"(relative error {self.error:.2e}).{lost if share >= 0.0001 else ''}"
        )


def read_inputs(arguments: Sequence[str]) -> list[MergeInput]:
    """Read what `PATH` or `PATH:STRENGTH` name; `UserError` if they belong to different base models."""
    parts = [read_input(*parse_strength(argument)) for argument in arguments]
    if all(part.strength == 0 for part in parts):
        raise UserError(
            "All strengths are 0, so nothing would be merged. Give one above it, as runs/dog:0.8."
        )
    for part in parts:
        if part.strength == 0:
            notify(f"{part.source} has the strength 0, so it adds nothing.")
        say_far_scale(part.strength, f"the weights of {part.source}")
    for number, part in enumerate(parts[1:], start=1):
        refuse_other_base(parts[0], part)
        for earlier in parts[:number]:
            if earlier.source.resolve() == part.source.resolve():
                added = earlier.strength + part.strength
                note = "" if added else ", so it adds nothing"
                notify(f"{part.source} is given twice: its strengths add up to {added:g}{note}.")
            elif _hold_the_same(earlier, part):
                notify(f"{earlier.source} and {part.source} hold the same weights: their strengths add up.")
    return parts


def _hold_the_same(first: MergeInput, second: MergeInput) -> bool:
    """Whether two inputs make the same changes."""
    ours, theirs = _list_changes(first), _list_changes(second)
    return (
        bool(ours)
        and ours.keys() == theirs.keys()
        and all(torch.equal(ours[key], theirs[key]) for key in ours)
    )


def _list_changes(part: MergeInput) -> dict[str, Tensor]:
    """All tensors of an input, by name."""
    factors = {
        f"{name}/{key}": value
        for name, layer in part.adapter.layers.items()
        for key, value in _list_values(layer).items()
    }
    return {**factors, **part.weight_deltas, **part.words}


def _list_values(layer: LayerUpdate) -> dict[str, Tensor]:
    """All tensors of a layer's update, by name."""
    magnitude = {} if layer.magnitude is None else {"magnitude": layer.magnitude}
    return {**layer.factors, **magnitude, "scale": torch.tensor(layer.scale)}


def read_input(path: Path, strength: float = 1.0) -> MergeInput:
    """Read an adapter file, or a run folder with its adapter, changed weights and learned embeddings."""
    concept = read_run_concept(path)
    say_other_best(path)
    if concept is None or concept.weights or not (concept.words or concept.changed):
        adapter = read_adapter(path)
    else:
        adapter = AdapterFile({})
    if concept is None:
        return MergeInput(path, strength, adapter)
    weight_deltas = read_tensors(path / concept.changed)[0] if concept.changed else {}
    words = read_tensors(path / concept.words)[0] if concept.words else {}
    for file, tensors in ((concept.changed, weight_deltas), (concept.words, words)):
        if file:
            check_tensors(path / file, tensors)
    return MergeInput(
        path, strength, adapter, concept, {f"unet.{name}": v for name, v in weight_deltas.items()}, words
    )


def parse_strength(text: str) -> tuple[Path, float]:
    """`runs/dog:0.8` → (path, 0.8); the strength is 1 if none is given.

    Raises `UserError` for `:0.8` and `:inf`, and strengths as others write them: `runs/dog=0.8`, or a number alone.
    """
    path, colon, number = text.rpartition(":")
    if not colon or (os.path.lexists(text) and not os.path.lexists(path)):  # a name may have a colon in it
        if (odd := ODD_STRENGTH.fullmatch(text)) and not os.path.lexists(text):
            suggestion = f"{odd['path'] or 'runs/dog'}:{odd['number']}"
            raise UserError(f"“{text}” is no adapter. A strength stands behind a colon: {suggestion}.")
        return written_path(text), 1.0
    try:
        strength = float(number)
    except ValueError:
        if path and (suggestion := as_strength(number)) and not os.path.lexists(text):
            raise UserError(
                f"“{text}” has a strength that is no number. Write it with a point: {path}:{suggestion}."
            ) from None
        return written_path(text), 1.0
    if not path or not math.isfinite(strength):
        raise UserError(f"“{text}” is no adapter with a strength. Write it like runs/dog:0.8.")
    return written_path(path), strength


def as_strength(text: str) -> str:
    """A decimal comma, a percentage or a factor (0,8; 80%; 0.8x) as a strength is written; "" for anything else."""
    match = re.fullmatch(r"([+-]?\d*[.,]?\d+)\s*(%|x|×)?", text.strip())
    if match is None:
        return ""
    value = float(match[1].replace(",", "."))
    return f"{value / 100 if match[2] == '%' else value:g}"


def refuse_other_base(first: MergeInput, second: MergeInput) -> None:
    """Raise `UserError` unless two adapters fit one base model: fingerprint, family, and shapes of shared layers."""
    names = f"{first.source} and {second.source}"
    concepts = [concept for concept in (first.concept, second.concept) if concept is not None]
    if not _are_of_one_model(concepts):
        models = " and ".join(concept.model for concept in concepts)
        raise UserError(f"{names} were trained on different weights ({models}). Merge runs of one model.")
    bases = first.adapter.base, second.adapter.base
    if first.adapter.layers and second.adapter.layers and bases[0] != bases[1]:
        raise UserError(
            f"{names} are for {first.adapter.base_name} and {second.adapter.base_name}. Merge adapters of one model."
        )
    for name in sorted(set(first.adapter.layers) & set(second.adapter.layers)):
        shapes = first.adapter.layers[name].shape, second.adapter.layers[name].shape
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{names} are for different models: {name} is {shapes[0][0]} × {shapes[0][1]} in one "
                f"and {shapes[1][0]} × {shapes[1][1]} in the other. Merge adapters of one model."
            )


def _are_of_one_model(concepts: Sequence[Concept]) -> bool:
    """Whether concepts have one fingerprint, or several that all belong to the model of one of them."""
    fingerprints = {concept.fingerprint for concept in concepts}
    for name in {concept.model for concept in concepts} if len(fingerprints) > 1 else ():
        try:
            known = make_fingerprints(locate(name))
            if all(fingerprint in known for fingerprint in fingerprints):
                return True
        except UserError:
            continue  # it has moved
    return len(fingerprints) < 2


def merge_exact(parts: Sequence[MergeInput]) -> AdapterFile:
    """Σ strength·ΔW as one LoRA, exactly: the ranks of a layer add up.

    Raises `UserError` for LoHa and LoKr, whose sum has no exact factors, and for DoRA, which is not additive.
    """
    by_layer = _group_by_layer(parts)
    for part in parts:
        unsupported = sorted(set(part.adapter.algorithms) - {"lora", "dora"})
        if unsupported:
            raise UserError(
                f"{part.source} is a {unsupported[0]}, whose sum with others has no exact factors. Add --rank to merge "
                "it as a LoRA of that rank, or --bake."
            )
    return AdapterFile(
        unify_alpha({name: sum_loras(*zip(*rows, strict=True)) for name, rows in by_layer.items()})
    )


def merge_to_rank(parts: Sequence[MergeInput], rank: int) -> tuple[AdapterFile, RankReduction]:
    """Best approximation of Σ strength·ΔW by a LoRA of `rank`; inputs may be any but DoRA, and fine-tuned weights."""
    truncations: dict[str, Truncation] = {}
    by_layer = _group_by_layer(parts)
    weight_deltas = sum_weight_deltas(parts)

    # Differences of whole weights count as ΔW if a LoRA can hold them, else as lost energy
    full_updates = {
        name.removesuffix(WEIGHT_SUFFIX): value
        for name, value in weight_deltas.items()
        if is_adaptable(name, value)
    }
    outside = sum(
        float(value.square().sum()) for name, value in weight_deltas.items() if not is_adaptable(name, value)
    )
    base = parts[0].adapter.base
    names = sorted(set(by_layer) | set(full_updates))
    with progress(len(names), "merging") as bar:
        for name in names:
            rows = by_layer.get(name, [])
            # LoRAs are summed as factors, [up₁ up₂]·[down₁; down₂]; anything else as ΔW, whose SVD is cut off
            if name not in full_updates and all(layer.algorithm == "lora" for layer, _ in rows):
                truncations[name] = truncate_lora(sum_loras(*zip(*rows, strict=True)), rank=rank)
            else:
                change = _sum_changes(rows, full_updates.get(name), guess_kernel_size(name, base))
                truncations[name] = fit_lora(change, rank=rank)
            bar.advance()
    adapter, reduction = _collect_truncations(truncations)
    return adapter, replace(reduction, outside=outside)


def _list_shared(tuned: str, tuned_weights: ModelWeights, base: str, base_weights: ModelWeights) -> list[str]:
    """The names of the tensors that both models have; prints of which components only one has them all.

    Raises `UserError` for models of different architectures.
    """
    shared = sorted(set(tuned_weights.shapes) & set(base_weights.shapes))
    misfits = [name for name in shared if tuned_weights.shapes[name] != base_weights.shapes[name]]
    unmatched = {split_component(name)[0] for name in set(tuned_weights.shapes) ^ set(base_weights.shapes)}
    if misfits or not shared or "unet" in unmatched or "transformer" in unmatched:
        reason = f"{misfits[0]} has another shape" if misfits else "their layers have other names"
        raise UserError(
            f"{tuned} and {base} are built differently ({reason}). Give a model and the one it came from."
        )
    for component in sorted(unmatched):
        notify(f"Only one of {tuned} and {base} has all of {component}; what is not in both is left out.")
    return shared


def _sum_changes(
    rows: Sequence[tuple[LayerUpdate, float]], weight_delta: Tensor | None, default_kernel: tuple[int, ...]
) -> Tensor:
    """Σ strength·ΔW of one layer in full, [out, in] or [out, in, k, k], with the delta of fine-tuned weights."""
    changes = [strength * layer.delta_weight() for layer, strength in rows]
    kernels = [size for layer, _ in rows if (size := infer_kernel_size(layer)) is not None]
    kernel = kernels[0] if kernels else default_kernel
    if weight_delta is not None:
        changes.append(weight_delta.flatten(1))
        kernel = tuple(weight_delta.shape[2:])
    return _reshape_kernel(torch.stack(changes).sum(0), kernel)


def sum_weight_deltas(parts: Sequence[MergeInput]) -> dict[str, Tensor]:
    """Tensor name → Σ strength·ΔW of the weights that full fine-tuning runs changed, float32."""
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.weight_deltas.items():
            change = part.strength * value.float()
            total[name] = total[name] + change if name in total else change
    return total


def resize_adapter(
    adapter: AdapterFile, *, rank: int | None = None, energy: float | None = None
) -> tuple[AdapterFile, RankReduction]:
    """Best LoRA approximation of `rank`, or per layer of the smallest rank that keeps a share `energy` of ‖ΔW‖².

    A LoHa or LoKr becomes a LoRA; DoRA's magnitudes are kept.
    """
    truncations: dict[str, Truncation] = {}
    with progress(len(adapter.layers), "resizing") as bar:
        for name, layer in adapter.layers.items():
            if layer.algorithm == "lora":
                truncations[name] = truncate_lora(layer, rank=rank, energy=energy)
            else:
                shape = infer_kernel_size(layer)
                shape = guess_kernel_size(name, adapter.base) if shape is None else shape
                fit = fit_lora(_reshape_kernel(layer.delta_weight(), shape), rank=rank, energy=energy)
                truncations[name] = replace(fit, layer=replace(fit.layer, magnitude=layer.magnitude))
            bar.advance()
    result, reduction = _collect_truncations(truncations)
    return replace(result, metadata=adapter.metadata), reduction


def infer_kernel_size(layer: LayerUpdate) -> tuple[int, ...] | None:
    """(k, k) of a convolution or () of a linear layer, if the factors' shapes show it; else None."""
    candidates = {"lora": ("down",), "loha": ("hada_t1",), "lokr": ("lokr_w2", "lokr_t2")}[layer.algorithm]
    for name in candidates:
        if name in layer.factors and (layer.algorithm == "lora" or layer.factors[name].ndim == 4):
            return tuple(layer.factors[name].shape[2:])
    return None


def guess_kernel_size(name: str, base: BaseFamily) -> tuple[int, ...]:
    """Kernel size by the layer's name in diffusers' UNets: LoHa and LoKr may store a convolution's ΔW flat."""
    last = name.rsplit(".", 1)[-1]
    if last in ("conv", "conv1", "conv2", "conv_in", "conv_out"):
        return (3, 3)
    pointwise = last == "conv_shortcut" or (last in ("proj_in", "proj_out") and base in ("sd1", "other"))
    return (1, 1) if pointwise and name.startswith("unet.") else ()


def _reshape_kernel(matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[out, in·k·k] → [out, in, k, k]; unchanged for a linear layer, whose `shape` is ()."""
    return matrix.reshape(len(matrix), -1, *shape) if shape else matrix


def unify_alpha(layers: Mapping[str, LayerUpdate]) -> dict[str, LayerUpdate]:
    """Rescale factors so that all layers have one α: not every reader of kohya's format handles several."""
    alpha = max((layer.alpha for layer in layers.values()), default=1.0)
    return {name: layer.with_alpha(alpha) for name, layer in layers.items()}


def _group_by_layer(parts: Sequence[MergeInput]) -> dict[str, list[tuple[LayerUpdate, float]]]:
    """Layer name → (update, strength) of every part that has it; `UserError` for DoRA, which is not additive."""
    by_layer: dict[str, list[tuple[LayerUpdate, float]]] = {}
    for part in parts:
        if "dora" in part.adapter.algorithms:
            raise UserError(
                f"{part.source} is a DoRA, whose change is not a sum. Merge it with --bake, into a whole model."
            )
        for name, layer in part.adapter.layers.items():
            by_layer.setdefault(name, []).append((layer, part.strength))
    return by_layer


def _collect_truncations(truncations: Mapping[str, Truncation]) -> tuple[AdapterFile, RankReduction]:
    """The truncated layers as an adapter of one α, and the energy that they keep together."""
    layers = unify_alpha({name: truncation.layer for name, truncation in truncations.items()})
    ranks = [layer.rank for layer in layers.values()]
    kept = sum(truncation.kept for truncation in truncations.values())
    total = sum(truncation.total for truncation in truncations.values())
    return AdapterFile(layers), RankReduction(kept, total, len(layers), min(ranks), max(ranks))


def extract_lora(
    tuned: str, base: str, *, rank: int | None = None, energy: float | None = None
) -> tuple[AdapterFile, RankReduction]:
    """W_tuned − W_base of two models (folders, checkpoint files) as a LoRA, by the SVD of every changed layer.

    Changes that a LoRA cannot represent (biases, norms, embeddings) count as lost energy. Changes of text encoders
    other than CLIP, whose LoRAs are not read, are left out, which is printed. Between a model in half precision and
    one in fp32, rounding does not count as a change. Warns if the two have different prediction types.
    Raises `UserError` for models of different architectures, or without a difference.
    """
    # Both of one architecture: the same layers of the same shapes
    _refuse_run(tuned)
    _refuse_run(base)
    places = locate(tuned), locate(base)
    tuned_weights, base_weights = map(ModelWeights, places)
    shared = _list_shared(tuned, tuned_weights, base, base_weights)
    say_other_noise(*places)

    # The change of every tensor, and its approximation by low-rank factors
    truncations: dict[str, Truncation] = {}
    unread: dict[str, int] = {}
    outside = 0.0
    with progress(len(shared), "extracting") as bar:
        for name in shared:
            bar.advance()
            # ΔW of one tensor, in the coarser precision of the two
            tuned_weight, base_weight = round_alike(tuned_weights[name].float(), base_weights[name].float())
            change = tuned_weight - base_weight
            if not bool(torch.isfinite(change).all()):
                raise UserError(
                    f"{name} of {tuned} or {base} holds values that are not finite. Download or train the model again."
                )
            energy_of_change = float(change.double().square().sum())
            if energy_of_change <= (UNCHANGED * float(base_weight.norm())) ** 2:
                continue
            # ΔW ≈ up·down by truncated SVD; what no LoRA holds counts as lost energy ‖ΔW‖²
            component, module = split_component(name.removesuffix(WEIGHT_SUFFIX))
            if is_text_encoder(component) and not is_known("clip", module):
                unread[component] = unread.get(component, 0) + is_adaptable(name, base_weight)
            elif is_adaptable(name, base_weight):
                truncations[name.removesuffix(WEIGHT_SUFFIX)] = fit_lora(change, rank=rank, energy=energy)
            else:
                outside += energy_of_change

    # What is not in the LoRA
    for component, layers in unread.items():
        if layers:
            notify(
                f"{component} differs in {format_count(layers, 'layer')}, which are left out: of text encoders, only "
                "LoRAs of CLIP are read."
            )
    if not truncations:
        raise UserError(
            f"No layer of {tuned} and {base} differs that an adapter could change. Give two other models."
        )
    adapter, reduction = _collect_truncations(truncations)
    return adapter, replace(reduction, outside=outside)


def _refuse_run(model: str) -> None:
    """`UserError` for a run, whose weights are no whole model's."""
    if read_run_concept(Path(model)) is not None:
        raise UserError(
            f"{model} is a run, not a whole model. Make one of it first: customize merge {quote(model)} --bake --out "
            "FOLDER"
        )


def round_alike(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two weights in fp32; if all values of only one are of a half precision, both are rounded to it."""
    for dtype in (torch.bfloat16, torch.float16):  # values of bf16 are nearly all of fp16 too
        halves = first.to(dtype).float(), second.to(dtype).float()
        if torch.equal(halves[0], first) != torch.equal(halves[1], second):
            return halves
    return first, second


def is_adaptable(name: str, weight: Tensor) -> bool:
    """Whether a tensor is the weight of a linear layer or a convolution."""
    return (
        name.endswith(WEIGHT_SUFFIX)
        and weight.ndim in (2, 4)
        and not name.endswith("_embedding" + WEIGHT_SUFFIX)
    )
