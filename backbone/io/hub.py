"""Ask the hub once whether it answers: without a connection its client tries each file for half a minute."""

from __future__ import annotations

import sys
from functools import cache
from typing import Literal

ANSWER_SECONDS = 5.0


@cache
def hub_answers(repository: str, kind: Literal["model", "dataset"] = "model") -> bool:
    """Whether the hub answers a request about this repository, with whatever answer."""
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
    """The commit of a dataset's branch, tag or commit; of its newest for "". Raises the hub's errors."""
    from huggingface_hub import HfApi

    info = HfApi().dataset_info(repository, revision=revision or None, timeout=ANSWER_SECONDS)
    return str(info.sha)


def connection_errors() -> tuple[type[Exception], ...]:
    """The errors that reading from the hub raises beside `OSError`."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    aiohttp = sys.modules.get("aiohttp")  # if nothing has imported it, it raises nothing
    return httpx.HTTPError, DatasetsError, *((aiohttp.ClientError,) if aiohttp else ())
