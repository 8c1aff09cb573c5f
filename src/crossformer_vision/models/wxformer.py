"""The weather CrossFormers of NCAR's CREDIT: WXFormer, its predecessor, and CAMulator.

Each is an encoder of CrossFormer stages and a U-Net decoder. Names of arguments and keys of weights are those
of CREDIT, so their configurations and checkpoints fit. Fields may have any height and width.
"""

import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from crossformer_vision.models.padding import PaddingMode, Sides, check_padding, crop, pad
from crossformer_vision.types import Kwargs

log = logging.getLogger("crossformer_vision")

PADDING_MODES: dict[str, PaddingMode] = {"earth": "sphere", "mirror": "mirror"}
"""Names of boundary paddings in CREDIT's configurations."""
KERNELS = ((4, 8, 16, 32), (2, 4), (2, 4), (2, 4))
SPECTRAL = (nn.Conv2d, nn.Linear, nn.ConvTranspose2d)


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
        nested: Keys have the index of a sequence, as in checkpoints of WXFormer.
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
        hidden = [nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU()]
        again = [nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU()]
        first = [nn.Linear(2, width), nn.LayerNorm(width), nn.ReLU()]
        self.layers = nn.Sequential(*first, *hidden, *again, nn.Linear(width, 1))
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
        H, W, window = x.shape[1], x.shape[2], self.window
        bottom, right = -H % window, -W % window
        qkv = self.to_qkv(self.norm(x))
        if bottom or right:
            qkv = F.pad(qkv, (0, 0, 0, right, 0, bottom))
        groups = self._partition(qkv).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.dpb().to(qkv.dtype)[None, None]
        if bottom or right:
            valid = F.pad(x.new_ones(1, H, W, 1), (0, 0, 0, right, 0, bottom)).bool()
            mask = self._partition(valid)[:, None, None, :, 0].repeat(len(x), 1, 1, 1)
            bias = torch.where(mask, bias, float("-inf"))
            bias = torch.where(mask.any(-1, keepdim=True), bias, 0.0)  # groups of padding alone
        q, k, v = groups.unbind(0)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        joined = attended.transpose(1, 2).flatten(2)
        return self.to_out(self._join(joined, len(x), H + bottom, W + right)[:, :H, :W])

    def _partition(self, x: Tensor) -> Tensor:
        """Groups of a map ``(B, H, W, C)``, shape ``(B * groups, members, C)``."""
        window = self.window
        if self.is_long:
            x = x.unflatten(2, (window, -1)).unflatten(1, (window, -1)).permute(0, 2, 4, 1, 3, 5)
        else:
            x = x.unflatten(2, (-1, window)).unflatten(1, (-1, window)).permute(0, 1, 3, 2, 4, 5)
        return x.flatten(3, 4).flatten(0, 2)

    def _join(self, groups: Tensor, batch: int, H: int, W: int) -> Tensor:
        """Map of groups, the inverse of ``_partition``."""
        window = self.window
        rows, columns = H // window, W // window
        x = groups.view(batch, rows, columns, window, window, -1)
        x = x.permute(0, 3, 1, 4, 2, 5) if self.is_long else x.permute(0, 1, 3, 2, 4, 5)
        return x.reshape(batch, H, W, -1)


class FeedForward(nn.Module):
    """Feed-forward network of maps ``(B, H, W, C)``.

    Args:
        dim: Number of channels, C.
        dropout: Dropout of the hidden layer.
    """

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        hidden = PointwiseConv(dim, 4 * dim)
        output = PointwiseConv(4 * dim, dim)
        self.layers = nn.Sequential(ChannelNorm(dim), hidden, nn.GELU(), nn.Dropout(dropout), output)

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
        upsampling: Literal["shuffle", "transposed", "bilinear"],
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
    """Embedding of patches. Its weights exist in all checkpoints; it is used for patches above 1x1.

    Args:
        in_channels: Channels of the field.
        dim: Channels of the output.
        patch: Frames, height and width of a patch.
    """

    def __init__(self, in_channels: int, dim: int, patch: tuple[int, int, int]) -> None:
        super().__init__()
        self.proj = nn.Conv3d(in_channels, dim, patch, stride=patch)
        self.norm = nn.LayerNorm(dim)

    @override
    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x[:, :, None])[:, :, 0]
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


class WeatherModel(nn.Module):
    """Base of the weather models: padding, encoder, decoder.

    Shape: ``(B, C, T, H, W)`` to ``(B, C_out, output_frames, H, W)``, with
    ``C = channels * levels + surface_channels + input_only_channels`` and
    ``C_out = channels * levels + surface_channels + output_only_channels``.

    Args:
        image_height: Height of the output fields, if ``interp`` is set.
        image_width: Width of the output fields, if ``interp`` is set.
        patch_height: Height of the patches that are embedded first. 1 for none.
        patch_width: Width of the patches.
        frames: Number of input frames, T.
        output_frames: Number of output frames.
        channels: Variables at each level.
        surface_channels: Variables at the surface.
        input_only_channels: Further input variables.
        output_only_channels: Further output variables.
        levels: Vertical levels.
        dim: Channels of each stage.
        depth: Units of each stage.
        dim_head: Channels of a head.
        global_window_size: Members of a group per axis of long-distance attention, by stage.
        local_window_size: The same of short-distance attention, for all stages or by stage.
        cross_embed_kernel_sizes: Kernels of the embedding of each stage.
        cross_embed_strides: Stride of each stage.
        attn_dropout: Dropout of attention weights.
        ff_dropout: Dropout of feed-forward networks.
        use_spectral_norm: Divide weights by their largest singular value.
        interp: Resize the output to ``image_height`` and ``image_width``.
        padding_conf: ``activate``, ``mode`` (``earth`` or ``mirror``), ``pad_lat`` (top and bottom) and
            ``pad_lon`` (left and right).
        **unused: Other keys of CREDIT's configurations, which are named in a warning.

    Raises:
        ValueError: If an argument is invalid.
    """

    upsampling: Literal["shuffle", "transposed", "bilinear"] = "shuffle"
    has_nested_keys = False

    def __init__(
        self,
        image_height: int = 640,
        image_width: int = 1280,
        patch_height: int = 1,
        patch_width: int = 1,
        frames: int = 2,
        output_frames: int = 1,
        channels: int = 4,
        surface_channels: int = 7,
        input_only_channels: int = 3,
        output_only_channels: int = 0,
        levels: int = 15,
        dim: Sequence[int] = (64, 128, 256, 512),
        depth: Sequence[int] = (2, 2, 8, 2),
        dim_head: int = 32,
        global_window_size: Sequence[int] = (5, 5, 2, 1),
        local_window_size: int | Sequence[int] = 10,
        cross_embed_kernel_sizes: Sequence[Sequence[int]] = KERNELS,
        cross_embed_strides: Sequence[int] = (4, 2, 2, 2),
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
        use_spectral_norm: bool = True,
        interp: bool = True,
        padding_conf: Kwargs | None = None,
        **unused: Any,
    ) -> None:
        super().__init__()
        if unused:
            log.warning("%s: arguments without effect: %s", type(self).__name__, ", ".join(sorted(unused)))
        if isinstance(local_window_size, int):
            local_window_size = [local_window_size] * 4
        for name, values in (
            ("dim", dim),
            ("depth", depth),
            ("global_window_size", global_window_size),
            ("local_window_size", local_window_size),
            ("cross_embed_kernel_sizes", cross_embed_kernel_sizes),
            ("cross_embed_strides", cross_embed_strides),
        ):
            if len(values) != 4:
                raise ValueError(f"{name}={values!r}: needs a value for each of the four stages")
        if max(patch_height, patch_width) > 1 and frames > 1:
            raise ValueError("patches above 1x1 need frames=1")
        self.size = (image_height, image_width) if interp else None
        self.in_channels = self.count_inputs(
            channels * levels + surface_channels + input_only_channels, frames
        )
        self.out_channels = channels * levels + surface_channels + output_only_channels
        self.output_frames = output_frames
        self.padding = _read_padding(padding_conf)
        self.cube_embedding = CubeEmbedding(self.in_channels, dim[0], (frames, patch_height, patch_width))
        self.use_patches = max(patch_height, patch_width) > 1
        self.patch = (patch_height, patch_width)
        widths = [dim[0] if self.use_patches else self.in_channels, *dim]
        self.strides = tuple(cross_embed_strides)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    CrossScaleEmbedding(
                        widths[n],
                        dim[n],
                        cross_embed_kernel_sizes[n],
                        cross_embed_strides[n],
                        self.has_nested_keys,
                    ),
                    Stage(
                        dim[n],
                        depth[n],
                        local_window_size[n],
                        global_window_size[n],
                        dim_head,
                        attn_dropout,
                        ff_dropout,
                    ),
                ]
            )
            for n in range(4)
        )
        self.up_block1 = UpBlock(dim[3], dim[2], dim[0], self.upsampling)
        self.up_block2 = UpBlock(2 * dim[2], dim[1], dim[0], self.upsampling)
        self.up_block3 = UpBlock(2 * dim[1], dim[0], dim[0], self.upsampling)
        self.up_block4 = self.create_last_block(2 * dim[0], self.out_channels * output_frames)
        self.init_weights()
        if use_spectral_norm:
            self._add_spectral_norm()

    def count_inputs(self, channels: int, frames: int) -> int:
        """Channels that the first embedding sees."""
        return channels * frames

    def create_last_block(self, in_channels: int, out_channels: int) -> nn.Module:
        """The last upsampling."""
        shuffle = nn.Conv2d(in_channels, 4 * out_channels, 3, padding=1)
        return nn.Sequential(shuffle, nn.PixelShuffle(2), nn.Conv2d(out_channels, out_channels, 3, padding=1))

    def init_weights(self) -> None:
        """Initialize weights beyond PyTorch's defaults."""

    def has_spectral_norm(self, name: str) -> bool:
        """Whether the layer of a name gets spectral normalization."""
        return True

    def _add_spectral_norm(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, SPECTRAL) and self.has_spectral_norm(name):
                nn.utils.spectral_norm(module)

    def remove_spectral_norm(self) -> None:
        """Store normalized weights, for inference and export. They cannot be loaded into CREDIT's models."""
        for module in self.modules():
            if isinstance(module, SPECTRAL) and hasattr(module, "weight_orig"):
                nn.utils.remove_spectral_norm(module)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations of the stages in the backward pass."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    def fold_frames(self, x: Tensor) -> Tensor:
        """Fold frames into channels: ``(B, C, T, H, W)`` to ``(B, C * T, H, W)``."""
        return x.flatten(1, 2)

    @override
    def forward(self, x: Tensor) -> Tensor:
        x = self.fold_frames(x)
        if x.shape[1] != self.in_channels:
            raise ValueError(f"the field has {x.shape[1]} channels and frames, expected {self.in_channels}")
        own_size = (x.shape[2], x.shape[3])
        if self.padding is not None:
            x = pad(x, *self.padding)
        unaligned_size = (x.shape[2], x.shape[3])
        x = self._pad_to_stride(x)
        aligned_size = (x.shape[2], x.shape[3])
        if self.use_patches:
            x = self.cube_embedding(x)
        maps: list[Tensor] = []
        for stage in self.layers:
            assert isinstance(stage, nn.ModuleList)
            for layer in stage:
                x = layer(x)
            maps.append(x)
        x = torch.cat([self.up_block1(x), maps[2]], 1)
        x = torch.cat([self.up_block2(x), maps[1]], 1)
        x = torch.cat([self.up_block3(x), maps[0]], 1)
        x = self.up_block4(x)
        if aligned_size != unaligned_size:
            x = self._remove_alignment(x, aligned_size, unaligned_size)
        if self.padding is not None:
            x = crop(x, self.padding[1])
        size = self.size or (own_size if aligned_size != unaligned_size else None)
        if size is not None and x.shape[2:] != size:
            x = F.interpolate(x, size, mode="bilinear")
        return x.unflatten(1, (self.out_channels, self.output_frames))

    def _pad_to_stride(self, x: Tensor) -> Tensor:
        """Repeat the last row and column so that strides divide the size."""
        total = self.strides[0] * self.strides[1] * self.strides[2] * self.strides[3]
        bottom, right = -x.shape[2] % (total * self.patch[0]), -x.shape[3] % (total * self.patch[1])
        if bottom or right:
            x = F.pad(x, (0, right, 0, bottom), mode="replicate")
        return x

    @staticmethod
    def _remove_alignment(x: Tensor, aligned: tuple[int, int], unaligned: tuple[int, int]) -> Tensor:
        """Remove the rows and columns of ``_pad_to_stride`` from an output, which may be smaller."""
        if x.shape[2:] != aligned:
            x = F.interpolate(x, aligned, mode="bilinear")
        return x[:, :, : unaligned[0], : unaligned[1]]


class WXFormer(WeatherModel):
    """WXFormer: pixel shuffle in the decoder. See ``WeatherModel`` for the arguments.

    ``load_state_dict`` accepts keys of old and new checkpoints.
    """

    has_nested_keys = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register_load_state_dict_pre_hook(_nest_old_keys)

    @override
    def init_weights(self) -> None:
        blocks = (self.up_block1, self.up_block2, self.up_block3)
        last = self.up_block4
        assert isinstance(last, nn.Sequential)
        for conv in [block.conv for block in blocks] + [last[0]]:
            assert isinstance(conv, nn.Conv2d)
            init_icnr(conv)


class WeatherCrossFormer(WeatherModel):
    """The CrossFormer of CREDIT before WXFormer. See ``WeatherModel`` for the other arguments.

    Args:
        upsample_v_conv: Bilinear upsampling and convolutions in the decoder instead of transposed
            convolutions.
        **options: Arguments of ``WeatherModel``.
    """

    def __init__(self, upsample_v_conv: bool = False, **options: Any) -> None:
        self.upsampling = "bilinear" if upsample_v_conv else "transposed"
        super().__init__(**options)

    @override
    def create_last_block(self, in_channels: int, out_channels: int) -> nn.Module:
        if self.upsampling == "transposed":
            return nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1)
        upsample = nn.Upsample(scale_factor=2, mode="bilinear")
        return nn.Sequential(upsample, nn.Conv2d(in_channels, out_channels, 3, padding=1))


class CAMulator(WeatherModel):
    """CAMulator: WXFormer's decoder, averages of pairs of frames, one output frame. See ``WeatherModel``."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "output_frames": 1})

    @override
    def count_inputs(self, channels: int, frames: int) -> int:
        return channels * max(1, frames // 2)

    @override
    def has_spectral_norm(self, name: str) -> bool:
        return not name.endswith(".sharp")

    @override
    def fold_frames(self, x: Tensor) -> Tensor:
        if x.shape[2] > 1:
            x = F.avg_pool3d(x, (2, 1, 1))
        return super().fold_frames(x)


def init_icnr(conv: nn.Conv2d) -> None:
    """Initialize the convolution before a pixel shuffle by 2 so that each 2x2 block starts equal (ICNR)."""
    subkernel = torch.empty(conv.out_channels // 4, *conv.weight.shape[1:])
    nn.init.kaiming_normal_(subkernel)
    with torch.no_grad():
        conv.weight.copy_(subkernel.repeat_interleave(4, 0))
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)


def _read_padding(conf: Kwargs | None) -> tuple[PaddingMode, Sides] | None:
    """Mode and sides of the padding that a configuration describes."""
    if not conf or not conf.get("activate", False):
        return None
    mode = conf.get("mode", "earth")
    if mode not in PADDING_MODES:
        raise ValueError(f"padding_conf: unknown mode '{mode}'. Choose from {', '.join(PADDING_MODES)}")
    (top, bottom), (left, right) = conf["pad_lat"], conf["pad_lon"]
    check_padding(PADDING_MODES[mode], (top, bottom, left, right))
    return PADDING_MODES[mode], (top, bottom, left, right)


def _nest_old_keys(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Rename convolutions of old checkpoints: ``convs.1.weight`` to ``convs.1.1.weight``."""
    for name in list(state):
        head, separator, tail = name.removeprefix(prefix).partition(".convs.")
        parts = tail.split(".")
        if separator and len(parts) == 2:
            state[f"{prefix}{head}.convs.{parts[0]}.1.{parts[1]}"] = state.pop(name)
