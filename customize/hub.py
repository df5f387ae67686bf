"""A run on the hub: the metadata of its card, and the upload."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from backbone.console import UserError
from backbone.model import Backbone
from customize.settings import Settings

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PRIVATE = ["checkpoint.safetensors", "tensorboard/*", ".*"]  # of use to nobody else


def card(settings: Settings, model: Backbone) -> str:
    """The head of a model card, as the hub reads it: base, library, tags, the prompt to write, a picture."""
    place = model.location.place
    adapter = settings.method in ("lora", "pivotal")
    tags = ["text-to-image", "diffusers", "dreambooth", settings.adapter if adapter else settings.method]
    first = settings.subjects()[0]
    prompt = replace(first, token=first.token_words).filled(settings.instance_prompt)
    lines = [
        "---",
        *([f"base_model: {place}"] if HUB_ID.fullmatch(place) and not Path(place).exists() else []),
        "library_name: diffusers",
        "pipeline_tag: text-to-image",
        f"instance_prompt: {quoted(prompt)}",
        f"tags: [{', '.join(tags)}]",
        "widget:",
        f"- text: {quoted(prompt)}",
        "  output:",
        "    url: sheet.png",
        "---",
        "",
        "",
    ]
    return "\n".join(lines)


def push(run: Path, repository: str) -> str:
    """Uploads a run folder, without what only resuming needs; gives its address. Raises `UserError` where it cannot."""
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi()
    try:
        made = api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=run, ignore_patterns=PRIVATE)
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, httpx.HTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"The run is finished in {run}, but it could not be uploaded as {repository} ({reason}). "
            f"Log in with: hf auth login; then: hf upload {repository} {run}"
        ) from error
    return str(made)


def quoted(text: str) -> str:
    """A text as YAML's double-quoted scalar."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
