"""The learning line: one cycle from the unknowns in Redis to a head in service, in straight code.

    claim -> sort out -> apply people's decisions -> find classes -> choose -> fit -> judge on the golden set
          -> publish -> the daemon answers with it -> record the outcome -> settle and acknowledge -> tidy up

A cycle begins with the bank and the golden set of the head in service, and what it ends with travels with the head that
it publishes: a crash leaves either the old state or the new one. Records are acknowledged last. What a cycle that died
had in its hands comes again, and what it had learned, the next one finds in the bank.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from semwatch.classes import clusters
from semwatch.classes.clusters import Clusters
from semwatch.classes.register import HOLD_S, ClassRegister
from semwatch.errors import ConfigError, PublishError
from semwatch.models import choice, head_bank, model_repository
from semwatch.models.head_bank import Bank
from semwatch.models.inference import Embedded
from semwatch.settings.recipe import Recipe, load_recipe
from semwatch.settings.site import Site
from semwatch.streams.handoff import MAX_CONFLICTS, Handoff
from semwatch.streams.handoff import Cycle as Ended
from semwatch.streams.records import NO_CLASSES, Correction, Record
from semwatch.streams.unknowns import Consumer
from semwatch.system.clock import utc_now
from semwatch_training.discovery.fit_head import MIN_PER_CLASS, HeadFit, fit_head
from semwatch_training.discovery.head import Head, save_head
from semwatch_training.learning import (
    candidates,
    corrections,
    decisions,
    housekeeping,
    intake,
    new_classes,
    outcomes,
    promotion,
)
from semwatch_training.learning.archive import ARCHIVE, Archive
from semwatch_training.learning.base_head import BaseHead, read_base_head
from semwatch_training.learning.corrections import Agreed
from semwatch_training.learning.crops import images_as_numbers, labelled, with_kept_crops
from semwatch_training.learning.decisions import DecidedCrops
from semwatch_training.learning.housekeeping import REPORTS
from semwatch_training.learning.intake import Claims, SortedUnknowns
from semwatch_training.learning.new_classes import Findings
from semwatch_training.learning.promotion import Answers, Held, Judgement
from semwatch_training.learning.report_builder import ReportBuilder
from semwatch_training.publishing import head_families
from semwatch_training.publishing.export import publish_head

LOCK, CANDIDATE = "retrain.lock", "head.safetensors"
FEW_AFTER_DRIFT = 10
"""Unknowns that suffice for a cycle once the drift watch has asked for one."""
N_REJECTED = 100
"""Crops of a rejected cluster that represent it in clustering."""

POLL_S = 0.1
"""Between two looks at what the daemon serves."""
REPORTED: Mapping[str, Literal["published", "refused", "nothing-new"]] = {
    "learned": "published", "refused": "refused", "nothing new": "nothing-new",
}  # fmt: skip
"""What a cycle's status is called in its record."""

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
    reasons: tuple[str, ...] = ()
    """Why the candidate does not serve."""
    conflicts: tuple[str, ...] = ()
    """Defects that people contradict each other about."""


@dataclass(frozen=True, slots=True, eq=False)
class _Cycle:
    """What one cycle has from its beginning."""

    site: Site
    recipes: Sequence[Recipe]
    archive: Archive
    register: ClassRegister
    handoff: Handoff
    models: Embedded
    claims: Claims
    base: BaseHead
    corrections: Consumer[Correction]
    report: ReportBuilder
    seed: int
    utc: str
    """When it began."""
    progress: Progress


def run_cycle(site: Site, *, seed: int = 0, progress: Progress = lambda *_: None) -> Outcome:
    """Run one cycle of learning.

    Args:
        site: whose unknowns, models and recipes.
        seed: of clustering and fit.
        progress: called after every step.

    Raises:
        ConfigError: the site cannot learn; the message says what to fix.
        ModelMismatch: the head in service brings no bank or golden set.
        ServiceUnavailable: Redis or the disk is away. Nothing is lost; the next cycle begins anew.
        PublishError: the new head could not be placed; the old one serves on.
    """
    folder, repository, utc = site.learning_dir, site.models.repository, utc_now()
    with _alone(folder) as is_alone:
        if not is_alone:
            return Outcome("busy", "another cycle is running: this one leaves it alone")
        recipes = _recipes(site)
        client, prefix = intake.connect(site)
        claims, handoff = intake.claims(client, prefix), Handoff(client, prefix=prefix)
        register = ClassRegister(handoff, folder, owner=intake.learner())
        try:
            with (
                Archive(folder / ARCHIVE) as archive,
                Embedded(repository, threads=site.models.threads, models=("encoder", "head")) as models,
            ):
                base = read_base_head(repository, models)
                report = ReportBuilder(folder / REPORTS / utc.replace(":", ""), utc)
                outcome = _run(
                    _Cycle(
                        site,
                        recipes,
                        archive,
                        register,
                        handoff,
                        models,
                        claims,
                        base,
                        intake.correction_queue(client, prefix),
                        report,
                        seed,
                        utc,
                        progress,
                    )
                )
                housekeeping.tidy(folder, archive, register.read(), site.learning, now_utc=utc)
                _state_outcome(handoff, outcome, archive, utc)
                return outcome
        finally:
            claims.give_back()
            client.close()


def _run(c: _Cycle) -> Outcome:
    repository, wishes = c.site.models.repository, c.handoff.wishes()
    with c.register.locked():  # what a cycle that died left out
        decided = outcomes.record_promotion(c.register, repository, c.base.version, c.base.meta, c.utc)
    c.claims.put_back(c.archive, outcomes.lost(c.base, repository, c.archive, decided), c.utc)
    agreed = _corrections(c)
    decided_crops = decisions.apply_decisions(c.base, decided, seed=c.seed)
    with c.report.step("claim"):
        claimed = c.claims.take(c.site.learning.max_unknowns, c.progress)
        claimed += c.claims.take_doubtful(c.progress)
        found = _sorted_out(c, claimed, decided, agreed)
        corrected = [record for record in found.fresh if record.id in agreed.corrections]
        crops = _crops(corrected, intake.features_of(corrected, c.models, c.progress))
    decided_crops = corrections.apply(decided_crops, decided, agreed, crops)
    fresh = [record for record in found.fresh if record.id not in decided_crops.corrected]
    n, n_needed = sum(one.kind in NO_CLASSES for one in found.fresh), c.site.learning.min_unknowns
    n_needed = min(n_needed, FEW_AFTER_DRIFT) if wishes else n_needed
    is_grouped_by_person = not decisions.ids_grouped_by_person(decided, decided_crops.bank.labels).isdisjoint(
        record.id for record in fresh
    )
    if n < n_needed and not decided_crops.is_changed and not is_grouped_by_person:
        return Outcome("too few", f"{n} unknowns wait, {n_needed} are needed: nothing was learned")
    f = _find(c, fresh, decided, decided_crops)
    c.report.add_findings(c.base, len(claimed), found, f, c.archive)
    c.report.add_corrections(len(decided_crops.corrected), agreed.conflicts)
    if not f.accepted and not decided_crops.is_changed:
        c.handoff.answer(list(wishes))
        return Outcome("nothing new", _nothing_new(f), report=c.report.write("nothing-new"), conflicts=agreed.conflicts)
    with c.report.step("fit"):
        bank, golden = new_classes.grown(decided_crops, f, c.seed, was_proof=set(c.base.golden.ids) - {""})
        head = _fitted(c, bank, agreed)
    with c.report.step("judge"):
        judgements = _judge(c, head, decided_crops, golden, _held(c, f, decided_crops))
    c.report.add_judgements(judgements, bank, c.base.frozen_width)
    if reasons := [f"{recipe.name}: {reason}" for recipe, judged in judgements for reason in judged.reasons]:
        return _refused(c, head, reasons, agreed.conflicts)
    # A name that a person gives now would publish the old head: it waits until this one serves, or is given before.
    with c.register.locked(HOLD_S + c.site.learning.swap_timeout_s):
        with c.report.step("publish"):
            version = _publish(c, head, decided_crops, f, judgements, bank, golden)
        with c.report.step("swap"):
            why_not = _serves(c, version)
        if why_not is None:
            outcomes.record_promotion(
                c.register, repository, version, model_repository.read_meta(repository, "head", version), c.utc
            )
    if why_not is not None:
        choice.withdraw(repository, "head", version, why_not)
        return _refused(c, head, [why_not], agreed.conflicts)
    with c.report.step("settle"):
        done = outcomes.settlements_by_head(f, decided_crops, version)
        intake.settle(c.archive, done, c.utc)
        choice.prune(repository, "head", keep=c.site.learning.keep_versions)
        c.handoff.answer(list(wishes))
        c.claims.put_back(c.archive, [*c.archive.state_of(decided_crops.removed)], c.utc)
    report = c.report.write("published", version)
    c.claims.acknowledge(list(done))
    sentence = f"head {version} serves and {_learned(f, decided_crops)}"
    return Outcome("learned", sentence, version, report, conflicts=agreed.conflicts)


# --- the steps -------------------------------------------------------------------------------------------------------


def _corrections(c: _Cycle) -> Agreed:
    """What people corrected; crops that come along, or that were settled otherwise, wait in the queue for a class."""
    intake.take_corrections(c.corrections, c.archive, c.utc)
    found = c.archive.corrections()
    agreed = corrections.agreed(found)
    states = c.archive.state_of(list(agreed.corrections))
    brought = {one.unknown_id: record for one in found if (record := corrections.as_record(one)) is not None}
    new = [record for id_, record in brought.items() if id_ in agreed.corrections and id_ not in states]
    c.claims.queue_again(new)
    otherwise = [id_ for id_, state in states.items() if state in ("explained", "rejected", "forgotten")]
    c.claims.put_back(c.archive, otherwise, c.utc)
    return agreed


def _sorted_out(c: _Cycle, claimed: Sequence[Record], decided: Clusters, agreed: Agreed) -> SortedUnknowns:
    """Sort records; those that need no learning or can have none leave the queue."""
    settlements = outcomes.settlements(c.base, decided)
    overruled = {id_ for id_ in agreed.corrections if settlements.get(id_, ("learned", ""))[0] == "rejected"}
    found = intake.sort_out(
        claimed,
        c.archive,
        settlements={id_: settled for id_, settled in settlements.items() if id_ not in overruled},
        fault=lambda record: intake.fault_of(record, c.models),
        forget_days=c.site.learning.forget_days,
        now_utc=c.utc,
        kept={
            *decisions.ids_that_wait(decided, decisions.renaming(c.base.meta.labels, decided).values()),
            *agreed.corrections,
        },
    )
    for id_, reason in found.unfit.items():
        c.claims.put_aside(id_, reason)
    c.claims.acknowledge(found.done)
    return found


def _find(c: _Cycle, fresh: Sequence[Record], decided: Clusters, decided_crops: DecidedCrops) -> Findings:
    """Group unknowns by people's decisions and by clustering, and choose what is learned."""
    width = c.base.frozen_width
    with c.report.step("embed"):
        crops = _crops(fresh, intake.features_of(fresh, c.models, c.progress))
    with c.report.step("find classes"):
        by_person, is_left, revisions = decisions.groups_by_person(
            decided, crops, decided_crops.bank.labels, frozen_width=width, seed=c.seed
        )
        left = head_bank.chosen(crops, is_left)
        rejected = _rejected(c, decided)
        known = head_bank.joined([decided_crops.bank, rejected])
        clustered = candidates.find(known, left.features, frozen_width=width, seed=c.seed, progress=c.progress)
        inside = outcomes.inside_rejected(clustered.known, left.features, rejected, frozen_width=width)
        clustered = replace(clustered, known=inside)
        groups = [*decided_crops.parts, *by_person, *new_classes.clustered_groups(clustered, left)]
    with c.report.step("identify"):
        before = decided
        decided, groups, ids = new_classes.identify(c.register, groups, c.utc)
        accepted, refusals = new_classes.choose(decided, ids, groups, decided_crops.bank.labels, c.recipes)
        records = [record for record, is_one in zip(fresh, is_left, strict=True) if is_one]
        f = Findings(clustered, records, groups, ids, decided, accepted, refusals, revisions)
        new_classes.show_examples(c.handoff, before, f, c.archive)
        alike = outcomes.settlements_by_clustering(f, rejected, frozen_width=width)
        intake.settle(c.archive, alike, c.utc)
        c.claims.acknowledge(list(alike))
    return f


def _rejected(c: _Cycle, decided: Clusters) -> Bank:
    """Crops of rejected clusters under stand-in labels: what looks like them is not proposed again."""
    banks = [head_bank.empty(c.base.bank.features.shape[1])]
    for cluster in decided.clusters:
        if clusters.label_of(decided, cluster.id) is not None:
            continue
        shown = c.archive.read_many(cluster.members[:N_REJECTED])
        kept = [record for record in shown if intake.fault_of(record, c.models) is None]
        if len(kept) >= MIN_PER_CLASS:
            crops = _crops(kept, intake.features_of(kept, c.models, c.progress))
            banks.append(labelled(crops, outcomes.REJECTED + cluster.id))
    return head_bank.joined(banks)


def _held(c: _Cycle, f: Findings, decided_crops: DecidedCrops) -> Bank:
    """Unknowns that clustering gave to known classes, under these."""
    known = [one if one in decided_crops.bank.labels else None for one in f.clustered.known]
    rows = [row for row, label in enumerate(known) if label is not None]
    found = [f.records[row] for row in rows]
    crops = _crops(found, intake.features_of(found, c.models, c.progress))
    return replace(crops, labels=tuple(label for label in known if label is not None))


def _fitted(c: _Cycle, bank: Bank, agreed: Agreed) -> Head:
    """A head of the family that serves."""
    classify = head_families.classify(head_families.family_of(c.base.meta), c.models.meta("encoder"), seed=c.seed)
    fit = HeadFit(frozen_width=c.base.frozen_width, seed=c.seed)
    numbers, weights = images_as_numbers(bank.images), agreed.weights_of(bank)
    return fit_head(bank.features, bank.labels, fit, images=numbers, weights=weights, classify=classify)


def _judge(
    c: _Cycle, head: Head, decided_crops: DecidedCrops, golden: Bank, held: Bank
) -> list[tuple[Recipe, Judgement]]:
    """Judge the candidate on the golden set, and on crops that wait, under each recipe."""

    def answers(crops: Bank) -> tuple[Answers, Answers]:
        answer = c.models.infer("head", {"features": crops.features})
        served = Answers(answer.meta.labels, answer.outputs["logits"], answer.outputs["p_values"])
        with torch.no_grad():
            logits, p_values = (values.numpy() for values in head.eval()(torch.from_numpy(crops.features)))
        return decisions.renamed_answers(served, decided_crops.names), Answers(head.labels, logits, p_values)

    served, candidate = answers(golden)
    waiting = Held(held.labels, *answers(held)) if len(held) else None

    def judged(recipe: Recipe) -> Judgement:
        return promotion.judge(
            served,
            candidate,
            golden,
            recipe.promotion,
            rule=recipe.unknown,
            best=promotion.best_of(c.base.meta.provenance, recipe),
            held=waiting,
        )

    return [(recipe, judged(recipe)) for recipe in c.recipes]


def _refused(c: _Cycle, head: Head, reasons: Sequence[str], conflicts: tuple[str, ...]) -> Outcome:
    """Keep a candidate that may not serve, with its report."""
    report = c.report.write("refused", reasons=reasons)
    save_head(head, report / CANDIDATE, encoder_form=f"encoder {c.base.meta.encoder_sha256}", provenance={})
    sentence = f"the candidate is kept and does not serve: {'; '.join(reasons)}"
    return Outcome("refused", sentence, report=report, reasons=tuple(reasons), conflicts=conflicts)


def _publish(
    c: _Cycle,
    head: Head,
    decided_crops: DecidedCrops,
    f: Findings,
    judgements: Sequence[tuple[Recipe, Judgement]],
    bank: Bank,
    golden: Bank,
) -> int:
    """Publish the head under the names that hold now: a person may have given one while it was fitted.

    Raises:
        PublishError: the disk refused, or a person took the head that this one was made from out of service.
    """
    repository, base = c.site.models.repository, c.base
    why_withdrawn = choice.why_withdrawn(repository, "head", base.version)
    if why_withdrawn is not None:
        raise PublishError(f"head {base.version} was withdrawn while the cycle ran ({why_withdrawn}): run another one")
    now = c.register.read()
    names = decisions.renaming(head.labels, now)
    # What was merged or rejected this minute waits for the next cycle.
    taken = [*head.labels, *(new for old, new in names.items() if new != old)]
    fresh = {old: new for old, new in names.items() if new is not None and taken.count(new) == 1}
    head.labels = tuple(fresh.get(label, label) for label in head.labels)
    return publish_head(
        head,
        repository,
        encoder_version=c.models.versions()["encoder"],
        provenance=outcomes.provenance(base, c.utc, judgements, decided_crops, f, bank, golden),
        codes=decisions.codes(base, decided_crops, now),
        bank=with_kept_crops(head_bank.renamed(bank, fresh), c.archive, repository),
        golden=with_kept_crops(head_bank.renamed(golden, fresh), c.archive, repository),
    )


def _serves(c: _Cycle, version: int) -> str | None:
    """Wait for the first answer of the new head; why there is none, or None.

    Where no daemon runs, the head is loaded here as the daemon would load it.
    """
    deadline = time.monotonic() + c.site.learning.swap_timeout_s
    while (serving := c.handoff.serving(c.site.name)) is not None:
        if serving.versions.get("head") == version:
            return None
        if version in serving.refused_heads:
            return f"the daemon refused head {version}: {serving.refused_heads[version]}"
        if time.monotonic() >= deadline:
            return f"the daemon did not serve head {version} within {c.site.learning.swap_timeout_s:.0f} s; see its log"
        time.sleep(POLL_S)
    with Embedded(c.site.models.repository, threads=c.site.models.threads, models=("encoder", "head")) as models:
        return models.refused().get(version)


def _state_outcome(handoff: Handoff, outcome: Outcome, archive: Archive, utc: str) -> None:
    """Say in Redis how the cycle ended; one that had too little to learn from says nothing."""
    if outcome.status in REPORTED:
        handoff.add_cycle(
            Ended(
                utc=utc,
                outcome=REPORTED[outcome.status],
                version=outcome.head_version,
                reasons=outcome.reasons,
                conflicts=outcome.conflicts[:MAX_CONFLICTS],
                sentence=outcome.sentence,
                unknowns={str(state): n for state, n in archive.counts().items()},
            )
        )


# --- small things ----------------------------------------------------------------------------------------------------


def _crops(found: Sequence[Record], features: NDArray[np.float32]) -> Bank:
    images = tuple(f"{record.sha256} {record.page}" for record in found)
    return Bank(features, ("",) * len(found), images, tuple(record.id for record in found))


def _learned(f: Findings, decided_crops: DecidedCrops) -> str:
    learned = ", ".join(f"{label} ({n} crops)" for label, n in f.learned.items())
    n = len(decided_crops.corrected)
    known = f"knows {learned}" if learned else "applies what people decided"
    return known + (f", {n} unknown{'s' if n > 1 else ''} by correction" if n else "")


def _nothing_new(f: Findings) -> str:
    why = "; ".join(f"{f.ids[i]} {reasons[0]}" for i, reasons in list(f.refusals.items())[:3])
    return f"{len(f.records)} unknowns make no new class that may be learned yet" + (f": {why}" if why else "")


def _recipes(site: Site) -> list[Recipe]:
    """The recipes that a new head would serve, each once: those that pin a head are not asked.

    Raises:
        ConfigError: the head is pinned, so that no new one would ever serve.
    """
    pinned = choice.pin_of(site.models.repository, "head")
    if pinned is not None:
        raise ConfigError(
            f"head {pinned} is pinned: no new one would serve; release it: `semwatch models pin head --release`"
        )
    recipes = {recipe.id: recipe for folder in site.folders for recipe in (load_recipe(folder.recipe),)}
    free = [recipe for recipe in recipes.values() if recipe.pins.head is None]
    if not free:
        raise ConfigError("every recipe pins its head: no new one would serve; set pins.head to null in one of them")
    return free


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
