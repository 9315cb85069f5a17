"""The paths from noise to data, x_γ = α(γ)·x + σ(γ)·ε, for γ of any shape. Source: Wang & Du 2025, arXiv 2510.02300."""

import math

import torch
from torch import Tensor

PATHS = ("Linear", "GVP", "VP")
# β of VP at its two ends, the noise variance added per unit of time (Song et al. 2021, arXiv 2011.13456).
VP_LEAST, VP_MOST = 0.1, 20.0
# The least 1 − γ that VP uses, since at 0 the derivative of σ is infinite. torch.rand gives no number closer to 1.
VP_LEAST_TIME = 2.0**-24


def coefficients(path: str, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """α and σ of x_γ = α·x + σ·ε: (N,) → (N,), (N,)."""
    if path == "Linear":
        return gamma, 1 - gamma
    if path == "GVP":
        return (gamma * (math.pi / 2)).sin(), (gamma * (math.pi / 2)).cos()
    log_alpha, _ = vp_log_alpha(gamma)
    # 1 − α² of a float32 α would be 0 well before γ = 1.
    return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()


def derivatives(path: str, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """dα/dγ and dσ/dγ: (N,) → (N,), (N,)."""
    if path == "Linear":
        return torch.ones_like(gamma), -torch.ones_like(gamma)
    alpha, sigma = coefficients(path, gamma)
    if path == "GVP":
        return sigma * (math.pi / 2), -alpha * (math.pi / 2)
    _, slope = vp_log_alpha(gamma)
    return alpha * slope, -alpha.square() * slope / sigma  # from σ² = 1 − α²


def vp_log_alpha(gamma: Tensor) -> tuple[Tensor, Tensor]:
    """ln α of the variance-preserving path, and its derivative in γ: (N,) → (N,), (N,)."""
    left = (1 - gamma).clamp(min=VP_LEAST_TIME)
    rise = VP_MOST - VP_LEAST
    return -rise / 4 * left.square() - VP_LEAST / 2 * left, rise / 2 * left + VP_LEAST / 2
