"""What people correct reaches the next head as labels; what they contradict each other about is shown."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cycles import LARGE, cycle_dies
from learning_site import Lab
from semwatch.models import head_bank
from semwatch.operations import decide
from semwatch.streams import records
from semwatch.streams.records import Correction, Record
from semwatch.streams.unknowns import Publisher
from semwatch_training.learning import corrections, cycle_report
from semwatch_training.learning.corrections import agreed, as_record
from semwatch_training.learning.retrain import run_cycle

UTC = "2026-01-03T00:00:00Z"


def correction(record: Record, label: str, **changes: Any) -> Correction:
    values: dict[str, Any] = {
        "id": "",
        "corrected_utc": UTC,
        "by": "ana",
        "source": record.source,
        "path": record.path,
        "sha256": record.sha256,
        "page": record.page,
        "box_xyxy": record.box_xyxy,
        "label": label,
        "defect_id": record.defect_id,
    }
    return Correction(**{**values, **changes})


def as_the_line_numbers(made: list[Record]) -> list[Record]:
    """Records under the ids that the daemon gives."""
    return [
        replace(r, id=records.unknown_id(r.site, r.source, r.sha256, r.page, r.box_xyxy, r.defect_id)) for r in made
    ]


def say(lab: Lab, said: list[Correction]) -> None:
    Publisher(lab.client).publish([records.correction_message(one) for one in said])


def test_later_word_of_a_person_holds_and_two_people_may_contradict_each_other(lab: Lab) -> None:
    one, other = as_the_line_numbers(lab.blob(LARGE, 2))
    said = agreed(
        [
            correction(one, "pit", corrected_utc="2026-01-05T00:00:00Z", weight=0.5),
            correction(one, "void"),
            correction(one, "pit", by="ben", weight=0.25),
            correction(other, "pit"),
            correction(other, "defect-free", by="ben"),
        ]
    )
    assert {id_: (held.label, held.weight) for id_, held in said.corrections.items()} == {one.id: ("pit", 0.5)}
    (conflict,) = said.conflicts
    assert "'pit' by ana" in conflict
    assert "'defect-free' by ben" in conflict


def test_corrected_unknowns_are_crops_of_the_next_head_and_leave_the_queue(lab: Lab) -> None:
    waiting = as_the_line_numbers(lab.blob(LARGE, 12))
    lab.add(waiting)
    say(lab, [correction(record, "pit", weight=0.5) for record in waiting[:9]])
    say(lab, [correction(waiting[9], "pit"), correction(waiting[9], "void", by="ben")])
    outcome = run_cycle(lab.site)
    assert outcome.sentence == "head 2 serves and applies what people decided, 9 unknowns by correction"
    assert sorted(lab.learned_ids("pit")) == sorted(record.id for record in waiting[:9])
    assert 1 <= sum(1 for id_ in lab.bank(head_bank.GOLDEN).ids if id_) <= 2
    assert (lab.n_waiting(), lab.states()) == (3, {"learned": 9, "waiting": 3})
    assert lab.client.xlen("semwatch:corrections") == 0
    (conflict,) = outcome.conflicts
    assert "'void' by ben" in conflict
    last = lab.handoff().last_cycle()
    assert last is not None
    assert last.conflicts == outcome.conflicts
    assert outcome.report is not None
    assert conflict in (outcome.report / cycle_report.WORDS).read_text()
    assert run_cycle(lab.site).status == "too few"  # nothing is learned twice


def test_correction_moves_a_learned_crop_and_beats_a_rejection(lab: Lab) -> None:
    made = as_the_line_numbers(lab.blob(LARGE, 30))
    lab.add(made)
    assert run_cycle(lab.site).sentence == "head 2 serves and knows novel-1 (30 crops)"
    learned = [id_ for id_ in lab.bank().ids if id_]
    by_id = {record.id: record for record in made}
    say(lab, [correction(by_id[learned[0]], "particle"), correction(by_id[learned[1]], "rust")])
    assert run_cycle(lab.site).status == "learned"
    assert learned[0] in lab.learned_ids("particle")
    assert learned[1] in lab.learned_ids("novel-1")  # one crop makes no class: it waits for more
    decide.reject(lab.site, "novel-1")
    assert run_cycle(lab.site).status == "learned"
    say(lab, [correction(by_id[id_], "particle") for id_ in learned[2:4]])
    assert run_cycle(lab.site).status == "learned"
    assert sorted(lab.learned_ids()) == sorted([learned[0], *learned[2:4]])
    assert lab.states() == {"learned": 3, "rejected": 27}


def test_missed_defect_brings_its_crop(lab: Lab) -> None:
    made = lab.blob(LARGE, 8)
    versions = {"model_versions": {"encoder": 1}}
    said = [
        correction(
            r, "pit", defect_id=None, features=r.features, soft_mask=r.soft_mask, crop=r.crop, crop_xyxy=r.crop_xyxy,
            area_px=r.area_px, field_short_px=r.field_short_px, **versions,
        )
        for r in made
    ]  # fmt: skip
    say(lab, said)
    assert run_cycle(lab.site).status == "learned"
    assert sorted(lab.learned_ids("pit")) == sorted(one.unknown_id for one in said)
    assert np.isfinite(lab.bank().features).all()
    assert as_record(replace(said[0], crop=None)) is None


def test_crash_after_the_corrections_were_taken_loses_none(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = as_the_line_numbers(lab.blob(LARGE, 8))
    lab.add(waiting)
    say(lab, [correction(record, "pit") for record in waiting])
    cycle_dies(lab, monkeypatch, corrections, "apply")
    assert run_cycle(lab.site).status == "learned"
    assert len(lab.learned_ids("pit")) == 8
