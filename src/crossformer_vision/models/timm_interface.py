"""What timm asks of a classifier that is a row of stages, a norm and a head: all but what it computes."""

from typing import TYPE_CHECKING, Any

import torch
from timm.models import register_notrace_function
from timm.models._features import FeatureGetterNet, feature_take_indices
from torch import Tensor, nn


@register_notrace_function
def check_size(x: Tensor) -> Tensor:
    """`x`, if it is an image batch of at least 32 x 32; a ValueError otherwise."""
    if x.dim() != 4:
        raise ValueError(f"expected images (B, C, H, W), got {x.dim()} dimensions")
    if x.shape[2] < 32 or x.shape[3] < 32:  # the stride of the last stage
        raise ValueError(f"image of {x.shape[2]}x{x.shape[3]} pixels is too small: 32x32 or more are needed")
    return x


class FeatureMaps(FeatureGetterNet):
    """timm's `features_only` wrapper, which passes on what it leaves out."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        model: Any = self.model
        model.set_grad_checkpointing(enable)


class StagedClassifier(nn.Module):
    """Base of the networks: heads to be exchanged, intermediate maps, groups of layers, checkpointing.

    A subclass sets the attributes and writes `forward_features`: images (B, C, H, W) -> (B, h, w, channels).

    Attributes:
        stages: each from a map, channels last, to the next; has `embed`, `blocks`, `grad_checkpointing`.
        norm: of the last map.
        head: timm's `ClassifierHead`, channels last.
        feature_info: channels, stride and name of each stage's map.
        num_features: channels of the last map.
    """

    if TYPE_CHECKING:  # TorchScript would take them for its own
        stages: nn.ModuleList
        norm: nn.Module
        head: Any
        feature_info: list[dict[str, Any]]
        num_classes: int
        global_pool: str
        num_features: int
        head_hidden_size: int

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Tables of positions; norms and biases optimizers leave out themselves."""
        tables = ("relative_table", "absolute_position")
        return {name for name, _ in self.named_parameters() if name.endswith(tables)}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return dict(
            stem=r"^stages\.0\.embed",
            blocks=r"^stages\.(\d+)"
            if coarse
            else [
                (r"^stages\.(\d+)\.embed", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^norm", (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        stages: Any = self.stages
        for stage in stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = global_pool
        self.head.reset(num_classes, pool_type=global_pool, in_features=self.num_features)
        self.head_hidden_size = self.head.num_features

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The final features and the output of chosen stages.

        Args:
            x: images (B, C, H, W).
            indices: the last n stages if an int, all if None, otherwise those listed.
            norm: apply the final norm to the last stage's output.
            stop_early: stop after the last stage asked for.
            output_fmt: of the intermediates, `"NCHW"` or `"NHWC"`.
            intermediates_only: return the list alone.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be NCHW or NHWC, not {output_fmt}")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        last = len(self.stages) - 1
        intermediates = []
        x = check_size(x).permute(0, 2, 3, 1)
        if torch.jit.is_scripting() or not stop_early:  # TorchScript cannot slice modules
            stages = self.stages
        else:
            stages = self.stages[: max_index + 1]
        i = 0
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take_indices:
                y = self.norm(x) if norm and i == last else x
                intermediates.append(y.permute(0, 3, 1, 2) if output_fmt == "NCHW" else y)
        if intermediates_only:
            return intermediates
        return self.norm(x) if i == last else x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages that `indices` do not need, and on demand the norm and the head."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        shortened = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        if shortened:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return take_indices

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)
