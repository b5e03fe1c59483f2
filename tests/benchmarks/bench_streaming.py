"""Streaming discovery, measured as it is used.

Run: `pytest tests/benchmarks/bench_streaming.py -s -o python_files='bench_*.py'`.

Crops arrive in order. Half of the classes are known from the start; the others appear one after another, and one in
three of them is never named by a person. After every ``ROUND`` crops each policy may learn. The policies:

- ``no learning``: the first head judges to the end.
- ``cycle, unknowns alone``: what the unknown rule queues is searched for classes, which must pass the recipe's
  promotion; the new head must pass it on the golden set. A person names each new class once, by what it shows mostly.
- ``cycle, named``: the product's cycle: the same, and doubtful crops are searched too.
- ``cycle, no person``: the same, and nobody says anything: new classes stay novel-<n>.
- ``retrain-all``: no unknown rule: all crops that came so far are searched anew after every round, beside the labelled
  ones; a person names each class of each round.
- ``route-attach-create``: each crop at once, by distance in the whitened space of the first labels, thresholds
  calibrated on these labels: routed to a known class, attached to a new one, or the first of a new one (PACO-like); a
  person names a new one when it has as many crops as the recipe asks for.

All see the same crops in the same order. Judged on crops of all classes that no policy was shown:

- classes made over true new classes, and the purity of what was made (share of the mostly shown class);
- NMI of what the held-out crops are called (not decided counts as a name of its own);
- known classes: share decided right at first and at the end;
- strangers still called known: held-out crops of new classes called a known name;
- new crops named: called what they are, by name or by the novel class that shows them mostly;
- labels that were asked of a person.

Data: synthetic defects; SD-saliency-900 and Magnetic-Tile together; line-space and more (hottest place of each field).
Those on disk are skipped where they are absent. ``SEMWATCH_STREAM_SEEDS`` (3) orders of each.
"""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from sklearn.metrics import normalized_mutual_info_score

from paths import DATA
from semwatch.defects import DEFECT_FREE, Verdict
from semwatch.line.classification import decide
from semwatch.models import head_bank
from semwatch.models.head_bank import Bank
from semwatch.models.inference import Embedded
from semwatch.settings.recipe import Promotion, Recipe, UnknownRule
from semwatch.settings.site import Learning
from semwatch_training.data import data_folders
from semwatch_training.data.datasets import distinct
from semwatch_training.discovery.fit_head import HeadFit, fit_head
from semwatch_training.discovery.head import Head, project
from semwatch_training.evaluation import evaluation_data, labelled_images, near_duplicates
from semwatch_training.evaluation.evaluation_data import Source
from semwatch_training.learning import candidates, promotion
from semwatch_training.learning.intake import MOST_DOUBTFUL
from semwatch_training.learning.promotion import Answers

SEEDS = int(os.environ.get("SEMWATCH_STREAM_SEEDS", "3"))
ROUND, LARGEST_CLASS = 40, 60
RULE, ASKED, MIN_UNKNOWNS = UnknownRule(), Promotion(), Learning().min_unknowns
NOVEL = "novel-"


@dataclass(frozen=True, slots=True, eq=False)
class Data:
    """Labelled crops of one data set, and the width of their frozen features."""

    name: str
    features: NDArray[np.float32]
    labels: NDArray[np.str_]
    groups: NDArray[np.intp]
    frozen_width: int


@dataclass(frozen=True, slots=True, eq=False)
class Stream:
    """One order: rows of the data."""

    known: tuple[str, ...]
    never_named: frozenset[str]
    labelled: NDArray[np.intp]
    golden: NDArray[np.intp]
    arriving: NDArray[np.intp]
    held_out: NDArray[np.intp]


@dataclass(eq=False)
class Ended:
    """What a policy has come to."""

    name: Callable[[NDArray[np.float32]], list[str | None]]
    """Calls features (n, D) something; None: not decided."""
    made: list[NDArray[np.intp]] = field(default_factory=list)
    """Rows of each class that it made."""
    names: dict[str, str] = field(default_factory=dict)
    """What a novel class shows mostly."""
    asked: int = 0


# ---- data ----


def synthetic(repository: Path, cache: Path) -> Data:
    crops, width, _ = evaluation_data.crops_of(Source("synthetic", repository, 40, cache), progress=_silent)
    return _of("synthetic", crops.features, crops.labels, crops.image_idx, width)


def steel_and_tiles(repository: Path, cache: Path) -> Data:
    parts = []
    for folder in ("SD-saliency-900", "MTD"):
        crops, width, _ = evaluation_data.crops_of(Source(str(DATA / folder), repository, 40, cache), progress=_silent)
        parts.append((crops, width))
    groups = [parts[0][0].image_idx, parts[1][0].image_idx + 1 + parts[0][0].image_idx.max()]
    return _of(
        "SD-saliency-900 and Magnetic-Tile",
        np.vstack([crops.features for crops, _ in parts]),
        [label for crops, _ in parts for label in crops.labels],
        np.concatenate(groups),
        parts[0][1],
    )


def line_space(repository: Path, cache: Path) -> Data:
    folder = DATA / "REAL-SEM" / "line-space-and-more"
    samples = distinct([*(data := data_folders.read(folder, allow_leakage=True)).train, *data.test])
    defects = [one for one in samples if not one.label.startswith(("CLEAN", "OTHERS")) and one.label != DEFECT_FREE]
    with Embedded(repository) as models:
        looked = labelled_images.look(models, Recipe(), defects, progress=_silent)
        width = evaluation_data.frozen_width(models)
    looked = [one for one in looked if one.regions]
    features = np.stack([one.regions[0].features for one in looked])
    groups = near_duplicates.groups([one.field for one in looked])
    return _of("line-space and more", features, [one.sample.label for one in looked], groups, width)


def _silent(what: str, done: int, of: int) -> None:
    """No bar among the tables."""


def _of(name: str, features: NDArray[np.float32], labels: Sequence[str], groups: NDArray[np.intp], width: int) -> Data:
    return Data(name, np.asarray(features, np.float32), np.array(labels), np.asarray(groups, np.intp), width)


def ordered(data: Data, seed: int) -> Stream:
    """Part the classes and their images, and put what arrives in an order."""
    rng = np.random.default_rng(seed)
    classes = rng.permutation(sorted(set(data.labels.tolist()) - {DEFECT_FREE})).tolist()
    known, new = classes[: len(classes) // 2], classes[len(classes) // 2 :]
    parts: dict[str, list[int]] = {name: [] for name in ("labelled", "golden", "held_out")}
    arrives: list[tuple[float, int]] = []
    for position, name in enumerate(classes):
        rows = rng.permutation(np.flatnonzero(data.labels == name))[:LARGEST_CLASS]
        groups = rng.permutation(np.unique(data.groups[rows]))
        share = (np.searchsorted(np.sort(groups), data.groups[rows]), len(groups))
        place = rng.permutation(len(groups))[share[0]] / share[1]
        is_known = name in known
        start = 0.0 if is_known else 0.75 * (position - len(known)) / len(new)
        for row, at in zip(rows.tolist(), place.tolist(), strict=True):
            if at < 0.25:
                parts["held_out"].append(row)
            elif is_known and at < 0.6:
                parts["labelled"].append(row)
            elif is_known and at < 0.7:
                parts["golden"].append(row)
            else:
                arrives.append((rng.uniform(start, 1), row))
    rows_of = {name: np.array(rows, np.intp) for name, rows in parts.items()}
    arriving = np.array([row for _, row in sorted(arrives)], np.intp)
    return Stream(tuple(known), frozenset(new[2::3]), arriving=arriving, **rows_of)


# ---- policies ----


def no_learning(data: Data, stream: Stream, seed: int) -> Ended:
    return Ended(_by_head(_fitted(data, _bank(data, stream.labelled), seed)))


def cycle_unnamed(data: Data, stream: Stream, seed: int) -> Ended:
    return _cycles(data, stream, seed, is_named=False)


def cycle_of_unknowns(data: Data, stream: Stream, seed: int) -> Ended:
    return _cycles(data, stream, seed, is_named=True, doubtful_significance=0.0)


def cycle_named(data: Data, stream: Stream, seed: int) -> Ended:
    return _cycles(data, stream, seed, is_named=True)


def _cycles(
    data: Data,
    stream: Stream,
    seed: int,
    *,
    is_named: bool,
    doubtful_significance: float = RULE.doubtful_significance,
) -> Ended:
    bank, golden = _bank(data, stream.labelled), _bank(data, stream.golden)
    head = _fitted(data, bank, seed)
    ended, queue, doubtful, best = Ended(_by_head(head)), list[int](), dict[int, float](), None
    for batch in _rounds(stream):
        verdicts = _verdicts(head, data.features[batch])
        queue += [row for row, v in zip(batch.tolist(), verdicts, strict=True) if v.label is None]
        p_values = ((row, v.nearest[0].p_value) for row, v in zip(batch.tolist(), verdicts, strict=True) if v.label)
        doubtful |= {row: p for row, p in p_values if p <= doubtful_significance}
        if len(queue) < MIN_UNKNOWNS:
            continue
        rows = np.array([*queue, *sorted(doubtful, key=lambda row: doubtful[row])[:MOST_DOUBTFUL]], np.intp)
        found = candidates.find(bank, data.features[rows], frozen_width=data.frozen_width, seed=seed)
        doubtful = {
            row: doubtful[row]
            for row, known in zip(rows.tolist(), found.known, strict=True)
            if row in doubtful and known is None
        }
        taken, grown = list[NDArray[np.intp]](), bank
        for one in found.classes:
            if not promotion.cluster_refusals(one.size, one.cohesion, 1, ASKED):
                taken.append(rows[one.members])
                name = _name(data, stream, taken[-1], ended, is_named=is_named, number=len(ended.made) + len(taken))
                grown = head_bank.joined([grown, _bank(data, taken[-1], name)])
        if not taken:
            continue
        new = _fitted(data, grown, seed)
        judged = promotion.judge(_answers(head, golden), _answers(new, golden), golden, ASKED, rule=RULE, best=best)
        if judged.reasons:
            continue
        head, bank, best = new, grown, judged.best
        ended.made += taken
        ended.asked += len(taken) if is_named else 0
        ended.name = _by_head(head)
        gone = {row for rows in taken for row in rows.tolist()}
        queue = [row for row in queue if row not in gone]
        doubtful = {row: p for row, p in doubtful.items() if row not in gone}
    return ended


def retrain_all(data: Data, stream: Stream, seed: int) -> Ended:
    bank, ended, seen = _bank(data, stream.labelled), Ended(lambda rows: [None] * len(rows)), list[int]()
    for batch in _rounds(stream):
        seen += batch.tolist()
        rows = np.array(seen, np.intp)
        found = candidates.find(bank, data.features[rows], frozen_width=data.frozen_width, seed=seed)
        ended.made, ended.names, grown = [], {}, bank
        for label in sorted({label for label in found.known if label is not None}):
            mine = rows[[i for i, known in enumerate(found.known) if known == label]]
            grown = head_bank.joined([grown, _bank(data, mine, label)])
        for one in found.classes:
            if one.size >= ASKED.min_cluster_size:
                ended.made.append(rows[one.members])
                name = _name(data, stream, ended.made[-1], ended, is_named=True, number=len(ended.made))
                grown = head_bank.joined([grown, _bank(data, ended.made[-1], name)])
        ended.asked += len(ended.made)
        ended.name = _by_logits(_fitted(data, grown, seed))
    return ended


def route_attach_create(data: Data, stream: Stream, seed: int) -> Ended:
    labelled = _bank(data, stream.labelled)
    space = _space_of(_fitted(data, labelled, seed), data.frozen_width)
    known = space(labelled.features)
    labels = np.array(labelled.labels)
    centres = {name: known[labels == name].mean(axis=0) for name in stream.known}
    own = np.array([_distance(row, centres[name]) for row, name in zip(known, labels, strict=True)])
    route, attach = float(np.quantile(own, 0.95)), float(np.quantile(own, 0.95))
    members: list[list[int]] = []
    points: list[NDArray[np.float32]] = []
    for row in stream.arriving.tolist():
        point = space(data.features[row : row + 1])[0]
        if min(_distance(point, centre) for centre in centres.values()) <= route:
            continue
        far = [_distance(point, centre) for centre in points]
        if far and min(far) <= attach:
            at = int(np.argmin(far))
            members[at].append(row)
            points[at] = space(data.features[members[at]]).mean(axis=0)
        else:
            members.append([row])
            points.append(point)
    ended = Ended(lambda rows: [None] * len(rows))
    for rows, point in zip(members, points, strict=True):
        if len(rows) >= ASKED.min_cluster_size:
            ended.made.append(np.array(rows, np.intp))
            ended.asked += 1
            centres[_name(data, stream, ended.made[-1], ended, is_named=True, number=len(ended.made))] = point

    def name(features: NDArray[np.float32]) -> list[str | None]:
        found: list[str | None] = []
        for point in space(features):
            nearest = min(centres, key=lambda one: _distance(point, centres[one]))
            found.append(nearest if _distance(point, centres[nearest]) <= route else None)
        return found

    ended.name = name
    return ended


POLICIES = {
    "no learning": no_learning,
    "cycle, unknowns alone": cycle_of_unknowns,
    "cycle, named": cycle_named,
    "cycle, no person": cycle_unnamed,
    "retrain-all": retrain_all,
    "route-attach-create": route_attach_create,
}


def _rounds(stream: Stream) -> list[NDArray[np.intp]]:
    return [stream.arriving[i : i + ROUND] for i in range(0, len(stream.arriving), ROUND)]


def _bank(data: Data, rows: NDArray[np.intp], label: str | None = None) -> Bank:
    labels = tuple(data.labels[rows].tolist()) if label is None else (label,) * len(rows)
    images = tuple(f"group {group}" for group in data.groups[rows])
    return Bank(data.features[rows], labels, images, ("",) * len(rows))


def _fitted(data: Data, bank: Bank, seed: int) -> Head:
    numbers = np.unique(np.array(bank.images), return_inverse=True)[1].tolist()
    fit = HeadFit(frozen_width=data.frozen_width, seed=seed)
    return fit_head(bank.features, bank.labels, fit, images=numbers).eval()


def _answers(head: Head, crops: Bank) -> Answers:
    with torch.no_grad():
        logits, p_values = head(torch.from_numpy(crops.features))
    return Answers(head.labels, logits.numpy(), p_values.numpy())


def _verdicts(head: Head, features: NDArray[np.float32]) -> list[Verdict]:
    with torch.no_grad():
        logits, p_values = head(torch.from_numpy(features))
    return [decide(row, p, head.labels, RULE) for row, p in zip(logits.numpy(), p_values.numpy(), strict=True)]


def _by_head(head: Head) -> Callable[[NDArray[np.float32]], list[str | None]]:
    return lambda features: [verdict.label for verdict in _verdicts(head, features)]


def _by_logits(head: Head) -> Callable[[NDArray[np.float32]], list[str | None]]:
    def name(features: NDArray[np.float32]) -> list[str | None]:
        with torch.no_grad():
            best = head(torch.from_numpy(features))[0].argmax(dim=1).tolist()
        return [head.labels[k] for k in best]

    return name


def _space_of(head: Head, width: int) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    buffer = dict(head.named_buffers())

    def seen(features: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.no_grad():
            return np.asarray(project(torch.from_numpy(features[:, :width]), buffer).numpy(), np.float32)

    return seen


def _distance(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(a / np.linalg.norm(a) - b / np.linalg.norm(b)))


def _name(data: Data, stream: Stream, rows: NDArray[np.intp], ended: Ended, *, is_named: bool, number: int) -> str:
    """What a new class is called: by a person, what it shows mostly, unless that is never named."""
    mostly = Counter(data.labels[rows].tolist()).most_common(1)[0][0]
    if is_named and mostly not in stream.never_named:
        return str(mostly)
    ended.names[f"{NOVEL}{number}"] = str(mostly)
    return f"{NOVEL}{number}"


# ---- figures ----

COLUMNS = (
    "classes made / new",
    "purity of these",
    "NMI",
    "known right, first",
    "known right, end",
    "new called known",
    "new named",
    "labels asked",
)


def figures(data: Data, stream: Stream, first: Ended, ended: Ended) -> tuple[float, ...]:
    truth, features = data.labels[stream.held_out], data.features[stream.held_out]
    called, before = ended.name(features), first.name(features)
    is_known = np.isin(truth, stream.known)
    new = sorted(set(truth[~is_known].tolist()))
    means = [ended.names.get(one, one) if one is not None else None for one in called]
    right = np.array([one == label for one, label in zip(means, truth, strict=True)])
    right_before = np.array([one == label for one, label in zip(before, truth, strict=True)])
    as_known = np.array([one in stream.known for one in called])
    shown = [Counter(data.labels[rows].tolist()).most_common(1)[0][1] for rows in ended.made]
    return (
        len(ended.made) / len(new),
        sum(shown) / sum(map(len, ended.made)) if ended.made else float("nan"),
        float(normalized_mutual_info_score(truth, [one or "not decided" for one in called])),
        float(right_before[is_known].mean()),
        float(right[is_known].mean()),
        float(as_known[~is_known].mean()),
        float(right[~is_known].mean()),
        float(ended.asked),
    )


def _cell(values: Sequence[float]) -> str:
    there = [value for value in values if not np.isnan(value)]
    return f"{np.mean(there):.2f} ± {np.std(there):.2f}" if there else "-"


@pytest.mark.timeout(5400)
@pytest.mark.parametrize("of", [synthetic, steel_and_tiles, line_space], ids=lambda one: one.__name__)
def test_streaming(of: Callable[[Path, Path], Data], repository: Path, tmp_path: Path) -> None:
    if of is not synthetic and not DATA.is_dir():
        pytest.skip("the public data are not beside the checkout")
    cache = Path(os.environ.get("SEMWATCH_STREAM_CACHE", str(tmp_path)))
    data = of(repository, cache)
    rows: dict[str, list[tuple[float, ...]]] = {}
    for seed in range(SEEDS):
        stream = ordered(data, seed)
        first = no_learning(data, stream, seed)
        for name, policy in POLICIES.items():
            rows.setdefault(name, []).append(figures(data, stream, first, policy(data, stream, seed)))
    table = Table("", *COLUMNS, title=f"{data.name}: {len(stream.arriving)} crops arrive, {SEEDS} orders")
    for name, runs in rows.items():
        table.add_row(name, *(_cell(column) for column in zip(*runs, strict=True)))
    Console(width=200).print(table)
    assert set(rows) == set(POLICIES)
