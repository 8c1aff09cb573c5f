"""Forward-mode and batched derivatives work with the CPU training kernels."""

import pytest
import timm
import torch
from torch.autograd import forward_ad

MODELS = ["crossformer_nano", "crossformer_pp_small", "crossformer_tiny"]


def build(name):
    torch.manual_seed(0)
    small = (
        {}
        if name == "crossformer_nano"
        else {"embed_dim": 32, "depths": (1, 2, 2, 1), "num_heads": (1, 2, 2, 4)}
    )
    return timm.create_model(name, num_classes=3, **small).double().eval()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("frozen", [False, True])
def test_forward_mode_derivatives(name, frozen):
    net = build(name).requires_grad_(not frozen)
    x, v = torch.randn(2, 1, 3, 64, 64, dtype=torch.float64)
    with forward_ad.dual_level():
        slope = forward_ad.unpack_dual(net(forward_ad.make_dual(x, v))).tangent
    with torch.no_grad():
        expected = (net(x + 1e-5 * v) - net(x - 1e-5 * v)) / 2e-5
    torch.testing.assert_close(slope, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_batched_gradients(name):
    net, x = build(name), torch.randn(1, 3, 64, 64, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian
    torch.testing.assert_close(jacobian(net, x, vectorize=True), jacobian(net, x), atol=1e-9, rtol=1e-9)
    weight = net.head.fc.weight if hasattr(net.head, "fc") else net.head.weight
    logits = net(x)
    eye = torch.eye(3, dtype=torch.float64)[:, None]
    (batched,) = torch.autograd.grad(logits, weight, eye, retain_graph=True, is_grads_batched=True)
    for k in range(3):
        (one,) = torch.autograd.grad(logits[0, k], weight, retain_graph=True)
        torch.testing.assert_close(batched[k], one)
