"""How the samples of a plan are made, as the flags say: a batch after as many steps, or each until it rests."""

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from compiled import is_fast, replayed
from models import EqM, sample_energy
from sampling.adaptive import Descent, Slots
from sampling.descent import Field, Finished, Measure, gradient_descent, integrate, norm_alone
from sampling.fields import Composition
from sampling.plan import Plan
from sampling.traces import norm_and_energy


def composition_of(args: argparse.Namespace, network: EqM, plan: Plan) -> Composition:
    """What the flags make of the fields of one class or a sum: guided, in all channels or in the first 3."""
    guided_channels = 3 if args.cfg_channels == "3" else network.in_channels
    scales = [args.cfg_scale if i < guided_channels else 1.0 for i in range(network.in_channels)]
    return Composition(plan.weights, network.num_classes, scales, network.pos_embed.device)


def mu_of(args: argparse.Namespace) -> float:
    """The look-ahead of the sampler."""
    return args.mu if args.sampler == "ngd" else 0.0


def sample_batch(
    args: argparse.Namespace,
    network: EqM,
    conditioned: Callable[..., Field],
    plan: Plan,
    indices: Sequence[int],
    x: Tensor,
    steps: Iterable,
    watch: Callable[[Tensor, Tensor], None] = lambda point, value: None,
) -> Tensor:
    """Samples of the plan, each after so many steps, in float32: (N, C, H, W) or (N, C, T, H, W).

    Args:
        x: where they start, of the same shape, on the network's device.
    """
    y, objective = plan.labels(indices), plan.starts.objective
    composition, rows = composition_of(args, network, plan), plan.rows(y)
    if args.sampler != "euler":
        return gradient_descent(composition.field(conditioned, rows), x, args.stepsize, steps, mu_of(args), watch)

    def velocity_at(gamma: float) -> Field:
        field = composition.field(partial(conditioned, gamma=gamma), rows)
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
    composition, device = composition_of(args, network, plan), network.pos_embed.device
    # Of every label now: while samples descend, the device alone knows which ones are wanted.
    composition.field(conditioned, plan.rows(plan.labels(range(len(plan.classes)))))

    def field_of(y: Tensor) -> Field:
        return composition.field(conditioned, plan.rows(y))

    descent = Descent(args.stepsize, mu_of(args), args.num_sampling_steps, args.adaptive)
    fast = is_fast(args, device)
    recorded = partial(replayed, fast=fast, device=device)
    slots = Slots(
        field_of,
        plan.starts,
        plan.labels,
        network.input_shape,
        size,
        descent,
        device,
        progress,
        measure,
        recorded,
        compiled=fast,
        shrinks=not fast,
    )
    finished = slots.run(indices)
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

    composition = composition_of(args, network, plan)

    def conditioned(y: Tensor) -> Field:  # of one number a sample, in the shape (N, 1, …) of a field
        return lambda x: sample_energy(network, x, y.to(x.device), seconds_per_frame).view(-1, *[1] * (x.dim() - 1))

    def energy(y: Tensor, x: Tensor) -> Tensor:
        of_each_channel = composition.field(conditioned, plan.rows(y))(x)  # (N, C or 1, 1, …)
        return of_each_channel.flatten(1).mean(1)

    # Where steps are compiled, this is not: it is a whole network's compilation, for a measurement.
    return norm_and_energy(torch.compiler.disable(energy))
