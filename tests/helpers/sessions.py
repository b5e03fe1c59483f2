"""Sessions of a clumsy person: whole cycles on a site of tiny models, and random decisions between them.

What must never happen is found by ``harms``, whatever she decides:

- a record is lost: it counts as learned and no head that serves has learned it, or nobody waits for it any more,
- a merge is called applied while crops of the merged cluster still wait,
- a crop is rejected that is of another kind than all crops of the rejected cluster,
- a class that the first head knew is taken by a new one,
- a crop that was taken out of a cluster is a crop of its class again,
- a step that was taken back has not gone: a merged crop is still of the other class, a rejected one still rejected.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fresh_crops import features_of, fresh
from learning_site import RULE, Lab
from semwatch.classes import clusters
from semwatch.classes.clusters import LIVE, Clusters
from semwatch.defects import DEFECT_FREE
from semwatch.errors import ConfigError, PublishError
from semwatch.line.classification import decide as verdict_of
from semwatch.models import choice, head_bank
from semwatch.models.inference import Embedded
from semwatch.operations import decide
from semwatch.streams.records import Record
from semwatch_training.learning.archive import ARCHIVE, Archive
from semwatch_training.learning.retrain import run_cycle

HIDDEN = (5, 6, 7)
"""Axes of the kinds that the first head does not know."""
KNOWN = ("bridge", "particle")
N_PROBES = 30
UNDOES = 0.6
"""How often a person with second thoughts takes a step back."""
EMPTIED = 0.5
"""A known class that loses more of its crops than this to new ones is emptied."""


@dataclass(eq=False)
class Session:
    """One site, what was put into it, and what was decided."""

    lab: Lab
    rng: np.random.Generator
    kind_of: dict[str, str] = field(default_factory=dict)
    """True kind by record id."""
    rejected_kinds: dict[str, set[str]] = field(default_factory=dict)
    """Kinds among the crops of each rejected cluster."""
    probes: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """Crops of each known class that no head has seen."""
    named_at_first: dict[str, int] = field(default_factory=dict)
    n_made: int = 0
    second_thoughts: np.random.Generator | None = None
    """Draws when she takes her last step back; None: never."""
    log: list[str] = field(default_factory=list)


def run(lab: Lab, seed: int, *, rounds: int = 3, undoes: bool = False) -> Session:
    """One session of so many rounds: unknowns come, a cycle runs, a person decides; two cycles follow at the end.

    With ``undoes`` she takes more than every second step back, some at once, some after the next cycle or rollback.
    """
    session = Session(lab, np.random.default_rng(seed))
    session.second_thoughts = np.random.default_rng(10_000 + seed) if undoes else None
    bank = lab.bank()
    session.probes = {
        label: np.stack([fresh(features_of(bank, label), session.rng) for _ in range(N_PROBES)]) for label in KNOWN
    }
    session.named_at_first = {label: named[label] for label, named in _named(session).items()}
    lab.change(learning={"min_unknowns": 20, "swap_timeout_s": 20})
    for _ in range(rounds):
        _unknowns_come(session)
        _cycle(session)
        for _ in range(int(session.rng.integers(1, 4))):
            _person_decides(session)
            _person_undoes(session)
    for _ in range(2):
        _cycle(session)
    return session


def harms(session: Session) -> list[str]:
    """What went wrong, in words; nothing where nothing did."""
    lab, found = session.lab, session.lab.found()
    held = {id_: label for name in (head_bank.BANK, head_bank.GOLDEN) for id_, label in _labels(lab, name)}
    waits = set(lab.claimable())
    with Archive(lab.learning / ARCHIVE, read_only=True) as archive:
        states, rejected = archive.state_of(list(session.kind_of)), archive.notes_of("rejected")
    return [
        *_lost(states, held, waits),
        # What a refused head would have learned waits for one that is not.
        *_merges_lost(found, states, held, set() if "cycle: refused" in session.log[-1] else waits, lab.labels),
        *_wrongly_rejected(session, rejected),
        *_emptied(session),
        *_back_again(found, held),
        *_not_undone(found, held, states, rejected),
    ]


# --- what must not happen --------------------------------------------------------------------------------------------


def _lost(states: Mapping[str, str], held: dict[str, str], waits: set[str]) -> list[str]:
    gone = [id_ for id_, state in states.items() if state == "learned" and id_ not in held]
    nowhere = [id_ for id_, state in states.items() if state == "waiting" and id_ not in waits]
    found = [f"{len(gone)} records count as learned, and the head in service has not learned them"] if gone else []
    return found + ([f"{len(nowhere)} records wait, and nobody will find them"] if nowhere else [])


def _merges_lost(
    found: Clusters, states: Mapping[str, str], held: dict[str, str], waits: set[str], labels: Sequence[str]
) -> list[str]:
    lost = []
    is_split = {d.cluster for d in clusters.in_force(found) if d.kind == "split"}
    for d in (d for d in clusters.in_force(found) if d.kind == "merge" and d.applied_utc is not None):
        k = clusters.find(found, d.cluster)
        of_cluster = [id_ for id_ in k.members if states.get(id_) == "waiting" and id_ in waits]
        if of_cluster and clusters.label_of(found, k.id) in labels:
            lost.append(f"{k.id} was merged into {d.into}, which counts as applied, and {len(of_cluster)} crops wait")
        label = clusters.label_of(found, k.id)
        elsewhere = {held[id_] for id_ in k.members if id_ in held and held[id_] != label}
        if elsewhere and label in labels and not is_split & {k.id, d.into}:
            lost.append(f"{k.id} was merged into {d.into}, which counts as applied, and its crops are of {elsewhere}")
    return lost


def _wrongly_rejected(session: Session, rejected: dict[str, str]) -> list[str]:
    wrong = Counter(
        f"{note}: a crop of kind {session.kind_of[id_]}"
        for id_, note in rejected.items()
        if note in session.rejected_kinds and session.kind_of[id_] not in session.rejected_kinds[note]
    )
    return [f"rejected with {what} ({n})" for what, n in wrong.items()]


def _emptied(session: Session) -> list[str]:
    known = {*KNOWN, DEFECT_FREE}
    found = []
    for label, named in _named(session).items():
        taken = sum(n for other, n in named.items() if other is not None and other not in known)
        if session.named_at_first[label] >= N_PROBES / 2 and taken > EMPTIED * N_PROBES:
            found.append(f"{label} is emptied: {dict(named)} of {N_PROBES}, {session.named_at_first[label]} at first")
    return found


def _back_again(found: Clusters, held: dict[str, str]) -> list[str]:
    done = {d.revision for d in clusters.in_force(found) if d.kind == "remove" and d.applied_utc is not None}
    back = []
    for d in (d for d in found.decisions if d.revision in done):
        own = clusters.names_of(found, clusters.find(found, d.cluster)) | {clusters.label_of(found, d.cluster)}
        back += [id_ for id_ in d.crops or () if id_ in held and held[id_] in own]
    return [f"{len(back)} crops that were taken out are back"] if back else []


def _not_undone(
    found: Clusters, held: dict[str, str], states: Mapping[str, str], rejected: dict[str, str]
) -> list[str]:
    wrong = []
    for d, k in clusters.taken_back(found, "merge"):
        is_waiting = any(e.undoes == d.revision and e.applied_utc is None for e in found.decisions)
        own = clusters.names_of(found, k) | {clusters.label_of(found, k.id)}
        if k.state not in LIVE or is_waiting:  # rejected or merged since, or the head was refused
            continue
        still = [id_ for id_ in k.members if held.get(id_, k.id) not in own]
        label = d.into if not d.into.startswith("novel-") else clusters.label_of(found, d.into)
        of_it = [id_ for id_ in still if held[id_] in (d.into, label)]
        if of_it:
            wrong.append(f"{len(of_it)} crops of {k.id} are still of {d.into}, though the merge was taken back")
    for _, k in clusters.taken_back(found, "reject"):
        if clusters.label_of(found, k.id) is not None and (n := sum(note == k.id for note in rejected.values())):
            wrong.append(f"{n} records are rejected with {k.id}, though that was taken back")
        if k.state in LIVE and any(states.get(id_) == "rejected" and rejected.get(id_) == k.id for id_ in k.members):
            wrong.append(f"crops of {k.id} are rejected, though that was taken back")
    return wrong


# --- what happens ----------------------------------------------------------------------------------------------------


def _unknowns_come(session: Session) -> None:
    rng, lab, made = session.rng, session.lab, list[Record]()
    for axis in rng.choice(HIDDEN, int(rng.integers(1, 3)), replace=False).tolist():
        made += _numbered(
            session, lab.blob(axis, int(rng.integers(14, 24)), first=1000 * axis + session.n_made), f"axis {axis}"
        )
    if rng.random() < 0.5:  # of a known class, but a little different
        label = KNOWN[int(rng.integers(2))]
        shift = np.zeros(lab.width, np.float32)
        shift[8] = rng.uniform(1, 5)
        some = lab.blob(9, int(rng.integers(14, 40)), first=500_000 + session.n_made)
        of_class = features_of(lab.bank(), label)
        for record in some:
            record.features[:] = fresh(of_class, rng) + shift
        made += _numbered(session, some, label)
    lab.add(made)


def _numbered(session: Session, made: list[Record], kind: str) -> list[Record]:
    session.n_made += 100
    session.kind_of |= {record.id: kind for record in made}
    return made


def _cycle(session: Session) -> None:
    outcome = run_cycle(session.lab.site)
    session.log.append(f"cycle: {outcome.status}: {outcome.sentence}")


def _person_decides(session: Session) -> None:
    """One random decision; what is refused is only noted."""
    rng, site, found = session.rng, session.lab.site, session.lab.found()
    live = [k for k in found.clusters if k.state in LIVE]
    act = str(rng.choice(["name", "merge", "merge", "split", "reject", "remove", "roll back", "roll back"]))
    if act != "roll back" and not live:
        return
    try:
        if act == "roll back":
            session.log.append(f"{act} {choice.roll_back(session.lab.repository, 'head', 'a test')}")
            return
        k = live[int(rng.integers(len(live)))]
        session.log.append(f"{act} {k.id}")
        if act == "name":
            decide.name(site, k.id, str(rng.choice(["pit", "scratch", "void"])))
        elif act == "merge":
            decide.merge(site, k.id, str(rng.choice([*(other.id for other in live), *KNOWN])))
        elif act == "split":
            decide.split(site, k.id, 2)
        elif act == "remove":
            decide.remove(site, k.id, rng.choice(k.members, min(3, len(k.members)), replace=False).tolist())
        else:
            # What was merged into it is part of it.
            of_class = [other for other in found.clusters if clusters.root_of(found, other) == k]
            kinds = {session.kind_of[id_] for other in of_class for id_ in other.members}
            decide.reject(site, k.id)
            session.rejected_kinds |= dict.fromkeys((other.id for other in of_class), kinds)
    except (ConfigError, PublishError) as error:
        session.log.append(f"refused: {error}")


def _person_undoes(session: Session) -> None:
    """Take the last step back, or the last about some cluster; what is refused is only noted."""
    rng, found = session.second_thoughts, session.lab.found()
    taken = clusters.in_force(found)
    if rng is None or not taken or rng.random() > UNDOES:
        return
    cluster = None if rng.random() < 0.5 else str(rng.choice([d.cluster for d in taken]))
    try:
        done = decide.undo(session.lab.site, cluster)
        assert done.undone is not None
        session.log.append(f"undo {done.undone.kind} {done.undone.cluster}")
        if done.undone.kind == "reject":
            parts = clusters.part_of(session.lab.found(), done.undone.cluster)
            for id_ in (done.undone.cluster, *(k.id for k in parts)):
                session.rejected_kinds.pop(id_, None)
    except (ConfigError, PublishError) as error:
        session.log.append(f"undo refused: {error}")


def _named(session: Session) -> dict[str, Counter[str | None]]:
    """How the head in service names the probes of each known class."""
    with Embedded(session.lab.repository, threads=1, models=("encoder", "head")) as models:
        found = {}
        for label, features in session.probes.items():
            answer = models.infer("head", {"features": features})
            rows = zip(answer.outputs["logits"], answer.outputs["p_values"], strict=True)
            found[label] = Counter(verdict_of(row, p, answer.meta.labels, RULE).label for row, p in rows)
    return found


def _labels(lab: Lab, name: str) -> list[tuple[str, str]]:
    crops = lab.bank(name)
    return [(id_, label) for id_, label in zip(crops.ids, crops.labels, strict=True) if id_]
