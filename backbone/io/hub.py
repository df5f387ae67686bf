"""The hub, asked once: without a connection its own client tries each file five times, for half a minute."""

from __future__ import annotations

import sys
from functools import cache
from typing import Literal

ANSWER_SECONDS = 5.0


@cache
def hub_answers(repository: str, kind: Literal["model", "dataset"] = "model") -> bool:
    """Whether the hub can be reached, asked about this repository; what it has to say of it does not matter."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    try:
        HfApi().repo_info(repository, repo_type=kind, timeout=ANSWER_SECONDS)
    except (HfHubHTTPError, HFValidationError):
        return True
    except (httpx.HTTPError, OSError):
        return False
    return True


def find_revision(repository: str, revision: str = "") -> str:
    """The commit of a dataset that a branch, a tag or a commit is now; "": of its newest. Raises the hub's errors."""
    from huggingface_hub import HfApi

    found = HfApi().dataset_info(repository, revision=revision or None, timeout=ANSWER_SECONDS)
    return str(found.sha)


def connection_errors() -> tuple[type[Exception], ...]:
    """What reading from the hub raises beside `OSError`."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    aiohttp = sys.modules.get("aiohttp")  # which raises nothing where nothing has imported it
    return httpx.HTTPError, DatasetsError, *((aiohttp.ClientError,) if aiohttp else ())
