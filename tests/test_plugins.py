"""A package of the user's, installed as theirs is: commands use what it adds; what is broken in it is said at once."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

from tests.extended import NEED, PACKAGE, PLUGINS, install, program
from tests.forks import WORKERS, Forks
from tests.tiny import make_tiny_tokenizer


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source") / "extend"  # pip writes beside what it installs
    shutil.copytree(PACKAGE, source)
    return install(tmp_path_factory.mktemp("site"), source)


@pytest.fixture(scope="module")
def extended(forks: Forks, installed: Path) -> Callable[..., str]:
    """`extended(command, *options)`: what it said, with the package installed."""

    def run(*arguments: object, expect: int = 0) -> str:
        done = forks.run(WORKERS / "extended_worker.py", installed, *arguments)
        assert done.returncode == expect, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


HOSTILE = {
    "reads a file": ("open('/etc/passwd')", "Operation not permitted"),
    "forks": ("import os\nos.fork()", "Operation not permitted"),
    "kills its parent": ("import os\nos.kill(os.getppid(), 9)", "Operation not permitted"),
    "stops everybody": ("import os\nos.killpg(0, 19)", "Operation not permitted"),
    "opens a socket": ("import socket\nsocket.socket()", "Operation not permitted"),
    "a thread": ("import threading\nthreading.Thread(target=print).start()", "can't start new thread"),
    "sleeps": ("import time\ntime.sleep(1000)", "Operation not permitted"),
    "puts off its end": ("import signal\nsignal.setitimer(signal.ITIMER_PROF, 0)", "Operation not permitted"),
    "ignores its end": ("import signal\nsignal.signal(signal.SIGPROF, signal.SIG_IGN)", "Operation not permitted"),
    "never ends": ("while True: pass", "out of CPU time"),
    "takes all memory": ("x = [0] * 10**9", "MemoryError"),
    "floods": ("def add(a, b): return 'x' * 10**7", "ended by SIGKILL"),
    "crashes": ("import ctypes\nctypes.string_at(0)", "ended by SIGSEGV"),
    "leaves": ("import os\nos._exit(0)", "ended without its outputs"),
    "answers for us": (
        "import os\nfor number in range(99):\n    try: os.write(number, b'{\"outputs\": [3]}')\n"
        "    except OSError: pass\nos._exit(0)",
        "ended without its outputs",
    ),
    "advises the kernel": (
        "import sys\nct = sys.modules['ctypes']\nlibc = ct.CDLL(None, use_errno=True)\nerrors = []\n"
        "for advice in (*range(30), 100, 101, 2**31 - 1, -1):\n"
        "    ct.set_errno(0)\n    libc.madvise(ct.c_size_t(0x10000), ct.c_size_t(0), advice)\n"
        "    errors.append((advice, ct.get_errno()))\n"
        "raise ValueError([advice for advice, error in errors if error != 1])",
        "ValueError: [4, 8, 14]",
    ),
    "says what no file takes": ("raise ValueError(chr(0xd800))", "ValueError: ?"),
    "looks for the gold": (
        "import gc\nraise ValueError([o for o in gc.get_objects() if isinstance(o, dict) and o.get('returns')])",
        "ValueError: []",
    ),
    "looks for earlier samples": (
        "import re, sys\nct = sys.modules['ctypes']\nlibc = ct.CDLL(None)\n"
        "libc.sbrk.restype = libc.mremap.restype = ct.c_ssize_t\n"
        "page, found = libc.sbrk(ct.c_ssize_t(0)) & ~4095, set()\n"
        "while libc.mremap(ct.c_ssize_t(page := page - 4096), ct.c_size_t(4096), ct.c_size_t(4096), 0) == page:\n"
        "    found |= set(re.findall(rb'SECR[E]T-[a-z]+', ct.string_at(page, 4096)))\n"
        "raise ValueError(sorted(found))",
        "ValueError: []",
    ),
}
SECRET = {  # its source, its inputs and its outputs, large enough to lie on the heap
    "gold": json.dumps({"function": "f", "calls": [["SECRET-input " * 99]], "returns": ["SECRET-output " * 99]}),
    "prediction": program(f"def f(x): return x.replace('input', 'output')  {'# SECRET-source ' * 99}"),
    "mode": "unit_tests",
}


SUMS = json.dumps({"inputs": ["2\n1 2\n40 1\n", "1\n-1 1", "0\n"], "outputs": ["3\n41\n", "0\n", ""]})
_EACH = "for _ in range(int(input())):\n    print(sum(map(int, input().split())))"
SCRIPTS = {
    "script": (_EACH, "3 of 3 tests pass"),
    "script with a guard": (f"def main():\n    {_EACH.replace(chr(10), chr(10) + '    ')}\n"
                            "if __name__ == '__main__':\n    main()", "3 of 3 tests pass"),
    "script on bytes": ("import sys\nit = iter(sys.stdin.buffer.read().split())\n"
                        "for _ in range(int(next(it))):\n"
                        "    sys.stdout.buffer.write(b'%d ' % (int(next(it)) + int(next(it))))", "3 of 3 tests pass"),
    "script that exits": (f"import sys\n{_EACH}\nprint('', end='\\n')\nsys.exit()\nprint(1)", "3 of 3 tests pass"),
    "script with a counter": (f"import math\nmath.n = getattr(math, 'n', 0) + 1\nn = 7\n{_EACH}\nn += 1\n"
                              "if n != 8: print(n)", "3 of 3 tests pass"),
    "script of 160 MB": ("cells = [0] * 20_000_000\ndef main():\n"
                         f"    {_EACH.replace(chr(10), chr(10) + '    ')}\nmain()", "3 of 3 tests pass"),
    "script that fails": (f"{_EACH}\nexit(3)", "SystemExit: 3"),
    "script that wants more": ("print(sum(map(int, input().split())))\ninput()\ninput()\ninput()", "EOFError"),
    "script that prints another sum": ("print(3, 41)", "1 of 3 tests pass"),
    "script that forks": ("import os\nos.fork()", "PermissionError"),
    "script that floods": ("while True: print('x' * (1 << 28))", "MemoryError"),
    "script without end": ("while True: pass", "out of CPU time"),
}  # fmt: skip


def test_its_penalty_and_its_answer_modes_grade(extended: Callable[..., str], installed: Path, tmp_path: Path) -> None:
    """And a program of a model can do nothing but compute; one after it, in the same grader, is not harmed."""
    good = program("import heapq, random\nprint('noise')\ndef add(a, b):\n    return heapq.nsmallest(1, [a + b])[0]")
    lines = [
        {"id": "sorry", "gold": "4", "prediction": "I apologize. \\boxed{4}"},
        {"id": "last", "gold": "12", "prediction": "first 3, then 12", "mode": "last_integer"},
        {"id": "good", "gold": NEED, "prediction": good, "mode": "unit_tests"},
        {"id": "half", "gold": NEED, "prediction": program("def add(a, b): return 3"), "mode": "unit_tests"},
        {"id": "secret", **SECRET},
        *({"id": name, "gold": NEED, "prediction": program(body), "mode": "unit_tests"}
          for name, (body, _) in HOSTILE.items()),
        {"id": "still good", "gold": NEED, "prediction": good, "mode": "unit_tests"},
        *({"id": name, "gold": SUMS, "prediction": program(body), "mode": "stdin_tests"}
          for name, (body, _) in SCRIPTS.items()),
        {"id": "broken gold", "gold": "?", "prediction": good, "mode": "unit_tests"},
        {"id": "no outcome", "gold": "right", "prediction": "x", "mode": "as_told"},
        {"id": "no text", "gold": "list", "prediction": "x", "mode": "as_told"},
        {"id": "three quarters", "gold": "0.75", "prediction": "x", "mode": "as_told"},
        {"id": "too much", "gold": "1.01", "prediction": "x", "mode": "as_told"},
    ]  # fmt: skip
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (installed / "told.py").write_text(
        "from megatron_t1.reward.config import verifier\nfrom megatron_t1.types import Verdict\n"
        "@verifier\ndef as_told(gold, response):\n"
        "    if gold[0].isdigit(): return Verdict('wrong', None, '', share=float(gold))\n"
        "    return Verdict('right', None, '') if gold == 'right' else Verdict('correct', [3, 4], '')\n"
    )
    extended("grade", source, out, "--plugins", "[my_t1.rewards,told]", "--reward.penalties.enabled", "[apology]",
             "--reward.num_workers", 1)  # fmt: skip
    graded = {row["id"]: row for row in map(json.loads, out.open())}
    assert graded["sorry"]["penalties"] == {"apology": "it apologizes"}
    assert {name for name, row in graded.items() if row["correct"]} == {
        *("sorry", "last", "good", "secret", "still good"),
        *(name for name, (_, ending) in SCRIPTS.items() if ending.startswith("3 of 3")),
    }
    assert graded["half"]["reason"] == "1 of 2 tests pass"
    for name, (_, ending) in SCRIPTS.items():
        assert graded[name]["reason"].startswith(ending), graded[name]
    for name, (_, reason) in HOSTILE.items():
        assert reason in graded[name]["reason"], name
    assert (graded["three quarters"]["reward"], graded["three quarters"]["outcome"]) == (0.75, "wrong")
    assert graded["too much"]["outcome"] == "crash"
    assert "share = 1.01 must lie in 0 to 1" in graded["too much"]["reason"]
    assert graded["broken gold"]["outcome"] == "crash"
    assert "JSONDecodeError" in graded["broken gold"]["reason"]
    for name, field in (("no outcome", "outcome"), ("no text", "extracted")):
        assert graded[name]["outcome"] == "crash"
        assert re.search(rf"ValidationError: .* at `\$.{field}`", graded[name]["reason"]), graded[name]


def test_a_program_of_root_has_no_capabilities() -> None:
    code = (
        "import ctypes, os, signal\n"
        "from megatron_t1.reward.processes import programs, worker\n"
        "reading, writing = os.pipe()\n"
        "if (pid := os.fork()) == 0:\n"
        "    libc = ctypes.CDLL(None)\n"
        "    libc.prctl(worker.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)\n"
        "    os.write(writing, b'+' if programs._confine(libc) else b'-')\n"
        "    while True: pass\n"
        "assert os.read(reading, 1) == b'+'\n"
        "print(open(f'/proc/{pid}/status').read())\n"
        "os.kill(pid, signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    held = dict(line.split(":\t") for line in done.stdout.splitlines() if line.startswith("Cap"))
    assert {held[name] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {"0" * 16}


def test_check_knows_what_it_adds(extended: Callable[..., str], tmp_path: Path) -> None:
    """Its model family, chat template, answer mode, question set, loss and advantage."""
    model = tmp_path / "llama"
    tokenizer = make_tiny_tokenizer(model)
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(model)
    questions = tmp_path / "train.jsonl"
    question = {"prompt": "1+1?", "answer": "2", "mode": "last_integer"}
    questions.write_text("".join(json.dumps({"id": i, **question}) + "\n" for i in range(40)))
    options = ["--config", PACKAGE / "extend.yaml", "--model.hf_path", model, "--run_dir", tmp_path / "run",
               "--sampling.max_new_tokens", 64, "--evaluate.sampling.max_new_tokens", 64]  # fmt: skip
    said = extended("check", *options, "--data.train", questions, "--for", "rl")
    assert "LlamaForCausalLM" in said
    assert "no problem found" in said
    # "user: 1+1?\nassistant: " is 22 bytes, each a token: the plugin's template, not the model's.
    assert "the longest of the first 40: 22 tokens" in said
    said = extended("check", *options, "--evaluate.sets", "[times_tables]", "--for", "evaluate")
    assert "set times_tables: 64 questions" in said
    extended("convert", "to-megatron", model, tmp_path / "megatron", "--plugins", "my_t1.llama")
    said = extended("convert", "verify", model, tmp_path / "megatron", "--plugins", "my_t1.llama")
    assert "are the same: names, shapes, dtypes and every byte" in said


BROKEN = {
    "raises": ("import json\njson.loads('{')\n", ["line 2, in <module>", "JSONDecodeError"]),
    "ends": ("import sys\nsys.exit('no')\n", ["line 2", "SystemExit: no"]),
    "no_python": ("def f(:\n", ["no_python.py", "SyntaxError"]),
    "needs": ("import not_there\n", ["line 1, in <module>", "No module named 'not_there'"]),
    "twice": ("from megatron_t1.reward.penalties import penalty\n@penalty\ndef overlong(c, r): ...\n",
              ["line 2, in <module>", "penalty 'overlong' of twice is there already"]),
}  # fmt: skip


def test_a_broken_one_is_refused_with_its_own_traceback(extended: Callable[..., str], installed: Path) -> None:
    for name, (source, said) in BROKEN.items():
        (installed / f"{name}.py").write_text(source)
        told = extended("rl", "--plugins", f"[{name}]", expect=1)
        assert f"plugins = {name} can't be loaded" in told
        assert all(part in told for part in said), told
        assert "importlib" not in told
        assert "megatron_t1/cli" not in told
    (installed / "no_code").mkdir()
    assert "no_code is a folder without code" in extended("rl", "--plugins", "[no_code]", expect=1)
    told = extended("rl", "--plugins", "[not_installed.rewards]", expect=1)
    assert "No module named 'not_installed'; install the package here" in told
    assert "Traceback" not in told


def test_what_no_plugin_brings_is_named(extended: Callable[..., str]) -> None:
    unknown = ["--loss.token_loss", "ppo", "--loss.advantage", "gae", "--data.chat_template", "x",
               "--reward.penalties.enabled", "[apology,other]"]  # fmt: skip
    told = extended("rl", "--plugins", PLUGINS, *unknown, expect=1)
    assert "loss.token_loss = 'ppo' has the token loss 'ppo', which is not known; known: t1, t1_uncertain" in told
    assert "loss.advantage = 'gae' has the advantage 'gae'" in told
    assert "data.chat_template = 'x' has the chat template 'x', which is not known; known: plain" in told
    assert "the penalty 'other', which is not known; known: apology, garbled, language" in told
