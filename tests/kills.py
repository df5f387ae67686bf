"""Kills commands at random moments and goes on: what comes out is what a quiet run gives, or nothing.

    python -m tests.kills --kills 20 --seed 0              all campaigns, on tiny random models
    python -m tests.kills customize-train                  one of them

Each campaign strikes its command again and again, with SIGKILL, SIGTERM or SIGINT, resumes or repeats it upon what is
left there, and lets it end. Then every file that a quiet run writes is there, tensors, tables and pixels equal bit for
bit, no temporary file is left, and after no blow was there a file that cannot be read; SIGTERM and SIGINT leave no
temporary file either. A repeated command may find that the killed one had finished, and says so. The moments are drawn
from the time that a quiet run takes.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from tests.commands import TIMEOUT, Started

TAKEN = re.compile("is not empty|exists already")
BLOWS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
STOPPED = 130  # the exit status after SIGTERM and SIGINT
WHERE = ("--precision", "fp32", "--device", "cpu")
LORA = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Campaign:
    """A command, how it goes on after a kill, and the files that must come out equal.

    again   the words after a kill that left a checkpoint; the same command where None. `{out}` is its output
    equal   files below the output (or itself, ""; or patterns of several), tensors, tables and pixels compared
    served  it serves a page, to which edits are posted until it is struck
    """

    words: Sequence[str]
    equal: Sequence[str]
    again: Sequence[str] | None = None
    served: bool = False


def prepare(folder: Path) -> dict[str, Campaign]:
    """Writes a tiny model, images, pairs, an adapter; gives the campaigns."""
    import numpy as np
    from PIL import Image

    from tests.tiny import tiny_pipeline

    model = str(tiny_pipeline(folder / "model"))
    (folder / "images").mkdir()
    (folder / "pairs").mkdir()
    random = np.random.default_rng(0)
    for number in range(8):
        pixels = random.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / ("images" if number < 3 else "pairs") / f"{number}.png")
    prompts = ("a dog", "a cat", "a red dog", "the cat")
    rows = [
        {"prompt": prompts[n % 4], "chosen": f"{3 + n % 5}.png", "rejected": f"{3 + (n + 1) % 5}.png"}
        for n in range(8)
    ]
    (folder / "pairs" / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n")
    bright = (
        "import numpy\ndef score(images, prompts):\n    return [float(numpy.mean(one)) for one in images]\n"
    )
    (folder / "bright.py").write_text(bright)
    learn = ("--steps", "40", "--checkpointing-steps", "2", "--model", model, *WHERE)
    customize = ("customize", "train", "--images", "images", "--token", "[V]", "--class", "dog", *learn)
    for number in range(2):
        run([*customize, "--seed", str(number), "--out", f"adapter-{number}"], folder, "quiet-cache")
    prepare_maps_and_a_clip(folder)
    drawing = ("--condition", "sketch", "--images", "maps", "--batch", "2", "--sample-steps", "2")
    control = ("customize", "train-control", *drawing, "--evaluation-steps", "10", *learn)
    film = ("film.webp", "--source", "a dog", "--target", "a cat", "--motion", "motion", "--steps", "8")
    pairs = ("align", "train", "pairs/pairs.jsonl", *learn, "--evaluation-steps", "20")
    rounds = ("--rounds", "4", "--per-prompt", "2", "--sample-steps", "2")
    judged = ("--online", "bright.py", "--prompts", "prompts.txt", "--steps", "12", *rounds)
    online = ("align", "train", *judged, "--model", model, *WHERE)
    words = ("--source", "a dog", "--target", "a cat", "--steps", "20")
    edit = ("edit", "invert-and-replace", "images/0.png", *words)
    resume = ("--resume", "{out}")
    several = (
        "--prompts",
        "prompts.txt",
        "--count",
        "4",
        "--steps",
        "8",
        "--batch",
        "2",
        "--model",
        model,
        *WHERE,
    )
    again = ("customize", "export", "adapter-0", "--to", "diffusers", "--out", "one.safetensors")
    run(again, folder, "quiet-cache")
    return {
        "customize-train": Campaign((*customize, "--out", "{out}"), (LORA,), ("customize", "train", *resume)),
        "align-train-pairs": Campaign((*pairs, "--out", "{out}"), (LORA,), ("align", "train", *resume)),
        "align-train-online": Campaign(
            (*online, "--out", "{out}"), (LORA,), ("align", "train", "--online", "bright.py", *resume)
        ),
        "edit": Campaign(
            (*edit, "--model", model, *WHERE, "--out", "{out}"), ("inversion.safetensors", "edit_0.png")
        ),
        "export": Campaign(
            ("customize", "export", "adapter-0", "--out", "{out}.safetensors", "--to", "kohya"), ("",)
        ),
        "merge": Campaign(("customize", "merge", "adapter-0", "adapter-1", "--out", "{out}"), (LORA,)),
        "import": Campaign(
            ("customize", "import", "one.safetensors", "--model", model, "--out", "{out}"), (LORA,)
        ),
        "resize": Campaign(
            ("customize", "resize", "adapter-0", "--rank", "4", "--out", "{out}.safetensors"), ("",)
        ),
        "invert": Campaign(
            (
                *(
                    "edit",
                    "invert",
                    "images/0.png",
                    "--source",
                    "a dog",
                    "--steps",
                    "40",
                    "--model",
                    model,
                    *WHERE,
                ),
                *("--out", "{out}.safetensors"),
            ),
            ("",),
        ),
        "edit-count": Campaign(
            (
                *("edit", "sdedit", "images/0.png", "--prompt", "a cat", "--count", "10", "--steps", "20"),
                *("--model", model, *WHERE, "--out", "{out}"),
            ),
            ("edit_*.png", "sheet.png"),
        ),
        "instruct": Campaign(
            (
                *("edit", "instruct", "images/0.png", "--instruction", "make it red", "--then", "brighter"),
                *("--steps", "20", "--model", prepare_an_editor(folder), *WHERE, "--out", "{out}"),
            ),
            ("edit_*.png", "sheet.png"),
        ),
        "paint": Campaign(
            (
                *("edit", "paint", "images/0.png", "--source", "a dog", "--steps", "4", "--no-browser"),
                *("--model", model, *WHERE, "--out", "{out}"),
            ),
            (),
            served=True,
        ),
        "sample": Campaign(("customize", "sample", *several, "--out", "{out}"), ("p*.png", "sheet.png")),
        "align-sample": Campaign(("align", "sample", *several, "--out", "{out}"), ("pictures/*.png",)),
        "customize-prepare": Campaign(
            ("customize", "prepare", "--images", "pairs", "--model", model, *WHERE, "--out", "{out}"),
            ("*/*.arrow", "pictures/*"),
        ),
        "align-prepare": Campaign(
            ("align", "prepare", "pairs/pairs.jsonl", "--model", model, *WHERE, "--out", "{out}"),
            ("*/*.arrow",),
        ),
        "train-control": Campaign(
            (*control, "--out", "{out}"),
            ("t2i_adapter/diffusion_pytorch_model.safetensors",),
            ("customize", "train-control", *resume),
        ),
        "clip": Campaign(
            (
                *("customize", "clip", "prompts.txt", "--motion", "motion", "--frames", "4", "--steps", "8"),
                *("--count", "2", "--model", model, *WHERE, "--out", "{out}"),
            ),
            ("p*/*.png", "sheet.png"),
        ),
        "edit-clip": Campaign(
            ("edit", "clip", *film, "--model", model, *WHERE, "--out", "{out}"), ("inversion.safetensors",)
        ),
    }


def prepare_maps_and_a_clip(folder: Path) -> None:
    """Writes images with their maps, a clip, and a tiny motion adapter."""
    from PIL import Image, ImageDraw

    from tests.tiny import tiny_motion_adapter

    (folder / "maps" / "sketch").mkdir(parents=True)
    lines = []
    for number in range(8):
        colour = ("red", "blue")[number % 2]
        for place, paper, ink in (
            (f"{number}.png", "white", colour),
            (f"sketch/{number}.png", "black", "white"),
        ):
            image = Image.new("RGB", (32, 32), paper)
            ImageDraw.Draw(image).ellipse((4 + number, 4, 20 + number, 20), outline=ink, fill=paper)
            image.save(folder / "maps" / place)
        lines.append(
            {
                "file_name": f"{number}.png",
                "conditioning_image": f"sketch/{number}.png",
                "text": f"a {colour} disc",
            }
        )
    (folder / "maps" / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    with Image.open(folder / "pairs" / "3.png") as still:
        frames = [still.rotate(10 * number) for number in range(4)]
    frames[0].save(folder / "film.webp", save_all=True, append_images=frames[1:], duration=125, lossless=True)
    tiny_motion_adapter().save_pretrained(folder / "motion")


def prepare_an_editor(folder: Path) -> str:
    """A tiny model that edits by instruction."""
    from tests.tiny import tiny_instruct_pix2pix

    return str(tiny_instruct_pix2pix(folder / "editor"))


def run(
    words: Sequence[str],
    folder: Path,
    cache: str,
    after: float | None = None,
    blow: signal.Signals = signal.SIGKILL,
) -> tuple[int, float, str]:
    """Runs a command to its end, or strikes it `after` so many seconds; (exit status, seconds, what it said)."""
    began = time.monotonic()
    started = Started(*words, cwd=folder, OMP_NUM_THREADS="1", LIMNER_CACHE=str(folder / cache))
    while after is not None and started.poll() is None:
        if time.monotonic() - began >= after:
            started.send_signal(blow)
            break
        time.sleep(0.005)
    try:
        _, said = started.communicate(TIMEOUT)
    except subprocess.TimeoutExpired as killed:
        said = str(killed.stderr)
    status = started.returncode
    assert status is not None
    if after is None and status != 0:
        raise RuntimeError(f"{' '.join(words)} ended with {status}: {said}")
    return status, time.monotonic() - began, said


def fight(name: str, campaign: Campaign, folder: Path, *, kills: int, random: Random) -> Counter[str]:
    """Counts of kills, of what was done after them, and of faults, of one campaign."""
    counts: Counter[str] = Counter()
    quiet, struck, cache = f"{name}-quiet", f"{name}-struck", f"{name}-cache"
    _, seconds, _ = run(filled(campaign.words, quiet), folder, "quiet-cache")

    def go_on(after: float | None, blow: signal.Signals = signal.SIGKILL) -> tuple[int, str]:
        resumes = campaign.again is not None and (folder / struck / "checkpoint.safetensors").exists()
        counts["resumed"] += resumes
        words = campaign.again if resumes and campaign.again else campaign.words
        status, _, said = run(filled(words, struck), folder, cache, after=after, blow=blow)
        return status, said

    def end(status: int, said: str) -> None:
        """What ended by itself is the quiet run's; or it was already there, whole, and that was said."""
        if status == 0 or (status == 2 and campaign.again is None and TAKEN.search(said)):
            counts["found whole" if status else "ended first"] += 1
            counts["faults"] += complain(name, compare(folder, quiet, struck, campaign.equal))
        else:
            counts["faults"] += complain(name, [f"ended with {status}: {said[-2000:]}"])
        counts["faults"] += complain(name, left_behind(folder))
        remove(folder, struck, cache)

    while counts["kills"] < kills and counts["ended first"] < 3 * kills:
        blow, before = random.choice(BLOWS), set(left_behind(folder))  # by a SIGKILL, for the next writer
        status, said = go_on(random.uniform(0.02, 1.05) * seconds, blow)
        if is_early(status, said) or status in (-signal.SIGKILL, STOPPED):
            counts["kills"] += 1
            faults = unreadable(folder, struck)
            left = set(left_behind(folder)) - before if status == STOPPED else set()
            counts["faults"] += complain(name, [*faults, *sorted(left)])
        else:
            end(status, said)
    end(*go_on(TIMEOUT))
    return counts


def fight_page(name: str, campaign: Campaign, folder: Path, *, kills: int, random: Random) -> Counter[str]:
    """The same of a command that serves a page: its record, and all images that it names, are whole after any blow."""
    counts: Counter[str] = Counter()
    out = f"{name}-struck"
    for _ in range(kills):
        blow = random.choice(BLOWS)
        started = Started(*filled(campaign.words, out), cwd=folder, OMP_NUM_THREADS="1")
        ended, posting = threading.Event(), None
        if random.random() < 0.75:  # else before the page is there
            posting = threading.Thread(target=post_edits, args=(wait_for_address(started), ended))
            posting.start()
        time.sleep(random.uniform(0.0, 3.0))
        started.send_signal(blow)
        _, said = started.communicate(TIMEOUT)
        ended.set()
        if posting is not None:
            posting.join()
        counts["kills"] += 1
        faults = unreadable(folder, out)
        record = folder / out / "edits.json"
        for edit in json.loads(record.read_text())["edits"] if record.is_file() and not faults else ():
            counts["edits kept"] += 1
            faults += [
                f"{edit[one]} is missing"
                for one in ("file", "mask")
                if not (folder / out / edit[one]).is_file()
            ]
        if blow != signal.SIGKILL:
            faults += left_behind(folder)
            ends = (0, STOPPED)
            if not (
                (started.returncode in ends and "Traceback" not in said) or is_early(started.returncode, said)
            ):
                faults.append(f"ended with {started.returncode}: {said[-2000:]}")
        counts["faults"] += complain(name, faults)
        for left in folder.glob(f".{out}*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        remove(folder, out, f"{name}-cache")
    return counts


def wait_for_address(started: Started) -> str:
    """Where the page is that a command serves."""
    for _ in range(20 * TIMEOUT):
        if found := re.search(r"http://[\w.:/-]+/", started.said()):
            return found[0]
        if started.poll() is not None:
            break
        time.sleep(0.05)
    raise RuntimeError(f"no page is served: {started.said()}")


def post_edits(address: str, ended: threading.Event) -> None:
    """Posts edits one after the other, until there is no answer."""
    import base64
    import io

    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (64, 64)).save(stream, "PNG")
    painted = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
    body = json.dumps({"painted": painted, "source": "a dog", "target": "a cat"}).encode()
    while not ended.is_set():
        asked = urllib.request.Request(
            f"{address}edit", body, {"Content-Type": "application/json", "Origin": address.rsplit("/", 2)[0]}
        )
        try:
            with urllib.request.urlopen(asked, timeout=30) as answer:
                answer.read()
        except (OSError, http.client.HTTPException):
            return


def is_early(status: int | None, said: str) -> bool:
    """Whether a command was struck before it was there to hear it."""
    return status == -signal.SIGTERM or (status == 1 and said.rstrip().endswith("KeyboardInterrupt"))


def filled(words: Sequence[str], out: str) -> list[str]:
    return [word.replace("{out}", out) for word in words]


def left_behind(folder: Path) -> list[str]:
    """The temporary files and folders that are there."""
    left = [path for end in ("partial", "whole") for path in folder.rglob(f".*.{end}")]
    return [f"{path} was left behind" for path in left]


def unreadable(folder: Path, struck: str) -> list[str]:
    """What a kill left that is not whole, but for temporary files."""
    from PIL import Image

    from backbone.io.console import UserError
    from backbone.io.files import read_header, read_json

    found = []
    for path in [*(folder / struck).rglob("*"), folder / f"{struck}.safetensors"]:
        if path.suffix in (".json", ".safetensors") and path.is_file():
            try:
                read_header(path) if path.suffix == ".safetensors" else read_json(path)
            except UserError as error:
                found.append(str(error))
        elif path.suffix == ".png" and not path.name.startswith("."):
            try:
                with Image.open(path) as image:
                    image.load()
            except OSError as error:
                found.append(f"{path}: {error}")
    return found


def compare(folder: Path, quiet: str, struck: str, names: Sequence[str]) -> list[str]:
    """In what the struck run differs from the quiet one: the files that there are, tensors and pixels."""
    from PIL import Image, ImageChops

    from backbone.io.files import read_tensors

    one, other = (
        {str(path.relative_to(folder / out)) for path in (folder / out).rglob("*")} for out in (quiet, struck)
    )
    different = [f"{name} is in one of the two alone" for name in sorted(one ^ other)]
    every = [
        str(path.relative_to(folder / quiet))
        for name in names
        for path in sorted((folder / quiet).glob(name) if name else ())
    ]
    for name in every or [""]:
        first, second = (
            folder / out / name if name else folder / f"{out}.safetensors" for out in (quiet, struck)
        )
        if not second.exists():
            different.append(f"{second.name} is missing")
        elif first.suffix == ".png":
            with Image.open(first) as a, Image.open(second) as b:
                if ImageChops.difference(a.convert("RGB"), b.convert("RGB")).getbbox():
                    different.append(f"{name} differs from the quiet run's")
        elif first.suffix != ".safetensors":
            if first.read_bytes() != second.read_bytes():
                different.append(f"{name} differs from the quiet run's")
        else:
            tensors, others = read_tensors(first)[0], read_tensors(second)[0]
            if set(tensors) != set(others) or not all(tensors[key].equal(others[key]) for key in tensors):
                different.append(f"{name or 'its file'} differs from the quiet run's")
    return different


def remove(folder: Path, struck: str, cache: str) -> None:
    for name in (struck, cache):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / f"{struck}.safetensors").unlink(missing_ok=True)


def complain(name: str, faults: Sequence[str]) -> int:
    for fault in faults:
        print(f"{name}: {fault}", flush=True)
    return len(faults)


def main(arguments: list[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.kills")
    parser.add_argument("campaigns", nargs="*")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    faults = 0
    with TemporaryDirectory() as folder:
        for name, campaign in prepare(Path(folder)).items():
            if asked.campaigns and name not in asked.campaigns:
                continue
            random = Random(f"{asked.seed}/{name}")
            strike = fight_page if campaign.served else fight
            counts = strike(name, campaign, Path(folder), kills=asked.kills, random=random)
            faults += counts["faults"]
            said = ", ".join(f"{number} {what}" for what, number in counts.items())
            print(f"{name}: {said}", flush=True)
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
