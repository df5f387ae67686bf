"""An edit's background made exact, whatever made the edit: registered, the place that changed found, the rest put back.

    kept = keep_background(edited, source)         # both [3, H, W] in −1…1
    kept.image, kept.place, kept.registration.shift, kept.drifted_psnr_db

Models that edit by instruction redraw the whole picture: it shifts, grows, takes another tone, and decays from edit to
edit. What was not meant to change is known exactly, from the source. So the edit is registered to it
(`backbone.media.registration`), a small change of tone that all of it has is undone, the place that was meant to change
is found where the two still differ, and everything else becomes the source's again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from backbone.evaluation.image_metrics import background_metrics
from backbone.io.console import UserError
from backbone.media.registration import TOLERANCE, Registration, Tone, match_tone, register_to_source, undo

SEEDS = 0.35  # of the range −1…1's half: a place that differs by so much has changed …
GROWN = 0.12  # … with what around it differs by so much and hangs together with it
SPECK = 4e-4  # of the pixels: what is smaller is an editor's noise
LEFT = 0.15  # of the pixels at least have to be the source's for a background to be there
TONED = 0.05  # of the pixels at least have to agree by another tone …
MOST_TONE = 0.2  # … that changes colours by no more than that of the range's half …
GAINS = (0.75, 1.35)  # … and their contrast by no more than that: what is more was meant
NO_TONE = Tone()
LOOKED_AT = 512  # pixels of the longer side at which the place is found


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
    """An edit that agrees with its source nearly nowhere."""


@dataclass(frozen=True, eq=False)
class KeptBackground:
    """An edit with its source's background.

    image              [3, H, W], the edit in the place that changed and the source elsewhere
    place              [H, W], 1 where the edit stands, 0 where the source does, between them at the seam
    registration       how the edit lay over the source
    drifted_psnr_db    of the background as the editor left it, against the source
    registered_psnr_db the same after the drift was undone: what is left is redrawing
    tone               what of its colours was undone
    """

    image: Tensor
    place: Tensor
    registration: Registration
    drifted_psnr_db: float | None
    registered_psnr_db: float | None
    tone: Tone = NO_TONE

    @classmethod
    def none(cls, edited: Tensor) -> KeptBackground:
        """An edit as it is: all of it changed."""
        return cls(edited, torch.ones_like(edited[0]), Registration(), None, None)

    @property
    def whole(self) -> bool:
        """Whether the edit is all of the image, so that it has no background."""
        return bool((self.place >= 1).all())

    @property
    def changed_share(self) -> float:
        """Share of the image that the edit takes."""
        return float((self.place > 0.5).float().mean())

    @property
    def figures(self) -> dict[str, float | None]:
        """What was found, for a record; of a drift and a background nothing where all of the image has changed."""
        if self.whole:
            return {**dict.fromkeys(FIGURES), "changed_share": 1.0}
        right, down = self.registration.shift
        height, width = self.place.shape
        drift = self.registration.drift((height, width))
        found = (
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
        return dict(zip(FIGURES, found, strict=True))


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
    background  what stands outside the place, where it is not the source itself: its copy by an autoencoder
    align       whether a drift of the whole, in place and tone, is looked for and undone

    Raises `NoBackgroundError` where nearly everything has changed, and `UserError` for what are no such tensors.
    """
    _refuse_misfits(source, edited=edited, changed=changed, background=background)

    # Undo the drift of the whole: in place, in tone, and in place again
    found = register_to_source(edited, source, changed=changed) if align else Registration()
    straight, tone = undo(edited, found, beyond=source), NO_TONE
    if align:
        tone = find_tone(straight, source, changed)
    if tone != NO_TONE:  # now that colours agree, the drift is seen better
        evened = tone.undo(edited)
        found = register_to_source(evened, source, changed=changed)
        straight = undo(evened, found, beyond=source)

    # Where the edit stands, at LOOKED_AT pixels
    small = [at_most(picture, LOOKED_AT) for picture in (straight, source)]
    place = (
        find_change(*small) if changed is None else (at_most(changed[None], LOOKED_AT)[0] > 0.5).to(source)
    )
    agree = share_agreeing(small[0], small[1])
    if changed is None and (agree < LEFT or bool(place.all())):
        raise NoBackgroundError(
            f"The edit agrees with the image before it in {agree:.0%} of its pixels, so there is no background to "
            "keep. Paint where it may change, and say --mask PNG."
        )

    # Edit inside, source outside, with a soft border
    size = source.shape[-2:]
    soft = F.interpolate(feather(place)[None, None], size, mode="bilinear", align_corners=False)[0, 0]
    rest = source if background is None else background
    hard = (soft > 0).to(source)
    return KeptBackground(
        torch.where(soft > 0, soft * straight + (1 - soft) * rest, rest),
        soft,
        found,
        background_metrics(source, edited, hard)["background_psnr_db"],
        background_metrics(source, straight, hard)["background_psnr_db"],
        tone,
    )


def _refuse_misfits(source: Tensor, **others: Tensor | None) -> None:
    """`UserError` unless these are tensors of an image's shape [3, H, W], or of a place's [H, W], and one size."""
    for name, given in {"source": source, **others}.items():
        wanted = "[H, W]" if name == "changed" else "[3, H, W]"
        if given is None:
            continue
        if not isinstance(given, Tensor) or given.ndim != wanted.count(",") + 1:
            what = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise UserError(
                f"{name} is a tensor {wanted}, and not {what}. backbone.media.transforms.to_tensor makes one of "
                "a PIL image."
            )
        if given.shape[-2:] != source.shape[-2:]:
            sizes = (" × ".join(map(str, reversed(one.shape[-2:]))) for one in (given, source))
            raise UserError(
                "{} is {} pixels, and the source {}. Resize one to the other.".format(name, *sizes)
            )


def find_tone(straight: Tensor, source: Tensor, changed: Tensor | None) -> Tone:
    """The tone of a registered edit [3, H, W] that its editor gave it unasked; none where that cannot be told.

    It is small, more of the image agrees without it, and it is not all that was edited: if nothing else differs from
    the source, the tone was the edit (“make it brighter”).
    """
    small = [at_most(picture, LOOKED_AT) for picture in (straight, source)]
    known = None if changed is None else at_most(changed[None], LOOKED_AT)[0]
    tone = match_tone(*small, changed=known)
    if tone.change > MOST_TONE or not all(GAINS[0] <= gain <= GAINS[1] for gain in tone.gain):
        return NO_TONE

    # More must agree with the tone undone, and something must still differ
    evened = tone.undo(small[0])
    gained = share_agreeing(evened, small[1], known) - share_agreeing(small[0], small[1], known)
    alone = known is None and not bool(find_change(evened, small[1]).any())
    return tone if gained >= TONED and not alone else NO_TONE


def share_agreeing(edited: Tensor, source: Tensor, changed: Tensor | None = None) -> float:
    """The share of the pixels of two pictures [3, H, W], outside of what was `changed`, whose colours agree."""
    agree = (edited - source).abs().amax(0) < 2 * TOLERANCE
    counted = torch.ones_like(agree) if changed is None else changed <= 0.5
    return float(agree[counted].float().mean())


def at_most(picture: Tensor, side: int) -> Tensor:
    """A picture [C, H, W] scaled down, if need be, to a longer side of this many pixels."""
    longest = max(picture.shape[-2:])
    if longest <= side:
        return picture
    size = [max(1, round(each * side / longest)) for each in picture.shape[-2:]]
    return F.interpolate(picture[None], size, mode="area")[0]


def find_change(edited: Tensor, source: Tensor) -> Tensor:
    """Where two registered pictures [3, H, W] differ by more than redrawing does [H, W], 0 or 1.

    Hysteresis (Canny 1986): places that differ much, with what hangs together with them and differs at all; holes are
    filled, specks dropped, and a margin is left for shadows and soft edges.
    """
    unit = max(source.shape[-2:]) / 128
    apart = blur((edited - source).abs().amax(0) / 2, 0.8 * unit)
    # An editor redraws everything a little: what most of the picture differs by is no change
    usual = min(3 * float(apart.median()), GROWN)

    # Seeds grow through whatever differs at all
    seeds, grown = (apart > limit + usual for limit in (SEEDS / 2, GROWN / 2))
    whole = fill_holes(drop_specks(hang_together(seeds, grown), round(SPECK * apart.numel())))
    return grow(whole, round(1.5 * unit)).to(source)


def hang_together(seeds: Tensor, within: Tensor) -> Tensor:
    """What of `within` [H, W] is connected to seeds: grown by a pixel at a time until nothing is added."""
    found = seeds & within
    while True:
        more = grow(found, 1) & within
        if torch.equal(more, found):
            return found
        found = more


def fill_holes(mask: Tensor) -> Tensor:
    """The mask [H, W] with everything that it encloses: what cannot be reached from the border outside it."""
    border = torch.zeros_like(mask)
    border[0], border[-1], border[:, 0], border[:, -1] = True, True, True, True
    return ~hang_together(border & ~mask, ~mask)


def drop_specks(mask: Tensor, least: int) -> Tensor:
    """The mask [H, W] without connected parts of fewer than `least` pixels."""
    left, kept = mask.clone(), torch.zeros_like(mask)
    while bool(left.any()):
        seed = torch.zeros_like(mask)
        seed.view(-1)[int(left.flatten().int().argmax())] = True
        part = hang_together(seed, left)
        if int(part.sum()) >= least:
            kept |= part
        left &= ~part
    return kept


def grow(mask: Tensor, pixels: int) -> Tensor:
    """The mask [H, W] and all within this many pixels of it."""
    if pixels < 1:
        return mask
    return F.max_pool2d(mask[None, None].float(), 2 * pixels + 1, stride=1, padding=pixels)[0, 0] > 0.5


def feather(place: Tensor) -> Tensor:
    """A place [H, W] with a soft seam just outside of it, so that all inside it stays the edit's."""
    unit = max(place.shape) / 128
    wide = grow(place > 0.5, round(unit)).to(place)
    return torch.maximum(place, blur(wide, 0.7 * unit))


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
