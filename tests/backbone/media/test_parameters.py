"""What a drawn image says of itself."""

from __future__ import annotations

import json
import re
from pathlib import Path

from backbone.media.parameters import describe_concepts, describe_drawing

# As A1111 reads the last line (modules/infotext_utils.py)
A1111 = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def test_a1111_reads_what_is_written_and_json_says_all(tmp_path: Path) -> None:
    best = tmp_path / "dog, mine" / "best"
    best.mkdir(parents=True)
    facts = {
        "seed": 0,
        "sampler": "ancestral",
        "steps": 25,
        "guidance": 4.0,
        "negative": "red, blue",
        "model": str(tmp_path),
    }
    facts |= describe_concepts([best], 0.7) | {"sample": 3, "width": None, "redraw": 0.0}
    texts = describe_drawing("a cat: with, commas", (128, 64), facts)
    prompt, negative, last = texts["parameters"].split("\n")
    assert (prompt, negative) == ("a cat: with, commas", "Negative prompt: red, blue")
    read = {
        name: json.loads(value) if value.startswith('"') else value for name, value in A1111.findall(last)
    }
    assert read == {
        "Steps": "25", "Sampler": "Euler a", "CFG scale": "4", "Seed": "0", "Size": "128x64", "Model": tmp_path.name,
        "Concepts": "dog, mine/best", "Scale": "0.7", "Sample": "3", "Redraw": "0", "Version": "limner",
    }  # fmt: skip
    assert list(read)[:6] == ["Steps", "Sampler", "CFG scale", "Seed", "Size", "Model"]
    whole = json.loads(texts["limner"])
    assert (whole["prompt"], whole["concepts"], whole["negative"]) == (
        prompt,
        ["dog, mine/best"],
        "red, blue",
    )
    assert (texts["prompt"], texts["seed"], texts["sample"]) == (prompt, "0", "3")
    assert str(tmp_path) not in str(texts)
