"""The result of a target whose artifact is an engine: built and measured on a board or a GPU of this machine, or not built."""

from __future__ import annotations

from collections.abc import Mapping

from ....devices.device import Device
from ....devices.pool import BoardDevice, Pool
from ....devices.tensorrt.device import boards_of
from ....devices.transport.base import BoardError
from ....targets.base import Target
from ...errors import BuildError
from ...network.calling import tensors_of
from ...run_context import RunContext
from ...run_folder import Stage
from ...types import Accuracy, Artifact, Kind, SearchResult, TargetResult, Verdict
from ..gates import Allowed, drop_complaint, judge
from ..references import Networks, accuracy_here, accuracy_of, accuracy_stage
from .steps import EngineWork, SimulatedError

ABSENT = (
    "no engine was built: there is no board with TensorRT (--device NAME) and no TensorRT with a CUDA GPU on this machine;"
    " artifacts/{name}/build.sh builds it on the board"
)


def remarks(found: SearchResult) -> list[str]:
    """Notes for the report on a search that measured nothing."""
    if found.best.latency_kind is not Kind.ESTIMATED:
        return []
    return [
        "The search had no board: what it calls latency is estimated, a roofline with a floor for each layer, and tells"
        " structures of one precision from each other. It is no time of any device, and does not include what int8 saves"
        " (docs/jetson.md)."
    ]


def unbuilt(
    run: RunContext, before: Stage, target: Target, artifact: Artifact, networks: Networks, limits: Allowed, why: str
) -> TargetResult:
    """What is known without an engine: the accuracy of the file's arithmetic. No gate on latency can be passed."""
    accuracy = _simulated(run, before, target, artifact, networks)
    complaint = drop_complaint(accuracy, limits)
    return TargetResult("not_built", Verdict(False, (why, complaint) if complaint else (why,)), artifact, accuracy)


def breaks_a_gate(result: TargetResult, limits: Allowed) -> bool:
    """Whether a result makes a run fail; an engine that was not built does so only by the accuracy of its file's arithmetic."""
    if result.status == "not_built":
        return result.accuracy is None or bool(drop_complaint(result.accuracy, limits))
    return not result.verdict.passed


def finished(
    run: RunContext, before: Stage, target: Target, artifact: Artifact, networks: Networks, limits: Allowed, place: Device
) -> TargetResult:
    """Result with the engine built, its accuracy and its latency measured, all on one board.

    In a class of boards any free one is used; after a failure another one starts over. A refusal by TensorRT is a failed target;
    an engine made by a stand-in for trtexec counts as not built.
    """
    on_each: dict[BoardDevice, EngineWork] = {one: EngineWork(run, before, target, artifact, one) for one in boards_of(place)}
    try:
        done = next((work for work in on_each.values() if work.is_done), None)
        if done is None:
            done = _on_one(run, place, on_each)
        engine, answers, seen, timing, golden = done.engine(), done.answers(), done.beside_file(), done.timing(), done.golden()
    except SimulatedError as error:
        return unbuilt(run, before, target, artifact, networks, limits, f"no engine was built: {error}")
    except BuildError as error:
        return TargetResult("failed", Verdict(False, (str(error),)), artifact)
    accuracy = accuracy_of(run, tensors_of(answers.outputs), answers.picked, networks, Kind.MEASURED)
    verdict = judge(limits, accuracy, timing, size_bytes=engine.file.size_bytes, seen=seen)
    return TargetResult("ok", verdict, engine, accuracy, timing, golden, seen)


def _on_one(run: RunContext, place: Device, on_each: Mapping[BoardDevice, EngineWork]) -> EngineWork:
    """Does all the work on one board, under its lease."""
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
                run.notes.append(f"{found.target.name}: a board failed, and the engine was built again on another one: {error}")
                raise
        return found

    return place.on_any(work)


def _simulated(run: RunContext, before: Stage, target: Target, artifact: Artifact, networks: Networks) -> Accuracy:
    def simulate() -> Accuracy:
        with run.stage(f"simulate {target.name}"):
            return accuracy_here(run, target, artifact, networks, target.simulation)

    return accuracy_stage(run, before, artifact).once(Accuracy, simulate)
