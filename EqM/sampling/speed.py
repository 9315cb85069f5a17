"""How a network is run for sampling: eagerly, replayed as CUDA graphs, or compiled as well.

A graph launches all kernels of an evaluation at once, compiled or not. So on a GPU it always pays. Compiling makes
fewer kernels, which read and write less, and takes some seconds first. It pays if all evaluations together save more.
The constants here are estimates, counted from the code of a block or rounded from single runs. They decide only how
long sampling takes.
"""

from compiled import COMPILED, EAGER, GRAPHS, Speed
from models import EqM
from runtime.logs import log

# Estimates: seconds to compile a block and the last layer, or the gradient of an explicit energy as a whole.
COMPILE_S, ENERGY_COMPILE_S = 6.0, 40.0
# Estimates for one block: compiling saves so many kernels, and reads or writes tokens (N, L, D) so many times less. A
# LayerNorm, its shift and its scale become one kernel, and so do a gate and its sum.
KERNELS_SAVED, PASSES_SAVED = 9, 14
ENERGY_FACTOR = 3  # an estimate: the gradient of an energy takes so many times the kernels and passes
KERNEL_S = 3e-6  # an estimate: seconds of a small kernel in a graph
BYTES_A_SECOND = 2e12  # an estimate: what a GPU reads and writes


def seconds_saved(network: EqM, rows: int) -> float:
    """An estimate of the seconds that compiling saves of one evaluation of so many samples on a GPU."""
    weight = network.final_layer.linear.weight
    passed = rows * network.num_tokens * weight.shape[1] * weight.element_size()  # bytes
    block = KERNELS_SAVED * KERNEL_S + PASSES_SAVED * passed / BYTES_A_SECOND
    return len(network.blocks) * block * (1 if network.energy == "none" else ENERGY_FACTOR)


def choose_speed(asked: Speed | None, device_type: str, network: EqM, rows: int, evaluations: int) -> Speed:
    """The way to run a network, with one line in the log that says which and why, if it is for a GPU to choose.

    Args:
        asked: what flags say; None: it is chosen.
        rows: samples that the network sees at once, with guidance and sums.
        evaluations: of the network, for all batches of a rank; at most so many.
    """
    if asked or device_type != "cuda":
        return asked or EAGER
    saved = seconds_saved(network, rows) * evaluations
    needed = COMPILE_S if network.energy == "none" else ENERGY_COMPILE_S
    estimate = f"it would save about {saved:.2g} s of {evaluations:,} evaluations, and take about {needed:g} s"
    if saved > needed:
        log.info("CUDA graphs of a compiled network, because %s (--graphs: do not compile)", estimate)
        return COMPILED
    log.info("CUDA graphs without compiling, because %s (--compile: compile)", estimate)
    return GRAPHS
