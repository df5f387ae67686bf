"""Two machines, as `recipes/accelerate/machines.yaml` has them, played by two processes of different host names."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from align.pairs.prepared import IMAGES, Prepared
from backbone.adapters.lora import LORA_WEIGHTS
from backbone.data.table import Table
from backbone.io.files import read_tensors
from backbone.models.cache import VARIABLE
from backbone.training.prepared import RECORDS
from tests.align.conftest import PROMPTS, picture, write_lines

ROOT = Path(__file__).parents[2]


NAMED = """
echo 127.0.0.1 localhost $0 > hosts-$0 && mount --bind hosts-$0 /etc/hosts && hostname $0 && exec "$@"
"""  # a host name of its own, which it can look up


def on_two_machines(folder: Path, *arguments: object, hosts: bool) -> list[str]:
    """Runs `align` on both; gives what each said. The rendezvous is torchrun's, at the first one's address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(2):
        launch = [
            *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"),
            *("--config_file", ROOT / "recipes/accelerate/machines.yaml", "--machine_rank", rank),
            *("--num_processes", 2, "--main_process_ip", "127.0.0.1", "--main_process_port", port),
            *("-m", "align.cli", *arguments, "--device", "cpu"),
        ]
        words = list(map(str, launch))
        if hosts:
            words = ["unshare", "--uts", "--mount", "sh", "-c", NAMED, f"machine-{rank}", *words]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environment |= {VARIABLE: str(folder / "cache"), "GLOO_SOCKET_IFNAME": "lo"}
        running.append(
            subprocess.Popen(words, cwd=folder, env=environment, text=True, stderr=subprocess.PIPE)
        )
    said = [process.communicate(timeout=300)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    return said


def alone(folder: Path, *arguments: object) -> None:
    words = [sys.executable, "-m", "align.cli", *map(str, arguments), "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment[VARIABLE] = str(folder / "cache of one")
    done = subprocess.run(words, cwd=folder, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def can_rename_hosts() -> bool:
    """Whether a process may have a host name of its own here."""
    tool = shutil.which("unshare")
    alone = "hostname other && mount --bind /etc/hosts /etc/hosts"
    words = [tool or "", "--uts", "--mount", "sh", "-c", alone]
    return tool is not None and subprocess.run(words, capture_output=True).returncode == 0


@pytest.mark.slow
def test_two_machines_share_a_preparation_and_learn_from_it_what_one_does(
    tmp_path: Path, tiny_folder: Path
) -> None:
    rows: list[dict[str, object]] = []
    for number in range(40):
        for side in range(2):
            picture(2 * number + side).save(tmp_path / f"{2 * number + side}.png")
        names = {"chosen": f"{2 * number}.png", "rejected": f"{2 * number + 1}.png"}
        rows.append({"prompt": PROMPTS[number % 4], **names})
    source = write_lines(tmp_path / "pairs.jsonl", rows)
    model = ("--model", tiny_folder, "--precision", "fp32")
    hosts = can_rename_hosts()

    prepared = ("prepare", source, "--any-model", *model, "--out")
    said = on_two_machines(tmp_path, *prepared, "two", hosts=hosts)
    alone(tmp_path, *prepared, "one")
    assert sum("40 pairs of 4 prompts" in one for one in said) == 1, "one of them speaks"
    one, two = (Prepared(tmp_path / name) for name in ("one", "two"))
    assert len(list((tmp_path / "two" / RECORDS).glob("*.arrow"))) == 2, "each wrote its share"
    images = [Table(folder.folder / IMAGES) for folder in (one, two)]
    assert [len(table) for table in images] == [80, 80], "and nothing twice"
    first, second = (
        table.column("mean")[folder.select(by_pairs=True, ties=False).find_rows(table)]
        for folder, table in zip((one, two), images, strict=True)
    )
    assert torch.equal(first, second)

    train = (
        "--batch",
        4,
        "--micro-batch",
        2,
        "--steps",
        3,
        "--rank",
        2,
        "--draws",
        2,
        "--evaluation-draws",
        1,
    )
    on_two_machines(tmp_path, "train", "two", "--out", "run-two", *model, *train, hosts=hosts)
    alone(tmp_path, "train", "one", "--out", "run-one", *model, *train)
    ours, theirs = (read_tensors(tmp_path / run / LORA_WEIGHTS)[0] for run in ("run-one", "run-two"))
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-5
