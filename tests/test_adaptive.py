"""Samples stop where they should, and their batch stays full, on a field whose norms are known."""

import heapq
import math
from collections.abc import Callable, Sequence

import pytest
import torch

from runtime.random_numbers import sample_noise
from sampling.adaptive import Descent, Slots, evaluations_summary
from sampling.descent import (
    Finished,
    Watch,
    fixed_descents,
    gradient_descent,
    norm_alone,
    norm_and_energy,
    value_norms,
)

CPU = torch.device("cpu")
SHAPE = (2, 3)
THRESHOLD, STEPSIZE = 0.02, 0.1


def minimum(index: int) -> torch.Tensor:
    """Of a sample's quadratic energy: the further, the higher its index within ten."""
    return torch.full(SHAPE, 1.5 ** (index % 10))


class Quadratic:
    """The fields m − x of the quadratics ½‖x − m‖², and the batches that they were evaluated for."""

    def __init__(self):
        self.batches: list[list[int]] = []

    def of(self, y: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """Of samples whose classes are their indices."""
        indices = y.tolist()
        minima = torch.stack([minimum(i) for i in indices])

        def field(x: torch.Tensor) -> torch.Tensor:
            self.batches.append(indices)
            return minima - x

        return field


def starts(indices: Sequence[int]) -> torch.Tensor:
    return sample_noise(0, indices, SHAPE)


def slots_of(size: int, descent: Descent, quadratic: Quadratic, **settings: object) -> Slots:
    return Slots(quadratic.of, starts, torch.tensor, SHAPE, size, descent, CPU, **settings)


def descend(
    indices: Sequence[int],
    size: int,
    mu: float = 0.0,
    threshold: float = THRESHOLD,
    cap: int = 200,
    lag: int = 0,
    quadratic: Quadratic | None = None,
    **settings: object,
) -> dict[int, Finished]:
    descent = Descent(STEPSIZE, mu, cap, threshold)
    finished = list(slots_of(size, descent, quadratic or Quadratic(), lag=lag, **settings).run(indices))
    assert sorted(sample.index for sample in finished) == sorted(indices)
    return {sample.index: sample for sample in finished}


def norms(sample: Finished) -> list[float]:
    return [norm for (norm,) in sample.measured]


def expected_evaluations(index: int) -> int:
    """Without look-ahead the distance, which is the norm, shrinks by 1 − η a step."""
    distance = (starts([index])[0] - minimum(index)).square().mean().sqrt().item()
    return 1 + math.ceil(math.log(THRESHOLD / distance) / math.log(1 - STEPSIZE))


def test_the_norm_is_the_root_mean_square_whatever_the_size_and_type():
    value = torch.full((2, 3, 4), 0.5)
    value[1] = torch.tensor([3.0, 4.0, 0.0, 0.0])
    torch.testing.assert_close(value_norms(value.to(torch.bfloat16)), torch.tensor([0.5, 2.5]))


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_a_sample_stops_in_the_first_evaluation_whose_norm_is_below_the_threshold(lag):
    finished = descend(range(25), 4, lag=lag)
    for index, sample in finished.items():
        assert sample.evaluations == len(norms(sample)) == expected_evaluations(index)
        assert norms(sample)[-1] < THRESHOLD <= min(norms(sample)[:-1])
        # x is where the norm was taken, not a step further.
        distance = (minimum(index) - sample.x).square().mean().sqrt().item()
        assert distance == pytest.approx(norms(sample)[-1], rel=1e-2)
    assert len({sample.evaluations for sample in finished.values()}) > 10


@pytest.mark.parametrize("mu", [0.0, 0.3])
def test_a_sample_is_the_same_in_any_batch_and_order(mu):
    whole = descend(range(25), 25, mu)
    for other in (
        descend(range(25), 1, mu),
        descend(list(reversed(range(25))), 7, mu),
        descend(range(3, 25, 2), 4, mu),
    ):
        for index, sample in other.items():
            assert sample.evaluations == whole[index].evaluations
            assert norms(sample) == pytest.approx(norms(whole[index]), rel=1e-5)
            torch.testing.assert_close(sample.x, whole[index].x)


@pytest.mark.parametrize("mu", [0.0, 0.3])
def test_knowing_of_norms_later_changes_no_sample(mu):
    at_once = descend(range(25), 4, mu)
    for lag in (1, 5):
        for index, sample in descend(range(25), 4, mu, lag=lag).items():
            assert torch.equal(sample.x, at_once[index].x)
            assert norms(sample) == norms(at_once[index])


def test_a_refilled_slot_looks_ahead_from_its_own_start():
    """What the look-ahead would add of the sample before is large, since its steps are."""
    (alone,) = descend([0], 1, mu=0.9).values()
    behind = descend([9, 0], 1, mu=0.9)[0]
    assert norms(behind) == norms(alone)


def busy_steps(evaluations: Sequence[int], size: int) -> int:
    """Steps of a batch whose slots, as they come free, take the next sample at once."""
    ends = [0] * size
    for count in evaluations:
        heapq.heappush(ends, heapq.heappop(ends) + count)
    return max(ends)


@pytest.mark.parametrize("lag", [0, 1, 5])
def test_a_slot_is_filled_at_once_however_late_the_host_knows_of_it(lag):
    quadratic = Quadratic()
    finished = descend(range(25), 4, lag=lag, quadratic=quadratic)
    assert {len(batch) for batch in quadratic.batches} == {4}
    counts = [finished[index].evaluations for index in range(25)]
    assert len(quadratic.batches) == busy_steps(counts, 4) + lag
    assert busy_steps(counts, 4) < 0.75 * math.ceil(25 / 4) * max(counts)


def test_samples_that_stop_faster_than_the_host_knows_wait_and_lose_nothing():
    """With a threshold above all norms each stops at its start, and the queue is empty until the host hears of it."""
    finished = descend(range(25), 4, threshold=1e9, lag=3)
    assert {sample.evaluations for sample in finished.values()} == {1}
    for index, sample in finished.items():
        assert torch.equal(sample.x, starts([index])[0])


@pytest.mark.parametrize("shrinks", [False, True])
def test_slots_serve_one_run_after_another(shrinks):
    slots = slots_of(4, Descent(STEPSIZE, 0.3, 200, THRESHOLD), Quadratic(), shrinks=shrinks, lag=0 if shrinks else 2)
    right = descend(range(25), 4, 0.3)
    next(slots.run(range(25)))  # one that is left early
    for indices in (range(9), [3], range(8, 25)):
        finished = list(slots.run(indices))
        assert sorted(sample.index for sample in finished) == list(indices)
        for sample in finished:
            assert torch.equal(sample.x, right[sample.index].x)
            assert norms(sample) == norms(right[sample.index])


@pytest.mark.parametrize("mu", [0.0, 0.3])
@pytest.mark.parametrize("lag", [0, 1])
def test_a_threshold_that_is_never_reached_gives_the_samples_of_fixed_steps_to_the_bit(mu, lag):
    cap, quadratic = 30, Quadratic()

    def sample(indices: Sequence[int], x: torch.Tensor, steps: Sequence[int], watch: Watch) -> torch.Tensor:
        return gradient_descent(quadratic.of(torch.tensor(indices)), x, STEPSIZE, steps, mu, watch)

    batches = [range(4), range(4, 8)]
    groups = fixed_descents(sample, starts, torch.tensor, batches, cap, 8, lambda _: None)
    fixed = [x for group in groups for x in group]
    finished = descend(range(8), 4, mu, threshold=1e-30, cap=cap, lag=lag)
    for right in fixed:
        ours = finished[right.index]
        assert ours.evaluations == right.evaluations == cap
        assert torch.equal(ours.x, right.x)
        assert norms(ours) == norms(right)
        assert len(norms(right)) == cap


def test_fixed_steps_know_the_last_norm_and_all_of_those_that_are_traced():
    def sample(indices: Sequence[int], x: torch.Tensor, steps: Sequence[int], watch: Watch) -> torch.Tensor:
        return gradient_descent(Quadratic().of(torch.tensor(indices)), x, STEPSIZE, steps, 0.0, watch)

    seen = []
    (first, last) = fixed_descents(sample, starts, torch.tensor, [range(3), range(3, 5)], 7, 2, seen.append)
    assert [(each.index, len(norms(each))) for each in first] == [(0, 7), (1, 7), (2, 7)]
    assert [(each.index, len(norms(each))) for each in last] == [(3, 1), (4, 1)]
    for each in (*first, *last):
        distance = (starts([each.index])[0] - minimum(each.index)).square().mean().sqrt().item()
        assert norms(each)[-1] == pytest.approx(distance * 0.9**6, rel=1e-4)
    assert sum(seen) == 5 * 7


def test_fixed_steps_draw_the_next_starts_before_they_wait_for_the_device():
    events: list[object] = []

    def drawn(indices: Sequence[int]) -> torch.Tensor:
        events.append(list(indices))
        return starts(indices)

    def sample(indices: Sequence[int], x: torch.Tensor, steps: Sequence[int], watch: Watch) -> torch.Tensor:
        return gradient_descent(Quadratic().of(torch.tensor(indices)), x, STEPSIZE, steps, 0.0, watch)

    def measure(y: torch.Tensor, x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        events.append("read")
        return value_norms(value)[:, None]

    batches = [range(2), range(2, 4), range(4, 5)]
    assert len(list(fixed_descents(sample, drawn, torch.tensor, batches, 3, 0, lambda _: None, measure))) == 3
    assert events == [[0, 1], [2, 3], "read", [4, 4], "read", "read"]


@pytest.mark.parametrize("lag", [0, 1])
def test_what_is_measured_is_each_samples_own_whatever_slot_and_step_it_is_at(lag):
    def measure(y: torch.Tensor, x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch.cat([value_norms(value)[:, None], y[:, None], x.flatten(1)[:, :1]], dim=1)

    descent = Descent(STEPSIZE, 0.0, 200, THRESHOLD)
    for sample in slots_of(4, descent, Quadratic(), lag=lag, measure=measure).run(range(9)):
        norm, index, first = torch.tensor(sample.measured).T
        assert set(index.tolist()) == {sample.index}
        assert sample.final_norm == norm[-1] < THRESHOLD <= norm[:-1].min()
        start, end = starts([sample.index])[0, 0, 0], minimum(sample.index)[0, 0]
        torch.testing.assert_close(first, end + (start - end) * (1 - STEPSIZE) ** torch.arange(sample.evaluations))


def test_the_cap_ends_a_sample_that_is_not_there_yet():
    finished = descend(range(10), 3, cap=50)
    assert {index for index, sample in finished.items() if sample.evaluations == 50} == {
        index for index in range(10) if expected_evaluations(index) >= 50
    }
    assert 3 < sum(sample.evaluations == 50 for sample in finished.values()) < 10


@pytest.mark.parametrize("number", [0, 1, 3])
def test_a_batch_may_have_more_slots_than_there_are_samples(number):
    finished = descend(range(number), 8)
    assert {index: sample.evaluations for index, sample in finished.items()} == {
        index: expected_evaluations(index) for index in range(number)
    }


@pytest.mark.parametrize("lag", [0, 1])
def test_progress_comes_to_the_cap_for_each_sample(lag):
    seen = []
    descend(range(10), 3, cap=60, lag=lag, progress=seen.append)
    assert sum(seen) == 10 * 60
    assert len(seen) > 60


@pytest.mark.parametrize("mu", [0.0, 0.3])
def test_a_batch_that_may_shrink_makes_no_evaluation_that_does_not_count(mu):
    quadratic = Quadratic()
    finished = descend(range(25), 4, mu, quadratic=quadratic, shrinks=True)
    for index, sample in descend(range(25), 4, mu).items():
        assert torch.equal(finished[index].x, sample.x)
        assert norms(finished[index]) == norms(sample)
    assert sum(map(len, quadratic.batches)) == sum(sample.evaluations for sample in finished.values())
    assert {len(batch) for batch in quadratic.batches} == {1, 2, 3, 4}


@pytest.mark.slow
@pytest.mark.parametrize("measure", [norm_alone, norm_and_energy()], ids=["norm", "energy"])
@pytest.mark.parametrize("mu", [0.0, 0.3])
def test_compiled_slots_do_what_they_do_eagerly(mu, measure):
    minima = torch.stack([minimum(i) for i in range(25)])  # (25, …)

    def field_of(y: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: minima[y] - x

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    descent, right = Descent(STEPSIZE, mu, 60, THRESHOLD), descend(range(25), 4, mu, cap=60, measure=measure)
    slots = Slots(field_of, starts, torch.tensor, SHAPE, 4, descent, CPU, measure=measure, compiled=True, lag=2)
    assert sorted(sample.index for sample in slots.run(range(25))) == list(range(25))
    for sample in slots.run(range(25)):
        torch.testing.assert_close(sample.x, right[sample.index].x)
        assert sample.evaluations == right[sample.index].evaluations
        ours, expected = (torch.tensor(each.measured) for each in (sample, right[sample.index]))
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]


def test_starts_are_not_written_to():
    given, descent = starts(range(3)), Descent(STEPSIZE, 0.3, 50, 1e9)
    before = given.clone()
    slots = Slots(
        Quadratic().of, lambda indices: given[indices[0] : indices[-1] + 1], torch.tensor, SHAPE, 2, descent, CPU
    )
    list(slots.run(range(3)))
    assert torch.equal(given, before)


def test_the_summary_says_how_evaluations_are_distributed_and_what_was_saved():
    assert evaluations_summary([90, 110, 200, 250, 100], 250) == (
        "evaluations a sample: mean 150, median 110, from 90 to 250; 1 of 5 came to the cap of 250;"
        " 40% fewer than fixed steps"
    )
