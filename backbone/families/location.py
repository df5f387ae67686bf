"""Model locations: a diffusers folder, a single checkpoint file, or a repository on the hub."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backbone.io.console import UserError, notify, notify_once
from backbone.io.files import read_json
from backbone.io.hub import hub_answers
from backbone.io.records import read_as
from backbone.io.weights import INDEX, REDIRECTIONS, check_weights, read_weight_index

# Configs and tokenizers of published models, a folder each, for files that come without any
PUBLISHED_CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Location:
    """Where a model is loaded from: a diffusers folder, a hub id or a single checkpoint file (`source`).

    `index` is its model_index.json. A single file holds weights alone; `settings` are the folders, laid out as
    diffusers', where its configs and tokenizers are looked up: the first that has a file wins. `parts` are files of
    components that it does not hold. `revision` is the commit of a hub id from which all its files are taken.
    `few_step` is the folder of an adapter that makes a few-step model of this one, with a scheduler of its own.
    """

    name: str
    source: str
    index: dict[str, Any]
    settings: tuple[Path, ...] = ()
    revision: str | None = None
    parts: Mapping[str, Path] = field(default_factory=dict)
    few_step: Path | None = None

    @property
    def folder(self) -> Path | None:
        """The diffusers folder on this machine, or None."""
        return Path(self.source) if Path(self.source).is_dir() else None

    @property
    def file(self) -> Path | None:
        """The single checkpoint file, or None."""
        return Path(self.source) if self.settings else None

    def find_file(self, part: str) -> Path:
        """The file that holds a component of a single-file model."""
        return self.parts.get(part, Path(self.source))

    def local(self, name: str) -> Path | None:
        """The local path of a file or folder of the diffusers layout (`tokenizer`, `unet/config.json`), or None."""
        roots = (self.folder,) if self.folder else self.settings
        if self.few_step is not None and name.startswith("scheduler"):
            roots = (self.few_step, *roots)
        return next((root / name for root in roots if (root / name).exists()), None)

    def config(self, part: str) -> Config:
        """Read the config of a component (`unet`, `vae`, `scheduler` …); `UserError` if it is missing or damaged.

        A scheduler's class is the one that model_index.json names, as diffusers loads it.
        """
        name = f"{part}/{'scheduler_config' if part == 'scheduler' else 'config'}.json"
        path = self.local(name)
        if path is None and not (self.folder or self.file):
            path = hub_file(self.source, name, self.revision)
        if path is None:
            raise UserError(f"{self.name} has no {name}. Save or download the model again.")
        config = Config(read_json(path))
        config.path = path
        types = CONFIG_TYPES | (VAE_TYPES if part == "vae" else {})
        inner = config.get("text_config")  # of a vision-language model
        for section in (config, inner) if isinstance(inner, dict) else (config,):
            for key, kind in types.items():
                if section.get(key) is not None:
                    _check_size(read_as(kind, section[key], path, key), path, key)
                elif key in section and key in NEVER_NULL:
                    raise config.damaged(key)
        for key, value in config.items():
            if isinstance(value, int) and abs(value) > LARGEST_OF_ALL:
                raise config.damaged(key)
        if part == "scheduler" and not self.file and (not self.few_step or self.few_step not in path.parents):
            self._follow_index(config)
        return config

    def _follow_index(self, config: Config) -> None:
        """Take the scheduler's class from model_index.json, if it is one of diffusers'; say so where they differ.

        `UserError` where one is of a flow and the other is not: those settings are another model's.
        """
        library, index_class = self.index.get("scheduler") or (None, None)
        if library != "diffusers" or not index_class:
            return
        config_class, config["_class_name"] = config.get("_class_name"), index_class
        if config_class is not None and ("FlowMatch" in config_class) != ("FlowMatch" in index_class):
            raise UserError(
                f"The scheduler of {self.name} is a {config_class}, and model_index.json names a {index_class}: it is "
                "another model's. Restore scheduler/."
            )
        if config_class is not None and config_class != index_class:
            notify_once(
                f"model_index.json of {self.name} names the {index_class} and its scheduler/ a {config_class}: the "
                "first is followed, as in diffusers."
            )

    def refuse_foreign_weights(self, part: str) -> None:
        """`UserError` unless loading this component opens only its own whole safetensors files."""
        if self.folder is not None:
            check_weights(self.folder / part)
            return
        for name in (*REDIRECTIONS, f"diffusion_pytorch_model{INDEX}", f"model{INDEX}"):
            path = find_hub_file(self.source, f"{part}/{name}", self.revision)
            if path is not None and name in REDIRECTIONS:
                raise UserError(f"{part}/{name} of {self.name} would load other weights. Name another model.")
            if path is not None:
                read_weight_index(path)


class Config(dict[str, Any]):
    """A component's config. A key that it lacks is a `UserError`."""

    path = Path()

    def __missing__(self, key: str) -> Any:
        raise UserError(f"{self.path} is damaged: it has no {key}. Restore it, or download the model again.")

    def damaged(self, key: str) -> UserError:
        """The error for a value that no network can have."""
        value = str(self.get(key))[:60]
        return UserError(
            f"{self.path} is damaged: {key} is {value}. Restore it, or download the model again."
        )

    def refuse_other_kinds(self, network: Any) -> None:
        """`UserError` for a value that is no number (or list of numbers) where the class's default is one.

        A diffusers class stores such a value when it is built, and fails on it when it is called. So it does where
        rotary angles are not of its axes, or do not fill an attention head.
        """
        parameters = inspect.signature(network.__init__).parameters
        defaults = {name: parameter.default for name, parameter in parameters.items()}
        for name, default in defaults.items():
            wants_numbers = default not in (None, [], ()) and _is_numeric(default)
            if wants_numbers and name in self and not _is_numeric(self[name]):
                raise self.damaged(name)

        # Rotary angles: so many numbers of a head for each axis
        values = {**defaults, **self}
        heads = {
            "axes_dims_rope": values.get("attention_head_dim"),
            "axes_dims": values.get("dim", 0) // (values.get("n_heads") or 1),
        }
        for name in heads.keys() & defaults.keys():
            axes, count = values[name], len(defaults[name])
            whole = isinstance(axes, (list, tuple)) and all(type(axis) is int for axis in axes)
            if not whole or len(axes) != count or sum(axes) != heads[name]:
                raise UserError(
                    f"{self.path} is damaged: {name} is {str(axes)[:60]}, and an attention head has {heads[name]} "
                    f"numbers for {count} axes. Restore it, or download the model again."
                )


# Of the keys that are read here; diffusers and transformers check the others
CONFIG_TYPES: dict[str, Any] = {
    "_class_name": str,
    "block_out_channels": list[int],
    "sample_size": int | list[int],
    "cross_attention_dim": int | list[int],
    "num_attention_heads": int | list[int],
    **dict.fromkeys(
        ("in_channels", "out_channels", "latent_channels", "patch_size", "pos_embed_max_size", "z_dim"), int
    ),
    **dict.fromkeys(("dim", "cap_feat_dim", "n_layers", "n_refiner_layers", "n_heads"), int),
    **dict.fromkeys(("joint_attention_dim", "pooled_projection_dim", "caption_channels"), int),
    **dict.fromkeys(("projection_class_embeddings_input_dim", "projection_dim"), int),
    **dict.fromkeys(("hidden_size", "d_model", "vocab_size", "num_hidden_layers", "num_layers"), int),
    **dict.fromkeys(
        ("num_single_layers", "num_frames", "addition_time_embed_dim", "num_train_timesteps"), int
    ),
    **dict.fromkeys(("scaling_factor", "shift_factor", "shift", "base_shift", "max_shift"), float),
    **dict.fromkeys(("force_upcast", "guidance_embeds", "use_dynamic_shifting"), bool),
    **dict.fromkeys(("encoder_hid_dim", "num_class_embeds"), int),
    **dict.fromkeys(("encoder_hid_dim_type", "class_embed_type"), str),
    **dict.fromkeys(("addition_embed_type", "prediction_type", "time_shift_type", "beta_schedule"), str),
}
VAE_TYPES: dict[str, Any] = {
    "patch_size": int | list[int],
    "temperal_downsample": list[bool],
    **dict.fromkeys(("latents_mean", "latents_std"), list[float]),
}
NEVER_NULL = ("sample_size", "latent_channels", "z_dim", "block_out_channels", "temperal_downsample", "shift")
LARGEST = 2**24  # size or number of the keys above
LARGEST_OF_ALL = 2**31  # integer of any other key
MOST_LAYERS = 1000


def _is_numeric(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_numeric, value))
    if isinstance(value, bool):
        return False  # where a number is wanted, torch's layers refuse it when they are called
    if isinstance(value, int):
        return abs(value) <= LARGEST_OF_ALL
    return value is None or (isinstance(value, float) and math.isfinite(value))


def _check_size(value: Any, path: Path, key: str) -> None:
    """Raise `UserError` for sizes that no network has: building it would take all memory, or never end."""
    largest = MOST_LAYERS if "layers" in key else LARGEST
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, int) and not isinstance(number, bool) and not 1 <= number <= largest:
            raise UserError(f"{path} is damaged: {key} is {number}. Restore it, or download the model again.")
    if value == []:
        raise UserError(f"{path} is damaged: {key} is empty. Restore it, or download the model again.")


LOG_IN = "Then log in: hf auth login, or set HF_TOKEN."


def hub_file(repository: str, name: str, revision: str | None = None) -> Path:
    """Download a file of a hub repository, or take it from the cache; `UserError` if neither works.

    A download is announced before it begins, because a file from elsewhere may name the model.
    """
    path = find_hub_file(repository, name, revision)
    if path is None:
        raise UserError(f"The model {repository} has no {name} on the hub. Name another model.")
    return path


def find_hub_file(repository: str, name: str, revision: str | None = None) -> Path | None:
    """`hub_file`, or None where the repository has no such file.

    Raises `UserError` where it cannot be fetched: an unknown or gated repository, or no connection.
    """
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    offline = not hub_answers(repository)
    if offline and try_to_load_from_cache(repository, name, revision=revision) is _CACHED_NO_EXIST:
        return None  # as the hub answered earlier
    try:
        if not offline and revision is None and try_to_load_from_cache(repository, name) is None:
            notify(f"Fetching {repository} from the hub ({name} first).")
        return Path(hf_hub_download(repository, name, revision=revision, local_files_only=offline))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        if isinstance(error, GatedRepoError):
            raise UserError(
                f"The model {repository} is gated: accept its terms at https://huggingface.co/{repository}. {LOG_IN}"
            ) from error
        if isinstance(error, RepositoryNotFoundError):
            raise UserError(
                f"The hub shows no model {repository}: check the spelling, or it is private. {LOG_IN}"
            ) from error
        if offline:
            raise UserError(
                f"The model {repository} is not on this machine, and the hub could not be reached. Check the "
                "connection, or name a local diffusers folder."
            ) from error
        raise UserError(
            f"The model {repository} is not on this machine and could not be fetched from the hub "
            f"({type(error).__name__}). Check its name and the connection, or name a local diffusers folder."
        ) from error
