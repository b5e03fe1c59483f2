"""Class names: those that models and class tables know, and the nearest to one that none does."""

import difflib
from collections.abc import Collection
from pathlib import Path

from semwatch.defects import DEFECT_FREE
from semwatch.errors import ConfigError, ModelMismatch
from semwatch.models import model_repository
from semwatch.settings.recipe import Recipe, load_recipe
from semwatch.settings.site import Site


def of_models(repository: Path) -> set[str]:
    """Class names of every version of the head, and ``defect-free``; damaged versions are left out."""
    found: set[str] = set()
    for version in model_repository.versions(repository, "head"):
        try:
            found |= set(model_repository.read_meta(repository, "head", version).labels)
        except ModelMismatch:
            continue
    return found | {DEFECT_FREE} if found else found


def of_site(site: Site) -> set[str]:
    """Class names that a model version or a class table of the site knows."""
    found = of_models(site.models.repository)
    for folder in site.folders:
        try:
            found |= set(load_recipe(folder.recipe).classes)
        except ConfigError:
            continue  # `doctor` says so
    return found - {DEFECT_FREE}


def faults(recipe: Recipe, known: Collection[str]) -> list[str]:
    """A sentence for each label of a recipe that no model knows; none where there is no model to compare with."""
    return [
        f"no model knows the label {label!r}, {_near(label, known)}"
        for label in dict.fromkeys((*recipe.classes, *recipe.unknown.class_confidence))
        if known and label not in known
    ]


def check(site: Site, label: str | None) -> None:
    """Refuse a label that no model and no class table of the site knows; None, which is no label, passes.

    Raises:
        ConfigError: it names the nearest.
    """
    known = of_site(site)
    if label is not None and label not in known:
        raise ConfigError(
            f"no model and no class table knows the label {label!r}, {_near(label, known)}; --new takes it as it is"
        )


def _near(label: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(label.lower(), sorted(known), n=3, cutoff=0.5)
    return f"the nearest are {', '.join(near)}" if near else f"there are {', '.join(sorted(known)) or 'none'}"
