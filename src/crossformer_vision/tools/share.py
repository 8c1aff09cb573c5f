"""Save a trained classifier in the format of timm and transformers, or upload it to Hugging Face."""

import json
import shutil
import tempfile
from pathlib import Path

import timm
from timm.models import save_for_hf

from crossformer_vision import __version__
from crossformer_vision.errors import UserError, error_line
from crossformer_vision.inference.load import load_predictor
from crossformer_vision.inference.predictor import Predictor
from crossformer_vision.types import JsonObject

PLOTS = ("curves.png", "confusion_matrix.png")  # not predictions.png, whose images may not be shareable
CROSSFORMER = """\
@inproceedings{wang2022crossformer,
  title = {CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention},
  author = {Wang, Wenxiao and Yao, Lu and Chen, Long and Lin, Binbin and Cai, Deng and He, Xiaofei
            and Liu, Wei},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year = {2022}
}"""
CROSSFORMER_PP = """\
@article{wang2023crossformer,
  title = {CrossFormer++: A Versatile Vision Transformer Hinging on Cross-scale Attention},
  author = {Wang, Wenxiao and Chen, Wei and Qiu, Qibo and Chen, Long and Wu, Boxi and Lin, Binbin
            and He, Xiaofei and Liu, Wei},
  journal = {IEEE Transactions on Pattern Analysis and Machine Intelligence},
  year = {2023}
}"""


def share(source: str, to: str) -> str:
    """Save a trained classifier with a model card of its results.

    Args:
        source: Run directory, whose results and plots go into the card, checkpoint of a run, or name of
            published weights.
        to: New folder, or ``hf:OWNER/NAME`` for a repository on Hugging Face.

    Returns:
        Name for ``timm.create_model``: ``local-dir:FOLDER`` or ``hf-hub:OWNER/NAME``.

    Raises:
        UserError: If the source is not a classifier, the folder exists, or the upload fails.
    """
    predictor = load_predictor(source, "cpu")
    if predictor.task != "classification" or not predictor.info.options:
        raise UserError(
            f"{source}: only trained classifiers can be shared, not {predictor.task} models or exported files"
        )
    if predictor.info.thresholds is not None:
        raise UserError(f"{source}: a multi-label classifier, which timm and transformers would read wrongly")
    repository = to.removeprefix("hf:") if to.startswith("hf:") else None
    if repository is not None and len([part for part in repository.split("/") if part]) != 2:
        raise UserError(f"--to {to}: not a repository, such as hf:owner/name")
    file = Path(source) / "best.ckpt" if Path(source).is_dir() else Path(source)
    own_file = file if file.exists() else None  # else published weights
    if repository is None:
        folder = Path(to)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder}: already exists. Choose a new folder")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".share-") as new:
                _write(predictor, own_file, Path(new) / "model", f"local-dir:{folder.name}", folder.name)
                (Path(new) / "model").replace(folder)
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
        return f"local-dir:{folder}"
    with tempfile.TemporaryDirectory() as new:
        _write(predictor, own_file, Path(new), f"hf-hub:{repository}", repository.split("/")[1])
        _upload(Path(new), repository)
    return f"hf-hub:{repository}"


def _results(file: Path | None) -> JsonObject:
    """Results of a run, if they belong to this checkpoint file."""
    if file is None or not (file.parent / "results.json").is_file():
        return {}
    results = json.loads((file.parent / "results.json").read_text(encoding="utf-8"))
    return results if Path(results.get("checkpoint", "")).name == file.name else {}


def _write(predictor: Predictor, file: Path | None, folder: Path, opened: str, title: str) -> None:
    """Write weights, configuration, plots and model card."""
    model_args = dict(predictor.info.options.get("model_args") or {})
    pretrained_cfg = dict(predictor.info.image)
    if file is not None:  # own weights, not covered by the license of published ones
        pretrained_cfg |= {"tag": None, "license": None}
    model_config = {"label_names": list(predictor.classes), "pretrained_cfg": pretrained_cfg}
    save_for_hf(
        predictor.net, str(folder), model_config=model_config, model_args=model_args, safe_serialization=True
    )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # timm also writes these at the top level, and transformers would pass both values.
    for name in ("num_classes", "global_pool"):
        config.get("model_args", {}).pop(name, None)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    results = _results(file)
    plots = (
        [file.parent / name for name in PLOTS if (file.parent / name).is_file()] if file and results else []
    )
    for plot in plots:
        shutil.copy(plot, folder)
    # safetensors writes files that only their owner can read.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")
    card = model_card(predictor, title, opened, results, [plot.name for plot in plots])
    (folder / "README.md").write_text(card, encoding="utf-8")


def _upload(folder: Path, repository: str) -> None:
    from huggingface_hub import HfApi

    try:
        api = HfApi(library_name="crossformer-vision", library_version=__version__)
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Add model")
    except Exception as error:  # connection or account errors
        raise UserError(
            f"hf:{repository}: {error_line(error)}. Log in with `hf auth login`, or share to a folder"
        ) from None


def model_card(predictor: Predictor, title: str, opened: str, results: JsonObject, plots: list[str]) -> str:
    """README of a shared model: Markdown with the metadata of Hugging Face.

    Args:
        predictor: Predictor of the shared model.
        title: Title of the card.
        opened: Name for ``timm.create_model``, such as ``hf-hub:OWNER/NAME``.
        results: Metrics of the run.
        plots: File names of plots.
    """
    name, classes = str(predictor.info.options["backbone"]), predictor.classes
    size = predictor.info.image["input_size"]
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
    images = "".join(f"\n![{p.removesuffix('.png').replace('_', ' ')}]({p})\n" for p in plots)
    needs_import = timm.model_entrypoint(name.split(".")[0]).__module__.startswith("crossformer_vision")
    line = "import crossformer_vision  # registers the model; pip install crossformer-vision\n"
    import_line = line if needs_import else ""
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
{images}
## Use

```python
import timm
{import_line}
net = timm.create_model("{opened}", pretrained=True).eval()
```

```python
from transformers import pipeline
{import_line}
print(pipeline("image-classification", model="{opened.partition(":")[2]}")("photo.jpg"))
```

Saved with timm {timm.__version__}. Whoever shares these weights chooses their licence.
{_citation(name)}"""


def _citation(model: str) -> str:
    """Section with the paper of a model; empty for models of other papers."""
    if model.startswith("crossformer_pp"):
        return f"\n## Citation\n\n```bibtex\n{CROSSFORMER_PP}\n```\n"
    return f"\n## Citation\n\n```bibtex\n{CROSSFORMER}\n```\n" if model.startswith("crossformer") else ""
