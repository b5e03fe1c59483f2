"""A recipe: how the images of one layer and step are judged, and what a new head must show before it serves it.

Its identity is the hash of its content; every result, record and audit line carries it.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PlainSerializer, model_validator

from semwatch.settings import yaml_file
from semwatch.settings.fields import (
    EXAMPLES,
    Count,
    FilePatterns,
    ImageType,
    Label,
    Levels,
    Name,
    NamePattern,
    Open,
    OrZero,
    OrZeroSeconds,
    Percentiles,
    Positive,
    Settings,
    Share,
    SitePath,
    refusal,
)

Method = Literal["plateau", "lowest", "fixed", "otsu", "literal"]
"""How a score map becomes a mask, see ``line.binarization.binarize``."""

SelfCalibration = Literal["off", "propose", "use"]
"""What becomes of the threshold that a stream's own scores propose, see ``line.gate_calibration``."""


Action = Literal["flag", "quarantine"]
"""What becomes of a file with a bad page."""

ImageRole = Literal["test", "reference", "ignore"]
"""What an image that a KLARF names is."""

DefectRule = Literal["nearest_centre", "nearest_coordinate", "largest", "worst"]
"""Which of the defects that an image shows is the one that a KLARF means, see ``line.defect_rule``."""


def load_recipe(path: Path) -> "Recipe":
    """Read a recipe.

    Raises:
        ConfigError: with every problem found, one a line, as ``file:line: key: remedy``.
    """
    return yaml_file.load(path, Recipe, example=EXAMPLES / "recipe.yaml")


class Pins(Settings):
    """Model versions to stay with."""

    detector: Count | None = None
    """Version of the detector; null: the newest."""
    encoder: Count | None = None
    """Version of the encoder; null: the newest."""
    head: Count | None = None
    """Version of the head; null: the newest."""


class QualityRule(Settings):
    """Which pages hold no image or a bad one, and what becomes of their files."""

    no_image: Action = "flag"
    """Pages that are blank or an info bar alone. flag: the result says so; quarantine: the whole file is refused."""
    bad_quality: Action = "flag"
    """Pages beyond a limit below. flag: the result says so; quarantine: the whole file is refused."""
    blank_range: Levels = 2.0
    """Blank: the gray levels, specks aside, span this at most."""
    blank_margin: Levels = 8.0
    """Blank as well: all gray levels, specks aside, are within this of black, or of white."""
    min_range: Levels = 8.0
    """Faint: the middle 99 % of the gray levels span less than this."""
    max_saturated: Annotated[float, Field(ge=0, le=1)] = 0.6
    """Saturated: a larger share of the pixels is at 0 or 255. Dark trenches are black for good reason."""
    max_blur_px: Positive = 4.0
    """Out of focus: edges are softer than this, as the sigma of a Gaussian; raise it for images that are scaled up."""
    max_streaks: Annotated[float, Field(ge=0, le=1)] = 0.08
    """Streaks: rows differ in brightness from their neighbours by more than this, as a share of the gray range."""
    max_drift_px: Positive = 1.0
    """Drift: rows are shifted sideways against their neighbours by more than this, root mean square."""


class Gate(Settings):
    """Which pages are searched for defects at all."""

    false_alarm_rate: Open = 0.05
    """Share of defect-free images that may pass the gate."""
    threshold: Annotated[float, Field(ge=0)] | None = None
    """Raw image score above which the gate opens; null: the detector's, for the false alarm rate."""
    self_calibration: SelfCalibration = "propose"
    """The stream's own image scores propose a threshold. propose: say it; use: open by it; off: neither."""
    miss_cost: Positive | None = None
    """Cost of a missed defective image, in false alarms, for the proposal; null: it meets false_alarm_rate."""


class Detection(Settings):
    """The scale at which a page is searched."""

    coarser: Annotated[float, Field(ge=1, le=16)] = 1.0
    """Pixels of the page, along an edge, that the detector sees as one; 1: the page's own scale."""


class Binarization(Settings):
    """From the score map to the defect mask."""

    method: Method = "plateau"
    """plateau: middle of the longest stable count; to compare with: lowest (of that run), literal, otsu, fixed."""
    grid_px: Annotated[int, Field(ge=16, le=1024)] = 112
    """Shorter edge of the grid that thresholds are tried on; a finer score map is taken as it is."""
    n_thresholds: Annotated[int, Field(ge=2, le=1024)] = 64
    """Thresholds tried, evenly spaced."""
    percentiles: Percentiles = (1.0, 99.9)
    """Percentiles of the score map between which the thresholds lie."""
    # Not Literal[0, 1]: that takes false for 0.
    epsilon: Annotated[int, Field(ge=0, le=1)] = 0
    """Change in the number of defects that still counts as the same: 0 or 1."""
    min_plateau: Count = 4
    """Shortest run of thresholds that is believed."""
    hot: Annotated[float, Field(ge=1)] | None = 4.0
    """Gate thresholds above which a place belongs to a defect whatever the plateau says; null: the plateau alone."""
    max_mask_fraction: Share = 0.5
    """Largest share of the field that a mask may cover."""
    max_defects: Count = 8
    """Most defects kept of one page."""
    merge_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Boxes closer than this share of the field become one."""

    @model_validator(mode="after")
    def _plateau_fits_the_sweep(self) -> "Binarization":
        if self.min_plateau > self.n_thresholds:
            raise refusal("min_plateau is larger than n_thresholds: no plateau could be found, make it smaller")
        return self


class Reference(Settings):
    """A picture of the same place of another die, to compare with; off where neither pattern nor page is given."""

    pattern: NamePattern | None = None
    """Names of reference files without their extension, such as "*_ref"; null: no file is a reference."""
    inspected: NamePattern = "*"
    """Names of the files that they belong to, in the same folder; the * stands for the same text in both."""
    page: OrZero | None = None
    """Page of a file that is the reference of its other pages, counted from 0; null: every page is reviewed."""
    wait_s: OrZeroSeconds = 10.0
    """Seconds that an image waits for its reference before it is judged alone."""
    max_shift: Annotated[float, Field(gt=0, le=0.4)] = 0.2
    """Largest shift between the two, as a share of each side."""
    min_correlation: Annotated[float, Field(ge=0, lt=1)] = 0.88
    """Least correlation of the two after alignment; below, the reference shows another place."""
    threshold: Annotated[float, Field(gt=0)] = 7.0
    """Difference, in standard deviations of the pair, above which there is a defect."""

    @model_validator(mode="after")
    def _names_differ(self) -> "Reference":
        if self.pattern is not None and self.pattern == self.inspected:
            raise refusal("pattern and inspected are the same: no file could be told from its reference")
        return self


class Klarf(Settings):
    """KLARF files that name the work of a lot, and the codes that are written back; off without a pattern."""

    pattern: FilePatterns | None = None
    """Names of KLARF files in the drop folder, such as "*.klarf|*.001", in any case; null: none is read."""
    wait_s: OrZeroSeconds = 600.0
    """Seconds that an image waits for a KLARF that names it; then it is judged without one."""
    deadline_s: Annotated[float, Field(gt=0, le=2_592_000)] = 3600.0
    """Seconds after the KLARF from which an image that has not come is missing, and the lot is done without it."""
    quiet_s: OrZeroSeconds = 60.0
    """Seconds without a change after which a lot that was done, and says something else since, is written again."""
    settle_s: OrZeroSeconds = 60.0
    """Seconds without a change after which a KLARF that does not end in EndOfFile counts as whole."""
    max_mb: Annotated[float, Field(gt=0, le=1024)] = 64.0
    """Largest KLARF, in megabytes; a larger one is quarantined."""
    max_defects: Annotated[int, Field(ge=1, le=2_000_000)] = 100_000
    """Most defects of a KLARF; one with more is quarantined."""
    step_ids: tuple[str, ...] = ()
    """StepIDs that this recipe is for; a KLARF of another step is quarantined. Empty: any."""
    recipe_ids: tuple[str, ...] = ()
    """The tool's recipes (RecipeID or SetupID) that this recipe is for, as step_ids."""
    reference_types: tuple[ImageType, ...] = ("31",)
    """Types of the images that are the reference of the others of their defect, as the KLARF calls them."""
    ignored_types: tuple[ImageType, ...] = ()
    """Types of the images that are not looked at, such as those of another detector, or with captions."""
    order: tuple[ImageRole, ...] = ()
    """What an image is by its place in the list of its defect, whatever its type, such as [test, reference]."""
    defect_rule: DefectRule = "nearest_centre"
    """Which defect of an image is the one of the KLARF, where several are found."""
    offset_columns: tuple[str, str] = ("XOFFSET", "YOFFSET")
    """With nearest_coordinate: columns that say where the defect lies, from the centre of its image."""
    form: Literal["full", "partial", "none"] = "full"
    """full: the whole file with one column changed; partial: DEFECTID and that column alone; none: no file."""
    target_column: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] = "CLASSNUMBER"
    """Column that gets the class codes; one that is not there is added."""
    no_verdict_code: int | None = None
    """Code of a defect without a verdict, such as one without an image; null: its cell stays as it is."""
    extend_lookup: bool = False
    """Add the codes that the file's table of classes lacks."""
    outbox: SitePath | None = None
    """Folder of the files written back, by source and folder of the lot; null: beside the results."""

    @property
    def judges_by(self) -> dict[str, object] | None:
        """What of it decides how an image is judged, for the identity of the recipe; None where it is off."""
        if self.pattern is None:
            return None
        types = {"reference_types": list(self.reference_types), "ignored_types": list(self.ignored_types)}
        return {**types, "order": list(self.order)}


class Crop(Settings):
    """The square window cut around a defect."""

    context: Annotated[float, Field(ge=1)] = 2.0
    """Edge of the window, in edges of the defect's box."""
    min_side_fraction: Share = 0.1
    """Smallest edge of the window, as a share of the field."""


class DomainRule(Settings):
    """Which pages are of a process whose normal images the detector knows."""

    significance: Open = 0.01
    """Unknown process: the field's p-value is not above this. It is the share of known fields that are called so."""


class UnknownRule(Settings):
    """When a defect is called unknown, when non-decidable, and what a name or a dismissal must show."""

    significance: Open = 0.05
    """Unknown: no class has a p-value above this. It is the share of known defects that are called unknown."""
    decide_confidence: Annotated[float, Field(ge=0, le=1)] = 0.8
    """Known: the head gives a class this probability among those that fit; else non-decidable."""
    class_confidence: Annotated[
        Mapping[Label, Share], AfterValidator(MappingProxyType), PlainSerializer(dict[str, float])
    ] = Field(default_factory=dict, validate_default=True)
    """The same by class, where it is higher; `semwatch recipe tune` proposes it for a purity that you name."""
    dismiss_probability: Share = 0.9
    """Defect-free: it is the head's first choice of all classes with this probability at least; else unknown."""
    foreign_confidence: Share = 0.95
    """Known on a page of an unknown process: the class has this probability among all classes; else unknown."""
    foreign_significance: Open = 0.2
    """And its p-value is above this; else unknown."""
    doubtful_significance: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Defects that are named with a p-value up to this go to learning too, which looks for new classes among them;
    about this share of known defects does. 0: none."""

    def needed(self, label: str) -> float:
        """Probability among the classes that fit from which a class is named."""
        return max(self.decide_confidence, self.class_confidence.get(label, 0.0))


class Promotion(Settings):
    """What a newly trained head must show before it serves this recipe."""

    max_accuracy_loss: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Most accuracy that any known class may lose on the golden set."""
    max_purity_loss: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Most purity that any known class may lose on the golden set."""
    loss_significance: Share = 0.05
    """A loss counts where chance makes one like it at most this often (paired sign test); 1: every loss counts."""
    max_class_loss: Share = 0.5
    """Largest share of a known class's crops, golden or waiting, that new classes may take; chance is no excuse."""
    max_lineage_loss: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Most accuracy that the first head's classes may lose over all cycles together, against the best head so far."""
    max_unknown_rate: Share = 0.2
    """Largest share of the golden set's defects that may be called unknown."""
    min_cluster_size: Annotated[int, Field(ge=5)] = 12
    """Fewest crops of a new class."""
    min_cohesion: Annotated[float, Field(ge=-1, le=1)] = 0.05
    """Smallest mean silhouette of a new class among all others, from -1 to 1."""
    min_cycles: Count = 1
    """Cycles in which a new class must have been seen before it is learned."""


class KnownClass(Settings):
    """One line of the fab's class table."""

    code: int
    """Class number in the fab's table and in KLARF files."""
    doi: bool = True
    """Defect of interest; false: nuisance."""


def _as_dict(classes: Mapping[str, KnownClass]) -> dict[str, KnownClass]:
    return dict(classes)


class Recipe(Settings):
    """How the images of one layer and step are judged."""

    name: Name = "default"
    """Name of the recipe."""
    version: OrZero = 1
    """The engineer's own count; the identity is the content."""
    pins: Pins = Pins()
    """Model versions to stay with."""
    quality: QualityRule = QualityRule()
    """Which pages hold no image or a bad one, and what becomes of their files."""
    gate: Gate = Gate()
    """Which pages are searched for defects at all."""
    detection: Detection = Detection()
    """The scale at which a page is searched."""
    binarization: Binarization = Binarization()
    """From the score map to the defect mask."""
    reference: Reference = Reference()
    """A picture of the same place of another die, to compare with."""
    klarf: Klarf = Klarf()
    """KLARF files that name the work of a lot, and the codes that are written back."""
    crop: Crop = Crop()
    """The square window cut around a defect."""
    domain: DomainRule = DomainRule()
    """Which pages are of a process whose normal images the detector knows."""
    unknown: UnknownRule = Field(default_factory=UnknownRule)
    """When a defect is called unknown, when non-decidable, and what a name or a dismissal must show."""
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

        Comments, order and spacing do not change it, nor does writing out a default; any other value does, but of
        ``klarf`` only what decides how an image is judged.
        """
        values = self.model_dump(mode="json", exclude={"klarf"})
        if (klarf := self.klarf.judges_by) is not None:
            values["klarf"] = klarf
        canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]
