"""Published weights: download addresses and matching models."""

import logging
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from crossformer_vision.errors import UserError
from crossformer_vision.models import find_model, variants
from crossformer_vision.weights.download import check_connection, download
from crossformer_vision.weights.loading import PREFIXES, load_checkpoint
from crossformer_vision.weights.reading import read_checkpoint, select_weights

log = logging.getLogger("crossformer_vision")

DRIVE = "https://drive.usercontent.google.com/download"
DETECTORS = ("retinanet", "mask_rcnn")


@dataclass(frozen=True)
class Published:
    """A file that the authors have published.

    Attributes:
        name: Name of the model.
        drive_id: Id on Google Drive; empty if it is not there.
        baidu_id: Id on Baidu, which only a browser can download from.
        baidu_code: Code that Baidu asks for.
    """

    name: str
    drive_id: str
    baidu_id: str
    baidu_code: str

    @property
    def filename(self) -> str:
        """Name of the file in the cache, such as ``mask-rcnn-s.pth`` for ``mask_rcnn_crossformer_small``."""
        head, variant = self.name.rsplit("_", 1)
        return f"{head.removesuffix('_crossformer').replace('_', '-')}-{variant[0]}.pth"

    def manual_download(self, path: Path) -> str:
        """How to download the file in a browser, for messages."""
        page = f"https://pan.baidu.com/s/{self.baidu_id} (code {self.baidu_code})"
        return f"get it in a browser from {page} and save it as {path}"


PUBLISHED = {
    name: Published(name, *ids)
    for name, *ids in (
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


def split_name(name: str) -> tuple[str, str | None]:
    """Backbone and head of a published model, ``None`` for the head of a classifier."""
    head, _, variant = name.rpartition("_crossformer_")
    return (f"crossformer_{variant}", head) if head else (name, None)


def cached_path(name: str) -> Path:
    """Where the published file of a model is saved: torch's hub cache."""
    return Path(torch.hub.get_dir()) / "checkpoints" / PUBLISHED[name].filename


def fetch_published(name: str, url: str = DRIVE) -> Path:
    """The published file of a model, from the cache or downloaded into it.

    Args:
        name: Name in ``PUBLISHED``.
        url: Google Drive's download address, or a mirror that takes the same ``id`` parameter.

    Raises:
        UserError: If the name is unknown, the file can only be downloaded in a browser, or the download
            fails. A partial download is resumed by the next call.
    """
    if name not in PUBLISHED:
        raise UserError(f"no published weights of '{name}'. Choose from {', '.join(PUBLISHED)}")
    published, path = PUBLISHED[name], cached_path(name)
    if path.exists():
        return path
    if not published.drive_id:
        raise UserError(
            f"the weights of {name} can only be downloaded by hand: {published.manual_download(path)}"
        )
    query = urllib.parse.urlencode({"id": published.drive_id, "export": "download"})
    try:
        download(f"{url}?{query}", path, lambda part: check_weights(name, part))
    except UserError as error:
        raise UserError(f"{error}; or {published.manual_download(path)}") from None
    return path


def check_weights(name: str, path: Path) -> None:
    """Check that a file has the weights of a published model.

    Raises:
        UserError: If it is no checkpoint, or belongs to another model.
    """
    model, head = split_name(name)
    try:
        load_checkpoint(_build(model, head), read_checkpoint(path), adapt_classifier=False)
    except UserError as error:
        raise UserError(f"not the weights of {name} ({error})") from None


def _build(model: str, head: str | None) -> nn.Module:
    from crossformer_vision.models.dense.detectors import create_detector
    from crossformer_vision.models.dense.segmenters import create_segmenter

    if head is None:
        return timm.create_model(model)
    groups = variants.published_groups(model, head)
    if head in DETECTORS:
        return create_detector(head, model, backbone_args=groups)  # type: ignore[arg-type]
    return create_segmenter(head, model, backbone_args=groups)  # type: ignore[arg-type]


def is_available(model: str) -> bool:
    """Whether published weights of a timm model are cached or can be downloaded.

    Logs a warning with the reason if not. Fails after a few seconds if the host is not reachable. Downloads
    CrossFormer's published files, since their availability is only known after the download.

    Args:
        model: timm name.
    """
    try:
        _check_available(model)
    except UserError as error:
        log.warning("published weights of %s are not available: %s", model, str(error).split("; ")[0])
        return False
    return True


def _check_available(model: str) -> None:
    cfg = find_model(model)
    name = model.split(".")[0]
    if not cfg.has_weights:
        raise UserError("there are none")
    if cfg.file:
        return
    if cfg.url == variants.PUBLISHED_PAGE:
        if not cached_path(name).exists():
            if PUBLISHED[name].drive_id:
                check_connection(DRIVE)
            fetch_published(name)
    elif cfg.hf_hub_id:
        from huggingface_hub import constants, try_to_load_from_cache

        files = ("model.safetensors", "pytorch_model.bin")
        if not any(isinstance(try_to_load_from_cache(cfg.hf_hub_id, file), str) for file in files):
            check_connection(constants.ENDPOINT)
    elif not (Path(torch.hub.get_dir()) / "checkpoints" / Path(str(cfg.url)).name).exists():
        check_connection(str(cfg.url))


def how_to_build(name: str, path: Path) -> str:
    """Python code that builds a published model and loads its file.

    Args:
        name: Name in ``PUBLISHED``.
        path: The file.
    """
    model, head = split_name(name)
    if head is None:
        create = f'timm.create_model("{model}")'
    else:
        kind = "detector" if head in DETECTORS else "segmenter"
        groups = variants.published_groups(model, head)  # the file does not contain them
        create = f'crossformer_vision.create_{kind}("{head}", "{model}", backbone_args={groups})'
    imports = "import timm\nimport crossformer_vision"
    return f'{imports}\n\nmodel = {create}\ncrossformer_vision.load_checkpoint(model, "{path}")'


def read_published_weights(model: str, file: str | None = None) -> dict[str, Tensor]:
    """State dict of a file, or of the published file of a model, without prefixes."""
    state = select_weights(read_checkpoint(file or fetch_published(model)))
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state
