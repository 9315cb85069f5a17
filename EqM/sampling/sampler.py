"""Makes the samples of a plan: batch by batch after the same number of steps, or each until it rests."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from graphs import replayed
from models import EqM, sample_energy
from runtime.transfers import to_device
from sampling.adaptive import Descent, Slots
from sampling.descent import (
    TRACED,
    Field,
    Finished,
    Measure,
    Watch,
    counted,
    fixed_descents,
    gradient_descent,
    integrate,
    norm_alone,
    norm_and_energy,
)
from sampling.fields import Composition, conditioned_field
from sampling.holding import Hold, held_levels
from sampling.method import Method
from sampling.plan import Plan
from sampling.speed import EAGER, Speed


def network_rows(method: Method, plan: Plan, batch: int) -> int:
    """The samples that the network sees at once for a batch: guidance, and sums, add some."""
    return batch * (len(plan.weights) + (method.cfg_scale != 1))


class Sampler:
    """Makes the samples of a plan, from noise or given starts to the end of their descent.

    Args:
        batch: samples that the network sees at once, before guidance and sums add rows.
        speed: how the network is run for this batch.
    """

    def __init__(
        self, method: Method, network: EqM, plan: Plan, seconds_per_frame: float, batch: int, speed: Speed = EAGER
    ):
        self.method, self.network, self.plan = method, network, plan
        self.seconds_per_frame, self.batch, self.speed = seconds_per_frame, batch, speed
        self.device = network.device
        channels = network.in_channels
        guided = channels if method.guided_channels is None else method.guided_channels
        scales = [method.cfg_scale if i < guided else 1.0 for i in range(channels)]
        self.composition = Composition(plan.weights, network.num_classes, scales, self.device)
        # An adaptive step is recorded as a whole, with its evaluation of the network.
        recorded = method.threshold is None
        rows = self.composition.rows * batch
        self.conditioned = conditioned_field(network, rows, seconds_per_frame, speed.fast, recorded, speed.compiled)

    def samples(
        self, batches: Sequence[range], trace: bool, progress: Callable[[int], object]
    ) -> Iterator[list[Finished]]:
        """The samples of all batches, in groups of at most a batch. Each x is on the device, in float32.

        Args:
            batches: indices of samples.
            trace: also measure energies, and the first TRACED samples at each step.
            progress: gets the number of new evaluations.
        """
        measure = self.energy_measure() if trace else norm_alone
        if self.method.threshold is not None:
            return self.adaptive(batches, measure, progress)
        if self.plan.windows:
            return self.long(batches, progress)
        labels, steps, traced = self.plan.labels, self.method.steps, TRACED if trace else 0
        return fixed_descents(self.descend_held, self.starts, labels, batches, steps, traced, progress, measure)

    def starts(self, indices: Sequence[int]) -> Tensor:
        """The starts of samples, on the device: (N, C, H, W) or (N, C, T, H, W)."""
        return to_device(self.plan.starts(indices), self.device)

    def field(self, y: Tensor, gamma: float = 0.0) -> Field:
        """The field that samples of classes y (N,) follow, guided and summed. A network may see γ."""
        return self.composition.field(partial(self.conditioned, gamma=gamma), self.plan.rows(y))

    def descend(
        self,
        indices: Sequence[int],
        x: Tensor,
        steps: Iterable,
        watch: Callable[[Tensor, Tensor], None] = lambda point, value: None,
        hold: Hold | None = None,
    ) -> Tensor:
        """Samples after the same number of steps, in float32: (N, C, H, W) or (N, C, T, H, W).

        Args:
            x: where they start, in the same shape, on the device.
            steps: one element a step. Euler's steps end after the method's number.
            watch: gets each point where the field was evaluated, and the value there.
            hold: holds parts of x, in gradient descent.
        """
        y, method = self.plan.labels(indices), self.method
        if method.sampler != "euler":
            planned = method.planned
            sizes, mu = (planned.sizes, planned.look_aheads) if planned else (method.stepsize, method.look_ahead)
            descend = partial(gradient_descent, self.field(y), x, sizes, steps, mu, watch)
            return hold.end(descend(hold)) if hold else descend()
        starts = self.plan.starts

        def velocity_at(gamma: float) -> Field:
            field = self.field(y, gamma)
            magnitude = starts.objective.c(torch.tensor([gamma])).item()
            return lambda x: field(x) / magnitude

        gammas = torch.linspace(1 - starts.noise, 1, method.steps + 1).tolist()  # (K + 1,)
        return integrate(velocity_at, x, gammas, steps, watch)

    def descend_held(
        self, indices: Sequence[int], x: Tensor, steps: Iterable, watch: Callable[[Tensor, Tensor], None]
    ) -> Tensor:
        """`descend`, holding what the plan keeps of the files that samples start from."""
        return self.descend(indices, x, steps, watch, self.hold_of_files(indices, x))

    def long(self, batches: Sequence[range], progress: Callable[[int], object]) -> Iterator[list[Finished]]:
        """The windows of long videos, batch by batch, each from the first window to the last.

        A window holds the last frames of the one before. The first window holds what the plan keeps of files.
        """
        starts, steps = self.plan.starts, self.method.steps
        for indices in batches:
            whole = [*indices, *[indices[-1]] * (self.batch - len(indices))]
            x = None
            for window in range(len(self.plan.windows)):
                noise = to_device(starts(whole, window), self.device)  # (N, C, T, H, W)
                hold = self.hold_of_window(x, noise) if window else self.hold_of_files(whole, noise)
                watch = Watch(norm_alone, self.plan.labels(whole), every=False)
                x = self.descend(whole, noise, counted(steps, len(indices), progress), watch, hold)
                made, rows = (window + 1) * steps, zip(indices, x, watch.read(), strict=False)
                yield [Finished(index, each, made, measured, window) for index, each, measured in rows]

    def hold_of_window(self, before: Tensor, noise: Tensor) -> Hold | None:
        """Holds the last frames of the window before, (N, C, T, H, W); None if windows do not overlap.

        Args:
            noise: what this window starts from, in that shape.
        """
        windows = self.plan.windows
        if not windows.overlap:
            return None
        mask = to_device(windows.mask(before.shape[1:]), self.device)
        return self.hold(mask, windows.begun(before), noise, self.plan.starts.objective.by_frame > 0)

    def hold_of_files(self, indices: Sequence[int], noise: Tensor) -> Hold | None:
        """Holds what the plan keeps of the files that samples start from; None if it keeps nothing.

        Args:
            noise: what samples start from, on the device, (N, C, [T,] H, W).
        """
        starts = self.plan.starts
        if not starts.kept:
            return None
        given = to_device(starts.shown(indices), self.device)  # (N, C, [T,] H, W)
        return self.hold(to_device(starts.kept.mask, self.device), given, noise, starts.kept.clean)

    def hold(self, mask: Tensor, given: Tensor, noise: Tensor, clean: bool) -> Hold:
        """Holds what is given for the steps of the method; the arguments are those of Hold and of Kept."""
        objective = self.plan.starts.objective
        return Hold(mask, given, noise, held_levels(objective.path, self.method.shares(objective), clean))

    def adaptive(
        self, batches: Sequence[range], measure: Measure, progress: Callable[[int], object]
    ) -> Iterator[list[Finished]]:
        """The samples of all batches in the order in which they stop, as many at once as a batch has."""
        method, plan = self.method, self.plan
        # All labels are looked up now: while samples descend, only the device knows which labels are next.
        self.field(plan.labels(range(len(plan.classes))))
        slots = Slots(
            self.field,
            plan.starts,
            plan.labels,
            self.network.input_shape,
            self.batch,
            Descent(method.stepsize, method.look_ahead, method.steps, method.threshold),
            self.device,
            progress,
            measure,
            partial(replayed, fast=self.speed.fast, device=self.device),
            compiled=self.speed.compiled,
            shrinks=not self.speed.fast,
        )
        finished = slots.run([index for batch in batches for index in batch])
        while group := list(islice(finished, self.batch)):
            yield group

    def energy_measure(self) -> Measure:
        """The Measure of norm and energy along the way.

        The field climbs down an explicit energy. An energy that is read off another network's field need not fall.
        For a sum of classes, and for guidance, the energy is the same sum. If only some channels are guided, it is
        the mean over the channels, each with its own sum.
        """
        network, seconds = self.network, self.seconds_per_frame
        if network.energy == "none":
            return norm_and_energy()

        def conditioned(y: Tensor) -> Field:  # one number a sample, in the shape (N, 1, …) of a field
            return lambda x: sample_energy(network, x, y.to(x.device), seconds).view(-1, *[1] * (x.dim() - 1))

        def energy(y: Tensor, x: Tensor) -> Tensor:
            of_each_channel = self.composition.field(conditioned, self.plan.rows(y))(x)  # (N, C or 1, 1, …)
            return of_each_channel.flatten(1).mean(1)

        # To compile this would be to compile a whole network, for a measurement.
        return norm_and_energy(torch.compiler.disable(energy))
