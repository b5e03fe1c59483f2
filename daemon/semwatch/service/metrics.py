"""What Prometheus reads of the daemon. One registry per ``Metrics``, nothing global.

Labels are bounded: sources come from the site settings, class labels from the head's own list, stages, models and
services from the code. An image name, a lot or an error text never becomes a label.
"""

from collections.abc import Iterable
from datetime import datetime
from itertools import product
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from semwatch.defects import DEFECT_FREE, NO_IMAGE, Domain, QualityName, Review, VerdictKind
from semwatch.errors import ConfigError
from semwatch.models.model_repository import MODELS
from semwatch.service.drift import WATCHED
from semwatch.service.metrics_server import MetricsServer
from semwatch.store.pause import REASONS
from semwatch.store.review_record import ReviewRecord

STAGE_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)

SEVEREST_FIRST: tuple[VerdictKind, ...] = ("unknown", "novel", "non-decidable", "known", "defect-free")
"""A file counts once, under the first of these that any of its defects has."""

FILE_VERDICTS: tuple[str, ...] = (*SEVEREST_FIRST[:-1], NO_IMAGE, SEVEREST_FIRST[-1])
"""What a file may count under: a page without an image is graver than a page without a defect."""

SERVICES = ("line", "redis", "folder", "file")
"""What can be away or fail: models or disk, the streams, a drop folder, a file by itself."""

HOOKS = ("on_lot_done", "on_alarm", "host_event")
HOOK_OUTCOMES = ("done", "failed", "given up")
"""Of an attempt: one that failed is tried again."""


class Metrics:
    """All measurements, and the endpoint that shows them once ``serve`` is called.

    Args:
        sources: names of the drop folders; their counters start at 0 instead of being absent until the first event.
    """

    def __init__(self, sources: Iterable[str] = ()) -> None:
        self.registry = CollectorRegistry()
        self._add_counters()
        self._add_gauges()
        self.stage_seconds = Histogram(
            "semwatch_stage_seconds",
            "Time of one stage for one file.",
            ["stage"],
            buckets=STAGE_BUCKETS_S,
            registry=self.registry,
        )
        for source in sources:
            self._start_at_zero(source)
        for service in SERVICES:
            self.errors.labels(service)
        for model in MODELS:
            self.swap_refused.labels(model)
        for reason in REASONS:
            self.paused.labels(reason)
        for hook, outcome in product(HOOKS, HOOK_OUTCOMES):
            self.hook_runs.labels(hook, outcome)
        self._endpoint: MetricsServer | None = None

    def observe(self, review: Review) -> None:
        """Count one finished review: verdicts, pages, defects, stage times, model versions, time of the last review."""
        self.reviews.labels(review.source, verdict_of(review)).inc()
        for page in review.pages:
            self.pages.labels(review.source, page.domain).inc()
        for defect in (defect for page in review.pages for defect in page.defects):
            self.defects.labels(review.source, defect.verdict.kind, defect.verdict.label or "").inc()
        for page in review.pages:
            if not page.quality.is_image:
                self.no_image.labels(review.source).inc()
            for flag in page.quality.flags:
                self.flagged.labels(review.source, flag.name).inc()
        for stage, milliseconds in review.timings_ms.items():
            self.stage_seconds.labels(stage).observe(milliseconds / 1000)
        for model, version in review.model_versions.items():
            self.model_version.labels(model).set(version)
        self.last_review_timestamp_seconds.set(datetime.fromisoformat(review.reviewed_utc).timestamp())

    def observe_revision(self, result: ReviewRecord) -> None:
        """Count one result that a later head judged again."""
        self.revised.labels(result.source, verdict_of(result)).inc()

    def serve(self, host: str, port: int) -> int:
        """Show the metrics at ``http://host:port/metrics``; return the port, which the system chooses for 0.

        Raises:
            ConfigError: the address cannot be listened on.
        """
        self.close()
        try:
            self._endpoint = MetricsServer(host, port, self.registry)
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"metrics cannot be served at {host}:{port} ({why}): "
                "set metrics.host and metrics.port in the site settings to a free address of this machine"
            ) from error
        return int(self._endpoint.server_port)

    def close(self) -> None:
        """Stop the endpoint and free its port; harmless where there is none."""
        endpoint, self._endpoint = self._endpoint, None
        if endpoint is not None:
            endpoint.close()

    def _add_counters(self) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"semwatch_{name}", text, labels, registry=self.registry)

        self.reviews = counter("reviews_total", "Files reviewed, by their severest verdict.", "source", "verdict")
        self.pages = counter(
            "pages_total", "Pages by whether they are of a process whose normal images are known.", "source", "domain"
        )
        self.defects = counter(
            "defects_total", "Defects by verdict; label is empty without class.", "source", "kind", "label"
        )
        self.no_image = counter("pages_without_image_total", "Pages that were blank or an info bar alone.", "source")
        self.flagged = counter("pages_flagged_total", "Pages by what is wrong with them.", "source", "flag")
        self.quarantined = counter("quarantined_total", "Files that could not be reviewed.", "source")
        self.duplicates = counter("duplicates_total", "Files whose content was reviewed before.", "source")
        self.errors = counter("errors_total", "Times a service or folder was away, or a file failed.", "service")
        self.swap_refused = counter("swap_refused_total", "Versions that were refused at load.", "model")
        self.revised = counter(
            "revised_total", "Results judged again after a swap, by their severest verdict now.", "source", "verdict"
        )
        self.hook_runs = counter("hook_runs_total", "Attempts of hooks by how they ended.", "hook", "outcome")
        self.drift_alarms = counter("drift_alarms_total", "Times a source left its reference window.", "source", "what")

    def _add_gauges(self) -> None:
        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"semwatch_{name}", text, labels, registry=self.registry)

        self.ready = gauge("ready", "1 once the daemon has started, in a pause too, else 0; see paused.")
        self.paused = gauge("paused", "1 while no file is taken for this reason, else 0.", "reason")
        self.in_flight = gauge("in_flight", "Files under review.")
        self.waiting_files = gauge("waiting_files", "Files that wait in the drop folders.")
        self.oldest_waiting_seconds = gauge(
            "oldest_waiting_seconds", "Age of the file that waits or is under review longest, 0 if none."
        )
        self.unpublished_records = gauge("unpublished_records", "Records not yet in Redis.")
        self.disk_free_bytes = gauge("disk_free_bytes", "Free space for results.")
        self.model_version = gauge("model_version", "Version that answered last.", "model")
        self.drift = gauge("drift", "Change against the reference window; 1 is an alarm.", "source", "what")
        self.last_review_timestamp_seconds = gauge(
            "last_review_timestamp_seconds", "Unix time of the last review, 0 if none."
        )

    def _start_at_zero(self, source: str) -> None:
        self.no_image.labels(source)
        for name in get_args(QualityName):
            self.flagged.labels(source, name)
        for kind in FILE_VERDICTS:
            self.reviews.labels(source, kind)
            self.revised.labels(source, kind)
        for domain in get_args(Domain):
            self.pages.labels(source, domain)
        self.quarantined.labels(source)
        self.duplicates.labels(source)
        for what in WATCHED:
            self.drift.labels(source, what)
            self.drift_alarms.labels(source, what)


def verdict_of(review: Review | ReviewRecord) -> str:
    """The severest verdict of a file; one without defects is defect-free, unless a page of it holds no image."""
    found: set[str] = {defect.verdict.kind for page in review.pages for defect in page.defects}
    if not all(page.quality.is_image for page in review.pages):
        found.add(NO_IMAGE)
    return next((kind for kind in FILE_VERDICTS if kind in found), DEFECT_FREE)
