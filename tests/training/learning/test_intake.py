"""What a cycle learns from: records claimed and given back, sorted, embedded again."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from learning_site import Lab, add_raw, notes_of, unknown
from progress import quiet
from semwatch.errors import ServiceUnavailable
from semwatch.models.inference import Embedded
from semwatch.streams.embedded_redis import EmbeddedRedis
from semwatch.streams.records import Fields, Record, decode, encode
from semwatch_training.learning import intake
from semwatch_training.learning.archive import Archive
from semwatch_training.learning.intake import Claims, Settlement, SortedUnknowns, fault_of, features_of, sort_out

NOW = "2026-03-01T00:00:00Z"
RECENT = "2026-02-20T00:00:00Z"


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[Archive]:
    with Archive(tmp_path / "unknowns.sqlite") as made:
        yield made


@pytest.fixture(scope="module")
def models(tiny_repository: Path) -> Iterator[Embedded]:
    with Embedded(tiny_repository, models=("encoder", "head")) as loaded:
        yield loaded


def record(i: int, **changes: Any) -> Record:
    return unknown(i, 5, width=74, **{"created_utc": RECENT, **changes})


def claims_of(client: redis.Redis) -> Claims:
    return intake.claims(client, "semwatch")


# --- claimed ---------------------------------------------------------------------------------------------------------


def test_nothing_waits_and_nothing_is_claimed(lab: Lab) -> None:
    claims = claims_of(lab.client)
    assert claims.take(10, quiet) == []
    claims.acknowledge([])
    claims.acknowledge(["never heard of"])
    claims.give_back()


def test_no_more_is_taken_than_asked_for_and_what_is_not_acknowledged_goes_back(lab: Lab, monkeypatch) -> None:
    monkeypatch.setattr(intake, "CLAIM", 3)
    lab.add([record(i) for i in range(10)])
    claims = claims_of(lab.client)
    taken = [r.id for r in claims.take(8, quiet)]
    assert taken == [f"{i:032x}" for i in range(8)]
    claims.acknowledge(taken[:5])
    claims.give_back()
    assert lab.claimable() == {f"{i:032x}": 1 for i in range(5, 10)}


def test_record_in_two_entries_is_taken_once_and_both_entries_are_settled_together(lab: Lab) -> None:
    for i in (1, 1, 2, 2, 3, 3):
        add_raw(lab.client, encode(record(i)))
    claims = claims_of(lab.client)
    one, two, three = (r.id for r in claims.take(10, quiet))
    claims.acknowledge([one])
    claims.put_aside(two, "looks like a coffee stain")
    claims.give_back()
    assert lab.n_waiting() == 2
    assert lab.claimable() == {three: 1}
    assert lab.dead_reasons() == {two: "looks like a coffee stain"}


def test_what_a_dead_learner_claimed_comes_again_under_its_name(lab: Lab) -> None:
    lab.add([record(i) for i in range(4)])
    assert len(claims_of(lab.client).take(3, quiet)) == 3
    assert len(lab.claimable()) == 1
    claims = claims_of(lab.client)
    assert len(claims.take(10, quiet)) == 4
    # A delivery soon after the one before does not count.
    assert [items[0].n_deliveries for items in claims.by_id.values()] == [1] * 4


def test_acknowledgement_is_tried_a_few_times_and_no_more(lab: Lab, server: EmbeddedRedis, monkeypatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(intake.time, "sleep", pauses.append)
    lab.add([record(1)])
    claims = claims_of(lab.client)
    (taken,) = claims.take(1, quiet)
    server.stop()
    with pytest.raises(ServiceUnavailable, match="Redis is away"):
        claims.acknowledge([taken.id])
    assert [pause for pause in pauses if pause >= 1] == [1, 2, 3, 4]
    claims.give_back()  # no error: it comes free by itself
    server.start()
    assert lab.n_waiting() == 1


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"page": 10**30}, "out of all bounds"),
        ({"defect_id": -(2**40)}, "out of all bounds"),
        ({"area_px": -1}, "negative"),
        ({"box_xyxy": [0, 0, 2**31, 1]}, "out of all bounds"),
        ({"path": "\ud800"}, "not Unicode"),
        ({"source": "a\udfff"}, "not Unicode"),
    ],
)
def test_record_that_no_archive_could_keep_is_damaged(changes: dict[str, Any], fault: str) -> None:
    fields: Fields = encode(record(1))
    fields[b"meta"] = json.dumps({**json.loads(fields[b"meta"]), **changes}).encode()
    with pytest.raises(ValueError, match=fault):
        decode(fields)


def test_sound_record_is_read_as_it_is() -> None:
    found = decode(encode(record(1, path="Größe/µ.tif", area_px=0)))
    assert (found.id, found.path, found.area_px) == (record(1).id, "Größe/µ.tif", 0)


# --- sorted out ------------------------------------------------------------------------------------------------------


def sorted_out(
    found: Sequence[Record], archive: Archive, settlements: Mapping[str, Settlement] | None = None
) -> SortedUnknowns:
    return sort_out(
        found,
        archive,
        settlements=settlements or {},
        fault=lambda r: "no features" if r.field_short_px is None else None,
        forget_days=30,
        now_utc=NOW,
    )


def test_nothing_is_sorted_into_nothing(archive: Archive) -> None:
    found = sorted_out([], archive)
    assert (found.fresh, found.done, found.unfit, found.n_duplicates) == ((), (), {}, 0)


def test_fresh_records_are_kept_and_come_oldest_first(archive: Archive) -> None:
    records = [record(i, created_utc=f"2026-02-{20 - i:02}T00:00:00Z") for i in range(5)]
    found = sorted_out(records, archive)
    assert [r.id for r in found.fresh] == [r.id for r in records[::-1]]
    assert (found.done, archive.counts()["waiting"]) == ((), 5)


def test_what_an_earlier_cycle_settled_is_done_and_its_note_stays(archive: Archive) -> None:
    archive.add([record(1), record(2)], now_utc=NOW)
    archive.settle([record(1).id], "learned", "pit, head 4", now_utc=RECENT)
    found = sorted_out([record(1), record(2)], archive, {record(1).id: ("rejected", "novel-9")})
    assert (found.done, [r.id for r in found.fresh]) == ((record(1).id,), [record(2).id])
    assert notes_of(archive, [record(1).id]) == {record(1).id: "pit, head 4"}


def test_settlements_are_written_down(archive: Archive) -> None:
    settlements: dict[str, Settlement] = {
        record(1).id: ("learned", "pit, head 4"),
        record(2).id: ("rejected", "novel-9"),
    }
    found = sorted_out([record(i) for i in range(4)], archive, settlements)
    assert set(found.done) == set(settlements)
    assert archive.state_of(found.done) == {id_: state for id_, (state, _) in settlements.items()}
    assert notes_of(archive, found.done) == {id_: note for id_, (_, note) in settlements.items()}


def test_same_place_of_the_same_file_and_the_same_pixels_are_duplicates_of_the_oldest(archive: Archive) -> None:
    first = record(1, created_utc="2026-02-01T00:00:00Z")
    other_recipe = replace(record(2), sha256=first.sha256, recipe_id="1" * 16)
    copied = replace(record(3), crop=first.crop, soft_mask=first.soft_mask)
    found = sorted_out([copied, other_recipe, first], archive)
    assert [r.id for r in found.fresh] == [first.id]
    assert (set(found.done), found.n_duplicates) == ({other_recipe.id, copied.id}, 2)


@pytest.mark.parametrize(
    "differs",
    [{"page": 1}, {"box_xyxy": (0, 0, 9, 9)}, {"source": "sem-2"}],
    ids=["page", "place", "tool"],
)
def test_another_page_place_or_tool_is_no_duplicate(archive: Archive, differs: dict[str, Any]) -> None:
    other = record(2, sha256=record(1).sha256, **differs)
    assert len(sorted_out([record(1), other], archive).fresh) == 2


def test_same_pixels_under_another_mask_are_another_defect(archive: Archive) -> None:
    assert len(sorted_out([record(1), record(2, crop=record(1).crop)], archive).fresh) == 2


def test_repetition_of_what_was_learned_is_a_duplicate(archive: Archive) -> None:
    again = record(2, crop=record(1).crop, soft_mask=record(1).soft_mask)
    found = sorted_out([record(1), again], archive, {record(1).id: ("learned", "pit, head 4")})
    assert (found.fresh, found.n_duplicates) == ((), 1)


@pytest.mark.parametrize("why", ["too old", "unfit"])
def test_what_is_dropped_takes_no_younger_repetition_with_it(archive: Archive, why: str) -> None:
    dropped = record(1, created_utc="2025-01-01T00:00:00Z" if why == "too old" else "2026-02-01T00:00:00Z")
    dropped = dropped if why == "too old" else replace(dropped, field_short_px=None)
    again = record(2, crop=dropped.crop, soft_mask=dropped.soft_mask)
    found = sorted_out([dropped, again], archive)
    assert [r.id for r in found.fresh] == [again.id]
    assert (found.done, dict(found.unfit)) == (
        ((dropped.id,), {}) if why == "too old" else ((), {dropped.id: "no features"})
    )


def test_what_has_waited_too_long_is_forgotten_but_not_a_second_sooner(archive: Archive) -> None:
    old, just = record(1, created_utc="2026-01-29T23:59:59Z"), record(2, created_utc="2026-01-30T00:00:00Z")
    found = sorted_out([old, just], archive)
    assert ([r.id for r in found.fresh], found.done) == ([just.id], (old.id,))
    assert archive.state_of([old.id]) == {old.id: "forgotten"}


@pytest.mark.parametrize("state", ["learned", "explained", "duplicate", "rejected"])
def test_defect_that_was_settled_under_its_old_id_is_not_learned_again_under_its_new_one(
    archive: Archive, state
) -> None:
    old = record(1, id="0" * 32)
    archive.add([old], now_utc=NOW)
    archive.settle([old.id], state, "long ago", now_utc=NOW)
    new = replace(old, id="1" * 32, site="fab3", crop=record(2).crop)  # a later build may decode a pixel otherwise
    found = sorted_out([new], archive)
    assert (found.fresh, found.done, found.n_duplicates) == ((), (new.id,), 1)
    assert notes_of(archive, [new.id]) == {new.id: f"the same place as {old.id}"}


def test_defect_that_waits_under_its_old_id_is_learned_once(archive: Archive) -> None:
    old = record(1, id="0" * 32, created_utc=RECENT)
    new = replace(old, id="1" * 32, site="fab3", created_utc="2026-02-21T00:00:00Z")
    found = sorted_out([new, old], archive)
    assert ([r.id for r in found.fresh], found.done) == ([old.id], (new.id,))
    # The other one was not claimed together with it: another cycle.
    archive.settle([old.id], "waiting", "", now_utc=NOW)
    archive.settle([new.id], "learned", "", now_utc=NOW)
    found = sorted_out([old], archive)
    assert (found.fresh, found.done) == ((), (old.id,))


def test_another_place_of_the_file_and_what_was_forgotten_are_fresh(archive: Archive) -> None:
    old, gone = record(1, id="0" * 32), record(3, id="3" * 32)
    archive.add([old, gone], now_utc=NOW)
    archive.settle([old.id], "learned", "", now_utc=NOW)
    archive.settle([gone.id], "forgotten", "", now_utc=NOW)
    elsewhere = replace(old, id="1" * 32, box_xyxy=(11, 10, 30, 30), crop=record(2).crop)
    again = replace(gone, id="4" * 32)
    found = sorted_out([elsewhere, again], archive)
    assert {r.id for r in found.fresh} == {elsewhere.id, again.id}


def test_fault_of_what_is_done_already_is_nobodys_concern(archive: Archive) -> None:
    spoilt = record(1, field_short_px=None)
    found = sorted_out([spoilt], archive, {spoilt.id: ("learned", "pit, head 4")})
    assert (found.done, dict(found.unfit)) == ((spoilt.id,), {})


# --- embedded --------------------------------------------------------------------------------------------------------

FOREIGN = {"encoder": 7}


def test_features_of_nothing_have_the_encoders_width(models: Embedded) -> None:
    assert features_of([], models, quiet).shape == (0, 74)


def test_features_of_this_encoder_are_taken_as_they_are(models: Embedded) -> None:
    assert fault_of(record(1), models) is None
    np.testing.assert_array_equal(features_of([record(1)], models, quiet), record(1).features[None])


@pytest.mark.parametrize(
    "changes",
    [
        {"model_versions": FOREIGN},
        {"model_versions": {}},
        {"model_hashes": {"encoder": "0" * 16}},
        {"features": np.zeros(3, np.float32)},
        {"features": np.zeros(0, np.float32)},
        {"features": np.full(74, 1e30, np.float32)},
    ],
    ids=[
        "another encoder",
        "no encoder",
        "another of this number",
        "another width",
        "none",
        "beyond half precision",
    ],
)
def test_features_that_mean_nothing_here_are_made_again_from_the_crop(models: Embedded, changes) -> None:
    found = [record(1), record(2, **changes), record(3)]
    assert [fault_of(r, models) for r in found] == [None] * 3
    made = features_of(found, models, quiet)
    asked = {
        "crop": found[1].crop[None],
        "soft_mask": found[1].soft_mask[None],
        "size": np.log2(np.array([[56, 300**0.5]]) / 200).astype(np.float32),
    }
    np.testing.assert_allclose(made[1], models.infer("encoder", asked).outputs["features"][0], rtol=1e-6)
    np.testing.assert_array_equal(made[[0, 2]], [found[0].features, found[2].features])


def test_features_of_this_encoder_under_another_number_are_its_own(models: Embedded) -> None:
    found = [record(1, model_versions=FOREIGN, model_hashes={"encoder": models.hashes()["encoder"]})]
    np.testing.assert_array_equal(features_of(found, models, quiet)[0], found[0].features)


def test_many_crops_are_embedded_in_batches_as_one_would_be(models: Embedded) -> None:
    found = [record(i, model_versions=FOREIGN) for i in range(intake.EMBED_BATCH + 3)]
    steps: list[tuple[int, int]] = []
    made = features_of(found, models, lambda _, done, total: steps.append((done, total)))
    assert steps == [(16, 19), (19, 19)]
    np.testing.assert_allclose(made[17], features_of(found[17:18], models, quiet)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"field_short_px": None}, "it does not hold the size of its field"),
        ({"crop": np.zeros((40, 40), np.uint8)}, r"its crop is \(40, 40\), not \(56, 56\)"),
        ({"soft_mask": np.zeros((16, 16), np.float32)}, r"its soft_mask is \(16, 16\), not \(4, 4\)"),
    ],
)
def test_crop_that_cannot_be_embedded_is_a_fault_that_says_why(models: Embedded, changes, why: str) -> None:
    spoilt = record(1, model_versions=FOREIGN, **changes)
    assert re.search(f"no features of encoder 1, and .*{why}.*: review its image again", fault_of(spoilt, models) or "")
    assert fault_of(record(1, **changes), models) is None  # its own features are enough


@pytest.mark.parametrize("xyxy", [(30, 30, 30, 30), (30, 30, 10, 10)])
def test_crop_without_a_size_is_embedded_all_the_same(models: Embedded, xyxy: tuple[int, int, int, int]) -> None:
    flat = record(1, model_versions=FOREIGN, crop_xyxy=xyxy, area_px=0)
    assert fault_of(flat, models) is None
    assert np.isfinite(features_of([flat], models, quiet)).all()
