"""Trains an Equilibrium Matching model on folders of images or videos.

    torchrun --nproc_per_node=1 EqM/train.py --data-path datasets/ucf-101/train \\
        --model EqM-S/4 --use-bf16 --video --clip-len 4
"""

if __name__ == "__main__":
    from runtime.interrupts import end_at_ctrl_c

    end_at_ctrl_c()


import argparse
import math
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from compiled import add_speed_args, freeze_garbage_collector, speed_of
from data.batches import TrainingBatches, add_batch_args, batch_of, sample_limit
from data.source import Source, add_data_args, find_pack, packed_flags
from evaluation.held_out import HeldOut, add_held_out_args, held_out_of
from network_settings import add_model_args
from objective import Objective, add_objective_args
from precision import Precision, add_precision_args, agree_on_precision, make_deterministic, requested_of
from runs.announcement import announce, report_finished
from runs.checkpoint import load_checkpoint
from runs.checkpoint_writer import CheckpointWriter
from runs.config import Config, check_resumable, config_of
from runs.init_weights import start_from
from runs.new_config import network_frames, new_config_of, source_of
from runs.record import Metrics, lowest_held_out
from runs.resume import add_resume_args, asked_of, claim_folder, find_start, is_finished, log_changes
from runs.schedule import RunOptions, add_run_args, run_options_of
from runs.settled import settled_of
from runs.signals import EXIT_STATUS, StopSignals
from runs.trackers import add_tracker_args, start_trackers, trackers_of
from runtime import cli, distributed
from runtime.logs import log, start_log
from sampling.previews import Previews, add_preview_args, preview_method_of
from state import TrainingState
from step import SeededStep, add_recipe_args, check_decay, recipe_of, training_step


def parse_args() -> tuple[argparse.Namespace, dict]:
    """The flags as they were given, and what a new run takes for those that checkpoints keep."""
    parser = cli.ArgumentParser("Trains an Equilibrium Matching model on images or videos.")
    add_data_args(parser)
    add_model_args(parser.add_argument_group("model"))
    add_objective_args(parser)
    training = parser.add_argument_group("training")
    add_recipe_args(training)
    add_batch_args(training)
    add_precision_args(parser)
    speed = parser.add_argument_group("speed and memory")
    add_speed_args(speed)
    speed.add_argument("--deterministic", action="store_true", help="bitwise repeatable on a GPU too")
    speed.add_argument("--grad-checkpoint", action="store_true", help="less memory for more time: for long clips")
    run = parser.add_argument_group("run")
    add_run_args(run)
    add_held_out_args(run)
    add_preview_args(run)
    add_tracker_args(run)
    add_resume_args(run)
    args = parser.parse_args()
    if args.ckpt and args.init_weights:
        parser.error("argument --init-weights: not allowed with argument --ckpt")
    return args, parser.new_run_defaults()


def evaluate(state: TrainingState, held_out: HeldOut, objective: Objective, metrics: Metrics) -> dict[str, float]:
    """The held-out loss of the averaged weights, for the next line of metrics. Every rank must call it."""
    found, seconds = held_out.measure(state.averaged_network(state.precision.dtype), objective)
    metrics.leave_out(seconds)
    return found


def report(state: TrainingState, batches: TrainingBatches, metrics: Metrics, found: dict[str, float]) -> float:
    """Writes a line of metrics, and returns the minutes since the start. Every rank must call it.

    Args:
        found: more values for the line.
    """
    return metrics.write(
        state.take_means(),
        state.samples,
        batches.take_idle_seconds(),
        step=state.step,
        epoch=batches.epoch(state.samples),
        lr=state.lr.item(),
        scaler_scale=state.scaler.get_scale(),
        skipped=state.skipped,
        unreadable=batches.log_unreadable(),
        **found,
    )


def save(state: TrainingState, batches: TrainingBatches, config: Config, writer: CheckpointWriter) -> None:
    """Has a checkpoint written. Every rank must call it.

    Raises:
        UserError: weights are not finite.
    """
    state.check_finite(writer.advice)
    writer.save(state.snapshot() | {"epoch": batches.epoch(state.samples), "config": config.as_dict()})


def train(
    options: RunOptions,
    config: Config,
    state: TrainingState,
    step: Callable[[Tensor, Tensor, Tensor], Tensor],
    batches: TrainingBatches,
    metrics: Metrics,
    previews: Previews,
    writer: CheckpointWriter,
    signals: StopSignals,
    held_out: HeldOut | None = None,
) -> bool:
    """The training loop. Returns False if a signal, or a problem of the batches, ended it early."""
    bar = tqdm(total=options.last_step, initial=state.step, unit="step", disable=not distributed.is_main())
    stopped = False
    iterator = iter(batches)  # it is kept until the end, since loading processes take seconds to end

    for x, y, seconds_per_frame in iterator:
        step(x, y, seconds_per_frame)
        state.advance(config.global_batch_size)
        bar.update(state.expected_step - bar.n)
        due = options.due_at(state.expected_step, signals.asked(batches.problem))
        if not due:
            continue  # the host never waits for the GPU here

        # Milestone: wait for the GPU, take skipped updates back
        skipped, stopped = state.read_counts(), due.stop
        if skipped:
            state.check_gradients(options.max_bad_steps, writer.advice)
            if not stopped:
                continue  # the step in question is still to come

        # Evaluate, log, save, show
        found = evaluate(state, held_out, config.objective, metrics) if due.evaluate and not skipped else {}
        is_best = options.keep_best and bool(found) and writer.is_best(state.step, found["held_out_loss"])
        minutes = report(state, batches, metrics, found) if due.log and not skipped else 0
        if stopped or due.end or minutes >= options.max_minutes:
            break
        if due.save or is_best:
            save(state, batches, config, writer)
        if due.show:
            metrics.leave_out(previews.show(signals))
    else:
        stopped = bool(batches.problem)
    bar.close()

    # End: the last line, the last checkpoint, the last preview
    if state.read_counts():
        state.check_gradients(options.max_bad_steps, writer.advice)
    if state.has_unreported_steps() and not stopped:
        report(state, batches, metrics, {})
    save(state, batches, config, writer)
    if not stopped:
        previews.show(signals)
    distributed.on_main(writer.finish)
    return not stopped


def make_state(
    args: argparse.Namespace,
    config: Config,
    saved: dict | None,
    notes: list[str],
    precision: Precision,
    device: torch.device,
) -> TrainingState:
    """The state of a new run, or of one that goes on from a checkpoint's contents. Adds to the notes for the log.

    Raises:
        UserError: --init-weights names weights that do not fit.
    """
    torch.manual_seed(args.global_seed)
    network = config.network.build()
    if args.init_weights and not saved:
        notes.extend(start_from(network, config, args.init_weights))
    state = TrainingState(network, precision, device)
    state.working.grad_checkpoint = args.grad_checkpoint
    if saved:
        state.load_state_dict(saved)
    return state


def make_step(
    args: argparse.Namespace, config: Config, state: TrainingState, source: Source, at_once: int, last_step: float
) -> SeededStep:
    """The training step that the flags ask for, as fast as they ask.

    Args:
        at_once: samples of one pass on a rank.
        last_step: the end of the run.
    """
    speed, recipe = speed_of(args, state.device.type), recipe_of(args, config.objective, last_step)
    frames = network_frames(source.form, source.space) if source.form.lengths else []
    step = training_step(state, recipe, at_once, args.global_seed, speed, frames)
    if speed.fast:
        freeze_garbage_collector()
    return step


def start_process(args: argparse.Namespace) -> tuple[torch.device, Precision]:
    """Meets the other ranks, and chooses the device and the precision with them."""
    device = distributed.start()
    distributed.check_same_flags(vars(args))
    if args.deterministic:
        make_deterministic()
    precision = agree_on_precision(requested_of(args), device.type, tf32=args.tf32)
    precision.set_fp32_mode()
    return device, precision


def main() -> None:
    args, defaults = parse_args()
    tracker_names = trackers_of(args)

    # Process: ranks, device, precision
    device, precision = start_process(args)

    # Start: a new run, or one that goes on with its own settings
    pack = distributed.together(lambda: find_pack(args.data_path))
    defaults = defaults | packed_flags(pack)
    asked = asked_of(args, defaults)
    start = distributed.on_main(lambda: find_start(asked))
    saved = distributed.together(lambda: load_checkpoint(start.checkpoint)) if start.checkpoint else None
    before = config_of(saved["config"], start.checkpoint) if saved else start.config
    by_default = args.global_batch_size is None and not before
    args = settled_of(args, defaults, before, pack)
    check_decay(args, args.max_steps or math.inf)

    # Data, and the network for them
    batch = batch_of(args, device.type)
    source = source_of(args, pack, before.space if before else None, device, precision)
    config = new_config_of(args, source, precision, batch, before.network.num_classes if saved else 0)
    last_sample = sample_limit(args.epochs, args.max_steps, len(source.found))
    if saved:
        check_resumable(before, config, start.checkpoint)
        if is_finished(saved["step"], saved["samples"], last_sample, args.max_steps or math.inf):
            return report_finished(start.folder, saved["step"])

    # Held-out data
    held_out = held_out_of(args, config.form, source, config.classes, device, precision)

    # State: weights, optimizer, counters
    state = make_state(args, config, saved, start.notes, precision, device)
    saved = None  # it is as large as the state itself

    # Folder and log
    method = preview_method_of(args, config.objective)
    folder = distributed.on_main(lambda: claim_folder(start, asked, config))
    start_log(folder / "log.txt")
    start.log()
    announce(config, state, source, batch, by_default)
    if start.checkpoint:
        log_changes(before, config)

    # Training
    with logging_redirect_tqdm([log]):
        signals = StopSignals()
        batches = TrainingBatches(source, args.global_seed, state.samples, last_sample, batch, args.num_workers, device)
        options = run_options_of(args, min(args.max_steps or math.inf, state.step + len(batches)))
        trackers = start_trackers(tracker_names, folder, state.step, config.as_dict())
        at_once = args.micro_batch_size or batch // distributed.world_size()
        vae = source.decoder(device, precision) if method else None
        previews = Previews(method, at_once, state, config, vae, folder, trackers)
        began = time.perf_counter()
        step = make_step(args, config, state, source, at_once, options.last_step)
        metrics = Metrics(folder, device, state.samples, state.step, trackers.log, began)
        writer = CheckpointWriter(folder, options.keep, start.checkpoint, state.assemble)
        if options.keep_best and (lowest := distributed.on_main(lambda: lowest_held_out(folder))):
            writer.is_best(*lowest)
        finished = train(options, config, state, step, batches, metrics, previews, writer, signals, held_out)
        trackers.close()
        signals.close()
        if not finished:
            batches.raise_problem()
    del step  # a group cannot end while a CUDA graph holds its exchange
    log.info("done: %s" if finished else "stopped: %s; --resume (in place of --ckpt) goes on", folder)
    distributed.stop()
    sys.exit(0 if finished else EXIT_STATUS)


if __name__ == "__main__":
    cli.run(main, "lower --global-batch-size, --clip-len or --image-size, or choose a smaller --model")
