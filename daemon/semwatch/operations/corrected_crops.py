"""Crops that go to learning with people's verdicts, cut from the file that still lies in the drop folder.

A defect that the line could not name lies in the queue with its crop. One that it named, dismissed or missed is nowhere
but in the picture: it is searched and cut once more, by the recipe and models of today.
"""

import hashlib
from collections.abc import Mapping, Sequence

from semwatch.defects import Box, Micrograph
from semwatch.errors import ConfigError, ImageError, SemwatchError
from semwatch.intake import decoding
from semwatch.intake.decoders import Decoders
from semwatch.line import marked
from semwatch.line.marked import Encoded
from semwatch.models.inference import Embedded
from semwatch.settings.recipe import load_recipe
from semwatch.settings.site import Site
from semwatch.store.ledger import Work

Place = tuple[int, Box]
"""Page, and a half-open box in pixels of the page as read."""
Crop = tuple[Encoded, Micrograph]
"""A defect as learning sees it, and the page that it is on."""


def cut(site: Site, work: Work, places: Sequence[Place]) -> tuple[Mapping[Place, Crop], str]:
    """Cut and encode defects of one reviewed file.

    Args:
        site: whose drop folder, recipe and models.
        work: the file.
        places: of the defects.

    Returns:
        Crops by place, and why others have none; "" where all have one.
    """
    if not places:
        return {}, ""
    try:
        return _cut(site, work, places)
    except SemwatchError as error:  # a person's word counts without its crop too
        return {}, str(error)


def _cut(site: Site, work: Work, places: Sequence[Place]) -> tuple[Mapping[Place, Crop], str]:
    folder = next((folder for folder in site.folders if folder.source == work.source), None)
    if folder is None:
        raise ConfigError(f"{site.name} has no folder with the source {work.source} any more")
    recipe, limits = load_recipe(folder.recipe), site.limits
    path = folder.path / work.path
    data = decoding.read_file(path, below=folder.path)
    if hashlib.sha256(data).hexdigest() != work.sha256:
        raise ImageError(f"{path} is of other content now")
    found: dict[Place, Crop] = {}
    with (
        Decoders() as decoders,
        Embedded(
            site.models.repository,
            pins=recipe.pins.model_dump(),
            threads=site.models.threads,
            models=("detector", "encoder"),
        ) as models,
    ):
        pages = decoders.decode(data, name=work.path, max_pixels=limits.max_image_px, max_pages=limits.max_pages)
        for page in pages:
            wanted = [place for place in dict.fromkeys(places) if place[0] == page.page]
            if wanted:
                seen = marked.encoded([box for _, box in wanted], page, recipe, models)
                found |= {place: (one, page) for place, one in zip(wanted, seen, strict=True) if one is not None}
    outside = len(set(places) - set(found))
    return found, f"{outside} lie outside the field of view" if outside else ""
