"""The memory of a process is its own, and a run folder belongs to the run that saved a step in it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from backbone.io.console import UserError
from backbone.io.run_folder import SAVED, clear_failed_try, peak_memory, refuse_taken

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


@pytest.mark.parametrize("name", SAVED)
def test_a_folder_is_taken_by_what_was_saved_and_not_by_settings(tmp_path: Path, name: str) -> None:
    (tmp_path / "settings.json").write_text("{}")
    (tmp_path / "log.jsonl").write_text("{}")
    (tmp_path / "previews").mkdir()
    refuse_taken(tmp_path)
    clear_failed_try(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match="already holds a run"):
        refuse_taken(tmp_path)
