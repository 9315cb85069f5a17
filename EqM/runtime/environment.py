"""What a launcher such as torchrun tells this process, in environment variables. They are read here alone.

This module imports nothing that takes time: `interrupts` needs it before torch is there.
"""

import os
from dataclasses import dataclass

# Nobody sets these for one process alone. MASTER_ADDR, MASTER_PORT and those of Slurm often stay set.
PLACE = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
MEETING = ("MASTER_ADDR", "MASTER_PORT")
COUNTS = ("LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")
ADVICE = "if WORLD_SIZE, RANK and LOCAL_RANK are left over from another job, unset them; else start all with torchrun"


@dataclass(frozen=True)
class Place:
    """This process among those that a launcher started.

    Attributes:
        rank, ranks: its number, and how many there are.
        local_rank: its number on its machine.
        address, port: where the ranks meet, if there are several.
        launcher_listens: the launcher answers there; else rank 0 does.
    """

    rank: int = 0
    ranks: int = 1
    local_rank: int = 0
    address: str = ""
    port: int = 0
    launcher_listens: bool = False


def is_launched() -> bool:
    """True if a launcher started this process, or left its variables behind."""
    return any(name in os.environ for name in PLACE)


def place() -> Place:
    """The place that the variables give this process. Without them, it is alone.

    Raises:
        ValueError: they cannot be right.
    """
    given = {name: os.environ[name] for name in (*PLACE, *MEETING, *COUNTS) if name in os.environ}
    try:
        ranks, rank, local_rank, *_ = (number(name) for name in (*PLACE, *COUNTS))
        port = number("MASTER_PORT") if ranks > 1 else 0
    except ValueError as error:
        raise wrong(given, str(error)) from None
    if not is_launched():
        return Place()
    needed = ("WORLD_SIZE", "RANK", *MEETING) if ranks > 1 else ("WORLD_SIZE", "RANK")
    if missing := [name for name in needed if not given.get(name)]:
        raise wrong(given, f"without {missing[0]}")
    if max(rank, local_rank) >= ranks or port >= 2**16:
        raise wrong(given, "which cannot be right")
    listens = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Place(rank, ranks, local_rank, given.get("MASTER_ADDR", ""), port, listens)


def wrong(given: dict[str, str], why: str) -> ValueError:
    """The error that names the variables, and says what to do."""
    return ValueError(
        f"the environment has {' '.join(f'{name}={text!r}' for name, text in given.items())}, {why}: {ADVICE}"
    )


def number(name: str, default: int = 0) -> int:
    """The number in a variable, or the default if it is not set. Raises ValueError if it holds something else."""
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise ValueError(f"where {name} is no number")
    return int(text)


def local_ranks() -> int:
    """How many ranks share this machine."""
    return max(1, number("LOCAL_WORLD_SIZE", 1))


def restarts() -> int:
    """How often torchrun has restarted all ranks because one had ended."""
    return number("TORCHELASTIC_RESTART_COUNT")


def speaks() -> bool:
    """True if this process prints what every rank would print: rank 0, and one whose variables cannot be right."""
    try:
        return place().rank == 0
    except ValueError:
        return True
