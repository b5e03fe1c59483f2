"""``model.onnx`` run by ONNX Runtime on the processor, for the python backend; imports nothing of semwatch."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort

WEIGHTS = "model.onnx"


class Network:
    """One version's network.

    Args:
        folder: of the version.
        parameters: of ``config.pbtxt``; "threads" by default are all the machine has.
        device: not used.

    Raises:
        RuntimeError: it does not load.
    """

    def __init__(self, folder: Path, parameters: Mapping[str, str], *, device: int = 0) -> None:  # noqa: ARG002
        options = ort.SessionOptions()
        options.intra_op_num_threads = int(parameters.get("threads", 0)) or len(os.sched_getaffinity(0))
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        path = folder / WEIGHTS
        try:
            self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise RuntimeError(f"{path} does not load: {error}") from error

    @property
    def signature(self) -> tuple[set[str], set[str]]:
        """Names of inputs and outputs."""
        return {t.name for t in self._session.get_inputs()}, {t.name for t in self._session.get_outputs()}

    def run(self, outputs: Sequence[str], inputs: Mapping[str, Any]) -> list[Any]:
        """Answer a batch."""
        values: list[Any] = self._session.run(list(outputs), dict(inputs))
        return values
