import pytest
from pydantic import ValidationError

from semwatch.intake.pairing import partner_of, references_of
from semwatch.settings.recipe import Recipe, Reference

SUFFIXES = (".tif", ".tiff", ".png")


@pytest.mark.parametrize(
    ("pattern", "inspected", "image", "reference"),
    [
        ("*_ref", "*", "lot/a", "lot/a_ref"),
        ("*-reference", "*", "a", "a-reference"),
        ("ref_*", "*", "lot/b.1", "lot/ref_b.1"),
        ("*_reference_image", "*_inspected_image", "case2_inspected_image", "case2_reference_image"),
    ],
)
def test_names_lead_from_image_to_reference_and_back(pattern, inspected, image, reference) -> None:
    rule = Reference(pattern=pattern, inspected=inspected)
    assert references_of(f"{image}.tif", rule, SUFFIXES)[0] == f"{reference}.tif"
    assert partner_of(f"{reference}.tif", rule) == image
    assert partner_of(f"{image}.tif", rule) is None
    assert references_of(f"{reference}.tif", rule, SUFFIXES) == ()


def test_without_a_pattern_no_file_has_or_is_a_reference() -> None:
    assert references_of("a.tif", Reference(), SUFFIXES) == ()
    assert partner_of("a_ref.tif", Reference()) is None


def test_reference_may_have_another_extension_but_that_of_the_image_comes_first() -> None:
    rule = Reference(pattern="*_ref")
    assert references_of("a.png", rule, SUFFIXES) == ("a_ref.png", "a_ref.tif", "a_ref.tiff")
    assert references_of("A.TIF", rule, SUFFIXES)[0] == "A_ref.TIF"


def test_file_that_fits_neither_name_is_reviewed_alone() -> None:
    rule = Reference(pattern="*_reference", inspected="*_inspected")
    assert references_of("other.tif", rule, SUFFIXES) == ()
    assert partner_of("other.tif", rule) is None
    assert partner_of("_reference.tif", rule) is None  # the * stands for something


@pytest.mark.parametrize("pattern", ["ref", "*_*", "sub/*", "*_ref?", ""])
def test_pattern_needs_exactly_one_star_and_no_folder(pattern) -> None:
    with pytest.raises(ValidationError, match="one \\*"):
        Reference(pattern=pattern)


def test_pattern_that_every_image_fits_is_refused() -> None:
    with pytest.raises(ValidationError, match="the same"):
        Reference(pattern="*")


def test_reference_is_part_of_the_identity() -> None:
    assert Recipe(reference=Reference(pattern="*_ref")).id != Recipe().id
