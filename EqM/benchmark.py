"""Measures training and sampling on random inputs, on the devices of this machine, and prints tables.

    python EqM/benchmark.py                     # the tables of docs/performance.md, on one GPU
    python EqM/benchmark.py --quick             # a small network, within two minutes on two CPU cores
    python EqM/benchmark.py --only agreement    # whether fast and eager training and sampling agree
    python EqM/benchmark.py --scaling           # training on 1, 2, 4, … GPUs: starts torchrun for each number
    python EqM/benchmark.py --scaling --quick   # the same for a small network, on CPUs with one process and with two

Each row is printed, and written to a JSON file, as soon as it is measured. The exit status is 1 if results differ
that must agree.
"""

if __name__ == "__main__":
    from runtime.interrupts import end_at_ctrl_c

    end_at_ctrl_c()


import argparse
import logging
import sys
from pathlib import Path

import torch

from measuring.device_tables import measure_one_device
from measuring.launches import launch
from measuring.rank_tables import measure_ranks, measure_scaling
from measuring.results import Results
from measuring.scaling_times import SCALED, SCALED_QUICK, Scaled
from measuring.workloads import FULL, QUICK, start_over
from runtime import cli, distributed, environment
from runtime.errors import UserError
from runtime.logs import start_log

above_one = cli.whole(2, cli.MAX_PROCESSES)


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser("Measures training and sampling on random inputs.")
    parser.add_argument("--quick", action="store_true", help="a small network, for a CPU or a first look")
    parser.add_argument("--scaling", action="store_true", help="measure training on several GPUs instead")
    parser.add_argument(
        "--ranks",
        nargs="+",
        type=above_one,
        metavar="N",
        help="--scaling compares these numbers of processes with one; default: 2, 4, … up to the number of GPUs, or 2"
        " on a CPU",
    )
    names = [f"{', '.join(FULL)}, largest", ", ".join(QUICK)]
    names = [f"{works}, optimizers, loader, saving, adaptive, positions, agreement" for works in names]
    names += [f"{', '.join(works)}, losses" for works in (SCALED, SCALED_QUICK)]
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="PART",
        help="measure these parts: of {}; with --quick of {}; with --scaling of {}; with both of {}".format(*names),
    )
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=("fp32", "tf32", "bf16", "fp16"),
        default=("fp32", "tf32", "bf16", "fp16"),
        help="measure the speed of training and sampling in these alone",
    )
    parser.add_argument("--output", type=cli.path, default=Path("results/benchmark.json"), help="gets the rows as JSON")
    # For the processes that --scaling starts: measure the parts and print records.
    parser.add_argument("--one-scale", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def check_launch(args: argparse.Namespace, device: torch.device) -> None:
    """Raises UserError if the processes or the devices are not those that the flags need."""
    if environment.is_launched():
        raise UserError("start this with plain python, not with torchrun: --scaling starts its processes itself")
    if args.ranks and not args.scaling:
        raise UserError("--ranks needs --scaling")
    if args.scaling and device.type == "cpu" and not args.quick:
        raise UserError("--scaling takes GPUs; on a CPU add --quick, which measures a small network")


def scaled_of(args: argparse.Namespace) -> dict[str, Scaled]:
    return SCALED_QUICK if args.quick else SCALED


def ranks_of(args: argparse.Namespace, device: torch.device) -> list[int]:
    """The numbers of ranks to compare with one, increasing.

    Raises:
        UserError: there are too few GPUs, or so many ranks cannot share the global batch equally.
    """
    gpus = torch.cuda.device_count() if device.type == "cuda" else 2
    numbers = sorted(set(args.ranks or (2**power for power in range(1, gpus.bit_length()))))
    if not numbers:
        raise UserError("--scaling compares several GPUs with one, and this machine has one")
    if device.type == "cuda" and numbers[-1] > gpus:
        raise UserError(f"--ranks {numbers[-1]}: this machine has {gpus} GPUs")
    for batch in (scaled.global_batch for scaled in scaled_of(args).values()):
        for number in numbers:
            if batch % number:
                raise UserError(f"--ranks {number}: so many cannot share {batch} samples equally; name another number")
    return numbers


def choose_parts(args: argparse.Namespace, device: torch.device) -> list[str]:
    """The parts to measure, in the order given.

    Raises:
        UserError: --only names an unknown part, or one that this device cannot measure.
    """
    works = list(QUICK if args.quick else FULL)
    largest = ["largest"] if device.type == "cuda" and not args.quick else []
    known = [*works, *largest, "optimizers", "loader", "saving", "adaptive", "positions", "agreement"]
    if args.scaling:
        known = [*scaled_of(args), "losses"]
    flags = [flag for flag, given in (("--quick", args.quick), ("--scaling", args.scaling)) if given]
    for part in args.only or ():
        if part not in known:
            raise UserError(f"--only {part}: {' '.join(['on this device', *flags])} has {', '.join(known)}")
    return args.only or ([*works, "adaptive"] if args.quick and not args.scaling else known)


def start_and_compare(args: argparse.Namespace, device: torch.device) -> Results:
    """Starts torchrun for each number of ranks. This process leaves the GPUs to those that it starts."""
    numbers, parts = ranks_of(args, device), choose_parts(args, device)
    results = Results(args.output)
    flags = ["--one-scale", *(["--quick"] if args.quick else []), "--ranks", *numbers, "--only"]
    measure_scaling(
        results,
        scaled_of(args),
        parts,
        numbers,
        lambda ranks, asked: launch(ranks, Path(__file__), [*flags, *asked]),
    )
    return results


def main() -> None:
    args = parse_args()
    if args.one_scale:
        device = distributed.start()
        start_log(level=logging.WARNING)
        measure_ranks(scaled_of(args), args.only, args.ranks, device)
        start_over(device)  # a recorded exchange must not outlive the group
        distributed.stop()
        return
    device = torch.device("cuda" if torch.cuda.device_count() else "cpu")
    check_launch(args, device)
    if args.scaling:
        results = start_and_compare(args, device)
    else:
        parts, device = choose_parts(args, device), distributed.start()
        start_log(level=logging.WARNING)
        results = Results(args.output)
        measure_one_device(results, device, parts, args.precisions, args.quick)
    if results.differs:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main, "choose fewer parts with --only, or --quick")
