"""The weather CrossFormers of NCAR's CREDIT: WXFormer, its predecessor, and CAMulator.

Each is an encoder of CrossFormer stages and a U-Net decoder. Names of arguments and keys of weights are those
of CREDIT, so their configurations and checkpoints fit. Fields may have any height and width.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from crossformer_vision.models.padding import PaddingMode, Sides, check_padding, crop, pad
from crossformer_vision.models.wxformer_layers import (
    CrossScaleEmbedding,
    CubeEmbedding,
    Stage,
    UpBlock,
    Upsampling,
    init_icnr,
)
from crossformer_vision.types import Kwargs

log = logging.getLogger("crossformer_vision")

PADDING_MODES: dict[str, PaddingMode] = {"earth": "sphere", "mirror": "mirror"}
"""Names of boundary paddings in CREDIT's configurations."""
KERNELS = ((4, 8, 16, 32), (2, 4), (2, 4), (2, 4))
SPECTRAL = (nn.Conv2d, nn.Linear, nn.ConvTranspose2d)


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

    upsampling: Upsampling = "shuffle"
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
        self._warn_unused(unused)
        if isinstance(local_window_size, int):
            local_window_size = [local_window_size] * 4
        _check_stages(dim=dim, depth=depth, cross_embed_strides=cross_embed_strides)
        _check_stages(global_window_size=global_window_size, local_window_size=local_window_size)
        _check_stages(cross_embed_kernel_sizes=cross_embed_kernel_sizes)
        self.size = (image_height, image_width) if interp else None
        self.in_channels = self.count_inputs(
            channels * levels + surface_channels + input_only_channels, frames
        )
        self.out_channels = channels * levels + surface_channels + output_only_channels
        self.output_frames = output_frames
        self.padding = _read_padding(padding_conf)
        self.cube_embedding = CubeEmbedding(self.in_channels, dim[0], (frames, patch_height, patch_width))
        self.patch = (patch_height, patch_width)
        self.use_patches = max(self.patch) > 1
        widths = [dim[0] if self.use_patches else self.in_channels, *dim]
        self.total_stride = math.prod(cross_embed_strides)
        embeddings = [
            CrossScaleEmbedding(widths[n], dim[n], kernels, cross_embed_strides[n], self.has_nested_keys)
            for n, kernels in enumerate(cross_embed_kernel_sizes)
        ]
        windows = zip(local_window_size, global_window_size, strict=True)
        stages = [
            Stage(width, units, *window, dim_head, attn_dropout, ff_dropout)
            for width, units, window in zip(dim, depth, windows, strict=True)
        ]
        self.layers = nn.ModuleList(map(nn.ModuleList, zip(embeddings, stages, strict=True)))
        self._create_decoder(dim)
        self.init_weights()
        if use_spectral_norm:
            self._add_spectral_norm()

    def _warn_unused(self, names: Kwargs) -> None:
        if names:
            log.warning("%s: arguments without effect: %s", type(self).__name__, ", ".join(sorted(names)))

    def _create_decoder(self, dim: Sequence[int]) -> None:
        """Create the decoder for stages of ``dim`` channels."""
        self.up_block1 = UpBlock(dim[3], dim[2], dim[0], self.upsampling)
        self.up_block2 = UpBlock(2 * dim[2], dim[1], dim[0], self.upsampling)
        self.up_block3 = UpBlock(2 * dim[1], dim[0], dim[0], self.upsampling)
        self.up_block4 = self.create_last_block(2 * dim[0], self.out_channels * self.output_frames)

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
        rows, columns = (self.total_stride * side for side in self.patch)
        bottom, right = -x.shape[2] % rows, -x.shape[3] % columns
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


def _check_stages(**options: Sequence[object]) -> None:
    """Check that options have a value for each of the four stages."""
    for name, values in options.items():
        if len(values) != 4:
            raise ValueError(f"{name}={values!r}: needs a value for each of the four stages")


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
