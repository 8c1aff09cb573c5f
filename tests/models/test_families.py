"""One small model of every timm family: a training step as a classifier, in both detectors and in both segmenters.

`python tests/models/test_families.py` writes the table of docs/backbones.md.
"""

import sys
import warnings
from pathlib import Path

import pytest
import timm
import torch
from timm.models._registry import _model_to_module

import crossformer_vision
from crossformer_vision.tasks.classification import Classification

PAGE = Path(__file__).parents[2] / "docs/backbones.md"
TASKS = ("classification", "retinanet", "mask_rcnn", "semantic_fpn", "upernet")
FAST = ("resnet18", "efficientnet_b0", "hrnet_w18_small", "vit_tiny_patch16_224", "vgg11", "pvt_v2_b0")


def families():
    """Family -> its model of fewest parameters that is not for tests alone."""
    smallest: dict[str, tuple[int, str]] = {}
    for name in timm.list_models():
        family = _model_to_module[name]
        if name.startswith(("test_", "crossformer")):
            continue
        try:
            with torch.device("meta"):
                model = timm.create_model(name)
            size = sum(p.numel() for p in model.parameters())
        except Exception:
            size = 10**12  # computes when it is made: only if the family has no other
        smallest[family] = min(smallest.get(family, (10**13, name)), (size, name))
    return {family: name for family, (_, name) in sorted(smallest.items())}


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


def row(family, name):
    cells = []
    for task in TASKS:
        try:
            step(name, task)
            cells.append("yes")
        except crossformer_vision.UserError as refusal:
            assert "\n" not in str(refusal) and name in str(refusal)
            cells.append(str(refusal).removeprefix(f"model '{name}' "))
        except Exception as error:
            cells.append(
                f"FAILS: {type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"
            )
    same = len(set(cells[1:])) == 1
    return [family, f"`{name}`", cells[0], cells[1] if same else "; ".join(cells[1:])]


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("task", TASKS)
def test_one_step(name, task):
    step(name, task)


@pytest.mark.slow
def test_the_table_of_the_docs():
    text = PAGE.read_text(encoding="utf-8")
    for family, name in families().items():
        line = f"| {' | '.join(row(family, name))} |"
        assert "FAILS" not in line and line in text


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    lines = []
    for family, name in families().items():
        lines.append(f"| {' | '.join(row(family, name))} |")
        print(lines[-1], flush=True)
    head = PAGE.read_text(encoding="utf-8").split("| family |")[0] if PAGE.exists() else "# Backbones\n\n"
    table = "| family | smallest model | classifier | detectors and segmenters |\n| --- | --- | --- | --- |\n"
    PAGE.write_text(head + table + "\n".join(lines) + "\n", encoding="utf-8")
    sys.exit(any("FAILS" in line for line in lines))
