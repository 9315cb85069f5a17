"""The benchmark's tables for one device: speed, memory, loader, checkpoints, adaptive sampling, fast against eager."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import date

import torch

from compiled import Speed, default_speed
from measuring import agreement, throughput
from measuring.adaptive_times import adaptive_times
from measuring.agreement import LOSS_COLUMNS, loss_cells
from measuring.loader_rates import loader_rates
from measuring.position_times import position_times
from measuring.results import Results
from measuring.saving_times import saving_times
from measuring.throughput import PRODUCT_SIDE, set_precision
from measuring.workloads import (
    BASE,
    CLIPS,
    FULL,
    GROUPS,
    LARGE,
    MIDDLE,
    ON_CPU,
    OPTIMIZED,
    QUICK,
    SMALL,
    TINY,
    Work,
    start_over,
)
from optimizer import OPTIMIZERS
from runtime.errors import UserError
from runtime.logs import device_name


def small_work(device: torch.device, quick: bool) -> tuple[Work, str, Speed]:
    """A small network for single measurements, its precision, and how it runs."""
    on_gpu = device.type == "cuda"
    speed = default_speed(device.type)
    return (SMALL, "bf16", speed) if on_gpu and not quick else (TINY, "fp32", speed)


def measure_speed(results: Results, device: torch.device, works: list[Work], precisions: Sequence[str]) -> None:
    product = throughput.product_flops(device)
    results.content["product_tflops"] = product / 1e12
    side = PRODUCT_SIDE[device.type]
    results.print(f"a dense bf16 product of side {side} runs at {product / 1e12:.3g} TFLOP/s\n")
    rows: dict[tuple[str, int], list[throughput.Row]] = {}
    results.print_heading(throughput.SPEED_COLUMNS)
    for work in works:
        ways = work.ways if device.type == "cuda" else ON_CPU
        for precision, mode in (way for way in ways if way[0] in precisions):
            row = throughput.measure_work(work, precision, mode, device, product)
            results.print_row(row.cells())
            rows.setdefault((row.work, row.batch), []).append(row)
            results.content["rows"].append(asdict(row))
            results.save()

    results.print()
    results.print_heading(("work", "batch", "ratio", ""))
    for (name, batch), measured in rows.items():
        for label, ratio in throughput.ratios(measured):
            results.print_row((name, str(batch), label, ratio))
            results.content["ratios"][f"{name}, batch {batch}: {label}"] = float(ratio)
    results.save()


def measure_largest(results: Results, device: torch.device) -> None:
    results.print()
    for precision in ("fp32", "bf16"):
        batch = throughput.largest_batch(LARGE, precision, device)
        results.content["largest_batch"][precision] = batch
        results.print(f"largest batch that fits, {LARGE.name}, fast, {precision}: {batch}")
        results.save()


def measure_optimizers(results: Results, device: torch.device, quick: bool) -> None:
    _, precision, speed = small_work(device, quick)
    choice = set_precision(precision, device)
    results.print()
    results.print_heading(("work", "batch", "precision", *(f"ms a step, {name}" for name in OPTIMIZERS), "ratio"))
    for work in [TINY] if quick or device.type == "cpu" else OPTIMIZED:
        results.content["optimizers"][work.name] = times = throughput.optimizer_times(work, choice, speed, device)
        results.print_row((work.name, str(work.batch), str(choice), *(f"{value:.2f}" for value in times.values())))
        results.save()


def measure_loader(results: Results) -> None:
    results.print()
    results.print_heading(("loader, 4 frames of 320×240 sources", "clips/s", "times decoding"))
    rates = results.content["loader"]
    for name, rate in loader_rates():
        rates[name] = rate
        results.print_row((name, f"{rate:,.0f}", f"{rate / next(iter(rates.values())):.1f}"))
        results.save()


def measure_saving(results: Results, device: torch.device, quick: bool) -> None:
    start_over(device)
    work, precision, speed = small_work(device, quick)
    choice = set_precision(precision, device)
    results.content["saving"] = times = saving_times(work, choice, speed, device, results.path.parent)
    results.print(f"\nwriting checkpoints of {work.name}, batch {work.batch}, {choice}, while training:")
    results.print(", ".join(f"{name} {value:.2f}" for name, value in times.items()))
    results.save()


def measure_adaptive(results: Results, device: torch.device, quick: bool) -> None:
    small, precision, speed = small_work(device, quick)
    choice = set_precision(precision, device)
    # Each is (work, samples a slot, rounds).
    measured = [(replace(small, batch=4), 4, 1)] if small is TINY else [(small, 64, GROUPS), (MIDDLE, 32, 1)]
    for work, samples_a_slot, rounds in measured:
        start_over(device)
        times = adaptive_times(work, choice, speed, device, samples_a_slot, rounds)
        results.content["adaptive"][work.name] = times
        results.print(f"\nsampling {work.name}, batch {work.batch}, {choice}, with fixed steps and adaptive:")
        results.print(", ".join(f"{name} {value:.4g}" for name, value in times.items()))
        results.save()


def measure_positions(results: Results, device: torch.device, quick: bool) -> None:
    small, precision, speed = small_work(device, quick)
    choice = set_precision(precision, device)
    results.print(f"\ntraining steps with fixed and with rotary positions, {choice}:\n")
    results.print_heading(("work", "batch", "fixed, ms", "rotary, ms", "rotary over fixed"))
    for work in [small] if small is TINY else [CLIPS[-1], BASE]:
        times = position_times(work, choice, speed, device)
        results.content["positions"][work.name] = times
        cells = [f"{times['fixed']:.2f}", f"{times['rotary']:.2f}", f"{times['ratio']:.3f}"]
        results.print_row([work.name, str(work.batch), *cells])
        results.save()


def measure_agreement(results: Results, device: torch.device, quick: bool) -> None:
    work, _, _ = small_work(device, quick)
    windows, samples, network = {}, {}, None
    results.content["agreement"] = found = {"windows": windows, "samples": samples}
    results.print(f"\nlosses of {agreement.STEPS[device.type]} steps of {work.name}, batch {work.batch}:\n")
    results.print_heading(LOSS_COLUMNS)
    for name, means, trained in agreement.trainings(work, device):
        windows[name], network = means, network or trained
        results.print_row(loss_cells(name, windows))
        results.save()

    results.print()
    results.print_heading(("sampling", "fast against eager", "tolerance"))
    agree = agreement.losses_agree(windows)
    for precision in agreement.precisions_of(device):
        difference = agreement.sample_difference(work, network, precision, device)
        samples[precision.name], tolerance = difference, agreement.SAMPLE_TOLERANCE[precision.name]
        results.print_row((str(precision), f"{difference:.2g}", f"{tolerance:.2g}"))
        agree &= difference <= tolerance
    found["agree"] = agree
    results.differs |= not agree
    results.save()
    results.print(f"\nfast and eager {'agree' if agree else 'DIFFER'}")


def measure_one_device(
    results: Results, device: torch.device, parts: Sequence[str], precisions: Sequence[str], quick: bool
) -> None:
    """Measures these parts. The speed of training and sampling is measured only in these precisions.

    Raises:
        UserError: speed is asked for, but this device is measured in none of these precisions.
    """
    where = {"device": device_name(device), "torch": torch.__version__, "date": date.today().isoformat()}
    others = ("ratios", "largest_batch", "optimizers", "loader", "saving", "adaptive", "positions", "agreement")
    results.content |= where | {"rows": []} | {part: {} for part in others}
    results.print(", ".join(where.values()))
    works = [work for part in parts for work in (QUICK if quick else FULL).get(part, [])]
    if works and device.type == "cpu" and "fp32" not in precisions:
        raise UserError(f"--precisions {' '.join(precisions)}: on this device only fp32 is measured")
    if works:
        measure_speed(results, device, works, precisions)
    if "largest" in parts:
        measure_largest(results, device)
    if "optimizers" in parts:
        measure_optimizers(results, device, quick)
    if "loader" in parts:
        measure_loader(results)
    if "saving" in parts:
        measure_saving(results, device, quick)
    if "adaptive" in parts:
        measure_adaptive(results, device, quick)
    if "positions" in parts:
        measure_positions(results, device, quick)
    if "agreement" in parts:
        measure_agreement(results, device, quick)
