"""Descent in which each sample stops by itself, in a batch that stays full.

A sample stops when the norm of its field falls below a threshold (Wang & Du 2025, arXiv 2510.02300). The
field does not depend on time, so samples at different steps share a batch. When a sample stops, the next one
takes its slot at once. Nothing here knows of networks, ranks or files.
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

# The host may be so many steps behind a GPU. Meanwhile it draws the noise of new samples.
LAG = 4


@dataclass(frozen=True)
class Descent:
    """How samples descend: x ← x + η·f(x + μ·(x − x₋₁)), until the norm of f is below `threshold`.

    Attributes:
        stepsize: η.
        mu: look-ahead.
        cap: a sample makes at most so many updates.
        threshold: for the norm, a root mean square.
    """

    stepsize: float
    mu: float
    cap: int
    threshold: float


class Slots:
    """A batch of samples at different steps.

    The device itself decides which samples stop. It gives their slots to the next samples, whose starts wait in its
    memory. So no slot waits for the host. The host learns of it some steps later: it copies the samples that have
    stopped, and draws more starts.

    Args:
        field_of: gives the field of a batch from classes (N,) on the device.
        starts: gives the starts (N, *shape), float32, from the indices of samples.
        labels: gives the classes (N,) from the indices of samples.
        shape: the shape of a sample.
        size: the number of slots.
        progress: gets the number of evaluations that were made, or that a stopped sample has saved.
        measure: measures each evaluation. The first number is the norm, and it decides.
        recorded: turns a step into one that a GPU replays, or returns it unchanged.
        compiled: compile the parts of a step around the field: they are many operations on little data.
        shrinks: if True, drop empty slots at the end. Leave False for a field compiled for one batch size. A GPU
            keeps its slots in any case: it would hardly be faster.
        lag: steps by which the host may be behind. Default LAG on a GPU, and 0 on a CPU, where nothing overlaps.
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
        self.shrinks = shrinks and not self.lag  # a step under way would still have the old number of slots
        self.allocate()
        if compiled:
            self.fill, self.settle = (torch.compile(part, dynamic=False) for part in (self.fill, self.settle))
        self.advance = recorded(self.step)

    def allocate(self) -> None:
        """The slots, and a queue of as many samples: the k-th of all samples waits in row k modulo N."""
        zeros = partial(torch.zeros, device=self.device)
        self.x, self.previous, self.queue = (zeros(self.size, *self.shape) for _ in range(3))  # (N, …)
        # `sample` holds the place of a sample among all.
        self.y, self.sample, self.evaluations, self.queued_y = (zeros(self.size).long() for _ in range(4))  # (N,)
        self.busy = zeros(self.size).bool()  # (N,)
        self.taken, self.queued = zeros(()).long(), zeros(()).long()  # of all samples, so far

    def run(self, indices: Sequence[int]) -> Iterator[Finished]:
        """Every sample, as it stops: at the evaluation whose norm is below the threshold, or after `cap` updates.

        A step evaluates the whole batch once.
        """
        if len(self.x) < self.size:
            self.allocate()
        for state in (self.busy, self.sample, self.taken, self.queued):
            state.zero_()
        self.indices, self.filled, self.unfinished = list(indices), 0, len(indices)
        self.measured: dict[int, list[list[float]]] = {}  # by sample, for those in slots
        self.refill(0)
        self.drop_slots()
        under_way: deque[tuple[Callable[[], Tensor], Tensor]] = deque()
        while self.unfinished:
            seen = self.advance().clone()  # (N, 3 + K), a copy: the next step overwrites it, and x
            under_way.append((read_later(seen), self.x.clone()))
            if len(under_way) > self.lag:
                read, x = under_way.popleft()
                yield from self.finish(read().tolist(), x)

    def step(self) -> Tensor:
        """Fills free slots, and updates every slot whose sample does not rest. Nothing waits for the host.

        Returns:
            (N, 3 + K) float64: for each slot its sample, whether it is busy, whether it stops, and the K measured
            numbers.
        """
        point = self.fill()  # (N, …)
        return self.settle(point, self.field_of(self.y)(point))

    def fill(self) -> Tensor:
        """Gives free slots to the samples at the head of the queue.

        Returns:
            The points (N, …) where the field is to be evaluated.
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
        """Updates x by the value (N, …) of the field at each point, except where samples rest. Returns as `step`."""
        value = value.float()
        after = torch.add(self.x, value, alpha=self.descent.stepsize)  # (N, …)
        measured = self.measure(self.y, point, value)  # (N, K)
        self.evaluations.add_(1)
        rests = measured[:, 0] < self.descent.threshold  # (N,)
        stops = self.busy & (rests | (self.evaluations == self.descent.cap))
        about = torch.stack([self.sample.double(), self.busy.double(), stops.double()], dim=1)  # (N, 3)
        stays = self.over_samples(rests)  # (N, 1, …)
        # A plain copy of x would be wrong: the compiler of torch 2.14 makes it after the update of x.
        self.previous.copy_(torch.where(stays, self.previous, self.x))
        self.x.copy_(torch.where(stays, self.x, after))
        self.busy.logical_and_(~stops)
        return torch.cat([about, measured.double()], dim=1)

    def over_samples(self, values: Tensor) -> Tensor:
        """(N,) → (N, 1, …): a value of each slot, for all elements of its sample."""
        return values.view(-1, *[1] * len(self.shape))

    def finish(self, seen: list[list[float]], x: Tensor) -> list[Finished]:
        """The samples that stopped at a step. Also queues more samples.

        Args:
            seen: the rows of `step`.
            x: the slots after it, (N, …).
        """
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
        """Queues samples as far as there is room.

        Args:
            taken: so many of all samples have left the queue.
        """
        new = range(self.filled, min(taken + self.size, len(self.indices)))
        # Several at once, unless they are the last: each time costs the host some launches.
        if len(new) > self.size // 8 or (new and new.stop == len(self.indices)):
            rows = torch.arange(new.start, new.stop, device=self.device) % self.size  # (n,)
            indices = self.indices[new.start : new.stop]
            self.queue.index_copy_(0, rows, to_device(self.starts(indices), self.device))
            self.queued_y.index_copy_(0, rows, to_device(self.labels(indices), self.device))
            self.queued.fill_(new.stop)
            self.filled = new.stop

    def drop_slots(self) -> None:
        """If slots may shrink, keeps no more of them than unfinished samples."""
        if self.shrinks and self.unfinished < len(self.x):
            kept = (~self.busy).int().argsort(stable=True)[: self.unfinished]  # (n,), the busy slots first
            for name in ("x", "previous", "y", "sample", "evaluations", "busy"):
                setattr(self, name, getattr(self, name)[kept])


def evaluations_summary(evaluations: Sequence[int], cap: int) -> str:
    """One line: how the evaluations of samples are distributed, and what stopping saved of `cap` for each."""
    mean, median = statistics.mean(evaluations), statistics.median(evaluations)
    capped = sum(count == cap for count in evaluations)
    return (
        f"evaluations a sample: mean {mean:.4g}, median {median:g}, from {min(evaluations)} to {max(evaluations)};"
        f" {capped} of {len(evaluations)} came to the cap of {cap}; {1 - mean / cap:.0%} fewer than fixed steps"
    )
