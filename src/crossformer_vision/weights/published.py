"""The published weights: where the authors put them, how they come here, which model each belongs to."""

import html.parser
import logging
import shutil
import socket
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import timm
import torch
from filelock import BaseFileLock, FileLock, SoftFileLock
from torch import Tensor, nn

from crossformer_vision.errors import UserError
from crossformer_vision.models import find_model, variants
from crossformer_vision.weights.checkpoints import PREFIXES, load_checkpoint, read_checkpoint, weights_of

log = logging.getLogger("crossformer_vision")


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
        _download(f"{url}?{query}", path, name)
    except UserError as error:
        raise UserError(f"{error}; or {published.by_hand(path)}") from None
    return path


def at_hand(model: str) -> bool:
    """Whether weights of a timm model are here or come from a host that answers; says so where not.

    Asks no longer than some seconds.
    """
    cfg = find_model(model)
    name = model.split(".")[0]
    try:
        if not cfg.has_weights:
            raise UserError("there are none")
        if cfg.file:
            return True
        if cfg.url == variants.PUBLISHED_PAGE:
            if not cached_path(name).exists():
                if PUBLISHED[name].drive_id:
                    _ask(DRIVE)
                fetch_published(name)
        elif cfg.hf_hub_id:
            from huggingface_hub import constants, try_to_load_from_cache

            files = ("model.safetensors", "pytorch_model.bin")
            if not any(isinstance(try_to_load_from_cache(cfg.hf_hub_id, file), str) for file in files):
                _ask(constants.ENDPOINT)
        elif not (Path(torch.hub.get_dir()) / "checkpoints" / Path(str(cfg.url)).name).exists():
            _ask(str(cfg.url))
    except UserError as error:
        log.warning("published weights of %s are not at hand: %s", model, str(error).split("; ")[0])
        return False
    return True


def _ask(url: str) -> None:
    """Whether a host answers within some seconds; a proxy is asked in its place."""
    asked = urllib.request.getproxies().get("https", url)
    address = urllib.parse.urlsplit(asked if "://" in asked else f"//{asked}")
    host, port = address.hostname or "", address.port or 443
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError as error:
        raise UserError(f"no connection to {host} ({error})") from None


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


def _download(url: str, path: Path, name: str) -> None:
    """Bring `url` to `path`, by one process at a time: others that want it wait, and find it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(f"{path}.lock"):
        if not path.exists():
            _fetch(url, path, name)


@contextmanager
def _lock(path: str) -> Iterator[None]:
    """A lock between processes; by the existence of a file where the disk has no locks."""
    lock: BaseFileLock = FileLock(path)
    try:
        lock.acquire()
    except (NotImplementedError, OSError):
        lock = SoftFileLock(path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fetch(url: str, path: Path, name: str) -> None:
    """Bring `url` to `path`, resumed from an earlier part, and under its name only when it fits the model."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

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
        whole = (error.headers.get("Content-Range") or "").rpartition("/")[2]
        if error.code != 416 or whole != str(offset):
            if error.code == 416:  # the part is longer than the file
                part.unlink()
            raise UserError(f"{url}: HTTP {error.code} {error.reason}; try again") from None
        total = offset  # all of it came before, but was not checked
    except (OSError, HTTPException) as error:
        raise UserError(f"{url}: {error}; try again, the download goes on where it stopped") from None
    size = part.stat().st_size
    if total is not None and size < total:
        raise UserError(
            f"{url}: truncated, {size} of {total} bytes came; try again, it goes on where it stopped"
        )
    try:
        _check_fits(name, part)
    except UserError as error:
        part.unlink()
        raise UserError(f"{url}: not the weights of {name}, and removed ({error}); try again") from None
    part.replace(path)


def _check_fits(name: str, path: Path) -> None:
    """Check that a file holds the weights of a published model.

    Raises:
        UserError: If it is no checkpoint, or another model's.
    """
    content = read_checkpoint(path)
    head, _, variant = name.rpartition("_crossformer_")
    model = f"crossformer_{variant}" if head else name
    net: nn.Module
    if not head:
        net = timm.create_model(model)
    else:
        from crossformer_vision.models.dense.detectors import create_detector
        from crossformer_vision.models.dense.segmenters import create_segmenter

        create: Any = create_detector if head in ("retinanet", "mask_rcnn") else create_segmenter
        net = create(head, model, backbone_args=variants.published_groups(model, head))
    load_checkpoint(net, content, adapt_classifier=False)


def _read_weights(model: str, file: str | None) -> dict[str, Tensor]:
    state = weights_of(read_checkpoint(file or fetch_published(model)))
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


variants.read_weights = _read_weights
