"""Weights on disk -> networks: published and own files, read safely, and the published ones fetched."""

import _codecs
import html.parser
import logging
import os
import pickle
import re
import shutil
import urllib.error
import urllib.parse
import urllib.request
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from crossformer_vision.errors import UserError
from crossformer_vision.models import variants
from crossformer_vision.models.backbones import DenseModel

log = logging.getLogger("crossformer_vision")

# ------------------------------------------------------------------------------------------------------------
# Reading
# ------------------------------------------------------------------------------------------------------------


_numpy_scalar: Any = np.float64(0).__reduce__()[0]
# What may stand in a file beside tensors and plain values. A published classification file holds its training
# configuration, a yacs node: for us a dictionary. Best scores are often NumPy's scalars, under the name of
# their module in NumPy 1 or 2; that function makes a number from a type and bytes.
PLAIN: list[Any] = [
    (OrderedDict, "yacs.config.CfgNode"),
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
    (_codecs.encode, "_codecs.encode"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"),
]


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a `.safetensors` or a `torch.save` file holds, read without running any code in it.

    Raises:
        UserError: no such file, truncated, not a checkpoint, or a pickle of anything but tensors and plain
            values.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file")
    with path.open("rb") as file:
        start = file.read(64).lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        raise UserError(f"{path}: is a web page, not a checkpoint; download the file again")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals(PLAIN):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" ({found[1]})" if found else ""
        raise UserError(
            f"{path}: not loaded: it holds Python objects beside tensors{what}, and they could run code"
        ) from error
    except Exception as error:  # of many kinds: whatever a damaged file makes a reader stumble over
        raise UserError(f"{path}: truncated or not a checkpoint; copy or download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a state dict")
    return content


def _state_dict(content: dict[str, Any]) -> dict[str, Tensor]:
    """The weights in a checkpoint: under `state_dict` or `model`, or the checkpoint itself."""
    for key in ("state_dict", "model"):
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def span_of_a_run(checkpoint: dict[str, Any], source: str) -> dict[str, str]:
    """The backbone's `lda_span` where a run's checkpoint needs one that its options do not name.

    Version 0.1 knew LDA in regions alone, and its checkpoints do not say so.
    """
    options = checkpoint.get("hyper_parameters", {})
    named = "lda_span" in checkpoint or "lda_span" in (options.get("model_args") or {})
    if named or not str(options.get("model")).startswith("crossformer"):
        return {}
    log.warning('%s: of version 0.1; built as it was trained, with lda_span="region"', source)
    return {"lda_span": "region"}


# ------------------------------------------------------------------------------------------------------------
# Loading
# ------------------------------------------------------------------------------------------------------------

PREFIXES = (
    "module.",
    "_orig_mod.",
    "net.",
    "backbone.",
)  # DataParallel, torch.compile, our tasks, dense models


@dataclass
class LoadReport:
    """What `load_checkpoint` did, as names of the model's or the file's weights."""

    loaded: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)  # classifier of another class count
    missing: list[str] = field(default_factory=list)  # kept as they were in the model
    unused: list[str] = field(default_factory=list)  # only in the file
    buffers: list[str] = field(default_factory=list)  # indices in the published files, no weights

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} weights loaded"]
        for what, names in (("of another shape", self.dropped), ("not in the file", self.missing)):
            if names:
                parts.append(f"{len(names)} {what}, left as they were ({_some(names)})")
        if self.unused:
            parts.append(f"{len(self.unused)} in the file unused ({_some(self.unused)})")
        if self.buffers:
            parts.append(f"{len(self.buffers)} index buffers in the file, which are no weights")
        return "; ".join(parts)


def load_checkpoint(
    model: nn.Module, checkpoint: str | os.PathLike[str] | dict[str, Any], adapt_classifier: bool = True
) -> LoadReport:
    """Load published or own weights into a network.

    Takes files of this library and published ones (`{"model": …}`, `{"state_dict": …}` or bare; names with
    `module.` or `backbone.` in front), `.pth`, `.ckpt` or `.safetensors`. First convolutions of another
    channel count are adapted as timm does. The head and the final norm may be absent on either side; anything
    else must match. A detector takes files of whole detectors, and those of backbones alone, whose neck and
    heads it keeps as they were.

    Args:
        model: a classifier, a `features_only` backbone, or a detector.
        checkpoint: a path, or a state dict or checkpoint in memory.
        adapt_classifier: leave a classifier of another class count as it is, with a notice, instead of
            refusing.

    Returns:
        The names loaded, dropped, missing and unused; also logged.

    Raises:
        UserError: a file that cannot be read, or that belongs to another model.
    """
    source = "state dict" if isinstance(checkpoint, dict) else str(checkpoint)
    content = checkpoint if isinstance(checkpoint, dict) else read_checkpoint(checkpoint)
    target = model.state_dict()
    cfg = getattr(model, "pretrained_cfg", None) or {}
    if isinstance(model, DenseModel):
        inner, heads, class_layers, rename = (
            model.body_name,
            model.heads,
            model.class_layers,
            model.rename_published,
        )
    else:
        inner = "model." if all(name.startswith("model.") for name in target) else ""  # features_only
        heads = class_layers = (inner + str(cfg.get("classifier", "head")),)

        def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
            known = {name: x for name, x in state.items() if inner + name in target}
            others = {name: x for name, x in state.items() if name not in known}
            return {inner + name: x for name, x in {**known, **variants.checkpoint_filter_fn(others)}.items()}

    weights = _state_dict(content)
    report = LoadReport(buffers=[name for name in weights if variants.PUBLISHED_BUFFERS.search(name)])
    state = _best_names({k: v for k, v in weights.items() if k not in report.buffers}, set(target), rename)

    convs = tuple(f"{inner}{name}.weight" for name in _as_tuple(cfg.get("first_conv")))
    optional = (*heads, inner + "norm.", inner + "head.")
    fitting: dict[str, Tensor] = {}
    for name, value in state.items():
        if name not in target:
            report.unused.append(name)
            continue
        if name in convs and value.shape != target[name].shape and value.shape[2:] == target[name].shape[2:]:
            value = adapt_input_conv(target[name].shape[1], value)
        if value.shape == target[name].shape:
            fitting[name] = value
        elif name.startswith(class_layers):
            report.dropped.append(name)
        else:
            raise UserError(
                f"{source}: belongs to another model: {name} is {list(value.shape)} there, "
                f"{list(target[name].shape)} here"
            )
    report.loaded = sorted(fitting)
    report.missing = sorted(set(target) - set(fitting) - set(report.dropped))
    if not any(not name.startswith(optional) for name in fitting):
        raise UserError(
            f"{source}: none of its weights fits this model ({_some(state) or 'it holds no tensors'})"
        )
    partial = tuple(part for part in heads if any(name.startswith(part) for name in fitting))
    for names, what in ((report.missing, "lacks"), (report.unused, "has, and this model has not,")):
        wrong = [
            name
            for name in names
            if (not name.startswith(optional) and _is_backbone(name, inner, target))
            or name.startswith(partial)
        ]
        if wrong:
            raise UserError(
                f"{source}: belongs to another model: it {what} {len(wrong)} weights ({_some(wrong)})"
            )
    if not adapt_classifier and report.dropped:
        name = report.dropped[0]
        if isinstance(model, DenseModel):
            there, here = list(state[name].shape), list(target[name].shape)
            raise UserError(f"{source}: is for other classes: {name} is {there} there, {here} here")
        raise UserError(f"{source}: has {len(state[name])} classes, {len(target[name])} are wanted")
    if not adapt_classifier and report.missing:
        raise UserError(f"{source}: lacks {len(report.missing)} weights ({_some(report.missing)})")
    model.load_state_dict(fitting, strict=False)
    log.log(logging.WARNING if report.dropped or report.missing else logging.INFO, "%s: %s", source, report)
    return report


def _best_names(
    state: dict[str, Tensor], wanted: set[str], rename: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """`state` under those names, stripped of prefixes and renamed, that match `wanted` most."""
    best: dict[str, Tensor] = {}
    tried = {name: name for name in state}
    while True:
        renamed = rename({short: state[name] for name, short in tried.items()})
        if len(wanted & renamed.keys()) > len(wanted & best.keys()) or not best:
            best = renamed
        prefix = next((p for p in PREFIXES if any(short.startswith(p) for short in tried.values())), None)
        if prefix is None:
            return best
        tried = {name: s.removeprefix(prefix) for name, s in tried.items() if s.startswith(prefix)}


def _is_backbone(name: str, inner: str, target: Iterable[str]) -> bool:
    """Whether a weight sits in a part that the model has: a detector's neck, say, does not."""
    return name.removeprefix(inner).split(".")[0] in {t.removeprefix(inner).split(".")[0] for t in target}


def _as_tuple(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


# ------------------------------------------------------------------------------------------------------------
# Published weights
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """Where the authors put a file.

    Attributes:
        name: of the model that it holds.
        drive_id: on Google Drive; "" for not there.
        baidu_id: on Baidu, which only a browser can fetch from,
        baidu_code: and the code that it asks for.
    """

    name: str
    drive_id: str
    baidu_id: str
    baidu_code: str

    @property
    def filename(self) -> str:
        """Here: mask-rcnn-s.pth of mask_rcnn_crossformer_small."""
        head, variant = self.name.rsplit("_", 1)
        return f"{head.removesuffix('_crossformer').replace('_', '-')}-{variant[0]}.pth"

    def by_hand(self, path: Path) -> str:
        """How a person gets it."""
        page = f"https://pan.baidu.com/s/{self.baidu_id} (code {self.baidu_code})"
        return f"get it in a browser from {page} and save it as {path}"


PUBLISHED = {
    name: Published(name, *places)
    for name, *places in (
        # name, id on Google Drive, id and code on Baidu
        ("crossformer_tiny", "1YSkU9enn-ITyrbxLH13zNcBYvWSEidfq", "1M45YXZgVvp6Ew9DO8UhdlA", "nkju"),
        ("crossformer_small", "1RAkigsgr33va0RZ85S2Shs2BhXYcS6U8", "1Xf4MXfb_soCnJFBeNDmoQQ", "fgqj"),
        ("crossformer_base", "1bK8biVCi17nz_nkt7rBfio_kywUpllSU", "1f5dH__UGDXb-HoOPHT5p0A", "7md9"),
        ("crossformer_large", "1zRWByVW_KIZ87NgaBkDIm60DAsGJErdG", "1YJLeHy_cxLBrZLklQBCA_A", "cc89"),
        (
            "retinanet_crossformer_small",
            "1OEEottS4fYGVZcPZG6WuBlKMK0tZLPZW",
            "1Ckrk3Z1uA65ve43_hL3ZFg",
            "ift3",
        ),
        (
            "retinanet_crossformer_base",
            "1TOuLLf_S4Ixo6COvaHQAocACR4NKKnGz",
            "1ESE7i1JpVjxZmB5ZTgXA5w",
            "hsd5",
        ),
        (
            "mask_rcnn_crossformer_small",
            "1qgO3-wnsJQw9Nj304AOj-TjVyadPPtvf",
            "1ytk95p-rjqI3UNEHaYqKKA",
            "4omu",
        ),
        (
            "mask_rcnn_crossformer_base",
            "1urkCa8Inss9CL1G1OgM4tWR5PSf6Ofn4",
            "1N_EGRLBuIXgQh6J0Oyh00g",
            "kjf4",
        ),
        (
            "semantic_fpn_crossformer_small",
            "1I-zpGG5rvkTtrTUnOF8Fx11yeb6pXGYi",
            "14K3gJS3UcnEZNwhTWHdsFg",
            "sn5h",
        ),
        (
            "semantic_fpn_crossformer_base",
            "1EjAnRc8Sau0un1ymqDVhFebHPeBIjukK",
            "1eCYENrLZsxjAQKW3eAQeUA",
            "joi5",
        ),
        (
            "semantic_fpn_crossformer_large",
            "12WS9lX9yR5skxdt3N2HE3b2EaDSMwUMY",
            "150b8-v1StaMHACIaM0hZVA",
            "6v5d",
        ),
        ("upernet_crossformer_small", "1VKu4D6oxYdO1VVILLMhOQy8oCxKGH5gx", "1MLcAOiJ22AFKUa6_t1psOQ", "wesb"),
        ("upernet_crossformer_base", "1B8VTNeidrzlfsOkQUKgmX4m_UfCIm58i", "1311pBQluwJGiVdWY1WE16Q", "j061"),
        ("upernet_crossformer_large", "1I9ph5MeCwlTF2PNCkIYMFXYsdywp9nU1", "1Yu8QB42hcbKNGQ46Wx_NaQ", "17ks"),
        ("crossformer_pp_small", "", "1smc_kRoogd0Ig5vfqwuGTA", "crsf"),
        ("crossformer_pp_base", "", "13XVP0ebtNcyRMmkl11ALYg", "crsf"),
        ("crossformer_pp_large", "", "1xtPh-ndcOxRM7fPYYxIIRg", "crsf"),
        ("crossformer_pp_huge", "", "1xtPh-ndcOxRM7fPYYxIIRg", "crsf"),
    )
}

DRIVE = "https://drive.usercontent.google.com/download"


def cached_path(name: str) -> Path:
    """Where the published file of a model is kept: torch's hub cache."""
    return Path(torch.hub.get_dir()) / "checkpoints" / PUBLISHED[name].filename


def fetch_published(name: str, url: str = DRIVE) -> Path:
    """The published file of a model, from the cache or else downloaded into it.

    Args:
        name: one of `PUBLISHED`.
        url: Google Drive's download address, or a mirror that takes the same `id` parameter.

    Raises:
        UserError: unknown name, a file that only a person can fetch (the message says where from and where
            to), no connection, a page instead of the file, a truncated body. What came so far is kept and
            resumed from.
    """
    if name not in PUBLISHED:
        raise UserError(f"no published weights of '{name}'; there are: {', '.join(PUBLISHED)}")
    published, path = PUBLISHED[name], cached_path(name)
    if path.exists():
        return path
    if not published.drive_id:
        raise UserError(
            f"the published weights of {name} cannot be fetched by a program: {published.by_hand(path)}"
        )
    query = urllib.parse.urlencode({"id": published.drive_id, "export": "download"})
    try:
        _download(f"{url}?{query}", path)
    except UserError as error:
        raise UserError(f"{error}; or {published.by_hand(path)}") from error
    return path


def how_to_build(name: str, path: Path) -> str:
    """The Python that makes a network of a published file; a dense one does not say its groups itself."""
    head, _, variant = name.rpartition("_crossformer_")
    model = f"crossformer_{variant}" if head else name
    if not head:
        create = f'timm.create_model("{model}")'
    else:
        kind = "detector" if head in ("retinanet", "mask_rcnn") else "segmenter"
        groups = variants.published_groups(model, head)
        create = f'crossformer_vision.create_{kind}("{head}", "{model}", backbone_args={groups})'
    return f'model = {create}\ncrossformer_vision.load_checkpoint(model, "{path}")'


class _Form(html.parser.HTMLParser):
    """The form of Google Drive's page "too large to scan for viruses": where to ask again, and with what."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.action = ""
        self.fields: dict[str, str] = {}
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag == "form":
            self.action = values.get("action", "")
        elif tag == "input" and "name" in values:
            self.fields[values["name"]] = values.get("value", "")


def _open(url: str, offset: int) -> Any:
    request = urllib.request.Request(url, headers={"Range": f"bytes={offset}-"} if offset else {})
    response = urllib.request.urlopen(request, timeout=60)
    if "text/html" not in response.headers.get("Content-Type", ""):
        return response
    form = _Form(response.read(1 << 20).decode("utf-8", "replace"))
    if "confirm" not in form.fields:
        raise UserError(
            f"{url}: answered with a web page, not the file (its quota may be used up); try again later"
        )
    action = urllib.parse.urljoin(url, form.action)
    request = urllib.request.Request(
        f"{action}?{urllib.parse.urlencode(form.fields)}", headers=dict(request.headers)
    )
    response = urllib.request.urlopen(request, timeout=60)
    if "text/html" in response.headers.get("Content-Type", ""):
        raise UserError(
            f"{url}: answered with a web page, not the file (its quota may be used up); try again later"
        )
    return response


def _download(url: str, path: Path) -> None:
    """Bring `url` to `path`, resumed from an earlier part, and under its name only when readable."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    offset = part.stat().st_size if part.exists() else 0
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    try:
        with _open(url, offset) as response:
            if response.status != 206:
                offset = 0
            length = response.headers.get("Content-Length")
            total = offset + int(length) if length else None
            if total is not None and shutil.disk_usage(path.parent).free < total - offset:
                raise UserError(f"{path.parent}: not enough disk space for {path.name} ({total >> 20} MB)")
            with (
                part.open("ab" if offset else "wb") as file,
                Progress(*columns, TimeRemainingColumn()) as progress,
            ):
                bar = progress.add_task(path.name, total=total, completed=offset)
                while block := response.read(1 << 18):
                    file.write(block)
                    progress.advance(bar, len(block))
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the part is as long as the file, or longer: it cannot be continued
            part.unlink()
        raise UserError(f"{url}: HTTP {error.code} {error.reason}; try again") from error
    except (OSError, HTTPException) as error:
        raise UserError(f"{url}: {error}; try again, the download goes on where it stopped") from error
    size = part.stat().st_size
    if total is not None and size < total:
        raise UserError(
            f"{url}: truncated, {size} of {total} bytes came; try again, it goes on where it stopped"
        )
    try:
        read_checkpoint(part)
    except UserError as error:
        part.unlink()
        raise UserError(f"{url}: what came is not a checkpoint, and was removed; try again") from error
    part.replace(path)


def _read_weights(model: str, file: str | None) -> dict[str, Tensor]:
    state = _state_dict(read_checkpoint(file or fetch_published(model)))
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


variants.read_weights = _read_weights
