"""Engines: what is refused before it costs anything, conversions, and one real compilation without a GPU."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import typer
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

import toy_family
from progress import quiet
from semwatch.errors import ConfigError, ModelMismatch, PublishError
from semwatch.line import detection
from semwatch.models import model_repository
from semwatch.models.model_repository import OPEN, Meta, Tensor
from semwatch.triton import config as triton_config
from semwatch.triton import plans
from semwatch.triton.plans import Batches, Difference, batches_of
from semwatch_training.engines import build, commands, onnx_precision, parity, tensorrt_compiler
from semwatch_training.engines.tensorrt_compiler import TOOLKITS, compile_plan, load_toolkit, parse_capabilities
from semwatch_training.families.intrinsic.export import exported
from semwatch_training.publishing.export import publish, random_inputs
from tiny_models import intrinsic_graph

RTX = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT for RTX is absent: pip install tensorrt-rtx-cu13"
)
MODELS = ("detector", "encoder", "head")


def graph(nodes, inputs, outputs, constants=(), opset=20) -> onnx.ModelProto:  # type: ignore[no-untyped-def]
    def values(named):  # type: ignore[no-untyped-def]
        return [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in named]

    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants]
    made = helper.make_graph(nodes, "g", values(inputs), values(outputs), tensors)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def linear(weight: np.ndarray, after: str = "Relu") -> onnx.ModelProto:
    """x @ weight, then something, then its root."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"], name="product"),
        helper.make_node(after, ["product"], ["positive"], name="after"),
        helper.make_node("Sqrt", ["positive"], ["y"], name="root"),
    ]
    rows, columns = weight.shape
    return graph(
        nodes, [("x", TensorProto.FLOAT, ["n", rows])], [("y", TensorProto.FLOAT, ["n", columns])], [("w", weight)]
    )


def open_detector() -> Meta:
    """A detector that takes fields at any size."""
    inputs = {"image": Tensor(dtype="uint8", shape=(OPEN, OPEN))}
    outputs = {"score_map": Tensor(dtype="float32", shape=(OPEN, OPEN)), "raw_score": Tensor(dtype="float32", shape=())}
    return Meta(model="detector", created_utc="now", inputs=inputs, outputs=outputs)


def of(model: onnx.ModelProto, op_type: str) -> set[int]:
    """Types that nodes of a kind give."""
    types = onnx_precision.element_types(model)
    return {types[node.output[0]] for node in model.graph.node if node.op_type == op_type}


# ---- what is asked for


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", ()), ("89", (89,)), ("75, 86,89,120", (75, 86, 89, 120)), ("sm89,8.9,SM120", (89, 120))],
)
def test_capabilities_are_read_in_any_common_spelling(text, expected) -> None:
    assert parse_capabilities(text) == expected


def test_word_among_capabilities_is_named() -> None:
    with pytest.raises(ConfigError, match="ada is no compute capability"):
        parse_capabilities("75,ada")


@pytest.mark.parametrize(
    ("target", "precision", "capabilities", "models", "words"),
    [
        ("openvino", "fp16", (89,), MODELS, "no target 'openvino'"),
        ("tensorrt-rtx", "fp12", (89,), MODELS, "no precision 'fp12'; there are fp32, fp16, bf16"),
        ("tensorrt-rtx", "int8", (89,), MODELS, "int8 needs a calibration set and a measured loss"),
        ("tensorrt-rtx", "fp8", (89,), MODELS, "fp8 needs a calibration set"),
        ("tensorrt-rtx", "fp16", (), MODELS, "name them, such as --compute-capability"),
        ("tensorrt-rtx", "bf16", (89, 75), MODELS, "SM75 has no bf16"),
        ("tensorrt-rtx", "fp32", (89, 75), MODELS, "no fp32 matrix products for SM75"),
        ("tensorrt", "bf16", (70,), MODELS, "SM70 has no bf16"),
        ("onnx", "fp16", (89,), MODELS, "belongs to no GPU"),
        ("onnx", "fp16", (), ("detector", "brain"), "no model brain"),
        ("onnx", "fp16", (), (), "name a model"),
    ],
)
def test_impossible_order_is_refused_with_what_is_possible(target, precision, capabilities, models, words) -> None:
    with pytest.raises(ConfigError, match=words):
        build.check_order(target, precision, capabilities, models)


def test_full_tensorrt_takes_fp32_on_turing() -> None:
    assert build.check_order("tensorrt", "fp32", (75,), MODELS) == ("tensorrt", "fp32")


def test_absent_package_is_named_with_its_install_command(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(ConfigError, match="needs the package tensorrt_rtx: pip install tensorrt-rtx-cu13"):
        load_toolkit("tensorrt-rtx", (89,))


def test_full_tensorrt_gets_a_profile_for_each_size_and_rtx_one_for_all() -> None:
    assert tensorrt_compiler.profiles(TOOLKITS["tensorrt-rtx"], Batches()) == [(1, 4, 16)]
    found = tensorrt_compiler.profiles(TOOLKITS["tensorrt"], Batches())
    assert found == [(1, 1, 1), (1, 4, 4), (1, 16, 16)]
    assert tuple(sizes.tuned for sizes in found) == triton_config.PROFILE_BATCHES


def test_fields_of_any_size_have_fewer_in_a_batch_and_profiles_from_the_smallest_to_the_largest() -> None:
    batches = batches_of(open_detector())
    assert batches == (1, 1, 4)
    assert batches.largest == triton_config.max_batch(open_detector())
    assert batches_of(open_detector().model_copy(update={"inputs": {}})) == Batches()
    assert tensorrt_compiler.profiles(TOOLKITS["tensorrt"], batches) == [(1, 1, 1), (1, 4, 4)]
    found = tensorrt_compiler.profile_shapes((-1, -1, -1), batches)
    assert found == [(1, 64, 64), (1, 1024, 1024), (4, 1536, 1536)]
    assert tensorrt_compiler.profile_shapes((-1, 3, 7), Batches()) == [(1, 3, 7), (4, 3, 7), (16, 3, 7)]


@RTX
def test_gpu_that_is_not_offered_is_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"cannot compile for \[90\] here, but for 75, 80, 86, 89, 120, 121"):
        load_toolkit("tensorrt-rtx", (89, 90))


# ---- conversion


@pytest.mark.parametrize(("low", "kind"), [("fp16", TensorProto.FLOAT16), ("bf16", TensorProto.BFLOAT16)])
def test_products_go_low_roots_stay_and_the_signature_stays(low, kind) -> None:
    converted = onnx_precision.lower(linear(np.eye(4, dtype=np.float32)), low)
    assert of(converted, "MatMul") == of(converted, "Relu") == {kind}
    assert of(converted, "Sqrt") == {TensorProto.FLOAT}
    assert {t.type.tensor_type.elem_type for t in (*converted.graph.input, *converted.graph.output)} == {
        TensorProto.FLOAT
    }
    assert [tensor.data_type for tensor in converted.graph.initializer] == [kind]


def test_output_that_is_a_product_comes_back_in_fp32() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"], name="product"),
        helper.make_node("Relu", ["y"], ["z"], name="reader"),
    ]
    signature = [(name, TensorProto.FLOAT, ["n", 2]) for name in "xyz"]
    source = graph(nodes, signature[:1], signature[1:], [("w", np.array([[0.1, -3], [2, 7]], np.float32))])
    x = np.array([[1.5, -0.25]], np.float32)
    for emulate in (False, True):
        converted = onnx_precision.lower(source, "fp16", emulate=emulate)
        assert [output.name for output in converted.graph.output] == ["y", "z"]
        for found in parity.judge(source, {"rounded": converted}, {"noise": [{"x": x}]}):
            assert max(found.relative.values()) < 1e-3


def test_rounding_alone_is_exactly_what_the_low_type_computes() -> None:
    source = linear(np.array([[1 / 3, 0.7]], np.float32))
    x = np.array([[2.0], [0.3]], np.float32)
    half = np.float16(x).astype(np.float32) * np.float16([[1 / 3, 0.7]]).astype(np.float32)
    emulated = onnx_precision.lower(source, "fp16", emulate=True)
    given = parity._run(parity._session(emulated), [{"x": x}])["y"].reshape(2, 2)
    np.testing.assert_allclose(given, np.sqrt(np.float16(half).astype(np.float32)), rtol=1e-6)
    assert not np.allclose(given, np.sqrt(x @ np.array([[1 / 3, 0.7]], np.float32)), rtol=1e-6)


@pytest.mark.parametrize(("constant", "kind"), [(1e-12, TensorProto.FLOAT), (0.5, TensorProto.FLOAT16)])
def test_epsilon_that_fp16_would_lose_keeps_its_sum_in_fp32(constant, kind) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"], name="product"),
        helper.make_node("Add", ["product", "epsilon"], ["y"], name="sum"),
    ]
    signature = [(name, TensorProto.FLOAT, ["n", 2]) for name in "xy"]
    constants = [("w", np.eye(2, dtype=np.float32)), ("epsilon", np.float32(constant))]
    converted = onnx_precision.lower(graph(nodes, signature[:1], signature[1:], constants), "fp16")
    assert of(converted, "Add") == {kind}


def test_weights_beyond_fp16_are_caught_by_parity() -> None:
    source = linear(np.full((1, 1), 1e6, np.float32))
    converted, judged = build.convert(source, "fp16")
    found = parity.judge(source, judged, {"noise": [{"x": np.ones((1, 1), np.float32)}]})
    with pytest.raises(PublishError, match=r"detector in fp16 is refused: its y is off by inf"):
        build.check_parity("detector", "fp16", found)
    assert converted is judged["onnxruntime"]


@pytest.mark.parametrize(("off", "is_refused"), [(0.049, False), (0.051, True), (float("nan"), True)])
def test_tolerance_is_where_it_is_said_to_be(off, is_refused) -> None:
    good = Difference(inputs="noise", way="onnxruntime", samples=2, relative={"a": 1e-4})
    found = [good, Difference(inputs="images", way="rounded", samples=3, relative={"b": off, "a": 0.0})]
    if not is_refused:
        build.check_parity("head", "fp16", found)
        return
    with pytest.raises(PublishError, match=r"its b is off by .* on 3 images \(rounded\), 5e-02 allowed"):
        build.check_parity("head", "fp16", found)


def test_uint8_becomes_float_before_anything_moves_it() -> None:
    nodes = [
        helper.make_node("Transpose", ["image"], ["turned"], name="turn", perm=[0, 2, 1]),
        helper.make_node("Cast", ["turned"], ["y"], name="cast", to=TensorProto.FLOAT),
    ]
    shape = ["n", 3, 3]
    source = graph(nodes, [("image", TensorProto.UINT8, shape)], [("y", TensorProto.FLOAT, shape)])
    converted = onnx_precision.float_inputs(source)
    assert converted.graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8
    assert of(converted, "Transpose") == {TensorProto.FLOAT}
    images = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    (found,) = parity.judge(source, {"onnxruntime": converted}, {"noise": [{"image": images}]})
    assert found.relative == {"y": 0.0}


def test_arithmetic_on_uint8_is_refused() -> None:
    nodes = [helper.make_node("Add", ["image", "image"], ["y"], name="sum")]
    source = graph(nodes, [("image", TensorProto.UINT8, ["n"])], [("y", TensorProto.UINT8, ["n"])])
    with pytest.raises(PublishError, match=r"sum \(Add\) computes with uint8"):
        onnx_precision.float_inputs(source)


def test_network_with_branches_is_refused() -> None:
    empty = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["z"])], "b", [], [helper.make_tensor_value_info("z", 1, [2])]
    )
    nodes = [helper.make_node("If", ["condition"], ["y"], name="fork", then_branch=empty, else_branch=empty)]
    inputs = [("condition", TensorProto.BOOL, []), ("x", TensorProto.FLOAT, [2])]
    with pytest.raises(PublishError, match=r"fork \(If\) holds a network of its own"):
        onnx_precision.lower(graph(nodes, inputs, [("y", TensorProto.FLOAT, [2])]), "fp16")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_our_networks_convert_and_stay_close_on_noise(tiny_repository, model, precision) -> None:
    meta = model_repository.read_meta(tiny_repository, model, 1)
    source = onnx.load(tiny_repository / model / "1" / "model.onnx")
    converted, judged = build.convert(source, precision)
    found = parity.judge(source, judged, {"noise": [random_inputs(meta, batch=5, seed=0)]})
    assert {row.way for row in found} == set(judged)
    assert [row.samples for row in found] == [5] * len(judged)
    build.check_parity(model, precision, found)
    worst = max(off for row in found for off in row.relative.values())
    assert worst == 0 if precision == "fp32" else worst > 1e-6
    products = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
    assert of(converted, "MatMul") == {products[precision]}


@pytest.fixture(scope="module")
def intrinsic(tmp_path_factory) -> Path:
    """A repository with a detector of fields of any size, which computes statistics of their own."""
    repository = tmp_path_factory.mktemp("intrinsic")
    publish(exported(intrinsic_graph(), normal_scores=[0.1]), repository)
    return repository


@pytest.mark.slow
def test_marks_of_an_export_name_the_operations_of_a_module_and_not_those_within(intrinsic) -> None:
    source = onnx.load(intrinsic / "detector/1/model.onnx")
    marked = onnx_precision.in_fp32(source)
    found = {op: [not marked.isdisjoint(n.output) for n in source.graph.node if n.op_type == op] for op in WHERE}
    assert {op: (any(each), all(each)) for op, each in found.items()} == WHERE
    assert b"/training/" not in (intrinsic / "detector/1/model.onnx").read_bytes()
    assert not onnx_precision.in_fp32(linear(np.eye(2, dtype=np.float32)))


WHERE = {"MatMul": (True, True), "CumSum": (True, True), "Conv": (False, False), "Resize": (True, False)}
"""Whether any, and whether all, are operations of the statistics rather than of trunk and branch."""


@pytest.mark.parametrize(("low", "kind"), [("fp16", TensorProto.FLOAT16), ("bf16", TensorProto.BFLOAT16)])
@pytest.mark.slow
def test_what_a_network_marks_stays_in_fp32(intrinsic, low, kind) -> None:
    source = onnx_precision.float_inputs(onnx.load(intrinsic / "detector/1/model.onnx"))
    assert onnx_precision.has_exact_products(source)
    converted = onnx_precision.lower(source, low)
    assert of(converted, "MatMul") == {TensorProto.FLOAT}
    assert of(converted, "Conv") == {kind}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.slow
def test_detector_of_any_size_converts_and_stays_close(intrinsic, precision) -> None:
    meta = model_repository.read_meta(intrinsic, "detector", 1)
    source = onnx.load(intrinsic / "detector/1/model.onnx")
    _, judged = build.convert(source, precision)
    fields = [random_inputs(meta, batch=n, seed=n, open_px=side) for n, side in ((2, 64), (1, 160))]
    found = parity.judge(source, judged, {"noise": fields})
    assert {row.samples for row in found} == {3}
    build.check_parity("detector", precision, found)


@RTX
@pytest.mark.slow
def test_gpu_without_fp32_products_is_refused_for_a_network_that_wants_some(intrinsic, tmp_path) -> None:
    making = build.export(
        intrinsic, tmp_path, target="tensorrt-rtx", capabilities=(89, 75), models=("detector",), progress=quiet
    )
    with pytest.raises(ConfigError, match=r"the detector computes statistics in fp32, and tensorrt_rtx .* for SM75"):
        next(making)


def test_empty_batch_is_not_judged() -> None:
    source = linear(np.eye(2, dtype=np.float32))
    assert parity.judge(source, {"rounded": source}, {"images": [{"x": np.zeros((0, 2), np.float32)}]}) == []


def test_fields_of_different_sizes_are_judged_together(tmp_path) -> None:
    toy_family.publish_open_detector(tmp_path)
    source = onnx.load(tmp_path / "detector/1/model.onnx")
    fields = [random_inputs(open_detector(), batch=1, seed=side, open_px=side) for side in (64, 96, 64)]
    batches = parity._alike(fields)
    assert [arrays["image"].shape for arrays in batches] == [(2, 64, 64), (1, 96, 96)]
    (found,) = parity.judge(source, {"onnxruntime": onnx_precision.float_inputs(source)}, {"images": batches})
    assert (found.samples, max(found.relative.values())) == (3, 0.0)


def test_large_field_is_judged_by_its_first_tile() -> None:
    for size_hw, expected in (((480, 512), (1, 480, 512)), ((2000, 500), (1, 1072, 496))):
        seen = detection.asked(open_detector(), np.zeros(size_hw, np.uint8))[0]
        assert seen["image"].shape == expected


# ---- engines on disk


def test_there_are_no_engines_in_an_empty_folder(tmp_path) -> None:
    assert plans.engines(tmp_path / "absent") == []


def test_absent_models_are_said_before_anything_is_made(tmp_path) -> None:
    with pytest.raises(ModelMismatch, match="no detector in the model repository"):
        list(build.export(tmp_path / "none", tmp_path / "out", target="onnx", progress=quiet))
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def onnx_engines(tiny_repository, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("engines")
    made = list(build.export(tiny_repository, out, target="onnx", n_images=2, progress=quiet))
    assert [(each.manifest.model, each.is_new) for each in made] == [(model, True) for model in MODELS]
    return out


@pytest.fixture
def some(onnx_engines, tmp_path) -> Path:
    return Path(shutil.copytree(onnx_engines, tmp_path / "engines"))


def test_onnx_of_another_precision_is_an_engine_too(onnx_engines, tiny_repository) -> None:
    found = plans.engines(onnx_engines)
    assert [str(m.folder) for m in found] == [f"{model}/1/onnx-fp16" for model in MODELS]
    assert len({m.engine_id for m in found}) == 3
    for manifest in found:
        meta = model_repository.read_meta(tiny_repository, manifest.model, 1)
        assert manifest.source_sha256 == meta.weights_sha256
        assert {(row.inputs, row.way) for row in manifest.parity} == {
            (inputs, way) for inputs in ("noise", "images") for way in ("onnxruntime", "rounded")
        }
        folder = onnx_engines / manifest.folder
        assert {path.name for path in folder.iterdir()} == {"model.onnx", "manifest.json"}
        assert sum(t.data_type == TensorProto.FLOAT16 for t in onnx.load(folder / "model.onnx").graph.initializer) > 3


def test_engine_that_is_up_to_date_is_not_made_again(some, tiny_repository) -> None:
    files = {path: path.stat().st_mtime_ns for path in some.rglob("*")}
    made = list(build.export(tiny_repository, some, target="onnx", progress=quiet))
    assert [each.is_new for each in made] == [False] * 3
    assert {path: path.stat().st_mtime_ns for path in some.rglob("*")} == files


@pytest.mark.parametrize("harm", ["weights", "truncated manifest", "no manifest", "other source", "other tolerance"])
def test_engine_that_is_not_what_it_says_is_made_again(some, tiny_repository, harm) -> None:
    folder = some / "head/1/onnx-fp16"
    path, before = folder / "manifest.json", plans.read(folder)
    if harm == "weights":
        (folder / "model.onnx").write_bytes(b"other")
    elif harm == "truncated manifest":
        path.write_text(path.read_text()[:100])
    elif harm == "no manifest":
        path.unlink()
    else:
        changed = {"other source": {"source_sha256": "0"}, "other tolerance": {"tolerance": 0.5}}[harm]
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    made = list(build.export(tiny_repository, some, target="onnx", n_images=1, progress=quiet))
    assert [each.is_new for each in made] == [False, False, True]
    assert plans.read(folder).onnx_sha256 == before.onnx_sha256
    assert [entry.name for entry in folder.parent.iterdir()] == ["onnx-fp16"]


def test_damaged_engine_is_said_by_name(some) -> None:
    (some / "encoder/1/onnx-fp16/model.onnx").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"encoder/1/onnx-fp16/manifest\.json describes other files .*model\.onnx"):
        plans.engines(some)


def test_disk_that_refuses_is_a_plain_error(some, tiny_repository) -> None:
    shutil.rmtree(some / "head")
    (some / "head").write_text("in the way")
    with pytest.raises(PublishError, match="cannot write the engine"):
        list(build.export(tiny_repository, some, target="onnx", n_images=1, progress=quiet))


# ---- the command


@pytest.fixture
def command():  # type: ignore[no-untyped-def]
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(commands.export)
    return lambda *args: CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "200"})


def test_help_says_what_a_capability_is(command) -> None:
    said = " ".join(command("--help").output.split())
    for words in ("86,89,120", "89 Ada", "nvidia-smi", "int8 is refused", "manifest.json"):
        assert words in said


def test_command_refuses_before_it_reads_anything(command, tmp_path) -> None:
    result = command("--out", tmp_path / "out", "--precision", "int8", "--compute-capability", "89")
    assert isinstance(result.exception, ConfigError)
    assert "calibration set" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_command_prints_a_table_of_what_is_there(command, some, tiny_repository) -> None:
    result = command("--out", some, "--target", "onnx", "--repository", tiny_repository, "--model", "head")
    assert result.exit_code == 0, result.output
    assert plans.read(some / "head/1/onnx-fp16").engine_id in result.output
    assert "as it was" in result.output


# ---- compilation, for GPUs that are not here


@RTX
def test_models_compile_for_ada_without_a_gpu(tiny_repository, tmp_path) -> None:
    made = list(
        build.export(tiny_repository, tmp_path, target="tensorrt-rtx", capabilities=(89,), n_images=1, progress=quiet)
    )
    assert [(each.manifest.model, each.is_new) for each in made] == [(model, True) for model in MODELS]
    for manifest, _ in made:
        folder = tmp_path / manifest.folder
        assert {path.name for path in folder.iterdir()} == {"model.plan", "model.onnx", "manifest.json", "build.log"}
        assert manifest.plan_bytes == (folder / "model.plan").stat().st_size > 10_000
        assert manifest.gpu.startswith("skipped: this machine has") or manifest.parity[-1].way == "gpu"
        assert manifest.seconds > 0
        assert "INFO" in (folder / "build.log").read_text()
        assert "ERROR" not in (folder / "build.log").read_text()
    assert len({manifest.engine_id for manifest, _ in made}) == 3
    again = build.export(tiny_repository, tmp_path, target="tensorrt-rtx", capabilities=(89,), progress=quiet)
    assert [each.is_new for each in again] == [False] * 3


@RTX
@pytest.mark.slow
def test_detector_of_any_size_compiles_with_its_statistics(intrinsic) -> None:
    trt, kit = load_toolkit("tensorrt-rtx", (89,)), TOOLKITS["tensorrt-rtx"]
    batches = batches_of(model_repository.read_meta(intrinsic, "detector", 1))
    for precision in ("fp32", "fp16"):
        network, _ = build.convert(onnx.load(intrinsic / "detector/1/model.onnx"), precision)
        made = compile_plan(trt, kit, network.SerializeToString(), 89, batches)
        assert len(made.plan) > 10_000
        assert not [line for line in made.log if "ERROR" in line]


@RTX
def test_refusal_of_tensorrt_is_said_in_its_own_words(tiny_repository) -> None:
    trt, kit = load_toolkit("tensorrt-rtx", (75,)), TOOLKITS["tensorrt-rtx"]
    fp32 = onnx_precision.float_inputs(onnx.load(tiny_repository / "head/1/model.onnx"))
    with pytest.raises(PublishError, match=r"for SM75: .*FP32 GEMM is not supported"):
        compile_plan(trt, kit, fp32.SerializeToString(), 75, Batches())
    with pytest.raises(PublishError, match="TensorRT cannot read the network"):
        compile_plan(trt, kit, b"not onnx", 89, Batches())


@RTX
def test_fp16_makes_it_compile_for_turing_and_plans_of_two_gpus_differ(tiny_repository) -> None:
    kit = TOOLKITS["tensorrt-rtx"]
    trt = load_toolkit("tensorrt-rtx", (75, 89))
    network, _ = build.convert(onnx.load(tiny_repository / "head/1/model.onnx"), "fp16")
    made = [compile_plan(trt, kit, network.SerializeToString(), c, Batches()).plan for c in (75, 89)]
    assert len({build.sha256(plan) for plan in made}) == 2
