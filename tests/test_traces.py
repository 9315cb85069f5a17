"""What is traced of samples on their way: the energy that their field climbs down, and its plots."""

import pytest
import torch

from models import EqM
from runtime.random_numbers import sample_noise
from sampling.descent import value_norms
from sampling.method import Method
from sampling.plan import Plan
from sampling.sampler import Sampler
from sampling.starts import Starts
from sampling.traces import trace_plots

SECONDS = 0.12
LABELS = Plan([0, 1, 2], [], Starts(0, (3, 4, 8, 8)))
SUM = Plan([3], [(1.0, 0), (-0.5, 2)], Starts(0, (3, 4, 8, 8)))


def guided_sampler(kind: str, plan: Plan, batch: int) -> Sampler:
    """Of a random network with an energy of a kind."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 3, "temporal_patch": 2}
    network = EqM((4, 8, 8), 4, 3, **sizes, energy=kind)
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    method = Method("gd", stepsize=0.02, cfg_scale=1.5)
    return Sampler(method, network.requires_grad_(False).eval(), plan, SECONDS, batch)


@torch.no_grad()
@pytest.mark.parametrize("plan", [LABELS, SUM], ids=["classes", "sum"])
@pytest.mark.parametrize("kind", ["dot", "l2"])
def test_the_slope_of_the_traced_energy_is_the_guided_field(kind, plan):
    sampler = guided_sampler(kind, plan, 4)
    shape = sampler.network.input_shape
    x, y = sample_noise(0, range(4), shape), plan.labels([1, 2, 0, 8])
    measure, direction = sampler.energy_measure(), sample_noise(1, range(4), shape)
    value = sampler.field(y)(x)
    norms = measure(y, x, value)[:, 0]
    torch.testing.assert_close(norms, value_norms(value))
    ahead, behind = (measure(y, x + h * direction, value)[:, 1] for h in (1e-2, -1e-2))
    slope = -(value * direction).flatten(1).mean(1)  # sampling adds the field and climbs down
    torch.testing.assert_close((ahead - behind) / 2e-2, slope, rtol=5e-3, atol=5e-3 * slope.abs().max().item())


@torch.no_grad()
def test_a_network_without_an_energy_has_one_read_off_its_field():
    sampler = guided_sampler("none", LABELS, 2)
    x, value = (sample_noise(seed, range(2), sampler.network.input_shape) for seed in (0, 1))
    found = sampler.energy_measure()(torch.tensor([0, 2]), x, value)
    torch.testing.assert_close(found[:, 1], -torch.stack([(a * b).mean() for a, b in zip(x, value, strict=True)]))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dot", "l2"])
def test_the_traced_energy_falls_on_the_way(kind):
    sampler = guided_sampler(kind, LABELS, 3)
    energies, measure = [], sampler.energy_measure()

    def watch(point: torch.Tensor, value: torch.Tensor) -> None:
        energies.append(measure(torch.arange(3), point, value)[:, 1])

    sampler.descend(range(3), sampler.starts(range(3)), range(6), watch)
    assert len(energies) == 6
    assert all((after < before).all() for before, after in zip(energies, energies[1:], strict=False))


def test_each_quantity_is_plotted_by_step_with_a_line_for_each_sample():
    norm, energy = trace_plots({1: [[3.0, -4.0], [1.0, -5.0]], 0: [[2.0, -1.0]]})
    assert norm.series == {"sample 0": [(1, 2.0)], "sample 1": [(1, 3.0), (2, 1.0)]}
    assert energy.series == {"sample 0": [(1, -1.0)], "sample 1": [(1, -4.0), (2, -5.0)]}
    assert (norm.y_label, norm.log_y) == ("norm", True)
    assert (energy.y_label, energy.log_y) == ("energy", False)
