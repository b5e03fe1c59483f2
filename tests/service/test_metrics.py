"""What Prometheus reads, scraped from a real endpoint."""

import gc
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from factories import make_review, make_verdict
from semwatch.defects import Quality, QualityFlag, Verdict, VerdictKind
from semwatch.errors import ConfigError
from semwatch.service import metrics_server
from semwatch.service.drift import WATCHED
from semwatch.service.metrics import SEVEREST_FIRST, STAGE_BUCKETS_S, Metrics, verdict_of
from semwatch.service.metrics_server import MAX_CONNECTIONS
from semwatch.store.review_record import to_record

HOST = "127.0.0.1"


@pytest.fixture
def metrics() -> Iterator[Metrics]:
    made = Metrics()
    yield made
    made.close()


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"semwatch_{name}", labels)


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://{HOST}:{port}/metrics", timeout=5) as answer:
        return str(answer.read().decode())


def test_nothing_is_known_of_no_source_and_nothing_is_global(metrics: Metrics) -> None:
    assert value(metrics, "quarantined_total", source="tool-a") is None
    assert value(metrics, "ready") == 0.0
    assert value(metrics, "last_review_timestamp_seconds") == 0.0
    assert not [family for family in REGISTRY.collect() if family.name.startswith("semwatch")]


def test_sources_start_at_zero_so_that_the_first_event_is_a_rise() -> None:
    metrics = Metrics(["tool-a"])
    for name in ("quarantined_total", "duplicates_total"):
        assert value(metrics, name, source="tool-a") == 0.0
    assert [value(metrics, "reviews_total", source="tool-a", verdict=kind) for kind in SEVEREST_FIRST] == [0.0] * 5
    for name in ("drift", "drift_alarms_total"):
        assert [value(metrics, name, source="tool-a", what=what) for what in WATCHED] == [0.0] * len(WATCHED)


def test_two_daemons_in_one_process_do_not_share_counts() -> None:
    one, two = Metrics(["a"]), Metrics(["a"])
    one.duplicates.labels("a").inc()
    assert (value(one, "duplicates_total", source="a"), value(two, "duplicates_total", source="a")) == (1.0, 0.0)


def test_pages_are_counted_by_their_process(metrics: Metrics) -> None:
    metrics.observe(make_review(0, n_pages=2, domain="unknown process"))
    metrics.observe(make_review(1, domain="known process"))
    counts = [value(metrics, "pages_total", source="tool-a", domain=d) for d in ("known process", "unknown process")]
    assert counts == [1.0, 2.0]
    begun = Metrics(["tool-b"])
    assert value(begun, "pages_total", source="tool-b", domain="unknown process") == 0.0


def test_file_of_an_unknown_process_counts_by_its_defects() -> None:
    assert verdict_of(make_review(0, domain="unknown process")) == "defect-free"
    named = make_review(1, domain="unknown process", verdicts=[make_verdict("known")])
    assert verdict_of(named) == verdict_of(to_record(named)) == "known"


def test_review_without_defects_counts_as_defect_free(metrics: Metrics) -> None:
    metrics.observe(make_review(0))
    assert value(metrics, "reviews_total", source="tool-a", verdict="defect-free") == 1.0
    assert value(metrics, "model_version", model="detector") == 1.0
    assert value(metrics, "model_version", model="head") is None
    families = {family.name: family.samples for family in metrics.registry.collect()}
    assert families["semwatch_defects"] == []


def test_one_review_updates_everything(metrics: Metrics) -> None:
    verdicts = [make_verdict("known", "bridge"), make_verdict("unknown")]
    metrics.observe(make_review(3, n_pages=2, verdicts=verdicts))
    assert value(metrics, "reviews_total", source="tool-a", verdict="unknown") == 1.0
    assert value(metrics, "reviews_total", source="tool-a", verdict="known") is None
    assert value(metrics, "defects_total", source="tool-a", kind="known", label="bridge") == 4.0
    assert value(metrics, "defects_total", source="tool-a", kind="unknown", label="") == 2.0
    assert [value(metrics, "model_version", model=m) for m in ("detector", "encoder", "head")] == [1.0, 1.0, 3.0]
    assert value(metrics, "last_review_timestamp_seconds") == 1740830400.0
    assert value(metrics, "stage_seconds_count", stage="detection") == 1.0
    assert value(metrics, "stage_seconds_sum", stage="detection") == pytest.approx(0.0114)
    assert value(metrics, "stage_seconds_bucket", stage="detection", le="0.01") == 0.0
    assert value(metrics, "stage_seconds_bucket", stage="detection", le="0.02") == 1.0


def test_model_version_follows_a_swap(metrics: Metrics) -> None:
    for head in (3, 4, 3):
        metrics.observe(make_review(1, model_versions={"head": head}))
        assert value(metrics, "model_version", model="head") == head


@pytest.mark.parametrize(
    ("kinds", "told"),
    [
        ([], "defect-free"),
        (["defect-free"], "defect-free"),
        (["defect-free", "known"], "known"),
        (["known", "non-decidable"], "non-decidable"),
        (["known", "novel", "non-decidable"], "novel"),
        (["novel", "non-decidable", "unknown", "known"], "unknown"),
    ],
)
def test_file_counts_under_its_severest_verdict(kinds: list[VerdictKind], told: str) -> None:
    verdicts = [Verdict(kind, None, 1.0, ()) for kind in kinds]
    assert verdict_of(make_review(len(kinds), verdicts=verdicts)) == told


def test_class_that_a_machine_found_counts_under_its_own_label(metrics: Metrics) -> None:
    metrics.observe(make_review(2, verdicts=[Verdict("novel", "novel-3", 0.9, ())]))
    assert value(metrics, "reviews_total", source="tool-a", verdict="novel") == 1.0
    assert value(metrics, "defects_total", source="tool-a", kind="novel", label="novel-3") == 2.0


def test_learning_is_counted(metrics: Metrics) -> None:
    metrics.swap_refused.labels("head").inc()
    metrics.drift_alarms.labels("tool-a", "class mix").inc()
    metrics.drift.labels("tool-a", "class mix").set(1.2)
    assert value(metrics, "swap_refused_total", model="head") == 1.0
    assert value(metrics, "drift_alarms_total", source="tool-a", what="class mix") == 1.0
    assert value(metrics, "drift", source="tool-a", what="class mix") == 1.2


def test_revision_counts_under_its_severest_verdict_and_not_as_another_review() -> None:
    metrics = Metrics(["tool-a"])
    assert [value(metrics, "revised_total", source="tool-a", verdict=kind) for kind in SEVEREST_FIRST] == [0.0] * 5
    novel = make_review(2, verdicts=[Verdict("novel", "novel-1", 0.9, ()), make_verdict("known")])
    metrics.observe_revision(to_record(novel))
    assert value(metrics, "revised_total", source="tool-a", verdict="novel") == 1.0
    assert value(metrics, "revised_total", source="tool-a", verdict="known") == 0.0
    assert value(metrics, "reviews_total", source="tool-a", verdict="novel") == 0.0


def test_verdicts_without_a_class_have_an_empty_label(metrics: Metrics) -> None:
    metrics.observe(
        make_review(2, verdicts=[Verdict("unknown", None, 1.0, ()), Verdict("non-decidable", None, 1.0, ())])
    )
    for kind in ("unknown", "non-decidable"):
        assert value(metrics, "defects_total", source="tool-a", kind=kind, label="") == 1.0


def test_number_of_series_does_not_grow_with_the_files(metrics: Metrics) -> None:
    def n_series() -> int:
        return sum(len(family.samples) for family in metrics.registry.collect())

    metrics.observe(make_review(2))
    before = n_series()
    for i in range(20):
        metrics.observe(make_review(2, path=f"lot{i}/wafer{i}/{i}.tif", seed=i))
    assert n_series() == before


def test_buckets_reach_from_a_millisecond_to_ten_seconds() -> None:
    assert (STAGE_BUCKETS_S[0], STAGE_BUCKETS_S[-1]) == (0.001, 10.0)
    assert list(STAGE_BUCKETS_S) == sorted(STAGE_BUCKETS_S)


def test_prometheus_reads_what_was_counted(metrics: Metrics) -> None:
    port = metrics.serve(HOST, 0)
    metrics.ready.set(1)
    metrics.observe(make_review(1))
    families = {family.name: family for family in text_string_to_metric_families(scrape(port))}
    assert families["semwatch_ready"].samples[0].value == 1.0
    assert families["semwatch_reviews"].type == "counter"
    assert families["semwatch_stage_seconds"].type == "histogram"


def test_names_keep_prometheus_conventions() -> None:
    metrics = Metrics(["a"])
    metrics.errors.labels("redis").inc()
    metrics.swap_refused.labels("head").inc()
    metrics.observe(make_review(1))
    for family in metrics.registry.collect():
        assert re.fullmatch(r"semwatch_[a-z_]+", family.name)
        assert family.documentation.endswith(".")
        assert not re.search(r"_(ms|mb|s|count|total)$", family.name), "base units in full; _total is for samples"
        if family.type == "counter":
            assert any(sample.name == f"{family.name}_total" for sample in family.samples)


def test_port_in_use_is_refused_with_the_settings_to_change(metrics: Metrics) -> None:
    with socket.create_server((HOST, 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"{HOST}:{port} \(Address already in use\): set metrics.host and"):
            metrics.serve(HOST, port)
    assert metrics.serve(HOST, port) == port, "a refusal leaves nothing behind"


@pytest.mark.parametrize(("host", "port"), [("192.0.2.1", 0), ("no-such-host.invalid", 0), (HOST, 70_000), (HOST, -1)])
def test_address_that_is_not_ours_is_refused(metrics: Metrics, host: str, port: int) -> None:
    with pytest.raises(ConfigError, match=rf"metrics cannot be served at {host}:{port} \(.+\): set metrics\.host"):
        metrics.serve(host, port)


def test_close_frees_the_port_and_ends_the_thread(metrics: Metrics) -> None:
    n_threads = threading.active_count()
    port = metrics.serve(HOST, 0)
    scrape(port)
    metrics.close()
    metrics.close()
    with pytest.raises(urllib.error.URLError):
        scrape(port)
    with socket.create_server((HOST, port)):
        pass
    assert threading.active_count() == n_threads
    gc.collect()  # a socket left open would warn here, and warnings are errors


def test_close_without_an_endpoint_does_nothing(metrics: Metrics) -> None:
    metrics.close()


def test_serving_again_moves_the_endpoint(metrics: Metrics) -> None:
    old = metrics.serve(HOST, 0)
    new = metrics.serve(HOST, 0)
    assert "semwatch_ready" in scrape(new)
    if new != old:
        with pytest.raises(urllib.error.URLError):
            scrape(old)


def test_counts_from_many_threads_add_up(metrics: Metrics) -> None:
    review = make_review(1)

    def observe_50() -> None:
        for _ in range(50):
            metrics.observe(review)

    threads = [threading.Thread(target=observe_50) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert value(metrics, "reviews_total", source="tool-a", verdict="known") == 200.0


def test_page_without_image_is_counted_and_is_not_defect_free(metrics: Metrics) -> None:
    whole = make_review(0, n_pages=2)
    blank = Quality((QualityFlag("blank", 0.0, 2.0),), is_image=False)
    soft = Quality((QualityFlag("defocus", 6.0, 4.0), QualityFlag("drift", 2.0, 1.0)))
    pages = (replace(whole.pages[0], score_map=None, quality=blank), replace(whole.pages[1], quality=soft))
    review = replace(whole, pages=pages)
    metrics.observe(review)
    assert verdict_of(review) == verdict_of(to_record(review)) == "no-image"
    assert value(metrics, "pages_without_image_total", source="tool-a") == 1
    for flag in ("blank", "defocus", "drift"):
        assert value(metrics, "pages_flagged_total", source="tool-a", flag=flag) == 1
    assert value(metrics, "reviews_total", source="tool-a", verdict="no-image") == 1
    assert not value(metrics, "reviews_total", source="tool-a", verdict="defect-free")


def test_defect_is_graver_than_a_page_without_image() -> None:
    whole = make_review(1, n_pages=2, verdicts=[make_verdict("unknown")])
    blank = replace(whole.pages[0], score_map=None, defects=(), quality=Quality(is_image=False))
    assert verdict_of(replace(whole, pages=(blank, whole.pages[1]))) == "unknown"


def test_idle_connections_take_no_place_from_prometheus() -> None:
    """1,021 idle connections once took every descriptor of the daemon."""
    metrics = Metrics(["tool-a"])
    port = metrics.serve(HOST, 0)
    before = len(list(Path("/proc/self/fd").iterdir()))
    idle = []
    try:
        for _ in range(200):
            idle.append(socket.create_connection((HOST, port), timeout=5))
            idle[-1].sendall(b"GET /metrics HTTP/1.1\r\nX-Slow: ")
        with urllib.request.urlopen(f"http://{HOST}:{port}/metrics", timeout=10) as answer:
            assert b"semwatch_ready" in answer.read()
        deadline = time.monotonic() + 10
        while (ours := len(list(Path("/proc/self/fd").iterdir())) - before - len(idle)) > MAX_CONNECTIONS:
            assert time.monotonic() < deadline, ours
            time.sleep(0.05)
        assert threading.active_count() < MAX_CONNECTIONS + 20
    finally:
        for connection in idle:
            connection.close()
        metrics.close()


def test_a_connection_that_dawdles_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_server, "REQUEST_S", 0.3)
    metrics = Metrics()
    port = metrics.serve(HOST, 0)
    with socket.create_connection((HOST, port), timeout=10) as slow:
        slow.sendall(b"GET /met")
        assert slow.recv(1) == b""  # the server hung up
    metrics.close()
