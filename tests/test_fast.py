"""Fast and eager do the same, alone and in every combination; what cannot be fast runs eagerly and says so."""

import gc
import json
import logging
import os
import sys
import weakref
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import benchmark
from compiled import COMPILED, EAGER, GRAPHS, Speed, freeze_garbage_collector
from conftest import ROOT, SMALL, run_command, run_python, run_ranks, run_script, run_torchrun
from drawing.pictures import read_png
from graphs import Graphed
from measuring import agreement
from measuring.workloads import TINY, start_over
from models import EqM
from precision import Precision
from runtime.random_numbers import sample_noise
from runtime.transfers import to_device
from sampling.adaptive import Descent, Slots
from sampling.descent import gradient_descent
from sampling.fields import Composition, conditioned_field
from state import TrainingState
from step import Recipe, training_step

CPU = torch.device("cpu")
PRECISIONS = {
    "fp32": Precision("fp32", "fp32", torch.float32),
    "bf16": Precision("bf16", "bf16", torch.bfloat16),
    "fp16": Precision("fp16", "fp16", torch.float16),
}
# After 20 steps: of losses near 20, and of the way that the weights have gone. Adam enlarges differences in small
# gradients.
TOLERANCES = {
    "fp32": {"loss": 1e-3, "weights": 1e-3},
    "fp16": {"loss": 2e-2, "weights": 0.05},
    "bf16": {"loss": 0.1, "weights": 0.2},
}
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def new_network() -> EqM:
    torch.manual_seed(0)
    network = EqM((4, 8, 8), 4, 3, hidden_size=32, depth=3, num_heads=2, num_classes=4, temporal_patch=2)
    torch.nn.init.normal_(network.final_layer.linear.weight, std=0.1)
    return network


class Trained:
    """Twenty steps on one batch: the losses, (20,), and the state after them."""

    def __init__(
        self,
        speed: Speed,
        precision: str = "fp32",
        device: torch.device = CPU,
        grad_checkpoint: bool = False,
        grad_clip: float = 0.5,
        micro_batch: int | None = None,
    ):
        torch._dynamo.reset()
        self.state = TrainingState(new_network(), PRECISIONS[precision], device)
        self.state.working.grad_checkpoint = grad_checkpoint
        recipe = Recipe(1e-3, warmup_steps=10, grad_clip=grad_clip, ema_decay=0.999, micro_batch=micro_batch)
        x = torch.rand(8, 3, 4, 8, 8, generator=torch.Generator().manual_seed(1)).to(device) * 2 - 1
        y, seconds = torch.arange(8, device=device) % 4, torch.full((8,), 0.1, device=device)

        self.step, self.inputs = training_step(self.state, recipe, 8, 0, speed), (x, y, seconds)
        losses = []
        for _ in range(20):
            losses.append(self.advance()[0].clone())
        self.losses = torch.stack(losses)
        self.skipped = self.state.read_counts()

    def advance(self) -> torch.Tensor:
        result = self.step(*self.inputs)
        self.state.advance(8)
        return result


def assert_same(ours: Trained, reference: Trained, loss: float, weights: float) -> None:
    """The losses differ by at most `loss`, and the weights by that share of the way that they have gone."""
    torch.testing.assert_close(ours.losses, reference.losses, atol=loss, rtol=0)
    start = TrainingState(new_network(), PRECISIONS["fp32"], ours.state.device).share.weights
    for name in ("weights", "average"):
        ended, right = getattr(ours.state.share, name), getattr(reference.state.share, name)
        assert (ended - right).norm() <= weights * (right - start).norm()
    assert ours.state.updates == reference.state.updates


@pytest.fixture(scope="module")
def eager() -> Trained:
    return Trained(EAGER)


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_gradients_added_up_over_micro_batches_are_those_of_the_whole_batch(eager, micro_batch):
    assert_same(Trained(EAGER, micro_batch=micro_batch), eager, loss=1e-4, weights=1e-3)


def test_blocks_computed_again_give_the_same_weights(eager):
    again = Trained(EAGER, grad_checkpoint=True)
    assert torch.equal(again.state.share.weights, eager.state.share.weights)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"grad_clip": 0.0},
        {"micro_batch": 4},
        {"grad_checkpoint": True},
        {"micro_batch": 4, "grad_checkpoint": True},
    ],
    ids=str,
)
def test_compiled_and_eager_give_the_same_losses_and_weights_over_20_steps(options):
    torch._dynamo.utils.counters.clear()
    ours = Trained(COMPILED, **options)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert_same(ours, Trained(EAGER, **options), **TOLERANCES["fp32"])


@pytest.mark.slow
def test_one_compilation_serves_all_blocks():
    torch._dynamo.utils.counters.clear()
    Trained(COMPILED)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.slow
def test_no_collection_looks_through_what_compiling_left_behind_and_starting_over_frees_it():
    trained = Trained(COMPILED)
    freeze_garbage_collector()
    assert gc.get_freeze_count() > 10 * len(gc.get_objects())
    network, trained.myself = weakref.ref(trained.state.working), trained
    del trained
    gc.collect()
    assert network(), "a cycle that is not looked through"
    start_over(CPU)
    assert not network()


def losses(folder: Path) -> list[float]:
    (path,) = folder.glob("results/*/metrics.jsonl")
    return [json.loads(line)["loss"] for line in path.read_text().splitlines()]


TRAIN = [*SMALL, "--max-steps", 3, "--log-every", 1, "--lr", 1e-3]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [[], ["--micro-batch-size", 2, "--grad-clip", 1, "--grad-checkpoint"]], ids=["", "all"]
)
def test_two_ranks_compiled_train_as_they_do_eagerly(shapes, tmp_path, flags):
    for name, compiled in (("fast", ["--compile"]), ("eager", [])):
        (tmp_path / name).mkdir()
        run = run_torchrun(2, "train.py", "--data-path", shapes, *TRAIN, *flags, *compiled, cwd=tmp_path / name)
        assert run.returncode == 0, run.stderr
        assert ("compiled in" in run.stdout) == bool(compiled)
        assert "WARNING" not in run.stdout
    assert losses(tmp_path / "fast") == pytest.approx(losses(tmp_path / "eager"), abs=1e-3)


@pytest.mark.slow
def test_compiled_samples_are_the_eager_ones(checkpoint, tmp_path):
    flags = ["--ckpt", checkpoint, "--num-fid-samples", 3, "--global-batch-size", 2, "--num-sampling-steps", 3]
    for name, compiled in (("fast", "--compile"), ("eager", "--no-compile")):
        run = run_script("sample_gd.py", *flags, compiled, "--folder", name, cwd=tmp_path)
        assert run.returncode == 0, run.stderr
        assert ("compiled in" in run.stdout) == (name == "fast")
    fast, eager = (read_png(tmp_path / f"{name}-sheet.png").astype(int) for name in ("fast", "eager"))
    assert abs(fast - eager).max() <= 1  # a pixel may be rounded otherwise


@pytest.mark.parametrize("processes", [1, 2])
def test_a_network_that_cannot_be_compiled_trains_eagerly_and_says_why_once(shapes, tmp_path, monkeypatch, processes):
    for name, compiled in (("eager", []), ("fast", ["--compile"])):
        if compiled or processes == 1:  # where one process says nothing of it, eager ranks need not be asked
            monkeypatch.setenv("CXX", "no-such-compiler")
            monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
        (tmp_path / name).mkdir()
        arguments = ["train.py", "--data-path", shapes, *TRAIN, *compiled]
        cwd = tmp_path / name
        run = run_script(*arguments, cwd=cwd) if processes == 1 else run_ranks(processes, *arguments, cwd=cwd)
        assert run.returncode == 0, run.stderr
        warnings = [line for line in run.stdout.splitlines() if "WARNING" in line]
        assert len(warnings) == len(compiled)
        assert all("running eagerly: the network cannot be compiled" in line for line in warnings)
        assert all("no-such-compiler" in line for line in warnings)
    assert losses(tmp_path / "fast") == losses(tmp_path / "eager")


def test_a_micro_batch_that_does_not_divide_the_batch_is_an_error(shapes, tmp_path):
    run = run_script("train.py", "--data-path", shapes, *SMALL, "--micro-batch-size", 3, cwd=tmp_path)
    assert run.returncode != 0
    assert "error: --micro-batch-size 3 does not divide a rank's 8 samples" in run.stderr


@on_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("options", [{}, {"micro_batch": 4, "grad_checkpoint": True}], ids=["plain", "all"])
@pytest.mark.parametrize("speed", [COMPILED, GRAPHS], ids=["compiled", "graphs"])
def test_captured_and_eager_steps_are_the_same_on_a_gpu(gpu_stream, precision, options, speed):
    fast = Trained(speed, precision, gpu_stream, **options)
    assert len(fast.step.launch.recordings) == 1
    assert_same(fast, Trained(EAGER, precision, gpu_stream, **options), **TOLERANCES[precision])
    # The warm-up's last learning rate, which a frozen number would not have reached.
    assert fast.state.lr.item() == pytest.approx(1e-3)
    assert fast.state.step == 20


@on_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("speed", [EAGER, GRAPHS, COMPILED], ids=["eager", "graphs", "compiled"])
def test_no_step_waits_for_the_gpu(gpu_stream, precision, speed):
    run = Trained(speed, precision, gpu_stream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            run.advance()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_a_replayed_step_skips_an_overflow_on_the_gpu(gpu_stream):
    run = Trained(COMPILED, "fp16", gpu_stream)
    run.state.scaler._scale.fill_(2.0**100)
    before = run.state.share.weights.clone(), run.state.share.average.clone(), run.state.sums.clone()
    run.advance()
    assert run.state.read_counts() == 1
    assert (run.state.step, run.state.skipped) == (20, run.skipped + 1)
    assert torch.equal(before[0], run.state.share.weights)
    assert torch.equal(before[1], run.state.share.average)
    assert torch.equal(before[2], run.state.sums)
    assert run.state.scaler.get_scale() == 2.0**99


@on_gpu
def test_a_function_that_waits_for_the_gpu_is_not_captured_but_still_called(gpu_stream, caplog):
    caplog.set_level(logging.WARNING, logger="EqM")
    graphed = Graphed(lambda x: x * x.sum().item())
    x = torch.arange(4.0, device=gpu_stream)
    for _ in range(6):
        torch.testing.assert_close(graphed(x), x * 6)
    (record,) = caplog.records
    assert "running without CUDA graphs: the step cannot be captured" in record.message


@on_gpu
def test_training_goes_on_eagerly_with_the_same_random_numbers_where_it_cannot_be_captured(
    gpu_stream, caplog, monkeypatch
):
    caplog.set_level(logging.WARNING, logger="EqM")
    right = Trained(EAGER, "fp16", gpu_stream)
    unscaled = TrainingState.unscaled

    def waiting(state: TrainingState, norm: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        norm, scale = unscaled(state, norm)
        norm.item()  # before the update
        return norm, scale

    monkeypatch.setattr(TrainingState, "unscaled", waiting)
    ours = Trained(COMPILED, "fp16", gpu_stream)
    assert not ours.step.launch.recordings
    assert len(caplog.records) == 1
    assert_same(ours, right, **TOLERANCES["fp16"])
    torch.randn(1, device=gpu_stream)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_that_broke_off_does_not_disturb_the_next(precision):
    right, ours = (TrainingState(new_network(), PRECISIONS[precision], CPU) for _ in range(2))
    ours.scaler.scale(torch.ones(()))
    ours.unscaled(torch.ones(()))
    ours.working.final_layer.linear.weight.grad = torch.ones_like(ours.working.final_layer.linear.weight)
    ours.drop_half_step()
    recipe, x = Recipe(1e-3, 0, 0, 0.999), torch.rand(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for state in (right, ours):
        training_step(state, recipe, 2, seed=0, speed=EAGER)(x, torch.arange(2), torch.full((2,), 0.1))
    assert torch.equal(ours.share.weights, right.share.weights)


def test_a_step_that_one_rank_cannot_capture_is_replayed_on_none(tmp_path):
    script = tmp_path / "step.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'EqM')!r})\n"
        "import torch, graphs\nfrom runtime import distributed, logs\n"
        "distributed.start()\n"
        "logs.start_log()\n"
        "def record(self, shapes, inputs):\n"
        "    if distributed.rank() == 1:\n"
        "        raise RuntimeError('not here')\n"
        "    self.recordings[shapes] = None\n"
        "graphs.Graphed.record = record\n"
        "step = graphs.Graphed(lambda x: x + 1, together=True)\n"
        "calls = [step(torch.zeros(2)).tolist() for _ in range(graphs.WARMUP_CALLS + 3)]\n"
        "assert calls == [[1, 1]] * len(calls), calls\n"
        "assert not step.recordings\n"
        "distributed.stop()\n"
    )
    run = run_ranks(2, script, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("the step cannot be captured: RuntimeError: not here") == 1


@torch.no_grad()
def test_the_part_of_each_label_is_computed_once_and_found_again(monkeypatch):
    network, computed = new_network().requires_grad_(False), []
    for block in (*network.blocks, network.final_layer):
        torch.nn.init.normal_(block.adaLN_modulation[1].weight, std=0.2)
    modulations = EqM.modulations

    def counted(self: EqM, t: torch.Tensor, y: torch.Tensor) -> tuple:
        computed.append(y.tolist())
        return modulations(self, t, y)

    monkeypatch.setattr(EqM, "modulations", counted)
    conditioned, x = conditioned_field(network, 3, 0.1, fast=False), torch.randn(3, 3, 4, 8, 8)
    results = {labels: conditioned(torch.tensor(labels))(x) for labels in ((2, 0, 2), (0, 0, 2), (4, 0, 1), (1, 2, 4))}
    assert computed == [[2, 0], [4, 1]]
    for labels, ours in results.items():
        torch.testing.assert_close(ours, network(x, torch.zeros(3), torch.tensor(labels)), atol=1e-5, rtol=0)
    assert (results[2, 0, 2] - results[0, 0, 2]).abs().max() > 1e-2


@on_gpu
@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_adaptive_samples_on_a_gpu_are_those_of_a_fixed_number_of_steps_and_nothing_waits_for_them(
    gpu_stream, precision, compiled
):
    network = new_network().requires_grad_(False).to(gpu_stream, PRECISIONS[precision].dtype)
    torch._dynamo.reset()
    conditioned = conditioned_field(network, 4, 0.1, fast=True, recorded=False)
    descent, shape = Descent(0.01, 0.3, 20, 1e-9), network.input_shape

    def labels(indices: list[int]) -> torch.Tensor:
        return torch.tensor([index % 4 for index in indices])

    def starts(indices: list[int]) -> torch.Tensor:
        return sample_noise(0, indices, shape)

    conditioned(labels(range(4)))
    slots = Slots(conditioned, starts, labels, shape, 4, descent, gpu_stream, recorded=Graphed, compiled=compiled)
    list(slots.run(range(4)))
    torch.cuda.set_sync_debug_mode("error")
    try:
        finished = list(slots.run(range(9)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert slots.advance.recordings, "the step is replayed as a CUDA graph"
    assert {sample.index for sample in finished} == set(range(9))
    for sample in finished:
        start = starts([sample.index]).expand(4, -1, -1, -1, -1).to(gpu_stream)
        right = gradient_descent(conditioned(labels([sample.index] * 4)), start, 0.01, range(20), 0.3)[0]
        torch.testing.assert_close(sample.x, right, atol=1e-4 if precision == "fp32" else 5e-2, rtol=0)


@on_gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["graphs alone", "compiled"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_captured_sampling_is_the_eager_one_for_every_batch_shape(gpu_stream, caplog, precision, compiled):
    caplog.set_level(logging.WARNING, logger="EqM")
    network = new_network().requires_grad_(False).to(gpu_stream, PRECISIONS[precision].dtype)
    eager = conditioned_field(network, 4, 0.1, fast=False)
    with torch.no_grad():
        for n in (2, 5, 2):
            torch._dynamo.reset()
            fast = conditioned_field(network, 2 * n, 0.1, fast=True, compiled=compiled)
            y = torch.arange(n)[None] % 4
            for _ in range(6):
                x = torch.randn(n, 3, 4, 8, 8, device=gpu_stream)
                guided = Composition([1.0], 4, 1.5, gpu_stream)
                ours, right = (guided.field(conditioned, y)(x).clone() for conditioned in (fast, eager))
                torch.testing.assert_close(ours, right, atol=1e-5 if precision == "fp32" else 5e-2, rtol=0)
    assert not caplog.records


@on_gpu
def test_a_tensor_whose_elements_share_memory_reaches_the_gpu(gpu_stream):
    shared = torch.arange(3.0)[:, None].expand(3, 4)
    assert torch.equal(to_device(shared, gpu_stream).cpu(), shared)


@on_gpu
def test_each_set_of_shapes_has_a_graph_of_its_own(gpu_stream):
    graphed = Graphed(lambda x: x + 1)
    for n in (2, 3, 2, 3):
        for _ in range(5):
            x = torch.randn(n, device=gpu_stream)
            assert torch.equal(graphed(x), x + 1)
    assert len(graphed.recordings) == 2


@on_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_exchange_is_captured(gpu_stream, tmp_path, precision):
    alone = Trained(COMPILED, precision, gpu_stream, micro_batch=1)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1, device_id=gpu_stream)
    try:
        ours = Trained(COMPILED, precision, gpu_stream, micro_batch=1)
        assert len(ours.step.launch.recordings) == 1
    finally:
        dist.destroy_process_group()
    assert_same(ours, alone, **TOLERANCES[precision])


@pytest.fixture
def gpu_stream():
    """The GPU, with a stream current that can be captured."""
    before = torch.cuda.current_stream()
    torch.cuda.set_stream(torch.cuda.Stream())
    yield torch.device("cuda", 0)
    torch.cuda.set_stream(before)


@pytest.mark.slow
def test_the_benchmark_finds_that_fast_and_eager_agree(tmp_path):
    run = run_python("benchmark.py", "--quick", "--only", "agreement", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "fast and eager agree" in run.stdout


@pytest.mark.parametrize("wrong", ["nothing", "training", "sampling"])
def test_the_benchmark_finds_a_fast_path_that_differs_and_exits_with_1(monkeypatch, tmp_path, capsys, wrong):
    def step(state: TrainingState, recipe: Recipe, batch: int, seed: int, speed: Speed) -> object:
        recipe = replace(recipe, lr=recipe.lr * 100) if speed.fast and wrong == "training" else recipe
        return training_step(state, recipe, batch, seed, EAGER)

    def field(network: EqM, batch: int, seconds_per_frame: float, fast: bool, compiled: bool) -> object:
        seconds_per_frame = 0.5 if fast and wrong == "sampling" else seconds_per_frame
        return conditioned_field(network, batch, seconds_per_frame, fast=False)

    monkeypatch.setattr("measuring.workloads.training_step", step)
    monkeypatch.setattr("measuring.workloads.conditioned_field", field)
    monkeypatch.setattr("measuring.device_tables.TINY", replace(TINY, batch=4))
    monkeypatch.setattr("measuring.agreement.STEPS", {"cpu": 10})
    monkeypatch.setattr("measuring.agreement.SAMPLING_STEPS", {"cpu": 3})
    monkeypatch.setattr(benchmark, "start_log", lambda level: None)
    path = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--quick", "--only", "agreement", "--output", str(path)])
    with nullcontext() if wrong == "nothing" else pytest.raises(SystemExit, match="^1$"):
        benchmark.main()
    assert f"fast and eager {'agree' if wrong == 'nothing' else 'DIFFER'}" in capsys.readouterr().out
    found = json.loads(path.read_text())["agreement"]
    assert found["agree"] == (wrong == "nothing")
    assert agreement.losses_agree(found["windows"]) == (wrong != "training")
    assert (found["samples"]["fp32"] < 1e-4) == (wrong != "sampling")


@pytest.mark.parametrize("flags", [["--only", "tiny"], ["--quick", "--only", "guide"], ["--only", "largest"]], ids=str)
def test_a_part_that_cannot_be_measured_is_refused(tmp_path, flags):
    run = run_script("benchmark.py", *flags, cwd=tmp_path)
    assert run.returncode == 1
    assert f"benchmark.py: error: --only {flags[-1]}: on this device" in run.stderr


@pytest.mark.slow
def test_the_quick_benchmark_writes_every_row_and_ratio_within_two_minutes(tmp_path):
    cores, shared = os.cpu_count() or 1, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))  # by tests at once
    command = [sys.executable, ROOT / "EqM" / "benchmark.py", "--quick"]
    run = run_command(*command, cwd=tmp_path, threads=min(cores, 2), timeout_s=120 * shared)
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "results" / "benchmark.json").read_text())
    assert [(row["precision"], row["mode"]) for row in report["rows"]] == 2 * [
        ("fp32 IEEE", "eager"),
        ("fp32 IEEE", "fast"),
    ]
    for row in report["rows"]:
        assert row["ms"] * row["samples_per_second"] == pytest.approx(1000 * row["batch"])
        assert row["of_product"] == pytest.approx(row["tflops"] / report["product_tflops"])
        assert f"| {row['ms']:.2f} |" in run.stdout
    first, second = report["rows"][:2]
    ratio = report["ratios"]["Ti/2, 4 frames of 16 px, batch 16: speed, fast over eager, fp32 IEEE"]
    assert ratio == pytest.approx(first["ms"] / second["ms"], abs=0.01)
    (saving,) = report["adaptive"].values()
    assert saving["ideal"] == pytest.approx(1 - saving["evaluations a sample"] / saving["cap"])
    assert 0.35 < saving["ideal"] < 0.45
    assert saving["saved"] == pytest.approx(1 - saving["adaptive s"] / saving["fixed s"])


def test_precisions_choose_the_rows_of_the_benchmark(tmp_path):
    flags = ("--quick", "--only", "sampling", "--precisions", "bf16")
    run = run_script("benchmark.py", *flags, cwd=tmp_path)
    assert run.returncode == 1
    assert "benchmark.py: error: --precisions bf16: on this device only fp32 is measured" in run.stderr
