"""How samples descend, as the flags say."""

import argparse
from dataclasses import dataclass

from objective import LEFT, Objective
from runtime import cli
from runtime.errors import UserError
from sampling.descent import MU, STEPS, STEPSIZE

SAMPLERS = ("gd", "ngd", "euler")
DEFAULT = f"{STEPSIZE}, or what leaves {LEFT:.1%}% of the noise after the steps, if that is more"


@dataclass(frozen=True)
class Method:
    """A way to sample.

    Attributes:
        sampler: one of SAMPLERS: gradient descent, the same with a look-ahead, or Euler's steps over time.
        stepsize: η, along the field (gd, ngd).
        mu: look-ahead (ngd).
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

    @property
    def look_ahead(self) -> float:
        """μ of the sampler in use; 0 if it does not look ahead."""
        return self.mu if self.sampler == "ngd" else 0.0


def add_method_args(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that choose a Method."""
    group = parser.add_argument_group("method")
    group.add_argument(
        "--sampler",
        choices=SAMPLERS,
        help="gd: gradient descent; ngd: with Nesterov's look-ahead; euler: integrates over time;"
        " default ngd, with --published sit euler",
    )
    group.add_argument("--stepsize", type=cli.positive_float, help=f"along the field (gd, ngd); default {DEFAULT}")
    group.add_argument("--mu", type=cli.fraction, default=MU, help="look-ahead (ngd)")
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
    if args.sampler == "euler" and args.adaptive:
        raise UserError("--adaptive stops gradient descent, and --sampler euler takes its steps over time: drop one")


def default_stepsize(objective: Objective, steps: int) -> float:
    """The published step size, or the least one that leaves at most LEFT of the noise, if that is larger."""
    return max(STEPSIZE, objective.least_stepsize(steps)) if objective.path == "Linear" else STEPSIZE


def method_of(args: argparse.Namespace, objective: Objective) -> Method:
    """The method that the flags choose, for a network that was trained with this objective."""
    return Method(
        sampler=args.sampler or "ngd",
        stepsize=args.stepsize or default_stepsize(objective, args.num_sampling_steps),
        mu=args.mu,
        steps=args.num_sampling_steps,
        threshold=args.adaptive,
        cfg_scale=args.cfg_scale,
        guided_channels=None if args.cfg_channels == "all" else int(args.cfg_channels),
    )
