"""Metrics of features against closed forms, against torch-fidelity, and against what resampling gives."""

import numpy as np
import pytest
import torch
from torch import Tensor

from evaluation import metrics
from evaluation.metrics import (
    METRICS,
    at_equal_counts,
    frechet_distance,
    frechet_estimate,
    kernel_distance,
    kernel_estimate,
    precision_estimate,
    recall_estimate,
)


def normal(n: int, d: int, seed: int, mean: float = 0.0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return mean + scale * torch.randn(n, d, generator=generator, dtype=torch.float64)


def with_moments(n: int, mean: Tensor, covariance: Tensor, seed: int) -> Tensor:
    """Samples (n, D) whose own mean and covariance are exactly these."""
    x = normal(n, len(mean), seed)
    x = torch.linalg.qr(x - x.mean(0))[0] * (n - 1) ** 0.5  # mean 0, covariance 1
    return x @ torch.linalg.cholesky(covariance).T + mean


def covariance(d: int, seed: int) -> Tensor:
    x = normal(2 * d, d, seed)
    return x.T @ x / len(x)


def test_the_frechet_distance_of_two_gaussians_is_the_closed_form():
    """Of commuting covariances it is |μ₁ − μ₂|² + Σ (σ₁ − σ₂)², which a rotation does not change."""
    mean, d1, d2 = (
        torch.tensor([1.0, -2, 0, 0.5]).double(),
        torch.tensor([4.0, 1, 9, 0.25]),
        torch.tensor([1.0, 1, 4, 1]),
    )
    turn = torch.linalg.qr(normal(4, 4, 0))[0]
    first = with_moments(50, torch.zeros(4).double(), turn @ d1.double().diag() @ turn.T, 1)
    second = with_moments(70, mean, turn @ d2.double().diag() @ turn.T, 2)
    expected = 1 + 4 + 0.25 + (d1.sqrt() - d2.sqrt()).square().sum().item()
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)


def test_the_frechet_distance_of_general_covariances_is_that_of_their_root():
    a, b = covariance(6, 0), covariance(6, 1)
    values, vectors = torch.linalg.eigh(a)
    root = vectors @ values.sqrt().diag() @ vectors.T
    expected = a.trace() + b.trace() - 2 * torch.linalg.eigvalsh(root @ b @ root).sqrt().sum()
    zero = torch.zeros(6).double()
    found = frechet_distance(with_moments(40, zero, a, 2), with_moments(40, zero, b, 3))
    assert found == pytest.approx(expected.item(), rel=1e-9)


def test_distances_and_shares_equal_those_of_torch_fidelity():
    fid, kid, prc = (pytest.importorskip(f"torch_fidelity.metric_{name}") for name in ("fid", "kid", "prc"))
    first, second = normal(300, 32, 0), normal(260, 32, 1, 0.3, 1.2)
    theirs = fid.fid_statistics_to_metric(*map(fid.fid_features_to_statistics, (first, second)), verbose=False)
    assert frechet_distance(first, second) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    assert frechet_estimate(first, second).value == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    settings = {"kid_subset_size": 100, "kid_subsets": 20, "verbose": False}
    theirs = kid.kid_features_to_metric(first, second, **settings)["kernel_inception_distance_mean"]
    assert kernel_distance(first, second, 100, 20) == pytest.approx(theirs, rel=1e-6)
    theirs = kid.kid_features_to_metric(first, second, kid_subset_size=260, verbose=False)
    assert kernel_estimate(first, second).value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)
    theirs = prc.prc_features_to_metric(second, first, verbose=False)  # generated, real
    assert precision_estimate(first, second).value == pytest.approx(theirs["precision"], rel=1e-6)
    assert recall_estimate(first, second).value == pytest.approx(theirs["recall"], rel=1e-6)


def test_the_kernel_distance_is_the_mean_over_pairs_and_unbiased():
    x, y = normal(5, 3, 0), normal(5, 3, 1)

    def k(a: Tensor, b: Tensor) -> float:
        return float((a @ b / 3 + 1) ** 3)

    within = [np.mean([k(s[i], s[j]) for i in range(5) for j in range(5) if i != j]) for s in (x, y)]
    between = np.mean([k(a, b) for a in x for b in y])
    assert kernel_distance(x, y, 5) == pytest.approx(sum(within) - 2 * between, rel=1e-9)
    same = [kernel_distance(normal(30, 4, 2 * i), normal(30, 4, 2 * i + 1), 30) for i in range(200)]
    assert abs(np.mean(same)) < 4 * np.std(same) / 200**0.5


def test_precision_and_recall_count_what_lies_within_neighbourhoods():
    """Real samples every 1 along a line: the third nearest of an inner one is 2 away, of an end 3."""
    real = torch.arange(10.0).double()[:, None]
    generated = torch.tensor([[-2.9], [-3.1], [4.4], [12.1], [5.0], [5.1]]).double()
    assert precision_estimate(real, generated).value == pytest.approx(4 / 6)
    # The radii of the generated ones are 8, 8.2, 7.3, 7.7, 7.1 and 7: all reach some, and together all.
    assert recall_estimate(real, generated).value == 1
    near = torch.tensor([[4.0], [4.1], [4.2], [4.3]]).double()
    assert recall_estimate(real, near).value == pytest.approx(1 / 10)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_every_sample_has_a_part_and_they_add_up_to_nothing(metric):
    first, second = normal(400, 3, 0), normal(400, 3, 1, 0.4, 1.3)
    estimate = metric.estimate(first, second)
    assert estimate.of_first.shape == (400,)
    assert estimate.of_second.shape == (400,)
    assert estimate.of_first.mean().abs() < 1e-9
    assert estimate.of_second.mean().abs() < 1e-9
    assert metric.value(first, second) == pytest.approx(estimate.value, rel=1e-9)


def test_the_parts_of_a_frechet_distance_are_its_derivative_by_the_samples_weights():
    """A sample once more, of N: to first order its part / (N + 1) more, which many samples make exact enough."""
    first, second = normal(4000, 3, 0), normal(5000, 3, 1, 0.4, 1.3)
    estimate = frechet_estimate(first, second)
    for i in range(8):
        more = (frechet_distance(first, torch.cat([second, second[i : i + 1]])) - estimate.value) * 5001
        assert estimate.of_second[i].item() == pytest.approx(more, rel=0.05, abs=0.1)
        more = (frechet_distance(torch.cat([first, first[i : i + 1]]), second) - estimate.value) * 4001
        assert estimate.of_first[i].item() == pytest.approx(more, rel=0.05, abs=0.1)
    assert estimate.of_second[:8].std() > 0.5


@pytest.mark.parametrize(
    ("name", "shift"), [("frechet_estimate", 0.5), ("frechet_estimate", 0.0)] + [("kernel_estimate", 0.5)]
)
def test_intervals_hold_the_mean_of_many_repetitions_about_as_often_as_they_say(name, shift):
    estimates = [getattr(metrics, name)(normal(150, 4, 2 * i), normal(150, 4, 2 * i + 1, shift)) for i in range(100)]
    mean = np.mean([estimate.value for estimate in estimates])
    held = sum(low <= mean <= high for low, high in (estimate.interval() for estimate in estimates))
    assert held >= 83  # of 100, at 95%
    widths = [np.diff(estimate.interval())[0] for estimate in estimates]
    spread = np.std([estimate.value for estimate in estimates])
    assert np.median(widths) < 2 * 2 * 1.96 * spread


def test_resampling_follows_from_the_seed():
    first, second = normal(50, 2, 0), normal(60, 2, 1, 1.0)
    estimate = kernel_estimate(first, second)
    assert estimate.interval(3) == estimate.interval(3) != estimate.interval(4)
    estimate = precision_estimate(first, second)
    low, high = estimate.interval()
    assert 0 <= low < estimate.value < high <= 1


def test_the_floor_and_the_comparison_at_equal_counts_use_that_many_samples():
    seen = []

    def value(first: Tensor, second: Tensor) -> float:
        seen.append((first, second))
        return float(second[0, 0])

    metric = metrics.Metric("counting", value, None, None)
    real, generated = torch.arange(9.0)[:, None], 100 + torch.arange(3.0)[:, None]
    halves = at_equal_counts(metric, real, generated)
    assert halves.samples == 3
    assert len(halves.floor) == len(halves.generated) == metrics.SPLITS
    for (reference, other), (same, drawn) in zip(seen[::2], seen[1::2], strict=True):
        assert len(reference) == len(other) == len(drawn) == 3
        assert not set(reference.flatten().tolist()) & set(other.flatten().tolist())
        assert torch.equal(reference, same)
        assert drawn.min() >= 100 > other.max()
    assert at_equal_counts(metric, real, torch.arange(50.0)[:, None]).samples == 4


def test_too_few_samples_are_a_reason():
    frechet, kernel, precision, recall = METRICS
    assert frechet.too_few(65, 64) == ""
    assert frechet.too_few(64, 64) == "64 samples, and a covariance of 64 features needs more than 64"
    assert "needs 20" in kernel.too_few(19, 64)
    assert kernel.too_few(20, 64) == ""
    assert "more than its 3 neighbours" in precision.too_few(3, 64)
    assert recall.too_few(4, 64) == ""
