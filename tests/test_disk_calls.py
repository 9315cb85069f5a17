"""Names and times of files are asked for one after another, and in threads once the disk makes them wait."""

import itertools
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from data import disk_calls
from data.disk_calls import AHEAD, TOGETHER, DiskCalls
from data.index import stats_of
from data.scan import find_files

WAIT_S = 0.03  # of a call that waits: the fourth has waited for more than PATIENCE_S in all


@pytest.fixture
def take(monkeypatch) -> Callable[[float, float], None]:
    """Lets a call take so many seconds of work and of waiting, on clocks that nothing else moves."""
    now = SimpleNamespace(wall=0.0, worked=0.0)

    def pass_by(worked: float, waited: float) -> None:
        now.wall += worked + waited
        now.worked += worked

    clocks = SimpleNamespace(perf_counter=lambda: now.wall, thread_time=lambda: now.worked)
    monkeypatch.setattr(disk_calls, "time", clocks)
    return pass_by


def in_callers_thread(item: object = None) -> bool:
    return threading.current_thread() is threading.main_thread()


@pytest.mark.parametrize(
    ("worked", "waited"),
    [
        pytest.param(0.01, 0.0, id="it never waits"),
        pytest.param(0.01, 0.009, id="it waits for less than half of the time"),
        pytest.param(0.0, 0.0009, id="it waits for less than a tenth of a second in all"),
    ],
)
def test_calls_stay_in_the_callers_thread_while_the_disk_answers_at_once(take, worked, waited):
    def call(item: int) -> bool:
        take(worked, waited)
        return in_callers_thread()

    with DiskCalls() as calls:
        assert all(calls.map(call, range(100)))


def test_calls_go_over_to_threads_when_they_have_waited_and_never_back(take):
    def call(item: int) -> bool:
        take(*((0, WAIT_S) if item < 4 else (1, 0)))
        return in_callers_thread()

    with DiskCalls() as calls:
        assert list(calls.map(call, range(100))) == [True] * 4 + [False] * 96
        assert not any(calls.map(call, range(100)))


def test_what_calls_waited_counts_over_several_rounds(take):
    def call(item: int) -> bool:
        take(0, WAIT_S)
        return in_callers_thread()

    with DiskCalls() as calls:
        assert [list(calls.map(call, [i])) for i in range(6)] == [[True]] * 4 + [[False]] * 2


def test_calls_that_wait_take_much_less_than_one_after_another_and_keep_their_order():
    def call(item: int) -> int:
        time.sleep(0.04 if item % 5 == 0 else 0.01)
        return -item

    start = time.perf_counter()
    with DiskCalls() as calls:
        assert list(calls.map(call, range(200))) == [-item for item in range(200)]
    assert time.perf_counter() - start < 1.6, "one after another takes 3.2 s"


def test_short_calls_are_made_together_and_give_one_result_each(take):
    def call(item: int) -> tuple[int, bool]:
        take(0, WAIT_S)
        return -item, in_callers_thread()

    with DiskCalls() as calls:
        results, callers = zip(*calls.map_short(call, range(1000)), strict=True)
    assert results == tuple(-item for item in range(1000))
    assert list(callers) == [True] * TOGETHER + [False] * (1000 - TOGETHER)


@pytest.mark.parametrize(
    ("waited", "count"),
    [
        pytest.param(0, 60, id="in the caller's thread"),
        pytest.param(WAIT_S, 60, id="in threads, when all calls have begun"),
        pytest.param(WAIT_S, 200, id="in threads, while calls begin"),
    ],
)
def test_an_error_comes_in_the_place_of_its_result(take, waited, count):
    def call(item: int) -> int:
        take(0, waited)
        if item == 50:
            raise ValueError("item 50")
        return item

    got = []
    with pytest.raises(ValueError, match="item 50"), DiskCalls() as calls:
        for result in calls.map(call, range(count)):
            got.append(result)
    assert got == list(range(50))


def test_items_are_taken_only_a_little_ahead_of_results(take):
    def call(item: int) -> int:
        take(0, WAIT_S)
        return item

    before, items = threading.active_count(), itertools.count()
    with DiskCalls() as calls:
        results = calls.map(call, items)
        assert [next(results) for _ in range(100)] == list(range(100))
        assert next(items) <= 100 + AHEAD
        assert threading.active_count() > before
    assert threading.active_count() == before


@pytest.fixture
def late(monkeypatch) -> Callable[[str, float], list[bool]]:
    """Lets a function of `os` answer so many seconds late. Returns which of its calls the main thread makes."""

    def patch(name: str, seconds: float) -> list[bool]:
        function, callers = getattr(os, name), []

        def call(*path: object, **more: object) -> object:
            callers.append(in_callers_thread())
            time.sleep(seconds)
            return function(*path, **more)

        monkeypatch.setattr(os, name, call)
        return callers

    return patch


def look(root: Path) -> tuple:
    """What a start asks of a disk."""
    listing = find_files(root, video=False)
    return listing.classes, listing.samples, stats_of(listing.paths).tolist()


def test_a_slow_disk_is_asked_in_threads_and_the_same_is_found(tmp_path, late):
    for name in map(str, range(1000)):
        folder = tmp_path / name[-1] / name[-2:]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.jpg").write_bytes(b"x" * int(name))
    at_once = look(tmp_path)
    for callers in (late("scandir", 0.005), late("stat", 0.001)):
        assert look(tmp_path) == at_once
        assert 0 < sum(callers) < len(callers) / 4


def test_a_slow_disk_is_asked_in_threads_where_links_lead(tmp_path, late):
    folder, elsewhere = tmp_path / "data" / "cat", tmp_path / "elsewhere"
    for path in (folder, elsewhere):
        path.mkdir(parents=True)
    for i in range(800):
        (elsewhere / f"{i}.jpg").touch()
        (folder / f"{i}.jpg").symlink_to(elsewhere / f"{i % 700}.jpg" if i > 1 else "nowhere")
    at_once = find_files(folder.parent, video=False)
    callers = late("stat", 0.001)
    found = find_files(folder.parent, video=False)
    assert found.samples == at_once.samples
    assert found.notes == at_once.notes
    assert len(found.samples) == 700 + 2  # links that lead nowhere are found too
    assert 0 < sum(callers) < len(callers) / 4
