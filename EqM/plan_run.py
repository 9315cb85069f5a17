"""Prints what training on a folder would cost on this machine, in about a minute.

    python EqM/plan_run.py datasets/ucf-101/train --video --model EqM-S/4 --clip-len 4 --batch 256 --use-bf16

A sample of the files is decoded, and some training steps on random inputs are timed. docs/scale.md has such figures of
known data sets.
"""

if __name__ == "__main__":
    from runtime.interrupts import end_at_ctrl_c

    end_at_ctrl_c()


import argparse
import logging

import torch

from compiled import add_speed_args, speed_of
from data.batches import DEFAULT_BATCH
from data.form import Form
from data.latents import DEFAULT_SIZE, DEFAULT_VAE_SIZE, LatentSpace, load_vae
from data.packs.pack import is_pack
from measuring.costs import Costs, look_at, this_machine, time_steps
from measuring.workloads import Work
from network_settings import EqM_models, NetworkSettings
from precision import add_precision_args, agree_on_precision, requested_of
from runtime import cli, distributed
from runtime.errors import UserError
from runtime.logs import start_log
from runtime.size import SIZE_HELP


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser("Prints what training on a folder would cost on this machine.")
    parser.add_argument("data_path", type=cli.path, metavar="DATA_PATH", help="class folders, or videos with a CSV")
    parser.add_argument("--model", choices=EqM_models, default="EqM-XL/2", metavar="NAME", help="size and patch")
    parser.add_argument("--video", action="store_true", help="train on clips of videos, not on images")
    parser.add_argument("--image-size", type=cli.size, help=f"{SIZE_HELP}; default 64, with a VAE 256")
    parser.add_argument("--vae", type=cli.given, metavar="NAME", help="train on latents of this VAE; default: pixels")
    parser.add_argument("--clip-len", type=cli.side, default=16, help="frames of a clip")
    parser.add_argument(
        "--frame-interval", type=cli.positive_int, default=3, help="from one frame of a clip to the next"
    )
    parser.add_argument("--temporal-patch", type=cli.side, help="frames of a token; default 2 if that divides the clip")
    parser.add_argument("--batch", type=cli.count, help="samples of a step, on all GPUs; default 256, on a CPU 8")
    parser.add_argument("--gpus", type=cli.processes, help="GPUs that share a step; default: those of this machine")
    parser.add_argument("--grad-checkpoint", action="store_true", help="less memory for more time")
    add_precision_args(parser)
    add_speed_args(parser)
    return parser.parse_args()


def form_of(args: argparse.Namespace) -> Form:
    size = args.image_size or (DEFAULT_VAE_SIZE if args.vae not in (None, "none") else DEFAULT_SIZE)
    return Form(True, size, args.clip_len, args.frame_interval) if args.video else Form(False, size)


def work_of(args: argparse.Namespace, form: Form, space: LatentSpace | None, share: int) -> Work:
    """The step of one GPU, with its share of the samples.

    Raises:
        UserError: sizes do not divide.
    """
    size, channels = form.input_size(space), space.channels if space else 3
    patch = (args.temporal_patch or (1 if size[0] % 2 else 2)) if form.video else 1
    NetworkSettings(args.model, size, channels, 1, patch).check()
    return Work("plan", "train", args.model, size, share, channels, patch, args.grad_checkpoint)


def main() -> None:
    args = parse_args()
    device = distributed.start()
    start_log(level=logging.WARNING)
    if distributed.is_group():
        raise UserError("one process measures: start EqM/plan_run.py with python, and give --gpus")
    if is_pack(args.data_path):
        raise UserError(f"{args.data_path} is a pack: give the folder of files that it was made from")
    precision = agree_on_precision(requested_of(args), device.type, tf32=args.tf32)
    precision.set_fp32_mode()
    devices = args.gpus or max(1, torch.cuda.device_count())
    batch = args.batch or DEFAULT_BATCH[device.type]
    if batch % devices:
        raise UserError(f"--batch {batch} is not a multiple of {devices} GPUs")
    form = form_of(args)
    space = load_vae(args.vae, device).space if args.vae not in (None, "none") else None
    work = work_of(args, form, space, batch // devices)
    data = look_at(args.data_path, form, space)
    step = time_steps(work, precision, speed_of(args, device.type), device)
    costs = Costs(data, step, this_machine(device, devices, args.data_path))
    rows = list(costs.rows())
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{name:{width}}  {text}")


if __name__ == "__main__":
    cli.run(main, "lower --batch, --clip-len or --image-size, or choose a smaller --model", only_prints=True)
