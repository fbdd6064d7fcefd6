"""The work on one board: what is kept of it, and whether sparse kernels are."""

import json
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
from edge_compress.devices.access import open_board
from edge_compress.devices.board import Board
from edge_compress.devices.measure.timing import TimingSettings
from edge_compress.pipeline.config import Config
from edge_compress.pipeline.files import file_ref
from edge_compress.pipeline.options import Precision
from edge_compress.pipeline.run_folder import RunFolder
from edge_compress.pipeline.types import Artifact
from edge_compress.pipeline.verify.engine import steps as engine_work
from edge_compress.pipeline.verify.engine.steps import EngineWork
from jetsons import onnx_file


@pytest.fixture
def work(jetson, tmp_path, monkeypatch):
    """The work on a file that asks for sparse kernels, in a run folder of its own."""
    monkeypatch.setattr(engine_work, "TimingSettings", partial(TimingSettings, sessions=1, min_pairs=10, max_pairs=20))
    device = open_board(Board("nano", ("jetson",), "ssh", runtime="tensorrt", address="nano", python=sys.executable))
    with RunFolder(Config(targets=("jetson",), out=tmp_path / "run"), print) as folder:
        files = [onnx_file(folder.path / f"{name}.onnx", channels=8, sparse=name == "model") for name in ("model", "baseline")]
        model, baseline = (file_ref(file, folder.path) for file in files)
        artifact = Artifact(
            "jetson", model, "onnx", Precision.FP32, "input", (1, 3, 2, 2), options={"two_four_layers": "2"}, baseline=baseline
        )
        run = SimpleNamespace(folder=folder, config=folder._config)
        before = folder.stage("before", "1", {})
        yield EngineWork(run, before, SimpleNamespace(name="jetson"), artifact, device)  # type: ignore[arg-type]
    device.close()


@pytest.mark.parametrize(
    ("takes", "source", "said"),
    [
        (0.8, "model.onnx", "with them 1.25 times as fast as without (95 % interval 1.25 to 1.25): kept"),
        (
            1.0,
            "model-dense-kernels.onnx",
            "with them 1.00 times as fast as without (95 % interval 1.00 to 1.00): not faster, so left out",
        ),
        (
            1.25,
            "model-dense-kernels.onnx",
            "with them 0.80 times as fast as without (95 % interval 0.80 to 0.80): not faster, so left out",
        ),
    ],
    ids=["faster", "as fast", "slower"],
)
def test_sparse_kernels_are_kept_only_where_the_board_measured_them_faster(work, jetson, real, takes, source, said):
    jetson.tell(sparse=takes, eligible=["a", "b"], picked=["b"])
    engine = work.engine()
    assert engine.options["onnx"] == source
    assert f"2:4: 2 layers eligible, sparse kernels picked for 1; {said}" in engine.notes
    about = json.loads((work.run.folder.path / engine.file.path).read_bytes().partition(b"\n")[2])
    assert about["sparse"] == (takes if source == "model.onnx" else 1.0)  # the engine that was fetched is that one
    asked = [call for call in jetson.commands("--onnx=") if "--sparsity=enable" in call]
    assert len(asked) == 1  # the baseline is built without


def test_of_a_stamped_engine_neither_is_kept(work, jetson):
    with pytest.raises(Exception, match="stamped simulated"):
        work.engine()
    assert not list(work.run.folder.path.rglob("*.engine"))
    assert not jetson.commands("--exportTimes=")


def test_what_is_known_of_an_engine_is_not_taken_for_another_one_built_from_the_same_file(work, jetson, real):
    work = replace(work, artifact=replace(work.artifact, options={}))
    first = work.engine()
    known = work._stage("timing")
    assert work.engine() == first
    assert len(jetson.commands("--onnx=")) == 2  # kept, not built again
    (work.run.folder.path / first.file.path).write_bytes(b"damaged")
    jetson.tell(sparse=0.5)  # another engine of the same file
    with work.device.engines() as engines:
        engines.drop(engines.engine(work.run.folder.path / "model.onnx"))
    again = work.engine()
    assert again.file != first.file
    assert work._stage("timing").key != known.key
