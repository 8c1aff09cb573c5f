"""The command: parses, imports late, calls one function."""

import io
import os
import shlex
import sys
import traceback
from argparse import ArgumentError
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

HELP = """\
usage: crossformer VERB [options]      crossformer VERB --help for all options of a verb

CrossFormer and CrossFormer++: train and evaluate vision models on images of your own.

  train       train a model; without options, the quickstart: some minutes on handwritten digits
  validate    evaluate a checkpoint, and draw what it gets right and wrong
  predict     what a trained checkpoint sees in images and folders: pictures and JSON
  inspect     what is inside a network on a photo: groups, attention, class activation
  compare     a grid of runs: models and options x seeds; their table, on one machine or many
  export      a trained network as ONNX, OpenVINO or torch's program, for any image size
  share       a trained classifier as a folder or a repository that timm and transformers open
  benchmark   how fast models are, side by side: inference and training, eager and compiled
  demo        a page in the browser: a photo, what a network sees, what a point attends to
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
  crossformer train --resume runs/classification-crossformer_small
  crossformer validate runs/classification-crossformer_small
  crossformer predict runs/classification-crossformer_small photo.jpg more_photos/
  crossformer inspect crossformer_nano.cifar10 photo.jpg
  crossformer export crossformer_nano.cifar10 --out nano.onnx
  crossformer benchmark crossformer_small swin_tiny_patch4_window7_224 --engine eager compiled
  crossformer info crossformer_small --detector mask_rcnn
  crossformer download crossformer_small

my_images holds train/<class>/… and val/<class>/… with the images of each class; my_coco holds
annotations/instances_train.json, annotations/instances_val.json, and images/train/ and images/val/;
my_maps holds images/training/ and annotations/training/, PNGs with a class index a pixel, the same of
validation, and classes.json.
--debug with any verb shows the traceback of an error.   --version shows the version.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 for an error, 2 for wrong usage."""
    # OpenMP's threads wait for each other in a loop: where another program takes a core, all wait for the one
    # that shares it. So they give up early (of torch's libgomp; read when torch is imported).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
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
        "inspect": inspect,
        "compare": compare,
        "export": export,
        "share": share,
        "benchmark": benchmark,
        "demo": demo,
        "info": info,
        "download": download,
    }
    if args[0] not in verbs:
        from difflib import get_close_matches

        close = get_close_matches(args[0], [*verbs, "--version", "--help"], 1)
        meant = f"; did you mean {close[0]}?" if close else f"; there are: {', '.join(verbs)}"
        print(f"crossformer: error: no verb '{args[0]}'{meant}", file=sys.stderr)
        return 2
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):  # file names may not fit the terminal's encoding
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        verbs[args[0]](args[1:])
    except BrokenPipeError:  # nobody reads what is printed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
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
        code = getattr(error, "code", None)  # of a run that a signal has ended
        if isinstance(code, int):
            print(f"\n{line}", file=sys.stderr)
            return code
        if "torchvision::nms does not exist" in line:
            line = (
                "torchvision does not match torch. Install the two together: "
                "pip install --force-reinstall torch torchvision"
            )
        print(f"crossformer: error: {line}", file=sys.stderr)
        return 2 if usage else 1
    return 0


def keep_freed_memory() -> None:
    """Let a process keep up to 2 GiB of what it frees, where glibc is the allocator.

    It gives large blocks back to the system at once, and fresh ones come page by page: a tenth of a training
    step on a CPU (docs/results/speed.md). `MALLOC_TRIM_THRESHOLD_` or `MALLOC_MMAP_THRESHOLD_` in the
    environment leave the choice to glibc and to them.
    """
    if sys.platform != "linux" or {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & set(os.environ):
        return
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, 2**30)


def train(args: list[str]) -> None:
    """`crossformer train`"""
    from crossformer_vision.cli import options
    from crossformer_vision.cli.arguments import take

    resume = take(args, "--resume")
    from crossformer_vision.plotting import visualize
    from crossformer_vision.training import run
    from crossformer_vision.training.run_directory import command, restarted

    cli: Any = None
    if resume == "auto" or (resume is None and restarted()):
        try:
            cli = options.parse(args, "train", auto="asked" if resume else "restarted")
            resume = None
        except options.GoOn as there:
            resume, args = str(there), []
    if cli is None:
        fixed: dict[str, Any] = {}
        upgraded: dict[str, Any] = {}
        if resume is not None:
            given, fixed, upgraded = options.from_run(resume, None)
            args = [*given, *args]
            if "--help" in args:
                resume = None
        cli = options.parse(args, "train", fixed, resume, upgraded)
    if resume and run.is_finished(Path(resume), cli.trainer):
        print(
            f"{resume} is finished; to train longer, pass a larger --trainer.max_epochs, or --run.patience "
            f"after an early stop, with --resume; to see its metrics: {command()} validate {resume}"
        )
        return
    results = run.train(cli.trainer, cli.model, cli.datamodule, cli.run, resume)
    if cli.trainer.is_global_zero:
        folder, call = cli.run.folder, command()
        metric = cli.model.monitor
        score = f"{visualize.called(metric)} {results[metric]:.2%}" if metric in results else "not validated,"
        print(f"\n{score} after {timedelta(seconds=round(60 * results['minutes']))}")
        print(f"  checkpoint  {results['checkpoint']}")
        print(f"  pictures    {', '.join(sorted(p.name for p in Path(folder).glob('*.png')))} in {folder}")
        print(f"  numbers     results.json, metrics.csv; tensorboard --logdir {folder}")
        print(f"next: {call} predict {shlex.quote(folder)} photo.jpg")
        if not cli.datamodule.root:
            print(f"      {call} --help, for images of your own")
        for line in cli.datamodule.notices():
            print(f"note: {line}")


def validate(args: list[str]) -> None:
    """`crossformer validate`"""
    from crossformer_vision.cli import options
    from crossformer_vision.cli.arguments import has, take
    from crossformer_vision.errors import UserError

    checkpoint = take(args, "--checkpoint")
    fixed: dict[str, Any] = {}
    folder = None
    if args and not args[0].startswith("-"):
        folder = args.pop(0)
        if Path(folder).is_file():
            folder, checkpoint = str(Path(folder).parent), checkpoint or folder
        checkpoint = checkpoint or f"{folder}/best.ckpt"
        given, fixed, _ = options.from_run(folder, checkpoint)
        if has(args, "--data.root"):  # other images: all of them, where they are not split
            fixed.pop("data.val_list", None)
            if not has(args, "--data.val_share"):
                fixed["data.val_share"] = 1.0
        args = [*given, *args]
    elif checkpoint:
        fixed = options.known_of(checkpoint)
    from crossformer_vision.training import run

    cli = options.parse(args, "validate", fixed, silent=folder is not None)
    if not (checkpoint or cli.config.model.pretrained or cli.config.model.checkpoint):
        raise UserError(
            "validate needs weights: a run's folder (crossformer validate runs/x), --checkpoint FILE of a "
            "run, --model.checkpoint FILE or --model.pretrained true"
        )
    out = cli.run.folder or (f"{folder}/validate" if folder else f"runs/{cli.model.name}-validate")
    path = Path(checkpoint) if checkpoint else None
    results, out = run.evaluate(cli.trainer, cli.model, cli.datamodule, path, Path(out))
    if cli.trainer.is_global_zero:
        import textwrap

        figures = [f"{k} {v:.4f}" for k, v in results.items() if k.startswith("val_")]
        lines = textwrap.wrap("  ".join(f.replace(" ", "\0") for f in figures), 79)  # a figure in one line
        print("\n".join(lines).replace("\0", " "))
        print(f"{results['images']} images; pictures and results.json in {out}")


def predict(args: list[str]) -> None:
    """`crossformer predict`"""
    import argparse

    parser = argparse.ArgumentParser(
        "crossformer predict", description="Draw and write down what a trained checkpoint sees in images."
    )
    parser.add_argument(
        "what",
        help="run folder, whose best.ckpt is taken, or a checkpoint file of a run; or the name of published "
        "weights, as crossformer_nano.cifar10, which come along, resnet18, mask_rcnn_crossformer_small; or "
        "an exported file, .onnx or .xml",
    )
    parser.add_argument("images", nargs="+", help="image files, folders, 'patterns*.jpg', videos")
    parser.add_argument(
        "--model",
        help="of a file of published weights: crossformer_small, mask_rcnn_crossformer_small, …",
    )
    parser.add_argument(
        "--out",
        default="predictions",
        help="folder for pictures and JSON, which replace those of an earlier call (predictions)",
    )
    parser.add_argument(
        "--save",
        choices=("all", "results", "nothing"),
        default="all",
        help="what is written below --out: pictures and results (all, the default), results, or nothing",
    )
    parser.add_argument("--json", action="store_true", help="print results as JSON, one a line, not as words")
    parser.add_argument(
        "--score",
        "--score-threshold",
        "--conf",
        type=float,
        default=0.5,
        help="score threshold of objects (default: 0.5)",
    )
    parser.add_argument(
        "--tile",
        "--tile-size",
        type=int,
        metavar="PIXELS",
        help="side of overlapping tiles, in which a detector goes over larger images for small objects; "
        "images of any number of pixels are read then",
    )
    parser.add_argument("--device", help="cpu, cuda, …; the best there is, if not given")
    options = parser.parse_args(args)
    from crossformer_vision import load_predictor
    from crossformer_vision.inference.files import predict_files

    if options.tile:
        from PIL import Image

        Image.MAX_IMAGE_PIXELS = None  # such images are what tiles are for
    predictor = load_predictor(options.what, options.device, options.score, options.tile, options.model)
    out = None if options.save == "nothing" else Path(options.out)
    predict_files(predictor, options.images, out, options.save == "all", options.json)


def inspect(args: list[str]) -> None:
    """`crossformer inspect`"""
    import argparse

    parser = argparse.ArgumentParser(
        "crossformer inspect",
        description="Draw what is inside a CrossFormer on a photo: the patches of an embedding, the groups "
        "of SDA and of both LDAs, what a position attends to, attention rollout, class activation, position "
        "biases, and the activations' amplitude by block.",
    )
    parser.add_argument("what", help="a run, a checkpoint of one, or the name of published weights")
    parser.add_argument("photo", help="an image file")
    parser.add_argument("--out", default="inspect.png", help="the page that is drawn (inspect.png)")
    parser.add_argument("--point", default="0.5,0.5", help="X,Y in shares of the photo (0.5,0.5: its middle)")
    parser.add_argument("--stage", type=int, default=3, help="of the network, from 1 (3)")
    parser.add_argument("--block", type=int, help="of the stage, from 1, with its neighbour (the last)")
    parser.add_argument("--head", type=int, help="of the attention, from 1 (the mean of all)")
    parser.add_argument(
        "--size", type=int, help="shorter side of the photo in pixels (the classifier's; 448)"
    )
    parser.add_argument("--beside", metavar="WHAT", help="another network, whose amplitudes are drawn, too")
    parser.add_argument("--device", help="cpu, cuda, …; the best there is, if not given")
    given = parser.parse_args(args)
    from crossformer_vision import load_predictor
    from crossformer_vision.data.images import read
    from crossformer_vision.errors import UserError, check_output
    from crossformer_vision.tools import inspection_page as page

    try:
        x, y = (float(share) for share in given.point.split(","))
    except ValueError:
        raise UserError(f"--point {given.point}: two shares of the photo, such as 0.5,0.25") from None
    check_output("--out", given.out, given.photo, given.what, given.beside)
    photo = read(given.photo, given.photo)
    beside = (given.beside, load_predictor(given.beside, given.device)) if given.beside else None
    block, head = (None if number is None else number - 1 for number in (given.block, given.head))
    at = dict(point=(x, y), stage=given.stage - 1, block=block, head=head, size=given.size, beside=beside)
    print(page.sheet(load_predictor(given.what, given.device), photo, given.out, **at))


def compare(args: list[str]) -> None:
    """`crossformer compare`"""
    import argparse

    parser = argparse.ArgumentParser(
        "crossformer compare",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="""\
Train the cells of a grid, models and options x seeds over one recipe, and write their table. Called again, it
does what lacks; called several times at once, on one machine or many, the calls share the cells.

  recipe: classification/crossformer_nano_cifar10.yaml
  options: {data.root: cifar10, trainer.max_epochs: 5}
  rows:
    CrossFormer: {}
    PVTv2: {model.model: pvt_v2_b0, model.model_args: {depths: [2, 2, 2, 2]}}
  vary: {model.lr: [1.0e-3, 3.0e-3]}
  seeds: 3""",
    )
    parser.add_argument("grid", help="YAML file of the grid, as above")
    parser.add_argument("--out", help="folder of its runs and its table (runs/<name of the grid>)")
    parser.add_argument("--storage", help="URL of a database for several machines (SQLite in the folder)")
    parser.add_argument(
        "--search",
        type=int,
        metavar="N",
        help="N trials, pruned, of the ranges under `search`, on its first row",
    )
    parser.add_argument(
        "--heartbeat",
        type=int,
        default=20,
        help="seconds between signs of life of a worker; three without one, and others take its cell (20)",
    )
    given = parser.parse_args(args)
    try:
        from crossformer_vision.tools import compare
    except ModuleNotFoundError as error:
        from crossformer_vision.errors import UserError

        raise UserError(f"{error.name} is not installed: pip install 'crossformer-vision[compare]'") from None
    out = Path(given.out or f"runs/{Path(given.grid).stem}")
    if given.search is not None:
        compare.search(given.grid, out, given.search, given.storage, given.heartbeat)
    else:
        compare.compare(given.grid, out, given.storage, given.heartbeat)


def export(args: list[str]) -> None:
    """`crossformer export`"""
    import argparse

    parser = argparse.ArgumentParser(
        "crossformer export",
        description="Write a trained classifier, segmenter or detector as one graph for any batch, height "
        "and width, and hold it against the network at several sizes. Takes some minutes.",
    )
    parser.add_argument("what", help="a run, a checkpoint of one, or the name of published weights")
    formats = ("onnx", "openvino", "torch")
    parser.add_argument("--format", choices=formats, help="of the file (by its ending, or else onnx)")
    parser.add_argument(
        "--out",
        help="the file: .onnx, .xml of OpenVINO with a .bin beside it, or .pt2 of torch (the name of what is "
        "exported, with the ending of the format)",
    )
    parser.add_argument("--features", action="store_true", help="the backbone's four maps, without a head")
    parser.add_argument(
        "--int8",
        metavar="IMAGES",
        help="compute in 8 bits, with the ranges that the images of this folder show (a classifier or "
        "segmenter, as OpenVINO)",
    )
    given = parser.parse_args(args)
    if given.int8 is not None and given.format is None and given.out is None:
        given.format = "openvino"
    from crossformer_vision import export

    path = Path(given.what)
    named = path.parent if path.suffix == ".ckpt" else path
    suffix = export.FORMATS[given.format or "onnx"]
    out = Path(given.out or f"{named.name}{'-features' if given.features else ''}{suffix}")
    if given.format and out.suffix != suffix:
        from crossformer_vision.errors import UserError

        raise UserError(f"'{out.name}': a file of the format {given.format} ends in {suffix}")
    report = partial(print, file=sys.stderr, flush=True)
    print(export.describe(export.export(given.what, out, given.features, given.int8, report), out))


def share(args: list[str]) -> None:
    """`crossformer share`"""
    import argparse

    parser = argparse.ArgumentParser(
        "crossformer share",
        description="Write a trained classifier as timm and transformers open it, with a model card.",
    )
    parser.add_argument("what", help="a run, a checkpoint of one, or the name of published weights")
    parser.add_argument("--to", required=True, help="a new folder, or hf:owner/name on Hugging Face")
    given = parser.parse_args(args)
    from crossformer_vision.tools import share

    print(f'timm.create_model("{share.share(given.what, given.to)}", pretrained=True)')


def benchmark(args: list[str]) -> None:
    """`crossformer benchmark`"""
    if args and args[0] == "--data":
        benchmark_data(args[1:])
        return
    import argparse

    parser = argparse.ArgumentParser(
        "crossformer benchmark",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="""\
Time models side by side in one interleaved run. Options of several values make a row of each combination.

  crossformer benchmark crossformer_small swin_tiny_patch4_window7_224 --step inference training
  crossformer benchmark crossformer_small convnext_tiny --engine eager compiled --dtype float32 bfloat16
  crossformer benchmark features:crossformer_small,lda_span=region features:resnet50 \\
    --size 800x1280 --batch 1

With --data first, the options are those of crossformer train: how fast its images are read, by number of
workers, how fast its network takes them, and which of the two waits.

  crossformer benchmark --data --data.root my_images""",
    )
    parser.add_argument(
        "what",
        nargs="+",
        help="timm models; features:MODEL, its maps; retinanet:MODEL, mask_rcnn:, semantic_fpn:, upernet:, "
        "with keywords of the model: MODEL,key=value; files of crossformer export",
    )
    parser.add_argument("--size", nargs="+", default=["224"], help="of the images: 224, or HxW (224)")
    parser.add_argument("--step", nargs="+", default=["inference"], choices=("inference", "training"))
    parser.add_argument(
        "--engine",
        nargs="+",
        default=["eager"],
        choices=("eager", "compiled", "frozen", "autotuned", "reduce-overhead", "max-autotune"),
        help="how it is run: as it is (eager, the default), or by torch.compile; for inference on CPUs: "
        "frozen, with weights and position biases as constants, and autotuned, the same with kernels chosen "
        "by timing",
    )
    parser.add_argument(
        "--dtype",
        nargs="+",
        default=["float32"],
        choices=("float32", "bfloat16", "float16", "amp-bfloat16", "amp-float16"),
        help="of weights and images; amp- keeps the weights in float32, by autocast",
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[8], help="images at a time (8)")
    parser.add_argument("--device", help="cpu, cuda, …; the best there is, if not given")
    parser.add_argument("--rounds", type=int, default=7, help="each row once in each; at least so many (7)")
    parser.add_argument("--threads", type=int, help="of a CPU; all cores if not given")
    parser.add_argument("--out", default="runs/benchmark", help="folder of its table (runs/benchmark)")
    given = parser.parse_args(args)
    from itertools import product

    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # of torch's profiler, which measures memory
    import torch

    from crossformer_vision.inference.predictor import best_device
    from crossformer_vision.tools import benchmark

    sizes = [benchmark.image_size(size) for size in given.size]
    if given.threads:
        torch.set_num_threads(given.threads)
    modes = product(sizes, given.step, given.engine, given.dtype, given.batch)
    rows = [benchmark.Row(what, *mode) for mode in modes for what in given.what]
    benchmark.run(rows, best_device(given.device), given.rounds, Path(given.out))


def benchmark_data(args: list[str]) -> None:
    """`crossformer benchmark --data`, with the options of `crossformer train`."""
    from crossformer_vision.cli import options
    from crossformer_vision.cli.arguments import take

    out = Path(take(args, "--out") or "runs/benchmark")
    cli = options.parse(args, "train")
    from crossformer_vision.tools import benchmark_data

    benchmark_data.run(cli, out)


def demo(args: list[str]) -> None:
    """`crossformer demo`"""
    import argparse

    parser = argparse.ArgumentParser(
        "crossformer demo",
        description="Serve a page: upload a photo, see what trained networks see in it, click a point and "
        "see what it attends to.",
    )
    parser.add_argument(
        "what",
        nargs="*",
        help="runs, checkpoints, names of published weights (crossformer_nano.cifar10, which come along)",
    )
    parser.add_argument("--port", type=int, help="the first free one from 7860 if not given")
    parser.add_argument("--host", default="127.0.0.1", help="address (127.0.0.1: this machine alone)")
    parser.add_argument("--device", help="cpu, cuda, …; the best there is, if not given")
    given = parser.parse_args(args)
    from crossformer_vision.tools import demo

    demo.serve(given.what or ["crossformer_nano.cifar10"], given.host, given.port, given.device)


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

    from crossformer_vision.tools import info

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
    from crossformer_vision.weights import published

    path = published.fetch_published(options.name, options.url or published.DRIVE)
    print(f"{path}\nbuild and load it:\n{published.how_to_build(options.name, path)}")


def script() -> None:
    """The entry point of the installed command."""
    sys.exit(main())
