"""Site settings and recipes: YAML files in, validated frozen models out; nothing else knows their keys.

A *site* says what this machine watches and where things live. A *recipe* says how a layer is judged; its content hash
is its identity. One ``ConfigError`` names every problem of a file with its line; what concerns several settings
together is looked at once each is right by itself.

``settings_file`` reads the YAML and words the faults; here stands what each setting is.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal, TypeVar
from urllib.parse import parse_qs, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from semwatch import settings_file
from semwatch.settings_file import BLANK, At

EXAMPLES = Path(__file__).with_name("examples")
"""Folder of the commented examples, valid as they stand: ``site.yaml``, ``recipe.yaml``."""

T = TypeVar("T")
Faults = Iterator[tuple[At, PydanticCustomError]]


def load_site(path: Path) -> "Site":
    """Read the site settings; relative paths in it start at the file's folder and come back absolute.

    Raises:
        ConfigError: with every problem found, one a line, as ``file:line: key: remedy``.
    """
    return settings_file.load(path, Site, example=EXAMPLES / "site.yaml")


def load_recipe(path: Path) -> "Recipe":
    """Read a recipe.

    Raises:
        ConfigError: with every problem found, one a line, as ``file:line: key: remedy``.
    """
    return settings_file.load(path, Recipe, example=EXAMPLES / "recipe.yaml")


def _refusal(text: str, **values: object) -> PydanticCustomError:
    return PydanticCustomError("refused", text, values)


def _absolute(value: object, info: ValidationInfo) -> Path:
    if value is None or value is BLANK:
        raise _refusal("is empty: give a path")
    if isinstance(value, Path):
        value = str(value)
    if not isinstance(value, str) or not value or not value.isprintable():
        raise _refusal("must be a path of printable characters: put it in quotes")
    if value.startswith("~") or re.search(r"\$\{|(^|/)\$", value):
        raise _refusal("'~' and '$NAME' are not expanded: write the whole path")
    folder = (info.context or {}).get("folder")
    return Path(value) if folder is None else Path(os.path.normpath(Path(folder).absolute() / value))


def _name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", value):
        raise _refusal(
            "must be 1 to 64 of the characters A-Z a-z 0-9 _ . - and start with a letter, a digit or _ "
            "(it becomes part of file and metric names)"
        )
    return value


def _suffix(value: str) -> str:
    if not re.fullmatch(r"\.[^\s/\\*?]+", value):
        raise _refusal("must be the end of a file name with its dot, such as .tif")
    return value


def _label(value: str) -> str:
    if value in ("unknown", "non-decidable"):
        raise _refusal("is a verdict, not a class: give its code as {key}", key=value.replace("-", "_") + "_code")
    if not value.isprintable() or value.strip() != value or not 1 <= len(value) <= 64:
        raise _refusal("must be a class name of 1 to 64 printable characters without spaces around it")
    return value


def _redis_url(value: str) -> str:
    # Whatever is wrong, the address is never repeated in the message: it may hold a password.
    if "@" in value or {"password", "username"} & parse_qs(value.partition("?")[2]).keys():
        raise _refusal("holds a user or a password: take it out, use username and password_file")
    try:
        parts = urlsplit(value)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise _refusal("is not an address: write it as redis://host:6379/0") from None
    if not (parts.path.strip("/") if parts.scheme == "unix" else parts.scheme in ("redis", "rediss") and host):
        raise _refusal("must be redis://host:port/db, rediss://host:port/db (TLS) or unix:///path/of/socket")
    return value


def _at_least_one(value: tuple[T, ...]) -> tuple[T, ...]:
    # Field(min_length=1) would count the items that are right, and so add a false problem to the true ones.
    if not value:
        raise _refusal("must have at least one item")
    return value


def _rising(value: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= value[0] < value[1] <= 100:
        raise _refusal("must be two rising percentiles within 0 and 100, such as [1, 99.9]")
    return value


SitePath = Annotated[Path, BeforeValidator(_absolute)]
Name = Annotated[str, AfterValidator(_name)]
Suffix = Annotated[str, AfterValidator(_suffix)]
ImageSuffix = Annotated[Suffix, AfterValidator(str.lower)]
Label = Annotated[str, AfterValidator(_label)]
RedisUrl = Annotated[str, AfterValidator(_redis_url)]
Percentiles = Annotated[tuple[float, float], AfterValidator(_rising)]
Count = Annotated[int, Field(ge=1)]
OrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Open = Annotated[float, Field(gt=0, lt=1)]
"""A share or probability that is neither 0 nor 1."""
Share = Annotated[float, Field(gt=0, le=1)]


class _Settings(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _blank_is_all_defaults(cls, value: object) -> object:
        return {} if value is BLANK else value


class Folder(_Settings):
    """One drop folder: the images of one tool."""

    path: SitePath
    """The drop folder."""
    source: Name
    """Name of the tool that writes here; stands in results, records and metrics."""
    recipe: SitePath
    """Recipe for the images of this folder."""
    completeness: Literal["rename", "marker", "steady"] = "steady"
    """How a file shows that it is whole: renamed into place, marked by a second file, or steady in size and time."""
    steady_s: Positive = 2.0
    """Seconds without a change in size and time after which a file counts as steady."""
    marker_suffixes: Annotated[tuple[Suffix, ...], AfterValidator(_at_least_one)] = (".done", ".trigger")
    """With marker: x.tif is whole once x.tif.done or x.done stands beside it."""
    recursive: bool = True
    """Look into sub-folders too."""
    polling: bool = False
    """Poll instead of waiting for events; needed on SMB, NFS and SSHFS shares."""
    suffixes: Annotated[tuple[ImageSuffix, ...], AfterValidator(_at_least_one)] = (
        *(".tif", ".tiff", ".png", ".jpg", ".jpeg", ".bmp"),
        ".i01",  # KLARF's multi-page TIFF
    )
    """Ends of the names that are images, in upper or lower case."""


class Triton(_Settings):
    """The Triton server that runs the models, for runtime: triton."""

    url: Annotated[str, Field(pattern=r"^[^\s/:]+:\d+$")] = "127.0.0.1:8001"
    """Its gRPC address, host:port."""
    timeout_s: Positive = 30.0
    """Seconds that one answer may take."""
    attempts: Annotated[int, Field(ge=1, le=10)] = 3
    """Tries of one request while the server is away, each later than the one before."""
    control_secret_file: SitePath | None = None
    """File with the secret of those who may load models; null: the one that `semwatch triton` leaves in its view."""


class Models(_Settings):
    """The models and what runs them."""

    repository: SitePath
    """Model repository: detector, encoder and head in Triton's layout."""
    runtime: Literal["embedded", "triton"] = "embedded"
    """What runs the models; embedded: ONNX Runtime inside the daemon; triton: a server that serves the repository."""
    triton: Triton = Triton()
    """The Triton server, for runtime: triton."""
    threads: Count | None = None
    """CPU threads of one network; null: all the machine has."""


class Redis(_Settings):
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
            raise _refusal("ca_file works with rediss:// only: change the url or delete ca_file")
        return self


class Limits(_Settings):
    """What the machine takes on."""

    in_flight: Annotated[int, Field(ge=1, le=64)] = 2
    """Files under review at the same time."""
    min_free_mb: OrZero = 1024
    """Files wait while the disk has less free space, in megabytes."""
    max_image_mpx: Positive = 67.2
    """Largest page in millions of pixels (8192 x 8192 fits); a larger one is quarantined."""
    max_pages: Count = 64
    """Most pages of one file; a file with more is quarantined."""
    max_attempts: Count = 5
    """Attempts at one file before it is quarantined."""
    review_timeout_s: Positive = 300.0
    """Seconds after which a review counts as hung: the watchdog is fed no more, and systemd restarts the daemon."""
    stop_timeout_s: Positive = 20.0
    """Seconds that a stop waits for the files in flight."""


class Learning(_Settings):
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
            raise _refusal("keep_days is smaller than reread_days: what shall be judged again would be gone")
        return self


class MetricsEndpoint(_Settings):
    """Where Prometheus reads."""

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address to listen on; 0.0.0.0: every network of the machine."""
    port: Annotated[int, Field(ge=1, le=65535)] = 9464
    """TCP port to listen on."""


class Site(_Settings):
    """What this machine watches, where things live and what it may use."""

    folders: Annotated[tuple[Folder, ...], AfterValidator(_at_least_one)]
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
    reconcile_s: Positive = 30.0
    """Seconds between full scans of the drop folders."""
    poll_s: Positive = 2.0
    """Seconds between looks at a polled folder."""
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


def _repeated_sources(site: Site) -> Faults:
    seen: set[str] = set()
    for i, folder in enumerate(site.folders):
        if folder.source in seen:
            yield ("folders", i, "source"), _refusal("is used by another folder too: give each folder its own source")
        seen.add(folder.source)


def _nested_folders(site: Site) -> Faults:
    outer: Path | None = None
    # Sorted by their parts, the folders inside a folder follow it directly.
    for real, i in sorted((_real(folder.path), i) for i, folder in enumerate(site.folders)):
        if outer and real.is_relative_to(outer):
            text = "lies in the drop folder {outer}: a file belongs to one source, choose folders side by side"
            yield ("folders", i, "path"), _refusal(text, outer=str(outer))
        else:
            outer = real


def _outputs_in_folders(site: Site) -> Faults:
    drops = [_real(folder.path) for folder in site.folders]
    for key, output in (("results_dir", _real(site.results_dir)), ("state_dir", _real(site.state_dir))):
        around = next((drop for drop in drops if output.is_relative_to(drop)), None)
        if around:
            text = "lies in the drop folder {around}: choose a folder outside, or output is read as input"
            yield (key,), _refusal(text, around=str(around))


def _real(path: Path) -> Path:
    # Unlike Path.resolve, realpath takes a ring of links as it is.
    return Path(os.path.realpath(path))


class Pins(_Settings):
    """Model versions to stay with."""

    detector: Count | None = None
    """Version of the detector; null: the newest."""
    encoder: Count | None = None
    """Version of the encoder; null: the newest."""
    head: Count | None = None
    """Version of the head; null: the newest."""


class Gate(_Settings):
    """Which pages are searched for defects at all."""

    false_alarm_rate: Open = 0.05
    """Share of defect-free images that may pass the gate."""
    threshold: Annotated[float, Field(ge=0)] | None = None
    """Raw image score above which the gate opens; null: the detector's, for the false alarm rate."""


class Binarization(_Settings):
    """From the score map to the defect mask."""

    method: Literal["plateau", "lowest", "fixed", "otsu", "literal"] = "plateau"
    """plateau: middle of the longest stable count; to compare with: lowest (of that run), literal, otsu, fixed."""
    grid_px: Annotated[int, Field(ge=16, le=1024)] = 112
    """Edge of the grid that thresholds are tried on."""
    n_thresholds: Annotated[int, Field(ge=2, le=1024)] = 64
    """Thresholds tried, evenly spaced."""
    percentiles: Percentiles = (1.0, 99.9)
    """Percentiles of the score map between which the thresholds lie."""
    # Not Literal[0, 1]: that takes false for 0.
    epsilon: Annotated[int, Field(ge=0, le=1)] = 0
    """Change in the number of defects that still counts as the same: 0 or 1."""
    min_plateau: Count = 4
    """Shortest run of thresholds that is believed."""
    max_mask_fraction: Share = 0.5
    """Largest share of the field that a mask may cover."""
    max_defects: Count = 8
    """Most defects kept of one page."""
    merge_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Boxes closer than this share of the field become one."""

    @model_validator(mode="after")
    def _plateau_fits_the_sweep(self) -> "Binarization":
        if self.min_plateau > self.n_thresholds:
            raise _refusal("min_plateau is larger than n_thresholds: no plateau could be found, make it smaller")
        return self


class Crop(_Settings):
    """The square window cut around a defect."""

    context: Annotated[float, Field(ge=1)] = 2.0
    """Edge of the window, in edges of the defect's box."""
    min_side_fraction: Share = 0.1
    """Smallest edge of the window, as a share of the field."""


class UnknownRule(_Settings):
    """When a defect is called unknown, when non-decidable."""

    significance: Open = 0.05
    """Unknown: no class has a p-value above this. It is the share of known defects that are called unknown."""
    decide_confidence: Annotated[float, Field(ge=0, le=1)] = 0.8
    """Known: the head gives a class this probability among those that fit; else non-decidable."""


class Promotion(_Settings):
    """What a newly trained head must show before it serves this recipe."""

    max_accuracy_loss: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Most accuracy that any known class may lose on the golden set."""
    max_purity_loss: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Most purity that any known class may lose on the golden set."""
    loss_significance: Share = 0.05
    """A loss counts where chance makes one like it at most this often (paired sign test); 1: every loss counts."""
    max_unknown_rate: Share = 0.2
    """Largest share of the golden set that may be called unknown."""
    min_cluster_size: Annotated[int, Field(ge=5)] = 12
    """Fewest crops of a new class."""
    min_cohesion: Annotated[float, Field(ge=-1, le=1)] = 0.05
    """Smallest mean silhouette of a new class among all others, from -1 to 1."""
    min_cycles: Count = 1
    """Cycles in which a new class must have been seen before it is learned."""


class KnownClass(_Settings):
    """One line of the fab's class table."""

    code: int
    """Class number in the fab's table and in KLARF files."""
    doi: bool = True
    """Defect of interest; false: nuisance."""


def _as_dict(classes: Mapping[str, KnownClass]) -> dict[str, KnownClass]:
    return dict(classes)


class Recipe(_Settings):
    """How the images of one layer and step are judged."""

    name: Name = "default"
    """Name of the recipe."""
    version: OrZero = 1
    """The engineer's own count; the identity is the content."""
    pins: Pins = Pins()
    """Model versions to stay with."""
    gate: Gate = Gate()
    """Which pages are searched for defects at all."""
    binarization: Binarization = Binarization()
    """From the score map to the defect mask."""
    crop: Crop = Crop()
    """The square window cut around a defect."""
    unknown: UnknownRule = UnknownRule()
    """When a defect is called unknown, when non-decidable."""
    # A read-only view, so that nothing changes the identity of a recipe in use.
    classes: Annotated[Mapping[Label, KnownClass], AfterValidator(MappingProxyType), PlainSerializer(_as_dict)] = Field(
        default_factory=dict, validate_default=True
    )
    """The fab's class table: label of the head to code. Labels that are not here have no code."""
    promotion: Promotion = Promotion()
    """What a newly trained head must show before it serves this recipe."""
    unknown_code: int | None = None
    """Code of an unknown defect, and of a new class that nobody has given a code; null: none."""
    non_decidable_code: int | None = None
    """Code of a non-decidable defect; null: none."""

    @property
    def id(self) -> str:
        """Identity of the recipe: 16 hexadecimal digits over every value, defaults included.

        Comments, order and spacing do not change it, nor does writing out a default; any other value does.
        """
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]
