import argparse
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models import EqM
from network_settings import EqM_models, load_weights
from positions import time_positions
from runs.checkpoint import load_file, network_weights
from runtime.errors import UserError

PARITY = Path(__file__).parent / "parity_eqm_tiny_forward.pt"
SMALL = {"hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 5, "in_channels": 3, "patch_size": 2}


def randomised(network: EqM) -> EqM:
    """The network with no zero weights, so that every part shows in its output."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return network.eval().requires_grad_(False)


def video_network(**changes: object) -> EqM:
    return randomised(EqM(**{**SMALL, "input_size": (4, 8, 6), "temporal_patch": 2, **changes}))


def test_the_published_forward_pass_is_reproduced():
    parity = torch.load(PARITY, weights_only=True)
    network = EqM(**parity["config"]).eval()
    network.load_state_dict(parity["state_dict"])
    with torch.no_grad():
        out = network(parity["x"], parity["t"], parity["y"])
    torch.testing.assert_close(out, parity["out"], atol=1e-5, rtol=0)


def test_a_published_checkpoint_file_loads_strictly(tmp_path):
    parity = torch.load(PARITY, weights_only=True)
    wrapped = {f"module.{name}": tensor for name, tensor in parity["state_dict"].items()}
    args = argparse.Namespace(model="EqM-S/2", epochs=80)
    torch.save({"model": {}, "ema": wrapped, "opt": {}, "args": args}, tmp_path / "published.pt")
    network = EqM(**parity["config"]).eval()
    path = tmp_path / "published.pt"
    load_weights(network, network_weights(load_file(path), path), path)
    with torch.no_grad():
        out = network(parity["x"], parity["t"], parity["y"])
    torch.testing.assert_close(out, parity["out"], atol=1e-5, rtol=0)


def test_weights_of_another_network_are_refused_by_name():
    with pytest.raises(UserError, match=r"other\.pt holds another network: blocks\.1\.adaLN"):
        load_weights(EqM(input_size=8, **SMALL), EqM(input_size=8, **{**SMALL, "depth": 1}).state_dict(), "other.pt")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("EqM-S/2", 32_963_360),
        ("EqM-S/4", 32_945_024),
        ("EqM-B/2", 130_512_416),
        ("EqM-L/2", 458_102_816),
        ("EqM-XL/2", 675_129_632),
    ],
)
def test_sizes_have_the_published_parameter_counts(name, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in EqM_models[name]().parameters()) == parameters


def test_every_registered_name_says_its_patch_size():
    with torch.device("meta"):
        for name, make in EqM_models.items():
            assert make(input_size=32).patch == (1, int(name.split("/")[1]))


@pytest.mark.parametrize(("input_size", "shape"), [(8, (2, 3, 8, 8)), ((4, 8, 6), (2, 3, 4, 8, 6))])
def test_the_field_has_the_shape_of_x_and_starts_at_zero(input_size, shape):
    network = EqM(input_size=input_size, **SMALL)
    out = network(torch.randn(shape), torch.rand(2), torch.tensor([0, 5]))
    assert out.shape == shape
    assert out.abs().max() == 0


def test_gamma_is_not_seen_unless_asked_for():
    x, y = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    for uncond in (True, False):
        network = randomised(EqM(input_size=8, uncond=uncond, **SMALL))
        same = torch.equal(network(x, torch.zeros(2), y), network(x, torch.full((2,), 0.7), y))
        assert same == uncond


def test_a_patch_of_a_clip_goes_back_to_where_it_came_from():
    network = video_network()
    (frames, rows, columns), (pt, p), channels = network.grid, network.patch, 3
    patches = torch.arange(2 * frames * rows * columns * pt * p * p * channels).view(2, frames * rows * columns, -1)
    clip = network.unpatchify(patches, network.grid)
    for t, h, w, c in [(0, 0, 0, 0), (1, 0, 1, 2), (3, 7, 5, 1), (2, 5, 0, 0)]:
        token = (t // pt * rows + h // p) * columns + w // p
        number = ((t % pt * p + h % p) * p + w % p) * channels + c
        assert clip[1, c, t, h, w] == patches[1, token, number]


def test_a_token_is_made_from_its_own_patch():
    network, x = video_network(), torch.randn(1, 3, 4, 8, 6)
    changed = x.clone()
    changed[0, 1, 3, 2, 5] += 1
    moved = (network.embed(x) - network.embed(changed)).abs().sum(-1)[0]
    _, rows, columns = network.grid
    assert moved.nonzero().flatten().tolist() == [(1 * rows + 1) * columns + 2]


def test_frame_rates_share_a_batch_and_each_sample_has_its_own():
    network, x = video_network(), torch.randn(2, 3, 4, 8, 6)
    y, t = torch.tensor([1, 1]), torch.zeros(2)
    together = network(x, t, y, torch.tensor([0.04, 0.4]))
    torch.testing.assert_close(together[:1], network(x[:1], t[:1], y[:1], 0.04))
    torch.testing.assert_close(together[1:], network(x[1:], t[1:], y[1:], torch.tensor([0.4])))
    assert not torch.allclose(together[1:], network(x[1:], t[1:], y[1:], 0.04), atol=1e-3)


def test_positions_in_time_depend_on_seconds_not_on_frames():
    at_10 = time_positions(32, 2, 2, torch.tensor([0.1]))[0]  # tokens at 0.05 and 0.25 s
    at_30 = time_positions(32, 4, 2, torch.tensor([0.1 / 3]))[0]  # tokens at 1/60, 5/60, 9/60, 13/60 s
    assert at_10.shape == (2, 32)
    assert not torch.allclose(at_10[1], at_30[1], atol=0.1)
    patch_1 = time_positions(32, 4, 1, torch.tensor([0.05]))[0]  # tokens at 0, .05, .1, .15 s
    torch.testing.assert_close(at_10[0], patch_1[1])


def test_a_network_cast_to_bf16_takes_float32_and_stays_close():
    x, t, y = torch.randn(2, 3, 4, 8, 6), torch.zeros(2), torch.tensor([0, 5])
    exact = video_network()(x, t, y, 0.1)
    low = video_network().to(torch.bfloat16)(x, t, y, 0.1)
    assert low.dtype == torch.bfloat16
    assert (low.float() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_size": 9}, "9x9 is not a multiple of the patch size 2"),
        ({"input_size": (5, 8, 8), "temporal_patch": 2}, "5 is not a multiple of the temporal patch 2"),
        ({"num_heads": 5}, "32 is not a multiple of 4 and of its 5 heads"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        EqM(**{**SMALL, "input_size": 8, **changes})


class NothingFromTheHost(TorchDispatchMode):
    """Refuses every operation that touches a tensor of the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, result)):
            assert not isinstance(value, torch.Tensor) or value.device.type == "cuda", f"{func} on the host"
        return result


@pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.15", reason="older releases ask a driver for random numbers that are not drawn"
)
@pytest.mark.parametrize("frames", [None, 4])
def test_a_field_on_a_gpu_copies_nothing_from_the_host_so_that_it_can_be_captured(frames):
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        network = EqM((frames, 8, 8) if frames else 8, 4, 3, 32, 2, 2, num_classes=4, temporal_patch=2 if frames else 1)
        x, y = torch.empty(2, *network.input_shape), torch.zeros(2, dtype=torch.long)
        blocks, final = network.modulations(torch.zeros(2), y)
        with NothingFromTheHost():
            assert network.field(x, torch.stack(blocks), final, 0.1).shape == x.shape
