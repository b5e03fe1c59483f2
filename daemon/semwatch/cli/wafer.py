"""`semwatch wafer`: the wafers of KLARF files: repeaters, scratches, clusters, maps."""

import json
from pathlib import Path
from typing import Annotated

import typer

from semwatch.cli.options import JsonOption, counted, say, show_table
from semwatch.errors import ConfigError
from semwatch.operations import wafers
from semwatch.operations.wafers import WaferReport
from semwatch.settings.site import load_site
from semwatch.wafer.drawing import labelled
from semwatch.wafer.signatures import Signature


def wafer(
    paths: Annotated[
        list[Path], typer.Argument(metavar="KLARF|FOLDER|LOT...", help="KLARFs, folders of some, lots of a site.")
    ],
    site: Annotated[
        Path | None, typer.Option(envvar="SEMWATCH_SITE", help="Site settings, for lots by their name or LotID.")
    ] = None,
    folder: Annotated[Path, typer.Option("--out", file_okay=False, help="Where pictures go.")] = Path(),
    svg: Annotated[bool, typer.Option("--svg", help="Draw a wafer map of each wafer as SVG.")] = False,
    png: Annotated[bool, typer.Option("--png", help="The same as PNG.")] = False,
    stack: Annotated[
        bool, typer.Option("--stack", help="Also draw all dies upon each other; SVG if not --png.")
    ] = False,
    g85: Annotated[Path | None, typer.Option(dir_okay=False, help="Write the dies with defects as SEMI G85.")] = None,
    e142: Annotated[Path | None, typer.Option(dir_okay=False, help="The same as SEMI E142.1.")] = None,
    tolerance: Annotated[float, typer.Option(min=0.001, help="Repeaters: how far off, um.")] = 2.0,
    edge_exclusion: Annotated[float, typer.Option(min=0, help="Ring without inspection at the edge, mm.")] = 3.0,
    class_column: Annotated[str, typer.Option(help="Column that holds the classes.")] = "CLASSNUMBER",
    as_json: JsonOption = False,
) -> None:
    """Find repeaters, scratches and clusters from coordinates alone, and draw or export the wafer.

    Nothing is called that random defects would make more than once on a hundred wafers.
    """
    maps = wafers.read_maps(
        _files(paths, site), edge_exclusion_um=edge_exclusion * 1000, class_column=class_column.upper()
    )
    reports = wafers.report(maps, tolerance_um=tolerance)
    formats = [name for name, is_asked in (("svg", svg or (stack and not png)), ("png", png)) if is_asked]
    written = wafers.write_pictures(reports, folder, formats=formats, has_stack=stack, tolerance_um=tolerance)
    wafers.write_die_maps(reports, g85=g85, e142=e142)
    written += [path for path in (g85, e142) if path is not None]
    if as_json:
        typer.echo(json.dumps({"wafers": [one.as_dict() for one in reports], "written": list(map(str, written))}))
        return
    for one in reports:
        _show(one)
    for path in written:
        say(f" {path}", ("wrote", "green"))


def _files(paths: list[Path], site: Path | None) -> list[Path]:
    """What to read: what is there under its name, else a lot's KLARFs."""
    found = []
    for path in paths:
        if path.exists():
            found.append(path)
        elif site is None:
            raise ConfigError(f"there is no {path}; a lot by its name needs --site")
        else:
            found += wafers.klarfs_of_lot(load_site(site), str(path))
    return found


def _show(one: WaferReport) -> None:
    found = one.as_dict()
    say(
        f": {counted(found['n_defects'], 'defect')} on {found['n_defective_dies']} of {counted(found['n_dies'], 'die')}"
        f"{'' if found['knows_dies'] else ' (the file names none: all whole ones)'}",
        (f"lot {found['lot'] or '-'} wafer {found['wafer'] or '-'} step {found['step'] or '-'}", "green"),
    )
    if not found["repeaters"] and not found["signatures"]:
        say("  nothing that random defects would not explain")
        return
    rows = []
    for each in found["repeaters"]:
        x, y = each["in_die_um"]
        where = f"{x:.1f}, {y:.1f} um in the die"
        rows.append((each["name"], "repeater", str(len(each["defects"])), str(each["n_dies"]), where))
    for each, (_, signature) in zip(found["signatures"], labelled(one.signatures), strict=True):
        kind = {"line": "scratch, a line", "arc": "scratch, an arc"}.get(each["kind"], each["kind"])
        rows.append((each["name"], kind, str(len(each["defects"])), str(each["n_dies"]), _where(signature)))
    show_table(("", "what", "defects", "dies", "where"), rows, right=(2, 3))


def _where(one: Signature) -> str:
    first, last = one.path_um[0] / 1000, one.path_um[-1] / 1000
    if one.kind == "cluster":
        x, y = one.path_um[:4].mean(0) / 1000
        return f"around {x:.1f}, {y:.1f} mm"
    if one.kind == "ring":
        return "around the centre"
    return f"{first[0]:.1f}, {first[1]:.1f} to {last[0]:.1f}, {last[1]:.1f} mm"
