"""What models are called that were distilled to few steps: no file says how it was made, and not every folder does."""

from __future__ import annotations

import re

# “de-turbo” is of one that is none again, and Z-Image-Turbo is called ZIT
_TURBO = r"(?<!de)(?<!de[-_ ])turbo|(?<![a-z])zit(?:v?\d|(?![a-z]))"
_OTHERS = r"lightning|hyper[-_ ]?sd|(?<![a-z])(?:lcm|flash)(?![a-z])|dmd2|(?<!\d)[1-8][-_ ]?steps?(?![a-z])"
TURBO, FEW_STEPS = re.compile(_TURBO), re.compile(f"{_TURBO}|{_OTHERS}")


def is_called_turbo(name: str) -> bool:
    """Whether a model's name is that of a Turbo, of the families whose others are drawn in many steps."""
    return TURBO.search(name.lower()) is not None


def is_called_few_step(name: str) -> bool:
    """Whether a model's name is that of one distilled to few steps by any method."""
    return FEW_STEPS.search(name.lower()) is not None
