"""Metadata of an exported adapter: kohya's `ss_*` entries and those of the ModelSpec standard, `modelspec.*`.

Tools show them, sort by them and take the trigger words from them. Values are text; what is unknown is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from backbone.adapters.concept import BEST, Concept, read_concept
from backbone.io.console import format_count, notify
from backbone.io.files import read_json, write_text
from backbone.io.records import RunRecord
from backbone.io.run_folder import CONCEPT_FILE as CONCEPT
from customize.formats.adapter import FOR_COMFYUI, AdapterFile, BaseFamily

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
    "zimage": "z-image",
    "flux2": "flux-2-klein",
    "qwen": "qwen-image",
    "krea2": "krea-2",
    "chroma": "chroma",
    "qwen21": "qwen-image-2.1",
}
RESOLUTIONS: dict[BaseFamily, str] = {"sd1": "512x512", "sd2": "512x512", "sdxl": "1024x1024"}
# Our setting → kohya's metadata key.
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
    """Metadata entries for an adapter called `title`, read from `source` (a run folder or file; None if extracted).

    The source's own entries are kept, except where rank, α or the title have changed.
    """
    base = base or adapter.base
    metadata = {key: value for key, value in adapter.metadata.items() if key.startswith(KEPT_PREFIXES)}
    metadata.pop("modelspec.hash_sha256", None)
    metadata.pop(FOR_COMFYUI, None)  # added again where it applies
    concept = read_run_concept(source) if source is not None else None
    entries = {
        **metadata,
        **_build_training_metadata(source, concept),
        **_build_network_metadata(adapter),
        "ss_output_name": title,
    }
    entries["modelspec.sai_model_spec"] = "1.0.1"
    entries["modelspec.title"] = title
    entries["modelspec.implementation"] = "diffusers"
    entries["modelspec.architecture"] = f"{_find_architecture(base, concept)}/lora"
    if base in KOHYA_VERSIONS:
        entries.setdefault("ss_base_model_version", KOHYA_VERSIONS[base])
        entries.setdefault("ss_v2", str(base == "sd2"))
    if base in RESOLUTIONS:
        entries.setdefault("modelspec.resolution", RESOLUTIONS[base])
    if source is not None:
        entries.setdefault("modelspec.date", _read_modification_date(source))
    return entries


def read_run_concept(source: Path) -> Concept | None:
    """Read the concept of a run folder; None for a file."""
    return read_concept(source) if source.is_dir() and (source / CONCEPT).is_file() else None


def say_other_best(run: Path) -> None:
    """Print that a run's last weights are used, if its best checkpoint, which sampling uses, has others."""
    for best in (run / BEST).glob("*.safetensors") if (run / BEST / CONCEPT).is_file() else ():
        last = run / best.name
        if last.is_file() and not _hold_the_same_tensors(last, best):
            notify(
                f"{run}: its weights after the last step are taken. Images are drawn by its best checkpoint: name "
                f"{run / BEST} for that."
            )
            return


def _hold_the_same_tensors(*paths: Path) -> bool:
    """Whether safetensors files have equal tensor data, whatever the metadata in their headers."""
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("rb")) for path in paths]
        for file in files:
            file.seek(int.from_bytes(file.read(8), "little") + 8)
        while True:
            parts = {file.read(1 << 24) for file in files}
            if len(parts) > 1 or parts == {b""}:
                return len(parts) == 1


def _build_network_metadata(adapter: AdapterFile) -> dict[str, str]:
    """kohya's network module, its dim, α and arguments."""
    layers = adapter.layers.values()
    linear = [layer for layer in layers if not _is_kernel(layer.factors)]
    convs = [layer for layer in layers if _is_kernel(layer.factors)]
    arguments: dict[str, str] = {}
    module = "networks.lora"
    if adapter.algorithms != ["lora"]:
        module = "lycoris.kohya"
        algorithms = [algorithm for algorithm in adapter.algorithms if algorithm != "dora"]
        arguments["algo"] = "locon" if algorithms == ["lora"] else algorithms[0]
        if "dora" in adapter.algorithms:
            arguments["dora_wd"] = "True"
    if convs:
        arguments |= {"conv_dim": _format_common(layer.rank for layer in convs)}
        arguments |= {"conv_alpha": _format_common(layer.alpha for layer in convs)}
    main_layers = linear or convs
    return {
        "ss_network_module": module,
        "ss_network_dim": _format_common(layer.rank for layer in main_layers),
        "ss_network_alpha": _format_common(layer.alpha for layer in main_layers),
        "ss_network_args": json.dumps(arguments),
    }


def _is_kernel(factors: Mapping[str, Tensor]) -> bool:
    """Whether the layer is a convolution with a kernel larger than 1 × 1, as far as its factors show."""
    spatial = [value.shape[2:].numel() for name, value in factors.items() if value.ndim == 4 and name != "up"]
    return any(size > 1 for size in spatial)


def _format_common(values: Any) -> str:
    """The value that all share; `Dynamic` where they differ, as kohya's resize_lora writes."""
    distinct = set(values)
    return f"{distinct.pop():g}" if len(distinct) == 1 else "Dynamic"


def _build_training_metadata(source: Path | None, concept: Concept | None) -> dict[str, str]:
    """kohya's entries of a run's settings, and its trigger words; {} for a file."""
    if concept is None or source is None:
        return {}
    entries = {
        "ss_sd_model_name": concept.model,
        "base_model": concept.model,
        "ss_optimizer": "torch.optim.AdamW",
    }

    # Trigger words, as model managers show them
    words = " ".join(concept.tokens.values())
    if words:
        entries |= {
            "limner_token": " ".join(concept.tokens),
            "limner_words": words,
            "limner_class": concept.class_noun,
        }
        entries |= {"limner_learned": " ".join(concept.learned_tokens)} if concept.words else {}
        phrase = f"{words} {concept.class_noun}".strip()
        entries["modelspec.trigger_phrase"] = phrase
        entries["modelspec.usage_hint"] = f"Write “{phrase}” in the prompt."

    # kohya's entries of the run's settings
    settings = source / "settings.json"
    if settings.is_file():
        trained: dict[str, Any] = read_json(settings, RunRecord).settings
        entries |= {name: str(trained[key]) for key, name in KOHYA_KEYS.items() if key in trained}
        if "steps" in trained:
            entries["ss_steps"] = str(trained["steps"])
    else:
        del entries["ss_optimizer"]
    return entries


def _find_architecture(base: BaseFamily, concept: Concept | None) -> str:
    return ARCHITECTURES.get(base) or (Path(concept.model).name if concept else "unknown")


def _read_modification_date(source: Path) -> str:
    """ISO time at which the weights were written, so that exporting them twice gives the same file."""
    return datetime.fromtimestamp(int(source.stat().st_mtime), tz=UTC).isoformat()


def write_import_record(folder: Path, concept: Concept, file: Path) -> None:
    """Write README.md and `concept.json` beside weights that were imported from a tool's file.

    `concept.folder` is the run folder that `folder` becomes.
    """
    reads = "; ".join(
        f"`{token}`, which stands for {format_count(len(words.split()), 'learned vector')}"
        if token in concept.learned_tokens
        else f"`{token}`; the model reads “{words}”"
        for token, words in concept.tokens.items()
    )
    imported = f"Imported from `{file.name}` for `{concept.model}`."
    write_text(folder / "README.md", f"# {concept.folder.name}\n\n{imported}\n\nWrite {reads} in a prompt.\n")
    concept.write(folder)
