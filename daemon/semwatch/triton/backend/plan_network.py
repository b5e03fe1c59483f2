"""A TensorRT-for-RTX plan run on an NVIDIA GPU, for the python backend; imports nothing of semwatch.

The plan is the one compiled for this GPU's compute capability. Device memory is asked from the driver itself, by
ctypes: it is there wherever a GPU is, and TensorRT works in the same (primary) context. TensorRT captures a CUDA graph
for each batch size that it meets and replays it from then on.
"""

import ctypes
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
_NO_GPU = "a TensorRT plan runs on an RTX GPU alone; serve with `semwatch triton up --target onnx-python` here"


class Cuda:
    """One GPU through NVIDIA's driver: its primary context and a stream.

    Args:
        device: number of the GPU.
        library: of the driver.

    Raises:
        RuntimeError: there is no driver, or no such GPU.
    """

    def __init__(self, device: int = 0, *, library: str = "libcuda.so.1") -> None:
        try:
            self._driver = ctypes.CDLL(library)
        except OSError as error:
            raise RuntimeError(f"this machine has no NVIDIA driver ({error}); {_NO_GPU}") from error
        self._device, self._context, self.stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        try:
            self._call("cuInit", ctypes.c_uint(0))
            self._call("cuDeviceGet", ctypes.byref(self._device), ctypes.c_int(max(device, 0)))
        except RuntimeError as error:
            raise RuntimeError(f"NVIDIA's driver finds no GPU {max(device, 0)} ({error}); {_NO_GPU}") from error
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        self.enter()
        self._call("cuStreamCreate", ctypes.byref(self.stream), ctypes.c_uint(1))  # apart from the default stream

    def enter(self) -> None:
        """Work in this GPU's context on the calling thread."""
        self._call("cuCtxSetCurrent", self._context)

    @property
    def capability(self) -> str:
        """Compute capability, such as "8.9"."""
        return f"{self._attribute(_MAJOR)}.{self._attribute(_MINOR)}"

    def allocate(self, n_bytes: int) -> int:
        """Address of new device memory; it goes with the process."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(n_bytes))
        return address.value

    def upload(self, address: int, array: Any) -> None:
        """Queue a copy of a contiguous array to the device."""
        self._call("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(address), *_memory(array), self.stream)

    def download(self, array: Any, address: int) -> None:
        """Queue a copy from the device into a contiguous array."""
        pointer, n_bytes = _memory(array)
        self._call("cuMemcpyDtoHAsync_v2", pointer, ctypes.c_uint64(address), n_bytes, self.stream)

    def wait(self) -> None:
        """Wait for all that was queued."""
        self._call("cuStreamSynchronize", self.stream)

    def _attribute(self, number: int) -> int:
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(number), self._device)
        return value.value

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._driver, name)(*arguments)
        if code:
            words = ctypes.c_char_p()
            self._driver.cuGetErrorString(ctypes.c_int(code), ctypes.byref(words))
            raise RuntimeError(f"{name}: {(words.value or b'error').decode()} ({code})")


class Network:
    """One version's plan, deserialised, with device memory for its largest batch.

    Args:
        folder: of the version.
        parameters: of ``config.pbtxt``: "plan.8.9" names the file, "plan_sha256.<version>.8.9" its content hash.
        device: number of the GPU.

    Raises:
        RuntimeError: no GPU, no TensorRT for RTX, no plan for this GPU, or a plan that is damaged or of another
            release.
    """

    def __init__(self, folder: Path, parameters: Mapping[str, str], *, device: int = 0) -> None:
        self._cuda = Cuda(device)
        capability = self._cuda.capability
        made_by = parameters.get(f"plan_toolkit.{folder.name}.{capability}", "")
        plan = chosen_plan(folder, parameters, capability)
        trt = _toolkit(made_by)
        log = trt.Logger(trt.Logger.ERROR)
        self._runtime = trt.Runtime(log)  # an engine does not keep it alive
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise RuntimeError(
                f"TensorRT for RTX {trt.__version__} cannot read the plan for {capability} in {folder}, which "
                f"{made_by or 'another release'} compiled; export the plans again with this release"
            )
        settings = self._engine.create_runtime_config()
        settings.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._context = self._engine.create_execution_context(settings)
        names = [self._engine.get_tensor_name(k) for k in range(self._engine.num_io_tensors)]
        is_input = {name: self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        self.signature = {n for n in names if is_input[n]}, {n for n in names if not is_input[n]}
        self._types = {name: np.dtype(trt.nptype(self._engine.get_tensor_dtype(name))) for name in names}
        self._shapes = {name: tuple(self._engine.get_tensor_shape(name))[1:] for name in names}
        first = next(name for name in names if is_input[name])
        count = self._engine.num_optimization_profiles
        shapes = [self._engine.get_tensor_profile_shape(first, k) for k in range(count)]
        self._profiles = [(shape[0][0], shape[2][0]) for shape in shapes]
        self._place()

    def run(self, outputs: Sequence[str], inputs: Mapping[str, Any]) -> list[Any]:
        """Answer a batch.

        Raises:
            RuntimeError: it is larger than any profile, or the GPU failed.
        """
        self._cuda.enter()  # Triton may call from another thread than the one that loaded
        n, stream = len(next(iter(inputs.values()))), self._cuda.stream.value
        profile = profile_for(n, self._profiles)
        if profile != self._context.active_optimization_profile:
            self._context.set_optimization_profile_async(profile, stream)
        for name, array in inputs.items():
            sent = np.ascontiguousarray(array, self._types[name]).reshape(n, *self._shapes[name])
            self._context.set_input_shape(name, sent.shape)
            self._cuda.upload(self._addresses[name], sent)
        for name, address in self._addresses.items():
            self._context.set_tensor_address(name, address)
        if not self._context.execute_async_v3(stream):
            self._cuda.wait()
            raise RuntimeError("TensorRT could not run the plan on this GPU")
        answers = {name: np.empty((n, *self._shapes[name]), self._types[name]) for name in self.signature[1]}
        for name, array in answers.items():
            self._cuda.download(array, self._addresses[name])
        self._cuda.wait()
        return [answers[name] for name in outputs]

    def _place(self) -> None:
        largest = max(most for _, most in self._profiles)
        self._addresses = {
            name: self._cuda.allocate(largest * int(np.prod(shape, dtype=np.int64)) * self._types[name].itemsize)
            for name, shape in self._shapes.items()
        }


def chosen_plan(folder: Path, parameters: Mapping[str, str], capability: str) -> bytes:
    """The plan for a GPU of this compute capability, checked against its content hash.

    Raises:
        RuntimeError: there is none, or it is another file than was placed.
    """
    name = parameters.get(f"plan.{capability}")
    if name is None or not (folder / name).is_file():
        offered = ", ".join(sorted(key.removeprefix("plan.") for key in parameters if key.startswith("plan.")))
        raise RuntimeError(
            f"{folder} has no plan for this GPU, of compute capability {capability}, only for {offered or 'none'}; "
            f"add it with `semwatch-train export --target tensorrt-rtx --compute-capability "
            f"{capability.replace('.', '')}`"
        )
    plan = (folder / name).read_bytes()
    expected = parameters.get(f"plan_sha256.{folder.name}.{capability}")
    if hashlib.sha256(plan).hexdigest() != expected:
        raise RuntimeError(f"{folder / name} is not the plan that was placed (sha256 differs); start the server anew")
    return plan


def profile_for(n: int, profiles: Sequence[tuple[int, int]]) -> int:
    """Number of the tightest profile, of (smallest, largest) batches, that takes a batch of n.

    Raises:
        RuntimeError: none does.
    """
    fitting = [(most, k) for k, (least, most) in enumerate(profiles) if least <= n <= most]
    if not fitting:
        raise RuntimeError(f"the plan takes no batch of {n}, only of {' or '.join(f'{a} to {b}' for a, b in profiles)}")
    return min(fitting)[1]


def _toolkit(made_by: str) -> Any:
    try:
        import tensorrt_rtx  # type: ignore[import-not-found,import-untyped,unused-ignore] # noqa: PLC0415
    except ImportError as error:
        version = f"=={made_by}" if made_by else ""
        raise RuntimeError(
            f"TensorRT for RTX is not in Triton's Python environment ({error}); install it there: "
            f"pip install tensorrt-rtx-cu13{version}"
        ) from error
    return tensorrt_rtx


def _memory(array: Any) -> tuple[ctypes.c_void_p, ctypes.c_size_t]:
    return ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)
