"""A small classifier that says of samples whether they show the class asked for.

It is trained on real samples in the command that uses it, and tested on others of them that it never saw. Class
names of two words, as CircleRight, are judged word by word. It always names some class: of what shows
nothing at all, too.
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

from runtime.errors import UserError

SIDE, FRAMES = 32, 8  # pixels and frames that it sees at most
HELD_OUT = 0.25  # of each class
LEAST_CLIPS = 4  # of each class
STEPS, BATCH, RATE = 600, 32, 2e-3
SHIFT = 2  # pixels that a training picture is moved by at most, in each direction
PARTS = ("shape", "direction")  # what the words of a name of two are


def small(x: Tensor) -> Tensor:
    """Clips (N, 3, T, H, W) uint8 as it sees them: (N, 3, t, h, w) uint8 of at most FRAMES frames and SIDE pixels."""
    shown = np.linspace(0, x.shape[2] - 1, min(x.shape[2], FRAMES)).round().astype(int)
    x = x[:, :, torch.from_numpy(shown)]
    if x.shape[-1] <= SIDE:
        return x
    return F.interpolate(x.float(), (x.shape[2], SIDE, SIDE), mode="area").round().byte()


def words(names: Sequence[str]) -> dict[str, list[str]]:
    """What is judged of each class: its two words where every name has two, as CircleRight, else its name.

    The values have one word for each name.
    """
    split = [re.findall("[A-Z][^A-Z]*", name) for name in names]
    if all(len(found) == 2 and "".join(found) == name for found, name in zip(split, names, strict=True)):
        return dict(zip(PARTS, map(list, zip(*split, strict=True)), strict=True))
    return {"class": list(names)}


class Network(nn.Module):
    """Convolutions over frames and their differences side by side, and a layer for each part of a class."""

    def __init__(self, frames: int, side: int, outputs: Sequence[int]):
        super().__init__()
        channels = [3 * (2 * frames - 1), 32, 64, 96]
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(zip(channels, channels[1:], strict=False)):
            stride = 2 if i or side > SIDE // 2 else 1
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        with torch.no_grad():
            elements = nn.Sequential(*layers).eval()(torch.zeros(1, channels[0], side, side)).numel()
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(elements, 128), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(128, count) for count in outputs)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Clips (N, 3, t, h, w) in [−1, 1] to the logits of each part, (N, words)."""
        features = self.body(torch.cat([x, x.diff(dim=2)], dim=2).flatten(1, 2))  # (N, 128)
        return [head(features) for head in self.heads]


@dataclass(frozen=True)
class Judged:
    """Which of a set's samples show what was asked for, (N,) bool by part; of two parts "both" is the last."""

    right: dict[str, np.ndarray]

    def shares(self) -> dict[str, float]:
        return {part: float(right.mean()) for part, right in self.right.items()}


class Judge:
    """A trained network for some classes, and how it fared on real samples that it had not seen."""

    def __init__(self, network: Network, names: Sequence[str], device: torch.device):
        self.network, self.names, self.device = network, list(names), device
        self.parts = words(self.names)
        self.held_out: Judged | None = None
        self.trained_on = 0

    def judge(self, x: Tensor, classes: Sequence[str]) -> Judged:
        """Compares clips (N, 3, t, h, w) uint8, `small`, with the classes that they are to show."""
        logits = [
            [part.argmax(1).cpu() for part in self.network(to_input(batch.to(self.device)))] for batch in x.split(BATCH)
        ]
        places = [self.names.index(name) for name in classes]
        right = {}
        for (part, of_class), predicted in zip(self.parts.items(), zip(*logits, strict=True), strict=True):
            vocabulary = sorted(set(of_class))
            wanted = np.array([vocabulary.index(of_class[place]) for place in places])
            right[part] = torch.cat(predicted).numpy() == wanted
        if len(right) > 1:
            right["both"] = np.all(list(right.values()), axis=0)
        return Judged(right)


def to_input(x: Tensor) -> Tensor:
    return x.float() / 127.5 - 1


def check_classes(classes: Sequence[str]) -> list[str]:
    """The sorted names of the classes; raises UserError where there are fewer than two, or too few clips of one."""
    counts = Counter(classes)
    if len(counts) < 2 or not all(counts):
        raise UserError("--judge wants REAL in two or more class folders, of which it learns the classes")
    few = min(counts, key=counts.get)
    if counts[few] < LEAST_CLIPS:
        raise UserError(f"--judge wants {LEAST_CLIPS} samples of each class or more, and {few} has {counts[few]}")
    return sorted(counts)


def held_out(labels: np.ndarray, seed: int) -> np.ndarray:
    """Which samples (N,) are held out: of each class a random HELD_OUT of them, and one at least."""
    held, rng = np.zeros(len(labels), bool), np.random.default_rng(seed)
    for label in np.unique(labels):
        mine = rng.permutation(np.flatnonzero(labels == label))
        held[mine[: max(1, int(HELD_OUT * len(mine)))]] = True
    return held


def train_judge(x: Tensor, classes: Sequence[str], seed: int, device: torch.device) -> Judge:
    """Trains a judge on three quarters of real clips (N, 3, t, h, w) uint8, `small`, and tests it on the others.

    Raises:
        UserError: fewer than two classes, or too few clips of one.
    """
    names = check_classes(classes)
    labels = np.array([names.index(name) for name in classes])  # (N,)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        held = held_out(labels, seed)  # (N,)
        parts = words(names)
        vocabularies = {part: sorted(set(of_class)) for part, of_class in parts.items()}
        network = Network(x.shape[2], x.shape[-1], [len(found) for found in vocabularies.values()]).to(device)
        targets = torch.tensor(
            [[vocabularies[part].index(of_class[label]) for part, of_class in parts.items()] for label in labels]
        )  # (N, parts)
        fit(network, x[~held], targets[~held], device)
        judge = Judge(network, names, device)
        with torch.no_grad():
            judge.held_out = judge.judge(x[held], [classes[i] for i in np.flatnonzero(held)])
        judge.trained_on = int((~held).sum())
    return judge


def fit(network: Network, x: Tensor, targets: Tensor, device: torch.device) -> None:
    """STEPS updates; pictures are shifted, and never mirrored, which would turn the direction round."""
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    network.train()
    for _ in tqdm(range(STEPS), desc="training the judge", unit="step"):
        chosen = torch.randint(len(x), (BATCH,))
        clips, wanted = to_input(shifted(x[chosen]).to(device)), targets[chosen].to(device)
        loss = sum(F.cross_entropy(part, wanted[:, i]) for i, part in enumerate(network(clips)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()


def shifted(x: Tensor) -> Tensor:
    """Clips (N, 3, t, h, w) moved together by up to SHIFT pixels, their edges repeated."""
    down, right = torch.randint(0, 2 * SHIFT + 1, (2,)).tolist()
    height, width = x.shape[-2:]
    padded = F.pad(x.float().flatten(1, 2), [SHIFT] * 4, mode="replicate").byte()
    return padded[..., down : down + height, right : right + width].unflatten(1, x.shape[1:3])
