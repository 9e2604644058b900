"""Programs that a model wrote, run for a verifier: unit tests of code and the like.

    grader (gold, verdict) --source, inputs--> keeper --fork--> a process for this program alone
                           <------outputs-----

The runner, forked once a grader, forks a keeper for each program; it reads no source and no output itself, since all
later programs have its memory.

A program may expect Python, the modules of `PRELOADED`, some CPU seconds and memory. What the user may rely on:

- The program's process never holds the expected outputs, nor anything of another task: the runner is forked before its
  grader has a task, and a keeper is told one program's source and inputs. The grader compares, and reads nothing but
  JSON.
- A seccomp filter leaves it memory, the clock, random numbers, one pipe and its own end. Files, sockets, processes,
  threads, signals to others, sleeping, tracing: the kernel refuses each (EPERM), for root too, whose capabilities it
  has not.
- It ends at its CPU limit or its memory limit, and its process with it: nothing is left for the next program.

It is no defence against a fault of the kernel in the few calls that are left, nor does it hide the inputs: a test whose
inputs are in the question can be answered by a table of its outputs.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import json
import math
import os
import platform
import resource
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any, Literal, NoReturn

from megatron_t1.fields import above, at_least, within
from megatron_t1.reward.processes.worker import PR_SET_PDEATHSIG, Frames, encode

PRELOADED = (
    *("abc", "array", "bisect", "calendar", "cmath", "collections", "collections.abc", "contextlib", "copy"),
    *("dataclasses", "datetime", "decimal", "enum", "fractions", "functools", "hashlib", "heapq", "io", "itertools"),
    *("json", "math", "numbers", "operator", "queue", "random", "re", "statistics", "string", "sys", "textwrap"),
    *("time", "types", "typing"),
)
"""What a program may import: no file can be opened for another."""
MAX_OUTPUT_BYTES = 1 << 20
_CONFINED = "+"
"""What its process writes before the program's first line: an exit status would be the program's to choose."""
_PR_GET_SECCOMP, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 21, 22, 2
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050001, 0x80000000  # _REFUSE: the call returns EPERM
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_CALLS = {
    # write, mmap, munmap, brk, rt_sigreturn, mremap, exit, gettimeofday, clock_gettime, exit_group, getrandom; madvise
    "x86_64": (0xC000003E, (1, 9, 11, 12, 15, 25, 60, 96, 228, 231, 318), 28),
    "aarch64": (0xC00000B7, (64, 222, 215, 214, 139, 216, 93, 169, 113, 94, 278), 233),
}
_ADVICES = (4, 8, 14)
"""Of madvise, those that allocators give: DONTNEED, FREE, HUGEPAGE. Root may take memory out of use by others."""
_CAPABILITIES_VERSION = 0x20080522
_wanted = False
_runner: socket.socket | None = None


@dataclass(frozen=True)
class Ran:
    """What became of a program."""

    ending: Literal["done", "error", "limit"]
    """`error`: it raised, or its outputs are no JSON; `limit`: its process was ended, mostly for want of time."""
    outputs: list[Any]
    """Of each call, as JSON has it (tuples are lists), or of each run. Empty but for `done`."""
    reason: str
    """One line for a person."""


@dataclass(frozen=True, kw_only=True)
class Programs:
    """Limits of a program. To be made when the plugin is imported: graders that are forked later can then run some."""

    cpu_s: float = 2.0
    """CPU seconds for all calls of a program together, at most 30; a verifier whose programs take 60 s is given up."""
    memory_mb: int = 512
    """Address space, in MiB, the interpreter's included."""

    def __post_init__(self) -> None:
        """
        Raises:
            FieldError: limits that can't be.
            OSError: this machine can't confine a program.
        """
        above(self, 0, "cpu_s")
        within(self, 0, 30, "cpu_s")  # half of what a grader may be silent for
        at_least(self, 256, "memory_mb")
        if platform.machine() not in _CALLS or ctypes.CDLL(None).prctl(_PR_GET_SECCOMP, 0, 0, 0, 0) < 0:
            raise OSError(f"a model's programs can't be confined here: that needs seccomp, on {' or '.join(_CALLS)}")
        global _wanted
        _wanted = True

    def run(self, source: str, function: str, calls: Sequence[Sequence[Any]]) -> Ran:
        """Execute `source`, then call its `function` with each of the argument lists. In a grader only.

        Args:
            calls: JSON values.

        Raises:
            RuntimeError: this process is no grader.
        """
        return self._told({"source": source, "function": function, "calls": calls})

    def run_main(self, source: str, inputs: Sequence[str]) -> Ran:
        """Execute `source` as a script once for each text on its standard input; the outputs are what it prints. In a
        grader only. All runs have one process, whose files are sys.stdin, sys.stdout and sys.stderr alone; what they
        print together is at most `MAX_OUTPUT_BYTES`.

        Raises:
            RuntimeError: this process is no grader.
        """
        ran = self._told({"source": source, "function": None, "calls": inputs})
        return ran if all(isinstance(text, str) for text in ran.outputs) else Ran("error", [], "it forged its outputs")

    def _told(self, program: dict[str, Any]) -> Ran:
        if _runner is None:
            raise RuntimeError("programs run in grader processes only: call this from a verifier")
        limits = {"cpu_s": self.cpu_s, "memory_bytes": self.memory_mb << 20}
        _runner.sendall(encode(program | limits))
        frames, replies = Frames(), list[Any]()
        try:
            while not replies:
                replies = frames.feed(_runner.recv(1 << 16))
        except (EOFError, OSError):
            os._exit(1)  # a grader without its runner is of no use: another one takes its tasks
        output, status = replies[0]
        return _read(output, status, len(program["calls"]))


def _read(output: str, status: int, num_calls: int) -> Ran:
    """Its last words, which may be anything."""
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        return Ran("limit", [], "out of CPU time" if name in ("SIGPROF", "SIGXCPU") else f"ended by {name}")
    if not output.startswith(_CONFINED):
        raise OSError("the kernel refuses a seccomp filter: no program was run")
    try:
        told = json.loads(output.removeprefix(_CONFINED))
        outputs = told.get("outputs")
        if isinstance(outputs, list) and len(outputs) == num_calls:
            return Ran("done", outputs, "ran")
        return Ran("error", [], str(told["error"])[:200])
    except (ValueError, RecursionError, LookupError, AttributeError):
        return Ran("error", [], "it ended without its outputs")


def start_runner() -> None:
    """Grader side, before its lock-down and its first task: a runner, when a plugin has programs to run."""
    global _runner
    if not _wanted:
        return
    for module in PRELOADED:
        importlib.import_module(module)
    grader = os.getpid()
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        try:
            _serve(theirs, grader)
        finally:
            os._exit(0)
    theirs.close()
    _runner = ours


def _serve(requests: socket.socket, grader: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != grader:
        return
    kept = requests.fileno()
    os.closerange(0, kept)  # the grader's own connection above all
    os.closerange(kept + 1, 1 << 16)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    runner = os.getpid()
    with contextlib.suppress(OSError):
        while requests.recv(1, socket.MSG_PEEK):  # what it read would be in the memory of every later program
            if (keeper := os.fork()) == 0:
                try:
                    _keep(requests, runner)
                finally:
                    os._exit(1)
            if os.waitpid(keeper, 0)[1]:
                return


def _keep(requests: socket.socket, runner: int) -> NoReturn:
    """One program, from its request to its reply."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != runner:
        os._exit(1)
    frames, asked = Frames(), list[Any]()
    while not asked:
        asked = frames.feed(requests.recv(1 << 20))
    requests.sendall(encode(_run(asked[0])))
    os._exit(0)


def _run(request: dict[str, Any]) -> tuple[str, int]:
    """What the program's process wrote, and its wait status."""
    reading, writing = os.pipe()
    keeper, pid = os.getpid(), os.fork()
    if pid == 0:
        try:
            _be_the_program(request, writing, keeper)
        finally:
            os._exit(1)
    os.close(writing)
    ends, output = time.monotonic() + 10 + 5 * request["cpu_s"], b""
    while len(output) <= MAX_OUTPUT_BYTES and select.select([reading], [], [], max(0.0, ends - time.monotonic()))[0]:
        if not (piece := os.read(reading, 1 << 16)):
            ends = 0.0
            break
        output += piece
    if ends:  # too much, or too late
        os.kill(pid, signal.SIGKILL)
    os.close(reading)
    return output.decode(errors="replace"), os.waitpid(pid, 0)[1]


def _be_the_program(request: dict[str, Any], writing: int, keeper: int) -> NoReturn:
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != keeper:
        os._exit(1)
    os.closerange(0, writing)
    os.closerange(writing + 1, 1 << 16)
    sys.stdin, sys.stdout, sys.stderr = io.StringIO(), io.StringIO(), io.StringIO()
    cpu_s, memory = request["cpu_s"], request["memory_bytes"]
    limits = {"AS": memory, "CPU": math.ceil(cpu_s) + 1, "FSIZE": 0, "CORE": 0, "NPROC": 0, "NOFILE": 0}
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    sys.setrecursionlimit(10_000)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    if not _confine(libc):
        os._exit(1)
    os.write(writing, _CONFINED.encode())
    try:
        code = compile(request["source"], "program", "exec")
        if request["function"] is None:
            outputs = [_printed(code, text) for text in request["calls"]]
        else:
            namespace: dict[str, Any] = {"__name__": "program"}
            exec(code, namespace)  # noqa: S102 - this process is made for it
            function = namespace[request["function"]]
            outputs = [function(*call) for call in request["calls"]]
        told = json.dumps({"outputs": outputs})
    except BaseException as error:
        told = json.dumps({"error": f"{type(error).__name__}: {error}"[:200]})
    data = told.encode()
    while data:
        data = data[os.write(writing, data) :]
    os._exit(0)


def _printed(code: CodeType, text: str) -> str:
    read, written = io.BytesIO(text.encode()), io.BytesIO()
    sys.stdin = io.TextIOWrapper(read, encoding="utf-8")
    sys.stdout = stdout = io.TextIOWrapper(written, encoding="utf-8")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    try:
        exec(code, namespace)  # noqa: S102 - as above
    except SystemExit as end:
        if end.code:
            raise
    finally:
        namespace.clear()  # its functions hold it: what a run made would be in memory beside the next one's
    stdout.flush()
    return written.getvalue().decode(errors="replace")


def _confine(libc: ctypes.CDLL) -> bool:
    """From here on, this process has no capabilities, and may make the calls of `_CALLS` and no others; False when the
    kernel refuses."""
    if libc.capset(struct.pack("=Ii", _CAPABILITIES_VERSION, 0), bytes(24)):
        return False
    architecture, calls, madvise = _CALLS[platform.machine()]
    steps = [(_LOAD, 0, 0, 4), (_JUMP_IF_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    steps += [(_JUMP_IF_EQUAL, len(calls) + 1, 0, madvise)]
    steps += [(_JUMP_IF_EQUAL, len(calls) - i + len(_ADVICES) + 2, 0, call) for i, call in enumerate(calls)]
    steps += [(_RETURN, 0, 0, _REFUSE), (_LOAD, 0, 0, 32)]  # its third argument, of which it takes these 32 bits
    steps += [(_JUMP_IF_EQUAL, len(_ADVICES) - i, 0, advice) for i, advice in enumerate(_ADVICES)]
    steps += [(_RETURN, 0, 0, _REFUSE), (_RETURN, 0, 0, _ALLOW)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    described = ctypes.create_string_buffer(struct.pack("@HP", len(steps), ctypes.addressof(program)))
    return libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, described, 0, 0) == 0
