"""The student as the logits of a head: what is fitted in one call, kept in a weights file, and read back."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from semwatch.errors import ConfigError
from semwatch_training.families.recame.fit_recame import Schedule, distil, fit
from semwatch_training.families.recame.network import NO_REGIONS, RecameForm, RecameNet, Regions

FAMILY = "recame"
TEMPERATURE = 1.3
"""What the student's logits are divided by: on held-out synthetic crops it was 1.3 to 1.4 too sure, at every tail."""


class Student(nn.Module):
    """Logits (B, K) of features (B, D), by one expert that was taught by several."""

    family = FAMILY

    def __init__(self, network: RecameNet) -> None:
        super().__init__()
        self.network = network

    @property
    def width(self) -> int:
        """Of the features."""
        return self.network.width

    def forward(self, features: Tensor) -> Tensor:
        """Logits of features."""
        logits: Tensor = self.network(features)
        return logits / TEMPERATURE

    def described(self) -> str:
        """What ``read`` needs beside the weights."""
        net = self.network
        kept = {"width": net.width, "n_classes": net.n_classes, "regions": net.regions, "form": asdict(net.form)}
        return json.dumps(kept, sort_keys=True)


@dataclass(frozen=True, slots=True)
class Recame:
    """How the logits of a head are fitted, see ``fit_head``."""

    regions: Regions = NO_REGIONS
    """What the encoder's last features are."""
    form: RecameForm = field(default_factory=RecameForm)
    schedule: Schedule = field(default_factory=Schedule)

    def __call__(
        self, features: NDArray[np.float32], y: NDArray[np.intp], n_classes: int, weights: NDArray[np.float64] | None
    ) -> Student:
        """Fit experts and their student on features (n, D), class numbers (n,) and, if any, weights (n,).

        Raises:
            ConfigError: see ``fit_recame.fit``.
        """
        teacher = fit(
            features, y, n_classes, regions=self.regions, form=self.form, schedule=self.schedule, weights=weights
        )
        return Student(distil(teacher, features, y, schedule=self.schedule, weights=weights))


def read(described: str, state: Mapping[str, Tensor]) -> Student:
    """The student that ``Student.described`` and its state tell of.

    Raises:
        ConfigError: they do not fit each other.
    """
    try:
        kept = json.loads(described)
        regions, form = Regions(*kept["regions"]), RecameForm(**kept["form"])
        with torch.random.fork_rng(devices=()):
            student = Student(RecameNet(int(kept["width"]), regions, int(kept["n_classes"]), form))
        student.load_state_dict(dict(state), strict=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"this is no student of {FAMILY}: {error}") from error
    return student.eval().requires_grad_(False)
