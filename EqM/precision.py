"""Chooses fp32, fp16 with a gradient scaler, or bf16, by flags and by what the hardware can do."""

import argparse
import copy
import logging
import os
from dataclasses import dataclass, replace

import torch
from torch import nn

from runtime import distributed
from runtime.logs import log

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# The first CUDA capability with matrix units for the type. Older cards emulate bf16, slowly,
# and torch.cuda.is_bf16_supported() counts the emulation as support.
REQUIRED_CAPABILITY = {"fp32": (0, 0), "fp16": (7, 0), "bf16": (8, 0), "TF32": (8, 0)}


@dataclass(frozen=True)
class Precision:
    """What a run computes in, what was asked for, and, where they differ, why.

    `tf32` says that a GPU rounds the factors of float32 products to TF32's 10 bits.
    """

    name: str
    requested: str
    dtype: torch.dtype
    reason: str = ""
    tf32: bool = False

    def working_copy(self, network: nn.Module) -> nn.Module:
        """What computes in this precision: the network itself, or its copy in 16 bits.

        A network computes in the type of its weights. autocast would cast them at every call, each in
        a kernel of its own, and keep what the blocks hand on in float32.
        """
        return network if self.dtype == torch.float32 else copy.deepcopy(network).to(self.dtype)

    def grad_scaler(self, device_type: str) -> torch.amp.GradScaler:
        """A gradient scaler, enabled for fp16 alone; a disabled one passes everything through."""
        return torch.amp.GradScaler(device_type, enabled=self.name == "fp16")

    def as_dict(self) -> dict:
        """As plain data, for configs."""
        return {"name": self.name, "requested": self.requested, "reason": self.reason, "tf32": self.tf32}

    def __str__(self) -> str:
        name = f"fp32 {'TF32' if self.tf32 else 'IEEE'}" if self.name == "fp32" else self.name
        asked = f"{self.requested} requested: " if self.requested != self.name else ""
        return f"{name} ({asked}{self.reason})" if self.reason else name


def make_deterministic() -> None:
    """Has every operation give the same bits again on the same device; to call before the first product."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS's own condition
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def add_precision_args(parser: argparse.ArgumentParser) -> None:
    """Adds --use-amp (fp16) and --use-bf16, of which at most one may be given, and --tf32."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--use-amp", action="store_true", help="fp16, in training with a gradient scaler")
    group.add_argument("--use-bf16", action="store_true", help="bf16")
    parser.add_argument("--tf32", action="store_true", help="fp32 products in TF32: faster, 10 bits; else IEEE")


def requested_precision(args: argparse.Namespace) -> str:
    """ "fp32", "fp16" or "bf16", as the flags ask."""
    return "fp16" if args.use_amp else "bf16" if args.use_bf16 else "fp32"


def resolve_precision(
    requested: str, device_type: str, capability: tuple[int, int] | None = None, tf32: bool = False
) -> Precision:
    """The precision to run in: the requested one where the device can do it, else fp32.

    Args:
        requested: "fp32", "fp16" or "bf16".
        device_type: "cuda" or "cpu"; anything but "cuda" computes in fp32.
        capability: the CUDA device's (major, minor); the current device is asked when None.
        tf32: float32 products in TF32 are wanted.

    Raises:
        ValueError: the name is none of the three.
    """
    if requested not in DTYPES:
        raise ValueError(f"unknown precision {requested!r}: choose fp32, fp16 or bf16")
    if device_type == "cuda":
        capability = tuple(capability or torch.cuda.get_device_capability())
        found = "this GPU has {}.{}".format(*capability)
    else:
        capability, found = (0, 0), f"this device is a {device_type.upper()}"

    def lacks(name: str) -> str:
        required = REQUIRED_CAPABILITY[name]
        needs = "{} needs a CUDA GPU of capability {}.{} or higher".format(name, *required)
        return "" if capability >= required else f"{needs}, and {found}"

    name = "fp32" if lacks(requested) else requested
    reasons = [lacks(requested), lacks("TF32") if tf32 else ""]
    return Precision(name, requested, DTYPES[name], "; ".join(filter(None, reasons)), tf32 and not reasons[1])


def agree_on_precision(
    requested: str, device_type: str, capability: tuple[int, int] | None = None, tf32: bool = False
) -> Precision:
    """Like `resolve_precision`, for all ranks together: what one cannot do, none does. Sets how fp32 is computed."""
    choices = distributed.gather(resolve_precision(requested, device_type, capability, tf32))
    rank, choice = min(enumerate(choices), key=lambda pair: (pair[1].name == requested, pair[1].tf32))
    if choice.reason and len(choices) > 1:
        choice = replace(choice, reason=f"rank {rank}: {choice.reason}")
    torch.set_float32_matmul_precision("high" if choice.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = choice.tf32
    return choice


def log_precision(precision: Precision) -> None:
    """Says what a run computes in: a warning, with the reason, where that is not what was asked for."""
    log.log(logging.WARNING if precision.reason else logging.INFO, "precision: %s", precision)
