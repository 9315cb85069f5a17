"""AdamW on a share of the weights, with what follows from it: their average and their copy in the training precision.

Source of AdamW: Loshchilov & Hutter 2019, arXiv 1711.05101. There is no weight decay.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from compiled import fused_adamw_

BETAS, EPSILON = (0.9, 0.999), 1e-8
OPTIMIZERS = ("adamw", "muon")  # muon.py has the second one
LR_SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Share:
    """A rank's share of what an update changes, (S,) each, float32 except the working copy.

    `working` is `weights` itself if the network computes in float32.
    """

    weights: Tensor
    average: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    working: Tensor


class Rates(NamedTuple):
    """The numbers of one update, as tensors on the device.

    Attributes:
        updated: whether to make it, a bool. If not, nothing changes.
        step: its number, from 1.
        corrections: 1 − βᵗ for AdamW's two moments, (2,).
        divisor: of the gradients.
        decay: of the average.
    """

    updated: Tensor
    step: Tensor
    lr: Tensor
    corrections: Tensor
    divisor: Tensor
    decay: Tensor

    @staticmethod
    def of(updated: Tensor, step: Tensor, lr: Tensor, divisor: Tensor, decay: Tensor) -> "Rates":
        """The rates of an update. The powers of β are computed in float64: in float32 1 − 0.999 has 4 digits."""
        corrections = torch.stack([1 - beta ** step.double() for beta in BETAS]).float()  # (2,)
        return Rates(updated, step, lr, corrections, divisor, decay)


@torch.no_grad()
def update(share: Share, gradients: Tensor, rates: Rates) -> None:
    """One update by torch's kernels. Gradients (S,) may have any precision, and may be overwritten."""
    tensors = [share.weights], [gradients.float()], [share.exp_avg], [share.exp_avg_sq]
    factors = rates.lr, BETAS, EPSILON, rates.step
    fused_adamw_(*tensors, *factors, divisor=rates.divisor, skip=~rates.updated)
    share.average.lerp_(share.weights, (1 - rates.decay) * rates.updated)
    if share.working is not share.weights:
        share.working.copy_(share.weights)


@torch.no_grad()
def update_in_one_kernel(share: Share, gradients: Tensor, rates: Rates) -> None:
    """`update`, written for the compiler, which makes one kernel of it. Without the compiler it is slow."""
    if_updated = rates.updated.float()  # 1 or 0: a factor of each change
    g = torch.where(rates.updated, gradients.float() / rates.divisor, 0)  # (S,)
    exp_avg = share.exp_avg + (1 - BETAS[0]) * if_updated * (g - share.exp_avg)  # (S,)
    kept = torch.where(rates.updated, BETAS[1], 1.0)
    exp_avg_sq = kept * share.exp_avg_sq + (1 - BETAS[1]) * g * g  # (S,)
    direction = exp_avg / ((exp_avg_sq / rates.corrections[1]).sqrt() + EPSILON)  # (S,)
    weights = share.weights - rates.lr / rates.corrections[0] * if_updated * direction  # (S,)
    share.average.lerp_(weights, (1 - rates.decay) * if_updated)
    for kept_tensor, value in ((share.exp_avg, exp_avg), (share.exp_avg_sq, exp_avg_sq), (share.weights, weights)):
        kept_tensor.copy_(value)
    if share.working is not share.weights:
        share.working.copy_(weights)
