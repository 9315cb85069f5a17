"""The step of several ranks: shares of weights, all ways to train, checkpoints for any number of ranks, launchers."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from compiled import EAGER
from conftest import ROOT, SMALL, environment_of, run_ranks, run_script, spawn
from measuring.agreement import GivenDraws
from models import EqM
from objective import Objective
from precision import Precision
from runs.checkpoint import load_checkpoint
from runtime import distributed
from sharding import HostGather, Sharding, plain_size, trainable
from state import TrainingState
from step import Recipe, training_step
from test_train import metrics

CPU = torch.device("cpu")
BATCH = 4
WAYS = {  # precision, energy, largest relative difference of a loss between one rank and two
    "fp32": (torch.float32, "none", 1e-5),
    "bf16": (torch.bfloat16, "none", 2e-2),
    "fp16": (torch.float16, "none", 2e-3),
    "energy": (torch.float32, "dot", 1e-5),
}


def new_network(energy: str = "none") -> EqM:
    torch.manual_seed(0)
    network = EqM((4, 8, 8), 4, 3, 32, 2, 2, 4, temporal_patch=2, energy=energy)
    torch.nn.init.normal_(network.final_layer.linear.weight, std=0.1)
    return network


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_a_weight_lies_whole_on_one_rank_and_every_share_is_aligned(monkeypatch, ranks):
    weights = trainable(new_network())
    plain = torch.arange(plain_size(weights), dtype=torch.float32)
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    found = torch.zeros_like(plain)
    for rank in range(ranks):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        sharding = Sharding.of(weights)
        share = torch.full((sharding.share,), -1.0)
        sharding.take_part(plain, share)
        part = sharding.parts[rank]
        found[part] = share[: part.stop - part.start]
        views, _ = sharding.views(torch.empty(ranks * sharding.share))
        starts = [view.storage_offset() for view in views]
        assert all(start % 64 == 0 for start in starts)
        ends = [start + view.numel() for start, view in zip(starts, views, strict=True)]
        assert all(
            start // sharding.share == (end - 1) // sharding.share for start, end in zip(starts, ends, strict=True)
        )
    assert torch.equal(found, plain)
    # Only whole weights can be shared: the largest one says how even shares can be.
    largest = max(weight.numel() for weight in weights.values())
    assert sharding.share <= len(plain) / ranks + largest + 64


def trained(way: str, micro_batch: int | None = None, own_draws: bool = False, optimizer: str = "adamw") -> dict:
    """Five steps on one global batch: losses over all ranks, and a checkpoint's contents.

    Unless the ranks draw their own noise and γ, these are given, and do not depend on the number of ranks.
    """
    dtype, energy, _ = WAYS[way]
    share = BATCH // distributed.world_size()
    mine = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
    generator = torch.Generator().manual_seed(1)
    x, noise = torch.randn(2, BATCH, 3, 4, 8, 8, generator=generator)
    gamma = torch.rand(BATCH, generator=generator)
    state = TrainingState(new_network(energy), Precision(way, way, dtype), CPU)
    state.working.grad_checkpoint = micro_batch is not None
    objective = Objective() if own_draws else GivenDraws(noise=noise[mine], gamma=gamma[mine])
    recipe = Recipe(1e-3, 0, 0.5, 0.99, micro_batch, objective, optimizer=optimizer)
    step, losses = training_step(state, recipe, share, 0, EAGER), []
    for _ in range(5):
        losses.append(distributed.mean(step(x[mine], torch.full((share,), 4), torch.full((share,), 0.1))[0]))
        state.advance(BATCH)
    state.read_counts()
    whole = state.averaged_network().state_dict()
    return {"losses": torch.stack(losses), "saved": state.assemble(state.snapshot()), "average": whole}


def train_all_ways() -> dict:
    others = {"own draws": trained("fp32", None, True), "own draws, micro-batches": trained("fp32", 1, True)}
    return {way: trained(way) for way in WAYS} | {"fp32 again": trained("fp32")} | others


def one_gives_nothing() -> str:
    """What a rank says of a checkpoint for which rank 1 has no memory."""
    sharding = Sharding.of(trainable(new_network()))
    problem = MemoryError("no memory") if distributed.rank() == 1 else None
    try:
        HostGather(sharding).collect({"model": torch.zeros(sharding.share)}, problem)
    except (MemoryError, RuntimeError) as error:
        return str(error)
    return "nothing"


def on_rank(rank: int, folder: Path, functions: list[Callable[[], object]]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save([function() for function in functions], folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[list]:
    folder = tmp_path_factory.mktemp("two")
    spawn(on_rank, (folder, [train_all_ways, one_gives_nothing]), 2, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_train_as_one_in_every_precision_and_with_an_energy(two_ranks, way):
    one, (first, second) = trained(way), (found[0][way] for found in two_ranks)
    assert one["losses"][-1] < one["losses"][0]
    torch.testing.assert_close(first["losses"], one["losses"], rtol=WAYS[way][2], atol=0)
    assert torch.equal(first["losses"], second["losses"])
    assert all(torch.equal(value, second["average"][name]) for name, value in first["average"].items())


def test_micro_batches_on_two_ranks_add_up(two_ranks):
    whole, parts = (two_ranks[0][0][name]["losses"] for name in ("own draws", "own draws, micro-batches"))
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=0)


def test_two_ranks_repeat_a_training_to_the_bit(two_ranks):
    first, again = (two_ranks[0][0][name] for name in ("fp32", "fp32 again"))
    assert torch.equal(first["losses"], again["losses"])
    for name in ("model", "ema", "opt"):
        assert all(torch.equal(value, again["saved"][name][key]) for key, value in first["saved"][name].items())


def test_rank_0_alone_has_the_checkpoint_and_it_is_that_of_one_rank(two_ranks):
    ours, right = two_ranks[0][0]["fp32"]["saved"], trained("fp32")["saved"]
    assert two_ranks[1][0]["fp32"]["saved"] == {}
    assert list(ours) == list(right)
    for name in ("model", "ema", "opt"):
        assert list(ours[name]) == list(right[name])
        for key, value in right[name].items():
            torch.testing.assert_close(ours[name][key], value, atol=2e-4, rtol=1e-3)
    assert all(torch.equal(value, ours["ema"][name]) for name, value in two_ranks[1][0]["fp32"]["average"].items())


def test_no_rank_waits_for_one_that_has_no_memory_for_its_share(two_ranks):
    assert [found[1] for found in two_ranks] == [
        "another process has no memory for its share of a checkpoint",
        "no memory",
    ]


def test_a_run_goes_on_with_any_number_of_ranks(shapes, tmp_path):
    flags = ["--data-path", shapes, *SMALL, "--num-workers", 0, "--global-batch-size", 6, "--log-every", 1]
    for ranks, steps in ((2, 2), (3, 4), (1, 6)):
        arguments = ("train.py", *flags, "--max-steps", steps, "--resume")
        run = run_script(*arguments, cwd=tmp_path) if ranks == 1 else run_ranks(ranks, *arguments, cwd=tmp_path)
        assert run.returncode == 0, run.stderr
    (folder,) = (tmp_path / "results").iterdir()
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3, 4, 5, 6]
    assert load_checkpoint(folder / "checkpoints" / "0000006.pt")["opt"]["step"] == 6


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_launchers(command: list, folder: Path, cwd: Path) -> list[subprocess.Popen]:
    """Starts a training with two launchers of one process each, as on two machines."""
    port, launchers = free_port(), []
    for machine in range(2):
        launcher = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", f"--node_rank={machine}"]
        rendezvous = ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=run"]
        with (folder / f"machine{machine}.txt").open("a") as output:
            arguments = [sys.executable, *launcher, *rendezvous, ROOT / "EqM" / "train.py", *command]
            launchers.append(
                subprocess.Popen(
                    [str(argument) for argument in arguments],
                    cwd=cwd,
                    env=environment_of(),
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    return launchers


def kill_machine(launcher: subprocess.Popen) -> None:
    """Ends a launcher and all its processes at once, as a power cut does."""
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(launcher.pid)], capture_output=True, text=True).stdout
    for pid in (launcher.pid, *map(int, children.split())):
        os.kill(pid, signal.SIGKILL)
    launcher.wait()


@pytest.mark.slow
def test_two_launchers_of_which_one_is_killed_end_bitwise_as_if_nothing_had_happened(shapes, tmp_path):
    flags = ["--data-path", shapes, *SMALL, "--num-workers", 0, "--global-batch-size", 4, "--log-every", 1]
    command = [*flags, "--max-steps", 60, "--ckpt-every", 5, "--resume"]
    straight = tmp_path / "straight"
    straight.mkdir()
    assert run_ranks(2, "train.py", *command, cwd=straight).returncode == 0
    launchers = start_launchers(command, tmp_path, tmp_path)
    try:
        deadline = time.monotonic() + 100
        while not list(tmp_path.glob("results/*/checkpoints/0000010.pt")):
            assert time.monotonic() < deadline, (tmp_path / "machine0.txt").read_text()
            time.sleep(0.05)
        kill_machine(launchers[1])
        assert launchers[0].wait(timeout=100) != 0
    finally:
        for launcher in launchers:
            launcher.kill()
    assert "the exchange with the other processes failed" in (tmp_path / "machine0.txt").read_text()
    launchers = start_launchers(command, tmp_path, tmp_path)
    assert [launcher.wait(timeout=150) for launcher in launchers] == [0, 0], (tmp_path / "machine0.txt").read_text()
    (ours,), (right,) = ((folder / "results").iterdir() for folder in (tmp_path, straight))
    ours, right = (load_checkpoint(folder / "checkpoints" / "0000060.pt") for folder in (ours, right))
    for name in ("model", "ema", "opt"):
        assert all(torch.equal(value, ours[name][key]) for key, value in right[name].items())
