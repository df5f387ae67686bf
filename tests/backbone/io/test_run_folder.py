"""The memory of a process is its own, and a run folder belongs to the run that saved a step in it."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from backbone.io.console import UserError, format_error
from backbone.io.files import append_jsonl
from backbone.io.run_folder import (
    SAVED,
    check_new_file,
    check_new_folder,
    clear_failed_try,
    hold_folder,
    hold_new_folder,
    name_beside,
    peak_memory,
    read_log,
    refuse_among_others,
    refuse_finished,
    refuse_taken,
    trim_log,
)

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


def test_a_run_that_is_the_working_folder_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dog").mkdir()
    monkeypatch.chdir(tmp_path / "dog")
    assert (
        name_beside(Path(), "-model")
        == name_beside(Path("../dog"), "-model").resolve()
        == tmp_path / "dog-model"
    )
    (tmp_path / "dog" / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "dog" / "inner")
    assert name_beside(Path(".."), "-model") == tmp_path / "dog-model"


def test_somebody_s_own_folder_is_neither_cleared_nor_written_into(tmp_path: Path) -> None:
    """`--out .`, and `--out "$OUT"` with a variable that was never set."""
    (tmp_path / "previews").mkdir()
    (tmp_path / "previews" / "mine.png").touch()
    with pytest.raises(UserError, match="would replace its previews"):
        refuse_taken(tmp_path)
    clear_failed_try(tmp_path)
    assert (tmp_path / "previews" / "mine.png").exists()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "notes.txt").touch()
    refuse_taken(tmp_path / "photos", [str(tmp_path)])
    with pytest.raises(UserError, match="holds what is learned from"):
        refuse_taken(tmp_path / "photos", ["", str(tmp_path / "previews" / ".." / "photos")])
    (tmp_path / "README.md").touch()
    with pytest.raises(UserError, match="is a file, not a folder"):
        refuse_taken(tmp_path / "README.md" / "run")


@pytest.mark.parametrize("name", ["dog.png", "DOG.JPG", "dog.webp"])
def test_a_run_is_not_written_among_somebody_s_images(tmp_path: Path, name: str) -> None:
    """Its sheet.png was learned as one of the subject's by the next run."""
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"holds images .{name}., and a run writes its own there"):
        refuse_taken(tmp_path)
    (tmp_path / "settings.json").write_text("{}")  # a run that failed
    refuse_taken(tmp_path)


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize(
    ("name", "is_folder"),
    [
        *((name, True) for name in ("sheet.png", "report.html", "README.md", "settings.json", "log.jsonl")),
        *((name, False) for name in ("best", "previews", "evaluations")),
    ],
)
def test_what_lies_where_a_run_writes_is_refused_before_it_trains(
    tmp_path: Path, name: str, is_folder: bool, stopped: bool
) -> None:
    """A folder that is called as one of its files was found when the training was over."""
    if stopped and name != "settings.json":
        (tmp_path / "settings.json").write_text("{}")
    (tmp_path / name).mkdir() if is_folder else (tmp_path / name).touch()
    with pytest.raises(
        UserError, match=f"{name} is a (file|folder), and a .*Move it away, or choose another --out"
    ):
        refuse_taken(tmp_path)
    with pytest.raises(UserError, match=f"{name} is a"), hold_folder(tmp_path):  # with --resume
        pass
    assert (tmp_path / name).exists()


def test_somebody_s_best_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "best").mkdir()
    with pytest.raises(UserError, match="would replace its best"):
        refuse_taken(tmp_path)


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


def test_a_folder_in_which_the_same_was_stopped_is_gone_on_with_and_no_other(tmp_path: Path) -> None:
    folder, what = tmp_path / "out", {"prompts": ("a dog",), "path": Path("dog")}

    def stop() -> None:
        with hold_new_folder(folder, folder, what) as held:
            (held / "p00.png").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    refuse_finished(folder)
    for other in (None, {**what, "prompts": ("a cat",)}):
        with pytest.raises(UserError, match=r"another command was writing|is not empty"):
            check_new_folder(folder, folder, other)
    with hold_new_folder(folder, folder, what) as held:
        assert (held / "p00.png").exists()
    assert [path.name for path in folder.iterdir()] == ["p00.png"]
    with pytest.raises(UserError, match="is not empty"):
        refuse_finished(folder)
    with pytest.raises(KeyError), hold_new_folder(tmp_path / "new", folder, what):
        raise KeyError  # nothing was written: nothing is left
    assert not (tmp_path / "new").exists()


@dataclass(frozen=True)
class Measured:
    """A line of a log, of which one number may be undefined."""

    step: int
    loss: float | None


def test_what_was_logged_up_to_a_checkpoint_outlives_a_second_stop(tmp_path: Path) -> None:
    """A number that is undefined too: as JSON's NaN, which no reader takes, its line would be lost the next time."""
    log = tmp_path / "evaluations.jsonl"
    assert read_log(log, Measured, done=3) == []
    for step, loss in ((0, math.nan), (2, 0.5), (4, 0.25)):
        append_jsonl(log, {"step": step, "loss": loss})
    kept = [Measured(0, None), Measured(2, 0.5)]
    assert read_log(log, Measured, done=3) == kept
    for _ in range(2):
        trim_log(log, 3)
        assert read_log(log, Measured, done=9) == kept


@pytest.mark.parametrize(
    ("files", "out", "said"),
    [
        (("concept.json",), "dog.safetensors", "the folder of a run"),
        (("checkpoint.safetensors",), "previews", "the folder of a run"),
        (("concept.json",), "evaluations/mine", "the folder of a run"),
        (("concept.json",), "dreambench", ""),  # a folder of its own inside of a run's
        (("model_index.json", "unet/config.json"), "unet/drawn", "a model"),
        (("model_index.json", "unet/config.json"), "unet/dog.safetensors", "a model"),
        (("model_index.json", "unet/config.json"), "drawn", ""),  # beside its parts
        (("prepared.json",), "drawn", "a folder of prepared data"),
        (("samples.json", "pictures/a.png"), "more", "a folder of align sample"),
        (("run.json", "sheet.png", "report.html"), "again/once", "the folder of an edit"),
        (("run.json",), "again", ""),
        (("dog.png",), "drawn", ""),
    ],
)
def test_nothing_is_written_among_what_somebody_else_made(
    files: tuple[str, ...], out: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "made"
    for name in files:
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text('{"unet": ["diffusers", "UNet2DConditionModel"]}')
    if said:
        with pytest.raises(UserError, match=rf"would lie in .*made, {said}.*outside of it"):
            refuse_among_others(made / out)
        monkeypatch.chdir(made)
    refuse_among_others(made / out)  # also where the user works in it


def as_somebody_else(monkeypatch: pytest.MonkeyPatch, closed: Path, mode: int) -> None:
    """Modes hold for who runs the tests as root too."""
    allowed = os.access
    monkeypatch.setattr(
        os, "access", lambda path, asked: not (Path(path) == closed and asked & mode) and allowed(path, asked)
    )


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_new_file(tmp_path / "made" / "later" / "dog.safetensors")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file, not a folder"):
        check_new_file(tmp_path / "file" / "dog.safetensors")
    as_somebody_else(monkeypatch, tmp_path, os.W_OK)
    with pytest.raises(UserError, match=r"is read-only\. Change its permissions, or choose another place"):
        check_new_file(tmp_path / "dog.safetensors")


def test_a_folder_that_may_not_be_entered_is_named_and_not_what_may_be_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in" / "below").mkdir(parents=True)
    as_somebody_else(monkeypatch, tmp_path / "in", os.X_OK)
    error = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "in" / "below" / "state.json"))
    assert str(format_error(error)).startswith(f"{tmp_path / 'in'} may not be entered (permission denied)")
