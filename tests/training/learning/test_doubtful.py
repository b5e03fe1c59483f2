"""Doubtful crops: named by the line with little support, and searched for new classes with the unknowns."""

from dataclasses import replace

import numpy as np
import pytest

from factories import make_review, make_verdict
from learning_site import Lab, unknown
from progress import quiet
from semwatch.defects import Neighbour
from semwatch.streams import records
from semwatch.streams.records import DOUBTFUL, Record, decode, decode_doubtful, encode, pack, unpack
from semwatch.streams.unknowns import MOST, Publisher
from semwatch_training.learning import intake
from semwatch_training.learning.archive import ARCHIVE, Archive
from semwatch_training.learning.retrain import run_cycle

NEW, BRIDGE = 5, 0


def doubtful(lab: Lab, axis: int, n: int, *, label: str = "bridge", p: float = 0.1) -> list[Record]:
    """Crops of the blob on an axis that the line called ``label``."""
    nearest = (Neighbour(label, 0.9, p),)
    made = lab.blob(axis, n, first=50_000 + 100 * axis)
    return [replace(one, kind="known", label=label, nearest=nearest) for one in made]


def states(lab: Lab, found: list[Record]) -> dict[str, str]:
    with Archive(lab.learning / ARCHIVE) as archive:
        return archive.state_of([one.id for one in found])


def n_in(lab: Lab) -> int:
    return int(lab.client.xlen(f"semwatch:{DOUBTFUL}"))


# --- the stream ------------------------------------------------------------------------------------------------------


def test_named_defects_of_little_support_are_doubtful_and_no_others() -> None:
    verdicts = [make_verdict(kind) for kind in ("known", "unknown", "defect-free")]
    verdicts.append(replace(make_verdict("known", "novel-1"), kind="novel"))
    low = [replace(v, nearest=(replace(v.nearest[0], p_value=0.1), *v.nearest[1:])) for v in verdicts]
    review = make_review(4, verdicts=low)
    assert [(r.kind, r.label) for r in records.doubtful(review, 0.2)] == [("known", "particle"), ("novel", "novel-1")]
    assert records.doubtful(review, 0.05) == []
    assert records.doubtful(review, 0) == []
    assert [(r.kind, r.label) for r in records.records(review)] == [("unknown", "")]


def test_record_of_one_stream_is_none_of_the_other() -> None:
    of_unknown = unpack(pack(encode(unknown(1, 5, width=8))))
    of_doubtful = unpack(pack(encode(replace(unknown(1, 5, width=8), kind="known", label="bridge"))))
    assert decode(of_unknown).kind == "unknown"
    assert decode_doubtful(of_doubtful).label == "bridge"
    with pytest.raises(ValueError, match="no unknown"):
        decode(of_doubtful)
    with pytest.raises(ValueError, match="no doubtful crop"):
        decode_doubtful(of_unknown)
    with pytest.raises(ValueError, match="no doubtful crop"):
        decode_doubtful(unpack(pack(encode(replace(unknown(1, 5, width=8), kind="known")))))


def test_stream_keeps_the_newest_and_unknowns_are_never_dropped(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MOST, DOUBTFUL, 5)
    lab.add(doubtful(lab, NEW, 12))
    lab.add(lab.blob(NEW, 12))
    assert n_in(lab) == 5
    assert lab.n_waiting() == 12


# --- a cycle ---------------------------------------------------------------------------------------------------------


def test_new_class_that_looks_known_to_the_line_is_found_among_doubtful_crops(lab: Lab) -> None:
    lab.change(learning={"min_unknowns": 4, "swap_timeout_s": 20})
    waiting, strange, known = lab.blob(NEW, 4), doubtful(lab, NEW, 14), doubtful(lab, BRIDGE, 6)
    lab.add([*waiting, *strange, *known])
    outcome = run_cycle(lab.site)
    assert outcome.status == "learned"
    assert set(states(lab, [*waiting, *strange]).values()) == {"learned"}, "4 unknowns alone are too few for a class"
    assert set(lab.learned_ids()) >= {one.id for one in [*waiting, *strange]}
    assert set(states(lab, known).values()) == {"explained"}
    assert n_in(lab) == 0


def test_doubtful_crops_alone_start_no_cycle_and_wait(lab: Lab) -> None:
    found = doubtful(lab, NEW, 40)
    lab.add(found)
    assert run_cycle(lab.site).status == "too few"
    assert n_in(lab) == 40
    assert set(states(lab, found).values()) == {"waiting"}


def test_those_that_fit_their_names_least_are_taken_and_the_rest_leaves(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "MOST_DOUBTFUL", 3)
    p_values = np.linspace(0.01, 0.19, 10)
    made = [
        replace(one, nearest=(Neighbour("bridge", 0.9, float(p)),))
        for one, p in zip(doubtful(lab, NEW, 10), p_values[::-1], strict=True)
    ]
    lab.add([*lab.blob(NEW, 2), *made])
    claims = intake.claims(lab.client, "semwatch")
    assert len(claims.take(10, quiet)) == 2
    assert [one.id for one in claims.take_doubtful(quiet)] == [one.id for one in made[:-4:-1]]
    claims.give_back()
    assert n_in(lab) == 3
    assert lab.n_waiting() == 2


def test_doubtful_crop_that_waits_again_goes_back_into_its_own_stream(lab: Lab) -> None:
    (one,) = doubtful(lab, NEW, 1)
    with Archive(lab.learning / ARCHIVE) as archive:
        archive.add([one], now_utc="2026-03-01T00:00:00Z")
        archive.settle([one.id], "learned", "novel-1 as of head 2", now_utc="2026-03-01T00:00:00Z")
        intake.claims(lab.client, "semwatch").put_back(archive, [one.id], "2026-03-02T00:00:00Z")
    assert (n_in(lab), lab.n_waiting()) == (1, 0)
    assert Publisher(lab.client).depths()["unknowns"].length == 0


def test_defect_that_was_doubtful_first_comes_as_an_unknown_all_the_same(lab: Lab) -> None:
    """Judged again under another recipe or head, the line may not name it any more: its id is the same."""
    (one,) = doubtful(lab, NEW, 1)
    unknown_now = replace(one, kind="unknown", label="")
    lab.add([one, unknown_now, unknown_now, one])
    assert (n_in(lab), lab.n_waiting()) == (1, 1)
    claims = intake.claims(lab.client, "semwatch")
    assert [r.kind for r in claims.take(10, quiet)] == ["unknown"]
    assert claims.take_doubtful(quiet) == []
    claims.acknowledge([one.id])
    assert (n_in(lab), lab.n_waiting()) == (0, 0), "both entries are settled together"


def test_explained_doubtful_crop_waits_again_as_an_unknown_and_nothing_else_does(lab: Lab) -> None:
    first, second = doubtful(lab, NEW, 2)
    with Archive(lab.learning / ARCHIVE) as archive:
        archive.add([first, second], now_utc="2026-03-01T00:00:00Z")
        archive.settle([first.id], "explained", "bridge", now_utc="2026-03-01T00:00:00Z")
        archive.settle([second.id], "learned", "novel-1", now_utc="2026-03-01T00:00:00Z")
        archive.add([first, second], now_utc="2026-03-02T00:00:00Z")
        assert archive.state_of([first.id, second.id]) == {first.id: "explained", second.id: "learned"}
        archive.add([replace(r, kind="unknown", label="") for r in (first, second)], now_utc="2026-03-03T00:00:00Z")
        assert archive.state_of([first.id, second.id]) == {first.id: "waiting", second.id: "learned"}
        assert archive.read(first.id).kind == "unknown"
