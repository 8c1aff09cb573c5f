"""The command: parses, imports late, calls one function."""

import sys
import traceback
from argparse import ArgumentError
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

HELP = """\
usage: crossformer VERB [options]      crossformer VERB --help for all options of a verb

CrossFormer and CrossFormer++: train and evaluate vision models on images of your own.

  train       train a model; without options, the quickstart: some minutes on handwritten digits
  validate    evaluate a checkpoint, and draw what it gets right and wrong
  predict     what a trained checkpoint sees in images and folders: pictures and JSON
  info        parameters and operations of a model, beside the published ones
  download    bring published weights into torch's cache

tasks, by --task or the configuration's: classification (the default), detection, segmentation

examples
  crossformer train
  crossformer train --data.root my_images --model.model crossformer_small --trainer.max_epochs 30
  crossformer train --config classification/crossformer_small.yaml --data.root imagenet --trainer.devices 8
  crossformer train --config quickstart/detection.yaml
  crossformer train --task detection --data.root my_coco --model.detector mask_rcnn
  crossformer train --task segmentation --data.root my_maps --model.segmenter upernet
  crossformer train --resume runs/my-run
  crossformer validate runs/my-run
  crossformer predict runs/my-run photo.jpg more_photos/
  crossformer info crossformer_small --detector mask_rcnn
  crossformer download crossformer_small

my_images holds train/<class>/… and val/<class>/… with the images of each class; my_coco holds
annotations/instances_train.json, annotations/instances_val.json, and images/train/ and images/val/;
my_maps holds images/training/ and annotations/training/, PNGs with a class index a pixel, the same of
validation, and classes.json.
--debug with any verb shows the traceback of an error.   --version shows the version.
"""


class TaskParts(NamedTuple):
    """Where a task's classes are, its configuration by default, what its data take from its model."""

    module: str  # in `tasks` and in `data`
    task: str
    data: str
    quickstart: str
    links: tuple[str, ...]  # options of the model that the data have, too


TASKS = {
    "classification": TaskParts(
        "classification", "Classification", "ClassificationData", "quickstart/classification.yaml", ("model",)
    ),
    "detection": TaskParts(
        "detection",
        "Detection",
        "DetectionData",
        "quickstart/detection.yaml",
        ("detector", "min_size", "max_size"),
    ),
    "segmentation": TaskParts(
        "segmentation",
        "Segmentation",
        "SegmentationData",
        "quickstart/semantic_segmentation.yaml",
        ("model", "test_scales"),
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 for an error, 2 for wrong usage."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [a for a in args if a != "--debug"]
    if not args or args[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if args[0] == "--version":
        from crossformer_vision import __version__

        print(__version__)
        return 0
    verbs = {
        "train": train,
        "validate": validate,
        "predict": predict,
        "info": info,
        "download": download,
    }
    if args[0] not in verbs:
        print(f"crossformer: error: no verb '{args[0]}'; there are: {', '.join(verbs)}", file=sys.stderr)
        return 2
    try:
        verbs[args[0]](args[1:])
    except KeyboardInterrupt:
        print("crossformer: stopped", file=sys.stderr)
        return 130
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    except Exception as error:
        if debug:
            traceback.print_exc()
        usage = isinstance(error, ArgumentError)  # its reasons come as indented lines
        lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
        from_worker = "Original Traceback" in str(error)  # a data loader's; the error itself is its last line
        line = " ".join(lines) if usage else lines[-1 if from_worker else 0]
        print(f"crossformer: error: {line}", file=sys.stderr)
        return 2 if usage else 1
    return 0


def find_config(name: str) -> str:
    """A configuration file: a path, or a name among those that come with the library."""
    if Path(name).is_file():
        return name
    here = Path(__file__).parent
    for folder in (here / "configs", here.parents[1] / "configs"):  # installed, or a checkout
        for candidate in (
            folder / name,
            folder / Path(name).relative_to("configs") if "configs/" in name else folder,
        ):
            if candidate.is_file():
                return str(candidate)
    from crossformer_vision.errors import UserError

    raise UserError(f"{name}: no such configuration file")


def train(args: list[str]) -> None:
    """`crossformer train`"""
    resume = _take(args, "--resume")
    if resume is not None:
        args = [*_from_run(resume, f"{resume}/last.ckpt"), *args, "--run.folder", resume]
    cli = _parse(args, "train", resumed=resume is not None)
    from crossformer_vision.tasks import run

    results = run.train(cli.trainer, cli.model, cli.datamodule, cli.run, resume)
    if cli.trainer.is_global_zero:
        folder = cli.run.folder
        metric = cli.model.monitor
        name = metric.removeprefix("val_").replace("_ap", " AP").replace("_", " ")
        score = f"{name} {results[metric]:.2%}" if metric in results else "not validated,"
        print(f"\n{score} after {results['minutes']} minutes")
        print(f"  checkpoint  {results['checkpoint']}")
        print(f"  pictures    {folder}/: {', '.join(sorted(p.name for p in Path(folder).glob('*.png')))}")
        print(f"  numbers     {folder}/results.json, metrics.csv; tensorboard --logdir {folder}")
        print(
            f"next: crossformer predict {folder} photo.jpg; train on images of your own: crossformer --help"
        )


def validate(args: list[str]) -> None:
    """`crossformer validate`"""
    checkpoint = _take(args, "--checkpoint")
    if args and not args[0].startswith("-"):
        folder = args.pop(0)
        checkpoint = checkpoint or f"{folder}/best.ckpt"
        args = [*_from_run(folder, checkpoint), "--run.folder", f"{folder}/validate", *args]
    cli = _parse(args, "validate", resumed=False)
    if not (checkpoint or cli.config.model.pretrained or cli.config.model.checkpoint):
        from crossformer_vision.errors import UserError

        raise UserError(
            "validate needs weights: a run's folder (crossformer validate runs/x), --checkpoint FILE of a "
            "run, --model.checkpoint FILE or --model.pretrained true"
        )
    from crossformer_vision.tasks import run

    metrics = run.validate(
        cli.trainer, cli.model, cli.datamodule, Path(checkpoint) if checkpoint else None, Path(cli.run.folder)
    )
    if cli.trainer.is_global_zero:
        print("  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        print(f"pictures in {cli.run.folder}")


def predict(args: list[str]) -> None:
    """`crossformer predict`"""
    import argparse

    parser = argparse.ArgumentParser(
        "crossformer predict", description="Draw and write down what a trained checkpoint sees in images."
    )
    parser.add_argument("run", help="run folder, whose best.ckpt is taken, or a checkpoint file of a run")
    parser.add_argument("images", nargs="+", help="image files, or folders of them")
    parser.add_argument("--out", default="predictions", help="folder for pictures and JSON (predictions)")
    parser.add_argument("--score", type=float, default=0.5, help="least score of an object (0.5)")
    parser.add_argument("--device", help="cpu, cuda, …; the best there is, if not given")
    options = parser.parse_args(args)
    from crossformer_vision import predict

    predictor = predict.load_predictor(options.run, options.device, options.score)
    predict.predict_files(predictor, options.images, Path(options.out))


def info(args: list[str]) -> None:
    """`crossformer info`"""
    import argparse

    parser = argparse.ArgumentParser(
        "crossformer info",
        description="Parameters and multiply-accumulates (MACs) of a model, beside the published ones.",
    )
    parser.add_argument("model", help="any timm model, such as crossformer_small")
    heads = parser.add_mutually_exclusive_group()
    heads.add_argument("--detector", choices=("retinanet", "mask_rcnn"), help="on the model as backbone")
    heads.add_argument("--segmenter", choices=("semantic_fpn", "upernet"), help="on the model as backbone")
    parser.add_argument(
        "--size", nargs=2, type=int, metavar=("H", "W"), help="of the image; the task's own if not given"
    )
    parser.add_argument("--json", action="store_true", help="the same for programs")
    options = parser.parse_args(args)
    import json

    from crossformer_vision import info

    what = options.model, options.detector or options.segmenter, options.size
    print(json.dumps(info.figures(*what), indent=2) if options.json else info.describe(*what))


def download(args: list[str]) -> None:
    """`crossformer download`"""
    import argparse

    parser = argparse.ArgumentParser(
        "crossformer download", description="Bring published weights into torch's cache."
    )
    parser.add_argument("name", help="such as crossformer_small, or upernet_crossformer_small")
    parser.add_argument("--url", help="a mirror of Google Drive's download address, asked for ?id=…")
    options = parser.parse_args(args)
    from crossformer_vision import published

    path = published.fetch_published(options.name, options.url or published.DRIVE)
    print(f"{path}\nbuild and load it:\n{published.how_to_build(options.name, path)}")


def _take(args: list[str], option: str) -> str | None:
    """Remove `option VALUE` or `option=VALUE` from `args` and return the value."""
    for i, arg in enumerate(args):
        if arg == option and i + 1 < len(args):
            del args[i]
            return args.pop(i)
        if arg.startswith(option + "="):
            return args.pop(i).split("=", 1)[1]
    return None


def _from_run(folder: str, checkpoint: str) -> list[str]:
    """The options that build what a checkpoint of a run folder holds."""
    from crossformer_vision.errors import UserError

    for path in (Path(folder) / "config.yaml", Path(checkpoint)):
        if not path.is_file():
            raise UserError(f"{folder}: not a run folder, it has no {path.name}")
    from crossformer_vision.checkpoints import read_checkpoint, span_of_a_run

    span = span_of_a_run(read_checkpoint(checkpoint), checkpoint)
    options = [part for name, value in span.items() for part in (f"--model.model_args.{name}", value)]
    return ["--config", f"{folder}/config.yaml", *options]


def _parse(args: list[str], verb: str, resumed: bool) -> Any:
    """Lightning's command line on our task, data and trainer; returns them, built."""
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

    import crossformer_vision.published  # noqa: F401  (registers the models with timm)
    from crossformer_vision.tasks.run import Run, new_folder, quiet

    quiet()
    args = [part for a in args for part in (a.split("=", 1) if a.startswith("--config=") else (a,))]
    args = [find_config(a) if i and args[i - 1] == "--config" else a for i, a in enumerate(args)]
    name = _task_name(args)
    parts = TASKS[name]
    if "--config" not in args:
        args = ["--config", find_config(parts.quickstart), *args]

    class Cli(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_argument("--task", default=name, help=f"one of {', '.join(TASKS)}")
            parser.add_class_arguments(Run, "run")
            parser.link_arguments("seed_everything", "data.seed")
            parser.link_arguments("seed_everything", "model.seed")
            for option in parts.links:
                parser.link_arguments(f"model.{option}", f"data.{option}")
            parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")

        def instantiate_trainer(self, **kwargs: Any) -> Any:
            self.run = self.config_init.run
            if self.run.folder is None:
                self.run.folder = str(new_folder(f"{verb}-{self.config.model.model}"))
            elif verb == "train" and not resumed and (Path(self.run.folder) / "last.ckpt").exists():
                from crossformer_vision.errors import UserError

                raise UserError(
                    f"{self.run.folder}: there is a run in it; --resume it, or choose another --run.folder"
                )
            text = self.parser.dump(self.config, skip_link_targets=True, skip_none=False)
            return super().instantiate_trainer(**self.run.trainer_parts(self.model, text, resumed), **kwargs)

    return Cli(
        getattr(import_module(f"crossformer_vision.tasks.{parts.module}"), parts.task),
        getattr(import_module(f"crossformer_vision.data.{parts.module}"), parts.data),
        args=args,
        run=False,
        save_config_callback=None,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        trainer_defaults={
            "max_epochs": 10,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "enable_progress_bar": sys.stdout.isatty(),
            "num_sanity_val_steps": 0,
            "gradient_clip_val": 5.0,
        },
        parser_kwargs={"prog": f"crossformer {verb}", "exit_on_error": False},
    )


def _task_name(args: list[str]) -> str:
    """The task of a command line: `--task`, or the configuration's, or classification."""
    name = _take(list(args), "--task")
    config = _take(list(args), "--config")
    if name is None and config is not None:
        import yaml

        try:
            content = yaml.safe_load(Path(config).read_text())
        except (yaml.YAMLError, UnicodeDecodeError):  # the parser will say what is wrong with it
            content = None
        name = content.get("task") if isinstance(content, dict) else None
    name = name or "classification"
    if name not in TASKS:
        from crossformer_vision.errors import UserError

        raise UserError(f"no task '{name}'; there are: {', '.join(TASKS)}")
    return name


def script() -> None:
    """The entry point of the installed command."""
    sys.exit(main())
