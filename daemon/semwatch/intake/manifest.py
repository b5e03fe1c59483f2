"""A KLARF as the manifest of its lot: which files it names, which of their pages are to be judged, and against what.

A lot's images lie in the folder of its KLARF or below it. A page is ``number - 1`` in a file of several pages. What a
page is, the recipe's ``klarf`` section says by the type of the image or its place in the list of its defect.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any

from semwatch import klarf
from semwatch.errors import ImageError
from semwatch.klarf import Document, KlarfError
from semwatch.klarf.check import check
from semwatch.klarf.views import Defect, Image, Wafer
from semwatch.settings.recipe import ImageRole, Klarf
from semwatch.store.manifests import NamedFile, match_key

END = b"EndOfFile;"
SHOW_ALL = "`semwatch klarf check` shows all that is wrong"
_TAIL_BYTES = 128
_NO_END = "expected EndOfFile"
"""How the problem begins that is no reason to refuse one which has settled."""


@dataclass(frozen=True, slots=True)
class NamedImage:
    """An image of a defect."""

    name: str
    """POSIX, relative to the drop folder, as the KLARF spells it."""
    page: int
    role: ImageRole


def is_manifest(name: str, settings: Klarf) -> bool:
    """Say of a file name whether the recipe takes it for a KLARF.

    >>> is_manifest("lot7/LOT7.001", Klarf(pattern="*.klarf|*.001"))
    True
    """
    if settings.pattern is None:
        return False
    base = name.rpartition("/")[2].casefold()
    return any(fnmatchcase(base, one.casefold()) for one in settings.pattern.split("|"))


def has_end(data: bytes) -> bool:
    """Whether the last line says that the writer has finished."""
    lines = data[-_TAIL_BYTES:].split(b"\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), b"")
    return last.replace(b" ", b"").lower().endswith(END.lower())


def read(data: bytes, settings: Klarf) -> Document:
    """Read a KLARF and look for all that would let a defect be lost or taken for another one.

    Raises:
        ImageError: it cannot be read without doubt, has more defects than the recipe allows, or is for another recipe;
            the message names the place.
    """
    try:
        document = klarf.parse(data, max_defects=settings.max_defects)
        problems = [one for one in check(document) if one.level == "error" and not one.text.startswith(_NO_END)]
    except KlarfError as error:
        is_too_long = "limit" in error.reason
        hint = f"klarf.max_defects of the recipe is {settings.max_defects}" if is_too_long else SHOW_ALL
        raise ImageError(f"this KLARF cannot be read: {error}; {hint}") from error
    if problems:
        first, more = problems[0], len(problems) - 1
        where = "" if first.place is None else f"{first.place}: "
        others = f" (and {more} more)" if more else ""
        raise ImageError(f"this KLARF is not safe to use: {where}{first.text}{others}; {SHOW_ALL}")
    for lot in document.lots:
        _check_for_recipe("StepID", lot.step_id, settings.step_ids, "klarf.step_ids")
        _check_for_recipe("recipe", lot.recipe_id, settings.recipe_ids, "klarf.recipe_ids")
    return document


def _check_for_recipe(what: str, found: str | None, wanted: Sequence[str], key: str) -> None:
    if wanted and found not in wanted:
        raise ImageError(
            f"this KLARF is for another recipe: its {what} is {found!r}, {key} has {', '.join(wanted)}; "
            f"drop it into the folder of its recipe, or add it there"
        )


def about(document: Document) -> dict[str, Any]:
    """Lot and wafers as the file calls them, for people."""
    lots = document.lots
    first = lots[0] if lots else None
    return {
        "version": document.version,
        "lot_id": first and first.id,
        "step_id": first and first.step_id,
        "device_id": first and first.device_id,
        "recipe_id": first and first.recipe_id,
        "wafers": [{"id": wafer.id, "slot": wafer.slot, "defects": len(wafer.defects)} for wafer in document.wafers],
    }


def images_of(defect: Defect, folder: str, settings: Klarf) -> list[NamedImage]:
    """The images of a defect with their roles, in the order of the file; those without a file name are left out.

    Args:
        defect: of a document that ``read`` has let pass.
        folder: of the KLARF, relative to the drop folder; "" for the drop folder itself.
        settings: say what is what.
    """
    return [
        NamedImage(str(PurePosixPath(folder) / image.path), image.page, _role(image, place, settings))
        for place, image in enumerate(defect.images)
        if image.file is not None
    ]


def _role(image: Image, place: int, settings: Klarf) -> ImageRole:
    if place < len(settings.order):
        return settings.order[place]
    if image.kind in settings.ignored_types:
        return "ignore"
    return "reference" if image.kind in settings.reference_types else "test"


@dataclass(slots=True)
class _Collected:
    """What is known of one file so far."""

    name: str
    pages: dict[int, NamedImage | None] = field(default_factory=dict)


def named_files(document: Document, folder: str, settings: Klarf) -> list[NamedFile]:
    """All files that a KLARF names, each once, with the pages to judge.

    The i-th test image of a defect has its i-th reference, the last one where there are fewer. A page that is the test
    image of one defect and the reference of another is judged. The references of one file lie in one file, its own or
    another: those elsewhere are left out.
    """
    found: dict[str, _Collected] = {}
    for defect in _defects(document.wafers):
        images = images_of(defect, folder, settings)
        for image in images:
            found.setdefault(match_key(image.name), _Collected(image.name))
        references = [image for image in images if image.role == "reference"]
        for i, image in enumerate(image for image in images if image.role == "test"):
            reference = references[min(i, len(references) - 1)] if references else None
            if reference is not None and _place(reference) == _place(image):
                reference = None
            pages = found[match_key(image.name)].pages
            pages[image.page] = pages.get(image.page) or reference
    return [_named(one) for one in found.values()]


def _named(one: _Collected) -> NamedFile:
    keys = [match_key(reference.name) for reference in one.pages.values() if reference is not None]
    if not keys:
        return NamedFile(one.name, dict.fromkeys(one.pages))
    own = match_key(one.name)
    key = own if own in keys else keys[0]
    pages = {
        page: reference.page if reference is not None and match_key(reference.name) == key else None
        for page, reference in one.pages.items()
    }
    other = next(ref.name for ref in one.pages.values() if ref is not None and match_key(ref.name) == key)
    return NamedFile(one.name, pages, None if key == own else other)


def _defects(wafers: Sequence[Wafer]) -> Iterator[Defect]:
    return (defect for wafer in wafers for defect in wafer.defects)


def _place(image: NamedImage) -> tuple[str, int]:
    return match_key(image.name), image.page


def merged(naming: Sequence[NamedFile]) -> NamedFile | None:
    """What several KLARFs, the newest first, say of one file: every page that any wants judged; None for no KLARF."""
    if not naming:
        return None
    newest = next((one for one in naming if one.pages), naming[0])
    pages = dict(newest.pages)
    for older in naming:
        is_alike = older.reference_key == newest.reference_key
        for page, reference in older.pages.items():
            pages.setdefault(page, reference if is_alike else None)
    return NamedFile(newest.name, pages, newest.reference)
