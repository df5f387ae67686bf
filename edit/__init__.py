"""Changes what the words say of a picture and nothing else: inversion, prompt-to-prompt, SDEdit.

    import edit
    from backbone.models.model import Backbone

    inversion = edit.invert(Backbone.open("moji"), "cat.png", "a cat in a park")
    edited = edit.replace(inversion, "a dog in a park")
    edited.pictures[0].save("dog.png")

The names load what they need when they are first used, so that `edit --help` imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "Inversion": "edit.inversion.inversion",
    "invert": "edit.inversion.inversion",
    "read_inversion": "edit.inversion.inversion",
    "replayed": "edit.inversion.inversion",
    "Drawn": "edit.methods.sdedit",
    "Edited": "edit.methods.prompt_to_prompt.edit",
    "PRESETS": "edit.methods.prompt_to_prompt.settings",
    "Settings": "edit.methods.prompt_to_prompt.settings",
    "replace": "edit.methods.prompt_to_prompt.edit",
    "sdedit": "edit.methods.sdedit",
    "flow_edit": "edit.methods.flow_edit",
    "remove": "edit.methods.remove",
    "compose": "edit.methods.compose",
    "interpolate": "edit.methods.interpolate",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from backbone import __version__

        return __version__
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
