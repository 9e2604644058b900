"""The process side of the pool: a small zygote that forks graders, and the grader's loop.

`python -m megatron_t1.reward.processes.worker FD MODULE [PLUGIN ...]` is the zygote: it imports them, runs MODULE's
`warm_up()` once, then forks one grader for every socket it is handed. A grader runs MODULE's `prepare()`, locks itself
down, and answers each task with what MODULE's `grade_task(task)` yields. The zygote is a fresh process (never a fork
of the trainer: threads, CUDA and process groups do not survive a fork) and imports neither torch nor Megatron. A
grader cannot open files, start processes or reach a network, and dies with the zygote.

Frames are a 4-byte length and JSON, in both directions: nothing a grader sends is ever executed or unpickled. Every
task has an `id`, and so has every reply to it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import resource
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megatron_t1.plugins import load

MAX_FRAME_BYTES = 64 << 20
MAX_UNSENT_CPU_S = 0.005
"""Replies to short tasks are sent together until they cost so much: it is billed to the first of them."""
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, CLONE_NEWNET, CLONE_NEWUSER = 1, 38, 0x40000000, 0x10000000


class Frames:
    """Puts frames together from what a socket gives."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, chunk: bytes) -> list[Any]:
        """The messages that are complete now.

        Raises:
            EOFError: the chunk is empty (the other side closed), or a frame is too long.
            ValueError: a frame is not JSON.
        """
        if not chunk:
            raise EOFError("the other side closed")
        self._buffer += chunk
        messages = []
        while len(self._buffer) >= 4:
            size = struct.unpack_from("<I", self._buffer)[0]
            if size > MAX_FRAME_BYTES:
                raise EOFError(f"a frame of {size} bytes")
            if len(self._buffer) < 4 + size:
                break
            messages.append(json.loads(self._buffer[4 : 4 + size]))
            del self._buffer[: 4 + size]
        return messages


def encode(message: Any) -> bytes:
    """One frame."""
    payload = json.dumps(message).encode()
    return struct.pack("<I", len(payload)) + payload


def leave_the_network(libc: ctypes.CDLL) -> None:
    """An empty network namespace; where the kernel refuses, the descriptor limit alone forbids new sockets."""
    if libc.unshare(CLONE_NEWNET) != 0:
        libc.unshare(CLONE_NEWUSER | CLONE_NEWNET)


def lock_down(memory_bytes: int) -> None:
    """Limits that hold for everything the grader does; exceeding them kills or fails only the grader."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (600, 600))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))  # no file or socket can be opened any more
    sys.setrecursionlimit(3000)


def _grader(
    connection: socket.socket,
    parent: int,
    memory_bytes: int,
    prepare: Callable[[], None],
    grade_task: Callable[[Any], Iterator[dict[str, Any]]],
) -> None:
    os.setsid()
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if os.getppid() != parent:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    prepare()
    lock_down(memory_bytes)
    frames = Frames()
    connection.sendall(encode(os.getpid()))
    replies = bytearray()
    sent_at_cpu_s = time.process_time()
    with contextlib.suppress(EOFError, OSError):
        while True:
            tasks = frames.feed(connection.recv(1 << 20))
            for i, task in enumerate(tasks, 1):
                for message in grade_task(task):
                    replies += encode({**message, "id": task["id"]})
                    last_or_slow = i == len(tasks) or time.process_time() - sent_at_cpu_s > MAX_UNSENT_CPU_S
                    if last_or_slow or not message["done"]:
                        connection.sendall(replies)
                        replies.clear()
                        sent_at_cpu_s = time.process_time()


def zygote(control: socket.socket, module: str, plugins: Sequence[str]) -> None:
    """Import the plugins, warm up, then fork a grader for every socket received until the control socket closes."""
    grading = importlib.import_module(module)
    load(plugins)
    grading.warm_up()
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    leave_the_network(ctypes.CDLL(None))  # once, for all graders
    parent = os.getpid()
    while True:
        try:
            data, descriptors, _, _ = socket.recv_fds(control, 64, 1)
        except OSError:
            return
        if not data or not descriptors:
            return
        (memory_bytes,) = struct.unpack("<Q", data)
        connection = socket.socket(fileno=descriptors[0])
        if os.fork() == 0:
            control.close()
            try:
                _grader(connection, parent, memory_bytes, grading.prepare, grading.grade_task)
            finally:
                os._exit(0)
        connection.close()


if __name__ == "__main__":
    zygote(socket.socket(fileno=int(sys.argv[1])), sys.argv[2], sys.argv[3:])
