"""Launching one vLLM server: its command line, environment and GPUs, a port held for it, the end of its group."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from megatron_t1.models.spec import HFConfig
from megatron_t1.servers.config import BACKEND, RolloutConfig
from megatron_t1.servers.guard import KEY_ENV
from megatron_t1.servers.server import ServerError

_TEARDOWN_S = 60.0
"""What the kernel and the driver may take to free what a killed process held; most is GPU memory."""
_COMMON_ENV = {
    "VLLM_SERVER_DEV_MODE": "1",  # the weight routes; `KeyGuard` keeps them to holders of the key
    "VLLM_NO_USAGE_STATS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONUNBUFFERED": "1",
    "PYTHONSAFEPATH": "1",  # a folder vllm/ where the job was started is not the installed one
}
# Without them the start takes longer, the first request compiles for seconds, and a push spends 0.4 s a GB on page
# faults.
_CPU_ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TORCHDYNAMO_DISABLE": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "34359738368",
}
# torchrun's variables would make vLLM join the trainer's process group; the last two are tuned for training.
_TRAINER_VARIABLES = {
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME"),
    *("CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_CUDA_ALLOC_CONF"),
}


def launch(
    cfg: RolloutConfig,
    model_dir: Path,
    *,
    index: int,
    host: str,
    port: int,
    key: str,
    device: str,
    log: Path,
) -> subprocess.Popen[bytes]:
    """Starts server `index` as a process group of its own that ends when this process does; appends to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    supervisor = [sys.executable, "-m", "megatron_t1.servers.die_with_parent", str(os.getpid())]
    with log.open("ab") as file:
        return subprocess.Popen(
            [*supervisor, *command(cfg, model_dir, host=host, port=port, device=device)],
            env=environment(cfg, index=index, key=key, device=device),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def command(cfg: RolloutConfig, model_dir: Path, *, host: str, port: int, device: str) -> list[str]:
    """The vLLM command line. The key is not on it: it is in the environment."""
    options: dict[str, Any] = {
        "model": str(model_dir),
        "served-model-name": "policy",
        "host": host,
        "port": port,
        "dtype": cfg.dtype,
        "tensor-parallel-size": cfg.tp,
        "max-model-len": cfg.max_model_len,
        "max-num-seqs": cfg.max_num_seqs,
        "logprobs-mode": "processed_logprobs",
        "enable-prefix-caching": True,
        "enable-scale-out": True,
        "generation-config": "vllm",
        "weight-transfer-config": {"backend": BACKEND},
        "middleware": "megatron_t1.servers.guard.KeyGuard",
        "disable-uvicorn-access-log": True,
    }
    hf = HFConfig.load(model_dir)
    # vLLM wants this field to hold what YaRN makes of it, Qwen's releases leave it as it was.
    overrides: dict[str, Any] = {"max_position_embeddings": yarn.num_positions} if (yarn := hf.yarn()) else {}
    if device == "cpu":
        longest = cfg.max_model_len or overrides.get("max_position_embeddings") or hf.size("max_position_embeddings")
        options |= {
            "enforce-eager": True,
            "kv-cache-memory-bytes": cfg.kv_cache_bytes,
            # A seeded request whose prefill is cut in two kills the CPU engine: "CPU Generator does not use offset".
            "enable-chunked-prefill": False,
            "max-num-batched-tokens": max(2048, cfg.max_num_seqs, longest),
        }
    else:
        options["gpu-memory-utilization"] = cfg.gpu_memory_utilization
        # As the trainer computes them; logits rounded to bfloat16 blur every logprob by some 0.03 nats.
        overrides["head_dtype"] = "float32"
        options |= {"enable-sleep-mode": True} if cfg.sleep else {}  # vLLM's CPU build takes the calls and ignores them
    if begins_random(cfg, model_dir):
        options["load-format"] = "dummy"
    given = {name.replace("_", "-"): value for name, value in cfg.vllm_args.items()}
    overrides |= given.pop("hf-overrides", {})
    options |= {"hf-overrides": overrides or None} | given
    words = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry"]
    for name, value in options.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, dict | list):
            words += [f"--{name}", json.dumps(value)]
        elif value is not None:
            words += [f"--{name}", str(value)]
    return words


def begins_random(cfg: RolloutConfig, model_dir: Path) -> bool:
    """Whether servers have no weights until a trainer pushes: they were asked to, or there are none that vLLM reads."""
    return not cfg.load_weights or not any(model_dir.glob("*.safetensors"))


def environment(cfg: RolloutConfig, *, index: int, key: str, device: str) -> dict[str, str]:
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in _TRAINER_VARIABLES and not name.startswith("TORCHELASTIC_")
    }
    env |= _COMMON_ENV | {KEY_ENV: key}
    if device == "cpu":
        env |= _CPU_ENV
        env.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override kv_cache_bytes
    else:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus(cfg, env.get("CUDA_VISIBLE_DEVICES"), index))
    return env | cfg.vllm_env


def gpus(cfg: RolloutConfig, visible: str | None, index: int) -> list[str]:
    """The GPUs of server `index`, as CUDA_VISIBLE_DEVICES spells them: `rollout.gpu_ids` count along `visible`.

    Raises:
        ServerError: fewer GPUs are visible to this process than the servers need.
    """
    numbers = gpu_numbers(cfg)[index * cfg.tp : (index + 1) * cfg.tp]
    if visible is None:
        return [str(number) for number in numbers]
    names = [name.strip() for name in visible.split(",") if name.strip()]
    if max(numbers) >= len(names):
        raise ServerError(
            f"server {index} needs GPU number {max(numbers)} and CUDA_VISIBLE_DEVICES={visible} shows {len(names)}: "
            "lower rollout.num_servers or rollout.tp, or set rollout.gpu_ids (they count along CUDA_VISIBLE_DEVICES)"
        )
    return [names[number] for number in numbers]


def gpu_numbers(cfg: RolloutConfig) -> tuple[int, ...]:
    """The GPUs of all servers, `tp` for each, counted along CUDA_VISIBLE_DEVICES."""
    return cfg.gpu_ids or tuple(range(cfg.num_servers * cfg.tp))


def public_address() -> str:
    """This host's IPv4 address as other hosts see it: of the interface that GLOO_SOCKET_IFNAME names, as torch takes
    it; else of its name, or, where that is an alias of loopback, of its default route."""
    if interface := os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]:
        for address in psutil.net_if_addrs().get(interface, ()):
            if address.family == socket.AF_INET:
                return str(address.address)
        raise ServerError(f"GLOO_SOCKET_IFNAME = {interface}: this host has no such interface with an IPv4 address")
    with contextlib.suppress(OSError):
        named = socket.gethostbyname(socket.gethostname())
        if not named.startswith("127."):
            return named
    try:
        return own_address(towards="192.0.2.1")  # reserved for documentation
    except OSError:
        raise ServerError(
            "rollout.host: this host's address for other hosts can't be told; give it by number"
        ) from None


def own_address(*, towards: str) -> str:
    """This host's IPv4 address as the host `towards` sees it; raises OSError when there is no route to it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((towards, 9))  # of a UDP socket: nothing is sent
        return str(probe.getsockname()[0])


def reserve_port(host: str, port: int) -> socket.socket:
    """Holds `port` of `host` (0: any free one) until the returned socket is closed; raises OSError when it is taken.

    A socket that is bound but does not listen lets vLLM's own bind pass (both set SO_REUSEADDR), while the kernel gives
    the port to nobody who asks for a free one.
    """
    holder = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        holder.bind((host, port))
    except OSError:
        holder.close()
        raise
    return holder


def signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """SIGKILLs the whole group, its engine processes included even when the leader is gone, and reaps the leader.

    Returns when all have ended, or after `_TEARDOWN_S`: until then they hold the GPU's memory, which the caller may be
    about to take.
    """
    signal_group(process, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + _TEARDOWN_S
    while _has_members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.02)


def _has_members(group: int) -> bool:
    """Zombies apart, which a container without an init keeps for good."""
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False
