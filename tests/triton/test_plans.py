"""Plans beside the model repository: which fit a version, how they get into Triton's view, and who refuses them."""

import hashlib
import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from semwatch.errors import ConfigError, ModelMismatch
from semwatch.models import model_repository
from semwatch.triton import config as triton_config
from semwatch.triton import plans
from semwatch.triton import view as triton_view
from semwatch.triton.backend import plan_network
from semwatch.triton.client import Triton
from semwatch.triton.plans import Batches, Manifest
from semwatch.triton.server import LocalTriton
from semwatch.triton.view import Settings, View
from semwatch_training.engines import build as engine_maker
from semwatch_training.engines import tensorrt_compiler

RTX = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT for RTX is absent: pip install tensorrt-rtx-cu13"
)
NO_DRIVER = pytest.mark.skipif(tensorrt_compiler.gpu() is not None, reason="this machine has a GPU")


@pytest.fixture
def engines(tmp_path: Path) -> Path:
    return tmp_path / "engines"


def compiled(
    engines: Path, repository: Path, model: str, version: int = 1, *, capability: int = 89, content: bytes = b"plan",
    precision: str = "fp16", target: str = "tensorrt-rtx", source: str | None = None,
) -> Manifest:  # fmt: skip
    """What an export leaves behind, with bytes in the place of a plan."""
    meta = model_repository.read_meta(repository, model, version)
    manifest = Manifest.model_validate(
        {
            "model": model, "version": version, "target": target, "precision": precision,
            "compute_capability": capability, "toolkit_version": "1.7", "converter": 1,
            "source_sha256": source or meta.weights_sha256, "batches": Batches(), "tolerance": 0.1,
            "plan_sha256": hashlib.sha256(content).hexdigest(), "onnx_sha256": hashlib.sha256(b"onnx").hexdigest(),
        }
    )  # fmt: skip
    folder = engines / manifest.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / plans.PLAN).write_bytes(content)
    (folder / plans.ONNX).write_bytes(b"onnx")
    (folder / plans.MANIFEST).write_text(manifest.model_dump_json())
    return manifest


def again(repository: Path, model: str = "detector") -> int:
    """The same weights under the next number."""
    meta = model_repository.read_meta(repository, model, 1)
    return model_repository.publish(repository, meta, repository / model / "1" / "model.onnx")


def other(repository: Path, model: str = "detector") -> int:
    """Other weights under the next number."""
    weights = repository.parent / "other.onnx"
    weights.write_bytes(b"other")
    return model_repository.publish(repository, model_repository.read_meta(repository, model, 1), weights)


def view_of(repository: Path, engines: Path, target: str = "tensorrt-rtx", precision: str = "fp16") -> View:
    view = View(repository.parent / "view", repository)
    view.prepare(Settings.model_validate({"target": target, "engines": engines, "precision": precision}))
    return view


def read_config(view: View, model: str) -> model_config_pb2.ModelConfig:
    return text_format.Parse((view.folder / model / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


# --- which plans fit -------------------------------------------------------------------------------------------------


def test_folder_without_engines_says_how_to_make_them(repository: Path, engines: Path) -> None:
    meta = model_repository.read_meta(repository, "detector", 1)
    with pytest.raises(ModelMismatch, match=r"no fp16 tensorrt plans for detector 1 .*semwatch-train export --out"):
        plans.plans_of(engines, meta, 1, "tensorrt", "fp16")


def test_plans_of_a_version_are_told_by_capability(repository: Path, engines: Path) -> None:
    for capability in (75, 89, 120):
        compiled(engines, repository, "detector", capability=capability)
    compiled(engines, repository, "detector", capability=86, precision="bf16")
    compiled(engines, repository, "detector", capability=80, target="tensorrt")
    compiled(engines, repository, "encoder", capability=86)
    meta = model_repository.read_meta(repository, "detector", 1)
    found = plans.plans_of(engines, meta, 1, "tensorrt-rtx", "fp16")
    assert {capability: plan.file_name for capability, plan in found.items()} == {
        "7.5": "model_sm75.plan",
        "8.9": "model_sm89.plan",
        "12.0": "model_sm120.plan",
    }
    assert plans.plans_of(engines, meta, 1, "tensorrt-rtx", "bf16").keys() == {"8.6"}


def test_same_weights_under_another_number_take_the_same_plans_and_their_own_go_before(
    repository: Path, engines: Path
) -> None:
    compiled(engines, repository, "detector", content=b"first")
    assert again(repository) == 2
    meta = model_repository.read_meta(repository, "detector", 2)
    assert plans.plans_of(engines, meta, 2, "tensorrt-rtx", "fp16")["8.9"].path.read_bytes() == b"first"
    compiled(engines, repository, "detector", 2, content=b"second")
    assert plans.plans_of(engines, meta, 2, "tensorrt-rtx", "fp16")["8.9"].path.read_bytes() == b"second"
    assert plans.plans_of(engines, meta, 1, "tensorrt-rtx", "fp16")["8.9"].path.read_bytes() == b"first"


def test_plan_of_other_weights_is_refused_with_both_hashes(repository: Path, engines: Path) -> None:
    compiled(engines, repository, "detector", source="f" * 64)
    meta = model_repository.read_meta(repository, "detector", 1)
    words = rf"detector 1 .*compiled from other weights \(sha256 ffffffffffff\).*\({meta.weights_sha256[:12]}\)"
    with pytest.raises(ModelMismatch, match=words):
        plans.plans_of(engines, meta, 1, "tensorrt-rtx", "fp16")


# --- the view --------------------------------------------------------------------------------------------------------


def test_target_without_a_folder_of_engines_is_refused() -> None:
    with pytest.raises(ValueError, match="tensorrt-rtx needs the folder of its plans"):
        Settings(target="tensorrt-rtx")


@pytest.mark.parametrize("target", ["tensorrt-rtx", "tensorrt"])
def test_plans_lie_beside_the_weights_and_the_head_stays_with_onnx(
    repository: Path, engines: Path, target: str
) -> None:
    made = [compiled(engines, repository, "detector", capability=c, target=target) for c in (86, 120)]
    view = view_of(repository, engines, target)
    view.place("detector", 1)
    view.place("head", 1)
    python = {"model.py", "semwatch_network.py"} if target == "tensorrt-rtx" else set()
    found = {path.name for path in (view.folder / "detector/1").iterdir()}
    assert found == {"model.onnx", "model_sm86.plan", "model_sm120.plan", *python}
    config = read_config(view, "detector")
    assert config.platform == ("tensorrt_plan" if target == "tensorrt" else "")
    assert dict(config.cc_model_filenames) == (
        {"8.6": "model_sm86.plan", "12.0": "model_sm120.plan"} if target == "tensorrt" else {}
    )
    key = triton_config.plan_sha256_key(1, "12.0")
    assert config.parameters[key].string_value == made[1].plan_sha256
    head = read_config(view, "head")
    assert (head.backend, head.instance_group[0].kind) == ("python", model_config_pb2.ModelInstanceGroup.KIND_CPU)
    assert "onnxruntime" in (view.folder / "head/1/semwatch_network.py").read_text()


def test_version_without_a_plan_is_refused_and_the_one_before_stays(repository: Path, engines: Path) -> None:
    compiled(engines, repository, "detector")
    view = view_of(repository, engines)
    view.place("detector", 1)
    version = other(repository)
    with pytest.raises(ModelMismatch, match=f"no fp16 tensorrt-rtx plans for detector {version}"):
        view.place("detector", version)
    assert view.placed("detector") == [1]
    compiled(engines, repository, "detector", version)
    view.place("detector", version)
    assert view.placed("detector") == [1, version]


def test_filling_a_view_says_by_model_what_is_missing(repository: Path, engines: Path) -> None:
    compiled(engines, repository, "detector", target="tensorrt")
    view = View(repository.parent / "view", repository)
    refused = view.fill(Settings(target="tensorrt", engines=engines))
    assert refused.keys() == {"encoder"}
    assert "no fp16 tensorrt plans for encoder 1" in refused["encoder"]
    assert {model: view.placed(model) for model in ("detector", "encoder", "head")} == {
        "detector": [1],
        "encoder": [],
        "head": [1],
    }
    assert view.fill(Settings()) == {}


def test_damaged_plan_is_refused_by_name(repository: Path, engines: Path) -> None:
    manifest = compiled(engines, repository, "detector")
    (engines / manifest.folder / plans.PLAN).write_bytes(b"damaged")
    view = view_of(repository, engines)
    with pytest.raises(ModelMismatch, match=r"model\.plan is not what its manifest says"):
        view.place("detector", 1)
    assert view.placed("detector") == []


def test_version_whose_plan_was_compiled_anew_is_placed_anew(repository: Path, engines: Path) -> None:
    compiled(engines, repository, "detector", content=b"old")
    version = again(repository)
    view = view_of(repository, engines)
    view.place("detector", 1)
    shutil.rmtree(engines)
    compiled(engines, repository, "detector", content=b"new")
    view.place("detector", version)
    assert view.placed("detector") == [version]  # what stood there was the old build
    view.place("detector", 1)
    assert (view.folder / "detector/1/model_sm89.plan").read_bytes() == b"new"


def test_view_that_changes_its_target_places_everything_anew(repository: Path, engines: Path) -> None:
    compiled(engines, repository, "detector")
    view = view_of(repository, engines)
    view.place("detector", 1)
    view.prepare(Settings(threads=2, target="tensorrt-rtx", engines=engines))
    assert view.placed("detector") == [1]
    view.prepare(Settings())
    assert view.placed("detector") == []
    view.place("detector", 1)
    found = {path.name for path in (view.folder / "detector/1").iterdir()}
    assert found == {"model.onnx", "model.py", "semwatch_network.py"}


# --- the backend's own parts -----------------------------------------------------------------------------------------


@NO_DRIVER
def test_machine_without_a_gpu_is_told_so() -> None:
    with pytest.raises(RuntimeError, match=r"no NVIDIA driver \(libcuda.*--target onnx-python"):
        plan_network.Cuda()


DRIVER = r"""
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
int cuInit(unsigned flags) { return flags; }
int cuDeviceGet(int *device, int number) { *device = number; return number > 0 ? 101 : 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = malloc(1); return device; }
int cuCtxSetCurrent(void *context) { return context == NULL; }
int cuStreamCreate(void **stream, unsigned flags) { *stream = (void *)0x7f0123456789; return flags != 1; }
int cuDeviceGetAttribute(int *value, int number, int device) { *value = number == 75 ? 12 : 0; return device; }
int cuMemAlloc_v2(uint64_t *address, size_t n)
{ if (n > 1ull << 33) return 2; *address = (uint64_t)malloc(n); return 0; }
int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t n, void *stream)
{ memcpy((void *)to, from, n); return stream != (void *)0x7f0123456789; }
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t n, void *stream)
{ memcpy(to, (void *)from, n); return stream != (void *)0x7f0123456789; }
int cuStreamSynchronize(void *stream) { return stream != (void *)0x7f0123456789; }
int cuGetErrorString(int code, const char **words) { *words = code == 2 ? "out of memory" : "invalid"; return 0; }
"""
"""The driver's functions with the signatures of cuda.h over ordinary memory: what ctypes passes must arrive whole."""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_driver_is_called_by_its_own_signatures(tmp_path: Path) -> None:
    (tmp_path / "driver.c").write_text(DRIVER)
    library = tmp_path / "driver.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "driver.c")], check=True, timeout=60)
    cuda = plan_network.Cuda(library=str(library))
    assert cuda.capability == "12.0"
    sent = np.arange(12, dtype=np.float32).reshape(3, 4)
    address, received = cuda.allocate(sent.nbytes), np.zeros_like(sent)
    cuda.upload(address, sent)
    cuda.download(received, address)
    cuda.wait()
    np.testing.assert_array_equal(received, sent)
    with pytest.raises(RuntimeError, match=r"cuMemAlloc_v2: out of memory \(2\)"):
        cuda.allocate(1 << 40)
    with pytest.raises(RuntimeError, match=r"finds no GPU 3 .*--target onnx-python"):
        plan_network.Cuda(3, library=str(library))


def test_plan_is_chosen_by_capability_and_checked(tmp_path: Path) -> None:
    folder = tmp_path / "7"
    folder.mkdir()
    (folder / "model_sm89.plan").write_bytes(b"plan")
    told = {"plan.8.9": "model_sm89.plan", "plan_sha256.7.8.9": hashlib.sha256(b"plan").hexdigest()}
    assert plan_network.chosen_plan(folder, told, "8.9") == b"plan"
    with pytest.raises(RuntimeError, match=r"no plan for this GPU, of compute capability 12\.0, only for 8\.9.* 120"):
        plan_network.chosen_plan(folder, told, "12.0")
    with pytest.raises(RuntimeError, match="only for none"):
        plan_network.chosen_plan(folder, {}, "8.9")
    (folder / "model_sm89.plan").write_bytes(b"nalp")
    with pytest.raises(RuntimeError, match="sha256 differs"):
        plan_network.chosen_plan(folder, told, "8.9")


@pytest.mark.parametrize(("n", "expected"), [(1, 0), (2, 1), (4, 1), (5, 2), (16, 2)])
def test_batch_takes_the_tightest_profile(n: int, expected: int) -> None:
    assert plan_network.profile_for(n, [(1, 1), (1, 4), (1, 16)]) == expected


def test_batch_that_no_profile_takes_is_refused() -> None:
    with pytest.raises(RuntimeError, match="no batch of 17, only of 1 to 4 or 1 to 16"):
        plan_network.profile_for(17, [(1, 4), (1, 16)])


@RTX
@pytest.mark.skipif(tensorrt_compiler.gpu() is None, reason="no CUDA GPU on this machine")
def test_plan_answers_as_onnx_runtime_does(tiny_repository: Path, tmp_path: Path) -> None:
    from semwatch.models.inference import Embedded

    here = tensorrt_compiler.gpu()
    assert here is not None
    try:
        tensorrt_compiler.load_toolkit("tensorrt-rtx", (here,))
    except ConfigError as error:
        pytest.skip(f"the GPU here is none that TensorRT for RTX compiles for: {error}")
    list(
        engine_maker.export(
            tiny_repository, tmp_path, target="tensorrt-rtx", capabilities=(here,), models=("detector",), n_images=1,
            progress=lambda *_: None,
        )
    )  # fmt: skip
    view = view_of(tiny_repository, tmp_path)
    view.place("detector", 1)
    told = {key: value.string_value for key, value in read_config(view, "detector").parameters.items()}
    network = plan_network.Network(view.folder / "detector/1", told)
    with Embedded(tiny_repository, threads=1, models=("detector",)) as embedded:
        for n in (1, 4, 16, 3, 4):  # batch sizes met again are replayed
            image = np.random.default_rng(n).integers(0, 256, (n, 112, 112), dtype=np.uint8)
            (found,) = network.run(["score_map"], {"image": image})
            expected = embedded.infer("detector", {"image": image}).outputs["score_map"]
            np.testing.assert_allclose(found, expected, atol=5e-2 * np.abs(expected).max())


# --- a real server without a GPU -------------------------------------------------------------------------------------


@NO_DRIVER
def test_server_without_a_gpu_refuses_a_plan_in_our_words_and_goes_on_with_what_it_serves(
    server: LocalTriton, repository: Path, engines: Path
) -> None:
    compiled(engines, repository, "detector")
    image = {"image": np.zeros((2, 112, 112), np.uint8)}
    with Triton(repository, url=server.url) as models:
        expected = models.infer("detector", image).outputs["raw_score"]
        version = again(repository)
        view = View(triton_view.beside(repository), repository)
        view.prepare(Settings(target="tensorrt-rtx", engines=engines))
        with pytest.raises(ModelMismatch, match=r"Triton cannot load detector 2: .*no NVIDIA driver.*onnx-python"):
            Triton(repository, url=server.url, pins={"detector": version})
        np.testing.assert_array_equal(models.infer("detector", image).outputs["raw_score"], expected)


@RTX
@pytest.mark.slow
def test_what_an_export_compiled_is_placed_with_its_hashes(repository: Path, engines: Path) -> None:
    made = engine_maker.export(
        repository, engines, target="tensorrt-rtx", capabilities=(75, 120), models=("detector",), n_images=1,
        progress=lambda *_: None,
    )  # fmt: skip
    hashes = {f"plan_sha256.1.{cc}": each.manifest.plan_sha256 for cc, each in zip(("7.5", "12.0"), made, strict=True)}
    view = view_of(repository, engines)
    view.place("detector", 1)
    told = {key: value.string_value for key, value in read_config(view, "detector").parameters.items()}
    assert hashes.items() <= told.items()
    for capability in ("7.5", "12.0"):
        assert len(plan_network.chosen_plan(view.folder / "detector/1", told, capability)) > 10_000


def test_manifest_is_what_an_export_writes(repository: Path, engines: Path) -> None:
    """The daemon reads what the learning side wrote, without importing it."""
    made = list(
        engine_maker.export(
            repository, engines, target="onnx", models=("head",), n_images=1, progress=lambda *_: None
        )
    )  # fmt: skip
    (found,) = plans.engines(engines)
    assert found == made[0].manifest
    assert json.loads((engines / found.folder / plans.MANIFEST).read_bytes())["source_sha256"] == found.source_sha256
