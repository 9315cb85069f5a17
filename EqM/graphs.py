"""CUDA graphs: all kernels of a step are launched at once.

A function that cannot be recorded runs as it is, on every rank, and one warning says why. Nothing here changes what is
computed.
"""

import math
import weakref
from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from compiled import attempt, free_from_capture

# Calls before a recording: they choose kernels, and allocate tensors that stay.
WARMUP_CALLS = 3


def replayed(function: Callable[..., Tensor], fast: bool, device: torch.device) -> Callable[..., Tensor]:
    """The function, as `Graphed` if it is to be fast on a GPU."""
    return Graphed(function) if fast and device.type == "cuda" else function


class Graphed:
    """A function of tensors on the GPU, recorded as CUDA graphs and replayed: one graph for each set of shapes.

    The first calls run as they are, and the next one is recorded. The function must not wait for the device. It must
    keep on the device whatever changes from call to call. The next call overwrites what it returns. The graphs share
    one memory, since none of them runs while another does.

    Args:
        function: from tensors to a tensor.
        generator: the function draws its random numbers from it, if it draws any.
        clean_up: is called if a recording breaks off within the function.
        together: all ranks make the same calls. Either all of them replay, or none.
        kinds: how many sets of shapes are to come. Nothing is recorded before all of them have run as they are, and the
            largest is recorded first. Else calls that run as they are would take memory beside that of the graphs.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        generator: torch.Generator | None = None,
        clean_up: Callable[[], None] = lambda: None,
        together: bool = False,
        kinds: int = 1,
    ):
        self.function, self.generator, self.clean_up, self.together = function, generator, clean_up, together
        self.kinds = kinds
        self.calls: Counter[tuple] = Counter()
        self.recordings: dict[tuple, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}
        # At an exit too: a group of ranks whose exchange a graph holds would wait for the graph's end for ever.
        weakref.finalize(self, self.recordings.clear)
        self.works = True

    def __call__(self, *inputs: Tensor) -> Tensor:
        shapes = tuple(value.shape for value in inputs)
        if shapes not in self.recordings:
            self.calls[shapes] += 1
            if not self.works or not self.is_due(shapes):
                return self.function(*inputs)
            problem = "running without CUDA graphs: the step cannot be captured"
            self.works = attempt(partial(self.record, shapes, inputs), problem, self.together)
            if not self.works:
                self.recordings.pop(shapes, None)  # it may have worked here, and not on another rank
                return self.function(*inputs)
        graph, own_inputs, output = self.recordings[shapes]
        for own, value in zip(own_inputs, inputs, strict=True):
            own.copy_(value)
        graph.replay()
        return output

    def is_due(self, shapes: tuple) -> bool:
        """Whether the call with these shapes, which is counted already, is to be recorded."""
        warm = [each for each, calls in self.calls.items() if calls >= WARMUP_CALLS]
        if self.calls[shapes] <= WARMUP_CALLS or len(warm) < self.kinds:
            return False
        largest = max(warm, key=lambda each: sum(map(math.prod, each)))
        return self.kinds == 1 or bool(self.recordings) or shapes == largest

    def record(self, shapes: tuple, inputs: tuple[Tensor, ...]) -> None:
        own_inputs = [value.clone() for value in inputs]
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        generators = [torch.cuda.default_generators[stream.device_index]]
        if self.generator:
            graph.register_generator_state(self.generator)
            generators.append(self.generator)
        states = [generator.get_state() for generator in generators]
        pool = next((other.pool() for other, _, _ in self.recordings.values()), None)
        try:
            # Other threads, as the loader's that pins memory, go on calling CUDA meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                output = self.function(*own_inputs)
        except Exception:
            for generator, state in zip(generators, states, strict=True):
                free_from_capture(generator, state)
            self.clean_up()
            raise
        self.recordings[shapes] = graph, own_inputs, output
