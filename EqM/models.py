"""The Equilibrium Matching transformer for images and video.

The network is a DiT with adaLN-Zero conditioning (Peebles & Xie 2023, arXiv 2212.09748), as Equilibrium Matching uses
it (Wang & Du 2025, arXiv 2510.02300). An image is a video of one frame: both take the same path. Image networks keep
the state-dict keys of the published checkpoints. A network computes in the type of its weights.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clip_field import ClipOutput
from energy import ENERGIES, energy, energy_gradient
from layers import Block, FinalLayer, LabelEmbedder, PatchEmbedder, TimestepEmbedder, check_sizes
from positions import POSITIONS, head_pairs, rotations, sincos_positions, time_positions


class EqM(nn.Module):
    """The field f(x) of Equilibrium Matching. It points from noise to data.

    Args:
        input_size: height and width of a square image, (H, W) of another one, or (T, H, W) of a clip.
        patch_size: height and width of a patch.
        in_channels: channels of x.
        hidden_size, depth, num_heads, mlp_ratio: width D, number of blocks, heads, width of the MLP over D.
        num_classes: classes without the null class, which has the index `num_classes`.
        temporal_patch: frames in a patch (video only).
        uncond: the network does not see γ; the timestep embedder gets zeros.
        energy: one of energy.ENERGIES. The field is the gradient of this energy; with "none" it is the output itself.
        clip_gain, clip_a, clip_b: if clip_gain is not 0, the output is a clip x̂, without noise, and the field follows
            from x̂ − x, as ClipOutput says. The noise in x then goes round the network, so that a token may hold as many
            numbers as the network is wide, or more.
        positions: one of POSITIONS. With "rotary" the network takes inputs of any size that the patches divide, and
            `input_size` is only the one that it is meant for.

    Attributes:
        grad_checkpoint: if True, a block keeps only its input, and the backward pass computes the rest again.

    Raises:
        ValueError: patches do not divide the input, heads do not divide the width, the energy or the positions are
            unknown, heads are too narrow for rotary positions, or a clip is to have an energy.
    """

    def __init__(
        self,
        input_size: int | tuple[int, int] | tuple[int, int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        num_classes: int = 1000,
        mlp_ratio: float = 4.0,
        temporal_patch: int = 1,
        uncond: bool = True,
        energy: str = "none",
        clip_gain: float = 0.0,
        positions: str = "fixed",
        clip_a: float = 0.0,
        clip_b: float = 1.0,
    ):
        super().__init__()
        shape = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
        self.is_video = len(shape) == 3
        frames, height, width = shape if self.is_video else (1, *shape)
        check_sizes((frames, height, width), temporal_patch, patch_size, hidden_size, num_heads)
        if energy not in ENERGIES:
            raise ValueError(f"unknown energy {energy!r}: choose {', '.join(ENERGIES)}")
        if clip_gain and energy != "none":
            raise ValueError("a network with an energy cannot put out the clip")
        if positions not in POSITIONS:
            raise ValueError(f"unknown positions {positions!r}: choose {', '.join(POSITIONS)}")
        self.positions, self.head_width = positions, hidden_size // num_heads
        if positions == "rotary":
            head_pairs(self.head_width)
        self.in_channels, self.num_classes, self.uncond, self.energy = in_channels, num_classes, uncond, energy
        self.clip_output = ClipOutput(clip_gain, clip_a, clip_b) if clip_gain else None
        # Published image checkpoints predict a second half of channels, which nothing reads.
        self.out_channels = in_channels if self.is_video else 2 * in_channels
        self.patch = (temporal_patch, patch_size)
        self.grid = (frames // temporal_patch, height // patch_size, width // patch_size)
        self.grad_checkpoint = False

        # The frames of a patch are folded into its channels, so that one 2-D embedding serves images and clips.
        self.x_embedder = PatchEmbedder(temporal_patch * in_channels, patch_size, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.pos_embed = None
        if positions == "fixed":
            places = torch.empty(1, math.prod(self.grid[1:]), hidden_size)  # (1, hw, D)
            self.pos_embed = nn.Parameter(places, requires_grad=False)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, temporal_patch * patch_size**2 * self.out_channels)
        self.initialize_weights()
        self.train()

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one sample, (C, H, W) or (C, T, H, W)."""
        (frames, rows, columns), (pt, p) = self.grid, self.patch
        picture = (rows * p, columns * p)
        return (self.in_channels, frames * pt, *picture) if self.is_video else (self.in_channels, *picture)

    @property
    def num_tokens(self) -> int:
        """The number of tokens of one sample."""
        return math.prod(self.grid)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.final_layer.linear.weight.device

    def initialize_weights(self) -> None:
        """Xavier for linear layers and patches, normal with 0.02 for embeddings, zeros for adaLN and the output.

        Fixed positions get their values here too.
        """
        if self.pos_embed is not None and self.device.type != "meta":  # arithmetic there imports torch's compiler
            self.pos_embed.copy_(sincos_positions(self.pos_embed.shape[-1], *self.grid[1:]))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        for module in (*self.blocks, self.final_layer):
            nn.init.zeros_(module.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)
        if self.energy == "l2":
            # From f = 0 the gradient of ‖f‖² is 0 for ever, and so is the gradient of the loss in every weight.
            nn.init.normal_(self.final_layer.linear.weight, std=0.02)

    def train(self, mode: bool = True) -> "EqM":
        """Also chooses the attention: training an energy takes second derivatives, which fused attention lacks."""
        if self.energy != "none":
            for block in self.blocks:
                block.attn.fused = not mode
        return super().train(mode)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        seconds_per_frame: Tensor | float = 0.1,
        with_tokens: bool = False,
        spacing: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The field at x.

        Args:
            x: (N, C, H, W), or (N, C, T, H, W) for a video network.
            t: γ, (N,). An `uncond` network does not look at it.
            y: class labels, (N,). `num_classes` is the null class.
            seconds_per_frame: seconds from one frame of a clip to the next, (N,) or one number. Images ignore it.
            with_tokens: also return the tokens of the last block.
            spacing: of rows and of columns, as `positions.rotations` takes it, for rotary positions; None: 1.

        Returns:
            The field, in the shape of x. With `with_tokens`, also the tokens (N, T'h'w', D).
        """
        field, tokens = self.field_and_tokens(x, *self.modulations(t, y), seconds_per_frame, spacing)
        return (field, tokens) if with_tokens else field

    def modulations(self, t: Tensor, y: Tensor) -> tuple[list[Tensor], Tensor]:
        """What γ (N,) and labels (N,) do to each block, (N, 6D), and to the last layer, (N, 2D).

        An `uncond` network's modulations stay the same from one sampling step to the next.
        """
        if self.uncond:
            t = t.new_zeros(len(t))  # (N,), also where each frame has its own γ
        c = self.t_embedder(t) + self.y_embedder(y)  # (N, D)
        return [block.adaLN_modulation(c) for block in self.blocks], self.final_layer.adaLN_modulation(c)

    def field(
        self, x: Tensor, blocks: Sequence[Tensor], final: Tensor, seconds_per_frame: Tensor | float = 0.1
    ) -> Tensor:
        """The field at x under given modulations of the blocks and of the last layer, in the shape of x."""
        return self.field_and_tokens(x, blocks, final, seconds_per_frame)[0]

    def field_and_tokens(
        self,
        x: Tensor,
        blocks: Sequence[Tensor],
        final: Tensor,
        seconds_per_frame: Tensor | float,
        spacing: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The field at x, in its shape, and the tokens of the last block, (N, T'h'w', D)."""
        if self.energy == "none":
            return self.output(x, blocks, final, seconds_per_frame, spacing)
        output = partial(self.output, blocks=blocks, final=final, seconds_per_frame=seconds_per_frame, spacing=spacing)
        return energy_gradient(self.energy, output, x)

    def output(
        self,
        x: Tensor,
        blocks: Sequence[Tensor],
        final: Tensor,
        seconds_per_frame: Tensor | float,
        spacing: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The output of the network, in the shape of x, and the tokens of the last block, (N, T'h'w', D)."""
        grid, tokens = self.grid_of(x), self.embed(x)  # (N, T'h'w', D)
        # The device writes the number itself: a CUDA graph cannot record a copy from the host.
        given = isinstance(seconds_per_frame, Tensor)
        seconds = seconds_per_frame if given else torch.full((1,), seconds_per_frame, device=x.device)  # (N,) or (1,)
        rotation = None
        if self.positions == "rotary":
            rotation = self.rotation(grid, seconds, spacing)  # (2, N or 1, 1, T'h'w', d/2)
        elif self.is_video:
            times = time_positions(tokens.shape[-1], grid[0], self.patch[0], seconds.expand(len(x)))  # (N, T', D)
            tokens = tokens + times.repeat_interleave(grid[1] * grid[2], dim=1).to(tokens.dtype)
        for block, modulation in zip(self.blocks, blocks, strict=True):
            if self.grad_checkpoint:
                # A block draws no random numbers, and a CUDA graph cannot read the state of the generator.
                tokens = checkpoint(block, tokens, modulation, rotation, use_reentrant=False, preserve_rng_state=False)
            else:
                tokens = block(tokens, modulation, rotation)  # (N, T'h'w', D)
        out = self.unpatchify(self.final_layer(tokens, final), grid).view(x.shape)
        return self.clip_output.field(out, x, self.patch[0]) if self.clip_output else out, tokens

    def grid_of(self, x: Tensor) -> tuple[int, int, int]:
        """How many tokens x has in time, rows and columns."""
        pt, p = self.patch
        return (x.shape[2] if self.is_video else 1) // pt, x.shape[-2] // p, x.shape[-1] // p

    def rotation(self, grid: tuple[int, int, int], seconds_per_frame: Tensor, spacing: Tensor | None = None) -> Tensor:
        """The rotary positions on a grid, for seconds_per_frame (N,) or (1,): (2, N or 1, 1, T'h'w', d/2)."""
        return rotations(self.head_width, grid, self.patch[0], seconds_per_frame, spacing)

    def embed(self, x: Tensor) -> Tensor:
        """Cuts x into patches, embeds them, and adds their fixed places in the picture: → (N, T'h'w', D)."""
        (frames, rows, columns), (pt, p) = self.grid_of(x), self.patch
        x = x.view(len(x), self.in_channels, frames, pt, rows, p, columns, p)
        patches = x.permute(0, 2, 4, 6, 3, 1, 5, 7).flatten(4).flatten(2, 3)  # (N, T', h'w', ptCpp)
        tokens = self.x_embedder(patches)  # (N, T', h'w', D)
        return (tokens if self.pos_embed is None else tokens + self.pos_embed[:, None]).flatten(1, 2)

    def unpatchify(self, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """(N, T'h'w', pt·p·p·C_out) on a grid → (N, C, T, H, W). Channels after the first C are dropped."""
        (frames, rows, columns), (pt, p) = grid, self.patch
        x = patches.view(-1, frames, rows, columns, pt, p, p, self.out_channels)
        x = x[..., : self.in_channels].permute(0, 7, 1, 4, 2, 5, 3, 6)  # (N, C, T', pt, h', p, w', p)
        return x.reshape(x.shape[0], self.in_channels, frames * pt, rows * p, columns * p)


@torch.no_grad()
def sample_energy(network: EqM, x: Tensor, y: Tensor, seconds_per_frame: Tensor | float = 0.1) -> Tensor:
    """The energy −E of samples, divided by their number of elements, in float32: (N,). It is low at the data.

    Args:
        network: one with an explicit energy.
        x: (N, C, H, W) or (N, C, T, H, W), float32.
        y: class labels, (N,). `num_classes` is the null class.
        seconds_per_frame: (N,) or one number. Images ignore it.

    Raises:
        ValueError: the network has no explicit energy.
    """
    if network.energy == "none":
        raise ValueError("the network has no explicit energy")
    blocks, final = network.modulations(torch.zeros(len(x), device=x.device), y)
    f, _ = network.output(x, blocks, final, seconds_per_frame)
    return -energy(network.energy, x, f) / x[0].numel()
