"""The metadata of a drawn image: its prompt and every setting, in A1111's form and as JSON.

    save_png(path, image, text=describe_drawing("a cat", image.size, {"steps": 25, "guidance": 4.0, "seed": 0}))

A1111, Forge, ComfyUI and galleries read the text `parameters`; `limner` holds the same as JSON. Folders are named by
their last part, so that a shared image tells nothing of the disk on which it was drawn.
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

    `facts` are its settings by our names; None and empty values are left out.
    """
    values = {"size": f"{size[0]}x{size[1]}", **facts}
    if values.get("model"):
        values["model"] = last_name(str(values["model"]))
    values = {name: value for name, value in values.items() if value not in (None, "", (), [], {})}
    ordered = [*(name for name in NAMES if name in values), *(name for name in values if name not in NAMES)]
    fields = [
        f"{NAMES.get(name, _capitalize(name))}: {_format_value(name, values[name])}"
        for name in ordered
        if name != "negative"
    ]
    negative = [f"Negative prompt: {values['negative']}"] if "negative" in values else []
    texts: dict[str, str] = {name: str(values[name]) for name in ("seed", "sample") if name in values}
    parameters = "\n".join([prompt, *negative, ", ".join([*fields, "Version: limner"])])
    record = json.dumps({"prompt": prompt, **values}, ensure_ascii=False, default=str)
    return {"prompt": prompt, **texts, "parameters": parameters, "limner": record}


def describe_concepts(folders: Sequence[str | Path], scale: float) -> dict[str, Any]:
    """The facts of an image's concepts: the names of their runs, and their strength."""
    if not folders:
        return {}
    return {"concepts": [last_name(str(folder)) for folder in folders], "scale": scale}


def last_name(name: str) -> str:
    """A folder's or a file's own name, for a run's best checkpoint with the run's; any other name unchanged."""
    path = written_path(name)
    if not path.exists():
        return name
    resolved = path.resolve()
    return f"{resolved.parent.name}/{resolved.name}" if resolved.name == "best" else resolved.name


def _capitalize(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _format_value(name: str, value: Any) -> str:
    """A value as A1111 writes it, in quotes if it contains a separator."""
    if name == "sampler":
        return SAMPLERS.get(value, str(value))
    if isinstance(value, (list, tuple)):
        value = ", ".join(map(str, value))
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r"[,:\n\"]", text) else text
