"""What a drawn image says of itself: its prompt and every setting, in A1111's form and as JSON.

    save_png(path, image, text=describe_drawing("a cat", image.size, {"steps": 25, "guidance": 4.0, "seed": 0}))

A1111, Forge, ComfyUI and galleries read the text `parameters`; `limner` holds the same as JSON. Folders are called by
their last name, so that an image that is passed on tells nothing of the disk that it was drawn on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backbone.io.written import written_path

NAMES = {  # of A1111, in its order
    "steps": "Steps",
    "sampler": "Sampler",
    "guidance": "CFG scale",
    "seed": "Seed",
    "size": "Size",
    "model": "Model",
    "strength": "Denoising strength",
}
SAMPLERS = {
    "ddim": "DDIM", "heun": "Heun", "dpmpp-2m": "DPM++ 2M", "unipc": "UniPC",
    "ancestral": "Euler a", "consistency": "LCM",
}  # fmt: skip


def describe_drawing(prompt: str, size: tuple[int, int], facts: Mapping[str, Any]) -> dict[str, str]:
    """The texts of a drawn image of `size` (width, height): `prompt`, `seed`, `sample`, `parameters` and `limner`.

    `facts` are its settings by our names; what is None or empty is left out.
    """
    known = {"size": f"{size[0]}x{size[1]}", **facts}
    if known.get("model"):
        known["model"] = last_name(str(known["model"]))
    known = {name: value for name, value in known.items() if value not in (None, "", (), [], {})}
    ordered = [*(name for name in NAMES if name in known), *(name for name in known if name not in NAMES)]
    said = [
        f"{NAMES.get(name, _title(name))}: {_value(name, known[name])}"
        for name in ordered
        if name != "negative"
    ]
    negative = [f"Negative prompt: {known['negative']}"] if "negative" in known else []
    texts: dict[str, str] = {name: str(known[name]) for name in ("seed", "sample") if name in known}
    parameters = "\n".join([prompt, *negative, ", ".join([*said, "Version: limner"])])
    whole = json.dumps({"prompt": prompt, **known}, ensure_ascii=False, default=str)
    return {"prompt": prompt, **texts, "parameters": parameters, "limner": whole}


def describe_concepts(folders: Sequence[str | Path], scale: float) -> dict[str, Any]:
    """The facts of the concepts that an image was drawn with: the names of their runs, and their strength."""
    if not folders:
        return {}
    return {"concepts": [last_name(str(folder)) for folder in folders], "scale": scale}


def last_name(place: str) -> str:
    """A folder's or a file's own name, for a run's best checkpoint the run's with it; anything else as it is."""
    path = written_path(place)
    if not path.exists():
        return place
    whole = path.resolve()
    return f"{whole.parent.name}/{whole.name}" if whole.name == "best" else whole.name


def _title(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _value(name: str, value: Any) -> str:
    """A value as A1111 writes it, in quotes where it holds what separates values."""
    if name == "sampler":
        return SAMPLERS.get(value, str(value))
    if isinstance(value, (list, tuple)):
        value = ", ".join(map(str, value))
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r"[,:\n\"]", text) else text
