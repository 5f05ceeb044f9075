"""What the figures of a run depend on: the processor, its load, and the versions."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import tilewright as tw

_WIDTHS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd")

BUSY = 0.5
"""Load per core before a run above which its figures are in doubt."""


def describe(device: torch.device | None = None) -> dict[str, Any]:
    """CPU name, cores, vector extensions that kernels may use, memory, and the load of the last minute; with a device
    that something is to run on, its name."""
    info = _cpu_info()
    flags = set(info.get("flags", info.get("Features", "")).split())
    return {
        "cpu": info.get("model name", platform.processor() or platform.machine()),
        "cores": os.cpu_count(),
        "extensions": [name for name in _WIDTHS if name in flags],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()}",
        **({} if device is None else {"device": device_name(device)}),
    }


def device_name(device: torch.device) -> str:
    """The name of a GPU, or of the processor."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return str(describe()["cpu"])


def warn_if_busy(facts: dict[str, Any], notes: Console) -> None:
    """Say so when the load before a run puts its figures in doubt; ``facts`` as ``describe`` gave them."""
    if facts["load"] > BUSY * facts["cores"]:
        notes.print(
            f"[yellow]busy machine[/yellow]: load {facts['load']} on {facts['cores']} cores; threads that wait for "
            "each other suffer most from that, so neither rates nor ratios will be those of a quiet one",
            highlight=False,
        )


def versions(*extras: str) -> dict[str, str]:
    """Versions of everything that is compared, ``extras`` (package names) too, and the commit, if known."""
    found = {
        "tilewright": tw.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    } | {name: version(name) for name in extras}
    if find_spec("triton") is not None:
        found["triton"] = version("triton")
    commit = _commit()
    return found | ({"commit": commit} if commit else {})


def _cpu_info() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text().split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _commit() -> str | None:
    """The commit of the working tree, marked where files differ from it; None outside of git."""
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty=+changes", "--abbrev=10"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
