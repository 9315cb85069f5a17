"""Rotary positions: what they turn, that they depend on distances alone, and that they matter at every size."""

import csv
import math
from dataclasses import replace
from pathlib import Path

import av
import pytest
import torch
from torch import Tensor

from compiled import EAGER, compile_network
from conftest import make_pack, run_script
from layers import Attention, Block
from measuring import position_times, workloads
from models import EqM
from network_settings import NetworkSettings
from positions import SPACE_BASE, TIME_PERIODS_S, head_pairs, rotated, rotations
from precision import Precision
from runs.checkpoint import load_checkpoint
from runs.config import config_of
from runs.init_weights import start_from
from runs.load_network import load_network
from step import draw_spacing
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


def test_attention_is_the_same_wherever_its_tokens_stand() -> None:
    torch.manual_seed(0)
    attention, x = Attention(32, 2), noise(1, 12, 32)
    places = rotations(16, (4, 5, 6), 1, torch.tensor([0.1])).view(2, 1, 1, 4, 5, 6, 8)
    corners = ((0, 0, 0), (2, 3, 1))
    here, there = (places[..., t : t + 2, r : r + 2, c : c + 3, :].flatten(3, 5) for t, r, c in corners)
    torch.testing.assert_close(attention(x, here), attention(x, there), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(attention(x, here), attention(x), atol=1e-3)


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


def test_stretched_rows_and_columns_stand_where_those_of_a_larger_grid_do() -> None:
    seconds, spacing = torch.tensor([0.1]), torch.tensor([[2.0, 1.0], [1.0, 3.0], [1.0, 1.0]])
    ours = rotations(64, (2, 3, 4), 2, seconds, spacing).unflatten(3, (2, 3, 4))
    for each, (rows, columns) in enumerate(((2, 1), (1, 3), (1, 1))):
        larger = rotations(64, (2, 3 * rows, 4 * columns), 2, seconds).unflatten(3, (2, 3 * rows, 4 * columns))
        torch.testing.assert_close(ours[:, each], larger[:, 0, :, :, ::rows, ::columns])


def test_half_of_the_spacings_are_1_and_the_others_reach_the_stretch() -> None:
    drawn = draw_spacing(torch.zeros(20_000, 3, 4, 4), 1.5, torch.Generator().manual_seed(0))  # (N, 2)
    assert (drawn == 1).float().mean().item() == pytest.approx(0.5, abs=0.01)
    assert 1 <= drawn.min() <= drawn.max() <= 1.5
    assert drawn[drawn > 1].log().mean().item() == pytest.approx(math.log(1.5) / 2, abs=0.01)


@pytest.mark.parametrize("size", SIZES)
def test_a_token_is_made_from_its_own_patch_at_every_size(size: tuple[int, int, int]) -> None:
    network, x = rotary_network(), noise(1, 3, *size)
    changed = x.clone()
    frame, row, column = (side - 1 for side in size)
    changed[0, 1, frame, 0, column] += 1
    changed[0, 1, 0, row, 0] += 1
    moved = (network.embed(x) - network.embed(changed)).abs().sum(-1)[0]
    frames, rows, columns = (side // 2 for side in size)
    wanted = {(rows - 1) * columns, (frames - 1) * rows * columns + columns - 1}
    assert set(moved.nonzero().flatten().tolist()) == wanted


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


def test_steps_with_fixed_and_rotary_positions_are_timed_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(position_times, "ROUNDS", 1)
    monkeypatch.setattr(workloads, "GROUP_SECONDS", 0)
    work, precision = replace(workloads.TINY, batch=1), Precision("fp32", "fp32", torch.float32)
    times = position_times.position_times(work, precision, EAGER, torch.device("cpu"))
    assert times["ratio"] == pytest.approx(times["rotary"] / times["fixed"])


TRAIN = (
    "--video --model EqM-Ti/8 --positions rotary --clip-len 4 --frame-interval 1 --image-size 16 --global-batch-size 4"
    " --num-workers 0 --no-compile --lr 1e-3 --ema-decay 0.9"
).split()
CHECKPOINTS = Path("results") / "000-EqM-Ti-8-Linear-velocity-None" / "checkpoints"


@pytest.fixture(scope="module")
def run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pack of its data, and a run of three steps with rotary positions."""
    folder = tmp_path_factory.mktemp("rotary")
    make_pack(shapes, folder / "pack")
    result = run_script("train.py", "--data-path", "pack", *TRAIN, "--max-steps", 3, cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def fixed(run: Path, tmp_path: Path) -> Path:
    """A checkpoint of a step with fixed positions, of the same data."""
    result = run_script(
        "train.py", "--data-path", run / "pack", *TRAIN, "--positions", "fixed", "--max-steps", 1, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    return tmp_path / CHECKPOINTS / "0000001.pt"


def sample(checkpoint: Path, folder: Path, *flags: object) -> object:
    few = "--num-fid-samples 2 --num-sampling-steps 3 --no-compile --folder videos".split()
    return run_script("sample_gd.py", "--ckpt", checkpoint, *few, *flags, cwd=folder)


def test_a_checkpoint_samples_clips_of_any_length_and_size(run: Path, tmp_path: Path) -> None:
    checkpoint = run / CHECKPOINTS / "0000003.pt"
    result = sample(checkpoint, tmp_path, "--clip-len", 10, "--image-size", "16x32", "--target-fps", 5)
    assert result.returncode == 0, result.stderr
    for number in range(2):
        with av.open(str(tmp_path / "videos" / f"{number:06d}.mp4")) as video:
            frames = [frame.to_ndarray(format="rgb24").shape for frame in video.decode(video=0)]
        assert frames == [(16, 32, 3)] * 10
    scored = run_script(
        "score.py", "--ckpt", checkpoint, "--clip-len", 10, "--image-size", "16x32", "videos", cwd=tmp_path
    )
    assert scored.returncode == 0, scored.stderr
    assert "videos: 2 files, mean norm" in scored.stdout


def test_given_clips_are_read_at_the_asked_size(run: Path, shapes: Path, tmp_path: Path) -> None:
    flags = ["--clip-len", 6, "--image-size", "24x16", "--init", shapes, "--init-noise", 0.2]
    result = sample(run / CHECKPOINTS / "0000003.pt", tmp_path, *flags)
    assert result.returncode == 0, result.stderr
    with av.open(str(tmp_path / "videos" / "000000.mp4")) as video:
        assert [frame.to_ndarray(format="rgb24").shape for frame in video.decode(video=0)] == [(24, 16, 3)] * 6


def test_a_notebook_opens_a_checkpoint_for_another_size(run: Path) -> None:
    loaded = load_network(run / CHECKPOINTS / "0000003.pt", clip_len=6, image_size=24)
    assert loaded.network.input_shape == (3, 6, 24, 24)
    assert (loaded.config.form.clip_len, loaded.config.form.image_size) == (6, 24)
    as_trained = load_network(run / CHECKPOINTS / "0000003.pt")
    x, y = noise(2, 3, 6, 24, 24), torch.tensor([0, 1])
    assert torch.equal(as_trained.network(x, torch.zeros(2), y, 0.1), loaded.network(x, torch.zeros(2), y, 0.1))


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--clip-len", 5], "clip length 5 is not a multiple of the temporal patch 2"),
        (["--image-size", 20], "image size 20x20 is not a multiple of the patch size 8"),
        (["--image-size", "16x20"], "image size 16x20 is not a multiple of the patch size 8"),
        (["--model", "EqM-S/8"], "--model EqM-S/8 contradicts the checkpoint"),
    ],
)
def test_a_size_that_patches_do_not_divide_is_refused_in_one_line(run: Path, tmp_path: Path, flags, line) -> None:
    result = sample(run / CHECKPOINTS / "0000003.pt", tmp_path, *flags)
    assert result.returncode == 1
    assert line in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_checkpoint_with_fixed_positions_refuses_another_size(fixed: Path, tmp_path: Path) -> None:
    for flags, line in ([["--clip-len", 8], "--clip-len 8 contr"], [["--image-size", 32], "--image-size 32 contr"]):
        result = sample(fixed, tmp_path, *flags)
        assert result.returncode == 1
        assert f"{line}adicts the checkpoint, which was trained with" in result.stderr


def test_a_run_keeps_its_positions_and_another_kind_is_another_run(run: Path, tmp_path: Path) -> None:
    config = config_of(load_checkpoint(run / CHECKPOINTS / "0000003.pt")["config"], "it")
    assert (config.network.positions, config.kept_flags()["positions"]) == ("rotary", "rotary")
    command = ["--data-path", run / "pack", "--ckpt", run / CHECKPOINTS / "0000003.pt", "--max-steps", 4]
    result = run_script("train.py", *command, "--no-compile", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    went_on = load_checkpoint(tmp_path / CHECKPOINTS / "0000004.pt")["config"]
    assert went_on["network"]["positions"] == "rotary"
    refused = run_script("train.py", *command, "--positions", "fixed", cwd=tmp_path)
    assert "was trained with positions rotary, and this run has fixed" in refused.stderr


def test_a_run_keeps_its_stretch_and_trains_with_it(run: Path, tmp_path: Path) -> None:
    command = ["train.py", "--data-path", run / "pack", *TRAIN, "--max-steps", 3, "--position-stretch"]
    result = run_script(*command, 2, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    one, two = (load_checkpoint(folder / CHECKPOINTS / "0000003.pt") for folder in (run, tmp_path))
    assert [config_of(each["config"], "it").kept_flags()["position_stretch"] for each in (one, two)] == [1.0, 2.0]
    assert any(not torch.equal(one["model"][name], two["model"][name]) for name in one["model"])
    refused = run_script(*command, 2, "--positions", "fixed", cwd=tmp_path)
    assert refused.returncode != 0
    assert refused.stderr == "train.py: error: --position-stretch 2 needs --positions rotary: add it\n"


def test_a_checkpoint_without_the_key_has_fixed_positions() -> None:
    assert NetworkSettings("EqM-Ti/8", (4, 16, 16), 3, 2).positions == "fixed"


def test_fine_tuning_changes_the_kind_of_positions_and_says_so(run: Path, fixed: Path) -> None:
    rotary = run / CHECKPOINTS / "0000003.pt"
    for path, other in ((rotary, fixed), (fixed, rotary)):
        config = config_of(load_checkpoint(other)["config"], "it")
        network = config.network.build()
        places = network.pos_embed
        notes = start_from(network, config, path)
        assert any("positions were not loaded: they are rotary in one of the networks" in note for note in notes)
        weights = load_checkpoint(path)["ema"]
        assert torch.equal(network.state_dict()["blocks.0.attn.qkv.weight"], weights["blocks.0.attn.qkv.weight"])
        assert places is network.pos_embed
    same = config_of(load_checkpoint(rotary)["config"], "it")
    assert not any("positions" in note for note in start_from(same.network.build(), same, rotary))
    longer = same.of_size(8, None)
    assert not any("positions" in note for note in start_from(longer.network.build(), longer, rotary))


def test_an_energy_trains_with_rotary_positions(run: Path, tmp_path: Path) -> None:
    command = ["--data-path", run / "pack", *TRAIN, "--ebm", "dot", "--max-steps", 2, "--log-every", 1]
    result = run_script("train.py", *command, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    sampled = sample(tmp_path / CHECKPOINTS / "0000002.pt", tmp_path, "--clip-len", 2, "--image-size", 24)
    assert sampled.returncode == 0, sampled.stderr
    with (tmp_path / "videos" / "samples.csv").open() as file:
        assert all(float(row["final_norm"]) > 0 for row in csv.DictReader(file))
