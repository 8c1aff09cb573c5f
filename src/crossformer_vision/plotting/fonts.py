"""Fonts that have the glyphs of class names, for matplotlib's pictures and Pillow's alike."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from warnings import catch_warnings, filterwarnings

from PIL import ImageFont

log = logging.getLogger("crossformer_vision")

# Looked at first: fonts of many systems with Chinese, Japanese and Korean. Then all others.
WIDE = (
    "Noto Sans CJK", "Noto Sans SC", "Noto Sans JP", "Noto Sans KR", "Source Han Sans", "WenQuanYi",
    "Microsoft YaHei", "SimHei", "PingFang", "Hiragino", "Yu Gothic", "MS Gothic", "Malgun Gothic",
    "Apple SD Gothic", "NanumGothic", "Droid Sans Fallback", "Arial Unicode",
)  # fmt: skip


@cache
def _find(characters: frozenset[str]) -> tuple[str, str] | None:
    """Family and file of the system's font with most of the characters; None where matplotlib's has all."""
    from matplotlib import font_manager

    def lacking(file: str) -> int:
        try:
            glyphs = font_manager.get_font(file).get_charmap()
        except Exception:  # a damaged font file is no reason to stop
            return len(characters)
        return sum(ord(c) not in glyphs for c in characters)

    best = lacking(font_manager.findfont("DejaVu Sans"))
    if not best:
        return None
    fonts = {font.fname: font.name for font in font_manager.fontManager.ttflist}
    fonts = {file: name for file, name in fonts.items() if not name.startswith("Last Resort")}  # boxes alone
    chosen: tuple[str, str] | None = None
    for file, family in sorted(fonts.items(), key=lambda font: not font[1].startswith(WIDE)):
        if (count := lacking(file)) < best:
            best, chosen = count, (family, file)
        if not best:
            break
    if best:
        shown = "".join(sorted(characters))[:20]
        log.warning(
            "no font of this system has all of '%s': pictures show boxes in their place. Install one, "
            "such as Noto Sans CJK (Debian: apt install fonts-noto-cjk)",
            shown,
        )
    return chosen


def _beyond_ascii(texts: Iterable[str]) -> frozenset[str]:
    return frozenset(c for text in texts for c in text if not c.isascii() and not c.isspace())


def font(texts: Iterable[str], size: int) -> Any:
    """Pillow's font for these texts, `size` pixels high."""
    characters = _beyond_ascii(texts)
    if not characters:
        return ImageFont.load_default(size)
    from matplotlib import font_manager

    found = _find(characters)
    return ImageFont.truetype(found[1] if found else font_manager.findfont("DejaVu Sans"), size)


@contextmanager
def written(texts: Iterable[str]) -> Iterator[None]:
    """Let matplotlib write these texts as they are, with glyphs for all; a dollar begins no formula."""
    import matplotlib

    found = _find(_beyond_ascii(texts)) if _beyond_ascii(texts) else None
    families = ["DejaVu Sans", *((found[0],) if found else ())]
    with matplotlib.rc_context({"font.family": families, "text.parse_math": False}), catch_warnings():
        filterwarnings("ignore", message="Glyph .* missing")  # it is said once, in `_find`
        yield


def shortened(text: str, length: int) -> str:
    """At most so many characters; the rest is taken from the middle, as names differ at their ends."""
    if len(text) <= length:
        return text
    head = max(1, (length - 1) * 2 // 3)
    return f"{text[:head]}…{text[len(text) - max(0, length - 1 - head) :]}"


def fitted(text: str, font: Any, width: float) -> str:
    """The text, shortened until it is at most so many pixels wide."""
    length = len(text)
    while length > 1 and font.getlength(shortened(text, length)) > width:
        length -= 1
    return shortened(text, length)
