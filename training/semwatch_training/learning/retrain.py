"""The learning line: one cycle from the unknowns in Redis to a head in service, in straight code.

    claim -> sort out -> obey people's decisions -> find classes -> choose -> fit -> judge on the golden set
          -> publish -> the daemon answers with it -> settle and acknowledge

A cycle begins with the bank and the golden set of the head in service, and what it ends with travels with the head that
it publishes: a crash leaves either the old state or the new one. Records are acknowledged last. What a cycle that died
had in its hands comes again, and what it had learned the next one finds in the bank.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from semwatch import clusters, drift, head_bank, model_repository, serving, sightings
from semwatch.archive import ARCHIVE, Archive
from semwatch.archive import State as Settled
from semwatch.clusters import Clusters
from semwatch.config import Recipe, Site, load_recipe
from semwatch.errors import ConfigError, ServiceUnavailable
from semwatch.head_bank import Bank
from semwatch.inference import Embedded
from semwatch.ledger import Ledger
from semwatch.records import Record
from semwatch.sightings import Found
from semwatch.unknowns import Claimed, Consumer
from semwatch_training.discovery.fit_head import MIN_PER_CLASS, HeadFit, fit_head
from semwatch_training.discovery.head import Head, save_head
from semwatch_training.export import publish_head
from semwatch_training.learning import candidates, intake, promotion, standing
from semwatch_training.learning.account import Account
from semwatch_training.learning.candidates import Candidates
from semwatch_training.learning.intake import Sorted
from semwatch_training.learning.promotion import Answers, Judgement
from semwatch_training.learning.standing import Findings, Group, Obeyed, Standing

LOCK, CYCLES, CANDIDATE = "retrain.lock", "cycles", "head.safetensors"
LEDGER = "ledger.sqlite"
FEW_AFTER_DRIFT = 10
"""Unknowns that suffice for a cycle once the drift watch has asked for one."""
GOLDEN_SHARE = 5
"""Every fifth crop of a new class goes to the golden set."""
MAX_PER_CLASS = 500
"""Crops of one class in a bank; a head stores fewer."""
REJECTED = "rejected "
"""Begins the stand-in classes that keep rejected crops from being proposed again; no head knows them."""
N_EXAMPLES, N_REJECTED = 12, 100
ACK_ATTEMPTS, ACK_PAUSE_S = 5, 1.0

Status = Literal["learned", "refused", "nothing new", "too few", "busy"]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a cycle ended."""

    status: Status
    sentence: str
    """For people, one line."""
    head_version: int | None = None
    """The head that was published and serves."""
    report: Path | None = None
    """Folder of the cycle's report."""


@dataclass(slots=True)
class Held:
    """Records in our hands; whatever is not acknowledged goes back."""

    queue: Consumer[Record]
    claims: dict[str, list[Claimed[Record]]] = field(default_factory=dict)
    """By record id: one record may stand in two entries."""

    def take(self, n: int, progress: Progress) -> list[Claimed[Record]]:
        """Claim up to n records."""
        claimed = intake.claim_all(self.queue, n, progress)
        for item in claimed:
            self.claims.setdefault(item.record.id, []).append(item)
        return claimed

    def put_aside(self, item: Claimed[Record], reason: str) -> None:
        """Make a record a dead letter."""
        self.queue.dead_letter(item, reason)
        self.claims.pop(item.record.id, None)

    def acknowledge(self, ids: Sequence[str]) -> None:
        """Say that these records are done.

        Raises:
            ServiceUnavailable: Redis stayed away; the next cycle acknowledges them and learns nothing twice.
        """
        done = [item for id_ in ids for item in self.claims.get(id_, ())]
        for attempt in range(1, ACK_ATTEMPTS + 1):
            try:
                intake.in_batches(self.queue.ack, done)
                break
            except ServiceUnavailable:
                if attempt == ACK_ATTEMPTS:
                    raise
                time.sleep(ACK_PAUSE_S * attempt)
        for id_ in ids:
            self.claims.pop(id_, None)

    def give_back(self) -> None:
        """Return all that was not acknowledged; where Redis is away, it comes free by itself."""
        with suppress(ServiceUnavailable):
            intake.in_batches(self.queue.give_back, [item for items in self.claims.values() for item in items])
        self.claims = {}


def run_cycle(site: Site, *, seed: int = 0, progress: Progress = lambda *_: None) -> Outcome:
    """Run one cycle of learning.

    Args:
        site: whose unknowns, models and recipes.
        seed: of clustering and fit.
        progress: told of every step.

    Raises:
        ConfigError: the site cannot learn; the message says what to fix.
        ModelMismatch: the head in service brings no bank or golden set.
        ServiceUnavailable: Redis or the disk is away. Nothing is lost; the next cycle begins anew.
        PublishError: the new head could not be placed; the old one serves on.
    """
    folder = site.learning_dir
    with _alone(folder) as is_alone:
        if not is_alone:
            return Outcome("busy", "another cycle is running: this one leaves it alone")
        client, prefix = intake.connect(site)
        held = Held(intake.consumer(client, prefix))
        try:
            with (
                Archive(folder / ARCHIVE) as archive,
                Embedded(site.models.repository, threads=site.models.threads, models=("encoder", "head")) as models,
            ):
                return _cycle(site, archive, models, held, seed, progress)
        finally:
            held.give_back()
            client.close()


def _cycle(site: Site, archive: Archive, models: Embedded, held: Held, seed: int, progress: Progress) -> Outcome:
    recipes, folder, utc = _recipes(site), site.learning_dir, _utc_now()
    account = Account(folder / CYCLES / utc.replace(":", ""), utc)
    base = standing.standing(site.models.repository, models)
    decided = clusters.change(folder, lambda c: standing.caught_up(c, base.meta, base.version, utc))
    obeyed = standing.obey(base, decided, seed=seed)
    with account.step("claim"):
        claims = held.take(site.learning.max_unknowns, progress)
        found = intake.sort_out(
            claims,
            archive,
            learned_ids=set(base.bank.ids) | set(base.golden.ids),
            forget_days=site.learning.forget_days,
            now_utc=utc,
        )
        fresh = _embeddable(found, models, held)
    n_needed = min(site.learning.min_unknowns, FEW_AFTER_DRIFT if drift.wanted(folder) else site.learning.min_unknowns)
    if len(fresh) < n_needed and not obeyed.is_changed:
        return Outcome("too few", f"{len(fresh)} unknowns wait, {n_needed} are needed: nothing was learned")
    with account.step("embed"):
        features = intake.features_of(fresh, models, progress)
    with account.step("find classes"):
        known = head_bank.joined([obeyed.bank, _rejected(decided, archive, models, progress)])
        clustered = candidates.find(known, features, frozen_width=base.frozen_width, seed=seed, progress=progress)
        groups = [*obeyed.parts, *_groups(clustered, _crops(fresh, features))]
    with account.step("identify"):
        f = _choose(*_identify(folder, groups, utc), groups, clustered, fresh, obeyed, recipes)
        _write_examples(folder, f, archive)
    account.found(base, len(claims), found, f, archive)
    if not f.accepted and not obeyed.is_changed:
        drift.clear_wanted(folder)
        return Outcome("nothing new", _nothing_new(f), report=account.write("nothing-new"))
    with account.step("fit"):
        bank, golden = _grown(obeyed, f, seed)
        fit = HeadFit(frozen_width=base.frozen_width, seed=seed)
        head = fit_head(bank.features, bank.labels, fit, images=standing.images_as_numbers(bank.images))
    with account.step("judge"):
        judgements = _judge(head, models, obeyed, golden, recipes)
    account.judged(judgements, bank, base.frozen_width)
    reasons = [f"{name}: {reason}" for name, judged in judgements.items() for reason in judged.reasons]
    if reasons:
        return _refused(head, base, account, reasons)
    # A name that a person gives now would publish the old head: it waits until this one serves, or is given before.
    with clusters.locked(folder):
        with account.step("publish"):
            version = _publish(site, models, base, obeyed, head, bank, golden, judgements, f, utc)
        with account.step("swap"):
            why_not = _serves(site, version)
        if why_not is None:
            _note(site, f, obeyed, version, utc)
    if why_not is not None:
        serving.withdraw(site.models.repository, "head", version, why_not)
        return _refused(head, base, account, [why_not])
    with account.step("settle"):
        done = _what_became(found, f)
        for (state, note), record_ids in _by_fate(done).items():
            archive.settle(record_ids, state, note and f"{note}, head {version}", now_utc=utc)
        held.acknowledge(list(done))
        serving.prune(site.models.repository, "head", keep=site.learning.keep_versions)
        drift.clear_wanted(folder)
    report = account.write("published", version)
    learned = ", ".join(f"{label} ({n} crops)" for label, n in f.learned.items()) or "what people decided"
    return Outcome("learned", f"head {version} serves and knows {learned}", version, report)


# --- the steps -------------------------------------------------------------------------------------------------------


def _embeddable(found: Sorted, models: Embedded, held: Held) -> list[Record]:
    """Fresh records; one whose features cannot be had becomes a dead letter that says why."""
    fresh = []
    for item in found.fresh:
        if intake.can_be_embedded(item.record, models):
            fresh.append(item.record)
        else:
            held.put_aside(
                item,
                "features of another encoder, and a crop that the one in service cannot embed: review the image again",
            )
    return fresh


def _rejected(decided: Clusters, archive: Archive, models: Embedded, progress: Progress) -> Bank:
    """Crops of rejected clusters under stand-in labels: what looks like them is not proposed again."""
    banks = [head_bank.empty(models.meta("encoder").outputs["features"].shape[0])]
    for cluster in decided.clusters:
        if clusters.label_of(decided, cluster.id) is not None:
            continue
        kept = [r for r in archive.read_many(cluster.members[:N_REJECTED]) if intake.can_be_embedded(r, models)]
        if len(kept) >= MIN_PER_CLASS:
            features = intake.features_of(kept, models, progress)
            banks.append(standing.labelled(_crops(kept, features), REJECTED + cluster.id))
    return head_bank.joined(banks)


def _groups(clustered: Candidates, crops: Bank) -> list[Group]:
    found = [(head_bank.chosen(crops, candidate.members), candidate) for candidate in clustered.classes]
    return [Group(rows.ids, rows, candidate) for rows, candidate in found]


def _identify(folder: Path, groups: Sequence[Group], utc: str) -> tuple[Clusters, list[str]]:
    """Give the groups their identities, those of earlier cycles where they are the same."""
    ids: list[str] = []
    seen = [
        Found(
            members=group.ids,
            size=group.candidate.size,
            cohesion=group.candidate.cohesion,
            nearest_known=group.candidate.nearest_known or "",
            nearest_distance=max(0.0, float(np.nan_to_num(group.candidate.nearest_distance))),
            examples=group.ids[:N_EXAMPLES],
        )
        for group in groups
    ]

    def step(c: Clusters) -> Clusters:
        numbers = iter(range(c.next_number, c.next_number + len(seen)))
        ids[:] = [id_ or f"novel-{next(numbers)}" for id_ in sightings.matches(c, seen)]
        return sightings.seen(c, seen, utc=utc)

    return clusters.change(folder, step), ids


def _choose(
    decided: Clusters,
    ids: Sequence[str],
    groups: Sequence[Group],
    clustered: Candidates,
    fresh: Sequence[Record],
    obeyed: Obeyed,
    recipes: Sequence[Recipe],
) -> Findings:
    """Tell the groups that are learned, and under which label, from those that are not, and why."""
    accepted: dict[int, str] = {}
    refusals: dict[int, Sequence[str]] = {}
    for i, (group, id_) in enumerate(zip(groups, ids, strict=True)):
        label = clusters.label_of(decided, id_)
        if label is None:
            refusals[i] = ["a person rejected it"]
        elif group.by_person or label in obeyed.bank.labels:  # a part of a split class, or merged into a known one
            accepted[i] = label
        else:
            cycles = clusters.find(decided, id_).cycles
            why = [
                f"recipe {recipe.name}: {reason}"
                for recipe in recipes
                for reason in promotion.cluster_refusals(group.candidate, cycles, recipe.promotion)
            ]
            if why:
                refusals[i] = why
            else:
                accepted[i] = label
    return Findings(fresh, clustered, groups, ids, decided, accepted, refusals)


def _grown(obeyed: Obeyed, f: Findings, seed: int) -> tuple[Bank, Bank]:
    """Bank and golden set with the new classes."""
    banks, golden = [obeyed.bank], [obeyed.golden]
    for i, label in f.accepted.items():
        learned, proof = standing.held_out(f.groups[i].crops, share=GOLDEN_SHARE, at_least=MIN_PER_CLASS)
        banks.append(standing.labelled(learned, label))
        golden.append(standing.labelled(proof, label))
    return standing.capped(head_bank.joined(banks), MAX_PER_CLASS, seed), head_bank.joined(golden)


def _judge(
    head: Head, models: Embedded, obeyed: Obeyed, golden: Bank, recipes: Sequence[Recipe]
) -> dict[str, Judgement]:
    """The judgement of each recipe, by its name."""
    answer = models.infer("head", {"features": golden.features})
    served = Answers(answer.meta.labels, answer.outputs["logits"], answer.outputs["p_values"])
    with torch.no_grad():
        logits, p_values = (values.numpy() for values in head.eval()(torch.from_numpy(golden.features)))
    return {
        recipe.name: promotion.judge(
            standing.renamed_answers(served, obeyed.names),
            Answers(head.labels, logits, p_values),
            golden,
            recipe.promotion,
            significance=recipe.unknown.significance,
            decide_confidence=recipe.unknown.decide_confidence,
        )
        for recipe in recipes
    }


def _refused(head: Head, base: Standing, account: Account, reasons: Sequence[str]) -> Outcome:
    """Keep a candidate that may not serve, with its report."""
    report = account.write("refused", reasons=reasons)
    save_head(head, report / CANDIDATE, encoder_form=f"encoder {base.meta.encoder_sha256}", provenance={})
    return Outcome("refused", f"the candidate is kept and does not serve: {'; '.join(reasons)}", report=report)


def _publish(
    site: Site,
    models: Embedded,
    base: Standing,
    obeyed: Obeyed,
    head: Head,
    bank: Bank,
    golden: Bank,
    judgements: Mapping[str, Judgement],
    f: Findings,
    utc: str,
) -> int:
    """Publish the head under the names that hold now: a person may have given one while it was fitted."""
    now = clusters.read(site.learning_dir)
    names = {label: new or label for label, new in standing.renaming(head.labels, now).items()}
    if len(set(names.values())) == len(names):  # a merge of this minute waits for the next cycle
        head.labels = tuple(names[label] for label in head.labels)
        bank, golden = head_bank.renamed(bank, names), head_bank.renamed(golden, names)
    return publish_head(
        head,
        site.models.repository,
        encoder_version=models.versions()["encoder"],
        provenance=_provenance(base, utc, judgements, f, bank, golden),
        codes=standing.codes(base, obeyed, now),
        bank=bank,
        golden=golden,
    )


def _serves(site: Site, version: int) -> str | None:
    """Wait for the first answer of the new head; why there is none, or None."""
    if serving.daemon_runs(site.state_dir):
        return serving.await_head(site.state_dir, version, timeout_s=site.learning.swap_timeout_s)
    with Embedded(site.models.repository, threads=site.models.threads, models=("encoder", "head")) as models:
        return models.refused().get(version)


def _note(site: Site, f: Findings, obeyed: Obeyed, version: int, utc: str) -> None:
    """Write the audit line, then the file of clusters, which is locked: there must be no change without its line."""
    entry = {
        "event": "head published",
        "utc": utc,
        "version": version,
        "learned": f.learned,
        "obeyed": list(obeyed.revisions),
    }
    with Ledger(site.state_dir / LEDGER, exclusive=False) as ledger:
        ledger.note(audit=entry, once=f"head published {site.models.repository} {version}")
    now = clusters.read(site.learning_dir)
    new = [f.ids[i] for i in f.accepted if clusters.find(f.decided, f.ids[i]).state in clusters.LIVE]
    told = sightings.applied(sightings.learned(now, new, version, utc), obeyed.revisions, utc)
    clusters.write(site.learning_dir, told.model_copy(update={"revision": now.revision + 1}))


def _what_became(found: Sorted, f: Findings) -> dict[str, tuple[Settled, str]]:
    """State and note by record id of all that is done with; unknowns that no class came of stay in the queue."""
    done: dict[str, tuple[Settled, str]] = {id_: (state, "") for id_, state in found.settled.items()}
    for record, known in zip(f.fresh, f.clustered.known, strict=True):
        if known is not None and known.startswith(REJECTED):
            done[record.id] = "rejected", known.removeprefix(REJECTED)
        elif known is not None and record.kind == "non-decidable":
            done[record.id] = "explained", known
    for i, group in enumerate(f.groups):
        if i in f.accepted:
            done |= dict.fromkeys(group.ids, ("learned", f.accepted[i]))
        elif f.is_rejected(i):
            done |= dict.fromkeys(group.ids, ("rejected", f.ids[i]))
    return done


def _by_fate(done: Mapping[str, tuple[Settled, str]]) -> dict[tuple[Settled, str], list[str]]:
    fates: dict[tuple[Settled, str], list[str]] = {}
    for id_, fate in done.items():
        fates.setdefault(fate, []).append(id_)
    return fates


# --- small things ----------------------------------------------------------------------------------------------------


def _crops(found: Sequence[Record], features: NDArray[np.float32]) -> Bank:
    images = tuple(f"{record.sha256} {record.page}" for record in found)
    return Bank(features, ("",) * len(found), images, tuple(record.id for record in found))


def _provenance(
    base: Standing, utc: str, judgements: Mapping[str, Judgement], f: Findings, bank: Bank, golden: Bank
) -> dict[str, str | float | int]:
    """How the head was made. ``made_from`` is the ancestor's: what learning grew is not built over by `build`."""
    kept = {key: base.meta.provenance[key] for key in ("made_from",) if key in base.meta.provenance}
    worst = max(judged.unknown_rate for judged in judgements.values())
    return {
        **kept,
        "cycle": utc,
        "parent": base.version,
        "learned": ", ".join(sorted(f.learned)),
        "bank": len(bank),
        "golden": len(golden),
        "golden_unknown_rate": round(worst, 4),
    }


def _write_examples(folder: Path, f: Findings, archive: Archive) -> None:
    for id_, group in zip(f.ids, f.groups, strict=True):
        place = folder / clusters.EXAMPLES / id_
        place.mkdir(parents=True, exist_ok=True)
        wanted = {Path(example).stem for example in clusters.find(f.decided, id_).examples}
        for record in archive.read_many([i for i in group.ids if i in wanted]):
            _, png = cv2.imencode(".png", record.crop)
            model_repository.write_whole(place / f"{record.id}.png", png.tobytes())


def _nothing_new(f: Findings) -> str:
    why = "; ".join(f"{f.ids[i]} {reasons[0]}" for i, reasons in list(f.refusals.items())[:3])
    return f"{len(f.fresh)} unknowns make no new class that may be learned yet" + (f": {why}" if why else "")


def _recipes(site: Site) -> list[Recipe]:
    """The recipes that a new head would serve, each once: those that pin a head are not asked.

    Raises:
        ConfigError: every recipe pins its head, so that no new one would ever serve.
    """
    recipes = {recipe.id: recipe for folder in site.folders for recipe in (load_recipe(folder.recipe),)}
    free = [recipe for recipe in recipes.values() if recipe.pins.head is None]
    if not free:
        raise ConfigError("every recipe pins its head: no new one would serve; set pins.head to null in one of them")
    return free


def _utc_now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Whether this is the only cycle of the folder; holds it until the end, and a crash lets go of it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be used ({error.strerror}); check the folder and its rights") from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)
