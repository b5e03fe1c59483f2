"""ONNX to a plan, by ``tensorrt`` or ``tensorrt_rtx``: one API, one code path.

Where the two differ stands in ``TOOLKITS`` and nowhere else. Both take types as the network has them (strong typing).
"""

import importlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch

from semwatch.errors import ConfigError, PublishError
from semwatch.models.contract import FIELD_SIDES_PX
from semwatch.models.model_repository import OPEN
from semwatch.triton.plans import Batches


@dataclass(frozen=True, slots=True)
class Toolkit:
    """One of the two packages that compile plans."""

    module: str
    install: str
    ahead_of_time: bool
    """Compiles for GPUs that are not there; the other one only for the one that is."""
    keeps_timings: bool
    """Tries kernels on the GPU and can write down how fast they were."""
    fp32_since: int
    """Lowest capability whose fp32 matrix products it compiles."""


TOOLKITS: Mapping[str, Toolkit] = {
    "tensorrt-rtx": Toolkit("tensorrt_rtx", "pip install tensorrt-rtx-cu13", True, False, 80),
    "tensorrt": Toolkit("tensorrt", "pip install tensorrt-cu13, or NVIDIA's container", False, True, 0),
}


class Compiled(NamedTuple):
    """What came out of a compilation."""

    plan: bytes
    log: tuple[str, ...]
    seconds: float
    timings: bytes


def parse_capabilities(text: str) -> tuple[int, ...]:
    """Numbers of a list such as "75,86,8.9,120", each once, in its order.

    Raises:
        ConfigError: one of them is no number.
    """
    parts = [part.strip().lower().removeprefix("sm").replace(".", "") for part in text.split(",") if part.strip()]
    if bad := [part for part in parts if not (part.isascii() and part.isdigit())]:
        raise ConfigError(f"{', '.join(bad)} is no compute capability; write them as 75,86,89,120")
    return tuple(dict.fromkeys(int(part) for part in parts))


def load_toolkit(target: str, capabilities: Sequence[int]) -> ModuleType:
    """Import the package that makes plans for these GPUs.

    Raises:
        ConfigError: it is not installed, or cannot compile for one of them.
    """
    kit = TOOLKITS[target]
    try:
        trt = importlib.import_module(kit.module)
    except (ImportError, OSError) as error:
        raise ConfigError(f"the target {target} needs the package {kit.module}: {kit.install} ({error})") from error
    if kit.ahead_of_time:
        offered = [int(name[2:]) for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    else:
        offered = [here] if (here := gpu()) else []
    if missing := [capability for capability in capabilities if capability not in offered]:
        offer = ", ".join(map(str, sorted(offered))) or "only for the GPU of this machine, which has none"
        hint = "" if kit.ahead_of_time else "; --target tensorrt-rtx compiles for GPUs that are not there"
        raise ConfigError(f"{target} {trt.__version__} cannot compile for {missing} here, but for {offer}{hint}")
    return trt


def check_gpu(kit: Toolkit, precision: str, capability: int) -> None:
    """Refuse a precision that a GPU, or the package, has not.

    Raises:
        ConfigError: it has not.
    """
    if precision == "bf16" and capability < 80:
        raise ConfigError(f"SM{capability} has no bf16, only SM80 and newer have; use --precision fp16 for it")
    if precision == "fp32" and capability < kit.fp32_since:
        raise ConfigError(
            f"{kit.module} compiles no fp32 matrix products for SM{capability}; use --precision fp16 for it"
        )


def compile_plan(
    trt: Any, kit: Toolkit, network: bytes, capability: int, batches: Batches, *, timings: bytes = b""
) -> Compiled:
    """Compile a plan from ONNX, for GPUs of one capability.

    Args:
        trt: ``tensorrt`` or ``tensorrt_rtx``.
        kit: how the two differ.
        network: ONNX, its types as the plan shall compute.
        capability: such as 89.
        batches: sizes of the first axis of every input.
        timings: what an earlier compilation found out.

    Raises:
        PublishError: TensorRT refused, with its own words.
    """
    start = time.perf_counter()
    log = _log(trt)
    builder = trt.Builder(log)
    definition = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    if not trt.OnnxParser(definition, log).parse(network):
        raise PublishError(f"TensorRT cannot read the network: {_errors(log.lines)}")
    config = builder.create_builder_config()
    # Set unless one asks otherwise, it takes fp32 factors of products with no more digits than fp16 has.
    config.clear_flag(trt.BuilderFlag.TF32)
    for sizes in profiles(kit, batches):
        config.add_optimization_profile(_profile(builder, definition, sizes))
    if kit.ahead_of_time:
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.__members__[f"SM{capability}"], 0)
    cache = config.create_timing_cache(timings) if kit.keeps_timings else None
    if cache is not None:
        config.set_timing_cache(cache, ignore_mismatch=False)
    plan = builder.build_serialized_network(definition, config)
    if plan is None:
        raise PublishError(f"TensorRT cannot compile the network for SM{capability}: {_errors(log.lines)}")
    seconds = time.perf_counter() - start
    return Compiled(bytes(plan), tuple(log.lines), seconds, bytes(cache.serialize()) if cache is not None else b"")


def profiles(kit: Toolkit, batches: Batches) -> list[Batches]:
    """Ranges of batch sizes of a plan's optimisation profiles.

    Full TensorRT chooses kernels for the size that a profile is tuned for, so each size gets its own. TensorRT for RTX
    makes kernels for the sizes that it meets when it runs: three profiles cost our networks 2.6 times the seconds of
    compilation and 1.4 times the megabytes.
    """
    if not kit.keeps_timings:
        return [batches]
    return [Batches(batches.smallest, size, size) for size in dict.fromkeys(batches)]


def gpu() -> int | None:
    """Compute capability of this machine's GPU, None where there is none."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def _profile(builder: Any, definition: Any, batches: Batches) -> Any:
    profile = builder.create_optimization_profile()
    for k in range(definition.num_inputs):
        tensor = definition.get_input(k)
        profile.set_shape(tensor.name, *profile_shapes(tuple(tensor.shape), batches))
    return profile


def profile_shapes(shape: Sequence[int], batches: Batches) -> list[tuple[int, ...]]:
    """The smallest shape of an input, the one that a plan is tuned for, and the largest.

    Args:
        shape: of the network's input, the batch first; -1 is a side that may have any size.
        batches: sizes of the first axis.
    """
    sides = FIELD_SIDES_PX.smallest, FIELD_SIDES_PX.typical, FIELD_SIDES_PX.largest
    return [
        (n, *(side if size == OPEN else size for size in shape[1:])) for n, side in zip(batches, sides, strict=True)
    ]


def _log(trt: Any) -> Any:
    """A logger that keeps what TensorRT says, less its chatter."""

    class BuildLog(trt.ILogger):  # type: ignore[misc]  # its base is known only when it is imported
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            """Take one message, from any thread."""
            if severity <= trt.ILogger.INFO:
                self.lines.append(f"{severity.name}: {message}")

    return BuildLog()


def _errors(lines: Sequence[str]) -> str:
    errors = [line.split(": ", maxsplit=1)[1] for line in lines if line.startswith(("ERROR", "INTERNAL_ERROR"))]
    return "; ".join(dict.fromkeys(errors)) or "it did not say why"
