"""The parts of the transformer. A part computes in the type of its weights."""

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from positions import rotated

EPSILON = 1e-6  # of LayerNorm


class PatchEmbedder(nn.Module):
    """Embeds patches: (N, …, C·p·p) → (N, …, D)."""

    def __init__(self, channels: int, patch_size: int, hidden_size: int):
        super().__init__()
        # Stored as a Conv2d to match published checkpoints. Computed as a matrix product, which is faster.
        self.proj = nn.Conv2d(channels, hidden_size, patch_size, patch_size)

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches.to(self.proj.weight.dtype), self.proj.weight.flatten(1), self.proj.bias)


class TimestepEmbedder(nn.Module):
    """Embeds γ in [0, 1]: (N,) → (N, D), through 256 sinusoids, cosines first."""

    def __init__(self, hidden_size: int, num_sinusoids: int = 256, max_period: float = 10_000):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(num_sinusoids, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
        self.num_sinusoids, self.max_period = num_sinusoids, max_period

    def forward(self, t: Tensor) -> Tensor:
        half = self.num_sinusoids // 2
        exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
        angles = t.float()[:, None] * torch.exp(-math.log(self.max_period) * exponents)  # (N, 128)
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1)  # (N, 256)
        return self.mlp(sinusoids.to(self.mlp[0].weight.dtype))  # (N, D)


class LabelEmbedder(nn.Module):
    """Embeds class labels: (N,) → (N, D). The label `num_classes` is the null class."""

    def __init__(self, num_classes: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)  # (N, D)


class LayerNorm(nn.Module):
    """LayerNorm over the last axis, without weights."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return F.layer_norm(x, x.shape[-1:], eps=EPSILON)
        # These two passes compile to half the time of layer_norm.
        centred = x.float() - x.float().mean(-1, keepdim=True)
        return (centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + EPSILON)).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention: (N, L, D) → (N, L, D).

    Attributes:
        fused: use torch's fused attention, which has a first derivative but no second one.
    """

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads, self.fused = num_heads, True
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, rotation: Tensor | None = None) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (3, N, heads, L, d)
        qk, v = heads.split((2, 1))
        if rotation is not None:
            qk = rotated(qk, rotation)  # both together: half as many kernels
        (q, k), v = qk.unbind(0), v.squeeze(0)  # (N, heads, L, d) each
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v)  # (N, heads, L, d)
        else:
            weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (N, heads, L, L)
            out = weights.softmax(-1) @ v  # (N, heads, L, d)
        return self.proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with a GELU in its tanh approximation between (Hendrycks & Gimpel 2016, arXiv 1606.08415)."""

    def __init__(self, hidden_size: int, inner_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, inner_size)
        self.fc2 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)  # (N, L, inner)
        if not torch.compiler.is_compiling():
            return self.fc2(F.gelu(x, approximate="tanh"))
        # (1 + tanh(u)) / 2 = sigmoid(2u), which compiles to fewer instructions.
        return self.fc2(x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class Block(nn.Module):
    """Attention and MLP. The modulation shifts, scales and gates each of them (adaLN-Zero)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1, self.attn = LayerNorm(), Attention(hidden_size, num_heads)
        self.norm2, self.mlp = LayerNorm(), MLP(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, modulation: Tensor, rotation: Tensor | None = None) -> Tensor:
        """Tokens (N, L, D) under a modulation (N, 6D), which `adaLN_modulation` makes of the condition.

        With rotary positions the `rotation` of all tokens comes from `positions.rotations`.
        """
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation[:, None].chunk(6, dim=-1)  # (N, 1, D)
        x = x + gate_a * self.attn(self.norm1(x) * (1 + scale_a) + shift_a, rotation)  # (N, L, D)
        return x + gate_m * self.mlp(self.norm2(x) * (1 + scale_m) + shift_m)  # (N, L, D)


class FinalLayer(nn.Module):
    """Turns tokens into patches: (N, L, D) → (N, L, numbers of a patch)."""

    def __init__(self, hidden_size: int, patch_numbers: int):
        super().__init__()
        self.norm_final = LayerNorm()
        self.linear = nn.Linear(hidden_size, patch_numbers)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        shift, scale = modulation[:, None].chunk(2, dim=-1)  # (N, 1, D)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


def check_sizes(
    input_size: tuple[int, int, int], temporal_patch: int, patch_size: int, hidden_size: int, num_heads: int
) -> None:
    """Raises ValueError if a size does not divide another; the text names both numbers."""
    frames, height, width = input_size
    if height % patch_size or width % patch_size:
        raise ValueError(f"image size {height}x{width} is not a multiple of the patch size {patch_size}")
    if frames % temporal_patch:
        raise ValueError(f"clip length {frames} is not a multiple of the temporal patch {temporal_patch}")
    if hidden_size % num_heads or hidden_size % 4:
        raise ValueError(f"width {hidden_size} is not a multiple of 4 and of its {num_heads} heads")
