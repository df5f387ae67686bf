"""Images with their prompts, as a notebook shows them."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from PIL import Image

from backbone.io.console import UserError
from backbone.media.sheet import Cell, draw_sheet, number_samples, split_rows


class Images(list[Image.Image]):
    """A list of images that remembers their `prompts` and shows itself as a contact sheet.

    After images are removed, added or reordered, each keeps its own prompt on the sheet; new ones have none.
    """

    def __init__(self, images: Iterable[Image.Image], prompts: Sequence[str], title: str = "") -> None:
        super().__init__(images)
        if len(self) != len(prompts):
            raise ValueError(f"{len(self)} images for {len(prompts)} prompts: one each is needed.")
        self.prompts, self.title = list(prompts), title
        self._originals = tuple(self)  # with these prompts, in this order

    def sheet(self, columns: int = 4) -> Image.Image:
        """A contact sheet, `columns` images a row, each above its prompt, and its number if the prompt has several."""
        if not isinstance(columns, int) or columns < 1:
            raise UserError(f"columns is {columns!r}; it is a whole number, at least 1.")
        if not self:
            raise UserError("There are no images to show. Draw some first.")
        captions = number_samples(self.prompts)
        if list(map(id, self)) != list(map(id, self._originals)):
            by_id = dict(zip(map(id, self._originals), captions, strict=False))
            captions = [by_id.get(id(image), "") for image in self]
        cells = [Cell(image, caption) for image, caption in zip(self, captions, strict=True)]
        return draw_sheet(split_rows(cells, columns), title=self.title)

    def __repr__(self) -> str:
        sizes = {image.size for image in self}
        size = " of " + " × ".join(map(str, sizes.pop())) if len(sizes) == 1 else ""
        return f"<{len(self)} images{size}: {', '.join(dict.fromkeys(self.prompts))[:80]}>"

    def _repr_png_(self) -> bytes | None:
        if not self:
            return None
        buffer = io.BytesIO()
        self.sheet().save(buffer, "PNG")
        return buffer.getvalue()
