"""Tests for automatic precision: runs avoid dtypes that the device emulates."""

import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode

from crossformer_vision import devices
from crossformer_vision.cli import main

TINY = """
  --data.train_images 4 --data.val_images 2 --data.batch_size 2 --data.num_workers 0 --data.image_size 64
  --model.model_args {"depths":[1,1,1,1]} --model.pretrained false --trainer.max_epochs 1 --trainer.accelerator cpu
""".split()
TASKS = {
    "classification": ["--config", "quickstart/classification.yaml", "--run.ema", "0.9"],
    "instance segmentation": ["--config", "quickstart/instance_segmentation.yaml"],
    "segmentation": ["--config", "quickstart/semantic_segmentation.yaml", "--data.crop_size", "64"],
}
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "convolution", "dot", "linear", "attention")


class ProductDtypes(TorchDispatchMode):
    """Collects the dtypes of all matrix products and convolutions, forward, backward and in optimizers."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(word in func.__name__ for word in PRODUCTS):
            self.dtypes |= {a.dtype for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()}
        return func(*args, **(kwargs or {}))


def cpu_with_bfloat16(monkeypatch, native):
    monkeypatch.setattr(devices, "onednn_has_bfloat16", lambda: native)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)


@pytest.mark.parametrize("native", [False, True], ids=["emulated", "native"])
@pytest.mark.parametrize("task", TASKS)
def test_products_use_native_dtypes(task, native, tmp_path, monkeypatch, capsys):
    cpu_with_bfloat16(monkeypatch, native)
    options = [*TASKS[task], *TINY, "--run.dir", str(tmp_path / "run")]
    if "data.crop_size" in " ".join(options):
        at = options.index("--data.image_size")
        options = options[:at] + options[at + 2 :]
    with ProductDtypes() as products:
        assert main(["train", *options]) == 0
    assert "float32" in str(products.dtypes)
    assert (torch.bfloat16 in products.dtypes) == native and torch.float16 not in products.dtypes
    precision = "bf16-mixed" if native else "32-true"
    assert f"precision: {precision} on cpu" in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["trainer"]["precision"] == precision


def test_precision_on_resume_and_validation(tmp_path, monkeypatch, capsys, caplog):
    cpu_with_bfloat16(monkeypatch, True)
    run = str(tmp_path / "run")
    assert main(["train", *TINY, "--run.dir", run]) == 0
    cpu_with_bfloat16(monkeypatch, False)  # simulates a move to another machine
    capsys.readouterr()
    with ProductDtypes() as products:
        assert main(["validate", run]) == 0
    assert products.dtypes == {torch.float32} and not caplog.messages
    assert main(["train", "--resume", run, "--trainer.max_epochs", "2"]) == 0
    assert "precision: bf16-mixed on cpu" in capsys.readouterr().out
    (line,) = caplog.messages
    assert line.startswith(
        "--trainer.precision bf16-mixed: this CPU emulates bfloat16: a matrix product takes "
    )
    assert main(["train", *TINY, "--run.dir", run, "--resume", "auto", "--trainer.max_epochs", "2"]) == 0


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_emulated_mixed_precision_warns(precision, tmp_path, monkeypatch, caplog):
    cpu_with_bfloat16(monkeypatch, False)
    options = [*TINY, "--trainer.precision", precision, "--run.dir", str(tmp_path / "run")]
    assert main(["train", *options]) == 0
    (line,) = caplog.messages
    assert f"--trainer.precision {precision}: this CPU emulates bfloat16" in line and "times as long" in line


def test_emulated_16_bit_weights_are_rejected(tmp_path, monkeypatch, capsys):
    cpu_with_bfloat16(monkeypatch, False)
    options = [*TINY, "--trainer.precision", "bf16-true", "--run.dir", str(tmp_path / "run")]
    assert main(["train", *options]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("crossformer: error: --trainer.precision bf16-true: this CPU emulates bfloat16")
    assert line.endswith("Use --trainer.precision auto") and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "value, line",
    [
        ("bf16-mixd", "'bf16-mixd' is not one of auto, 32-true"),
        ("true", "'True' is not one of auto, 32-true"),
    ],
)
def test_unknown_precision_is_rejected(value, line, capsys):
    assert main(["train", *TINY, "--trainer.precision", value]) == 2
    assert line in capsys.readouterr().err
