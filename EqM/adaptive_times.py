"""What samples that stop by themselves save of the time of fixed steps, for the benchmark.

The network is evaluated in full, but has not been trained, and its field's norms need not fall. So what it
returns counts nothing, and samples follow the field m − x of a quadratic energy, whose minimum m is the
further away the higher the class, and the evaluations the more.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from adaptive import Descent, Slots, to_device
from descents import Finished, Watch, fixed_descents
from fast import conditioned_field
from precision import Precision
from sampling import Field, gradient_descent, sample_noise
from workloads import NUM_CLASSES, Work

# Evaluations are spread evenly from a fifth of the cap to the cap.
DESCENT = Descent(stepsize=0.05, mu=0.0, cap=100, threshold=0.4)
FEWEST = 20


def adaptive_times(
    work: Work, precision: Precision, fast: bool, device: torch.device, samples_a_slot: int, rounds: int
) -> dict[str, float]:
    """Seconds for the same samples with fixed steps and adaptive, each the median of some rounds, and what is saved.

    The ideal saving is that of the evaluations. Where slots are kept that no sample is left for, as on a
    GPU, it is the nearer the more samples a slot has.
    """
    network = work.build(device).requires_grad_(False).eval().to(precision.dtype)
    conditioned = conditioned_field(network, work.batch, 0.1, fast)
    number = samples_a_slot * work.batch
    classes = torch.randint(NUM_CLASSES, (number,), generator=torch.Generator().manual_seed(0))  # (samples,)
    conditioned(torch.arange(NUM_CLASSES))

    def field_of(indices: Sequence[int]) -> Field:
        y = classes[list(indices)]  # (N,)
        real, known = conditioned(y), known_field(y, len(network.input_shape), device)
        return lambda x: known(x) + 0 * real(x)

    def starts(indices: Sequence[int]) -> Tensor:
        return sample_noise(0, indices, network.input_shape)

    def sample(indices: Sequence[int], steps: Iterable, watch: Watch) -> Tensor:
        return gradient_descent(field_of(indices), starts(indices).to(device), DESCENT.stepsize, steps, watch=watch)

    def fixed() -> Iterator[list[Finished]]:
        batches = [range(first, first + work.batch) for first in range(0, number, work.batch)]
        return fixed_descents(sample, batches, DESCENT.cap, 0, lambda evaluations: None)

    def adaptive() -> Iterator[list[Finished]]:
        slots = Slots(field_of, starts, range(number), work.batch, DESCENT, device, shrinks=not fast)
        finished = slots.run()
        return iter(lambda: list(islice(finished, work.batch)), [])

    field, x = field_of(range(work.batch)), starts(range(work.batch)).to(device)
    for _ in range(5):  # the graph is recorded at the fourth
        field(x)
    times, evaluations = {fixed: [], adaptive: []}, 0
    for _ in range(rounds):
        for way, found in times.items():
            seconds, evaluations = timed(way)
            found.append(seconds)
    before, after = (statistics.median(found) for found in times.values())
    mean = evaluations / number
    saved, ideal = 1 - after / before, 1 - mean / DESCENT.cap
    counts = {"samples": number, "cap": DESCENT.cap, "evaluations a sample": mean}
    return counts | {"fixed s": before, "adaptive s": after, "saved": saved, "ideal": ideal, "of ideal": saved / ideal}


def known_field(y: Tensor, axes: int, device: torch.device) -> Field:
    """The fields m − x of classes y (N,), for samples of so many axes that start from standard normal noise.

    Nothing waits for the device.
    """
    evaluations = FEWEST + (DESCENT.cap - FEWEST) * y / (NUM_CLASSES - 1)  # (N,)
    # Each step takes 1 − η of the distance, which is the norm; the start is 1 from 0.
    distances = DESCENT.threshold * (1 - DESCENT.stepsize) ** (1 - evaluations)  # (N,)
    minima = to_device((distances.square() - 1).clamp(min=0).sqrt(), device).view(-1, *[1] * axes)  # (N, 1, …)
    return lambda x: minima - x


def timed(way: Callable[[], Iterable[list[Finished]]]) -> tuple[float, int]:
    """The seconds until all samples are on the host, and their evaluations."""
    start, evaluations = time.perf_counter(), 0
    for group in way():
        torch.stack([finished.x for finished in group]).cpu()
        evaluations += sum(finished.evaluations for finished in group)
    return time.perf_counter() - start, evaluations
