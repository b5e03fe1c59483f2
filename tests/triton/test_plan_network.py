"""Our own TensorRT backend over stand-ins for the GPU and for TensorRT: profiles, shapes and memory of open sides.

The stand-ins hold what TensorRT's documentation says of them: a shape outside of the profile is refused, a change of
profile forgets the shapes, outputs have a shape once all inputs have one, and nothing is written past its memory.
"""

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from semwatch.triton.backend import plan_network

Shape = tuple[int, ...]
Ranges = list[tuple[Shape, Shape, Shape]]

OPEN_RANGES: Ranges = [((1, 64, 64), (1, 1024, 1024), (1, 1536, 1536)), ((1, 64, 64), (4, 1024, 1024), (4, 1536, 1536))]
FIXED_RANGES: Ranges = [((1, 112, 112), (4, 112, 112), (16, 112, 112))]
OUTPUTS = ["score_map", "raw_score"]


class HostMemory:
    """In the place of ``Cuda``: memory of this process."""

    capability = "8.9"
    stream = SimpleNamespace(value=1)

    def __init__(self, device: int = 0) -> None:
        self.blocks: dict[int, NDArray[np.uint8]] = {}

    def allocate(self, n_bytes: int) -> int:
        block = np.zeros(n_bytes, np.uint8)
        self.blocks[block.ctypes.data] = block
        return block.ctypes.data

    def at(self, address: int, shape: Shape, dtype: Any) -> NDArray[Any]:
        n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        assert n_bytes <= self.blocks[address].nbytes, "past its memory"
        return self.blocks[address][:n_bytes].view(dtype).reshape(shape)

    def upload(self, address: int, array: NDArray[Any]) -> None:
        self.at(address, array.shape, array.dtype)[...] = array

    def download(self, array: NDArray[Any], address: int) -> None:
        array[...] = self.at(address, array.shape, array.dtype)

    def enter(self) -> None:
        pass

    def wait(self) -> None:
        pass


class Context:
    """Answers with the mean of 8 x 8 pixels, and with the highest of these."""

    def __init__(self, ranges: Ranges, memory: HostMemory) -> None:
        self.ranges, self.memory = ranges, memory
        self.active_optimization_profile = 0
        self.shape: Shape | None = None
        self.addresses: dict[str, int] = {}
        self.chosen: list[int] = []

    def set_optimization_profile_async(self, profile: int, stream: int) -> None:
        self.active_optimization_profile, self.shape = profile, None

    def set_input_shape(self, name: str, shape: Shape) -> bool:
        least, _, most = self.ranges[self.active_optimization_profile]
        fits = len(shape) == 3 and all(a <= n <= b for a, n, b in zip(least, shape, most, strict=True))
        self.shape = shape if fits else None
        return fits

    def get_tensor_shape(self, name: str) -> Shape:
        n, height, width = self.shape or (-1, -1, -1)
        return {"image": (n, height, width), "score_map": (n, height // 8, width // 8), "raw_score": (n,)}[name]

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        n, height, width = self.get_tensor_shape("image")
        image = self.memory.at(self.addresses["image"], (n, height, width), np.uint8)
        cells = image.reshape(n, height // 8, 8, width // 8, 8).mean(axis=(2, 4), dtype=np.float32)
        self.memory.at(self.addresses["score_map"], cells.shape, np.float32)[...] = cells
        self.memory.at(self.addresses["raw_score"], (n,), np.float32)[...] = cells.max(axis=(1, 2))
        self.chosen.append(self.active_optimization_profile)
        return True


class Engine:
    num_io_tensors = 3
    device_memory_size_v2 = 123_000_000

    def __init__(self, ranges: Ranges, context: Context | None) -> None:
        self.ranges, self.context = ranges, context
        self.num_optimization_profiles = len(ranges)

    def get_tensor_name(self, k: int) -> str:
        return ["image", *OUTPUTS][k]

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name == "image" else "output"

    def get_tensor_dtype(self, name: str) -> type:
        return np.uint8 if name == "image" else np.float32

    def get_tensor_shape(self, name: str) -> Shape:
        sides = self.ranges[0][0][1:] if self.ranges is FIXED_RANGES else (-1, -1)
        return {"image": (-1, *sides), "score_map": (-1, *(n if n < 0 else n // 8 for n in sides)), "raw_score": (-1,)}[
            name
        ]

    def get_tensor_profile_shape(self, name: str, profile: int) -> tuple[Shape, Shape, Shape]:
        assert name == "image"
        return self.ranges[profile]

    def create_runtime_config(self) -> SimpleNamespace:
        return SimpleNamespace()

    def create_execution_context(self, settings: object) -> Context | None:
        return self.context


class Logger:
    ERROR = 1

    def __init__(self, level: int) -> None:
        self.level = level


def network(
    monkeypatch: pytest.MonkeyPatch, folder: Path, ranges: Ranges, *, is_full: bool = False
) -> tuple[plan_network.Network, Context, HostMemory]:
    """A network on stand-ins."""
    memory = HostMemory()
    context = Context(ranges, memory)
    engine = Engine(ranges, None if is_full else context)
    toolkit = SimpleNamespace(
        __version__="1.7",
        nptype=np.dtype,
        Logger=Logger,
        Runtime=lambda log: SimpleNamespace(deserialize_cuda_engine=lambda plan: engine),
        TensorIOMode=SimpleNamespace(INPUT="input"),
        CudaGraphStrategy=SimpleNamespace(WHOLE_GRAPH_CAPTURE=1),
    )
    monkeypatch.setattr(plan_network, "Cuda", lambda device: memory)
    monkeypatch.setattr(plan_network, "_toolkit", lambda made_by: toolkit)
    version = folder / "1"
    version.mkdir()
    (version / "model_sm89.plan").write_bytes(b"plan")
    told = {"plan.8.9": "model_sm89.plan", "plan_sha256.1.8.9": hashlib.sha256(b"plan").hexdigest()}
    return plan_network.Network(version, told), context, memory


def noise(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)


def test_fields_of_any_size_are_answered_in_the_tightest_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, context, _ = network(monkeypatch, tmp_path, OPEN_RANGES)
    for shape in ((1, 64, 64), (4, 1536, 1536), (1, 96, 448), (3, 64, 1536), (1, 96, 448)):
        image = noise(*shape)
        raw, cells = made.run(["raw_score", "score_map"], {"image": image})
        expected = image.reshape(shape[0], shape[1] // 8, 8, shape[2] // 8, 8).mean(axis=(2, 4))
        np.testing.assert_allclose(cells, expected, rtol=1e-5)
        np.testing.assert_allclose(raw, expected.max(axis=(1, 2)), rtol=1e-5)
    assert context.chosen == [0, 1, 0, 1, 0]


def test_memory_is_that_of_the_largest_batch_of_the_largest_fields(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, memory = network(monkeypatch, tmp_path, OPEN_RANGES)
    assert sorted(block.nbytes for block in memory.blocks.values()) == [4 * 4, 4 * 192 * 192 * 4, 4 * 1536 * 1536]


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 1552, 64), r"takes no image of \(1, 1552, 64\), only of \(1, 64, 64\) to \(1, 1536, 1536\)"),
        ((2, 48, 64), r"takes no image of \(2, 48, 64\), only of \(1, 64, 64\) to \(4, 1536, 1536\)"),
        ((5, 64, 64), "takes no batch of 5, only of 1 to 1 or 1 to 4"),
    ],
)
def test_field_that_no_profile_takes_is_refused_and_the_next_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: Shape, words: str
) -> None:
    made, _, _ = network(monkeypatch, tmp_path, OPEN_RANGES)
    with pytest.raises(RuntimeError, match=words):
        made.run(OUTPUTS, {"image": noise(*shape)})
    assert made.run(OUTPUTS, {"image": noise(1, 64, 80)})[0].shape == (1, 8, 10)


def test_images_of_one_size_are_answered_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, _, memory = network(monkeypatch, tmp_path, FIXED_RANGES)
    assert [made.run(OUTPUTS, {"image": noise(n, 112, 112)})[0].shape for n in (1, 16)] == [(1, 14, 14), (16, 14, 14)]
    assert max(block.nbytes for block in memory.blocks.values()) == 16 * 112 * 112


def test_gpu_without_room_for_the_plan_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match=r"too little free memory for the plan .*needs 123 MB"):
        network(monkeypatch, tmp_path, OPEN_RANGES, is_full=True)
