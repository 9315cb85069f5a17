"""Whether several ranks train as one does on the same global batch, for the benchmark.

Ranks draw noise and γ each for itself, so that another number of them draws others. Here they are given, the same
for every number of ranks, and what differs is rounding.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from measuring.workloads import NUM_CLASSES, RECIPE, Training, Work, part_of_rank, start_over
from objective import Objective
from precision import Precision
from runtime import distributed
from runtime.distributed import FirstRanks

WINDOWS = 5  # parts of a training whose mean losses are compared
LR = 5e-4


@dataclass(frozen=True)
class GivenDraws(Objective):
    """An objective at a given noise (N, …) and γ (N,), whatever was drawn."""

    noise: Tensor | None = None
    gamma: Tensor | None = None

    def loss(
        self, field: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]], x: Tensor, noise: Tensor, gamma: Tensor
    ) -> Tensor:
        return super().loss(field, x, self.noise, self.gamma)


def train(work: Work, precision: Precision, device: torch.device, steps: int, seed: int) -> tuple[list[float], bool]:
    """The losses of some steps, of which all ranks share the work's batch, and whether all end with the same weights.

    Ranks that exchange their gradients do, to the bit.
    """
    start_over(device)
    share = replace(work, batch=work.batch // distributed.world_size())
    mine, generator = part_of_rank(share.batch), torch.Generator().manual_seed(seed)
    noise = torch.randn(work.batch, *work.build("meta").input_shape, generator=generator)  # (N, …)
    gamma = torch.rand(work.batch, generator=generator)  # (N,)
    objective = GivenDraws(noise=noise[mine].to(device), gamma=gamma[mine].to(device))
    recipe = replace(RECIPE, lr=LR, objective=objective)
    step = Training(share, precision, device.type == "cuda", device, recipe=recipe)
    step.y.fill_(NUM_CLASSES)  # no label, so that none is dropped at random
    losses = torch.stack([step()[0].clone() for _ in range(steps)])  # (steps,)
    weights = hashlib.sha256(step.state.weights.detach().cpu().numpy()).hexdigest()
    return distributed.mean(losses).tolist(), len(set(distributed.gather(weights))) == 1


def rank_losses(
    work: Work, precision: Precision, device: torch.device, steps: int, one: FirstRanks, many: FirstRanks
) -> dict:
    """Mean losses of windows of steps, by one rank, by one with other noise and γ, and by many ranks.

    They agree where many ranks, with the same weights, differ from one by less than other noise and γ do. Every
    rank must call it.
    """
    run = partial(train, work, precision, device, steps)
    names = ("1 rank", "1 rank, other noise and γ", f"{many.count} ranks")
    calls = ((one, 0), (one, 1), (many, 0))
    losses, same = zip(*(group.call(partial(run, seed=seed)) for group, seed in calls), strict=True)
    curves = [torch.tensor(curve).chunk(WINDOWS) for curve in losses]
    means = torch.stack([torch.stack([window.mean() for window in curve]) for curve in curves])  # (3, WINDOWS)
    _, noise, difference = (means - means[0]).abs().amax(1).tolist()
    return {
        "windows": dict(zip(names, means.tolist(), strict=True)),
        "noise": noise,
        "difference": difference,
        "same_weights": same[-1],
        "agree": difference < noise and same[-1],
    }
