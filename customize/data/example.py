"""The packaged example: five images of one particular dog, which `moji` has never seen."""

from __future__ import annotations

from pathlib import Path

from backbone.io.files import empty_folder, write_bytes

EXAMPLE_FOLDER = Path(__file__).parents[1] / "examples" / "dog"


def write_example(folder: Path) -> list[Path]:
    """Copy the images into a folder that is new, empty, or already holds them; returns their paths."""
    sources = sorted(EXAMPLE_FOLDER.glob("*.png"))
    names = {source.name for source in sources}
    if not folder.is_dir() or {path.name for path in folder.iterdir()} - names:
        empty_folder(folder)
    for source in sources:
        write_bytes(folder / source.name, source.read_bytes())
    return [folder / source.name for source in sources]
