"""A file of many pages that a KLARF names, judged part by part: memory, time and what a crash repeats stay small.

What a part came to is kept in the state folder until all are there; then they are one result like any other. A part
counts only for the same content, recipe, pages and reference, and by the models that judge the others.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from pydantic import ValidationError

from semwatch.defects import PageReview, Review
from semwatch.errors import ServiceUnavailable
from semwatch.line.pipeline import ReferenceFile
from semwatch.store.manifests import KEPT
from semwatch.store.review_record import ReviewRecord
from semwatch.system import files

PAGES = 16
"""Of a part, references not counted."""
SLICE_S = 45.0
"""A file is given back after so long, and comes again for its next parts: no review is to look like one that hangs."""

Pages = Mapping[int, int | None]
"""Pages to judge, each with the page of its reference."""


def split(pages: Pages, max_pages: int) -> list[Pages]:
    """Parts of the pages, in their order; a file with few is one part.

    >>> [list(part) for part in split(dict.fromkeys(range(18)), 64)]
    [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [16, 17]]
    """
    n, left = max(1, min(PAGES, max_pages // 2)), iter(sorted(pages.items()))
    found: list[Pages] = []
    while part := dict(islice(left, n)):
        found.append(part)
    return found


def as_numbered(part: Pages, numbers: Sequence[int], *, own_references: bool) -> Pages:
    """The pages of a part by their places in a file that holds those of ``numbers`` alone."""
    at = {number: place for place, number in enumerate(numbers)}
    return {
        at[page]: at.get(reference) if own_references and reference is not None else reference
        for page, reference in part.items()
        if page in at
    }


def renumbered(review: Review, numbers: Sequence[int], *, own_references: bool) -> Review:
    """A review of such a file with the numbers that its pages have in the whole one."""
    return replace(review, pages=tuple(_renumbered(page, numbers, own_references) for page in review.pages))


def _renumbered(page: PageReview, numbers: Sequence[int], own_references: bool) -> PageReview:
    reference = page.reference
    if reference is not None and own_references and reference.name.startswith("page "):
        place = int(reference.name.removeprefix("page "))
        reference = replace(reference, name=f"page {numbers[place]}")
    micrograph = replace(page.micrograph, page=numbers[page.micrograph.page])
    return replace(page, micrograph=micrograph, reference=reference)


class KeptParts:
    """The parts of one file that were judged.

    Args:
        state_dir: of the site.
        sha256: of the file.
        recipe_id: of the recipe that judges.
        parts: all of them.
        reference: file of the references, where they have one.
    """

    def __init__(
        self, state_dir: Path, sha256: str, recipe_id: str, parts: Sequence[Pages], reference: ReferenceFile | None
    ) -> None:
        of = None if reference is None else [reference.name, hashlib.sha256(reference.data or b"").hexdigest()]
        plan = json.dumps([sha256, recipe_id, [sorted(part.items()) for part in parts], of])
        self.name = hashlib.sha256(plan.encode()).hexdigest()[:16]
        self._folder = state_dir / KEPT / "parts" / self.name

    def read(self, n: int) -> ReviewRecord | None:
        """A part; None where it is not judged yet."""
        try:
            return ReviewRecord.model_validate_json((self._folder / f"{n}.json").read_bytes())
        except (OSError, ValidationError):
            return None

    def keep(self, n: int, record: ReviewRecord) -> None:
        """Keep a part.

        Raises:
            ServiceUnavailable: the disk is full or broken.
        """
        try:
            files.make_folder(self._folder)
            files.write_whole(self._folder / f"{n}.json", record.model_dump_json().encode())
        except OSError as error:
            raise ServiceUnavailable(
                f"cannot write {self._folder} ({error.strerror}); free or mend the disk"
            ) from error

    def forget(self) -> None:
        """Forget all of them."""
        shutil.rmtree(self._folder, ignore_errors=True)


def is_by(record: ReviewRecord | None, hashes: Mapping[str, str]) -> bool:
    """Whether a part is there, and the models of these content hashes judged it."""
    return record is not None and all(hashes.get(model) == one for model, one in record.model_hashes.items())


def joined(records: Sequence[ReviewRecord]) -> ReviewRecord:
    """One result of all parts; one at least."""
    first, last = records[0], records[-1]
    pages = sorted((page for record in records for page in record.pages), key=lambda page: page.page)
    timings = {stage: sum(record.timings_ms.get(stage, 0.0) for record in records) for stage in first.timings_ms}
    versions = {model: n for record in records for model, n in record.model_versions.items()}
    hashes = {model: one for record in records for model, one in record.model_hashes.items()}
    changes = {"pages": tuple(pages), "timings_ms": timings, "model_versions": versions, "model_hashes": hashes}
    return first.model_copy(update={**changes, "reviewed_utc": last.reviewed_utc})
