"""The mutants: each is one change that matters, made where it says, and left alone is what it says it leaves alone."""

import ast
import importlib.util
from types import ModuleType

import pytest

from paths import ROOT

SOURCE = '''"""A module."""
LIMIT = 3

class Thing:
    n: int = 4

    def first(self, found: "list[int]", least: int = 2) -> int | None:
        """Find one."""
        log.info("looking at %d", 7)
        if not found or least < 0 and self.n:
            raise ValueError("none")
        found.sort()
        for one in found:
            if one == least:
                return one if one is not self else -one
        return None
'''


@pytest.fixture(scope="module")
def mutants() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "tests/mutants.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def changes(mutants: ModuleType) -> list[tuple[int, str, str, str]]:
    mutator = mutants.Mutator()
    mutator.visit(ast.parse(SOURCE))
    return mutator.offered


def test_every_operator_is_offered_at_its_line(mutants: ModuleType) -> None:
    offered = [(line, operator, after) for line, operator, _, after in changes(mutants)]
    for expected in [
        (7, "constant", "3"),
        (10, "compare", "least <= 0"),
        (10, "and-or", "least < 0 or self.n"),
        (10, "and-or", "not found and (least < 0 and self.n)"),
        (10, "negate", "not (not found or (least < 0 and self.n))"),
        (11, "raise", "pass"),
        (12, "call", "pass"),
        (14, "compare", "one != least"),
        (15, "return", "return None"),
        (15, "compare", "one is self"),
    ]:
        assert expected in offered


def test_logging_annotations_and_numbers_outside_functions_are_left_alone(mutants: ModuleType) -> None:
    lines = {line for line, *_ in changes(mutants)}
    assert not lines & {1, 2, 5, 8, 9, 16}


def test_each_mutant_differs_from_the_module_in_one_place(mutants: ModuleType) -> None:
    plain = ast.unparse(ast.parse(SOURCE)).splitlines()
    sources = [mutants.mutated(SOURCE, index) for index in range(len(changes(mutants)))]
    assert len(set(sources)) == len(sources)
    for source in sources:
        compile(source, "mutant", "exec")
        changed = [(a, b) for a, b in zip(plain, source.splitlines(), strict=True) if a != b]
        assert len(changed) == 1, changed


def test_tests_that_a_module_is_mapped_to_are_there(mutants: ModuleType) -> None:
    assert set(mutants.TESTS) <= set(mutants.modules())
    for module in mutants.modules():
        own, rest = mutants.tests_of(module)
        assert own or rest, module
        assert all((ROOT / name).is_file() for name in [*own, *rest])
