"""Step sizes of a descent that are planned ahead, and how much noise is left along the way.

On the Linear path, with s = 1 − γ the share of the noise in x, a perfect field is c(1 − s) times the vector from ε to
the data (Wang & Du 2025, arXiv 2510.02300). So a step of size η takes s down to s − η·c(p), where p is γ at the point
where the field is evaluated. A plan turns this round: it chooses the shares of noise, and each η follows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from objective import Objective

# Chosen by measurement: docs/quality.md. Larger: more of the steps lie where little noise is left.
POWER = 1.25
# Up to so many steps are planned if no step size is given. So 250 steps are as published.
PLANNED_STEPS = 64


@dataclass(frozen=True)
class PlannedSteps:
    """K steps of a descent, planned ahead.

    Attributes:
        sizes: η of each, along the field.
        look_aheads: μ of each; 0 for the first, which has no step before it.
        shares: of the noise, before each step and after the last: K + 1 numbers. γ is 1 − share.
        mu: the look-ahead that was asked for. None: half a step.
    """

    sizes: tuple[float, ...]
    look_aheads: tuple[float, ...]
    shares: tuple[float, ...]
    mu: float | None = None

    def __str__(self) -> str:
        return f"{self.sizes[0]:.4g} to {self.sizes[-1]:.4g}"


def plan_steps(objective: Objective, steps: int, mu: float | None = None, first: float = 1.0) -> PlannedSteps:
    """Steps that end without noise, at evenly spaced shares^(1/POWER).

    Such shares are those of the noise levels of Karras et al. 2022, arXiv 2206.00364, with their ρ = POWER. By the
    plan, the last step ends at the clip that the field points to, and no step goes past it.

    Args:
        objective: on the Linear path.
        mu: look-ahead, at most half a step. None: each step evaluates the field half a step ahead, as the midpoint rule
            does. That costs no evaluation, because the step before gives the direction.
        first: the share of noise in the start.
    """
    shares = [first * (1 - k / steps) ** POWER for k in range(steps + 1)]
    falls = [before - after for before, after in pairwise(shares)]
    half = [0.0, *(fall / last / 2 for last, fall in pairwise(falls))]
    ahead = half if mu is None else [min(mu, each) for each in half]
    points = [share - part * last for share, part, last in zip(shares, ahead, [0.0, *falls], strict=False)]
    sizes = [fall / magnitude(objective, point) for fall, point in zip(falls, points, strict=True)]
    return PlannedSteps(tuple(sizes), tuple(ahead), tuple(shares), mu)


def magnitude(objective: Objective, share: float) -> float:
    """c(γ) where this share of the noise is left."""
    return objective.c(torch.tensor(1 - share, dtype=torch.float64)).item()


def shares_of_noise(objective: Objective, sizes: Sequence[float], mu: float = 0.0, first: float = 1.0) -> list[float]:
    """The share of the noise before each of K steps, and after the last: K + 1 numbers; γ is 1 − share.

    This holds on the Linear path, for a perfect field.

    Args:
        sizes: η of each step.
        mu: look-ahead of all steps.
        first: the share at the start.
    """
    shares, previous = [first], first
    for eta in sizes:
        share = shares[-1]
        point = max(share - mu * (previous - share), 0.0)
        shares.append(max(share - eta * magnitude(objective, point), 0.0))
        previous = share
    return shares
