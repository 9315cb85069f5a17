"""Whether sampling compiles its network."""

import logging

import pytest
import torch

from compiled import COMPILED, EAGER, GRAPHS, add_speed_args, asked_speed_of, speed_of
from models import EqM
from runtime import cli
from sampling import fields, speed
from sampling.fields import conditioned_field
from sampling.method import Method
from sampling.plan import Plan
from sampling.sampler import Sampler, network_rows
from sampling.speed import choose_speed, seconds_saved
from sampling.starts import Starts


def new_network(**settings: object) -> EqM:
    sizes = {"patch_size": 4, "depth": 2, "hidden_size": 16, "num_heads": 2, "num_classes": 3, "temporal_patch": 2}
    return EqM((4, 8, 8), **(sizes | settings)).requires_grad_(False).eval()


def new_plan(network: EqM, terms: list[tuple[float, int]] | None = None) -> Plan:
    return Plan([0, 1], terms or [], Starts(0, network.input_shape))


@pytest.mark.parametrize(
    ("flags", "asked"),
    [([], None), (["--compile"], COMPILED), (["--no-compile"], EAGER), (["--graphs"], GRAPHS)],
    ids=str,
)
def test_flags_choose_the_speed_and_without_them_a_gpu_compiles(flags, asked):
    parser = cli.ArgumentParser("")
    add_speed_args(parser)
    args = parser.parse_args(flags)
    assert asked_speed_of(args) == asked
    assert [speed_of(args, device) for device in ("cuda", "cpu")] == [asked or COMPILED, asked or EAGER]


def test_one_clip_is_not_compiled_for_and_many_are(caplog):
    caplog.set_level(logging.INFO, logger="EqM")
    network = new_network(depth=12, hidden_size=384, num_heads=6)
    assert choose_speed(None, "cuda", network, 1, 250) == GRAPHS
    assert choose_speed(None, "cuda", network, 64, 10**6) == COMPILED
    few, many = (record.getMessage() for record in caplog.records)
    assert few.startswith("CUDA graphs without compiling, because it would save about 0.08")
    assert few.endswith(" s of 250 evaluations, and take about 6 s (--compile: compile)")
    assert many.startswith("CUDA graphs of a compiled network, because it would save about ")


def test_compiling_pays_from_where_it_saves_more_than_it_takes():
    network = new_network()
    pays = round(speed.COMPILE_S / seconds_saved(network, 8))
    assert not choose_speed(None, "cuda", network, 8, round(pays * 0.99)).compiled
    assert choose_speed(None, "cuda", network, 8, round(pays * 1.01)).compiled
    assert seconds_saved(network, 80) > seconds_saved(network, 8) > seconds_saved(new_network(depth=1), 8)


def test_an_energy_takes_longer_to_compile():
    network = new_network(energy="dot")
    pays = round(speed.ENERGY_COMPILE_S / seconds_saved(network, 8))
    assert not choose_speed(None, "cuda", network, 8, round(pays * 0.99)).compiled
    assert choose_speed(None, "cuda", network, 8, round(pays * 1.01)).compiled


@pytest.mark.parametrize("evaluations", [1, 10**9])
def test_what_is_asked_wins_and_a_cpu_runs_eagerly(caplog, evaluations):
    caplog.set_level(logging.INFO, logger="EqM")
    network = new_network()
    for device in ("cuda", "cpu"):
        for asked in (COMPILED, GRAPHS, EAGER):
            assert choose_speed(asked, device, network, 8, evaluations) == asked
    assert choose_speed(None, "cpu", network, 8, evaluations) == EAGER
    assert not caplog.records


@pytest.mark.parametrize(("terms", "cfg_scale"), [([], 1.0), ([], 2.0), ([(1.0, 0), (0.5, 2)], 1.5)])
def test_guidance_and_sums_are_counted_as_samples_of_the_network(terms, cfg_scale):
    network, method = new_network(), Method(cfg_scale=cfg_scale)
    plan = new_plan(network, terms)
    sampler = Sampler(method, network, plan, 0.1, 4)
    assert network_rows(method, plan, 4) == 4 * sampler.composition.rows


def test_a_network_for_graphs_alone_is_not_compiled(monkeypatch):
    compiled, network = [], new_network()
    monkeypatch.setattr(fields, "compile_network", lambda *_, **__: compiled.append(1))
    monkeypatch.setattr(torch, "compile", lambda *_, **__: compiled.append(2))
    for threshold in (None, 1e-9):  # an adaptive step compiles parts of its own
        method = Method(stepsize=0.01, steps=2, threshold=threshold)
        sampler = Sampler(method, network, new_plan(network), 0.1, 2, GRAPHS)
        groups = list(sampler.samples([range(2)], trace=False, progress=lambda evaluations: None))
        assert sum(map(len, groups)) == 2
    assert not compiled
    conditioned_field(network, 2, 0.1, fast=True)
    assert compiled == [1]


def test_a_graph_records_each_evaluation_of_a_network_that_is_not_compiled(monkeypatch):
    recorded, network = [], new_network()
    monkeypatch.setattr(fields, "replayed", lambda field, fast, device: recorded.append(fast) or field)
    conditioned_field(network, 2, 0.1, fast=True, compiled=False)
    conditioned_field(network, 2, 0.1, fast=True, recorded=False, compiled=False)
    assert recorded == [True]
