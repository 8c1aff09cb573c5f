"""One step of a benchmark: which network, image size, engine and dtype."""

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from crossformer_vision.errors import UserError
from crossformer_vision.inference.exported import OnnxRuntime, OpenVinoRuntime
from crossformer_vision.models import find_model, img_size_kwargs
from crossformer_vision.models.dense.backbones import create_backbone, extract_feature_maps
from crossformer_vision.models.freezing import freeze_position_bias
from crossformer_vision.tools import info
from crossformer_vision.tools.info import DETECTORS
from crossformer_vision.types import Kwargs

SEGMENTERS = ("semantic_fpn", "upernet")
ENGINES: dict[str, Kwargs | None] = {  # arguments of torch.compile
    "eager": None,
    "compiled": {},
    # Dynamo distinguishes cached graphs by these options, so freezing must be one of them.
    "frozen": {"options": {"freezing": True}},
    "autotuned": {"options": {"freezing": True, "max_autotune": True}},
    "reduce-overhead": {"mode": "reduce-overhead"},
    "max-autotune": {"mode": "max-autotune"},
}
FROZEN = ("frozen", "autotuned")  # engines with weights and position biases as constants
DTYPES = {  # dtype of weights and images, dtype of autocast
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "float16": (torch.float16, None),
    "amp-bfloat16": (torch.float32, torch.bfloat16),
    "amp-float16": (torch.float32, torch.float16),
}


@dataclass(frozen=True)
class Row:
    """One row of a benchmark.

    Attributes:
        model: A timm model, also with a prefix ``features:``, ``retinanet:``, ``mask_rcnn:``,
            ``semantic_fpn:`` or ``upernet:``, and with arguments: ``crossformer_small,lda_span=region``. Or
            an exported file, ``.onnx`` or ``.xml``.
        size: Height and width of the images.
        step: ``inference``, or ``training`` (forward and backward pass, AdamW).
        engine: A key of ``ENGINES``.
        dtype: A key of ``DTYPES``.
        batch: Images per batch.
    """

    model: str
    size: tuple[int, int] = (224, 224)
    step: str = "inference"
    engine: str = "eager"
    dtype: str = "float32"
    batch: int = 8

    @property
    def mode(self) -> tuple[object, ...]:
        """All fields except the model."""
        return self.size, self.step, self.engine, self.dtype, self.batch

    @property
    def is_training(self) -> bool:
        """Whether a training step is timed."""
        return self.step == "training"

    @property
    def is_exported(self) -> bool:
        """Whether the model is an exported file."""
        return Path(self.model).suffix in (".onnx", ".xml")

    def __str__(self) -> str:
        height, width = self.size
        return " ".join(
            [self.model, f"{height}x{width}", self.step, self.engine, self.dtype, str(self.batch)]
        )


def parse_spec(spec: str) -> tuple[str, str, Kwargs]:
    """Split ``Row.model`` into head, timm model and arguments.

    >>> parse_spec("features:crossformer_small,lda_span=region,group_size=(14,14,7,7)")
    ('features', 'crossformer_small', {'lda_span': 'region', 'group_size': (14, 14, 7, 7)})

    Args:
        spec: Value of ``Row.model``.

    Raises:
        UserError: If the head or model is unknown.
    """
    name, *keywords = re.split(r",(?=\s*\w+=)", spec)
    head, colon, model = name.rpartition(":")
    known = ("features", *DETECTORS, *SEGMENTERS)
    if colon and head not in known:
        raise UserError(
            f"'{spec}': unknown head '{head}'. Choose from {', '.join(known)}, as in features:{model}"
        )
    find_model(model)
    values: Kwargs = {}
    for keyword in keywords:
        key, _, value = keyword.partition("=")
        try:
            values[key.strip()] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            values[key.strip()] = value
    return head, model, values


def parse_size(text: str) -> tuple[int, int]:
    """Height and width from ``"224"`` or ``"800x1280"``.

    Args:
        text: Value of ``--size``.

    Raises:
        UserError: If it is neither.
    """
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise UserError(f"size '{text}': must be a number of pixels, or HEIGHTxWIDTH such as 800x1280")
    return int(sides[0]), int(sides[-1])


class Features(nn.Module):
    """Feature maps of a backbone.

    Args:
        model: timm model.
        keywords: Arguments of the model.
    """

    def __init__(self, model: str, keywords: Kwargs) -> None:
        super().__init__()
        self.body = create_backbone(model, **keywords)

    @override
    def forward(self, x: Tensor) -> list[Tensor]:
        return extract_feature_maps(self.body, x)


def create_network(row: Row) -> nn.Module:
    """Create the network of a row in float32, with reproducible random weights."""
    head, model, keywords = parse_spec(row.model)
    torch.manual_seed(0)
    if head == "features":
        return Features(model, keywords)
    short, long = sorted(row.size)
    if head in DETECTORS:
        return info.create_network(model, head, keywords, min_size=short, max_size=long)
    sized = img_size_kwargs(model, short) if not head and short == long else {}
    return info.create_network(model, head, {**sized, **keywords})


def load_exported(row: Row) -> nn.Module:
    """Load an exported file.

    Args:
        row: Row of the benchmark.

    Raises:
        ValueError: If the row asks for training, compilation or another dtype.
    """
    if (row.step, row.engine, row.dtype) != ("inference", "eager", "float32"):
        raise ValueError("exported files support only --step inference, --engine eager, --dtype float32")
    path = Path(row.model)
    return OnnxRuntime(path) if path.suffix == ".onnx" else OpenVinoRuntime(path)


class Step:
    """A callable that runs one step of a row on random images.

    Args:
        row: Row of the benchmark.
        device: Device of the network.

    Raises:
        ValueError: If a frozen network would be trained.
    """

    def __init__(self, row: Row, device: torch.device) -> None:
        if row.is_training and row.engine in FROZEN:
            raise ValueError(f"--engine {row.engine} supports only --step inference")
        self.row, self.device = row, device
        weights, self.autocast = DTYPES[row.dtype]
        self.net = load_exported(row) if row.is_exported else create_network(row)
        self.net = self.net.to(device, weights).train(row.is_training)
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(row.batch, 3, *row.size, generator=generator).to(device, weights)
        self.is_detector = not row.is_exported and parse_spec(row.model)[0] in DETECTORS
        if self.is_detector:
            self.images = self.images.sigmoid()
            height, width = row.size
            boxes = torch.tensor([[0.1, 0.1, 0.5, 0.5], [0.3, 0.3, 0.9, 0.9]], device=device)
            boxes = boxes * torch.tensor([width, height, width, height], device=device)
            masks = torch.ones(2, height, width, dtype=torch.uint8, device=device)
            self.target = {"boxes": boxes, "labels": torch.tensor([1, 2], device=device), "masks": masks}
        if row.is_training:
            self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-5, fused=True)
        if row.engine in FROZEN and any(hasattr(module, "frozen") for module in self.net.modules()):
            freeze_position_bias(self.net, *row.size)
        keywords = ENGINES[row.engine]
        self.run: Callable[..., Any] = self.net if keywords is None else torch.compile(self.net, **keywords)

    def __call__(self) -> object:
        """Run the step; returns the output of inference."""
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            if not self.row.is_training:
                with torch.no_grad():
                    return self.run(list(self.images) if self.is_detector else self.images)
            loss = self.compute_loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return None

    def compute_loss(self) -> Tensor:
        """Loss of a detector, or cross-entropy of logits or feature maps with class 0."""
        if self.is_detector:
            return sum(self.run(list(self.images), [self.target] * len(self.images)).values())
        out = self.run(self.images)
        outs = [out] if isinstance(out, Tensor) else list(out.values() if isinstance(out, dict) else out)
        outs = [o for o in outs if o is not None]
        return torch.stack([F.cross_entropy(o, torch.zeros_like(o[:, 0]).long()) for o in outs]).sum()
