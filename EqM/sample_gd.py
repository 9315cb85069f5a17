"""Samples images or videos from a checkpoint by gradient descent along its field.

    torchrun --nproc_per_node=1 EqM/sample_gd.py --folder video_samples --num-fid-samples 16 --use-bf16 \\
        --ckpt results/000-EqM-S-4-Linear-velocity-None/checkpoints/0100000.pt
"""

import argparse
import csv
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import cli
import distributed
from checkpoint import load_checkpoint, load_file, load_weights, network_weights
from cli import UserError
from config import check_flags, class_names, published_config
from fast import add_compile_arg, conditioned_field, is_fast
from latents import VAE, load_vae
from loader import to_pixels
from models import EqM, EqM_models, build_network
from pictures import contact_sheet, read_png, write_gif, write_png
from precision import Precision, add_precision_args, agree_on_precision, requested_precision
from runs import log, log_precision, start_log
from sampling import Field, gradient_descent, guided, sample_noise
from video import write_video

SHEET_SAMPLES = 24  # how many of the first samples the contact sheet shows


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
    parser.add_argument("--target-fps", type=cli.frame_rate, help="frames a second; default the training clips' mean")
    parser.add_argument("--video-format", choices=("mp4", "gif"), default="mp4", help="of videos")
    parser.add_argument("--global-batch-size", type=cli.positive_int, default=32, help="over all ranks")
    parser.add_argument("--global-seed", type=cli.non_negative_int, default=0, help="of the noise")
    add_precision_args(parser)
    add_compile_arg(parser)
    parser.add_argument("--vae", metavar="NAME", help="ema, mse or a folder; default the training's")
    method = parser.add_argument_group("method")
    method.add_argument("--sampler", choices=("gd", "ngd"), default="ngd", help="ngd looks ahead, as Nesterov")
    method.add_argument("--stepsize", type=cli.positive_float, default=0.0017, help="along the field")
    method.add_argument("--mu", type=cli.fraction, default=0.3, help="look-ahead of ngd")
    method.add_argument("--num-sampling-steps", type=cli.positive_int, default=250, help="updates a sample")
    method.add_argument("--cfg-scale", type=cli.non_negative_float, default=1.0, help="guidance; 1: none")
    known = parser.add_argument_group("what the checkpoint knows, checked against it where given")
    known.add_argument("--model", choices=EqM_models, metavar="NAME")
    known.add_argument("--video", action="store_true", default=None)
    known.add_argument("--clip-len", type=cli.side)
    known.add_argument("--image-size", type=cli.side)
    known.add_argument("--num-classes", type=cli.positive_int)
    return parser.parse_args()


def load(args: argparse.Namespace, device: torch.device, precision: Precision) -> tuple[dict, dict, VAE | None]:
    """The checkpoint's weights, its config, and the VAE that decodes its samples if they are latents.

    Raises:
        UserError: no checkpoint, or the VAE is missing or another one than the network was trained on.
    """
    contents = load_file(args.ckpt)
    weights = network_weights(contents)
    table = weights.get("y_embedder.embedding_table.weight")
    published = "config" not in contents and args.model and args.vae and table is not None
    config = None if published else load_checkpoint(args.ckpt)["config"]
    trained_on = (config.get("vae") or {}) if config else {}
    name = args.vae or trained_on.get("name", "none")
    if (name == "none") == bool(published or trained_on):
        wants = f"latents of {trained_on['name']}" if trained_on else "pixels"
        raise UserError(f"{args.ckpt} was trained on {wants}, and --vae says {name}: leave it out")
    vae = load_vae(name, device, precision.name == "bf16") if name != "none" else None
    if trained_on and vae.space.fingerprint != trained_on["fingerprint"]:
        raise UserError(f"--vae {name} is another VAE than the one that {args.ckpt} was trained on")
    return weights, config or published_config(args, len(table) - 1, vae.space), vae


def choose_classes(asked: list[str], names: list[str]) -> list[int]:
    """Class indices from names or indices."""

    def index(text: str) -> int:
        if text in names:
            return names.index(text)
        if text.isdecimal() and int(text) < len(names):
            return int(text)
        some = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
        raise UserError(f"--class {text} is unknown: the checkpoint has 0 to {len(names) - 1}: {some}")

    return [index(text) for text in asked]


@dataclass(frozen=True)
class Output:
    """Where samples go and how a file is named and written."""

    folder: Path
    suffix: str
    frames_per_second: float | None

    def path(self, index: int) -> Path:
        return self.folder / f"{index:06d}{self.suffix}"

    def prepare(self, num_samples: int) -> None:
        """Makes the folder.

        Raises:
            UserError: it cannot be written, or holds samples that this run would not replace.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for folder in (self.folder, self.folder.parent):  # the sheet and the .npz lie beside the samples
                tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise UserError(f"--folder {self.folder} cannot be written: {error.strerror}") from None
        ours = {self.path(i).name for i in range(num_samples)}
        for path in sorted(self.folder.iterdir()):
            if path.suffix in (".mp4", ".gif", ".png") and path.name not in ours:
                raise UserError(f"{path} is not one of these samples: empty the folder, or name another --folder")

    def write(self, index: int, frames: np.ndarray) -> None:
        """Writes one sample, (T, H, W, 3) uint8."""
        path = self.path(index)
        if self.suffix == ".png":
            write_png(path, frames[0])
        elif self.suffix == ".gif":
            write_gif(path, frames, self.frames_per_second)
        else:
            write_video(path, frames, self.frames_per_second)


def batches_of_rank(num_samples: int, global_batch: int) -> list[range]:
    """The sample indices of this rank, cut into batches of nearly the same size."""
    rank, ranks = distributed.rank(), distributed.world_size()
    if global_batch % ranks:
        raise UserError(f"--global-batch-size {global_batch} is not a multiple of the {ranks} processes")
    indices = range(rank, num_samples, ranks)
    num_batches = -(-len(indices) * ranks // global_batch)
    share = -(-len(indices) // max(num_batches, 1))
    return [indices[i * share : (i + 1) * share] for i in range(num_batches)]


def sample_batch(
    args: argparse.Namespace,
    network: EqM,
    conditioned: Callable[[Tensor], Field],
    y: Tensor,
    indices: Sequence[int],
    steps: Iterable,
) -> Tensor:
    """Samples of the classes y (N,), in float32: (N, C, H, W) or (N, C, T, H, W)."""
    noise = sample_noise(args.global_seed, indices, network.input_shape).to(y.device)
    field = guided(conditioned, y, network.num_classes, args.cfg_scale)
    return gradient_descent(field, noise, args.stepsize, steps, args.mu if args.sampler == "ngd" else 0.0)


@torch.no_grad()
def write_samples(
    args: argparse.Namespace, network: EqM, vae: VAE | None, classes: list[int], output: Output, device: torch.device
) -> dict[int, np.ndarray]:
    """Makes and writes this rank's samples; returns those for the contact sheet, by index.

    Raises:
        UserError: samples that are not finite.
    """
    batches = batches_of_rank(args.num_fid_samples, args.global_batch_size)
    size, shown = max(map(len, batches), default=1), {}
    seconds_per_frame = 1 / output.frames_per_second if output.frames_per_second else 0.0
    evaluations = size if args.cfg_scale == 1 else 2 * size  # in one call
    conditioned = conditioned_field(network, evaluations, seconds_per_frame, is_fast(args, device))
    total = len(batches) * args.num_sampling_steps
    with tqdm(total=total, desc="sampling", unit="step", disable=not distributed.is_main()) as bar:

        def counted_steps() -> Iterator[int]:
            for step in range(args.num_sampling_steps):
                yield step
                bar.update()

        for indices in batches:
            # Every batch has the same size, since another would have to be compiled: the last repeats a sample.
            padded = [*indices, *[indices[-1]] * (size - len(indices))]
            y = torch.tensor([classes[i % len(classes)] for i in padded], device=device)  # (N,)
            x = sample_batch(args, network, conditioned, y, padded, counted_steps())[: len(indices)]
            if not x.isfinite().all():
                raise UserError("samples are not finite: lower --stepsize or --cfg-scale, or sample in fp32")
            x = vae.decode(x) if vae else x
            clips = to_pixels(x if network.is_video else x[:, :, None]).permute(0, 2, 3, 4, 1)  # (N, T, H, W, C)
            for index, frames in zip(indices, clips.cpu().numpy(), strict=True):
                output.write(index, frames)
                if index < SHEET_SAMPLES:
                    shown[index] = frames
    return shown


def write_table(
    args: argparse.Namespace, output: Output, classes: list[int], names: list[str], precision: Precision
) -> None:
    """Writes samples.csv: what each file shows and how it was made."""
    settings = {
        "seed": args.global_seed,
        "sampler": args.sampler,
        "stepsize": args.stepsize,
        "mu": args.mu if args.sampler == "ngd" else 0.0,
        "steps": args.num_sampling_steps,
        "cfg_scale": args.cfg_scale,
        "precision": precision.name,
        "frames_per_second": output.frames_per_second,
        "checkpoint": args.ckpt,
    }
    with (output.folder / "samples.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "index", "class", "class_name", *settings])
        for index in range(args.num_fid_samples):
            label = classes[index % len(classes)]
            writer.writerow([output.path(index).name, index, label, names[label], *settings.values()])


def write_npz(output: Output, num_samples: int) -> Path:
    """Writes all images, (N, H, W, 3) uint8, as `arr_0` of a file beside the folder."""
    path = output.folder.with_name(output.folder.name + ".npz")
    np.savez(path, arr_0=np.stack([read_png(output.path(i)) for i in range(num_samples)]))
    return path


def main() -> None:
    args = parse_args()
    device = distributed.start()
    start_log()
    precision = agree_on_precision(requested_precision(args), device.type, tf32=args.tf32)
    weights, config, vae = load(args, device, precision)
    settings, names = config["network"], class_names(config)
    check_flags(args, config)
    classes = choose_classes(args.classes or config["classes"], names)
    batches_of_rank(args.num_fid_samples, args.global_batch_size)

    network = build_network(settings)
    load_weights(network, weights, args.ckpt)
    network = network.requires_grad_(False).eval().to(device, precision.dtype)
    frames_per_second = (args.target_fps or config["frames_per_second"]) if network.is_video else None
    output = Output(args.folder.resolve(), f".{args.video_format}" if network.is_video else ".png", frames_per_second)
    distributed.on_main(lambda: output.prepare(args.num_fid_samples))

    log_precision(precision)
    log.info("checkpoint: %s, %s, trained in %s", args.ckpt, settings["model"], config["precision"]["name"])
    shown = write_samples(args, network, vae, classes, output, device)
    shown = {index: frames for part in distributed.gather(shown) for index, frames in part.items()}
    if distributed.is_main():
        write_table(args, output, classes, names, precision)
        if not network.is_video:
            log.info("all images: %s", write_npz(output, args.num_fid_samples))
        sheet = output.folder.with_name(output.folder.name + "-sheet.png")
        captions = [names[classes[i % len(classes)]] for i in sorted(shown)]
        write_png(sheet, contact_sheet([shown[i] for i in sorted(shown)], captions))
        log.info("%d samples in %s", args.num_fid_samples, output.folder)
        log.info("contact sheet: %s", sheet)
    distributed.stop()


if __name__ == "__main__":
    cli.run(main, "lower --global-batch-size")
