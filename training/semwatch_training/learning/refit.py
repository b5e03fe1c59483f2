"""The head in service fitted anew from its own bank, without some of its classes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from semwatch.errors import ConfigError
from semwatch.models import head_bank
from semwatch.models.head_bank import Bank
from semwatch.models.inference import Embedded
from semwatch_training.discovery.fit_head import HeadFit, fit_head
from semwatch_training.learning import outcomes
from semwatch_training.learning.base_head import read_base_head
from semwatch_training.learning.crops import images_as_numbers
from semwatch_training.publishing.export import publish_head


def refit(repository: Path, *, without: Sequence[str], seed: int = 0) -> int:
    """Fit the head in service again from its bank, without some classes, and publish it; returns the version.

    Raises:
        ConfigError: a class that the head does not know, or too little is left to fit a head on.
        ModelMismatch: the head brings no bank or golden set.
        PublishError: the repository cannot take it.
    """
    with Embedded(repository, models=("encoder", "head")) as models:
        base = read_base_head(repository, models)
        encoder_version = models.versions()["encoder"]
    if strangers := sorted(set(without) - set(base.meta.labels)):
        raise ConfigError(f"the head does not know {', '.join(strangers)}; it knows {', '.join(base.meta.labels)}")
    bank, golden = (_without(crops, without) for crops in (base.bank, base.golden))
    fit = HeadFit(frozen_width=base.frozen_width, seed=seed)
    head = fit_head(bank.features, bank.labels, fit, images=images_as_numbers(bank.images))
    provenance = {**outcomes.lineage(base.meta), "parent": base.version, "without": ", ".join(without)}
    return publish_head(
        head,
        repository,
        encoder_version=encoder_version,
        provenance=provenance,
        codes=base.meta.codes,
        bank=bank,
        golden=golden,
    )


def _without(crops: Bank, labels: Sequence[str]) -> Bank:
    return head_bank.chosen(crops, np.array([label not in labels for label in crops.labels], np.bool_))
