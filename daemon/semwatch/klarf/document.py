"""A whole file: its bytes, its statements or records, and the views on them."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from semwatch.klarf import flat_views, nested_views
from semwatch.klarf.errors import KlarfError
from semwatch.klarf.flat import VERSIONS, Statement, parse_flat
from semwatch.klarf.nested import VERSION, Record, parse_nested
from semwatch.klarf.source import Source, open_source
from semwatch.klarf.table import Table
from semwatch.klarf.views import Lot, Wafer

MAX_DEFECTS = 2_000_000
MAX_BYTES = 1 << 30


@dataclass(frozen=True, eq=False)
class Document:
    """A KLARF as it was read; ``bytes(document)`` is the file again, byte for byte. Edits make new documents.

    Attributes:
        source: the bytes and how their text is encoded.
        version: ``1.1``, ``1.2`` or ``1.8``.
        statements: of 1.1 and 1.2, in their order; empty in 1.8.
        root: the outermost record of 1.8; None in 1.1 and 1.2.
        is_complete: whether ``EndOfFile;`` ends it: without that a writer may not have finished.
    """

    source: Source
    version: str
    statements: tuple[Statement, ...]
    root: Record | None
    is_complete: bool

    def __bytes__(self) -> bytes:
        return self.source.data

    @cached_property
    def lots(self) -> tuple[Lot, ...]:
        """The lots with their wafers."""
        if self.root is not None:
            return nested_views.lots(self.source, self.root)
        return flat_views.lots(self.source, self.statements)

    @property
    def wafers(self) -> tuple[Wafer, ...]:
        """The wafers of all lots."""
        return tuple(wafer for lot in self.lots for wafer in lot.wafers)

    @property
    def tables(self) -> tuple[Table, ...]:
        """The lists of defects of all wafers, in the order of the file."""
        return tuple(table for wafer in self.wafers for table in wafer.tables)


def parse(data: bytes, *, max_defects: int = MAX_DEFECTS) -> Document:
    """Read the bytes of a KLARF 1.1, 1.2 or 1.8. Takes time in proportion to them, and 16 bytes for each defect.

    Raises:
        KlarfError: what cannot be read without doubt, with line and column; more than ``max_defects`` defects.
    """
    source = open_source(data)
    head = data[source.begin : source.begin + 4096].split(None, 3)
    if head[:2] == [b"Record", b"FileRecord"]:
        root, is_complete = parse_nested(source, max_defects=max_defects)
        if root.id != VERSION:
            raise source.error(root.name_span.end, f'the version "{VERSION}"')
        document = Document(source, VERSION, (), root, is_complete)
    elif head and head[0].upper() == b"FILEVERSION":
        statements = parse_flat(source, max_defects=max_defects)
        words = [source.text(word) for word in source.flat_words(statements[0].body)]
        version = VERSIONS.get(" ".join(words))
        if version is None:
            raise source.error(statements[0].body.start, "the version 1 1 or 1 2")
        is_complete = statements[-1].keyword.upper() == "ENDOFFILE"
        document = Document(source, version, statements, None, is_complete)
    else:
        raise source.error(
            source.begin, 'FileVersion 1 1, FileVersion 1 2 or Record FileRecord "1.8" as the first words'
        )
    _ = document.lots  # ids and names that stand twice are refused here, not later
    return document


def read(path: Path | str, *, max_defects: int = MAX_DEFECTS, max_bytes: int = MAX_BYTES) -> Document:
    """Read a file.

    Raises:
        KlarfError: as ``parse``, and a file of more than ``max_bytes``.
        OSError: the file cannot be opened.
    """
    with Path(path).open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise KlarfError(f"larger than {max_bytes} bytes")
    return parse(data, max_defects=max_defects)
