"""Tests for frozen stages, layer-wise learning rates and linear probes."""

import json

import pytest
import timm
import torch
from small_runs import CLASSIFICATION, DETECTION, SEGMENTATION, read_weights

from crossformer_vision import (
    Classification,
    Detection,
    Segmentation,
    UserError,
    load_checkpoint,
    load_predictor,
)
from crossformer_vision.cli import main
from crossformer_vision.tasks.finetuning import (
    freeze_parameters,
    head_parameters,
    layer_ids,
    set_frozen_to_eval,
)

SMALL = {"depths": (1, 1, 1, 1)}


@pytest.mark.parametrize("model", ["crossformer_nano", "resnet18", "swin_tiny_patch4_window7_224"])
def test_learning_rates_equal_those_of_timm(model):
    task = Classification(model, num_classes=10, layer_decay=0.75, lr=0.1, weight_decay=0.05)
    ours = task.create_optimizer()
    theirs = timm.optim.create_optimizer_v2(
        task.net, opt="adamw", lr=0.1, weight_decay=0.05, layer_decay=0.75, filter_bias_and_bn=True
    )

    def rates(optimizer):
        return {
            id(p): (group["lr_scale"], group["weight_decay"])
            for group in optimizer.param_groups
            for p in group["params"]
        }

    assert rates(ours) == rates(theirs) and len(ours.param_groups) > 8
    assert ours.param_groups[0]["lr_scale"] == 1  # whose learning rate is logged


@pytest.mark.parametrize("backbone", ["crossformer_nano", "resnet18", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("kind", [Detection, Segmentation])
def test_learning_rates_of_dense_models(kind, backbone):
    options = {"layer_decay": 0.5, "backbone_lr_scale": 0.1, "width": 16, "num_classes": 3}
    task = kind(backbone=backbone, **options)
    scales = {
        id(p): group["lr_scale"] for group in task.create_optimizer().param_groups for p in group["params"]
    }
    ids = layer_ids(task.net, backbone, {}, coarse=False)
    assert set(ids) == {n for n, _ in task.net.named_parameters() if n.startswith(task.net.body_prefix)}
    last = max(ids.values())
    for name, parameter in task.net.named_parameters():
        expected = 0.1 * 0.5 ** (1 + last - ids[name]) if name in ids else 1.0
        assert scales[id(parameter)] == pytest.approx(expected), name


@pytest.mark.parametrize("stages", [2, "all"])
def test_frozen_weights_do_not_change(stages, tmp_path):
    run, options = tmp_path / "run", ["--model.freeze", str(stages), "--run.ema", "0.9", "--model.lr", "0.1"]
    assert main(["train", *CLASSIFICATION, "--trainer.max_epochs", "1", *options, "--run.dir", str(run)]) == 0
    torch.manual_seed(0)
    initial = Classification("crossformer_nano", num_classes=10, model_args=dict(SMALL)).net.state_dict()
    trained = read_weights(run / "last.ckpt")
    assert main(["train", "--resume", str(run), "--trainer.max_epochs", "2"]) == 0
    resumed = read_weights(run / "last.ckpt")
    frozen = (
        ("stages.0", "stages.1", "stages.2", "stages.3", "norm")
        if stages == "all"
        else ("stages.0", "stages.1")
    )
    for name, value in resumed.items():
        is_frozen = name.removeprefix("net.").startswith(frozen)
        if is_frozen or "position_bias" not in name:  # a narrow DPB may have no gradient
            assert torch.equal(value, trained[name]) == is_frozen, name
    assert {name.removeprefix("net.") for name in trained} == set(initial)


def test_frozen_norms_stay_in_eval_mode(tmp_path):
    """Statistics of frozen batch norms do not change, and stochastic depth of frozen blocks is off."""
    net = timm.create_model("resnet18", num_classes=3, drop_path_rate=0.5)
    freeze_parameters(net, 2, "resnet18", {})
    net.train()
    set_frozen_to_eval(net)
    assert not net.bn1.training and not net.layer2[1].drop_path.training
    assert net.layer3[0].bn1.training and net.training
    before = {name: value.clone() for name, value in net.named_buffers()}
    net(torch.randn(4, 3, 64, 64))
    changed = {
        name.split(".")[0] for name, value in net.named_buffers() if not torch.equal(value, before[name])
    }
    assert changed == {"layer3", "layer4"}


def test_distilled_models_have_two_heads():
    net = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3, depth=1)
    freeze_parameters(net, "all", "deit_tiny_distilled_patch16_224", {})
    trained = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert trained == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}


def test_frozen_detector_trains(tmp_path, capsys):
    run = tmp_path / "run"
    options = ["--trainer.max_epochs", "1", "--model.freeze", "all", "--run.dir", str(run)]
    assert main(["train", *DETECTION, *options]) == 0
    weights = read_weights(run / "best.ckpt")
    assert weights
    assert "frozen: " in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        ({"freeze": 5}, "--model.freeze 5: model 'crossformer_nano' has 4 stages"),
        ({"freeze": -1}, "freeze=-1: must be a number at least 0"),
        ({"layer_decay": 1.5}, "layer_decay=1.5: must be a number from 0 to 1"),
        ({"backbone_lr_scale": -1}, "backbone_lr_scale=-1: must be a number at least 0"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(UserError, match=message):
        task = Classification("crossformer_nano", model_args=dict(SMALL), **options)
        freeze_parameters(task.net, task.freeze_stages, "crossformer_nano", {})


@pytest.mark.parametrize(
    "model", ["crossformer_nano", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"]
)
def test_merged_adapters_equal_unmerged_ones(model):
    torch.manual_seed(0)
    task = Classification(model, num_classes=5, lora=4).eval()
    trained = {name for name, p in task.net.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in name or name in head_parameters(task.net) for name in trained)
    for name, parameter in task.net.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    images = torch.rand(2, 3, 224, 224)
    unmerged = task(images)
    plain = Classification(model, num_classes=5).eval()
    assert not torch.allclose(plain(images), unmerged, atol=1e-3)
    load_checkpoint(plain.net, {"state_dict": task.state_dict()})  # merged when it is read
    torch.testing.assert_close(plain(images), unmerged, atol=1e-5, rtol=1e-5)
    task.merge_adapters()
    assert task.net.state_dict().keys() == plain.net.state_dict().keys()
    torch.testing.assert_close(task(images), unmerged, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("task", [CLASSIFICATION, DETECTION, SEGMENTATION])
def test_run_with_adapters(task, tmp_path):
    run, options = tmp_path / "run", ["--model.lora", "2", "--model.layer_decay", "0.9"]
    assert main(["train", *task, "--trainer.max_epochs", "1", *options, "--run.dir", str(run)]) == 0
    assert main(["train", "--resume", str(run), "--trainer.max_epochs", "2"]) == 0
    assert main(["validate", str(run), "--run.dir", str(tmp_path / "again")]) == 0
    before, after = (json.loads((path / "results.json").read_text()) for path in (run, tmp_path / "again"))
    assert after[before["metric"]] == pytest.approx(before[before["metric"]], abs=1e-5)
    assert not any("lora" in name for name in load_predictor(run, "cpu").net.state_dict())


def test_adapters_and_frozen_stages_exclude_each_other():
    with pytest.raises(UserError, match="--model.lora freezes the backbone itself"):
        Classification(lora=4, freeze=2)
