"""Writes the bundle's bill of materials in CycloneDX 1.6 (ECMA-424): the artifact, what it was made of, what made it.

The same report and files give the same bytes: the serial number comes from the artifact's digest, the time is the run's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from datetime import datetime
from importlib.util import find_spec
from typing import TYPE_CHECKING
from uuid import NAMESPACE_URL, uuid5

from ..errors import UnavailableError
from ..report.report import Named, Report

if TYPE_CHECKING:
    from cyclonedx.model import HashType
    from cyclonedx.model.component import Component


def sbom(report: Report, target: str, files: Mapping[str, bytes]) -> bytes:
    """The bill of a target's bundle.

    Args:
        report: of the run.
        target: whose artifact it is.
        files: in the bundle so far.

    Raises:
        UnavailableError: the library is not installed.
        ValueError: the target has no artifact.
    """
    if find_spec("cyclonedx") is None:
        raise UnavailableError("a bill of materials needs cyclonedx-python-lib", do="pip install 'edge-compress[release]'")
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.output.json import JsonV1Dot6

    artifact = report.targets[target].artifact
    if artifact is None:
        raise ValueError(f"{target} has no artifact")
    whole = Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        name=report.model.name,
        version=artifact.sha256[:16],
        bom_ref="artifact",
        hashes=[_sha256(artifact.sha256)],
        description=f"{artifact.precision} {artifact.format} for {target}",
    )
    bom = Bom(serial_number=uuid5(NAMESPACE_URL, f"edge-compress:{artifact.sha256}:{report.finished}"))
    bom.metadata.timestamp = datetime.fromisoformat(report.finished)
    bom.metadata.component = whole
    parts = [*_inputs(report), *_files(files), *_packages(report)]
    for part in parts:
        bom.components.add(part)
    bom.register_dependency(whole, parts)
    return JsonV1Dot6(bom).output_as_string(indent=1).encode() + b"\n"


def _inputs(report: Report) -> Iterator[Component]:
    """What the artifact was made of: the dense network, and the data by its digest."""
    from cyclonedx.model.component import Component, ComponentType

    data = Named(report.data.name, report.data.sha256)
    for ref, kind, entry in (("dense", ComponentType.MACHINE_LEARNING_MODEL, report.model), ("data", ComponentType.DATA, data)):
        yield Component(type=kind, name=entry.name, version=entry.sha256[:16], bom_ref=ref, hashes=[_sha256(entry.sha256)])


def _files(files: Mapping[str, bytes]) -> Iterator[Component]:
    from cyclonedx.model.component import Component, ComponentType

    for path, data in sorted(files.items()):
        digest = hashlib.sha256(data).hexdigest()
        yield Component(type=ComponentType.FILE, name=path, bom_ref=f"file:{path}", hashes=[_sha256(digest)])


def _packages(report: Report) -> Iterator[Component]:
    """The packages that had a part in the run, with the licence each states."""
    from cyclonedx.contrib.license.factories import LicenseFactory
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

    said = report.tool.licenses
    for name, version in sorted(report.tool.packages.items()):
        url = PackageURL("pypi", name=name.lower().replace("_", "-"), version=version)
        licenses = [LicenseFactory().make_from_string(said[name])] if said.get(name) else []
        yield Component(
            type=ComponentType.LIBRARY, name=name, version=version, purl=url, bom_ref=url.to_string(), licenses=licenses
        )


def _sha256(digest: str) -> HashType:
    from cyclonedx.model import HashAlgorithm, HashType

    return HashType(alg=HashAlgorithm.SHA_256, content=digest)
