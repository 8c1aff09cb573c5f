"""Group attention and patch embedding: all implementations give the same results."""

import pytest
import timm
import torch
import torch.nn.functional as F

from crossformer_vision.models.attention import apply_key_mask, group_attention, join_heads, split_heads
from crossformer_vision.models.cpu.large_kernels import LargeKernelConv2d


def definition(qkv, num_heads, bias, real):
    q, k, v = split_heads(qkv, num_heads)
    bias = apply_key_mask(bias, real)
    return join_heads((q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + bias).softmax(-1) @ v)


def inputs(groups, members, per_group, padded, dtype=torch.float64):
    torch.manual_seed(0)
    qkv = torch.randn(groups, members, 24, dtype=dtype, requires_grad=True)
    bias = torch.randn(groups if per_group else 1, 2, members, members, dtype=dtype, requires_grad=True)
    real = None
    if padded:
        real = torch.rand(groups, 1, 1, members) > 0.3
        real[0] = False  # a group with only padding
    return qkv, bias, real


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("per_group", [False, True], ids=["one bias", "a bias a group"])
def test_cpu_training(per_group, padded):
    """Covers several chunks: 300 groups of 9 make three."""
    qkv, bias, real = inputs(300, 9, per_group, padded)
    expected = definition(qkv, 2, bias, real)
    found = group_attention(qkv, 2, bias, real)
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad(found, [qkv, bias], grad), torch.autograd.grad(expected, [qkv, bias], grad)
    ):
        torch.testing.assert_close(one, other)


def test_second_derivatives_and_frozen_bias():
    qkv, bias, _ = inputs(2, 3, False, False)
    assert torch.autograd.gradgradcheck(lambda x, b: group_attention(x, 2, b, None), (qkv, bias))
    frozen = bias.detach()
    found = torch.autograd.grad(group_attention(qkv, 2, frozen, None).square().sum(), qkv)
    torch.testing.assert_close(
        found, torch.autograd.grad(definition(qkv, 2, frozen, None).square().sum(), qkv)
    )


def test_training_saves_no_attention_matrix():
    qkv, bias, real = inputs(50, 49, False, True, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        group_attention(qkv, 2, bias, real).sum().backward()
    assert kept and max(kept) <= qkv.numel() < 50 * 2 * 49 * 49


def test_functional_transforms():
    qkv, bias, real = inputs(4, 9, False, True)
    bias = bias.detach()

    def loss(x):
        return group_attention(x, 2, bias, real).square().sum()

    expected = torch.autograd.grad(definition(qkv, 2, bias, real).square().sum(), qkv)[0]
    torch.testing.assert_close(torch.func.grad(loss)(qkv), expected)
    each = torch.func.vmap(torch.func.grad(lambda x: group_attention(x[None], 2, bias, None).square().sum()))
    plain = torch.autograd.grad(definition(qkv, 2, bias, None).square().sum(), qkv)[0]
    torch.testing.assert_close(each(qkv), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("members", [9, 520])
def test_inference_in_16_bits(members, dtype):
    qkv, bias, real = inputs(3, members, False, True, dtype)
    exact = definition(qkv.double(), 2, bias.double(), real)
    with torch.no_grad():
        found = group_attention(qkv, 2, bias, real)
    assert found.dtype == dtype and found.isfinite().all()
    torch.testing.assert_close(found[1:].double(), exact[1:], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_in_16_bits(dtype):
    """Covers several chunks: 600 groups of 9 make two."""
    qkv, bias, real = inputs(600, 9, False, True, dtype)
    exact_qkv, exact_bias = (t.detach().double().requires_grad_() for t in (qkv, bias))
    exact = definition(exact_qkv, 2, exact_bias, real)
    found = group_attention(qkv, 2, bias, real)
    assert found.dtype == dtype and found.isfinite().all()
    torch.testing.assert_close(found[1:].double(), exact[1:], atol=2e-2, rtol=2e-2)
    grad = torch.randn_like(found)
    grad[0] = 0  # outputs of padded positions are discarded
    wanted = torch.autograd.grad(exact, [exact_qkv, exact_bias], grad.double())
    for one, other in zip(torch.autograd.grad(found, [qkv, bias], grad), wanted, strict=True):
        assert other.abs().max() > 0.5
        assert (one.double() - other).abs().max() < 2e-2 * other.abs().max()


@pytest.mark.parametrize("kernel", [8, 16, 32])
@pytest.mark.parametrize("size", [(32, 32), (36, 64)])
def test_large_kernels_match_convolution(kernel, size):
    torch.manual_seed(0)
    conv = LargeKernelConv2d(3, 5, kernel, 4).double()
    assert conv.use_folding == (kernel >= 16)
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    expected = F.conv2d(x, conv.weight, conv.bias, 4, (kernel - 4) // 2)
    found = conv(x)
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(found)
    wanted = [x, conv.weight, conv.bias]
    for one, other in zip(
        torch.autograd.grad(found, wanted, grad), torch.autograd.grad(expected, wanted, grad), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_bfloat16_is_close_to_float32():
    torch.manual_seed(0)
    model = timm.create_model("crossformer_nano", num_classes=10).eval()
    x = torch.randn(2, 3, 96, 70)
    with torch.no_grad():
        exact = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(x)
        low = model.bfloat16()(x.bfloat16())
    for y in (mixed, low):
        assert (y.float() - exact).abs().max() < 2e-2 * exact.abs().max()
