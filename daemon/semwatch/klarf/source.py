"""The bytes of a file, never changed, and what its words are made of."""

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from semwatch.klarf.errors import KlarfError, Place

# Every pattern is possessive: it never goes back, so reading takes time in proportion to the length of the text.
STRING = rb'"[^"\r\n]*+"'
FLAT_WORD = rb'[^\s";]++'
NESTED_WORD = rb'[^\s";{},]++'
FLAT_TOKEN = re.compile(STRING + rb"|" + FLAT_WORD + rb'|[;"]')
NESTED_TOKEN = re.compile(STRING + rb"|" + NESTED_WORD + rb'|[;{},"]')
SPACE = re.compile(rb"\s*+")
INTEGER = rb"[+-]?+[0-9]++"
NUMBER = rb"[+-]?+(?>[0-9]++\.?+[0-9]*+|\.[0-9]++)(?>[eE][+-]?+[0-9]++)?+"
NOT_A_NUMBER = rb"N/?A|[Nn]a[Nn]|[+-]?[Ii][Nn][Ff]|[+-]?1\.#[A-Z]++[0-9]*+"
"""What tools write where there is no number: NA of KLARF 1.8, and what C prints for a float that is none."""

_IS_INTEGER = re.compile(INTEGER)
_IS_NUMBER = re.compile(NUMBER)
_IS_NO_NUMBER = re.compile(NOT_A_NUMBER)
_MAX_DIGITS = 100
_SHOWN = 40
_CHUNK = 1 << 20
_UTF_16_32 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

Value = int | float | str | None
"""What a cell or a field holds; None stands for NA, NaN and infinity."""


class Span(NamedTuple):
    """Bytes ``start`` to ``end`` of a file, half-open."""

    start: int
    end: int


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A file as it was read.

    Attributes:
        data: every byte of it.
        encoding: of its text: UTF-8 where that fits, else latin-1, which fits always.
        begin: first byte behind a mark of byte order.
    """

    data: bytes
    encoding: Literal["utf-8", "latin-1"]
    begin: int

    @property
    def newline(self) -> bytes:
        """What ends the first line; edits end theirs the same way."""
        first = self.data.find(b"\n")
        return b"\r\n" if first > 0 and self.data[first - 1] == 0x0D else b"\n"

    def text(self, span: Span) -> str:
        """What stands there, without the quotes of a string."""
        word = self.data[span.start : span.end]
        return (word[1:-1] if word.startswith(b'"') else word).decode(self.encoding)

    def value(self, span: Span) -> Value:
        """What stands there as a number where it is one, and is not quoted."""
        return as_value(self.data[span.start : span.end], self.encoding)

    def place(self, offset: int) -> Place:
        """Line and column of a byte."""
        line_start = self.data.rfind(b"\n", 0, offset) + 1
        line = self.data.count(b"\n", 0, offset) + 1
        return Place(line, offset - max(line_start, self.begin) + 1)

    def error(self, offset: int, expected: str, *, found: bool = True) -> KlarfError:
        """An error at a byte, with the word that stands there."""
        return KlarfError(
            f"expected {expected}" + (f", found {self.shown(offset)}" if found else ""), self.place(offset)
        )

    def shown(self, offset: int) -> str:
        """The word at a byte, for a message."""
        start = _skip_space(self.data, offset)
        token = NESTED_TOKEN.match(self.data, start)
        if token is None:
            return "the end of the file"
        word = token[0][:_SHOWN].decode(self.encoding, "replace")
        return repr(word + ("..." if len(token[0]) > _SHOWN else ""))

    def flat_words(self, span: Span) -> Iterator[Span]:
        """The words of a statement of 1.1 or 1.2."""
        return (Span(*token.span()) for token in FLAT_TOKEN.finditer(self.data, span.start, span.end))

    def nested_words(self, span: Span) -> Iterator[Span]:
        """The words between braces of 1.8, without commas."""
        tokens = NESTED_TOKEN.finditer(self.data, span.start, span.end)
        return (Span(*token.span()) for token in tokens if token[0] != b",")


def open_source(data: bytes) -> Source:
    """Find out how the text of a file is encoded.

    Raises:
        KlarfError: it is UTF-16, or empty.
    """
    begin = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    if data.startswith(_UTF_16_32):
        raise KlarfError("expected ASCII, UTF-8 or latin-1, found UTF-16: save it as UTF-8", Place(1, 1))
    return Source(data, "utf-8" if _is_utf8(data) else "latin-1", begin)


def _is_utf8(data: bytes) -> bool:
    if data.isascii():
        return True
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for start in range(0, len(data), _CHUNK):
            decoder.decode(data[start : start + _CHUNK])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def as_value(word: bytes, encoding: str) -> Value:
    r"""A word as a number where it is one.

    >>> as_value(b"1.5e+005", "utf-8"), as_value(b"-12", "utf-8"), as_value(b'"12"', "utf-8"), as_value(b"NA", "utf-8")
    (150000.0, -12, '12', None)
    """
    if word.startswith(b'"'):
        return word[1:-1].decode(encoding)
    if len(word) > _MAX_DIGITS:  # Python refuses integers of thousands of digits
        return word.decode(encoding)
    if _IS_INTEGER.fullmatch(word):
        return int(word)
    if _IS_NUMBER.fullmatch(word):
        number = float(word)
        return number if abs(number) < float("inf") else None
    return None if _IS_NO_NUMBER.fullmatch(word) else word.decode(encoding)


def as_integer(word: bytes) -> int | None:
    """A word as an integer; None where it is none."""
    if word.isdigit() and len(word) <= _MAX_DIGITS:  # most are, and this is quick
        return int(word)
    return int(word) if len(word) <= _MAX_DIGITS and _IS_INTEGER.fullmatch(word) else None


def is_number(word: bytes) -> bool:
    """Whether a word is a number."""
    return _IS_NUMBER.fullmatch(word) is not None


def _skip_space(data: bytes, offset: int) -> int:
    found = SPACE.match(data, offset)
    return offset if found is None else found.end()
