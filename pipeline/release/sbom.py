"""Writes the bundle's bill of materials in CycloneDX 1.6 (ECMA-424): the artifact, what it was made of, what made it.

The same report and files give the same bytes: the serial number comes from the artifact's digest, the time is the run's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import datetime
from importlib.util import find_spec
from uuid import NAMESPACE_URL, uuid5

from ..errors import UnavailableError, install_hint
from ..report.report import Report


def sbom(report: Report, target: str, files: Mapping[str, bytes]) -> bytes:
    """The bill of a target's bundle; `files` are those in it so far.

    Raises:
        UnavailableError: the library is not installed.
        ValueError: the target has no artifact.
    """
    if find_spec("cyclonedx") is None:
        raise UnavailableError("a bill of materials needs cyclonedx-python-lib", do=install_hint("release"))
    from cyclonedx.contrib.license.factories import LicenseFactory
    from cyclonedx.model import HashAlgorithm, HashType
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.output.json import JsonV1Dot6
    from packageurl import PackageURL

    artifact, data = report.targets[target].artifact, report.data
    if artifact is None:
        raise ValueError(f"{target} has no artifact")

    def part(kind: ComponentType, ref: str, name: str, sha256: str, version: str | None, text: str | None = None) -> Component:
        hashes = [HashType(alg=HashAlgorithm.SHA_256, content=sha256)]
        return Component(type=kind, name=name, version=version, bom_ref=ref, hashes=hashes, description=text)

    network, text = ComponentType.MACHINE_LEARNING_MODEL, f"{artifact.precision} {artifact.format} for {target}"
    whole = part(network, "artifact", report.model.name, artifact.sha256, artifact.sha256[:16], text)
    parts = [
        part(network, "dense", report.model.name, report.model.sha256, report.model.sha256[:16]),
        part(ComponentType.DATA, "data", data.name, data.sha256, data.sha256[:16]),
    ]
    for path, content in sorted(files.items()):
        parts.append(part(ComponentType.FILE, f"file:{path}", path, hashlib.sha256(content).hexdigest(), None))
    for name, version in sorted(report.tool.packages.items()):
        url = PackageURL("pypi", name=name.lower().replace("_", "-"), version=version)
        said = report.tool.licenses.get(name)
        licenses = [LicenseFactory().make_from_string(said)] if said else []
        kind = ComponentType.LIBRARY
        parts.append(Component(type=kind, name=name, version=version, purl=url, bom_ref=url.to_string(), licenses=licenses))
    bom = Bom(serial_number=uuid5(NAMESPACE_URL, f"edge-compress:{artifact.sha256}:{report.finished}"))
    bom.metadata.timestamp = datetime.fromisoformat(report.finished)
    bom.metadata.component = whole
    for each in parts:
        bom.components.add(each)
    bom.register_dependency(whole, parts)
    return JsonV1Dot6(bom).output_as_string(indent=1).encode() + b"\n"
