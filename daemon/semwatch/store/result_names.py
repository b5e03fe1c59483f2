"""Names of the files of a result, apart from what reads and writes them: who only lists them starts quickly."""

from collections.abc import Sequence

REVIEW, OVERLAY, REASON, DUPLICATE = ".review.json", ".overlay.png", ".reason.json", ".duplicate.json"
IN_TABLES = (REVIEW, REASON, DUPLICATE)
"""Ends of the names of what the table of a lot is made of."""


def names_among(found: Sequence[str]) -> list[str]:
    """Of the names of all files of a folder those that tables are made of, by image; of one with a result, that."""
    by_image: dict[str, str] = {}
    for suffix in reversed(IN_TABLES):  # a later one takes the place of an earlier
        by_image |= {name.removesuffix(suffix): name for name in found if name.endswith(suffix)}
    return [by_image[image] for image in sorted(by_image)]
