"""Twenty cycles of learning while the crops drift: what known classes lose, and whether clusters stay who they are.

What is drawn how. Real: the features of 1,921 crops that are shipped with the head (its bank, and its golden set, whose
images fall by chance into a golden set of this run, a held-out set and a stream). Mixed: every crop of the stream, of
three real ones of its class (``fresh_crops``); none is a copy. Added: a drift that grows from cycle to cycle along one
direction, which is drawn like a deviation within a class, up to half the mean length of such a deviation at the end.

The first head does not know four types. They appear in cycles 1, 4, 8 and 12; from then on half of the stream shows the
types that have appeared, the other half the known classes, each as often. In each cycle crops are drawn until the head
that serves calls 60 of them unknown or non-decidable: these are queued, as the daemon would. No person says anything:
classes stay ``novel-<n>``, nothing is merged or rejected. Accuracy is that of held-out real crops of the classes known
at first, no one of which was in any bank, golden set or stream: the mean over classes of the share decided right.

An identity is right where a cluster id, seen in another cycle, shows mostly the type that it showed mostly at first;
and where a head calls held-out crops ``novel-<n>``, if most of them are of the type that the cluster showed when it was
learned.
"""

import json
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import fresh_crops
from daemon import make_site
from semwatch.classes import clusters
from semwatch.defects import NOVEL
from semwatch.models import head_bank
from semwatch.models.head_bank import Bank
from semwatch.models.inference import Embedded
from semwatch.settings.site import Learning, Site, load_site
from semwatch.streams.embedded_redis import EmbeddedRedis
from semwatch_training.learning.refit import refit
from semwatch_training.learning.retrain import Outcome, run_cycle

N_CYCLES = int(os.environ.get("SEMWATCH_CYCLES", "20"))
SEED = int(os.environ.get("SEMWATCH_CYCLES_SEED", "0"))
APPEARS = {"scratch": 1, "residue": 4, "gate-open": 8, "bubble": 12}
"""Cycle of each type that the first head does not know."""
PER_CYCLE, BATCH, MAX_DRAWN = 60, 30, 3000
LARGEST_DRIFT = 0.5
"""At the last cycle, in mean lengths of a deviation within a class."""
MAX_LOSS_POINTS, MIN_RIGHT = 1.0, 0.9


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """The golden set's images, parted; the bank is the head's own."""

    golden: Bank
    held_out: Bank
    stream: dict[str, NDArray[np.float32]]
    """Real crops by class; of the types that are unknown at first, the bank's too."""


@dataclass(slots=True)
class Account:
    """What is counted over the cycles."""

    truth: dict[str, str] = field(default_factory=dict)
    """True class by record id."""
    first_shown: dict[str, str] = field(default_factory=dict)
    """What each cluster showed mostly when it was seen first."""
    n_again: int = 0
    n_again_right: int = 0
    n_named: int = 0
    """Novel classes with held-out crops called so, summed over cycles."""
    n_named_right: int = 0


@pytest.mark.timeout(5400)
def test_twenty_cycles(repository: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(SEED)
    models = fresh_crops.copied_models(repository, tmp_path / "models")
    parts = parted(rng)
    head_bank.write(parts.golden, models / "head/1" / head_bank.GOLDEN)
    first = refit(models, without=list(APPEARS)).version
    drift = drift_direction(head_bank.read(models / f"head/{first}" / head_bank.BANK), rng)
    account, outcomes, accuracies = Account(), list[Outcome](), list[tuple[float, float]]()
    table = Table(*COLUMNS, title=f"{N_CYCLES} cycles, {PER_CYCLE} new unknowns each")
    with EmbeddedRedis(tmp_path / "redis") as server:
        file = make_site(tmp_path / "site", models, redis_url=server.url).file
        every_head = Learning(keep_versions=N_CYCLES + 3)  # the first is asked again at the end
        site = load_site(file).model_copy(update={"learning": every_head})
        for cycle in range(1, N_CYCLES + 1):
            shift = drift * LARGEST_DRIFT * (cycle - 1) / max(1, N_CYCLES - 1)
            n_drawn = queue(server.url, models, parts, cycle, shift, account, rng)
            start = time.monotonic()
            outcomes.append(run_cycle(site, seed=cycle))
            seconds = time.monotonic() - start
            ids = identities(site, outcomes[-1], account)
            accuracies.append((accuracy(models, parts, first), accuracy(models, parts, None)))
            drifted = accuracy(models, parts, first, shift), accuracy(models, parts, None, shift)
            novel = names_of_novel(models, site, parts, account)
            table.add_row(*cells(cycle, n_drawn, outcomes[-1], ids, accuracies[-1], drifted, novel, seconds))
    Console(width=200).print(table)
    conclude(site, account, outcomes, accuracies, len(parts.held_out))
    assert {outcome.status for outcome in outcomes} <= {"learned", "refused", "nothing new", "too few"}
    assert any(outcome.status == "learned" for outcome in outcomes)


# --- what is shown ---------------------------------------------------------------------------------------------------


def parted(rng: np.random.Generator) -> Parts:
    bank, rest = fresh_crops.shipped()
    golden, held_out, stream = fresh_crops.split_by_image(rest, (0.4, 0.3, 0.3), rng)
    hidden = head_bank.joined([bank, golden, stream])  # the first head's bank and golden set lose them
    pools = {
        label: fresh_crops.features_of(hidden if label in APPEARS else stream, label) for label in set(rest.labels)
    }
    return Parts(golden, held_out, pools)


def drift_direction(bank: Bank, rng: np.random.Generator) -> NDArray[np.float32]:
    """A deviation such as crops of one class have from their mean (D,), of their mean length."""
    deviations = np.concatenate(
        [crops - crops.mean(axis=0) for crops in (fresh_crops.features_of(bank, label) for label in set(bank.labels))]
    )
    mixed = rng.normal(size=len(deviations)) @ deviations
    return np.asarray(mixed / np.linalg.norm(mixed) * np.linalg.norm(deviations, axis=1).mean(), np.float32)


def queue(
    url: str,
    models: Path,
    parts: Parts,
    cycle: int,
    shift: NDArray[np.float32],
    account: Account,
    rng: np.random.Generator,
) -> int:
    """Queue what the head that serves does not name; returns how many crops it was shown."""
    appeared = sorted(label for label, at in APPEARS.items() if at <= cycle)
    known = sorted(set(parts.stream) - set(APPEARS))
    n_drawn, found = 0, []
    with Embedded(models, models=("head",), threads=1) as asked:
        while len(found) < PER_CYCLE and n_drawn < MAX_DRAWN:
            labels = [str(rng.choice(appeared if i % 2 else known)) for i in range(BATCH)]
            rows = np.stack([fresh_crops.fresh(parts.stream[label], rng) for label in labels]) + shift
            answer = asked.infer("head", {"features": rows})
            n_drawn += len(rows)
            for label, row, verdict in zip(labels, rows, fresh_crops.verdicts(answer), strict=True):
                if verdict.kind in ("unknown", "non-decidable") and len(found) < PER_CYCLE:
                    name = f"cycle-{cycle}-{len(found)}"
                    found.append(fresh_crops.record(row, verdict, name, head_version=answer.version, rng=rng))
                    account.truth[found[-1].id] = label
    fresh_crops.send(url, found)
    return n_drawn


# --- what is counted -------------------------------------------------------------------------------------------------


def accuracy(models: Path, parts: Parts, version: int | None, shift: "NDArray[np.float32] | float" = 0.0) -> float:
    """Mean over the classes known at first of the share of held-out crops decided right, by the head in service."""
    shown = parts.held_out
    with Embedded(models, pins={"head": version}, models=("head",), threads=1) as asked:
        answer = asked.infer("head", {"features": np.asarray(shown.features + shift, np.float32)})
    right: dict[str, list[bool]] = {}
    for label, verdict in zip(shown.labels, fresh_crops.verdicts(answer), strict=True):
        right.setdefault(label, []).append(verdict.label == label)
    return float(np.mean([np.mean(of) for label, of in right.items() if label not in APPEARS]))


def identities(site: Site, outcome: Outcome, account: Account) -> list[str]:
    """Note what each cluster of a cycle shows; returns a word on each for the table."""
    if outcome.report is None:
        return []
    found, words = clusters.read(site.learning_dir), []
    for told in json.loads((outcome.report / "report.json").read_text())["clusters"]:
        shown = Counter(account.truth[id_] for id_ in clusters.find(found, told["name"]).members)
        ((mostly, n),) = shown.most_common(1)
        number = told["name"].removeprefix(NOVEL)
        mark = "+" if told["decision"] == "learned" and outcome.status == "learned" else ""
        words.append(f"{mark}{number} {mostly} {n}/{told['size']}")
        if told["name"] in account.first_shown:
            account.n_again += 1
            account.n_again_right += account.first_shown[told["name"]] == mostly
        account.first_shown.setdefault(told["name"], mostly)
    return words


def names_of_novel(models: Path, site: Site, parts: Parts, account: Account) -> float | None:
    """Count whether novel-<n> still means what it meant; returns the share of held-out hidden crops called rightly."""
    shown = parts.held_out
    with Embedded(models, models=("head",), threads=1) as asked:
        answer = asked.infer("head", {"features": shown.features})
    called: dict[str, Counter[str]] = {}
    for label, verdict in zip(shown.labels, fresh_crops.verdicts(answer), strict=True):
        if verdict.kind == "novel" and verdict.label is not None:
            called.setdefault(verdict.label, Counter())[label] += 1
    for name, counts in called.items():
        account.n_named += 1
        account.n_named_right += counts.most_common(1)[0][0] == account.first_shown[name]
    learned = {account.first_shown[label] for label in answer.meta.labels if label.startswith(NOVEL)} & set(APPEARS)
    n = sum(label in learned for label in shown.labels)
    n_right = sum(counts[account.first_shown[name]] for name, counts in called.items())
    return n_right / n if n else None


# --- what is said ----------------------------------------------------------------------------------------------------

COLUMNS = (
    "cycle",
    "drawn",
    "outcome",
    "head",
    "clusters: + learned, n, mostly, of",
    "known right: first head, now",
    "the same, drifted",
    "learned types named",
    "s",
)


def cells(
    cycle: int,
    n_drawn: int,
    outcome: Outcome,
    ids: list[str],
    right: tuple[float, float],
    drifted: tuple[float, float],
    novel: float | None,
    seconds: float,
) -> list[str]:
    return [
        str(cycle),
        str(n_drawn),
        outcome.status,
        str(outcome.head_version or ""),
        ", ".join(ids),
        f"{100 * right[0]:.1f} {100 * right[1]:.1f}",
        f"{100 * drifted[0]:.1f} {100 * drifted[1]:.1f}",
        "-" if novel is None else f"{novel:.0%}",
        f"{seconds:.0f}",
    ]


def conclude(
    site: Site, account: Account, outcomes: list[Outcome], accuracies: list[tuple[float, float]], n_held_out: int
) -> None:
    first, last = accuracies[-1]
    worst = min(now - then for then, now in accuracies)
    known = [k for k in clusters.read(site.learning_dir).clusters if k.head_version is not None]
    ids = Counter(account.first_shown[k.id] for k in known)
    table = Table(show_header=False, title=f"after {len(outcomes)} cycles; {n_held_out} held-out crops")
    table.add_row("accuracy of known classes, points lost", f"{100 * (first - last):+.1f}", f"aim {MAX_LOSS_POINTS:g}")
    table.add_row("the same at the worst cycle", f"{-100 * worst:+.1f}", "")
    for what, n, right in (
        ("clusters seen again that show the same type", account.n_again, account.n_again_right),
        ("novel names that mean the type they meant", account.n_named, account.n_named_right),
    ):
        table.add_row(what, f"{right} of {n}" + (f", {right / n:.0%}" if n else ""), f"aim {MIN_RIGHT:.0%}")
    table.add_row("novel classes learned, by type", ", ".join(f"{label} {n}" for label, n in ids.items()), "")
    table.add_row("cycles", ", ".join(f"{s} {n}" for s, n in Counter(o.status for o in outcomes).items()), "")
    Console(width=160).print(table)
    for cycle, outcome in enumerate(outcomes, 1):
        if outcome.status == "refused":
            Console().print(f"cycle {cycle}: {outcome.sentence}", highlight=False, soft_wrap=True)
