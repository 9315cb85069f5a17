"""Compares generated clips or images with real ones: distances between their features, precision and recall.

    python EqM/evaluate.py datasets/moving-shapes/test samples

Both may be folders of clips or images (of EqM/sample_gd.py too), packs of pixels, or .npz of samples. Every
file is cropped to a square and resized to --image-size. A number says little without its floor, which is
the same number of real samples against other real ones, and without the counts: docs/quality.md.
"""

import argparse
import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import cli
import distributed
from cli import UserError
from contents import Content, Kind, classes_asked, first_window, folder_sizes, kind_of, npz_content, open_path
from data import Found, unreadable_errors
from evaluation_table import lines
from features import FEATURES, WITH_WEIGHTS, Features, open_features
from files import write_whole
from judge import Judged, check_classes, small, train_judge
from loader import Samples, keyed_uniforms
from metrics import METRICS, PERCENTILES, RESAMPLES, SPLITS, SUBSET_SIZE, Estimate, at_equal_counts, equal_count
from outputs import check_writable
from pack import is_pack
from runs import log, start_log


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser("Compares generated clips or images with real ones.")
    parser.add_argument("real", type=Path, metavar="REAL", help="a folder of clips or images, a pack, or an .npz")
    parser.add_argument("generated", type=Path, metavar="GENERATED", help="the same, as EqM/sample_gd.py writes it")
    parser.add_argument(
        "--features",
        nargs="+",
        choices=FEATURES,
        default=["pixels"],
        help="what is compared; all but pixels want packages: requirements-evaluate.txt",
    )
    parser.add_argument("--weights", type=Path, metavar="FILE", help="of inception (FID) or i3d (FVD)")
    parser.add_argument("--judge", action="store_true", help="also the share of samples that show the class asked for")
    parser.add_argument("--image-size", type=cli.side, help="side in pixels; default that of the first generated one")
    parser.add_argument("--clip-len", type=cli.side, help="frames; default those of the first generated clip")
    parser.add_argument(
        "--frame-interval",
        type=cli.positive_int,
        help="of real clips, frames from one to the next; default from the frames a second of both sides, or 1",
    )
    parser.add_argument("--batch-size", type=cli.positive_int, default=32, help="samples at once")
    parser.add_argument("--seed", type=cli.non_negative_int, default=0, help="of windows, resampling, splits, judge")
    parser.add_argument("--output", type=Path, default=Path("evaluation.json"), help="gets every number")
    args = parser.parse_args()
    if args.real.resolve() == args.generated.resolve():
        raise UserError("REAL and GENERATED are the same: every comparison already shows real against real")
    if len(set(WITH_WEIGHTS) & set(args.features)) > 1:
        raise UserError("--weights is one file, and --features has inception and i3d: run them one after the other")
    args.features = list(dict.fromkeys(args.features))
    return args


@dataclass
class Side:
    """One side of the comparison: where it lies, what is read, and what came out of it.

    `rows` has the features (N, D) by name, `classes` the class of each of the N samples, `clips` what the
    judge sees (N, 3, t, h, w).
    """

    path: Path
    content: Content
    classes: list[str]
    about: dict
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    rows: dict[str, Tensor] = field(default_factory=dict)
    clips: Tensor = field(default_factory=lambda: torch.empty(0))


def open_sides(args: argparse.Namespace) -> tuple[Side, Side, Kind]:
    """Both sides, and what their samples are once read.

    Raises:
        UserError: nothing there, two kinds, or flags that are of clips for images.
    """
    of_generated = kind_of(args.generated)
    video = of_generated.video
    of_real = kind_of(args.real, video)
    if of_real.video != video:
        kinds = ("clips", "images")[:: 1 if of_real.video else -1]
        raise UserError(f"{args.real} holds {kinds[0]}, and {args.generated} {kinds[1]}: compare two of a kind")
    if not video and (args.clip_len or args.frame_interval):
        raise UserError("--clip-len and --frame-interval are of clips, and these are images: leave them out")
    size = args.image_size or of_generated.side
    frames = (args.clip_len or of_generated.frames) if video else 1
    if frames > of_generated.frames:
        raise UserError(f"--clip-len {frames}: the first generated clip has {of_generated.frames} frames")
    interval = args.frame_interval or matching_interval(of_real, of_generated)

    def window(place: int) -> float:
        return float(keyed_uniforms(args.seed, [(0, place)])[0, 0])

    sides = []
    for path, kind, every, place in ((args.real, of_real, interval, window), (args.generated, of_generated, 1, None)):
        windows = Samples(Found("", (), (), ()), size, frames, every, flip=False, seed=0)
        if path.suffix == ".npz" and not path.is_dir():
            content = npz_content(path, windows, video)
        else:
            content = open_path(path, windows, video, None, f"--image-size {size}", place or first_window)
        about = {"path": str(path), "first_file": asdict(kind), "frame_interval": every}
        if path.is_dir() and not is_pack(path):
            check_sizes(path, video, size, path is args.generated, about)
        sides.append(Side(path, content, classes_asked(path, content), about))
    return *sides, Kind(video, size, frames, of_generated.frames_per_second)


def matching_interval(real: Kind, generated: Kind) -> int:
    """The frame interval at which real clips come nearest to the generated ones' frames a second."""
    if not (real.frames_per_second and generated.frames_per_second):
        return 1
    return max(1, math.floor(real.frames_per_second / generated.frames_per_second + 0.5))


def check_sizes(path: Path, video: bool, size: int, generated: bool, about: dict) -> None:
    """Notes the sizes of a folder's files, and warns of what resizing does that a person may not expect."""
    sizes = {f"{w}x{h}": count for (w, h), count in sorted(folder_sizes(path, video).items())}
    about["sizes"] = sizes
    sides = [min(map(int, name.split("x"))) for name in sizes]
    if generated and len(sizes) > 1:
        log.warning("%s holds %d sizes, from %s to %s: all become %d×%d", path, len(sizes), *ends(sizes), size, size)
    if sides and min(sides) < size:
        log.warning("%s holds files of %s pixels, which are enlarged to %d×%d", path, ends(sizes)[0], size, size)


def ends(sizes: dict[str, int]) -> tuple[str, str]:
    ordered = sorted(sizes, key=lambda name: min(map(int, name.split("x"))))
    return ordered[0], ordered[-1]


def read_batches(side: Side, batch: int, video: bool, name: str) -> Iterator[tuple[list[int], Tensor]]:
    """Places and samples (N, 3, T, H, W) uint8 of a side, in order; what cannot be read is noted and left out."""
    content = side.content

    def read(place: int) -> Tensor | str:
        try:
            return content.read(place)[0]
        except unreadable_errors(video) as error:
            return str(error) or type(error).__name__

    total = len(content.names)
    with ThreadPoolExecutor() as pool, tqdm(total=total, desc=f"reading {name}", unit="file") as bar:
        for start in range(0, total, batch):
            places = range(start, min(start + batch, total))
            results = dict(zip(places, pool.map(read, places), strict=True))
            side.unreadable += [(content.names[i], x) for i, x in results.items() if isinstance(x, str)]
            found = {i: x for i, x in results.items() if isinstance(x, Tensor)}
            if found:
                x = torch.stack(list(found.values()))
                yield list(found), x if video else x[:, :, None]
            bar.update(len(places))


@torch.no_grad()
def measure(side: Side, features: list[Features], args: argparse.Namespace, video: bool, name: str) -> None:
    """Fills in a side's features, and the judge's clips.

    Raises:
        UserError: no file can be read, or features are not finite.
    """
    rows: dict[str, list[Tensor]] = {each.name: [] for each in features}
    read, clips = [], []
    for places, x in read_batches(side, args.batch_size, video, name):
        read += places
        for each in features:
            rows[each.name].append(each.extract(x).double())
        if args.judge:
            clips.append(small(x))
    if side.unreadable:
        log.warning("%d files in %s cannot be read, as %s: %s", len(side.unreadable), side.path, *side.unreadable[0])
    if not read:
        raise UserError(f"no readable file in {side.path}: {side.unreadable[0][0]}: {side.unreadable[0][1]}")
    side.rows = {feature: torch.cat(parts) for feature, parts in rows.items()}
    for feature, values in side.rows.items():
        if not values.isfinite().all():
            raise UserError(f"{feature} features of {side.path} are not finite: check --weights")
    side.classes = [side.classes[place] for place in read]
    side.clips = torch.cat(clips) if clips else side.clips
    side.about |= {"samples": len(read), "unreadable": len(side.unreadable)}


def compare(each: Features, real: Tensor, generated: Tensor, seed: int) -> dict:
    """Every metric of one kind of features (N, D), (M, D), as plain data, with its floor or why there is none."""
    called = {"Fréchet distance": f" ({each.frechet})", "kernel distance": f" ({each.kernel})"}
    smaller, halves, dimensions = min(len(real), len(generated)), equal_count(len(real), len(generated)), real.shape[1]
    metrics = []
    for metric in tqdm(METRICS, desc=f"comparing {each.name}", unit="metric"):
        about: dict = {"metric": metric.name + called.get(metric.name, ""), "of": each.title}
        if reason := metric.too_few(smaller, dimensions):
            about["left_out"] = reason
        else:
            estimate = metric.estimate(real, generated)
            about |= {"value": estimate.value, "interval": estimate.interval(seed)}
        if reason := metric.too_few(halves, dimensions):
            about["floor_left_out"] = reason
        else:
            about["at_equal_counts"] = asdict(at_equal_counts(metric, real, generated, seed))
        metrics.append(about)
    about = {"features": each.name, "title": each.title, "dimensions": dimensions, "equal_counts": halves}
    return about | {"kernel_subset_size": min(SUBSET_SIZE, smaller), "metrics": metrics}


def check_judged(real: Side, generated: Side) -> list[int]:
    """The places of the generated samples that were asked to show a class of REAL.

    Raises:
        UserError: REAL has no classes to learn, or no sample is of one of them.
    """
    check_classes(real.classes)
    known = [i for i, name in enumerate(generated.classes) if name in real.classes]
    if not known:
        raise UserError(f"--judge: no sample of {generated.path} was asked to show a class of REAL (samples.csv)")
    return known


def judge_samples(real: Side, generated: Side, seed: int, device: torch.device) -> dict:
    """How a judge fares on held-out real samples, and how many generated ones show the class asked for.

    Raises:
        UserError: as `check_judged`.
    """
    known = check_judged(real, generated)
    judge = train_judge(real.clips, real.classes, seed, device)
    with torch.no_grad():
        judged = judge.judge(generated.clips[known], [generated.classes[i] for i in known])
    return {
        "classes": judge.names,
        "trained_on": judge.trained_on,
        "held_out": shares(judge.held_out, seed),
        "generated": shares(judged, seed),
        "without_class": len(generated.classes) - len(known),
    }


def shares(judged: Judged, seed: int) -> dict:
    """The share of samples that are right, by part, with its interval."""
    found: dict = {}
    for part, right in judged.right.items():
        values = torch.from_numpy(right).double()
        estimate = Estimate(float(values.mean()), values - values.mean(), torch.zeros(1).double())
        found[part] = {"samples": len(right), "share": estimate.value, "interval": estimate.interval(seed)}
    return found


def flags(args: argparse.Namespace) -> dict:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def main() -> None:
    args = parse_args()
    device = distributed.start()
    if distributed.is_group():
        raise UserError("one process does all the work: start EqM/evaluate.py with python, or --nproc_per_node=1")
    start_log()
    check_writable("--output", args.output)
    real, generated, kind = open_sides(args)
    if args.judge:
        check_judged(real, generated)  # before the long work
    features = [open_features(name, args.weights, kind.video, kind.frames, device) for name in args.features]
    for side, name in ((real, "real"), (generated, "generated")):
        measure(side, features, args, kind.video, name)
    report = {
        "real": real.about,
        "generated": generated.about,
        "compared": asdict(kind),
        "settings": {"resamples": RESAMPLES, "percentiles": PERCENTILES, "splits": SPLITS} | flags(args),
        "comparisons": [compare(each, real.rows[each.name], generated.rows[each.name], args.seed) for each in features],
    }
    if args.judge:
        report["judge"] = judge_samples(real, generated, args.seed, device)
    for line in lines(report):
        print(line)
    write_whole(args.output, lambda path: path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n"))
    log.info("all numbers: %s", args.output)


if __name__ == "__main__":
    cli.run(main, "lower --batch-size")
