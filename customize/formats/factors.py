"""Low-rank weight updates ΔW of one layer, stored as factors, and their algebra: merge, sum, truncate.

    LoRA  ΔW = (α/r)·B·A                      Hu et al. 2022, eq. 3
    LoHa  ΔW = (α/r)·(B₁·A₁) ⊙ (B₂·A₂)        Hyeon-Woo et al. 2022 (FedPara), eq. 4
    LoKr  ΔW = (α/r)·W₁ ⊗ W₂                  Yeh et al. 2024 (LyCORIS)
    DoRA  W' = m·(W + ΔW)/‖W + ΔW‖            Liu et al. 2024, eq. 5, the norm over a row [out]; OneTrainer's default
                                              and LyCORIS' wd_on_output=False: over a column [in]

A convolution's ΔW [out, in, k, k] is treated as the matrix [out, in·k·k].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Algorithm = Literal["lora", "loha", "lokr"]


@dataclass(frozen=True)
class LayerUpdate:
    """One layer's weight update: `factors` named as below, scaled by `alpha` / `rank`.

    `magnitude` is DoRA's: [out] where it scales the rows of the weight, [1, in] where it scales the columns.

    lora: down [r, in] or [r, in, k, k], up [out, r] or [out, r, 1, 1]
    loha: hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b, and hada_t1, hada_t2 for convolutions
    lokr: lokr_w1 or lokr_w1_a and lokr_w1_b; lokr_w2 or lokr_w2_a and lokr_w2_b, and lokr_t2 for convolutions
    """

    algorithm: Algorithm
    factors: Mapping[str, Tensor]
    rank: int
    alpha: float
    magnitude: Tensor | None = None

    @property
    def scale(self) -> float:
        """α/r, which multiplies the product of the factors."""
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in·k·k] of the layer, from the factors alone, without computing ΔW."""
        f = self.factors
        if self.algorithm == "lora":
            return f["up"].shape[0], f["down"].shape[1:].numel()
        if self.algorithm == "loha":
            if "hada_t1" in f:
                return f["hada_w1_a"].shape[1], f["hada_w1_b"].shape[1] * f["hada_t1"].shape[2:].numel()
            return f["hada_w1_a"].shape[0], f["hada_w1_b"].shape[1]
        left, right = _compose_kronecker_factors(f)
        return left.shape[0] * right.shape[0], left.shape[1] * right.shape[1:].numel()

    def delta_weight(self) -> Tensor:
        """ΔW [out, in·k·k], float32; with DoRA the update of the direction, before the magnitude is applied."""
        f = {name: value.float() for name, value in self.factors.items()}
        if self.algorithm == "lora":
            product = f["up"].flatten(1) @ f["down"].flatten(1)
        elif self.algorithm == "loha":
            first = _multiply_factors(f["hada_w1_a"], f["hada_w1_b"], f.get("hada_t1"))
            second = _multiply_factors(f["hada_w2_a"], f["hada_w2_b"], f.get("hada_t2"))
            if first.shape != second.shape:  # which would be repeated
                raise RuntimeError(f"LoHa's products are {list(first.shape)} and {list(second.shape)}")
            product = first * second
        else:
            left, right = _compose_kronecker_factors(f)
            product = torch.kron(left, right.flatten(1))
        return self.scale * product

    def squared_norm(self) -> float:
        """‖ΔW‖² (Frobenius); of a LoRA from its r × r Gram matrices, so that ΔW is never computed."""
        if self.algorithm != "lora":
            return float(self.delta_weight().double().square().sum())
        up, down = self.factors["up"].double().flatten(1), self.factors["down"].double().flatten(1)
        return self.scale**2 * max(0.0, float(((up.T @ up) * (down @ down.T)).sum()))

    def with_alpha(self, alpha: float) -> LayerUpdate:
        """The same ΔW with another α: one factor is rescaled by the ratio."""
        if alpha == self.alpha:
            return self
        rescaled = {"lora": "up", "loha": "hada_w1_a"}.get(self.algorithm) or (
            "lokr_w1" if "lokr_w1" in self.factors else "lokr_w1_a"
        )
        factors = {**self.factors, rescaled: self.factors[rescaled] * (self.alpha / alpha)}
        return replace(self, factors=factors, alpha=alpha)

    def on_meta(self) -> LayerUpdate:
        """The same layer without values, for the shapes of its products."""
        return replace(self, factors={name: value.to("meta") for name, value in self.factors.items()})

    def to_lora(self, kernel: tuple[int, ...] = ()) -> LayerUpdate:
        """The same ΔW as a LoRA, exactly, of as low a rank as that takes; `kernel` is the layer's (k, k)."""
        if self.algorithm == "lora":
            return self
        change = self.delta_weight()
        if kernel:
            change = change.reshape(len(change), -1, *kernel)
        rank = max(1, int(torch.linalg.matrix_rank(change.flatten(1).double(), rtol=1e-10)))
        return replace(fit_lora(change, rank=rank).layer, magnitude=self.magnitude)

    def reshape(self, weight: Sequence[int]) -> LayerUpdate:
        """A LoRA's factors shaped for a weight [out, in] or [out, in, k, k] of that size; other kinds unchanged."""
        if self.algorithm != "lora":
            return self
        up, down = self.factors["up"], self.factors["down"]
        spatial = [1] * (len(weight) - 2)
        factors = {"down": down.reshape(-1, *weight[1:]), "up": up.reshape(weight[0], -1, *spatial)}
        return replace(self, factors=factors)

    def measure_growth(self, weight: Tensor) -> Tensor:
        """‖W + ΔW‖/‖W‖ of each output row [out]: what ComfyUI's formula of DoRA leaves out."""
        return row_norms(weight.float() + self.delta_weight().reshape(weight.shape)) / row_norms(weight)

    def merge_into(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """W + strength·(W' − W), float32 in `weight`'s shape, where W' has the whole update (and DoRA's magnitude)."""
        base = weight.float()
        updated = base + self.delta_weight().reshape(weight.shape)

        # DoRA: W' = m·(W + ΔW)/‖W + ΔW‖, over columns or rows
        if self.magnitude is not None:
            magnitude = self.magnitude.float()
            if magnitude.ndim == 2:  # one for each input, whichever of a kernel's k·k places it goes to
                scale = magnitude.flatten() / row_norms(updated.transpose(0, 1))
                updated = updated * scale.reshape(1, -1, *[1] * (updated.ndim - 2))
            else:
                updated = updated * _broadcast_rows(magnitude / row_norms(updated), updated)
        return base + strength * (updated - base)


def row_norms(weight: Tensor) -> Tensor:
    """Norm of each output row of a weight [out, …] → [out], at least the smallest normal float."""
    norms: Tensor = weight.float().flatten(1).norm(dim=1)
    return norms.clamp_min(torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class Truncation:
    """A LoRA of lower rank: `kept` of the `total` energy (squared Frobenius norm of ΔW) remains."""

    layer: LayerUpdate
    kept: float
    total: float


def truncate_lora(layer: LayerUpdate, *, rank: int | None = None, energy: float | None = None) -> Truncation:
    """Best approximation of a LoRA by one of `rank` (Eckart–Young), or of the smallest rank that keeps `energy` (0…1).

    Works on the factors: two QR decompositions and the SVD of an r × r matrix. A DoRA magnitude is kept as it is.
    """
    assert layer.algorithm == "lora"
    up, down = layer.factors["up"], layer.factors["down"]

    # B = Q₁·R₁, Aᵀ = Q₂·R₂: ΔW = Q₁·(α/r·R₁·R₂ᵀ)·Q₂ᵀ, and the SVD is that of the r × r matrix in the middle
    left, upper = torch.linalg.qr(up.double().flatten(1))
    right, lower = torch.linalg.qr(down.double().flatten(1).T)
    u, values, v = torch.linalg.svd(layer.scale * upper @ lower.T)
    truncation = _truncate_svd(left @ u, values, v @ right.T, rank, energy)
    factors = truncation.layer.factors
    # Back to the kernel shapes of a convolution, which `flatten` took away.
    reshaped = {
        "up": factors["up"].reshape(*factors["up"].shape, *up.shape[2:]),
        "down": factors["down"].reshape(truncation.layer.rank, *down.shape[1:]),
    }
    return Truncation(
        replace(truncation.layer, factors=reshaped, magnitude=layer.magnitude),
        truncation.kept,
        truncation.total,
    )


def fit_lora(change: Tensor, *, rank: int | None = None, energy: float | None = None) -> Truncation:
    """Best LoRA approximation of a full ΔW [out, in] or [out, in, k, k], its factors shaped for that layer."""
    truncation = _truncate_matrix(change.flatten(1), rank, energy)
    if change.ndim == 2:
        return truncation
    layer = truncation.layer
    factors = {
        "up": layer.factors["up"][:, :, None, None],
        "down": layer.factors["down"].reshape(layer.rank, *change.shape[1:]),
    }
    return Truncation(replace(layer, factors=factors), truncation.kept, truncation.total)


def sum_loras(layers: Sequence[LayerUpdate], strengths: Iterable[float]) -> LayerUpdate:
    """Σ strength·ΔW of LoRAs, exactly: the factors are concatenated, so the ranks add up."""
    assert all(layer.algorithm == "lora" and layer.magnitude is None for layer in layers)
    largest = max((layer.factors["down"] for layer in layers), key=lambda down: down.ndim)
    layers = [layer.reshape((layer.shape[0], *largest.shape[1:])) for layer in layers]
    ups = [
        layer.factors["up"].float() * (strength * layer.scale)
        for layer, strength in zip(layers, strengths, strict=True)
    ]
    down = torch.cat([layer.factors["down"].float() for layer in layers])
    return LayerUpdate(
        "lora", {"up": torch.cat(ups, dim=1), "down": down}, down.shape[0], float(down.shape[0])
    )


def _truncate_matrix(matrix: Tensor, rank: int | None, energy: float | None) -> Truncation:
    """Truncated SVD of a matrix [m, n] by the Gram matrix of its shorter side: a convolution's ΔW is very wide."""
    matrix = matrix.double()
    is_tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if is_tall else matrix

    # W·Wᵀ = U·Σ²·Uᵀ, ascending; then Vᵀ = Σ⁻¹·Uᵀ·W
    squares, vectors = torch.linalg.eigh(wide @ wide.T)
    values, vectors = squares.flip(0).clamp_min(0).sqrt(), vectors.flip(1)
    rows = (vectors.T @ wide) / values.clamp_min(values[0] * 1e-12 + 1e-300)[:, None]
    left, right = (rows.T, vectors.T) if is_tall else (vectors, rows)
    return _truncate_svd(left, values, right, rank, energy)


def _truncate_svd(
    left: Tensor, values: Tensor, right: Tensor, rank: int | None, energy: float | None
) -> Truncation:
    """U [m, r], singular values [r] and Vᵀ [r, n] → a LoRA with √σ in each factor, so α = rank."""
    squares = values.square()
    total = float(squares.sum())
    if energy is not None:
        # The smallest rank with Σᵢ≤ᵣ σᵢ² ≥ energy·Σ σᵢ²
        rank = int((squares.cumsum(0) < (energy - 1e-12) * total).sum()) + 1
    assert rank is not None
    rank = max(1, min(rank, len(values)))
    root = values[:rank].sqrt()
    factors = {"up": (left[:, :rank] * root).float(), "down": (root[:, None] * right[:rank]).float()}
    return Truncation(LayerUpdate("lora", factors, rank, float(rank)), float(squares[:rank].sum()), total)


def _multiply_factors(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    """A·B [out, in], or with a Tucker core [r, r, k, k] the kernels [out, in·k·k] of a [r, out] and b [r, in]."""
    if core is None:
        return a @ b
    return torch.einsum("ijkl,io,jn->onkl", core, a, b).flatten(1)


def _compose_kronecker_factors(f: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """LoKr's W₁ [a, b] and W₂ [c, d] or [c, d, k, k], multiplied out where they are stored factorised."""
    left = f["lokr_w1"] if "lokr_w1" in f else f["lokr_w1_a"] @ f["lokr_w1_b"]
    if "lokr_w2" in f:
        return left, f["lokr_w2"]
    if "lokr_t2" in f:
        core = f["lokr_t2"]
        product = _multiply_factors(f["lokr_w2_a"], f["lokr_w2_b"], core)
        return left, product.reshape(product.shape[0], -1, *core.shape[2:])
    return left, f["lokr_w2_a"] @ f["lokr_w2_b"]


def _broadcast_rows(values: Tensor, weight: Tensor) -> Tensor:
    """[out] → [out, 1, …] with as many dimensions as `weight`."""
    return values.reshape(-1, *[1] * (weight.ndim - 1))
