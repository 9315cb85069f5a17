"""An explicit energy's field is its gradient, in training, in sampling and compiled; checkpoints keep the objective."""

import csv
import json
import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from compiled import COMPILED, EAGER, compile_network
from conftest import SMALL, make_pack, run_script, spawn
from energy import energy
from measuring import throughput
from measuring.workloads import TINY, Training
from models import EqM, sample_energy
from objective import Objective
from precision import Precision
from runs.checkpoint import save_checkpoint
from runs.config import check_resumable, config_of
from runtime.random_numbers import seed_draws
from sampling.descent import gradient_descent
from sampling.fields import Composition, conditioned_field
from state import TrainingState
from step import Recipe, network_loss, training_step

CPU = torch.device("cpu")
KINDS = ["dot", "l2"]
PRECISIONS = [
    Precision("fp32", "fp32", torch.float32),
    Precision("bf16", "bf16", torch.bfloat16),
    Precision("fp16", "fp16", torch.float16),
]
Y, SECONDS = torch.arange(3), torch.full((3,), 0.1)


def initialised(kind: str, input_size: object = (4, 8, 8), depth: int = 2) -> EqM:
    torch.manual_seed(0)
    video = not isinstance(input_size, int)
    shape = {"hidden_size": 32, "depth": depth, "num_heads": 2, "num_classes": 4}
    return EqM(input_size, 4, 3, **shape, temporal_patch=2 if video else 1, energy=kind)


def new_network(kind: str, input_size: object = (4, 8, 8)) -> EqM:
    """A network with no zero weights, so that every part shows in its output."""
    network = initialised(kind, input_size)
    for weight in network.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.1)
    return network


def batch(network: EqM, n: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Data and noise, (N, …), and γ (N,)."""
    generator = torch.Generator().manual_seed(1)
    x, noise = (torch.randn(n, *network.input_shape, generator=generator) for _ in range(2))
    return x, noise, torch.rand(n, generator=generator)


def gradients(network: EqM, field: object) -> list[torch.Tensor]:
    """Of the loss in every weight, with the field that a function of x_γ and γ gives."""
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    return torch.autograd.grad(Objective().loss(field, *batch(network)), weights)


def doubly_differentiated(network: EqM) -> list[torch.Tensor]:
    """The loss's gradients, with the energy and its gradient written out."""

    def field(x: torch.Tensor, gamma: torch.Tensor) -> tuple[torch.Tensor, None]:
        x = x.clone().requires_grad_()
        f, _ = network.output(x, *network.modulations(gamma, Y), SECONDS)
        total = (x * f).sum() if network.energy == "dot" else -(f**2).sum() / 2
        return torch.autograd.grad(total, x, create_graph=True)[0], None

    return gradients(network, field)


def assert_same_gradients(network: EqM, right: list[torch.Tensor]) -> None:
    """Those of the network's own field are within 1e-4 of each weight's largest."""
    ours = gradients(network, lambda x, gamma: network(x, gamma, Y, SECONDS, with_tokens=True))
    for mine, other in zip(ours, right, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(mine, other, atol=1e-4 * other.abs().max().item(), rtol=0)


def test_energies_are_their_formulas_one_a_sample():
    x, f = torch.tensor([[[1.0, 2.0]], [[3.0, -1.0]]]), torch.tensor([[[2.0, 0.5]], [[1.0, 4.0]]])
    assert energy("dot", x, f).tolist() == [3, -1]
    assert energy("l2", x, f).tolist() == [-2.125, -8.5]
    assert energy("dot", x, f.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("input_size", [8, (4, 8, 8)], ids=["image", "clip"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_field_is_the_energys_slope_without_autograd_too(kind, input_size):
    network = new_network(kind, input_size).eval().requires_grad_(False)
    x, direction, _ = batch(network)
    with torch.no_grad():
        field = network(x, torch.zeros(3), Y, SECONDS)
        ahead, behind = (-sample_energy(network, x + h * direction, Y, SECONDS) for h in (1e-2, -1e-2))
    assert field.dtype == torch.float32
    slope = (field * direction).flatten(1).sum(1)  # (N,)
    slope /= x[0].numel()
    torch.testing.assert_close(slope, (ahead - behind) / 2e-2, rtol=2e-3, atol=2e-3 * slope.abs().max().item())


@pytest.mark.parametrize("kind", KINDS)
def test_the_losss_gradients_are_those_of_double_differentiation(kind):
    network = new_network(kind)
    assert_same_gradients(network, doubly_differentiated(network))


@pytest.mark.parametrize("kind", KINDS)
def test_the_losss_gradients_are_its_slope(kind):
    network, h = new_network(kind), 1e-3
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    found = gradients(network, lambda x, gamma: network(x, gamma, Y, SECONDS, with_tokens=True))

    def loss_at(distance: float) -> float:
        moved = deepcopy(network)
        ends = [weight for weight in moved.parameters() if weight.requires_grad]
        for end, gradient in zip(ends, found, strict=True):
            end.data += distance * gradient / norm
        return network_loss(moved, Objective(), *batch(moved), Y, SECONDS).item()

    norm = torch.stack([gradient.square().sum() for gradient in found]).sum().sqrt()
    assert (loss_at(h) - loss_at(-h)) / (2 * h) == pytest.approx(norm.item(), rel=0.02)
    assert len(weights) == len(found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_gradients_are_those_of_double_differentiation(kind):
    torch._dynamo.reset()
    network = new_network(kind)
    right = doubly_differentiated(network)
    compile_network(network, 3, training=True)
    torch._dynamo.utils.counters.clear()
    assert_same_gradients(network, right)
    # What was tried out is what is used.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
    assert torch._dynamo.utils.counters["frames"]["total"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_sampling_follows_the_same_field(kind):
    torch._dynamo.reset()
    network = new_network(kind).eval().requires_grad_(False)
    x, _, _ = batch(network)
    with torch.no_grad():
        right = conditioned_field(network, 3, 0.12, fast=False)(Y)(x)
        compiled = conditioned_field(network, 3, 0.12, fast=True)
        torch._dynamo.utils.counters.clear()
        torch.testing.assert_close(compiled(Y)(x), right, atol=1e-5, rtol=1e-4)
    assert torch._dynamo.utils.counters["frames"]["total"] == 0


class Trained:
    """Steps on one batch of six: the losses, and the state after them."""

    def __init__(self, network: EqM, precision: Precision, steps: int, **recipe: object):
        self.state = TrainingState(network, precision, CPU)
        recipe = Recipe(lr=3e-3, warmup_steps=0, grad_clip=1.0, ema_decay=0.999, **recipe)
        step = training_step(self.state, recipe, 6, seed=0, speed=EAGER)
        x = torch.rand(6, *network.input_shape, generator=torch.Generator().manual_seed(2)) * 2 - 1
        self.losses = []
        for _ in range(steps):
            self.losses.append(step(x, torch.arange(6) % 4, torch.full((6,), 0.1))[0].item())
            self.state.advance(0)  # the same random numbers again


@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda p: p.name)
@pytest.mark.parametrize("kind", KINDS)
def test_an_energy_learns_from_the_first_step_in_every_precision(kind, precision):
    network = initialised(kind)
    start = TrainingState(deepcopy(network), precision, CPU).share.weights.clone()
    one = Trained(deepcopy(network), precision, 1).state
    assert one.read_counts() == 0
    assert not torch.equal(one.share.weights, start)
    losses = Trained(network, precision, 30).losses
    assert losses[-1] < 0.9 * losses[0]


def test_an_energy_whose_output_starts_at_zero_would_never_learn():
    network = initialised("l2")
    assert network.final_layer.linear.weight.std().item() == pytest.approx(0.02, rel=0.1)
    torch.nn.init.zeros_(network.final_layer.linear.weight)
    found = gradients(network, lambda x, gamma: network(x, gamma, Y, SECONDS, with_tokens=True))
    assert all((gradient == 0).all() for gradient in found)
    assert (initialised("dot").final_layer.linear.weight == 0).all()


def test_a_step_takes_its_recipes_objective():
    plain, doubled = (
        Trained(initialised("dot"), PRECISIONS[0], 1, objective=Objective(scale=scale)).losses[0] for scale in (4, 8)
    )
    assert doubled == pytest.approx(4 * plain)  # of a field that is 0


def test_training_hands_the_network_its_gamma():
    seen = []

    def network(x: torch.Tensor, t: torch.Tensor, *_: object, **given: object) -> tuple[torch.Tensor, None]:
        seen.append(t)
        return torch.zeros_like(x), None

    x, noise, gamma = batch(initialised("none"))
    network_loss(network, Objective(), x, noise, gamma, Y, SECONDS)
    assert torch.equal(seen[0], gamma)


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_add_up_to_the_whole_batchs_gradients(kind):
    whole, parts = (Trained(new_network(kind), PRECISIONS[0], 2, micro_batch=size) for size in (None, 2))
    assert parts.losses == pytest.approx(whole.losses, rel=1e-4)


def test_the_dispersive_term_reaches_the_weights_of_every_kind():
    for kind in ("none", *KINDS):
        network = new_network(kind)
        plain, dispersed = (
            network_loss(network, Objective(dispersion=weight), *batch(network), Y, SECONDS) for weight in (0, 100.0)
        )
        weight = network.blocks[1].mlp.fc2.weight
        (difference,) = torch.autograd.grad(dispersed - plain, weight)
        assert difference.abs().max() > 1e-3


def shard_step(rank: int, folder: Path, ranks: int, kind: str, fast: bool) -> None:
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    torch._dynamo.utils.counters.clear()
    state = TrainingState(initialised(kind, 8, depth=1), PRECISIONS[0], CPU)
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(rank)) * 2 - 1
    recipe = Recipe(1e-3, 0, 0.0, 0.999, objective=Objective(dispersion=0.5))
    step = training_step(state, recipe, 4, 0, COMPILED if fast else EAGER)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert (compiled == 1) == fast
    for number in range(2):  # a weight without a gradient would stop the second
        seed_draws(state.generator, 0, number, rank)
        step.launch(x, torch.arange(4), torch.full((4,), 0.1))
        if number == 0:
            gradients = [moment * 10 for moment in state.sharding.whole(state.share.exp_avg).values()]
            torch.save(torch.cat([gradient.flatten() for gradient in gradients]), folder / f"{ranks}-{rank}.pt")
    # Nothing is compiled again.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled
    if ranks > 1:
        dist.destroy_process_group()


@pytest.mark.parametrize("fast", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_take_the_mean_of_their_gradients(tmp_path, kind, fast):
    spawn(shard_step, (tmp_path, 2, kind, fast), 2, tmp_path)
    for rank in (0, 1):
        shard_step(rank, tmp_path, 1, kind, fast=False)
    first, second = (torch.load(tmp_path / f"1-{rank}.pt") for rank in (0, 1))
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(tmp_path / f"2-{rank}.pt"), (first + second) / 2, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_climbs_the_energy(kind):
    network = new_network(kind).eval().requires_grad_(False)
    x, _, _ = batch(network)
    field = conditioned_field(network, 3, 0.1, fast=False)(Y)
    with torch.no_grad():
        trace = [sample_energy(network, gradient_descent(field, x, 0.02, range(n)), Y, 0.1) for n in range(4)]
    assert all((after < before).all() for before, after in zip(trace, trace[1:], strict=False))


def test_guidance_mixes_gradients():
    network = new_network("dot").eval().requires_grad_(False)
    x, _, _ = batch(network)
    with torch.no_grad():
        given, null = (network(x, torch.zeros(3), labels, 0.1) for labels in (Y, torch.full((3,), 4)))
        mixed = Composition([1.0], 4, 1.5, "cpu").field(conditioned_field(network, 6, 0.1, fast=False), Y[None])(x)
    torch.testing.assert_close(mixed, null + 1.5 * (given - null))


def test_a_network_without_an_energy_has_none_to_give():
    network = new_network("none")
    with pytest.raises(ValueError, match="no explicit energy"):
        sample_energy(network, batch(network)[0], Y)
    with pytest.raises(ValueError, match="unknown energy 'mean'"):
        initialised("mean")


TRAIN = ["train.py", "--num-workers", 0, "--log-every", 1, "--data-path"]


def assert_refused(run: object, *words: str) -> None:
    """The run ended with one line, which says all of the words."""
    assert run.returncode != 0
    (line,) = [line for line in run.stderr.splitlines() if "error:" in line]
    assert all(word in line for word in words), line
    assert "Traceback" not in run.stderr


def test_an_energy_trains_resumes_and_is_sampled_as_what_it_is(shapes, tmp_path):
    flags = [*SMALL, "--ebm", "l2", "--path-type", "GVP", "--c-schedule", "linear", "--c-lambda", 2, "--disp"]
    for steps in (2, 4):
        run = run_script(*TRAIN, shapes, *flags, "--max-steps", steps, "--resume", cwd=tmp_path)
        assert run.returncode == 0, run.stderr
    (folder,) = (tmp_path / "results").iterdir()
    assert folder.name == "000-EqM-Ti-4-GVP-velocity-None"
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    config = torch.load(folder / "checkpoints" / "0000004.pt", weights_only=True)["config"]
    assert config["network"]["energy"] == "l2"
    assert Objective(**config["objective"]) == Objective("GVP", "linear", scale=2.0, dispersion=0.5)

    sample = ["sample_gd.py", "--ckpt", folder / "checkpoints" / "0000004.pt", "--num-sampling-steps", 2]
    run = run_script(*sample, "--num-fid-samples", 1, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert_refused(run_script(*sample, "--ebm", "dot", cwd=tmp_path), "--ebm dot", "l2")
    other = [*SMALL, "--c-schedule", "truncated", "--max-steps", 5, "--ckpt", sample[2]]
    assert_refused(run_script(*TRAIN, shapes, *other, cwd=tmp_path), "schedule linear", "truncated")


def test_an_explicit_energy_is_traced_where_samples_stop_by_themselves(shapes, tmp_path):
    run = run_script(*TRAIN, shapes, *SMALL, "--ebm", "dot", "--max-steps", 2, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    (checkpoint,) = tmp_path.glob("results/*/checkpoints/0000002.pt")
    flags = ["--num-sampling-steps", 3, "--adaptive", 1e-9, "--cfg-scale", 1.5, "--num-fid-samples", 5]
    flags += ["--trace", "--global-batch-size", 2, "--folder", "out"]
    run = run_script("sample_gd.py", "--ckpt", checkpoint, *flags, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    with (tmp_path / "out-trace.csv").open() as file:
        rows = [(int(row["sample"]), int(row["step"]), float(row["energy"])) for row in csv.DictReader(file)]
    assert [row[:2] for row in rows] == [(sample, step) for sample in range(5) for step in (1, 2, 3)]
    assert all(math.isfinite(energy) for *_, energy in rows)


@pytest.mark.slow
def test_an_explicit_energy_is_compiled_once_for_training_from_a_pack_and_once_for_sampling(
    shapes, tmp_path, monkeypatch
):
    make_pack(shapes, tmp_path / "pack")
    monkeypatch.setenv("TORCH_LOGS", "recompiles")
    flags = ["--video", "--clip-len", 4, "--model", "EqM-Ti/4", "--ebm", "dot", "--max-steps", 2, "--compile"]
    run = run_script(*TRAIN, tmp_path / "pack", *flags, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    (checkpoint,) = tmp_path.glob("results/*/checkpoints/0000002.pt")
    flags = ["--num-sampling-steps", 2, "--cfg-scale", 1.5, "--num-fid-samples", 4, "--global-batch-size", 2]
    sampling = run_script("sample_gd.py", "--ckpt", checkpoint, *flags, "--compile", cwd=tmp_path)
    assert sampling.returncode == 0, sampling.stderr
    for said in (run.stdout + run.stderr, sampling.stdout + sampling.stderr):
        assert "compiled in" in said
        assert "Recompiling" not in said


def test_a_network_that_sees_gamma_is_trained_on_it_and_not_sampled(shapes, tmp_path):
    run = run_script(*TRAIN, shapes, *SMALL, "--no-uncond", "--max-steps", 2, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    (checkpoint,) = tmp_path.glob("results/*/checkpoints/0000002.pt")
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["config"]["network"]["uncond"] is False
    assert_refused(run_script("sample_gd.py", "--ckpt", checkpoint, cwd=tmp_path), "--no-uncond", "γ")
    assert not (tmp_path / "samples").exists()
    euler = ["sample_gd.py", "--ckpt", checkpoint, "--sampler", "euler", "--num-sampling-steps", 2]
    assert_refused(run_script(*euler, "--adaptive", 1, cwd=tmp_path), "--adaptive", "--sampler euler")
    run = run_script(*euler, "--num-fid-samples", 1, "--init", shapes, "--trace", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "samples-trace-norm.png").exists()


def test_energies_and_blocks_computed_again_are_refused_together(shapes, tmp_path):
    run = run_script(*TRAIN, shapes, *SMALL, "--ebm", "dot", "--grad-checkpoint", cwd=tmp_path)
    assert_refused(run, "--grad-checkpoint", "--ebm dot", "--micro-batch-size")
    assert "checking files" not in run.stderr


def test_a_meaningless_c_b_is_refused_before_the_data_are_looked_at(shapes, tmp_path):
    run = run_script(*TRAIN, shapes, *SMALL, "--c-b", 2, cwd=tmp_path)
    assert_refused(run, "--c-b", "--c-schedule truncated")
    assert "checking files" not in run.stderr


def test_a_checkpoint_from_before_these_flags_means_their_defaults(checkpoint, shapes, tmp_path):
    saved = torch.load(checkpoint, weights_only=True)
    today = config_of(saved["config"], checkpoint)
    del saved["config"]["objective"], saved["config"]["network"]["uncond"], saved["config"]["network"]["energy"]
    check_resumable(config_of(saved["config"], "old.pt"), today, checkpoint)
    save_checkpoint(tmp_path / "old.pt", saved)
    run = run_script("sample_gd.py", "--ckpt", "old.pt", "--num-sampling-steps", 1, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    run = run_script(*TRAIN, shapes, *SMALL, "--ckpt", "old.pt", "--path-type", "VP", "--max-steps", 5, cwd=tmp_path)
    assert_refused(run, "old.pt", "path Linear", "VP")


def test_the_benchmark_trains_an_energy_and_counts_its_products():
    work = replace(TINY, batch=2, energy="dot")
    step = Training(work, PRECISIONS[0], EAGER, CPU)
    assert step.state.working.energy == "dot"
    assert step()[0].isfinite()
    # An inner gradient takes as many products as the forward pass.
    plain = throughput.forward_flops(replace(work, energy="none"))
    assert throughput.forward_flops(work) == pytest.approx(2 * plain, rel=0.1)
