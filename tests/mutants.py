"""Change one thing at a time in the rooms whose faults cost results, and see whether a test falls.

    python tests/mutants.py                       150 mutants, the same ones each time
    python tests/mutants.py --sample 40 --seed 1 --only store/audit.py

Each mutant is one change to one module, in a copy of the tree; the tests mapped to the module run, then those of its
room, until one falls. A mutant that no test notices survives, and is named. Operators:

    compare     < to <=, == to !=, in to not in, ...     negate      a condition turned round
    and-or      `and` for `or`, `or` for `and`           constant    a number one larger, True for False
    call        a call for its effect left out           return      None for what is returned
    raise       a refusal left out

Left alone: what is written to the log, annotations, docstrings, numbers that stand outside of functions.
"""

import argparse
import ast
import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path("daemon/semwatch")
ROOMS = ("store", "streams", "line", "intake")
ALSO = (
    "system/files.py",
    "system/sqlite_file.py",
    *(f"service/{name}.py" for name in ("lot_tables", "forgetting", "faults", "late_look", "duplicates")),
)
"""What stood in these rooms, or stands on their behalf."""
TESTS: dict[str, tuple[str, ...]] = {
    "store/audit.py": ("store/test_audit.py",),
    "store/ledger.py": ("store/test_ledger.py",),
    "store/unknown_features.py": ("store/test_ledger.py", "service/test_rereview.py"),
    "store/lot_rows.py": ("service/test_lot_tables.py",),
    "store/lot_table.py": ("store/test_lot_table.py",),
    "store/overlay.py": ("store/test_overlay.py",),
    "store/results.py": ("store/test_results.py",),
    "store/review_record.py": ("store/test_results.py",),
    "store/serving.py": ("service/test_models_in_service.py", "cli/test_model_commands.py"),
    "streams/embedded_redis.py": ("streams/test_embedded_redis.py",),
    "streams/handoff.py": ("streams/test_handoff.py",),
    "streams/queues.py": ("cli/test_queue_commands.py",),
    "line/binarization.py": ("line/test_binarization.py",),
    "line/classification.py": ("line/test_classification.py",),
    "line/detection.py": ("line/test_detection.py",),
    "line/notices.py": ("line/test_notices.py",),
    "line/pipeline.py": ("line/test_pipeline.py",),
    **dict.fromkeys(("line/reference.py", "line/registration.py", "line/difference.py"), ("line/test_reference.py",)),
    "intake/drop_folder.py": ("intake/test_incoming.py",),
    "intake/folder_rules.py": ("intake/test_incoming.py",),
    "intake/folder_scan.py": ("intake/test_folder_scan.py",),
    "intake/waiting.py": ("intake/test_waiting.py",),
    "intake/watch.py": ("intake/test_incoming.py",),
    "intake/decoding.py": ("intake/test_micrograph.py",),
    "intake/decoders.py": ("intake/test_decoders.py",),
    "intake/jpeg.py": ("intake/test_micrograph.py",),
    "intake/page.py": ("intake/test_micrograph.py",),
    "intake/tiff.py": ("intake/test_micrograph.py",),
    "intake/vendor_tags.py": ("intake/test_micrograph.py",),
    "intake/info_bar.py": ("intake/test_micrograph.py",),
    "system/files.py": ("system/test_files.py", "system/test_order_of_writes.py"),
    "system/sqlite_file.py": ("system/test_sqlite_file.py",),
    "service/faults.py": ("service/test_faults.py",),
    "service/late_look.py": ("service/test_faults.py",),
    "service/duplicates.py": ("service/test_faults.py",),
    "service/lot_tables.py": ("service/test_lot_tables.py",),
    "service/forgetting.py": ("service/test_forgetting.py",),
}
"""The tests that speak of a module, in tests/; those of its room follow."""
AIM = 0.9
_NOTHING_SELECTED = 5
_FLIPPED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change: the ``index``-th that a module offers."""

    module: str
    index: int
    line: int
    operator: str
    before: str
    after: str


class Mutator(ast.NodeTransformer):
    """Offers every change of a module, in the order of its text; makes one of them, or none."""

    def __init__(self, target: int = -1) -> None:
        self.offered: list[tuple[int, str, str, str]] = []
        self._target, self._depth = target, 0

    def _offer(self, node: Any, operator: str, changed: Callable[[Any], ast.AST]) -> Any:
        mutant = changed(copy.deepcopy(node))
        ast.copy_location(mutant, node)
        self.offered.append((node.lineno, operator, ast.unparse(node), ast.unparse(mutant)))
        return mutant if len(self.offered) - 1 == self._target else node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self._depth += 1
        node.args.defaults = [self.visit(value) for value in node.args.defaults]
        node.args.kw_defaults = [value and self.visit(value) for value in node.args.kw_defaults]
        node.body = [self.visit(statement) for statement in node.body]  # annotations and decorators are left alone
        self._depth -= 1
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.value = node.value and self.visit(node.value)
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)

        def flipped(node: ast.Compare) -> ast.AST:
            node.ops[0] = _FLIPPED[type(node.ops[0])]()
            return node

        return self._offer(node, "compare", flipped)

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        self.generic_visit(node)

        def swapped(node: ast.BoolOp) -> ast.AST:
            node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
            return node

        return self._offer(node, "and-or", swapped)

    def _negated(self, node: ast.expr) -> ast.expr:
        return self._offer(node, "negate", lambda test: ast.UnaryOp(ast.Not(), test))

    def visit_If(self, node: ast.If) -> ast.AST:
        self.generic_visit(node)
        node.test = self._negated(node.test)
        return node

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        self.generic_visit(node)
        node.test = self._negated(node.test)
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if not self._depth or type(node.value) not in (bool, int, float):
            return node
        value = not node.value if isinstance(node.value, bool) else node.value + 1
        return self._offer(node, "constant", lambda _: ast.Constant(value))

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        if ast.unparse(node).startswith(("log.", "logger.")):
            return node
        self.generic_visit(node)
        return self._offer(node, "call", lambda _: ast.Pass()) if isinstance(node.value, ast.Call) else node

    def visit_Return(self, node: ast.Return) -> ast.AST:
        self.generic_visit(node)
        if node.value is None or (isinstance(node.value, ast.Constant) and node.value.value is None):
            return node
        return self._offer(node, "return", lambda _: ast.Return(ast.Constant(None)))

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        self.generic_visit(node)
        return self._offer(node, "raise", lambda _: ast.Pass())


def modules() -> list[str]:
    """The modules that are mutated, relative to the package."""
    found = [path for room in ROOMS for path in sorted((ROOT / PACKAGE / room).glob("*.py"))]
    return [*(str(p.relative_to(ROOT / PACKAGE)) for p in found if p.name != "__init__.py"), *ALSO]


def mutants_of(module: str) -> Iterator[Mutant]:
    """Every mutant of a module."""
    mutator = Mutator()
    mutator.visit(ast.parse((ROOT / PACKAGE / module).read_text()))
    for index, (line, operator, before, after) in enumerate(mutator.offered):
        yield Mutant(module, index, line, operator, before, after)


def mutated(source: str, index: int) -> str:
    """Text of a module with the ``index``-th change that it offers."""
    return ast.unparse(ast.fix_missing_locations(Mutator(index).visit(ast.parse(source))))


def is_killed(mutant: Mutant, tree: Path, timeout_s: float) -> bool:
    """Whether a test of the module, or of its room, falls or hangs."""
    path = tree / PACKAGE / mutant.module
    original = path.read_text()
    path.write_text(mutated(original, mutant.index))
    try:
        return any(_falls(tests, tree, timeout_s) for tests in tests_of(mutant.module) if tests)
    finally:
        path.write_text(original)


def tests_of(module: str) -> tuple[list[str], list[str]]:
    """Tests that speak of a module, and the other ones of its room."""
    room = module.split("/", maxsplit=1)[0]
    own = [f"tests/{name}" for name in TESTS.get(module, ())]
    of_room = sorted((ROOT / "tests" / room).glob("test_*.py")) if room in ROOMS else []
    return own, [name for path in of_room if (name := str(path.relative_to(ROOT))) not in own]


def _falls(tests: Sequence[str], tree: Path, timeout_s: float) -> bool:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", *tests]
    # Bytecode would be told apart by time and size alone, which a mutant may share with the original.
    environ = os.environ | {"PYTHONPATH": f"{tree}/daemon:{tree}/training", "PYTHONDONTWRITEBYTECODE": "1"}
    with subprocess.Popen(
        command, cwd=tree, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as run:
        try:
            return run.wait(timeout_s) not in (0, _NOTHING_SELECTED)
        except subprocess.TimeoutExpired:
            return True
        finally:
            with suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)  # with the servers that a test has started


def copied_tree(folder: Path) -> Path:
    """A tree whose package may be changed; models and caches are those of the checkout."""
    for name in ("daemon", "training", "tests", "systemd", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copyfile(ROOT / name, folder / name)
    for name in ("model_repository", ".cache"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def report(tried: dict[Mutant, bool], seed: int, seconds: float) -> dict[str, object]:
    """What came of a sample: shares, and every survivor by name."""
    rooms, operators = Counter[str](), Counter[str]()
    for mutant, killed in tried.items():
        rooms[mutant.module.split("/", maxsplit=1)[0]] += killed
        operators[mutant.operator] += killed
    n_rooms = Counter(mutant.module.split("/", maxsplit=1)[0] for mutant in tried)
    n_operators = Counter(mutant.operator for mutant in tried)
    n_killed = sum(tried.values())
    return {
        "seed": seed,
        "sampled": len(tried),
        "killed": n_killed,
        "share": round(n_killed / max(len(tried), 1), 3),
        "seconds": round(seconds),
        "by_room": {room: f"{rooms[room]} of {n}" for room, n in sorted(n_rooms.items())},
        "by_operator": {operator: f"{operators[operator]} of {n}" for operator, n in sorted(n_operators.items())},
        "survivors": [
            {key: value for key, value in asdict(mutant).items() if key != "index"}
            for mutant, killed in sorted(tried.items(), key=lambda item: (item[0].module, item[0].line))
            if not killed
        ],
    }


def main() -> int:
    """Try a sample; exit code 1 where fewer than ``AIM`` are killed, 2 where the tests fall anyway."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sample", type=int, default=150, help="mutants to try")
    parser.add_argument("--seed", type=int, default=20260101, help="of the sample")
    parser.add_argument("--only", help="a part of the modules' names")
    parser.add_argument("--timeout-s", type=float, default=240.0, help="after which a run of tests counts as hung")
    parser.add_argument("--out", type=Path, help="JSON of what came out")
    options = parser.parse_args()
    every = [mutant for module in modules() if (options.only or "") in module for mutant in mutants_of(module)]
    sample = random.Random(options.seed).sample(every, min(options.sample, len(every)))
    print(f"{len(sample)} of {len(every)} mutants")
    start, tried = time.monotonic(), dict[Mutant, bool]()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = copied_tree(Path(folder))
        needed = {name for mutant in sample for tests in tests_of(mutant.module) for name in tests}
        if _falls(sorted(needed), tree, 20 * options.timeout_s):
            print("the tests fall without a mutant: mend that first")
            return 2
        for mutant in sample:
            tried[mutant] = is_killed(mutant, tree, options.timeout_s)
            word = "killed  " if tried[mutant] else "SURVIVED"
            change = f"{mutant.before}  ->  {mutant.after}".replace("\n", " ")[:150]
            print(f"{word} {mutant.module}:{mutant.line} {mutant.operator}: {change}", flush=True)
            if options.out:
                made = report(tried, options.seed, time.monotonic() - start)
                options.out.write_text(json.dumps(made, indent=1) + "\n")
    share = sum(tried.values()) / max(len(tried), 1)
    print(f"{share:.1%} of {len(tried)} killed, aim {AIM:.0%}")
    return 0 if share >= AIM else 1


if __name__ == "__main__":
    sys.exit(main())
