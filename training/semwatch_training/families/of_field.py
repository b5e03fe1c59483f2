"""What any detector can say beside its score: of the whole field, and of each place, for an encoder that asks."""

from torch import Tensor, nn

from semwatch.models.contract import FIELD_FEATURES, PATCH_FEATURES
from semwatch.models.model_repository import OPEN, Meta
from semwatch.models.model_repository import Tensor as Signature
from semwatch_training.families.exported import Exported
from semwatch_training.trunks.efficientnet import (
    FIELD_KIND,
    FIELD_STAGES,
    FIELD_WIDTH,
    PATCH_WIDTH,
    STRIDES,
    EfficientNet,
    field_descriptor,
    patch_descriptor,
)


class WithFieldFeatures(nn.Module):
    """A detector, and beside its answer the descriptors of the field that it was shown.

    A detector that runs the same trunk over the same image pays for it once: runtimes join what is computed twice.
    """

    def __init__(self, detector: nn.Module, trunk: EfficientNet) -> None:
        super().__init__()
        self.detector, self.trunk = detector, trunk

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """The detector's outputs, then the descriptors of images (B, H, W) uint8, multiples of 16.

        These are ``field_descriptor``, (B, ``FIELD_WIDTH``), and ``patch_descriptor``, (B, ``PATCH_WIDTH``, h, w).
        """
        maps = self.trunk(image, FIELD_STAGES)
        return *self.detector(image), field_descriptor(maps), patch_descriptor(maps)


def with_field_features(exported: Exported, trunk: EfficientNet) -> Exported:
    """The same detector, which now says beside its score what an encoder may ask for."""
    return Exported(WithFieldFeatures(exported.graph, trunk), says_of_field(exported.meta), exported.form)


def says_of_field(meta: Meta) -> Meta:
    """The contract of a detector whose last two outputs are ``field_descriptor`` and ``patch_descriptor``."""
    sides = (side if side == OPEN else side // STRIDES[FIELD_STAGES[-1] - 1] for side in meta.inputs["image"].shape)
    outputs = {
        FIELD_FEATURES: Signature(dtype="float32", shape=(FIELD_WIDTH,)),
        PATCH_FEATURES: Signature(dtype="float32", shape=(PATCH_WIDTH, *sides)),
    }
    provenance = {**meta.provenance, FIELD_FEATURES: FIELD_KIND}
    return meta.model_copy(update={"outputs": {**meta.outputs, **outputs}, "provenance": provenance})
