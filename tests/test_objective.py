import math

import pytest
import torch

from objective import c_truncated, drop_labels, eqm_loss, interpolate, target_field

# E[c²] = λ²·(a + (1 − a)/3) at the defaults a = 0.8, λ = 4.
MEAN_C_SQUARED = 16 * (0.8 + 0.2 / 3)


def test_c_is_flat_then_falls_to_zero():
    gamma = torch.tensor([0.0, 0.5, 0.8, 0.9, 1.0])
    torch.testing.assert_close(c_truncated(gamma), torch.tensor([4.0, 4.0, 4.0, 2.0, 0.0]))


@pytest.mark.parametrize("shape", [(3, 3, 4, 4), (3, 3, 2, 4, 4), (3, 3), (3,)])
def test_the_loss_equals_hand_computed_values_with_as_many_samples_as_channels(shape):
    generator = torch.Generator().manual_seed(0)
    x, noise, slope = (torch.randn(shape, generator=generator) for _ in range(3))
    gamma = torch.tensor([0.1, 0.85, 0.95])
    total, count = 0.0, 0
    for sample, g in enumerate(gamma.tolist()):
        c = 4.0 if g <= 0.8 else 4.0 * (1 - g) / 0.2
        numbers = zip(x[sample].flatten(), noise[sample].flatten(), slope[sample].flatten(), strict=True)
        for data, eps, factor in ((float(a), float(b), float(f)) for a, b, f in numbers):
            field = factor * (g * data + (1 - g) * eps) + g
            total += (field - (data - eps) * c) ** 2
            count += 1

    def field(x_gamma: torch.Tensor, seen_gamma: torch.Tensor) -> torch.Tensor:
        return slope * x_gamma + seen_gamma.view(-1, *[1] * (x.dim() - 1))

    assert eqm_loss(field, x, noise, gamma).item() == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("shape", [(4096, 3, 4, 4), (4096, 3, 2, 4, 2)])
def test_zero_output_has_the_expected_loss(shape):
    generator = torch.Generator().manual_seed(0)
    x = 0.5 * torch.randn(shape, generator=generator)
    noise, gamma = torch.randn(shape, generator=generator), torch.rand(shape[0], generator=generator)
    loss = eqm_loss(lambda x_gamma, _: torch.zeros_like(x_gamma), x, noise, gamma)
    assert loss.item() == pytest.approx(MEAN_C_SQUARED * (1 + 0.25), rel=0.02)


def test_the_field_points_from_noise_to_data_and_ends_there():
    x, noise = torch.ones(2, 5), torch.zeros(2, 5)
    gamma = torch.tensor([0.0, 1.0])
    torch.testing.assert_close(interpolate(x, noise, gamma), torch.tensor([[0.0] * 5, [1.0] * 5]))
    torch.testing.assert_close(target_field(x, noise, gamma), torch.tensor([[4.0] * 5, [0.0] * 5]))


def test_the_loss_is_float32_whatever_the_network_gives():
    x, noise, gamma = torch.randn(2, 3), torch.randn(2, 3), torch.rand(2)
    loss = eqm_loss(lambda x_gamma, _: x_gamma.to(torch.bfloat16), x, noise, gamma)
    assert loss.dtype == torch.float32


def test_a_tenth_of_the_labels_becomes_the_null_class():
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    labels = drop_labels(torch.full((20_000,), 3), uniform, null_class=7)
    assert set(labels.tolist()) == {3, 7}
    assert math.isclose((labels == 7).float().mean().item(), 0.1, abs_tol=0.01)
