"""What a head says of a golden set, the crops that no head is ever fitted on: the ground of `models diff`."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from semwatch.defects import Verdict
from semwatch.line import inputs
from semwatch.line.classification import decide
from semwatch.models import head_bank, model_repository
from semwatch.models.head_bank import GOLDEN, Bank
from semwatch.models.inference import Embedded
from semwatch.operations.quality import Share, share
from semwatch.settings.recipe import UnknownRule


@dataclass(frozen=True, slots=True)
class Judged:
    """One class of a golden set under one head."""

    label: str
    accuracy: Share
    """Of the crops of the class, those that are called so."""
    purity: Share
    """Of the crops that are called so, those that are of the class."""


def golden_set(repository: Path, version: int) -> Bank:
    """The golden set that a head was proven on.

    Raises:
        ModelMismatch: it is absent or damaged.
    """
    return head_bank.read(repository / "head" / str(version) / GOLDEN)


def verdicts(repository: Path, version: int, crops: Bank, rule: UnknownRule) -> list[Verdict]:
    """What a head says of labelled crops, as the line would decide it on a known process.

    Raises:
        ModelMismatch: the head is absent or damaged, or reads other features.
    """
    if not len(crops):
        return []
    with Embedded(repository, pins={"head": version}, models=("head",)) as models:
        answer = models.infer("head", inputs.for_head(crops.features))
    logits, p_values = answer.outputs["logits"], answer.outputs["p_values"]
    return [decide(row, p, answer.meta.labels, rule) for row, p in zip(logits, p_values, strict=True)]


def judged(labels: Sequence[str], given: Sequence[Verdict]) -> dict[str, Judged]:
    """Accuracy and purity by class: of those that the crops are of, and of those that they are called."""
    true, called = Counter(labels), Counter(one.label for one in given if one.label is not None)
    right = Counter(label for label, one in zip(labels, given, strict=True) if one.label == label)
    return {
        label: Judged(label, share(right[label], true[label]), share(right[label], called[label]))
        for label in sorted(true.keys() | called.keys())
    }


def compare(repository: Path, old: int, new: int, rule: UnknownRule) -> tuple[dict[str, Judged], dict[str, Judged]]:
    """Two heads on the golden set of the newer one; each on its own where they read different encoders.

    Raises:
        ModelMismatch: a head or a golden set is absent or damaged.
    """
    metas = [model_repository.read_meta(repository, "head", version) for version in (old, new)]
    of_new = golden_set(repository, new)
    of_old = of_new if metas[0].encoder_sha256 == metas[1].encoder_sha256 else golden_set(repository, old)
    return (
        judged(of_old.labels, verdicts(repository, old, of_old, rule)),
        judged(of_new.labels, verdicts(repository, new, of_new, rule)),
    )
