"""Options of ``CrossFormer`` that vary by stage or block, or that select an ablation by name."""

from collections.abc import Sequence
from typing import TypeVar

from torch import nn

T = TypeVar("T")
GroupSizes = Sequence[int | Sequence[int]]


def check_options(
    lda_span: str,
    weight_init: str,
    embed_split: str,
    output_stride: int,
    attention: str,
    position_bias: str,
    group_size: object,
) -> None:
    """Check the options of ``CrossFormer`` that accept names.

    Args:
        lda_span: See `CrossFormer`.
        weight_init: See `CrossFormer`.
        embed_split: See `CrossFormer`.
        output_stride: See `CrossFormer`.
        attention: See `CrossFormer`.
        position_bias: See `CrossFormer`.
        group_size: See `CrossFormer`.

    Raises:
        ValueError: If a value is unknown.
    """
    from crossformer_vision.models.ablations import ATTENTIONS, GROUP_MODES, POSITION_BIASES

    for name, value, choices in (
        ("lda_span", lda_span, ("map", "region", "count")),
        ("weight_init", weight_init, ("", "xavier_mlp")),
        ("embed_split", embed_split, ("halving", "equal")),
        ("output_stride", output_stride, (8, 16, 32)),
        ("attention", attention, ("long_short", *ATTENTIONS)),
        ("position_bias", position_bias, ("dynamic", *POSITION_BIASES)),
        ("group_size", group_size, GROUP_MODES if isinstance(group_size, str) else (group_size,)),
    ):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}")


def check_position_bias(position_bias: str, width: int | None, heads: str) -> None:
    """Check the options of DPB.

    Args:
        position_bias: See `CrossFormer`.
        width: See `CrossFormer`.
        heads: See `CrossFormer`.

    Raises:
        ValueError: If a value is invalid, or another position bias is used.
    """
    if heads not in ("separate", "shared"):
        raise ValueError(f"position_bias_heads must be one of 'separate', 'shared', not {heads!r}")
    if width is not None and width < 1:
        raise ValueError(f"position_bias_width must be at least 1, not {width}")
    if position_bias != "dynamic" and (width is not None or heads == "shared"):
        raise ValueError(f"position_bias_width and position_bias_heads are for DPB, not {position_bias!r}")


def resolve_strides(strides: Sequence[int], depths: Sequence[int], output_stride: int) -> list[int]:
    """Stride of each stage's map in pixels of the image.

    Args:
        strides: Strides of the CELs. Those beyond the number of stages are ignored.
        depths: Blocks per stage.
        output_stride: Largest stride, if it is less than 32.

    Raises:
        ValueError: If there is not one stride of at least 1 for each stage.
    """
    if len(strides) < len(depths) or min(strides) < 1:
        raise ValueError(
            f"strides needs a value of at least 1 for each of {len(depths)} stages, not {strides}"
        )
    reductions: list[int] = []
    for stride in strides[: len(depths)]:
        reduction = stride * (reductions[-1] if reductions else 1)
        is_allowed = output_stride == 32 or reduction <= output_stride
        reductions.append(reduction if is_allowed or not reductions else reductions[-1])
    return reductions


def resolve_group_size(group_size: GroupSizes | str, depths: Sequence[int]) -> GroupSizes:
    """Group sizes of a named mode, or the given ones."""
    if not isinstance(group_size, str):
        return group_size
    from crossformer_vision.models.ablations import GROUP_MODES

    return GROUP_MODES[group_size](depths)


def add_absolute_position(embed: nn.Module, dim: int) -> nn.Module:
    """Wrap the first CEL to add learned absolute positions (APE)."""
    from crossformer_vision.models.ablations import AbsolutePosition

    return AbsolutePosition(embed, dim)


def per_block(values: Sequence[T | Sequence[T]], depths: Sequence[int], name: str) -> list[list[T]]:
    """Expand values per stage to values per block.

    Args:
        values: One value, or one list with a value per block, for each stage.
        depths: Blocks per stage.
        name: Name of the option, for messages.

    Raises:
        ValueError: If the numbers of values and blocks differ.
    """
    if len(values) != len(depths):
        raise ValueError(f"{name} needs one entry for each of the {len(depths)} stages, got {len(values)}")
    lists = [
        list(v) if isinstance(v, Sequence) else [v] * depth for v, depth in zip(values, depths, strict=True)
    ]
    for stage, (blocks, depth) in enumerate(zip(lists, depths, strict=True)):
        if len(blocks) != depth:
            raise ValueError(
                f"{name} of stage {stage} needs {depth} entries, one per block, got {len(blocks)}"
            )
    return lists
