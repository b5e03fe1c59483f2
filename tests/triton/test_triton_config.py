"""What Triton is told of a model, read back with Triton's own schema."""

from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from semwatch.models.contract import FIELD_SIDES_PX
from semwatch.models.model_repository import OPEN, Meta, Tensor
from semwatch.triton import config as triton_config
from semwatch.triton.plans import Batches, Manifest, Plan

BYTE, FLOAT = "TYPE_UINT8", "TYPE_FP32"
FILES = {"8.6": "model_sm86.plan", "12.0": "model_sm120.plan"}


def plan(capability: int, sha256: str) -> Plan:
    made = Manifest(
        model="encoder", version=1, target="tensorrt", precision="fp16", compute_capability=capability,
        toolkit_version="10.1", converter=1, source_sha256="ab", batches=Batches(), tolerance=0.1, plan_sha256=sha256,
    )  # fmt: skip
    return Plan(Path("model.plan"), made)


PLANS = {k: {"8.6": plan(86, f"{k}-86"), "12.0": plan(120, f"{k}-120")} for k in (1, 4)}


def meta(model: Any = "encoder", *, n_classes: int = 3, sha256: str = "ab") -> Meta:
    inputs = {
        "detector": {"image": Tensor(dtype="uint8", shape=(112, 112))},
        "encoder": {
            "crop": Tensor(dtype="uint8", shape=(56, 56)),
            "size": Tensor(dtype="float32", shape=(2,)),
        },
        "head": {"features": Tensor(dtype="float32", shape=(74,))},
    }[model]
    outputs = {
        "detector": {
            "score_map": Tensor(dtype="float32", shape=(8, 8)),
            "raw_score": Tensor(dtype="float32", shape=()),
        },
        "encoder": {"features": Tensor(dtype="float32", shape=(74,))},
        "head": {"logits": Tensor(dtype="float32", shape=(n_classes,))},
    }[model]
    return Meta(model=model, created_utc="now", inputs=inputs, outputs=outputs, weights_sha256=sha256)


OPEN_SHAPES = {
    "inputs": {"image": Tensor(dtype="uint8", shape=(OPEN, OPEN))},
    "outputs": {
        "score_map": Tensor(dtype="float32", shape=(OPEN, OPEN)),
        "raw_score": Tensor(dtype="float32", shape=()),
    },
}


def read(metas: dict[int, Meta], target: triton_config.Target, **options: Any) -> Any:
    text = triton_config.config_pbtxt(metas, target, **options)
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def test_model_without_versions_has_no_configuration() -> None:
    with pytest.raises(ValueError, match="empty"):
        triton_config.config_pbtxt({}, "onnx-python")


@pytest.mark.parametrize("target", triton_config.TARGETS)
@pytest.mark.parametrize("model", ["detector", "encoder", "head"])
def test_every_target_says_the_same_signature(target: triton_config.Target, model: str) -> None:
    one = meta(model)
    config = read({4: one}, target, plans=PLANS)
    types = {BYTE: "uint8", FLOAT: "float32"}
    for told, expected in ((config.input, one.inputs), (config.output, one.outputs)):
        found = {t.name: (types[model_config_pb2.DataType.Name(t.data_type)], tuple(t.dims)) for t in told}
        assert found == {name: (t.dtype, t.shape or (1,)) for name, t in expected.items()}
    assert (config.name, config.max_batch_size) == (model, triton_config.MAX_BATCH[model])
    assert list(config.version_policy.specific.versions) == [4]


@pytest.mark.parametrize("target", triton_config.TARGETS)
def test_queue_is_bounded_and_live_work_goes_first(target: triton_config.Target) -> None:
    batching = read({1: meta()}, target, plans=PLANS).dynamic_batching
    policy = batching.default_queue_policy
    assert batching.max_queue_delay_microseconds == (0 if target == "onnx-python" else triton_config.QUEUE_DELAY_US)
    assert (batching.priority_levels, batching.default_priority_level) == (2, triton_config.LIVE)
    assert triton_config.LIVE < triton_config.BACKLOG <= batching.priority_levels
    assert policy.timeout_action == model_config_pb2.ModelQueuePolicy.REJECT
    assert policy.allow_timeout_override
    assert policy.max_queue_size == triton_config.MAX_QUEUE > 0
    assert policy.default_timeout_microseconds == triton_config.QUEUE_TIMEOUT_S * 1e6


def test_onnx_runs_in_the_python_backend_on_the_processor() -> None:
    config = read({1: meta()}, "onnx-python", threads=2, environment=Path('/opt/a "b"'))
    (group,) = config.instance_group
    assert (config.backend, config.platform) == ("python", "")
    assert (group.count, group.kind) == (2, model_config_pb2.ModelInstanceGroup.KIND_CPU)
    (resource,) = group.rate_limiter.resources  # of both: one network at a time
    assert (resource.count, getattr(resource, "global")) == (1, True)
    assert config.parameters["threads"].string_value == "2"
    assert config.parameters["EXECUTION_ENV_PATH"].string_value == '/opt/a "b"'
    assert not config.cc_model_filenames


def test_images_are_not_put_together_on_a_processor_and_rows_are() -> None:
    found = {model: read({1: meta(model)}, "onnx-python") for model in ("detector", "encoder", "head")}
    assert {model: list(c.dynamic_batching.preferred_batch_size) for model, c in found.items()} == {
        "detector": [1],
        "encoder": [1],
        "head": [],
    }
    delays = {model: config.dynamic_batching.max_queue_delay_microseconds for model, config in found.items()}
    assert delays == {"detector": 0, "encoder": 0, "head": triton_config.QUEUE_DELAY_US}


def test_nothing_is_said_of_threads_and_environment_where_nothing_was_asked() -> None:
    assert set(read({1: meta()}, "onnx-python").parameters) == {"weights_sha256.1"}


def test_tensorrt_plans_are_told_by_compute_capability() -> None:
    config = read({1: meta()}, "tensorrt", plans=PLANS)
    assert (config.platform, config.backend) == ("tensorrt_plan", "")
    assert dict(config.cc_model_filenames) == FILES
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 16]
    assert config.optimization.cuda.graphs
    assert config.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_GPU
    assert list(config.instance_group[0].profile) == [str(k) for k, _ in enumerate(triton_config.PROFILE_BATCHES)]


def test_tensorrt_rtx_runs_in_the_python_backend_which_takes_the_gpu_itself() -> None:
    config = read({1: meta()}, "tensorrt-rtx", plans=PLANS)
    assert (config.backend, config.platform) == ("python", "")
    assert {cc: config.parameters[f"plan.{cc}"].string_value for cc in FILES} == FILES
    assert config.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_MODEL


@pytest.mark.parametrize(("target", "sizes"), [("onnx-python", [1]), ("tensorrt", [1, 4, 16])])
def test_warm_up_asks_for_every_input_in_every_tuned_batch(target: triton_config.Target, sizes: list[int]) -> None:
    config = read({1: meta()}, target, plans=PLANS)
    assert [warmup.batch_size for warmup in config.model_warmup] == sizes
    for warmup in config.model_warmup:
        assert {name: tuple(i.dims) for name, i in warmup.inputs.items()} == {"crop": (56, 56), "size": (2,)}


@pytest.mark.parametrize(
    ("target", "warmed", "preferred", "profiles"),
    [("onnx-python", [1], [1], []), ("tensorrt-rtx", [1, 4], [4], []), ("tensorrt", [1, 4], [4], ["0", "1"])],
)
def test_detector_of_any_size_leaves_its_sides_open_and_warms_up_at_the_typical_one(
    target: triton_config.Target, warmed: list[int], preferred: list[int], profiles: list[str]
) -> None:
    config = read({1: meta("detector").model_copy(update=OPEN_SHAPES)}, target, plans=PLANS)
    assert [list(tensor.dims) for tensor in (*config.input, *config.output)] == [[-1, -1], [-1, -1], [1]]
    assert not any(tensor.allow_ragged_batch for tensor in config.input)  # so those alone of one size run together
    assert config.max_batch_size == 4
    assert [warmup.batch_size for warmup in config.model_warmup] == warmed
    assert {tuple(warmup.inputs["image"].dims) for warmup in config.model_warmup} == {(FIELD_SIDES_PX.typical,) * 2}
    assert list(config.dynamic_batching.preferred_batch_size) == preferred
    assert list(config.instance_group[0].profile) == profiles


def test_several_versions_serve_together_each_with_its_content_hash() -> None:
    config = read({2: meta("head", sha256="aa"), 7: meta("head", sha256="bb")}, "onnx-python")
    assert list(config.version_policy.specific.versions) == [2, 7]
    assert config.parameters[triton_config.sha256_key(2)].string_value == "aa"
    assert config.parameters[triton_config.sha256_key(7)].string_value == "bb"


@pytest.mark.parametrize("target", ["tensorrt-rtx", "tensorrt"])
def test_plans_of_a_fleet_are_told_apart_by_content_hash(target: triton_config.Target) -> None:
    parameters = read({1: meta(), 4: meta()}, target, plans=PLANS).parameters
    found = {
        (version, cc): parameters[triton_config.plan_sha256_key(version, cc)].string_value
        for version in (1, 4)
        for cc in FILES
    }
    assert found == {(1, "8.6"): "1-86", (1, "12.0"): "1-120", (4, "8.6"): "4-86", (4, "12.0"): "4-120"}
    assert parameters["plan_toolkit.4.12.0"].string_value == "10.1"


def test_versions_with_other_numbers_of_classes_leave_that_number_open() -> None:
    config = read({1: meta("head"), 2: meta("head", n_classes=4)}, "onnx-python")
    assert list(config.output[0].dims) == [-1]
    assert list(config.input[0].dims) == [74]


def test_one_number_per_item_travels_as_an_axis_of_one() -> None:
    score = read({1: meta("detector")}, "onnx-python").output[1]
    assert (list(score.dims), score.HasField("reshape"), list(score.reshape.shape)) == ([1], True, [])


def test_versions_with_other_axes_do_not_fit_together() -> None:
    with pytest.raises(ValueError, match="longer"):
        triton_config.dims([(3,), (3, 1)])
