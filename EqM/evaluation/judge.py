"""A small classifier that decides whether samples show the class asked for.

The command that uses it trains it on real samples, and tests it on real samples that it never saw. Class names of two
words, such as CircleRight, are judged word by word. The judge always names some class, even for a sample that shows
nothing. It keeps float32 weights, and computes under autocast.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from tqdm import tqdm

from precision import Precision
from runtime.errors import UserError

SIDE, FRAMES = 32, 8  # the most pixels of the short side, and the most frames, that it sees
HELD_OUT = 0.25  # share of each class
LEAST_CLIPS = 4  # of each class
STEPS, BATCH, RATE = 600, 32, 2e-3
SHIFT = 2  # the most pixels by which a training clip is moved, in each direction
PARTS = ("shape", "direction")  # the meaning of the words in a name of two words


def small(x: Tensor) -> Tensor:
    """Reduces clips (N, 3, T, H, W) uint8 to at most FRAMES frames, whose short side has at most SIDE pixels.

    Returns:
        (N, 3, t, h, w) uint8. Height and width keep their proportions.
    """
    shown = np.linspace(0, x.shape[2] - 1, min(x.shape[2], FRAMES)).round().astype(int)
    x = x[:, :, torch.from_numpy(shown)]
    short = min(x.shape[-2:])
    if short <= SIDE:
        return x
    smaller = [round(side * SIDE / short) for side in x.shape[-2:]]
    return F.interpolate(x.float(), (x.shape[2], *smaller), mode="area").round().byte()


def words(names: Sequence[str]) -> dict[str, list[str]]:
    """Splits class names into the parts that are judged: one list per part, with one word per name.

    If every name has two words, such as CircleRight, the parts are PARTS. Otherwise the only part is "class", and
    its words are the names.
    """
    split = [re.findall("[A-Z][^A-Z]*", name) for name in names]
    if all(len(found) == 2 and "".join(found) == name for found, name in zip(split, names, strict=True)):
        return dict(zip(PARTS, map(list, zip(*split, strict=True)), strict=True))
    return {"class": list(names)}


class Network(nn.Module):
    """Convolutions over all frames and their differences, stacked as channels, and one linear layer per part.

    Args:
        size: height and width of its input.
        outputs: the number of words of each part.
    """

    def __init__(self, frames: int, size: tuple[int, int], outputs: Sequence[int]):
        super().__init__()
        channels = [3 * (2 * frames - 1), 32, 64, 96]
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(zip(channels, channels[1:], strict=False)):
            stride = 2 if i or min(size) > SIDE // 2 else 1
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        with torch.no_grad():
            elements = nn.Sequential(*layers).eval()(torch.zeros(1, channels[0], *size)).numel()
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(elements, 128), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(128, count) for count in outputs)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps clips (N, 3, t, h, w) in [−1, 1] to the logits of each part: (N, words)."""
        features = self.body(torch.cat([x, x.diff(dim=2)], dim=2).flatten(1, 2))  # (N, 128)
        return [head(features) for head in self.heads]


@dataclass(frozen=True)
class Judged:
    """Which samples of a set show what was asked for: (N,) bool by part. Two parts are followed by "both"."""

    right: dict[str, np.ndarray]

    def shares(self) -> dict[str, float]:
        return {part: float(right.mean()) for part, right in self.right.items()}


class Judge:
    """A trained network for some classes.

    `trained_on` counts its training samples. `held_out` says how it judged real samples that it had not seen.
    """

    def __init__(self, network: Network, names: Sequence[str], device: torch.device, precision: Precision):
        self.network, self.names, self.device, self.precision = network, list(names), device, precision
        self.parts = words(self.names)
        self.held_out: Judged | None = None
        self.trained_on = 0

    @torch.no_grad()
    def words_seen(self, x: Tensor) -> dict[str, np.ndarray]:
        """The word of each part that clips (N, 3, t, h, w) uint8, from `small`, show: (N,) by part."""
        with self.precision.autocast(self.device.type):
            logits = [self.network(to_input(batch.to(self.device))) for batch in x.split(BATCH)]
        predicted = [torch.cat(part).argmax(1).cpu().numpy() for part in zip(*logits, strict=True)]  # (N,) by part
        vocabularies = [np.array(sorted(set(of_class))) for of_class in self.parts.values()]
        return {
            part: vocabulary[found] for part, vocabulary, found in zip(self.parts, vocabularies, predicted, strict=True)
        }

    def judge(self, x: Tensor, classes: Sequence[str]) -> Judged:
        """Compares clips (N, 3, t, h, w) uint8, from `small`, with the classes that they were asked to show."""
        places = [self.names.index(name) for name in classes]
        right = {}
        for part, seen in self.words_seen(x).items():
            right[part] = seen == np.array([self.parts[part][place] for place in places])  # (N,)
        if len(right) > 1:
            right["both"] = np.all(list(right.values()), axis=0)
        return Judged(right)


def to_input(x: Tensor) -> Tensor:
    """Converts uint8 pixels to the network's input in [−1, 1], of any shape."""
    return x.float() / 127.5 - 1


def learnable_classes(classes: Sequence[str]) -> list[str]:
    """Returns the sorted names of the classes that real samples show, one class per sample.

    Raises:
        UserError: there are fewer than two classes, or too few samples of one.
    """
    counts = Counter(classes)
    if len(counts) < 2 or not all(counts):
        raise UserError("a judge learns the classes of REAL: give a REAL with two or more class folders")
    few = min(counts, key=counts.get)
    if counts[few] < LEAST_CLIPS:
        raise UserError(f"a judge needs {LEAST_CLIPS} or more samples of each class, and {few} has {counts[few]}")
    return sorted(counts)


def held_out(labels: np.ndarray, seed: int) -> np.ndarray:
    """Chooses the samples (N,) to hold out: the share HELD_OUT of each class at random, and at least one."""
    held, rng = np.zeros(len(labels), bool), np.random.default_rng(seed)
    for label in np.unique(labels):
        mine = rng.permutation(np.flatnonzero(labels == label))
        held[mine[: max(1, int(HELD_OUT * len(mine)))]] = True
    return held


def train_judge(x: Tensor, classes: Sequence[str], seed: int, device: torch.device, precision: Precision) -> Judge:
    """Trains a judge on three quarters of real clips (N, 3, t, h, w) uint8, from `small`, and tests it on the rest.

    Raises:
        UserError: as `learnable_classes`.
    """
    names = learnable_classes(classes)
    labels = np.array([names.index(name) for name in classes])  # (N,)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        held = held_out(labels, seed)  # (N,)
        parts = words(names)
        vocabularies = {part: sorted(set(of_class)) for part, of_class in parts.items()}
        network = Network(x.shape[2], x.shape[-2:], [len(found) for found in vocabularies.values()]).to(device)
        targets = torch.tensor(
            [[vocabularies[part].index(of_class[label]) for part, of_class in parts.items()] for label in labels]
        )  # (N, parts)
        fit(network, x[~held], targets[~held], device, precision)
        judge = Judge(network, names, device, precision)
        judge.held_out = judge.judge(x[held], [classes[i] for i in np.flatnonzero(held)])
        judge.trained_on = int((~held).sum())
    return judge


def fit(network: Network, x: Tensor, targets: Tensor, device: torch.device, precision: Precision) -> None:
    """Trains for STEPS steps on clips (N, 3, t, h, w) uint8 and the places of their words (N, parts).

    Clips are shifted at random. They are never mirrored: that would reverse the direction.
    """
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    scaler = precision.grad_scaler(device.type)
    network.train()
    for _ in tqdm(range(STEPS), desc="training the judge", unit="step"):
        chosen = torch.randint(len(x), (BATCH,))
        clips, wanted = to_input(shifted(x[chosen]).to(device)), targets[chosen].to(device)
        with precision.autocast(device.type):
            logits = network(clips)
        loss = sum(F.cross_entropy(part.float(), wanted[:, i]) for i, part in enumerate(logits))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scale = scaler.get_scale()
        scaler.update()
        if scaler.get_scale() >= scale:  # a lower scale means that the update was skipped
            schedule.step()
    network.eval()


def shifted(x: Tensor) -> Tensor:
    """Moves all clips (N, 3, t, h, w) by the same random shift of up to SHIFT pixels, and repeats their edges."""
    down, right = torch.randint(0, 2 * SHIFT + 1, (2,)).tolist()
    height, width = x.shape[-2:]
    padded = F.pad(x.float().flatten(1, 2), [SHIFT] * 4, mode="replicate").byte()
    return padded[..., down : down + height, right : right + width].unflatten(1, x.shape[1:3])
