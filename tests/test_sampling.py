from collections.abc import Callable

import numpy as np
import pytest
import torch

from runtime.random_numbers import sample_noise
from sampling.descent import Field, gradient_descent, integrate
from sampling.fields import Composition

MINIMUM = torch.tensor([1.0, -2.0, 0.5])


def towards_minimum(x: torch.Tensor) -> torch.Tensor:
    """The field of the quadratic ½‖x − m‖²."""
    return MINIMUM - x


def test_gradient_descent_on_a_quadratic_shrinks_the_distance_by_the_same_factor_each_step():
    start = torch.zeros(3)
    end = gradient_descent(towards_minimum, start, 0.1, range(25))
    torch.testing.assert_close(end, MINIMUM + 0.9**25 * (start - MINIMUM))


@pytest.mark.parametrize("mu", [0.3, 0.9])
def test_look_ahead_on_a_quadratic_follows_its_recurrence(mu):
    eta, steps = 0.1, 25
    # With e the distance from the minimum, e' = e − η·(e + μ·(e − e₋₁)), linear in (e, e₋₁).
    one_step = np.array([[1 - eta - eta * mu, eta * mu], [1, 0]])
    factor = (np.linalg.matrix_power(one_step, steps) @ [1, 1])[0]
    end = gradient_descent(towards_minimum, torch.zeros(3), eta, range(steps), mu)
    torch.testing.assert_close(end, MINIMUM * (1 - factor), rtol=1e-5, atol=1e-6)


def test_as_many_updates_as_steps_are_made():
    calls = []
    gradient_descent(lambda x: calls.append(1) or x, torch.zeros(1), 0.1, range(7))
    assert len(calls) == 7


def test_x_stays_in_float32_under_a_low_precision_field():
    end = gradient_descent(lambda x: x.to(torch.bfloat16), torch.ones(2), 1e-4, range(10))
    assert end.dtype == torch.float32
    assert end[0] > 1.0009


def test_guidance_moves_away_from_the_null_class_in_one_call():
    calls = []

    def conditioned(y: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        def field(x: torch.Tensor) -> torch.Tensor:
            calls.append(y.tolist())
            return y.float()[:, None].expand_as(x)

        return field

    y, x = torch.tensor([1, 2]), torch.zeros(2, 4)
    field = Composition([1.0], 9, 1.5, "cpu").field(conditioned, y[None])
    torch.testing.assert_close(field(x)[:, 0], torch.tensor([9 + 1.5 * (1 - 9), 9 + 1.5 * (2 - 9)]))
    assert calls == [[1, 2, 9, 9]]
    Composition([1.0], 9, 1.0, "cpu").field(conditioned, y[None])(x)
    assert calls[1:] == [[1, 2]]


def fields_by_label(values: dict[int, torch.Tensor], calls: list) -> Callable:
    """Stands for a network: the field of label k is values[k] − x. Each call's labels go into `calls`."""

    def conditioned(y: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        def field(x: torch.Tensor) -> torch.Tensor:
            calls.append(y.tolist())
            return torch.stack([values[label] for label in y.tolist()]) - x

        return field

    return conditioned


@pytest.mark.parametrize(("weights", "middle"), [((1.0, 1.0), 0.5), ((1.0, 3.0), 0.75), ((1.0, -0.5), -1.0)])
def test_a_sum_of_two_quadratics_lands_at_their_weighted_minimum(weights, middle):
    minima, calls = {0: torch.zeros(3, 2), 1: torch.ones(3, 2), 9: torch.full((3, 2), 100.0)}, []
    conditioned, y = fields_by_label(minima, calls), torch.tensor([[0, 0], [1, 1]])
    field = Composition(weights, 9, 1, "cpu").field(conditioned, y)
    end = gradient_descent(field, torch.randn(2, 3, 2), 0.1, range(300))
    torch.testing.assert_close(end, torch.full((2, 3, 2), middle))
    assert calls[0] == [0, 0, 1, 1]


def test_guidance_adds_one_row_to_a_sum_and_guides_each_class_of_it():
    values, calls = {k: torch.full((2,), float(k)) for k in (1, 2, 9)}, []
    field = Composition([1.0, 0.5], 9, 3, "cpu").field(fields_by_label(values, calls), torch.tensor([[1], [2]]))
    by_hand = (9 + 3 * (1 - 9)) + 0.5 * (9 + 3 * (2 - 9))
    torch.testing.assert_close(field(torch.zeros(1, 2)), torch.full((1, 2), by_hand))
    assert calls == [[1, 2, 9]]


def test_guidance_of_three_channels_leaves_the_fourth_conditional():
    values, calls = {k: torch.full((4, 2, 2), float(k)) for k in (1, 2, 9)}, []
    conditioned = fields_by_label(values, calls)
    guided_one, guided_two = 9 + 1.5 * (1 - 9), 9 + 1.5 * (2 - 9)
    scale = [1.5, 1.5, 1.5, 1.0]
    field = Composition([1.0], 9, scale, "cpu").field(conditioned, torch.tensor([[1, 2]]))
    expected = torch.tensor([[guided_one] * 3 + [1], [guided_two] * 3 + [2]])
    torch.testing.assert_close(field(torch.zeros(2, 4, 2, 2))[:, :, 0, 1], expected)
    both = Composition([1.0, -2.0], 9, scale, "cpu").field(conditioned, torch.tensor([[1], [2]]))
    expected = torch.tensor([[guided_one - 2 * guided_two] * 3 + [1 - 2 * 2.0]])
    torch.testing.assert_close(both(torch.zeros(1, 4, 2, 2))[:, :, 1, 0], expected)


def test_noise_depends_on_seed_and_index_alone():
    together = sample_noise(5, [0, 1, 2, 3], (3, 2, 4, 4))
    torch.testing.assert_close(sample_noise(5, [2], (3, 2, 4, 4)), together[2:3], rtol=0, atol=0)
    torch.testing.assert_close(sample_noise(5, [3, 1], (3, 2, 4, 4)), together[[3, 1]], rtol=0, atol=0)
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(sample_noise(6, [0], (3, 2, 4, 4)), together[:1])


def test_noise_is_standard_normal():
    noise = sample_noise(0, range(200), (3, 16, 16))
    assert noise.mean().item() == pytest.approx(0, abs=0.01)
    assert noise.std().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("first", [0.0, 0.7])
def test_steps_over_time_along_straight_lines_end_at_the_data(first):
    data, x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 3)
    seen = []

    def velocity_at(gamma: float) -> Field:
        return lambda x: (data - x) / (1 - gamma)

    end = integrate(velocity_at, x, torch.linspace(first, 1, 11).tolist(), range(10), lambda *at: seen.append(at))
    torch.testing.assert_close(end, data)
    assert len(seen) == 10
    torch.testing.assert_close(seen[5][0], data * 0.5)
    torch.testing.assert_close(seen[5][1], data / (1 - first))
