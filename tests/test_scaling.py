"""Training on the first ranks of a launch, how it is measured, and that many ranks train as one does."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import benchmark
from conftest import run_python, run_ranks, spawn
from measuring import agreement as rank_losses
from measuring import scaling_times
from measuring.scaling_times import SCALED, SCALED_QUICK, ScalingRow
from measuring.workloads import BASE, LARGE, SMALL, TINY, Training
from precision import Precision
from runtime import distributed
from runtime.distributed import FirstRanks
from runtime.errors import UserError

CPU = torch.device("cpu")
FP32 = Precision("fp32", "fp32", torch.float32)
WORK = replace(TINY, batch=2)


def spawned(rank: int, folder: Path, ranks: int, function: Callable[[], object]) -> None:
    torch.set_num_threads(1)
    # An exchange with ranks that are elsewhere fails soon.
    wait = timedelta(minutes=2)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=wait)
    torch.save(function(), folder / f"{rank}.pt")
    dist.destroy_process_group()


def on_ranks(folder: Path, ranks: int, function: Callable[[], object]) -> list:
    """What the function returns on each of so many real processes, in rank order."""
    spawn(spawned, (folder, ranks, function), ranks, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


def place() -> dict:
    return {
        "rank": distributed.rank(),
        "ranks": distributed.world_size(),
        "all": distributed.gather(dist.get_rank()),
        "mean": distributed.mean(torch.tensor(float(dist.get_rank()))).item(),
        "main": distributed.on_main(dist.get_rank),
    }


def places() -> dict:
    """Where a rank finds itself among the first two, among the first, alone, and in the end."""
    seen = {"two": None, "one": None}

    def look(name: str) -> str:
        seen[name] = place()
        return f"{name} of rank {dist.get_rank()}"

    results = [FirstRanks(count).call(lambda name=name: look(name)) for count, name in ((2, "two"), (1, "one"))]
    seen["alone"] = distributed.alone(place)
    with pytest.raises(ZeroDivisionError):
        distributed.alone(lambda: 1 / 0)
    return seen | {"end": place(), "results": results}


def gradient(step: Training) -> torch.Tensor:
    """That of the first step, (P,): a tenth of it is Adam's first moment."""
    step()
    return step.state.state_dict()["opt"]["exp_avg"].clone() * 10


def gradients() -> dict:
    """What the first two of three ranks train on, and their gradients: together, and each by itself."""
    step, found = Training(WORK, FP32, False, CPU), {}
    one_batch = FirstRanks(1).call(lambda: Training(replace(WORK, batch=4), FP32, False, CPU).x)

    def together() -> None:
        step = Training(WORK, FP32, False, CPU)
        mine, step.y[:] = step.x.clone(), 101
        found["x"], found["together"] = mine, gradient(step)
        apart = distributed.alone(lambda: Training(WORK, FP32, False, CPU))
        apart.x, apart.y = mine, step.y
        found["apart"] = gradient(apart)  # draws as the rank does in `together`
        found["wrapped"] = [type(a.state.parallel).__name__ for a in (step, apart)]

    FirstRanks(2).call(together)
    return found | {"one_batch": one_batch, "all": step.state.parallel.process_group.size()}


def places_and_gradients() -> tuple[dict, dict]:
    return places(), gradients()


@pytest.fixture(scope="module")
def three_ranks(tmp_path_factory) -> list[tuple[dict, dict]]:
    return on_ranks(tmp_path_factory.mktemp("three"), 3, places_and_gradients)


def test_the_first_ranks_are_all_that_there_are_while_the_others_wait(three_ranks):
    for rank, (found, _) in enumerate(three_ranks):
        two = {"rank": rank, "ranks": 2, "all": [0, 1], "mean": 0.5, "main": 0}
        assert found["two"] == (two if rank < 2 else None)
        alone = {"rank": 0, "ranks": 1, "all": [rank], "mean": rank, "main": rank}
        assert found["one"] == (alone if rank == 0 else None)
        assert found["alone"] == alone
        assert found["end"] == {"rank": rank, "ranks": 3, "all": [0, 1, 2], "mean": 1, "main": 0}
        assert found["results"] == ["two of rank 0", "one of rank 0"]


def test_the_first_two_of_three_ranks_share_one_batch_and_the_mean_of_their_gradients(three_ranks):
    first, second, third = (found for _, found in three_ranks)
    assert set(third) == {"one_batch", "all"}
    assert third["all"] == 3
    torch.testing.assert_close(torch.cat([first["x"], second["x"]]), first["one_batch"], rtol=0, atol=0)
    assert first["wrapped"] == ["DistributedDataParallel", "EqM"]
    assert torch.equal(first["together"], second["together"])
    assert not torch.allclose(first["apart"], second["apart"], rtol=0.1)
    torch.testing.assert_close(first["together"], (first["apart"] + second["apart"]) / 2, atol=1e-6, rtol=1e-4)


def losses_of_two_ranks() -> tuple[dict, dict]:
    """With their exchange of gradients, and without."""
    work, groups = replace(TINY, batch=4), (FirstRanks(1), FirstRanks(2))
    found = rank_losses.rank_losses(work, FP32, CPU, 10, *groups)
    found["curves"] = [group.call(lambda: rank_losses.train(work, FP32, CPU, 10, 0)[0]) for group in groups]
    distributed.data_parallel = lambda network: network
    return found, rank_losses.rank_losses(work, FP32, CPU, 10, *groups)


def test_two_ranks_have_the_losses_of_one_on_the_same_global_batch_and_draws(tmp_path):
    for found, without_exchange in on_ranks(tmp_path, 2, losses_of_two_ranks):
        one, two = found["curves"]
        assert len(one) == 10
        assert one[-1] < one[0] - 0.05
        assert two == pytest.approx(one, rel=1e-5)
        assert list(found["windows"]) == ["1 rank", "1 rank, other noise and γ", "2 ranks"]
        assert found["windows"]["1 rank"][0] == pytest.approx((one[0] + one[1]) / 2)
        assert found["difference"] < 1e-3 < found["noise"]
        assert found["same_weights"]
        assert found["agree"]
        assert not without_exchange["same_weights"]
        assert not without_exchange["agree"]


@pytest.mark.parametrize(("last", "agree"), [(2.9, True), (3.2, False), (math.nan, False)])
def test_losses_agree_where_they_differ_by_less_than_other_noise_makes_them(monkeypatch, last, agree):
    curves = iter([[5.0, 4.0, 3.0, 3.0, 3.0], [5.0, 4.0, 3.0, 3.0, 2.85], [5.0, 4.0, 3.0, 3.0, last]])
    monkeypatch.setattr(rank_losses, "train", lambda *_, seed: (next(curves), True))
    found = rank_losses.rank_losses(TINY, FP32, CPU, 5, FirstRanks(1), FirstRanks(1))
    assert found["agree"] == agree
    assert found["noise"] == pytest.approx(0.15)


def test_efficiency_is_against_one_rank_and_communication_against_ranks_apart(monkeypatch):
    seconds = {1: (0.1, 0.1, 1.0), 2: (0.125, 0.1, 1.5), 4: (0.05, 0.04, 1.25)}
    asked = []

    class Group(FirstRanks):
        def call(self, function: Callable) -> tuple:
            asked.append((self.count, function.args[0].batch, function.args[1].micro_batch))
            return seconds[self.count]

    scaled = replace(SCALED_QUICK["tiny"], global_batch=16)
    rows = list(scaling_times.scaling_times(scaled, FP32, CPU, [Group(count) for count in seconds]))
    assert asked == [(1, 4, 4), (2, 4, 4), (4, 4, 4), (1, 16, 2), (2, 8, 2), (4, 4, 2)]
    assert [row.samples_per_second for row in rows] == pytest.approx([40, 64, 320, 160, 128, 320])
    assert [row.efficiency for row in rows] == pytest.approx([1, 0.8, 2, 1, 0.4, 0.5])
    assert [row.communication for row in rows] == pytest.approx([0, 0.2, 0.2] * 2)
    assert [row.gigabytes for row in rows] == [1.0, 1.5, 1.25] * 2
    assert rows[3].cells()[1:] == ["strong", "1", "16, 2 at a time", "100.00", "160", "1.000", "0.0%", "1.00"]


def test_the_works_are_those_of_the_bars():
    weak = [scaled.of_rank("weak", 8) for scaled in SCALED.values()]
    assert [(work, recipe.micro_batch) for work, recipe in weak] == [(SMALL, 64), (BASE, 8), (LARGE, 64)]
    strong = [scaled.of_rank("strong", ranks) for scaled in SCALED.values() for ranks in (1, 2, 4, 8)]
    assert [work.batch for work, _ in strong] == [256, 128, 64, 32] * 3
    micro = [recipe.micro_batch for _, recipe in strong]
    assert micro == [256, 128, 64, 32, 32, 32, 32, 32, 64, 64, 64, 32]


def test_the_quick_table_of_two_processes_has_both_group_sizes(tmp_path):
    run = run_ranks(2, "benchmark.py", "--scaling", "--quick", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "results" / "benchmark.json").read_text())
    rows = [ScalingRow(**row) for row in report["scaling"]]
    assert [(row.scaling, row.ranks) for row in rows] == [("weak", 1), ("weak", 2), ("strong", 1), ("strong", 2)]
    for row, one in zip(rows, (rows[0], rows[0], rows[2], rows[2]), strict=True):
        assert row.ms * row.samples_per_second == pytest.approx(1000 * row.ranks * row.batch)
        assert row.efficiency == pytest.approx(row.samples_per_second / (row.ranks * one.samples_per_second))
        assert row.communication < 1
        assert run.stdout.count("| " + " | ".join(row.cells()) + " |") == 1  # rank 0 alone prints
    for row in (rows[0], rows[2]):
        assert (row.efficiency, row.communication) == (1, 0)
    assert [row.batch for row in rows] == [4, 4, 8, 4]
    assert report["losses"]["agree"]
    assert "2 ranks and one agree" in run.stdout
    assert {"device", "torch", "exchange", "python", "precision", "mode", "date"} < set(report)


def test_scaling_on_a_cpu_without_quick_is_refused_in_one_line(tmp_path):
    run = run_python("benchmark.py", "--scaling", cwd=tmp_path)
    assert run.returncode == 1
    assert run.stderr == (
        "benchmark.py: error: --scaling takes GPUs; on a CPU add --quick, which measures a small network\n"
    )


def test_the_tables_of_one_device_are_not_measured_by_several_processes(monkeypatch):
    monkeypatch.setattr("sys.argv", ["benchmark.py", "--quick"])
    args = benchmark.parse_args()
    benchmark.check_launch(args, CPU)
    monkeypatch.setattr(distributed, "is_group", lambda: True)
    with pytest.raises(UserError, match="leave torchrun out, or add --scaling"):
        benchmark.check_launch(args, CPU)


def test_a_part_that_scaling_lacks_is_refused(monkeypatch):
    for flags, parts in ((["--quick"], ["tiny", "losses"]), ([], ["small", "base", "large", "losses"])):
        monkeypatch.setattr("sys.argv", ["benchmark.py", "--scaling", *flags])
        assert benchmark.choose_parts(benchmark.parse_args(), CPU) == parts
        monkeypatch.setattr("sys.argv", ["benchmark.py", "--scaling", *flags, "--only", "guide"])
        with pytest.raises(UserError, match="--only guide: on this device .*--scaling has .*losses"):
            benchmark.choose_parts(benchmark.parse_args(), CPU)


def test_scaling_leaves_nvlink_multicast_off_unless_told(monkeypatch):
    monkeypatch.setattr("sys.argv", ["benchmark.py", "--scaling", "--quick"])
    monkeypatch.setattr(benchmark, "start_log", lambda level: None)
    for before, after in ((None, "0"), ("1", "1")):
        monkeypatch.setenv("NCCL_NVLS_ENABLE", before or "")
        if before is None:
            monkeypatch.delenv("NCCL_NVLS_ENABLE")
        with pytest.raises(UserError, match="torchrun"):
            benchmark.main()
        assert os.environ["NCCL_NVLS_ENABLE"] == after
