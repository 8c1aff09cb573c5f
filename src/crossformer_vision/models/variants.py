"""Named models: sizes, timm configurations, and names of the published weights."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from torch import Tensor, nn

from crossformer_vision.models.crossformer import CrossFormer
from crossformer_vision.models.timm_interface import FeatureMaps
from crossformer_vision.types import Kwargs

# ------------------------------------------------------------------------------------------------------------
# Published names
# ------------------------------------------------------------------------------------------------------------

Renamings = list[tuple[str, str | Callable[[re.Match[str]], str]]]  # patterns and replacements, in order

PUBLISHED_NAMES: Renamings = [
    (r"^patch_embed\.projs\.", "stages.0.embed.convs."),
    (r"^patch_embed\.norm\.", "stages.0.embed.norm."),
    (r"^layers\.(\d+)\.downsample\.reductions\.", lambda m: f"stages.{int(m[1]) + 1}.embed.convs."),
    (r"^layers\.(\d+)\.downsample\.norm\.", lambda m: f"stages.{int(m[1]) + 1}.embed.norm."),
    (r"^layers\.", "stages."),
    (r"\.attn\.pos\.pos_proj\.", ".attn.position_bias.proj."),
    (r"\.attn\.pos\.pos(\d)\.", lambda m: f".attn.position_bias.layers.{int(m[1]) - 1}."),
    (r"\.ex_conv\.", ".acl.conv."),
    (r"\.ex_ln\.", ".acl.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]


# Buffers in the published T/S/B/L files: indices, and the position biases of the last forward pass.
PUBLISHED_BUFFERS = re.compile(r"(^|\.)attn\.(biases|relative_position_index)$")


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module | None = None) -> dict[str, Tensor]:
    """Rename the keys of a published state dict. Keys of this package are returned unchanged."""
    state_dict = state_dict.get("model", state_dict)  # type: ignore[assignment]
    renamed = {}
    for name, value in state_dict.items():
        if PUBLISHED_BUFFERS.search(name):
            continue
        for pattern, replacement in PUBLISHED_NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


# ------------------------------------------------------------------------------------------------------------
# timm's configurations
# ------------------------------------------------------------------------------------------------------------

# Page that lists the published files; weights.published has their addresses.
PUBLISHED_PAGE = "https://github.com/cheerss/CrossFormer"
BUNDLED = Path(__file__).parents[1] / "weights" / "bundled"


def model_cfg(**kwargs: Any) -> Kwargs:
    """Create timm's configuration of a model, with arguments that override the defaults."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "min_input_size": (3, 32, 32),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": tuple(f"stages.0.embed.convs.{i}" for i in range(4)),
        "classifier": "head.fc",
        "paper_ids": "arXiv:2108.00154",
        "license": "mit",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "crossformer_tiny.in1k": model_cfg(url=PUBLISHED_PAGE),
        "crossformer_small.in1k": model_cfg(url=PUBLISHED_PAGE),
        "crossformer_base.in1k": model_cfg(url=PUBLISHED_PAGE),
        "crossformer_large.in1k": model_cfg(url=PUBLISHED_PAGE),
        "crossformer_pp_small.in1k": model_cfg(url=PUBLISHED_PAGE, paper_ids="arXiv:2303.06908"),
        "crossformer_pp_base.in1k": model_cfg(url=PUBLISHED_PAGE, paper_ids="arXiv:2303.06908"),
        "crossformer_pp_large.in1k": model_cfg(url=PUBLISHED_PAGE, paper_ids="arXiv:2303.06908"),
        "crossformer_pp_huge.in1k": model_cfg(url=PUBLISHED_PAGE, paper_ids="arXiv:2303.06908"),
        "crossformer_nano.cifar10": model_cfg(
            file=str(BUNDLED / "crossformer_nano.cifar10.safetensors"),
            num_classes=10,
            input_size=(3, 64, 64),
            pool_size=(2, 2),
            crop_pct=1.0,
            first_conv=tuple(f"stages.0.embed.convs.{i}" for i in range(3)),
            license="apache-2.0",
        ),
    }
)


def _create_crossformer(variant: str, pretrained: bool = False, **kwargs: Any) -> CrossFormer:
    cfg = None
    if pretrained:
        from crossformer_vision.weights.published import read_published_weights

        overlay = kwargs.get("pretrained_cfg_overlay") or {}
        cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), overlay)
        is_timm_format = cfg.source in ("local-dir", "hf-hub")
        if not (cfg.state_dict or is_timm_format) and (cfg.file or cfg.url == PUBLISHED_PAGE):
            # timm refuses the published files because of Python objects beside the weights.
            state = read_published_weights(variant, cfg.file)
            kwargs["pretrained_cfg_overlay"] = {**overlay, "state_dict": state}
    model = build_model_with_cfg(
        CrossFormer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls=FeatureMaps),
        **kwargs,
    )
    if cfg is not None:  # otherwise the model would keep a second copy of its weights
        holders: Any = [m for m in model.modules() if hasattr(m, "pretrained_cfg")]
        for module in holders:
            module.pretrained_cfg = {**module.pretrained_cfg, "state_dict": cfg.state_dict}
            module.default_cfg = module.pretrained_cfg  # an alias in timm
    return model


# ------------------------------------------------------------------------------------------------------------
# The published dense models
# ------------------------------------------------------------------------------------------------------------

DENSE_G7 = dict(group_size=(7, 7, 7, 7), interval=(8, 4, 2, 1), lda_span="map")
DENSE_G14 = dict(group_size=(14, 14, 7, 7), interval=(16, 8, 2, 1), lda_span="map")


def published_groups(model: str, head: str | None) -> Kwargs:
    """Groups of the backbone in a published detector or segmenter, which its file does not contain.

    The 3x models of Mask R-CNN, for which no files exist, have ``DENSE_G14``.

    Args:
        model: Name of the backbone.
        head: Name of the detector or segmenter. ``None`` for a classifier.

    Returns:
        Arguments of the backbone.
    """
    if head is None:
        return {}
    return DENSE_G14 if head == "semantic_fpn" and model != "crossformer_pp_base" else DENSE_G7


# ------------------------------------------------------------------------------------------------------------
# The models
# ------------------------------------------------------------------------------------------------------------

PLUS_PLUS = dict(group_size=(4, 4, 14, 7), interval=(4, 2, 1, 1), lda_span="region", amplitude_cooling=3)


@register_model
def crossformer_tiny(pretrained: bool = False, **kwargs: Any) -> CrossFormer:
    """CrossFormer-T: 27.8 M parameters, 2.9 GMACs at 224 (table 1 of CrossFormer)."""
    args = dict(embed_dim=64, depths=(1, 1, 8, 6), num_heads=(2, 4, 8, 16))
    return _create_crossformer("crossformer_tiny", pretrained, **{**args, **kwargs})


@register_model
def crossformer_small(pretrained: bool = False, **kwargs: Any) -> CrossFormer:
    """CrossFormer-S: 30.7 M parameters, 4.9 GMACs at 224 (table 1 of CrossFormer)."""
    args = dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24))
    return _create_crossformer("crossformer_small", pretrained, **{**args, **kwargs})


@register_model
def crossformer_base(pretrained: bool = False, **kwargs: Any) -> CrossFormer:
    """CrossFormer-B: 52.0 M parameters, 9.2 GMACs at 224 (table 1 of CrossFormer)."""
    args = dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24))
    return _create_crossformer("crossformer_base", pretrained, **{**args, **kwargs})


@register_model
def crossformer_large(pretrained: bool = False, **kwargs: Any) -> CrossFormer:
    """CrossFormer-L: 92.0 M parameters, 16.1 GMACs at 224 (table 1 of CrossFormer)."""
    args = dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32))
    return _create_crossformer("crossformer_large", pretrained, **{**args, **kwargs})


@register_model
def crossformer_pp_small(pretrained: bool = False, **kwargs: Any) -> CrossFormer:
    """CrossFormer++-S: 23.3 M parameters, 4.4 GMACs at 224 (4.9 published), CrossFormer++."""
    args = dict(embed_dim=64, depths=(2, 2, 18, 2), num_heads=(2, 4, 8, 16), **PLUS_PLUS)
    return _create_crossformer("crossformer_pp_small", pretrained, **{**args, **kwargs})


@register_model
def crossformer_pp_base(pretrained: bool = False, **kwargs: Any) -> CrossFormer:
    """CrossFormer++-B: 52.0 M parameters, 9.6 GMACs at 224 (9.5 published), CrossFormer++."""
    args = dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), **PLUS_PLUS)
    return _create_crossformer("crossformer_pp_base", pretrained, **{**args, **kwargs})


@register_model
def crossformer_pp_large(pretrained: bool = False, **kwargs: Any) -> CrossFormer:
    """CrossFormer++-L: 92.0 M parameters, 16.7 GMACs at 224 (16.6 published), CrossFormer++."""
    args = dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), **PLUS_PLUS)
    return _create_crossformer("crossformer_pp_large", pretrained, **{**args, **kwargs})


@register_model
def crossformer_pp_huge(pretrained: bool = False, **kwargs: Any) -> CrossFormer:
    """CrossFormer++-H: 96.0 M parameters, 22.0 GMACs at 224 (21.8 published), CrossFormer++."""
    args = dict(embed_dim=128, depths=(6, 6, 18, 2), num_heads=(4, 8, 16, 32), **PLUS_PLUS)
    return _create_crossformer("crossformer_pp_huge", pretrained, **{**args, **kwargs})


@register_model
def crossformer_nano(pretrained: bool = False, **kwargs: Any) -> CrossFormer:
    """CrossFormer-N of this library, for small images and CPUs: 2.6 M parameters, 0.04 GMACs at 64x64.

    It has one block in the first stage, which is memory-bound on CPUs; groups of 4, so that LDA spans the
    16x16 and 8x8 maps of a 64x64 image; and no 32x32 kernel, which would be a quarter of a training step.
    """
    args = dict(
        embed_dim=32,
        depths=(1, 3, 6, 1),
        num_heads=(1, 2, 4, 8),
        group_size=(4, 4, 4, 4),
        interval=(4, 2, 2, 1),
        lda_span="region",
        patch_sizes=(4, 8, 16),
        amplitude_cooling=3,
        weight_init="xavier_mlp",
    )
    return _create_crossformer("crossformer_nano", pretrained, **{**args, **kwargs})
