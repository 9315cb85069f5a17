"""Checks that different ways to train and to sample agree.

On one device: fast against eager, in every precision. On several ranks: all ranks against one, on the same global
batch. The losses of a training are compared as means over windows of steps. A training agrees with the first one if it
differs from it by less than a training with other random numbers does.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compiled import COMPILED, EAGER, Speed, default_speed
from measuring.workloads import NUM_CLASSES, RECIPE, Sampling, Training, Work, part_of_rank, start_over
from models import EqM
from objective import Objective
from precision import Precision, agree_on_precision
from runtime import distributed

WINDOWS = 5  # parts of a training whose mean losses are compared
LOSS_COLUMNS = ("training", *(f"window {i + 1}" for i in range(WINDOWS)), "largest difference")
LR = 5e-4
# Steps by device type: of a training on one device, of a training on several ranks, and of a sampling.
STEPS = {"cuda": 200, "cpu": 20}
RANK_STEPS = {"cuda": 100, "cpu": 20}
SAMPLING_STEPS = {"cuda": 50, "cpu": 10}
# The largest ‖fast − eager‖ / ‖eager − start‖ of samples: a few rounding errors of the precision.
SAMPLE_TOLERANCE = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 4e-2}


def window_losses(step: Training, steps: int) -> list[float]:
    """Trains. Returns the mean loss of each window of steps over all ranks, (WINDOWS,)."""
    losses = distributed.mean(torch.stack([step()[0].clone() for _ in range(steps)]))  # (steps,)
    return torch.stack([window.mean() for window in losses.chunk(WINDOWS)]).tolist()


def differences(windows: dict[str, list[float]]) -> dict[str, float]:
    """The largest difference of each training, by name, from the first one, over the means of the windows."""
    means = torch.tensor(list(windows.values()))  # (trainings, WINDOWS)
    return dict(zip(windows, (means - means[0]).abs().amax(1).tolist(), strict=True))


def loss_cells(name: str, windows: dict[str, list[float]]) -> list[str]:
    """A training's row of LOSS_COLUMNS."""
    return [name, *(f"{mean:.4f}" for mean in windows[name]), f"{differences(windows)[name]:.4f}"]


def losses_agree(windows: dict[str, list[float]]) -> bool:
    """True if all trainings agree with the first one. The second one has other random numbers."""
    _, noise, *others = differences(windows).values()
    return all(difference < noise for difference in others)


def precisions_of(device: torch.device) -> list[Precision]:
    """All precisions that the device can compute in, fp32 first."""
    choices = [agree_on_precision(name, device.type) for name in ("fp32", "bf16", "fp16")]
    return [choice for choice in choices if not choice.reason]


def trainings(work: Work, device: torch.device) -> Iterator[tuple[str, list[float], EqM]]:
    """Trains in every precision, eagerly and fast: a name, window losses (WINDOWS,), and the averaged network.

    The first one is eager in fp32. The second one differs from it only in its random numbers.
    """
    choices = precisions_of(device)
    ways = [(precision, speed, 0) for precision in choices for speed in (EAGER, COMPILED)]
    ways.insert(1, (choices[0], EAGER, 1))
    for precision, speed, seed in ways:
        name = f"{precision} {'fast' if speed.fast else 'eager'}" + (", other random numbers" if seed else "")
        yield name, *train_windows(work, precision, speed, device, seed)


def train_windows(
    work: Work, precision: Precision, speed: Speed, device: torch.device, seed: int
) -> tuple[list[float], EqM]:
    """Window losses (WINDOWS,) of one training, and the averaged network."""
    start_over(device)
    step = Training(work, precision, speed, device, seed, replace(RECIPE, lr=LR))
    return window_losses(step, STEPS[device.type]), step.state.averaged_network()


def sample_difference(work: Work, network: EqM, precision: Precision, device: torch.device) -> float:
    """‖fast − eager‖ / ‖eager − start‖ of samples of one network from the same noise."""

    def moved(speed: Speed) -> Tensor:
        start_over(device)
        step = Sampling(work, precision, speed, device, network)
        start = step.x  # (N, …)
        for _ in range(SAMPLING_STEPS[device.type]):
            step()
        return step.x - start  # (N, …)

    eager, fast = moved(EAGER), moved(COMPILED)
    return ((fast - eager).norm() / eager.norm()).item()


@dataclass(frozen=True)
class GivenDraws(Objective):
    """An objective that replaces the drawn noise and γ by given noise (N, …) and γ (N,)."""

    noise: Tensor | None = None
    gamma: Tensor | None = None

    def loss(
        self, field: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]], x: Tensor, noise: Tensor, gamma: Tensor
    ) -> Tensor:
        return super().loss(field, x, self.noise, self.gamma)


def rank_losses(work: Work, precision: Precision, device: torch.device, seed: int) -> tuple[list[float], bool]:
    """Trains on the work's batch, which all ranks share: window losses, and whether all end with the same weights.

    In training each rank draws its own noise and γ, so another number of ranks has others. Here they depend only on the
    seed, so that only rounding differs. Weights are compared bitwise: ranks that exchange their gradients keep the same
    weights.
    """
    start_over(device)
    share = replace(work, batch=work.batch // distributed.world_size())
    mine, generator = part_of_rank(share.batch), torch.Generator().manual_seed(seed)
    noise = torch.randn(work.batch, *work.build("meta").input_shape, generator=generator)  # (N, …)
    gamma = torch.rand(work.batch, generator=generator)  # (N,)
    objective = GivenDraws(noise=noise[mine].to(device), gamma=gamma[mine].to(device))
    recipe = replace(RECIPE, lr=LR, objective=objective)
    step = Training(share, precision, default_speed(device.type), device, recipe=recipe)
    step.y.fill_(NUM_CLASSES)  # the null class: no label can be dropped at random
    losses = window_losses(step, RANK_STEPS[device.type])
    weights = hashlib.sha256(step.state.working_weights.float().cpu().numpy()).hexdigest()
    return losses, len(set(distributed.gather(weights))) == 1
