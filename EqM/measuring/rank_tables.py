"""The benchmark's tables for several ranks: speed, efficiency, memory, and losses against those of one rank.

Each number of ranks is a launch of torchrun. `measure_ranks` runs in a launch, and sends records to the process that
started it. `measure_scaling` starts the launches and makes the tables.
"""

import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from datetime import date

import torch

from measuring.agreement import LOSS_COLUMNS, RANK_STEPS, differences, loss_cells, losses_agree, rank_losses
from measuring.launches import tell
from measuring.results import Results
from measuring.scaling_times import SCALING_COLUMNS, Scaled, Share, measure_share, scaling_rows
from measuring.workloads import Work
from precision import agree_on_precision
from runtime import distributed
from runtime.logs import device_name


def measure_ranks(known: dict[str, Scaled], parts: Sequence[str], others: Sequence[int], device: torch.device) -> None:
    """Measures parts on all ranks of this launch, and sends the results.

    If this is the only rank, it also measures the share that a rank has in each launch of `others`, and trains again
    with other random numbers.
    """
    ranks, fast = distributed.world_size(), device.type == "cuda"
    precision = agree_on_precision("bf16" if fast else "fp32", device.type)
    where = {
        "device": device_name(device),
        "torch": torch.__version__,
        "exchange": f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if fast else "gloo",
        "python": platform.python_version(),
        "precision": str(precision),
        "mode": "fast" if fast else "eager",
        "date": date.today().isoformat(),
    }
    tell({"where": where, "steps": RANK_STEPS[device.type]})
    for part in (part for part in parts if part in known):
        for share in known[part].shares([1, *others] if ranks == 1 else [ranks]):
            seconds, gigabytes = measure_share(known[part].work, share, precision, device)
            tell({"part": part, "share": share, "seconds": seconds, "gigabytes": gigabytes})
    if "losses" in parts:
        for seed in (0, 1) if ranks == 1 else (0,):
            means, same_weights = rank_losses(losses_work(known), precision, device, seed)
            name = "1 rank, other noise and γ" if seed else f"{ranks} ranks" if ranks > 1 else "1 rank"
            tell({"training": name, "means": means, "same_weights": same_weights})


def losses_work(known: dict[str, Scaled]) -> Work:
    """The work on which losses are compared: the first one, with its global batch."""
    first = next(iter(known.values()))
    return replace(first.work, batch=first.global_batch)


def measure_scaling(
    results: Results,
    known: dict[str, Scaled],
    parts: Sequence[str],
    others: Sequence[int],
    start: Callable[[int, Sequence[str]], Iterable[dict]],
) -> None:
    """Measures parts on one rank, then on each number of ranks in `others`, in increasing order.

    Args:
        start: launches this many ranks to measure these parts, and yields their records.
    """
    alone: dict[str, dict[Share, float]] = {part: {} for part in known}  # seconds a step of one rank
    windows, same_weights, steps = {}, True, 0
    for ranks in (1, *others):
        # Losses are compared only between one rank and the largest number.
        asked = [part for part in parts if part != "losses" or ranks in (1, others[-1])]
        for record in start(ranks, asked) if asked else ():
            match record:
                case {"where": where, "steps": steps} if ranks == 1:
                    where["device"] = f"{others[-1]} × {where['device']}"
                    results.content |= where | {"scaling": [], "losses": {"windows": windows}}
                    results.print(", ".join(where.values()) + "\n")
                    if set(parts) & set(known):
                        results.print_heading(SCALING_COLUMNS)
                case {"part": part, "share": share, "seconds": seconds, "gigabytes": gigabytes}:
                    if ranks == 1:
                        alone[part][Share(*share)] = seconds
                    for row in scaling_rows(known[part], ranks, Share(*share), seconds, gigabytes, alone[part]):
                        results.print_row(row.cells())
                        results.content["scaling"].append(asdict(row))
                case {"training": name, "means": means, "same_weights": same}:
                    windows[name] = means
                    same_weights &= same
            results.save()
    if windows:
        work = losses_work(known)
        results.print(f"\nlosses of {steps} steps of {work.name}, global batch {work.batch}:\n")
        compare_losses(results, windows, same_weights, others[-1])


def compare_losses(results: Results, windows: dict[str, list[float]], same_weights: bool, ranks: int) -> None:
    """Prints the losses of one rank and of `ranks` ranks, and whether they agree."""
    results.print_heading(LOSS_COLUMNS)
    for name in windows:
        results.print_row(loss_cells(name, windows))
    agree = losses_agree(windows) and same_weights
    _, noise, difference = differences(windows).values()
    found = {"noise": noise, "difference": difference, "same_weights": same_weights, "agree": agree}
    results.content["losses"] |= found
    results.differs |= not agree
    results.save()
    results.print(f"\nthe ranks' weights {'are the same' if same_weights else 'DIFFER from one another'}")
    results.print(f"{ranks} ranks and one {'agree' if agree else 'DIFFER'}")
