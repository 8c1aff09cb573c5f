"""Drawing into images: boxes, masks, class maps, captions and legends."""

import colorsys
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from crossformer_vision.plotting.fonts import fit_text, load_font

# Colors of classes, distinguishable on photos and with color vision deficiency (Okabe and Ito).
COLORS = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)

Objects = Mapping[str, NDArray[np.number]]
"""Objects of an image, see `draw_objects`."""

MAX_LABELED_OBJECTS = 30  # maximum number of objects in an image with labels
OVERLAY_OPACITY = 0.6


def draw_objects(image: Image.Image, objects: Objects, classes: Sequence[str]) -> Image.Image:
    """Draw masks, boxes, classes and scores into an image.

    Classes and scores are not written for more than ``MAX_LABELED_OBJECTS`` objects.

    Args:
        image: RGB image.
        objects: ``boxes`` ``(n, 4)`` in pixels and ``labels`` ``(n,)`` from 1. Optionally ``scores`` ``(n,)``
            and ``masks`` ``(n, H, W)`` of 0 and 1.
        classes: Names of the classes; label 1 is the first.

    Returns:
        A new image.
    """
    pixels = np.array(image, np.float32)
    masks = objects.get("masks")
    if masks is not None:
        for n, mask in enumerate(masks):  # each instance has its own color
            pixels[mask > 0] = 0.5 * pixels[mask > 0] + 0.5 * np.array(COLORS[n % len(COLORS)])
    drawn = Image.fromarray(pixels.round().astype(np.uint8))
    canvas = ImageDraw.Draw(drawn)
    line = max(1, round(min(drawn.size) / 250))
    text_font = load_font(classes, max(11, round(min(drawn.size) / 24)))
    colors = [
        COLORS[(n if masks is not None else int(label) - 1) % len(COLORS)]
        for n, label in enumerate(objects["labels"])
    ]
    for (x0, y0, x1, y1), color in zip(np.asarray(objects["boxes"], float).reshape(-1, 4).tolist(), colors):
        # Boxes in annotation files may have a negative width or height.
        canvas.rectangle((min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)), outline=color, width=line)
    for n, (box, label) in enumerate(zip(objects["boxes"], objects["labels"])):
        texts = [classes[int(label) - 1]] if len(classes) > 1 else []
        if "scores" in objects:
            texts.append(f"{objects['scores'][n]:.2f}".replace("0.", ".", 1))
        if not texts or len(objects["boxes"]) > MAX_LABELED_OBJECTS:
            continue
        score = f" {texts[-1]}" if "scores" in objects and len(texts) > 1 else ""
        room = drawn.width - text_font.getlength(score) - 2
        text = fit_text(texts[0], text_font, room) + score
        left, top = float(box[0]), float(box[1])
        left = max(0.0, min(left, drawn.width - text_font.getlength(text) - 2))  # inside the image
        area = canvas.textbbox((left, top), text, font=text_font, anchor="lb")
        if area[1] < 0:  # no room above the box
            area = canvas.textbbox((left, max(0.0, top)), text, font=text_font, anchor="lt")
        canvas.rectangle(area, fill=colors[n])
        canvas.text((area[0], area[1]), text, fill="black", font=text_font, anchor="lt")
    return drawn


def _readable(image: Image.Image) -> Image.Image:
    """Enlarge a small image to make room for text below or above it."""
    factor = max(1, min(round(320 / min(image.size)), round(1280 / max(image.size))))
    return image.resize((image.width * factor, image.height * factor))


def add_caption(image: Image.Image, lines: Sequence[str]) -> Image.Image:
    """Add lines of text above an image.

    Args:
        image: RGB image.
        lines: Lines of text, shortened to the width of the image.
    """
    image = _readable(image)
    width = max(320, image.width)
    size = max(12, round(min(width, 3 * image.height) / 24))
    text_font = load_font(lines, size)
    height = round(1.5 * size)
    page = Image.new("RGB", (width, image.height + height * len(lines) + size // 2), "white")
    page.paste(image, (0, page.height - image.height))
    canvas = ImageDraw.Draw(page)
    for n, line in enumerate(lines):
        place = (size // 2, size // 4 + n * height)
        canvas.text(place, fit_text(line, text_font, width - size), fill="black", font=text_font)
    return page


def enlarge(image: Image.Image, objects: Objects, factor: int) -> tuple[Image.Image, Objects]:
    """Enlarge an image and its objects.

    Args:
        image: RGB image.
        objects: See `draw_objects`.
        factor: Integer factor.
    """
    larger = {**objects, "boxes": objects["boxes"] * factor}
    if "masks" in objects:
        larger["masks"] = objects["masks"].repeat(factor, 1).repeat(factor, 2)
    return image.resize((image.width * factor, image.height * factor)), larger


def class_colors(classes: int) -> NDArray[np.uint8]:
    """Distinguishable colors of classes, ``(classes, 3)``: ``COLORS``, then other hues."""
    colors: list[tuple[int, ...]] = [*COLORS[:classes]]
    for k in range(classes - len(colors)):
        hue, value = (k * 0.618034) % 1, (1.0, 0.6, 0.8)[k % 3]
        rgb = colorsys.hsv_to_rgb(hue, (0.9, 0.6)[k // 3 % 2], value)
        colors.append(tuple(round(255 * channel) for channel in rgb))
    return np.array(colors, np.uint8)


def overlay_class_map(image: Image.Image, class_map: NDArray[np.integer]) -> Image.Image:
    """Overlay the grayscale image with the colors of its classes. Pixels with value 255 are not changed.

    Args:
        image: RGB image.
        class_map: Class index of each pixel, ``(H, W)``.
    """
    pixels = np.array(image, np.float32)
    gray = np.array(image.convert("L"), np.float32)[..., None]
    known = class_map != 255
    colors = class_colors(int(class_map[known].max()) + 1 if known.any() else 1)
    pixels[known] = (1 - OVERLAY_OPACITY) * gray[known] + OVERLAY_OPACITY * colors[class_map[known]]
    return Image.fromarray(pixels.round().astype(np.uint8))


def legend_colors(classes: int) -> NDArray[np.uint8]:
    """Colors of classes as overlaid on medium gray."""
    return (
        ((1 - OVERLAY_OPACITY) * 128 + OVERLAY_OPACITY * class_colors(classes).astype(np.float32))
        .round()
        .astype(np.uint8)
    )


def add_legend(picture: Image.Image, class_map: NDArray[np.integer], classes: Sequence[str]) -> Image.Image:
    """Add a legend below an image: colors and names of the classes in its class map, the largest first.

    Args:
        picture: RGB image.
        class_map: Class index of each pixel, ``(H, W)``; 255 is ignored.
        classes: Names of the classes.
    """
    picture = _readable(picture)
    total = max(320, picture.width)
    counts = np.bincount(class_map[class_map != 255].ravel(), minlength=len(classes))
    present = [int(k) for k in np.argsort(-counts, kind="stable") if counts[k]]
    size = max(12, round(min(total, 3 * picture.height) / 40))
    text_font = load_font(classes, size)
    names = {k: fit_text(classes[k], text_font, total - 3 * size) for k in present}
    places: list[tuple[int, int]] = []
    x, y = size // 2, picture.height + size // 2
    for k in present:
        width = round(text_font.getlength(names[k])) + 3 * size
        if x + width > total and x > size // 2:
            x, y = size // 2, y + round(1.6 * size)
        places.append((x, y))
        x += width
    page = Image.new("RGB", (total, y + 2 * size), "white")
    page.paste(picture, (0, 0))
    canvas = ImageDraw.Draw(page)
    colors = legend_colors(len(classes))
    for k, (x, y) in zip(present, places):
        canvas.rectangle((x, y, x + size, y + size), fill=tuple(int(v) for v in colors[k]))
        canvas.text(
            (x + round(1.4 * size), y + size // 2), names[k], fill="black", font=text_font, anchor="lm"
        )
    return page


def denormalize(
    image: NDArray[np.float32], mean: Sequence[float], std: Sequence[float]
) -> NDArray[np.float32]:
    """Convert a network's input to an RGB image with values from 0 to 1.

    Args:
        image: Input, ``(3, H, W)``.
        mean: Mean that the channels were normalized by.
        std: Standard deviation that the channels were normalized by.

    Returns:
        Image, ``(H, W, 3)``.
    """
    values = image * np.array(std, np.float32)[:, None, None] + np.array(mean, np.float32)[:, None, None]
    return values.transpose(1, 2, 0).clip(0, 1)


def stretch(image: NDArray[np.float32], channels: Sequence[int] | None = None) -> NDArray[np.float32]:
    """Convert an image with any channels to RGB, scaled from the 2nd to the 98th percentile of each channel.

    Args:
        image: Image, ``(C, H, W)``.
        channels: Channels to show as red, green and blue. ``None`` for the first three, or the first one in
            gray.

    Returns:
        Image, ``(H, W, 3)`` with values from 0 to 1.
    """
    chosen = channels or ((0, 1, 2) if len(image) >= 3 else (0, 0, 0))
    values = image[list(chosen)].transpose(1, 2, 0)
    low, high = np.percentile(values, (2, 98), axis=(0, 1)).astype(np.float32)
    stretched: NDArray[np.float32] = ((values - low) / np.maximum(high - low, 1e-6)).clip(0, 1)
    return stretched
