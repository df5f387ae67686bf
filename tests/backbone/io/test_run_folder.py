"""The memory of a process is its own."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np

from backbone.io.run_folder import peak_memory

ASKED = "import json\nfrom backbone.io.run_folder import peak_memory\nprint(json.dumps(peak_memory()))"


def test_the_peak_is_not_that_of_the_process_that_started_it() -> None:
    """Which is what `ru_maxrss` says on Linux."""
    before = peak_memory()
    assert before is not None
    large = np.ones(400_000_000, dtype=np.uint8)
    after = peak_memory()
    assert after is not None and after > 400_000_000
    done = subprocess.run([sys.executable, "-c", ASKED], capture_output=True, text=True, check=True)
    own = json.loads(done.stdout)
    assert own < 0.9 * after
    assert own > 5_000_000 and large.sum() == 400_000_000
