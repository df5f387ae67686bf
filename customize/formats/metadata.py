"""What the metadata of an exported adapter says: kohya's `ss_*` entries and the ModelSpec standard's `modelspec.*`.

Tools show these, sort by them and find the trigger word in them. Values are text. Nothing is said that is not known.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch import Tensor

from backbone.adapters.concept import FILE as CONCEPT
from backbone.adapters.concept import Concept, read_concept
from backbone.io.files import read_json
from customize.formats.adapter import AdapterFile, BaseFamily

KEPT_PREFIXES = ("ss_", "modelspec.", "limner_", "base_model")
KOHYA_VERSIONS: dict[BaseFamily, str] = {
    "sd1": "sd_v1",
    "sd2": "sd_v2",
    "sdxl": "sdxl_base_v1-0",
    "sd3": "sd3",
    "flux": "flux1",
}
ARCHITECTURES: dict[BaseFamily, str] = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-512",
    "sdxl": "stable-diffusion-xl-v1-base",
    "sd3": "stable-diffusion-3",
    "flux": "flux-1-dev",
}
RESOLUTIONS: dict[BaseFamily, str] = {"sd1": "512x512", "sd2": "512x512", "sdxl": "1024x1024"}
# Our setting → kohya's name for it.
KOHYA_KEYS = {
    "steps": "ss_max_train_steps",
    "learning_rate": "ss_learning_rate",
    "lr_scheduler": "ss_lr_scheduler",
    "lr_warmup_steps": "ss_lr_warmup_steps",
    "batch": "ss_total_batch_size",
    "lora_dropout": "ss_network_dropout",
    "max_grad_norm": "ss_max_grad_norm",
    "prior_loss_weight": "ss_prior_loss_weight",
    "precision": "ss_mixed_precision",
    "seed": "ss_seed",
}


def build_metadata(
    adapter: AdapterFile, *, source: Path | None = None, title: str, base: BaseFamily | None = None
) -> dict[str, str]:
    """The entries for an adapter that was read from `source` (a run folder or a file, None for one made from
    models), to be called `title`.

    What the source's own metadata said is kept, save where rank, α or the title are known better now.
    """
    base = base or adapter.base
    kept = {key: value for key, value in adapter.metadata.items() if key.startswith(KEPT_PREFIXES)}
    kept.pop("modelspec.hash_sha256", None)
    concept = read_run_concept(source) if source is not None else None
    said = {
        **kept,
        **_training_metadata(source, concept),
        **_network_metadata(adapter),
        "ss_output_name": title,
    }
    said["modelspec.sai_model_spec"] = "1.0.1"
    said["modelspec.title"] = title
    said["modelspec.implementation"] = "diffusers"
    said["modelspec.architecture"] = f"{_architecture_name(base, concept)}/lora"
    if base in KOHYA_VERSIONS:
        said.setdefault("ss_base_model_version", KOHYA_VERSIONS[base])
        said.setdefault("ss_v2", str(base == "sd2"))
    if base in RESOLUTIONS:
        said.setdefault("modelspec.resolution", RESOLUTIONS[base])
    if source is not None:
        said.setdefault("modelspec.date", _modification_date(source))
    return said


def read_run_concept(source: Path) -> Concept | None:
    """The concept of a run folder; None for a file."""
    return read_concept(source) if source.is_dir() and (source / CONCEPT).is_file() else None


def _network_metadata(adapter: AdapterFile) -> dict[str, str]:
    """Which network module of kohya's this is, its rank and its α."""
    layers = adapter.layers.values()
    linear = [layer for layer in layers if not _is_kernel(layer.factors)]
    kernels = [layer for layer in layers if _is_kernel(layer.factors)]
    arguments: dict[str, str] = {}
    module = "networks.lora"
    if adapter.algorithms != ["lora"]:
        module = "lycoris.kohya"
        kinds = [kind for kind in adapter.algorithms if kind != "dora"]
        arguments["algo"] = "locon" if kinds == ["lora"] else kinds[0]
        if "dora" in adapter.algorithms:
            arguments["dora_wd"] = "True"
    if kernels:
        arguments |= {"conv_dim": _format_common(layer.rank for layer in kernels)}
        arguments |= {"conv_alpha": _format_common(layer.alpha for layer in kernels)}
    counted = linear or kernels
    return {
        "ss_network_module": module,
        "ss_network_dim": _format_common(layer.rank for layer in counted),
        "ss_network_alpha": _format_common(layer.alpha for layer in counted),
        "ss_network_args": json.dumps(arguments),
    }


def _is_kernel(factors: Mapping[str, Tensor]) -> bool:
    """Whether the layer is a convolution of more than one pixel, as far as the factors show it."""
    spatial = [value.shape[2:].numel() for name, value in factors.items() if value.ndim == 4 and name != "up"]
    return any(size > 1 for size in spatial)


def _format_common(values: Any) -> str:
    """The value that all share; `Dynamic`, as kohya's resizing writes, where they differ."""
    found = set(values)
    return f"{found.pop():g}" if len(found) == 1 else "Dynamic"


def _training_metadata(source: Path | None, concept: Concept | None) -> dict[str, str]:
    """How a run was trained, from its settings, and what its concept is called."""
    if concept is None or source is None:
        return {}
    said = {
        "ss_sd_model_name": concept.model,
        "base_model": concept.model,
        "ss_optimizer": "torch.optim.AdamW",
    }
    words = " ".join(concept.tokens.values())
    if words:
        said |= {"limner_words": words, "limner_class": concept.class_noun}
        phrase = f"{words} {concept.class_noun}".strip()
        said["modelspec.trigger_phrase"] = phrase
        said["modelspec.usage_hint"] = f"Write “{phrase}” in the prompt."
    settings = source / "settings.json"
    if settings.is_file():
        trained: dict[str, Any] = read_json(settings).get("settings", {})
        said |= {name: str(trained[key]) for key, name in KOHYA_KEYS.items() if key in trained}
        if "steps" in trained:
            said["ss_steps"] = str(trained["steps"])
    else:
        del said["ss_optimizer"]
    return said


def _architecture_name(base: BaseFamily, concept: Concept | None) -> str:
    return ARCHITECTURES.get(base) or (Path(concept.model).name if concept else "unknown")


def _modification_date(source: Path) -> str:
    """When the weights were written, so that exporting them twice gives the same file."""
    return datetime.fromtimestamp(int(source.stat().st_mtime), tz=timezone.utc).isoformat()
