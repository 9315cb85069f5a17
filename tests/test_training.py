import math
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from conftest import spawn
from models import EqM
from precision import Precision, resolve_precision
from runtime import distributed
from runtime.errors import UserError
from runtime.random_numbers import seed_draws
from state import TrainingState
from step import Recipe, draw_random_numbers, train_step

CPU = torch.device("cpu")
FP32, FP16 = resolve_precision("fp32", "cpu"), Precision("fp16", "fp16", torch.float16)
RECIPE = Recipe(lr=1e-3, warmup_steps=0, grad_clip=0.0, ema_decay=0.999)


def new_state(precision: Precision = FP32, device: torch.device = CPU) -> TrainingState:
    torch.manual_seed(0)
    network = EqM((4, 8, 8), 4, 3, hidden_size=32, depth=2, num_heads=2, num_classes=4, temporal_patch=2)
    # Non-zero outputs, so that every weight has a gradient from the first step.
    torch.nn.init.normal_(network.final_layer.linear.weight, std=0.1)
    return TrainingState(network, precision, device)


def one_step(
    state: TrainingState, recipe: Recipe = RECIPE, samples: int = 0, x: torch.Tensor | None = None
) -> tuple[bool, float, float]:
    """Whether the weights were updated, the loss and the gradients' norm."""
    if x is None:
        x = torch.rand(8, 3, 4, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    seed_draws(state.generator, 0, samples, 0)
    inputs = (x, torch.arange(8) % 4, torch.full((8,), 0.1))
    loss, grad_norm = train_step(state, recipe, *(value.to(state.device) for value in inputs)).tolist()
    state.advance(8)
    return state.read_counts() == 0, loss, grad_norm


def kept(state: TrainingState) -> list[torch.Tensor]:
    """Copies of all that an update changes."""
    return [tensor.clone() for tensor in (*vars(state.share).values(), state.working_weights)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("precision", [FP32, FP16, Precision("bf16", "bf16", torch.bfloat16)], ids=lambda p: p.name)
def test_the_loss_falls_on_one_batch_in_every_precision(precision):
    state, recipe = new_state(precision), Recipe(lr=1e-2, warmup_steps=0, grad_clip=1.0, ema_decay=0.999)
    losses = [one_step(state, recipe)[1] for _ in range(30)]
    assert losses[-1] < 0.8 * losses[0]
    assert state.step == 30


def test_an_overflow_moves_neither_weights_nor_ema_nor_counters():
    state = new_state(FP16)
    one_step(state)
    before = kept(state), state.sums.clone()
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    updated, _, grad_norm = one_step(state)
    assert not updated
    assert not math.isfinite(grad_norm)
    assert same(before[0], kept(state))
    assert torch.equal(state.sums, before[1])
    assert (state.step, state.skipped) == (1, 1)
    assert state.scaler.get_scale() == 2.0**99


BF16 = Precision("bf16", "bf16", torch.bfloat16)
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("precision", [FP32, BF16], ids=lambda p: p.name)
def test_a_bad_update_is_skipped_without_a_scaler_too(precision, device):
    state = new_state(precision, torch.device(device))
    one_step(state)
    before = kept(state)
    updated, loss, _ = one_step(state, x=torch.full((8, 3, 4, 8, 8), float("nan")))
    assert not updated
    assert not math.isfinite(loss)
    assert same(before, kept(state))
    assert (state.step, state.skipped, state.launched) == (1, 1, 2)
    assert one_step(state)[0], "the next update is made"


def test_gradients_are_unscaled_before_they_are_measured_and_clipped():
    exact, scaled = new_state(FP32), new_state(FP16)
    recipe = Recipe(lr=1e-3, warmup_steps=0, grad_clip=0.5, ema_decay=0.999)
    _, _, exact_norm = one_step(exact, recipe)
    _, _, scaled_norm = one_step(scaled, recipe)
    assert exact_norm > 0.5
    assert scaled_norm == pytest.approx(exact_norm, rel=0.02)
    # After one update Adam's first moment is a tenth of the gradient.
    clipped = scaled.share.exp_avg.norm() * 10
    assert clipped.item() == pytest.approx(0.5, rel=0.01)


def test_the_ema_is_warmed_up_and_follows_the_weights():
    state = new_state()
    start = state.share.average.clone()
    one_step(state)
    # The first update's decay is 1/10: a tenth of the old average stays.
    torch.testing.assert_close(state.share.average, 0.1 * start + 0.9 * state.share.weights)
    assert RECIPE.ema_decay_at(torch.tensor(1e6)).item() == pytest.approx(0.999)


def test_the_learning_rate_warms_up_linearly_then_stays():
    recipe = Recipe(lr=1.0, warmup_steps=4, grad_clip=0, ema_decay=0.9)
    assert recipe.lr_at(torch.arange(6)).tolist() == [0.25, 0.5, 0.75, 1, 1, 1]
    assert RECIPE.lr_at(torch.tensor(0)).item() == pytest.approx(1e-3)


def test_a_step_moves_the_weights_by_the_learning_rate_of_its_place_in_the_warm_up():
    state, recipe = new_state(), Recipe(lr=1e-3, warmup_steps=4, grad_clip=0.0, ema_decay=0.999)
    for step in range(3):
        before = state.share.weights.clone()
        one_step(state, recipe, samples=8 * step)
        # Adam's first updates are as long as the learning rate, in every weight that has a gradient.
        assert (state.share.weights - before).abs().max().item() == pytest.approx(2.5e-4 * (step + 1), rel=0.05)


def test_means_are_over_the_updates_since_the_last_time():
    state = new_state()
    for samples in (0, 8):
        _, loss, grad_norm = one_step(state, samples=samples)
        assert state.take_means().tolist() == pytest.approx([loss, grad_norm, grad_norm])


def test_random_numbers_repeat_for_the_same_place_and_differ_elsewhere():
    x, generator = torch.zeros(4, 3, 8, 8), torch.Generator()

    def noise(seed: int, samples: int, rank: int) -> torch.Tensor:
        seed_draws(generator, seed, samples, rank)
        return draw_random_numbers(x, generator)[0]

    first = noise(0, 64, 0)
    for place in [(1, 64, 0), (0, 72, 0), (0, 64, 1)]:
        assert not torch.equal(first, noise(*place))
    assert torch.equal(first, noise(0, 64, 0))


def test_a_state_saved_and_loaded_goes_on_as_if_uninterrupted():
    straight, stopped = new_state(), new_state()
    for samples in (0, 8, 16, 24):
        one_step(straight, samples=samples)
    for samples in (0, 8):
        one_step(stopped, samples=samples)
    torch.manual_seed(9)
    resumed = TrainingState(EqM((4, 8, 8), 4, 3, 32, 2, 2, 4, temporal_patch=2), FP32, CPU)
    resumed.load_state_dict(deepcopy(stopped.assemble(stopped.snapshot())))
    for samples in (16, 24):
        one_step(resumed, samples=samples)
    assert same(kept(straight), kept(resumed))
    assert resumed.step == 4


def test_a_scale_that_has_fallen_to_zero_never_counts_as_an_update():
    state = new_state(FP16)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=1e-45)
    state.working.final_layer.linear.bias.data.fill_(float("nan"))
    assert [one_step(state)[0] for _ in range(4)] == [False] * 4
    assert (state.scaler.get_scale(), state.step) == (0, 0)
    with pytest.raises(UserError, match="overflow at step 0 however small the fp16 scale, 4 batches skipped; ADVICE"):
        state.check_gradients(100, lambda: "ADVICE")


def test_weights_that_are_not_finite_are_not_saved():
    state = new_state()
    state.check_finite(lambda: "ADVICE")
    state.working.blocks[1].attn.qkv.bias.data[0] = float("inf")
    with pytest.raises(UserError, match="not finite at step 0 in fp32, and were not saved; ADVICE"):
        state.check_finite(lambda: "ADVICE")


def shard_step(rank: int, folder: Path, ranks: int) -> None:
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    state = new_state()
    x = torch.rand(4, 3, 4, 8, 8, generator=torch.Generator().manual_seed(rank)) * 2 - 1
    seed_draws(state.generator, 0, 0, rank)
    loss = train_step(state, RECIPE, x, torch.arange(4), torch.full((4,), 0.1))[0]
    gradients = [moment * 10 for moment in state.sharding.whole(state.share.exp_avg).values()]
    saved = {"weights": [state.working_weights], "gradients": gradients, "loss": distributed.mean(loss)}
    torch.save(saved, folder / f"{ranks}-{rank}.pt")
    if ranks > 1:
        dist.destroy_process_group()


def test_two_ranks_take_the_same_step_with_the_mean_of_their_gradients(tmp_path):
    spawn(shard_step, (tmp_path, 2), 2, tmp_path)
    for rank in (0, 1):
        shard_step(rank, tmp_path, 1)
    both = [torch.load(tmp_path / f"2-{rank}.pt") for rank in (0, 1)]
    alone = [torch.load(tmp_path / f"1-{rank}.pt") for rank in (0, 1)]
    assert same(both[0]["weights"], both[1]["weights"])
    for shared, first, second in zip(*(run["gradients"] for run in (both[0], *alone)), strict=True):
        torch.testing.assert_close(shared, (first + second) / 2)
    torch.testing.assert_close(both[1]["loss"], (alone[0]["loss"] + alone[1]["loss"]) / 2)


def test_a_checkpoint_of_one_precision_goes_on_in_another():
    fp32, fp16 = new_state(FP32), new_state(FP16)
    one_step(fp32)
    one_step(fp16)
    saved = {name: deepcopy(state.assemble(state.snapshot())) for name, state in (("fp32", fp32), ("fp16", fp16))}
    into_fp16, into_fp32 = new_state(FP16), new_state(FP32)
    into_fp16.load_state_dict(saved["fp32"])
    into_fp32.load_state_dict(saved["fp16"])
    assert one_step(into_fp16)[0]
    assert one_step(into_fp32)[0]
    assert into_fp16.scaler.get_scale() == 2.0**16
