"""Characters that fonts have, and those that none has."""

from collections.abc import Iterable
from functools import cache

from matplotlib.font_manager import findfont, fontManager, get_font

from ..naming import escaped_token


def short_token(token: str) -> str:
    """Label a token in a picture: as ``escaped_token``, with ▯ for characters that no installed font has."""
    return with_known_glyphs(escaped_token(token))


def with_known_glyphs(text: str) -> str:
    """Replace characters that no installed font has by ▯."""
    return "".join(c if _font_of(c) else "▯" for c in text)


def missing_glyphs(tokens: Iterable[str]) -> str:
    """Collect the characters of labels that no installed font has, each once."""
    return "".join(dict.fromkeys(c for token in tokens for c in token if c.isprintable() and not _font_of(c)))


def font_families(texts: Iterable[str]) -> list[str]:
    """Choose fonts that have the characters of texts between them, for matplotlib's ``fontfamily``."""
    found = dict.fromkeys(family for text in texts for c in text if (family := _font_of(c)))
    return list(dict.fromkeys(["DejaVu Sans", *found]))


@cache
def _font_of(c: str) -> str | None:
    """Find an installed font that has a character: matplotlib's own first; None where there is none."""
    if ord(c) in _charmap(findfont("DejaVu Sans")):
        return "DejaVu Sans"
    others = (font for font in fontManager.ttflist if not font.name.startswith("Last Resort"))  # boxes for everything
    return next((font.name for font in others if ord(c) in _charmap(font.fname)), None)


@cache
def _charmap(path: str) -> frozenset[int]:
    try:
        return frozenset(get_font(path).get_charmap())
    except (OSError, RuntimeError):  # gone, or in a format that matplotlib cannot draw
        return frozenset()
