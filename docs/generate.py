"""Write the pages that are made from data: settings.md from the settings' own models, figures.md from figures.json.

    python docs/generate.py                           write both pages
    python docs/generate.py --measured ID RESULT      put a new result into figures.json first, with today's date and
                                                      the commit that is checked out; --missed or --reached says how
                                                      it stands to its aim

``tests/test_docs.py`` fails where a page differs from what this script would write.
"""

import argparse
import json
import re
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from semwatch.settings.recipe import Recipe
from semwatch.settings.site import Site

DOCS = Path(__file__).parent
FIGURES = DOCS / "figures.json"
BEFORE = "4b6ac70"
"""The last commit before the rooms; what was measured there was not measured again."""

# --- settings --------------------------------------------------------------------------------------------------------

SETTINGS_HEAD = """\
# Settings

This page is generated from the settings' own descriptions by `python docs/generate.py`; do not edit it.

There are two files, both YAML. The *site* says what a machine watches and where things live. The *recipe* says how the
images of one layer and step are judged; its content is its identity, see [recipe id](glossary.md#recipe-id).
`semwatch install` lays commented examples of both into `/etc/semwatch`.

- A relative path starts at the folder of the file. `~` and `$NAME` are not expanded.
- Write `true` and `false`, not `yes` and `no`.
- A key that is not listed here is refused, with its line and the nearest valid key. `semwatch recipe check RECIPE` and
  `semwatch doctor --site SITE` read the files as the daemon does.
- The daemon reads both files when it starts: restart it after an edit. Results carry the id of the recipe that judged
  them, so a result shows whether an edit had come into use.
- In the tables, `folders[]` stands for each item of the list `folders`, and `classes.LABEL` for each label.
"""


def settings_page() -> str:
    """The page of all keys of site and recipe."""
    parts = [SETTINGS_HEAD]
    for title, model in (("Site", Site), ("Recipe", Recipe)):
        schema = model.model_json_schema()
        parts += [f"\n## {title}\n\n{schema['description']}\n", _rows_as_table(_top_rows(schema))]
        for key, field in schema["properties"].items():
            if nested := _nested(field, schema):
                heading, below = nested
                rows = list(_setting_rows(below, schema, key + heading))
                parts += [f"\n### {title.lower()}: {key}\n\n{below['description']}\n", _rows_as_table(rows)]
    return _page(parts)


def _top_rows(schema: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    rows = []
    for key, field in schema["properties"].items():
        if nested := _nested(field, schema):
            what = {"[]": "list of sections", ".LABEL": "table of sections", "": "section"}[nested[0]]
            default = "required" if key in schema.get("required", ()) else "see below"
            if "null" in str(field.get("anyOf")):
                default = "null"
            meaning = field.get("description") or nested[1]["description"]
            rows.append((f"[`{key}`](#{schema['title'].lower()}-{key})", what, default, meaning))
        else:
            rows.append(_setting_row(key, field, key in schema.get("required", ())))
    return rows


def _setting_rows(section: dict[str, Any], schema: dict[str, Any], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    for key, field in section["properties"].items():
        if nested := _nested(field, schema):
            yield from _setting_rows(nested[1], schema, f"{prefix}.{key}{nested[0]}")
        else:
            yield _setting_row(f"{prefix}.{key}", field, key in section.get("required", ()))


def _setting_row(name: str, field: dict[str, Any], is_required: bool) -> tuple[str, str, str, str]:
    absent: object = {} if _values(field) is not None else None
    default = "required" if is_required else f"`{_as_yaml(field.get('default', absent))}`"
    return f"`{name}`", _type(field), default, field.get("description", "")


def _nested(field: dict[str, Any], schema: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Where a key holds settings of its own: how its items are written, and what they hold."""
    for candidate in (field, *field.get("anyOf", ())):
        for suffix, of in (("", candidate), ("[]", candidate.get("items")), (".LABEL", _values(candidate))):
            if isinstance(of, dict) and "$ref" in of:
                return suffix, schema["$defs"][of["$ref"].rpartition("/")[2]]
    return None


def _values(field: dict[str, Any]) -> dict[str, Any] | None:
    values = field.get("additionalProperties")
    return values if isinstance(values, dict) else None


def _type(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_type(one) for one in field["anyOf"])
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if field["type"] == "array":
        if "prefixItems" in field:
            return f"list of {len(field['prefixItems'])}: {_type(field['prefixItems'][0])}"
        return f"list: {_type(field['items'])}"
    if (values := _values(field)) is not None:
        return f"by label: {_type(values)}"
    words = {"integer": "whole number", "number": "number", "boolean": "true or false", "null": "null"}
    text = "path" if field.get("format") == "path" else words.get(field["type"], "text")
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = " and ".join(f"{sign} {field[key]:g}" for key, sign in signs.items() if key in field)
    return f"{text} {bounds}".strip()


def _as_yaml(value: object) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).strip()
    return text.removesuffix("...").strip()


# --- figures ---------------------------------------------------------------------------------------------------------

FIGURES_HEAD = f"""\
# Figures

This page is generated from `docs/figures.json` by `python docs/generate.py`; do not edit it. A benchmark prints what it
measures; `python docs/generate.py --measured ID RESULT` puts the result beside the command, the day and the commit.

Figures were measured on two processor cores without a GPU unless a row says otherwise. Machines differ: each figure
comes with the command that prints it. An aim that was missed says so. Commit `{BEFORE}` is the last one before the code
was put into rooms: what it stands beside was measured at that commit or an earlier one, and not measured again since.
`make bench` runs every benchmark.
"""


def figures_page() -> str:
    """The page of all measured figures."""
    parts = [FIGURES_HEAD]
    for group in json.loads(FIGURES.read_text())["groups"]:
        parts.append(f"\n## {group['title']}\n")
        if group["note"]:
            parts.append(f"{group['note']}\n")
        parts += ["| what | result | aim | command | measured | id |", "|---|---|---|---|---|---|"]
        parts += [_figure_row(figure) for figure in group["figures"]]
    return _page(parts)


def _figure_row(figure: dict[str, Any]) -> str:
    verdict = {True: ": reached", False: ": **missed**", None: ""}[figure["reached"]]
    aim = f"{figure['aim']}{verdict}" if figure["aim"] else ""
    when = f"{figure['date']}, `{figure['commit']}`"
    command = _cell(figure["command"])
    if figure["source"] and figure["source"] not in figure["command"]:
        command += f" ([source](../{figure['source']}))"
    return (
        f"| {_cell(figure['name'])} | {_cell(figure['result'])} | {_cell(aim)} | {command} | {when} | {figure['id']} |"
    )


def measured(figure_id: str, result: str, *, reached: bool | None) -> None:
    """Put a new result into figures.json.

    Raises:
        SystemExit: there is no figure of this id.
    """
    data = json.loads(FIGURES.read_text())
    figure = next((f for group in data["groups"] for f in group["figures"] if f["id"] == figure_id), None)
    if figure is None:
        raise SystemExit(f"no figure {figure_id} in {FIGURES}; add an entry with that id first")
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=DOCS, check=True, capture_output=True, text=True)
    figure |= {"result": result, "date": datetime.now(UTC).date().isoformat(), "commit": head.stdout.strip()}
    if reached is not None:
        figure["reached"] = reached
    FIGURES.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


# --- both ------------------------------------------------------------------------------------------------------------


def _rows_as_table(rows: list[tuple[str, str, str, str]]) -> str:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    lines += [_table_row(*map(_cell, row)) for row in rows]
    return "\n".join(lines) + "\n"


def _table_row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _page(parts: list[str]) -> str:
    """Join the parts of a page with one blank line at most between them."""
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).strip() + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


PAGES = {DOCS / "settings.md": settings_page, DOCS / "figures.md": figures_page}
"""Every generated page, and what makes it."""


def main() -> None:
    """Write the pages."""
    parser = argparse.ArgumentParser(description="Write the generated pages of the documentation.")
    parser.add_argument("--measured", nargs=2, metavar=("ID", "RESULT"), help="a figure that was measured anew")
    parser.add_argument("--reached", action="store_const", const=True, default=None, help="the aim is reached")
    parser.add_argument("--missed", action="store_const", const=False, dest="reached", help="the aim is missed")
    given = parser.parse_args()
    if given.measured:
        measured(*given.measured, reached=given.reached)
    for page, make in PAGES.items():
        page.write_text(make())


if __name__ == "__main__":
    main()
