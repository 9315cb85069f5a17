import pytest
import torch

from objective import Objective
from sampling.descent import gradient_descent
from sampling.stepsizes import shares_of_noise


def away(x: torch.Tensor) -> torch.Tensor:
    return 2 - x.square()


def test_each_step_of_a_descent_takes_its_own_step_size():
    start, sizes = torch.randn(3, 4), (0.3, 0.1, 0.05)
    right, previous = start, start
    for eta in sizes:
        point = torch.add(right, right - previous, alpha=0.3)
        previous, right = right, torch.add(right, away(point), alpha=eta)
    assert torch.equal(gradient_descent(away, start, sizes, range(3), 0.3), right)
    assert torch.equal(gradient_descent(away, start, sizes, range(9), 0.3), right)
    assert torch.equal(
        gradient_descent(away, start, (0.1,) * 3, range(3), 0.3), gradient_descent(away, start, 0.1, range(3), 0.3)
    )


def test_the_share_of_noise_falls_by_step_size_times_magnitude():
    shares = shares_of_noise(Objective(schedule="linear", scale=2.0), [0.25, 0.1], first=0.5)
    assert shares == pytest.approx([0.5, 0.5 - 0.25 * 2 * 0.5, 0.25 - 0.1 * 2 * 0.25])
    assert shares_of_noise(Objective(schedule="constant"), [1.0]) == [1.0, 0.0]
