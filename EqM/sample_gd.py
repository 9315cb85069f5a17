"""Samples images or videos from a checkpoint by gradient descent along its field, or over time.

    torchrun --nproc_per_node=1 EqM/sample_gd.py --folder video_samples --num-fid-samples 16 --use-bf16 \\
        --ckpt results/000-EqM-S-4-Linear-velocity-None/checkpoints/0100000.pt
"""

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import cli
import distributed
from adaptive import Descent, Slots, summary
from checkpoint import check_written_here, load_file, load_weights, network_weights
from cli import UserError
from config import add_known_args, check_flags, class_names, published_config
from descents import Finished, Measure, Watch, fixed_descents, norm_alone
from energy import sample_energy
from fast import add_compile_arg, conditioned_field, is_fast
from latents import VAE, load_vae
from loader import to_pixels
from models import EqM, build_network
from outputs import Output, Report, write_npz, write_sheet, write_table
from plan import Plan, make_plan
from precision import Precision, add_precision_args, agree_on_precision, requested_precision
from runs import log, log_precision, start_log
from sampling import MU, STEPS, STEPSIZE, Field, composed, gradient_descent, integrate
from starts import add_start_args
from traces import TRACED, norm_and_energy, write_evaluations, write_trace

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
    parser.add_argument("--trace", action="store_true", help="norms and energies by step: table and plots")
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
    return parser.parse_args()


def load(args: argparse.Namespace, device: torch.device, precision: Precision) -> tuple[dict, dict, VAE | None]:
    """The checkpoint's weights, its config, and the VAE that decodes its samples if they are latents.

    Raises:
        UserError: no checkpoint, or the VAE is missing or another one than the network was trained on.
    """
    contents = load_file(args.ckpt)
    weights = network_weights(contents, args.ckpt)
    table = weights.get("y_embedder.embedding_table.weight", torch.empty(0))  # (classes and the null class, D)
    if "config" not in contents and len(table.shape) == 2 and args.model and args.vae not in (None, "none"):
        vae = load_vae(args.vae, device, precision.name == "bf16")
        return weights, published_config(args, len(table) - 1, vae.space), vae
    check_written_here(contents, args.ckpt)
    trained_on = contents["config"].get("vae") or {}
    name = args.vae or trained_on.get("name", "none")
    if (name == "none") == bool(trained_on):
        wants = f"latents of {trained_on['name']}" if trained_on else "pixels"
        raise UserError(f"{args.ckpt} was trained on {wants}, and --vae says {name}: leave it out")
    vae = load_vae(name, device, precision.name == "bf16") if name != "none" else None
    if trained_on and vae.space.fingerprint != trained_on["fingerprint"]:
        raise UserError(f"--vae {name} is another VAE than the one that {args.ckpt} was trained on")
    return weights, contents["config"], vae


def open_network(args: argparse.Namespace, device: torch.device, precision: Precision) -> tuple[EqM, dict, VAE | None]:
    """The checkpoint's network on the device in the precision, without gradients; its config, and its VAE if any.

    Raises:
        UserError: as `load`, and for a flag that contradicts the checkpoint, or weights of another network.
    """
    weights, config, vae = load(args, device, precision)
    check_flags(args, config)
    network = build_network(config["network"])
    load_weights(network, weights, args.ckpt)
    return network.requires_grad_(False).eval().to(device, precision.dtype), config, vae


def batches_of_rank(num_samples: int, global_batch: int) -> list[range]:
    """The sample indices of this rank, cut into batches of nearly the same size."""
    rank, ranks = distributed.rank(), distributed.world_size()
    if global_batch % ranks:
        raise UserError(f"--global-batch-size {global_batch} is not a multiple of the {ranks} processes")
    indices = range(rank, num_samples, ranks)
    num_batches = -(-len(indices) * ranks // global_batch)
    share = -(-len(indices) // max(num_batches, 1))
    return [indices[i * share : (i + 1) * share] for i in range(num_batches)]


def field_of(
    args: argparse.Namespace,
    network: EqM,
    conditioned: Callable[[Tensor], Field],
    y: Tensor,
    terms: Sequence[tuple[float, int]] = (),
) -> Field:
    """The guided field of classes y (N,), or, for N samples, of a sum of classes."""
    guided_channels = 3 if args.cfg_channels == "3" else network.in_channels
    scales = [args.cfg_scale if i < guided_channels else 1.0 for i in range(network.in_channels)]
    weights = [weight for weight, _ in terms] or [1.0]
    rows = torch.stack([torch.full_like(y, label) for _, label in terms] or [y])  # (K, N)
    return composed(conditioned, rows, weights, network.num_classes, scales)


def sample_batch(
    args: argparse.Namespace,
    network: EqM,
    conditioned: Callable[..., Field],
    plan: Plan,
    indices: Sequence[int],
    steps: Iterable,
    watch: Callable[[Tensor, Tensor], None] = lambda point, value: None,
) -> Tensor:
    """Samples of the plan, each after so many steps, in float32: (N, C, H, W) or (N, C, T, H, W)."""
    y, x, objective = plan.labels(indices), plan.starts(indices).to(network.pos_embed.device), plan.starts.objective
    if args.sampler != "euler":
        field, mu = field_of(args, network, conditioned, y, plan.terms), args.mu if args.sampler == "ngd" else 0.0
        return gradient_descent(field, x, args.stepsize, steps, mu, watch)

    def velocity_at(gamma: float) -> Field:
        field = field_of(args, network, partial(conditioned, gamma=gamma), y, plan.terms)
        magnitude = objective.c(torch.tensor([gamma])).item()
        return lambda x: field(x) / magnitude

    gammas = torch.linspace(1 - plan.starts.noise, 1, args.num_sampling_steps + 1).tolist()  # (K + 1,)
    return integrate(velocity_at, x, gammas, steps, watch)


def adaptive_samples(
    args: argparse.Namespace,
    network: EqM,
    conditioned: Callable[[Tensor], Field],
    plan: Plan,
    batches: list[range],
    progress: Callable[[int], object],
    measure: Measure = norm_alone,
) -> Iterator[list[Finished]]:
    """The samples of all batches in the order in which they stop, as many at once as a batch has."""
    indices, size = [index for batch in batches for index in batch], max(map(len, batches), default=1)
    if indices:
        # The part of every label at once, rather than a pass for each that a slot's next sample brings.
        field_of(args, network, conditioned, plan.labels(range(len(plan.classes))), plan.terms)

    def field_of_samples(samples: Sequence[int]) -> Field:
        return field_of(args, network, conditioned, plan.labels(samples), plan.terms)

    mu = args.mu if args.sampler == "ngd" else 0.0
    descent = Descent(args.stepsize, mu, args.num_sampling_steps, args.adaptive)
    device, shrinks = network.pos_embed.device, not is_fast(args, network.pos_embed.device)
    slots = Slots(field_of_samples, plan.starts, indices, size, descent, device, progress, shrinks, measure=measure)
    finished = slots.run()
    while group := list(islice(finished, size)):
        yield group


def measure_of(args: argparse.Namespace, network: EqM, plan: Plan, seconds_per_frame: float) -> Measure:
    """What is measured of samples on their way: the norm, with --trace also the energy.

    An explicit energy is what the field climbs down; one read off it need not fall. That of a sum of classes,
    or of guidance, is the same sum; where --cfg-channels guides some of the channels alone, it is the mean over
    channels, each with its own.
    """
    if not args.trace or network.energy == "none":
        return norm_and_energy() if args.trace else norm_alone

    def conditioned(y: Tensor) -> Field:  # of one number a sample, in the shape (N, 1, …) of a field
        return lambda x: sample_energy(network, x, y.to(x.device), seconds_per_frame).view(-1, *[1] * (x.dim() - 1))

    def energy(indices: Sequence[int], x: Tensor) -> Tensor:
        of_each_channel = field_of(args, network, conditioned, plan.labels(indices), plan.terms)(x)  # (N, C or 1, 1, …)
        return of_each_channel.flatten(1).mean(1)

    return norm_and_energy(energy)


@torch.no_grad()
def write_samples(
    args: argparse.Namespace, network: EqM, vae: VAE | None, plan: Plan, output: Output, device: torch.device
) -> Report:
    """Makes and writes this rank's samples; returns what there is to say of them.

    Raises:
        UserError: samples that are not finite.
    """
    batches, report = batches_of_rank(args.num_fid_samples, args.global_batch_size), Report()
    size, num_samples = max(map(len, batches), default=1), sum(map(len, batches))
    seconds_per_frame = 1 / output.frames_per_second if output.frames_per_second else 0.0
    evaluations = (max(len(plan.terms), 1) + (args.cfg_scale != 1)) * size  # in one call
    conditioned = conditioned_field(network, evaluations, seconds_per_frame, is_fast(args, device))

    measure = measure_of(args, network, plan, seconds_per_frame)

    def sample(indices: Sequence[int], steps: Iterable, watch: Watch) -> Tensor:
        return sample_batch(args, network, conditioned, plan, indices, steps, watch)

    total = num_samples * args.num_sampling_steps
    with tqdm(total=total, desc="sampling", unit="evaluation", disable=not distributed.is_main()) as bar:
        if args.adaptive:
            groups = adaptive_samples(args, network, conditioned, plan, batches, bar.update, measure)
        else:
            traced = TRACED if args.trace else 0
            groups = fixed_descents(sample, batches, args.num_sampling_steps, traced, bar.update, measure)
        for group in groups:
            x = torch.stack([finished.x for finished in group])  # (N, …)
            if not x.isfinite().all():
                raise UserError("samples are not finite: lower --stepsize or --cfg-scale, or sample in fp32")
            x = vae.decode(x) if vae else x
            clips = to_pixels(x if network.is_video else x[:, :, None]).permute(0, 2, 3, 4, 1)  # (N, T, H, W, C)
            for finished, frames in zip(group, clips.cpu().numpy(), strict=True):
                output.write(finished.index, frames)
                report.add(finished, frames)
    return report


def main() -> None:
    args = parse_args()
    device = distributed.start()
    start_log()
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
            log.info("evaluations of all samples: %s", write_evaluations(output.folder, counts))
    distributed.stop()


if __name__ == "__main__":
    cli.run(main, "lower --global-batch-size")
