"""Base class of dense models, and the mapping of published keys to their keys."""

import re
from typing import Any, ClassVar

from timm.models import FeatureListNet
from torch import Tensor, nn

from crossformer_vision.models import pvt, variants
from crossformer_vision.models.dense.backbones import SimpleFeaturePyramid


class DenseModel(nn.Module):
    """Base class of detectors and segmenters: describes their parameters for `load_checkpoint`.

    Attributes:
        body_prefix: Prefix of the timm model's keys.
        heads: Prefixes of all other keys. A checkpoint of a backbone lacks them.
        class_layers: Prefixes of layers whose shape depends on the number of classes.
        published_names: OpenMMLab's keys of the heads, as pairs of a pattern and its replacement.
    """

    body_prefix: str
    heads: ClassVar[tuple[str, ...]]
    class_layers: ClassVar[tuple[str, ...]]
    published_names: ClassVar[list[tuple[str, str]]]

    @property
    def body(self) -> Any:
        """The ``features_only`` model."""
        return self.get_submodule(self.body_prefix.removesuffix("model.").removesuffix("."))

    def no_weight_decay(self) -> set[str]:
        """Names of the timm model's parameters without weight decay, such as position tables."""
        body = getattr(self.body, "model", self.body)
        others = getattr(body, "no_decay_names", ())
        names = body.no_weight_decay() if hasattr(body, "no_weight_decay") else others
        return {self.body_prefix + name for name in names}

    def rename_published(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Map the keys of a published dense model, or of a backbone alone, to this model's keys.

        This model's own keys are returned unchanged. Keys that match no pattern belong to the backbone.
        """
        own = self.state_dict().keys()
        renamed, others = {}, {}
        for name, value in state.items():
            new_name = name
            if name not in own:
                for pattern, replacement in self.published_names:
                    new_name = re.sub(pattern, replacement, new_name)
                if new_name == name:
                    others[name.removeprefix("backbone.")] = value
                    continue
            renamed[new_name] = value
        body = remap_keys(self.body, others)
        return {**renamed, **{self.body_prefix + name: value for name, value in body.items()}}


def remap_keys(model: object, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Map the keys of a classifier to those of a ``features_only`` model.

    Published keys become this library's keys. timm's ``FeatureListNet`` calls ``layers.0`` ``layers_0``.
    """
    if isinstance(model, SimpleFeaturePyramid):
        model = model.body
    if isinstance(model, FeatureListNet):
        own = model.state_dict().keys()
        flat = {name: re.sub(r"^(\w+)\.(\d+)\.", r"\1_\2.", name) for name in state}
        return {flat[name] if flat[name] in own else name: value for name, value in state.items()}
    model = getattr(model, "model", model)
    if isinstance(model, pvt.PyramidVisionTransformer):
        return pvt.checkpoint_filter_fn(state)
    return variants.checkpoint_filter_fn(state)


def find_body_prefix(prefix: str, body: object) -> str:
    """Prefix of a timm model's keys in a dense model that holds it under ``prefix``."""
    if isinstance(body, SimpleFeaturePyramid):
        return find_body_prefix(f"{prefix}body.", body.body)
    return f"{prefix}model." if hasattr(body, "model") else prefix
