"""A class of boards through Ray: one resource a board, an actor on its host, ratios from both, a board that no host has."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import peers
import pytest
from edge_compress.devices.access import open_pool
from edge_compress.devices.board import Board
from edge_compress.devices.cluster import ray_board
from edge_compress.devices.cluster.ray_board import RayBoard
from edge_compress.devices.measure.timing import TimingSettings
from edge_compress.devices.transport.base import BoardError
from edge_compress.pipeline.errors import BuildError, UnavailableError
from edge_compress.pipeline.types import Kind
from small_models import convolution

SETTINGS = TimingSettings(sessions=1, min_pairs=5, max_pairs=10, max_seconds=5.0, warmup_seconds=0.1)


def test_without_ray_the_extra_is_named(monkeypatch):
    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(ray_board, "_started", [])
    monkeypatch.setattr(ray_board.importlib, "import_module", absent)
    with pytest.raises(UnavailableError, match=r"pip install -c constraints.txt '\.\[cluster\]'"):
        RayBoard(Board("one", ("x86",), "ssh", address="loop")).facts("onnxruntime", 1)


@pytest.fixture(scope="module")
def cluster(server: peers.Sshd) -> Iterator[list[Board]]:
    """A cluster of one host with two boards, which are two folders of one sshd."""
    ray = pytest.importorskip("ray", reason="the extra [cluster] brings Ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(server.programs()), prepend=":")
        patch.setenv("RAY_ADDRESS", "local")
        patch.setenv("EDGE_COMPRESS_CACHE", str(server.folder / "cache"))
        patch.setattr(ray_board, "_started", [])
        ray.init(
            num_cpus=2,
            resources={"board:one": 1, "board:two": 1},
            include_dashboard=False,
            object_store_memory=100_000_000,
            _node_ip_address="127.0.0.1",
            log_to_driver=False,
            logging_level="ERROR",
        )
        try:
            yield [
                Board(
                    name,
                    ("x86",),
                    "ssh",
                    class_="bench",
                    address=host,
                    python=server.python,
                    folder=f"{server.board_folder}-{name}",
                )
                for name, host in (("one", "loop"), ("two", "loop2"))
            ]
        finally:
            ray.shutdown()


@pytest.mark.devices
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")
def test_boards_of_a_cluster_do_what_boards_here_do(cluster: list[Board], tmp_path: Path):
    dense, small = (convolution(tmp_path / f"{n}.onnx", n) for n in (128, 16))
    pool = open_pool("class:bench", cluster)
    assert pool.facts("onnxruntime", 1)["runtime_version"] == f"onnxruntime {onnxruntime.__version__}"
    with contextlib.closing(pool.meter(dense.read_bytes(), "onnxruntime", 1, 0)) as meter:
        ratios = meter.ratios([small.read_bytes(), dense.read_bytes(), small.read_bytes()])
        assert meter.dense_ms > 0
        assert meter.width == 2  # what a search expects goes to both
    assert ratios[0].value < 0.7
    assert ratios[1].value == pytest.approx(1.0, abs=0.5)
    for board in cluster:
        assert (Path(board.folder) / "lock").exists()  # both had some
    timing = pool.measure(dense, small, SETTINGS)
    assert timing.kind is Kind.MEASURED
    assert timing.device in ("one", "two")
    assert timing.speedup.median > 1.5
    image = np.random.default_rng(0).standard_normal((1, 16, 24, 24)).astype(np.float32)
    with pool.connect() as agent:
        model = agent.load(small, "onnxruntime", 1)
        there = model.run({"x": image})["y"]
        assert "Conv" in {kind for _, kind, _ in model.layers(5, 60.0)}
        assert agent.kind() is Kind.MEASURED
    np.testing.assert_array_equal(there, onnxruntime.InferenceSession(small).run(None, {"x": image})[0])
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    with pytest.raises(BuildError, match=r"broken\.onnx"):
        pool.measure(dense, broken, SETTINGS)
    pool.close()
    with pytest.raises(BoardError, match=r"no host of the cluster has the resource board:three.*ray start"):
        RayBoard(Board("three", ("x86",), "ssh", address="loop")).facts("onnxruntime", 1)
