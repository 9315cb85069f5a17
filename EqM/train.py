"""Trains an Equilibrium Matching model on folders of images or videos.

    torchrun --nproc_per_node=1 EqM/train.py --data-path datasets/ucf-101/train \\
        --model EqM-S/4 --use-bf16 --video --clip-len 4
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from compiled import add_compile_arg, is_fast
from data.batches import DeviceLoader, EpochStream, UnreadableLog, make_loader
from data.scan import Found
from data.source import Source, check_classes, open_source
from models import EqM_models, build_network
from objective import add_objective_args, objective_of
from precision import add_precision_args, agree_on_precision, log_precision, make_deterministic, requested_precision
from runs.checkpoint import load_checkpoint
from runs.checkpoint_writer import CheckpointWriter
from runs.config import check_resumable, make_config, network_settings
from runs.folder import write_config
from runs.record import Metrics
from runs.resume import Start, find_start, is_finished, launcher, log_changes, new_folder
from runs.signals import EXIT_STATUS, StopSignals
from runs.trackers import add_tracker_args, check_trackers, start_trackers
from runtime import cli, distributed
from runtime.draws import seed_draws
from runtime.errors import UserError
from runtime.logs import device_name, log, start_log
from sampling.previews import Previews, add_preview_args
from step import Recipe, TrainingState, training_step

DEFAULT_BATCH = {"cuda": 256, "cpu": 8}
DEFAULT_WORKERS = {"cuda": 4, "cpu": 0}
DEFAULT_EPOCHS, NO_EPOCH_LIMIT = 80, 10**9


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser("Trains an Equilibrium Matching model on images or videos.")
    data = parser.add_argument_group("data")
    data.add_argument("--data-path", type=Path, required=True, help="class folders, or videos with a CSV")
    data.add_argument("--video", action="store_true", help="train on clips of videos, not on images")
    data.add_argument("--image-size", type=cli.side, help="height and width, pixels; default 64, with a VAE 256")
    data.add_argument("--vae", metavar="NAME", help="none (pixels), ema, mse, or a folder: train on its latents")
    data.add_argument("--clip-len", type=cli.side, default=16, help="frames of a clip")
    data.add_argument("--frame-interval", type=cli.positive_int, default=3, help="video frames from one to the next")
    data.add_argument(
        "--no-flip", action="store_true", help="no mirrored samples: for classes that tell left from right"
    )
    data.add_argument(
        "--num-workers", type=cli.non_negative_int, help="processes a rank; default 4, on a CPU and for a pack 0"
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        choices=EqM_models,
        default="EqM-XL/2",
        metavar="NAME",
        help="EqM-{Ti,S,B,L,XL}/{2,4,8}: size and patch",
    )
    model.add_argument("--num-classes", type=cli.positive_int, help="at least the data's count, the default")
    model.add_argument(
        "--temporal-patch", type=cli.positive_int, help="frames a token; default 2 where it divides the clip, else 1"
    )
    add_objective_args(parser)
    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=cli.positive_int, help="default 80; no limit where --max-steps is given")
    training.add_argument(
        "--max-steps", type=cli.positive_int, help="stop at this step, counted from the first run's start"
    )
    training.add_argument("--max-minutes", type=cli.positive_float, help="stop at the first log line after so long")
    training.add_argument("--global-batch-size", type=cli.positive_int, help="over all ranks; default 256, on a CPU 8")
    training.add_argument(
        "--micro-batch-size", type=cli.positive_int, help="samples at a time a rank; gradients add up; default all"
    )
    training.add_argument("--lr", type=cli.positive_float, default=1e-4, help="AdamW's learning rate")
    training.add_argument("--warmup-steps", type=cli.non_negative_int, default=0, help="steps of linear warm-up")
    training.add_argument(
        "--grad-clip", type=cli.non_negative_float, default=0.0, help="largest gradient norm; 0: none"
    )
    training.add_argument("--ema-decay", type=cli.fraction, default=0.9999, help="of the averaged weights")
    training.add_argument(
        "--max-bad-steps", type=cli.positive_int, default=20, help="in fp32 and bf16: stop after so many not finite"
    )
    training.add_argument("--global-seed", type=cli.non_negative_int, default=0, help="of all random choices")
    add_precision_args(parser)
    speed = parser.add_argument_group("speed and memory")
    add_compile_arg(speed)
    speed.add_argument("--deterministic", action="store_true", help="the same bits again on a GPU too")
    speed.add_argument("--grad-checkpoint", action="store_true", help="less memory for more time: for long clips")
    add_run_args(parser)
    args = parser.parse_args()
    if args.ebm != "none" and args.grad_checkpoint:
        raise UserError(f"--grad-checkpoint does not work with --ebm {args.ebm}: use --micro-batch-size for memory")
    return args


def add_run_args(parser: argparse.ArgumentParser) -> None:
    """Adds where a run leaves what it makes, how often, and from where it goes on."""
    run = parser.add_argument_group("run")
    run.add_argument("--results-dir", type=Path, default=Path("results"), help="gets the run folders")
    run.add_argument("--log-every", type=cli.positive_int, default=100, help="steps between log lines")
    run.add_argument("--ckpt-every", type=cli.positive_int, default=1000, help="steps between checkpoints")
    run.add_argument("--keep", type=cli.positive_int, help="newest checkpoints to keep; default all")
    add_preview_args(run)
    add_tracker_args(run)
    start = run.add_mutually_exclusive_group()
    start.add_argument("--ckpt", type=Path, help="a checkpoint to go on from, in a new run folder")
    start.add_argument("--resume", action="store_true", help="go on with the newest run of this model, if there is one")


def global_batch(args: argparse.Namespace, device_type: str) -> int:
    """Samples a step over all ranks, which it must divide into."""
    size, ranks = args.global_batch_size or DEFAULT_BATCH[device_type], distributed.world_size()
    if size % ranks:
        raise UserError(f"--global-batch-size {size} is not a multiple of the {ranks} processes")
    if size // ranks % (args.micro_batch_size or 1):
        raise UserError(f"--micro-batch-size {args.micro_batch_size} does not divide a rank's {size // ranks} samples")
    return size


def sample_limit(args: argparse.Namespace, found: Found) -> int:
    """How many samples to draw at most, from the start of the first run."""
    epochs = args.epochs or (NO_EPOCH_LIMIT if args.max_steps else DEFAULT_EPOCHS)
    return epochs * len(found.items)


def announce(args: argparse.Namespace, state: TrainingState, source: Source, batch: int) -> None:
    """The log's first lines."""
    where = device_name(state.device)
    log.info("device: %s, %d process(es), torch %s", where, distributed.world_size(), torch.__version__)
    log_precision(state.precision)
    parameters = sum(p.numel() for p in state.network.parameters())
    log.info("model: %s, %s parameters", args.model, f"{parameters:,}")
    source.announce(args)
    log.info("tokens per sample: %d", state.network.num_tokens)
    note = "" if args.global_batch_size or state.device.type == "cuda" else " (the default on a CPU; on a GPU 256)"
    log.info("batch: %d%s, %d per rank", batch, note, batch // distributed.world_size())


def open_data(args: argparse.Namespace, state: TrainingState, source: Source, batch: int) -> DeviceLoader:
    """This rank's batches, from where the state has come to, up to the limit of epochs."""
    num_batches = -(-(sample_limit(args, source.found) - state.samples) // batch)
    rank, ranks, items = distributed.rank(), distributed.world_size(), len(source.found.items)
    stream = EpochStream(items, batch, num_batches, args.global_seed, state.samples, rank, ranks)
    # On a CPU, loading processes would take cores from the step, whose threads wait for one another. What a
    # pack gives takes longer to hand from a process to another than to gather.
    default = 0 if source.pack else DEFAULT_WORKERS[state.device.type]
    workers = args.num_workers if args.num_workers is not None else default
    loader = make_loader(source.dataset(args), stream, workers, pin_memory=state.device.type == "cuda")
    return DeviceLoader(loader, state.device)


def report(
    state: TrainingState, found: Found, loader: DeviceLoader, unreadable: UnreadableLog, metrics: Metrics
) -> float:
    """Writes a line of metrics, and returns the minutes since the start; every rank must call it."""
    for path in unreadable.share():
        log.warning("skipped unreadable %s", path)
    return metrics.write(
        state.take_means(),
        state.samples,
        loader.take_idle_seconds(),
        step=state.step,
        epoch=state.samples // len(found.items),
        lr=state.lr.item(),
        scaler_scale=state.scaler.get_scale(),
        skipped=state.skipped,
        unreadable=len(unreadable.known),
    )


def train(
    args: argparse.Namespace,
    recipe: Recipe,
    state: TrainingState,
    source: Source,
    batch: int,
    config: dict,
    writer: CheckpointWriter,
) -> bool:
    """The loop: data, step, log, save. Returns False where a signal ended it early."""
    signals, loader, found = StopSignals(), open_data(args, state, source, batch), source.found
    last_step, max_minutes = min(args.max_steps or math.inf, state.step + len(loader)), args.max_minutes or math.inf
    state.working.grad_checkpoint = args.grad_checkpoint
    trackers = start_trackers(args, writer.folder, state.step, config)
    previews = Previews(args, state, source, batch, config, writer.folder, trackers)
    step = training_step(state, recipe, batch // distributed.world_size(), is_fast(args, state.device))
    unreadable = UnreadableLog(found)
    metrics = Metrics(writer.folder, state.device, state.samples, state.step, trackers.log)

    def save() -> None:
        state.check_finite(writer.advice)
        if distributed.is_main():
            writer.save(state.state_dict() | {"epoch": state.samples // len(found.items), "config": config})

    generator, rank = torch.Generator(state.device), distributed.rank()
    bar = tqdm(total=last_step, initial=state.step, unit="step", disable=not distributed.is_main())
    batches = iter(loader)  # kept until the end, since loading processes take seconds to end
    for inputs in batches:
        unreadable.add(inputs["unreadable"])
        x = source.to_input(inputs, generator, args.global_seed, state.samples, rank)
        seed_draws(state.generator, args.global_seed, state.samples, rank)
        step(x, inputs["label"], inputs["seconds_per_frame"])
        state.samples += batch
        state.step += 1
        bar.update(state.step - bar.n)

        log_due = state.step == 1 or state.step % args.log_every == 0
        save_due, show_due = state.step % args.ckpt_every == 0, previews.due(state.step)
        is_last, stopping = state.step == last_step, signals.asked()
        skipped = state.read_counts() if log_due or save_due or show_due or is_last or stopping else 0
        if skipped:
            state.check_gradients(args.max_bad_steps, writer.advice)
        if skipped and not stopping:
            continue  # the step in question is still to come
        minutes = report(state, found, loader, unreadable, metrics) if log_due and not skipped else 0
        if stopping or is_last or minutes >= max_minutes:
            break
        if save_due:
            save()
        if show_due:
            metrics.leave_out(previews.show(signals))
    bar.close()
    if state.read_counts():
        state.check_gradients(args.max_bad_steps, writer.advice)
    if state.sums[2] > 0 and not stopping:
        report(state, found, loader, unreadable, metrics)
    save()
    if not stopping:
        previews.show(signals)
    distributed.on_main(writer.finish)
    trackers.close()
    signals.close()
    return not stopping


def report_finished(start: Start, step: int) -> None:
    """Says that there is nothing left to do.

    Raises:
        UserError: --ckpt asked to train on.
    """
    if not start.folder:
        raise UserError(f"--ckpt is at step {step}, the end of --max-steps or --epochs: raise them to train on")
    start_log()
    log.info("finished: %s is at step %d, the end of --max-steps or --epochs", start.folder, step)
    distributed.stop()


def main() -> None:
    args = parse_args()
    objective = objective_of(args)
    recipe = Recipe(args.lr, args.warmup_steps, args.grad_clip, args.ema_decay, args.micro_batch_size, objective)
    check_trackers(args)
    device = distributed.start()
    if args.deterministic:
        make_deterministic()
    precision = agree_on_precision(requested_precision(args), device.type, tf32=args.tf32)
    batch = global_batch(args, device.type)
    start = distributed.on_main(lambda: find_start(args))
    saved = load_checkpoint(start.checkpoint) if start.checkpoint else None

    source = open_source(args, device, precision)
    found = source.found
    settings = network_settings(args, source.image_size, check_classes(found, args.num_classes), source.space)
    config = make_config(args, settings, objective, found, precision, batch, source.space)
    if saved:
        check_resumable(saved, config, start.checkpoint)
        if is_finished(saved, sample_limit(args, found), args.max_steps or math.inf):
            return report_finished(start, saved["step"])

    torch.manual_seed(args.global_seed)
    state = TrainingState(build_network(settings), precision, device)
    if saved:
        state.load_state_dict(saved, start.checkpoint)

    folder = start.folder or distributed.on_main(lambda: new_folder(args))
    start_log(folder / "log.txt")
    start.log()
    announce(args, state, source, batch)
    if saved:
        log_changes(saved, config)
        del saved  # as large as the state itself
    distributed.on_main(lambda: write_config(folder, config | {"launcher": launcher()}))
    with logging_redirect_tqdm([log]):
        writer = CheckpointWriter(folder, args.keep, start.checkpoint)
        finished = train(args, recipe, state, source, batch, config, writer)
    log.info("done: %s" if finished else "stopped: %s; --resume (in place of --ckpt) goes on", folder)
    distributed.stop()
    sys.exit(0 if finished else EXIT_STATUS)


if __name__ == "__main__":
    cli.run(main, "lower --global-batch-size, --clip-len or --image-size, or choose a smaller --model")
