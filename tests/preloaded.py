"""Imported once by the server that `tests.commands` forks commands from: what is no module's import of its own."""

from PIL import Image

from backbone.families.registry import families

Image.init()  # every format that Pillow reads
list(families())
