"""Rotary positions: what they turn, that they depend on distances alone, and that they matter at every size."""

import math

import pytest
import torch
from torch import Tensor

from compiled import compile_network
from layers import Block
from models import EqM
from positions import SPACE_BASE, TIME_PERIODS_S, head_pairs, rotated, rotations
from test_models import randomised

TINY = {"patch_size": 2, "in_channels": 3, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
SIZES = [(4, 8, 8), (2, 8, 8), (12, 8, 8), (4, 8, 12), (4, 12, 4), (2, 2, 2)]


def rotary_network(**changes: object) -> EqM:
    return randomised(EqM(**{"input_size": (4, 8, 8), "temporal_patch": 2, "positions": "rotary", **TINY, **changes}))


def field(network: EqM, x: Tensor, seconds_per_frame: Tensor | float = 0.1) -> Tensor:
    return network(x, torch.zeros(len(x)), torch.zeros(len(x), dtype=torch.long), seconds_per_frame)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("width", "pairs"), [(64, (8, 12, 12)), (72, (12, 12, 12)), (16, (2, 3, 3)), (6, (1, 1, 1))])
def test_a_head_is_split_evenly_over_time_rows_and_columns(width: int, pairs: tuple[int, int, int]) -> None:
    assert head_pairs(width) == pairs


@pytest.mark.parametrize("width", [2, 4, 8, 63])
def test_a_head_that_cannot_be_split_is_refused(width: int) -> None:
    with pytest.raises(ValueError, match=f"cannot split a head of {width} numbers"):
        head_pairs(width)
    with pytest.raises(ValueError, match=f"cannot split a head of {width} numbers"):
        EqM(8, positions="rotary", **{**TINY, "hidden_size": 4 * width, "num_heads": 4})


@pytest.mark.parametrize("seconds", [0.1, 0.04])
def test_each_pair_turns_by_its_own_axis(seconds: float) -> None:
    grid, pt = (3, 4, 5), 2
    cosines, sines = rotations(64, grid, pt, torch.tensor([seconds]))
    assert cosines.shape == (1, 1, 60, 32)
    angles = torch.atan2(sines, cosines)[0, 0].view(*grid, 32).double()
    shortest, longest = TIME_PERIODS_S
    for t, row, column in [(0, 0, 0), (2, 3, 4), (1, 0, 2), (2, 1, 0)]:
        periods = [shortest * (longest / shortest) ** (i / 7) for i in range(8)]
        wanted = [2 * math.pi * (2 * t + 0.5) * seconds / period for period in periods]
        wanted += [place * SPACE_BASE ** (-i / 12) for place in (row, column) for i in range(12)]
        difference = angles[t, row, column] - torch.tensor(wanted, dtype=torch.float64)
        torch.testing.assert_close(difference.cos(), torch.ones(32, dtype=torch.float64), atol=1e-6, rtol=0)


def test_a_rotation_keeps_lengths_and_turns_each_pair_by_its_angle() -> None:
    x, angles = noise(2, 3, 5, 8), noise(2, 1, 5, 4)
    turned = rotated(x, torch.stack([angles.cos(), angles.sin()]))
    as_complex = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(turned, torch.cat([as_complex.real, as_complex.imag], dim=-1))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_scores_depend_on_distances_alone_in_time_rows_and_columns() -> None:
    q, k = noise(2, 1, 1, 1, 64)
    rotation = rotations(64, (6, 7, 9), 1, torch.tensor([0.04]))
    turned = [rotated(each.expand(1, 1, 6 * 7 * 9, 64), rotation)[0, 0].view(6, 7, 9, 64) for each in (q, k)]
    score = torch.einsum("trcd,TRCd->trcTRC", *turned)
    near, far = score[0, 1, 2, 3, 4, 1], score[2, 3, 6, 5, 6, 5]  # both are 3 later, 3 lower and 1 to the left
    torch.testing.assert_close(near, far, atol=1e-4, rtol=0)
    for other in (score[0, 1, 2, 4, 4, 1], score[0, 1, 2, 3, 5, 1], score[0, 1, 2, 3, 4, 0]):
        assert (other - near).abs() > 1e-2


def test_time_is_counted_in_seconds_and_each_sample_has_its_own() -> None:
    network, x = rotary_network(), noise(2, 3, 4, 8, 8)
    together = field(network, x, torch.tensor([0.04, 0.4]))
    torch.testing.assert_close(together[:1], field(network, x[:1], 0.04))
    torch.testing.assert_close(together[1:], field(network, x[1:], torch.tensor([0.4])))
    assert not torch.allclose(together[1:], field(network, x[1:], 0.04), atol=1e-3)
    # Twice as many frames in the same time: every second token is at the same time as a token before.
    slow, fast = rotations(64, (3, 1, 1), 1, torch.tensor([0.2])), rotations(64, (6, 1, 1), 1, torch.tensor([0.1]))
    torch.testing.assert_close(fast[..., ::2, :], slow)


@pytest.mark.parametrize("size", SIZES)
def test_positions_matter_at_every_size_on_every_axis_that_has_tokens(size: tuple[int, int, int]) -> None:
    """A published network had lost its rotary positions at every size but one, and nobody noticed."""
    network, x = rotary_network(), noise(1, 3, *size)
    before = field(network, x)
    assert before.shape == x.shape
    for axis, patch in ((2, 2), (3, 2), (4, 2)):
        tokens = x.unflatten(axis, (-1, patch))
        if tokens.shape[axis] < 3:
            continue  # the distance is the same to the left as to the right only without positions, or for two
        order = torch.arange(tokens.shape[axis]).roll(1)
        moved = tokens.index_select(axis, order).flatten(axis, axis + 1)
        # Without positions the field moves with the tokens.
        after = field(network, moved).unflatten(axis, (-1, patch)).index_select(axis, order.argsort())
        assert not torch.allclose(after.flatten(axis, axis + 1), before, atol=1e-3), f"no positions on axis {axis}"


def test_without_its_rotation_the_network_would_not_see_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the test before tests what it says."""
    monkeypatch.setattr("layers.rotated", lambda x, rotation: x)
    network, x = rotary_network(), noise(1, 3, 4, 8, 8)
    moved = field(network, x.roll(2, dims=3)).roll(-2, dims=3)
    torch.testing.assert_close(moved, field(network, x), atol=1e-5, rtol=1e-4)


def test_one_network_has_the_same_field_whatever_size_it_was_built_for() -> None:
    network, other = rotary_network(), rotary_network(input_size=(8, 12, 12))
    assert "pos_embed" not in network.state_dict()
    other.load_state_dict(network.state_dict())
    for size in SIZES:
        x = noise(2, 3, *size)
        assert torch.equal(field(network, x), field(other, x))


def test_positions_of_a_larger_grid_begin_with_those_of_a_smaller_one() -> None:
    small, large = ((4, 4, 4), (8, 5, 6))
    turns = [rotations(16, grid, 2, torch.tensor([0.1])).view(2, *grid, 8) for grid in (small, large)]
    assert torch.equal(turns[0], turns[1][:, :4, :4, :4])


def test_a_size_that_patches_do_not_divide_is_an_error_and_no_field() -> None:
    for size in [(4, 9, 8), (3, 8, 8), (4, 8, 10 + 1)]:
        with pytest.raises(RuntimeError):
            field(rotary_network(), noise(4, 3, *size))


def test_images_are_clips_of_one_frame_at_time_0() -> None:
    network = rotary_network(input_size=8, temporal_patch=1)
    x = noise(2, 3, 8, 12)
    assert torch.equal(field(network, x, 0.1), field(network, x, torch.tensor([0.0, 7.0])))


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_16_bit_networks_stay_close(precision: torch.dtype) -> None:
    x = noise(2, 3, 4, 8, 12)
    exact, low = field(rotary_network(), x), field(rotary_network().to(precision), x)
    assert low.dtype == precision
    assert (low.float() - exact).norm() < 0.05 * exact.norm()


def test_a_block_with_rotation_has_a_second_derivative() -> None:
    torch.manual_seed(0)
    block = Block(12, 2, 1.0).double()
    block.attn.fused = False
    rotation = rotations(6, (2, 1, 2), 1, torch.tensor([0.3])).double()
    x, modulation = torch.randn(1, 4, 12).double(), torch.randn(1, 72).double()
    inputs = (x.requires_grad_(), modulation.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda x, m: block(x, m, rotation), inputs)


@pytest.mark.parametrize("kind", ["dot", "l2"])
def test_the_field_of_an_energy_is_its_gradient_at_any_size(kind: str) -> None:
    network, x = rotary_network(energy=kind).train(), noise(1, 3, 6, 4, 8)
    inputs = x.clone().requires_grad_()
    blocks, final = network.modulations(torch.zeros(1), torch.zeros(1, dtype=torch.long))
    f, _ = network.output(inputs, blocks, final, 0.1)
    value = (inputs * f).sum() if kind == "dot" else -0.5 * f.square().sum()
    torch.testing.assert_close(field(network, x), torch.autograd.grad(value, inputs)[0], atol=1e-5, rtol=1e-4)


def test_gradients_are_the_same_with_blocks_that_compute_again() -> None:
    grads = []
    for again in (False, True):
        network = rotary_network().requires_grad_(True)
        network.grad_checkpoint = again
        field(network, noise(2, 3, 4, 8, 8)).square().mean().backward()
        grads.append([weight.grad for weight in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("energy", ["none", "dot"])
def test_the_compiled_network_has_the_same_field(energy: str) -> None:
    network, x = rotary_network(energy=energy, depth=1), noise(2, 3, 4, 8, 8)
    eager = field(network, x, torch.tensor([0.1, 0.1]))
    assert compile_network(network, 2, training=False)
    torch.testing.assert_close(field(network, x), eager, atol=1e-4, rtol=1e-3)
    torch._dynamo.reset()
