"""Descent in which each sample stops by itself, in a batch that stays full.

A sample stops where its field's norm falls below a threshold (Wang & Du 2025, arXiv 2510.02300). The
field does not depend on time, so that samples at different steps share a batch: the next sample takes a
stopped one's slot at once. Nothing here knows of networks, ranks or files.
"""

import statistics
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from runtime.transfers import read_later, to_device
from sampling.descent import Field, Finished, Measure, look_ahead, norm_alone

# Steps by which the host, which reads what has stopped, may be behind a GPU: meanwhile it draws new samples' noise.
LAG = 4


@dataclass(frozen=True)
class Descent:
    """How samples descend: x ← x + η·f(x + μ·(x − x₋₁)) until f's norm is below `threshold`, `cap` times at most."""

    stepsize: float
    mu: float
    cap: int
    threshold: float


class Slots:
    """A batch of samples at different steps.

    The device itself decides which samples stop, and gives their slots to the next ones, whose starts wait in its
    memory. So no slot waits for the host, which may learn of it later: it copies samples that have stopped, and draws
    the starts of more.

    Args:
        field_of: from classes (N,) on the device to the field of a batch.
        starts: from samples' indices to where they start, (N, *shape) float32.
        labels: from samples' indices to their classes (N,).
        shape: of a sample.
        size: slots.
        progress: gets the number of evaluations that were made, or that a sample which stopped has saved.
        measure: takes the norm, which decides, and whatever else `Finished` is to have of each evaluation.
        recorded: makes of a step what a GPU replays, or leaves it as it is.
        compiled: what a step does beside the field is compiled: it is many operations on little.
        shrinks: slots go once no sample is left for them, so that none idles; not for a field that is compiled
            for batches of one size. A GPU keeps them: it would hardly be faster.
        lag: steps by which the host may be behind; default LAG on a GPU. On a CPU there is nothing to overlap: 0.
    """

    def __init__(
        self,
        field_of: Callable[[Tensor], Field],
        starts: Callable[[Sequence[int]], Tensor],
        labels: Callable[[Sequence[int]], Tensor],
        shape: Sequence[int],
        size: int,
        descent: Descent,
        device: torch.device,
        progress: Callable[[int], object] = lambda evaluations: None,
        measure: Measure = norm_alone,
        recorded: Callable[[Callable[[], Tensor]], Callable[[], Tensor]] = lambda step: step,
        compiled: bool = False,
        shrinks: bool = False,
        lag: int | None = None,
    ):
        self.field_of, self.starts, self.labels, self.descent = field_of, starts, labels, descent
        self.shape, self.size, self.device, self.progress, self.measure = shape, size, device, progress, measure
        self.lag = (LAG if device.type == "cuda" else 0) if lag is None else lag
        self.shrinks = shrinks and not self.lag  # what is under way has the slots that there were
        self.allocate()
        if compiled:
            self.fill, self.settle = (torch.compile(part, dynamic=False) for part in (self.fill, self.settle))
        self.advance = recorded(self.step)

    def allocate(self) -> None:
        """The slots, and a queue of as many samples: of all samples the k-th waits in row k modulo N."""
        zeros = partial(torch.zeros, device=self.device)
        self.x, self.previous, self.queue = (zeros(self.size, *self.shape) for _ in range(3))  # (N, …)
        # A sample goes by its place among all.
        self.y, self.sample, self.evaluations, self.queued_y = (zeros(self.size).long() for _ in range(4))  # (N,)
        self.busy = zeros(self.size).bool()  # (N,)
        self.taken, self.queued = zeros(()).long(), zeros(()).long()  # of all samples, so far

    def run(self, indices: Sequence[int]) -> Iterator[Finished]:
        """Every sample, as it stops: in the evaluation that finds the norm below the threshold, or after `cap` updates.

        One evaluation of the whole batch a step.
        """
        if len(self.x) < self.size:
            self.allocate()
        for state in (self.busy, self.sample, self.taken, self.queued):
            state.zero_()
        self.indices, self.filled, self.unfinished = list(indices), 0, len(indices)
        self.measured: dict[int, list[list[float]]] = {}  # of the samples in slots
        self.refill(0)
        self.drop_slots()
        under_way: deque[tuple[Callable[[], Tensor], Tensor]] = deque()
        while self.unfinished:
            seen = self.advance().clone()  # (N, 3 + K) which the next step overwrites, as it does x
            under_way.append((read_later(seen), self.x.clone()))
            if len(under_way) > self.lag:
                read, x = under_way.popleft()
                yield from self.finish(read().tolist(), x)

    def step(self) -> Tensor:
        """Fills free slots, and updates all but those whose samples rest. Nothing waits for the host.

        Returns:
            Of each slot (N, 3 + K), in float64: its sample, whether there is one, whether it stops, what was measured.
        """
        point = self.fill()  # (N, …)
        return self.settle(point, self.field_of(self.y)(point))

    def fill(self) -> Tensor:
        """Gives free slots to the samples at the head of the queue, as far as there are any.

        Returns:
            The points (N, …) where the field is wanted.
        """
        following = self.taken + (~self.busy).cumsum(0) - 1  # (N,) the samples that free slots would get
        fills = ~self.busy & (following < self.queued)  # (N,)
        row = following % len(self.queue)  # (N,)
        x = torch.where(self.over_samples(fills), self.queue[row], self.x)  # (N, …)
        self.previous.copy_(torch.where(self.over_samples(fills), x, self.previous))
        self.x.copy_(x)
        self.y.copy_(torch.where(fills, self.queued_y[row], self.y))
        self.sample.copy_(torch.where(fills, following, self.sample))
        self.evaluations.copy_(torch.where(fills, 0, self.evaluations))
        self.busy.logical_or_(fills)
        self.taken.add_(fills.sum())
        return look_ahead(self.x, self.previous, self.descent.mu)

    def settle(self, point: Tensor, value: Tensor) -> Tensor:
        """Updates x, but where samples rest, by the field's value (N, …) at each point; returns what `step` does."""
        value = value.float()
        after = torch.add(self.x, value, alpha=self.descent.stepsize)  # (N, …)
        measured = self.measure(self.y, point, value)  # (N, K)
        self.evaluations.add_(1)
        rests = measured[:, 0] < self.descent.threshold  # (N,)
        stops = self.busy & (rests | (self.evaluations == self.descent.cap))
        about = torch.stack([self.sample.double(), self.busy.double(), stops.double()], dim=1)  # (N, 3)
        stays = self.over_samples(rests)  # (N, 1, …)
        # Not a mere copy of x: the compiler of torch 2.14 would make it after x's update.
        self.previous.copy_(torch.where(stays, self.previous, self.x))
        self.x.copy_(torch.where(stays, self.x, after))
        self.busy.logical_and_(~stops)
        return torch.cat([about, measured.double()], dim=1)

    def over_samples(self, values: Tensor) -> Tensor:
        """Values of slots (N,) as (N, 1, …), for all elements of each sample."""
        return values.view(-1, *[1] * len(self.shape))

    def finish(self, seen: list[list[float]], x: Tensor) -> list[Finished]:
        """The samples that a step was the last of; more are queued in place of those that have left the queue."""
        finished, evaluations, last = [], 0, 0
        for place, (number, busy, stops, *numbers) in enumerate(seen):
            sample = int(number)
            last = max(last, sample)
            if busy:
                measured = self.measured.setdefault(sample, [])
                measured.append(numbers)
                evaluations += 1
            if stops:
                finished.append(Finished(self.indices[sample], x[place].clone(), len(measured), measured))
                evaluations += self.descent.cap - len(measured)
                del self.measured[sample]
        self.unfinished -= len(finished)
        self.progress(evaluations)
        self.refill(last + 1)
        self.drop_slots()
        return finished

    def refill(self, taken: int) -> None:
        """Queues samples, as far as there is room once so many of all have come into slots."""
        new = range(self.filled, min(taken + self.size, len(self.indices)))
        # A few at once, unless they are the last: each time costs the host some launches.
        if len(new) > self.size // 8 or (new and new.stop == len(self.indices)):
            rows = torch.arange(new.start, new.stop, device=self.device) % self.size  # (n,)
            indices = self.indices[new.start : new.stop]
            self.queue.index_copy_(0, rows, to_device(self.starts(indices), self.device))
            self.queued_y.index_copy_(0, rows, to_device(self.labels(indices), self.device))
            self.queued.fill_(new.stop)
            self.filled = new.stop

    def drop_slots(self) -> None:
        """Where slots may go, keeps no more than there are samples to come."""
        if self.shrinks and self.unfinished < len(self.x):
            kept = (~self.busy).int().argsort(stable=True)[: self.unfinished]  # (n,) the busy ones first
            for name in ("x", "previous", "y", "sample", "evaluations", "busy"):
                setattr(self, name, getattr(self, name)[kept])


def summary(evaluations: Sequence[int], cap: int) -> str:
    """How samples' evaluations are distributed, and what stopping saved of `cap` for each, in words."""
    mean, median = statistics.mean(evaluations), statistics.median(evaluations)
    capped = sum(count == cap for count in evaluations)
    return (
        f"evaluations a sample: mean {mean:.4g}, median {median:g}, from {min(evaluations)} to {max(evaluations)};"
        f" {capped} of {len(evaluations)} came to the cap of {cap}; {1 - mean / cap:.0%} fewer than fixed steps"
    )
