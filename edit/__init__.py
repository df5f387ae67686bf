"""Changes what the words say of an image and nothing else: inversion, prompt-to-prompt, SDEdit.

    import edit
    from backbone.models.model import Backbone

    inversion = edit.invert(Backbone.open("moji"), "cat.png", "a cat in a park")
    result = edit.replace(inversion, "a dog in a park", edit.ReplaceSettings(keep=["park"]))
    result.images[0].save("dog.png")

The names load what they need when they are first used, so that `edit --help` imports no torch.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from backbone.cli.lazy import export_lazily

if TYPE_CHECKING:
    from edit.inversion.inversion import Inversion, invert, read_inversion, reconstruct
    from edit.methods.compose import compose
    from edit.methods.flow_edit import flow_edit
    from edit.methods.instruct import instruct
    from edit.methods.interpolate import interpolate
    from edit.methods.keep_background import keep_background
    from edit.methods.prompt_to_prompt.replace import replace
    from edit.methods.prompt_to_prompt.settings import PRESETS, ReplaceSettings
    from edit.methods.remove import remove
    from edit.methods.sdedit import sdedit
    from edit.result import Result

    __version__: str

__all__ = [
    "PRESETS",
    "Inversion",
    "ReplaceSettings",
    "Result",
    "compose",
    "flow_edit",
    "instruct",
    "interpolate",
    "invert",
    "keep_background",
    "read_inversion",
    "reconstruct",
    "remove",
    "replace",
    "sdedit",
]

_MODULES = {
    "edit.inversion.inversion": ("Inversion", "invert", "read_inversion", "reconstruct"),
    "edit.methods.compose": ("compose",),
    "edit.methods.flow_edit": ("flow_edit",),
    "edit.methods.instruct": ("instruct",),
    "edit.methods.interpolate": ("interpolate",),
    "edit.methods.keep_background": ("keep_background",),
    "edit.methods.prompt_to_prompt.replace": ("replace",),
    "edit.methods.prompt_to_prompt.settings": ("PRESETS", "ReplaceSettings"),
    "edit.methods.remove": ("remove",),
    "edit.methods.sdedit": ("sdedit",),
    "edit.result": ("Result",),
}

# Flags of the commands whose keyword, or field of `ReplaceSettings`, has another name
_FLAGS = {
    "self": "self_attention",
    "window": "windows",
    "reweight": "weights",
    "swap": "swaps",
    "heatmap": "heatmaps",
    "reference": "references",
    **{name: name for name in ("cross", "blend", "keep", "features", "threshold", "strength", "method")},
    **{name: name for name in ("guidance", "negative", "mask", "frames")},
}
# An edit changes the attention of its model while it runs
__getattr__, __dir__ = export_lazily(__name__, _MODULES, flags=_FLAGS, lock=threading.RLock())
