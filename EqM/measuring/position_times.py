"""How much longer a training step takes with rotary positions than with fixed ones."""

import statistics
from dataclasses import replace

import torch

from compiled import Speed
from measuring.workloads import Training, Work, seconds_a_call, start_over
from positions import POSITIONS
from precision import Precision

ROUNDS = 3
RECORDED = 5  # calls until a graph is recorded


def position_times(work: Work, precision: Precision, speed: Speed, device: torch.device) -> dict[str, float]:
    """Milliseconds a step with positions of each kind, by name, and the `ratio`, rotary over fixed.

    The two kinds take turns, so that a clock that changes changes both.
    """
    start_over(device)
    works = {kind: replace(work, positions=kind) for kind in POSITIONS}
    steps = {kind: Training(each, precision, speed, device) for kind, each in works.items()}
    for step in steps.values():
        for _ in range(RECORDED):
            step()
    rounds = [{kind: seconds_a_call(step, device) for kind, step in steps.items()} for _ in range(ROUNDS)]
    times = {kind: 1e3 * statistics.median(each[kind] for each in rounds) for kind in POSITIONS}
    return times | {"ratio": statistics.median(each["rotary"] / each["fixed"] for each in rounds)}
