"""A trained classifier for others: a folder, or a repository of Hugging Face, in timm's own format."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import timm
from timm.models import save_for_hf

from crossformer_vision import __version__
from crossformer_vision.errors import UserError
from crossformer_vision.inference.predictor import Predictor, load_predictor

PLOTS = ("curves.png", "confusion_matrix.png")  # `predictions.png` shows images that may not be ours to share
CITATION = """\
```bibtex
@inproceedings{wang2022crossformer,
  title = {CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention},
  author = {Wang, Wenxiao and Yao, Lu and Chen, Long and Lin, Binbin and Cai, Deng and He, Xiaofei
            and Liu, Wei},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year = {2022}
}
```"""


def share(what: str, to: str) -> str:
    """Write a trained classifier as timm and transformers open it, with a model card of its results.

    Args:
        what: as for `load_predictor`: a run, whose results and plots go into the card, a checkpoint or the
            name of published weights.
        to: a new folder; or `hf:owner/name`, a repository of Hugging Face that you may write to.

    Returns:
        What `timm.create_model` takes: `local-dir:FOLDER` or `hf-hub:owner/name`.

    Raises:
        UserError: no classifier; a folder that is there already; Hugging Face cannot be reached or refuses.
    """
    predictor = load_predictor(what, "cpu")
    if predictor.task != "classification" or not predictor.options:
        raise UserError(f"{what}: timm's format is for trained classifiers, not for {predictor.task} or ONNX")
    repository = to.removeprefix("hf:") if to.startswith("hf:") else None
    if repository is not None and len([part for part in repository.split("/") if part]) != 2:
        raise UserError(f"--to {to}: a repository is hf:owner/name")
    file = Path(what) / "best.ckpt" if Path(what).is_dir() else Path(what)
    own = file if file.exists() else None  # not published weights
    if repository is None:
        folder = Path(to)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder}: is there already; name a new folder")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".share-") as new:
                _write(predictor, own, Path(new) / "model", f"local-dir:{folder.name}", folder.name)
                (Path(new) / "model").replace(folder)
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
        return f"local-dir:{folder}"
    with tempfile.TemporaryDirectory() as new:
        _write(predictor, own, Path(new), f"hf-hub:{repository}", repository.split("/")[1])
        _upload(Path(new), repository)
    return f"hf-hub:{repository}"


def _results(file: Path | None) -> dict[str, Any]:
    """What the run of a checkpoint says of it; nothing where it says it of another, as best beside last."""
    if file is None or not (file.parent / "results.json").is_file():
        return {}
    results = json.loads((file.parent / "results.json").read_text(encoding="utf-8"))
    return results if Path(results.get("checkpoint", "")).name == file.name else {}


def _write(predictor: Predictor, file: Path | None, folder: Path, opened: str, title: str) -> None:
    args = dict(predictor.options.get("model_args") or {})
    net: Any = predictor.net
    prepared = dict(predictor.image)
    if file is not None:  # own weights: not the model's published ones, nor under their licence
        prepared |= {"tag": None, "license": None}
    config = {"label_names": list(predictor.classes), "pretrained_cfg": prepared}
    save_for_hf(net, str(folder), model_config=config, model_args=args, safe_serialization=True)
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # timm notes them twice, and transformers passes on both.
    for name in ("num_classes", "global_pool"):
        written.get("model_args", {}).pop(name, None)
    (folder / "config.json").write_text(json.dumps(written, indent=2), encoding="utf-8")
    results = _results(file)
    plots = (
        [file.parent / name for name in PLOTS if (file.parent / name).is_file()] if file and results else []
    )
    for plot in plots:
        shutil.copy(plot, folder)
    shutil.copymode(
        folder / "config.json", folder / "model.safetensors"
    )  # safetensors writes files with mode 0600
    card = model_card(predictor, title, opened, results, [plot.name for plot in plots])
    (folder / "README.md").write_text(card, encoding="utf-8")


def _upload(folder: Path, repository: str) -> None:
    from huggingface_hub import HfApi

    try:
        api = HfApi(library_name="crossformer-vision", library_version=__version__)
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Add model")
    except Exception as error:  # of the network, of the account, of many kinds
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"hf:{repository}: {line}; log in with `hf auth login`, or share to a folder"
        ) from None


def model_card(
    predictor: Predictor, title: str, opened: str, results: dict[str, Any], plots: list[str]
) -> str:
    """The README of a shared model, in Markdown with Hugging Face's head."""
    name, classes = str(predictor.options["model"]), predictor.classes
    size = predictor.image["input_size"]
    parameters = sum(p.numel() for p in predictor.net.parameters())
    listed = ", ".join(f"`{c}`" for c in classes[:20]) + (
        f" and {len(classes) - 20} more" * (len(classes) > 20)
    )
    facts = [
        f"- **Model:** `{name}`, {parameters / 1e6:.1f} M parameters",
        f"- **Images:** {size[1]}x{size[2]}",
        f"- **Classes:** {len(classes)}: {listed}",
    ]
    for key, label in (
        ("val_accuracy", "Accuracy"),
        ("val_accuracy_top5", "Top-5 accuracy"),
    ):
        if key in results:
            facts.append(f"- **{label}:** {results[key]:.2%} on the run's validation images")
    for key, label in (
        ("epochs", "Epochs"),
        ("date", "Trained on"),
        ("hardware", "Hardware"),
    ):
        if results.get(key) is not None:
            facts.append(f"- **{label}:** {results[key]}")
    pictures = "".join(f"\n![{p.removesuffix('.png').replace('_', ' ')}]({p})\n" for p in plots)
    ours = name.startswith(("crossformer_", "pvt_"))
    needed = (
        "import crossformer_vision  # registers the model; pip install crossformer-vision\n" if ours else ""
    )
    return f"""---
tags:
- image-classification
- timm
- transformers
pipeline_tag: image-classification
library_name: timm
---
# {title}

An image classifier, shared by crossformer-vision {__version__}.

{chr(10).join(facts)}
{pictures}
## Use

```python
import timm
{needed}
net = timm.create_model("{opened}", pretrained=True).eval()
```

```python
from transformers import pipeline
{needed}
print(pipeline("image-classification", model="{opened.partition(":")[2]}")("photo.jpg"))
```

Written for timm {timm.__version__}. The licence is for whoever shares these weights to name.

## Citation

{CITATION}
"""
