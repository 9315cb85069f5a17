"""The judge of classes, on moving shapes as they are rendered."""

import numpy as np
import pytest
import torch

from evaluation import judge
from evaluation.judge import small, train_judge, words
from make_moving_shapes import render_clip
from runtime.errors import UserError

CPU = torch.device("cpu")
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
        return train_judge(*rendered(60, 0), 0, CPU)


def test_it_tells_shapes_and_directions_apart_on_clips_that_it_never_saw(trained):
    assert trained.trained_on == 180
    assert {part: len(right) for part, right in trained.held_out.right.items()} == dict.fromkeys(
        ("shape", "direction", "both"), 60
    )
    assert trained.held_out.shares()["both"] >= 0.95
    with torch.no_grad():
        assert trained.judge(*rendered(20, 1)).shares()["both"] >= 0.95


def test_samples_of_another_class_are_wrong_in_the_part_that_differs(trained):
    clips, names = rendered(20, 1)
    mirrored = [name.replace("Right", "?").replace("Left", "Right").replace("?", "Left") for name in names]
    with torch.no_grad():
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
    first, after = train_judge(clips, names, 1, CPU), torch.rand(1)
    second = train_judge(clips, names, 1, CPU)
    torch.manual_seed(7)
    assert torch.rand(1) == after
    a, b = (each.network.state_dict() for each in (first, second))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


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
        (["A"] * 5 + ["B"] * 3, "B has 3"),
    ],
)
def test_classes_that_cannot_be_learned_are_one_line(names, problem):
    with pytest.raises(UserError, match=problem):
        train_judge(torch.zeros(8, 3, 4, 16, 16).byte(), names, 0, CPU)
