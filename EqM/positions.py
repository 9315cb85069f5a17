"""The positions of tokens: rows and columns on a grid, and time in seconds."""

import math

import torch
from torch import Tensor

# Shortest and longest period, in seconds, of the sinusoids that encode a token's time. The shortest is below the step
# of common frame rates with a frame interval. The longest is above the length of any clip.
TIME_PERIODS_S = (0.1, 100.0)


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


def time_positions(hidden_size: int, tokens: int, temporal_patch: int, seconds_per_frame: Tensor) -> Tensor:
    """Sinusoids of the time, in seconds, at the middle of each token's frames: (N,) → (N, tokens, D)."""
    device = seconds_per_frame.device
    middles = torch.arange(tokens, device=device) * temporal_patch + (temporal_patch - 1) / 2  # (T',) in frames
    times = seconds_per_frame[:, None, None] * middles[:, None]  # (N, T', 1) in seconds
    shortest, longest = TIME_PERIODS_S
    steps = torch.linspace(0, 1, hidden_size // 2, device=device)
    angles = times * (2 * math.pi / (shortest * (longest / shortest) ** steps))  # (N, T', D/2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)  # (N, T', D)
