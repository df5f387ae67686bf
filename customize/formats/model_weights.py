"""Read a model's weights by the names that adapters use, without building the model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from backbone.families.location import Location
from backbone.io.console import UserError
from backbone.io.files import open_tensors
from backbone.io.weights import list_weight_files, read_weights_header
from customize.formats.layers.names import COMPONENTS, TEXT_MODEL_PREFIX, is_text_encoder, split_component

WEIGHT_SUFFIX = ".weight"


class ModelWeights(Mapping[str, Tensor]):
    """A model's tensors by canonical name (`unet.conv_in.weight`), each read from its file on access."""

    def __init__(self, location: Location) -> None:
        self.location = location
        self._sources: dict[str, tuple[Path, str]] = {}
        self._loaded: dict[str, Tensor] = {}
        self._opened: dict[Path, Callable[[str], Tensor]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        if location.folder is not None:
            for component in COMPONENTS:
                for path in list_weight_files(location.folder / component):
                    for name, shape in read_weights_header(path).shapes.items():
                        canonical = canonical_name(component, name)
                        self._sources[canonical] = (path, name)
                        self.shapes[canonical] = shape
        else:
            self._load()
        if not self.shapes:
            raise UserError(f"{location.name} holds no safetensors weights. Save the model as safetensors.")

    def __getitem__(self, name: str) -> Tensor:
        if name in self._loaded:
            return self._loaded[name]
        path, stored = self._sources[name]
        if path not in self._opened:
            self._opened[path] = open_tensors(path)
        return self._opened[path](stored)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def _load(self) -> None:
        """Load a checkpoint file or a hub model as for sampling, and keep its state dicts."""
        from backbone.models.model import Backbone

        model = Backbone.open(self.location.name, device="cpu", precision="fp32")
        denoiser = model.denoiser
        component = "unet" if hasattr(denoiser, "down_blocks") else "transformer"
        parts = {component: denoiser.state_dict()}
        parts |= {slot.name: slot.model.state_dict() for slot in model.text_encoder.slots}
        for part, tensors in parts.items():
            self._loaded |= {canonical_name(part, name): value for name, value in tensors.items()}
        self.shapes = {name: tuple(value.shape) for name, value in self._loaded.items()}


class LayerWeights(Mapping[str, Tensor]):
    """View of `ModelWeights` by layer name (`unet.conv_in`): the `.weight` tensors alone."""

    def __init__(self, weights: ModelWeights) -> None:
        self.weights = weights

    def __getitem__(self, layer: str) -> Tensor:
        return self.weights[layer + WEIGHT_SUFFIX]

    def __contains__(self, layer: object) -> bool:
        return f"{layer}{WEIGHT_SUFFIX}" in self.weights.shapes

    def __iter__(self) -> Iterator[str]:
        return (
            name.removesuffix(WEIGHT_SUFFIX) for name in self.weights.shapes if name.endswith(WEIGHT_SUFFIX)
        )

    def __len__(self) -> int:
        return sum(1 for _ in self)


def canonical_name(component: str, stored: str) -> str:
    """`component.name` of a stored tensor, without CLIP's level `text_model`."""
    return f"{component}.{stored.removeprefix(TEXT_MODEL_PREFIX) if is_text_encoder(component) else stored}"


def refuse_mismatch(
    layers: Mapping[str, tuple[int, int]],
    shapes: Mapping[str, tuple[int, ...]],
    source: str,
    model: str,
) -> None:
    """Raise `UserError` unless the model's tensors `shapes` have all these layers, of these shapes [out, in·k·k]."""
    for layer, (rows, columns) in layers.items():
        shape = shapes.get(layer + WEIGHT_SUFFIX)
        if shape is None:
            reason = f"it changes {layer}, which that model does not have"
        elif (shape[0], math.prod(shape[1:])) != (rows, columns):
            reason = (
                f"{layer} is {rows} × {columns} there and {shape[0]} × {math.prod(shape[1:])} in the model"
            )
        else:
            continue
        raise UserError(
            f"{source} was made for another model than {model}: {reason}. Give the --model that it fits."
        )


def count_components(layers: Mapping[str, object]) -> dict[str, int]:
    """Component → number of its layers."""
    return dict(Counter(split_component(layer)[0] for layer in layers))
