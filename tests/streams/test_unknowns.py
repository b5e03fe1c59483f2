"""The record format and the streams, against a real server: nothing is lost, nothing comes twice."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import fields as fields_of
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import jsonschema
import numpy as np
import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from factories import make_review, make_verdict, messages, result_summary
from semwatch.errors import ConfigError, ServiceUnavailable
from semwatch.streams import unknowns
from semwatch.streams.embedded_redis import EmbeddedRedis
from semwatch.streams.records import (
    DOUBTFUL,
    RESULTS,
    UNKNOWNS,
    Fields,
    Message,
    Record,
    decode,
    decode_result,
    encode,
    is_by,
    json_schemas,
    pack,
    records,
    unpack,
)
from semwatch.streams.unknowns import Claimed, Consumer, Publisher, connect

UNKNOWN = make_verdict("unknown")
STREAM = "semwatch:unknowns"
DEAD = "semwatch:unknowns:dead"


def kill(server: EmbeddedRedis) -> None:
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while server.pid is not None and time.monotonic() < deadline:
        time.sleep(0.01)


def make_record(i: int = 0) -> Record:
    record = records(make_review(1, verdicts=[UNKNOWN]))[0]
    return replace(record, id=f"{i:032x}")


def make_messages(n: int) -> list[Message]:
    template = encode(make_record())
    return [(UNKNOWNS, f"{i:032x}", pack({**template, b"id": b"%032x" % i})) for i in range(n)]


def make_consumer(client: redis.Redis, name: str = "a", **options: Any) -> Consumer[Record]:
    return Consumer(client, UNKNOWNS, decode, name=name, **{"counts_after_s": 0.0, **options})


def numbers(claimed: list[Claimed[Record]]) -> list[int]:
    return [int(item.record.id, 16) for item in claimed]


def claim_all(consumer: Consumer[Record], min_idle_s: float = 60, n: int = 7) -> list[Claimed[Record]]:
    return list(itertools.chain.from_iterable(iter(lambda: consumer.claim(n, min_idle_s=min_idle_s), [])))


def assert_same(a: Record, b: Record) -> None:
    for field in fields_of(Record):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if isinstance(left, np.ndarray):
            assert (left.dtype, left.shape) == (right.dtype, right.shape)
            assert np.array_equal(left, right)
        else:
            assert left == right, field.name


# --- the record ------------------------------------------------------------------------------------------------------


def test_review_without_defects_makes_no_record_but_a_summary() -> None:
    review = make_review(0)
    assert records(review) == []
    summary = decode_result(result_summary(review))
    assert (summary.n_defects, summary.n_by_kind, summary.n_by_label) == (0, {}, {})
    assert len(summary.image_scores) == 1
    assert [stream for stream, _, _ in messages(review)] == [RESULTS]


@pytest.mark.parametrize(
    ("versions", "hashes", "expected"),
    [
        ({"encoder": 2}, {"encoder": "abc"}, True),
        ({"encoder": 2}, {}, True),  # old: by number
        ({"encoder": 2}, {"head": "abc"}, True),
        ({"encoder": 7}, {"encoder": "abc"}, True),  # numbers are local
        ({"encoder": 2}, {"encoder": "abd"}, False),
        ({"encoder": 7}, {}, False),
        ({}, {}, False),
    ],
)
def test_record_is_of_a_model_by_content_where_it_says_so_and_by_number_where_not(versions, hashes, expected) -> None:
    (record,) = records(make_review(1, verdicts=[UNKNOWN]))
    made = replace(record, model_versions=versions, model_hashes=hashes)
    assert is_by(decode(encode(made)), "encoder", 2, "abc") is expected


def test_record_and_summary_of_an_older_release_have_no_hashes() -> None:
    review = make_review(1, verdicts=[UNKNOWN])
    for fields, read in ((encode(records(review)[0]), decode), (result_summary(review), decode_result)):
        meta = json.loads(fields[b"meta"])
        del meta["model_hashes"]
        assert read({**fields, b"meta": json.dumps(meta).encode()}).model_hashes == {}


def test_only_unknown_and_non_decidable_defects_become_records() -> None:
    kinds = [make_verdict(kind) for kind in ("known", "unknown", "non-decidable", "defect-free")]
    found = records(make_review(4, verdicts=kinds))
    assert sorted(record.kind for record in found) == ["non-decidable", "unknown"]


def test_record_survives_the_wire_whole() -> None:
    review = make_review(3, n_pages=2, verdicts=[UNKNOWN])
    found = records(review)
    assert len({record.id for record in found}) == 6
    for record in found:
        assert_same(decode(unpack(pack(encode(record)))), record)


def test_ids_are_of_site_tool_content_and_place_alone() -> None:
    review = make_review(1, verdicts=[UNKNOWN])
    same = [
        replace(review, reviewed_utc="2030-01-01T00:00:00Z", path="moved/a.tif"),
        replace(review, recipe_id="x", recipe_name="y"),
        replace(review, model_versions={"encoder": 7}, model_hashes={"encoder": "abc"}),
    ]
    (first,) = records(review)
    assert {records(other)[0].id for other in same} == {first.id}
    (page,) = review.pages
    (defect,) = page.defects
    elsewhere = replace(page, defects=(replace(defect, box_xyxy=(0, 0, 9, 9)),))
    others = [
        replace(review, sha256="0" * 64),
        replace(review, source="b"),
        replace(review, site="another"),
        replace(review, pages=(elsewhere,)),
        replace(review, pages=(replace(page, defects=(replace(defect, defect_id=2),)),)),
        replace(review, pages=(replace(page, micrograph=replace(page.micrograph, page=3)),)),
    ]
    assert len({records(other)[0].id for other in [review, *others]}) == 7


def test_record_and_summary_carry_the_site_and_old_ones_have_none() -> None:
    review = make_review(1, verdicts=[UNKNOWN], site="fab3-ws7")
    for fields, read in ((encode(records(review)[0]), decode), (result_summary(review), decode_result)):
        assert read(fields).site == "fab3-ws7"
        meta = json.loads(fields[b"meta"])
        del meta["site"]
        assert read({**fields, b"meta": json.dumps(meta).encode()}).site == ""


def test_result_of_another_path_or_head_is_another_result() -> None:
    review = make_review(1)
    others = [
        replace(review, path="b.tif"),
        replace(review, model_versions={"head": 9}),
        replace(review, site="b"),
        replace(review, recipe_id="x"),
    ]
    assert len({result_summary(other)[b"id"] for other in [review, *others]}) == 5
    assert result_summary(review) == result_summary(review)


def test_result_summary_counts_by_kind_and_label() -> None:
    kinds = [make_verdict("known", "bridge"), make_verdict("known", "open"), UNKNOWN]
    summary = decode_result(result_summary(make_review(3, verdicts=kinds)))
    assert summary.n_by_kind == {"known": 2, "unknown": 1}
    assert summary.n_by_label == {"bridge": 1, "open": 1}


def test_path_that_is_no_utf8_is_still_written() -> None:
    path = os.fsdecode(b"lot/\xff.tif")
    review = make_review(1, verdicts=[UNKNOWN], path=path)
    assert decode(encode(records(review)[0])).path == "lot/\\xff.tif"
    assert decode_result(result_summary(review)).path == "lot/\\xff.tif"


@settings(max_examples=40, deadline=None)
@given(
    n_features=st.integers(0, 2000),
    t=st.integers(0, 40),
    crop_px=st.integers(1, 300),
    scale=st.floats(-(2.0**100), 2.0**100, width=32),
)
def test_arrays_of_every_size_survive_the_wire(n_features: int, t: int, crop_px: int, scale: float) -> None:
    rng = np.random.default_rng(n_features)
    record = replace(
        make_record(),
        features=(rng.standard_normal(n_features) * scale).astype(np.float32),
        soft_mask=rng.random((t, t), np.float32),
        crop=rng.integers(0, 256, (crop_px, crop_px), np.uint8),
    )
    assert_same(decode(unpack(pack(encode(record)))), record)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.binary(max_size=8), st.binary(max_size=300), max_size=6), st.data())
def test_packed_fields_come_back_and_a_cut_is_noticed(fields: Fields, data: st.DataObject) -> None:
    blob = pack(fields)
    assert unpack(blob) == fields
    if blob:
        cut = data.draw(st.integers(1, len(blob)))
        whole_fields = {pack(dict(list(fields.items())[:n])) for n in range(len(fields))}
        if blob[:-cut] in whole_fields:
            assert unpack(blob[:-cut]).items() < fields.items()
        else:
            with pytest.raises(ValueError, match=r"cut short|shorter"):
                unpack(blob[:-cut])


def _with_meta(fields: Fields, **changes: object) -> Fields:
    return {**fields, b"meta": json.dumps({**json.loads(fields[b"meta"]), **changes}).encode()}


def _png(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".png", pixels)[1].tobytes()


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.sampled_from([1, unknowns._BATCH_BYTES // 3, unknowns._BATCH_BYTES + 1]), max_size=200))
def test_batches_hold_all_in_order_and_as_much_as_one_round_trip_carries(sizes: list[int]) -> None:
    class Payload(bytes):
        """Bytes that only say how many they are."""

        def __new__(cls, size: int) -> "Payload":
            made = super().__new__(cls)
            made.size = size
            return made

        def __len__(self) -> int:
            return self.size

    items = [("unknowns", str(i), Payload(size)) for i, size in enumerate(sizes)]
    batches = list(unknowns._batches(items))
    assert [item for batch in batches for item in batch] == items
    weights = [sum(len(item[2]) for item in batch) for batch in batches]
    for batch, weight in zip(batches, weights, strict=True):
        assert 1 <= len(batch) <= unknowns._BATCH_MESSAGES
        assert weight <= unknowns._BATCH_BYTES or len(batch) == 1
    for batch, weight, following in zip(batches, weights, batches[1:], strict=False):
        is_full = len(batch) == unknowns._BATCH_MESSAGES
        assert is_full or weight + len(following[0][2]) > unknowns._BATCH_BYTES


BROKEN: dict[str, tuple[Callable[[Fields], Fields], str]] = {
    "no fields": (lambda f: {}, "features is missing"),
    "no schema": (lambda f: {k: v for k, v in f.items() if k != b"schema"}, "schema is missing"),
    "newer schema": (lambda f: {**f, b"schema": b"2"}, "update semwatch here"),
    "cut features": (lambda f: {**f, b"features": f[b"features"][:-3]}, "features is cut short"),
    "nan features": (lambda f: {**f, b"features": b"\x00\x00\xc0\x7f"}, "not finite"),
    "cut soft mask": (lambda f: {**f, b"soft_mask": f[b"soft_mask"][:-4]}, "soft_mask is not square"),
    "no crop": (lambda f: {**f, b"crop_png": b""}, "not a PNG"),
    "cut crop": (lambda f: {**f, b"crop_png": f[b"crop_png"][:-30]}, "damaged"),
    "damaged crop": (lambda f: {**f, b"crop_png": f[b"crop_png"][:60] + b"!" + f[b"crop_png"][61:]}, "damaged"),
    "crop of gigabytes": (
        lambda f: {**f, b"crop_png": f[b"crop_png"][:16] + b"\x7f" * 8 + b"\x08\x00"},
        "wanted square",
    ),
    **{
        f"{name} crop": (lambda f, pixels=pixels: {**f, b"crop_png": _png(pixels)}, "wanted square 8-bit gray")
        for name, pixels in {
            "16-bit": np.full((56, 56), 300, np.uint16),
            "colour": np.zeros((56, 56, 3), np.uint8),
            "oblong": np.zeros((56, 57), np.uint8),
        }.items()
    },
    "id not hex": (lambda f: {**f, b"id": b"../etc/passwd"}, "32 hex digits"),
    "id not ascii": (lambda f: {**f, b"id": b"\xff"}, "ascii"),
    "meta no json": (lambda f: {**f, b"meta": b"{"}, "Expecting property name"),
    "meta no object": (lambda f: {**f, b"meta": b"[]"}, "not a JSON object"),
    "meta no utf-8": (lambda f: {**f, b"meta": b"\xff"}, "codec"),
    "meta incomplete": (lambda f: {**f, b"meta": b"{}"}, "Field required"),
    "wrong kind": (lambda f: _with_meta(f, kind="known"), "kind"),
    "box of three": (lambda f: _with_meta(f, box_xyxy=[1, 2, 3]), "box_xyxy"),
    "score not a number": (lambda f: _with_meta(f, image_score=None), "image_score"),
    "score infinite": (lambda f: {**f, b"meta": f[b"meta"][:-1] + b',"image_score":1e999}'}, "not finite"),
    "score infinite in words": (lambda f: _with_meta(f, image_score="1e999"), "not finite"),
    "score NaN": (lambda f: {**f, b"meta": f[b"meta"][:-1] + b',"image_score":NaN}'}, "no number of JSON"),
    "meta nested": (lambda f: _with_meta(f, more=[[[[[[[[[1]]]]]]]]]), "nested deeper"),
    "meta nested beyond the parser": (
        lambda f: {**f, b"meta": b'{"x":' + b"[" * 30000 + b"]" * 30000 + b"}"},
        "nested",
    ),
    "meta too long": (lambda f: _with_meta(f, path="x" * 70000), "bytes, over"),
    "a number of 6000 digits": (lambda f: {**f, b"meta": f[b"meta"][:-1] + b',"y":' + b"9" * 6000 + b"}"}, "digits"),
    "area out of bounds": (lambda f: _with_meta(f, area_px=2**62), "out of all bounds"),
    "area negative": (lambda f: _with_meta(f, area_px=-1), "negative"),
    "empty crop": (lambda f: _with_meta(f, crop_xyxy=[0, 0, 0, 0]), "no box"),
    "box inside out": (lambda f: _with_meta(f, box_xyxy=[5, 5, -5, -5]), "no box"),
    "no time": (lambda f: _with_meta(f, created_utc="zzzz"), "created_utc"),
    "half a character": (lambda f: _with_meta(f, path="\ud800"), "not Unicode"),
    "features endless": (lambda f: {**f, b"features": bytes(5 << 20)}, "bytes, over"),
    "crop beyond all encoders": (lambda f: {**f, b"crop_png": _png(np.zeros((1025, 1025), np.uint8))}, "1025 x 1025"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_record_is_refused_with_a_plain_reason(broken: str) -> None:
    spoil, reason = BROKEN[broken]
    with pytest.raises(ValueError, match=reason):
        decode(spoil(encode(make_record())))


def test_meta_may_gain_keys_within_a_schema() -> None:
    record = make_record()
    assert_same(decode(_with_meta(encode(record), added_later=1)), record)


def test_published_schemas_describe_what_is_written() -> None:
    review = make_review(2, verdicts=[UNKNOWN])
    schemas = json_schemas()
    unknown = records(review)[0]
    named = replace(unknown, kind="known", label="pit")
    written = {UNKNOWNS: encode(unknown), DOUBTFUL: encode(named), RESULTS: result_summary(review)}
    for stream, fields in written.items():
        jsonschema.Draft202012Validator.check_schema(schemas[stream])
        jsonschema.validate(json.loads(fields[b"meta"]), schemas[stream])
        assert set(json.loads(fields[b"meta"])) == set(schemas[stream]["properties"])
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({}, schemas[stream])


# --- producer --------------------------------------------------------------------------------------------------------


def test_publishing_nothing_does_nothing(publisher: Publisher, client: redis.Redis) -> None:
    publisher.publish([])
    assert client.dbsize() == 0
    assert {stream: (d.length, d.pending, d.dead) for stream, d in publisher.depths().items()} == {
        UNKNOWNS: (0, 0, 0),
        RESULTS: (0, 0, 0),
    }


def test_messages_of_a_review_reach_their_streams(publisher: Publisher, client: redis.Redis) -> None:
    publisher.publish(messages(make_review(2, verdicts=[UNKNOWN])))
    publisher.ping()
    depths = publisher.depths()
    assert (depths[UNKNOWNS].length, depths[RESULTS].length) == (2, 1)
    results = Consumer(client, RESULTS, decode_result, name="bridge", group="yield")
    (summary,) = results.claim(5, min_idle_s=60)
    assert summary.record.n_by_kind == {"unknown": 2}
    assert publisher.depths()[RESULTS].pending == 1
    assert results.ack([summary]) == 1
    assert publisher.depths()[RESULTS].length == 0


def test_id_is_added_once_however_often_it_is_published(publisher: Publisher, client: redis.Redis) -> None:
    items = make_messages(150)  # more than one batch
    publisher.publish(items[:70])
    publisher.publish(items + items)
    assert [fields[b"id"] for _, fields in client.xrange(STREAM)] == [id_.encode() for _, id_, _ in items]


def test_id_stays_sent_after_it_was_consumed_and_only_for_its_time(publisher: Publisher, client: redis.Redis) -> None:
    items = make_messages(1)
    publisher.publish(items)
    consumer = make_consumer(client)
    consumer.ack(claim_all(consumer))
    publisher.publish(items)
    assert client.xlen(STREAM) == 0
    assert 2 * 24 * 3600 < client.ttl(f"semwatch:sent:{items[0][1]}") <= 3 * 24 * 3600


def test_prefix_keeps_two_installations_apart(client: redis.Redis) -> None:
    for prefix in ("fab1", "fab2"):
        Publisher(client, prefix=prefix).publish(make_messages(1))
    assert {b"fab1:unknowns", b"fab2:unknowns"} < set(client.keys())
    (one,) = make_consumer(client, prefix="fab2").claim(9, min_idle_s=60)
    assert one.entry_id


def test_message_cut_in_the_outbox_is_an_error(publisher: Publisher, client: redis.Redis) -> None:
    stream, id_, blob = make_messages(1)[0]
    with pytest.raises(ValueError, match="cut short"):
        publisher.publish([(stream, id_, blob[:-1])])
    assert client.dbsize() == 0


PRODUCER = """
import sys
from pathlib import Path
from semwatch.streams.unknowns import Publisher, connect
blob = Path(sys.argv[2]).read_bytes()
publisher = Publisher(connect(sys.argv[1]))
for i in range(10_000):
    publisher.publish([("unknowns", f"{i:032x}", blob)])
    print(i, flush=True)
"""


def test_producer_killed_between_add_and_mark_neither_loses_nor_doubles(
    server: EmbeddedRedis, publisher: Publisher, client: redis.Redis, tmp_path: Path
) -> None:
    (tmp_path / "blob").write_bytes(make_messages(1)[0][2])
    command = [sys.executable, "-c", PRODUCER, server.url, str(tmp_path / "blob")]
    environment = {**os.environ, "PYTHONPATH": str(Path(unknowns.__file__).parents[2])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as producer:
        assert producer.stdout is not None
        while int(producer.stdout.readline()) < 30:
            pass
        producer.kill()
    n_added = client.xlen(STREAM)
    assert n_added >= 31
    publisher.publish(make_messages(n_added + 5))  # the outbox has none of them marked
    assert client.xlen(STREAM) == n_added + 5


def test_server_killed_in_the_middle_loses_nothing_and_doubles_nothing(
    server: EmbeddedRedis, client: redis.Redis
) -> None:
    items = make_messages(300)
    answered: set[bytes] = set()
    killer = threading.Timer(0.1, kill, (server,))

    def publish_until_it_fails(publisher: Publisher) -> None:
        for item in itertools.cycle(items):
            publisher.publish([item])
            answered.add(item[1].encode())

    with connect(server.url, timeout_s=1) as mine:
        killer.start()
        with pytest.raises(ServiceUnavailable):
            publish_until_it_fails(Publisher(mine))
        killer.join()
        server.start()
        assert 0 < len(answered) <= mine.xlen(STREAM)
        assert answered <= {fields[b"id"] for _, fields in mine.xrange(STREAM)}
        Publisher(mine).publish(items)
        assert sorted(fields[b"id"] for _, fields in mine.xrange(STREAM)) == [id_.encode() for _, id_, _ in items]


def test_full_server_pushes_back_and_nothing_is_lost(publisher: Publisher, client: redis.Redis) -> None:
    items = make_messages(20)
    publisher.publish(items[:5])
    consumer = make_consumer(client)
    held = consumer.claim(1, min_idle_s=60)
    client.config_set("maxmemory", 1)
    try:
        with pytest.raises(ServiceUnavailable, match="full"):
            publisher.publish(items)
        assert client.xlen(STREAM) == 5
        assert consumer.ack(held + claim_all(consumer)) == 5  # a full server can be drained
    finally:
        client.config_set("maxmemory", 0)
    publisher.publish(items)
    assert client.xlen(STREAM) == 15


def test_failed_add_leaves_no_mark(publisher: Publisher, client: redis.Redis) -> None:
    client.set(STREAM, "not a stream")
    with pytest.raises(ServiceUnavailable, match="choose another"):
        publisher.publish(make_messages(1))
    client.delete(STREAM)
    publisher.publish(make_messages(1))
    assert client.xlen(STREAM) == 1


def test_loading_or_replica_server_is_waited_for(publisher: Publisher, client: redis.Redis) -> None:
    client.replicaof("127.0.0.1", "1")
    try:
        with pytest.raises(ServiceUnavailable, match=r"(?i)read only replica|READONLY"):
            publisher.publish(make_messages(1))
    finally:
        client.replicaof("NO", "ONE")


# --- connection ------------------------------------------------------------------------------------------------------


def _raises_within(seconds: float, url: str, timeout_s: float) -> None:
    started = time.monotonic()
    with connect(url, timeout_s=timeout_s) as client, pytest.raises(ServiceUnavailable):
        Publisher(client).ping()
    assert time.monotonic() - started < seconds


def test_server_that_is_not_there_raises_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        _raises_within(1.0, f"redis://127.0.0.1:{free.getsockname()[1]}", 5.0)


def test_server_that_never_answers_raises_within_the_timeout() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        _raises_within(2.5, f"redis://127.0.0.1:{silent.getsockname()[1]}", 1.0)


def test_socket_that_is_not_there_raises_at_once(tmp_path: Path) -> None:
    _raises_within(1.0, f"unix://{tmp_path}/none.sock", 5.0)


def test_address_of_no_known_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="address cannot be used"):
        connect("http://127.0.0.1")


def test_password_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="password_file"):
        connect("redis://127.0.0.1", password_file=tmp_path / "none")


def test_password_is_read_from_its_file_and_a_wrong_one_is_a_server_that_is_away(
    server: EmbeddedRedis, client: redis.Redis, tmp_path: Path
) -> None:
    (tmp_path / "right").write_text("s3cret\n")
    (tmp_path / "wrong").write_text("guess\n")
    client.config_set("requirepass", "s3cret")
    try:
        with connect(server.url, password_file=tmp_path / "right") as right:
            Publisher(right).publish(make_messages(1))
            assert right.xlen(STREAM) == 1
            for password_file in (tmp_path / "wrong", None):
                with (
                    connect(server.url, password_file=password_file) as wrong,
                    pytest.raises(ServiceUnavailable, match="password_file"),
                ):
                    Publisher(wrong).publish(make_messages(3))
    finally:
        client.config_set("requirepass", "")


def test_password_for_a_server_without_one_is_a_server_that_is_away(
    server: EmbeddedRedis, client: redis.Redis, tmp_path: Path
) -> None:
    (tmp_path / "password").write_text("s3cret")
    with connect(server.url, password_file=tmp_path / "password") as mine, pytest.raises(ServiceUnavailable):
        Publisher(mine).ping()


def _make_user(client: redis.Redis, *rules: str) -> None:
    client.execute_command("ACL", "SETUSER", "edge", "reset", "on", ">pw", *rules)


def test_rights_that_the_docstring_names_are_enough(server: EmbeddedRedis, client: redis.Redis, tmp_path: Path) -> None:
    rules = (unknowns.__doc__ or "").split("An ACL user needs\n``")[1].split("``")[0].split()
    _make_user(client, *rules)
    (tmp_path / "pw").write_text("pw")
    with connect(server.url, username="edge", password_file=tmp_path / "pw") as mine:
        publisher, consumer = Publisher(mine), make_consumer(mine)
        publisher.publish(make_messages(3))
        publisher.ping()
        first, second, third = consumer.claim(3, min_idle_s=60)
        assert consumer.give_back([first]) == 1
        assert consumer.dead_letter(second, "why")
        assert consumer.ack([third]) == 1
        assert len(consumer.dead()) == 1
        assert consumer.requeue_dead() == 1
        assert publisher.depths()[UNKNOWNS].length == 2


def test_missing_right_is_a_server_that_is_away_and_leaves_no_mark(
    server: EmbeddedRedis, client: redis.Redis, tmp_path: Path
) -> None:
    _make_user(client, "~semwatch:*", "+@connection", "+eval", "+exists", "+set")
    (tmp_path / "pw").write_text("pw")
    with connect(server.url, username="edge", password_file=tmp_path / "pw") as mine:
        with pytest.raises(ServiceUnavailable, match="ACL"):
            Publisher(mine).publish(make_messages(1))
        with pytest.raises(ServiceUnavailable, match="ACL"):
            make_consumer(mine).claim(1, min_idle_s=60)
    assert client.dbsize() == 0


NO_REDIS = [
    b"HTTP/1.1 400 Bad Request\r\n\r\n",
    b":seven\r\n",
    b"$9999999999999\r\n",
    b"*100000\r\n",
    b"*1\r\n" * 5000,
    b"\xff\xfe\x00\r\n" * 9,
    b"-\r\n",
    b"+OK\r\n" * 9,
    b"$-7\r\n",
    b"",
]


@pytest.mark.parametrize("said", NO_REDIS, ids=range(len(NO_REDIS)))
def test_another_server_on_the_port_is_a_redis_that_is_away(said: bytes) -> None:
    def stranger() -> None:
        listening.settimeout(20)
        try:
            while True:
                connection, _ = listening.accept()
                with connection:
                    connection.settimeout(5)
                    connection.recv(1 << 16)
                    connection.sendall(said)
        except OSError:
            return

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        url = f"redis://127.0.0.1:{listening.getsockname()[1]}"
        thread = threading.Thread(target=stranger, daemon=True)
        thread.start()
        with connect(url, timeout_s=1.0) as client:
            with pytest.raises(ServiceUnavailable):
                Publisher(client).publish(make_messages(1))
            with pytest.raises(ServiceUnavailable):
                make_consumer(client).claim(1, min_idle_s=60)
        listening.shutdown(socket.SHUT_RDWR)
    thread.join(10)


def test_a_stream_whose_ids_are_used_up_is_a_redis_that_is_away(publisher: Publisher, client: redis.Redis) -> None:
    client.xadd(STREAM, {"x": "y"}, id="18446744073709551615-18446744073709551615")
    with pytest.raises(ServiceUnavailable, match=r"takes no more entries.*rename its key"):
        publisher.publish(make_messages(1))
    client.rename(STREAM, "aside")
    publisher.publish(make_messages(1))
    assert client.xlen(STREAM) == 1


def test_a_password_that_is_changed_is_read_anew(server: EmbeddedRedis, client: redis.Redis, tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text("first")
    client.config_set("requirepass", "first")
    try:
        with connect(server.url, password_file=password) as mine:
            Publisher(mine).publish(make_messages(1))
            client.config_set("requirepass", "second")
            mine.connection_pool.disconnect()
            with pytest.raises(ServiceUnavailable):
                Publisher(mine).publish(make_messages(2))
            password.unlink()
            with pytest.raises(ServiceUnavailable):
                Publisher(mine).publish(make_messages(2))
            password.write_text("second")
            Publisher(mine).publish(make_messages(2))
    finally:
        client.config_set("requirepass", "")
    assert client.xlen(STREAM) == 2


# --- consumer --------------------------------------------------------------------------------------------------------


def test_empty_stream_gives_nothing_and_waits_no_longer_than_asked(client: redis.Redis) -> None:
    consumer = make_consumer(client)
    assert consumer.claim(5, min_idle_s=60) == []
    started = time.monotonic()
    assert consumer.claim(5, min_idle_s=60, block_s=0.5) == []
    assert 0.4 < time.monotonic() - started < 2
    assert (consumer.ack([]), consumer.give_back([]), consumer.dead(), consumer.requeue_dead()) == (0, 0, [], 0)


def test_waiting_consumer_is_woken_by_a_new_record(server: EmbeddedRedis, client: redis.Redis) -> None:
    with connect(server.url) as other:
        later = threading.Timer(0.3, lambda: Publisher(other).publish(make_messages(1)))
        later.start()
        assert numbers(make_consumer(client).claim(5, min_idle_s=60, block_s=10)) == [0]
        later.join()


def test_records_published_before_the_first_consumer_are_not_missed(publisher: Publisher, client: redis.Redis) -> None:
    publisher.publish(make_messages(3))
    claimed = make_consumer(client).claim(10, min_idle_s=60)
    assert numbers(claimed) == [0, 1, 2]
    assert [item.n_deliveries for item in claimed] == [1, 1, 1]


def test_acknowledged_records_are_deleted_and_acknowledging_twice_is_harmless(
    publisher: Publisher, client: redis.Redis
) -> None:
    publisher.publish(make_messages(3))
    consumer = make_consumer(client)
    claimed = consumer.claim(2, min_idle_s=60)
    assert (publisher.depths()[UNKNOWNS].length, publisher.depths()[UNKNOWNS].pending) == (3, 2)
    assert consumer.ack(claimed) == 2
    assert consumer.ack(claimed) == 0
    assert (publisher.depths()[UNKNOWNS].length, publisher.depths()[UNKNOWNS].pending) == (1, 0)


def test_two_consumers_share_the_work(publisher: Publisher, client: redis.Redis) -> None:
    publisher.publish(make_messages(20))
    a, b = make_consumer(client, "a"), make_consumer(client, "b")
    shares = [numbers(who.claim(4, min_idle_s=60)) for who in (a, b, a, b, a)]
    assert sorted(itertools.chain.from_iterable(shares)) == list(range(20))


def test_restarted_consumer_first_gets_all_it_held_and_each_once(publisher: Publisher, client: redis.Redis) -> None:
    publisher.publish(make_messages(12))
    assert len(make_consumer(client, "a").claim(8, min_idle_s=60)) == 8
    again = make_consumer(client, "a")
    held = [again.claim(3, min_idle_s=60) for _ in range(3)]
    assert [numbers(page) for page in held] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert {item.n_deliveries for page in held for item in page} == {2}
    assert numbers(claim_all(again)) == [8, 9, 10, 11]


def test_work_of_a_dead_consumer_is_taken_over_once_it_is_idle(publisher: Publisher, client: redis.Redis) -> None:
    publisher.publish(make_messages(5))
    assert len(make_consumer(client, "dead").claim(5, min_idle_s=60)) == 5
    living = make_consumer(client, "living")
    assert living.claim(5, min_idle_s=60) == []
    time.sleep(0.15)
    taken = living.claim(5, min_idle_s=0.1)
    assert numbers(taken) == [0, 1, 2, 3, 4]
    assert {item.n_deliveries for item in taken} == {2}
    assert make_consumer(client, "other").claim(5, min_idle_s=60) == []


def test_returned_work_is_anybodys_at_once_and_costs_no_delivery(publisher: Publisher, client: redis.Redis) -> None:
    publisher.publish(make_messages(3))
    a, b = make_consumer(client, "a", max_deliveries=1), make_consumer(client, "b", max_deliveries=1)
    for who in (a, b, a, b):
        claimed = who.claim(3, min_idle_s=3600)
        assert numbers(claimed) == [0, 1, 2]
        assert {item.n_deliveries for item in claimed} == {1}
        assert who.give_back(claimed) == 3
        assert who.give_back(claimed) == 0  # no longer ours


def test_consumer_cannot_return_or_bury_what_another_has_taken_over(publisher: Publisher, client: redis.Redis) -> None:
    publisher.publish(make_messages(1))
    slow, fast = make_consumer(client, "slow"), make_consumer(client, "fast")
    (held,) = slow.claim(1, min_idle_s=60)
    (taken,) = fast.claim(1, min_idle_s=0)
    assert slow.give_back([held]) == 0
    assert not slow.dead_letter(held, "late")
    assert fast.ack([taken]) == 1


def test_record_that_kills_every_consumer_becomes_a_dead_letter(publisher: Publisher, client: redis.Redis) -> None:
    publisher.publish(make_messages(2))
    for life in range(3):
        claimed = make_consumer(client, "a", max_deliveries=3).claim(1, min_idle_s=3600)
        assert [(int(item.record.id, 16), item.n_deliveries) for item in claimed] == [(0, life + 1)]
    survivor = make_consumer(client, "a", max_deliveries=3)
    assert numbers(claim_all(survivor)) == [1]
    (letter,) = survivor.dead()
    assert (letter.n_deliveries, letter.error) == (3, "delivered 3 times and never acknowledged")
    assert_same(decode(letter.fields), make_record(0))
    depth = publisher.depths()[UNKNOWNS]
    assert (depth.length, depth.pending, depth.dead) == (1, 1, 1)


def test_dead_letter_says_why_and_can_be_sent_again(publisher: Publisher, client: redis.Redis) -> None:
    publisher.publish(make_messages(120))
    consumer = make_consumer(client)
    for item in claim_all(consumer, n=50):
        assert consumer.dead_letter(item, "crop is black")
    assert {(letter.error, letter.n_deliveries) for letter in consumer.dead(500)} == {("crop is black", 1)}
    assert client.xlen(STREAM) == 0
    assert consumer.requeue_dead() == 120
    assert consumer.dead() == []
    again = claim_all(consumer, n=50)
    assert numbers(again) == list(range(120))
    assert_same(again[7].record, make_record(7))


def test_a_wrong_decoder_condemns_nothing_and_says_so(publisher: Publisher, client: redis.Redis) -> None:
    """``records.decode`` on results once moved every entry to the dead letters."""
    publisher.publish(
        [(RESULTS, f"{i:032x}", pack({**result_summary(make_review(0)), b"id": b"%032x" % i})) for i in range(5)]
    )
    wrong = Consumer(client, RESULTS, decode, name="mes", group="mes")
    for _ in range(7):
        with pytest.raises(ConfigError, match=r"sound entry.*is it the decoder of this stream"):
            wrong.claim(4, min_idle_s=60)
    assert client.xlen("semwatch:results:dead") == 0
    right = Consumer(client, RESULTS, decode_result, name="mes", group="mes")
    found = list(itertools.chain.from_iterable(iter(lambda: right.claim(4, min_idle_s=60), [])))
    assert [(int(item.record.id, 16), item.n_deliveries) for item in found] == [(i, 1) for i in range(5)]


def test_a_decoder_that_fails_on_its_own_account_condemns_nothing(publisher: Publisher, client: redis.Redis) -> None:
    publisher.publish(make_messages(2))

    def failing(fields: Any) -> Any:
        return fields[b"no such field"]

    with pytest.raises(ConfigError, match="KeyError"):
        Consumer(client, UNKNOWNS, failing, name="a").claim(2, min_idle_s=60)
    assert client.xlen(DEAD) == 0
    assert numbers(claim_all(make_consumer(client, "b"))) == [0, 1]


def test_a_consumer_that_ends_at_once_and_is_started_again_condemns_nothing_for_a_while(
    publisher: Publisher, client: redis.Redis
) -> None:
    publisher.publish(make_messages(1))
    (item,) = make_consumer(client).claim(1, min_idle_s=3600)
    for _ in range(8):
        (item,) = make_consumer(client, max_deliveries=3, counts_after_s=60).claim(1, min_idle_s=3600)
        assert item.n_deliveries == 1
    for n in (2, 3):
        time.sleep(0.6)
        (item,) = make_consumer(client, max_deliveries=3, counts_after_s=0.5).claim(1, min_idle_s=3600)
        assert item.n_deliveries == n
    assert make_consumer(client, max_deliveries=3, counts_after_s=0.5).claim(1, min_idle_s=3600) == []
    assert client.xlen(DEAD) == 1


@pytest.mark.parametrize("broken", ["newer schema", "cut features", "cut crop", "no schema"])
def test_unreadable_record_is_put_aside_and_the_others_arrive(
    publisher: Publisher, client: redis.Redis, broken: str
) -> None:
    spoiled = BROKEN[broken][0](encode(make_record(1)))
    good = make_messages(3)
    publisher.publish([good[0], (UNKNOWNS, good[1][1], pack(spoiled)), good[2]])
    consumer = make_consumer(client)
    assert numbers(consumer.claim(3, min_idle_s=60)) == [0, 2]
    (letter,) = consumer.dead()
    assert BROKEN[broken][1] in letter.error
    assert letter.fields == spoiled


def test_batch_of_nothing_but_rubbish_does_not_look_like_an_empty_stream(
    publisher: Publisher, client: redis.Redis
) -> None:
    for _ in range(10):
        client.xadd(STREAM, {"what": "is this"})
    publisher.publish(make_messages(1))
    assert numbers(make_consumer(client).claim(4, min_idle_s=60)) == [0]
    assert client.xlen(DEAD) == 10


def test_unreadable_record_on_a_full_server_stays_and_does_not_stop_the_others(
    publisher: Publisher, client: redis.Redis
) -> None:
    consumer = make_consumer(client)
    assert consumer.claim(1, min_idle_s=60) == []
    client.xadd(STREAM, {"what": "is this"})
    publisher.publish(make_messages(2))
    client.config_set("maxmemory", 1)
    try:
        assert consumer.claim(1, min_idle_s=60) == []
        assert numbers(consumer.claim(5, min_idle_s=60)) == [0, 1]
    finally:
        client.config_set("maxmemory", 0)
    assert numbers(make_consumer(client, "b").claim(5, min_idle_s=0)) == [0, 1]
    assert client.xlen(DEAD) == 1


def test_entry_deleted_under_us_is_forgotten(publisher: Publisher, client: redis.Redis) -> None:
    publisher.publish(make_messages(3))
    claimed = make_consumer(client, "dead").claim(3, min_idle_s=60)
    client.xdel(STREAM, claimed[1].entry_id)
    assert numbers(make_consumer(client, "b").claim(3, min_idle_s=0)) == [0, 2]
    assert publisher.depths()[UNKNOWNS].pending == 2


def test_stream_deleted_under_us_is_made_again(publisher: Publisher, client: redis.Redis) -> None:
    consumer = make_consumer(client)
    publisher.publish(make_messages(1))
    held = consumer.claim(1, min_idle_s=60)
    client.flushall()
    assert consumer.claim(1, min_idle_s=60) == []
    assert (consumer.ack(held), consumer.give_back(held), consumer.dead_letter(held[0], "x")) == (0, 0, False)
    publisher.publish(make_messages(2))
    assert numbers(claim_all(consumer)) == [0, 1]


def test_stream_deleted_while_a_consumer_waits_is_made_again(server: EmbeddedRedis, client: redis.Redis) -> None:
    consumer = make_consumer(client)
    with connect(server.url) as other:

        def delete_and_publish() -> None:
            other.flushall()
            Publisher(other).publish(make_messages(1))

        later = threading.Timer(0.3, delete_and_publish)
        later.start()
        assert numbers(consumer.claim(1, min_idle_s=60, block_s=10)) == [0]
        later.join()


def test_group_deleted_under_us_is_made_again_from_the_start(publisher: Publisher, client: redis.Redis) -> None:
    publisher.publish(make_messages(2))
    consumer = make_consumer(client)
    assert len(consumer.claim(2, min_idle_s=60)) == 2
    client.xgroup_destroy(STREAM, "learners")
    assert numbers(consumer.claim(5, min_idle_s=60)) == [0, 1]  # rather twice than never


def test_killed_server_forgets_neither_records_nor_who_holds_them(
    server: EmbeddedRedis, publisher: Publisher, client: redis.Redis
) -> None:
    publisher.publish(make_messages(10))
    consumer = make_consumer(client)
    held = consumer.claim(4, min_idle_s=60)
    assert consumer.ack(held[:1]) == 1
    kill(server)
    with pytest.raises(ServiceUnavailable):
        consumer.claim(4, min_idle_s=60)
    server.start()
    assert numbers(consumer.claim(20, min_idle_s=60)) == [4, 5, 6, 7, 8, 9]
    assert consumer.ack(held[1:]) == 3
    assert publisher.depths()[UNKNOWNS].length == 6
