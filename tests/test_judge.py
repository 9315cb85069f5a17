"""The judge of classes, on moving shapes as they are rendered."""

import numpy as np
import pytest
import torch

from evaluation import judge
from evaluation.judge import small, train_judge, words
from make_moving_shapes import render_clip
from precision import Precision
from runtime.errors import UserError

CPU = torch.device("cpu")
FP32 = Precision("fp32", "fp32", torch.float32)
CLASSES = [(shape, direction) for shape in ("square", "triangle") for direction in ("right", "left")]


def rendered(per_class: int, seed: int) -> tuple[torch.Tensor, list[str]]:
    """Clips (N, 3, 4, 16, 16) uint8 and their classes."""
    clips, names = [], []
    for i in range(per_class):
        for j, (shape, direction) in enumerate(CLASSES):
            clips.append(render_clip(shape, direction, 16, 4, np.random.default_rng((seed, i, j))))
            names.append(shape.title() + direction.title())
    return torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).contiguous(), names


@pytest.fixture(scope="module")
def trained() -> judge.Judge:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge, "STEPS", 250)
        return train_judge(*rendered(60, 0), 0, CPU, FP32)


def test_it_tells_shapes_and_directions_apart_on_clips_that_it_never_saw(trained):
    assert trained.trained_on == 180
    assert {part: len(right) for part, right in trained.held_out.right.items()} == dict.fromkeys(
        ("shape", "direction", "both"), 60
    )
    assert trained.held_out.shares()["both"] >= 0.95
    assert trained.judge(*rendered(20, 1)).shares()["both"] >= 0.95


def test_samples_of_another_class_are_wrong_in_the_part_that_differs(trained):
    clips, names = rendered(20, 1)
    mirrored = [name.replace("Right", "?").replace("Left", "Right").replace("?", "Left") for name in names]
    shares = trained.judge(clips, mirrored).shares()
    backwards = trained.judge(clips.flip(2), names).shares()
    other = trained.judge(clips, [name.replace("Square", "Triangle") for name in names]).shares()
    assert shares["shape"] >= 0.95
    assert shares["direction"] <= 0.05
    assert shares["both"] <= 0.05
    assert backwards["direction"] <= 0.05
    assert 0.4 < other["shape"] < 0.6
    assert other["direction"] >= 0.95


def test_training_follows_from_the_seed_and_leaves_the_random_state(monkeypatch):
    monkeypatch.setattr(judge, "STEPS", 3)
    clips, names = rendered(4, 0)
    torch.manual_seed(7)
    first, after = train_judge(clips, names, 1, CPU, FP32), torch.rand(1)
    second = train_judge(clips, names, 1, CPU, FP32)
    torch.manual_seed(7)
    assert torch.rand(1) == after
    a, b = (each.network.state_dict() for each in (first, second))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_it_trains_and_judges_under_autocast_and_keeps_float32_weights(monkeypatch, name, dtype):
    monkeypatch.setattr(judge, "STEPS", 2)
    monkeypatch.setattr(judge, "BATCH", 4)
    seen = []

    def forward(network: judge.Network, x: torch.Tensor) -> list[torch.Tensor]:
        logits = [head(network.body(torch.cat([x, x.diff(dim=2)], dim=2).flatten(1, 2))) for head in network.heads]
        seen.append((network.training, logits[0].dtype))
        return logits

    monkeypatch.setattr(judge.Network, "forward", forward)
    trained = train_judge(*rendered(4, 0), 1, CPU, Precision(name, name, dtype))
    assert set(seen) == {(True, dtype), (False, dtype)}
    weights = list(trained.network.parameters())
    assert {weight.dtype for weight in weights} == {torch.float32}
    assert all(weight.isfinite().all() for weight in weights)


@pytest.mark.filterwarnings("error")
def test_fp16_trains_with_a_gradient_scaler_that_skips_updates_which_overflow(monkeypatch):
    """The schedule waits with the optimizer, or torch would warn that it went first."""
    monkeypatch.setattr(judge, "STEPS", 6)
    monkeypatch.setattr(judge, "BATCH", 4)
    scales, grad_scaler = [], Precision.grad_scaler

    def too_large(precision: Precision, device_type: str) -> torch.amp.GradScaler:
        scales.append(scaler := grad_scaler(precision, device_type))
        scaler.set_growth_interval(1000)
        scaler._init_scale = 2.0**40
        return scaler

    monkeypatch.setattr(Precision, "grad_scaler", too_large)
    trained = train_judge(*rendered(4, 0), 1, CPU, Precision("fp16", "fp16", torch.float16))
    assert scales[0].is_enabled()
    assert scales[0].get_scale() < 2.0**40
    assert all(weight.isfinite().all() for weight in trained.network.parameters())


def test_names_of_two_words_are_shape_and_direction_and_others_are_whole():
    assert words(["CircleUp", "SquareLeft"]) == {"shape": ["Circle", "Square"], "direction": ["Up", "Left"]}
    assert words(["CircleUp", "Archery"]) == {"class": ["CircleUp", "Archery"]}
    assert words(["ApplyEyeMakeup", "BabyCrawling"]) == {"class": ["ApplyEyeMakeup", "BabyCrawling"]}
    assert words(["circleUp", "SquareLeft"]) == {"class": ["circleUp", "SquareLeft"]}


def test_large_and_long_clips_are_made_small():
    x = torch.randint(0, 256, (2, 3, 21, 64, 64), dtype=torch.uint8)
    assert small(x).shape == (2, 3, judge.FRAMES, judge.SIDE, judge.SIDE)
    assert torch.equal(small(x[..., :16, :16])[:, :, [0, -1]], x[:, :, [0, -1], :16, :16])
    blocks = x[:, :, :4].float().unflatten(-1, (32, 2)).unflatten(-3, (32, 2)).mean((-1, -3))
    assert (small(x[:, :, :4]).float() - blocks).abs().max() <= 0.51


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["A"] * 8, "two or more class folders"),
        ([""] * 4 + ["A"] * 4, "two or more class folders"),
        (["A"] * 5 + ["B"] * 3, "needs 4 or more samples of each class, and B has 3"),
    ],
)
def test_classes_that_cannot_be_learned_are_one_line(names, problem):
    with pytest.raises(UserError, match=problem):
        train_judge(torch.zeros(8, 3, 4, 16, 16).byte(), names, 0, CPU, FP32)
