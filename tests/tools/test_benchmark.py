"""Tests for the benchmark commands."""

import csv
import json

import pytest
import torch

from crossformer_vision.cli import main
from crossformer_vision.compat import compiler_config
from crossformer_vision.errors import UserError
from crossformer_vision.tools import benchmark
from crossformer_vision.tools.benchmark import relative_difference
from crossformer_vision.tools.benchmark_step import Row, Step, parse_size, parse_spec
from crossformer_vision.tools.timing import peak_memory


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Rounds of a tenth of a second: figures are looked at here, not their spread."""
    rounds, _, log = benchmark.run_benchmark.__defaults__
    monkeypatch.setattr(benchmark.run_benchmark, "__defaults__", (rounds, 0.1, log))


@pytest.mark.slow
def test_row_types(tmp_path, capsys):
    whats = ["crossformer_nano", "resnet18,channels=(8,8,8,8)", "features:crossformer_nano,lda_span=region"]
    whats += ["retinanet:crossformer_nano", "semantic_fpn:crossformer_nano"]
    options = "--size 32x64 --batch-size 2 --step inference training --rounds 3 --device cpu --dtype".split()
    tables = []
    for what, dtypes in ((whats, ["float32"]), (whats[:1], ["float32", "amp-bfloat16"])):
        assert main(["benchmark", *what, *options, *dtypes, "--output", str(tmp_path)]) == 0
        assert "in mode" in capsys.readouterr().out
        found = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
        assert len(found) == len(what) * 2 * len(dtypes)
        tables.append(found)
    for row, rows in ((row, table) for table in tables for row in table):
        assert "error" not in row, row
        assert row["images_per_second"] > 0 and row["ms_median"] <= row["ms_90"] <= row["ms_99"]
        assert row["memory"] > 0 and row["parameters"] > 1000 and row["macs"] > 1e5
        first = next(r for r in rows if all(r[k] == row[k] for k in ("size", "step", "dtype")))
        rate = row["images_per_second"] / first["images_per_second"]
        assert row["ratio_in_mode"] == pytest.approx(rate)
        if row["step"] == "inference" and not row["model"].startswith("retinanet"):
            assert row["difference"] <= (0.05 if row["dtype"] == "amp-bfloat16" else 0)
    inference, training = (
        next(r for r in rows if r["model"] == "crossformer_nano" and r["step"] == step)
        for step in ("inference", "training")
    )
    assert training["memory"] > 2 * inference["memory"]  # weight gradients and saved activations
    with open(tmp_path / "benchmark.csv") as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    assert (tmp_path / "benchmark.png").stat().st_size > 5000


@pytest.mark.parametrize("task", ["classification", pytest.param("detection", marks=pytest.mark.slow)])
def test_benchmark_data(task, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("crossformer_vision.tools.benchmark_data.run.__defaults__", (0.5, [0, 1]))
    options = "--data.train_images 40 --data.val_images 4 --data.image_size 32 --data.batch_size 4".split()
    options += ["--trainer.accelerator", "cpu", "--task", task, "--model.pretrained", "false"]
    assert main(["benchmark-data", *options, "--output", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "read and decode" in said and "-bound: " in said
    found = json.loads((tmp_path / "data.json").read_text())
    rates = found["images_per_second_by_workers"]
    assert list(rates) == ["0", "1"] and min(rates.values()) > 0 and found["images_per_second_trained"] > 0
    assert (tmp_path / "data.png").stat().st_size > 3000 and "| network |" in (
        tmp_path / "data.md"
    ).read_text()
    assert main(["benchmark-data", "--data.root", "none"]) == 1
    assert "none: no such folder" in capsys.readouterr().err


def test_failed_row_does_not_stop_other_rows(tmp_path, capsys):
    options = "--size 96 --batch-size 1 --rounds 3 --device cpu --output".split()
    assert main(["benchmark", "crossformer_nano", "features:vgg11,nonsense=1", *options, str(tmp_path)]) == 0
    nano, other = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    assert nano["images_per_second"] > 0 and "nonsense" in other["error"]
    assert "not run" in (tmp_path / "benchmark.md").read_text()
    assert main(["benchmark", "features:vgg11,nonsense=1", *options, str(tmp_path)]) == 1
    assert "none of the rows could be run: features:vgg11,nonsense=1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, said",
    [
        ("crossformer_smal", "unknown model 'crossformer_smal'. Did you mean 'crossformer_small'"),
        ("mask:resnet18", "unknown head 'mask'. Choose from features, retinanet"),
        ("resnet18 --size 0", "size '0': must be a number of pixels"),
        ("resnet18 --size 3x4x5", "size '3x4x5'"),
        ("resnet18 --device tpu0", "device 'tpu0'"),
        ("resnet18 --batch-size 0", "batch=0: must be a number at least 1"),
    ],
)
def test_invalid_arguments(options, said, capsys, tmp_path):
    assert main(["benchmark", *options.split(), "--output", str(tmp_path)]) != 0
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", ["benchmark crossformer_nano --size 32 --rounds 3", "benchmark-data"])
def test_output_is_checked_before_timing(command, capsys, tmp_path):
    (tmp_path / "taken").write_text("a file")
    assert main([*command.split(), "--output", str(tmp_path / "taken")]) == 1
    said = capsys.readouterr()
    assert "taken: " in said.err and "32x32" not in said.out and "decode" not in said.out


def test_help_of_benchmark_data_lists_its_options(capsys):
    assert main(["benchmark-data", "--help"]) == 0
    said = capsys.readouterr().out
    assert "usage: crossformer benchmark-data" in said and "--output OUTPUT" in said and "--data.root" in said


def test_frozen_engine_rejects_training(tmp_path, capsys):
    row = "benchmark crossformer_nano --size 32 --batch-size 2 --step training --engine frozen".split()
    assert main([*row, "--output", str(tmp_path)]) == 1
    assert "supports only --step inference" in capsys.readouterr().err


def test_parse_spec_and_size():
    what = "features:crossformer_small,lda_span=region,group_size=(14,14,7,7)"
    keywords = {"lda_span": "region", "group_size": (14, 14, 7, 7)}
    assert parse_spec(what) == ("features", "crossformer_small", keywords)
    assert parse_size("224") == (224, 224) and parse_size("800x1280") == (800, 1280)
    with pytest.raises(UserError, match="unknown head"):
        parse_spec("yolo:resnet18")


def test_peak_memory_of_step():
    def step():
        a = torch.empty(1 << 20, dtype=torch.uint8)
        a = torch.empty(2 << 20, dtype=torch.uint8)  # the first tensor is freed after this allocation
        return torch.empty(1 << 20, dtype=torch.uint8)[a[0].item() * 0 :]

    assert 3 << 20 <= peak_memory(step, torch.device("cpu")) <= 3.2 * (1 << 20)


def test_relative_difference_of_outputs():
    a = torch.tensor([1.0, -4.0])
    assert relative_difference(a, a + 1) == pytest.approx(1 / 3)
    assert relative_difference([a, a], [a, 2 * a]) == 0.5
    assert relative_difference([{"boxes": a}], [{"boxes": a}]) is None
    assert Row("resnet18", batch=1).mode != Row("resnet18", batch=2).mode


@pytest.mark.slow
def test_frozen_row_does_not_reuse_compiled_graph():
    """Both graphs have the same class, so dynamo could reuse the cached one."""
    device = torch.device("cpu")
    for engine, constants in (("compiled", False), ("frozen", True)):
        step = Step(Row("resnet18,channels=(8,8,8,8)", (32, 32), engine=engine, batch=1), device)
        with compiler_config(freezing=engine == "frozen"):
            before = step()
        with torch.no_grad():
            step.net.conv1.weight.zero_()
        assert torch.equal(step(), before) == constants  # constants ignore weight updates
