"""Imports the given modules once and becomes, by fork, every process that it is asked for (tests.forks).

argv: number of the socket to listen on, modules... One JSON line asks to start processes or how they ended.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import random
import runpy
import signal
import socket
import sys
import threading
import traceback
from multiprocessing import context
from typing import Any

_PR_SET_PDEATHSIG = 1


def serve(channel: socket.socket) -> tuple[dict[str, Any], dict[str, str]] | None:
    """Answers until the tests are over. Returns in a child, with what it was asked to run and its environment."""
    codes: dict[int, int] = {}
    with channel.makefile("rw") as file:
        for line in file:
            request = json.loads(line)
            if "poll" in request:
                for pid in set(request["poll"]) - codes.keys():
                    ended, status = os.waitpid(pid, os.WNOHANG)
                    if ended:
                        codes[pid] = os.waitstatus_to_exitcode(status)
                answer = [codes.get(pid) for pid in request["poll"]]
            else:
                answer = []
                for environment in request["environments"]:
                    pid = os.fork()
                    if pid == 0:
                        return request, environment
                    codes.pop(pid, None)  # numbers come again
                    answer.append(pid)
            file.write(json.dumps(answer) + "\n")
            file.flush()
    return None


def become(request: dict[str, Any], environment: dict[str, str]) -> None:
    """What is left between a fork and a process that was started: groups, files, environment, random numbers."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    for number, path in ((1, request["stdout"]), (2, request["stderr"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(request["cwd"])
    random.seed()
    sys.argv = [request["target"], *request["arguments"]]
    if request["target"].endswith(".py"):
        runpy.run_path(request["target"], run_name="__main__")
    else:
        runpy.run_module(request["target"], run_name="__main__", alter_sys=True)


def finish(code: int) -> None:
    """Ends as the interpreter would, but for taking all that was imported apart."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    listening = socket.socket(fileno=int(sys.argv[1]))
    for name in sys.argv[2:]:
        importlib.import_module(name)
    # vLLM's engine is spawned: all imports again.
    context._concrete_contexts["spawn"] = context._concrete_contexts["fork"]
    gc.freeze()  # a collection in a fork need not look at, and copy, what was imported
    asked = serve(listening)
    listening.close()
    code = 0
    try:
        if asked:
            become(*asked)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    finish(code)
