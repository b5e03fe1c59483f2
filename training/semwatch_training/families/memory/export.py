"""A memory of normal images as a detector, as it is published."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType

from semwatch.errors import ConfigError
from semwatch.models.model_repository import Meta, Tensor
from semwatch.system.clock import utc_now
from semwatch_training.families.exported import Exported, Provenance, flat
from semwatch_training.families.memory import memory_detector
from semwatch_training.families.memory.memory_detector import MemoryGraph, Trunks
from semwatch_training.families.of_field import with_field_features
from semwatch_training.trunks.backbone import Backbones

FAMILY = "memory"


def exported(
    graph: MemoryGraph, *, normal_scores: Sequence[float], provenance: Provenance = MappingProxyType({})
) -> Exported:
    """A memory with the raw scores of images that it was built without."""
    form = graph.form
    meta = Meta(
        model="detector",
        created_utc=utc_now(),
        inputs={"image": Tensor(dtype="uint8", shape=(form.input_px, form.input_px))},
        outputs={
            "score_map": Tensor(dtype="float32", shape=(form.side, form.side)),
            "raw_score": Tensor(dtype="float32", shape=()),
        },
        normal_scores=tuple(sorted(round(score, 7) for score in normal_scores)),
        provenance={"family": FAMILY, **flat(asdict(form)), **provenance},
    )
    return Exported(graph, meta)


def read(path: Path | None, backbones: Backbones) -> Exported:
    """See ``exported.Export.read``."""
    if path is None:
        raise ConfigError("a memory needs normal images to remember; name its file")
    kept = memory_detector.load(path)
    graph = MemoryGraph(Trunks(backbones.vit, backbones.efficientnet), kept)
    return with_field_features(exported(graph, normal_scores=kept.normal_scores), backbones.efficientnet)
