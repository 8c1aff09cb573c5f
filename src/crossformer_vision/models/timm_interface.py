"""Base class with timm's model interface: stages, norm and head."""

from typing import Any, cast

from timm.layers import ClassifierHead
from timm.models import register_notrace_function
from torch import Tensor, nn

from crossformer_vision.compat import FeatureGetterNet, feature_take_indices
from crossformer_vision.types import JsonObject

MIN_SIDE = 32  # the stride of the last stage


@register_notrace_function  # type: ignore[untyped-decorator]
def check_size(x: Tensor) -> Tensor:
    """Check that a tensor is a batch of images of at least 32 x 32 pixels.

    Returns:
        The tensor.

    Raises:
        ValueError: If it is not.
    """
    if x.dim() != 4:
        raise ValueError(f"expected images of shape (B, C, H, W), got {x.dim()} dimensions")
    if x.shape[2] < MIN_SIDE or x.shape[3] < MIN_SIDE:
        raise ValueError(
            f"an image of {x.shape[2]}x{x.shape[3]} pixels is too small: at least 32x32 are needed"
        )
    return x


class FeatureMaps(FeatureGetterNet):
    """timm's ``features_only`` wrapper, with gradient checkpointing."""

    model: "StagedClassifier"

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations of each block in the backward pass."""
        self.model.set_grad_checkpointing(enable)


class StagedClassifier(nn.Module):
    """Base class of the networks: classifier, intermediate maps, layer groups, gradient checkpointing.

    A subclass sets the attributes and implements ``forward_features``, which maps images of shape
    ``(B, C, H, W)`` to features of shape ``(B, h, w, num_features)``.

    Attributes:
        stages: Stages with ``embed``, ``blocks`` and ``grad_checkpointing``, each from a channels-last map to
            the next.
        norm: Norm of the last map.
        head: timm's ``ClassifierHead``, channels last.
        feature_info: Channels, stride and module name of each stage's map.
        num_features: Channels of the last map.
    """

    stages: nn.ModuleList
    norm: nn.Module
    head: nn.Module
    feature_info: list[JsonObject]
    num_classes: int
    global_pool: str
    num_features: int
    head_hidden_size: int

    def no_weight_decay(self) -> set[str]:
        """Names of position tables. Optimizers exempt norms and biases themselves."""
        tables = ("relative_table", "absolute_position")
        return {name for name, _ in self.named_parameters() if name.endswith(tables)}

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """Patterns that assign parameters to layer groups.

        Args:
            coarse: One group per stage instead of one per block.
        """
        fine = [
            (r"^stages\.(\d+)\.embed", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^stages\.0\.embed", "blocks": r"^stages\.(\d+)" if coarse else fine}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations of each block in the backward pass."""
        for stage in cast(Any, self.stages):
            stage.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.get_submodule("fc")

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier.

        Args:
            num_classes: Number of classes; 0 for no classifier.
            global_pool: ``"avg"`` or ``""``. ``None`` keeps the pooling.
        """
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = global_pool
        head = cast(ClassifierHead, self.head)
        head.reset(num_classes, pool_type=global_pool, in_features=self.num_features)
        self.head_hidden_size = head.num_features

    def forward_stage(self, index: int, x: Tensor) -> Tensor:
        """Output of a stage."""
        return self.stages[index](x)

    def final_norm(self, x: Tensor) -> Tensor:
        """Final features from the output of the last stage."""
        return self.norm(x)

    def stage_map(self, index: int, x: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Map of shape ``(B, h, w, C)`` from the output of a stage, for images of a height and width.

        Args:
            index: Index of the stage.
            x: Output of the stage.
            image_size: Height and width of the images.
        """
        return x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Final features and outputs of selected stages.

        Args:
            x: Images, shape ``(B, C, H, W)``.
            indices: The last n stages for an int, all for ``None``, else the listed ones.
            norm: Apply the final norm to the output of the last stage.
            stop_early: Stop after the last selected stage.
            output_fmt: Format of the intermediates, ``"NCHW"`` or ``"NHWC"``.
            intermediates_only: Return only the intermediates.

        Raises:
            ValueError: If ``output_fmt`` is unknown.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be NCHW or NHWC, not {output_fmt}")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        last = len(self.stages) - 1
        intermediates = []
        image_size = (x.shape[2], x.shape[3])
        x = check_size(x).permute(0, 2, 3, 1)
        index = 0
        for index in range(max_index + 1 if stop_early else len(self.stages)):
            x = self.forward_stage(index, x)
            if index in take_indices:
                y = self.norm(x) if norm and index == last else x
                y = self.stage_map(index, y, image_size)
                intermediates.append(y.permute(0, 3, 1, 2) if output_fmt == "NCHW" else y)
        if intermediates_only:
            return intermediates
        return self.final_norm(x) if index == last else x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last selected one.

        Args:
            indices: The last n stages for an int, else the listed ones.
            prune_norm: Remove the final norm even if the last stage stays.
            prune_head: Remove the head even if the last stage stays.

        Returns:
            Indices of the selected stages.
        """
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        is_shortened = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        if is_shortened:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
        if prune_norm or is_shortened:
            self.norm = nn.Identity()
        if prune_head or is_shortened:
            self.reset_classifier(0, "")
        return take_indices

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of features.

        Args:
            x: Features of ``forward_features``.
            pre_logits: Return pooled features instead of logits.
        """
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)
