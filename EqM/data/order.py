"""The order in which training sees samples, and the form of the clips of a batch."""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from torch.utils.data import Sampler

FORM = 5  # in a seed: keeps the draws of lengths and intervals apart from others


class EpochStream(Sampler[list[tuple[int, int]]]):
    """This rank's batches of keys (epoch, index), from position `first` of an endless shuffled stream.

    (seed, epoch) decides the order of the whole set in an epoch. Epochs follow without a gap: a batch may span several.
    The global batches are the same for any number of ranks.
    """

    def __init__(
        self, num_items: int, global_batch: int, num_batches: int, seed: int, first: int, rank: int, ranks: int
    ):
        self.num_items, self.num_batches, self.first, self.seed = num_items, num_batches, first, seed
        self.global_batch, self.per_rank, self.rank = global_batch, global_batch // ranks, rank
        self.order = lru_cache(maxsize=2)(self.shuffled)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in range(self.num_batches):
            start = self.first + batch * self.global_batch + self.rank * self.per_rank
            yield [self.key(position) for position in range(start, start + self.per_rank)]

    def key(self, position: int) -> tuple[int, int]:
        epoch, within = divmod(position, self.num_items)
        return epoch, int(self.order(epoch)[within])

    def shuffled(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(self.num_items)


class MixedStream(Sampler[list[tuple[int, int, int, int]]]):
    """The batches of a stream, with one clip length and one interval each: keys (epoch, index, clip length, interval).

    (seed, samples drawn before) alone decides both. So they are the same on all ranks, and in a run that goes on.
    """

    def __init__(self, stream: EpochStream, lengths: Sequence[int], intervals: Sequence[int]):
        self.stream, self.lengths, self.intervals = stream, lengths, intervals

    def __len__(self) -> int:
        return len(self.stream)

    def __iter__(self) -> Iterator[list[tuple[int, int, int, int]]]:
        for number, keys in enumerate(self.stream):
            drawn = self.drawn_at(self.stream.first + number * self.stream.global_batch)
            yield [(*key, *drawn) for key in keys]

    def drawn_at(self, drawn_before: int) -> tuple[int, int]:
        """Length and interval of the batch that begins after so many samples. All are equally likely."""
        rng = np.random.default_rng((self.stream.seed, drawn_before, FORM))
        return self.lengths[rng.integers(len(self.lengths))], self.intervals[rng.integers(len(self.intervals))]
