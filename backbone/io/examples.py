"""Files to try the commands with: a scene to edit with its prompt, prompts, held-out prompts, a scorer."""

from __future__ import annotations

from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"
SCENE = ("scene.png", "scene.txt")  # an image, and what it shows


def example_files() -> list[Path]:
    """All of these files, sorted."""
    return sorted(path for path in EXAMPLES.iterdir() if path.suffix in (".png", ".txt", ".py"))
