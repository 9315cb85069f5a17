"""Chooses fp32, fp16 with a gradient scaler, or bf16, by flags and by what the hardware can do."""

import argparse
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch

import distributed

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# The first CUDA capability with matrix units for the type. Older cards emulate bf16, slowly,
# and torch.cuda.is_bf16_supported() counts the emulation as support.
REQUIRED_CAPABILITY = {"fp16": (7, 0), "bf16": (8, 0)}


@dataclass(frozen=True)
class Precision:
    """What a run computes in, what was asked for, and, where they differ, why."""

    name: str
    requested: str
    dtype: torch.dtype
    reason: str = ""

    def autocast(self, device_type: str) -> AbstractContextManager:
        """The context for the forward pass; in fp32 it does nothing."""
        if self.name == "fp32":
            return torch.autocast(device_type, enabled=False)
        return torch.autocast(device_type, dtype=self.dtype)

    def grad_scaler(self, device_type: str) -> torch.amp.GradScaler:
        """A gradient scaler, enabled for fp16 alone; a disabled one passes everything through."""
        return torch.amp.GradScaler(device_type, enabled=self.name == "fp16")

    def __str__(self) -> str:
        return f"{self.name} ({self.requested} requested: {self.reason})" if self.reason else self.name


def add_precision_args(parser: argparse.ArgumentParser) -> None:
    """Adds --use-amp (fp16) and --use-bf16, of which at most one may be given."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--use-amp", action="store_true", help="fp16 with a gradient scaler")
    group.add_argument("--use-bf16", action="store_true", help="bf16 autocast")


def requested_precision(args: argparse.Namespace) -> str:
    """ "fp32", "fp16" or "bf16", as the flags ask."""
    return "fp16" if args.use_amp else "bf16" if args.use_bf16 else "fp32"


def resolve_precision(requested: str, device_type: str, capability: tuple[int, int] | None = None) -> Precision:
    """The precision to run in: the requested one where the device can do it, else fp32.

    Args:
        requested: "fp32", "fp16" or "bf16".
        device_type: "cuda" or "cpu"; anything but "cuda" computes in fp32.
        capability: the CUDA device's (major, minor); the current device is asked when None.

    Raises:
        ValueError: the name is none of the three.
    """
    if requested not in DTYPES:
        raise ValueError(f"unknown precision {requested!r}: choose fp32, fp16 or bf16")
    if requested == "fp32":
        return Precision("fp32", "fp32", torch.float32)
    required = REQUIRED_CAPABILITY[requested]
    if device_type == "cuda":
        capability = capability or torch.cuda.get_device_capability()
        if tuple(capability) >= required:
            return Precision(requested, requested, DTYPES[requested])
        found = "this GPU has {}.{}".format(*capability)
    else:
        found = f"this device is a {device_type.upper()}"
    needs = "{} needs a CUDA GPU of capability {}.{} or higher".format(requested, *required)
    return Precision("fp32", requested, torch.float32, f"{needs}, and {found}")


def agree_on_precision(requested: str, device_type: str, capability: tuple[int, int] | None = None) -> Precision:
    """Like `resolve_precision`, for all ranks together: one that falls back makes all fall back."""
    choices = distributed.gather(resolve_precision(requested, device_type, capability))
    for rank, choice in enumerate(choices):
        if choice.reason:
            return replace(choice, reason=f"rank {rank}: {choice.reason}") if len(choices) > 1 else choice
    return choices[0]
