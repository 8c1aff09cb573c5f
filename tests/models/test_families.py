"""A small model of every timm family: a step of training as a classifier, in both detectors and both segmenters.

The slow test writes `docs/backbones.md`.
"""

import gc
import logging
from pathlib import Path

import pytest
import timm
import torch

import crossformer_vision
from crossformer_vision.models.dense.backbones import SimplePyramid, create_backbone
from crossformer_vision.tasks.classification import Classification

TASKS = ("classification", "retinanet", "mask_rcnn", "semantic_fpn", "upernet")
FAST = ("efficientnet_b0", "hrnet_w18_small", "vit_tiny_patch16_224")


def step(name, task):
    """One step of training on two images."""
    torch.manual_seed(0)
    side = timm.get_pretrained_cfg(name).input_size[-1] if task == "classification" else 128
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


# Words in the names of small models, the smallest first.
SMALL = (
    "_atto", "_femto", "_zepto", "_pico", "nano", "xxtiny", "_xxs", "xx_small", "extra_small", "xsmall", "_xs", "tiny",
    "mini", "micro", "_t0", "_s0", "_m0", "_b0", "_a0", "_0", "small", "_005", "_010", "_lite", "_s1", "_18", "18", "_11",
    "_s_", "_s", "_t", "_n", "_26", "_9",
)  # fmt: skip


def smallest(module):
    """The smallest of a family's models, as far as names tell, by the parameters of a few candidates."""
    names = [n for n in timm.list_models(module=module) if not n.startswith("test_")]
    names.sort(key=lambda n: (next((k for k, word in enumerate(SMALL) if word in n), 99), len(n)))
    counts = {}
    for name in names[:4]:
        try:
            with torch.device("meta"):
                counts[name] = sum(p.numel() for p in timm.create_model(name).parameters())
        except (RuntimeError, NotImplementedError):
            counts[name] = sum(p.numel() for p in timm.create_model(name).parameters())
    return min(counts, key=counts.get)


def outcome(name, task):
    """`yes`, or the refusal of a model in words; any other error is a failure of this library."""
    try:
        step(name, task)
    except ValueError as error:  # UserError is one
        said = str(error)
        assert name in said and "\n" not in said, said
        return said
    return "yes"


INTRO = """# Backbones

What each family of timm's models does here: a step of training of one small model of each, as a classifier, in both
detectors (RetinaNet, Mask R-CNN) and both segmenters (Semantic FPN, UPerNet). Written by
`pytest -m slow tests/models/test_families.py` with timm {version}.

{summary}

Of dense models "pyramid" has maps at strides 4 to 32 of its own; those that "some maps" lack are made from their
neighbours, and all from "one map", as in ViTDet (arXiv 2203.16527). What has none of stride 8, 16 or 32, or takes one
size of image alone, is refused when it is made, with what is said here; a segmenter can work in windows of that size
(`model_args: {{img_size: 256}}`, `window: 256`).

| family | model | classifier | detectors, segmenters |
| --- | --- | --- | --- |
"""


@pytest.mark.slow
def test_every_family_and_its_table():
    """Every failure is a refusal in words, the same for all dense models."""
    logging.disable(logging.WARNING)
    rows, counts = [], {"classifier": 0, "dense": 0}
    for module in timm.list_modules():
        if module.startswith("crossformer") or not timm.list_models(module=module):
            continue
        name = smallest(module)
        said = {task: outcome(name, task) for task in TASKS}
        dense = {said[task] for task in TASKS[1:]}
        assert len(dense) == 1, (name, said)
        classifier, (dense,) = said["classification"], dense
        counts["classifier"] += classifier == "yes"
        counts["dense"] += dense == "yes"
        if dense == "yes":
            dense = kind(name)
        family = "crossformer" if module == "variants" else module  # our file of named models
        rows.append(f"| {family} | {name} | {short(classifier, name)} | {short(dense, name)} |")
        print(rows[-1], flush=True)
        gc.collect()
    summary = (
        f"Of {len(rows)} families {counts['classifier']} serve as classifiers, and {counts['dense']} as backbones "
        "of detectors and segmenters."
    )
    page = INTRO.format(version=timm.__version__, summary=summary) + "\n".join(rows) + "\n"
    (Path(__file__).parents[2] / "docs" / "backbones.md").write_text(page, encoding="utf-8")


def kind(name):
    model = create_backbone(name)
    if not isinstance(model, SimplePyramid):
        return "pyramid"
    return "one map" if len({*model.sources}) == 1 else "some maps"


def short(said, name):
    """A refusal without the model's name, and without the way out, which the page's head has."""
    return said.removeprefix(f"model '{name}' ").split(", and dense models")[0].replace("|", "/")
