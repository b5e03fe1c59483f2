"""Text that somebody else has written, for a log, a terminal or a table: file names may hold anything but / and NUL."""

import re

_CONTROL = re.compile(
    "[\x00-\x1f\x7f-\x9f"  # C0, DEL and C1: they move cursors, colour, and end lines
    "\u2028\u2029"  # line and paragraph separators
    "\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069"  # marks of direction: they show a name in another order
    "\ud800-\udfff\ufeff]"
)
_BUT_NEWLINE = re.compile(f"(?!\n){_CONTROL.pattern}")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def escaped(text: str, *, keeps_lines: bool = False) -> str:
    r"""Spell out what is no plain character: bytes that are no UTF-8 and small control characters as ``\xNN``.

    Args:
        keeps_lines: of text that is ours and has several lines.

    >>> escaped("a\x1b[31m\nb\udcff")
    'a\\x1b[31m\\x0ab\\xff'
    """
    return (_BUT_NEWLINE if keeps_lines else _CONTROL).sub(_spelled, text)


def for_spreadsheet(text: str) -> str:
    r"""Text of a CSV cell that no spreadsheet takes for a formula: an apostrophe before what could be one.

    >>> for_spreadsheet("=1+1"), for_spreadsheet("lot/a.png"), for_spreadsheet("a\rb")
    ("'=1+1", 'lot/a.png', 'a\\x0db')
    """
    return ("'" if text.startswith(_FORMULA) else "") + escaped(text)


def _spelled(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte, as the file system gives it
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def counted(n: int, what: str, plural: str = "") -> str:
    """A number and what it counts.

    >>> counted(1, "defect"), counted(2, "defect"), counted(0, "class", "classes")
    ('1 defect', '2 defects', '0 classes')
    """
    return f"{n} {what if n == 1 else plural or what + 's'}"


def utf8(name: str) -> str:
    """Spell out bytes that are no UTF-8, which neither JSON nor every file system takes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
