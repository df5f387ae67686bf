"""The hub, asked once: without a connection its own client tries each file five times, for half a minute."""

from __future__ import annotations

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
