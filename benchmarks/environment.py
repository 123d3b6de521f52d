"""Where and with what a measurement is made."""

import contextlib
import ctypes
import datetime
import importlib.metadata
import os
import pathlib
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

ROOT = pathlib.Path(__file__).resolve().parent.parent

_PACKAGES = ("jax_blocksparse", "jax", "jaxlib", "numpy")
_PEER_PACKAGES = ("torch", "triton", "nvidia-cusparse", "nvidia-cusparse-cu12", "stanford-stk")
_GPU_FIELDS = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu")
_CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE = 38


def describe(device: jax.Device, revision: str | None) -> dict[str, Any]:
    """Returns device, date, versions and revision, ready for JSON.

    Args:
      device: the device measured.
      revision: what to record instead of what git says.
    """
    return {
        "device": device_name(device),
        "platform": device.platform,
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "l2_bytes": l2_bytes(device),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in _PACKAGES},
            **_versions_if_installed(_PEER_PACKAGES),
            "backend": " ".join(device.client.platform_version.split()),
        },
        "xla_flags": os.environ.get("XLA_FLAGS"),
        "matmul_precision": jax.config.jax_default_matmul_precision,
        "revision": {"commit": revision, "dirty": None} if revision else _git_revision(),
    }


def copy_bandwidth() -> float:
    """Returns the bytes per second that the device reads and writes when it negates much more than its caches hold."""
    array = jnp.ones(2**28, jnp.float32)
    negate = jax.jit(jnp.negative)
    taken, calls = [], 10
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):  # each takes long enough to hide the launch of the next
            array = negate(array)
        array.block_until_ready()
        taken.append(time.perf_counter() - start)
    return calls * 2 * array.nbytes / statistics.median(taken)


def device_name(device: jax.Device) -> str:
    """Returns the name its maker gave the device."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if device.platform == "cpu" and cpuinfo.exists():
        model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        return model[1].strip() if model else platform.processor()
    return device.device_kind


def l2_bytes(device: jax.Device) -> int | None:
    """Returns the size of a GPU's L2 cache, as the CUDA driver knows it; None for other devices."""
    if device.platform != "gpu":
        return None
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    size = ctypes.c_int()
    driver.cuInit(0)
    status = driver.cuDeviceGetAttribute(
        ctypes.byref(size), _CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE, device.local_hardware_id
    )
    return size.value if status == 0 else None


def gpu_state(device: jax.Device) -> dict[str, str] | None:
    """Returns the driver of a GPU, and its clocks, power and temperature at this moment; None for other devices."""
    if device.platform != "gpu":
        return None
    answer = _output_of(
        "nvidia-smi",
        f"--id={device.local_hardware_id}",
        f"--query-gpu={','.join(_GPU_FIELDS)}",
        "--format=csv,noheader",
    )
    return answer and dict(zip(_GPU_FIELDS, answer.split(", "), strict=True))


def _versions_if_installed(packages: Sequence[str]) -> dict[str, str]:
    versions = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _git_revision() -> dict[str, Any]:
    commit = _output_of("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changes = _output_of("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": commit and bool(changes)}


def _output_of(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
