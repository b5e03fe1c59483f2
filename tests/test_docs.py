"""The pages for users: links, size, generated parts, field tables, commands that they name, and readers that run."""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest
import typer

from factories import make_review, make_verdict, messages, result_summary
from semwatch.store import lot_table, review_record
from semwatch.streams import embedded_redis, records, unknowns

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "model_repository" / "README.md",
        ROOT / "training" / "semwatch_training" / "weights" / "MODEL_CARD.md",
        *DOCS.glob("*.md"),
    ]
)
README_BYTES, PICTURE_BYTES = 6_000, 80_000
READ_S = 30.0


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


# --- links -----------------------------------------------------------------------------------------------------------


def without_code(text: str) -> str:
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(page: Path) -> set[str]:
    """What a heading can be linked by, as GitHub makes it."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.M):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        found.add(slug if slug not in found else f"{slug}-1")
    return found


def faulty_links(page: Path) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists():
            yield f"{target}: there is no such file"
        elif anchor and anchor not in anchors(file):
            yield f"{target}: that page has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    assert list(faulty_links(page)) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("# A title: `code`, twice\n")
    page = tmp_path / "a.md"
    page.write_text(
        "[1](b.md) [2](c.md) [3](b.md#a-title-code-twice) [4](b.md#title) [5](#no) `[6](d.md)` [7](https://x/y.md)\n"
        "```\n[8](e.md)\n# no\n```\n"
    )
    assert [fault.split(":")[0] for fault in faulty_links(page)] == ["c.md", "b.md#title", "#no"]


def test_every_page_can_be_reached_from_the_first() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        targets = re.findall(r"\]\(([^)#\s]+)", without_code(page.read_text()))
        waiting += [(page.parent / target).resolve() for target in targets if "://" not in target]
    assert set(PAGES) <= reached


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_of_tests_and_docs_that_a_page_names_are_there(page: Path) -> None:
    named = set(re.findall(r"\b(?:tests|docs)/[\w/.-]*\w\.\w+", page.read_text()))
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_no_page_names_the_former_operations_page() -> None:
    for page in PAGES:
        assert "OPERATIONS.md" not in page.read_text(), page


# --- the tree --------------------------------------------------------------------------------------------------------

PACKAGES = (ROOT / "daemon" / "semwatch", ROOT / "training" / "semwatch_training")


def tree_of_contributing() -> dict[str, set[str]]:
    """Entries of the drawn tree, by the package that they stand under."""
    drawn = (ROOT / "CONTRIBUTING.md").read_text().partition("## The tree")[2].partition("```")[2].partition("```")[0]
    found: dict[str, set[str]] = {}
    for line in drawn.strip().splitlines():
        if not line.startswith(" "):
            top = line.split()[0]
        else:
            found.setdefault(top, set()).add(line.split()[0])
    return found


@pytest.mark.parametrize("package", PACKAGES, ids=name)
def test_drawn_tree_has_every_room_and_no_other(package: Path) -> None:
    drawn = {entry for entry in tree_of_contributing()[f"{name(package)}/"] if entry.endswith("/")}
    rooms = {f"{path.name}/" for path in package.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert drawn == rooms


def test_what_to_open_is_there() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("## To change X")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("|")]
    named = {one for line in rows for one in re.findall(r"`([a-z_]+/[a-z_]*)`", line)}
    assert len(named) > 15
    places = (*PACKAGES, ROOT)
    missing = {one for one in named if not any((p / one).exists() or (p / f"{one}.py").exists() for p in places)}
    assert missing == set()


# --- the first page --------------------------------------------------------------------------------------------------


def test_first_page_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= README_BYTES


def test_first_page_shows_one_small_picture() -> None:
    pictures = re.findall(r"!\[.+?\]\((.+?)\)", (ROOT / "README.md").read_text())
    assert len(pictures) == 1
    content = (ROOT / pictures[0]).read_bytes()
    assert content[:3] == b"\xff\xd8\xff"
    assert len(content) <= PICTURE_BYTES


# --- generated pages -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["settings.md", "figures.md"])
def test_generated_page_is_what_its_script_writes(generator: ModuleType, page: str) -> None:
    assert {path.name for path in generator.PAGES} == {"settings.md", "figures.md"}
    made = generator.PAGES[DOCS / page]()
    assert (DOCS / page).read_text() == made, "run `python docs/generate.py`"


def test_settings_page_has_every_key_with_a_meaning(generator: ModuleType) -> None:
    rows = re.findall(r"^\| (?:\[)?`([\w.\[\]]+)`.*\| (.*) \|$", generator.settings_page(), re.M)
    keys = dict(rows)
    for key in ("folders[].path", "models.triton.url", "redis.prefix", "gate.threshold", "classes.LABEL.code"):
        assert key in keys
    assert [key for key, meaning in keys.items() if not meaning.strip()] == []


def test_every_figure_has_its_command_date_and_commit() -> None:
    figures = [f for group in json.loads((DOCS / "figures.json").read_text())["groups"] for f in group["figures"]]
    keys = {"id", "name", "result", "aim", "reached", "command", "source", "date", "commit"}
    assert len({figure["id"] for figure in figures}) == len(figures)
    for figure in figures:
        assert set(figure) == keys, figure["id"]
        assert all(figure[key] for key in ("id", "name", "result", "command")), figure["id"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", figure["date"]), figure["id"]
        assert re.fullmatch(r"[0-9a-f]{7,40}", figure["commit"]), figure["id"]
        assert (figure["reached"] is None) == (not figure["aim"]), figure["id"]
        assert not figure["source"] or (ROOT / figure["source"]).exists(), figure["id"]


def test_a_figure_measured_anew_has_this_commit(
    generator: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generator, "FIGURES", tmp_path / "figures.json")
    shutil.copy(DOCS / "figures.json", generator.FIGURES)
    generator.measured("rollback", "1.9 s", reached=True)
    (figure,) = (
        f
        for group in json.loads(generator.FIGURES.read_text())["groups"]
        for f in group["figures"]
        if f["id"] == "rollback"
    )
    assert (figure["result"], figure["reached"]) == ("1.9 s", True)
    assert figure["commit"] != generator.BEFORE
    assert "| 1.9 s | 2 s: reached |" in generator.figures_page()
    with pytest.raises(SystemExit, match="no figure nonsense"):
        generator.measured("nonsense", "1", reached=None)


# --- field tables ----------------------------------------------------------------------------------------------------


def field_tables() -> dict[str, list[str]]:
    """First column of every table behind a mark ``<!-- fields: NAME -->``, by name."""
    tables: dict[str, list[str]] = {}
    for page in (DOCS / "results.md", DOCS / "wire.md"):
        for mark, table in re.findall(r"<!-- fields: (\S+) -->\n((?:\|.*\n)+)", page.read_text()):
            assert mark not in tables, mark
            tables[mark] = re.findall(r"^\| `(\w+)` \|", table, re.M)
    return tables


def described() -> dict[str, list[str]]:
    """What the tables must hold: the keys of the published schemas and of the two other files."""
    wanted = {"lot.csv": list(lot_table.LOT_COLUMNS), "reason.json": list(review_record.ReasonRecord.model_fields)}
    wanted["duplicate.json"] = list(review_record.DuplicateRecord.model_fields)
    for path in (ROOT / "daemon").rglob("*.schema.json"):
        schema = json.loads(path.read_text())
        wanted[path.name] = list(schema["properties"])
        for part, of in schema.get("$defs", {}).items():
            wanted[f"{path.name}#{part}"] = list(of["properties"])
    # A doubtful crop is described by what it has beside an unknown.
    del wanted["doubtful.schema.json#Neighbour"]
    wanted["doubtful.schema.json"] = [
        k for k in wanted["doubtful.schema.json"] if k not in wanted["unknown.schema.json"]
    ]
    return wanted


def test_there_is_a_table_for_every_published_object() -> None:
    assert field_tables().keys() == described().keys()
    assert sum(mark.endswith(".schema.json") for mark in described()) == 6


@pytest.mark.parametrize("mark", sorted(described()))
def test_table_has_a_row_for_every_field_and_no_other(mark: str) -> None:
    assert field_tables()[mark] == described()[mark]


def test_shapes_beside_the_repository_are_those_of_the_models(repository: Path) -> None:
    text = (ROOT / "model_repository" / "README.md").read_text()
    for model in ("detector", "encoder", "head"):
        newest = max((repository / model).glob("[0-9]*"), key=lambda folder: int(folder.name))
        meta = json.loads((newest / "meta.json").read_text())
        (row,) = re.findall(rf"^\| `{model}` \| (.*) \| (.*) \|$", text, re.M)
        for cell, tensors in zip(row, (meta["inputs"], meta["outputs"]), strict=True):
            said = {
                tensor: (dtype, [int(side) for side in sides.split(",") if side.strip()])
                for tensor, dtype, sides in re.findall(r"`(\w+)` (\w+) \(([\d, -]*)\)", cell)
            }
            assert said == {tensor: (of["dtype"], of["shape"]) for tensor, of in tensors.items()}, model


def test_label_list_is_that_of_the_shipped_head(repository: Path) -> None:
    text = (DOCS / "results.md").read_text()
    (listed,) = re.findall(r"The labels of the shipped head are (.*?)\.\n", text, re.S)
    meta = json.loads((repository / "head" / "1" / "meta.json").read_text())
    assert re.findall(r"`([\w-]+)`", listed) == meta["labels"]


# --- commands --------------------------------------------------------------------------------------------------------


def command_lines(page: Path) -> Iterator[list[str]]:
    """Words of each command of ours that a page shows, up to the first that is no name of a command."""
    text = page.read_text()
    code = re.findall(r"^```.*?^```", text, re.M | re.S) + re.findall(r"`([^`\n]+)`", without_fences(text))
    for block in code:
        for line in block.splitlines():
            for found in re.finditer(r"(?:^|[\s/(])(semwatch|semwatch-train)((?: [a-z][a-z|-]*)+)(?=[\s`)]|$)", line):
                yield [found[1], *found[2].split()]


def without_fences(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def unknown_words(line: list[str], programs: dict[str, Any]) -> list[str]:
    at = programs[line[0]]
    for word in line[1:]:
        commands = getattr(at, "commands", None)  # of a group alone
        if commands is None:
            return []
        if missing := [one for one in word.split("|") if one not in commands]:
            return missing
        at = commands[word.split("|")[0]]
    return []


@pytest.fixture(scope="module")
def programs() -> dict[str, Any]:
    found = {"semwatch": "semwatch.__main__", "semwatch-train": "semwatch_training.__main__"}
    return {name: typer.main.get_command(importlib.import_module(module).app) for name, module in found.items()}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_that_a_page_shows_exist(page: Path, programs: dict[str, Any]) -> None:
    wrong = [(line, missing) for line in command_lines(page) if (missing := unknown_words(line, programs))]
    assert wrong == []


def test_a_command_that_is_not_there_is_found(tmp_path: Path, programs: dict[str, Any]) -> None:
    page = tmp_path / "a.md"
    page.write_text(
        "`semwatch clusters nme ID`, `semwatch queue stats`\n```\nsemwatch-train evalute k DATA  # c\n```\n"
    )
    assert [unknown_words(line, programs) for line in command_lines(page)] == [["evalute"], ["nme"], []]


# --- readers ---------------------------------------------------------------------------------------------------------


def snippet(language: str, contains: str) -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", (DOCS / "wire.md").read_text(), re.S)
    (found,) = (block for block in blocks if contains in block)
    return str(found)


def at_address(code: str, url: str) -> str:
    here, n = re.subn(r"redis://127\.0\.0\.1:6379/0", url, code)
    assert n == 1
    return here


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1"}


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[Any]:
    with embedded_redis.EmbeddedRedis(tmp_path / "redis") as running:
        yield running


@pytest.fixture
def client(redis_server: Any) -> Iterator[Any]:
    with unknowns.connect(redis_server.url) as made:
        yield made


def review(seed: int) -> Any:
    kinds = [make_verdict("unknown"), make_verdict("non-decidable"), make_verdict("known")]
    return make_review(3, verdicts=kinds, seed=seed, path=f"lot7/{seed}.tif")


def publish(client: Any, seed: int) -> None:
    unknowns.Publisher(client).publish(messages(review(seed)))


class Reader:
    """A reader of the page as a process of its own."""

    def __init__(self, *command: str, cwd: Path) -> None:
        self._process = subprocess.Popen(
            command, cwd=cwd, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def lines(self, n: int) -> list[str]:
        """The next ``n`` lines that it prints; fewer where it ends before."""
        assert self._process.stdout is not None
        signal.signal(signal.SIGALRM, _too_long)
        signal.setitimer(signal.ITIMER_REAL, READ_S)
        try:
            return [line.strip() for _ in range(n) if (line := self._process.stdout.readline())]
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def _too_long(*_: object) -> None:
    raise TimeoutError(f"the reader printed nothing for {READ_S:g} s")


def n_pending(client: Any, stream: str, group: str) -> int:
    return next(int(g["pending"]) for g in client.xinfo_groups(stream) if g["name"] == group.encode())


def wait_until_acknowledged(client: Any, group: str) -> None:
    for _ in range(100):
        if not sum(n_pending(client, f"semwatch:{stream}", group) for stream in ("unknowns", "results")):
            return
        time.sleep(0.05)
    raise AssertionError("the reader does not acknowledge")


def test_python_reader_reads_both_streams_and_takes_nothing_from_learning(
    redis_server: Any, client: Any, tmp_path: Path
) -> None:
    code = at_address(snippet("python", "xreadgroup"), redis_server.url)
    publish(client, 1)  # before it has ever run
    with Reader(sys.executable, "-W", "error", "-c", code, cwd=tmp_path) as reader:
        first = reader.lines(3)
        publish(client, 2)  # while it waits
        second = reader.lines(3)
        wait_until_acknowledged(client, "yield-station")
    for seed, said in ((1, first), (2, second)):
        assert sorted(line.split()[:2] for line in said if "near" in line) == [
            [f"lot7/{seed}.tif", "non-decidable"],
            [f"lot7/{seed}.tif", "unknown"],
        ]
        assert sum("revision 1" in line and "'known': 1" in line for line in said) == 1
    learner = unknowns.Consumer(client, records.UNKNOWNS, records.decode, name="learning")
    assert len(learner.claim(10, min_idle_s=1)) == 4


def test_python_reader_goes_on_after_its_own_end_and_after_that_of_redis(
    redis_server: Any, client: Any, tmp_path: Path
) -> None:
    code = at_address(snippet("python", "xreadgroup"), redis_server.url)
    publish(client, 1)
    with Reader(sys.executable, "-W", "error", "-c", code, cwd=tmp_path) as reader:
        assert len(reader.lines(3)) == 3
        wait_until_acknowledged(client, "yield-station")
    # Handed to it before it was killed, and one of them deleted by learning before it came back.
    publish(client, 2)
    handed = client.xreadgroup("yield-station", "station-1", {"semwatch:unknowns": ">"})[0][1]
    client.xdel("semwatch:unknowns", handed[0][0])
    with Reader(sys.executable, "-W", "error", "-c", code, cwd=tmp_path) as reader:
        assert [line.split()[0] for line in reader.lines(2)] == ["lot7/2.tif"] * 2
        redis_server.stop()
        redis_server.start()
        publish(client, 3)
        assert [line.split()[0] for line in reader.lines(3)] == ["lot7/3.tif"] * 3


def test_python_reader_decodes_what_was_encoded(tmp_path: Path) -> None:
    code = snippet("python", "xreadgroup").partition("client = ")[0]  # its functions, without the loop
    page: dict[str, Any] = {}
    exec(compile(code, "wire.md", "exec"), page)
    (record, _) = records.records(review(1))
    read = page["unknown"](records.encode(record))
    assert (read["id"], read["path"], read["kind"]) == (record.id, record.path, "unknown")
    assert np.array_equal(read["features"], record.features)
    assert np.array_equal(read["soft_mask"], record.soft_mask)
    crop = cv2.imdecode(np.frombuffer(read["crop_png"], np.uint8), cv2.IMREAD_UNCHANGED)
    assert crop.shape == record.crop.shape
    assert np.array_equal(crop, record.crop)
    summary = page["summary"](result_summary(review(1)))
    assert summary["n_by_kind"] == {"unknown": 1, "non-decidable": 1, "known": 1}


def test_entries_have_the_fields_that_the_page_names() -> None:
    section = (DOCS / "wire.md").read_text().partition("## Fields of an entry")[2].partition("###")[0]
    rows = re.findall(r"^\| `(\w+)` \|.*\| (both|unknowns) \|$", section, re.M)
    (record, _) = records.records(review(1))
    assert [field.encode() for field, _ in rows] == list(records.encode(record))
    assert [field.encode() for field, of in rows if of == "both"] == list(result_summary(review(1)))


def test_consumer_of_our_own_library_reads_both_streams_and_takes_nothing_from_learning(
    redis_server: Any, client: Any, tmp_path: Path
) -> None:
    code = at_address(snippet("python", "unknowns.Consumer("), redis_server.url)
    publish(client, 1)
    with Reader(sys.executable, "-W", "error", "-c", code, cwd=tmp_path) as reader:
        first = reader.lines(3)
        publish(client, 2)
        second = reader.lines(3)
        wait_until_acknowledged(client, "my-station")
        redis_server.stop()
        redis_server.start()
        publish(client, 3)
        third = reader.lines(3)
    for seed, said in ((1, first), (2, second), (3, third)):
        words = sorted(line.split()[1] for line in said)
        assert {line.split()[0] for line in said} == {f"lot7/{seed}.tif"}
        assert words == sorted(["unknown", "non-decidable", words[-1] if words[-1][0] == "{" else words[0]])
    learner = unknowns.Consumer(client, records.UNKNOWNS, records.decode, name="learning")
    assert len(learner.claim(10, min_idle_s=1)) == 6
    assert client.xlen("semwatch:results") == 3


@pytest.mark.skipif(
    shutil.which("node") is None or not os.environ.get("SEMWATCH_NODE_MODULES"),
    reason="needs node, and a folder node_modules with the package redis in SEMWATCH_NODE_MODULES",
)
def test_javascript_reader_reads_both_streams(redis_server: Any, client: Any, tmp_path: Path) -> None:
    (tmp_path / "node_modules").symlink_to(os.environ["SEMWATCH_NODE_MODULES"])
    (tmp_path / "reader.mjs").write_text(at_address(snippet("javascript", "XREADGROUP"), redis_server.url))
    publish(client, 1)
    with Reader("node", "reader.mjs", cwd=tmp_path) as reader:
        said = reader.lines(3)
        wait_until_acknowledged(client, "yield-station")
    assert sorted(line.split()[0] for line in said) == ["lot7/1.tif"] * 3
    assert client.xlen("semwatch:unknowns") == 2
