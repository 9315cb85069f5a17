"""The field of a network that puts out the clip.

On the Linear path x_γ = γ·x + (1 − γ)·ε the noise is ε = (x_γ − γ·x)/(1 − γ). So the target of Equilibrium Matching,
(x − ε)·c(γ) (Wang & Du 2025, arXiv 2510.02300), is (x − x_γ)·c(γ)/(1 − γ), and a clip x̂ has the field
f = (x̂ − x_γ)·c(γ)/(1 − γ). It is 0 where x̂ = x_γ.

The network sees no γ. What is left of the noise, s = 1 − γ, is read off d = x̂ − x_γ, which is s·(x̂ − ε): the noise of
D elements has the expected square D and is independent of the clip, so s = ‖d‖/√(‖x̂‖² + D).
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ClipOutput:
    """The factor c/(1 − γ) from x̂ − x_γ to the field.

    c(γ) is gain·(b − (b − 1)·γ/a) up to γ = a, and from there on it falls linearly, from `gain` to 0 at γ = 1. With
    b = 1 this is the schedule `truncated` of Objective, with another b `piecewise`, and with a = 0 `linear`.

    Attributes:
        gain: λ.
        a: in [0, 1). From this γ on, c/(1 − γ) is constant. With 0 it is λ everywhere, and s is not needed.
        b: c/λ at γ = 0.
    """

    gain: float
    a: float = 0.0
    b: float = 1.0

    def field(self, clip: Tensor, x: Tensor, temporal_patch: int) -> Tensor:
        """The field at x of a network that puts out a clip, (N, C, H, W) or (N, C, T, H, W) each, in float32."""
        # In float32: near the data x̂ − x is small, and 16 bits would round it away.
        clip = clip.float()
        away = clip - x  # (N, C, …)
        if not self.a:
            return self.gain * away
        left = noise_left(clip, away, temporal_patch, least=1 - self.a)  # (N, 1, …)
        return self.gain * (self.b - (self.b - 1) * (1 - left) / self.a) / left * away


def noise_left(clip: Tensor, away: Tensor, temporal_patch: int, least: float) -> Tensor:
    """s = 1 − γ, clamped into [least, 1], from a clip x̂ and d = x̂ − x_γ.

    It is one number for each image, (N, C, H, W) → (N, 1, 1, 1), and for the frames of each temporal patch of a clip,
    (N, C, T, H, W) → (N, 1, T, 1, 1), since frames may have noise levels of their own.
    """

    def total(squares: Tensor) -> Tensor:
        if squares.dim() == 4:
            return squares.sum((1, 2, 3), keepdim=True)  # (N, 1, 1, 1)
        by_patch = squares.unflatten(2, (-1, temporal_patch)).sum((1, 3, 4, 5), keepdim=True)  # (N, 1, T', 1, 1, 1)
        return by_patch.expand(-1, -1, -1, temporal_patch, -1, -1).flatten(2, 3)  # (N, 1, T, 1, 1)

    # The square is clamped, not its root, whose derivative at d = 0 is infinite.
    share = total(away.square()) / total(clip.square() + 1)
    return share.clamp(least**2, 1).sqrt()
