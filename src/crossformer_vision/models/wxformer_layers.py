"""Layers of the weather models in ``wxformer.py``."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from crossformer_vision.models.attention import group_attention
from crossformer_vision.models.cpu.chunking import chunked_apply
from crossformer_vision.models.cpu.feed_forward import linear_of_gelu
from crossformer_vision.models.grouping import (
    Layout,
    ceil_div,
    group,
    key_padding_mask,
    sda_layout,
    ungroup,
)
from crossformer_vision.models.heads import apply_key_mask, join_heads, split_heads

Upsampling = Literal["shuffle", "transposed", "bilinear"]
"""How the decoder doubles height and width, see ``UpBlock``."""


class ChannelNorm(nn.Module):
    """Layer normalization over the last dimension, with weights of the shape ``(1, C, 1, 1)``.

    Args:
        dim: Number of channels, C.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, dim, 1, 1))
        self.b = nn.Parameter(torch.zeros(1, dim, 1, 1))

    @override
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.g.flatten(), self.b.flatten(), eps=1e-5)


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution of maps ``(B, H, W, C)``, computed as a linear layer."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias)

    @override
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.flatten(1), self.bias)


class PaddedConv(nn.Conv2d):
    """A strided convolution that pads by kernel size minus stride, the smaller half on the top left."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        total = self.kernel_size[0] - self.stride[0]
        before, after = total // 2, total - total // 2
        return super().forward(F.pad(input, (before, after, before, after)))


class CrossScaleEmbedding(nn.Module):
    """Convolutions with kernels of several sizes, whose outputs are concatenated (CEL).

    Shape: ``(B, in_channels, H, W)`` to ``(B, dim, H / stride, W / stride)``.

    Args:
        in_channels: Channels of the input.
        dim: Channels of the output: half from the smallest kernel, a quarter from the next, ….
        kernel_sizes: Sides of the kernels.
        stride: Stride of all of them.
        nested: Wrap each convolution in a sequence, so that keys are those of WXFormer's checkpoints.
    """

    def __init__(
        self, in_channels: int, dim: int, kernel_sizes: Sequence[int], stride: int, nested: bool
    ) -> None:
        super().__init__()
        kernels = sorted(kernel_sizes)
        dims = [dim // 2**n for n in range(1, len(kernels))]
        dims.append(dim - sum(dims))
        convs: list[nn.Module] = [
            PaddedConv(in_channels, width, kernel, stride=stride)
            for width, kernel in zip(dims, kernels, strict=True)
        ]
        self.convs = nn.ModuleList(nn.Sequential(nn.Identity(), conv) if nested else conv for conv in convs)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([conv(x) for conv in self.convs], 1)


class PositionBias(nn.Module):
    """Dynamic position bias (DPB), one for all heads.

    The published table has ``(2w + 1)**2`` offsets but is indexed as if it had ``(2w - 1)**2``. Published
    weights were trained with this, so it is kept.

    Args:
        width: Hidden width.
        window: Members of a group per axis, w.
    """

    def __init__(self, width: int, window: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs in (2, width, width):
            layers += [nn.Linear(inputs, width), nn.LayerNorm(width), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 1))
        positions = torch.arange(window)
        grid = torch.stack(torch.meshgrid(positions, positions, indexing="ij")).flatten(1)
        offsets = grid[:, :, None] - grid[:, None, :] + window - 1
        rows = offsets[0] * (2 * window - 1) + offsets[1]
        side = 2 * window + 1
        self.register_buffer("rows", rows.flatten(), persistent=False)
        used = torch.arange((2 * window - 1) ** 2)
        table = torch.stack([used // side - window, used % side - window], 1).float()
        self.register_buffer("offsets", table, persistent=False)
        self.rows: Tensor
        self.offsets: Tensor

    @override
    def forward(self) -> Tensor:
        """Bias of each pair of members, shape ``(L, L)``."""
        members = int(len(self.rows) ** 0.5)
        return self.layers(self.offsets)[:, 0][self.rows].view(members, members)


class GroupAttention(nn.Module):
    """Attention within groups of ``window**2`` positions.

    Shape: ``(B, H, W, C)`` to the same. Maps that the groups do not fill are padded on the bottom right, and
    padding is masked.

    Args:
        dim: Number of channels, C.
        window: Members of a group per axis.
        is_long: Members are spread over the whole map (LDA) instead of being neighbors (SDA).
        dim_head: Channels of a head.
        dropout: Dropout of attention weights.
    """

    def __init__(self, dim: int, window: int, is_long: bool, dim_head: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.window, self.is_long, self.dropout = dim // dim_head, window, is_long, dropout
        inner = self.heads * dim_head
        self.norm = ChannelNorm(dim)
        self.to_qkv = PointwiseConv(dim, 3 * inner, bias=False)
        self.to_out = PointwiseConv(inner, dim)
        self.dpb = PositionBias(dim // 4, window)

    @override
    def forward(self, x: Tensor) -> Tensor:
        B, H, W, _ = x.shape
        layout = self.layout(H, W)
        members = layout.gh * layout.gw
        bias = self.dpb().expand(1, self.heads, members, members)
        mask = key_padding_mask(B, H, W, layout, x.device)
        groups = group(self.norm(x), layout)
        return ungroup(chunked_apply(members, self.attend, groups, bias, mask), layout, B, H, W)

    def layout(self, H: int, W: int) -> Layout:
        """Layout of the groups of an ``H x W`` map."""
        window = self.window
        if self.is_long:
            return Layout(1, 1, window, window, ceil_div(H, window), ceil_div(W, window))
        return sda_layout(H, W, window)

    def attend(self, x: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
        """Attention within groups.

        Args:
            x: Groups, shape ``(N, L, C)``.
            bias: Position bias, shape ``(1, h, L, L)``.
            mask: ``True`` for valid keys, shape ``(N, 1, 1, L)``. ``None`` if all are valid.
        """
        qkv = self.to_qkv(x)
        bias = bias.to(qkv.dtype)
        if not (self.training and self.dropout):
            return self.to_out(group_attention(qkv, self.heads, bias, mask))
        q, k, v = split_heads(qkv, self.heads)
        bias = apply_key_mask(bias, mask)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=self.dropout)
        return self.to_out(join_heads(attended))


class ActivatedConv(PointwiseConv):
    """GELU and a 1x1 convolution of maps ``(B, H, W, C)``. Training on CPUs recomputes GELU."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        assert self.bias is not None
        x = linear_of_gelu(input.flatten(0, -2), self.weight.flatten(1), self.bias)
        return x.unflatten(0, input.shape[:-1])


class FeedForward(nn.Module):
    """Feed-forward network of maps ``(B, H, W, C)``.

    Args:
        dim: Number of channels, C.
        dropout: Dropout of the hidden layer.
    """

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        hidden = PointwiseConv(dim, 4 * dim)
        if dropout:
            last: list[nn.Module] = [nn.GELU(), nn.Dropout(dropout), PointwiseConv(4 * dim, dim)]
        else:  # the same keys
            last = [nn.Identity(), nn.Identity(), ActivatedConv(4 * dim, dim)]
        self.layers = nn.Sequential(ChannelNorm(dim), hidden, *last)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Stage(nn.Module):
    """Units of short-distance attention, feed-forward, long-distance attention, feed-forward.

    Shape: ``(B, C, H, W)`` to the same.

    Args:
        dim: Number of channels, C.
        depth: Number of units.
        local_window: Members of a group per axis of short-distance attention.
        global_window: The same of long-distance attention.
        dim_head: Channels of a head.
        attn_dropout: Dropout of attention weights.
        ff_dropout: Dropout of feed-forward networks.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        local_window: int,
        global_window: int,
        dim_head: int,
        attn_dropout: float,
        ff_dropout: float,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    GroupAttention(dim, local_window, False, dim_head, attn_dropout),
                    FeedForward(dim, ff_dropout),
                    GroupAttention(dim, global_window, True, dim_head, attn_dropout),
                    FeedForward(dim, ff_dropout),
                ]
            )
            for _ in range(depth)
        )

    @override
    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1).contiguous()
        for unit in self.layers:
            assert isinstance(unit, nn.ModuleList)
            for layer in unit:
                if self.grad_checkpointing and torch.is_grad_enabled():
                    x = x + checkpoint(layer, x, use_reentrant=False)
                else:
                    x = x + layer(x)
        return x.permute(0, 3, 1, 2)


class UpBlock(nn.Module):
    """Doubles height and width, then applies a residual stack of two convolutions.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        groups: Groups of the group normalization.
        upsampling: ``shuffle`` (pixel shuffle and a residual convolution), ``transposed`` (transposed
            convolution) or ``bilinear`` (bilinear upsampling and a convolution).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        groups: int,
        upsampling: Upsampling,
    ) -> None:
        super().__init__()
        self.upsampling = upsampling
        self.conv: nn.Module
        if upsampling == "transposed":
            self.conv = nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2)
        else:
            factor = 4 if upsampling == "shuffle" else 1
            self.conv = nn.Conv2d(in_channels, factor * out_channels, 3, padding=1)
        if upsampling == "shuffle":
            self.sharp = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        stack: list[nn.Module] = []
        for _ in range(2):
            convolution = nn.Conv2d(out_channels, out_channels, 3, padding=1)
            stack += [convolution, nn.GroupNorm(groups, out_channels), nn.SiLU()]
        self.b = nn.Sequential(*stack)

    @override
    def forward(self, x: Tensor) -> Tensor:
        if self.upsampling == "bilinear":
            x = F.interpolate(x, scale_factor=2, mode="bilinear")
        x = self.conv(x)
        if self.upsampling == "shuffle":
            x = F.pixel_shuffle(x, 2)
            x = x + self.sharp(x)
        return x + self.b(x)


class CubeEmbedding(nn.Module):
    """Embedding of patches. Its weights exist in all checkpoints; it is used for patches larger than 1x1.

    Args:
        in_channels: Channels of the field.
        dim: Channels of the output.
        patch: Frames, height and width of a patch.

    Raises:
        ValueError: If a patch is larger than 1x1 and has several frames.
    """

    def __init__(self, in_channels: int, dim: int, patch: tuple[int, int, int]) -> None:
        super().__init__()
        if max(patch[1:]) > 1 and patch[0] > 1:
            raise ValueError("patches larger than 1x1 require frames=1")
        self.proj = nn.Conv3d(in_channels, dim, patch, stride=patch)
        self.norm = nn.LayerNorm(dim)

    @override
    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x[:, :, None])[:, :, 0]
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


def init_icnr(conv: nn.Conv2d) -> None:
    """Initialize the convolution before a pixel shuffle by 2 so that each 2x2 block starts equal (ICNR)."""
    subkernel = torch.empty(conv.out_channels // 4, *conv.weight.shape[1:])
    nn.init.kaiming_normal_(subkernel)
    with torch.no_grad():
        conv.weight.copy_(subkernel.repeat_interleave(4, 0))
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
