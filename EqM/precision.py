"""Mixed precision: fp32, fp16 with GradScaler, or bf16. The flags ask for one, and the hardware decides.

A network computes in 16 bits in one of two ways. Training and sampling use a copy of it that has 16-bit weights
(`Precision.working_copy`). The networks that evaluate samples keep float32 weights and run under torch.autocast
(`Precision.autocast`). docs/mixed_precision.md says which is used where, and why.
"""

import argparse
import copy
import logging
import os
from contextlib import AbstractContextManager, nullcontext
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
    """The number format of a run, the format that was asked for, and the reason where they differ.

    If `tf32` is set, a GPU rounds the factors of float32 products to TF32's 10 bits.
    """

    name: str
    requested: str
    dtype: torch.dtype
    reason: str = ""
    tf32: bool = False

    def working_copy(self, network: nn.Module) -> nn.Module:
        """Returns what trains and samples: a copy of the network with 16-bit weights, or in fp32 the network itself.

        It needs no autocast, since a network computes in the type of its weights. autocast would cast frozen weights
        at every call, and keep the residual stream in float32.
        """
        return network if self.dtype == torch.float32 else copy.deepcopy(network).to(self.dtype)

    def autocast(self, device_type: str) -> AbstractContextManager:
        """Returns torch.autocast in fp16 or bf16, for a network that keeps float32 weights. In fp32 it does nothing.

        Training in fp16 also needs `grad_scaler`.
        """
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(device_type, self.dtype)

    def grad_scaler(self, device_type: str) -> torch.amp.GradScaler:
        """Returns a gradient scaler. It is enabled in fp16 only; a disabled one changes nothing."""
        return torch.amp.GradScaler(device_type, enabled=self.name == "fp16")

    def in_fp32(self) -> "Precision":
        """Returns the precision of what stays in float32 in such a run: fp32, with the same `tf32`."""
        return replace(self, name="fp32", dtype=torch.float32)

    def set_fp32_mode(self) -> None:
        """Sets how this process computes all float32 products: IEEE or TF32."""
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = self.tf32

    def as_dict(self) -> dict:
        """The precision as plain data, for configs and reports."""
        return {"name": self.name, "requested": self.requested, "reason": self.reason, "tf32": self.tf32}

    @property
    def label(self) -> str:
        """Its name in tables: "fp32 IEEE", "fp32 TF32", "fp16" or "bf16"."""
        return f"fp32 {'TF32' if self.tf32 else 'IEEE'}" if self.name == "fp32" else self.name

    def __str__(self) -> str:
        asked = f"{self.requested} requested: " if self.requested != self.name else ""
        return f"{self.label} ({asked}{self.reason})" if self.reason else self.label


def make_deterministic() -> None:
    """Makes every operation repeat its result bit by bit on the same device. Call this before the first product."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS is deterministic only with this
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def add_precision_args(parser: argparse.ArgumentParser) -> None:
    """Adds --tf32, and --use-amp (fp16) and --use-bf16, which exclude each other."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--use-amp", action="store_true", help="compute in fp16; training uses a gradient scaler")
    group.add_argument("--use-bf16", action="store_true", help="compute in bf16")
    parser.add_argument("--tf32", action="store_true", help="fp32 products in TF32: faster, with 10 bits; else IEEE")


def requested_of(args: argparse.Namespace) -> str:
    """Returns "fp32", "fp16" or "bf16", as the flags ask."""
    return "fp16" if args.use_amp else "bf16" if args.use_bf16 else "fp32"


def resolve_precision(
    requested: str, device_type: str, capability: tuple[int, int] | None = None, tf32: bool = False
) -> Precision:
    """Returns the requested precision if the device can compute in it, else fp32 with the reason.

    Args:
        requested: "fp32", "fp16" or "bf16".
        device_type: "cuda" or "cpu"; all types except "cuda" compute in fp32.
        capability: (major, minor) of the CUDA device; None asks the current device.
        tf32: whether TF32 is wanted for float32 products.

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
    """Like `resolve_precision`, for all ranks together: if one rank cannot do it, all fall back to fp32."""
    choices = distributed.gather(resolve_precision(requested, device_type, capability, tf32))
    rank, choice = min(enumerate(choices), key=lambda pair: (pair[1].name == requested, pair[1].tf32))
    if choice.reason and len(choices) > 1:
        choice = replace(choice, reason=f"rank {rank}: {choice.reason}")
    return choice


def log_precision(precision: Precision) -> None:
    """Logs the precision: as a warning, with the reason, if it is not the one that was asked for."""
    log.log(logging.WARNING if precision.reason else logging.INFO, "precision: %s", precision)
