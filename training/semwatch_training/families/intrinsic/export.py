"""An intrinsic detector, as it is published."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType

from semwatch.errors import ConfigError
from semwatch.models.model_repository import OPEN, Meta, Tensor
from semwatch.system.clock import utc_now
from semwatch_training.families.exported import Exported, Provenance, flat
from semwatch_training.families.intrinsic import train_intrinsic
from semwatch_training.families.intrinsic.intrinsic_detector import IntrinsicGraph
from semwatch_training.families.intrinsic.train_intrinsic import FAMILY
from semwatch_training.families.of_field import says_of_field
from semwatch_training.trunks import backbone
from semwatch_training.trunks.backbone import Backbones

TRUNK = "trunk.safetensors"
"""The converted checkpoint of its trunk lies beside a published detector, so that ``adapt`` needs nothing else."""


def exported(
    graph: IntrinsicGraph,
    *,
    normal_scores: Sequence[float],
    provenance: Provenance = MappingProxyType({}),
    files: Mapping[str, Path] = MappingProxyType({}),
) -> Exported:
    """A detector with the raw scores of its held-out normal images, and files to publish beside it."""
    meta = Meta(
        model="detector",
        created_utc=utc_now(),
        inputs={"image": Tensor(dtype="uint8", shape=(OPEN, OPEN))},
        outputs={
            "score_map": Tensor(dtype="float32", shape=(OPEN, OPEN)),
            "raw_score": Tensor(dtype="float32", shape=()),
            "domain_p": Tensor(dtype="float32", shape=()),
        },
        normal_scores=tuple(sorted(round(score, 7) for score in normal_scores)),
        provenance={"family": FAMILY, **flat(asdict(graph.detector.form)), **provenance},
    )
    return Exported(graph, says_of_field(meta), files=files)


def read(path: Path | None, backbones: Backbones) -> Exported:
    """See ``exported.Export.read``."""
    if path is None:
        raise ConfigError("a detector needs trained weights; name its file")
    detector, normal_scores, provenance = train_intrinsic.load(path)
    if provenance.get("branch_trunk", backbone.EFFICIENTNET_WHEEL_SHA256) != backbone.EFFICIENTNET_WHEEL_SHA256:
        raise ConfigError(f"{path} was trained on another trunk than the one that is built in; train it again")
    graph = IntrinsicGraph(backbones.efficientnet, detector).eval()
    files = {TRUNK: backbones.efficientnet_file}
    return exported(graph, normal_scores=normal_scores, provenance=provenance, files=files)
