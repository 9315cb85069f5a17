"""What the commands share: one-line errors, flags, checked numbers."""

import argparse
import errno
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from runtime import environment
from runtime.errors import UserError, first_line, is_lost_process, is_out_of_memory, shown
from runtime.size import MAX_SIDE, WANTED, ImageSize, parse_size
from runtime.streams import lost_output, make_output_lossy

# Seconds that a rank other than 0 waits before it prints an error. If every rank meets the same error, rank 0 prints
# it, and torchrun ends the others within this time.
OTHER_RANKS_WAIT_S = 10
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # which writing alone meets
READER_GONE = 141  # the exit status of tools that print into a pipe that nobody reads any more
# What is larger is a typing error, and would end in a hang or without memory.
MAX_PROCESSES = 1024
MAX_COUNT = 10_000_000  # of samples, classes or updates that take memory each
MAX_INT = 2**31 - 1  # of steps or epochs; products of two such numbers fit into 64 bits
MAX_SEED = 2**63 - 1
LEAST_FLOAT, MAX_FLOAT = 1e-38, 1e38  # what is smaller is 0 in fp32, and what is larger infinite
SHOWN_LETTERS = 60  # of a value that is refused


def fail(message: str, status: int = 1) -> NoReturn:
    """Prints one line on stderr, once for all ranks, and exits."""
    if not environment.speaks():
        time.sleep(OTHER_RANKS_WAIT_S)
    # Not print: a progress bar may stand on the line.
    tqdm.write(shown(f"{Path(sys.argv[0]).name}: error: {message}"), file=sys.stderr)
    sys.exit(status)


def run(main: Callable[[], None], out_of_memory_advice: str, only_prints: bool = False) -> None:
    """Runs a command. Turns an error that people can mend into one line and an exit status other than 0.

    Output that cannot be written ends no command. One that `only_prints`, and makes no file, ends as other tools do:
    quietly if the reader of a pipe has gone, and else with an error.
    """
    make_output_lossy()
    try:
        main()
        if only_prints and (lost := lost_output()):
            if isinstance(lost, BrokenPipeError):
                sys.exit(READER_GONE)
            raise UserError(f"the output cannot be written: {lost.strerror}")
    except UserError as error:
        fail(str(error))
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        fail(f"{error.filename or 'a file'} cannot be written: {error.strerror}")
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


class OneOrMore(argparse.Action):
    """For nargs="+": one value as it is, and several different ones as a tuple in ascending order."""

    def __call__(self, parser: argparse.ArgumentParser, flags: object, values: list, name: str | None = None) -> None:
        different = tuple(sorted(set(values)))
        setattr(flags, self.dest, different if len(different) > 1 else different[0])


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


def given(text: str) -> str:
    """An argparse type for a text that may not be empty, as one from a variable that is not set is."""
    if not text:
        raise argparse.ArgumentTypeError("'' is empty: is a variable not set?")
    return text


def path(text: str) -> Path:
    """An argparse type for a path. An empty text would be the current folder, and a system has a longest path."""
    try:
        os.stat(given(text))  # noqa: PTH116
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise argparse.ArgumentTypeError(f"{text[:SHOWN_LETTERS]}… is too long for a path") from None
    return Path(text)


def checked(convert: Callable[[str], float], accepts: Callable[[float], bool], wants: str) -> Callable:
    """An argparse type that converts a text to a number and refuses a number that is not what it `wants`."""

    def parse(text: str) -> float:
        try:
            value = convert(text)
        except ValueError:  # Python refuses to convert thousands of digits too
            value = math.nan
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"{seen(text)!r} is not {wants}")
        return value

    return parse


def seen(text: str) -> str:
    """A text that is refused, for a message."""
    return text if len(text) <= SHOWN_LETTERS else f"{text[:SHOWN_LETTERS]}…"


def size(text: str) -> ImageSize:
    """An argparse type for the size of a picture: a side, or height and width as 64x96."""
    try:
        return parse_size(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{seen(text)!r} is not {WANTED}") from None


def whole(least: int, most: int) -> Callable:
    """An argparse type for a whole number in a range, which includes both ends."""
    return checked(int, lambda v: least <= v <= most, f"a whole number from {least} to {most}")


positive_int = whole(1, MAX_INT)
non_negative_int = whole(0, MAX_INT)
count = whole(1, MAX_COUNT)
side = whole(1, MAX_SIDE)
seed = whole(0, MAX_SEED)
processes = whole(1, MAX_PROCESSES)
loading_processes = whole(0, MAX_PROCESSES)
frame_rate = checked(float, lambda v: 0.01 <= v <= 1000, "a number from 0.01 to 1000")
number = checked(float, lambda v: abs(v) <= MAX_FLOAT, "a number that fp32 can hold")
stretch = checked(float, lambda v: 1 <= v <= 16, "a number from 1 to 16")
positive_float = checked(float, lambda v: LEAST_FLOAT <= v <= MAX_FLOAT, "a number above 0 that fp32 can hold")
non_negative_float = checked(float, lambda v: 0 <= v <= MAX_FLOAT, "a number from 0 on that fp32 can hold")
fraction = checked(float, lambda v: 0 <= v < 1, "a number from 0 up to, but not including, 1")
