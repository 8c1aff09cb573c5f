"""Fonts with the glyphs of class names, for matplotlib and Pillow."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from warnings import catch_warnings, filterwarnings

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

log = logging.getLogger("crossformer_vision")

# Common fonts with Chinese, Japanese and Korean glyphs, tried before all others.
CJK_FONTS = (
    "Noto Sans CJK", "Noto Sans SC", "Noto Sans JP", "Noto Sans KR", "Source Han Sans", "WenQuanYi",
    "Microsoft YaHei", "SimHei", "PingFang", "Hiragino", "Yu Gothic", "MS Gothic", "Malgun Gothic",
    "Apple SD Gothic", "NanumGothic", "Droid Sans Fallback", "Arial Unicode",
)  # fmt: skip


@cache
def _find(characters: frozenset[str]) -> tuple[str, str] | None:
    """Family and file of the installed font with most of the characters. ``None`` if DejaVu Sans has all."""
    from matplotlib import font_manager

    def count_missing(file: str) -> int:
        try:
            glyphs = font_manager.get_font(file).get_charmap()
        except Exception:  # skip damaged font files
            return len(characters)
        return sum(ord(c) not in glyphs for c in characters)

    best = count_missing(font_manager.findfont("DejaVu Sans"))
    if not best:
        return None
    fonts = {font.fname: font.name for font in font_manager.fontManager.ttflist}
    # "Last Resort" has only placeholder boxes.
    fonts = {file: name for file, name in fonts.items() if not name.startswith("Last Resort")}
    chosen: tuple[str, str] | None = None
    for file, family in sorted(fonts.items(), key=lambda font: not font[1].startswith(CJK_FONTS)):
        if (count := count_missing(file)) < best:
            best, chosen = count, (family, file)
        if not best:
            break
    if best:
        shown = "".join(sorted(characters))[:20]
        log.warning(
            "no installed font has all of '%s'; plots show boxes instead. Install one, such as Noto Sans CJK "
            "(Debian: apt install fonts-noto-cjk)",
            shown,
        )
    return chosen


def _beyond_ascii(texts: Iterable[str]) -> frozenset[str]:
    return frozenset(c for text in texts for c in text if not c.isascii() and not c.isspace())


def load_font(texts: Iterable[str], size: int) -> Font:
    """Load a Pillow font that has the glyphs of texts.

    Args:
        texts: Texts to be written.
        size: Height in pixels.
    """
    characters = _beyond_ascii(texts)
    if not characters:
        return ImageFont.load_default(size)
    from matplotlib import font_manager

    found = _find(characters)
    return ImageFont.truetype(found[1] if found else font_manager.findfont("DejaVu Sans"), size)


@contextmanager
def use_fonts_for(texts: Iterable[str]) -> Iterator[None]:
    """Make matplotlib use a font with the glyphs of texts, and not treat dollar signs as formulas."""
    import matplotlib

    characters = _beyond_ascii(texts)
    found = _find(characters) if characters else None
    families = ["DejaVu Sans", *((found[0],) if found else ())]
    with matplotlib.rc_context({"font.family": families, "text.parse_math": False}), catch_warnings():
        filterwarnings("ignore", message="Glyph .* missing")  # `_find` has logged a warning
        yield


def shorten(text: str, length: int) -> str:
    """Shorten a text to ``length`` characters by removing its middle."""
    if len(text) <= length:
        return text
    head = max(1, (length - 1) * 2 // 3)
    return f"{text[:head]}…{text[len(text) - max(0, length - 1 - head) :]}"


def fit_text(text: str, font: Font, width: float) -> str:
    """Shorten a text until it is at most ``width`` pixels wide.

    Args:
        text: Text to shorten.
        font: Pillow font.
        width: Maximum width in pixels.
    """
    length = len(text)
    while length > 1 and font.getlength(shorten(text, length)) > width:
        length -= 1
    return shorten(text, length)
