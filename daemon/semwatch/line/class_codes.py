"""The fab's class codes of verdicts: defined once, for the first review and for every later one."""

from collections.abc import Mapping
from typing import TypedDict

from semwatch.settings.recipe import Recipe


class ClassCodes(TypedDict):
    """The fab's class codes, as ``results.write`` takes them."""

    class_codes: Mapping[str, int]
    unknown_code: int | None
    non_decidable_code: int | None


def class_codes(recipe: Recipe, named: Mapping[str, int]) -> ClassCodes:
    """The class codes of a recipe, and of classes that people ``named`` where the recipe has none."""
    return {
        "class_codes": {**named, **{label: known.code for label, known in recipe.classes.items()}},
        "unknown_code": recipe.unknown_code,
        "non_decidable_code": recipe.non_decidable_code,
    }
