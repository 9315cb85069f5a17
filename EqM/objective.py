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

from energy import ENERGIES
from runtime import cli
from runtime.errors import UserError
from runtime.plain_data import one_of

LABEL_DROPOUT = 0.1
LEFT = 0.005  # of the noise, at the end of a descent
PATHS = ("Linear", "GVP", "VP")
SCHEDULES = ("truncated", "linear", "piecewise", "constant")
DISPERSION_WEIGHT = 0.5
# β of VP at its two ends, the noise variance added per unit of time (Song et al. 2021, arXiv 2011.13456).
VP_LEAST, VP_MOST = 0.1, 20.0
# The least 1 − γ that VP uses, since at 0 the derivative of σ is infinite. torch.rand gives no number closer to 1.
VP_LEAST_TIME = 2.0**-24
BETWEEN = cli.checked(float, lambda v: 0 < v < 1, "a number between 0 and 1")
SHARE = cli.checked(float, lambda v: 0 <= v <= 1, "a number from 0 to 1")


@dataclass(frozen=True)
class Objective:
    """The path from noise to data, the magnitude c(γ) of the field along it, and the dispersive term.

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
    """

    path: Annotated[str, one_of(PATHS)] = "Linear"
    schedule: Annotated[str, one_of(SCHEDULES)] = "truncated"
    a: Annotated[float, BETWEEN] = 0.8
    b: Annotated[float, cli.positive_float] = 1.0
    scale: Annotated[float, cli.positive_float] = 4.0
    dispersion: Annotated[float, cli.non_negative_float] = 0.0
    by_frame: Annotated[float, SHARE] = 0.0

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
        """(1 − γ)/c(γ) on the Linear path, also at γ = 1: (N,) → (N,)."""
        if self.schedule == "linear":
            return torch.ones_like(gamma) / self.scale
        if self.schedule == "constant":
            return (1 - gamma) / self.scale
        if self.schedule == "truncated":
            return (1 - gamma).clamp(min=1 - self.a) / self.scale
        before = (1 - gamma) / (self.b - (self.b - 1) * gamma / self.a)  # (N,)
        return torch.where(gamma <= self.a, before, 1 - self.a) / self.scale

    def loss(
        self,
        field: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]],
        x: Tensor,
        noise: Tensor,
        gamma: Tensor,
    ) -> Tensor:
        """Mean squared error of the field at x_γ, plus the dispersive term: a float32 scalar.

        Args:
            field: (x_γ, γ) ↦ (f, tokens). f has x's shape and any precision. tokens are the last block's, (N, …);
                only the dispersive term uses them.
            x, noise: data and standard normal noise, (N, …).
            gamma: (N,), or (N, T) of the frames of clips, in [0, 1].
        """
        prediction, tokens = field(self.interpolate(x, noise, gamma), gamma)
        error = (prediction.float() - self.target(x, noise, gamma)).square().mean()
        return error + self.dispersion * crowding(tokens) if self.dispersion else error


def coefficients(path: str, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """α and σ of x_γ = α·x + σ·ε: (N,) → (N,), (N,)."""
    if path == "Linear":
        return gamma, 1 - gamma
    if path == "GVP":
        return (gamma * (math.pi / 2)).sin(), (gamma * (math.pi / 2)).cos()
    log_alpha, _ = vp_log_alpha(gamma)
    # 1 − α² of a float32 α would be 0 well before γ = 1.
    return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()


def derivatives(path: str, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """dα/dγ and dσ/dγ: (N,) → (N,), (N,)."""
    if path == "Linear":
        return torch.ones_like(gamma), -torch.ones_like(gamma)
    alpha, sigma = coefficients(path, gamma)
    if path == "GVP":
        return sigma * (math.pi / 2), -alpha * (math.pi / 2)
    _, slope = vp_log_alpha(gamma)
    return alpha * slope, -alpha.square() * slope / sigma  # from σ² = 1 − α²


def vp_log_alpha(gamma: Tensor) -> tuple[Tensor, Tensor]:
    """ln α of the variance-preserving path, and its derivative in γ: (N,) → (N,), (N,)."""
    left = (1 - gamma).clamp(min=VP_LEAST_TIME)
    rise = VP_MOST - VP_LEAST
    return -rise / 4 * left.square() - VP_LEAST / 2 * left, rise / 2 * left + VP_LEAST / 2


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


def drop_labels(y: Tensor, uniform: Tensor, null_class: int) -> Tensor:
    """Replaces labels by the null class where the uniform draw is below LABEL_DROPOUT: y, uniform (N,)."""
    return torch.where(uniform < LABEL_DROPOUT, null_class, y)


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
    cli.add_kept(
        group,
        "--predict",
        "field",
        choices=("field", "clip"),
        help="what the network puts out; clip: the clip without noise, which serves tokens as wide as the network, with"
        " --c-schedule linear (then its default)",
    )
    by_frame = "share of the clips in which each token's time has its own noise level γ, and in half of which the first"
    by_frame += " frames are clean: for --keep-frames and --frames of sample_gd.py"
    cli.add_kept(group, "--gamma-per-frame", 0.0, type=SHARE, metavar="SHARE", help=by_frame)
    cli.add_kept(group, "--ebm", "none", choices=ENERGIES, help="the field is the gradient of this energy")
    cli.add_kept(
        group,
        "--uncond",
        True,
        action=argparse.BooleanOptionalAction,
        help="hide γ from the network; one that sees γ cannot be sampled by gradient descent",
    )


def objective_of(args: argparse.Namespace) -> Objective:
    """The objective that the flags ask for.

    Raises:
        UserError: --c-b is missing, or has no meaning; or the network cannot put out the clip, or have γ by frame.
    """
    check_frame_levels(args)
    if args.predict == "clip":
        wrong = {"--c-schedule": (args.c_schedule, "linear"), "--path-type": (args.path_type, "Linear")}
        for flag, (value, needed) in (wrong | {"--ebm": (args.ebm, "none")}).items():
            if value != needed:
                raise UserError(f"--predict clip needs {flag} {needed}, and it is {value}: change one of them")
    if (args.c_schedule == "piecewise") != (args.c_b is not None):
        asks = "needs --c-b, c/λ at γ = 0: add it" if args.c_b is None else "has no use for --c-b: leave it out"
        raise UserError(f"--c-schedule {args.c_schedule} {asks}")
    b = 1.0 if args.c_b is None else args.c_b
    dispersion = DISPERSION_WEIGHT if args.disp else 0.0
    numbers = args.c_a, b, args.c_lambda, dispersion, args.gamma_per_frame
    return Objective(args.path_type, args.c_schedule, *numbers)


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
