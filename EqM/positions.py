"""The positions of tokens: rows and columns on a grid, and time in seconds.

Fixed positions are added to the tokens. Rotary positions (Su et al. 2021, arXiv 2104.09864) turn the queries and keys
of attention, so that a score depends on the distance of two tokens, and not on where they are. They have no weights,
and no grid is too large for them.
"""

import math

import torch
from torch import Tensor

POSITIONS = ("fixed", "rotary")
# Shortest and longest period, in seconds, of the sinusoids that encode a token's time. The shortest is below the step
# of common frame rates with a frame interval. The longest is above the length of any clip.
TIME_PERIODS_S = (0.1, 100.0)
# Rotary rows and columns turn by 1 radian a patch at most, and by 1/100 at least, as in Heo et al. 2024 (arXiv
# 2403.13298). There such a network kept its accuracy on pictures larger than those of its training. The base 10,000 of
# texts would leave most numbers of a head almost unturned on grids of 8 to 64 patches.
SPACE_BASE = 100.0


def sincos_positions(hidden_size: int, rows: int, columns: int) -> Tensor:
    """Fixed positions on a grid, row by row: (rows·columns, D).

    The first half of D encodes the column, the second half the row. Each half has sines, then cosines.
    """
    frequencies = 10_000 ** -(torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size // 4))

    def encode(places: Tensor) -> Tensor:
        angles = places.double()[:, None] * frequencies  # (places, D/4)
        return torch.cat([angles.sin(), angles.cos()], dim=1)  # (places, D/2)

    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.cat([encode(column.flatten()), encode(row.flatten())], dim=1).float()


def time_angles(count: int, tokens: int, temporal_patch: int, seconds_per_frame: Tensor) -> Tensor:
    """Angles of `count` periods at the middle of each token's frames: seconds_per_frame (N,) → (N, tokens, count)."""
    device = seconds_per_frame.device
    middles = torch.arange(tokens, device=device) * temporal_patch + (temporal_patch - 1) / 2  # (T',) in frames
    times = seconds_per_frame[:, None, None] * middles[:, None]  # (N, T', 1) in seconds
    shortest, longest = TIME_PERIODS_S
    steps = torch.linspace(0, 1, count, device=device)
    return times * (2 * math.pi / (shortest * (longest / shortest) ** steps))  # (N, T', count)


def time_positions(hidden_size: int, tokens: int, temporal_patch: int, seconds_per_frame: Tensor) -> Tensor:
    """Sinusoids of the time, in seconds, at the middle of each token's frames: (N,) → (N, tokens, D)."""
    angles = time_angles(hidden_size // 2, tokens, temporal_patch, seconds_per_frame)  # (N, T', D/2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)  # (N, T', D)


def head_pairs(head_width: int) -> tuple[int, int, int]:
    """How many pairs of a head's numbers encode the time, the row and the column, as evenly as eighths allow.

    A head of 64 numbers has 8 + 12 + 12 pairs, one of 72 has 12 + 12 + 12.

    Raises:
        ValueError: the width is odd, or too small for three axes.
    """
    pairs = head_width // 2
    unit = max(pairs // 8, 1)
    space = unit * -(-pairs // (3 * unit))
    if head_width % 2 or pairs <= 2 * space:
        raise ValueError(f"rotary positions cannot split a head of {head_width} numbers into pairs for three axes")
    return pairs - 2 * space, space, space


def rotations(
    head_width: int,
    grid: tuple[int, int, int],
    temporal_patch: int,
    seconds_per_frame: Tensor,
    spacing: Tensor | None = None,
) -> Tensor:
    """How far each token turns the pairs of a head, as cosines and sines: (2, N, 1, T'h'w', d/2), float32.

    Args:
        head_width: d.
        grid: tokens in time, rows and columns, (T', h', w').
        seconds_per_frame: (N,). N may be 1 for all samples of a batch.
        spacing: from one row to the next and from one column to the next, in patches, (N, 2); None: 1.
    """
    device = seconds_per_frame.device
    of_time, *of_space = head_pairs(head_width)
    spacing = torch.ones(1, 2, device=device) if spacing is None else spacing
    rows, columns = spacing[:, :, None, None].unbind(1)  # (N or 1, 1, 1)

    def place_angles(places: int, count: int) -> Tensor:
        frequencies = SPACE_BASE ** -(torch.arange(count, device=device) / count)  # (count,) in radians a patch
        return torch.arange(places, device=device)[:, None] * frequencies  # (places, count)

    time = time_angles(of_time, grid[0], temporal_patch, seconds_per_frame)[:, :, None, None]  # (N, T', 1, 1, ·)
    row = (rows * place_angles(grid[1], of_space[0]))[:, None, :, None]  # (N or 1, 1, h', 1, ·)
    column = (columns * place_angles(grid[2], of_space[1]))[:, None, None]  # (N or 1, 1, 1, w', ·)
    whole = [part.expand(max(len(time), len(spacing)), *grid, -1) for part in (time, row, column)]
    angles = torch.cat(whole, dim=-1).flatten(1, 3)[:, None]  # (N, 1, T'h'w', d/2)
    return torch.stack([angles.cos(), angles.sin()])


def rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """Heads x (…, N, heads, L, d), each pair (i, i + d/2) of their numbers turned by `rotations`, in x's type."""
    cosines, sines = rotation.unbind(0)  # (N, 1, L, d/2)
    first, second = x.chunk(2, dim=-1)  # (…, N, heads, L, d/2)
    turned = [first * cosines - second * sines, second * cosines + first * sines]  # in float32 if x has 16 bits
    return torch.cat(turned, dim=-1).to(x.dtype)
