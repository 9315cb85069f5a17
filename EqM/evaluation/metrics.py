"""How far two sets of features (N, D) lie apart: Fréchet and kernel distance, precision and recall.

All are computed in float64, on the features' device. Each comes with the part that every sample has in it, to first
order. `Estimate.interval` resamples these parts. Resampling the samples themselves would need a decomposition each
time. It would also raise a Fréchet distance by about its bias, since a resampled set has fewer different samples.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

RESAMPLES, PERCENTILES = 1000, (2.5, 97.5)
SUBSETS, SUBSET_SIZE, SUBSET_SEED = 100, 1000, 2020  # torch-fidelity's
SPLITS, SPLIT_SUBSETS = 5, 10  # times that the real samples are halved, and subsets for each time
LEAST_FOR_KERNEL = 20  # samples; with fewer, the interval says nothing
NEIGHBOURS = 3  # Kynkäänniemi et al. 2019
ROWS = 4096  # in memory at once, of a matrix over all pairs


@dataclass(frozen=True)
class Estimate:
    """A metric of two sets of N and M samples, and how it depends on each sample.

    Let sample i of the first set have the weight 1 + w_i, where the w_i add up to 0. To first order, this adds
    mean(w · of_first) to the value. The same holds for the second set. `of_first` (N,) and `of_second` (M,) have the
    mean 0.
    """

    value: float
    of_first: Tensor
    of_second: Tensor

    def interval(self, seed: int = 0) -> tuple[float, float]:
        """The bootstrap's PERCENTILES, from RESAMPLES resamples of both sets."""
        rng = np.random.default_rng(seed)
        deviations = sum(resampled_means(part.cpu().numpy(), rng) for part in (self.of_first, self.of_second))
        low, high = np.percentile(deviations, PERCENTILES)
        return float(self.value + low), float(self.value + high)


def resampled_means(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws N of the values (N,) with replacement, RESAMPLES times, and returns the means: (RESAMPLES,)."""
    return np.array([values[rng.integers(0, len(values), len(values))].mean() for _ in range(RESAMPLES)])


def root(x: Tensor) -> Tensor:
    """Returns R (min(N, D), D), such that Rᵀ·R is the covariance of samples (N, D)."""
    return torch.linalg.qr(x - x.mean(0), mode="r")[1] / (len(x) - 1) ** 0.5


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2·(Σ₁·Σ₂)^½) of the normal distributions with the samples' moments.

    Source: Dowson & Landau 1982; as FID, Heusel et al. 2017. With Σ = Rᵀ·R the last trace is the sum of
    R₁·R₂ᵀ's singular values.
    """
    r1, r2 = root(first.double()), root(second.double())
    return from_roots(first, second, r1, r2, torch.linalg.svdvals(r2 @ r1.T))


def from_roots(first: Tensor, second: Tensor, r1: Tensor, r2: Tensor, singular: Tensor) -> float:
    """`frechet_distance` of sets with these roots, from the singular values of R₁·R₂ᵀ."""
    means = (first.double().mean(0) - second.double().mean(0)).square().sum()
    return float(means + r1.square().sum() + r2.square().sum() - 2 * singular.sum())


def frechet_estimate(first: Tensor, second: Tensor) -> Estimate:
    """`frechet_distance` with each sample's part. Both sets need more samples than features.

    The derivative by Σ₂ is I − T, with T = Σ₁^½·(Σ₁^½·Σ₂·Σ₁^½)^−½·Σ₁^½ (the optimal map from the second
    distribution to the first), by μ₂ it is 2·(μ₂ − μ₁), and so for the first.
    """
    first, second = first.double(), second.double()
    r1, r2 = root(first), root(second)
    u, s, v = torch.linalg.svd(r2 @ r1.T)  # (D, D), (D,), (D, D)
    s_inverse = 1 / s.clamp_min(1e-12 * s.max())
    to_first = r1.T @ (v.T * s_inverse) @ v @ r1  # (D, D)
    to_second = r2.T @ (u * s_inverse) @ u.T @ r2  # (D, D)

    def parts(x: Tensor, other: Tensor, transport: Tensor) -> Tensor:
        centred = x - x.mean(0)  # (N, D)
        parts = 2 * centred @ (x.mean(0) - other.mean(0)) + (centred * (centred - centred @ transport)).sum(1)
        return parts - parts.mean()  # (N,)

    value = from_roots(first, second, r1, r2, s)
    return Estimate(value, parts(first, second, to_second), parts(second, first, to_first))


def kernel(x: Tensor, y: Tensor) -> Tensor:
    """(xᵢ·yⱼ / D + 1)³ for all pairs of samples (N, D) and (M, D): (N, M)."""
    k = x @ y.T / x.shape[1] + 1
    return k * k * k


def kernel_distance(
    first: Tensor, second: Tensor, subset_size: int, subsets: int = SUBSETS, seed: int = SUBSET_SEED
) -> float:
    """The squared maximum mean discrepancy under `kernel`, unbiased, averaged over random subsets of both sets.

    Source: Bińkowski et al. 2018 (KID). For the same seed, the subsets are those of torch-fidelity. If both sets have
    `subset_size` samples, every subset is the whole set, and one is enough.
    """
    first, second = first.double(), second.double()
    if len(first) == len(second) == subset_size:
        return discrepancy(first, second)
    rng, values = np.random.RandomState(seed), []
    for _ in range(subsets):
        chosen = [torch.from_numpy(rng.choice(len(x), subset_size, replace=False)) for x in (first, second)]
        values.append(discrepancy(first[chosen[0]], second[chosen[1]]))
    return float(np.mean(values))


def discrepancy(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy of equally many samples (n, D)."""
    n = len(x)
    within = [(k.sum() - k.diagonal().sum()) / (n * (n - 1)) for k in (kernel(x, x), kernel(y, y))]
    return float(sum(within) - 2 * kernel(x, y).mean())


def kernel_estimate(first: Tensor, second: Tensor) -> Estimate:
    """`kernel_distance` over subsets of at most SUBSET_SIZE samples, with each sample's part."""
    first, second = first.double(), second.double()

    def parts(x: Tensor, other: Tensor) -> Tensor:
        parts = [
            2 * (kernel(rows, x).mean(1) - kernel(rows, other).mean(1))  # (rows,)
            for rows in x.split(ROWS)
        ]
        parts = torch.cat(parts)  # (N,)
        return parts - parts.mean()

    value = kernel_distance(first, second, min(SUBSET_SIZE, len(first), len(second)))
    return Estimate(value, parts(first, second), parts(second, first))


def within_neighbourhoods(x: Tensor, of: Tensor) -> Tensor:
    """Which samples x (N, D) lie in the neighbourhood of one of the others (M, D): (N,) bool.

    The neighbourhood of a sample of `of` reaches to its NEIGHBOURS-th nearest neighbour within `of`.
    """
    x, of = x.double(), of.double()
    radii = [
        torch.cdist(rows, of).kthvalue(NEIGHBOURS + 1).values for rows in of.split(ROWS)
    ]  # + 1: the first is itself
    radii = torch.cat(radii)  # (M,)
    return torch.cat([(torch.cdist(rows, of) <= radii).any(1) for rows in x.split(ROWS)])


def precision_estimate(first: Tensor, second: Tensor) -> Estimate:
    """The share of the second set (generated) that lies within the first set's (real) neighbourhoods.

    Source: Kynkäänniemi et al. 2019. The parts hold the neighbourhoods fixed: copies of a sample would shrink them.
    """
    inside = within_neighbourhoods(second, first).double()  # (M,)
    return Estimate(float(inside.mean()), torch.zeros(len(first)).double(), inside - inside.mean())


def recall_estimate(first: Tensor, second: Tensor) -> Estimate:
    """The share of the first set (real) that lies within the second set's (generated) neighbourhoods."""
    swapped = precision_estimate(second, first)
    return Estimate(swapped.value, swapped.of_second, swapped.of_first)


def frechet_wants(samples: int, dimensions: int) -> str:
    """Why so many samples of so many features have no Fréchet distance, or ""."""
    if samples > dimensions:
        return ""
    return f"{samples} samples, and a covariance of {dimensions} features needs more than {dimensions}"


def kernel_wants(samples: int, dimensions: int) -> str:
    """Why so many samples have no kernel distance, or ""."""
    return "" if samples >= LEAST_FOR_KERNEL else f"{samples} samples, and it needs {LEAST_FOR_KERNEL}"


def neighbours_want(samples: int, dimensions: int) -> str:
    """Why so many samples have no precision and recall, or ""."""
    return "" if samples > NEIGHBOURS else f"{samples} samples, and it needs more than its {NEIGHBOURS} neighbours"


@dataclass(frozen=True)
class Metric:
    """A metric of real and generated features, (N, D) and (M, D), by name.

    `value` alone is cheaper than `estimate`. `too_few` takes the samples of the smaller set and D; it returns why
    they are too few, or "".
    """

    name: str
    value: Callable[[Tensor, Tensor], float]
    estimate: Callable[[Tensor, Tensor], Estimate]
    too_few: Callable[[int, int], str]


def kernel_value(first: Tensor, second: Tensor) -> float:
    """`kernel_distance` over SPLIT_SUBSETS subsets, which is cheaper."""
    return kernel_distance(first, second, min(SUBSET_SIZE, len(first), len(second)), SPLIT_SUBSETS)


def precision_share(first: Tensor, second: Tensor) -> float:
    """The value of `precision_estimate`."""
    return float(within_neighbourhoods(second, first).double().mean())


def recall_share(first: Tensor, second: Tensor) -> float:
    """The value of `recall_estimate`."""
    return precision_share(second, first)


METRICS = (
    Metric("Fréchet distance", frechet_distance, frechet_estimate, frechet_wants),
    Metric("kernel distance", kernel_value, kernel_estimate, kernel_wants),
    Metric("precision", precision_share, precision_estimate, neighbours_want),
    Metric("recall", recall_share, recall_estimate, neighbours_want),
)


@dataclass(frozen=True)
class Halves:
    """A metric at equal counts: real against real (the floor), and generated against the same real samples.

    Both lists have one number per split. `samples` is the count of every set.
    """

    samples: int
    floor: list[float]
    generated: list[float]


def equal_count(real: int, generated: int) -> int:
    """The most samples that the real set has twice, and the generated set once."""
    return min(real // 2, generated)


def at_equal_counts(metric: Metric, real: Tensor, generated: Tensor, seed: int = 0) -> Halves:
    """Compares random real samples (N, D) with as many other real ones, and with as many generated ones (M, D).

    Distances and shares depend on the number of samples, so only numbers at equal counts can be compared.
    """
    samples, rng = equal_count(len(real), len(generated)), np.random.default_rng(seed)
    floor, values = [], []
    for _ in range(SPLITS):
        order = torch.from_numpy(rng.permutation(len(real)))
        reference, other = real[order[:samples]], real[order[samples : 2 * samples]]
        drawn = generated[torch.from_numpy(rng.permutation(len(generated))[:samples])]
        floor.append(metric.value(reference, other))
        values.append(metric.value(reference, drawn))
    return Halves(samples, floor, values)
