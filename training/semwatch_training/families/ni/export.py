"""A detector of the reconstruction family, or of the segmentation branch that it carries, as it is published."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType

from semwatch.errors import ConfigError
from semwatch.models.model_repository import Meta, Tensor
from semwatch.system.clock import utc_now
from semwatch_training.families.exported import Exported, Provenance, flat
from semwatch_training.families.ni import folding, train_detector
from semwatch_training.families.ni.ni_detector import DetectorGraph
from semwatch_training.families.of_field import with_field_features
from semwatch_training.trunks import backbone
from semwatch_training.trunks.backbone import Backbones

FAMILY = "ni"


def exported(
    graph: DetectorGraph, *, normal_scores: Sequence[float], provenance: Provenance = MappingProxyType({})
) -> Exported:
    """A detector with the raw scores of its held-out normal images."""
    form, side = graph.detector.form, graph.side
    meta = Meta(
        model="detector",
        created_utc=utc_now(),
        inputs={"image": Tensor(dtype="uint8", shape=(form.input_px, form.input_px))},
        outputs={
            "score_map": Tensor(dtype="float32", shape=(side, side)),
            "raw_score": Tensor(dtype="float32", shape=()),
        },
        normal_scores=tuple(sorted(round(score, 7) for score in normal_scores)),
        provenance={"family": FAMILY, **flat(asdict(form)), **provenance},
    )
    return Exported(folding.folded(graph), meta)


def read(path: Path | None, backbones: Backbones) -> Exported:
    """See ``exported.Export.read``."""
    if path is None:
        raise ConfigError("a detector needs trained weights; name its file")
    detector, normal_scores, provenance = train_detector.load(path)
    ours: Mapping[str, str] = {
        "backbone": backbone.WHEEL_SHA256,
        "branch_trunk": backbone.EFFICIENTNET_WHEEL_SHA256,
    }
    foreign = [name for name, sha256 in ours.items() if provenance.get(name, sha256) != sha256]
    if foreign or detector.form.trunk != backbone.TRUNK_NAME:
        raise ConfigError(
            f"{path} was trained on another backbone ({', '.join(foreign) or detector.form.trunk}) than the one that "
            f"is built in; train it again without --trunk and --checkpoint"
        )
    vit = None if detector.form.evidence == "branch" else backbones.vit
    convolutional = None if detector.form.branch is None else backbones.efficientnet
    graph = train_detector.with_trunk(vit, detector, convolutional)
    made = exported(graph, normal_scores=normal_scores, provenance=provenance)
    return with_field_features(made, backbones.efficientnet)
