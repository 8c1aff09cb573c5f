"""Cutting a map into groups and back: what is not the papers' idea but its cost.

`crossformer.py` says which positions form a group; here are the reshapes, the masks of padded positions and
the index tensors that are kept. How attention in the groups is computed is in `attention.py`.

A map of eight positions, in one dimension, and who attends to whom. Equal letters are one group:

    position                       0 1 2 3 4 5 6 7
    SDA, G = 4                     a a a a b b b b    neighbours
    LDA over the map, I = 2        a b a b a b a b    every second one; ceil(8 / 2) = 4 members
    LDA in regions, G = 2, I = 2   a b a b c d c d    every second one of a region of G * I = 4
    LDA of the classifiers         a b a b a b a b    G = 4, I = 2: one region of G * I = 8 is the map

A published classifier's code writes its LDA as a reshape to (G, I) where SDA's is (H / G, G): at 224 pixels
G * I is the side of every map, so both definitions of LDA are that reshape. On any other map they differ.

A group's members keep their order, so the members of `a` lie `I` apart and their offsets, in members, are
those of DPB. A map that the groups do not fill is padded right and bottom: seven positions, I = 2, are

    position   0 1 2 3 4 5 6 -
    group      a b a b a b a b    the last member of b is padding: masked as a key, dropped as an output
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

# ------------------------------------------------------------------------------------------------------------
# Cut and join
# ------------------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """How a map is cut: rows x cols regions, of interval ** 2 groups each, of gh x gw members each."""

    rows: int
    cols: int
    gh: int
    gw: int
    interval: int


def neighbours(H: int, W: int, G: int) -> Layout:
    """SDA: G x G neighbours are a group."""
    return Layout(ceil_div(H, G), ceil_div(W, G), G, G, 1)


def across_map(H: int, W: int, interval: int) -> Layout:
    """LDA over the map: members lie `interval` apart over all of it, so groups are as oblong as the map."""
    return Layout(1, 1, ceil_div(H, interval), ceil_div(W, interval), interval)


def across_regions(H: int, W: int, G: int, interval: int) -> Layout:
    """LDA in regions: members lie `interval` apart inside each square of G * interval positions."""
    return Layout(ceil_div(H, G * interval), ceil_div(W, G * interval), G, G, interval)


def padded_size(layout: Layout) -> tuple[int, int]:
    """Height and width of the map that the groups fill."""
    return layout.rows * layout.gh * layout.interval, layout.cols * layout.gw * layout.interval


def is_padded(H: int, W: int, layout: Layout) -> bool:
    """Whether an H x W map is padded; in a graph of symbolic sizes, unless it can be told that it is not."""
    padded_H, padded_W = padded_size(layout)
    return may_differ(padded_H, H) or may_differ(padded_W, W)


def group(x: Tensor, layout: Layout) -> Tensor:
    """(B, H, W, C), zero-padded bottom and right to what the groups fill -> (N, L, C), L = gh * gw."""
    rows, cols, gh, gw, interval = layout
    B, H, W, C = x.shape
    if is_padded(H, W, layout):
        padded_H, padded_W = padded_size(layout)
        x = F.pad(x, (0, 0, 0, padded_W - W, 0, padded_H - H))
    x = x.view(B, rows, gh, interval, cols, gw, interval, C)
    x = x.permute(0, 1, 4, 3, 6, 2, 5, 7)  # B, row, col of the region, row, col offset, gh, gw, C
    return x.contiguous().view(B * rows * cols * interval * interval, gh * gw, C)


def ungroup(x: Tensor, layout: Layout, B: int, H: int, W: int) -> Tensor:
    """The inverse of `group`: (N, L, C) -> (B, H, W, C), without the padding."""
    rows, cols, gh, gw, interval = layout
    padded_H, padded_W = padded_size(layout)
    C = x.shape[-1]
    x = x.view(B, rows, cols, interval, interval, gh, gw, C)
    # B, row of the region, gh, row offset, col of the region, gw, col offset, C
    x = x.permute(0, 1, 5, 3, 2, 6, 4, 7)
    x = x.contiguous().view(B, padded_H, padded_W, C)
    return crop(x, H, W) if is_padded(H, W, layout) else x


def crop(x: Tensor, H: int, W: int) -> Tensor:
    """The top left H x W of a map (B, ≥ H, ≥ W, C)."""
    if torch.jit.is_scripting():
        return x[:, :H, :W]
    else:
        if not (is_open(H, x.shape[1]) or is_open(W, x.shape[2])):
            return x[:, :H, :W]
        # A slice guards on whether it is the whole; a graph of symbolic sizes is for all of them.
        rows, cols = torch.arange(H, device=x.device), torch.arange(W, device=x.device)
        return x.index_select(1, rows).index_select(2, cols)


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """(B, C, H, W), zero-padded right and bottom so that `multiple` divides both sides."""
    H, W = x.shape[2], x.shape[3]
    pad_h, pad_w = ceil_div(H, multiple) * multiple - H, ceil_div(W, multiple) * multiple - W
    if may_differ(pad_h, 0) or may_differ(pad_w, 0):
        x = F.pad(x, (0, pad_w, 0, pad_h))
    return x


def ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


def may_differ(a: int, b: int) -> bool:
    """`a != b`; True of sizes that a compiled or exported graph leaves open, so as to serve all of them."""
    if torch.jit.is_scripting():
        return a != b
    else:
        return not is_known(a == b)


@torch.jit.unused
def is_known(condition: bool) -> bool:
    """Whether it holds for all sizes that a graph is for; `torch.jit.trace` is for those of its example."""
    return bool(condition) if torch.jit.is_tracing() else statically_known_true(condition)


@torch.jit.unused
def is_open(a: int, b: int) -> bool:
    """Whether a graph of symbolic sizes leaves open if `a` and `b` are the same."""
    return not (is_known(a == b) or is_known(a != b))


def shorter(H: int, W: int) -> int:
    """`min(H, W)`, which of a traced graph's sizes would be the one that is shorter while it is traced."""
    if torch.jit.is_scripting():
        return min(H, W)
    else:
        return torch.sym_min(H, W) if torch.compiler.is_exporting() else min(H, W)  # type: ignore[return-value]


def longer(H: int, W: int) -> int:
    """`max(H, W)`, likewise."""
    if torch.jit.is_scripting():
        return max(H, W)
    else:
        return torch.sym_max(H, W) if torch.compiler.is_exporting() else max(H, W)  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------------------
# Indices and masks of one size, and what is kept of them
# ------------------------------------------------------------------------------------------------------------


def real_keys(B: int, H: int, W: int, layout: Layout, device: torch.device) -> Tensor | None:
    """Which members of each group of B maps are not padding: (N, 1, 1, L), bool; None if all are."""
    if not is_padded(H, W, layout):
        return None
    if torch.jit.is_scripting():
        real = real_members(H, W, layout, device)
    else:
        real = kept(real_members, H, W, layout, device)
    return real.repeat(B, 1)[:, None, None, :]


def real_members(H: int, W: int, layout: Layout, device: torch.device) -> Tensor:
    """Which members of each group of one map are not padding: (groups, L), bool."""
    return group(torch.ones(1, H, W, 1, dtype=torch.bool, device=device), layout).squeeze(-1)


def kinds_of_groups(H: int, W: int, layout: Layout, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """The groups of one map by which members are real: (their numbers, (L,) of bool) of each kind."""
    rows, cols, gh, gw, interval = layout

    def real_count(size: int, region: int, offset: int, most: int) -> int:
        return max(0, min(most, ceil_div(size - offset, interval) - region * most))

    members: dict[tuple[int, int], list[int]] = {}
    places = itertools.product(range(rows), range(cols), range(interval), range(interval))
    for number, (row, col, y, x) in enumerate(places):
        counts = real_count(H, row, y, gh), real_count(W, col, x, gw)
        members.setdefault(counts, []).append(number)
    return [
        (
            torch.tensor(numbers, device=device),
            torch.tensor([y < h and x < w for y in range(gh) for x in range(gw)], device=device),
        )
        for (h, w), numbers in members.items()
    ]


def relative_offsets(gh: int, gw: int, device: torch.device) -> Tensor:
    """The distinct offsets (dy, dx) between members, query less key: ((2gh-1) * (2gw-1), 2), float32."""
    dy = torch.arange(1 - gh, gh, device=device)
    dx = torch.arange(1 - gw, gw, device=device)
    return torch.stack(torch.meshgrid(dy, dx, indexing="ij"), dim=-1).reshape(-1, 2).float()


def relative_rows(queries: int, gh: int, gw: int, device: torch.device) -> Tensor:
    """The row in `relative_offsets` of each query and key: (queries * gw * L,), int64.

    Args:
        queries: the first so many of the gh rows of queries. Those of the next ones are these plus 2gw - 1
            for each row that they begin further down.
    """
    y, x = torch.arange(gh, device=device), torch.arange(gw, device=device)
    dy = y[:queries, None] - y[None, :] + gh - 1  # query, key
    dx = x[:, None] - x[None, :] + gw - 1
    return (dy[:, None, :, None] * (2 * gw - 1) + dx[None, :, None, :]).reshape(-1)


KEPT_BYTES = 64 << 20
_kept: dict[Any, Any] = {}


def kept(build: Callable[..., Any], *args: Any) -> Any:
    """`build(*args)`, index tensors of one size, built once and shared by all blocks and models.

    At most `KEPT_BYTES` are kept, and nothing while tensors are not what they seem (compiled, fake or traced,
    inside functional transforms). Threads may build the same twice, but never see what is half done.
    """
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or is_in_torch_dispatch_mode()
        or torch._C._functorch.maybe_current_level() is not None
    ):
        return build(*args)
    key = (build, *args)
    found = _kept.get(key)
    if found is None:
        with torch.inference_mode(False):  # an inference tensor would break a later backward
            found = build(*args)
        if sum(map(_bytes, [*_kept.values(), found])) > KEPT_BYTES:
            _kept.clear()
        if _bytes(found) <= KEPT_BYTES:
            _kept[key] = found
    return found


def _bytes(x: Any) -> int:
    return x.nbytes if isinstance(x, Tensor) else sum(map(_bytes, x))


# ------------------------------------------------------------------------------------------------------------
# Deployment
# ------------------------------------------------------------------------------------------------------------


def freeze_position_bias(model: nn.Module, height: int = 224, width: int = 224) -> nn.Module:
    """Turn the position biases of a trained CrossFormer into buffers, which are no longer computed.

    A buffer holds the biases of the largest offsets that images of up to height x width need; those of
    smaller groups are a part of it, and those of larger ones are computed. Weights that change afterwards
    are not seen: freeze again. `model.train()` undoes it.

    Args:
        model: a classifier, a `features_only` model, or a detector or segmenter.
        height, width: of the largest image, in pixels.

    Returns:
        The model, in eval mode.
    """
    body: Any = getattr(model.eval(), "body", model)
    sizes: dict[Any, tuple[int, int]] = {}
    biases: Any = [module for module in model.modules() if hasattr(module, "frozen")]
    if not biases:
        return model
    for bias in biases:
        bias.frozen = None
    hooks = [
        bias.register_forward_pre_hook(lambda bias, args: sizes.update({bias: args[:2]})) for bias in biases
    ]
    weight = next(p for p in body.parameters() if p.dim() == 4)  # of the first embedding
    image = weight.new_zeros(1, weight.shape[1], height, width)
    with torch.no_grad():
        body(image)
        for hook in hooks:
            hook.remove()
        for bias, (gh, gw) in sizes.items():
            bias.frozen = bias.compute(gh, gw, image).view(-1, 2 * gh - 1, 2 * gw - 1)
    return model
