"""The private parts of torch that compiled.py uses still do what it needs them for."""

import logging

import pytest
import torch
from torch import Tensor, nn

import compiled
from compiled import (
    copy_all,
    eager_with_a_warning,
    forget_compiled,
    forget_failures,
    forget_half_step,
    free_from_capture,
    fused_adamw_,
    warn_of_later_failures,
)
from models import EqM

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=on_gpu)]


def new_network() -> EqM:
    torch.manual_seed(0)
    return EqM(8, 4, 3, hidden_size=32, depth=1, num_heads=2, num_classes=4)


@pytest.mark.parametrize("device", DEVICES)
def test_the_fused_update_is_that_of_torchs_optimizer(device: str) -> None:
    torch.manual_seed(0)
    weights = nn.Parameter(torch.randn(100, device=device))
    optimizer = torch.optim.AdamW([weights], 1e-2, weight_decay=0)
    ours, divisor = [weights.detach().clone(), *torch.zeros(2, 100, device=device)], torch.tensor(4.0, device=device)
    for step, is_bad in ((1, False), (2, False), (3, True), (3, False)):
        gradients = torch.full((100,), torch.nan, device=device) if is_bad else torch.randn(100, device=device)
        before = [tensor.clone() for tensor in ours]
        tensors = (list(tensor.split([30, 70])) for tensor in (ours[0], gradients * 4, *ours[1:]))
        numbers = torch.tensor(1e-2, device=device), (0.9, 0.999), 1e-8, torch.tensor(step, device=device)
        fused_adamw_(*tensors, *numbers, divisor, torch.tensor(is_bad, device=device))
        if is_bad:
            assert all(torch.equal(a, b) for a, b in zip(before, ours, strict=True))
            continue
        weights.grad = gradients
        optimizer.step()
        state = optimizer.state[weights]
        for own, right in zip(ours, (weights, state["exp_avg"], state["exp_avg_sq"]), strict=True):
            torch.testing.assert_close(own, right.detach(), atol=1e-6, rtol=1e-5)


def test_a_scaler_forgets_a_step_that_broke_off() -> None:
    weights = nn.Parameter(torch.ones(2))
    optimizer, scaler = torch.optim.SGD([weights], 0.1), torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(weights.sum()).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.unscale_(optimizer)
    forget_half_step(scaler)
    weights.grad = None
    scaler.scale(weights.sum()).backward()
    scaler.unscale_(optimizer)
    assert weights.grad.tolist() == [1.0, 1.0]
    forget_half_step(torch.amp.GradScaler("cpu", enabled=False))  # it has begun nothing


@pytest.mark.parametrize("device", DEVICES)
def test_many_tensors_are_copied_at_once(device: str) -> None:
    sources = [torch.randn(n, device=device, dtype=torch.bfloat16) for n in (1, 5, 7)]
    targets = [torch.zeros(n, device=device) for n in (1, 5, 7)]
    copy_all(targets, sources)
    assert all(torch.equal(target, source.float()) for target, source in zip(targets, sources, strict=True))


class Broken(nn.Module):
    """A part that the compiler takes only for two samples."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and len(x) != 2:
            torch._dynamo.graph_break("not for so many samples")
        return x + 1


def test_a_compilation_that_fails_later_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="EqM")
    network = new_network()
    network.blocks = nn.ModuleList([Broken()])
    forget_compiled()
    network.blocks[0].compile(dynamic=False, fullgraph=True, backend="eager")
    warn_of_later_failures(network)
    assert network.blocks[0](torch.zeros(2, 3)).tolist() == [[1.0] * 3] * 2
    assert not caplog.records
    for _ in range(2):
        assert network.blocks[0](torch.zeros(5, 3)).tolist() == [[1.0] * 3] * 5
    (record,) = caplog.records
    assert "runs eagerly, because it cannot be compiled: " in record.message


def test_an_error_of_the_function_itself_is_not_taken_for_the_compilers() -> None:
    def wrong(x: Tensor) -> Tensor:
        raise ValueError("wrong shape")

    with pytest.raises(ValueError, match="wrong shape"):
        eager_with_a_warning(wrong, lambda x: x)(torch.zeros(1))


def test_compiled_code_is_forgotten() -> None:
    calls = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> object:
        calls.append(graph)
        return graph.forward

    function = torch.compile(lambda x: x * 2, backend=backend)
    function(torch.ones(3))
    function(torch.ones(3))
    assert len(calls) == 1
    forget_compiled()
    function(torch.ones(3))
    assert len(calls) == 2


@pytest.mark.slow
def test_a_smaller_memory_budget_keeps_fewer_activations() -> None:
    kept = []
    for budget in (1.0, 0.3):
        forget_compiled()
        forget_failures(budget)
        block = new_network().blocks[0]
        block.compile(dynamic=False)
        sizes = []
        x, modulation = torch.randn(4, 4, 32, requires_grad=True), torch.randn(4, 192, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            block(x, modulation)
        kept.append(sum(sizes))
    assert kept[1] < kept[0]
    forget_failures(compiled.MEMORY_BUDGET)


def test_a_new_compilation_is_tried_after_one_that_failed() -> None:
    torch.compiler.set_stance("force_eager")
    forget_failures(1.0)
    seen = []
    torch.compile(lambda x: x + 1, backend=lambda graph, _: seen.append(graph) or graph.forward)(torch.ones(2))
    assert seen


@on_gpu
def test_a_generator_is_free_again_after_a_capture_that_broke_off() -> None:
    generator = torch.Generator("cuda")
    state, default = generator.get_state(), torch.cuda.default_generators[0].get_state()
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    with pytest.raises(RuntimeError), torch.cuda.graph(graph, stream=torch.cuda.Stream()):  # noqa: PT012
        torch.randn(1, device="cuda", generator=generator).item()
    # Every capture holds the default generator, too: without this, later tests could not draw from it.
    free_from_capture(torch.cuda.default_generators[0], default)
    free_from_capture(generator, state)
    for each, start in ((generator, state), (torch.cuda.default_generators[0], default)):
        first = torch.randn(4, device="cuda", generator=each)
        each.set_state(start)
        assert torch.equal(first, torch.randn(4, device="cuda", generator=each))
