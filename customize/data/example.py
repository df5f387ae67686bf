"""The packaged example: five images of one particular dog, which `moji` has never seen, and files for other commands.

`FOLDER/example/`, which no command takes for images of the subject, holds a scene to edit with its prompt, prompts to
sample and choose from, held-out prompts, and a scorer that prefers warm colours.
"""

from __future__ import annotations

from pathlib import Path

from backbone.io.examples import example_files
from backbone.io.files import make_empty_folder, write_bytes

EXAMPLE_FOLDER = Path(__file__).parents[1] / "examples" / "dog"
EXTRAS = "example"


def write_example(folder: Path) -> tuple[list[Path], list[Path]]:
    """Copy the example into a folder that is new, empty, or already holds it; returns its images and its extras.

    Each image has a caption file, which says where the dog stands, so that the place is not learned with it.
    """
    images = {folder / source.name: source for source in sorted(EXAMPLE_FOLDER.glob("*.png"))}
    captions = {folder / source.name: source for source in EXAMPLE_FOLDER.glob("*.txt")}
    extras = {folder / EXTRAS / source.name: source for source in example_files()}
    files = {**images, **captions, **extras}
    if not folder.is_dir() or {path for path in folder.rglob("*") if path.is_file()} - files.keys():
        make_empty_folder(folder)
    for path, source in files.items():
        write_bytes(path, source.read_bytes())
    return list(images), list(extras)
