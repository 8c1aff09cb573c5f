"""Tests for multi-process and multi-node runs, job schedulers and full disks."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_runs import CLASSIFICATION, SEGMENTATION

from crossformer_vision.cli import main
from crossformer_vision.training.options import parse_options
from crossformer_vision.training.resume import find_run_of_job

CROSSFORMER = [sys.executable, "-m", "crossformer_vision"]
CALM = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "1",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_NNODES": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NODELIST": "127.0.0.1",
    "SLURM_STEP_NODELIST": "127.0.0.1",
}
TWO = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]


def run(*args, cwd, **env):
    """The command in a process of its own -> (exit code, what it said)."""
    done = subprocess.run(
        [*CROSSFORMER, *map(str, args)],
        cwd=cwd,
        env={**os.environ, **CALM, **env},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout + done.stderr


def started(command, cwd, **env):
    """A process that runs beside the test; what it says is kept."""
    env = {**os.environ, **CALM, **env}
    return subprocess.Popen(
        command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def torchrun(node, port, cwd, *args, restarts=0):
    """A node of two, of one process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--node_rank", str(node), "--master_addr", "127.0.0.1", "--master_port", str(port)]
    command += ["--max-restarts", str(restarts), "-m", "crossformer_vision", "train", *CLASSIFICATION]
    command += ["--trainer.accelerator", "cpu", "--trainer.num_nodes", "2", "--trainer.devices", "1", *args]
    return started(command, cwd)


def two_machines(tmp_path, *args):
    """Nodes in folders of their own -> (folders, exit codes, what they said)."""
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    port = free_port()
    nodes = [torchrun(n, port, folders[n], "--trainer.max_epochs", "1", *args) for n in (0, 1)]
    said = [node.communicate(timeout=300)[0] for node in nodes]
    return folders, [node.returncode for node in nodes], said


@pytest.mark.slow
def test_multi_node_without_shared_file_system(tmp_path):
    """The best weights of the first node are sent to the second node."""
    folders, codes, said = two_machines(tmp_path, "--run.dir", "run")
    assert codes == [0, 0], said
    results = json.loads((folders[0] / "run/results.json").read_text())
    assert results["processes"] == results["nodes"] == 2 and results["global_batch"] == 2 * 16
    assert not (folders[1] / "run").exists()


@pytest.mark.slow
def test_multi_node_resume_requires_shared_file_system(tmp_path):
    """Both nodes fail before training if the second node cannot read the run directory."""
    folders, codes, said = two_machines(tmp_path, "--run.dir", "run")
    assert codes == [0, 0], said
    (folders[0] / "run/results.json").unlink()  # simulates an interrupted run
    _, codes, said = two_machines(tmp_path, "--run.dir", "run", "--resume", "auto")
    assert 0 not in codes and any("not every machine sees what it holds" in text for text in said), said


@pytest.mark.slow
def test_fewer_validation_images_than_processes(tmp_path):
    code, said = run(
        "train",
        *CLASSIFICATION,
        *TWO,
        "--data.val_images",
        1,
        "--trainer.max_epochs",
        1,
        "--run.dir",
        "run",
        cwd=tmp_path,
    )
    assert code == 0, said
    assert json.loads((tmp_path / "run/results.json").read_text())["val_accuracy"] in (0.0, 1.0)


@pytest.mark.slow
def test_upernet_without_auxiliary_loss(tmp_path, capsys):
    upernet = [*SEGMENTATION, "--model.segmenter", "upernet", "--trainer.max_epochs", "1"]
    without = ["--model.auxiliary_weight", "0", "--run.dir", "two"]
    code, said = run("train", *upernet, *TWO, *without, cwd=tmp_path)
    assert code == 0, said
    code, said = run("train", *upernet, *TWO, "--data.batch_size", 1, cwd=tmp_path)
    assert code != 0 and "upernet normalises over a batch: take --data.batch_size 2 or more" in said


def test_unsupported_strategies_are_rejected(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *CLASSIFICATION, "--trainer.strategy", "ddp_spawn", "--trainer.devices", "2"]) == 1
    assert "Use ddp, which starts processes of its own" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_slurm_requeue(tmp_path):
    """The SLURM signal saves a checkpoint and requeues the job; the same command then resumes the run."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/asked\n')
    (tools / "scontrol").chmod(0o755)
    env = {**SLURM, "PATH": f"{tools}:{os.environ['PATH']}"}
    args = [
        "train",
        *CLASSIFICATION,
        "--data.train_images",
        "800",
        "--trainer.max_epochs",
        "1",
        "--run.save_every",
        "2",
    ]
    job = started([*CROSSFORMER, *args], tmp_path, **env)
    folder = tmp_path / "runs/classification-crossformer_nano"
    while not (folder / "last.ckpt").exists() and job.poll() is None:
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    said, _ = job.communicate(timeout=120)
    assert job.returncode == 128 + signal.SIGUSR1 and "SLURM has it in its queue again" in said, said
    assert (tmp_path / "asked").read_text() == "requeue 4711\n" and not list(tmp_path.glob("hpc_ckpt*"))
    (tmp_path / "runs/classification-crossformer_nano-2").mkdir()  # belongs to another job
    code, said = run(*args, cwd=tmp_path, **env, SLURM_RESTART_COUNT="1")
    assert code == 0 and "resuming after step" in said, said
    assert (folder / "results.json").exists() and len(list(tmp_path.glob("runs/*/results.json"))) == 1


@pytest.mark.slow
def test_slurm_validation_uses_requested_checkpoint(tmp_path, monkeypatch, capsys):
    """A checkpoint of an earlier job in the working directory is ignored."""
    monkeypatch.chdir(tmp_path)
    one = ["train", *CLASSIFICATION, "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"]
    for seed in ("0", "5"):
        assert main([*one, "--seed_everything", seed, "--run.dir", seed]) == 0
    shutil.move("5/last.ckpt", "hpc_ckpt_1.ckpt")
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    capsys.readouterr()
    assert main(["validate", "0"]) == 0
    loss = json.loads(Path("0/results.json").read_text())["val_loss"]
    assert f"val_loss {loss:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "number, more",
    [
        (signal.SIGTERM, []),
        pytest.param(signal.SIGINT, [], marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, TWO, marks=pytest.mark.slow),
        pytest.param(
            signal.SIGTERM, [*TWO, "--trainer.accumulate_grad_batches", "2"], marks=pytest.mark.slow
        ),
    ],
    ids=["SIGTERM", "Ctrl-C", "SIGTERM to two processes", "SIGTERM to two that accumulate"],
)
def test_signal_to_process_group(number, more, tmp_path):
    """Terminals and schedulers also send the signal to data loader workers."""
    command = [
        *CROSSFORMER,
        "train",
        *CLASSIFICATION,
        *more,
        "--data.train_images",
        "3200",
        "--run.dir",
        "run",
    ]
    job = subprocess.Popen(
        [*command, "--run.save_every", "1"],
        cwd=tmp_path,
        env={**os.environ, **CALM},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    while not (tmp_path / "run/last.ckpt").exists() and job.poll() is None:
        time.sleep(0.02)
    os.killpg(job.pid, number)
    said, _ = job.communicate(timeout=120)
    assert job.returncode == 128 + number, said
    assert "continue with" in said and "--resume run" in said and "error" not in said, said
    assert not (tmp_path / "run/results.json").exists()


def test_resume_auto(tmp_path, monkeypatch, capsys):
    """Starts a run, resumes it, exits if it is finished and rejects a different configuration."""
    monkeypatch.chdir(tmp_path)
    command = [
        "train",
        *CLASSIFICATION,
        "--trainer.max_epochs",
        "2",
        "--resume",
        "auto",
        "--run.save_every",
        "1",
    ]
    job = subprocess.Popen([*CROSSFORMER, *command], env={**os.environ, **CALM}, stdout=subprocess.DEVNULL)
    folder = Path("runs/classification-crossformer_nano")
    while not (folder / "last.ckpt").exists() and job.poll() is None:
        time.sleep(0.02)
    job.kill()
    job.wait()
    assert not (folder / "results.json").exists()
    assert main(command) == 0
    assert "resuming after step" in capsys.readouterr().out and (folder / "results.json").exists()
    assert main(command) == 0
    assert "is finished" in capsys.readouterr().out
    assert main([*command, "--model.lr", "0.5"]) == 1
    said = capsys.readouterr().err
    assert "holds a run with another configuration: model.lr is" in said and "0.5 here" in said
    assert [p.name for p in Path("runs").iterdir()] == ["classification-crossformer_nano"]


def test_restarted_job_continues_its_newest_run(tmp_path, monkeypatch):
    """Launches of torchrun share the id ``none``, so older runs have it too. Other models are not matched."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    options = parse_options("train", [*CLASSIFICATION, "--model.backbone", "resnet50"])
    names = ["", "-2", "-9", "-10", "d", "-9-old"]
    for age, name in enumerate(names):
        run = Path(f"runs/classification-resnet50{name}")
        run.mkdir(parents=True)
        (run / "config.yaml").touch()
        (run / ".lock").write_text("torchrun none")
        os.utime(run / ".lock", (age, age))
    shutil.rmtree("runs/classification-resnet50-9-old")
    assert find_run_of_job(options) == Path("runs/classification-resnet50-10")


@pytest.mark.slow
def test_torchrun_restart_resumes(tmp_path):
    """A killed process is restarted by ``--max-restarts`` and the run completes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", "-m", "crossformer_vision", "train", *CLASSIFICATION, *TWO]
    command += ["--trainer.max_epochs", "1", "--run.save_every", "2", "--data.train_images", "1600"]
    job = started(command, tmp_path)
    folder = tmp_path / "runs/classification-crossformer_nano"
    while not (folder / "last.ckpt").exists() and job.poll() is None:
        time.sleep(0.02)
    children = subprocess.run(
        ["pgrep", "-P", str(job.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    said, _ = job.communicate(timeout=300)
    assert job.returncode == 0 and "resuming after step" in said, said
    assert len(list(tmp_path.glob("runs/*"))) == 1 and (folder / "results.json").exists()


@pytest.mark.slow
def test_failed_config_write_keeps_previous_file(tmp_path):
    """If the disk is full on resume, the error names the file and its contents are unchanged."""
    code, said = run("train", *CLASSIFICATION, "--trainer.max_epochs", "1", "--run.dir", "run", cwd=tmp_path)
    assert code == 0, said
    before = (tmp_path / "run/config.yaml").read_bytes()
    limited = (
        f"ulimit -f 1; exec {sys.executable} -m crossformer_vision train --resume run --trainer.max_epochs 2"
    )
    done = subprocess.run(
        ["bash", "-c", limited], cwd=tmp_path, env={**os.environ, **CALM}, capture_output=True, text=True
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "run/config.yaml: cannot be written (File too large); what was there is untouched" in done.stderr
    assert (tmp_path / "run/config.yaml").read_bytes() == before
    assert main(["train", "--resume", str(tmp_path / "run"), "--trainer.max_epochs", "2"]) == 0
