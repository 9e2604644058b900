"""`t1 doctor`: what is installed here and can be used, and what is missing for what.

What is compiled is imported, each in a process of its own: its metadata are there after a build against another torch
too, and one that crashes is a row of the table.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from megatron_t1.platform.installed import OPTIONAL, REQUIRED, installed, vllm_version

IMPORT_TIMEOUT_S = 180.0
"""From a cold network file system vLLM takes a minute."""
_VLLM = """
import vllm.entrypoints.launchers.api_server.entry
from vllm.platforms import current_platform
if current_platform.is_cuda():
    import vllm._C_stable_libtorch
"""
_TE = "import transformer_engine.pytorch"
_TE_PACKAGE = "transformer-engine"
_TE_RELEASES = ("2.9", "2.12")
"""From the first on, below the second: what megatron-core 0.16.1 asks for."""
_NETWORK = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb", "afs", "glusterfs", "pvfs", "wekafs", "fuse.")
_CACHES = {
    "TRITON_CACHE_DIR": "~/.triton/cache",
    "TORCHINDUCTOR_CACHE_DIR": "{tmp}/torchinductor_{user}",
    "VLLM_CACHE_ROOT": "~/.cache/vllm",
}
"""Variable -> where the cache is when it is not set."""

Row = tuple[str, str, str]
"""State (ok, absent, warn, MISSING, BROKEN), what, for what or why."""


def diagnose() -> tuple[str, bool]:
    """A table for a person, and whether everything required is there."""
    with ThreadPoolExecutor(2) as pool:
        vllm, te = pool.submit(import_failure, _VLLM), pool.submit(import_failure, _TE)
        rows = [_package(name, purpose) for name, purpose in REQUIRED.items()]
        rows.append(_imported("vllm", vllm_version(), vllm.result(), "for sampling", required=True))
        rows.append(_transformer_engine(te.result()))
    rows += [_package(name, purpose, optional=True) for name, purpose in OPTIONAL.items() if name != _TE_PACKAGE]
    apex = importlib.util.find_spec("amp_C") is not None
    rows.append(("ok" if apex else "absent", "Apex", "optional, for a fused optimizer without Transformer Engine"))
    gpus, has_gpus = _gpus()
    rows += gpus
    rows.append(_compiler(needed=has_gpus))
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    rows.append(("ok", f"{os.cpu_count()} CPU cores, {memory_gb:.0f} GB of memory", ""))
    shm_gb = shutil.disk_usage("/dev/shm").free / 1e9
    rows.append(("ok", f"/dev/shm {shm_gb:.1f} GB free", "for weight pushes to servers on the CPU: the model's size"))
    if has_gpus:
        rows += [_cache(variable) for variable in _CACHES]
    width = min(48, max(len(what) for _, what, _ in rows))
    table = "\n".join(f"{state:8} {what:{width}}  {why}".rstrip() for state, what, why in rows)
    return table, not any(state in ("MISSING", "BROKEN") for state, _, _ in rows)


def import_failure(code: str, timeout_s: float = IMPORT_TIMEOUT_S) -> str | None:
    """Why `code` fails in a process of its own; None when it does not."""
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return f"its import did not end within {timeout_s:g} s"
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f"its import was ended by signal {-done.returncode}"
    return next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "it says no reason")[:500]


def _package(name: str, purpose: str, optional: bool = False) -> Row:
    found = installed(name)
    missing = "absent" if optional else "MISSING"
    return "ok" if found else missing, f"{name} {found or ''}".strip(), "optional, " * optional + f"for {purpose}"


def _imported(name: str, found: str | None, failure: str | None, purpose: str, *, required: bool) -> Row:
    if found is None:
        return "MISSING" if required else "absent", name, purpose
    if failure is not None:
        return "BROKEN", f"{name} {found}", f"{purpose}; it can't be imported: {failure}"
    return "ok", f"{name} {found}", purpose


def _transformer_engine(failure: str | None) -> Row:
    found = installed(_TE_PACKAGE)
    purpose = f"optional, for {OPTIONAL[_TE_PACKAGE]}"
    state, what, why = _imported(_TE_PACKAGE, found, failure, purpose, required=False)
    if state == "BROKEN":
        why += f". Build it for torch {installed('torch')} (requirements/te.txt), or give --model.layers local"
    elif found and not _numbers(_TE_RELEASES[0]) <= _numbers(found) < _numbers(_TE_RELEASES[1]):
        first, beyond = _TE_RELEASES
        why += f"; megatron-core {installed('megatron-core')} asks for one from {first} on and below {beyond}"
        return "warn", what, why
    return state, what, why


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split(".")[:2])


def _gpus() -> tuple[list[Row], bool]:
    """Rows for driver and GPUs, and whether there are any, usable or not."""
    try:
        import torch
    except Exception as error:  # a broken build raises anything
        return [("BROKEN", "torch", f"it can't be imported: {error}")] if installed("torch") else [], False
    from megatron_t1.platform import gpus

    try:
        usable = gpus.usable()
    except ValueError as error:
        return [("BROKEN", "GPU", str(error))], True
    if not usable:
        return [("absent", "GPU none: Megatron and vLLM run on the CPU", "")], False
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    driver = Path("/proc/driver/nvidia/version")
    release = driver.read_text().splitlines()[0] if driver.exists() else "NVIDIA driver of unknown release"
    return [("ok", f"GPU {', '.join(names)}", f"torch's CUDA {torch.version.cuda}; {release}")], True


def _compiler(needed: bool) -> Row:
    """Compiles an empty extension, as Triton does with its launchers on each node."""
    purpose = "for Triton and torch.compile on GPUs: a C compiler and Python.h, on every node"
    compiler = next(filter(None, map(shutil.which, filter(None, (os.environ.get("CC"), "gcc", "clang", "cc")))), None)
    if compiler is None:
        return "MISSING" if needed else "absent", "C compiler", f"{purpose}; install gcc, or name one in CC"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "empty.c"
        source.write_text("#include <Python.h>\n")
        include = sysconfig.get_path("include")
        command = [compiler, "-shared", "-fPIC", f"-I{include}", str(source), "-o", str(source.with_suffix(".so"))]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return "ok", f"{compiler} with Python.h", purpose
    reason = next((line for line in done.stderr.splitlines() if "error" in line), f"exit code {done.returncode}")
    remedy = f"Python.h belongs into {include} (Debian: python3.11-dev)"
    return "MISSING" if needed else "absent", f"{compiler} with Python.h", f"{purpose}; {reason.strip()}; {remedy}"


def _cache(variable: str) -> Row:
    folder = _CACHES[variable].format(tmp=tempfile.gettempdir(), user=os.environ.get("USER", "root"))
    folder = os.path.expanduser(os.environ.get(variable, folder))
    kind = file_system_of(Path(folder))
    if kind.startswith(_NETWORK):
        why = f"on {kind}, where all ranks of all nodes write into it at once: set {variable} to a folder of each node"
        return "warn", folder, why
    return "ok", folder, f"{variable}, on {kind}"


def file_system_of(folder: Path) -> str:
    """Kind of the file system that the folder is on, or would be."""
    path = folder.resolve()
    mounts = {part.mountpoint: part.fstype for part in psutil.disk_partitions(all=True)}
    return next((mounts[str(above)] for above in (path, *path.parents) if str(above) in mounts), "unknown")
