"""Model locations: a diffusers folder, a single checkpoint file, or a repository on the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from backbone.io.console import UserError
from backbone.io.files import read_json
from backbone.io.hub import hub_answers


@dataclass(frozen=True)
class Location:
    """Where a model is loaded from: a diffusers folder, a hub id or a single checkpoint file (`source`).

    `index` is its model_index.json. A single file holds weights alone; `settings` are the folders where its configs and
    tokenizers are looked up, laid out as diffusers', the first that has a file wins.
    """

    name: str
    source: str
    index: dict[str, Any]
    settings: tuple[Path, ...] = ()

    @property
    def folder(self) -> Path | None:
        """The diffusers folder on this machine, or None."""
        return Path(self.source) if Path(self.source).is_dir() else None

    @property
    def file(self) -> Path | None:
        """The single checkpoint file, or None."""
        return Path(self.source) if self.settings else None

    def local(self, name: str) -> Path | None:
        """The local path of a file or folder of the diffusers layout (`tokenizer`, `unet/config.json`), or None."""
        roots = (self.folder,) if self.folder else self.settings
        return next((root / name for root in roots if (root / name).exists()), None)

    def config(self, part: str) -> dict[str, Any]:
        """Read the config of a component (`unet`, `vae`, `scheduler` …); `UserError` if it has none."""
        name = f"{part}/{'scheduler_config' if part == 'scheduler' else 'config'}.json"
        path = self.local(name) if self.folder or self.file else hub_file(self.source, name)
        if path is None:
            raise UserError(f"{self.name} has no {name}. Save or download the model again.")
        return cast("dict[str, Any]", read_json(path))


def hub_file(repository: str, name: str) -> Path:
    """Download a file of a hub repository, or take it from the cache; `UserError` if neither works."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, name, local_files_only=not hub_answers(repository)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"The model {repository} is not on this machine and could not be fetched from the hub "
            f"({type(error).__name__}). Check its name and the connection, or name a local diffusers folder."
        ) from error
