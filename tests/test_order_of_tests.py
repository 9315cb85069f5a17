"""A test finds the same, whichever tests came before it in its process."""

import pytest
import torch


@pytest.fixture(scope="module")
def seed_of_an_earlier_test() -> None:
    """Leaves a seed behind, as an earlier test may. Fixtures of a module come before those of each test."""
    torch.manual_seed(0)


def test_what_a_test_draws_does_not_follow_from_an_earlier_test(seed_of_an_earlier_test):
    assert torch.rand(1) != torch.rand(1, generator=torch.Generator().manual_seed(0))
