"""What every target has to keep, run over whatever targets there are."""

import hashlib

import nets
import numpy as np
import pytest
import torch
from edge_compress import targets
from edge_compress.pipeline.codec import from_json, to_json
from edge_compress.pipeline.evaluate.unit_prober import UnitProber
from edge_compress.pipeline.options import Pattern, Precision
from edge_compress.pipeline.signature import image_signature
from edge_compress.pipeline.types import Artifact
from edge_compress.targets.base import BuildRequest, Interface, Limits, Structure

SHAPE = (3, 12, 12)


@pytest.fixture(params=targets.names())
def target(request):
    return targets.load(request.param)


@pytest.fixture
def ready(target):
    reason = target.missing()
    if reason:
        pytest.skip(f"{target.name}: {reason}")
    return target


def pixels(target, images):
    """What candidates take, of network inputs: artifacts that are told no mean take these as they are."""
    return images.transpose(0, 2, 3, 1) if target.takes_pixels else images


def build(target, net, images, folder, precision):
    given = images[:8]
    return target.build(
        BuildRequest(
            module=net,
            baseline=target.baseline(net, Interface(image_signature(SHAPE), tuple("abcde"))),
            signature=image_signature(SHAPE),
            classes=tuple("abcde"),
            precision=precision,
            calibration=[given],
            score=lambda predict: 100.0 * float((predict(given).argmax(1) == 0).mean()),
            folder=folder,
        )
    )


def test_there_is_a_target():
    assert targets.names()


def test_a_target_states_its_limits(target):
    assert target.name in targets.names()
    assert isinstance(target.limits, Limits)
    assert target.limits.channel_multiple >= 1
    for values, kind in ((target.limits.precisions, Precision), (target.limits.patterns, Pattern)):
        assert values
        assert len(set(values)) == len(values)
        assert all(isinstance(value, kind) for value in values)
    assert target.runtime
    reason = target.missing()
    assert reason is None or (reason and "\n" not in reason)


def test_an_artifact_is_what_its_record_says_and_runs(ready, tiny, images, tmp_path):
    artifact = build(ready, tiny, images, tmp_path, ready.limits.precisions[0])
    assert artifact.target == ready.name
    assert artifact.precision is ready.limits.precisions[0]
    assert artifact.baseline is not None
    for ref in (artifact.file, artifact.baseline):
        data = (tmp_path / ref.path).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (ref.sha256, ref.size_bytes)
    assert from_json(Artifact, to_json(artifact)) == artifact
    with torch.no_grad():
        expected = tiny(torch.from_numpy(images)).numpy()
    for ref, close in ((artifact.file, 0.95), (artifact.baseline, 0.9999)):
        with ready.runner(tmp_path / ref.path) as run:
            logits = run(images)
        assert logits.shape == expected.shape
        assert np.corrcoef(logits.ravel(), expected.ravel())[0, 1] > close


def test_candidates_of_units_are_smaller_and_run(ready, tiny, images, tmp_path):
    """Cut from the target's file, from its exported graph, or exported: as the target can."""
    checked, said = nets.checked_of(tiny, SHAPE), []
    prober = UnitProber(checked, ready, image_signature(SHAPE), ready.limits.precisions[0], said.append)
    whole, small = Structure({}), Structure({"b.conv1": (8, 16)}, ("block:c.conv2",))
    assert len(prober.candidate(small)) < len(prober.candidate(whole))
    for name, data, given in (
        ("candidate", prober.candidate(small), pixels(ready, images[:1])),
        ("baseline", ready.baseline(tiny, Interface(image_signature(SHAPE), tuple("abcde"))), images[:1]),
    ):
        path = tmp_path / name
        path.write_bytes(data)
        with ready.runner(path) as run:
            assert run(given).shape == (1, 5)
