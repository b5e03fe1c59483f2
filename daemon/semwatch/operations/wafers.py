"""The wafers of a lot from its KLARF files: what repeats, what hangs together, and the pictures and maps of them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from semwatch import klarf
from semwatch.errors import ConfigError
from semwatch.klarf import KlarfError
from semwatch.operations import lot_manifests, lots
from semwatch.settings.site import Site
from semwatch.store.lot_record import LOT_JSON
from semwatch.store.result_index import INDEX, open_index
from semwatch.system import files
from semwatch.wafer import map_files
from semwatch.wafer.drawing import draw_stack, draw_wafer, labelled
from semwatch.wafer.map_files import die_bins
from semwatch.wafer.picture import Drawing, png, svg
from semwatch.wafer.repeaters import Repeater, find_repeaters
from semwatch.wafer.signatures import Signature, find_signatures
from semwatch.wafer.wafer_map import WaferMap, wafer_map

_HEAD = 4096
_MARKS = (b"fileversion", b"record filerecord")


@dataclass(frozen=True, eq=False)
class WaferReport:
    """One wafer of a file and what was found on it.

    Attributes:
        repeaters: those of all wafers with the same dies, with the members on this one.
    """

    file: Path
    map: WaferMap
    repeaters: list[Repeater]
    signatures: list[Signature]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: members by their DEFECTID."""
        bins = die_bins(self.map)
        return {
            "file": str(self.file),
            "lot": self.map.lot,
            "wafer": self.map.wafer,
            "step": self.map.step,
            "slot": self.map.slot,
            "n_defects": len(self.map.ids),
            "n_dies": len(self.map.dies),
            "n_defective_dies": bins.count(map_files.DEFECTIVE),
            "knows_dies": self.map.knows_dies,
            "repeaters": [
                {
                    "name": f"R{n}",
                    "in_die_um": one.in_die_um,
                    "n_dies": one.n_dies,
                    "log10_chance": round(one.log10_chance, 1),
                    "defects": self.map.ids[one.members].tolist(),
                }
                for n, one in enumerate(self.repeaters, 1)
            ],
            "signatures": [
                {
                    "name": name,
                    "kind": one.kind,
                    "n_dies": len({tuple(die) for die in self.map.defect_dies[one.members].tolist()}),
                    "length_um": round(one.length_um, 1),
                    "path_um": one.path_um.round(1).tolist(),
                    "log10_chance": round(one.log10_chance, 1),
                    "defects": self.map.ids[one.members].tolist(),
                }
                for name, one in labelled(self.signatures)
            ],
        }


def read_maps(
    paths: Sequence[Path], *, edge_exclusion_um: float, class_column: str = "CLASSNUMBER"
) -> list[tuple[Path, WaferMap]]:
    """Every wafer of KLARF files, or of those that lie in folders.

    Raises:
        ConfigError: a file cannot be read, or no path holds a wafer.
        KlarfError: a file is no sound KLARF, or does not say where its defects lie.
    """
    found: list[tuple[Path, WaferMap]] = []
    for path in (file for given in paths for file in (_klarf_files(given) if given.is_dir() else [given])):
        try:
            for lot in klarf.read(path).lots:
                found += [
                    (path, wafer_map(lot, wafer, edge_exclusion_um=edge_exclusion_um, class_column=class_column))
                    for wafer in lot.wafers
                ]
        except KlarfError as error:
            raise KlarfError(f"{path}: {error}") from error
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    if not found:
        raise ConfigError(f"no wafer in {', '.join(map(str, paths))}: name a KLARF, or a folder that holds some")
    return found


def klarfs_of_lot(site: Site, name: str) -> list[Path]:
    """The KLARFs of a lot: what was last written back of each, with its classes, else the one in the drop folder.

    Args:
        name: its folder, ``source/folder``, or the LotID of its KLARF.

    Raises:
        ConfigError: there is no such lot, or it has no KLARF.
    """
    bases = lot_manifests.folders_of_lot_id(site, name)
    if not bases:
        with open_index(site.state_dir / INDEX) as index:
            bases = {lots.find(site, index, name)}
    folders = {folder.source: folder.path for folder in site.folders}
    found = []
    for base in sorted(bases):
        for one in lot_manifests.of_lot(site, base):
            written = [Path(place) for place in one.written if not place.endswith(LOT_JSON) and Path(place).exists()]
            found += written or [folders[base.partition("/")[0]] / one.klarf]
    if not found:
        raise ConfigError(f"lot {name} has no KLARF that the daemon has taken; see docs/lots.md, or name a file")
    return found


def report(maps: Sequence[tuple[Path, WaferMap]], *, tolerance_um: float = 2.0) -> list[WaferReport]:
    """Look for repeaters over all wafers with the same dies, then for signatures on each among the other defects.

    Raises:
        ConfigError: a tolerance that is none.
    """
    if maps and not 0 < tolerance_um < min(one.pitch_um.min() for _, one in maps) / 10:
        raise ConfigError(f"a tolerance of {tolerance_um:g} um: expected one above 0 and far below the size of a die")
    by_pitch: dict[tuple[float, ...], list[int]] = {}
    for i, (_, one) in enumerate(maps):
        by_pitch.setdefault(tuple(one.pitch_um.tolist()), []).append(i)
    repeaters: dict[int, list[Repeater]] = {}
    for rows in by_pitch.values():
        group = [maps[i][1] for i in rows]
        every = stacked_repeaters(group, tolerance_um=tolerance_um)
        begins = np.cumsum([0, *(len(one.ids) for one in group)])
        for i, begin, end in zip(rows, begins, begins[1:], strict=False):
            repeaters[i] = [_within(one, begin, end) for one in every]
    return [WaferReport(path, one, repeaters[i], _signatures(one, repeaters[i])) for i, (path, one) in enumerate(maps)]


def stacked_repeaters(maps: Sequence[WaferMap], *, tolerance_um: float) -> list[Repeater]:
    """Repeaters over the dies of several wafers of one product; members count through the defects of all maps."""
    dies: dict[tuple[object, ...], int] = {}
    die = [dies.setdefault((one.lot, one.wafer, x, y), len(dies)) for one in maps for x, y in one.defect_dies.tolist()]
    in_die = np.concatenate([one.in_die_um for one in maps])
    area = float(np.prod(maps[0].pitch_um))
    return find_repeaters(in_die, np.array(die, np.int64), die_area_um2=area, tolerance_um=tolerance_um)


def write_pictures(
    reports: Sequence[WaferReport], folder: Path, *, formats: Sequence[str], has_stack: bool, tolerance_um: float = 2.0
) -> list[Path]:
    """A wafer map of each wafer, and of each product the stack of its dies, as SVG, PNG or both.

    Raises:
        ConfigError: a file cannot be written.
    """
    names = Counter[str]()
    written: list[Path] = []
    for one in reports:
        name = f"{one.file.name}.{_plain(one.map.wafer)}"
        names[name] += 1
        name += f".{names[name]}" if names[name] > 1 else ""
        written += _write(draw_wafer(one.map, one.repeaters, one.signatures), folder / f"{name}.wafermap", formats)
    groups: dict[tuple[object, ...], list[WaferReport]] = {}
    for one in reports if has_stack else ():
        groups.setdefault((one.map.device, one.map.step, *one.map.pitch_um.tolist()), []).append(one)
    for n, group in enumerate(groups.values(), 1):
        maps = [one.map for one in group]
        drawing = draw_stack(maps, stacked_repeaters(maps, tolerance_um=tolerance_um))
        number = f".{n}" if len(groups) > 1 else ""
        written += _write(drawing, folder / f"{_plain(maps[0].lot)}.{_plain(maps[0].step)}{number}.diestack", formats)
    return written


def write_die_maps(reports: Sequence[WaferReport], *, g85: Path | None, e142: Path | None) -> None:
    """Which dies have defects, as SEMI G85 and SEMI E142.1.

    Raises:
        ConfigError: a target is one of the files that were read, or cannot be written.
    """
    maps = [one.map for one in reports]
    for path, make in ((g85, map_files.g85), (e142, map_files.e142)):
        if path is None:
            continue
        if any(path.exists() and path.samefile(one.file) for one in reports):
            raise ConfigError(f"{path} is a KLARF that was read; name another file")
        _save(path, make(maps))


def _signatures(one: WaferMap, repeaters: Sequence[Repeater]) -> list[Signature]:
    """Of what is no repeater; members count through all defects of the wafer."""
    repeated = np.concatenate([np.zeros(0, np.int64), *(found.members for found in repeaters)])
    rows = np.setdiff1d(np.arange(len(one.ids)), repeated)
    found = find_signatures(one.on_wafer_um[rows], radius_um=one.radius_um)
    return [
        Signature(each.kind, rows[each.members], each.path_um, each.length_um, each.half_width_um, each.log10_chance)
        for each in found
    ]


def _within(one: Repeater, begin: int, end: int) -> Repeater:
    members = one.members[(one.members >= begin) & (one.members < end)] - begin
    return Repeater(one.in_die_um, members, one.n_dies, one.log10_chance)


def _klarf_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                head = b" ".join(file.read(_HEAD).lower().split())
            if any(mark in head[:200] for mark in _MARKS):
                yield path


def _write(drawing: Drawing, stem: Path, formats: Sequence[str]) -> Iterator[Path]:
    for suffix in formats:
        path = stem.with_name(f"{stem.name}.{suffix}")
        _save(path, svg(drawing).encode() if suffix == "svg" else png(drawing))
        yield path


def _save(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_whole(path, data)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


def _plain(text: str | None) -> str:
    """A name that every file system takes."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in text or "-")[:60]
