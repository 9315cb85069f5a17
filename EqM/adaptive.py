"""Descent in which each sample stops by itself, in a batch that stays full.

A sample stops where its field's norm falls below a threshold (Wang & Du 2025, arXiv 2510.02300). The
field does not depend on time, so that samples at different steps share a batch: the next sample takes a
stopped one's slot at once. Nothing here knows of networks, ranks or files.
"""

import statistics
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from descents import Finished, Measure, norm_alone
from sampling import Field, update


@dataclass(frozen=True)
class Descent:
    """How samples descend: x ← x + η·f(x + μ·(x − x₋₁)) until f's norm is below `threshold`, `cap` times at most."""

    stepsize: float
    mu: float
    cap: int
    threshold: float


@dataclass(frozen=True)
class Step:
    """A batch (N, …) before and after an update, and what reads what was measured, which decides whether it counts."""

    before: Tensor
    after: Tensor
    read: Callable[[], list[list[float]]]


class Slots:
    """A batch of samples at different steps.

    The host learns of a step's norms while the device is at the step after (`lag` 1), so that the device
    never waits for the host; in turn a slot whose sample has stopped makes one evaluation that does not count.
    On a CPU there is nothing to overlap, and lag is 0.

    Args:
        field_of: from the samples' indices, as many as there are slots, to their field.
        starts: from samples' indices to where they start, (N, …) float32.
        indices: the samples.
        size: slots; there are as many as samples if those are fewer.
        progress: gets the number of evaluations that were made, or that a sample which stopped has saved.
        measure: takes the norm, which decides, and whatever else `Finished` is to have of each evaluation.
        shrinks: slots go once no sample is left for them, so that none idles; not for a field that is compiled
            for batches of one size. A GPU keeps them: it would hardly be faster.
    """

    def __init__(
        self,
        field_of: Callable[[Sequence[int]], Field],
        starts: Callable[[Sequence[int]], Tensor],
        indices: Sequence[int],
        size: int,
        descent: Descent,
        device: torch.device,
        progress: Callable[[int], object] = lambda evaluations: None,
        shrinks: bool = False,
        lag: int | None = None,
        measure: Measure = norm_alone,
    ):
        self.field_of, self.starts, self.descent, self.progress = field_of, starts, descent, progress
        self.measure = measure
        self.lag = int(device.type == "cuda") if lag is None else lag
        self.shrinks = shrinks and not self.lag  # what is under way has the slots that there were
        self.indices = list(indices[:size])
        self.waiting = deque(indices[size:])
        self.busy = [True] * len(self.indices)
        self.measured: list[list[list[float]]] = [[] for _ in self.indices]
        self.stale = [0] * len(self.indices)  # evaluations under way of the sample that a slot had before
        if self.indices:
            self.x = self.previous = to_device(starts(self.indices), device).clone()  # (N, …), written to
            self.field = field_of(self.indices)

    def run(self) -> Iterator[Finished]:
        """Every sample, as it stops: in the evaluation that finds the norm below the threshold, or after `cap` updates.

        One evaluation of the whole batch a step.
        """
        under_way: deque[Step] = deque()
        while any(self.busy):
            under_way.append(self.step())
            if len(under_way) > self.lag:
                yield from self.finish(under_way.popleft())

    def step(self) -> Step:
        before = self.x
        descent = self.descent
        self.x, point, value = update(self.field, before, self.previous, descent.stepsize, descent.mu)  # (N, …)
        self.previous = before
        return Step(before, self.x, read_later(self.measure(self.indices, point, value)))

    def finish(self, step: Step) -> list[Finished]:
        """The samples that the step was the last of; others take their slots."""
        places, finished, evaluations = [], [], 0
        for place, numbers in enumerate(step.read()):
            if self.stale[place]:
                self.stale[place] -= 1
            elif self.busy[place]:
                measured = self.measured[place]
                measured.append(numbers)
                evaluations += 1
                stops = numbers[0] < self.descent.threshold
                if stops or len(measured) == self.descent.cap:
                    x = (step.before if stops else step.after)[place].clone()  # (…)
                    finished.append(Finished(self.indices[place], x, len(measured), measured))
                    places.append(place)
                    evaluations += self.descent.cap - len(measured)
        self.progress(evaluations)
        self.fill(places)
        return finished

    def fill(self, places: list[int]) -> None:
        """Gives slots to the next samples, as far as there are any."""
        filled, idle = places[: len(self.waiting)], places[len(self.waiting) :]
        if filled:
            new = [self.waiting.popleft() for _ in filled]
            starts = to_device(self.starts(new), self.x.device)  # (n, …)
            for place, index, start in zip(filled, new, starts, strict=True):
                self.indices[place], self.measured[place], self.stale[place] = index, [], self.lag
                self.x[place] = start
                self.previous[place] = start
        for place in idle:
            self.busy[place] = False
        if idle and self.shrinks:
            self.drop_idle()
        if any(self.busy) and (filled or self.shrinks and idle):
            self.field = self.field_of(self.indices)

    def drop_idle(self) -> None:
        kept = [place for place, busy in enumerate(self.busy) if busy]
        self.x, self.previous = self.x[kept], self.previous[kept]  # (n, …)
        self.indices, self.measured = [self.indices[p] for p in kept], [self.measured[p] for p in kept]
        self.busy, self.stale = [True] * len(kept), [0] * len(kept)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Float32 values from the host on the device, which the host does not wait for."""
    if device.type == "cuda" and not values.is_cuda:
        values = values.pin_memory()
    return values.to(device, torch.float32, non_blocking=True)


def read_later(values: Tensor) -> Callable[[], list[list[float]]]:
    """Starts to copy values (N, K) to the host; what it returns waits for this copy alone."""
    if not values.is_cuda:
        return values.tolist
    host, copied = values.to("cpu", non_blocking=True), torch.cuda.Event()
    copied.record()

    def read() -> list[list[float]]:
        copied.synchronize()
        return host.tolist()

    return read


def summary(evaluations: Sequence[int], cap: int) -> str:
    """How samples' evaluations are distributed, and what stopping saved of `cap` for each, in words."""
    mean, median = statistics.mean(evaluations), statistics.median(evaluations)
    capped = sum(count == cap for count in evaluations)
    return (
        f"evaluations a sample: mean {mean:.4g}, median {median:g}, from {min(evaluations)} to {max(evaluations)};"
        f" {capped} of {len(evaluations)} came to the cap of {cap}; {1 - mean / cap:.0%} fewer than fixed steps"
    )
