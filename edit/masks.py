"""Masks of an edit: drawn by the user, or from the difference of the predictions under two prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from backbone.diffusion.noise import add_noise, generator, randn_like
from backbone.diffusion.transfer import send
from backbone.io.console import UserError, notify_once
from backbone.media.shapes import is_same_shape
from backbone.media.transforms import crop_and_resize, mask_to_tensor
from backbone.models.cache import encode_prompts_cached
from edit.inversion.inversion import Inversion
from edit.layout import SOURCE, TARGET
from edit.pictures import EncodedImage, ImageLike, read_mask

# Shares of the steps: late enough to see where a thing is, early enough to see what it is
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)
FLOOR = 0.1  # quantile of differences that is treated as zero
COARSEST = 0.25  # smallest width of a mask of the image's shape, as a share of the image's


@torch.no_grad()
def compute_difference_maps(
    inversion: Inversion,
    pairs: Sequence[tuple[str, str]],
    *,
    first: int = 0,
    sides: tuple[int, int] = (SOURCE, TARGET),
) -> tuple[Tensor, int]:
    """Differences of the predictions under each pair of prompts [N, H, W], at most 1, and the NFE: five per prompt.

    For a clip [N, F, H, W], at most 1 over all frames.

    After Couairon et al. 2023 (DiffEdit, section 3.2), with the states of the trajectory from step `first` on in place
    of fresh noise, at five steps. `sides` says under whose control maps each prompt of a pair is predicted.
    """
    model, steps = inversion.model, inversion.steps
    if not inversion.layout.conditions:
        sides = (SOURCE, SOURCE)  # without conditions the side does not matter
    sided = [tuple(zip(pair, sides, strict=True)) for pair in pairs]
    prompts = list(dict.fromkeys(prompt for pair in sided for prompt in pair))
    # One batch of every prompt at every one of the chosen steps, [steps · prompts, ...], each row at its own level
    sampled_steps = torch.tensor(sorted({first + int(share * (steps - first)) for share in SHARES}))
    states = inversion.states.float()[send(sampled_steps, inversion.states.device)].repeat_interleave(
        len(prompts), 0
    )
    levels = inversion.schedule[sampled_steps.repeat_interleave(len(prompts))]
    text = encode_prompts_cached(model, [prompt for prompt, _ in prompts])
    text = inversion.layout.attach(text, inversion.schedule, [side for _, side in prompts]).repeat(
        len(sampled_steps)
    )
    batch = 1 if states.ndim > 4 else len(states)  # a clip's frames are predicted together
    slices = [slice(start, start + batch) for start in range(0, len(states), batch)]
    noise = torch.cat([model.predictor(text[rows])(states[rows], levels[rows]).noise for rows in slices])
    noise = noise.unflatten(0, (len(sampled_steps), len(prompts)))
    maps = []
    for source, target in sided:
        # |ε̂ − ε̂'|, mean over channels, at each step minus its FLOOR quantile, scaled to at most 1
        difference = (noise[:, prompts.index(target)] - noise[:, prompts.index(source)]).abs().mean(1)
        floor = difference.flatten(1).quantile(FLOOR, dim=1).view(-1, *[1] * (difference.ndim - 1))
        difference = (difference - floor).clamp(min=0)
        difference = difference / difference.amax(tuple(range(1, difference.ndim)), keepdim=True).clamp(
            min=1e-12
        )
        # Summed over the steps, smoothed over 3 × 3 positions
        total = difference.sum(0)
        pictures = total.view(-1, 1, *total.shape[-2:])
        smooth = _box(pictures, 1)
        maps.append(smooth.view_as(total) / smooth.amax().clamp(min=1e-12))
    return torch.stack(maps), len(states)


@torch.no_grad()
def compute_evidence_maps(
    inversion: Inversion, prompts: Sequence[str], *, seed: int = 0, draws: int = 3
) -> tuple[Tensor, int]:
    """How much larger the error is at each position under each prompt than under the source's [N, H, W], and the NFE.

    E‖ε̂ − ε‖² under the prompt minus that under the source's, over fresh noise at seven steps: the diffusion classifier
    (Li et al. 2023, eq. 4) at each position. A difference of predictions is also large where the rest is drawn
    differently; this is large where the words that the prompt lacks explain the image.
    """
    model, steps, clean = inversion.model, inversion.steps, inversion.clean
    all_prompts = [inversion.prompt, *prompts]
    text = inversion.layout.attach(
        encode_prompts_cached(model, all_prompts), inversion.schedule, [SOURCE] * len(all_prompts)
    )
    predict = model.predictor(text)
    maps, nfe = clean.new_zeros(len(prompts), *clean.shape[-2:]), 0
    for step in sorted({int(share * steps) for share in (*SHARES, 0.6, 0.7)}):
        level = inversion.schedule[step]
        for draw in range(draws):
            noise = randn_like(clean, generator(seed, step, draw, "evidence"))
            noisy = add_noise(clean, noise, level).expand(len(all_prompts), *clean.shape)
            # ‖ε̂ − ε‖² at each position, mean over channels, minus the source prompt's [N, h, w]
            error = (predict(noisy, level).noise - noise).square().mean(1)
            nfe += len(all_prompts)
            worse = error[1:] - error[:1]
            maps = maps + worse / worse.abs().amax((1, 2), keepdim=True).clamp(min=1e-12)
    return _box(maps[:, None], 1)[:, 0], nfe


def load_latent_mask(mask: ImageLike | None, image: EncodedImage) -> Tensor | None:
    """A drawn mask (white = may change) at the latent's size [H, W], 0 or 1, on its device; None without one.

    `UserError` as in `load_pixel_mask`.
    """
    white = load_pixel_mask(mask, image)
    if white is None:
        return None
    # 1 where a position is at least half as white as the whitest around it: so is the edge of a filled region, and
    # every position that a line covers, however thin the line is
    share = F.interpolate(white[None, None], tuple(image.latent.shape[-2:]), mode="area")
    whitest = F.max_pool2d(share, 3, stride=1, padding=1)
    return ((share > 0) & (share >= whitest / 2))[0, 0].float()


def load_pixel_mask(mask: ImageLike | None, image: EncodedImage) -> Tensor | None:
    """A drawn mask (white = may change) at the image's working size [8H, 8W], in 0…1, on its device; None without one.

    It has the size of the image or its working size, or is scaled to it if it has its shape and is not far too coarse;
    and something in it is white. `UserError` otherwise.
    """
    if mask is None:
        return None
    size = (image.pixels.shape[-1], image.pixels.shape[-2])
    fitted = fit_mask(mask, size, tuple(image.facts.get("size") or size))
    return send(mask_to_tensor(fitted)[0].to(image.latent.dtype), image.latent.device)


def fit_mask(mask: ImageLike, size: tuple[int, int], original: tuple[int, int]) -> Image.Image:
    """A drawn mask at the working `size` (W, H) of an image of `original` size.

    Raises `UserError` as `load_pixel_mask` does.
    """
    mask_image = read_mask(mask).image
    sizes = list(dict.fromkeys([original, size]))
    if mask_image.size not in sizes and not _covers(mask_image.size, original):
        expected = " or ".join(f"{width} × {height}" for width, height in sizes)
        raise UserError(
            f"The mask is {mask_image.width} × {mask_image.height} pixels and the image {expected}. Draw it on the "
            "image."
        )
    if mask_image.size not in sizes:
        notify_once(
            f"The mask of {mask_image.width} × {mask_image.height} pixels is scaled to the image's {original[0]} × "
            f"{original[1]}."
        )
    mask_image = mask_image if mask_image.size == size else crop_and_resize(mask_image, size)
    if not mask_image.getbbox():
        raise UserError(
            f"What is white in the mask is cropped off, or vanishes, where the model is shown the image as "
            f"{size[0]} × {size[1]} pixels. Paint more of it white, or edit a part of the image."
        )
    return mask_image


def _covers(mask: tuple[int, int], image: tuple[int, int]) -> bool:
    """Whether a mask of this size has such an image's aspect ratio, and is not too coarse for it."""
    return is_same_shape(mask, image) and mask[0] >= COARSEST * image[0]


def weigh_by_colour(prior: Tensor, image: Tensor, *, bins: int = 16) -> Tensor:
    """The probability of a thing at each position [H, W], from a `prior` in 0…1 and an image's colours.

    Bayes' rule, p·f(c) / (p·f(c) + (1 − p)·g(c)), with a histogram of the colours c of the image [3, H, W] in −1…1 for
    the thing, f, and one for its surroundings, g, as in GrabCut (Rother et al. 2004, with mixtures there). They count a
    pixel p⁴ and (1 − p)² times: f is of where the thing surely is, g of all the rest.
    """
    # Each pixel's colour as one of bins³
    levels = ((image + 1) / 2 * (bins - 1)).round().long().clamp(0, bins - 1)
    colours = ((levels[0] * bins + levels[1]) * bins + levels[2]).flatten()
    background, thing = (
        _colour_histogram(weights.flatten(), colours, bins)[colours].view_as(prior)
        for weights in ((1 - prior) ** 2, prior**4)
    )
    return prior * thing / (prior * thing + (1 - prior) * background)


def _colour_histogram(weights: Tensor, colours: Tensor, bins: int) -> Tensor:
    """Shares of the weight [P] that each colour [P] has [bins³], smoothed by (¼, ½, ¼) along each channel."""
    counts = weights.new_zeros(bins**3).index_add_(0, colours, weights).view(1, 1, bins, bins, bins)
    kernel = send(torch.tensor([0.25, 0.5, 0.25], dtype=weights.dtype), weights.device)
    for shape, padding in (((3, 1, 1), (1, 0, 0)), ((1, 3, 1), (0, 1, 0)), ((1, 1, 3), (0, 0, 1))):
        counts = F.conv3d(counts, kernel.view(1, 1, *shape), padding=padding)
    # Not 0 for a colour that does not occur, which is no evidence
    return counts.flatten() / weights.sum().clamp(min=1e-6) + 1e-5


def align_to_edges(mask: Tensor, image: Tensor, *, radius: int, eps: float = 1e-3) -> Tensor:
    """A map [H, W] aligned to the edges of an image [3, H, W] in −1…1: the guided filter (He, Sun & Tang 2013).

    In each window of 2·`radius` + 1 pixels the result is linear in the colour, a·I + b (eq. 14 and 15); what varies by
    less than `eps` (the variance of colours in 0…1) is no edge.
    """
    guide, p = (image[None] + 1) / 2, mask[None, None]

    # Σ and cov(I, p) of each window
    mean, mean_p = _box(guide, radius), _box(p, radius)
    covariance = _box(guide * p, radius) - mean * mean_p  # of colours and mask [1, 3, H, W]
    products = _box((guide[:, :, None] * guide[:, None]).flatten(1, 2), radius).unflatten(1, (3, 3))
    variance = (products - mean[:, :, None] * mean[:, None])[0].permute(2, 3, 0, 1)  # of colours [H, W, 3, 3]

    # a = (Σ + eps·1)⁻¹·cov(I, p), b = p̄ − aᵀ·Ī, and their means over all windows that hold a pixel
    regular = variance + eps * torch.eye(3, dtype=variance.dtype, device=variance.device)
    a = torch.linalg.solve(regular, covariance[0].permute(1, 2, 0)).permute(2, 0, 1)[None]
    b = mean_p - (a * mean).sum(1, keepdim=True)
    smooth: Tensor = ((_box(a, radius) * guide).sum(1, keepdim=True) + _box(b, radius))[0, 0]
    return smooth


def _box(x: Tensor, radius: int) -> Tensor:
    """Means [B, C, H, W] over windows of 2·`radius` + 1 pixels, repeated beyond the edges."""
    return F.avg_pool2d(F.pad(x, (radius,) * 4, mode="replicate"), 2 * radius + 1, stride=1)


def fill_smoothly(x: Tensor, inside: Tensor, *, down: float = 0.5, rounds: int = 40) -> Tensor:
    """x [C, H, W] with the inside of a mask [H, W] filled smoothly from its surroundings: about harmonic, ∇²x = 0.

    `down` is the weight of the neighbours above and below: with a small one a region is filled from its rows. The mask
    is in CPU memory, where the coarsest level is chosen. Coarse to fine: the inside starts from the coarse solution,
    then every pixel becomes the mean of its neighbours `rounds` times. If all is inside, it is filled with 0.
    """
    if not inside.any():
        return x
    if inside.all():
        return torch.zeros_like(x)
    hole = send(inside > 0, x.device)
    outside_hole = send((inside == 0).to(x.dtype), x.device)
    if min(x.shape[-2:]) > 1:
        # Means over the known pixels of 2 × 2 blocks
        share = F.avg_pool2d((inside == 0).to(x.dtype)[None], 2, ceil_mode=True)[0]
        half = F.avg_pool2d((x * outside_hole)[None], 2, ceil_mode=True)[0] / send(
            share.clamp(min=1e-6), x.device
        )
        coarse = fill_smoothly(half, (share == 0).to(x.dtype), down=down, rounds=rounds)
        filling = F.interpolate(coarse[None], x.shape[-2:], mode="bilinear", align_corners=False)[0]
    else:
        filling = ((x * outside_hole).sum((1, 2)) / outside_hole.sum())[:, None, None].expand_as(x)

    # Jacobi iteration: x ← ½·(down·(above + below) + (1 − down)·(left + right)) inside
    x = torch.where(hole, filling, x)
    for _ in range(rounds):
        wide = F.pad(x[None], (1, 1, 1, 1), mode="replicate")[0]
        above_below, left_right = (
            wide[:, :-2, 1:-1] + wide[:, 2:, 1:-1],
            wide[:, 1:-1, :-2] + wide[:, 1:-1, 2:],
        )
        x = torch.where(hole, (down * above_below + (1 - down) * left_right) / 2, x)
    return x


def composite(edits: Tensor, background: Tensor, masks: Tensor | None) -> Tensor:
    """Decoded edits [N, 3, 8H, 8W] inside their masks (0 or 1; None: everywhere), `background` outside.

    A decoder sees the whole latent, so pixels around an edit change with it even where the latent is the same. With
    masks on the latent's grid [N, H, W] an edit extends half a latent beyond its mask and fades out there, with masks
    in pixels [N, 8H, 8W] one pixel.
    """
    if masks is None:
        return edits
    large = masks[:, None].to(edits)
    if large.shape[-2:] == edits.shape[-2:]:
        large = _box(large, 1)
    large = F.interpolate(large, edits.shape[-2:], mode="bilinear", align_corners=False)
    return background + (2 * large).clamp(0, 1) * (edits - background)


def mask_to_image(mask: Tensor, size: tuple[int, int]) -> Image.Image:
    """A mask [h, w] in 0…1 as an image of (width, height) pixels [mode L]."""
    pixels = (mask.detach().float().cpu().clamp(0, 1) * 255).round().byte().numpy()
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)
