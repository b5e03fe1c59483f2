"""Triton python backend: answers requests with the network that ``semwatch_network`` beside it makes of a version.

It runs in Triton's own environment (numpy below 2) and imports nothing of semwatch. Requests that Triton hands over
together are answered by one run. Which version answered, Triton itself says in every response.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import semwatch_network  # type: ignore[import-not-found,unused-ignore]  # a copy of ``onnx_network`` or ``plan_network``
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found,unused-ignore]  # only inside Triton


class TritonPythonModel:
    """One version of one model; Triton finds it by this name."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the version's network; what is raised here stands in the answer to Triton's load request."""
        if int(np.__version__.split(".")[0]) >= 2:
            raise pb_utils.TritonModelException(
                f"numpy {np.__version__} in Triton's Python environment: this python backend would answer with empty "
                f"tensors and no error; install 'numpy<2' there, or run `semwatch triton setup`"
            )
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        folder = Path(args["model_repository"]) / args["model_version"]
        self._inputs = [tensor["name"] for tensor in config["input"]]
        self._outputs = [tensor["name"] for tensor in config["output"]]
        try:
            self._network = semwatch_network.Network(folder, parameters, device=int(args["model_instance_device_id"]))
        except Exception as error:
            raise pb_utils.TritonModelException(str(error)) from error
        found = self._network.signature
        if found != (set(self._inputs), set(self._outputs)):
            raise pb_utils.TritonModelException(f"{folder} takes and gives {found}, config.pbtxt says otherwise")

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer every request, in order."""
        batches = [self._read(request) for request in requests]
        try:
            return self._answer(batches)
        except Exception as error:  # noqa: BLE001 - whatever the network raises belongs into the responses
            if len(batches) == 1:
                return [_refusal(f"the network could not answer: {error}")]
        return [self._answer_alone(batch) for batch in batches]  # one bad request must not cost its neighbours

    def _answer_alone(self, batch: dict[str, Any]) -> Any:
        try:
            return self._answer([batch])[0]
        except Exception as error:  # noqa: BLE001 - as above
            return _refusal(f"the network could not answer: {error}")

    def _read(self, request: Any) -> dict[str, Any]:
        return {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self._inputs}

    def _answer(self, batches: Sequence[dict[str, Any]]) -> list[Any]:
        sizes = [len(batch[self._inputs[0]]) for batch in batches]
        joined = {name: np.concatenate([batch[name] for batch in batches]) for name in self._inputs}
        values = self._network.run(self._outputs, joined)
        ends = np.cumsum(sizes)
        return [
            self._response([value[end - size : end] for value in values]) for size, end in zip(sizes, ends, strict=True)
        ]

    def _response(self, values: Sequence[Any]) -> Any:
        if any(value.size == 0 for value in values):
            return _refusal("the network gave an empty output")
        tensors = [pb_utils.Tensor(name, value) for name, value in zip(self._outputs, values, strict=True)]
        return pb_utils.InferenceResponse(output_tensors=tensors)


def _refusal(why: str) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(why))
