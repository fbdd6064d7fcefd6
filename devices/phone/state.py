"""The state of an Android phone, read by a plain shell: machine, memory, disk, heat, clocks."""

from __future__ import annotations

import re
from typing import Any

_NUMBER = re.compile(r"[0-9]{1,15}")
# toybox and mksh are all there is; the folder for files is $1; a line is `key=value`, what cannot be read is left out or empty
SCRIPT = r"""
first() { echo "$1=$(head -n 1 "$2" 2>/dev/null)"; }
echo "board=$(getprop ro.product.manufacturer 2>/dev/null) $(getprop ro.product.model 2>/dev/null)"
echo "cpu=$(getprop ro.soc.manufacturer 2>/dev/null) $(getprop ro.soc.model 2>/dev/null)"
echo "build=$(getprop ro.build.fingerprint 2>/dev/null)"
echo "emulated=$(getprop ro.boot.qemu 2>/dev/null)$(getprop ro.kernel.qemu 2>/dev/null)"
echo "machine=$(uname -m)"
echo "cpus=$(ls -d /sys/devices/system/cpu/cpu[0-9]* | wc -l)"
first boot_id /proc/sys/kernel/random/boot_id
first load /proc/loadavg
first governor /sys/devices/system/cpu/cpu0/cpufreq/scaling_governor
grep -E '^Mem(Total|Available):' /proc/meminfo | sed -e 's/: */=/' -e 's/ kB//'
for z in /sys/class/thermal/thermal_zone*; do
  [ -r "$z/temp" ] && echo "zone ${z##*zone} $(cat "$z/type" 2>/dev/null)=$(cat "$z/temp" 2>/dev/null)"
done
for c in /sys/devices/system/cpu/cpu[0-9]*; do
  f="$c/cpufreq"
  [ -r "$f/scaling_cur_freq" ] || continue
  echo "clock ${c##*/}=$(cat "$f/scaling_cur_freq" "$f/cpuinfo_min_freq" "$f/cpuinfo_max_freq" | tr '\n' ' ')"
done
echo "disk=$(df -Pk "$1" | tail -n 1)"
echo "thermal=$(dumpsys thermalservice 2>/dev/null | grep -m 1 'Thermal Status')"
echo "low_power=$(settings get global low_power 2>/dev/null)"
exit 0
"""


def parsed(text: str) -> dict[str, Any]:
    """The answer of SCRIPT with the keys of `agent.describe_board`; what cannot be read is empty or 0."""
    found = {key.strip(): value.strip() for key, sep, value in (line.partition("=") for line in text.splitlines()) if sep}
    zones = {key[5:]: value for key, value in found.items() if key.startswith("zone ")}
    clocks = {key[6:]: value.split() for key, value in found.items() if key.startswith("clock ")}
    disk = found.get("disk", "").split()
    thermal = re.search(r"[0-9]{1,3}", found.get("thermal", ""))
    return {
        "machine": {
            "cpu": found.get("cpu") or found.get("machine", ""),
            "cpus": found.get("cpus", ""),
            "machine": found.get("machine", ""),
            "board": found.get("board", ""),
            "build": found.get("build", ""),
            "python": "none",
            "governor": found.get("governor") or "unknown",
            "load_average": (found.get("load", "").split() or [""])[0],
        },
        "host": "",  # its address, the serial number, identifies it
        "boot_id": found.get("boot_id", ""),
        "memory_total_bytes": 1024 * _whole(found.get("MemTotal", "")),
        "memory_available_bytes": 1024 * _whole(found.get("MemAvailable", "")),
        "disk_free_bytes": 1024 * _whole(disk[-3]) if len(disk) >= 6 else 0,
        "temperatures_c": {name: int(value) / 1000 for name, value in zones.items() if re.fullmatch(r"-?[0-9]{1,9}", value)},
        "clocks_mhz": {
            name: [int(v) / 1000 for v in values]
            for name, values in clocks.items()
            if len(values) == 3 and all(_NUMBER.fullmatch(v) for v in values)
        },
        "power_mode": {"1": "battery saver", "0": "normal"}.get(found.get("low_power", ""), ""),
        "thermal_status": int(thermal[0]) if thermal else 0,
        "emulated": "1" in found.get("emulated", ""),
    }


def _whole(text: str) -> int:
    return int(text) if _NUMBER.fullmatch(text) else 0
