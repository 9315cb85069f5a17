import argparse
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from conftest import spawn
from precision import Precision, add_precision_args, agree_on_precision, requested_of, resolve_precision

FP16 = Precision("fp16", "fp16", torch.float16)
BF16 = Precision("bf16", "bf16", torch.bfloat16)


@pytest.mark.parametrize(
    ("requested", "device_type", "capability", "name"),
    [
        ("fp32", "cpu", None, "fp32"),
        ("fp16", "cpu", None, "fp32"),
        ("bf16", "cpu", None, "fp32"),
        ("bf16", "mps", None, "fp32"),
        ("fp32", "cuda", (6, 1), "fp32"),
        ("fp16", "cuda", (6, 1), "fp32"),
        ("bf16", "cuda", (6, 1), "fp32"),
        ("fp16", "cuda", (7, 0), "fp16"),
        ("bf16", "cuda", (7, 0), "fp32"),
        ("fp16", "cuda", (7, 5), "fp16"),
        ("bf16", "cuda", (7, 5), "fp32"),
        ("fp16", "cuda", (8, 0), "fp16"),
        ("bf16", "cuda", (8, 0), "bf16"),
        ("bf16", "cuda", (9, 0), "bf16"),
        ("bf16", "cuda", (12, 0), "bf16"),
    ],
)
def test_the_hardware_decides_and_a_fallback_has_a_reason(requested, device_type, capability, name):
    precision = resolve_precision(requested, device_type, capability)
    assert (precision.name, precision.requested) == (name, requested)
    assert precision.dtype == {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]
    assert bool(precision.reason) == (name != requested)


def test_the_reason_names_what_is_needed_and_what_is_there():
    reason = resolve_precision("bf16", "cuda", (7, 5)).reason
    assert "8.0" in reason
    assert "7.5" in reason


def test_the_current_device_is_asked_for_its_capability(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    assert resolve_precision("bf16", "cuda").name == "fp32"
    assert resolve_precision("fp16", "cuda").name == "fp16"


def test_an_unknown_name_is_a_value_error():
    with pytest.raises(ValueError, match="fp8"):
        resolve_precision("fp8", "cuda", (9, 0))


def test_flags_choose_the_precision_and_exclude_each_other(capsys):
    parser = argparse.ArgumentParser()
    add_precision_args(parser)
    assert requested_of(parser.parse_args([])) == "fp32"
    assert requested_of(parser.parse_args(["--use-amp"])) == "fp16"
    assert requested_of(parser.parse_args(["--use-bf16"])) == "bf16"
    with pytest.raises(SystemExit):
        parser.parse_args(["--use-amp", "--use-bf16"])
    assert "not allowed with" in capsys.readouterr().err


def test_the_working_copy_is_in_low_precision_and_fp32_needs_none():
    network = torch.nn.Linear(4, 4)
    assert resolve_precision("fp32", "cpu").working_copy(network) is network
    working = FP16.working_copy(network)
    assert {weight.dtype for weight in working.parameters()} == {torch.float16}
    assert all(weight.requires_grad for weight in working.parameters())
    assert network.weight.dtype == torch.float32


@pytest.mark.parametrize("precision", [FP16, BF16])
def test_autocast_computes_in_16_bits_and_keeps_float32_weights_and_gradients(precision):
    network = torch.nn.Linear(4, 4)
    with precision.autocast("cpu"):
        y = network(torch.ones(2, 4))
    assert y.dtype == precision.dtype
    y.float().sum().backward()
    assert (network.weight.dtype, network.weight.grad.dtype) == (torch.float32, torch.float32)


@pytest.mark.filterwarnings("error")
def test_autocast_does_nothing_in_fp32():
    with resolve_precision("bf16", "cpu").autocast("cpu"):
        assert not torch.is_autocast_enabled("cpu")
        assert torch.nn.Linear(4, 4)(torch.ones(2, 4)).dtype == torch.float32


def test_what_stays_in_fp32_in_a_16_bit_run_keeps_its_tf32():
    kept = resolve_precision("bf16", "cuda", (9, 0), tf32=True).in_fp32()
    assert (kept.dtype, kept.label) == (torch.float32, "fp32 TF32")
    assert resolve_precision("bf16", "cuda", (9, 0)).in_fp32().label == "fp32 IEEE"


@pytest.mark.parametrize(
    ("capability", "wanted", "said"),
    [
        ((9, 0), False, "fp32 IEEE"),
        ((9, 0), True, "fp32 TF32"),
        ((7, 5), True, "fp32 IEEE (TF32 needs a CUDA GPU of capability 8.0 or higher, and this GPU has 7.5)"),
    ],
)
def test_what_fp32_means_is_said(capability, wanted, said):
    assert str(resolve_precision("fp32", "cuda", capability, wanted)) == said


def test_tf32_changes_how_fp32_products_are_computed_until_the_next_choice():
    before = torch.get_float32_matmul_precision()
    try:
        agree_on_precision("fp32", "cuda", (9, 0), tf32=True).set_fp32_mode()
        assert torch.get_float32_matmul_precision() == "high"
        agree_on_precision("fp32", "cuda", (9, 0)).set_fp32_mode()
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_scaler_is_on_for_fp16_alone():
    assert FP16.grad_scaler("cpu").is_enabled()
    assert not BF16.grad_scaler("cpu").is_enabled()
    assert not resolve_precision("fp32", "cpu").grad_scaler("cpu").is_enabled()


def agree(rank: int, folder: Path, capabilities: list[tuple[int, int]]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(capabilities))
    precision = agree_on_precision("bf16", "cuda", capabilities[rank])
    (folder / f"rank{rank}").write_text(f"{precision.name}: {precision.reason}")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("capabilities", "name", "said"), [([(9, 0), (7, 0)], "fp32", "rank 1"), ([(9, 0), (8, 0)], "bf16", "")]
)
def test_one_rank_that_cannot_makes_all_fall_back(tmp_path, capabilities, name, said):
    spawn(agree, (tmp_path, capabilities), 2, tmp_path)
    answers = [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)]
    assert answers[0] == answers[1]
    assert answers[0].startswith(f"{name}: {said}")
