"""Step sizes of a descent, and how much noise is left along the way.

On the Linear path, with s = 1 − γ the share of the noise in x, a perfect field is c(1 − s) times the vector from ε to
the data (Wang & Du 2025, arXiv 2510.02300). So a step of size η takes s down to s − η·c(1 − s).
"""

from collections.abc import Iterable

import torch

from objective import Objective


def shares_of_noise(objective: Objective, stepsizes: Iterable[float], first: float = 1.0) -> list[float]:
    """The share of the noise s before each of K steps, and after the last: K + 1 numbers; γ is 1 − s.

    Linear path, perfect field, no look-ahead.

    Args:
        stepsizes: η of each step.
        first: s at the start.
    """
    shares = [first]
    for eta in stepsizes:
        magnitude = objective.c(torch.tensor(1 - shares[-1], dtype=torch.float64)).item()
        shares.append(max(shares[-1] - eta * magnitude, 0.0))
    return shares
