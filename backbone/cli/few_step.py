"""Names of models that were distilled to few steps: files, and some folders, do not say how they were made."""

from __future__ import annotations

import re

# A “de-turbo” is no Turbo any more, and Z-Image-Turbo is called ZIT too
_TURBO = r"(?<!de)(?<!de[-_ ])turbo|(?<![a-z])zit(?:v?\d|(?![a-z]))"
_OTHERS = r"lightning|hyper[-_ ]?sd|(?<![a-z])(?:lcm|flash)(?![a-z])|dmd2|(?<!\d)[1-8][-_ ]?steps?(?![a-z])"
TURBO, FEW_STEPS = re.compile(_TURBO), re.compile(f"{_TURBO}|{_OTHERS}")


def is_called_turbo(name: str) -> bool:
    """Whether a model's name is that of a Turbo, in families whose other models take many steps."""
    return TURBO.search(name.lower()) is not None


def is_called_few_step(name: str) -> bool:
    """Whether a model's name says that it was distilled to few steps, by any method."""
    return FEW_STEPS.search(name.lower()) is not None
