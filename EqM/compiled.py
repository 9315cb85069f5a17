"""Compiled networks, and every call into a private part of torch.

A small network's step on a GPU is spent launching kernels. Compilation makes fewer kernels. A network that cannot be
compiled runs eagerly, on every rank, and one warning says why. Nothing here changes what is computed.
"""

import argparse
import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from models import EqM
from runtime import distributed
from runtime.errors import first_line, is_out_of_memory
from runtime.logs import log

T = TypeVar("T")
# The share of a block's activations that it keeps for the backward pass. Below 1 the compiler computes GELU and
# LayerNorm again: that frees 6 of 17 activations for 2% of the time.
MEMORY_BUDGET = 0.8
VERSIONS = 8  # of a compiled function, as torch allows by itself


@dataclass(frozen=True)
class Speed:
    """How a network is run.

    Attributes:
        fast: its work is for one batch size. A GPU replays it as CUDA graphs.
        compiled: torch.compile makes its kernels. Only with `fast`.
    """

    fast: bool = False
    compiled: bool = False


EAGER, GRAPHS, COMPILED = Speed(), Speed(fast=True), Speed(fast=True, compiled=True)


def add_speed_args(parser: argparse._ActionsContainer, default: str = "on a GPU") -> None:
    """Adds --compile, --no-compile and --graphs. The help says what the default is."""
    group = parser.add_mutually_exclusive_group()
    text = f"compile the network, and replay CUDA graphs; default: {default}"
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, help=text)
    group.add_argument("--graphs", action="store_true", help="on a GPU CUDA graphs alone: no wait for the compiler")


def asked_speed_of(args: argparse.Namespace) -> Speed | None:
    """What --compile, --no-compile and --graphs say; None without them."""
    if args.graphs:
        return GRAPHS
    return None if args.compile is None else COMPILED if args.compile else EAGER


def speed_of(args: argparse.Namespace, device_type: str) -> Speed:
    """What the flags say, or the default."""
    return asked_speed_of(args) or default_speed(device_type)


def default_speed(device_type: str) -> Speed:
    """The speed of many steps. On a CPU it is eager: a minute's wait gains 1.1 to 1.3 times the speed."""
    return COMPILED if device_type == "cuda" else EAGER


def compile_network(
    network: EqM, batch: int, training: bool, seconds_per_frame: float = 0.1, frames: Sequence[int] = ()
) -> bool:
    """Compiles a network in place, for batches of one size, and returns whether that worked.

    If not, it runs eagerly, and a warning says why.

    The repeated block is compiled once for all blocks, so that the wait does not grow with depth. A network with an
    explicit energy is compiled as a whole. The compiled parts are tried at once: forward and, for training, backward.

    Args:
        frames: of the clips, if there are several lengths. Each is compiled.
    """
    energy = network.energy != "none"
    log.info("compiling the network: the first step waits for this, %s", "some minutes" if energy else "up to a minute")
    start = time.perf_counter()
    forget_failures(memory_budget=1 if energy else MEMORY_BUDGET)
    allow_versions(len(frames))
    trial = partial(try_out_energy, seconds_per_frame=seconds_per_frame) if energy else try_out
    sizes = [(count, *network.input_shape[-2:]) for count in frames] or [network.input_shape[1:]]
    consequence = "running eagerly: the network cannot be compiled"
    if attempt(partial(trial, network, batch, training, sizes), consequence, training):
        log.info("compiled in %.0f s", time.perf_counter() - start)
        warn_of_later_failures(network)
        return True
    torch.compiler.set_stance("force_eager")
    return False


def try_out(network: EqM, batch: int, training: bool, sizes: Sequence[tuple[int, ...]]) -> None:
    """Compiles the parts, and calls one of each kind on zeros, for samples of each size. Leaves no gradients."""
    for part in (*network.blocks, network.final_layer):
        part.compile(dynamic=False, fullgraph=True)
    for size in sizes:
        try_out_parts(network, batch, training, network.grid_of(torch.empty(1, 1, *size, device="meta")))


def try_out_parts(network: EqM, batch: int, training: bool, grid: tuple[int, int, int]) -> None:
    """Calls a block and the last layer on zeros, as for samples whose tokens have this grid."""
    weight = network.final_layer.linear.weight
    width = weight.shape[1]
    with torch.set_grad_enabled(training):
        tokens = weight.new_zeros(batch, math.prod(grid), width, requires_grad=training)  # (N, L, D)
        # The same shape as in training and sampling: for another one the block would be compiled again.
        seconds = torch.zeros(batch if training else 1, device=network.device)
        rotation = network.rotation(grid, seconds) if network.positions == "rotary" else None
        for part, parts, more in ((network.blocks[0], 6, (rotation,)), (network.final_layer, 2, ())):
            modulation = weight.new_zeros(batch, parts * width, requires_grad=training)  # (N, parts·D)
            out = part(tokens, modulation, *more)
            if training:
                used = [tokens, modulation, *(w for name, w in part.named_parameters() if "adaLN" not in name)]
                torch.autograd.grad(out, used, torch.ones_like(out))


def try_out_energy(
    network: EqM, batch: int, training: bool, sizes: Sequence[tuple[int, ...]], seconds_per_frame: float
) -> None:
    """Compiles the gradient of the energy as one function, and calls it for each size. Leaves no gradients.

    A block that is compiled alone has a first derivative and no second one. Only within one function does the
    compiler see both.
    """
    network.field_and_tokens = torch.compile(network.field_and_tokens, fullgraph=True, dynamic=False)
    gamma = torch.zeros(batch, device=network.device)
    # The same kinds of arguments as in training and sampling: others would be compiled again.
    seconds = torch.full_like(gamma, seconds_per_frame) if training else seconds_per_frame
    for size in sizes:
        x = torch.zeros(batch, network.in_channels, *size, device=network.device)  # (N, C, …)
        with torch.set_grad_enabled(training):
            blocks, final = network.modulations(gamma, torch.zeros_like(gamma, dtype=torch.long))
            field = network.field(x, blocks if training else torch.stack(blocks), final, seconds)
            if training:
                used = [weight for weight in network.parameters() if weight.requires_grad]
                torch.autograd.grad(field, used, torch.ones_like(field))


def attempt(function: Callable[[], None], consequence: str, together: bool) -> bool:
    """Calls the function, and returns whether it worked. If not, warns of the consequence and says why.

    Args:
        together: all ranks call this, and it works on none if it fails on one.

    Raises:
        Exception: memory ran out. Eager execution does not mend that.
    """
    problem = ""
    try:
        function()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        problem = f"{type(error).__name__}: {first_line(error)}"
    problems = [problem for problem in (distributed.gather(problem) if together else [problem]) if problem]
    if problems:
        log.warning("%s: %s", consequence, problems[0])
    return not problems


def compiled_or_eager(function: Callable[..., T], eager: Callable[..., T] | None = None) -> Callable[..., T]:
    """The function, compiled at its first call; if it cannot be compiled, `eager` or itself, and a warning says why."""
    return eager_with_a_warning(torch.compile(function, fullgraph=True, dynamic=False), eager or function)


def freeze_garbage_collector() -> None:
    """Has Python's garbage collector spare all objects that there are now.

    The compiler leaves hundreds of thousands of objects behind. To look through them takes a third of a second now
    and then, and a small network's GPU waits meanwhile. A command calls this once its network is compiled.
    """
    gc.unfreeze()  # the objects of an earlier network
    gc.collect()
    gc.freeze()


# Private parts of torch. Each stands behind a function here, and tests/test_private_torch.py has a test for each.


def forget_failures(memory_budget: float) -> None:
    """Makes the next compilation start afresh: an earlier failure would hide that this network cannot be compiled.

    Sets also how much of a block is kept for the backward pass. Noticed by
    test_a_smaller_memory_budget_keeps_fewer_activations.
    """
    import torch._functorch.config as functorch_config

    functorch_config.activation_memory_budget = memory_budget
    torch.compiler.set_stance("default")


def allow_versions(count: int) -> None:
    """Lets a function be compiled for so many sizes of its inputs, and for some other reasons beside.

    Noticed by test_a_function_is_compiled_for_as_many_sizes_as_asked.
    """
    torch._dynamo.config.recompile_limit = VERSIONS + count


def warn_of_later_failures(network: EqM) -> None:
    """Has a part that must be compiled again later, and cannot be, run eagerly with a warning.

    Noticed by test_a_compilation_that_fails_later_is_said.
    """
    for part in (*network.blocks, network.final_layer):
        if part._compiled_call_impl:
            part._compiled_call_impl = eager_with_a_warning(part._compiled_call_impl, part._call_impl)
    if "field_and_tokens" in vars(network):  # of an explicit energy
        eager = partial(type(network).field_and_tokens, network)
        network.field_and_tokens = eager_with_a_warning(network.field_and_tokens, eager)


def eager_with_a_warning(compiled: Callable[..., T], eager: Callable[..., T]) -> Callable[..., T]:
    """The compiled function; once it cannot be compiled for some inputs, the eager one, and a warning says why."""
    failed = False

    def call(*inputs: object) -> T:
        nonlocal failed
        if failed:
            return eager(*inputs)
        try:
            return compiled(*inputs)
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            failed = True
            log.warning("a part of the step runs eagerly, because it cannot be compiled: %s", first_line(error))
            return eager(*inputs)

    return call


def forget_compiled() -> None:
    """Frees what was compiled, so that another network starts afresh. Noticed by test_compiled_code_is_forgotten."""
    gc.unfreeze()
    gc.collect()
    torch._dynamo.reset()


def free_from_capture(generator: torch.Generator, state: Tensor) -> None:
    """Frees a generator whose capture broke off, and sets its state: it would wait for the capture's end for ever.

    Noticed by test_a_generator_is_free_again_after_a_capture_that_broke_off, on a GPU.
    """
    generator.graphsafe_set_state(torch.Generator(generator.device).graphsafe_get_state())
    generator.set_state(state)


def fused_adamw_(
    weights: list[Tensor],
    gradients: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    lr: Tensor,
    betas: tuple[float, float],
    epsilon: float,
    step: Tensor,
    divisor: Tensor,
    skip: Tensor,
) -> None:
    """AdamW's update of flat float32 tensors in place, by one call of torch's kernel, with gradients / divisor.

    `step` counts from 1. If the bool `skip` is true nothing changes, and the host does not wait to know. Noticed by
    test_the_fused_update_is_that_of_torchs_optimizer.
    """
    state = weights, gradients, exp_avg, exp_avg_sq, [], [step.float()] * len(weights)
    constants = {"beta1": betas[0], "beta2": betas[1], "weight_decay": 0.0, "eps": epsilon}
    switches = {"amsgrad": False, "maximize": False, "grad_scale": divisor, "found_inf": skip.float()}
    torch._fused_adamw_(*state, lr=lr, **constants, **switches)


def forget_half_step(scaler: torch.amp.GradScaler) -> None:
    """Has a scaler forget that it began a step. Noticed by test_a_scaler_forgets_a_step_that_broke_off."""
    if scaler.is_enabled():
        scaler._per_optimizer_states.clear()


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copies many tensors, converting their types, in one kernel. Noticed by test_many_tensors_are_copied_at_once."""
    torch._foreach_copy_(targets, sources)
