"""The parts of the transformer: embeddings, the block, the last layer. A network computes in its weights' type."""

import math

import torch
from timm.models.vision_transformer import Attention, Mlp
from torch import Tensor, nn

EPSILON = 1e-6  # of LayerNorm


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
    """Embeds class labels: (N,) → (N, D). Label `num_classes` is the null class."""

    def __init__(self, num_classes: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)  # (N, D)


class PatchEmbedder(nn.Module):
    """Embeds patches: (N, L, C·p·p) → (N, L, D)."""

    def __init__(self, channels: int, patch_size: int, hidden_size: int):
        super().__init__()
        # A convolution in name and shape, for the published keys; as a product it is faster, and in fp32 exact.
        self.proj = nn.Conv2d(channels, hidden_size, patch_size, patch_size)

    def forward(self, patches: Tensor) -> Tensor:
        return nn.functional.linear(patches.to(self.proj.weight.dtype), self.proj.weight.flatten(1), self.proj.bias)


class LayerNorm(nn.Module):
    """LayerNorm over the last axis, without weights."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return nn.functional.layer_norm(x, x.shape[-1:], eps=EPSILON)
        # Compiled, these two passes take half the time of the one that the compiler makes of layer_norm.
        centred = x.float() - x.float().mean(-1, keepdim=True)
        return (centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + EPSILON)).to(x.dtype)


class GELU(nn.Module):
    """GELU in its tanh approximation (Hendrycks & Gimpel 2016, arXiv 1606.08415)."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return nn.functional.gelu(x, approximate="tanh")
        # (1 + tanh(u)) / 2 = sigmoid(2u), which compiles to fewer instructions.
        return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated (adaLN-Zero)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = LayerNorm()
        self.attn = Attention(hidden_size, num_heads=num_heads, qkv_bias=True)
        self.norm2 = LayerNorm()
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), act_layer=GELU)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """Tokens (N, L, D), with the modulation (N, 6D) that `adaLN_modulation` makes of the condition."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation[:, None].chunk(6, dim=-1)  # (N, 1, D)
        x = x + gate_a * self.attn(self.norm1(x) * (1 + scale_a) + shift_a)  # (N, L, D)
        return x + gate_m * self.mlp(self.norm2(x) * (1 + scale_m) + shift_m)  # (N, L, D)


class FinalLayer(nn.Module):
    """Turns tokens into patches: (N, L, D) → (N, L, patch numbers)."""

    def __init__(self, hidden_size: int, patch_numbers: int):
        super().__init__()
        self.norm_final = LayerNorm()
        self.linear = nn.Linear(hidden_size, patch_numbers)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        shift, scale = modulation[:, None].chunk(2, dim=-1)  # (N, 1, D)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)
