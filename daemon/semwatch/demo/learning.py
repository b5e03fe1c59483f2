"""The learning demonstration: two defect types that the head has never seen become classes that it names.

A head without the two types; a lot that shows them; one cycle of learning; a person's word for each cluster, spoken
here from the lot's ground truth; and a second lot, on which the new names are counted against the truth.
"""

import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from semwatch.classes.register import ClassRegister
from semwatch.demo import one_lot
from semwatch.demo.one_lot import Layout
from semwatch.errors import ServiceUnavailable
from semwatch.models import crop_store, head_bank, model_repository
from semwatch.settings.site import Site, load_site
from semwatch.store import audit
from semwatch.store.ledger import LEDGER, Ledger
from semwatch.store.review_record import ReviewRecord
from semwatch.streams.embedded_redis import EmbeddedRedis
from semwatch.streams.handoff import Handoff
from semwatch.streams.unknowns import connect
from semwatch.system import terminal

UNSEEN = ("scratch", "residue")
"""Defect types that the demo's head does not know at first. They look like nothing that it knows; a type that does, as
collapse looks like necking, would be called by that name and never reach the queue."""
KNOWN = ("void", "necking")
STAGES = ("BEOL", "DPR")
COMMAND_TIMEOUT_S = 300.0
MIN_SHARE = 0.5
"""A cluster gets the name of the type that more than half of its crops show; a mixed one stays without a name."""
REFUSED = 10
"""What `semwatch-train retrain` ends with where its head was refused."""

Reviews = Sequence[tuple[Path, ReviewRecord]]


def run_learning_demo(*, folder: Path, repository: Path, n: int, seed: int, console: Console) -> None:
    """Run the demonstration from an empty folder to the table of before and after.

    Args:
        folder: emptied first if an earlier demo made it; refused otherwise.
        repository: model repository; it is copied, not changed.
        n: images of each of the two lots.
        seed: of the first lot; the second has the next.
        console: where progress and tables go.

    Raises:
        ConfigError: the folder holds something else, or the learning side is not installed.
        ServiceUnavailable: the daemon or the cycle did not do its part.
    """
    layout = Layout(folder.absolute())
    start = time.monotonic()
    one_lot.clear(layout)
    models = _models_without(UNSEEN, repository, layout, console)
    lots = [_lot(layout.folder / f"lot{i}", n, seed + i) for i in (1, 2)]
    with EmbeddedRedis(layout.folder / "redis") as redis:
        one_lot.write_settings(layout, redis.url, models)
        site = load_site(layout.site)
        with one_lot.running_daemon(layout, console) as daemon:
            before = one_lot.drop_one_by_one(one_lot.images_of(lots[0]), layout, daemon, console)
            output = _semwatch_train("retrain", "--site", str(layout.site), "--json")
            cycle = json.loads(output)
            console.print(f"cycle: {cycle['said']}", highlight=False, soft_wrap=True)
            if cycle["status"] == "learned":
                _name_clusters(site, redis.url, layout, lots[0], console)
            after = one_lot.drop_one_by_one(one_lot.images_of(lots[1]), layout, daemon, console)
    _show(_counts(before, lots[0]), _counts(after, lots[1]), console)
    log = audit.verify(layout.folder / "state" / "audit.jsonl")
    console.print(f"report of the cycle   {cycle['report'] or '-'}", soft_wrap=True, highlight=False)
    console.print(f"audit log             {'intact' if log.ok else 'BROKEN'}, {log.n_lines} lines", highlight=False)
    console.print(f"in all                {time.monotonic() - start:.0f} s", highlight=False)


def _models_without(unseen: Sequence[str], repository: Path, layout: Layout, console: Console) -> Path:
    """A model repository of the demo's own, whose head was never shown these types."""
    mine = layout.folder / "models"
    for model in model_repository.MODELS:
        version = model_repository.latest(repository, model)
        model_repository.read_meta(repository, model, version)
        shutil.copytree(repository / model / str(version), mine / model / "1")
    crop_store.copy(repository, mine, head_bank.banks_of(mine))
    without = [part for label in unseen for part in ("--without", label)]
    _semwatch_train("refit", "--repository", str(mine), *without)
    console.print(f"the head knows nothing of {' and '.join(unseen)}", highlight=False)
    return mine


def _lot(folder: Path, n: int, seed: int) -> Path:
    stages = [part for stage in STAGES for part in ("--stage", stage)]
    types = [part for label in (*UNSEEN, *KNOWN) for part in ("--defect", label)]
    one_lot.generate(folder, n=n, seed=seed, options=["--defect-free", "0.1", "--size", "768", *stages, *types])
    return folder


def _semwatch_train(*arguments: str) -> str:
    command = [sys.executable, "-m", "semwatch_training", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMMAND_TIMEOUT_S)
    if done.returncode not in (0, REFUSED):
        raise ServiceUnavailable(f"semwatch-train {arguments[0]} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def _name_clusters(site: Site, redis_url: str, layout: Layout, lot: Path, console: Console) -> None:
    """Name each learned cluster by the truth of its crops, as an engineer would by looking at them."""
    truth = one_lot.truth_of(lot)
    rows = []
    named: dict[str, str] = {}
    with Ledger(site.state_dir / LEDGER, read_only=True) as ledger:
        path_of = {found.id: found.path for found in ledger.unknowns_since("", limit=100_000)}
    with Handoff(connect(redis_url)) as handoff:
        found = ClassRegister(handoff, site.state_dir, owner="demo").read().clusters
    for cluster in found:
        paths = [path_of[id_] for id_ in cluster.members if id_ in path_of]
        shown = Counter(label for path in paths for label in set(truth.get(path, [])))
        label = _type_of(shown, len(paths)) if cluster.state == "learned" else None
        what = "-" if label is None else f"merged into {named[label]}" if label in named else label
        if label in named:
            _semwatch(layout, "clusters", "merge", cluster.id, named[label])
        elif label is not None:
            _semwatch(layout, "clusters", "name", cluster.id, label)
            named[label] = cluster.id
        looks = ", ".join(f"{name} {n}" for name, n in shown.most_common(3))
        rows.append((cluster.id, str(cluster.size), looks, what))
    terminal.print_table(console, ("cluster", "crops", "they show", "named"), rows, title="clusters", right=(1,))


def _type_of(shown: Counter[str], n_crops: int) -> str | None:
    """The unseen type that more than ``MIN_SHARE`` of a cluster's crops show, None where there is none."""
    (label, count), *_ = [*shown.most_common(1), ("", 0)]
    return label if label in UNSEEN and count > MIN_SHARE * n_crops else None


def _semwatch(layout: Layout, *arguments: str) -> None:
    command = [sys.executable, "-m", "semwatch", *arguments, "--site", str(layout.site)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMMAND_TIMEOUT_S)
    if done.returncode != 0:
        raise ServiceUnavailable(f"semwatch {' '.join(arguments)} failed:\n{done.stderr[-2000:] or done.stdout}")


def _counts(reviews: Reviews, lot: Path) -> dict[str, Counter[str]]:
    """By true type: images that show it, and what the line said of them: named right, novel, left to people, missed."""
    truth = one_lot.truth_of(lot)
    counts: dict[str, Counter[str]] = {}
    for image, record in reviews:
        verdicts = [defect.verdict for page in record.pages for defect in page.defects]
        for label in set(truth.get(image.name, [])) & {*UNSEEN, *KNOWN}:
            of_type = counts.setdefault(label, Counter())
            of_type["images"] += 1
            if any(verdict.label == label for verdict in verdicts):
                of_type["right"] += 1
            elif any(verdict.kind == "novel" for verdict in verdicts):
                of_type["novel"] += 1
            elif any(verdict.kind in ("unknown", "non-decidable") for verdict in verdicts):
                of_type["left"] += 1
            elif any(verdict.kind == "known" for verdict in verdicts):
                of_type["wrong"] += 1
    return counts


def _show(before: Mapping[str, Counter[str]], after: Mapping[str, Counter[str]], console: Console) -> None:
    columns = ("type", "lot", "images", "named right", "novel-n", "left to people", "wrong name", "missed")
    rows = []
    for label in (*UNSEEN, *KNOWN):
        style = "bold" if label in UNSEEN else ""
        for lot, counts in (("1", before), ("2", after)):
            of_type: Counter[str] = counts.get(label, Counter())
            n = of_type["images"]
            missed = n - sum(of_type[kind] for kind in ("right", "novel", "left", "wrong"))
            cells = [n, *(of_type[kind] for kind in ("right", "novel", "left", "wrong")), missed]
            rows.append([terminal.printable(text, style) for text in (label, lot, *map(str, cells))])
    terminal.print_table(console, columns, rows, title="before, after", right=range(1, len(columns)))
    shares = [
        sum(counts[label]["right"] for label in UNSEEN if label in counts)
        / max(1, sum(counts[label]["images"] for label in UNSEEN if label in counts))
        for counts in (before, after)
    ]
    console.print(f"new types named right: {shares[0]:.0%} before, {shares[1]:.0%} after", highlight=False)
