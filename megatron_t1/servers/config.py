"""What a user says about the vLLM servers: how many, where, how they are asked and fed.

Left out: everything vLLM decides well by itself. What it takes beyond these fields goes through `vllm_args` verbatim.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from megatron_t1.fields import FieldError, above, at_least, http_only

Transport = Literal["shm", "tcp", "collective"]
BACKEND = "t1"
"""Name, inside vLLM, of our own weight-transfer backend: the receiving end of every transport."""
_NOT_VERBATIM = {
    "middleware": "it would take the place of the guard that asks every request for the server's key",
    "host": "rollout.host says it",
    "port": "rollout.ports says it",
    "api-key": "rollout.key_file says it",
    "tensor-parallel-size": "rollout.tp says it",
    "dtype": "rollout.dtype says it",
    "max-model-len": "rollout.max_model_len says it",
    "max-num-seqs": "rollout.max_num_seqs says it",
    "gpu-memory-utilization": "rollout.gpu_memory_utilization says it",
}
"""Options of vLLM that are no matter of the servers alone -> why, or where they are said."""


@dataclass(kw_only=True, frozen=True)
class RolloutConfig:
    """vLLM servers: how many to start here, or the URLs of running ones."""

    urls: tuple[str, ...] = ()
    """Base URLs of servers that already run (`t1 serve` prints one). Empty: start `num_servers` here."""
    key_file: str | None = None
    """File with the servers' key (mode 0600), made when there is none. None: run_dir/server_key; for `urls` the
    environment variable T1_SERVER_KEY."""
    await_servers: int = 0
    """Servers that other hosts start (`t1 serve --rollout.host auto`, same run_dir on a shared file system): wait for
    so many, start none here."""
    registry: str | None = None
    """Folder in which servers on other hosts are announced; None: run_dir/servers."""
    num_servers: int = 1
    """Servers to start on this host."""
    host: str = "127.0.0.1"
    """Address that the servers of this host listen on, behind the key: a loopback address keeps them to this host;
    `auto` is this host's address as others see it, 0.0.0.0 all of its addresses."""
    ports: tuple[int, ...] = ()
    """A fixed port for every server; empty: free ones are taken."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda when torch finds a GPU."""
    gpu_ids: tuple[int, ...] = ()
    """GPUs of the servers, `tp` of them for each in order, counted along CUDA_VISIBLE_DEVICES; empty: 0, 1, 2, ..."""
    share_gpus: bool = False
    """Servers started here may use GPUs that trainer ranks have too: `gpu_memory_utilization` is then what they take of
    each, and the trainer needs room in the rest. Weights go through the host's memory: NCCL refuses two on one GPU."""
    sleep: bool = False
    """With `share_gpus`, servers give their GPU memory back while the trainer trains (vLLM's sleep, level 2), and get
    weights with the next push: `gpu_memory_utilization` may then be all that the trainer leaves while they generate."""
    gpu_memory_utilization: float = 0.85
    """Share of a GPU's memory that a server may fill (GPU only)."""
    tp: int = 1
    """Tensor parallelism of each server."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "auto"
    """Compute type of the server. Give the trainer's own: a difference shows as train/rollout mismatch."""
    max_model_len: int | None = None
    """Longest prompt + response, tokens; None: what the model's config allows."""
    max_num_seqs: int = 256
    """Samples that one server generates at the same time; also the most that one request may ask for."""
    kv_cache_bytes: int = 64 * 2**20
    """Bytes of the KV cache of each server on the CPU. On a GPU `gpu_memory_utilization` sizes it."""
    transport: Literal["auto"] | Transport = "auto"
    """How new weights reach the servers. auto: collective on GPUs that are not shared, broadcasts in one group of
    trainer and servers (NCCL); else shm, or tcp when trainer or servers span hosts, or the job does not train
    (`megatron_t1.push.transports`)."""
    pause_mode: Literal["abort", "wait", "keep"] = "wait"
    """What a push does with requests in flight: wait for their end, abort them (they are asked again), or keep them
    going on the new weights (their tokens then carry both versions)."""
    samples_per_request: int = 16
    """Samples of one prompt asked for in one request: fewer spread better over servers, more cost less overhead. Long
    ones are asked for in smaller requests, of 262,144 new tokens at most (or one sample): what a server must answer at
    once, and what is lost with it."""
    startup_timeout_s: float = 1800.0
    """Deadline for a server to become healthy: reading 65 GB four times from a shared disk, compiling and capturing
    graphs may take long. One that ends in its start is noticed at once."""
    request_timeout_s: float = 21600.0
    """Deadline for one generation request, queueing included; a server that misses it is started again. It must exceed
    the time of the longest sample and of those before it. (A server that hangs is noticed by its /health.)"""
    health_timeout_s: float = 60.0
    """A busy server that answers no /health for so long counts as stuck; its requests are asked elsewhere. So are those
    at a host of which nothing is heard for so long."""
    sync_timeout_s: float = 600.0
    """Deadline for each phase of a weight push, and for a trainer rank to come to where the others are in it."""
    connect_retries: int = 3
    """Attempts of one request at a server before connection errors make it count as dead."""
    load_weights: bool = True
    """false: servers started here begin with random weights and read none from the disk. For a training, which pushes
    its own before it asks, and whose comparison before the first step then proves that all of them came by the push.
    `t1 rl` and `t1 run` start theirs so; for `t1 serve` the batch scripts set it."""
    vllm_args: dict[str, Any] = field(default_factory=dict)
    """More options of `vllm serve`: {"enable-expert-parallel": true, "max-num-batched-tokens": 8192}. Not those that a
    field above sets, and not `middleware`, which would take the place of the guard that asks for the servers' key."""
    vllm_env: dict[str, str] = field(default_factory=dict)
    """More environment variables of the servers: {"VLLM_ATTENTION_BACKEND": "..."}."""

    def __post_init__(self) -> None:
        at_least(
            self, 1, "num_servers", "tp", "max_num_seqs", "kv_cache_bytes", "samples_per_request", "connect_retries"
        )
        at_least(self, 0, "await_servers")
        above(self, 0, "startup_timeout_s", "request_timeout_s", "health_timeout_s", "sync_timeout_s")
        if self.ports and not self.urls and len(self.ports) != self.num_servers:
            raise FieldError("ports", self.ports, f"must be one for each of the {self.num_servers} servers, or none")
        if len(set(self.ports)) < len(self.ports) or not all(0 < port < 1 << 16 for port in self.ports):
            raise FieldError("ports", self.ports, "must be different numbers from 1 to 65535")
        if self.gpu_ids and len(self.gpu_ids) != self.num_servers * self.tp:
            raise FieldError(
                "gpu_ids",
                self.gpu_ids,
                f"must be {self.num_servers * self.tp} GPUs: rollout.num_servers x rollout.tp",
            )
        of_servers = [self.gpu_ids[i : i + self.tp] for i in range(0, len(self.gpu_ids), self.tp)]
        if any(len(set(own)) < len(own) for own in of_servers) or any(gpu < 0 for gpu in self.gpu_ids):
            raise FieldError("gpu_ids", self.gpu_ids, "must be numbers from 0 on, different ones for each server")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise FieldError("max_model_len", self.max_model_len, "must be at least 2, or null for the model's own")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise FieldError("gpu_memory_utilization", self.gpu_memory_utilization, "must lie in (0, 1]")
        if self.share_gpus and self.transport == "collective":
            raise FieldError("transport", "collective", "must be auto, shm or tcp with rollout.share_gpus")
        if self.sleep and not self.share_gpus:
            raise FieldError("sleep", True, "needs rollout.share_gpus: nobody else would use the memory")
        if self.await_servers and self.urls:
            raise FieldError("await_servers", self.await_servers, "and rollout.urls exclude each other")
        for name in ("hf-overrides", "hf_overrides"):
            if not isinstance(given := self.vllm_args.get(name, {}), dict):
                raise FieldError(f"vllm_args.{name}", given, "must be a mapping: it is laid over what is set here")
        for name, given in self.vllm_args.items():
            if why := _NOT_VERBATIM.get(name.replace("_", "-")):
                raise FieldError(f"vllm_args.{name}", given, f"must be left out: {why}")
        if not self.host or ":" in self.host:
            raise FieldError("host", self.host, "must be an IPv4 address, a host name, or auto")
        self._check_urls()

    def _check_urls(self) -> None:
        http_only(self, "urls")
        urls = [url.rstrip("/") for url in self.urls]
        if len(set(urls)) < len(urls):
            raise FieldError("urls", self.urls, "must name each server once")
        for url in urls:
            if url.endswith("/v1"):
                raise FieldError("urls", self.urls, f"must be base URLs: {url.removesuffix('/v1')}")
            if "[" in url or not urlsplit(url).hostname:
                raise FieldError("urls", self.urls, "must have an IPv4 address or a host name each")

    @property
    def on_loopback(self) -> bool:
        """Whether the servers started here are for this host alone."""
        return self.host == "localhost" or self.host.startswith("127.")

    def registry_folder(self, run_dir: Path) -> Path:
        return Path(self.registry) if self.registry else run_dir / "servers"
