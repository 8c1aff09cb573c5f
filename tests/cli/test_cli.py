"""Tests for the command line: fast help, one-line errors and exit codes."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from data.test_classification import tree

import crossformer_vision
from crossformer_vision.cli import main


def test_module_entry_point_and_typing_marker():
    done = subprocess.run(
        [sys.executable, "-m", "crossformer_vision", "--version"], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.strip() == crossformer_vision.__version__
    assert set(crossformer_vision.__all__) <= set(dir(crossformer_vision))
    assert (Path(crossformer_vision.__file__).parent / "py.typed").exists()


def test_help_avoids_heavy_imports():
    script = """
import sys
sys.argv = ["crossformer", "--help"]
from crossformer_command import main
try:
    main()
except SystemExit as stop:
    assert stop.code == 0
assert not {"crossformer_vision", "torch", "timm", "lightning", "numpy", "matplotlib"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "crossformer train" in done.stdout


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have no such thresholds")
@pytest.mark.parametrize("environment, faults", [({}, False), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, True)])
def test_freed_memory_is_reused(environment, faults):
    """A 64 MiB tensor reuses freed pages unless the environment sets malloc options."""
    script = """
import resource, torch
from crossformer_vision.cli import main
main(["info", "nothing"])
for _ in range(3):
    torch.ones(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(1 << 24)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() > 1 << 23)
"""
    others = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", script], env={**others, **environment}, capture_output=True, text=True
    )
    assert done.stdout.split() == [str(faults)], done.stderr


def test_verb_help(capsys):
    assert main(["train", "--help"]) == 0
    printed = capsys.readouterr().out
    for words in ("--data.root", "--run.ema", "Stochastic depth", "--trainer.devices"):
        assert words in printed


def test_import_registers_models_and_public_names():
    script = "import timm, crossformer_vision as c; print(timm.is_model('crossformer_pp_huge'), c.load_checkpoint.__name__)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "load_checkpoint"]


@pytest.mark.parametrize(
    "args, code, message",
    [
        (
            "fly",
            2,
            "unknown command 'fly'. Choose from check, train, validate, predict, inspect, compare, export, share, benchmark, benchmark-data, demo, info, download",
        ),
        ("train --data.root nowhere", 1, "nowhere: no such folder"),
        (
            "train --model.backbone crossformer_smal",
            1,
            "unknown model 'crossformer_smal'. Did you mean 'crossformer_small'",
        ),
        ("train --config nothing.yaml", 1, "nothing.yaml: no such configuration file"),
        ("train --resume nowhere", 1, "nowhere: not a run directory, it has no config.yaml"),
        ("validate nowhere", 1, "nowhere: not a run directory"),
        ("train --model.lr fast", 2, "lr"),
        ("train --data.wings 2", 2, "wings"),
        (
            "download crossformer_tin",
            1,
            "no published weights of 'crossformer_tin'. Choose from crossformer_tiny",
        ),
        (
            "train --data.image_size 16",
            1,
            "image of 16x16 pixels is too small: at least 32x32 are needed",
        ),
        ("train --model.checkpoint cut.pth", 1, "cut.pth: truncated or not a checkpoint"),
        ("train --model.checkpoint other.pth", 1, "other.pth: none of its weights fits this model"),
        ("validate --checkpoint five.pth", 1, "five.pth: has 5 classes, 10 are needed"),
        ("train --data.root tree --data.batch_size 4", 1, "0.jpg: cannot read this image"),
    ],
)
def test_errors_are_one_line(args, code, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if "tree" in args:
        tree(tmp_path / "tree")
        (tmp_path / "tree/train/ant/0.jpg").write_bytes(b"rubbish")
    if "pth" in args:
        import timm

        (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04cut")
        torch.save({"conv.weight": torch.ones(3)}, "other.pth")
        torch.save(timm.create_model("crossformer_nano", num_classes=5).state_dict(), "five.pth")
    small = "--data.train_images 16 --data.val_images 4 --data.batch_size 4 --data.num_workers 0".split()
    words = args.split()
    if (
        words[0] in ("train", "validate")
        and code == 1
        and "--resume" not in words
        and "nowhere" not in words[1:2]
    ):
        words += small
    assert main(words) == code
    printed = capsys.readouterr()
    lines = printed.err.strip().splitlines()
    assert "Traceback" not in printed.err + printed.out
    assert message in printed.err
    if code == 1:
        assert len(lines) == 1 and lines[0].startswith("crossformer: error: ")


def test_debug_shows_the_traceback(capsys):
    assert main(["train", "--data.root", "nowhere", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err
