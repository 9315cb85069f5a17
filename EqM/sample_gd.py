"""Samples images or videos from a checkpoint by gradient descent along its field, or over time.

    torchrun --nproc_per_node=1 EqM/sample_gd.py --folder video_samples --num-fid-samples 16 --use-bf16 \\
        --ckpt results/000-EqM-S-4-Linear-velocity-None/checkpoints/0100000.pt
"""

if __name__ == "__main__":
    from runtime.interrupts import end_at_ctrl_c

    end_at_ctrl_c()


import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from compiled import add_speed_args, asked_speed_of, freeze_garbage_collector
from data.latents import VAE
from drawing.plots import INSTALL, can_plot, check_plots
from precision import add_precision_args, agree_on_precision, log_precision, requested_of
from runs.load_network import add_checkpoint_args, checkpoint_request_of, open_network
from runtime import cli, distributed
from runtime.distributed import batches_of_rank
from runtime.logs import log, start_log
from sampling.adaptive import evaluations_summary
from sampling.long_videos import LongWriter
from sampling.method import Method, add_method_args, check_method, method_of
from sampling.outputs import Output, SampleLog, Writer, decode, to_frames, write_npz, write_sheet, write_table
from sampling.pages import write_page
from sampling.plan import Plan, add_plan_args, check_plan_args, make_plan, plan_request_of
from sampling.sampler import Sampler, network_rows
from sampling.speed import choose_speed
from sampling.traces import write_evaluations, write_trace


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser("Samples images or videos from a checkpoint of EqM/train.py.")
    parser.add_argument("--folder", type=cli.path, default=Path("samples"), help="gets the samples")
    parser.add_argument("--num-fid-samples", type=cli.count, default=16, help="number of samples")
    parser.add_argument("--target-fps", type=cli.frame_rate, help="frames a second; default: as the training clips")
    parser.add_argument("--video-format", choices=("mp4", "gif"), default="mp4", help="format of videos")
    parser.add_argument(
        "--trace",
        action="store_true",
        help="norms and energies by step: table and plots; an explicit energy takes one more pass a step",
    )
    parser.add_argument("--global-batch-size", type=cli.count, default=32, help="samples at once, on all ranks")
    parser.add_argument("--global-seed", type=cli.seed, default=0, help="seed of the noise")
    add_precision_args(parser)
    add_speed_args(parser, "on a GPU CUDA graphs, and a compiled network if the samples are enough for it to pay")
    add_method_args(parser)
    add_plan_args(parser)
    add_checkpoint_args(parser)
    args = parser.parse_args()
    if args.published == "sit":
        args.sampler = args.sampler or "euler"
    check_method(args)
    check_plan_args(args)
    if args.trace:
        check_plots("--trace")
    return args


def write_samples(
    sampler: Sampler, batches: Sequence[range], trace: bool, vae: VAE | None, output: Output
) -> SampleLog:
    """Makes and writes the samples of this rank.

    Raises:
        UserError: samples are not finite, or cannot be written.
    """
    windows, hidden = sampler.plan.windows, not distributed.is_main()
    total = sum(map(len, batches)) * sampler.method.steps * (len(windows) if windows else 1)
    own = LongWriter(output, windows) if windows else Writer(output)
    with tqdm(total=total, desc="sampling", unit="evaluation", disable=hidden) as bar, own as writer:
        for group in sampler.samples(batches, trace, bar.update):
            x = torch.stack([finished.x for finished in group])  # (N, …)
            writer.take(group, x, to_frames(decode(x, vae)))
        return writer.finish()


def write_about(output: Output, plan: Plan, method: Method, samples: SampleLog, trace: bool) -> None:
    """Writes what lies beside the samples, and logs where it lies."""
    if output.suffix == ".png":
        log.info("all images: %s", write_npz(output, len(samples.descents)))
    log.info("contact sheet: %s", write_sheet(output, plan, samples.shown))
    log.info("page: %s", write_page(output, plan, method, samples))
    if trace:
        log.info("norms and energies by step: %s, %s, %s", *write_trace(output.folder, samples.traces))
    if method.threshold is not None:
        counts = [count for count, _ in samples.descents.values()]
        log.info(evaluations_summary(counts, method.steps))
        if can_plot():
            log.info("evaluations of all samples: %s", write_evaluations(output.folder, counts))


@torch.no_grad()
def main() -> None:
    # Flags
    args = parse_args()

    # Process
    device = distributed.start()
    distributed.check_same_flags(vars(args))
    start_log()
    first_line = time.perf_counter()
    log.info("sampling from %s", args.ckpt)
    if args.adaptive and not can_plot():
        log.warning("matplotlib is missing, so the plot of evaluations is left out: %s", INSTALL)
    precision = agree_on_precision(requested_of(args), device.type, tf32=args.tf32)
    precision.set_fp32_mode()
    batches = batches_of_rank(args.num_fid_samples, args.global_batch_size)

    # Network
    request = checkpoint_request_of(args)
    network, config, vae = distributed.together(lambda: open_network(request, device, precision))

    # Method and plan
    asked = plan_request_of(args)
    method = method_of(args, config.objective, asked.start.share, one_class=asked.compose is None)
    plan = make_plan(asked, method, config, network.input_shape, vae)

    # Output
    frames_per_second = (args.target_fps or config.frames_per_second) if network.is_video else None
    output = Output(args.folder.resolve(), f".{args.video_format}" if network.is_video else ".png", frames_per_second)
    distributed.on_main(lambda: output.prepare(args.num_fid_samples))
    log_precision(precision)
    if not isinstance(args.stepsize, float) and method.sampler != "euler":
        log.info("step size: %s, for %d steps", method.step_text, method.steps)
    log.info("checkpoint: %s, %s, trained in %s", args.ckpt, config.network.model, config.precision["name"])

    # Sample
    start = time.perf_counter()
    size = max(map(len, batches), default=1)
    passes = len(plan.windows) if plan.windows else 1
    evaluations = method.steps * passes * math.ceil(args.num_fid_samples / args.global_batch_size)
    speed = choose_speed(asked_speed_of(args), device.type, network, network_rows(method, plan, size), evaluations)
    sampler = Sampler(method, network, plan, config.seconds_at(frames_per_second), size, speed)
    if speed.fast:
        freeze_garbage_collector()
    own = write_samples(sampler, batches, args.trace, vae, output)
    samples = SampleLog.of_all(distributed.gather(own))
    end = time.perf_counter()

    # Report
    if distributed.is_main():
        write_table(output, plan, method, samples, precision.name, args.ckpt)
        log.info("%d samples in %.1f s: %s", args.num_fid_samples, end - start, output.folder)
        log.info("from the first line of this log to the last sample's file: %.2f s", end - first_line)
        write_about(output, plan, method, samples, args.trace)
    distributed.stop()


if __name__ == "__main__":
    cli.run(main, "lower --global-batch-size")
