"""Measures training and sampling on random inputs, on whatever device there is, and prints tables.

    python EqM/benchmark.py            # the tables of docs/performance.md; a quarter of an hour on a GPU
    python EqM/benchmark.py --quick    # small ones, within two minutes on two CPU cores
    torchrun --nproc_per_node=8 EqM/benchmark.py --scaling             # training on 1, 2, 4 and 8 GPUs
    torchrun --nproc_per_node=2 EqM/benchmark.py --scaling --quick     # the same of a small network, on CPUs

Each row is printed, and written to a JSON file, as soon as it is measured.
"""

import argparse
import json
import logging
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path

import torch

from measuring import scaling_times, throughput
from measuring.adaptive_times import adaptive_times
from measuring.agreement import WINDOWS, rank_losses
from measuring.loader_rates import loader_rates
from measuring.saving_times import saving_times
from measuring.scaling_times import SCALED, SCALED_QUICK
from measuring.throughput import PRODUCT_SIDE, choose_precision
from measuring.workloads import FULL, GROUPS, LARGE, MIDDLE, ON_CPU, QUICK, QUICK_BY_NAME, SMALL, TINY, Work, start_over
from precision import Precision, agree_on_precision
from runtime import cli, distributed
from runtime.distributed import FirstRanks
from runtime.errors import UserError
from runtime.logs import device_name, start_log

LOSS_STEPS = {"cuda": 100, "cpu": 20}


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser("Measures training and sampling on random inputs.")
    parser.add_argument("--quick", action="store_true", help="a small network, for a CPU or a first look")
    parser.add_argument("--scaling", action="store_true", help="training on 1, 2, 4, … of torchrun's processes instead")
    names = [f"{', '.join(FULL)}, largest", ", ".join(QUICK | QUICK_BY_NAME)]
    names = [f"{works}, loader, saving, adaptive" for works in names]
    names += [f"{', '.join(works)}, losses" for works in (SCALED, SCALED_QUICK)]
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="PART",
        help="of {}; with --quick of {}; with --scaling of {}; with both of {}".format(*names),
    )
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=("fp32", "tf32", "bf16", "fp16"),
        default=("fp32", "tf32", "bf16", "fp16"),
        help="of training and sampling measure these alone",
    )
    parser.add_argument("--output", type=Path, default=Path("results/benchmark.json"), help="gets the rows as JSON")
    return parser.parse_args()


def check_launch(args: argparse.Namespace, device: torch.device) -> None:
    """Raises UserError where there are not the processes or the devices for what is to be measured."""
    quick = " --quick" if args.quick else ""
    if args.scaling and device.type == "cpu" and not args.quick:
        raise UserError("--scaling takes GPUs; on a CPU add --quick, which measures a small network")
    if args.scaling and not distributed.is_group():
        raise UserError(
            f"--scaling compares numbers of processes: torchrun --nproc_per_node=N EqM/benchmark.py --scaling{quick},"
            " N at least 2"
        )
    if distributed.is_group() and not args.scaling:
        raise UserError("one process measures this: leave torchrun out, or add --scaling")


def choose_parts(args: argparse.Namespace, device: torch.device) -> list[str]:
    """The parts to measure, in the order given.

    Raises:
        UserError: --only names one that there is not, or not on this device.
    """
    works = list(QUICK if args.quick else FULL)
    by_name = list(QUICK_BY_NAME) if args.quick else ["largest"] if device.type == "cuda" else []
    known = [*works, *by_name, "loader", "saving", "adaptive"]
    if args.scaling:
        known = [*(SCALED_QUICK if args.quick else SCALED), "losses"]
    flags = [flag for flag, given in (("--quick", args.quick), ("--scaling", args.scaling)) if given]
    for part in args.only or ():
        if part not in known:
            raise UserError(f"--only {part}: {' '.join(['on this device', *flags])} has {', '.join(known)}")
    return args.only or ([*works, "adaptive"] if args.quick and not args.scaling else known)


class Report:
    """What has been measured, as `content`: in a JSON file, and on rank 0's screen."""

    def __init__(self, args: argparse.Namespace, device: torch.device, content: dict):
        self.quick, self.path, self.device, self.content = args.quick, args.output, device, content
        if distributed.is_main():
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def save(self) -> None:
        if distributed.is_main():
            self.path.write_text(json.dumps(self.content, indent=1) + "\n")

    def print(self, text: str = "") -> None:
        if distributed.is_main():
            print(text, flush=True)

    def print_row(self, cells: Sequence[str]) -> None:
        self.print("| " + " | ".join(cells) + " |")

    def print_heading(self, cells: Sequence[str]) -> None:
        self.print_row(cells)
        self.print_row(["---"] * len(cells))

    def small_work(self) -> tuple[Work, str, bool]:
        """What single numbers are measured with: a network, its precision, and whether it runs fast."""
        fast = self.device.type == "cuda"
        return (SMALL, "bf16", fast) if fast and not self.quick else (TINY, "fp32", fast)


def measure_speed(report: Report, works: list[Work], precisions: Sequence[str], product: float) -> None:
    rows: dict[tuple[str, int], list[throughput.Row]] = {}
    report.print_heading(throughput.COLUMNS)
    for work in works:
        ways = work.ways if report.device.type == "cuda" else ON_CPU
        for precision, mode in (way for way in ways if way[0] in precisions):
            row = throughput.measure(work, precision, mode, report.device, product)
            report.print_row(row.cells())
            rows.setdefault((row.work, row.batch), []).append(row)
            report.content["rows"].append(asdict(row))
            report.save()

    report.print()
    report.print_heading(("work", "batch", "ratio", ""))
    for (name, batch), measured in rows.items():
        for label, ratio in throughput.ratios(measured):
            report.print_row((name, str(batch), label, ratio))
            report.content["ratios"][f"{name}, batch {batch}: {label}"] = float(ratio)
    report.save()


def measure_largest(report: Report) -> None:
    report.print()
    for precision in ("fp32", "bf16"):
        report.content["largest_batch"][precision] = batch = throughput.largest_batch(LARGE, precision, report.device)
        report.print(f"largest batch that fits, {LARGE.name}, fast, {precision}: {batch}")
        report.save()


def measure_loader(report: Report) -> None:
    report.print()
    report.print_heading(("loader, 4 frames of 320×240 sources", "clips/s", "times decoding"))
    rates = report.content["loader"]
    for name, rate in loader_rates():
        rates[name] = rate
        report.print_row((name, f"{rate:,.0f}", f"{rate / next(iter(rates.values())):.1f}"))
        report.save()


def measure_saving(report: Report) -> None:
    start_over(report.device)
    work, precision, fast = report.small_work()
    choice = choose_precision(precision, report.device)
    report.content["saving"] = times = saving_times(work, choice, fast, report.device, report.path.parent)
    report.print(f"\nwriting checkpoints of {work.name}, batch {work.batch}, {choice}, while training:")
    report.print(", ".join(f"{name} {value:.2f}" for name, value in times.items()))
    report.save()


def measure_adaptive(report: Report) -> None:
    small, precision, fast = report.small_work()
    choice = choose_precision(precision, report.device)
    # Work, samples a slot, rounds.
    measured = [(replace(small, batch=4), 4, 1)] if small is TINY else [(small, 64, GROUPS), (MIDDLE, 32, 1)]
    for work, samples_a_slot, rounds in measured:
        start_over(report.device)
        times = adaptive_times(work, choice, fast, report.device, samples_a_slot, rounds)
        report.content["adaptive"][work.name] = times
        report.print(f"\nsampling {work.name}, batch {work.batch}, {choice}, with fixed steps and adaptive:")
        report.print(", ".join(f"{name} {value:.4g}" for name, value in times.items()))
        report.save()


MEASURES = {
    "largest": measure_largest,
    "loader": measure_loader,
    "saving": measure_saving,
    "adaptive": measure_adaptive,
}


def measure_one_device(args: argparse.Namespace, parts: list[str], device: torch.device) -> None:
    """All tables but those of several ranks."""
    product = throughput.product_flops(device)
    where = {"device": device_name(device), "torch": torch.__version__, "date": date.today().isoformat()}
    empty = {"rows": [], "ratios": {}, "largest_batch": {}, "loader": {}, "saving": {}, "adaptive": {}}
    report = Report(args, device, where | {"product_tflops": product / 1e12} | empty)
    report.print(", ".join(where.values()))
    side = PRODUCT_SIDE[device.type]
    report.print(f"a dense bf16 product of side {side} runs at {product / 1e12:.3g} TFLOP/s\n")
    works = [work for part in parts for work in (QUICK | QUICK_BY_NAME if args.quick else FULL).get(part, [])]
    if works and device.type == "cpu" and "fp32" not in args.precisions:
        raise UserError(f"--precisions {' '.join(args.precisions)}: on this device fp32 is measured")
    if works:
        measure_speed(report, works, args.precisions, product)
    for name, measure in MEASURES.items():
        if name in parts:
            measure(report)


def measure_scaling(args: argparse.Namespace, parts: list[str], device: torch.device) -> None:
    """The tables of several ranks, of which the first 1, 2, 4, … train while the others wait."""
    groups = [FirstRanks(2**power) for power in range(distributed.world_size().bit_length())]
    precision = agree_on_precision("bf16" if device.type == "cuda" else "fp32", device.type)
    where = {
        "device": f"{distributed.world_size()} × {device_name(device)}",
        "torch": torch.__version__,
        "exchange": f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if device.type == "cuda" else "gloo",
        "python": platform.python_version(),
        "precision": str(precision),
        "mode": "fast" if device.type == "cuda" else "eager",
        "date": date.today().isoformat(),
    }
    report = Report(args, device, where | {"scaling": [], "losses": {}})
    report.print(", ".join(where.values()) + "\n")
    known = SCALED_QUICK if args.quick else SCALED
    scaled = [known[part] for part in parts if part in known]
    if scaled:
        report.print_heading(scaling_times.COLUMNS)
    for work in scaled:
        for row in scaling_times.scaling_times(work, precision, device, groups):
            report.print_row(row.cells())
            report.content["scaling"].append(asdict(row))
            report.save()
    if "losses" in parts:
        measure_losses(report, precision, groups)


def measure_losses(report: Report, precision: Precision, groups: list[FirstRanks]) -> None:
    scaled = next(iter((SCALED_QUICK if report.quick else SCALED).values()))
    work, steps = replace(scaled.work, batch=scaled.global_batch), LOSS_STEPS[report.device.type]
    report.content["losses"] = found = rank_losses(work, precision, report.device, steps, groups[0], groups[-1])
    report.save()
    report.print(f"\nlosses of {steps} steps of {work.name}, global batch {work.batch}, {precision}:\n")
    report.print_heading(("training", *(f"window {i + 1}" for i in range(WINDOWS))))
    for name, means in found["windows"].items():
        report.print_row((name, *(f"{mean:.4f}" for mean in means)))
    many, noise, difference = groups[-1].count, found["noise"], found["difference"]
    report.print(f"\nother noise and γ: {noise:.4f}; {many} ranks against one: {difference:.4f}")
    report.print(f"the ranks' weights {'are the same' if found['same_weights'] else 'DIFFER from one another'}")
    report.print(f"{many} ranks and one {'agree' if found['agree'] else 'DIFFER'}")


def main() -> None:
    args = parse_args()
    if args.scaling:
        # On a host that others share, NVLink multicast of one can put the GPUs of all out of service.
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    device = distributed.start()
    start_log(level=logging.WARNING)
    check_launch(args, device)
    (measure_scaling if args.scaling else measure_one_device)(args, choose_parts(args, device), device)
    start_over(device)  # a recorded exchange must not outlive the group
    distributed.stop()


if __name__ == "__main__":
    cli.run(main, "choose fewer parts with --only, or --quick")
