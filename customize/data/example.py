"""The packaged example: five pictures of one particular dog, which `moji` has never seen, and what else can be tried.

`FOLDER/example/` lies beside the pictures, where no command takes it for pictures of the subject: a scene to edit with
its prompt, prompts to draw and choose from, and prompts that are held out.
"""

from __future__ import annotations

from pathlib import Path

from backbone.io.files import make_empty_folder, write_bytes

PICTURES = Path(__file__).parents[1] / "examples" / "dog"
EXTRAS = "example"


def write_example(folder: Path) -> tuple[list[Path], list[Path]]:
    """Writes the example into a folder that is new, empty, or already holds it; gives the pictures and the extras."""
    pictures = {folder / source.name: source for source in sorted(PICTURES.glob("*.png"))}
    extras = {
        folder / EXTRAS / source.name: source
        for source in sorted(PICTURES.with_name("extras").iterdir())
        if source.suffix in (".png", ".txt")
    }
    files = {**pictures, **extras}
    if not folder.is_dir() or {path for path in folder.rglob("*") if path.is_file()} - files.keys():
        make_empty_folder(folder)
    for path, source in files.items():
        write_bytes(path, source.read_bytes())
    return list(pictures), list(extras)
