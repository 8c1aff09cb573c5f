"""Tests for batched Muon: updates, state and parameter groups match timm, in a native dtype."""

import copy
import functools

import pytest
import timm.optim.muon
import torch
from timm.optim import Muon

from crossformer_vision.compat import muon_coefficients
from crossformer_vision.tasks.classification import Classification
from crossformer_vision.tasks.muon import BatchedMuon, gram_newton_schulz, orthogonalize

COEFFICIENTS = muon_coefficients("quintic")


def parameters(seed=0):
    """Matrices of two shapes, several of one; a convolution; a flat, a frozen and an unused parameter."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(16, 8), (8, 40), (16, 8), (8, 3, 4, 4), (16,), (3, 3), (8, 8), (8, 8)]
    found = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    found[-2].requires_grad_(False)
    return found


def train(optimizer, params, steps=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params[:-2]:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return params


@pytest.mark.parametrize("nesterov", [False, True])
def test_updates_match_timm(nesterov, monkeypatch):
    monkeypatch.setattr(
        timm.optim.muon,
        "zeropower_via_newtonschulz",
        functools.partial(timm.optim.muon.zeropower_via_newtonschulz, dtype=torch.float32),
    )
    options = dict(lr=0.02, weight_decay=0.1, nesterov=nesterov)
    ours, theirs = parameters(), parameters()
    optimizer, reference = BatchedMuon(ours, **options), Muon(theirs, **options)
    train(optimizer, ours)
    train(reference, theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    states = optimizer.state_dict()["state"], reference.state_dict()["state"]
    assert [s.keys() for s in states[0].values()] == [s.keys() for s in states[1].values()]
    assert all(p.grad is not None for p in ours[:-2])  # same as torch optimizers


def test_resume_is_bitwise_identical():
    whole = parameters()
    train(BatchedMuon(whole, lr=0.02, nesterov=True), whole, 2, seed=1)
    half = [torch.nn.Parameter(p.detach().clone(), p.requires_grad) for p in whole]
    first = parameters()
    optimizer = BatchedMuon(first, lr=0.02, nesterov=True)
    train(optimizer, first, 2, seed=1)
    resumed = BatchedMuon(half, lr=0.02, nesterov=True)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, first, 2, seed=2)
    train(resumed, half, 2, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first, half, strict=True))


def test_closure_is_evaluated_once():
    weight = torch.nn.Parameter(torch.eye(4))
    optimizer, calls = BatchedMuon([weight], lr=0.1, weight_decay=0), []

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 4 and len(calls) == 1
    assert weight.diagonal().max() < 1


@pytest.mark.parametrize("shape", [(3, 64, 16), (3, 16, 64), (1, 32, 33), (2, 8, 768)])
def test_singular_values_become_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonalize(matrices, COEFFICIENTS)
    assert found.shape == shape and found.dtype == torch.float32
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6 and values.max() < 1.3
    torch.testing.assert_close(gram_newton_schulz(matrices, COEFFICIENTS), found, rtol=1e-3, atol=1e-4)


def test_zero_gradients_keep_matrices_unchanged():
    assert torch.equal(gram_newton_schulz(torch.zeros(2, 4, 16), COEFFICIENTS), torch.zeros(2, 4, 16))


def test_task_uses_batched_muon_without_bias_and_norm_decay():
    task = Classification("crossformer_nano", optimizer="nmuon", weight_decay=0.1)
    optimizer = task.create_optimizer()
    assert type(optimizer) is BatchedMuon and optimizer.defaults["nesterov"]
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.0, 0.1}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(task.net.parameters()))
    assert not Classification("crossformer_nano", optimizer="muon").create_optimizer().defaults["nesterov"]
    assert (
        type(Classification("crossformer_nano", optimizer="lookahead_muon").create_optimizer()).__name__
        == "Lookahead"
    )


def test_model_without_matrices_is_rejected(capsys):
    from crossformer_vision import UserError

    task = Classification("crossformer_nano", optimizer="muon")
    task.net = torch.nn.BatchNorm2d(3)
    with pytest.raises(
        UserError, match=r"--model.optimizer muon: this model has no matrix for Muon. Use adamw"
    ):
        task.create_optimizer()


def test_emulated_bfloat16_variants_are_rejected(monkeypatch):
    from crossformer_vision import UserError, devices

    task = Classification("crossformer_nano", optimizer="nadamuon")
    monkeypatch.setattr(devices, "onednn_has_bfloat16", lambda: True)
    assert type(task.create_optimizer()) is Muon
    monkeypatch.setattr(devices, "onednn_has_bfloat16", lambda: False)
    with pytest.raises(UserError, match="bfloat16, which this device emulates. Use nmuon"):
        task.create_optimizer()
