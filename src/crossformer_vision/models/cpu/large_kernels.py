"""The convolutions of the first embedding on CPUs, where gradients of large kernels are slow."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from crossformer_vision.models.cpu.chunking import in_functorch
from crossformer_vision.models.grouping import ceil_div

MIN_KERNEL = 16
MAX_CHANNELS = 7  # images; later embeddings have small kernels


class LargeKernelConv2d(nn.Conv2d):
    """``Conv2d`` with a square kernel, padded by ``(kernel_size - stride) // 2``.

    oneDNN's backward pass is about ten times slower than the forward pass for kernels of 16 and more on
    images. CPU training therefore folds squares of ``stride x stride`` pixels into channels. The kernel is
    then ``kernel_size / stride`` wide with stride 1: the same products with the same weights, and a five
    times faster gradient for 32x32.

    Args:
        in_dim: Channels of the input.
        dim: Channels of the output.
        kernel_size: Side of the kernel.
        stride: Stride.
    """

    def __init__(self, in_dim: int, dim: int, kernel_size: int, stride: int) -> None:
        super().__init__(in_dim, dim, kernel_size, stride, padding=(kernel_size - stride) // 2)
        is_foldable = kernel_size % stride == 0 and (kernel_size - stride) % 2 == 0
        self.use_folding = is_foldable and kernel_size >= MIN_KERNEL and in_dim <= MAX_CHANNELS

    @override
    def forward(self, input: Tensor) -> Tensor:
        if self.use_folding and torch.is_grad_enabled() and input.device.type == "cpu":
            # Exported graphs and torch.func use the convolution itself.
            if not (torch.compiler.is_exporting() or torch.jit.is_tracing() or in_functorch()):
                return folded_conv2d(input, self.weight, self.bias, self.stride[0])
        return super().forward(input)


def folded_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """Convolution with squares of ``stride x stride`` pixels as channels.

    Args:
        x: Shape ``(B, C, H, W)``.
        weight: Shape ``(dim, C, kernel_size, kernel_size)``.
        bias: Shape ``(dim,)``.
        stride: Stride, which divides the kernel size.

    Returns:
        Shape ``(B, dim, ceil(H / stride), ceil(W / stride))``.
    """
    B, C, H, W = x.shape
    dim, _, k, _ = weight.shape
    s, p = stride, (k - stride) // 2
    bottom, right = ceil_div(H, s) * s - H, ceil_div(W, s) * s - W
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, p, p + right, p, p + bottom))
    h, w = x.shape[1] // s, x.shape[2] // s
    x = x.view(B, h, s, w, s, C).permute(0, 1, 3, 2, 4, 5).reshape(B, h, w, s * s * C)
    weight = weight.view(dim, C, k // s, s, k // s, s).permute(0, 3, 5, 1, 2, 4)
    weight = weight.reshape(dim, s * s * C, k // s, k // s).contiguous(memory_format=torch.channels_last)
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias)
