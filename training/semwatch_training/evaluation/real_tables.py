"""Tables of detection, gates, escapes and verdicts on real images; arguments are what ``real_line`` has seen."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from semwatch.defects import DEFECT_FREE, VerdictKind
from semwatch_training.evaluation import near_duplicates, real_data, real_splits
from semwatch_training.evaluation.real_baselines import Scores
from semwatch_training.evaluation.real_line import Passer, Seen, at_defect, page_verdict, passed_by
from semwatch_training.evaluation.report import Cell, Table
from semwatch_training.metrics import detection_metrics
from semwatch_training.metrics.uncertainty import Rate

SERVED = "served"
POSITION_SLACK_PX = 5
"""How far beside a box a point defect may lie: its position is where a person clicked."""
FOUR = "all four"
ALL = "all"


class Process(NamedTuple):
    """Images of one process: what its clean ones tell of a gate holds for its defects."""

    folder: str
    clean: str
    """Label of its clean images."""
    defects: dict[str, tuple[str, ...]]
    """What is compared with them: labels, by name, single classes first."""


def processes(seen: Sequence[Seen]) -> list[Process]:
    """The processes that have clean images and defective ones."""
    labels: dict[str, list[str]] = {}
    for one in seen:
        labels.setdefault(one.image.folder, []).append(one.image.label)
    bare = sorted({*labels.get(real_data.BARE_WAFER, [])} - {DEFECT_FREE})
    four = [name for name in real_data.FOUR_DEFECTS if name in labels.get(real_data.LINE_SPACE, [])]
    found = [
        Process(real_data.BARE_WAFER, DEFECT_FREE, _each(bare) | ({ALL: tuple(bare)} if bare else {})),
        Process(
            real_data.LINE_SPACE,
            real_data.CLEAN_LAYER,
            _each(four) | ({FOUR: tuple(four)} if four else {}) | {"LER": ("LER",)},
        ),
        Process(real_data.LINE_SPACE, "CLEAN_VIA", {"VIA": ("VIA",)}),
        Process(real_data.LINE_SPACE, "CLEAN_CRACK", {"CRACK": ("CRACK",)}),
        Process(real_data.PAIRS, "clean", {"defect": ("defect",)}),
        Process(real_data.FIBRES, "good", {"anomalous": ("anomalous",)}),
    ]
    kept = []
    for process in found:
        present = set(labels.get(process.folder, []))
        defects = {name: of for name, of in process.defects.items() if present & set(of)}
        if process.clean in present and defects:
            kept.append(process._replace(defects=defects))
    return kept


def _each(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    return {name: (name,) for name in names}


def of_process(seen: Sequence[Seen], process: Process) -> list[Seen]:
    """The images of a process, clean and defective."""
    labels = {process.clean}.union(*process.defects.values())
    return [one for one in seen if one.image.folder == process.folder and one.image.label in labels]


def groups_of(seen: Sequence[Seen]) -> NDArray[np.intp]:
    """Groups of near duplicates (n,)."""
    return near_duplicates.groups([one.field for one in seen])


# ---- detection ----


def detection_table(
    seen: Sequence[Seen], engines: Mapping[str, Scores], groups: Mapping[tuple[str, str], NDArray[np.intp]]
) -> Table:
    """Image AUROC of every engine, clean images of a process against each of its defects; the first is served."""
    rows: list[tuple[Cell, ...]] = []
    for process in processes(seen):
        some, of_group = of_process(seen, process), groups[process.folder, process.clean]
        for name, labels in process.defects.items():
            chosen = [i for i, one in enumerate(some) if one.image.label in (process.clean, *labels)]
            defective = np.array([some[i].image.label != process.clean for i in chosen])
            cells: list[Cell] = []
            for scores in engines.values():
                raw = [scores[some[i].image.name].raw for i in chosen if some[i].image.name in scores]
                whole = len(raw) == len(chosen)
                cells.append(detection_metrics.image_auroc(np.array(raw), defective) if whole else None)
            served = np.array([next(iter(engines.values()))[some[i].image.name].raw for i in chosen])
            deviation = real_splits.auroc_deviation(served, defective, of_group[chosen])
            n_bad = int(defective.sum())
            rows.append(
                (
                    process.folder,
                    f"{name} / {process.clean}",
                    n_bad,
                    len(chosen) - n_bad,
                    cells[0],
                    deviation,
                    *cells[1:],
                )
            )
    first, *others = engines
    note = (
        f"Raw image score of {first}; of the training-free ones the largest value of the map. ±: standard deviation "
        f"over {real_splits.N_RESAMPLED} resamples of groups of near duplicates, of {first} alone. The nearest "
        f"patch has the clean images of the other folds as normals."
    )
    return Table(
        "Detection, image AUROC",
        ("folder", "defects / clean", "defective", "clean", first, "±", *others),
        tuple(rows),
        note,
    )


def pairs_table(seen: Sequence[Seen], engines: Mapping[str, Scores]) -> Table | None:
    """Share of pairs of which the defective image scores higher; ties count half."""
    by_file: dict[str, dict[str, str]] = {}
    for one in seen:
        if one.image.folder == real_data.PAIRS:
            by_file.setdefault(one.image.name.rsplit("/", 1)[-1], {})[one.image.label] = one.image.name
    pairs = [(pair["clean"], pair["defect"]) for pair in by_file.values() if len(pair) == 2]
    if not pairs:
        return None
    rows: list[tuple[Cell, ...]] = []
    for name, scores in engines.items():
        if all(file in scores for pair in pairs for file in pair):
            n_right = sum(scores[defect].raw > scores[clean].raw for clean, defect in pairs)
            rows.append((name, Rate.of(n_right, len(pairs))))
    return Table("Pairs, the defective image scores higher", ("engine", "pairs ranked right"), tuple(rows))


def pixel_table(seen: Sequence[Seen], engines: Mapping[str, Scores]) -> Table | None:
    """Pixel AUROC of every engine where masks are: pooled, mean and worst of the images; at the masks' own size."""
    rows: list[tuple[Cell, ...]] = []
    for folder in (real_data.PAIRS, real_data.FIBRES):
        drawn = [
            (one.image.name, truth) for one in seen if one.image.folder == folder and _is_drawn(truth := one.truth)
        ]
        if not drawn:
            continue
        masks = [truth for _, truth in drawn if truth is not None]
        for name, scores in engines.items():
            if any(file not in scores for file, _ in drawn):
                continue
            maps = [scores[file].score_map for file, _ in drawn]
            each = [
                detection_metrics.pixel_auroc([one], [mask], size_hw=None)
                for one, mask in zip(maps, masks, strict=True)
            ]
            pooled = detection_metrics.pixel_auroc(maps, masks, size_hw=None)
            rows.append((folder, name, len(maps), pooled, float(np.mean(each)), float(np.std(each)), min(each)))
    if not rows:
        return None
    note = "Images with a mask, each at its own size; deviation over the images."
    columns = ("folder", "engine", "images", "pooled", "mean by image", "deviation", "worst image")
    return Table("Where the defect lies, pixel AUROC", columns, tuple(rows), note)


def _is_drawn(truth: NDArray[np.bool_] | None) -> bool:
    return truth is not None and bool(truth.any()) and not bool(truth.all())


# ---- gates ----


def gate_table(
    seen: Sequence[Seen],
    groups: Mapping[tuple[str, str], NDArray[np.intp]],
    *,
    false_alarm_rate: float,
    seeds: Sequence[int],
) -> Table:
    """How often the gate opens, by folder and class: as shipped, and calibrated on the clean images of the process."""
    calibrated: dict[tuple[str, str], NDArray[np.bool_]] = {}
    for process in processes(seen):
        some = of_process(seen, process)
        raw = np.array([one.raw_score for one in some], np.float64)
        clean = np.array([one.image.label == process.clean for one in some])
        opened = real_splits.cross_calibrated(
            raw, clean, groups[process.folder, process.clean], false_alarm_rate=false_alarm_rate, seeds=seeds
        )
        for label in {one.image.label for one in some}:
            if opened is not None:
                calibrated[process.folder, label] = opened[:, [one.image.label == label for one in some]]
    rows: list[tuple[Cell, ...]] = []
    for (folder, label), some in by_class(seen).items():
        n_opened = sum(one.is_opened for one in some)
        at_rate = calibrated.get((folder, label))
        raw_scores = [one.raw_score for one in some]
        rows.append(
            (
                folder,
                label,
                _is(some[0].image.defective),
                Rate.of(n_opened, len(some)),
                None if at_rate is None else real_splits.mean_rate(at_rate),
                float(np.median(raw_scores)),
            )
        )
    threshold = seen[0].reviewed.gate_threshold
    note = (
        f"Of clean images an opened gate is a false alarm, of defective ones it is recall. Shipped: threshold "
        f"{threshold:.4g}, for {false_alarm_rate:.0%} by the detector's own normals. Calibrated: the conformal "
        f"threshold for {false_alarm_rate:.0%}, the recipe's rate, from the clean images of the process in the other "
        f"four of five folds that keep near duplicates together; mean over seeds {list(seeds)}; – where clean images "
        f"are too few."
    )
    columns = ("folder", "class", "is", "gate opens, shipped", "gate opens, calibrated", "median raw score")
    return Table("Gate", columns, tuple(rows), note)


def _is(defective: bool | None) -> str:
    return "not known" if defective is None else "defective" if defective else "clean"


def by_class(seen: Sequence[Seen]) -> dict[tuple[str, str], list[Seen]]:
    """Images by folder and class, in the order of the folders."""
    found: dict[tuple[str, str], list[Seen]] = {}
    for one in seen:
        found.setdefault((one.image.folder, one.image.label), []).append(one)
    return found


# ---- escapes and verdicts ----


def escape_table(seen: Sequence[Seen]) -> Table:
    """Defective images that pass as defect-free, by who let them pass."""
    rows: list[tuple[Cell, ...]] = []
    classes = {key: some for key, some in by_class(seen).items() if some[0].image.defective}
    pooled = {
        (real_data.BARE_WAFER, ALL): [key for key in classes if key[0] == real_data.BARE_WAFER],
        (real_data.LINE_SPACE, FOUR): [key for key in classes if key[1] in real_data.FOUR_DEFECTS],
    }
    for key, parts in pooled.items():
        if len(parts) > 1:
            classes[key] = [one for part in parts for one in classes[part]]
    for (folder, label), some in sorted(classes.items(), key=lambda item: real_data.FOLDERS.index(item[0][0])):
        passers = [passed_by(one) for one in some]
        counts = Counter(passer for passer in passers if passer is not None)
        drawn = [one for one in some if _is_drawn(one.truth)]
        beside = sum(one.has_defect_verdict and not _verdict_at_defect(one) for one in drawn)
        rows.append(
            (
                folder,
                label,
                Rate.of(sum(counts.values()), len(some)),
                *(counts[passer] for passer in get_args(Passer)),
                beside if drawn else None,
            )
        )
    note = (
        "An escape is a defective image of which no region is called anything but defect-free. Let pass by the "
        "gate: it stayed shut; the mask: it was empty, or no region lies on the defect where that is drawn; the head: "
        "it called every region defect-free. Beside: not an escape, but no region on the drawn defect is called a "
        "defect."
    )
    columns = ("folder", "class", "escapes", *(f"by the {passer}" for passer in get_args(Passer)), "beside the defect")
    return Table("Escapes", columns, tuple(rows), note)


def _verdict_at_defect(one: Seen) -> bool:
    touching = at_defect(one) or []
    return any(touches and kind != "defect-free" for touches, kind in zip(touching, one.kinds, strict=True))


def clean_table(seen: Sequence[Seen]) -> Table:
    """Pages of clean images with a defect verdict."""
    rows: list[tuple[Cell, ...]] = []
    for (folder, label), some in by_class(seen).items():
        if some[0].image.defective is False:
            named = sum(one.has_defect_verdict for one in some)
            n_regions = sum(kind != "defect-free" for one in some for kind in one.kinds)
            rows.append((folder, label, Rate.of(named, len(some)), n_regions / len(some)))
    note = "Clean images of which a region is called anything but defect-free: fewer is better."
    columns = ("folder", "class", "pages with a defect verdict", "such regions a page")
    return Table("False alarms after the head", columns, tuple(rows), note)


def verdict_table(seen: Sequence[Seen]) -> Table:
    """What is said of a page, by folder and class, and which names are given."""
    kinds: tuple[VerdictKind, ...] = get_args(VerdictKind)
    rows: list[tuple[Cell, ...]] = []
    for (folder, label), some in by_class(seen).items():
        verdicts = [page_verdict(one.reviewed.defects) for one in some]
        counts = Counter(kind for kind, _ in verdicts)
        names = Counter(name for _, name in verdicts if name is not None)
        named = ", ".join(f"{name} {n}" for name, n in names.most_common())
        rows.append((folder, label, len(some), *(counts[kind] for kind in kinds), named))
    note = (
        "One verdict a page: that of its highest-scored region that is not called defect-free. Which of the names are "
        "plausible no code can judge."
    )
    return Table("Verdicts", ("folder", "class", "pages", *kinds, "names"), tuple(rows), note)


# ---- inspected and reference ----


def reference_table(seen: Sequence[Seen]) -> Table | None:
    """Defects at known positions that are found, without and with the reference image."""
    rows: list[tuple[Cell, ...]] = []
    for one in seen:
        if not one.image.positions_xy:
            continue
        for how, page in (("without reference", one.page), ("with reference", one.reference_page)):
            if page is None:
                continue
            boxes = [(defect.box_xyxy, defect.verdict.kind != "defect-free") for defect in page.defects]
            named = [box for box, is_named in boxes if is_named]
            positions = one.image.positions_xy
            n_boxed = sum(any(_holds(box, position) for box, _ in boxes) for position in positions)
            n_named = sum(any(_holds(box, position) for box in named) for position in positions)
            n_false = sum(not any(_holds(box, position) for position in positions) for box, _ in boxes)
            height, width = page.micrograph.field.shape
            covered = np.zeros((height, width), np.bool_)
            left, top = page.micrograph.field_xyxy[:2]
            for (x0, y0, x1, y1), _ in boxes:
                covered[max(0, y0 - top) : max(0, y1 - top), max(0, x0 - left) : max(0, x1 - left)] = True
            unused = getattr(getattr(page, "reference", None), "reason", "")
            rows.append(
                (
                    one.image.name,
                    f"{how}, not used: {unused}" if unused else how,
                    Rate.of(n_boxed, len(positions)),
                    Rate.of(n_named, len(positions)),
                    n_false,
                    float(covered.mean()),
                )
            )
    if not rows:
        return None
    note = (
        f"A position is boxed where a region's box holds it, up to {POSITION_SLACK_PX} px beside; with a defect "
        f"verdict where such a region is not called defect-free. False regions hold no position."
    )
    if not any(one.reference_page for one in seen):
        note += " Without reference alone: this version's line takes none, or there is none."
    columns = ("image", "how", "positions boxed", "with a defect verdict", "false regions", "share of field boxed")
    return Table("Inspected images", columns, tuple(rows), note)


def _holds(box: tuple[int, int, int, int], position_xy: tuple[int, int]) -> bool:
    (x0, y0, x1, y1), (x, y) = box, position_xy
    slack = POSITION_SLACK_PX
    return x0 - slack <= x < x1 + slack and y0 - slack <= y < y1 + slack


# ---- time ----


def time_table(times: tuple[Sequence[tuple[tuple[int, int], float]], float]) -> Table:
    """Milliseconds of the networks: of the detector by size of the field, of the encoder for one crop."""
    by_size, encoder = times
    rows: list[tuple[Cell, ...]] = []
    for (height, width), detector in by_size:
        megapixels = height * width / 1e6
        rows.append((f"detector, field of {width} x {height}", megapixels, detector, detector / megapixels))
    rows.append(("encoder, one crop", None, encoder, None))
    note = "Median of three answers after one to warm up, on this machine as loaded as it was; lower is better."
    return Table("Milliseconds", ("network", "megapixels", "ms", "ms a megapixel"), tuple(rows), note)
