"""Measures training and sampling on random inputs, on whatever device there is, and prints tables.

    python EqM/benchmark.py            # the tables of docs/performance.md; a quarter of an hour on a GPU
    python EqM/benchmark.py --quick    # small ones, within two minutes on two CPU cores

Each row is printed, and written to a JSON file, as soon as it is measured.
"""

import argparse
import gc
import json
import logging
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import cli
import distributed
from adaptive_times import adaptive_times
from cli import UserError, is_out_of_memory
from loader_rates import loader_rates
from precision import Precision, agree_on_precision
from runs import device_name, start_log
from saving_times import saving_times
from workloads import FULL, LARGE, ON_CPU, QUICK, QUICK_BY_NAME, SMALL, TINY, Sampling, Training, Work

PRODUCT_SIDE = {"cuda": 8192, "cpu": 1024}  # of the bf16 matrix product whose speed is called the ceiling
GROUPS, GROUP_SECONDS = 3, 0.5  # a time is the median of three groups of steps of so long
COLUMNS = ("work", "batch", "precision", "mode", "ms a step", "samples/s", "tokens/s", "GB", "TFLOP/s", "of product")


@dataclass(frozen=True)
class Row:
    """A measurement; memory is None on a CPU."""

    work: str
    batch: int
    precision: str
    mode: str
    ms: float
    samples_per_second: float
    tokens_per_second: float
    gigabytes: float | None
    tflops: float
    of_product: float

    def cells(self) -> list[str]:
        memory = "–" if self.gigabytes is None else f"{self.gigabytes:.2f}"
        speeds = [f"{self.ms:.2f}", f"{self.samples_per_second:,.0f}", f"{self.tokens_per_second:,.0f}"]
        rates = [f"{self.tflops:.3g}", f"{self.of_product:.0%}"]
        return [self.work, str(self.batch), self.precision, self.mode, *speeds, memory, *rates]


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser("Measures training and sampling on random inputs.")
    parser.add_argument("--quick", action="store_true", help="a small network, for a CPU or a first look")
    names = [f"{', '.join(FULL)}, largest", ", ".join(QUICK | QUICK_BY_NAME)]
    names = [f"{works}, loader, saving, adaptive" for works in names]
    parser.add_argument("--only", nargs="+", metavar="PART", help=f"of {names[0]}; with --quick of {names[1]}")
    parser.add_argument("--output", type=Path, default=Path("results/benchmark.json"), help="gets the rows as JSON")
    return parser.parse_args()


def choose_parts(args: argparse.Namespace, device: torch.device) -> list[str]:
    """The parts to measure, in the order given.

    Raises:
        UserError: --only names one that there is not, or not on this device.
    """
    works = list(QUICK if args.quick else FULL)
    by_name = list(QUICK_BY_NAME) if args.quick else ["largest"] if device.type == "cuda" else []
    known = [*works, *by_name, "loader", "saving", "adaptive"]
    for part in args.only or ():
        if part not in known:
            quick = " --quick" if args.quick else ""
            raise UserError(f"--only {part}: on this device{quick} has {', '.join(known)}")
    return args.only or ([*works, "adaptive"] if args.quick else known)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_a_call(call: Callable[[], object], device: torch.device) -> float:
    """The median over groups of calls, which follow one another without waiting for the device."""

    def group(size: int) -> float:
        start = time.perf_counter()
        for _ in range(size):
            call()
        synchronize(device)
        return (time.perf_counter() - start) / size

    synchronize(device)
    size = max(1, round(GROUP_SECONDS / group(2)))
    return statistics.median(group(size) for _ in range(GROUPS))


def product_flops(device: torch.device) -> float:
    """Operations a second of a dense bf16 matrix product: the ceiling."""
    side = PRODUCT_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    return 2 * side**3 / seconds_a_call(lambda: a @ b, device)


def forward_flops(work: Work) -> int:
    """Operations of one sample's forward pass, counted from the shapes of all products."""
    network, counter = work.build("meta"), FlopCounterMode(display=False)
    x = torch.empty(1, *network.input_shape, device="meta")
    with counter, torch.no_grad():
        network(x, x.new_empty(1), torch.empty(1, dtype=torch.long, device="meta"))
    return counter.get_total_flops()


def choose_precision(name: str, device: torch.device) -> Precision:
    """The precision called fp32, tf32, bf16 or fp16."""
    return agree_on_precision("fp32" if name == "tf32" else name, device.type, tf32=name == "tf32")


def start_over(device: torch.device) -> None:
    """Frees what the last measurement left."""
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def measure(work: Work, precision: str, mode: str, device: torch.device, product: float) -> Row:
    start_over(device)
    choice, fast = choose_precision(precision, device), mode == "fast"
    call = (Training if work.kind == "train" else Sampling)(work, choice, fast, device)
    for _ in range(5):  # the graph is recorded at the fourth
        call()
    seconds = seconds_a_call(call, device)
    tokens = math.prod(work.build("meta").grid)
    flops = forward_flops(work) * work.batch * (3 if work.kind == "train" else 2) / seconds
    return Row(
        work.name,
        work.batch,
        str(choice),
        mode,
        seconds * 1e3,
        work.batch / seconds,
        work.batch * tokens / seconds,
        torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None,
        flops / 1e12,
        flops / product,
    )


def fits(work: Work, precision: str, device: torch.device) -> float | None:
    """The memory reserved for some fast steps, in 10⁹ bytes; None if they do not fit."""
    start_over(device)
    try:
        call = Training(work, choose_precision(precision, device), True, device)
        for _ in range(5):
            call()
        synchronize(device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None
    return torch.cuda.max_memory_reserved(device) / 1e9


def largest_batch(work: Work, precision: str, device: torch.device) -> int:
    """The largest batch that fits, to a sixteenth, or 0: memory grows linearly, so that two sizes foretell it."""
    small, double = (fits(replace(work, batch=size), precision, device) for size in (work.batch, 2 * work.batch))
    batch = 2 * work.batch
    if small and double:
        total = torch.cuda.get_device_properties(device).total_memory / 1e9
        batch = int(work.batch * (1 + (0.98 * total - small) / (double - small)))
    while batch and fits(replace(work, batch=batch), precision, device) is None:
        batch = batch * 15 // 16
    return batch


def ratios(rows: list[Row]) -> list[tuple[str, str]]:
    """What the rows of one work say of one another."""
    found = {(row.precision, row.mode): row for row in rows}
    pairs = [
        ("speed, bf16 over fp32 IEEE", ("bf16", "fast"), ("fp32 IEEE", "fast"), "ms"),
        ("speed, bf16 over fp32 TF32", ("bf16", "fast"), ("fp32 TF32", "fast"), "ms"),
        ("speed, bf16 over fp32 IEEE eager", ("bf16", "fast"), ("fp32 IEEE", "eager"), "ms"),
        ("speed, fast over eager, bf16", ("bf16", "fast"), ("bf16", "eager"), "ms"),
        ("speed, fast over eager, fp32 IEEE", ("fp32 IEEE", "fast"), ("fp32 IEEE", "eager"), "ms"),
        ("time, fp16 over bf16", ("bf16", "fast"), ("fp16", "fast"), "ms"),
        ("memory, fp32 IEEE eager over bf16", ("bf16", "fast"), ("fp32 IEEE", "eager"), "gigabytes"),
    ]
    both = [(label, found.get(ours), found.get(theirs), key) for label, ours, theirs, key in pairs]
    return [
        (label, f"{getattr(theirs, key) / getattr(ours, key):.2f}")
        for label, ours, theirs, key in both
        if ours and theirs and getattr(ours, key)
    ]


def print_row(cells: list[str] | tuple[str, ...]) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    args = parse_args()
    device = distributed.start()
    start_log(level=logging.WARNING)
    parts = choose_parts(args, device)
    product = product_flops(device)
    where = {"device": device_name(device), "torch": torch.__version__, "date": date.today().isoformat()}
    report = where | {
        "product_tflops": product / 1e12,
        "rows": [],
        "ratios": {},
        "largest_batch": {},
        "loader": {},
        "saving": {},
        "adaptive": {},
    }
    print(", ".join(where.values()))
    print(f"a dense bf16 product of side {PRODUCT_SIDE[device.type]} runs at {product / 1e12:.3g} TFLOP/s\n")
    args.output.parent.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        args.output.write_text(json.dumps(report, indent=1) + "\n")

    rows: dict[tuple[str, int], list[Row]] = {}
    works = [work for part in parts for work in (QUICK | QUICK_BY_NAME if args.quick else FULL).get(part, [])]
    if works:
        print_row(COLUMNS)
        print_row(["---"] * len(COLUMNS))
    for work in works:
        for precision, mode in work.ways if device.type == "cuda" else ON_CPU:
            row = measure(work, precision, mode, device, product)
            print_row(row.cells())
            rows.setdefault((row.work, row.batch), []).append(row)
            report["rows"].append(asdict(row))
            save()

    if works:
        print()
        print_row(("work", "batch", "ratio", ""))
        print_row(["---"] * 4)
    for (name, batch), measured in rows.items():
        for label, ratio in ratios(measured):
            print_row((name, str(batch), label, ratio))
            report["ratios"][f"{name}, batch {batch}: {label}"] = float(ratio)
    save()

    if "largest" in parts:
        print()
        for precision in ("fp32", "bf16"):
            report["largest_batch"][precision] = batch = largest_batch(LARGE, precision, device)
            print(f"largest batch that fits, {LARGE.name}, fast, {precision}: {batch}", flush=True)
            save()
    if "loader" in parts:
        print()
        print_row(("loader, 4 frames of 320×240 sources", "clips/s", "times decoding"))
        print_row(["---"] * 3)
        for name, rate in loader_rates():
            report["loader"][name] = rate
            print_row((name, f"{rate:,.0f}", f"{rate / next(iter(report['loader'].values())):.1f}"))
            save()
    if "saving" in parts:
        start_over(device)
        work, precision = (TINY, "fp32") if args.quick or device.type == "cpu" else (SMALL, "bf16")
        fast, choice = device.type == "cuda", choose_precision(precision, device)
        report["saving"] = times = saving_times(work, choice, fast, device, args.output.parent)
        print(f"\nwriting checkpoints of {work.name}, batch {work.batch}, {choice}, while training:")
        print(", ".join(f"{name} {value:.2f}" for name, value in times.items()))
        save()
    if "adaptive" in parts:
        start_over(device)
        work, precision = (replace(TINY, batch=4), "fp32") if args.quick or device.type == "cpu" else (SMALL, "bf16")
        fast, choice = device.type == "cuda", choose_precision(precision, device)
        report["adaptive"] = times = adaptive_times(work, choice, fast, device, *((32, GROUPS) if fast else (4, 1)))
        print(f"\nsampling {work.name}, batch {work.batch}, {choice}, with fixed steps and adaptive:")
        print(", ".join(f"{name} {value:.4g}" for name, value in times.items()))
        save()
    distributed.stop()


if __name__ == "__main__":
    cli.run(main, "choose fewer parts with --only, or --quick")
