"""Whatever a file holds, the answer is a document or a KlarfError."""

import random
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress

import pytest

from klarf_files import damage, make
from paths import DATA
from semwatch import klarf
from semwatch.klarf import Document, KlarfError
from semwatch.klarf.check import check
from semwatch.klarf.convert import convert
from semwatch.klarf.diff import diff

PUBLIC = [path.read_bytes() for path in sorted((DATA / "KLARF").glob("*.klarf"))]


def use(document: Document) -> None:
    """Everything that one can do with a file."""
    check(document)
    for wafer in document.wafers:
        for defect in wafer.defects:
            with suppress(KlarfError):
                _ = defect.on_wafer, defect.size, [(image.page, image.path) for image in defect.images]
    with suppress(KlarfError):
        list(diff(document, document))
    with suppress(KlarfError):
        convert(document, "1.8" if document.root is None else "1.2")
    with suppress(KlarfError):
        klarf.add_classes(document, document.lots[0], {12345: "new"}) if document.lots else None
    for wafer in document.wafers[:1]:
        ids = [one for one in wafer.defects.column("DEFECTID")[:1] if isinstance(one, int)]
        for edit in (klarf.set_column, klarf.add_column, klarf.partial):
            for column in ("CLASSNUMBER", "NEWCLASS"):
                with suppress(KlarfError):
                    edit(document, wafer, column, dict.fromkeys(ids, 7))


def outcomes(seeds: Iterable[int]) -> Counter[str]:
    found: Counter[str] = Counter()
    for seed in seeds:
        rng = random.Random(seed)
        data = damage(rng.choice(PUBLIC) if PUBLIC and rng.random() < 0.2 else make(rng.randrange(500)).data, rng)
        try:
            document = klarf.parse(data)
        except KlarfError as error:
            found["refused with a place" if error.place else "refused"] += 1
            continue
        try:
            assert bytes(document) == data
            use(document)
        except KlarfError:
            found["refused in use"] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
        else:
            found["read"] += 1
    return found


def test_thousand_damaged_files_are_read_or_refused_with_a_place() -> None:
    found = outcomes(range(1000))
    assert found["refused"] == 0
    assert found["read"] > 100
    assert found["refused with a place"] > 300


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_thousand_damaged_files_are_read_or_refused_with_a_place() -> None:
    assert outcomes(range(1000, 11_000))["refused"] == 0
