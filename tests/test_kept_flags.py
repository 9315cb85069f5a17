"""A run that goes on has the settings of its checkpoint, and --resume finds the run that has the given settings."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import make_pack, run_script
from data.latent_space import LatentSpace
from network_settings import NetworkSettings
from objective import Objective
from runs.checkpoint import save_checkpoint
from runs.config import OLD_MEANINGS, Config, config_of
from runs.resume import TELLING, Asked, find_start
from runtime import cli
from runtime.errors import UserError
from test_old_files import GOLDEN, OLD, RUN, checkpoint  # noqa: F401

CONFIG = Config(
    network=NetworkSettings("EqM-Ti/4", (4, 16, 16), 3, num_classes=2, temporal_patch=2),
    classes=("A", "B"),
    frames_per_second=10.0,
    precision={"name": "fp32"},
    global_batch_size=12,
    flags={"lr": 0.5, "no_flip": True, "frame_interval": 7},
)
TWO = replace(CONFIG, objective=Objective(scale=2.0))
ENERGY = replace(CONFIG, network=replace(CONFIG.network, energy="dot"))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Three runs of one model, the last two of them with other settings, and their configs alone."""
    for number, config in enumerate((CONFIG, TWO, ENERGY)):
        folder = tmp_path / f"{number:03d}-EqM-Ti-4-Linear-velocity-None"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config.as_dict()))
    return tmp_path


@pytest.mark.parametrize(
    ("given", "number"),
    [
        ({}, 2),
        ({"ebm": "none"}, 1),
        ({"ebm": "none", "c_lambda": 4.0}, 0),
        ({"model": "EqM-Ti/4", "c_lambda": 2.0, "clip_len": 4, "video": True}, 1),
    ],
)
def test_resume_takes_the_newest_run_that_has_the_given_settings(results, given, number):
    start = find_start(Asked(results, resume=True, checkpoint=None, given=given))
    assert start.folder.name.startswith(f"{number:03d}-")
    assert start.config == (CONFIG, TWO, ENERGY)[number]


def test_fine_tuning_does_not_go_on_with_the_run_whose_weights_it_starts_from(results, monkeypatch):
    monkeypatch.chdir(results)
    asked = Asked(Path(), resume=True, checkpoint=None, given={"init_weights": "first.pt"})
    assert find_start(asked).folder is None
    tuned = replace(CONFIG, flags={"init_weights": str(results / "first.pt")})
    (results / "001-EqM-Ti-4-Linear-velocity-None" / "config.json").write_text(json.dumps(tuned.as_dict()))
    assert find_start(asked).folder == Path("001-EqM-Ti-4-Linear-velocity-None")


@pytest.mark.parametrize("given", [{"c_lambda": 3.0}, {"model": "EqM-Ti/2"}, {"ebm": "l2"}, {"image_size": 32}])
def test_resume_starts_a_new_run_if_none_has_the_given_settings_and_says_so(results, given):
    start = find_start(Asked(results, resume=True, checkpoint=None, given=given))
    assert start.folder is None
    assert start.notes == [f"no run in {results} has the given settings: this one is new"]


IMAGES = replace(CONFIG, network=NetworkSettings("EqM-Ti/4", 16, 3, num_classes=2), frames_per_second=None)


def test_a_run_that_uses_a_setting_comes_before_one_that_does_not(results):
    (results / "003-EqM-Ti-4-Linear-velocity-None").mkdir()
    (results / "003-EqM-Ti-4-Linear-velocity-None" / "config.json").write_text(json.dumps(IMAGES.as_dict()))

    def found(**given: object) -> Path | None:
        return find_start(Asked(results, resume=True, checkpoint=None, given=given)).folder

    assert found(clip_len=4).name.startswith("002-")
    assert found(clip_len=8).name.startswith("003-"), "a command for images may name a length, which means nothing"
    assert found(c_b=2.0) is None


@pytest.mark.parametrize(("name", "found"), [("EqM-Ti-8-VP", None), ("EqM-Ti-8-GVP", "000")])
def test_a_run_without_a_config_goes_on_under_its_own_name_alone(tmp_path, name, found):
    (tmp_path / "000-EqM-Ti-8-GVP-velocity-None").mkdir()
    start = find_start(Asked(tmp_path, resume=True, checkpoint=None, given={}, new_name=f"{name}-velocity-None"))
    assert (start.folder and start.folder.name[:3]) == found


@pytest.mark.parametrize(("spelt", "same"), [("vae", True), ("./vae", True), ("here/../vae", True), ("other", False)])
def test_a_vae_has_one_name_however_its_folder_is_spelt(tmp_path, monkeypatch, spelt, same):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "000-EqM-Ti-4-Linear-velocity-None"
    folder.mkdir()
    space = LatentSpace("vae", "0", 1.0, 4, 2)
    config = replace(CONFIG, network=replace(CONFIG.network, in_channels=4), space=space)
    (folder / "config.json").write_text(json.dumps(config.as_dict()))
    start = find_start(Asked(tmp_path, resume=True, checkpoint=None, given={"vae": spelt}))
    assert (start.folder is not None) == same


def test_one_run_of_another_version_does_not_keep_others_from_going_on(results):
    broken = results / "004-EqM-Ti-4-Linear-velocity-None" / "checkpoints"
    broken.mkdir(parents=True)
    save_checkpoint(broken / "0000001.pt", {"config": {}})
    assert find_start(Asked(results, resume=True, checkpoint=None, given={})).folder.name.startswith("002-")


def test_a_config_goes_through_json_and_back_unchanged():
    assert config_of(json.loads(json.dumps(TWO.as_dict())), "config.json") == TWO


def test_a_key_that_an_old_config_lacks_has_its_old_meaning():
    old = CONFIG.as_dict()
    del old["objective"], old["vae"], old["global_batch_size"], old["processes"], old["args"]
    del old["network"]["uncond"], old["network"]["energy"]
    config = config_of(old, "old.pt")
    kept = config.kept_flags()
    assert OLD_MEANINGS.items() <= kept.items()
    assert (kept["uncond"], kept["ebm"], kept["path_type"], kept["vae"]) == (True, "none", "Linear", "none")
    assert (kept["c_schedule"], kept["c_a"], kept["c_lambda"], kept["disp"]) == ("truncated", 0.8, 4.0, False)
    assert config.form.frame_interval == 1


EMPTY_SIZE = {**CONFIG.as_dict(), "network": {**CONFIG.as_dict()["network"], "input_size": []}}


@pytest.mark.parametrize(
    "wrong", [{}, {"network": {"model": "EqM-Ti/4"}}, {**CONFIG.as_dict(), "classes": None}, EMPTY_SIZE]
)
def test_a_config_that_is_none_is_refused_in_one_line(wrong):
    with pytest.raises(UserError, match="other.pt holds a config of another program or version"):
        config_of(wrong, "other.pt")


def test_what_is_given_wins_over_what_is_kept_and_that_over_the_defaults():
    defaults = {"lr": 1e-4, "model": "EqM-XL/2", "clip_len": 16, "c_b": None}
    given = {"lr": None, "model": None, "clip_len": 8, "c_b": None, "log_every": 5}
    kept = CONFIG.kept_flags()
    assert cli.settled(given, kept, defaults) == {
        "lr": 0.5, "model": "EqM-Ti/4", "clip_len": 8, "c_b": None, "log_every": 5
    }  # fmt: skip
    assert cli.settled(given, {}, defaults)["model"] == "EqM-XL/2"


def test_every_flag_that_tells_runs_apart_is_one_that_checkpoints_keep():
    assert set(TELLING) <= CONFIG.kept_flags().keys()


def test_an_old_run_goes_on_with_its_own_settings_whatever_today_s_defaults_are(checkpoint, tmp_path):  # noqa: F811
    command = ["--data-path", OLD / "pack", "--resume", "--max-steps", 15, "--log-every", 1]
    result = run_script("train.py", *command, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (tmp_path / RUN / "metrics.jsonl").read_text().splitlines()]
    found = [[row["step"], row["loss"], row["grad_norm"]] for row in rows]
    np.testing.assert_allclose(found, GOLDEN["resumed"], rtol=1e-5)
    config = torch.load(tmp_path / RUN / "checkpoints" / "0000015.pt", weights_only=True)["config"]
    assert (config["args"]["lr"], config["args"]["warmup_steps"], config["global_batch_size"]) == (1e-3, 5, 4)


@pytest.mark.parametrize(("flags", "micro_batch"), [(["--global-batch-size", 6], 2), ([], 4)])
def test_a_kept_micro_batch_fits_another_batch(checkpoint, tmp_path, flags, micro_batch):  # noqa: F811
    command = ["--data-path", OLD / "pack", "--resume", "--max-steps", 11, *flags]
    result = run_script("train.py", *command, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    config = torch.load(tmp_path / RUN / "checkpoints" / "0000011.pt", weights_only=True)["config"]
    assert config["args"]["micro_batch_size"] == micro_batch


def test_a_pack_of_another_form_than_the_runs_is_refused_with_both(checkpoint, shapes, tmp_path):  # noqa: F811
    make_pack(shapes, tmp_path / "pack", image_size=32)
    result = run_script("train.py", "--data-path", "pack", "--resume", cwd=tmp_path)
    assert result.returncode == 1
    assert "the run has --image-size 16, and pack is a pack with --image-size 32: give another pack" in result.stderr


def test_data_with_more_classes_than_the_runs_are_refused_with_both_numbers(checkpoint, shapes, tmp_path):  # noqa: F811
    shutil.copytree(shapes, tmp_path / "more")
    shutil.copytree(shapes / "CircleUp", tmp_path / "more" / "Another")
    result = run_script("train.py", "--data-path", "more", "--ckpt", checkpoint, cwd=tmp_path)
    assert result.returncode == 1
    assert "was trained on other classes: these data lack nothing, and have 'Another' in addition" in result.stderr
    assert "--init-weights" in result.stderr


def test_help_says_the_defaults_of_kept_flags_also_if_they_are_zero(tmp_path):
    text = " ".join(run_script("train.py", "--help", cwd=tmp_path).stdout.split())
    assert "steps of linear warm-up; default 0" in text
    assert "default 0.0001" in text


def test_a_checkpoint_goes_on_in_a_new_folder_with_its_own_settings(checkpoint, tmp_path):  # noqa: F811
    command = ["--data-path", OLD / "pack", "--ckpt", checkpoint, "--max-steps", 11]
    result = run_script("train.py", *command, "--lr", 0.5, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "--lr was 0.001 and is 0.5" in result.stdout
    assert (tmp_path / "results" / "001-EqM-Ti-8-Linear-velocity-None" / "checkpoints" / "0000011.pt").is_file()
    refused = run_script("train.py", *command, "--c-lambda", 2, cwd=tmp_path)
    assert refused.returncode == 1
    assert "was trained with the objective's scale 4.0, and this run has 2.0" in refused.stderr
