"""The Equilibrium Matching objective, for tensors of any rank, in float32.

Source: Wang & Du 2025, arXiv 2510.02300. The sign is that of the published code: the field points from noise to data,
and sampling adds it.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from clip_field import ClipOutput
from energy import ENERGIES
from paths import PATHS, coefficients, derivatives
from runtime import cli
from runtime.errors import UserError
from runtime.plain_data import one_of

CLASS_DROPOUT = 0.1
LEFT = 0.005  # of the noise, at the end of a descent
SCHEDULES = ("truncated", "linear", "piecewise", "constant")
LOSS_WEIGHTS = ("field", "clip", "min-snr")
GAMMA_DISTRIBUTIONS = ("uniform", "logit-normal")
MOST_SNR = 5.0  # of min-snr, as published
DISPERSION_WEIGHT = 0.5
BETWEEN = cli.checked(float, lambda v: 0 < v < 1, "a number between 0 and 1")
SHARE = cli.checked(float, lambda v: 0 <= v <= 1, "a number from 0 to 1")
LOGIT = cli.checked(float, lambda v: -10 <= v <= 10, "a number from -10 to 10")
LOGIT_SPREAD = cli.checked(float, lambda v: 0.01 <= v <= 10, "a number from 0.01 to 10")


@dataclass(frozen=True)
class Objective:
    """The path from noise to data, the magnitude c(γ) of the field along it, and what the loss makes of them.

    The defaults must never change: a checkpoint that lacks a key means its default. A sample has one γ, (N,), or each
    frame of a clip has its own, (N, T).

    Attributes:
        path: one of PATHS, α(γ) and σ(γ) of x_γ = α·x + σ·ε.
        schedule, a, b, scale: c(γ) = λ·h(γ), with λ = `scale`. The schedule, one of SCHEDULES, gives h:
            truncated: 1 up to γ = a, then linear to 0 at γ = 1;
            linear: 1 − γ;
            piecewise: linear from b at γ = 0 to 1 at γ = a, then linear to 0 at γ = 1;
            constant: 1.
        dispersion: weight of the dispersive term; 0: none.
        by_frame: share of the samples in which each token's time has a γ of its own (`step.draw_frame_levels`).
        loss_weight: one of LOSS_WEIGHTS, the error whose square is the loss:
            field: that of the field;
            clip: that of the clip which the field implies on the Linear path;
            min-snr: the same times the signal-to-noise ratio γ²/(1 − γ)², or MOST_SNR if that is less (Hang et al.
                2023, arXiv 2303.09556).
        gamma_distribution: one of GAMMA_DISTRIBUTIONS, the distribution of γ in training. The logit ln(γ/(1 − γ)) of
            `logit-normal` has the mean gamma_mean and the standard deviation gamma_std (Esser et al. 2024,
            arXiv 2403.03206).
    """

    path: Annotated[str, one_of(PATHS)] = "Linear"
    schedule: Annotated[str, one_of(SCHEDULES)] = "truncated"
    a: Annotated[float, BETWEEN] = 0.8
    b: Annotated[float, cli.positive_float] = 1.0
    scale: Annotated[float, cli.positive_float] = 4.0
    dispersion: Annotated[float, cli.non_negative_float] = 0.0
    by_frame: Annotated[float, SHARE] = 0.0
    loss_weight: Annotated[str, one_of(LOSS_WEIGHTS)] = "field"
    gamma_distribution: Annotated[str, one_of(GAMMA_DISTRIBUTIONS)] = "uniform"
    gamma_mean: Annotated[float, LOGIT] = 0.0
    gamma_std: Annotated[float, LOGIT_SPREAD] = 1.0

    def c(self, gamma: Tensor) -> Tensor:
        """The field's magnitude c(γ), in the shape of γ."""
        falling = (1 - gamma) / (1 - self.a)  # (N,) or (N, T)
        if self.schedule == "truncated":
            return self.scale * falling.clamp(max=1)
        if self.schedule == "linear":
            return self.scale * (1 - gamma)
        if self.schedule == "piecewise":
            return self.scale * torch.where(gamma <= self.a, self.b - (self.b - 1) * gamma / self.a, falling)
        return self.scale * torch.ones_like(gamma)

    def least_stepsize(self, steps: int) -> float:
        """The least step size with which so many steps of gradient descent leave at most LEFT of the noise.

        Each step takes the noise's part n = 1 − γ down by η·c(γ), on the Linear path and with a perfect field. `linear`
        has the exact value, the others that of a continuous descent, which is a little slower than one in steps.
        """
        if self.schedule == "linear":
            return (1 - LEFT ** (1 / steps)) / self.scale
        if self.schedule == "constant":
            return (1 - LEFT) / (self.scale * steps)
        first = math.log(self.b) / (self.b - 1) if self.schedule == "piecewise" and self.b != 1 else 1.0
        last = (1 - self.a) * max(math.log((1 - self.a) / LEFT), 0.0)
        return (self.a * first + last) / (self.scale * steps)

    def interpolate(self, x: Tensor, noise: Tensor, gamma: Tensor) -> Tensor:
        """x_γ = α(γ)·x + σ(γ)·ε, with gamma (N,) and x, noise (N, …), or gamma (N, T) and clips (N, C, T, H, W)."""
        alpha, sigma = (broadcast_over(value, x) for value in coefficients(self.path, gamma))  # (N, 1, …)
        return alpha * x + sigma * noise

    def target(self, x: Tensor, noise: Tensor, gamma: Tensor) -> Tensor:
        """u = (α'(γ)·x + σ'(γ)·ε)·c(γ), with x, noise and gamma as for `interpolate`. For Linear it is (x − ε)·c(γ).

        Where γ = 1 it is 0, unless the path is VP or the schedule `constant`.
        """
        alpha, sigma = (broadcast_over(value, x) for value in derivatives(self.path, gamma))  # (N, 1, …)
        return (alpha * x + sigma * noise) * broadcast_over(self.c(gamma), x)

    def clip_of(self, x_gamma: Tensor, field: Tensor, gamma: Tensor) -> Tensor:
        """The clip x̂ that a field implies at x_γ, (N, …), not finite where c(γ) = 0 hides it.

        For Linear it is x_γ + f·(1 − γ)/c(γ), whose factor has a closed form. For the other paths x̂ follows from x_γ
        and from the velocity f/c.
        """
        if self.path == "Linear":
            return x_gamma + field * broadcast_over(self.reach(gamma), field)
        (alpha, sigma), (alpha_slope, sigma_slope) = coefficients(self.path, gamma), derivatives(self.path, gamma)
        values = (alpha, sigma, alpha_slope, sigma_slope, self.c(gamma))
        alpha, sigma, alpha_slope, sigma_slope, c = (broadcast_over(value, field) for value in values)  # (N, 1, …)
        return (sigma_slope * x_gamma - sigma * field / c) / (alpha * sigma_slope - alpha_slope * sigma)

    def reach(self, gamma: Tensor) -> Tensor:
        """(1 − γ)/c(γ) on the Linear path, also at γ = 1, in the shape of γ."""
        if self.schedule == "linear":
            return torch.ones_like(gamma) / self.scale
        if self.schedule == "constant":
            return (1 - gamma) / self.scale
        if self.schedule == "truncated":
            return (1 - gamma).clamp(min=1 - self.a) / self.scale
        before = (1 - gamma) / (self.b - (self.b - 1) * gamma / self.a)  # (N,) or (N, T)
        return torch.where(gamma <= self.a, before, 1 - self.a) / self.scale

    @property
    def clip_output(self) -> ClipOutput:
        """How a network's clip becomes its field, on the Linear path and for any schedule but `constant`."""
        a, b = 0.0 if self.schedule == "linear" else self.a, self.b if self.schedule == "piecewise" else 1.0
        return ClipOutput(self.scale, a, b)

    def drawn_gamma(self, uniform: Tensor) -> Tensor:
        """γ in [0, 1] from uniform numbers in [0, 1), of any shape, by the inverse of its distribution function."""
        if self.gamma_distribution == "uniform":
            return uniform
        return torch.sigmoid(self.gamma_mean + self.gamma_std * torch.special.ndtri(uniform))

    def weight(self, gamma: Tensor) -> Tensor:
        """The factor of the squared error of the field in the loss, in γ's shape."""
        if self.loss_weight == "field":
            return torch.ones_like(gamma)
        of_clip = self.reach(gamma).square()
        if self.loss_weight == "clip":
            return of_clip
        return of_clip * (gamma / (1 - gamma)).square().clamp(max=MOST_SNR)

    def loss(
        self,
        field: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]],
        x: Tensor,
        noise: Tensor,
        gamma: Tensor,
    ) -> Tensor:
        """Mean squared error of the field at x_γ, weighted, plus the dispersive term: a float32 scalar.

        Args:
            field: (x_γ, γ) ↦ (f, tokens). f has x's shape and any precision. tokens are the last block's, (N, …);
                only the dispersive term uses them.
            x, noise: data and standard normal noise, (N, …).
            gamma: (N,), or (N, T) of the frames of clips, in [0, 1].
        """
        prediction, tokens = field(self.interpolate(x, noise, gamma), gamma)
        squares = (prediction.float() - self.target(x, noise, gamma)).square()  # (N, …)
        if self.loss_weight != "field":
            squares = squares * broadcast_over(self.weight(gamma), squares)
        error = squares.mean()
        return error + self.dispersion * crowding(tokens) if self.dispersion else error


def crowding(tokens: Tensor) -> Tensor:
    """The dispersive term: ln of the mean of exp(−D) over all pairs of a batch's samples, in float32.

    D is the mean squared difference of two samples' tokens (N, …). A sample is also paired with itself.
    Source: Wang & He 2025, arXiv 2506.09027.
    """
    z = tokens.float().flatten(1)
    z = z - z.mean(0)  # (N, K): the distances are the same, and lose fewer digits below
    squares = z.square().sum(1)  # (N,)
    distances = (squares[:, None] + squares - 2 * z @ z.T) / z.shape[1]  # (N, N)
    return torch.logsumexp(-distances.flatten(), 0) - 2 * math.log(len(z))


def broadcast_over(values: Tensor, x: Tensor) -> Tensor:
    """(N,) → (N, 1, …, 1) with x's rank, so that each sample of x is multiplied by its own value.

    (N, T) → (N, 1, T, 1, 1), so that each frame of a clip x (N, C, T, H, W) is.
    """
    if values.dim() == 2:
        return values[:, None, :, None, None]
    return values.view(-1, *[1] * (x.dim() - 1))


def drop_labels(y: Tensor, uniform: Tensor, null_class: int, share: float = CLASS_DROPOUT) -> Tensor:
    """Replaces labels by the null class where the uniform draw is below the share: y, uniform (N,)."""
    return torch.where(uniform < share, null_class, y)


def add_objective_args(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the objective: path, c(γ), dispersive term, explicit energy, whether the network sees γ."""
    group = parser.add_argument_group("objective")
    cli.add_kept(group, "--path-type", "Linear", choices=PATHS, help="the path from noise to data")
    cli.add_kept(group, "--c-schedule", "truncated", choices=SCHEDULES, help="c(γ), the field's magnitude")
    cli.add_kept(group, "--c-a", 0.8, type=BETWEEN, help="c falls from this γ on (truncated, piecewise)")
    cli.add_kept(group, "--c-b", type=cli.positive_float, help="c/λ at γ = 0 (piecewise, which needs it)")
    cli.add_kept(group, "--c-lambda", 4.0, type=cli.positive_float, help="λ, the factor of c")
    cli.add_kept(
        group,
        "--disp",
        False,
        action="store_true",
        help="add the dispersive term: it drives the samples of a rank's (micro-)batch apart",
    )
    predict = "what the network puts out; clip: the clip without noise, for tokens as wide as the network"
    cli.add_kept(group, "--predict", "field", choices=("field", "clip"), help=predict)
    by_frame = "share of the clips in which each token's time has its own noise level γ, and in half of which the first"
    by_frame += " frames are clean: for --keep-frames and --frames of sample_gd.py"
    cli.add_kept(group, "--gamma-per-frame", 0.0, type=SHARE, metavar="SHARE", help=by_frame)
    add_loss_args(group)
    cli.add_kept(group, "--ebm", "none", choices=ENERGIES, help="the field is the gradient of this energy")
    cli.add_kept(
        group,
        "--uncond",
        True,
        action=argparse.BooleanOptionalAction,
        help="hide γ from the network; one that sees γ cannot be sampled by gradient descent",
    )


def add_loss_args(group: argparse._ActionsContainer) -> None:
    """Adds the flags that say how much each γ counts in the loss."""
    weight = "whose squared error the loss is: the field's; the implied clip's; or the clip's, times min(SNR, 5)"
    cli.add_kept(group, "--loss-weight", "field", choices=LOSS_WEIGHTS, help=weight)
    distribution = "how γ is distributed in training"
    cli.add_kept(group, "--gamma-distribution", "uniform", choices=GAMMA_DISTRIBUTIONS, help=distribution)
    cli.add_kept(group, "--gamma-mean", type=LOGIT, help="mean of ln(γ/(1 − γ)) (logit-normal); default 0")
    cli.add_kept(group, "--gamma-std", type=LOGIT_SPREAD, help="its standard deviation (logit-normal); default 1")


def check_objective(args: argparse.Namespace) -> None:
    """Raises UserError if flags of the objective contradict one another."""
    clip, linear = args.predict == "clip", ("--path-type", args.path_type, "Linear")
    needs = [("--predict clip", *each) for each in (linear, ("--ebm", args.ebm, "none")) if clip]
    needs += [(f"--loss-weight {args.loss_weight}", *linear)] if args.loss_weight != "field" else []
    for flag, other, value, needed in needs:
        if value != needed:
            raise UserError(f"{flag} needs {other} {needed}, and it is {value}: change one of them")
    if clip and args.c_schedule == "constant":
        raise UserError("--predict clip has no bounded field with --c-schedule constant: change one of them")
    if (args.c_schedule == "piecewise") != (args.c_b is not None):
        asks = "needs --c-b, c/λ at γ = 0: add it" if args.c_b is None else "has no use for --c-b: leave it out"
        raise UserError(f"--c-schedule {args.c_schedule} {asks}")
    if args.gamma_distribution == "uniform" and (args.gamma_mean is not None or args.gamma_std is not None):
        raise UserError("--gamma-mean and --gamma-std need --gamma-distribution logit-normal: add it")


def objective_of(args: argparse.Namespace) -> Objective:
    """The objective that the flags ask for.

    Raises:
        UserError: flags contradict one another, or --c-b is missing.
    """
    check_objective(args)
    check_frame_levels(args)
    b, mean, std = (
        default if value is None else value
        for value, default in ((args.c_b, 1.0), (args.gamma_mean, 0.0), (args.gamma_std, 1.0))
    )
    dispersion = DISPERSION_WEIGHT if args.disp else 0.0
    of_loss = dispersion, args.gamma_per_frame, args.loss_weight, args.gamma_distribution, mean, std
    return Objective(args.path_type, args.c_schedule, args.c_a, b, args.c_lambda, *of_loss)


def check_frame_levels(args: argparse.Namespace) -> None:
    """Raises UserError if frames are to have levels of their own where no field can serve several levels at once."""
    if not args.gamma_per_frame:
        return
    wrong = {
        "--no-uncond, whose network sees one γ": not args.uncond,
        "--path-type VP, whose target has no bound at γ = 1": args.path_type == "VP",
        "--c-schedule constant, whose field does not vanish at γ = 1": args.c_schedule == "constant",
        "images: add --video": not args.video,
    }
    for what, is_so in wrong.items():
        if is_so:
            raise UserError(f"--gamma-per-frame does not work with {what}")
