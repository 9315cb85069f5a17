"""How fast networks train and sample in each precision, and how large a batch fits."""

import math
from dataclasses import dataclass, replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from compiled import COMPILED, Speed
from measuring.workloads import MODES, RECIPE, Sampling, Training, Work, seconds_a_call, start_over, synchronize
from optimizer import OPTIMIZERS
from precision import Precision, agree_on_precision
from runtime.errors import is_out_of_memory

PRODUCT_SIDE = {"cuda": 8192, "cpu": 1024}  # of the square bf16 matrices that product_flops multiplies
SPEED_COLUMNS = (
    "work",
    "batch",
    "precision",
    "mode",
    "ms a step",
    "samples/s",
    "tokens/s",
    "GB",
    "TFLOP/s",
    "of product",
)


@dataclass(frozen=True)
class Row:
    """A measurement. Memory is None on a CPU."""

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


def product_flops(device: torch.device) -> float:
    """Operations a second of a dense bf16 matrix product: the upper limit for a network."""
    side = PRODUCT_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    return 2 * side**3 / seconds_a_call(lambda: a @ b, device)


def forward_flops(work: Work) -> int:
    """Operations of the forward pass of one sample, counted from the shapes of its products."""
    network, counter = work.build("meta"), FlopCounterMode(display=False)
    x = torch.empty(1, *network.input_shape, device="meta")
    with counter, torch.no_grad():
        network(x, x.new_empty(1), torch.empty(1, dtype=torch.long, device="meta"))
    return counter.get_total_flops()


def set_precision(name: str, device: torch.device) -> Precision:
    """The precision called fp32, tf32, bf16 or fp16. Also sets how this process computes float32 products."""
    precision = agree_on_precision("fp32" if name == "tf32" else name, device.type, tf32=name == "tf32")
    precision.set_fp32_mode()
    return precision


def measure_work(work: Work, precision: str, mode: str, device: torch.device, product: float) -> Row:
    start_over(device)
    choice = set_precision(precision, device)
    call = (Training if work.kind == "train" else Sampling)(work, choice, MODES[mode], device)
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


def optimizer_times(work: Work, precision: Precision, speed: Speed, device: torch.device) -> dict[str, float]:
    """Milliseconds of a training step with each optimizer, by its name, and Muon's time over AdamW's as "ratio"."""
    times = {}
    for optimizer in OPTIMIZERS:
        start_over(device)
        call = Training(work, precision, speed, device, recipe=replace(RECIPE, optimizer=optimizer))
        for _ in range(5):  # the graph is recorded at the fourth
            call()
        times[optimizer] = seconds_a_call(call, device) * 1e3
    return times | {"ratio": times["muon"] / times["adamw"]}


def fits(work: Work, precision: str, device: torch.device) -> float | None:
    """The memory that fast steps reserve, in 10⁹ bytes; None if they do not fit."""
    start_over(device)
    try:
        call = Training(work, set_precision(precision, device), COMPILED, device)
        for _ in range(5):
            call()
        synchronize(device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None
    return torch.cuda.max_memory_reserved(device) / 1e9


def largest_batch(work: Work, precision: str, device: torch.device) -> int:
    """The largest batch that fits, to a sixteenth, or 0. Two sizes predict it, since memory grows linearly."""
    small, double = (fits(replace(work, batch=size), precision, device) for size in (work.batch, 2 * work.batch))
    batch = 2 * work.batch
    if small and double:
        total = torch.cuda.get_device_properties(device).total_memory / 1e9
        batch = int(work.batch * (1 + (0.98 * total - small) / (double - small)))
    while batch and fits(replace(work, batch=batch), precision, device) is None:
        batch = batch * 15 // 16
    return batch


def ratios(rows: list[Row]) -> list[tuple[str, str]]:
    """(label, ratio) for each pair of ways, if both are among these rows of one work."""
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
    return [
        (label, f"{getattr(found[theirs], key) / getattr(found[ours], key):.2f}")
        for label, ours, theirs, key in pairs
        if {ours, theirs} <= found.keys() and getattr(found[ours], key)
    ]
