"""Measures what videos do over time: how they continue given frames, or whether they still show at their end what they
showed at their start. For sets of coloured things on grey, such as moving shapes.

    python EqM/evaluate_video.py datasets/moving-shapes/train samples --given 4
    python EqM/evaluate_video.py datasets/bouncing-shapes/train long-samples --ends 16

REAL are training clips in class folders, or a pack of them: a judge of shapes learns from them. GENERATED is a folder
as EqM/sample_gd.py writes it. For --given its samples started from held-out clips (--init). docs/video.md
"""

if __name__ == "__main__":
    from runtime.interrupts import end_at_ctrl_c

    end_at_ctrl_c()


import argparse
import json
from pathlib import Path

import torch

from data.contents import kind_of
from evaluation.constancy import constancy_rows, open_ends, read_ends
from evaluation.continuation import continuation_rows, open_sources, read_continued, read_training
from evaluation.foreground import psnr
from evaluation.judge import Judge, train_judge
from evaluation.report import shares
from evaluation.sides import Comparison, Side, open_sides, read_features
from evaluation.video_text import lines
from precision import Precision, add_precision_args, agree_on_precision, log_precision, requested_of
from runtime import cli, distributed
from runtime.errors import UserError, shown
from runtime.files import check_writable, write_text
from runtime.logs import log, start_log


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser("Measures how videos go on from given frames, or whether they stay what they were.")
    parser.add_argument("real", type=cli.path, metavar="REAL", help="training clips in class folders, or a pack")
    parser.add_argument("generated", type=cli.path, metavar="GENERATED", help="videos as EqM/sample_gd.py writes them")
    measure = parser.add_mutually_exclusive_group(required=True)
    measure.add_argument("--given", type=cli.side, metavar="N", help="the first N frames of each sample were given")
    measure.add_argument("--ends", type=cli.side, metavar="N", help="compare the last N frames with the first N")
    parser.add_argument(
        "--frame-interval",
        type=cli.positive_int,
        help="distance between two frames of a real clip; default from the frame rates of both sides, or 1",
    )
    parser.add_argument("--batch-size", type=cli.count, default=32, help="clips at once")
    parser.add_argument("--seed", type=cli.seed, default=0, help="of windows, intervals, judge, controls")
    parser.add_argument("--output", type=cli.path, default=Path("video-evaluation.json"), help="file for all numbers")
    add_precision_args(parser)
    return parser.parse_args()


def comparison_of(args: argparse.Namespace, clip_len: int | None) -> Comparison:
    """What the flags ask to compare."""
    return Comparison(args.real, args.generated, None, clip_len, args.frame_interval, args.seed)


def check_length(real: Side, frames: int) -> None:
    """Raises UserError if REAL's first clip is shorter than what a judge is to see."""
    found, needed = real.about["first_file"]["frames"], 1 + (frames - 1) * real.about["frame_interval"]
    if found < needed:
        raise UserError(f"the first clip of REAL has {found} frames, and {needed} are needed: give longer clips")


def about_judge(judge: Judge, seed: int) -> dict:
    """The judge's part of the report."""
    return {"classes": judge.names, "trained_on": judge.trained_on, "held_out": shares(judge.held_out, seed)}


def report_of_continuation(args: argparse.Namespace, device: torch.device, precision: Precision) -> dict:
    """Measures the frames that follow given ones."""
    real, generated, kind = open_sides(comparison_of(args, None))
    if not kind.video or args.given > kind.frames - 2:
        found = f"{kind.frames} frames" if kind.video else "images"
        raise UserError(f"--given {args.given} needs samples of {args.given + 2} frames or more, and these are {found}")
    check_length(real, kind.frames)
    sources = open_sources(real, generated, kind)
    continued = read_continued(generated, sources, args.given, args.batch_size)
    following, classes, nearest = read_training(real, continued, args.batch_size)
    judge = train_judge(following, classes, args.seed, device, precision)
    rows = continuation_rows(continued, nearest.clips(real.content.read), judge, args.seed)
    count, height, width = len(continued.samples), *continued.samples.shape[-2:]
    title = f"{args.given} given frames, {kind.frames - args.given} follow, of {height}×{width} pixels: {count} samples"
    about = {"title": title, "judge": about_judge(judge, args.seed), "rows": rows}
    pair = (clips[:, :, : args.given] for clips in (continued.samples, continued.truths))
    return about | {"given_psnr": float(psnr(*pair).mean())}


def report_of_constancy(args: argparse.Namespace, device: torch.device, precision: Precision) -> dict:
    """Compares the last frames of long videos with their first frames."""
    whole = kind_of(args.generated)
    if not whole.video or whole.frames < 2 * args.ends:
        found = f"{whole.frames} frames" if whole.video else "images"
        raise UserError(f"--ends {args.ends} needs videos of {2 * args.ends} frames or more, and these are {found}")
    real, generated, kind = open_sides(comparison_of(args, args.ends))
    check_length(real, args.ends)
    clips, colours = read_ends(open_ends(generated, kind), args.batch_size)
    training = read_features(real, [], args.batch_size, True, for_judge=True)
    judge = train_judge(training.clips, training.classes, args.seed, device, precision)
    rows = constancy_rows(clips, colours, judge, args.seed)
    title = f"the last {args.ends} of {whole.frames} frames against the first {args.ends}: {clips.shape[1]} videos"
    return {"title": title, "judge": about_judge(judge, args.seed), "rows": rows}


def main() -> None:
    args = parse_args()
    device = distributed.start()
    if distributed.is_group():
        raise UserError("one process does all the work: start EqM/evaluate_video.py with python")
    precision = agree_on_precision(requested_of(args), device.type, tf32=args.tf32)
    precision.set_fp32_mode()
    start_log()
    log_precision(precision)
    check_writable("--output", args.output)
    measure = report_of_continuation if args.given else report_of_constancy
    report = measure(args, device, precision)
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    report |= {"precision": precision.as_dict(), "settings": flags}
    for line in lines(report):
        print(shown(line))
    write_text(args.output, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    log.info("all numbers: %s", args.output)


if __name__ == "__main__":
    cli.run(main, "lower --batch-size")
