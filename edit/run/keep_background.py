"""`edit keep-background`: read an edit and its source, restore the background, write the result and its metrics."""

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
from edit.run.report import RECORD, REPORT, draw_difference

NOTICED = 0.05  # pixels of drift


def write_kept_background(
    source: SourceImage,
    edited: SourceImage,
    *,
    mask: SourceImage | None,
    align: bool,
    out: Path | None,
    typed: str,
) -> tuple[Path, list[str]]:
    """Write the run folder, and return it with the lines to print.

    Raises `UserError` for images of other shapes, a mask of another shape than the source's, equal images, and an edit
    that has no background left.
    """
    image = fit_to_source(source, edited)
    if image.tobytes() == source.image.tobytes():
        raise UserError(
            f"{edited.name} is {source.name}: nothing was edited. Name the image before and after."
        )

    # Restore the background outside the mask, or where the two do not differ
    fitted = None if mask is None else fit_mask(mask, source.image.size, source.image.size)
    changed = None if fitted is None else (mask_to_tensor(fitted)[0] >= 0.5).float()
    background = keep_background(to_tensor(image), to_tensor(source.image), changed=changed, align=align)
    lines = describe(background, source, edited)
    figures = measure(background, source)
    with ExitStack() as stack:
        default = Path("runs") / f"edit-{Path(source.name).stem}"
        folder, unfinished = stack.enter_context(fill_new_folder(out, default))
        result, edit_mask = to_image(background.image), mask_to_image(background.place, source.image.size)
        cells = [
            Cell(source.image, "source"),
            Cell(image, "as it was edited"),
            Cell(draw_difference(source.image, image), "differs from the source"),
            Cell(edit_mask, "where the edit stands"),
            Cell(result, "background kept"),
            Cell(draw_difference(source.image, result), "differs from the source"),
        ]
        page = draw_sheet([cells[:3], cells[3:]], title="background kept")
        save_png(unfinished / "kept.png", result)
        save_png(unfinished / "mask.png", edit_mask)
        save_png(unfinished / "sheet.png", page)
        files = {image.name: image.content for image in (source, edited, mask) if image is not None}
        record = {"command": "keep-background", "said": typed, "files": files, "align": align, **figures}
        write_json(unfinished / RECORD, {**record, "versions": package_versions()})
        parts = [image_figure(page, "source and edit, before and after"), *map(paragraph, lines)]
        parts += [heading("Figures"), table(("", ""), [(name, value) for name, value in figures.items()])]
        write_report(unfinished / REPORT, "background kept", [*parts, heading("Again"), command_block(typed)])
    return folder, lines


def fit_to_source(source: SourceImage, edited: SourceImage) -> Image.Image:
    """The edit in its source's size; `UserError` where it has another shape."""
    (width, height), (edited_width, edited_height) = source.image.size, edited.image.size
    if not is_same_shape((width, height), (edited_width, edited_height)):
        # In a run folder, the source at the size of its edits
        run_source = Path(edited.name).parent / "source.png"
        remedy = (
            f"Name {quote(run_source)} in its place, which was cropped as the edit was."
            if edited.name and run_source.is_file()
            else "Crop one as the other was cropped."
        )
        raise UserError(
            f"{edited.name} is {edited_width} × {edited_height} pixels and {source.name} {width} × {height}: other "
            f"shapes. {remedy}"
        )
    return (
        edited.image
        if (edited_width, edited_height) == (width, height)
        else crop_and_resize(edited.image, (width, height))
    )


def measure(background: KeptBackground, source: SourceImage) -> dict[str, float | None]:
    """Measure the figures of the record."""
    kept = background_metrics(to_tensor(source.image), background.image, (background.place > 0).float())
    return {
        **background.figures,
        "background_psnr_db_kept": kept["background_psnr_db"],
    }


def describe(background: KeptBackground, source: SourceImage, edited: SourceImage) -> list[str]:
    """Describe the result in sentences."""
    width, height = source.image.size
    registration = background.registration
    drift, share = registration.drift((height, width)), float((background.place > 0.5).float().mean())
    lines = [
        f"The edit stands in {share:.0%} of the image; the rest is {source.name} again, pixel for pixel."
        if background.place.any()
        else f"No place of {edited.name} differs enough to be an edit, so what is kept is {source.name} again. Paint "
        "where it stands, and say --mask PNG."
    ]
    if drift >= NOTICED:
        right, down = registration.shift
        lines.append(
            f"{edited.name} lay {right:+.2f} px to the right of it and {down:+.2f} px down, at scale "
            f"{registration.scale:.4f}: {drift:.1f} px at the corner that moved most. That is undone."
        )
    if background.tone.change:
        lines.append(
            f"Its colours were {50 * background.tone.change:.1f} % of their range off. That is undone too."
        )
    if background.drifted_psnr_db is not None and background.registered_psnr_db is not None:
        lines.append(
            f"Its background was {background.drifted_psnr_db:.1f} dB from the source's, "
            f"{background.registered_psnr_db:.1f} dB after registration."
        )
    return lines
