"""Adapters added up, cut to another rank, and taken out of two checkpoints.

customize merge A:0.8 B:0.5 --out AB              Σ strength·ΔW, exactly, the ranks added
customize merge A:0.8 B:0.5 --rank 8 --out AB     the nearest of rank 8 (Eckart–Young), its error said
customize merge A B --bake --model MODEL --out P  a diffusers folder with W + Σ strength·ΔW
customize resize A --rank 4                       one adapter at another rank
customize extract TUNED BASE --rank 16            W_tuned − W_base as an adapter
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from backbone.adapters.concept import Concept
from backbone.io.console import UserError, progress, say
from backbone.io.files import read_tensors
from backbone.models.locate import locate
from customize.formats.adapter import BASE_NAMES, AdapterFile, BaseFamily
from customize.formats.factors import LayerUpdate, Truncation, fit_lora, sum_loras, truncate_lora
from customize.formats.layer_names import split_component
from customize.formats.metadata import read_run_concept
from customize.formats.model_weights import WEIGHT_SUFFIX, ModelWeights
from customize.formats.read import read_adapter

UNCHANGED = 1e-7  # ‖ΔW‖/‖W‖ below which two checkpoints share a weight


@dataclass(frozen=True)
class MergeInput:
    """One member of a merge: where it came from, how strongly it counts, what it holds.

    `weight_deltas` are differences of whole weights (`unet.conv_in.weight`), `words` rows of learned words by
    token or side.
    """

    source: Path
    strength: float
    adapter: AdapterFile
    concept: Concept | None = None
    weight_deltas: Mapping[str, Tensor] = field(default_factory=dict)
    words: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class RankReduction:
    """What lower ranks left: `kept` of the `total` energy, over `layers` layers of ranks `lowest` to `highest`."""

    kept: float
    total: float
    layers: int
    lowest: int
    highest: int
    outside: float = 0.0  # energy of biases, norms and embeddings, which no adapter holds

    @property
    def share(self) -> float:
        """What is kept of all that changed, 0…1."""
        total = self.total + self.outside
        return self.kept / total if total else 1.0

    @property
    def error(self) -> float:
        """‖what is lost‖ / ‖the change‖."""
        return math.sqrt(max(0.0, 1 - self.share))

    def sentence(self) -> str:
        """What a person wants to know of it."""
        ranks = (
            f"rank {self.lowest}" if self.lowest == self.highest else f"ranks {self.lowest} to {self.highest}"
        )
        return f"{self.layers} layers at {ranks} keep {self.share:.2%} of the energy (relative error {self.error:.2e})."


def read_inputs(asked: Sequence[str]) -> list[MergeInput]:
    """The members of a merge, from `PATH` or `PATH:STRENGTH`; `UserError` where they were made for different bases."""
    parts = [read_input(*parse_strength(text)) for text in asked]
    for part in parts[1:]:
        refuse_other_base(parts[0], part)
    return parts


def read_input(path: Path, strength: float = 1.0) -> MergeInput:
    """An adapter file, or a run with all that it learned."""
    concept = read_run_concept(path)
    if concept is None or concept.weights or not (concept.words or concept.changed):
        adapter = read_adapter(path)
    else:
        adapter = AdapterFile({})
    if concept is None:
        return MergeInput(path, strength, adapter)
    weight_deltas = read_tensors(path / concept.changed)[0] if concept.changed else {}
    words = read_tensors(path / concept.words)[0] if concept.words else {}
    return MergeInput(
        path, strength, adapter, concept, {f"unet.{name}": v for name, v in weight_deltas.items()}, words
    )


def parse_strength(text: str) -> tuple[Path, float]:
    """`runs/dog:0.8` → the path and 0.8; without a number 1."""
    path, colon, number = text.rpartition(":")
    if not colon:
        return Path(text), 1.0
    try:
        strength = float(number)
    except ValueError:
        return Path(text), 1.0
    if not path or not math.isfinite(strength):
        raise UserError(f"“{text}” is no adapter with a strength. Write it like runs/dog:0.8.")
    return Path(path), strength


def refuse_other_base(first: MergeInput, second: MergeInput) -> None:
    """`UserError` when two adapters cannot belong to one model."""
    names = f"{first.source} and {second.source}"
    one, other = first.concept, second.concept
    if one is not None and other is not None and one.fingerprint != other.fingerprint:
        raise UserError(
            f"{names} were trained on different weights ({one.model} and {other.model}). Merge runs of one model."
        )
    bases = first.adapter.base, second.adapter.base
    if first.adapter.layers and second.adapter.layers and bases[0] != bases[1]:
        raise UserError(
            f"{names} are for {BASE_NAMES[bases[0]]} and {BASE_NAMES[bases[1]]}. Merge adapters of one model."
        )
    for name in sorted(set(first.adapter.layers) & set(second.adapter.layers)):
        shapes = first.adapter.layers[name].shape, second.adapter.layers[name].shape
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{names} are for different models: {name} is {shapes[0][0]} × {shapes[0][1]} in one "
                f"and {shapes[1][0]} × {shapes[1][1]} in the other. Merge adapters of one model."
            )


def merge_exact(parts: Sequence[MergeInput]) -> AdapterFile:
    """Σ strength·ΔW as one LoRA, exactly: in every layer the ranks add up.

    Raises `UserError` for LoHa and LoKr, whose sum has no such factors, and for DoRA, which is not a sum.
    """
    by_layer = _group_by_layer(parts)
    for part in parts:
        others = sorted(set(part.adapter.algorithms) - {"lora", "dora"})
        if others:
            raise UserError(
                f"{part.source} is a {others[0]}, whose sum with others has no exact factors. Add --rank to merge it "
                "as a LoRA of that rank, or --bake."
            )
    return AdapterFile(
        unify_alpha({name: sum_loras(*zip(*rows, strict=True)) for name, rows in by_layer.items()})
    )


def merge_to_rank(parts: Sequence[MergeInput], rank: int) -> tuple[AdapterFile, RankReduction]:
    """Σ strength·ΔW as the nearest LoRA of a rank; any kind but DoRA may be among them, and whole weights too."""
    found: dict[str, Truncation] = {}
    by_layer = _group_by_layer(parts)
    weight_deltas = sum_weight_deltas(parts)
    whole = {
        name.removesuffix(WEIGHT_SUFFIX): value
        for name, value in weight_deltas.items()
        if is_adaptable(name, value)
    }
    outside = sum(
        float(value.square().sum()) for name, value in weight_deltas.items() if not is_adaptable(name, value)
    )
    base = parts[0].adapter.base
    names = sorted(set(by_layer) | set(whole))
    with progress(len(names), "merging") as bar:
        for name in names:
            rows = by_layer.get(name, [])
            if name not in whole and all(layer.algorithm == "lora" for layer, _ in rows):
                found[name] = truncate_lora(sum_loras(*zip(*rows, strict=True)), rank=rank)
            else:
                kernels = [size for layer, _ in rows if (size := infer_kernel_size(layer)) is not None]
                shape = (
                    whole[name].shape[2:]
                    if name in whole
                    else (kernels or [guess_kernel_size(name, base)])[0]
                )
                changes = [strength * layer.delta_weight() for layer, strength in rows]
                changes += [whole[name].flatten(1)] if name in whole else []
                found[name] = fit_lora(_reshape_kernel(torch.stack(changes).sum(0), tuple(shape)), rank=rank)
            bar.advance()
    adapter, loss = _collect_truncations(found)
    return adapter, replace(loss, outside=outside)


def sum_weight_deltas(parts: Sequence[MergeInput]) -> dict[str, Tensor]:
    """Σ strength·difference of the whole weights that runs without an adapter weight_deltas, float32."""
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.weight_deltas.items():
            change = part.strength * value.float()
            total[name] = total[name] + change if name in total else change
    return total


def resize_adapter(
    adapter: AdapterFile, *, rank: int | None = None, energy: float | None = None
) -> tuple[AdapterFile, RankReduction]:
    """The nearest LoRA of a rank, or the smallest one that keeps a share `energy` of every layer's change.

    A LoHa or LoKr becomes a LoRA so; DoRA keeps its magnitudes.
    """
    found: dict[str, Truncation] = {}
    with progress(len(adapter.layers), "resizing") as bar:
        for name, layer in adapter.layers.items():
            if layer.algorithm == "lora":
                found[name] = truncate_lora(layer, rank=rank, energy=energy)
            else:
                shape = infer_kernel_size(layer)
                shape = guess_kernel_size(name, adapter.base) if shape is None else shape
                one = fit_lora(_reshape_kernel(layer.delta_weight(), shape), rank=rank, energy=energy)
                found[name] = replace(one, layer=replace(one.layer, magnitude=layer.magnitude))
            bar.advance()
    result, loss = _collect_truncations(found)
    return replace(result, metadata=adapter.metadata), loss


def infer_kernel_size(layer: LayerUpdate) -> tuple[int, ...] | None:
    """(k, k) of a convolution and () of a matrix, where the factors tell; None where they do not."""
    told = {"lora": ("down",), "loha": ("hada_t1",), "lokr": ("lokr_w2", "lokr_t2")}[layer.algorithm]
    for name in told:
        if name in layer.factors and (layer.algorithm == "lora" or layer.factors[name].ndim == 4):
            return tuple(layer.factors[name].shape[2:])
    return None


def guess_kernel_size(name: str, base: BaseFamily) -> tuple[int, ...]:
    """The same by the layer's name, in diffusers' UNets: LoHa and LoKr of convolutions may hold flat matrices."""
    last = name.rsplit(".", 1)[-1]
    if last in ("conv", "conv1", "conv2", "conv_in", "conv_out"):
        return (3, 3)
    pointwise = last == "conv_shortcut" or (last in ("proj_in", "proj_out") and base in ("sd1", "other"))
    return (1, 1) if pointwise and name.startswith("unet.") else ()


def _reshape_kernel(matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
    return matrix.reshape(len(matrix), -1, *shape) if shape else matrix


def unify_alpha(layers: Mapping[str, LayerUpdate]) -> dict[str, LayerUpdate]:
    """The same changes with one α everywhere: readers of kohya's format are not all right about several."""
    alpha = max((layer.alpha for layer in layers.values()), default=1.0)
    return {name: layer.with_alpha(alpha) for name, layer in layers.items()}


def _group_by_layer(parts: Sequence[MergeInput]) -> dict[str, list[tuple[LayerUpdate, float]]]:
    by_layer: dict[str, list[tuple[LayerUpdate, float]]] = {}
    for part in parts:
        if "dora" in part.adapter.algorithms:
            raise UserError(
                f"{part.source} is a DoRA, whose change is not a sum. Merge it with --bake, into a whole model."
            )
        for name, layer in part.adapter.layers.items():
            by_layer.setdefault(name, []).append((layer, part.strength))
    return by_layer


def _collect_truncations(found: Mapping[str, Truncation]) -> tuple[AdapterFile, RankReduction]:
    layers = unify_alpha({name: one.layer for name, one in found.items()})
    return AdapterFile(layers), summarize_truncations(found.values())


def summarize_truncations(cuts: Iterable[Truncation]) -> RankReduction:
    """What cuts left, together."""
    made = list(cuts)
    ranks = [one.layer.rank for one in made]
    kept, total = sum(one.kept for one in made), sum(one.total for one in made)
    return RankReduction(kept, total, len(made), min(ranks), max(ranks))


# Two checkpoints.


def extract_lora(
    tuned: str, base: str, *, rank: int | None = None, energy: float | None = None
) -> tuple[AdapterFile, RankReduction]:
    """W_tuned − W_base of two models (folders, checkpoint files) as a LoRA, by the SVD of every changed layer.

    The loss counts what no adapter holds (biases, norms, embeddings) as lost.

    Raises `UserError` for models of different builds, or without a difference.
    """
    ours, theirs = ModelWeights(locate(tuned)), ModelWeights(locate(base))
    shared = sorted(set(ours.shapes) & set(theirs.shapes))
    strange = [name for name in shared if ours.shapes[name] != theirs.shapes[name]]
    lacking = {split_component(name)[0] for name in set(ours.shapes) ^ set(theirs.shapes)}
    if strange or not shared or "unet" in lacking or "transformer" in lacking:
        what = f"{strange[0]} has another shape" if strange else "their layers have other names"
        raise UserError(
            f"{tuned} and {base} are built differently ({what}). Give a model and the one it came from."
        )
    for component in sorted(lacking):
        say(f"Only one of {tuned} and {base} has all of {component}; what is not in both is left out.")
    found: dict[str, Truncation] = {}
    outside = 0.0
    with progress(len(shared), "extracting") as bar:
        for name in shared:
            bar.advance()
            before = theirs[name].float()
            change = ours[name].float() - before
            size = float(change.double().square().sum())
            if size <= (UNCHANGED * float(before.norm())) ** 2:
                continue
            if is_adaptable(name, before):
                found[name.removesuffix(WEIGHT_SUFFIX)] = fit_lora(change, rank=rank, energy=energy)
            else:
                outside += size
    if not found:
        raise UserError(
            f"No layer of {tuned} and {base} differs that an adapter could change. Give two other models."
        )
    adapter, loss = _collect_truncations(found)
    return adapter, replace(loss, outside=outside)


def is_adaptable(name: str, weight: Tensor) -> bool:
    """Whether a tensor is the weight of a linear layer or a convolution."""
    return (
        name.endswith(WEIGHT_SUFFIX)
        and weight.ndim in (2, 4)
        and not name.endswith("_embedding" + WEIGHT_SUFFIX)
    )
