"""Whether ways to train and to sample that must agree do agree.

On one device: fast against eager, in every precision. On several ranks: all ranks against one, on the same global
batch. The losses of a training are compared as means over windows of steps. Random numbers set the tolerance: a
training agrees with the first one if it differs by less than a training with other random numbers does.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from measuring.workloads import NUM_CLASSES, RECIPE, Sampling, Training, Work, part_of_rank, start_over
from models import EqM
from objective import Objective
from precision import Precision, agree_on_precision
from runtime import distributed

WINDOWS = 5  # parts of a training whose mean losses are compared
LOSS_COLUMNS = ("training", *(f"window {i + 1}" for i in range(WINDOWS)), "largest difference")
LR = 5e-4
# By device type, the steps of a training on one device, of a training on several ranks, and of a sampling.
STEPS = {"cuda": 200, "cpu": 20}
RANK_STEPS = {"cuda": 100, "cpu": 20}
SAMPLING_STEPS = {"cuda": 50, "cpu": 10}
# The largest ‖fast − eager‖ / ‖eager − start‖ of samples: a few roundings of the precision.
SAMPLE_TOLERANCE = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 4e-2}


def window_losses(step: Training, steps: int) -> list[float]:
    """Trains, and gives the mean loss of each window of steps over all ranks, (WINDOWS,)."""
    losses = distributed.mean(torch.stack([step()[0].clone() for _ in range(steps)]))  # (steps,)
    return torch.stack([window.mean() for window in losses.chunk(WINDOWS)]).tolist()


def differences(windows: dict[str, list[float]]) -> dict[str, float]:
    """By training, the largest difference of a window's mean loss from that of the first training."""
    means = torch.tensor(list(windows.values()))  # (trainings, WINDOWS)
    return dict(zip(windows, (means - means[0]).abs().amax(1).tolist(), strict=True))


def loss_cells(name: str, windows: dict[str, list[float]]) -> list[str]:
    """A training's row of LOSS_COLUMNS."""
    return [name, *(f"{mean:.4f}" for mean in windows[name]), f"{differences(windows)[name]:.4f}"]


def losses_agree(windows: dict[str, list[float]]) -> bool:
    """Whether all trainings agree with the first; the second is the one with other random numbers."""
    _, noise, *others = differences(windows).values()
    return all(difference < noise for difference in others)


def precisions_of(device: torch.device) -> list[Precision]:
    """All that the device can compute in, fp32 first."""
    choices = [agree_on_precision(name, device.type) for name in ("fp32", "bf16", "fp16")]
    return [choice for choice in choices if not choice.reason]


def trainings(work: Work, device: torch.device) -> Iterator[tuple[str, list[float], EqM]]:
    """Trains in every precision, eagerly and fast: a name, window losses (WINDOWS,), and the averaged network.

    The first is eager in fp32, and the second differs from it by its random numbers alone.
    """
    choices = precisions_of(device)
    ways = [(precision, fast, 0) for precision in choices for fast in (False, True)]
    ways.insert(1, (choices[0], False, 1))
    for precision, fast, seed in ways:
        name = f"{precision} {'fast' if fast else 'eager'}" + (", other random numbers" if seed else "")
        yield name, *train_windows(work, precision, fast, device, seed)


def train_windows(
    work: Work, precision: Precision, fast: bool, device: torch.device, seed: int
) -> tuple[list[float], EqM]:
    """Window losses (WINDOWS,) of one training, and the averaged network."""
    start_over(device)
    step = Training(work, precision, fast, device, seed, replace(RECIPE, lr=LR))
    return window_losses(step, STEPS[device.type]), step.state.ema


def sample_difference(work: Work, network: EqM, precision: Precision, device: torch.device) -> float:
    """‖fast − eager‖ / ‖eager − start‖ of samples of one network from the same noise."""

    def moved(fast: bool) -> Tensor:
        start_over(device)
        step = Sampling(work, precision, fast, device, network)
        start = step.x  # (N, …)
        for _ in range(SAMPLING_STEPS[device.type]):
            step()
        return step.x - start  # (N, …)

    eager, fast = moved(False), moved(True)
    return ((fast - eager).norm() / eager.norm()).item()


@dataclass(frozen=True)
class GivenDraws(Objective):
    """An objective that takes a given noise (N, …) and γ (N,) in place of those drawn."""

    noise: Tensor | None = None
    gamma: Tensor | None = None

    def loss(
        self, field: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]], x: Tensor, noise: Tensor, gamma: Tensor
    ) -> Tensor:
        return super().loss(field, x, self.noise, self.gamma)


def rank_losses(work: Work, precision: Precision, device: torch.device, seed: int) -> tuple[list[float], bool]:
    """Trains on the work's batch, which all ranks share: window losses, and whether all end with the same weights.

    Each rank draws its own noise and γ, and another number of ranks would draw others. So they are given here: they
    depend on the seed alone, and only rounding differs. Weights are compared to the bit: ranks that exchange their
    gradients keep the same ones.
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
    losses = window_losses(step, RANK_STEPS[device.type])
    weights = hashlib.sha256(step.state.weights.detach().cpu().numpy()).hexdigest()
    return losses, len(set(distributed.gather(weights))) == 1
