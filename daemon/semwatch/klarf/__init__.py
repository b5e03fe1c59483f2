"""KLARF 1.1, 1.2 and 1.8 without loss: read, look, edit one column, convert, write. A library of its own.

May import: `errors`, and nothing but the standard library.
Start reading: `document.py`, which joins the two grammars (`flat.py`, `nested.py`) and the views on them (`views.py`).
"""

from semwatch.klarf.document import MAX_BYTES, MAX_DEFECTS, Document, parse, read
from semwatch.klarf.edit import add_classes, add_column, partial, set_column
from semwatch.klarf.errors import KlarfError, Place

__all__ = [
    "MAX_BYTES",
    "MAX_DEFECTS",
    "Document",
    "KlarfError",
    "Place",
    "add_classes",
    "add_column",
    "parse",
    "partial",
    "read",
    "set_column",
]
