"""Identifiers of the product are terms of the field: none holds one of the metaphors that earlier releases used."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(file for part in ("daemon", "training") for file in (ROOT / part).rglob("*.py"))
BANNED = {
    *(
        "account",
        "fate",
        "fates",
        "living",
        "obey",
        "obeyed",
        "obeys",
        "said",
        "sighting",
        "sightings",
        "speak",
        "speaks",
    ),
    *("spoken", "standing", "talked", "tell", "tells", "told", "who", "whom", "whose"),
}
PHRASES = ("on_record",)


def identifiers(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of all that a source defines or imports; attributes of foreign objects are not its own."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield node.lineno, name
            case ast.arg(arg=name) | ast.Name(id=name):
                yield node.lineno, name
            case ast.Attribute(attr=name, ctx=ast.Store()):
                yield node.lineno, name
            case ast.keyword(arg=str(name)):
                yield node.value.lineno, name
            case ast.alias(name=name, asname=asname):
                yield node.lineno, asname or name
            case ast.ImportFrom(module=str(name)):
                yield node.lineno, name


def banned_words(name: str) -> set[str]:
    """The banned words among the parts of a name in snake_case, CamelCase or CAPITALS."""
    parts = {part.lower() for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}
    return (parts & BANNED) | {phrase for phrase in PHRASES if phrase in name}


def test_product_has_sources_in_both_packages() -> None:
    assert {"semwatch", "semwatch_training"} <= {file.relative_to(ROOT).parts[1] for file in SOURCES}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def tell(x): pass", {"tell"}),
        ("class Standing: pass", {"standing"}),
        ("_told = 1", {"told"}),
        ("OBEYED = 1", {"obeyed"}),
        ("def f(who_answers): pass", {"who"}),
        ("self.is_told = 1", {"told"}),
        ("f(said=1)", {"said"}),
        ("from semwatch_training.learning.on_record import put", {"on_record"}),
        ("import x as fates", {"fates"}),
        ("position = file.tell()", set()),  # the standard library's
        ("whole = understanding = accounted = 1", set()),
    ],
)
def test_banned_word_is_found_in_every_kind_of_name(source: str, found: set[str]) -> None:
    assert {word for _, name in identifiers(source) for word in banned_words(name)} == found


def test_no_identifier_of_the_product_holds_a_banned_word() -> None:
    faults = [
        f"{file.relative_to(ROOT)}:{line}: {name}"
        for file in SOURCES
        for line, name in identifiers(file.read_text())
        if banned_words(name)
    ]
    faults += [str(file.relative_to(ROOT)) for file in SOURCES if banned_words(file.stem)]
    assert not faults, "\n".join(faults)
