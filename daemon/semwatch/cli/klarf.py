"""`semwatch klarf`: look into KLARF files, check, compare and convert them. None is ever changed in place."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from semwatch import klarf
from semwatch.cli.options import EPILOG, JsonOption, counted, say, show_table
from semwatch.errors import ConfigError
from semwatch.klarf import Document, KlarfError
from semwatch.klarf.check import check as problems_of
from semwatch.klarf.convert import convert as converted
from semwatch.klarf.diff import diff as differences
from semwatch.klarf.views import Defect, Lot, Wafer
from semwatch.system import files

app = typer.Typer(no_args_is_help=True, help="KLARF files: look, check, compare, convert. None is changed in place.")

FileArgument = Annotated[Path, typer.Argument(help="A KLARF 1.1, 1.2 or 1.8.", exists=True, dir_okay=False)]


@app.command(epilog=EPILOG)
def show(
    file: FileArgument,
    n: Annotated[int, typer.Option("--defects", "-n", min=0, help="Most defects of a wafer to show.")] = 10,
    as_json: JsonOption = False,
) -> None:
    """Show lots, wafers, classes and the first defects; lengths in um, whatever the file counts in."""
    document = _read(file)
    if as_json:
        lots = [_lot(lot, n) for lot in document.lots]
        typer.echo(json.dumps({"version": document.version, "is_complete": document.is_complete, "lots": lots}))
        return
    say(f": KLARF {document.version}{'' if document.is_complete else ', without EndOfFile'}", (file.name, "green"))
    for lot in document.lots:
        say(
            f"lot {lot.id or '-'}: step {lot.step_id or '-'}, recipe {lot.recipe_id or '-'}, "
            f"{counted(len(lot.classes), 'class', 'classes')}"
        )
        for wafer in lot.wafers:
            orientation = wafer.orientation
            mark = f"{orientation.mark or 'mark'} at {orientation.degrees} degrees"
            say(f"wafer {wafer.id or '-'}: slot {wafer.slot or '-'}, {mark}, {counted(len(wafer.defects), 'defect')}")
            _show_defects(wafer, n)


@app.command("check", epilog=EPILOG)
def check(
    paths: Annotated[list[Path], typer.Argument(help="KLARF files.", exists=True, dir_okay=False)],
    as_json: JsonOption = False,
) -> None:
    """Check files: what cannot be read, and what can and is wrong, each with line and column."""
    rows = [row for path in paths for row in _problems(path)]
    has_errors = any(row["level"] == "error" for row in rows)
    if as_json:
        typer.echo(json.dumps({"ok": not has_errors, "problems": rows}))
    else:
        for row in rows:
            place = "" if row["line"] is None else f":{row['line']}:{row['column']}"
            say(f" {row['file']}{place}: {row['text']}", (row["level"], "red" if row["level"] == "error" else "yellow"))
        if not rows:
            say(f" {counted(len(paths), 'file')}", ("ok", "green"))
    if has_errors:
        raise typer.Exit(1)


@app.command("diff", epilog=EPILOG)
def diff(old: FileArgument, new: FileArgument, as_json: JsonOption = False) -> None:
    """Say what differs in fields, classes and defects; spacing does not count. Exit code 1 where something does."""
    before, after = _read(old), _read(new)
    try:
        found = list(differences(before, after))
    except KlarfError as error:
        raise KlarfError(f"{old}, {new}: {error}") from error
    if as_json:
        typer.echo(json.dumps([one._asdict() for one in found]))
    elif not found:
        say(": " + ("byte for byte" if bytes(before) == bytes(after) else "but for spacing"), ("the same", "green"))
    else:
        show_table(("where", "what", "old", "new"), [["-" if text is None else text for text in one] for one in found])
    if found:
        raise typer.Exit(1)


@app.command("convert", epilog=EPILOG)
def convert(
    file: FileArgument,
    to: Annotated[Literal["1.2", "1.8"], typer.Option(help="The version to convert to.")],
    target: Annotated[Path, typer.Option("--out", help="The new file; one that is there is left alone.")],
    as_json: JsonOption = False,
) -> None:
    """Convert 1.1 or 1.2 to 1.8, or 1.8 to 1.2, and list what the other version cannot hold."""
    if target.exists() or not target.parent.is_dir():
        raise ConfigError(f"{target} is there already, or its folder is not; name a new file in a folder that is there")
    document = _read(file)
    try:
        made, notes = converted(document, to)
    except KlarfError as error:
        raise KlarfError(f"{file}: {error}") from error
    try:
        files.write_whole(target, bytes(made))
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror}") from error
    rows = [{"kind": kind, **_place(place), "text": text} for kind, place, text in notes]
    if as_json:
        typer.echo(json.dumps({"out": str(target), "version": made.version, "notes": rows}))
        return
    for kind, place, text in notes:
        say(f": {'' if place is None else f'line {place.line}: '}{text}", (kind, "red" if kind == "lost" else "yellow"))
    say(f": KLARF {made.version}", (str(target), "green"))


def _read(path: Path) -> Document:
    try:
        return klarf.read(path)
    except KlarfError as error:
        raise KlarfError(f"{path}: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error


def _problems(path: Path) -> list[dict[str, Any]]:
    try:
        found = problems_of(klarf.read(path))
    except KlarfError as error:
        return [{"file": str(path), "level": "error", **_place(error.place), "text": error.reason}]
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    return [{"file": str(path), "level": level, **_place(place), "text": text} for level, place, text in found]


def _place(place: klarf.Place | None) -> dict[str, int | None]:
    return {"line": None, "column": None} if place is None else place._asdict()


def _lot(lot: Lot, n: int) -> dict[str, Any]:
    return {
        "id": lot.id,
        "step_id": lot.step_id,
        "device_id": lot.device_id,
        "recipe_id": lot.recipe_id,
        "inspected": lot.inspected,
        "classes": [dataclasses.asdict(one) for one in lot.classes.values()],
        "wafers": [_wafer(wafer, n) for wafer in lot.wafers],
    }


def _wafer(wafer: Wafer, n: int) -> dict[str, Any]:
    return {
        "id": wafer.id,
        "slot": wafer.slot,
        "die_pitch_um": wafer.die_pitch,
        "center_um": wafer.center,
        "diameter_um": wafer.diameter_um,
        "orientation": dataclasses.asdict(wafer.orientation),
        "n_dies": len(wafer.dies),
        "n_defects": len(wafer.defects),
        "columns": wafer.defects.columns,
        "defects": [_defect(defect) for defect in wafer.defects[:n]],
    }


def _defect(defect: Defect) -> dict[str, Any]:
    die = defect.die
    return {
        "id": defect.id,
        "class_number": defect.class_number,
        "die": None if die is None else (die.x_index, die.y_index),
        "in_die_um": defect.in_die,
        "on_wafer_um": defect.on_wafer,
        "size_um": defect.size,
        "images": [dataclasses.asdict(image) | {"page": image.page} for image in defect.images],
    }


def _show_defects(wafer: Wafer, n: int) -> None:
    if not n or not len(wafer.defects):
        return
    rows = []
    for defect in wafer.defects[:n]:
        die, place, number = defect.die, defect.on_wafer, defect.class_number
        known = None if number is None else wafer.classes.get(number)
        cells = (
            str(defect.id),
            "-" if number is None else f"{number} {known.name}" if known else str(number),
            "-" if die is None else f"{die.x_index} {die.y_index}",
            "-" if place is None else f"{place.x_um:.3f} {place.y_um:.3f}",
            ", ".join(f"{image.file or '-'} page {image.page}" for image in defect.images),
        )
        rows.append(cells)
    show_table(("defect", "class", "die", "on wafer, um", "images"), rows)
