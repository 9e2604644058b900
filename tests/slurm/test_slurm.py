"""The batch scripts on a real Slurm with emulated nodes (`cluster.sh`): accepted, run, stopped, requeued, failed.

Skipped with a word where Slurm is not installed (`make slurm-tools`) or namespaces are not allowed; where
T1_REQUIRE_SLURM is set, as in CI, that is an error.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.forks import ROOT, environment
from tests.tiny import make_tiny_qwen2

NOT_SUBMITTED = ("lib.sh", "pipeline.sh")
SCRIPTS = sorted(p for p in (ROOT / "slurm").glob("*.sh") if p.name not in NOT_SUBMITTED and not p.is_symlink())
SHELL = [*sorted((ROOT / "slurm").glob("*.sh")), *sorted((ROOT / "tests/slurm").glob("*.sh"))]
CLUSTER = Path(__file__).with_name("cluster.sh")


def missing() -> str | None:
    for command in ("slurmctld", "slurmd", "sbatch", "munged", "ip", "shellcheck"):
        if not shutil.which(command, path=os.environ["PATH"] + ":/usr/sbin:/sbin"):
            return f"{command} is not installed: make slurm-tools"
    if os.geteuid() != 0:
        return "the emulated cluster needs root for its namespaces"
    return None


@pytest.fixture(autouse=True, scope="module")
def slurm() -> None:
    if reason := missing():
        if os.environ.get("T1_REQUIRE_SLURM"):
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    make_tiny_qwen2(folder / "model")
    for name, more in (("rl", 1), ("heldout", 2)):
        questions = [{"id": str(i), "prompt": f"{i}+{more}?", "answer": str(i + more)} for i in range(8)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    example = {"prompt": "1+1?", "response": "\\boxed{2}"}
    (folder / "sft.jsonl").write_text((json.dumps(example) + "\n") * 8)
    return folder


def try_out(scenario: str, num_nodes: int, work: Path, timeout_s: float = 3500) -> dict:
    """Runs a function of scenarios.py on a fresh cluster; what it saw."""
    command = [CLUSTER, "-n", str(num_nodes), sys.executable, Path(__file__).with_name("scenarios.py"), scenario, work]
    done = subprocess.run(
        ["bash", *map(str, command)], capture_output=True, text=True, timeout=timeout_s, cwd=ROOT,
        env=environment(PATH=os.environ["PATH"] + ":/usr/sbin:/sbin"),
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-12000:]
    return json.loads((work / "seen.json").read_text())


def late_directives(text: str) -> list[str]:
    """`#SBATCH` lines after the first command: Slurm ignores them in silence."""
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if line.strip() and not line.startswith("#")), len(lines))
    return [line for line in lines[first:] if line.startswith("#SBATCH")]


def test_no_directive_comes_too_late() -> None:
    for script in SCRIPTS:
        assert late_directives(script.read_text()) == []
    assert late_directives("#!/bin/bash\n#SBATCH --nodes=1\n\nset -e\n#SBATCH --time=1\n") == ["#SBATCH --time=1"]


def test_the_scripts_are_alike() -> None:
    """A user edits account, partition and paths: everything else is the same but for name and number of nodes."""

    def directives(script: Path) -> list[str]:
        return [
            re.sub(r"(job-name|nodes)=.*", r"\1", line) for line in script.read_text().splitlines() if "#SBATCH" in line
        ]

    assert len(SCRIPTS) == 7
    assert len({tuple(directives(script)) for script in SCRIPTS}) == 1
    (signalled,) = re.findall(r"--signal=B:USR1@(\d+)", "\n".join(directives(SCRIPTS[0])))
    (grace,) = re.findall(r"GRACE_S:-(\d+)", (ROOT / "slurm/lib.sh").read_text())
    assert int(grace) == int(signalled) - 60
    for wanted in ("--requeue", "--open-mode=append", "--account", "--partition"):
        assert any(wanted in line for line in directives(SCRIPTS[0])), wanted


def dry_run(script: str, *options: object, **variables: object) -> str:
    """The srun commands of a batch script, without the shell's backslashes."""
    env = {"T1_DRY_RUN": "1", "T1_NODES": "n1 n2", "T1_HOME": ROOT, "T1_PYTHON": sys.executable, "VLLM_NODES": 0}
    done = subprocess.run(
        ["bash", ROOT / f"slurm/{script}.sh", *map(str, options)], capture_output=True, text=True, cwd=ROOT,
        env=environment(**{name: str(value) for name, value in (env | variables).items()}),
    )  # fmt: skip
    return done.stdout.replace("\\", "") if done.returncode == 0 else f"{done.returncode}: {done.stdout}"


@pytest.mark.parametrize(("script", "option"), [("rl", "--data.heldout "), ("curate", "--curate.evaluation=[")])
def test_held_out_questions_stay_out_of_the_training(tmp_path: Path, script: str, option: str) -> None:
    heldout = tmp_path / "heldout.jsonl"
    given = f"{option}{heldout}"
    assert option not in dry_run(script, DATA=tmp_path)
    heldout.write_text('{"id": "1", "prompt": "1+1?", "answer": "2"}\n')
    lines = dry_run(script, DATA=tmp_path).splitlines()
    assert len(lines) == 3
    assert all(given in line for line in lines)
    assert given not in dry_run("evaluate", DATA=tmp_path)
    config = tmp_path / "own.yaml"
    config.write_text("data: {heldout: /own.jsonl}\ncurate: {evaluation: [math500]}\n")
    assert given not in dry_run(script, DATA=tmp_path, CONFIG=config)
    own = ("--data.heldout", "/own.jsonl", "--curate.evaluation", "[math500]")
    assert given not in dry_run(script, *own, DATA=tmp_path)


def test_chains_are_not_written_without_settings(tmp_path: Path) -> None:
    for config in ("glm-4-9b", "qwen2.5-14b", "qwen2.5-32b"):
        assert "--rollout.tp " in dry_run("synthesize", CONFIG=f"examples/{config}/synthesize.yaml")
    assert re.match("2: .*FAILED: CONFIG=/none.yaml is not there", dry_run("synthesize", CONFIG="/none.yaml"))


def test_where_servers_and_trainer_go_when_no_node_is_for_vllm_alone(tmp_path: Path) -> None:
    for script, tasks, nodes, gpus in (("rl", 8, "n1,n2", "4,5,6,7"), ("evaluate", 1, "n1", "0,1,2,3,4,5,6,7")):
        *serve, trainer = dry_run(script, RUN_DIR=tmp_path, VLLM_TP=2).splitlines()
        assert [re.findall(r"--nodelist=(\S+) .* -m megatron_t1 serve", line) for line in serve] == [["n1"], ["n2"]]
        assert f"--ntasks={tasks} --nodelist={nodes} " in trainer
        assert f"-m megatron_t1 {script} " in trainer
        assert f"--rollout.await_servers {len(gpus.split(','))} " in trainer
        for line in (*serve, trainer):
            assert "--rollout.gpu_ids [" + gpus + "] " in line


def chains(tmp_path: Path, commands: dict[str, str], **variables: str) -> Callable[..., tuple[int, list[str]]]:
    """pipeline.sh with stand-ins for Slurm's commands; its exit code and what it says."""
    for name, script in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\ncd {tmp_path}\n{script}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "calls").touch()
    env = {"MODEL": "/m", "DATA": "/d", "RUN_DIR": str(tmp_path / "run"), "T1_HOME": str(ROOT),
           "PATH": f"{tmp_path}:{os.environ['PATH']}", **variables}  # fmt: skip

    def pipeline(*words: str, **more: str) -> tuple[int, list[str]]:
        command = ["bash", ROOT / "slurm/pipeline.sh", *words]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(**(env | more)))
        return done.returncode, done.stdout.splitlines()

    return pipeline


def test_a_stage_takes_what_the_one_before_wrote(tmp_path: Path) -> None:
    stand_ins = {"sbatch": 'echo "$MODEL $CONFIG $@" >>calls; wc -l <calls', "squeue": "", "scontrol": "exit 1"}
    pipeline = chains(tmp_path, stand_ins, CONFIGS="examples/glm-4-9b", SYNTHESIZE_MODEL="/instructed")
    run = tmp_path / "run"

    def submitted() -> list[str]:
        calls = (tmp_path / "calls").read_text().splitlines()
        (tmp_path / "calls").write_text("")
        (run / "pipeline/jobs").unlink()
        return [re.sub(r" --parsable .*slurm", "", call) for call in calls]

    (tmp_path / "empty").mkdir()
    code, said = pipeline(CONFIGS=str(tmp_path / "empty"))
    assert code == 2
    assert said[0].startswith(f"synthesize: {tmp_path}/empty/synthesize.yaml is not there")
    assert not (tmp_path / "calls").read_text(), "nothing was submitted"
    chain, curated = f"--data.sft {run}/synthesize/sft.jsonl", f"--data.train {run}/curate/prompts.jsonl"
    config = "examples/glm-4-9b"
    assert pipeline("--seed", "1")[0] == 0
    assert submitted()[:4] == [
        f"/instructed {config}/synthesize.yaml/synthesize.sh",
        f"/m {config}/sft.yaml/sft.sh {chain} --seed 1",
        f"{run}/sft/hf {config}/rl.yaml/curate.sh --seed 1",
        f"{run}/sft/hf {config}/rl.yaml/rl.sh {curated} --seed 1",
    ]
    assert pipeline(STAGES="sft rl")[0] == 0
    assert submitted() == [f"/m {config}/sft.yaml/sft.sh", f"{run}/sft/hf {config}/rl.yaml/rl.sh"], "files of DATA"
    for name in ("synthesize/sft.jsonl", "curate/prompts.jsonl"):
        (run / name).parent.mkdir()
        (run / name).touch()
    assert pipeline(STAGES="sft rl")[0] == 0
    assert submitted() == [
        f"/m {config}/sft.yaml/sft.sh {chain}",
        f"{run}/sft/hf {config}/rl.yaml/rl.sh {curated}",
    ], "what a chain of before wrote"


def test_a_chain_that_sbatch_refuses_half_way_is_gone_on_with(tmp_path: Path) -> None:
    """With stand-ins for Slurm's commands: no cluster of ours refuses the third job, or has forgotten one."""
    commands = {
        "sbatch": """[ "$(wc -l <calls)" != 2 ] || [ -e refused ] || { touch refused; exit 1; }
echo "$@" >>calls; wc -l <calls""",
        "squeue": '[ "$*" = "-h -o %i -j 2" ] && echo 2',
        "scontrol": "echo 'Invalid job id specified' >&2; exit 1",
    }
    pipeline = chains(tmp_path, commands, STAGES="sft rl evaluate")
    assert pipeline()[0] == 1
    forgotten = "is not known to Slurm any more, and left no result"
    assert pipeline("status") == (0, [f"{stage}: job {n} {forgotten}" for n, stage in enumerate(("sft", "rl"), 1)])
    (tmp_path / "run/sft/hf").mkdir(parents=True)
    (tmp_path / "run/sft/hf/config.json").touch()
    on_its_way = "rl: job 2 is on its way (to submit it anew, scancel it first)"
    assert pipeline() == (0, ["sft: done", on_its_way, "evaluate: submitted as job 3"])
    now = ["sft: job 1 finished", f"rl: job 2 {forgotten}", f"evaluate: job 3 {forgotten}"]
    assert pipeline("status") == (0, now)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [re.findall(r"afterok:(\d)|/(\w+)\.sh", call)[-1][1] for call in calls] == ["sft", "rl", "evaluate"]
    assert "afterok:2" in calls[2]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (
            ["slurmstepd-n1: error: execve(): env: No such file or directory"],
            "slurmstepd-n1: error: execve(): env: No ",
        ),
        (
            ["slurmstepd: error: pyxis: failed to import", "srun: error: n1: task 0: Exited"],
            "slurmstepd: error: pyxis: f",
        ),
        (["t1 rl: error: a", "slurmstepd: error: *** STEP 1.0 CANCELLED"], "t1 rl: error: a"),
        (["x", "t1 rl: error: a", "b"], "t1 rl: error: a [...] b"),
        (["t1 rl: error: a", "2026-01-01 00:00:00 job 1.0: starts on n1", "srun: error: b"], "srun: error: b"),
    ],
)
def test_the_last_line_has_the_reason_where_the_command_never_began(
    lines: list[str], said: str, tmp_path: Path
) -> None:
    log = tmp_path / "trainer.log"
    log.write_text("".join(f"{line}\n" for line in ["2026-01-01 00:00:00 job 1.0: starts on n1", *lines]))
    command = ["bash", "-c", f"source {ROOT}/slurm/lib.sh; last_words {log}"]
    assert subprocess.run(command, capture_output=True, text=True).stdout.startswith(said)


def test_a_finished_stage_is_known_whatever_its_folder_is_called(tmp_path: Path) -> None:
    pipeline = chains(tmp_path, {"sbatch": "exit 1"}, STAGES="sft", RUN_DIR=str(tmp_path / "run[1] *"))
    (tmp_path / "run[1] */sft/hf").mkdir(parents=True)
    (tmp_path / "run[1] */sft/hf/config.json").touch()
    assert pipeline() == (0, ["sft: done"])


def test_jobs_of_a_site_that_exports_little_and_of_one_that_is_being_requeued(tmp_path: Path) -> None:
    """What sbatch was told to export (SBATCH_EXPORT, --export) is not what the job's steps need, and a job that ends
    to begin again is not submitted a second time."""
    seen = try_out("few_variables", 1, tmp_path)
    assert seen["state"] == "COMPLETED"
    assert "-m megatron_t1 convert verify a b, MASTER_ADDR=n1" in seen["step"]
    assert f"--model.hf_path {tmp_path}/a model" in seen["chain"]
    assert f"--data.sft {tmp_path}/sft.jsonl" in seen["chain"]
    assert seen["state of the chain"] == "COMPLETING"
    assert seen["again"].startswith("sft: job 2 is on its way")


def test_shellcheck_has_nothing_to_say() -> None:
    done = subprocess.run(["shellcheck", "-x", *map(str, SHELL)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_sbatch_accepts_the_headers_on_four_nodes_of_eight_gpus(tmp_path: Path) -> None:
    seen = try_out("headers", 4, tmp_path)
    for script in SCRIPTS:
        assert seen[script.name]["code"] == 0, seen[script.name]
        assert "to start at" in seen[script.name]["said"]
    for broken in ("no_such_option", "time", "nodes", "gpus"):
        assert seen[broken]["code"] != 0, broken


@pytest.mark.timeout(3600)
def test_a_failed_node_leaves_a_job_on_fewer_nodes_and_scancel_ends_it(task: Path, tmp_path: Path) -> None:
    """On nodes that are shared: servers asleep while the trainer trains, its state on the host while they generate."""
    shutil.copytree(task, tmp_path / "work")
    seen = try_out("other_nodes", 3, tmp_path / "work")
    assert seen["state"] == "CANCELLED", seen["text"]
    assert seen["restarts"] == "1"
    assert "job 1.0: rl on n1 n2 n3," in seen["log"]
    assert "job 1.1: rl on n1 n3," in seen["log"]
    trainer = (tmp_path / "work/run/logs/trainer.log").read_text()
    assert re.findall(r"(\d) trainer processes", trainer) == ["3", "2"]
    metrics = rows(tmp_path / "work/run/rl/metrics.jsonl")
    assert [row["step"] for row in metrics] == seen["steps"] == list(range(1, len(metrics) + 1))
    assert all(row["logprob_diff"] < 1e-3 and row["oldest_version"] == row["step"] - 1 for row in metrics)
    assert all(row["seconds/turns"] > 0 for row in metrics)
    assert seen["left"] == [], "processes outlived scancel"
    assert seen["checkpoints"]


@pytest.mark.timeout(3600)
def test_a_chain_that_is_struck_ends_with_the_files_of_one_that_is_not(task: Path, tmp_path: Path) -> None:
    """SFT, RL, evaluation, scaling by pipeline.sh in containers. A killed server, a requeue and a cancelled job cost RL
    no step, and the same command goes on with the chain."""
    work = tmp_path / "work"
    shutil.copytree(task, work)
    seen = try_out("chain", 1, work)
    alone, struck, text = work / "run", work / "struck", seen["text"]

    def states(status: str) -> dict[str, str]:
        return dict(line.split(": ", 1) for line in seen[status].splitlines())

    stages = ["sft", "rl", "evaluate", "scaling"]
    assert list(states("submitted")) == stages
    assert all(state.endswith("finished") for state in states("status").values()), text
    assert all("CANCELLED" in states("struck")[stage] for stage in stages[1:]), "what waits for RL is taken back"
    assert states("submitted again")["sft"] == "done"
    assert all(state.endswith("finished") for state in states("status again").values()), text
    assert states("done") == dict.fromkeys(stages, "done")
    # It went on from where it was stopped, although its own next checkpoint was far.
    assert 1 <= len(seen["stopped_at"]) < len(seen["cancelled_at"]) < 8, "the job was over before it was struck"
    assert f"step_{seen['stopped_at'][-1]:08d}" in seen["checkpoints"]
    log, said = seen["rl"], (struck / "logs/trainer.log").read_text()
    assert re.search(r"job \d+\.0: rl on n1", log), "the log of the first start is kept"
    assert "asked to stop" in log
    assert re.search(r"job \d+\.0: requeued", log)
    assert "stopped as asked" in said
    # Its `t1 serve` or the trainer may see first that it is gone.
    why = r"(ended|no good answer.*|was given up by the trainer) and is started again"
    assert re.search(why, (struck / "logs/serve_n1.log").read_text())
    assert "a trainer rank was killed" not in log, "the trainer outlives its only server"
    assert "was lost and is started again" in said

    metrics, others = rows(alone / "rl/metrics.jsonl"), rows(struck / "rl/metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, 9))
    assert any(row["pg_loss"] for row in metrics)
    for row in others:
        assert row["oldest_version"] == row["step"] - 1
        assert row["logprob_diff"] < 1e-3
    differs = re.compile("seconds|_per_s$|^idle/|^graders/")
    assert without(others, differs) == without(metrics, differs)
    samples = [rows(run / "rl/samples.jsonl") for run in (alone, struck)]
    for row in (*samples[0], *samples[1]):
        del row["reward"]["seconds"]
    assert samples[0] == samples[1]
    assert len(files(alone / "rl/hf") | files(alone / "evaluate") | files(alone / "scaling")) > 10
    for folder in ("rl/hf", "evaluate", "scaling"):
        assert files(struck / folder) == files(alone / folder)
    assert seen["convert"] == "COMPLETED", text
    assert (work / "hf/model.safetensors").read_bytes() == (alone / "rl/hf/model.safetensors").read_bytes()

    assert set(seen["containers"]) == {"pyxis registry/t1:1", "apptainer t1.sif"}
    assert seen["left"] == []
    for run in (alone, struck):
        key = (run / "server_key").read_text()
        assert key not in "".join([*seen["command_lines"], *(path.read_text() for path in work.rglob("*.log"))])
    assert list((alone / "servers").iterdir()) == []


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without(found: list[dict], names: re.Pattern[str]) -> list[dict]:
    return [{name: value for name, value in row.items() if not names.search(name)} for row in found]


def files(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.timeout(3600)
def test_a_job_that_can_not_work_says_why_in_its_last_line(task: Path, tmp_path: Path) -> None:
    shutil.copytree(task, tmp_path / "work")
    seen = try_out("clear_errors", 2, tmp_path / "work")
    assert {case["JobState"] for case in seen.values()} == {"FAILED"}
    typo, server = seen["typo"]["log"].splitlines(), seen["server"]["log"].splitlines()
    assert typo[-1].endswith("FAILED: t1 check refused the configuration: see above")
    assert "problem: rl.stepps is not a setting; did you mean rl.steps?" in typo
    assert seen["typo"]["ExitCode"] == "2:0"
    assert re.search("FAILED: all vLLM servers ended: t1 serve: error: .*: --no-such-option$", server[-1])
    assert all(case["left"] == [] for case in seen.values())
