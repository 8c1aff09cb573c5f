"""Predictions always use the current weights, however they are changed or replaced."""

import copy
import os
import socket
import subprocess
import sys
import threading
import warnings

import pytest
import timm
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parameters_to_vector, prune, vector_to_parameters

from crossformer_vision.models import index_cache

NAMES = ["crossformer_nano", "crossformer_tiny"]  # interval of each LDA


@pytest.fixture(params=NAMES)
def build(request):
    """Build networks in float64 with weights by seed, small enough to trace."""

    def build(seed=1, dtype=torch.float64):
        torch.manual_seed(seed)
        net = timm.create_model(request.param, num_classes=5, depths=(1, 2, 2, 1)).to(dtype).eval()
        for p in net.parameters():
            nn.init.normal_(p, std=0.1)
        return net

    return build


X = torch.randn(2, 3, 72, 90, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def run(net, x=X):
    with torch.no_grad():
        return net(x).clone()


def fresh(net, build, x=X):
    other = build(9, x.dtype)
    other.load_state_dict(net.state_dict())
    return run(other, x)


def step(net):
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.AdamW(net.parameters(), 0.05, fused=True).step()


CHANGES = {
    "a fused optimizer": step,
    "a NumPy view": lambda net: [p.detach().numpy().__imul__(1.5) for p in net.parameters()],
    "data": lambda net: [setattr(p, "data", p.data * 1.5) for p in net.parameters()],
    "inference mode": lambda net: [p.data.mul_(1.5) for p in net.parameters()],
    "a flat vector": lambda net: vector_to_parameters(
        parameters_to_vector(net.parameters()) * 1.2, net.parameters()
    ),
    "other weights": lambda net: net.load_state_dict(
        {k: v * 1.5 for k, v in net.state_dict().items()}, assign=True
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_weight_changes(change, build):
    net = build()
    before = run(net)
    CHANGES[change](net)
    after = run(net)
    torch.testing.assert_close(after, fresh(net, build))
    assert (after - before).abs().max() > 1e-3 * before.abs().max()


def test_pruned_hooked_and_replaced_layers(build):
    net, other = build(), build()
    for model in (net, other):
        if model is net:
            run(net)
        torch.manual_seed(3)
        for layer in [m for m in model.modules() if isinstance(m, nn.Linear)]:
            prune.random_unstructured(layer, "weight", 0.3)
            layer.register_forward_hook(lambda layer, args, out: out * 1.1)
    torch.testing.assert_close(run(net), run(other))


def test_functional_calls_and_ensembles(build):
    members = [build(seed) for seed in (2, 3)]
    net = build()
    run(net)
    for member in members:
        with torch.no_grad():
            torch.testing.assert_close(
                functional_call(net, dict(member.named_parameters()), (X,)), run(member)
            )
    stacked, buffers = stack_module_state(members)
    base = copy.deepcopy(net).to("meta")
    with torch.no_grad():
        both = vmap(lambda p, b: functional_call(base, (p, b), (X,)))(stacked, buffers)
    for got, member in zip(both, members, strict=True):
        torch.testing.assert_close(got, run(member))
    torch.testing.assert_close(run(net), fresh(net, build))


def test_per_sample_gradients_and_tangents(build):
    net = build()
    run(net)
    weights = {k: p.detach() for k, p in net.named_parameters()}

    def loss(p, image):
        return functional_call(net, p, (image[None],)).square().mean()

    def by_autograd(image):
        plain = build()
        plain(image[None]).square().mean().backward()
        return {k: p.grad for k, p in plain.named_parameters()}

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        per_image = vmap(grad(loss), (None, 0))(weights, X)
        direction = {k: torch.randn_like(p) for k, p in weights.items()}
        tangent = jvp(lambda p: loss(p, X[0]), (weights,), (direction,))[1]
    for i, image in enumerate(X):
        for key, expected in by_autograd(image).items():
            torch.testing.assert_close(per_image[key][i], expected)
    slope = sum((g * direction[k]).sum() for k, g in by_autograd(X[0]).items())
    torch.testing.assert_close(tangent, slope)
    torch.testing.assert_close(run(net), fresh(net, build))


@pytest.mark.parametrize("gradients", [False, True])
def test_fake_tensors(gradients, build):
    """Fake and real tensors do not share cache entries, in eager mode and in traces."""
    index_cache._cache.clear()
    net = build()
    weights = {k: v.detach() for k, v in net.state_dict().items()}

    def fake():
        mode = FakeTensorMode()
        with mode, torch.set_grad_enabled(gradients):
            values = {k: mode.from_tensor(v) for k, v in weights.items()}
            assert functional_call(net, values, (mode.from_tensor(X),)).shape == (2, 5)

    fake()
    expected = fresh(net, build)
    torch.testing.assert_close(run(net), expected)
    fake()
    with torch.set_grad_enabled(gradients):
        graph = make_fx(lambda p, x: functional_call(net, p, (x,)), tracing_mode="fake")(weights, X)
        torch.testing.assert_close(graph(weights, X).detach(), expected)
    torch.testing.assert_close(run(net), expected)


def test_threads_with_many_image_sizes(build, monkeypatch):
    monkeypatch.setattr(index_cache, "MAX_BYTES", 200_000)  # forces repeated cache eviction
    net = build(dtype=torch.float32)
    inputs = [torch.randn(1, 3, 32 * h, 32 * w) for h in (1, 2) for w in range(1, 9)]
    expected = [run(net, x) for x in inputs]
    failed = []

    def work(k):
        try:
            for i in torch.randperm(len(inputs), generator=torch.Generator().manual_seed(k)).tolist():
                with torch.inference_mode() if k % 2 else torch.no_grad():
                    torch.testing.assert_close(net(inputs[i]), expected[i], atol=1e-5, rtol=1e-4)
        except Exception as error:
            failed.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failed, failed[0]


def test_dynamic_quantization(build):
    from torch.ao.quantization import quantize_dynamic

    net = build(dtype=torch.float32)
    x = X.float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = run(quantize_dynamic(net, {nn.Linear}), x)
        expected = run(net, x)
        after = run(quantize_dynamic(net, {nn.Linear}), x)
    torch.testing.assert_close(after, before)
    assert (after - expected).abs().max() < 0.3 * expected.abs().max()


@pytest.mark.filterwarnings("ignore")
def test_torchao(build):
    quantization = pytest.importorskip("torchao.quantization")
    net, other = build(dtype=torch.float32), build(dtype=torch.float32)
    run(net, X.float())
    for model in (net, other):
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    torch.testing.assert_close(run(net, X.float()), run(other, X.float()))


@pytest.mark.filterwarnings("ignore")
def test_switched_and_disabled_adapters(build):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)

    def config():
        return peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)

    net = peft.get_peft_model(build(), config(), adapter_name="one")
    net.add_adapter("two", config())
    net = net.double().eval()
    plain = run(build())
    for adapter in ("one", "two", "one"):
        net.set_adapter(adapter)
        merged = copy.deepcopy(net)
        merged.set_adapter(adapter)
        torch.testing.assert_close(run(net), fresh(merged.merge_and_unload(), build))
        with net.disable_adapter():
            torch.testing.assert_close(run(net), plain)


def test_replicas(build):
    """DataParallel creates replicas at each call, whose weights are not parameters."""

    def replica(net):
        copies = {id(m): m._replicate_for_data_parallel() for m in net.modules()}
        for module in net.modules():
            mine = copies[id(module)]
            for key, child in module._modules.items():
                mine._modules[key] = copies[id(child)] if child is not None else None
            for key, p in module._parameters.items():
                setattr(mine, key, p.detach().clone() if p is not None else None)
        return copies[id(net)]

    net = build()
    for change in (lambda net: None, step, lambda net: [p.data.mul_(1.2) for p in net.parameters()]):
        change(net)
        torch.testing.assert_close(run(replica(net)), fresh(net, build))


SHARDED = """
import sys, timm, torch, torch.distributed as dist, crossformer_vision
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
rank, port, name = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)

def build():
    torch.manual_seed(1)
    return timm.create_model(name, num_classes=5, depths=(1, 2, 2, 1)).double()

net = FSDP(build(), device_id=torch.device("cpu"))
optimizer = torch.optim.AdamW(net.parameters(), 0.01)
x = torch.randn(2, 3, 72, 90, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
for epoch in range(3):
    net.train()
    net(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        found = net.eval()(x)
    weights = get_model_state_dict(net, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        plain = build().eval()
        plain.load_state_dict(weights)
        with torch.no_grad():
            torch.testing.assert_close(found, plain(x))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "crossformer_nano" else pytest.mark.slow) for n in NAMES]
)
def test_validation_under_fsdp(name):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    both = [
        subprocess.Popen(
            [sys.executable, "-c", SHARDED, str(rank), port, name],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for process in both:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
