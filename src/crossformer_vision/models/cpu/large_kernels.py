"""The convolution of the first embedding: large kernels on images, whose gradient a CPU computes slowly."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossformer_vision.models.cpu.chunking import transformed
from crossformer_vision.models.grouping import ceil_div


class LargeKernelConv2d(nn.Conv2d):
    """`Conv2d` of a square kernel with a stride, padded by `(kernel - stride) // 2` as in an embedding.

    Of a kernel of 16 or more on an image, oneDNN computes the gradient at a tenth of the forward pass's rate.
    With the stride's squares of pixels as channels the kernel is `kernel / stride` wide and its stride 1: the
    same products in the same weights, and for 32x32 a gradient in a fifth of the time. Training on a CPU goes
    that way; the weights keep their shape.
    """

    def __init__(self, in_dim: int, dim: int, kernel_size: int, stride: int) -> None:
        super().__init__(in_dim, dim, kernel_size, stride, padding=(kernel_size - stride) // 2)
        whole = kernel_size % stride == 0 and (kernel_size - stride) % 2 == 0
        self.folds = whole and kernel_size >= 16 and in_dim < 8

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not torch.jit.is_scripting():
            # Graphs of inference, for other programs, and torch.func have the convolution itself.
            whole = torch.compiler.is_exporting() or torch.jit.is_tracing() or transformed()
            if self.folds and not whole and torch.is_grad_enabled() and input.device.type == "cpu":
                return self.folded(input, weight, bias)
        return F.conv2d(input, weight, bias, self.stride, self.padding)

    @torch.jit.unused
    def folded(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution with the squares of a stride as channels: (B, C, H, W) -> (B, dim, h, w)."""
        B, C, H, W = x.shape
        dim, _, k, _ = weight.shape
        s = self.stride[0]
        p = (k - s) // 2
        bottom, right = ceil_div(H, s) * s - H, ceil_div(W, s) * s - W
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, p, p + right, p, p + bottom))
        h, w = x.shape[1] // s, x.shape[2] // s
        x = x.view(B, h, s, w, s, C).permute(0, 1, 3, 2, 4, 5).reshape(B, h, w, s * s * C)
        weight = weight.view(dim, C, k // s, s, k // s, s).permute(0, 3, 5, 1, 2, 4)
        weight = weight.reshape(dim, s * s * C, k // s, k // s).contiguous(memory_format=torch.channels_last)
        return F.conv2d(x.permute(0, 3, 1, 2), weight, bias)
