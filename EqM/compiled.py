"""The fast way to run a network: its blocks compiled, and whole calls replayed as CUDA graphs.

A small network's step on a GPU is spent launching kernels. Compilation makes them fewer, and a
graph launches all of them at once. What cannot be compiled or captured runs eagerly instead, on
every rank, with one warning that says why. Nothing here changes what is computed.
"""

import argparse
import gc
import time
from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
import torch._functorch.config as functorch_config
from torch import Tensor

from models import EqM
from runtime import distributed
from runtime.errors import is_out_of_memory
from runtime.logs import log

# Of what a block would keep for going backward: below 1, GELU and LayerNorms are computed again, which
# takes 6 of 17 activations' memory away for 2% of the time.
MEMORY_BUDGET = 0.8
# Calls before a capture: kernels are compiled and chosen, and lasting tensors allocated.
WARMUP_CALLS = 3
# DistributedDataParallel rebuilds its buckets and times itself in its first ten.
WARMUP_CALLS_DISTRIBUTED = 11


def add_compile_arg(parser: argparse._ActionsContainer) -> None:
    """Adds --compile and --no-compile."""
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="compiled network and CUDA graphs; default on a GPU"
    )


def is_fast(args: argparse.Namespace, device: torch.device) -> bool:
    """What --compile says; by default only on a GPU: on a CPU a minute's wait gains 1.1 to 1.3 times the speed."""
    return device.type == "cuda" if args.compile is None else args.compile


def replayed(function: Callable[..., Tensor], fast: bool, device: torch.device) -> Callable[..., Tensor]:
    """The function, as `Graphed` where it is to be fast on a GPU."""
    return Graphed(function) if fast and device.type == "cuda" else function


def compile_network(network: EqM, batch: int, training: bool, seconds_per_frame: float = 0.1) -> None:
    """Compiles the network's repeated parts, in place, for batches of one size; of an explicit energy all of it.

    One block stands for all, so that the wait does not grow with depth. It is tried at once:
    forward and, for training, backward.
    """
    energy = network.energy != "none"
    log.info("compiling the network: the first step waits for this, %s", "some minutes" if energy else "up to a minute")
    start = time.perf_counter()
    functorch_config.activation_memory_budget = 1 if energy else MEMORY_BUDGET
    trial = partial(try_out_energy, seconds_per_frame=seconds_per_frame) if energy else try_out
    # What an earlier network left behind would hide that this one cannot be compiled.
    torch._dynamo.config.suppress_errors = False
    torch.compiler.set_stance("default")
    if attempt(partial(trial, network, batch, training), "running eagerly: the network cannot be compiled", training):
        log.info("compiled in %.0f s", time.perf_counter() - start)
        torch._dynamo.config.suppress_errors = True  # what must be compiled again for other inputs may run eagerly
    else:
        torch.compiler.set_stance("force_eager")
    # The compiler leaves hundreds of thousands of objects behind. To look through them for garbage takes Python a third
    # of a second now and then, for which a small network's GPU would wait: from now on it spares them.
    gc.unfreeze()  # of an earlier network
    gc.collect()
    gc.freeze()


def try_out(network: EqM, batch: int, training: bool) -> None:
    """Has the parts compiled at their first call, and calls one of each kind, on zeros; leaves no gradients."""
    for part in (*network.blocks, network.final_layer):
        part.compile(dynamic=False)
    weight = network.final_layer.linear.weight
    width = weight.shape[1]
    with torch.set_grad_enabled(training):
        tokens = weight.new_zeros(batch, network.num_tokens, width, requires_grad=training)  # (N, L, D)
        for part, parts in ((network.blocks[0], 6), (network.final_layer, 2)):
            modulation = weight.new_zeros(batch, parts * width, requires_grad=training)
            out = part(tokens, modulation)
            if training:
                used = [tokens, modulation, *(w for name, w in part.named_parameters() if "adaLN" not in name)]
                torch.autograd.grad(out, used, torch.ones_like(out))


def try_out_energy(network: EqM, batch: int, training: bool, seconds_per_frame: float) -> None:
    """Has the gradient of the energy compiled at its first call, as one function, and calls it; leaves no gradients.

    A block compiled alone has a first derivative and no second: only within one function does the
    compiler see both.
    """
    # It would cut the function between the gradient and what it is the gradient of.
    torch._dynamo.config.optimize_ddp = False
    network.field_and_tokens = torch.compile(network.field_and_tokens, fullgraph=True, dynamic=False)
    device = network.pos_embed.device
    x, gamma = torch.zeros(batch, *network.input_shape, device=device), torch.zeros(batch, device=device)
    # Of the kinds that training and sampling give, since another kind would be compiled again.
    seconds = torch.full_like(gamma, seconds_per_frame) if training else seconds_per_frame
    with torch.set_grad_enabled(training):
        blocks, final = network.modulations(gamma, torch.zeros_like(gamma, dtype=torch.long))
        field = network.field(x, blocks if training else torch.stack(blocks), final, seconds)
        if training:
            used = [weight for weight in network.parameters() if weight.requires_grad]
            torch.autograd.grad(field, used, torch.ones_like(field))


def attempt(function: Callable[[], None], consequence: str, together: bool) -> bool:
    """Calls the function, and returns whether it worked: if not, warns of the consequence and says why.

    Args:
        together: all ranks call this, and it works on none if it fails on one.

    Raises:
        Exception: memory ran out, which eager execution would not mend.
    """
    problem = ""
    try:
        function()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        problem = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    problems = [problem for problem in (distributed.gather(problem) if together else [problem]) if problem]
    if problems:
        log.warning("%s: %s", consequence, problems[0])
    return not problems


class Graphed:
    """A function of tensors on the GPU, recorded as CUDA graphs, one for each set of shapes, and replayed.

    The first calls run as they are, the next one is recorded. The function must not wait for the
    device, and must keep on the device whatever changes from call to call. What it returns is
    overwritten by the next call.

    Args:
        function: from tensors to a tensor.
        generator: where the function's random numbers come from, if it draws any.
        clean_up: called where recording broke off within the function.
        together: all ranks make the same calls, and replay either on all or on none.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        generator: torch.Generator | None = None,
        clean_up: Callable[[], None] = lambda: None,
        together: bool = False,
    ):
        self.function, self.generator, self.clean_up, self.together = function, generator, clean_up, together
        self.calls: Counter[tuple] = Counter()
        self.recordings: dict[tuple, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}
        self.warmup_calls = WARMUP_CALLS_DISTRIBUTED if distributed.is_group() else WARMUP_CALLS
        self.works = True

    def __call__(self, *inputs: Tensor) -> Tensor:
        shapes = tuple(value.shape for value in inputs)
        if shapes not in self.recordings:
            self.calls[shapes] += 1
            if not self.works or self.calls[shapes] <= self.warmup_calls:
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

    def record(self, shapes: tuple, inputs: tuple[Tensor, ...]) -> None:
        own_inputs = [value.clone() for value in inputs]
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        generators = [torch.cuda.default_generators[stream.device_index]]
        if self.generator:
            graph.register_generator_state(self.generator)
            generators.append(self.generator)
        states = [generator.get_state() for generator in generators]
        try:
            # Other threads, as the loader's that pins memory, go on calling CUDA meanwhile.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                output = self.function(*own_inputs)
        except Exception:
            # A generator whose capture broke off would wait for its end for ever.
            for generator, state in zip(generators, states, strict=True):
                generator.graphsafe_set_state(torch.Generator(generator.device).graphsafe_get_state())
                generator.set_state(state)
            self.clean_up()
            raise
        self.recordings[shapes] = graph, own_inputs, output
