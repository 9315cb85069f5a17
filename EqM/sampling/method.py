"""How samples descend, as the flags say."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from objective import LEFT, Objective
from runtime import cli
from runtime.errors import UserError
from sampling.descent import MU, STEPS, STEPSIZE
from sampling.stepsizes import PLANNED_STEPS, PlannedSteps, plan_steps, shares_of_noise

SAMPLERS = ("gd", "ngd", "euler")
AUTO = "auto"
DEFAULT = (
    f"{AUTO} up to {PLANNED_STEPS} steps, then {STEPSIZE}, or what leaves {LEFT:.1%}% of the noise, if that is more"
)


@dataclass(frozen=True)
class Method:
    """A way to sample.

    Attributes:
        sampler: one of SAMPLERS: gradient descent, the same with a look-ahead, or Euler's steps over time.
        stepsize: η, along the field (gd, ngd).
        mu: look-ahead (ngd).
        planned: the steps, planned ahead: they take the place of `stepsize` and `mu`.
        steps: updates of a sample; with a threshold, at most so many.
        threshold: a sample stops if the norm of its field falls below it. None: after `steps`.
        cfg_scale: guidance; 1 is none.
        guided_channels: guidance changes so many of the first channels. None: all.
    """

    sampler: str = "ngd"
    stepsize: float = STEPSIZE
    mu: float = MU
    steps: int = STEPS
    threshold: float | None = None
    cfg_scale: float = 1.0
    guided_channels: int | None = None
    planned: PlannedSteps | None = None

    @property
    def look_ahead(self) -> float:
        """μ of the sampler in use; 0 if it does not look ahead."""
        return self.mu if self.sampler == "ngd" else 0.0

    def shares(self, objective: Objective) -> Sequence[float]:
        """The share of noise, 1 − γ, before each step of gradient descent from noise, and after the last."""
        if self.planned:
            return self.planned.shares
        return shares_of_noise(objective, [self.stepsize] * self.steps, self.look_ahead)

    @property
    def step_settings(self) -> dict[str, object]:
        """Step size and look-ahead, as the table of samples shows them."""
        if self.planned:
            return {"stepsize": self.step_text, "mu": AUTO if self.planned.mu is None else self.planned.mu}
        return {"stepsize": self.stepsize if self.sampler != "euler" else "", "mu": self.look_ahead}

    @property
    def step_text(self) -> str:
        """The step size, or the first and the last one of a plan, for people."""
        return f"{AUTO}: {self.planned}" if self.planned else f"{self.stepsize:.4g}"


def stepsize(text: str) -> float | str:
    """An argparse type for a step size: a number, or `auto`, which plans each step."""
    try:
        return AUTO if text == AUTO else cli.positive_float(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, nor {AUTO}") from None


def add_method_args(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that choose a Method."""
    group = parser.add_argument_group("method")
    group.add_argument(
        "--sampler",
        choices=SAMPLERS,
        help="gd: gradient descent; ngd: with Nesterov's look-ahead; euler: integrates over time;"
        " default ngd, with --published sit euler",
    )
    group.add_argument("--stepsize", type=stepsize, help=f"along the field (gd, ngd), or {AUTO}; default {DEFAULT}")
    group.add_argument("--mu", type=cli.fraction, help=f"look-ahead (ngd); default {MU}, or half a step with {AUTO}")
    group.add_argument("--num-sampling-steps", type=cli.count, default=STEPS, help="updates of a sample")
    group.add_argument(
        "--adaptive",
        type=cli.positive_float,
        metavar="G",
        help="a sample stops when the norm of its field (root mean square over its elements) falls below G, and"
        " after --num-sampling-steps at the latest",
    )
    group.add_argument("--cfg-scale", type=cli.non_negative_float, default=1.0, help="guidance; 1: none")
    group.add_argument(
        "--cfg-channels",
        choices=("all", "3"),
        default="all",
        help="channels that guidance changes; 3: the first three, as for the published scores",
    )


def check_method(args: argparse.Namespace) -> None:
    """Raises UserError if a flag has no meaning for the sampler."""
    if args.stepsize == AUTO and args.sampler == "euler":
        raise UserError(f"--stepsize {AUTO} plans gradient descent, and --sampler euler has no step size: drop one")
    if args.stepsize == AUTO and args.adaptive:
        raise UserError(f"--stepsize {AUTO} plans all steps, and --adaptive stops before the last: drop one")
    if args.sampler == "euler" and args.adaptive:
        raise UserError("--adaptive stops gradient descent, and --sampler euler takes its steps over time: drop one")


def default_stepsize(objective: Objective, steps: int) -> float:
    """The published step size, or the least one that leaves at most LEFT of the noise, if that is larger."""
    return max(STEPSIZE, objective.least_stepsize(steps)) if objective.path == "Linear" else STEPSIZE


def steps_planned(
    asked: float | str | None, objective: Objective, steps: int, mu: float | None, first: float = 1.0
) -> PlannedSteps | None:
    """The planned steps of gradient descent. None: they all have one size.

    Args:
        asked: a step size, `auto`, or None: planned up to PLANNED_STEPS steps, on the Linear path.
        mu: look-ahead; None: half a step.
        first: the share of noise in the start.

    Raises:
        UserError: `auto` on another path.
    """
    if asked == AUTO and objective.path != "Linear":
        raise UserError(
            f"--stepsize {AUTO} is known for --path-type Linear alone, and the network was trained with"
            f" {objective.path}: give a number"
        )
    few = asked is None and steps <= PLANNED_STEPS and objective.path == "Linear"
    return plan_steps(objective, steps, mu, first) if asked == AUTO or few else None


def method_of(args: argparse.Namespace, objective: Objective, first: float = 1.0, one_class: bool = True) -> Method:
    """The method that the flags choose, for a network that was trained with this objective.

    Args:
        first: the share of noise in the start.
        one_class: each sample follows the field of one class, and no sum of fields.

    Raises:
        UserError: --stepsize auto has no meaning for the network, or for a sum.
    """
    if args.stepsize == AUTO and not one_class:
        raise UserError(f"--stepsize {AUTO} plans the field of one class, and --compose has a sum: give a number")
    sampler, steps = args.sampler or "ngd", args.num_sampling_steps
    plans = sampler != "euler" and args.adaptive is None and one_class
    number = args.stepsize if isinstance(args.stepsize, float) else default_stepsize(objective, steps)
    return Method(
        sampler=sampler,
        stepsize=number,
        mu=MU if args.mu is None else args.mu,
        steps=steps,
        threshold=args.adaptive,
        cfg_scale=args.cfg_scale,
        guided_channels=None if args.cfg_channels == "all" else int(args.cfg_channels),
        planned=steps_planned(args.stepsize, objective, steps, args.mu if sampler == "ngd" else 0.0, first)
        if plans
        else None,
    )
