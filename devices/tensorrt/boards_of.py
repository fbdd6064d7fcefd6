"""Which boards that build engines a device stands for: itself, or those of its class."""

from __future__ import annotations

from ..device import Device
from ..pool import Pool
from .device import TensorRtDevice


def boards_of(device: Device) -> tuple[TensorRtDevice, ...]:
    """The boards with TensorRT; none where one of them has another runtime, or is reached through another host."""
    found = device.devices if isinstance(device, Pool) else (device,)
    engines = tuple(one for one in found if isinstance(one, TensorRtDevice))
    return engines if len(engines) == len(found) else ()
