import math

import pytest
import torch

from objective import PATHS, SCHEDULES, Objective, add_objective_args, crowding, drop_labels, objective_of
from runtime import cli
from runtime.errors import UserError

# E[c²] = λ²·(a + (1 − a)/3) at the defaults a = 0.8, λ = 4.
MEAN_C_SQUARED = 16 * (0.8 + 0.2 / 3)


def test_c_is_flat_then_falls_to_zero():
    gamma = torch.tensor([0.0, 0.5, 0.8, 0.9, 1.0])
    torch.testing.assert_close(Objective().c(gamma), torch.tensor([4.0, 4.0, 4.0, 2.0, 0.0]))


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

    def field(x_gamma: torch.Tensor, seen_gamma: torch.Tensor) -> tuple[torch.Tensor, None]:
        return slope * x_gamma + seen_gamma.view(-1, *[1] * (x.dim() - 1)), None

    assert Objective().loss(field, x, noise, gamma).item() == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("shape", [(4096, 3, 4, 4), (4096, 3, 2, 4, 2)])
def test_zero_output_has_the_expected_loss(shape):
    generator = torch.Generator().manual_seed(0)
    x = 0.5 * torch.randn(shape, generator=generator)
    noise, gamma = torch.randn(shape, generator=generator), torch.rand(shape[0], generator=generator)
    loss = Objective().loss(lambda x_gamma, _: (torch.zeros_like(x_gamma), None), x, noise, gamma)
    assert loss.item() == pytest.approx(MEAN_C_SQUARED * (1 + 0.25), rel=0.02)


def test_the_field_points_from_noise_to_data_and_ends_there():
    x, noise = torch.ones(2, 5), torch.zeros(2, 5)
    gamma = torch.tensor([0.0, 1.0])
    torch.testing.assert_close(Objective().interpolate(x, noise, gamma), torch.tensor([[0.0] * 5, [1.0] * 5]))
    torch.testing.assert_close(Objective().target(x, noise, gamma), torch.tensor([[4.0] * 5, [0.0] * 5]))


def test_the_loss_is_float32_whatever_the_network_gives():
    x, noise, gamma = torch.randn(2, 3), torch.randn(2, 3), torch.rand(2)
    loss = Objective().loss(lambda x_gamma, _: (x_gamma.to(torch.bfloat16), None), x, noise, gamma)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize(("asked", "share"), [((), 0.1), ((0.3,), 0.3), ((0.0,), 0.0)])
def test_a_share_of_the_labels_becomes_the_null_class(asked, share):
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    labels = drop_labels(torch.full((20_000,), 3), uniform, 7, *asked)
    assert set(labels.tolist()) <= {3, 7}
    assert math.isclose((labels == 7).float().mean().item(), share, abs_tol=0.01)


def test_the_defaults_are_the_linear_paths_numbers_to_the_last_bit():
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(64, 3, 2, 4, 4, generator=generator) for _ in range(2))
    gamma = torch.rand(64, generator=generator)
    g = gamma.view(-1, 1, 1, 1, 1)
    assert torch.equal(Objective().interpolate(x, noise, gamma), g * x + (1 - g) * noise)
    assert torch.equal(Objective().target(x, noise, gamma), (x - noise) * (4 * ((1 - g) / (1 - 0.8)).clamp(max=1)))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("truncated", [3, 3, 3, 1.5, 0]),
        ("linear", [3, 2.1, 1.2, 0.6, 0]),
        ("piecewise", [6, 4.5, 3, 1.5, 0]),
        ("constant", [3, 3, 3, 3, 3]),
    ],
)
def test_each_schedule_has_the_values_of_its_formula(schedule, expected):
    gamma = torch.tensor([0.0, 0.3, 0.6, 0.8, 1.0])
    c = Objective(schedule=schedule, a=0.6, b=2, scale=3).c(gamma)
    torch.testing.assert_close(c, torch.tensor(expected, dtype=torch.float32), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "mean_of_squares"),
    [
        ("truncated", 0.6 + 0.4 / 3),
        ("linear", 1 / 3),
        ("piecewise", 0.6 * (4 + 2 + 1) / 3 + 0.4 / 3),
        ("constant", 1),
    ],
)
def test_zero_output_has_the_expected_loss_under_each_schedule(schedule, mean_of_squares):
    generator = torch.Generator().manual_seed(0)
    x, noise = 0.5 * torch.randn(8192, 64, generator=generator), torch.randn(8192, 64, generator=generator)
    gamma, objective = torch.rand(8192, generator=generator), Objective(schedule=schedule, a=0.6, b=2, scale=3)
    loss = objective.loss(lambda x_gamma, _: (torch.zeros_like(x_gamma), None), x, noise, gamma)
    assert loss.item() == pytest.approx(9 * mean_of_squares * (1 + 0.25), rel=0.02)


@pytest.mark.parametrize("shape", [(9, 3), (9, 9, 2, 3)], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_the_target_is_the_velocity_along_the_path_times_c(path, shape):
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    gamma, step = torch.tensor([0.001, 0.1, 0.3, 0.5, 0.7, 0.79, 0.81, 0.9, 0.99], dtype=torch.float64), 1e-6
    objective = Objective(path)
    after, before = (objective.interpolate(x, noise, gamma + change) for change in (step, -step))
    c = (4 * ((1 - gamma) / 0.2).clamp(max=1)).view(-1, *[1] * (x.dim() - 1))
    torch.testing.assert_close(objective.target(x, noise, gamma), (after - before) / (2 * step) * c, atol=1e-6, rtol=0)


@pytest.mark.parametrize("path", PATHS)
def test_every_path_leads_from_noise_to_data(path):
    x, noise, ends = torch.full((2, 5), 2.0), torch.full((2, 5), -1.0), torch.tensor([0.0, 1.0])
    start, end = Objective(path).interpolate(x, noise, ends)
    # VP starts with a little of the data.
    torch.testing.assert_close(start, noise[0], atol=0.02 if path == "VP" else 1e-6, rtol=0)
    torch.testing.assert_close(end, x[1], atol=1e-3, rtol=0)


def test_close_to_the_data_the_variance_preserving_path_keeps_its_noise_and_a_finite_target():
    left = torch.tensor([0.0, 2.0**-24, 1e-6, 1e-4])
    nothing, noise = torch.zeros(4, 1), torch.ones(4, 1)
    sigma = Objective("VP").interpolate(nothing, noise, 1 - left)[1:, 0]
    # σ² = 1 − exp(−0.1·(1−γ) − …) ≈ 0.1·(1−γ); 1−γ itself is what float32 makes of it.
    torch.testing.assert_close(sigma, (0.1 * (1 - (1 - left[1:]))).sqrt(), rtol=0.01, atol=0)
    for schedule in SCHEDULES:
        assert Objective("VP", schedule).target(nothing, noise, 1 - left).isfinite().all()
    assert abs(Objective("VP").target(nothing, noise, 1 - left)[0].item()) < 0.01


def test_the_dispersive_term_is_that_of_all_pairs_and_drives_samples_apart():
    generator = torch.Generator().manual_seed(0)
    tokens = (3 + torch.randn(4, 5, 2, generator=generator)).requires_grad_()
    rows = tokens.detach().double().flatten(1).tolist()
    distances = [sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) / 10 for p in rows for q in rows]
    expected = math.log(sum(math.exp(-d) for d in distances) / 16)
    assert crowding(tokens).item() == pytest.approx(expected, abs=1e-5)
    x, gamma = torch.randn(4, 3), torch.rand(4)
    losses = [Objective(dispersion=w).loss(lambda x, _: (x, tokens.bfloat16()), x, x, gamma) for w in (0, 0.5)]
    assert (losses[1] - losses[0]).item() == pytest.approx(expected / 2, abs=0.01)
    assert torch.equal(crowding(tokens.bfloat16()), crowding(tokens.bfloat16().float()))
    (gradient,) = torch.autograd.grad(crowding(tokens), tokens)
    assert crowding(tokens - gradient) < crowding(tokens) - 0.01


def parsed(*flags: str) -> Objective:
    parser = cli.ArgumentParser("")
    add_objective_args(parser)
    args = parser.parse_args(flags)
    for name, value in cli.settled(vars(args), {}, parser.new_run_defaults()).items():
        setattr(args, name, value)
    return objective_of(args)


def test_flags_make_the_objective_and_none_the_default():
    assert parsed() == Objective()
    flags = "--path-type VP --c-schedule piecewise --c-a 0.5 --c-b 2 --c-lambda 3 --disp".split()
    assert parsed(*flags) == Objective("VP", "piecewise", 0.5, 2.0, 3.0, 0.5)


@pytest.mark.parametrize("flags", [["--c-schedule", "piecewise"], ["--c-b", "2"]], ids=str)
def test_a_missing_or_meaningless_c_b_is_an_error(flags):
    with pytest.raises(UserError, match="--c-b"):
        parsed(*flags)
