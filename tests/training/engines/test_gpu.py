"""The GPU run, tried out on the processor with tiny networks; what needs a GPU says so and is skipped."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from gpu_run import measure, networks
from gpu_run import run as whole_run
from gpu_run.__main__ import gpu
from gpu_run.networks import Pair
from gpu_run.run import Order
from semwatch.errors import ConfigError
from semwatch_training.engines import parity
from semwatch_training.families.branch.segmentation_branch import BranchForm
from semwatch_training.families.ni.ni_detector import DetectorForm, DetectorGraph, NIDetector
from semwatch_training.families.smg_vit.smg_vit import EncoderForm, EncoderGraph, SmgVit
from tiny_models import DETECTOR, ENCODER, convolutional, trunk

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
LOW = [torch.bfloat16, torch.float16]


def tiny() -> Pair:
    """The paper's pair, small."""
    return networks.paper("tiny", trunk(), DETECTOR, ENCODER)


def tiny_shipped() -> Pair:
    """A branch alone for detection, two trunks for the encoder: what ships, small."""
    second = convolutional()
    form = DetectorForm(evidence="branch", branch=BranchForm(input_px=128, width=8), input_px=128)
    torch.manual_seed(1)
    detector = DetectorGraph(None, NIDetector(form), second).eval()
    encoder = EncoderForm(trunk="tiny", input_px=112, pooled_layers=(1,), guided_layers=2, second_stages=(3,))
    return Pair("tiny shipped", "random", detector, EncoderGraph(SmgVit(trunk(), encoder), second).eval())


def worst(pair: Pair, dtype: torch.dtype, device: str = "cpu") -> dict[str, float]:
    """Differences of both networks to fp32, by output."""
    inputs = whole_run.looked_at(pair, 2)
    found = {}
    names = {"detector": ("score_map", "raw_score"), "encoder": ("features",)}
    for part, graph in (("detector", pair.detector), ("encoder", pair.encoder)):
        fed = [torch.from_numpy(array) for array in inputs[part].values()]
        with torch.no_grad():
            expected = whole_run._answers(graph, fed, names[part])
            lowered = networks.lowered(graph, dtype, device)
            found |= parity.differences(expected, whole_run._answers(lowered, [x.to(device) for x in fed], names[part]))
    return found


# --- the networks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny, tiny_shipped])
def test_folded_and_fused_networks_answer_the_same_in_fp32(make) -> None:
    assert max(worst(make(), torch.float32).values()) < 1e-5


@pytest.mark.parametrize("make", [tiny, tiny_shipped])
@pytest.mark.parametrize("dtype", LOW)
def test_low_precision_stays_close(make, dtype: torch.dtype) -> None:
    found = worst(make(), dtype)
    assert 1e-6 < max(found.values()) < {torch.bfloat16: 1e-1, torch.float16: 2e-2}[dtype]


def test_network_that_is_lowered_is_a_copy() -> None:
    pair = tiny()
    before = {name: value.clone() for name, value in pair.detector.state_dict().items()}
    networks.lowered(pair.detector, torch.bfloat16, "cpu")
    for name, value in pair.detector.state_dict().items():
        assert torch.equal(value, before[name])


def test_literal_attention_with_a_bias_is_fused_too() -> None:
    form = EncoderForm(trunk="tiny", input_px=56, pooled_layers=(0,), guided_layers=2, second_trunk="",
                       attention="literal")  # fmt: skip
    pair = networks.paper("tiny", trunk(), DETECTOR, form)
    assert worst(pair, torch.float32)["features"] < 1e-5


def test_networks_have_no_break_that_would_keep_them_from_being_compiled() -> None:
    pair = tiny()
    (image,) = whole_run._first(whole_run.looked_at(pair, 1)["detector"], 1, "cpu")
    lowered = networks.lowered(pair.detector, torch.float32, "cpu")
    with torch.no_grad():
        quick = torch.compile(lowered, backend="eager", fullgraph=True)
        torch.testing.assert_close(quick(image), lowered(image))


def test_size_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no size 'vit-h'; there are shipped, vit-s, vit-b"):
        networks.make("vit-h", tmp_path)


def test_shipped_networks_are_not_timed_and_the_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fields at any size"):
        networks.make("shipped", tmp_path)


# --- floor and time --------------------------------------------------------------------------------------------------


def test_operations_are_those_that_a_matrix_product_has() -> None:
    linear = torch.nn.Linear(300, 500, bias=False)
    assert measure.gflop(linear, [torch.zeros(7, 300)]) == pytest.approx(2 * 7 * 300 * 500 / 1e9)
    assert linear.weight.device.type == "cpu"


def test_count_of_the_papers_networks_is_that_of_the_method() -> None:
    """METHOD section 5 counts by formula, the run by what is called."""
    with torch.device("meta"):
        pair = networks.make("vit-b", Path("none"))
    image, crop = (torch.zeros(1, side, side, dtype=torch.uint8) for side in (448, 224))
    detector = measure.gflop(pair.detector, [image])
    encoder = measure.gflop(pair.encoder, [crop, torch.zeros(1, 16, 16), torch.zeros(1, 2)])
    expected = whole_run.METHOD_GFLOP["vit-b"]
    assert detector == pytest.approx(expected["detector"], rel=whole_run.COUNT_TOLERANCE)
    assert encoder == pytest.approx(expected["encoder"], rel=whole_run.COUNT_TOLERANCE)


def test_every_call_is_timed() -> None:
    calls = []
    found = measure.times(lambda: calls.append(1), "cpu", 5)
    assert (len(found), len(calls)) == (5, 5 + measure.WARM_UP)
    assert min(found) >= 0


# --- the run ---------------------------------------------------------------------------------------------------------


def test_run_without_networks_reports_the_peak_alone(tmp_path: Path) -> None:
    report = whole_run.run(tmp_path, [], "cpu", Order())
    assert report.peak_tflops > 0
    assert report.rows == report.parity == []
    assert "no CUDA device" in report.left_out[0]


def test_run_writes_times_floors_and_parity(tmp_path: Path) -> None:
    report = whole_run.run(tmp_path, [tiny, tiny_shipped], "cpu", Order(batches=(1, 2), repeats=1, images=1))
    assert {(row.size, row.part, row.batch) for row in report.rows} == {
        (size, part, batch)
        for size in ("tiny", "tiny shipped")
        for part in ("detector", "encoder", "both")
        for batch in (1, 2)
    }
    for row in report.rows:
        assert (row.way, row.precision) == ("eager", "fp32")
        assert row.ms_per_image > 0
        assert row.floor_ms == pytest.approx(row.gflop_per_image / report.peak_tflops)
        assert row.ratio == pytest.approx(row.ms_per_image / row.floor_ms)
    both = [row.gflop_per_image for row in report.rows if row.size == "tiny" and row.batch == 1]
    assert both[2] == pytest.approx(both[0] + both[1])
    assert {(p.part, p.precision) for p in report.parity} == {
        (part, precision) for part in ("detector", "encoder") for precision in ("bf16", "fp16")
    }
    kept = json.loads((tmp_path / "report.json").read_bytes())
    assert kept["rows"] == [row.model_dump() for row in report.rows]
    text = (tmp_path / "report.txt").read_text()
    assert "left out: CUDA graphs" in text
    assert "tiny shipped" in text


def test_higher_peak_lowers_every_floor_and_a_beaten_floor_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = iter([1e-9, 2e-9])
    monkeypatch.setattr(measure, "peak_tflops", lambda *_: next(peaks))
    report = whole_run.run(tmp_path, [tiny], "cpu", Order(batches=(1,), repeats=1, images=1))
    assert report.peak_tflops == 2e-9
    assert all(row.floor_ms == pytest.approx(row.gflop_per_image / 2e-9) for row in report.rows)
    assert "3 times lie below it" in report.left_out[-1]
    assert "a sound floor" in (tmp_path / "report.txt").read_text()


def test_run_that_is_cut_off_keeps_what_it_has(tmp_path: Path) -> None:
    def cut() -> Pair:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        whole_run.run(tmp_path, [tiny, cut], "cpu", Order(batches=(1,), repeats=1, images=1))
    assert len(json.loads((tmp_path / "report.json").read_bytes())["rows"]) == 3


def test_command_refuses_what_is_not_there(tmp_path: Path) -> None:
    import typer

    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(gpu)
    said = CliRunner().invoke(app, ["--out", str(tmp_path), "--device", "tpu"])
    assert "there are cuda and cpu" in str(said.exception)
    if not torch.cuda.is_available():
        said = CliRunner().invoke(app, ["--out", str(tmp_path)])
        assert "no CUDA device here; --device cpu" in str(said.exception)


# --- with a GPU ------------------------------------------------------------------------------------------------------


@CUDA
@pytest.mark.parametrize("make", [tiny, tiny_shipped])
@pytest.mark.parametrize("dtype", LOW)
def test_gpu_in_low_precision_is_close_to_the_processor_in_fp32(make, dtype: torch.dtype) -> None:
    assert max(worst(make(), dtype, "cuda").values()) < {torch.bfloat16: 1e-1, torch.float16: 2e-2}[dtype]


@CUDA
@pytest.mark.parametrize("make", [tiny, tiny_shipped])
def test_replay_of_a_cuda_graph_answers_as_the_network_does(make) -> None:
    pair = make()
    network = networks.lowered(pair.detector, torch.bfloat16, "cuda")
    (image,) = whole_run._first(whole_run.looked_at(pair, 2)["detector"], 2, "cuda")
    with torch.no_grad():
        replay, answer = measure.captured(lambda: network(image))
        image.copy_(255 - image)  # a graph reads its input's memory: what lies there now
        replay()
        torch.cuda.synchronize()
        for found, expected in zip(answer, network(image), strict=True):
            np.testing.assert_allclose(found.cpu(), expected.cpu(), rtol=1e-3, atol=1e-4)


@CUDA
def test_run_on_a_gpu_has_graphs_too(tmp_path: Path) -> None:
    report = whole_run.run(tmp_path, [tiny], "cuda", Order(batches=(1,), repeats=3, images=1, compiled=()))
    assert {row.way for row in report.rows} == {"eager", "graph"}
