import copy
import hashlib
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from edge_compress.pipeline.errors import BuildError
from edge_compress.pipeline.signature import Signature, TensorSpec, image_signature
from edge_compress.targets.onnx.export import export_float
from torch import nn

SHAPE = (3, 12, 12)


def run(model, images):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"input": image[None]})[0] for image in images])


def digest(model):
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


def test_the_graph_computes_what_the_module_computes(tiny, tiny_onnx, images):
    with torch.no_grad():
        expected = tiny(torch.from_numpy(images)).numpy()
    assert np.abs(run(tiny_onnx, images) - expected).max() < 1e-4
    assert np.ptp(expected) > 0.1


def test_batchnorm_is_folded_and_weights_keep_their_module_names(tiny, tiny_onnx):
    assert not any(node.op_type == "BatchNormalization" for node in tiny_onnx.graph.node)
    names = {initializer.name for initializer in tiny_onnx.graph.initializer}
    layers = [name for name, module in tiny.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert {f"{layer}.weight" for layer in layers} <= names
    assert {"stem.bias", "a.conv1.bias", "d.conv2.bias", "head.bias"} <= names
    assert [i.name for i in tiny_onnx.graph.input] == ["input"]
    assert [o.name for o in tiny_onnx.graph.output] == ["logits"]


def test_the_global_mean_becomes_the_pooling_that_has_an_int8_kernel(tiny_onnx):
    kinds = [node.op_type for node in tiny_onnx.graph.node]
    assert "GlobalAveragePool" in kinds
    assert "ReduceMean" not in kinds


def test_a_second_export_gives_the_same_bytes_and_leaves_the_module_as_it_was(tiny, tiny_onnx):
    module = copy.deepcopy(tiny).train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert digest(export_float(module, image_signature(SHAPE))) == digest(tiny_onnx)
    assert module.training
    assert isinstance(module.bn, nn.BatchNorm2d)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_another_process_gives_the_same_bytes_without_a_trace_of_the_machine(tiny_onnx):
    here = Path(__file__).parents[1]
    code = (
        "import hashlib, sys; sys.path.insert(0, sys.argv[1]); import conftest\n"
        "from edge_compress.targets.onnx.export import export_float\n"
        "from edge_compress.pipeline.signature import image_signature\n"
        "model = export_float(conftest.make_tiny(), image_signature((3, 12, 12)))\n"
        "print(hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", code, str(here)], capture_output=True, text=True, check=True, cwd="/")
    assert other.stdout.split() == [digest(tiny_onnx)]
    data = tiny_onnx.SerializeToString()
    for trace in (b"stack_trace", b".py", str(here).encode(), str(Path(torch.__file__).parent).encode()):
        assert trace not in data


def test_no_reshape_names_a_channel_count_or_a_batch(images):
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.pool = nn.AdaptiveAvgPool2d(1)
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            return self.head(torch.flatten(self.pool(self.conv(x)), 1))

    module = Pooled().eval()
    model = export_float(module, image_signature(SHAPE))
    values = {i.name: onnx.numpy_helper.to_array(i).tolist() for i in model.graph.initializer}
    targets = [values[node.input[1]] for node in model.graph.node if node.op_type == "Reshape"]
    assert targets == [[0, -1]]
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = module(torch.from_numpy(images)).numpy()
    assert np.abs(session.run(None, {"input": images})[0] - expected).max() < 1e-5


def test_a_module_that_fx_cannot_trace_is_exported_all_the_same(images):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.norm(self.conv(x)) if x.shape[1] > 2 else x
            return y.mean((2, 3))

    module = Branching().eval()
    with torch.no_grad():
        module.norm.running_mean.fill_(0.3)
        expected = module(torch.from_numpy(images)).numpy()
    assert np.abs(run(export_float(module, image_signature(SHAPE)), images) - expected).max() < 1e-5


def test_what_cannot_be_exported_is_one_line_and_no_warning_setting_stays_changed():
    class DataDependent(nn.Module):
        def forward(self, x):
            return x.mean((2, 3)) if x.sum() > 0 else x.sum((2, 3))

    filters = list(warnings.filters)
    with pytest.raises(BuildError) as caught:
        export_float(DataDependent(), image_signature(SHAPE))
    assert "\n" not in str(caught.value)
    assert "cannot be exported" in str(caught.value)
    assert warnings.filters == filters


def test_layers_with_equal_weights_keep_weights_of_their_own():
    first, second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
    second.load_state_dict(first.state_dict())
    net = nn.Sequential(nn.Sequential(first, nn.ReLU()), second, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    model = export_float(net, image_signature((4, 6, 6)))
    wanted = [["0.0.weight", "0.0.bias"], ["1.weight", "1.bias"]]
    assert [list(node.input[1:]) for node in model.graph.node if node.op_type == "Conv"] == wanted


class Normed(nn.Module):
    """A convolution with BatchNorm whose statistics are not those of a new one."""

    def __init__(self, *, tracks=True):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=tracks)
        if tracks:
            self.norm.running_mean.fill_(0.3)
            self.norm.running_var.fill_(0.4)

    def forward(self, x):
        return self.norm(self.conv(x)).mean((2, 3))


class Typed(Normed):
    """Data-independent control flow that symbolic tracing gets wrong: a torch.fx Proxy is not an instance of Tensor."""

    def forward(self, x):
        if isinstance(x, torch.Tensor):
            x = x * 2
        return super().forward(x)


class Reused(Normed):
    """The same, where what the convolution gives has a second user in the branch."""

    def forward(self, x):
        y = self.conv(x)
        found = self.norm(y)
        if isinstance(x, torch.Tensor):
            found = found + y
        return found.mean((2, 3))


class Masked(Normed):
    """An argument that is not given."""

    def forward(self, x, mask=None):
        y = self.norm(self.conv(x))
        if mask is not None:
            y = y * mask
        return y.mean((2, 3))


class NormAct(nn.BatchNorm2d):
    """BatchNorm by its function, and an activation, as in timm: the layer is more than its statistics."""

    def forward(self, x):
        return F.relu(F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps))


class Activated(Normed):
    """The same with a BatchNorm of the user's own class."""

    def __init__(self, *, bias=True):
        super().__init__()
        state = self.norm.state_dict()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=bias), NormAct(4)
        self.norm.load_state_dict(state)


class Unbiased(Activated):
    """The same after a convolution without bias."""

    def __init__(self):
        super().__init__(bias=False)


@pytest.mark.parametrize(
    ("make", "bias"),
    [
        *((make, "conv.bias") for make in (Normed, Typed, Masked, Activated)),
        (Unbiased, "conv.weight_bias"),  # by the exporter's own optimizer
        (Reused, None),
    ],
)
def test_folding_batchnorm_takes_the_same_branches_as_the_module(make, bias, images):
    module = make().eval()
    before = copy.deepcopy(module.state_dict())
    with torch.no_grad():
        expected = module(torch.from_numpy(images)).numpy()
    model = export_float(module, image_signature(SHAPE))
    assert np.abs(run(model, images) - expected).max() < 1e-5
    if bias is not None:
        assert [node.op_type for node in model.graph.node if "Norm" in node.op_type] == []
        assert {"conv.weight", bias} <= {i.name for i in model.graph.initializer}
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_batchnorm_that_keeps_no_statistics_normalises_by_those_of_its_input(images):
    module = Normed(tracks=False).eval()
    model = export_float(module, image_signature(SHAPE))
    with torch.no_grad():
        expected = torch.cat([module(torch.from_numpy(image[None])) for image in images]).numpy()
    assert np.abs(run(model, images) - expected).max() < 1e-5


@pytest.mark.parametrize(("layer", "shape"), [(nn.Linear(4, 4), (6, 4)), (nn.Conv3d(3, 4, 1), (3, 2, 4, 4))])
def test_means_of_tensors_that_are_no_images_keep_their_shape(layer, shape):
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x).mean((-2, -1))

    module = Mean().eval()
    inputs = np.random.default_rng(0).standard_normal((3, *shape), dtype=np.float32)
    with torch.no_grad():
        expected = module(torch.from_numpy(inputs)).numpy()
    model = export_float(module, Signature((TensorSpec("input", shape),), (TensorSpec("y", expected.shape[1:]),)))
    found = run(model, inputs)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-5
