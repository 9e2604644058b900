"""`t1 check --dry-run`: the commands that the batch scripts would run, from the scripts' own library."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from megatron_t1.check.machines import Machines
from megatron_t1.config import Config
from megatron_t1.servers.launch import command as vllm_command


def dry_run(cfg: Config, command: str, machines: Machines, options: list[str]) -> str:
    """The srun commands that the batch scripts would run for these options, and the vLLM command of a server."""
    root = Path(__file__).resolve().parents[2]
    library = root / "slurm" / "lib.sh"
    if not library.is_file():
        raise ValueError(f"--dry-run reads {library}, which is there in a checkout of the project only")
    words = [part for word in options for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if "--config" not in words:
        raise ValueError("--dry-run needs --config FILE: the batch scripts take the settings of a run from one")
    at = words.index("--config")
    config, rest = Path(words[at + 1]).absolute(), words[:at] + words[at + 2 :]
    env = {
        **os.environ,
        "T1_DRY_RUN": "1",
        "T1_HOME": str(root),
        "T1_PYTHON": sys.executable,
        "T1_NODES": " ".join(f"node{i + 1}" for i in range(machines.nodes)),
        "SLURM_GPUS_PER_NODE": str(machines.gpus_per_node),
        "VLLM_NODES": str(machines.vllm_nodes),
        "VLLM_GPUS": str(machines.vllm_gpus_of_node),
        "VLLM_TP": str(cfg.rollout.tp),
        "MODEL": cfg.model.hf_path,
        "RUN_DIR": cfg.run_dir,
        "RANKS": str(machines.ranks_per_node or ""),
    }
    if command not in ("rl", "sft", "evaluate", "scaling"):
        raise ValueError(f"--dry-run is for rl, sft, evaluate and scaling; there is no batch script for {command}")
    script = f'source {shlex.quote(str(library))}; t1_{command} "$@"'
    done = subprocess.run(["bash", "-c", script, "t1", str(config), *rest], env=env, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"slurm/lib.sh refused: {done.stderr or done.stdout}")
    text = done.stdout
    model_dir = Path(cfg.model.hf_path)
    if command != "sft" and (model_dir / "config.json").is_file():
        words = vllm_command(cfg.rollout, model_dir, host="NODE", port=0, device="cuda")
        text += (
            "\n# each server that `t1 serve` starts on a node, with the key in its environment:\n"
            + shlex.join(words)
            + "\n"
        )
    return text
