"""Random numbers that depend only on their place: a seed and a position in the work."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def seed_draws(generator: torch.Generator, *place: int) -> None:
    """Seeds a generator with a place, as (seed, samples drawn before, rank). A resumed run draws the same numbers."""
    generator.manual_seed(int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0]))


def keyed_uniforms(seed: int, keys: list[tuple[int, int]]) -> np.ndarray:
    """Two uniform numbers in [0, 1) for each key (epoch, index), (N, 2), from the seed and the key alone.

    SplitMix64's mixing function (Steele, Lea & Flood 2014) over seed, epoch and index. A generator for each sample
    would take longer than reading the sample from a pack.
    """
    golden, shifts = np.array([0x9E3779B97F4A7C15], np.uint64), [np.uint64(shift) for shift in (30, 27, 31, 11)]
    factors = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)

    def mix(z: np.ndarray) -> np.ndarray:
        z = (z ^ (z >> shifts[0])) * factors[0]
        z = (z ^ (z >> shifts[1])) * factors[1]
        return z ^ (z >> shifts[2])

    state = np.array([seed], np.uint64)
    for part in np.array(keys, np.uint64).T:
        state = mix(state + golden) ^ part  # (N,)
    return np.stack([(mix(state + golden * np.uint64(i)) >> shifts[3]) * 2.0**-53 for i in (1, 2)], axis=1)


def sample_noise(seed: int, indices: Sequence[int], shape: Sequence[int], window: int = 0) -> Tensor:
    """Standard normal noise (len(indices), *shape) on the CPU, each sample from (seed, its index) alone.

    A sample thus starts from the same noise in any batch, on any device and in any process. A long video has other
    noise in each `window`.
    """
    place = (window,) if window else ()
    generator = torch.Generator()

    def draw(index: int) -> Tensor:
        seed_draws(generator, seed, index, *place)
        return torch.randn(*shape, generator=generator)

    return torch.stack([draw(index) for index in indices])
