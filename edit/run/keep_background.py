"""`edit keep-background`: an edit and its source read, the background put back, and what was found written."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from PIL import Image

from backbone.evaluation.image_metrics import background_metrics
from backbone.io.console import UserError, quote
from backbone.io.files import write_json
from backbone.io.report import command_block, heading, image_figure, paragraph, table, write_report
from backbone.io.run_folder import fill_new_folder, package_versions
from backbone.media.shapes import is_same_shape
from backbone.media.sheet import Cell, draw_sheet, save_png
from backbone.media.transforms import crop_and_resize, mask_to_tensor, to_image, to_tensor
from edit.masks import fit_mask, mask_to_image
from edit.methods.keep_background import KeptBackground, keep_background
from edit.pictures import SourceImage
from edit.run.report import RECORD, REPORT, difference

NOTICED = 0.05  # pixels of drift


def write_kept_background(
    source: SourceImage,
    edited: SourceImage,
    *,
    mask: SourceImage | None,
    align: bool,
    out: Path | None,
    said: str,
) -> tuple[Path, list[str]]:
    """Write the run folder, and return it with lines that say what was found.

    Raises `UserError` for images of other shapes, a mask of another shape than the source's, equal images, and an edit
    that has no background left.
    """
    image = fit_to_source(source, edited)
    if image.tobytes() == source.image.tobytes():
        raise UserError(
            f"{edited.name} is {source.name}: nothing was edited. Name the image before and after."
        )

    # The background put back, where a mask says or where the two differ
    drawn = None if mask is None else fit_mask(mask, source.image.size, source.image.size)
    changed = None if drawn is None else (mask_to_tensor(drawn)[0] >= 0.5).float()
    kept = keep_background(to_tensor(image), to_tensor(source.image), changed=changed, align=align)
    lines = describe(kept, source, edited)
    figures = measure(kept, source)
    with ExitStack() as stack:
        default = Path("runs") / f"edit-{Path(source.name).stem}"
        folder, unfinished = stack.enter_context(fill_new_folder(out, default))
        result, place = to_image(kept.image), mask_to_image(kept.place, source.image.size)
        cells = [
            Cell(source.image, "source"),
            Cell(image, "as it was edited"),
            Cell(difference(source.image, image), "differs from the source"),
            Cell(place, "where the edit stands"),
            Cell(result, "background kept"),
            Cell(difference(source.image, result), "differs from the source"),
        ]
        page = draw_sheet([cells[:3], cells[3:]], title="background kept")
        save_png(unfinished / "kept.png", result)
        save_png(unfinished / "mask.png", place)
        save_png(unfinished / "sheet.png", page)
        files = {one.name: one.content for one in (source, edited, mask) if one is not None}
        record = {"command": "keep-background", "said": said, "files": files, "align": align, **figures}
        write_json(unfinished / RECORD, {**record, "versions": package_versions()})
        parts = [image_figure(page, "source and edit, before and after"), *map(paragraph, lines)]
        parts += [heading("Figures"), table(("", ""), [(name, value) for name, value in figures.items()])]
        write_report(unfinished / REPORT, "background kept", [*parts, heading("Again"), command_block(said)])
    return folder, lines


def fit_to_source(source: SourceImage, edited: SourceImage) -> Image.Image:
    """The edit in its source's size; `UserError` where it has another shape."""
    (width, height), (wide, high) = source.image.size, edited.image.size
    if not is_same_shape((width, height), (wide, high)):
        shown = (
            Path(edited.name).parent / "source.png"
        )  # of a run folder: the source as the model was shown it
        remedy = (
            f"Name {quote(shown)} in its place, which was cropped as the edit was."
            if edited.name and shown.is_file()
            else "Crop one as the other was cropped."
        )
        raise UserError(
            f"{edited.name} is {wide} × {high} pixels and {source.name} {width} × {height}: other shapes. {remedy}"
        )
    return edited.image if (wide, high) == (width, height) else crop_and_resize(edited.image, (width, height))


def measure(kept: KeptBackground, source: SourceImage) -> dict[str, float | None]:
    """The figures of the record."""
    after = background_metrics(to_tensor(source.image), kept.image, (kept.place > 0).float())
    return {
        **kept.figures,
        "background_psnr_db_kept": after["background_psnr_db"],
    }


def describe(kept: KeptBackground, source: SourceImage, edited: SourceImage) -> list[str]:
    """What was found, in sentences."""
    width, height = source.image.size
    found = kept.registration
    drift, share = found.drift((height, width)), float((kept.place > 0.5).float().mean())
    lines = [
        f"The edit stands in {share:.0%} of the image; the rest is {source.name} again, pixel for pixel."
        if kept.place.any()
        else f"No place of {edited.name} differs enough to be an edit, so what is kept is {source.name} again. Paint "
        "where it stands, and say --mask PNG."
    ]
    if drift >= NOTICED:
        right, down = found.shift
        lines.append(
            f"{edited.name} lay {right:+.2f} px to the right of it and {down:+.2f} px down, at scale "
            f"{found.scale:.4f}: {drift:.1f} px at the corner that moved most. That is undone."
        )
    if kept.tone.change:
        lines.append(
            f"Its colours were {50 * kept.tone.change:.1f} % of their range off. That is undone too."
        )
    if kept.drifted_psnr_db is not None and kept.registered_psnr_db is not None:
        lines.append(
            f"Its background was {kept.drifted_psnr_db:.1f} dB from the source's, {kept.registered_psnr_db:.1f} dB "
            "after registration."
        )
    return lines
