"""How much time adaptive sampling saves against fixed steps.

The network is evaluated completely, but its result is multiplied by 0: it is not trained, so the norms of its field
need not fall. Samples follow the field m − x of a quadratic energy instead. Its minimum m depends on the class: for a
higher class it lies further from the start, and samples take more evaluations.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from compiled import Speed
from graphs import replayed
from measuring.workloads import NUM_CLASSES, Work
from precision import Precision
from runtime.random_numbers import sample_noise
from runtime.transfers import read_later, to_device
from sampling.adaptive import Descent, Slots
from sampling.descent import Field, Finished, Watch, fixed_descents, gradient_descent
from sampling.fields import conditioned_field

# Evaluations are spread evenly from a fifth of the cap to the cap.
DESCENT = Descent(stepsize=0.05, mu=0.0, cap=100, threshold=0.4)
FEWEST = 20


class Descents:
    """The same samples with fixed steps and adaptively, on a network that only takes time.

    Args:
        number: how many samples, a multiple of the work's batch.
    """

    def __init__(self, work: Work, precision: Precision, speed: Speed, device: torch.device, number: int):
        self.network = work.build(device).requires_grad_(False).eval().to(precision.dtype)
        self.batch, self.fast, self.device, self.number = work.batch, speed.fast, device, number
        self.shape = self.network.input_shape
        self.classes = torch.randint(NUM_CLASSES, (number,), generator=torch.Generator().manual_seed(0))  # (samples,)
        self.minima = known_minima(len(self.shape)).to(device)  # (classes, 1, …)
        self.fixed_field = self.field(recorded=True)
        recorded = partial(replayed, fast=speed.fast, device=device)
        self.slots = Slots(
            self.field(recorded=False),
            self.starts,
            self.labels,
            self.shape,
            work.batch,
            DESCENT,
            device,
            recorded=recorded,
            compiled=speed.compiled,
            shrinks=not speed.fast,
        )

    def field(self, recorded: bool) -> Callable[[Tensor], Field]:
        """A function of classes (N,) that returns the field of a batch."""
        conditioned = conditioned_field(self.network, self.batch, 0.1, self.fast, recorded)
        conditioned(torch.arange(NUM_CLASSES))

        def field_of(y: Tensor) -> Field:
            real, known = conditioned(y), self.minima[y.to(self.device, non_blocking=True)]  # (N, 1, …)
            return lambda x: known - x + 0 * real(x)

        return field_of

    def labels(self, indices: Sequence[int]) -> Tensor:
        return self.classes[list(indices)]

    def starts(self, indices: Sequence[int]) -> Tensor:
        return sample_noise(0, indices, self.shape)

    def starts_on_device(self, indices: Sequence[int]) -> Tensor:
        return to_device(self.starts(indices), self.device)

    def sample(self, indices: Sequence[int], x: Tensor, steps: Iterable, watch: Watch) -> Tensor:
        return gradient_descent(self.fixed_field(self.labels(indices)), x, DESCENT.stepsize, steps, watch=watch)

    def fixed(self) -> Iterator[list[Finished]]:
        batches = [range(first, first + self.batch) for first in range(0, self.number, self.batch)]
        return fixed_descents(
            self.sample, self.starts_on_device, self.labels, batches, DESCENT.cap, 0, lambda evaluations: None
        )

    def adaptive(self) -> Iterator[list[Finished]]:
        finished = self.slots.run(range(self.number))
        return iter(lambda: list(islice(finished, self.batch)), [])

    def warm_up(self) -> None:
        """Compiles, and records the graphs, which happens at the fourth call."""
        field, x = self.fixed_field(self.labels(range(self.batch))), self.starts(range(self.batch)).to(self.device)
        for _ in range(5):
            field(x)
        if self.fast:
            list(self.slots.run(range(self.batch)))


def adaptive_times(
    work: Work, precision: Precision, speed: Speed, device: torch.device, samples_a_slot: int, rounds: int
) -> dict[str, float]:
    """Seconds for the same samples with fixed steps and adaptively, medians over rounds, and the share of time saved.

    The ideal is the share of evaluations saved. A GPU keeps the slots for which no sample is left. So more samples for
    each slot bring the time saved closer to the ideal.
    """
    number = samples_a_slot * work.batch
    descents = Descents(work, precision, speed, device, number)
    descents.warm_up()
    times, evaluations = {descents.fixed: [], descents.adaptive: []}, 0
    for _ in range(rounds):
        for way, found in times.items():
            seconds, evaluations = timed(way)
            found.append(seconds)
    before, after = (statistics.median(found) for found in times.values())
    mean = evaluations / number
    saved, ideal = 1 - after / before, 1 - mean / DESCENT.cap
    counts = {"samples": number, "cap": DESCENT.cap, "evaluations a sample": mean}
    return counts | {"fixed s": before, "adaptive s": after, "saved": saved, "ideal": ideal, "of ideal": saved / ideal}


def known_minima(axes: int) -> Tensor:
    """The minima m of the classes' energies, (classes, 1, …), for samples with this many axes. The field is m − x."""
    evaluations = torch.linspace(FEWEST, DESCENT.cap, NUM_CLASSES)  # (classes,)
    # The field's norm is the distance to m. A step multiplies it by 1 − η. Starts are normal noise, with norm 1.
    distances = DESCENT.threshold * (1 - DESCENT.stepsize) ** (1 - evaluations)  # (classes,)
    return (distances.square() - 1).clamp(min=0).sqrt().view(-1, *[1] * axes)


def timed(way: Callable[[], Iterable[list[Finished]]]) -> tuple[float, int]:
    """Seconds until all samples are on the host, and the evaluations of all samples."""
    start, evaluations, reading = time.perf_counter(), 0, deque()
    for group in way():
        reading.append(read_later(torch.stack([finished.x for finished in group])))
        if len(reading) > 1:
            reading.popleft()()
        evaluations += sum(finished.evaluations for finished in group)
    for read in reading:
        read()
    return time.perf_counter() - start, evaluations
