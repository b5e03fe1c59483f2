"""The encoder that keeps regions, as it is published; its weights file is that of ``smg_vit``."""

from pathlib import Path

from semwatch.models.model_repository import Tensor
from semwatch_training.families.exported import Exported, Provenance
from semwatch_training.families.recame.network import NO_REGIONS, Regions
from semwatch_training.families.recame.regional_encoder import SIDE, RegionalEncoder
from semwatch_training.families.smg_vit import export as smg_vit_export
from semwatch_training.families.smg_vit.smg_vit import EncoderGraph
from semwatch_training.trunks.backbone import Backbones

FAMILY = "recame"
CHANNELS_KEY, SIDE_KEY = "region_channels", "region_side"
"""In an encoder's provenance: what the last features are, see ``network.Regions``."""


def read(path: Path | None, backbones: Backbones) -> Exported:
    """See ``exported.Export.read``; without a file the last layers are the trunk's own."""
    return with_regions(smg_vit_export.read(path, backbones))


def with_regions(exported: Exported) -> Exported:
    """An encoder of ``smg_vit``, which from now on says what lies in the regions of the crop."""
    if not isinstance(exported.graph, EncoderGraph):
        raise TypeError(f"regions are of an encoder of {smg_vit_export.FAMILY}, not of {type(exported.graph).__name__}")
    graph = RegionalEncoder(exported.graph)
    made = {"family": FAMILY, CHANNELS_KEY: graph.regions.channels, SIDE_KEY: graph.regions.side}
    meta = exported.meta.model_copy(
        update={
            "outputs": {"features": Tensor(dtype="float32", shape=(graph.width,))},
            "provenance": {**exported.meta.provenance, **made},
        }
    )
    return Exported(graph, meta, _with_side(exported.form))


def form_of(provenance: Provenance) -> str:
    """See ``exported.EncoderExport.form_of``."""
    return _with_side(smg_vit_export.form_of(provenance))


def regions_of(provenance: Provenance) -> Regions:
    """What an encoder's last features are, from its provenance; no regions where it is of another family."""
    channels, side = (provenance.get(key) for key in (CHANNELS_KEY, SIDE_KEY))
    return Regions(channels, side) if isinstance(channels, int) and isinstance(side, int) else NO_REGIONS


def _with_side(form: str) -> str:
    return f"{form} and {SIDE} x {SIDE} regions"
