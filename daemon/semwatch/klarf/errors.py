"""The one error of this library: it names the place in the file."""

from typing import NamedTuple

from semwatch.errors import SemwatchError


class Place(NamedTuple):
    """Where a byte of a file stands; both count from 1, columns in bytes, a mark of byte order not counted."""

    line: int
    column: int

    def __str__(self) -> str:
        return f"line {self.line}, column {self.column}"


class KlarfError(SemwatchError, ValueError):
    """A KLARF cannot be read as what it claims to be, or an edit cannot be made.

    Args:
        reason: what was expected, and what was found.
        place: where; None for what has no place, such as a file that is too large.
    """

    def __init__(self, reason: str, place: Place | None = None) -> None:
        super().__init__(reason if place is None else f"{place}: {reason}")
        self.reason = reason
        self.place = place
