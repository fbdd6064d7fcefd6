"""The phone target: what can be said without its packages, and with them what the files are and what cutting them gives."""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from contextlib import closing
from dataclasses import replace

import nets
import numpy as np
import pytest
import torch
from edge_compress.calibration.ranges import METHODS, ranges
from edge_compress.devices.local import LocalDevice, describe
from edge_compress.pipeline.axes.cutting.surgery import cut
from edge_compress.pipeline.errors import BuildError, UnavailableError, install_hint
from edge_compress.pipeline.evaluate.unit_prober import by_layer, first_units
from edge_compress.pipeline.options import Precision
from edge_compress.pipeline.reconstruct.gptq import round_weights
from edge_compress.pipeline.signature import image_signature
from edge_compress.targets import phone
from edge_compress.targets.base import BuildRequest, Interface, Structure
from edge_compress.targets.tflite import (
    edit as tflite_cut,
)
from edge_compress.targets.tflite import (
    file as tflite_file,
)
from edge_compress.targets.tflite import (
    layers as tflite_layers,
)
from edge_compress.targets.tflite import (
    prober as tflite_prober,
)
from edge_compress.targets.tflite.run import predictor
from torch import nn

SHAPE = (3, 12, 12)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
lacking = phone.TARGET.missing()
converts = pytest.mark.skipif(lacking is not None, reason=f"phone: {lacking}")


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(3).integers(0, 256, (24, *SHAPE)).astype(np.float32)


@pytest.fixture(scope="module")
def inputs(pixels):
    mean, std = (np.array(v, np.float32).reshape(1, 3, 1, 1) for v in (MEAN, STD))
    return ((pixels / 255 - mean) / std).astype(np.float32)


@pytest.fixture(scope="module")
def images(pixels):
    """What the files take."""
    return pixels.transpose(0, 2, 3, 1).astype(np.uint8)


@pytest.fixture(scope="module")
def net(tiny):
    """The network with distinct weights: what the prober converts."""
    return tflite_prober.distinct(tiny)


@pytest.fixture(scope="module")
def checked(net):
    return nets.checked_of(net, SHAPE)


def halves(checked, *blocks: str) -> Structure:
    """The first half of every group's units, without some branches."""
    units = nets.units(checked.coupling)
    return Structure({name: (len(some) // 2, len(some)) for name, some in units.items()}, blocks)


def cut_to(checked, structure: Structure) -> nn.Module:
    return cut(checked.coupling, first_units(structure), checked.sized).eval()


@pytest.fixture(scope="module")
def prober(net):
    patch = pytest.MonkeyPatch()
    patch.setattr(tflite_prober, "distinct", lambda module: module)
    with patch.context():
        made = phone.TARGET.prober(net, image_signature(SHAPE), Precision.INT8)
    patch.undo()
    return made


def int8_request(module, images, score, folder):
    return BuildRequest(
        module=module,
        baseline=phone.TARGET.baseline(module, Interface(image_signature(SHAPE), tuple("abcde"), MEAN, STD)),
        signature=image_signature(SHAPE),
        classes=tuple("abcde"),
        precision=Precision.INT8,
        calibration=[images[:12]],
        score=score,
        folder=folder,
        mean=MEAN,
        std=STD,
    )


@pytest.fixture(scope="module")
def built(tiny, inputs, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("phone")
    with torch.no_grad():
        expected = tiny(torch.from_numpy(inputs)).argmax(1).numpy()

    def score(predict):
        return 100.0 * float((predict(images).argmax(1) == expected).mean())

    request = int8_request(tiny, images, score, folder)
    return folder, phone.TARGET.build(request), request


def shapes(model):
    """Operator, shapes of its inputs and of its output, for every operator in order."""
    graph = tflite_file.graph_of(model)

    def shape(i):
        return tuple(int(n) for n in graph.tensors[i].shape)

    return [
        (tflite_file.op_name(model, op), tuple(shape(i) for i in op.inputs if i >= 0), shape(op.outputs[0]))
        for op in graph.operators
    ]


# ------------------------------------------------------------------------------------------------- without the packages


def test_missing_packages_and_machines_without_a_converter_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(phone, "find_spec", lambda name: None if name == "ai_edge_quantizer" else object())
    assert phone.TARGET.missing() == f"packages are missing (ai-edge-quantizer): {install_hint('phone')}"
    with pytest.raises(UnavailableError, match="ai-edge-quantizer"):
        phone.TARGET.prober(nn.Identity(), image_signature(SHAPE), Precision.INT8)
    monkeypatch.setattr(phone, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match="ai-edge-litert is not installed"), phone.TARGET.runner(tmp_path / "x.tflite"):
        pass
    monkeypatch.setattr(phone.platform, "system", lambda: "Linux")
    monkeypatch.setattr(phone.platform, "machine", lambda: "aarch64")
    assert "no wheel for Linux aarch64" in phone.TARGET.missing()


def test_what_is_no_tflite_file_is_refused():
    with pytest.raises(BuildError, match=r"no \.tflite file"):
        tflite_file.graph_of(tflite_file.read(b"\x00\x00\x00\x00PK34"))


# ------------------------------------------------------------------------------------------------------ cutting the file


@converts
def test_a_cut_network_computes_what_the_pruned_network_computes(checked, prober, pixels):
    """Only the first channels stay and one block goes: LiteRT on the cut file against torch on the pruned network."""
    for units in (
        halves(checked),
        Structure({}, ("block:c.conv2",)),
        halves(checked, "block:a.conv2", "block:d.conv2"),
    ):
        structure = by_layer(checked.coupling, units)
        data = tflite_file.write(tflite_cut.cut(tflite_file.read(prober.network), prober._names, structure))
        with torch.no_grad():
            expected = cut_to(checked, units)(torch.from_numpy((pixels / 255 - 0.5) / 0.5)).numpy()
        found = predictor(data)(pixels.transpose(0, 2, 3, 1))
        assert np.ptp(expected) > 0.1
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
        assert len(data) < len(prober.network)


@converts
def test_a_cut_file_is_what_converting_the_pruned_network_gives(checked, prober):
    from edge_compress.targets.tflite.convert import convert
    from edge_compress.targets.tflite.int8 import collect, quantize

    units = halves(checked, "block:c.conv2")
    structure = by_layer(checked.coupling, units)
    converted, _ = convert(cut_to(checked, units), image_signature(SHAPE), (0.5,) * 3, (0.5,) * 3)
    assert shapes(tflite_cut.cut(tflite_file.read(prober.network), prober._names, structure)) == shapes(
        tflite_file.read(converted)
    )
    images = np.random.default_rng(0).integers(0, 256, (4, *SHAPE[1:], 3)).astype(np.float32)
    whole = tflite_file.read(quantize(converted, ranges(collect(converted, [images]), "min-max")))
    small = tflite_file.read(prober.candidate(structure))
    assert shapes(small) == shapes(whole)
    kinds = [[t.type for t in tflite_file.graph_of(m).tensors] for m in (small, whole)]
    assert Counter(kinds[0]) == Counter(kinds[1])
    assert predictor(prober.candidate(structure))(np.zeros((1, *SHAPE[1:], 3), np.float32)).shape == (1, 5)


@converts
def test_cutting_leaves_the_dense_network_as_it_was(prober):
    before = prober.candidate(Structure({}))
    narrow = Structure({"a.conv1": (8, 4), "a.conv2": (4, 8)}, ("c.conv2",))
    assert len(prober.candidate(narrow)) < len(before)
    assert prober.candidate(Structure({})) == before


@converts
def test_a_structure_that_does_not_fit_is_refused(prober):
    with pytest.raises(BuildError, match="layer nowhere is not"):
        prober.candidate(Structure({"nowhere": (1, 1)}))
    with pytest.raises(BuildError, match=r"a\.conv2"):
        prober.candidate(Structure({"a.conv1": (8, 4)}))  # its reader still wants eight
    with pytest.raises(BuildError, match="cannot be removed"):
        prober.candidate(Structure({}, ("head",)))


@converts
def test_candidates_are_measured_in_litert(prober):
    assert describe("litert")["runtime_version"][0].isdigit()
    with closing(LocalDevice().meter(prober.network, "litert", 1, 0)) as meter:
        assert meter.dense_ms > 0
        assert 0 < meter.ratio(prober.candidate(Structure({}))).value < 20
        with pytest.raises(BuildError, match="candidate of the search"):
            meter.ratio(b"not a network")


# ------------------------------------------------------------------------------------------------------------ artifacts


@converts
def test_the_artifact_takes_pixels_and_both_files_compute_the_network(built, inputs, images):
    folder, artifact, request = built
    with torch.no_grad():
        expected = request.module(torch.from_numpy(inputs)).numpy()
    with phone.TARGET.runner(folder / "baseline.tflite") as dense, phone.TARGET.runner(folder / "model.tflite") as model:
        assert np.abs(dense(images) - expected).max() < 1e-4 * np.abs(expected).max()
        assert np.corrcoef(model(images).ravel(), expected.ravel())[0, 1] > 0.99
        assert model(images[:0]).shape == (0, 5)
    assert artifact.file.size_bytes < artifact.baseline.size_bytes
    assert artifact.options["transposes"] == "0"
    assert int(artifact.options["delegates"]) >= 1
    assert len(artifact.choices) == 5  # float and every way to take ranges
    assert artifact.options["rounding"] == "nearest"  # the request offers nothing else
    assert sorted(path.name for path in folder.iterdir()) == ["baseline.tflite", "model.tflite"]


@converts
@pytest.mark.parametrize(("last", "rounding"), [(89.9, "compensated"), (88.01, "nearest")])
def test_weights_rounded_together_are_taken_where_int8_costs_too_much_and_they_repay_it(
    built, inputs, images, tmp_path, last, rounding
):
    figures = iter([90.0, *[88.0] * len(METHODS), last])
    rounded = round_weights(built[2].module, [inputs[:12]])
    request = replace(built[2], score=lambda predict: next(figures), folder=tmp_path, rounded=lambda steps: rounded)
    artifact = phone.TARGET.build(request)
    assert artifact.options["rounding"] == rounding
    assert artifact.choices[-1] == f"min-max ranges, 8-bit weights rounded by GPTQ: {last:.2f} %"
    with phone.TARGET.runner(tmp_path / "model.tflite") as run, torch.no_grad():
        found = run(images)
        own, other = (np.abs(found - net(torch.from_numpy(inputs)).numpy()).mean() for net in (rounded, request.module))
    assert (own < other) == (rounding == "compensated")


@converts
def test_int8_input_is_the_pixel_minus_128_without_knowing_anything_of_us(built, images):
    from ai_edge_litert.interpreter import Interpreter

    folder, _, _ = built
    interpreter = Interpreter(model_path=str(folder / "model.tflite"))
    interpreter.allocate_tensors()
    (image,), (logits,) = interpreter.get_input_details(), interpreter.get_output_details()
    assert (image["name"], tuple(image["shape"]), image["dtype"]) == ("image", (1, 12, 12, 3), np.int8)
    assert image["quantization"] == (1.0, -128)
    assert logits["dtype"] is np.int8
    interpreter.set_tensor(image["index"], (images[:1].astype(int) - 128).astype(np.int8))
    interpreter.invoke()
    with phone.TARGET.runner(folder / "model.tflite") as run:
        answers = run(images[:1])
    scale, zero = logits["quantization"]
    assert np.allclose((interpreter.get_tensor(logits["index"]).astype(np.float32) - zero) * scale, answers)


@converts
def test_weights_are_int8_per_channel_and_aligned_and_names_are_short(built):
    folder, _, _ = built
    data = (folder / "model.tflite").read_bytes()
    model = tflite_file.read(data)
    graph = tflite_file.graph_of(model)
    found = 0
    for op in graph.operators:
        if tflite_file.op_name(model, op) in tflite_layers.LAYER_OPS:
            weight = graph.tensors[op.inputs[1]]
            assert tflite_file.constant(model, weight).dtype == np.int8
            axis = weight.quantization.quantizedDimension
            assert len(weight.quantization.scale) == weight.shape[axis]
            found += 1
    assert found == 13
    start = np.frombuffer(data, np.uint8).ctypes.data
    places = [buffer.data.ctypes.data - start for buffer in model.buffers if isinstance(buffer.data, np.ndarray)]
    assert len(places) > 26
    assert all(0 < at < len(data) and at % tflite_file.ALIGNMENT == 0 for at in places)
    assert max(len(tensor.name) for tensor in graph.tensors) <= 8


@converts
def test_labels_metadata_and_record_are_inside(built):
    from edge_compress.targets.tflite import metadata as metadata

    folder, _, _ = built
    data = (folder / "model.tflite").read_bytes()
    assert zipfile.Path(folder / "model.tflite", "labels.txt").read_text().splitlines() == list("abcde")
    assert metadata.entry(data, "TFLITE_METADATA")[4:8] == b"M001"
    assert json.loads(metadata.entry(data, "EDGE_COMPRESS"))["mean"] == list(MEAN)
    assert metadata.entry(data, "nothing") is None


@converts
def test_input_and_output_are_float_when_asked_for_and_half_precision_halves_the_file(built, inputs, images):
    from edge_compress.targets.tflite.int8 import collect, halve, quantize

    folder, _, request = built
    dense = (folder / "baseline.tflite").read_bytes()
    found = ranges(collect(dense, [images]), "min-max")
    data = quantize(dense, found, float_io=True)
    counts = tflite_file.op_counts(data)
    assert (counts["QUANTIZE"], counts["DEQUANTIZE"]) == (1, 1)
    half = halve(dense)
    assert 0.4 < len(half) / len(dense) < 0.7
    with torch.no_grad():
        expected = request.module(torch.from_numpy(inputs)).numpy()
    for file, close in ((data, 0.99), (half, 0.99999)):
        assert np.corrcoef(predictor(file)(images).ravel(), expected.ravel())[0, 1] > close


@converts
def test_files_that_cannot_be_loaded_are_named(tmp_path):
    path = tmp_path / "net.tflite"
    for content in (b"not a network", b"\x00\x00\x00\x00TFL3" + bytes(8)):
        path.write_bytes(content)
        with pytest.raises(BuildError, match=r"net\.tflite"), phone.TARGET.runner(path):
            pass
    with pytest.raises(BuildError, match=r"gone\.tflite cannot be read"), phone.TARGET.runner(tmp_path / "gone.tflite"):
        pass


@converts
def test_dynamic_files_keep_float_activations_and_int8_weights(built, inputs, images, net, prober):
    folder, _, request = built
    dynamic = phone.TARGET.build(replace(request, precision=Precision.DYNAMIC, folder=folder / "dynamic"))
    data = (folder / "dynamic" / "model.tflite").read_bytes()
    model = tflite_file.read(data)
    graph = tflite_file.graph_of(model)
    layers = [op for op in graph.operators if tflite_file.op_name(model, op) in ("CONV_2D", "FULLY_CONNECTED")]
    assert {tflite_file.constant(model, graph.tensors[op.inputs[1]]).dtype for op in layers} == {np.dtype(np.int8)}
    assert {graph.tensors[i].type for op in layers for i in (op.inputs[0], op.outputs[0])} == {0}  # float32
    assert (tflite_file.op_counts(data)["QUANTIZE"], tflite_file.op_counts(data)["DEQUANTIZE"]) == (0, 0)
    assert dynamic.file.size_bytes < 0.6 * dynamic.baseline.size_bytes
    assert any("nothing was calibrated" in note for note in dynamic.notes)
    with torch.no_grad():
        expected = request.module(torch.from_numpy(inputs)).numpy()
    with phone.TARGET.runner(folder / "dynamic" / "model.tflite") as run:
        assert np.corrcoef(run(images).ravel(), expected.ravel())[0, 1] > 0.99
    small = Structure({"a.conv1": (8, 4), "a.conv2": (4, 8)}, ("c.conv2",))
    made = tflite_prober.TfliteProber(net, image_signature(SHAPE), Precision.DYNAMIC, pixels=True)
    assert predictor(made.candidate(small))(images[:1]).shape == (1, 5)
    assert len(made.candidate(small)) < len(made.candidate(Structure({}))) < len(made.network)


class Odd(nn.Module):
    def forward(self, x):
        return x.kthvalue(2, dim=1).values


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.stage = nn.Sequential(nn.ReLU(), Odd())

    def forward(self, x):
        return self.stage(self.conv(x)).mean(dim=2)


@converts
def test_an_operator_that_does_not_convert_is_named_with_its_module(monkeypatch):
    with pytest.raises(BuildError, match=r"aten\.kthvalue\S* in .*stage\.1.*replace this operation"):
        phone.TARGET.prober(Holder(), image_signature(SHAPE), Precision.INT8)


@converts
def test_the_padding_in_front_of_a_maximum_is_no_observation_and_costs_nothing(inputs, images, tmp_path):
    torch.manual_seed(0)
    stem = torch.nn.Sequential(  # of every ResNet
        torch.nn.Conv2d(SHAPE[0], 8, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(3, 2, 1),
        torch.nn.Conv2d(8, 8, 3),
        torch.nn.MaxPool2d(3, 2, 1),  # of negative numbers too
        torch.nn.Flatten(),
        torch.nn.LazyLinear(5),
    ).eval()
    with torch.no_grad():
        expected = stem(torch.from_numpy(inputs)).numpy()

    def score(predict):
        return 100.0 * float((predict(images).argmax(1) == expected.argmax(1)).mean())

    artifact = phone.TARGET.build(int8_request(stem, images, score, tmp_path))
    assert artifact.precision == "int8"
    with phone.TARGET.runner(tmp_path / "model.tflite") as model:
        assert np.corrcoef(model(images).ravel(), expected.ravel())[0, 1] > 0.99
