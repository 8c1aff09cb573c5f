"""Recomputed GELU matches the values and gradients of GELU followed by a linear layer."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import crossformer_vision  # noqa: F401  (registers the models)
from crossformer_vision.models.cpu.feed_forward import gelu_linear


def inputs(rows, dtype=torch.float64):
    torch.manual_seed(0)
    return torch.randn(rows, 12, dtype=dtype, requires_grad=True), nn.Linear(12, 5).to(dtype)


@pytest.mark.parametrize("rows", [0, 7, 5000])  # no rows, one chunk, five chunks
def test_cpu_training(rows):
    x, linear = inputs(rows)
    expected, found = linear(F.gelu(x)), gelu_linear(x, linear)
    torch.testing.assert_close(found, expected)
    wanted, grad = [x, linear.weight, linear.bias], torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad(found, wanted, grad), torch.autograd.grad(expected, wanted, grad), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_second_derivatives():
    x, linear = inputs(4)
    assert torch.autograd.gradgradcheck(lambda x, *_: gelu_linear(x, linear), (x, *linear.parameters()))


def test_training_saves_hidden_map_once():
    x, linear = inputs(50)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        gelu_linear(x, linear)
    assert sum(kept) == x.numel() + linear.weight.numel()


@pytest.mark.parametrize("frozen", [("weight",), ("bias",), ("weight", "bias")])
def test_frozen_weights_have_no_gradient(frozen):
    x, linear = inputs(9)
    for name in frozen:
        getattr(linear, name).requires_grad_(False)
    gelu_linear(x, linear).sum().backward()
    for name, p in linear.named_parameters():
        assert (p.grad is None) == (name in frozen)
    found = x.grad.clone()
    x.grad = None
    linear(F.gelu(x)).sum().backward()
    torch.testing.assert_close(found, x.grad)


def test_autocast_with_bfloat16_hidden_map():
    x, linear = inputs(64, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = x.bfloat16()
        expected, found = linear(F.gelu(hidden)), gelu_linear(hidden, linear)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)
    wanted = [x, linear.weight, linear.bias]
    for one, other in zip(
        torch.autograd.grad(found.float().sum(), wanted), torch.autograd.grad(expected.float().sum(), wanted)
    ):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, atol=2e-2, rtol=2e-2)


def test_autocast_with_float32_hidden_map():
    x, linear = inputs(64, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = gelu_linear(x, linear)
    assert found.dtype == torch.bfloat16
    found.float().sum().backward()
    assert x.grad.isfinite().all() and x.grad.dtype == torch.float32


def test_custom_linear_layers_are_called():
    """Adapters, hooks and parametrized weights of the linear layer take effect."""

    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    x, linear = inputs(9)
    adapted = Adapted(12, 5).double()
    adapted.load_state_dict(linear.state_dict())
    torch.testing.assert_close(gelu_linear(x, adapted), linear(F.gelu(x)) + 1)

    seen = []
    linear.register_full_backward_hook(lambda *args: seen.append("backward"))
    linear.register_forward_hook(lambda *args: seen.append("forward"))
    gelu_linear(x, linear).sum().backward()
    assert seen == ["forward", "backward"]

    normed = torch.nn.utils.parametrizations.weight_norm(inputs(9)[1])
    gelu_linear(x, normed).sum().backward()
    assert all(p.grad is not None for p in normed.parameters())


def test_functional_transforms():
    x, linear = inputs(9)
    expected = torch.autograd.grad(linear(F.gelu(x)).square().sum(), x)[0]
    each = torch.func.vmap(torch.func.grad(lambda row: gelu_linear(row[None], linear).square().sum()))
    torch.testing.assert_close(each(x), expected)


def test_torch_func_on_cpu():
    """Gradients with respect to images and stacked weights, with weights that require gradients."""
    torch.manual_seed(0)
    nets = [timm.create_model("crossformer_nano", num_classes=3) for _ in range(2)]
    images = torch.randn(2, 3, 64, 64)

    def loss(weights, buffers):
        return torch.func.functional_call(nets[0], (weights, buffers), (images,)).square().mean()

    found = torch.func.vmap(torch.func.grad(loss))(*torch.func.stack_module_state(nets))
    of_images = torch.func.grad(lambda x: nets[0](x).square().mean())(images)
    x = images.clone().requires_grad_()
    nets[0](x).square().mean().backward()
    torch.testing.assert_close(of_images, x.grad, atol=1e-6, rtol=1e-4)
    for name, weight in nets[0].named_parameters():
        torch.testing.assert_close(found[name][0], weight.grad, atol=1e-6, rtol=1e-3)
