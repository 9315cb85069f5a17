"""Samples images or videos from a checkpoint by gradient descent along its field, or over time.

    torchrun --nproc_per_node=1 EqM/sample_gd.py --folder video_samples --num-fid-samples 16 --use-bf16 \\
        --ckpt results/000-EqM-S-4-Linear-velocity-None/checkpoints/0100000.pt
"""

import argparse
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from compiled import add_compile_arg, is_fast
from data.latents import VAE, to_pixels
from drawing.plots import INSTALL, can_plot, check_plots
from models import EqM
from precision import add_precision_args, agree_on_precision, log_precision, requested_precision
from runs.load_network import add_known_args, class_names, open_network
from runtime import cli, distributed
from runtime.distributed import batches_of_rank
from runtime.logs import log, start_log
from runtime.transfers import to_device
from sampling.adaptive import summary
from sampling.descent import MU, STEPS, STEPSIZE, Watch, fixed_descents
from sampling.fields import conditioned_field
from sampling.outputs import Output, Report, Writer, write_npz, write_sheet, write_table
from sampling.plan import Plan, make_plan
from sampling.sampler import adaptive_samples, composition_of, measure_of, sample_batch
from sampling.starts import add_start_args
from sampling.traces import TRACED, write_evaluations, write_trace

SAMPLERS = ("gd", "ngd", "euler")


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser("Samples images or videos from a checkpoint of EqM/train.py.")
    parser.add_argument("--ckpt", type=Path, required=True, help="a checkpoint that EqM/train.py wrote")
    parser.add_argument("--folder", type=Path, default=Path("samples"), help="gets the samples")
    parser.add_argument("--num-fid-samples", type=cli.positive_int, default=16, help="how many samples")
    parser.add_argument(
        "--class",
        dest="classes",
        action="append",
        metavar="CLASS",
        help="a name or an index; repeat it for more; default all in turn",
    )
    parser.add_argument("--compose", metavar="SUM", help='adds the fields of classes, as "A + 0.5*B - 0.3*C"')
    parser.add_argument("--target-fps", type=cli.frame_rate, help="frames a second; default the training clips' mean")
    parser.add_argument("--video-format", choices=("mp4", "gif"), default="mp4", help="of videos")
    parser.add_argument(
        "--trace",
        action="store_true",
        help="norms and energies by step: table and plots; an explicit energy takes a pass more",
    )
    parser.add_argument("--global-batch-size", type=cli.positive_int, default=32, help="over all ranks")
    parser.add_argument("--global-seed", type=cli.non_negative_int, default=0, help="of the noise")
    add_precision_args(parser)
    add_compile_arg(parser)
    parser.add_argument("--vae", metavar="NAME", help="ema, mse or a folder; default the training's")
    method = parser.add_argument_group("method")
    method.add_argument(
        "--sampler", choices=SAMPLERS, default="ngd", help="ngd looks ahead, as Nesterov; euler integrates over time"
    )
    method.add_argument("--stepsize", type=cli.positive_float, default=STEPSIZE, help="along the field; gd, ngd")
    method.add_argument("--mu", type=cli.fraction, default=MU, help="look-ahead of ngd")
    method.add_argument("--num-sampling-steps", type=cli.positive_int, default=STEPS, help="updates a sample")
    method.add_argument(
        "--adaptive",
        type=cli.positive_float,
        metavar="G",
        help="a sample stops where its field's norm, the root mean square over its elements, is below G;"
        " --num-sampling-steps is the cap",
    )
    method.add_argument("--cfg-scale", type=cli.non_negative_float, default=1.0, help="guidance; 1: none")
    method.add_argument(
        "--cfg-channels", choices=("all", "3"), default="all", help="that it changes; 3: the first 3, as published"
    )
    add_start_args(parser)
    add_known_args(parser)
    args = parser.parse_args()
    if args.trace:
        check_plots("--trace")
    return args


@torch.no_grad()
def write_samples(
    args: argparse.Namespace, network: EqM, vae: VAE | None, plan: Plan, output: Output, device: torch.device
) -> Report:
    """Makes and writes this rank's samples; returns what there is to say of them.

    Raises:
        UserError: samples that are not finite, or cannot be written.
    """
    batches = batches_of_rank(args.num_fid_samples, args.global_batch_size)
    size, total = max(map(len, batches), default=1), sum(map(len, batches)) * args.num_sampling_steps
    seconds_per_frame, fast = 1 / output.frames_per_second if output.frames_per_second else 0.0, is_fast(args, device)
    evaluations = composition_of(args, network, plan).rows * size  # in one call
    conditioned = conditioned_field(network, evaluations, seconds_per_frame, fast, recorded=not args.adaptive)
    measure = measure_of(args, network, plan, seconds_per_frame)

    def starts(indices: Sequence[int]) -> Tensor:
        return to_device(plan.starts(indices), device)

    def sample(indices: Sequence[int], x: Tensor, steps: Iterable, watch: Watch) -> Tensor:
        return sample_batch(args, network, conditioned, plan, indices, x, steps, watch)

    hidden = not distributed.is_main()
    with tqdm(total=total, desc="sampling", unit="evaluation", disable=hidden) as bar, Writer(output) as writer:
        if args.adaptive:
            groups = adaptive_samples(args, network, conditioned, plan, batches, bar.update, measure)
        else:
            steps, traced = args.num_sampling_steps, TRACED if args.trace else 0
            groups = fixed_descents(sample, starts, plan.labels, batches, steps, traced, bar.update, measure)
        for group in groups:
            x = torch.stack([finished.x for finished in group])  # (N, …)
            decoded = vae.decode(x) if vae else x
            clips = to_pixels(decoded if network.is_video else decoded[:, :, None])  # (N, C, T, H, W)
            writer.take(group, x, clips.permute(0, 2, 3, 4, 1))
        return writer.finish()


def main() -> None:
    args = parse_args()
    device = distributed.start()
    start_log()
    if args.adaptive and not can_plot():
        log.warning("matplotlib is missing, so the plot of evaluations is left out: %s", INSTALL)
    precision = agree_on_precision(requested_precision(args), device.type, tf32=args.tf32)
    network, config, vae = open_network(args, device, precision)
    batches_of_rank(args.num_fid_samples, args.global_batch_size)
    plan = make_plan(args, config, network.input_shape, vae)
    names = [*class_names(config), args.compose or "no class"]
    frames_per_second = (args.target_fps or config["frames_per_second"]) if network.is_video else None
    output = Output(args.folder.resolve(), f".{args.video_format}" if network.is_video else ".png", frames_per_second)
    distributed.on_main(lambda: output.prepare(args.num_fid_samples))

    log_precision(precision)
    model, trained_in = config["network"]["model"], config["precision"]["name"]
    log.info("checkpoint: %s, %s, trained in %s", args.ckpt, model, trained_in)
    start = time.perf_counter()
    report = Report.of_all(distributed.gather(write_samples(args, network, vae, plan, output, device)))
    seconds = time.perf_counter() - start
    if distributed.is_main():
        write_table(args, output, plan.classes, names, precision, plan.starts, report)
        if not network.is_video:
            log.info("all images: %s", write_npz(output, args.num_fid_samples))
        log.info("%d samples in %.1f s: %s", args.num_fid_samples, seconds, output.folder)
        log.info("contact sheet: %s", write_sheet(output, report.shown, plan.classes, names, plan.starts))
        if args.trace:
            log.info("norms and energies by step: %s, %s, %s", *write_trace(output.folder, report.traces))
        if args.adaptive:
            counts = [count for count, _ in report.descents.values()]
            log.info(summary(counts, args.num_sampling_steps))
            if can_plot():
                log.info("evaluations of all samples: %s", write_evaluations(output.folder, counts))
    distributed.stop()


if __name__ == "__main__":
    cli.run(main, "lower --global-batch-size")
