"""Compares generated clips or images with real ones: distances between their features, precision and recall.

    python EqM/evaluate.py datasets/moving-shapes/test samples

Both may be folders of clips or images (of EqM/sample_gd.py too), packs of pixels, or .npz of samples. Every
file is cropped to a square and resized to --image-size. A number says little without its floor, which is
the same number of real samples against other real ones, and without the counts: docs/quality.md.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from evaluation.features import FEATURES, WITH_WEIGHTS, open_features
from evaluation.metrics import PERCENTILES, RESAMPLES, SPLITS
from evaluation.report import check_judged, compare, judge_samples
from evaluation.sides import measure, open_sides
from evaluation.table import lines
from runtime import cli, distributed
from runtime.errors import UserError
from runtime.files import check_writable, write_whole
from runtime.logs import log, start_log


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
