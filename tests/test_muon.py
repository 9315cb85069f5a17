"""Muon: what it does to matrices, which weights have it, and that its update obeys all that an update obeys."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from conftest import SMALL, run_script, spawn
from muon import RMS, Matrices, MuonUpdate, begin, begin_in_one_kernel, orthogonal, orthogonalise, runs_of_share
from optimizer import Rates, update
from precision import Precision
from runtime import distributed
from sharding import Sharding, trainable
from test_ranks import WAYS, new_network, on_rank, trained
from test_train import assert_same, load, metrics
from test_training import CPU, FP16, FP32, RECIPE, kept, new_state, one_step, same

MUON = replace(RECIPE, optimizer="muon")
PARTS = {"attn.qkv": 3, "attn.proj": 1, "mlp.fc1": 1, "mlp.fc2": 1}  # queries, keys and values each
MATRICES = {f"blocks.{i}.{kind}.weight": parts for i in (0, 1) for kind, parts in PARTS.items()}


def rates_of(step: int, updated: bool = True, divisor: float = 4.0) -> Rates:
    numbers = (torch.tensor(value) for value in (updated, step, 1e-2, divisor, 0.9))
    return Rates.of(*numbers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [32, 128])
def test_singular_values_become_nearly_1_and_singular_vectors_stay(dtype, columns):
    torch.manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(3, 32, columns), full_matrices=False)  # (3, 32, 32), (3, 32, c)
    values = torch.logspace(-2, 0, 32)
    matrices = (u * values / values.norm()) @ vh  # (3, 32, c)
    found = orthogonal(matrices.to(dtype)).float()
    assert 0.67 < torch.linalg.svdvals(found).min() < torch.linalg.svdvals(found).max() < 1.22
    inside = u.mT @ found @ vh.mT  # (3, 32, 32), diagonal if the vectors are the same
    on = inside.diagonal(dim1=1, dim2=2)
    assert on.min() > 0.6
    assert (inside - torch.diag_embed(on)).norm() < (1e-3 if dtype == torch.float32 else 0.1) * inside.norm()


def named_matrices(sharding: Sharding, plain: Tensor) -> dict[str, Tensor]:
    """Muon's matrices by the name of their weight, with their number for one that holds several."""
    named = sharding.named(plain)
    return {f"{name}[{i}]": part for name, parts in MATRICES.items() for i, part in enumerate(named[name].chunk(parts))}


def test_a_batch_over_the_share_is_each_matrix_by_itself():
    sharding = new_state().sharding
    plain = torch.randn(sharding.share, generator=torch.Generator().manual_seed(2))
    before = plain.clone()
    orthogonalise(plain, runs_of_share(sharding), torch.float32)
    for name, matrix in named_matrices(sharding, before).items():
        rows, columns = matrix.shape
        wide = (matrix / matrix.norm()).reshape(1, rows, columns)
        right = orthogonal(wide.mT)[0].mT if rows > columns else orthogonal(wide)[0]
        right = right * RMS * max(rows, columns) ** 0.5
        torch.testing.assert_close(named_matrices(sharding, plain)[name], right, atol=1e-5, rtol=1e-4, msg=name)
        assert right.square().mean().sqrt() == pytest.approx(RMS, rel=0.2)
    others = ~Matrices.of(sharding, CPU).is_matrix
    assert torch.equal(plain[others], before[others])


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_the_blocks_matrices_have_muon_and_all_other_weights_adamw(monkeypatch, ranks):
    weights, found = trainable(new_network()), {}
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    for rank in range(ranks):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        sharding = Sharding.of(weights)
        is_matrix = Matrices.of(sharding, CPU).is_matrix
        for name, start in sharding.held().items():
            found[name] = is_matrix[start : start + weights[name].numel()]
        assert is_matrix.sum() == sum(len(found[name]) for name in sharding.held() if name in MATRICES)
    assert found.keys() == weights.keys()
    assert {name for name, held in found.items() if held.all()} == MATRICES.keys()
    assert not any(held.any() for name, held in found.items() if name not in MATRICES)


def test_a_rank_without_matrices_updates_as_adamw_does(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 100)
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    state, second = new_state(), new_state().share
    ours, first = MuonUpdate.of(state.sharding, CPU, compiles=False), state.share
    assert ours.matrices.runs == []
    gradients = torch.randn(len(first.weights))
    for step in (1, 2):
        ours(first, gradients.clone(), rates_of(step))
        update(second, gradients.clone(), rates_of(step))
    assert_same(vars(first), vars(second))


def test_blocks_that_differ_are_refused():
    network = new_network()
    network.blocks[1].mlp.fc1 = nn.Linear(32, 64)
    with pytest.raises(ValueError, match="the blocks' mlp.fc1 differ"):
        runs_of_share(Sharding.of(trainable(network)))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
def test_the_update_is_that_of_torchs_optimizers():
    state = new_state()
    ours = MuonUpdate.of(state.sharding, CPU, compiles=False)
    start, gradients = state.share.weights.clone(), torch.Generator().manual_seed(3)
    rest = nn.Parameter(start.clone())
    matrices = {name: nn.Parameter(m.clone()) for name, m in named_matrices(state.sharding, start).items()}
    settings = {"weight_decay": 0, "momentum": 0.95, "nesterov": True, "adjust_lr_fn": "match_rms_adamw"}
    theirs = torch.optim.Muon(matrices.values(), 1e-2, **settings), torch.optim.AdamW([rest], 1e-2, weight_decay=0)
    for step in (1, 2, 3):
        g = torch.randn(len(start), generator=gradients)
        rest.grad = g.clone()
        for name, matrix in named_matrices(state.sharding, g).items():
            matrices[name].grad = matrix.clone()
        ours(state.share, 4 * g, rates_of(step))
        for optimizer in theirs:
            optimizer.step()
    others = ~ours.matrices.is_matrix
    torch.testing.assert_close(state.share.weights[others], rest.detach()[others], atol=1e-6, rtol=1e-5)
    before = named_matrices(state.sharding, start)
    for name, moved in named_matrices(state.sharding, state.share.weights).items():
        right = matrices[name].detach() - before[name]
        assert (moved - before[name] - right).norm() < 0.05 * right.norm(), name  # torch's products are in bf16


def test_the_update_for_the_compiler_is_that_of_torchs_kernels():
    first, second = new_state(), new_state()
    kernels = MuonUpdate.of(first.sharding, CPU, compiles=False)
    for step, updated in ((1, True), (2, False), (2, True), (3, True)):
        g = torch.randn(first.sharding.share, generator=torch.Generator().manual_seed(step))
        g[0] = 0 if updated else torch.inf
        kernels(first.share, g.clone(), rates_of(step, updated))
        replace(kernels, begin=begin_in_one_kernel)(second.share, g.clone(), rates_of(step, updated))
    for name, value in vars(first.share).items():
        torch.testing.assert_close(getattr(second.share, name), value, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.slow
def test_the_compiled_update_is_the_eager_one():
    first, second = new_state(), new_state()
    eager, fast = (MuonUpdate.of(first.sharding, CPU, compiles) for compiles in (False, True))
    for step, updated in ((1, True), (2, False), (2, True)):
        g = torch.randn(first.sharding.share, generator=torch.Generator().manual_seed(step))
        eager(first.share, g.clone(), rates_of(step, updated))
        fast(second.share, g.clone(), rates_of(step, updated))
    for name, value in vars(first.share).items():
        torch.testing.assert_close(getattr(second.share, name), value, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kernel", [begin, begin_in_one_kernel])
def test_a_skipped_update_changes_nothing(kernel):
    state = new_state()
    one_step(state, MUON)
    before, ours = kept(state), MuonUpdate.of(state.sharding, CPU, compiles=False)
    bad = torch.full_like(state.share.weights, torch.nan)
    replace(ours, begin=kernel)(state.share, bad, rates_of(2, updated=False, divisor=torch.inf))
    assert same(before, kept(state))


@pytest.mark.parametrize("precision", [FP32, FP16, Precision("bf16", "bf16", torch.bfloat16)], ids=lambda p: p.name)
def test_the_loss_falls_in_every_precision_and_a_step_without_finite_gradients_is_skipped(precision):
    state, recipe = new_state(precision), replace(MUON, lr=1e-2, grad_clip=1.0)
    losses = [one_step(state, recipe)[1] for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]
    before = kept(state)
    assert not one_step(state, recipe, x=torch.full((8, 3, 4, 8, 8), torch.nan))[0]
    assert same(before, kept(state))
    assert state.share.exp_avg_sq[Matrices.of(state.sharding, CPU).is_matrix].abs().max() == 0
    assert one_step(state, recipe)[0]


def train_all_ways() -> dict:
    ways = {way: trained(way, optimizer="muon") for way in WAYS} | {"again": trained("fp32", optimizer="muon")}
    own = {f"own draws, {n}": trained("fp32", n, own_draws=True, optimizer="muon") for n in (None, 1)}
    return ways | own


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("two")
    spawn(on_rank, (folder, [train_all_ways]), 2, folder)
    return [torch.load(folder / f"{rank}.pt")[0] for rank in (0, 1)]


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_train_with_muon_as_one_does(two_ranks, way):
    one, tolerance = trained(way, optimizer="muon"), WAYS[way][2]
    assert torch.equal(two_ranks[0][way]["losses"], two_ranks[1][way]["losses"])
    torch.testing.assert_close(two_ranks[0][way]["losses"], one["losses"], rtol=tolerance, atol=0)


def test_micro_batches_of_two_ranks_with_muon_add_up(two_ranks):
    whole, parts = (two_ranks[0][f"own draws, {n}"]["losses"] for n in (None, 1))
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=0)


def test_two_ranks_repeat_a_training_with_muon_to_the_bit(two_ranks):
    assert_same(two_ranks[0]["fp32"], two_ranks[0]["again"])


def flags(shapes: Path) -> list:
    given = ["--num-workers", 0, "--log-every", 1, "--lr", 1e-3, "--grad-clip", 1]
    return ["--data-path", shapes, *SMALL, "--model", "EqM-Ti/8", "--global-batch-size", 4, *given]


@pytest.fixture(scope="module")
def run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of four steps with Muon."""
    folder = tmp_path_factory.mktemp("muon")
    result = run_script("train.py", *flags(shapes), "--optimizer", "muon", "--max-steps", 4, cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


def test_a_run_with_muon_keeps_it_and_is_resumed_to_the_bit_without_the_flag(run, shapes, tmp_path):
    (straight,) = (run / "results").iterdir()
    assert json.loads((straight / "config.json").read_text())["args"]["optimizer"] == "muon"
    command = ["train.py", *flags(shapes), "--micro-batch-size", 4]
    stopped = run_script(*command, "--optimizer", "muon", "--max-steps", 2, cwd=tmp_path)
    went_on = run_script(*command, "--max-steps", 4, "--resume", cwd=tmp_path)
    assert (stopped.returncode, went_on.returncode) == (0, 0), went_on.stderr
    (ours,) = (tmp_path / "results").iterdir()
    for name in ("model", "ema", "opt"):
        assert_same(load(ours, 4)[name], load(straight, 4)[name])


def test_another_optimizer_is_another_run(run, shapes, tmp_path):
    (checkpoint,) = run.glob("results/*/checkpoints/0000004.pt")
    other = ["train.py", *flags(shapes), "--optimizer", "adamw", "--max-steps", 5]
    refused = run_script(*other, "--ckpt", checkpoint, cwd=tmp_path)
    assert refused.returncode == 1
    assert "was trained with optimizer muon, and this run has adamw" in refused.stderr
    assert not list(tmp_path.glob("results/*"))
    new = run_script(*other, "--resume", "--results-dir", run / "results", "--max-steps", 1, cwd=tmp_path)
    assert new.returncode == 0, new.stderr
    assert "no run in" in new.stdout
    assert [line["step"] for line in metrics(run / "results" / "001-EqM-Ti-8-Linear-velocity-None")] == [1]


def test_an_unknown_optimizer_is_refused(shapes, tmp_path):
    result = run_script("train.py", *flags(shapes), "--optimizer", "sgd", cwd=tmp_path)
    assert result.returncode == 2
    assert "argument --optimizer: invalid choice: 'sgd'" in result.stderr


@pytest.mark.slow
def test_the_benchmark_compares_the_optimizers(tmp_path):
    result = run_script("benchmark.py", "--quick", "--only", "optimizers", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (times,) = json.loads((tmp_path / "results" / "benchmark.json").read_text())["optimizers"].values()
    assert times["ratio"] == pytest.approx(times["muon"] / times["adamw"])
    assert f"| {times['adamw']:.2f} | {times['muon']:.2f} | {times['ratio']:.2f} |" in result.stdout
