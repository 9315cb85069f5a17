"""Compares generated clips or images with real ones: distances between their features, precision and recall.

    python EqM/evaluate.py datasets/moving-shapes/test samples

Each of the two may be a folder of clips or images (as EqM/sample_gd.py writes it), a pack of pixels, or an .npz of
samples. Every file is resized and cropped to --image-size, which may be 64x96 (height x width). Compare a number with
its floor, which is the same number for real samples against other real ones, and only at equal counts: docs/quality.md.
"""

if __name__ == "__main__":
    from runtime.interrupts import end_at_ctrl_c

    end_at_ctrl_c()


import argparse
import json
from pathlib import Path

from drawing.pictures import write_png
from evaluation.features import FEATURES, WITH_WEIGHTS, open_features
from evaluation.metrics import PERCENTILES, RESAMPLES, SPLITS
from evaluation.neighbours import find_neighbours
from evaluation.report import check_judged, compare_features, judge_samples
from evaluation.report_text import lines
from evaluation.sides import Comparison, open_held_out, open_sides, read_features
from precision import add_precision_args, agree_on_precision, log_precision, requested_of
from runtime import cli, distributed
from runtime.errors import UserError, shown
from runtime.files import check_writable, write_output, write_text
from runtime.logs import log, start_log
from runtime.size import SIZE_HELP, Size


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser("Compares generated clips or images with real ones.")
    parser.add_argument("real", type=cli.path, metavar="REAL", help="a folder of clips or images, a pack, or an .npz")
    parser.add_argument("generated", type=cli.path, metavar="GENERATED", help="the same, as EqM/sample_gd.py writes it")
    parser.add_argument(
        "--features",
        nargs="+",
        choices=FEATURES,
        default=["pixels"],
        help="what is compared; all except pixels need packages: requirements-evaluate.txt",
    )
    parser.add_argument("--weights", type=cli.path, metavar="FILE", help="weights of inception (FID) or i3d (FVD)")
    parser.add_argument("--judge", action="store_true", help="also the share of samples that show the class asked for")
    nearest = "also the nearest sample of REAL of the first samples, with a sheet beside --output: are they copies?"
    parser.add_argument("--neighbours", action="store_true", help=nearest)
    held_out = "for --neighbours: real data that training did not see, whose distances are shown beside"
    parser.add_argument("--held-out", type=cli.path, metavar="PATH", help=held_out)
    parser.add_argument("--image-size", type=cli.size, help=f"{SIZE_HELP}; default that of the first generated one")
    parser.add_argument("--clip-len", type=cli.side, help="frames; default those of the first generated clip")
    parser.add_argument(
        "--frame-interval",
        type=cli.positive_int,
        help="distance between two frames of a real clip; default from the frame rates of both sides, or 1",
    )
    parser.add_argument("--batch-size", type=cli.count, default=32, help="samples at once")
    parser.add_argument("--seed", type=cli.seed, default=0, help="of windows, resampling, splits, judge")
    parser.add_argument("--output", type=cli.path, default=Path("evaluation.json"), help="file for all numbers")
    add_precision_args(parser)
    args = parser.parse_args()
    if args.real.resolve() == args.generated.resolve():
        raise UserError("REAL and GENERATED are the same: every comparison already shows real against real")
    if args.held_out and not args.neighbours:
        raise UserError("--held-out is for --neighbours: add it")
    if len(set(WITH_WEIGHTS) & set(args.features)) > 1:
        raise UserError("--weights is one file, and --features has inception and i3d: run them one after the other")
    args.features = list(dict.fromkeys(args.features))
    return args


def comparison_of(args: argparse.Namespace) -> Comparison:
    """What the flags ask to compare."""
    return Comparison(args.real, args.generated, args.image_size, args.clip_len, args.frame_interval, args.seed)


def settings_of(args: argparse.Namespace) -> dict:
    """All flags and the constants of the metrics, as plain data."""
    flags = {name: str(value) if isinstance(value, Path | Size) else value for name, value in vars(args).items()}
    return {"resamples": RESAMPLES, "percentiles": PERCENTILES, "splits": SPLITS} | flags


def main() -> None:
    args = parse_args()
    device = distributed.start()
    if distributed.is_group():
        raise UserError("one process does all the work: start EqM/evaluate.py with python, or --nproc_per_node=1")
    precision = agree_on_precision(requested_of(args), device.type, tf32=args.tf32)
    precision.set_fp32_mode()
    start_log()
    log_precision(precision)
    check_writable("--output", args.output)
    sheet = args.output.with_name(f"{args.output.stem}-neighbours.png")
    if args.neighbours:
        check_writable("--output", sheet)

    # What is compared
    real, generated, kind = open_sides(comparison_of(args))
    if args.judge:
        check_judged(real, generated)
    held_out = open_held_out(args.held_out, real, kind, args.seed) if args.held_out else None
    features = [open_features(name, args.weights, kind, device, precision) for name in args.features]

    # The long work: features of all samples
    real_features, generated_features = (
        read_features(side, features, args.batch_size, kind.video, args.judge) for side in (real, generated)
    )

    # The report, in which the distances are float64
    report = {
        "real": real_features.about,
        "generated": generated_features.about,
        "compared": kind.as_dict(),
        "precision": precision.as_dict(),
        "settings": settings_of(args),
        "comparisons": [
            compare_features(each, real_features.rows[each.name], generated_features.rows[each.name], args.seed)
            for each in features
        ],
    }
    if args.judge:
        report["judge"] = judge_samples(real_features, generated_features, args.seed, device, precision)
    if args.neighbours:
        sides = real, generated, held_out
        report["neighbours"], picture = find_neighbours(*sides, args.batch_size, kind.video, device)
        write_output(sheet, lambda temporary: write_png(temporary, picture))
    for line in lines(report):
        print(shown(line))
    write_text(args.output, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    log.info("all numbers: %s", args.output)
    if args.neighbours:
        log.info("samples beside their nearest real ones: %s", sheet)


if __name__ == "__main__":
    cli.run(main, "lower --batch-size")
