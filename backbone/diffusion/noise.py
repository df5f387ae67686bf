"""The noise algebra: one formula for every model family, and its consequences.

    x = a·x0 + b·ε          ε ~ N(0, I)

| path                       | a       | b         | the network's time       |
|----------------------------|---------|-----------|--------------------------|
| variance preserving (`vp`) | √ᾱ      | √(1 − ᾱ)  | the timestep             |
| variance exploding (`ve`)  | 1       | σ         | σ                        |
| rectified flow (`flow`)    | 1 − t   | t         | t, or 1000·t             |

A noise level is the pair (a, b). A network may predict ε, x0, v, u (flow velocity) or the score; `estimate`
converts its prediction to both halves (x̂0, ε̂), `target` is what it should predict, and
`losses.denoising_score_matching` is the difference that trains it. Nothing here depends on the model family.

Letters: B batch, C/H/W latent, S steps (a schedule of S steps has S + 1 levels).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from backbone.diffusion.transfer import send

PredictionType = Literal["epsilon", "sample", "v_prediction", "flow", "score"]
"""What a network predicts, in diffusers' words: ε, x0, v = a·ε − b·x0, u = ε − x0, or s = ∇log p(x)."""

Randomness: TypeAlias = torch.Generator | Sequence[torch.Generator] | None
"""One generator for the batch, or one for each sample, so that a sample does not depend on its neighbours."""


class SingularLevel(ValueError):
    """A conversion that would divide by zero: x0 from ε or the score at a = 0, ε or the score at b = 0."""


@dataclass(frozen=True, eq=False)
class Level:
    """A noise level, x = a·x0 + b·ε: one for all samples [], one for each [B], or a schedule [S + 1].

    a      scale of the clean sample
    b      standard deviation of the noise (clean samples have about unit variance)
    time   the network's input for this level, such as a timestep or sigma; None without a network
    """

    a: Tensor
    b: Tensor
    time: Tensor | None = None

    def __post_init__(self) -> None:
        if self.a.shape != self.b.shape or (self.time is not None and self.time.shape != self.a.shape):
            time = None if self.time is None else tuple(self.time.shape)
            raise ValueError(
                f"a level's parts differ in shape: a {tuple(self.a.shape)}, b {tuple(self.b.shape)}, "
                f"time {time}."
            )
        if self.a.ndim > 1:
            raise ValueError(f"a level is [], [B] or [S + 1], not {tuple(self.a.shape)}.")

    def broadcast_like(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) shaped to broadcast against x [B, ...], with x's device and dtype."""
        if self.a.ndim == 1 and self.a.shape[0] != x.shape[0]:
            raise ValueError(f"{self.a.shape[0]} levels for {x.shape[0]} samples: one each is needed.")
        return broadcast_like(self.a, x), broadcast_like(self.b, x)

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio a²/b²; infinite at b = 0."""
        return self.a**2 / self.b**2

    @property
    def log_snr(self) -> Tensor:
        """log(a²/b²), natural logarithm."""
        return 2 * (self.a.log() - self.b.log())

    @property
    def sigma(self) -> Tensor:
        """Noise for a clean sample of unit size, b/a; infinite at a = 0."""
        return self.b / self.a

    @property
    def tau(self) -> Tensor:
        """Position between clean (0) and noise (1), b/(a + b): the time of the flow that x/(a + b) follows."""
        return self.b / (self.a + self.b)

    def __len__(self) -> int:
        return len(self.a)

    def __getitem__(self, index: int | slice | Tensor) -> Level:
        return Level(self.a[index], self.b[index], None if self.time is None else self.time[index])

    def __iter__(self) -> Iterator[Level]:
        return (self[i] for i in range(len(self)))

    def flip(self) -> Level:
        """The same schedule in the other direction."""
        return Level(self.a.flip(0), self.b.flip(0), None if self.time is None else self.time.flip(0))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Level:
        """On another device; dtype is for a and b alone, since timesteps do not survive half precision."""
        return Level(
            self.a.to(dtype=dtype or self.a.dtype).to(device=device),
            self.b.to(dtype=dtype or self.b.dtype).to(device=device),
            None if self.time is None else self.time.to(device=device),
        )

    def with_time(self, time: Tensor | None) -> Level:
        """The same (a, b) with another time for the network."""
        return replace(self, time=time)


Schedule = Level
"""A Level whose tensors are [S + 1]: level 0 is where sampling starts, level S where it ends."""


class Estimate(NamedTuple):
    """Both halves of a prediction, x̂0 and ε̂ [B, ...]; noisy = a·clean + b·noise until one is edited."""

    clean: Tensor
    noise: Tensor


Predict: TypeAlias = Callable[[Tensor, Level], Estimate]
"""A model as the samplers see it: (noisy [B, ...], level) → Estimate."""


# Levels -----------------------------------------------------------------------------------------------------


def vp(alpha_bar: Tensor | float, time: Tensor | None = None) -> Level:
    """Variance preserving: a = √ᾱ, b = √(1 − ᾱ), with ᾱ in [0, 1] (Ho et al. 2020, eq. 4)."""
    alpha_bar = _as_tensor(alpha_bar)
    return Level(alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), time)


def ve(sigma: Tensor | float, time: Tensor | None = None) -> Level:
    """Variance exploding: a = 1, b = σ (Song et al. 2021, eq. 9). `time` is σ if left out."""
    sigma = _as_tensor(sigma)
    return Level(torch.ones_like(sigma), sigma, sigma if time is None else time)


def flow(t: Tensor | float, time: Tensor | None = None) -> Level:
    """Rectified flow: a = 1 − t, b = t (Liu et al. 2023, eq. 1). `time` is t if left out."""
    t = _as_tensor(t)
    return Level(1 - t, t, t if time is None else time)


def broadcast_like(number: Tensor, x: Tensor) -> Tensor:
    """A number [], or one for each sample [B], shaped to broadcast against x [B, ...], in its dtype."""
    shape = number.shape + (1,) * (x.ndim - 1) if number.ndim else number.shape
    return send(number.to(x.dtype), x.device).reshape(shape)


def to_sigma_space(level: Level) -> Level:
    """The same levels for the state x/a, i.e. VE with the same times; raises `SingularLevel` at a = 0."""
    _require(level.a, "x/a", "a = 0")
    return ve(level.sigma, level.time)


def add_noise(clean: Tensor, noise: Tensor, level: Level) -> Tensor:
    """x = a·x0 + b·ε [B, ...]."""
    a, b = level.broadcast_like(clean)
    return a * clean + b * noise


# Predictions ----------------------------------------------------------------------------------------------------


def estimate(prediction: Tensor, noisy: Tensor, level: Level, prediction_type: PredictionType) -> Estimate:
    """Both halves (x̂0, ε̂) of a network's prediction at `noisy` [B, ...].

    v and u are read natively, so they hold at both ends. Neither ε nor the score tells x0 at a = 0, and x0
    does not tell ε at b = 0: those raise `SingularLevel`.
    """
    return Estimate(
        _clean(prediction, noisy, level, prediction_type), _noise(prediction, noisy, level, prediction_type)
    )


def target(clean: Tensor, noise: Tensor, level: Level, prediction_type: PredictionType) -> Tensor:
    """The training target of a network of this prediction type at a·clean + b·noise [B, ...].

    Raises `SingularLevel` for the score at b = 0.
    """
    a, b = level.broadcast_like(clean)
    match prediction_type:
        case "epsilon":
            return noise
        case "sample":
            return clean
        case "v_prediction":  # Salimans & Ho 2022, section 4
            return a * noise - b * clean
        case "flow":
            return noise - clean
        case "score":
            return _score(noise, level)
    raise unknown_prediction_type(prediction_type)


def convert(
    prediction: Tensor, noisy: Tensor, level: Level, source_type: PredictionType, target_type: PredictionType
) -> Tensor:
    """A prediction at `noisy` as another prediction type [B, ...]; only the halves it needs are computed."""
    if source_type == target_type:
        return prediction
    match target_type:
        case "epsilon":
            return _noise(prediction, noisy, level, source_type)
        case "sample":
            return _clean(prediction, noisy, level, source_type)
        case "score":
            return _score(_noise(prediction, noisy, level, source_type), level)
        case _:
            return target(*estimate(prediction, noisy, level, source_type), level, target_type)


def score(estimate: Estimate, level: Level) -> Tensor:
    """s = ∇log p(x) = −ε̂/b [B, ...]; raises `SingularLevel` at b = 0."""
    return _score(estimate.noise, level)


def tweedie(noisy: Tensor, score: Tensor, level: Level) -> Tensor:
    """x̂0 = E[x0 | x] = (x + b²·s)/a [B, ...], on any path (Efron 2011, eq. 1.4); singular at a = 0."""
    return _clean(score, noisy, level, "score")


def tweedie_vp(noisy: Tensor, score: Tensor, alpha_bar: Tensor | float) -> Tensor:
    """x̂0 = (x + (1 − ᾱ)·s)/√ᾱ [B, ...]."""
    return tweedie(noisy, score, vp(alpha_bar))


def tweedie_ve(noisy: Tensor, score: Tensor, sigma: Tensor | float) -> Tensor:
    """x̂0 = x + σ²·s [B, ...]."""
    return tweedie(noisy, score, ve(sigma))


# Predicting -------------------------------------------------------------------------------------------------


def predictor(network: Callable[[Tensor, Tensor], Tensor], prediction_type: PredictionType) -> Predict:
    """A network (noisy [B, ...], time) → prediction [B, ...] as a `Predict`."""

    def predict(noisy: Tensor, level: Level) -> Estimate:
        if level.time is None:
            raise ValueError("the network needs a time, and this level has none: build it with time=...")
        return estimate(network(noisy, send(level.time, noisy.device)), noisy, level, prediction_type)

    return predict


def scale_to_unit_variance(predict: Predict) -> Predict:
    """Let a VP network serve any path: the state is scaled to a² + b² = 1 first, as EDM's c_in does.

    Both halves of an estimate are the same on every scale, so they need no scaling back.
    """

    def predict_scaled(noisy: Tensor, level: Level) -> Estimate:
        scale = (level.a**2 + level.b**2).rsqrt()
        return predict(
            broadcast_like(scale, noisy) * noisy, Level(scale * level.a, scale * level.b, level.time)
        )

    return predict_scaled


def guided_predictor(predict_conditional: Predict, predict_unconditional: Predict, scale: float) -> Predict:
    """Classifier-free guidance: unconditional + scale·(conditional − unconditional).

    Ho & Salimans 2022, eq. 6, with scale = 1 + w as diffusers counts it. Both halves are guided alike, which
    is the same as guiding the raw prediction since each half is affine in it. At scale 1 the unconditional
    is never evaluated.
    """
    if scale == 1:
        return predict_conditional

    def predict(noisy: Tensor, level: Level) -> Estimate:
        return guide(predict_conditional(noisy, level), predict_unconditional(noisy, level), scale)

    return predict


def guide(conditional: Estimate, unconditional: Estimate, scale: float) -> Estimate:
    """unconditional + scale·(conditional − unconditional), of both halves: as in `guided_predictor`."""
    return Estimate(*(u + scale * (c - u) for c, u in zip(conditional, unconditional, strict=True)))


def keep(predict: Predict, original: Tensor, mask: Tensor) -> Predict:
    """The same estimates with x̂0 replaced by `original` [B, ...] where `mask` (bool, broadcast to it) is true.

    There ε̂ is the noise that leads from `original` to the noisy sample, so samplers end with `original` inside the
    mask. Outside it the model predicts with that in view (as diffusers' inpainting, at every noise level above 0).
    """

    def predict_kept(noisy: Tensor, level: Level) -> Estimate:
        a, b = level.broadcast_like(noisy)
        clean, noise = predict(noisy, level)
        return Estimate(
            torch.where(mask, original, clean), torch.where(mask, (noisy - a * original) / b, noise)
        )

    return predict_kept


# Randomness -------------------------------------------------------------------------------------------------


def generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A random generator that depends on its key alone: `generator(seed, step, "noise")`."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def randn_like(x: Tensor, generator: Randomness = None) -> Tensor:
    """ε ~ N(0, I) with x's shape, device and dtype, drawn on the generator's device."""
    if generator is None or isinstance(generator, torch.Generator):
        device = x.device if generator is None else generator.device
        return send(torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype), x.device)
    if len(generator) != len(x):
        raise ValueError(f"{len(generator)} generators for {len(x)} samples: one each is needed.")
    return torch.stack([randn_like(sample, g) for sample, g in zip(x, generator, strict=True)])


# Helpers ----------------------------------------------------------------------------------------------------


def _clean(prediction: Tensor, noisy: Tensor, level: Level, prediction_type: PredictionType) -> Tensor:
    """x̂0, each prediction type from its own definition and x = a·x0 + b·ε."""
    a, b = level.broadcast_like(noisy)
    match prediction_type:
        case "epsilon":
            _require(level.a, "x0 from ε", "a = 0")
            return (noisy - b * prediction) / a
        case "sample":
            return prediction
        case "v_prediction":
            return (a * noisy - b * prediction) / (a**2 + b**2)
        case "flow":
            return (noisy - b * prediction) / (a + b)
        case "score":
            _require(level.a, "x0 from the score", "a = 0")
            return (noisy + b**2 * prediction) / a
    raise unknown_prediction_type(prediction_type)


def _noise(prediction: Tensor, noisy: Tensor, level: Level, prediction_type: PredictionType) -> Tensor:
    """ε̂, each prediction type from its own definition and x = a·x0 + b·ε."""
    a, b = level.broadcast_like(noisy)
    match prediction_type:
        case "epsilon":
            return prediction
        case "sample":
            _require(level.b, "ε from x0", "b = 0")
            return (noisy - a * prediction) / b
        case "v_prediction":
            return (b * noisy + a * prediction) / (a**2 + b**2)
        case "flow":
            return (noisy + a * prediction) / (a + b)
        case "score":
            return -b * prediction
    raise unknown_prediction_type(prediction_type)


def _score(noise: Tensor, level: Level) -> Tensor:
    """s = −ε/b; the clean half is not needed."""
    _require(level.b, "the score", "b = 0")
    return -noise / level.broadcast_like(noise)[1]


def _require(part: Tensor, name: str, condition: str) -> None:
    if bool((part == 0).any()):
        raise SingularLevel(
            f"{name} is undefined at {condition}. Use a network that predicts v or flow, or stop short of it."
        )


def _as_tensor(value: Tensor | float) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor, half precision as float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def unknown_prediction_type(prediction_type: str) -> ValueError:
    """The error for an unknown prediction type."""
    return ValueError(
        f"no prediction type is called {prediction_type!r}. Known are {', '.join(get_args(PredictionType))}."
    )
