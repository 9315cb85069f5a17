"""Trains and samples one network eagerly and fast, in every precision the device has, and compares.

    python EqM/compare.py

Losses are compared as means over windows of steps. What differs by less than two eager fp32
trainings with other random numbers do is noise. The exit status is 1 where anything differs by more.
"""

import argparse
import sys
from dataclasses import replace
from datetime import date

import torch
from torch import Tensor

from measuring.workloads import RECIPE, SMALL, TINY, Sampling, Training, Work, start_over
from models import EqM
from precision import Precision, agree_on_precision
from runtime import cli, distributed
from runtime.logs import device_name, start_log

WINDOWS = 5  # parts of a training whose mean losses are compared
LR = 5e-4
# The largest ‖fast − eager‖ / ‖eager − start‖ of samples: a few roundings of the precision.
SAMPLE_TOLERANCE = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 4e-2}


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser("Compares fast and eager training and sampling.")
    parser.add_argument("--steps", type=cli.positive_int, default=200, help="of each training")
    parser.add_argument("--sampling-steps", type=cli.positive_int, default=50, help="of each sampling")
    return parser.parse_args()


def train(
    work: Work, precision: Precision, fast: bool, device: torch.device, steps: int, seed: int = 0
) -> tuple[Tensor, EqM]:
    """The mean loss of each window of steps, (WINDOWS,), and the averaged network."""
    start_over(device)
    step = Training(work, precision, fast, device, seed, replace(RECIPE, lr=LR))
    losses = torch.stack([step()[0].clone() for _ in range(steps)])  # (steps,)
    return torch.stack([window.mean() for window in losses.chunk(WINDOWS)]).cpu(), step.state.ema


def sample(work: Work, network: EqM, precision: Precision, fast: bool, device: torch.device, steps: int) -> Tensor:
    """How far samples move from their noise, (N, …)."""
    start_over(device)
    step = Sampling(work, precision, fast, device, network)
    start = step.x
    for _ in range(steps):
        step()
    return step.x - start


def main() -> int:
    args = parse_args()
    device = distributed.start()
    start_log()
    work = SMALL if device.type == "cuda" else TINY
    choices = [agree_on_precision(name, device.type) for name in ("fp32", "bf16", "fp16")]
    choices = [choice for choice in choices if not choice.reason]
    print(f"{work.name}, batch {work.batch}, {device_name(device)}, torch {torch.__version__}, {date.today()}\n")

    reference, network = train(work, choices[0], False, device, args.steps)
    noise = (train(work, choices[0], False, device, args.steps, seed=1)[0] - reference).abs().max().item()
    print("| training | " + " | ".join(f"window {i + 1}" for i in range(WINDOWS)) + " | largest difference |")
    print("| --- " * (WINDOWS + 2) + "|")
    worst, agree = 0.0, True
    for precision in choices:
        for fast in (False, True):
            losses, _ = train(work, precision, fast, device, args.steps)
            difference = (losses - reference).abs().max().item()
            cells = [f"{precision} {'fast' if fast else 'eager'}", *(f"{loss:.4f}" for loss in losses.tolist())]
            print("| " + " | ".join([*cells, f"{difference:.4f}"]) + " |", flush=True)
            worst = max(worst, difference)
            agree &= difference <= noise
    print(f"\nother random numbers, fp32 eager: {noise:.4f}; largest difference above: {worst:.4f}\n")

    print("| sampling | fast against eager | tolerance |\n| --- | --- | --- |")
    for precision in choices:
        eager, fast = (sample(work, network, precision, fast, device, args.sampling_steps) for fast in (False, True))
        difference = ((fast - eager).norm() / eager.norm()).item()
        tolerance = SAMPLE_TOLERANCE[precision.name]
        print(f"| {precision} | {difference:.2g} | {tolerance:.2g} |", flush=True)
        agree &= difference <= tolerance
    distributed.stop()
    print("\nfast and eager agree" if agree else "\nfast and eager DIFFER")
    return 0 if agree else 1


if __name__ == "__main__":
    cli.run(lambda: sys.exit(main()), "")
