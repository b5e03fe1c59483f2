"""Site settings: what this machine watches, where things live, and what it may use.

One ``ConfigError`` names every problem of a file with its line; what concerns several settings together is looked at
once each is right by itself. ``yaml_file`` reads the YAML and words the faults; ``fields`` has the kinds of values.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from semwatch.errors import ConfigError
from semwatch.settings import yaml_file
from semwatch.settings.fields import (
    EXAMPLES,
    Command,
    Count,
    ImageSuffix,
    Name,
    OrZero,
    Positive,
    RedisUrl,
    Settings,
    SitePath,
    Suffix,
    at_least_one,
    placeholders,
    refusal,
)
from semwatch.settings.yaml_file import At

IMAGE_SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg", ".bmp", ".i01")
"""``.i01`` is KLARF's multi-page TIFF."""
DEFAULT_NAME = "site"
"""Of a site that nobody has named: two of them in one fab cannot be told apart."""

OF_LOTS = (
    *("site", "utc", "lot", "path", "images", "refused", "duplicates"),
    *("lot_id", "klarf", "revision", "defects", "verdicts"),
)
"""Variables that a hook gets of a lot; the second row is empty without a KLARF, the counts of images with one."""
OF_ALARMS = ("site", "utc", "alarm", "source", "sentence")

Faults = Iterator[tuple[At, PydanticCustomError]]


def load_site(path: Path) -> "Site":
    """Read the site settings; relative paths in it start at the file's folder and come back absolute.

    Raises:
        ConfigError: with every problem found, one a line, as ``file:line: key: remedy``.
    """
    return yaml_file.load(path, Site, example=EXAMPLES / "site.yaml")


class Folder(Settings):
    """One drop folder: the images of one tool."""

    path: SitePath
    """The drop folder."""
    source: Name
    """The tool's name, unique in this site; stands in results, records and metrics."""
    recipe: SitePath
    """Recipe for the images of this folder."""
    completeness: Literal["rename", "marker", "steady"] = "steady"
    """How a file shows that it is whole: renamed into place, marked by a second file, or steady in size and time."""
    steady_s: Positive = 2.0
    """Seconds without a change in size and time after which a file counts as steady."""
    marker_suffixes: Annotated[tuple[Suffix, ...], AfterValidator(at_least_one)] = (".done", ".trigger")
    """With marker: x.tif is whole once x.tif.done or x.done stands beside it."""
    recursive: bool = True
    """Look into sub-folders too."""
    polling: bool = False
    """Poll instead of waiting for events; needed on SMB, NFS and SSHFS shares."""
    suffixes: Annotated[tuple[ImageSuffix, ...], AfterValidator(at_least_one)] = IMAGE_SUFFIXES
    """Ends of the names that are images, in upper or lower case."""


class Triton(Settings):
    """The Triton server that runs the models, for runtime: triton."""

    url: Annotated[str, Field(pattern=r"^[^\s/:]+:\d+$")] = "127.0.0.1:8001"
    """Its gRPC address, host:port."""
    timeout_s: Positive = 30.0
    """Seconds that one answer may take."""
    attempts: Annotated[int, Field(ge=1, le=10)] = 3
    """Tries of one request while the server is away, each later than the one before."""
    control_secret_file: SitePath | None = None
    """File with the secret of those who may load models; null: the one that `semwatch triton` leaves in its view."""


class Models(Settings):
    """The models and what runs them."""

    repository: SitePath
    """Model repository: detector, encoder and head in Triton's layout."""
    runtime: Literal["embedded", "triton"] = "embedded"
    """What runs the models; embedded: ONNX Runtime inside the daemon; triton: a server that serves the repository."""
    triton: Triton = Triton()
    """The Triton server, for runtime: triton."""
    threads: Count | None = None
    """CPU threads of one network; null: all the machine has."""


class Redis(Settings):
    """The Redis server that takes the records."""

    url: RedisUrl
    """Address: redis://host:port/db, rediss://host:port/db (TLS) or unix:///path/of/socket; never a password."""
    username: str | None = None
    """ACL user; null: the server's default user."""
    password_file: SitePath | None = None
    """File that holds the password; null: none."""
    ca_file: SitePath | None = None
    """With rediss: PEM file of the authority to trust; null: the system's."""
    prefix: Name = "semwatch"
    """First part of every Redis key."""
    max_unpublished: Count = 1000
    """Files wait in the folder once this many records are unpublished."""
    timeout_s: Positive = 5.0
    """Seconds that one call to the server may take."""

    @model_validator(mode="after")
    def _ca_file_needs_tls(self) -> "Redis":
        if self.ca_file and not self.url.startswith("rediss:"):
            raise refusal("ca_file works with rediss:// only: change the url or delete ca_file")
        return self


class Limits(Settings):
    """What the machine takes on."""

    in_flight: Annotated[int, Field(ge=1, le=64)] = 2
    """Files under review at the same time."""
    min_free_mb: OrZero = 1024
    """Files wait while the disk has less free space, in megabytes."""
    max_image_mpx: Positive = 67.2
    """Largest page in millions of pixels (8192 x 8192 fits); a larger one is quarantined."""
    max_pages: Count = 64
    """Most pages of one file; a file with more is quarantined."""
    decode_cpu_s: Annotated[float, Field(ge=1, le=600)] = 30.0
    """Seconds of computing, four times that by the clock, that decoding one file may take before it is quarantined."""
    max_attempts: Count = 5
    """Attempts at one file before it is quarantined."""
    review_timeout_s: Positive = 300.0
    """Seconds after which a review counts as hung: the watchdog is fed no more, and systemd restarts the daemon."""
    stop_timeout_s: Positive = 20.0
    """Seconds that a stop waits for the files in flight."""

    @property
    def max_image_px(self) -> int:
        """Pixels of the largest page."""
        return int(self.max_image_mpx * 1_000_000)


class Learning(Settings):
    """How unknowns become classes; `semwatch-train retrain` reads it, and the daemon after a swap."""

    folder: SitePath | None = None
    """Folder of what learning keeps: seen unknowns, clusters, reports; null: learning in the state_dir."""
    min_unknowns: Count = 30
    """A cycle learns once this many unknowns wait."""
    max_unknowns: Count = 4000
    """Most unknowns that one cycle takes."""
    forget_days: Positive = 60.0
    """Days after which an unknown that no class came of leaves the queue; it stays in the archive."""
    reread_days: Annotated[float, Field(ge=0)] = 14.0
    """After a swap, unknowns of so many days are judged again by the new head; 0: none."""
    keep_days: Positive = 365.0
    """Days after which an unknown that was settled leaves the archive; no fewer than reread_days."""
    keep_reports: Count = 100
    """Reports of cycles that are kept, the newest."""
    keep_versions: Annotated[int, Field(ge=2)] = 10
    """Versions of a head that are kept; the one in service and the one before it always are."""
    swap_timeout_s: Positive = 60.0
    """Seconds that a cycle waits until the daemon answers with the new head."""

    @model_validator(mode="after")
    def _what_is_reread_is_kept(self) -> "Learning":
        if self.keep_days < self.reread_days:
            raise refusal("keep_days is smaller than reread_days: what shall be judged again would be gone")
        return self


class LedgerMemory(Settings):
    """What the ledger remembers."""

    keep_days: Annotated[float, Field(ge=1)] = 400.0
    """Days after which a finished image that has left its drop folder is forgotten: the same content, dropped again
    later, is reviewed anew. What still lies there is remembered."""


class Hooks(Settings):
    """Programs of yours that the daemon runs without a shell: absolute path and arguments of each as a list."""

    on_lot_done: Annotated[Command, placeholders(*OF_LOTS)] = ()
    """When a lot is complete; {lot}, {path} of its results, {lot_id}, {klarf}, {revision}, {images}, {refused} and more
    become what they name; []: none."""
    on_alarm: Annotated[Command, placeholders(*OF_ALARMS)] = ()
    """When there is an alarm; {alarm}, {source}, {sentence}, {site} and {utc} become what they name; []: none."""
    quiet_s: Annotated[float, Field(gt=0, le=86_400)] = 300.0
    """Seconds without a new image, and none waiting, after which a lot without a KLARF counts as complete."""
    timeout_s: Annotated[float, Field(gt=0, le=3600)] = 30.0
    """Seconds after which a hook that still runs is ended, and counts as failed."""
    attempts: Annotated[int, Field(ge=1, le=20)] = 3
    """Tries of one run, each later than the one before; then it is given up, which `semwatch doctor` says."""
    retry_s: Annotated[float, Field(gt=0, le=300)] = 10.0
    """Seconds until the second try; doubled with each further one, up to five minutes."""
    alarm_again_s: Annotated[float, Field(ge=0)] = 3600.0
    """Seconds for which the same alarm of the same source runs no hook again."""


class HostEvent(Settings):
    """The fab's host, which gets an S6F11 over HSMS for each lot that is complete; needs `semwatch[secsgem]`."""

    mode: Literal["active", "passive"] = "active"
    """active: the host listens; passive: it connects to this machine, while there is a report."""
    address: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Of the host; with passive the one to listen on."""
    port: Annotated[int, Field(ge=1, le=65535)] = 5000
    """TCP port of it."""
    device_id: Annotated[int, Field(ge=0, le=32767)] = 0
    """Session id of HSMS."""
    ceid: Count = 1
    """Of the collection event."""
    rptid: Count = 1
    """Of its report."""
    timeout_s: Annotated[float, Field(gt=0, le=600)] = 30.0
    """Seconds until the host answers, and again until it acknowledges."""
    attempts: Annotated[int, Field(ge=1, le=1000)] = 20
    """Tries of one report, with the waits of hooks.retry_s between; then it is given up."""


class MetricsEndpoint(Settings):
    """Where Prometheus reads."""

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address to listen on; 0.0.0.0: every network of the machine."""
    port: Annotated[int, Field(ge=1, le=65535)] = 9464
    """TCP port to listen on."""


class Site(Settings):
    """What this machine watches, where things live and what it may use."""

    name: Name = DEFAULT_NAME
    """Name of this site, unique in the fab; stands in results and records."""
    folders: Annotated[tuple[Folder, ...], AfterValidator(at_least_one)]
    """The drop folders."""
    results_dir: SitePath
    """Folder of the results."""
    state_dir: SitePath
    """Folder of ledger.sqlite and audit.jsonl, on a local disk."""
    models: Models
    """The models and what runs them."""
    redis: Redis | None = None
    """The Redis server that takes the records; null: none."""
    learning: Learning = Learning()
    """How unknowns become classes."""
    limits: Limits = Limits()
    """What the machine takes on."""
    ledger: LedgerMemory = LedgerMemory()
    """What the ledger remembers."""
    reconcile_s: Positive = 30.0
    """Seconds between full scans of the drop folders."""
    poll_s: Positive = 2.0
    """Seconds between looks at a polled folder."""
    hooks: Hooks = Hooks()
    """Programs of yours that the daemon runs."""
    host_event: HostEvent | None = None
    """The fab's host, which gets an event for each lot that is complete; null: none."""
    metrics: MetricsEndpoint | None = None
    """Where Prometheus reads; null: nowhere."""

    @property
    def learning_dir(self) -> Path:
        """Folder of what learning keeps."""
        return self.learning.folder or self.state_dir / "learning"

    @model_validator(mode="after")
    def _folders_keep_apart(self) -> "Site":
        faults = [*_repeated_sources(self), *_nested_folders(self), *_outputs_in_folders(self)]
        if faults:
            details = [InitErrorDetails(type=fault, loc=at, input=None) for at, fault in faults]
            raise ValidationError.from_exception_data("Site", details)
        return self


def check_outbox(folders: Sequence[Folder], outbox: Path | None, recipe: Path) -> None:
    """Make sure that what is written back is not read as input.

    Args:
        folders: of the site.
        outbox: that a recipe names, if it names one.
        recipe: its file, for the message.

    Raises:
        ConfigError: the outbox lies in a drop folder.
    """
    for folder in folders:
        if outbox is not None and _real(outbox).is_relative_to(_real(folder.path)):
            raise ConfigError(
                f"{recipe}: klarf.outbox lies in the drop folder {folder.path}: choose a folder outside, or what is "
                f"written back is read as input"
            )


def _repeated_sources(site: Site) -> Faults:
    seen: set[str] = set()
    for i, folder in enumerate(site.folders):
        if folder.source in seen:
            yield ("folders", i, "source"), refusal("is used by another folder too: give each folder its own source")
        seen.add(folder.source)


def _nested_folders(site: Site) -> Faults:
    outer: Path | None = None
    # Sorted by their parts, the folders inside a folder follow it directly.
    for real, i in sorted((_real(folder.path), i) for i, folder in enumerate(site.folders)):
        if outer and real.is_relative_to(outer):
            text = "lies in the drop folder {outer}: a file belongs to one source, choose folders side by side"
            yield ("folders", i, "path"), refusal(text, outer=str(outer))
        else:
            outer = real


def _outputs_in_folders(site: Site) -> Faults:
    drops = [_real(folder.path) for folder in site.folders]
    for key, output in (("results_dir", _real(site.results_dir)), ("state_dir", _real(site.state_dir))):
        around = next((drop for drop in drops if output.is_relative_to(drop)), None)
        if around:
            text = "lies in the drop folder {around}: choose a folder outside, or output is read as input"
            yield (key,), refusal(text, around=str(around))


def _real(path: Path) -> Path:
    # Unlike Path.resolve, realpath takes a ring of links as it is.
    return Path(os.path.realpath(path))
