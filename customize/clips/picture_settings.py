"""The options of `customize clip` for clips of pictures. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from backbone.cli.flags import MODEL
from backbone.cli.options import Option
from backbone.io.console import UserError

PICTURE = "Image to video"
ALONE = ("motion_bucket_id", "noise_aug_strength", "min_guidance")  # of models without words


@dataclass(frozen=True, kw_only=True)
class PictureOptions:
    """Options of clips with pictures.

    images                   pictures that begin to move, each a clip of its own; beside words, frames of one clip,
                             or the first one, in which a thing moves, or over which a camera moves
    mask, behind             the thing in the first picture, and that picture without it
    image_at                 at which frames these are
    motion_bucket_id …       of a model that reads a picture and no words (Stable Video Diffusion)
    sparsectrl …             the network that reads frames beside words (SparseCtrl)
    """

    images: Annotated[
        tuple[Path, ...],
        Option(
            "An image to animate (repeatable); with words, the first frame, in which what they name moves, or a frame "
            "for --sparsectrl.",
            PICTURE,
            flag="image",
            metavar="PICTURE",
        ),
    ] = ()
    image_at: Annotated[
        tuple[int, ...],
        Option(
            "Index of the frame that an --image is, from 0; -1: the last one. Once for each --image.",
            PICTURE,
            aliases=("controlnet-frame-indices",),
            needs={"images": ()},
            default_text="0, and evenly to the last",
        ),
    ] = ()
    mask: Annotated[
        Path | None,
        Option(
            "Mask of the thing in --image that the words move: white where it is.",
            PICTURE,
            metavar="PICTURE",
            default_text="where --behind differs, or where the model sees what they name",
            needs={"images": ()},
        ),
    ] = None
    behind: Annotated[
        Path | None,
        Option(
            "The --image without that thing, as edit remove draws it.",
            PICTURE,
            metavar="PICTURE",
            default_text="what the image's rows have beside the thing",
            needs={"images": ()},
        ),
    ] = None
    sparsectrl: Annotated[
        str,
        Option(
            "A SparseCtrl network that reads the images, or maps of some frames (--condition): a folder, a "
            ".safetensors, or a hub id.",
            PICTURE,
            aliases=("sparse-control",),
            needs=({"images": ()}, {"condition": ()}),
            metavar="NETWORK",
        ),
    ] = ""
    sparsectrl_scale: Annotated[
        float,
        Option("Conditioning scale of the SparseCtrl network.", PICTURE, min=0, needs={"sparsectrl": ()}),
    ] = 1.0
    motion_bucket_id: Annotated[
        float, Option("SVD: motion bucket id; more means more motion.", PICTURE, min=0, max=1000)
    ] = 127.0
    noise_aug_strength: Annotated[
        float,
        Option(
            "SVD: noise added to the picture; with more, the clip keeps less of it.",
            PICTURE,
            min=0,
            max=1000,
        ),
    ] = 0.02
    min_guidance: Annotated[
        float,
        Option(
            "SVD: guidance of the first frame, growing to --guidance at the last.",
            PICTURE,
            aliases=("min-guidance-scale",),
            min=0,
        ),
    ] = 1.0
    vram: Annotated[
        float | None,
        Option("Plan for a device with this many GiB of memory, and draw so that it fits.", MODEL, min=0.1),
    ] = None

    def check_pictures(self, *, words: bool, camera: bool, thing: bool) -> None:
        """`UserError` for frames without a picture each, and for options that have no effect with `words`, or without.

        camera, thing  whether one moves that no motion adapter follows
        """
        if words and self.images and not self.sparsectrl:
            if not (camera or thing):
                _refuse_missing(self.images)
                raise UserError(
                    "The words beside the picture say nothing that moves in it. Say it (“a dog, moving left”, or “…, "
                    "camera panning left”), name a network that reads pictures (--sparsectrl, with --motion), or leave "
                    "the words out: --model svd."
                )
            if len(self.images) > 1 or self.image_at:
                what = "--image-at" if self.image_at else f"{len(self.images)} --image"
                raise UserError(f"One picture moves, from its first frame on: {what} is too much.")
        for name in ("mask", "behind"):
            if getattr(self, name) is not None and not thing:
                raise UserError(
                    f"--{name} is for a thing in an --image that words move, without --motion. Say how (“a dog, moving "
                    "left”), or leave it out."
                )
        for name in ALONE:
            if words and getattr(self, name) != getattr(PictureOptions, name):
                raise UserError(
                    f"--{name.replace('_', '-')} is for models that read a picture and no words (SVD). Leave it out."
                )
        if self.image_at and len(self.image_at) != len(self.images):
            raise UserError(
                f"There are {len(self.images)} --image and {len(self.image_at)} --image-at. Say a frame for each "
                "picture, or for none."
            )


def _refuse_missing(images: Sequence[Path]) -> None:
    """`UserError` for a picture that does not exist, with the name of one that is like it."""
    for path in images:
        if not path.exists():
            from backbone.media.sources.decode import open_named

            open_named(path)
