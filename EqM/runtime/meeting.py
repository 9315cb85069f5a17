"""Where ranks meet before the first exchange: who is missing, and how long the others wait."""

import logging
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta

import torch.distributed as dist

from runtime import environment
from runtime.environment import Place
from runtime.errors import UserError, first_line

PATIENCE_S = 300  # for ranks that start at other moments, on machines of other speeds
QUIET_S = 10  # of waiting, before the log says so
POLL_S = 0.1


def meet(place: Place) -> dist.Store:
    """The store through which the ranks find one another, once all of them are there.

    Raises:
        UserError: nobody answers at the place's address, another process has this rank, or ranks are missing.
    """
    here, end = f"{place.address}:{place.port}", time.monotonic() + PATIENCE_S
    hosts = place.rank == 0 and not place.launcher_listens
    if not hosts:
        host = "the launcher" if place.launcher_listens else "rank 0"
        wait_for(lambda: [] if answers(place) else [host], here, end)
    connected: Future[dist.TCPStore] = Future()
    # In a thread: if another program listens there, torch waits for its answer for ever.
    threading.Thread(target=connect, args=(place, hosts, connected), daemon=True).start()
    try:
        wait_for(lambda: [] if connected.done() else ["an answer"], here, end)
        # When a launcher restarts all ranks, its store still holds the addresses of the ended ones.
        store = dist.PrefixStore(f"start{environment.restarts()}", connected.result())
        if store.add(f"rank {place.rank}", 1) > 1:
            raise UserError(f"another process at {here} has RANK={place.rank} too: {environment.ADVICE}")
        names = [f"rank {rank}" for rank in range(place.ranks)]
        wait_for(lambda: [] if store.check(names) else [name for name in names if not store.check([name])], here, end)
    except dist.DistError as error:
        reason = first_line(error)
        raise UserError(f"the {place.ranks} processes cannot meet at {here}: {reason}; {environment.ADVICE}") from None
    return store


def connect(place: Place, hosts: bool, connected: Future) -> None:
    """Opens the store of all ranks, and puts it, or the error, into the future."""
    patience = timedelta(seconds=PATIENCE_S)
    try:
        store = dist.TCPStore(place.address, place.port, place.ranks, hosts, patience, False, multi_tenant=True)
        connected.set_result(store)
    except dist.DistError as error:
        connected.set_exception(error)


def answers(place: Place) -> bool:
    """True if a process listens where the ranks meet."""
    try:
        socket.create_connection((place.address, place.port), timeout=5).close()
    except OSError:
        return False
    return True


def wait_for(missing: Callable[[], list[str]], where: str, end: float) -> None:
    """Waits until nobody is missing. Asks again and again in Python, so that Ctrl-C gets through.

    Raises:
        UserError: somebody is still missing at `end`, in seconds of time.monotonic.
    """
    speak = time.monotonic() + QUIET_S
    while names := missing():
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        if time.monotonic() > end:
            waited = f"within {PATIENCE_S / 60:.1f} minutes"
            raise UserError(f"{shown} did not come to {where} {waited}: {environment.ADVICE}")
        if time.monotonic() > speak:
            speak = end
            minutes = (end - time.monotonic()) / 60
            logging.getLogger("EqM").warning(
                "waiting for %s at %s, for at most %.1f more minutes", shown, where, minutes
            )
        time.sleep(POLL_S)
