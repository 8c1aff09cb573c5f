"""Small models of several timm families: a step of training as a classifier, in both detectors and both segmenters."""

import pytest
import timm
import torch

import crossformer_vision
from crossformer_vision.tasks.classification import Classification

TASKS = ("classification", "retinanet", "mask_rcnn", "semantic_fpn", "upernet")
FAST = ("efficientnet_b0", "hrnet_w18_small", "vit_tiny_patch16_224", "vgg11")


def step(name, task):
    """One step of training on two images, of the model's own size if that is fixed."""
    torch.manual_seed(0)
    cfg = timm.get_pretrained_cfg(name)
    side = cfg.input_size[-1] if cfg is not None and cfg.fixed_input_size else 128
    images = torch.rand(2, 3, side, side)
    if task == "classification":
        net = Classification(name, num_classes=3).net.train()
        out = net(images)
        out = out[0] if isinstance(out, tuple) else out
        loss = torch.nn.functional.cross_entropy(out, torch.tensor([0, 2]))
    elif task in ("retinanet", "mask_rcnn"):
        net = crossformer_vision.create_detector(
            task, name, num_classes=2, width=16, min_size=128, max_size=128
        ).train()
        boxes = torch.tensor([[10.0, 10, 60, 70]])
        masks = torch.zeros(1, side, side)
        masks[:, 10:70, 10:60] = 1
        targets = [dict(boxes=boxes, labels=torch.tensor([1]), masks=masks)] * 2
        loss = sum(net(list(images), targets).values())
    else:
        net = crossformer_vision.create_segmenter(task, name, num_classes=3, width=16).train()
        labels = torch.randint(0, 3, (2, 100, 120))
        loss = torch.nn.functional.cross_entropy(net(torch.rand(2, 3, 100, 120)), labels)
    assert loss.isfinite()
    loss.backward()
    body = [p.grad for p in net.parameters() if p.grad is not None]
    assert body and all(g.isfinite().all() for g in body)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("task", TASKS)
def test_one_step(name, task):
    step(name, task)
