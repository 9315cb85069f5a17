"""How often a run logs, saves and shows samples, and when it ends."""

import argparse
import math
from dataclasses import astuple, dataclass
from pathlib import Path

from runtime import cli


@dataclass(frozen=True)
class Due:
    """What to do after a step. It is false if there is nothing to do."""

    evaluate: bool
    log: bool
    save: bool
    show: bool
    end: bool
    stop: bool

    def __bool__(self) -> bool:
        return any(astuple(self))


@dataclass(frozen=True)
class RunOptions:
    """How often a run logs, saves and shows samples, and when it ends.

    Attributes:
        log_every, ckpt_every: steps between log lines and between checkpoints.
        sample_every: steps between previews; None: no previews.
        eval_every: steps between held-out losses; None: there are none.
        keep_best: the checkpoint with the lowest held-out loss is kept too.
        keep: how many checkpoints to keep, the newest ones; None: all.
        max_minutes: the run ends at its first log line after this time.
        max_bad_steps: the run ends if gradients are not finite in this many steps in a row (fp32 and bf16).
        last_step: the run ends at this step.
    """

    log_every: int
    ckpt_every: int
    sample_every: int | None
    keep: int | None
    max_minutes: float
    max_bad_steps: int
    last_step: float
    eval_every: int | None = None
    keep_best: bool = False

    def due_at(self, step: int, asked: bool) -> Due:
        """What to do after this step. `asked`: the run was asked to stop."""
        evaluate = self.eval_every is not None and (step % self.eval_every == 0 or step >= self.last_step)
        return Due(
            evaluate=evaluate,
            log=step == 1 or step % self.log_every == 0 or evaluate,
            save=step % self.ckpt_every == 0,
            show=self.sample_every is not None and step % self.sample_every == 0,
            end=step >= self.last_step,
            stop=asked,
        )


def add_run_args(parser: argparse._ActionsContainer) -> None:
    """Adds flags for where a run writes, how often, and what ends it early."""
    parser.add_argument("--results-dir", type=cli.path, default=Path("results"), help="gets the run folders")
    parser.add_argument("--log-every", type=cli.positive_int, default=100, help="steps between log lines")
    parser.add_argument("--ckpt-every", type=cli.positive_int, default=1000, help="steps between checkpoints")
    parser.add_argument("--keep", type=cli.positive_int, help="number of newest checkpoints to keep; default all")
    parser.add_argument("--max-minutes", type=cli.positive_float, help="stop at the first log line after this time")
    bad = "stop if gradients are not finite in this many steps in a row (fp32, bf16)"
    parser.add_argument("--max-bad-steps", type=cli.positive_int, default=20, help=bad)


def run_options_of(args: argparse.Namespace, last_step: float) -> RunOptions:
    """The options that the flags ask for."""
    return RunOptions(
        args.log_every,
        args.ckpt_every,
        args.sample_every,
        args.keep,
        args.max_minutes or math.inf,
        args.max_bad_steps,
        last_step,
        args.eval_every if args.eval_path else None,
        args.keep_best,
    )
