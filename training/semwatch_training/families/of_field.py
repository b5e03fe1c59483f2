"""What any detector can say of the whole field beside its score: the descriptor that an encoder may ask for."""

from torch import Tensor, nn

from semwatch.models.contract import FIELD_FEATURES
from semwatch.models.model_repository import Meta
from semwatch.models.model_repository import Tensor as Signature
from semwatch_training.families.exported import Exported
from semwatch_training.trunks.efficientnet import (
    FIELD_KIND,
    FIELD_STAGES,
    FIELD_WIDTH,
    EfficientNet,
    field_descriptor,
)


class WithFieldFeatures(nn.Module):
    """A detector, and beside its answer the descriptor of the field that it was shown.

    A detector that runs the same trunk over the same image pays for it once: runtimes join what is computed twice.
    """

    def __init__(self, detector: nn.Module, trunk: EfficientNet) -> None:
        super().__init__()
        self.detector, self.trunk = detector, trunk

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Score map (B, h, w), raw score (B,) and descriptor (B, ``FIELD_WIDTH``) of images (B, H, W) uint8."""
        score_map, raw_score = self.detector(image)
        return score_map, raw_score, field_descriptor(self.trunk(image, FIELD_STAGES))


def with_field_features(exported: Exported, trunk: EfficientNet) -> Exported:
    """The same detector, which now says of the field what an encoder may ask for."""
    return Exported(WithFieldFeatures(exported.graph, trunk), says_of_field(exported.meta), exported.form)


def says_of_field(meta: Meta) -> Meta:
    """The contract of a detector whose third answer is ``field_descriptor``."""
    signature = Signature(dtype="float32", shape=(FIELD_WIDTH,))
    return meta.model_copy(
        update={
            "outputs": {**meta.outputs, FIELD_FEATURES: signature},
            "provenance": {**meta.provenance, FIELD_FEATURES: FIELD_KIND},
        }
    )
