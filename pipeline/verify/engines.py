"""Targets whose artifact is an engine: built, judged and timed on a board or a GPU of this machine, or left unbuilt."""

from __future__ import annotations

from collections.abc import Mapping

from safetensors.torch import load_file

from ...devices.device import Device
from ...devices.pool import BoardDevice, Pool
from ...devices.tensorrt.boards_of import boards_of
from ...devices.transport.base import BoardError
from ...targets.base import Target
from ..errors import BuildError
from ..run_context import Run
from ..run_folder import Stage
from ..task.inference import artifact_logits
from ..types import Accuracy, Artifact, Kind, SearchResult, TargetResult, Verdict
from . import engine_answers
from .engine_steps import EngineWork, SimulatedError
from .gates import compare, judge
from .references import References

ABSENT = (
    "no engine was built: there is no board with TensorRT (--device NAME) and no TensorRT with a CUDA GPU on this machine;"
    " artifacts/{name}/build.sh builds it on the board"
)


def remarks(found: SearchResult) -> list[str]:
    """What the report has to say of a search that measured nothing."""
    if found.best.latency_kind is not Kind.ESTIMATED:
        return []
    return [
        "The search had no board: what it calls latency is estimated, a roofline with a floor for each layer, and tells"
        " structures of one precision from each other. It is no time of any device, and what int8 saves is not in it"
        " (docs/jetson.md)."
    ]


def unbuilt(run: Run, before: Stage, target: Target, artifact: Artifact, references: References, why: str) -> TargetResult:
    """What is known without an engine: the accuracy of the file's arithmetic. No gate on latency can be passed."""
    accuracy = _simulated(run, before, target, artifact, references)
    reasons = [why, *_over(accuracy, run.config.max_accuracy_drop)]
    return TargetResult("not_built", Verdict(False, tuple(reasons)), artifact, accuracy)


def breaks_a_gate(result: TargetResult, max_drop_pp: float) -> bool:
    """Whether a result makes a run fail: what was not built does so only by what is known of it all the same."""
    if result.status == "not_built":
        return result.accuracy is None or bool(_over(result.accuracy, max_drop_pp))
    return not result.verdict.passed


def finished(run: Run, before: Stage, target: Target, artifact: Artifact, references: References, place: Device) -> TargetResult:
    """The engine, its accuracy on the test split and its latency, all on one board; and the gates.

    Of a class it is any free board; when that fails, another one begins anew. What TensorRT itself refuses to build is a failed
    target. An engine that a stand-in made is no engine.
    """
    config = run.config
    boards = boards_of(place)
    on_each: dict[BoardDevice, EngineWork] = {one: EngineWork(run, before, target, artifact, one) for one in boards}
    try:
        done = next((work for work in on_each.values() if work.is_done), None)
        if done is None:
            done = _on_one(run, place, on_each)
        engine, answers, seen, timing, golden = done.engine(), done.answers(), done.beside_file(), done.timing(), done.golden()
    except SimulatedError as error:
        return unbuilt(run, before, target, artifact, references, f"no engine was built: {error}")
    except BuildError as error:
        return TargetResult("failed", Verdict(False, (str(error),)), artifact)
    accuracy = engine_answers.accuracy(run, answers, references)
    verdict = judge(
        accuracy,
        timing,
        max_drop_pp=config.max_accuracy_drop,
        min_speedup=config.min_speedup,
        seen=seen,
        size_bytes=engine.file.size_bytes,
        max_size_bytes=config.max_size,
    )
    return TargetResult("ok", verdict, engine, accuracy, timing, golden, seen)


def _on_one(run: Run, place: Device, on_each: Mapping[BoardDevice, EngineWork]) -> EngineWork:
    """Do all the work on one board, which is this process's meanwhile."""
    if not isinstance(place, Pool):
        (alone,) = on_each.values()
        with alone.device.leased():
            alone.do()
        return alone
    runtime, threads = "tensorrt", run.config.threads
    place.facts(runtime, threads)  # asked once, while no board is taken

    def work(device: BoardDevice) -> EngineWork:
        found = on_each[device]
        with found.device.leased():
            place.require_alike(device, runtime, threads)
            try:
                found.do()
            except BoardError as error:
                found.forget()
                run.notes.append(f"{found.target.name}: a board failed, and the engine was built anew on another one: {error}")
                raise
        return found

    return place.on_any(work)


def _simulated(run: Run, before: Stage, target: Target, artifact: Artifact, references: References) -> Accuracy:
    stage = run.folder.stage(f"accuracy-{target.name}", "1", {}, (before.key, artifact.file.sha256, references.logits.sha256))
    accuracy = stage.result(Accuracy)
    if accuracy is None:
        with run.stage(f"simulate {target.name}"):
            test = run.loaded.data.test
            found = artifact_logits(target, run.folder.path / artifact.file.path, test, run.loaded.subject.preprocess)
            kind = target.simulation
            known = load_file(run.folder.path / references.logits.path)
            accuracy = compare(found, known["pruned"].numpy(), known["dense"].numpy(), test.labels, kind)
        stage.finish(accuracy)
    return accuracy


def _over(accuracy: Accuracy, max_drop_pp: float) -> list[str]:
    if accuracy.drop_pp <= max_drop_pp:
        return []
    return [f"accuracy: top-1 fell by {accuracy.drop_pp:.2f} points ({accuracy.kind}), at most {max_drop_pp:g} allowed"]
