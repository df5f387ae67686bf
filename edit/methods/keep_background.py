"""Restoring an edit's background exactly, whatever made the edit: register it, find the changed region, copy the rest.

    kept = keep_background(edited, source)         # both [3, H, W] in −1…1
    kept.image, kept.place, kept.registration.shift, kept.drifted_psnr_db

Models that edit by instruction redraw the whole picture: it shifts, scales, changes its tone, and degrades from edit to
edit. The background is known exactly, from the source. So the edit is registered to it (`backbone.media.registration`),
a small global change of tone is undone, the changed region is found where the two still differ, and everything else is
replaced by the source.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from backbone.evaluation.image_metrics import background_metrics
from backbone.io.console import UserError
from backbone.media.registration import TOLERANCE, Registration, Tone, match_tone, register_to_source, undo

SEEDS = 0.35  # on the scale 0…1: pixels that differ by this much have changed …
GROWN = 0.12  # … and so have connected pixels that differ by this much
SPECK = 4e-4  # share of the pixels below which a region is an editor's noise
LEFT = 0.15  # least share of the pixels that must equal the source's for a background
TONED = 0.05  # least share of the pixels that must agree by another tone …
MOST_TONE = 0.2  # … which changes colours by at most this, on the scale 0…1 …
GAINS = (0.75, 1.35)  # … and contrast within these bounds: a larger change was intended
NO_TONE = Tone()
LOOKED_AT = 512  # pixels of the longer side at which the changed region is found


FIGURES = (
    "drift_px",
    "drift_percent",  # of the longer side
    "shift_right_px",
    "shift_down_px",
    "scale",
    "tone_percent",  # of the range of a channel
    "changed_share",
    "background_psnr_db_as_edited",
    "background_psnr_db_registered",
)


class NoBackgroundError(UserError):
    """Raised for an edit that agrees with its source nearly nowhere."""


@dataclass(frozen=True, eq=False)
class KeptBackground:
    """An edit with its source's background.

    image              [3, H, W], the edit in the place that changed and the source elsewhere
    place              [H, W], 1 where the edit stands, 0 where the source does, between them at the seam
    registration       the edit's position relative to the source
    drifted_psnr_db    of the background as the editor left it, against the source
    registered_psnr_db the same after the drift was undone: the rest is redrawing
    tone               the change of its colours that was undone
    """

    image: Tensor
    place: Tensor
    registration: Registration
    drifted_psnr_db: float | None
    registered_psnr_db: float | None
    tone: Tone = NO_TONE

    @classmethod
    def without_background(cls, edited: Tensor) -> KeptBackground:
        """An edit as it is, where all of the image has changed."""
        return cls(edited, torch.ones_like(edited[0]), Registration(), None, None)

    @property
    def is_whole(self) -> bool:
        """Whether the edit is all of the image, so that it has no background."""
        return bool((self.place >= 1).all())

    @property
    def changed_share(self) -> float:
        """Share of the image that the edit takes."""
        return float((self.place > 0.5).float().mean())

    @property
    def figures(self) -> dict[str, float | None]:
        """The measurements for a record; None for drift and background if all of the image has changed."""
        if self.is_whole:
            return {**dict.fromkeys(FIGURES), "changed_share": 1.0}
        right, down = self.registration.shift
        height, width = self.place.shape
        drift = self.registration.drift((height, width))
        values = (
            round(drift, 3),
            round(100 * drift / max(height, width), 3),
            round(right, 3),
            round(down, 3),
            round(self.registration.scale, 5),
            round(50 * self.tone.change, 2),
            round(self.changed_share, 4),
            self.drifted_psnr_db,
            self.registered_psnr_db,
        )
        return dict(zip(FIGURES, values, strict=True))


def keep_background(
    edited: Tensor,
    source: Tensor,
    *,
    changed: Tensor | None = None,
    background: Tensor | None = None,
    align: bool = True,
) -> KeptBackground:
    """Put the background of a source [3, H, W] back into an edit of it, of the same size, values in −1…1.

    changed     [H, W], 1 where the edit was meant to change something, if that is known
    background  what stands outside the changed region instead of the source itself: its copy by an autoencoder
    align       whether a global drift, in position and tone, is looked for and undone

    Raises `NoBackgroundError` where nearly everything has changed, and `UserError` for what are no such tensors.
    """
    _refuse_misfits(source, edited=edited, changed=changed, background=background)

    # Undo the global drift: position, tone, and position again
    registration = register_to_source(edited, source, changed=changed) if align else Registration()
    aligned, tone = undo(edited, registration, beyond=source), NO_TONE
    if align:
        tone = find_tone(aligned, source, changed)
    if tone != NO_TONE:  # with equal colours the registration is more precise
        tone_corrected = tone.undo(edited)
        registration = register_to_source(tone_corrected, source, changed=changed)
        aligned = undo(tone_corrected, registration, beyond=source)

    # The changed region, at LOOKED_AT pixels
    small = [shrink_to(picture, LOOKED_AT) for picture in (aligned, source)]
    changed_region = (
        find_change(*small) if changed is None else (shrink_to(changed[None], LOOKED_AT)[0] > 0.5).to(source)
    )
    agree = measure_agreement(small[0], small[1])
    if changed is None and (agree < LEFT or bool(changed_region.all())):
        raise NoBackgroundError(
            f"The edit agrees with the image before it in {agree:.0%} of its pixels, so there is no background to "
            "keep. Paint where it may change, and say --mask PNG."
        )

    # Edit inside, source outside, with a soft border
    size = source.shape[-2:]
    soft = F.interpolate(feather(changed_region)[None, None], size, mode="bilinear", align_corners=False)[
        0, 0
    ]
    outside = source if background is None else background
    hard = (soft > 0).to(source)
    return KeptBackground(
        torch.where(soft > 0, soft * aligned + (1 - soft) * outside, outside),
        soft,
        registration,
        background_metrics(source, edited, hard)["background_psnr_db"],
        background_metrics(source, aligned, hard)["background_psnr_db"],
        tone,
    )


def _refuse_misfits(source: Tensor, **tensors: Tensor | None) -> None:
    """`UserError` unless these are tensors of an image's shape [3, H, W] or a region's [H, W], and of one size."""
    for name, tensor in {"source": source, **tensors}.items():
        expected = "[H, W]" if name == "changed" else "[3, H, W]"
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor) or tensor.ndim != expected.count(",") + 1:
            actual = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise UserError(
                f"{name} is a tensor {expected}, and not {actual}. backbone.media.transforms.to_tensor makes one of "
                "a PIL image."
            )
        if tensor.shape[-2:] != source.shape[-2:]:
            sizes = (" × ".join(map(str, reversed(image.shape[-2:]))) for image in (tensor, source))
            raise UserError(
                "{} is {} pixels, and the source {}. Resize one to the other.".format(name, *sizes)
            )


def find_tone(aligned: Tensor, source: Tensor, changed: Tensor | None) -> Tone:
    """The unintended change of tone of a registered edit [3, H, W]; NO_TONE where there is none or it is unclear.

    It is small, more of the image agrees without it, and it is not the whole edit: if nothing else differs from the
    source, the tone was the edit (“make it brighter”).
    """
    small = [shrink_to(picture, LOOKED_AT) for picture in (aligned, source)]
    changed_small = None if changed is None else shrink_to(changed[None], LOOKED_AT)[0]
    tone = match_tone(*small, changed=changed_small)
    if tone.change > MOST_TONE or not all(GAINS[0] <= gain <= GAINS[1] for gain in tone.gain):
        return NO_TONE

    # More must agree with the tone undone, and something must still differ
    tone_corrected = tone.undo(small[0])
    agreement_gain = measure_agreement(tone_corrected, small[1], changed_small) - measure_agreement(
        small[0], small[1], changed_small
    )
    is_whole_edit = changed_small is None and not bool(find_change(tone_corrected, small[1]).any())
    return tone if agreement_gain >= TONED and not is_whole_edit else NO_TONE


def measure_agreement(edited: Tensor, source: Tensor, changed: Tensor | None = None) -> float:
    """The share of the pixels outside of `changed` whose colours agree in two pictures [3, H, W]."""
    agree = (edited - source).abs().amax(0) < 2 * TOLERANCE
    outside = torch.ones_like(agree) if changed is None else changed <= 0.5
    return float(agree[outside].float().mean())


def shrink_to(picture: Tensor, side: int) -> Tensor:
    """Scale a picture [C, H, W] down, if need be, to a longer side of this many pixels."""
    longest = max(picture.shape[-2:])
    if longest <= side:
        return picture
    size = [max(1, round(length * side / longest)) for length in picture.shape[-2:]]
    return F.interpolate(picture[None], size, mode="area")[0]


def find_change(edited: Tensor, source: Tensor) -> Tensor:
    """Where two registered pictures [3, H, W] differ by more than redrawing does [H, W], 0 or 1.

    Hysteresis (Canny 1986): pixels that differ strongly, and connected ones that differ weakly; holes are filled,
    specks dropped, and a margin is added for shadows and soft edges.
    """
    unit = max(source.shape[-2:]) / 128
    difference = blur((edited - source).abs().amax(0) / 2, 0.8 * unit)
    # An editor redraws everything a little: the typical difference is no change
    usual = min(3 * float(difference.median()), GROWN)

    # Seeds grow through weaker differences
    seeds, grown = (difference > limit + usual for limit in (SEEDS / 2, GROWN / 2))
    filled = fill_holes(drop_specks(flood_fill(seeds, grown), round(SPECK * difference.numel())))
    return grow(filled, round(1.5 * unit)).to(source)


def flood_fill(seeds: Tensor, allowed: Tensor) -> Tensor:
    """The part of `allowed` [H, W] that is connected to seeds, grown pixel by pixel until nothing is added."""
    connected = seeds & allowed
    while True:
        grown = grow(connected, 1) & allowed
        if torch.equal(grown, connected):
            return connected
        connected = grown


def fill_holes(mask: Tensor) -> Tensor:
    """The mask [H, W] with its holes filled."""
    border = torch.zeros_like(mask)
    border[0], border[-1], border[:, 0], border[:, -1] = True, True, True, True
    return ~flood_fill(border & ~mask, ~mask)


def drop_specks(mask: Tensor, least: int) -> Tensor:
    """The mask [H, W] without connected parts of fewer than `least` pixels."""
    remaining, large_parts = mask.clone(), torch.zeros_like(mask)
    while bool(remaining.any()):
        seed = torch.zeros_like(mask)
        seed.view(-1)[int(remaining.flatten().int().argmax())] = True
        part = flood_fill(seed, remaining)
        if int(part.sum()) >= least:
            large_parts |= part
        remaining &= ~part
    return large_parts


def grow(mask: Tensor, pixels: int) -> Tensor:
    """The mask [H, W] grown by this many pixels."""
    if pixels < 1:
        return mask
    return F.max_pool2d(mask[None, None].float(), 2 * pixels + 1, stride=1, padding=pixels)[0, 0] > 0.5


def feather(region: Tensor) -> Tensor:
    """A region [H, W] with a soft edge just outside of it, so that all inside it stays the edit's."""
    unit = max(region.shape) / 128
    wide = grow(region > 0.5, round(unit)).to(region)
    return torch.maximum(region, blur(wide, 0.7 * unit))


def blur(picture: Tensor, sigma: float) -> Tensor:
    """A Gaussian blur of [H, W], repeated beyond the edges."""
    reach = min(round(3 * sigma), min(picture.shape) - 1)
    if reach < 1:
        return picture
    offset = torch.arange(-reach, reach + 1, dtype=picture.dtype, device=picture.device)
    line = torch.exp(-(offset**2) / (2 * sigma**2))
    line = line / line.sum()
    padded = F.pad(picture[None, None], (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, line[None, None, :, None]), line[None, None, None, :])[0, 0]
