"""What the commands share: one-line errors, flags, checked numbers."""

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from runtime import environment
from runtime.errors import UserError, first_line, is_lost_process, is_out_of_memory

# Seconds that a rank other than 0 waits before it prints an error. If every rank meets the same error, rank 0 prints
# it, and torchrun ends the others within this time.
OTHER_RANKS_WAIT_S = 10
MAX_SIDE = 16_384  # pixels or frames; more is a typing error
TOO_LARGE = 2**63  # neither a seed nor the size of a tensor can be so large


def fail(message: str, status: int = 1) -> NoReturn:
    """Prints one line on stderr, once for all ranks, and exits."""
    if not environment.speaks():
        time.sleep(OTHER_RANKS_WAIT_S)
    # Not print: a progress bar may stand on the line.
    tqdm.write(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(status)


def run(main: Callable[[], None], out_of_memory_advice: str) -> None:
    """Runs a command. Turns an error that people can mend into one line and an exit status other than 0."""
    try:
        main()
    except UserError as error:
        fail(str(error))
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            fail(f"out of memory: {out_of_memory_advice}")
        if is_lost_process(error):
            time.sleep(2 * OTHER_RANKS_WAIT_S)  # the failed rank prints first, and torchrun ends this one
            fail(f"the exchange with the other processes failed: {first_line(error)}")
        raise


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default unless it is None or False."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse with one-line errors, defaults in the help, and no abbreviated flags."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (--help lists the flags)", status=2)

    def new_run_defaults(self) -> dict:
        """A new run's defaults of the flags of `add_kept`, by name."""
        return {action.dest: action.new_run_default for action in self._actions if hasattr(action, "new_run_default")}


def add_kept(group: argparse._ActionsContainer, flag: str, default: object = None, **settings: object) -> None:
    """Adds a flag that checkpoints keep.

    argparse's default is None. If the flag is not given, a resumed run takes the checkpoint's value, and a new run
    takes `default`.
    """
    if default is not None and default is not False:
        settings["help"] = f"{settings['help']}; default {flag if default is True else default}"
    group.add_argument(flag, default=None, **settings).new_run_default = default


def settled(given: dict, kept: dict, defaults: dict) -> dict:
    """All flags by name. A given value comes before the checkpoint's, and that before a new run's default."""
    known = defaults | {name: value for name, value in kept.items() if value is not None}
    return given | {name: known[name] for name in defaults if given[name] is None}


def checked(convert: Callable[[str], float], accepts: Callable[[float], bool], wants: str) -> Callable:
    """An argparse type that converts a text to a number and refuses a number that is not what it `wants`."""

    def parse(text: str) -> float:
        try:
            value = convert(text)
        except ValueError:
            value = math.nan
        if not (accepts(value) and abs(value) < math.inf):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wants}")
        return value

    return parse


positive_int = checked(int, lambda v: 0 < v < TOO_LARGE, "a whole number above 0 and below 2^63")
non_negative_int = checked(int, lambda v: 0 <= v < TOO_LARGE, "a whole number from 0 up to, but not including, 2^63")
side = checked(int, lambda v: 0 < v <= MAX_SIDE, f"a whole number from 1 to {MAX_SIDE}")
frame_rate = checked(float, lambda v: 0.01 <= v <= 1000, "a number from 0.01 to 1000")
positive_float = checked(float, lambda v: v > 0, "a number above 0")
non_negative_float = checked(float, lambda v: v >= 0, "a number, 0 or more")
fraction = checked(float, lambda v: 0 <= v < 1, "a number from 0 up to, but not including, 1")
