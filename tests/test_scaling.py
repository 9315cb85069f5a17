"""Training on several ranks, how it is measured in a launch for each number, and that many ranks train as one does."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import benchmark
from compiled import EAGER
from conftest import run_python, spawn
from measuring import agreement
from measuring.launches import RECORD, launch
from measuring.rank_tables import measure_scaling
from measuring.results import Results
from measuring.scaling_times import SCALED, SCALED_QUICK, ScalingRow, Share, scaling_rows
from measuring.workloads import BASE, LARGE, SMALL, TINY, Training
from precision import Precision
from runtime import distributed
from runtime.errors import UserError
from sharding import Sharding

CPU = torch.device("cpu")
FP32 = Precision("fp32", "fp32", torch.float32)
WORK, SHARED = replace(TINY, batch=2), replace(TINY, batch=4)
SHORT = {"cpu": 10}  # steps


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


def gradient(step: Training) -> torch.Tensor:
    """That of the first step, (P,): a tenth of it is Adam's first moment."""
    step.y[:] = 101
    step()
    moments = step.state.sharding.whole(step.state.share.exp_avg).values()
    return torch.cat([moment.flatten() for moment in moments]) * 10


def findings() -> dict:
    """What a rank sees of the others, trains on, and has for its gradient and losses, at last without an exchange."""
    step = Training(WORK, FP32, EAGER, CPU)
    found = {"place": place(), "x": step.x.clone(), "gradient": gradient(step)}
    agreement.RANK_STEPS = SHORT
    found["losses"], found["same weights"] = agreement.rank_losses(SHARED, FP32, CPU, 0)
    Sharding.fill_from_shares = lambda sharding, padded: None
    return found | {"same without exchange": agreement.rank_losses(SHARED, FP32, CPU, 0)[1]}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict]:
    return on_ranks(tmp_path_factory.mktemp("two"), 2, findings)


def test_each_rank_knows_its_place_and_gets_what_the_others_give(two_ranks):
    for rank, found in enumerate(two_ranks):
        assert found["place"] == {"rank": rank, "ranks": 2, "all": [0, 1], "mean": 0.5, "main": 0}


def test_two_ranks_share_one_batch_and_the_mean_of_their_gradients(two_ranks, monkeypatch):
    first, second = two_ranks
    whole = Training(SHARED, FP32, EAGER, CPU).x  # (4, …)
    assert torch.equal(torch.cat([first["x"], second["x"]]), whole)
    apart = []
    for rank, found in enumerate(two_ranks):
        step = Training(WORK, FP32, EAGER, CPU)
        step.x = found["x"]
        with monkeypatch.context() as patch:
            patch.setattr(distributed, "rank", lambda rank=rank: rank)  # draws as this rank does
            apart.append(gradient(step))
    assert torch.equal(first["gradient"], second["gradient"])
    assert not torch.allclose(*apart, rtol=0.1)
    torch.testing.assert_close(first["gradient"], (apart[0] + apart[1]) / 2, atol=1e-6, rtol=1e-4)


def test_two_ranks_have_the_losses_of_one_on_the_same_global_batch_and_draws(two_ranks, monkeypatch):
    monkeypatch.setattr(agreement, "RANK_STEPS", SHORT)
    (one, same), (other, _) = (agreement.rank_losses(SHARED, FP32, CPU, seed) for seed in (0, 1))
    assert same
    assert one[-1] < one[0] - 0.05
    for found in two_ranks:
        assert found["losses"] == pytest.approx(one, rel=1e-5)
        windows = {"1 rank": one, "other noise": other, "2 ranks": found["losses"]}
        _, noise, difference = agreement.differences(windows).values()
        assert difference < 1e-3 < noise
        assert agreement.losses_agree(windows)
        assert found["same weights"]
        assert not found["same without exchange"]


@pytest.mark.parametrize(("last", "agree"), [(2.9, True), (3.2, False), (math.nan, False)])
def test_losses_agree_where_they_differ_by_less_than_other_random_numbers_make_them(last, agree):
    windows = {"first": [5, 4, 3, 3, 3.0], "other": [5, 4, 3, 3, 2.85], "second": [5, 4, 3, 3, last]}
    assert agreement.losses_agree(windows) == agree
    assert list(agreement.differences(windows).values())[:2] == pytest.approx([0, 0.15])
    assert agreement.loss_cells("other", windows)[-2:] == ["2.8500", "0.1500"]


def scaling_results(path: Path, second: list[float], same_weights: bool = True) -> tuple[Results, list]:
    """What is made of known records of 1, 2 and 4 ranks, and what each launch was asked for."""
    seconds = {
        1: {Share(4, 4): 0.1, Share(16, 2): 0.4, Share(8, 2): 0.2, Share(4, 2): 0.1},
        2: {Share(4, 4): 0.125, Share(8, 2): 0.25},
        4: {Share(4, 4): 0.2, Share(4, 2): 0.125},
    }
    known = {"tiny": replace(SCALED_QUICK["tiny"], global_batch=16)}
    asked, losses = [], {"1 rank": [5.0] * 5, "1 rank, other noise and γ": [4.0] * 5, "4 ranks": second}

    def start(ranks: int, parts: Sequence[str]) -> Iterator[dict]:
        asked.append((ranks, parts))
        yield {"where": {"device": "abacus"}, "steps": 5}
        for share, value in seconds[ranks].items():
            yield {"part": "tiny", "share": list(share), "seconds": value, "gigabytes": ranks / 2}
        for name in losses if "losses" in parts else ():
            if name.startswith(str(ranks)):
                yield {"training": name, "means": losses[name], "same_weights": same_weights}

    assert list(seconds[1]) == known["tiny"].shares([1, 2, 4])
    results = Results(path)
    measure_scaling(results, known, ["tiny", "losses"], [2, 4], start)
    return results, asked


def test_efficiency_and_communication_are_against_the_launch_of_one_rank(tmp_path, capsys):
    results, asked = scaling_results(tmp_path / "rows.json", [4.9] * 5)
    assert asked == [(1, ["tiny", "losses"]), (2, ["tiny"]), (4, ["tiny", "losses"])]
    content = json.loads((tmp_path / "rows.json").read_text())
    rows = [ScalingRow(**row) for row in content["scaling"]]
    assert [(row.scaling, row.ranks) for row in rows] == [(way, n) for n in (1, 2, 4) for way in ("weak", "strong")]
    assert [row.samples_per_second for row in rows] == pytest.approx([40, 40, 64, 64, 80, 128])
    assert [row.efficiency for row in rows] == pytest.approx([1, 1, 0.8, 0.8, 0.5, 0.8])
    assert [row.communication for row in rows] == pytest.approx([0, 0, 0.2, 0.2, 0.5, 0.2])
    assert [row.gigabytes for row in rows] == [0.5, 0.5, 1, 1, 2, 2]
    assert rows[1].cells()[1:] == ["strong", "1", "16, 2 at a time", "400.00", "40", "1.000", "0.0%", "0.50"]
    printed = capsys.readouterr().out
    assert all(printed.count("| " + " | ".join(row.cells()) + " |") == 1 for row in rows)
    assert content["device"] == "4 × abacus"
    assert content["losses"]["agree"]
    assert not results.differs
    assert "4 ranks and one agree" in printed


@pytest.mark.parametrize(("second", "same_weights"), [([3.9] * 5, True), ([5.0] * 5, False)])
def test_ranks_with_other_losses_or_weights_differ_from_one(tmp_path, capsys, second, same_weights):
    results, _ = scaling_results(tmp_path / "rows.json", second, same_weights)
    assert results.differs
    assert not results.content["losses"]["agree"]
    assert "4 ranks and one DIFFER" in capsys.readouterr().out


def test_one_time_gives_two_rows_where_weak_and_strong_shares_are_equal():
    large = SCALED["large"]
    assert large.shares([4]) == [Share(64, 64)]
    alone = {Share(64, 64): 0.1, Share(256, 64): 0.4}
    rows = list(scaling_rows(large, 4, Share(64, 64), 0.125, None, alone))
    assert [(row.scaling, row.efficiency) for row in rows] == [("weak", pytest.approx(0.8)), ("strong", 0.8)]


def test_the_works_are_those_of_the_bars():
    assert [scaled.work for scaled in SCALED.values()] == [SMALL, BASE, LARGE]
    assert [scaled.share("weak", 8) for scaled in SCALED.values()] == [(64, 64), (8, 8), (64, 64)]
    strong = [scaled.share("strong", ranks) for scaled in SCALED.values() for ranks in (1, 2, 4, 8)]
    assert [share.batch for share in strong] == [256, 128, 64, 32] * 3
    assert [share.micro_batch for share in strong] == [256, 128, 64, 32, 32, 32, 32, 32, 64, 64, 64, 32]


def test_a_launch_yields_records_prints_other_lines_and_says_that_it_failed(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("NCCL_NVLS_ENABLE", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, sys\n"
        "print('a warning')\n"
        "known = [os.environ[name] for name in ('NCCL_NVLS_ENABLE', 'OMP_NUM_THREADS')]\n"
        f"print({RECORD!r} + json.dumps([sys.argv[1], *known]))\n"
        "sys.exit(3)\n"
    )
    records = launch(1, script, [7])
    assert next(records) == ["7", "0", "2"]
    with pytest.raises(UserError, match="the launch of 1 ranks ended with status 1"):
        next(records)
    assert capsys.readouterr().out == "a warning\n"


@pytest.mark.slow
def test_the_quick_table_of_one_and_two_processes_agrees(tmp_path):
    run = run_python("benchmark.py", "--scaling", "--quick", "--ranks", 2, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "results" / "benchmark.json").read_text())
    rows = [ScalingRow(**row) for row in report["scaling"]]
    assert [(row.scaling, row.ranks) for row in rows] == [("weak", 1), ("strong", 1), ("weak", 2), ("strong", 2)]
    for row, one in zip(rows, rows[:2] * 2, strict=True):
        assert row.ms * row.samples_per_second == pytest.approx(1000 * row.ranks * row.batch)
        assert row.efficiency == pytest.approx(row.samples_per_second / (row.ranks * one.samples_per_second))
        assert row.communication < 1
        assert run.stdout.count("| " + " | ".join(row.cells()) + " |") == 1
    assert [row.batch for row in rows] == [4, 8, 4, 4]
    assert list(report["losses"]["windows"]) == ["1 rank", "1 rank, other noise and γ", "2 ranks"]
    assert report["losses"]["agree"]
    assert "2 ranks and one agree" in run.stdout
    assert {"device", "torch", "exchange", "python", "precision", "mode", "date"} < set(report)


def test_scaling_on_a_cpu_without_quick_is_refused_in_one_line(tmp_path):
    run = run_python("benchmark.py", "--scaling", cwd=tmp_path)
    assert run.returncode == 1
    assert run.stderr == (
        "benchmark.py: error: --scaling takes GPUs; on a CPU add --quick, which measures a small network\n"
    )


@pytest.mark.parametrize(
    ("flags", "launcher", "words"),
    [
        (["--quick", "--scaling"], {"LOCAL_RANK": "0"}, "with plain python, not with torchrun"),
        (["--quick"], {"LOCAL_RANK": "0"}, "with plain python, not with torchrun"),
        (["--quick", "--ranks", "2"], {}, "--ranks needs --scaling"),
        (["--quick", "--scaling", "--ranks", "2", "3"], {}, "--ranks 3: so many cannot share 8 samples equally"),
    ],
)
def test_a_start_that_cannot_measure_is_refused(monkeypatch, tmp_path, flags, launcher, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["benchmark.py", *flags])
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        benchmark.main()
    assert list(tmp_path.iterdir()) == []


def test_ranks_are_powers_of_two_up_to_the_number_of_gpus_or_those_asked_for(monkeypatch):
    def numbers(device: str, gpus: int, *flags: str) -> list[int]:
        monkeypatch.setattr("sys.argv", ["benchmark.py", "--scaling", *flags])
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        return benchmark.ranks_of(benchmark.parse_args(), torch.device(device))

    assert [numbers("cuda", gpus) for gpus in (2, 3, 8)] == [[2], [2], [2, 4, 8]]
    assert numbers("cpu", 0, "--quick") == [2]
    assert numbers("cuda", 8, "--ranks", "8", "2") == [2, 8]
    with pytest.raises(UserError, match="this machine has one"):
        numbers("cuda", 1)
    with pytest.raises(UserError, match="--ranks 4: this machine has 2 GPUs"):
        numbers("cuda", 2, "--ranks", "4")


def test_a_part_that_scaling_lacks_is_refused(monkeypatch):
    for flags, parts in ((["--quick"], ["tiny", "losses"]), ([], ["small", "base", "large", "losses"])):
        monkeypatch.setattr("sys.argv", ["benchmark.py", "--scaling", *flags])
        assert benchmark.choose_parts(benchmark.parse_args(), CPU) == parts
        monkeypatch.setattr("sys.argv", ["benchmark.py", "--scaling", *flags, "--only", "guide"])
        with pytest.raises(UserError, match="--only guide: on this device .*--scaling has .*losses"):
            benchmark.choose_parts(benchmark.parse_args(), CPU)
