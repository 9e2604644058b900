"""A 3-billion-parameter bf16 checkpoint converted to Megatron and back, against a plain copy of the same bytes.

The checkpoint has the shapes of Qwen2.5-3B and random numbers; it is written by this script, tensor by tensor. Copy and
conversions take turns, each in a process of its own, each bringing its files to the disk; the time is that of the work,
without the imports. Right before it, its input is read, so that it is in the kernel's cache, and as much free memory as
it will fill is touched: a virtual machine's host takes free pages back, and whoever needs them next pays for that.
Memory is the kernel's peak of resident memory (VmHWM: everything, libraries and mapped files too) above that of an
interpreter that does nothing. Needs three times the checkpoint's size on the disk (about 19 GB).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from megatron_t1.weights.hf_folder import HFFolder, ShardWriter, TensorInfo
from tests.tiny import make_tiny_tokenizer

QWEN25_3B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "intermediate_size": 11008,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "bfloat16",
}
# In a process of its own: read the files of a folder, touch so many bytes of memory.
WARM = """
import mmap, os, sys
buffer = bytearray(1 << 20)
for name in os.listdir(sys.argv[1]):
    with open(os.path.join(sys.argv[1], name), 'rb', buffering=0) as file:
        while file.readinto(buffer): pass
memory = mmap.mmap(-1, int(sys.argv[2]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_HUGEPAGE)
for begin in range(0, len(memory), mmap.PAGESIZE): memory[begin] = 1
"""
# Around each job: time and CPU time from `start()` on, and the peak of the whole process.
BEFORE = """
import os, shutil, subprocess, sys, time
from pathlib import Path
def start():
    global began, began_cpu
    os.sync()
    subprocess.run([sys.executable, '-S', '-c', {warm!r}, {source!r}, '{touched}'], check=True)
    began, began_cpu = time.perf_counter(), sum(os.times()[:2])
"""
AFTER = """
print('TIME', time.perf_counter() - began, sum(os.times()[:2]) - began_cpu)
print('PEAK', [line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])
"""
JOBS = {
    "interpreter": "began = began_cpu = 0",
    "copy": "start()\n"
    "os.mkdir({out!r})\n"
    "for name in os.listdir({source!r}):\n"
    "    shutil.copyfile({source!r} + '/' + name, {out!r} + '/' + name)\n"
    "    with open({out!r} + '/' + name, 'rb+') as file: os.fsync(file.fileno())",
    "to-megatron": "from megatron_t1 import convert\nstart()\n"
    "convert.to_megatron(Path({source!r}), Path({out!r}), tp=2, pp=2)",
    "to-hf": "from megatron_t1 import convert\nstart()\nconvert.to_hf(Path({source!r}), Path({out!r}))",
}


def write_checkpoint(folder: Path, num_layers: int) -> int:
    """Returns its bytes."""
    folder.mkdir()
    make_tiny_tokenizer(folder)
    config = {**QWEN25_3B, "num_hidden_layers": num_layers}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    hidden, kv, ffn = 2048, 2 * 128, 11008
    layer = {
        **{f"self_attn.{p}_proj.weight": (rows, hidden) for p, rows in (("q", hidden), ("k", kv), ("v", kv))},
        **{f"self_attn.{p}_proj.bias": (rows,) for p, rows in (("q", hidden), ("k", kv), ("v", kv))},
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(num_layers) for name, shape in layer.items()}
    tensors = {name: TensorInfo(torch.bfloat16, shape) for name, shape in shapes.items()}
    writer = ShardWriter(folder, tensors, 4 << 30)
    noise = torch.randn(1 << 24).bfloat16()
    for number, (name, info) in enumerate(tensors.items()):  # every tensor another stretch of the noise
        count = math.prod(info.shape)
        repeated = noise.roll(number * 7919).repeat(-(-count // len(noise)))
        writer.write(name, repeated[:count].view(info.shape))
    writer.finish()
    return sum(info.num_bytes for info in tensors.values())


def run(job: str, num_bytes: int, source: str = "", out: str = "") -> dict[str, float]:
    """Seconds by the clock, CPU seconds, peak MiB of one job in a process of its own."""
    before = BEFORE.format(warm=WARM, source=source, touched=num_bytes + (1 << 30))
    code = before + JOBS[job].format(source=source, out=out) + AFTER
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=env, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{job} failed")
    words = dict(line.split(" ", 1) for line in done.stdout.splitlines() if line.startswith(("TIME", "PEAK")))
    seconds, cpu = (float(word) for word in words["TIME"].split())
    measured = {"seconds": seconds, "cpu": cpu, "peak_mib": int(words["PEAK"]) / 1024}
    print(job, json.dumps(measured), flush=True)
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=QWEN25_3B["num_hidden_layers"], help="fewer: a quick look")
    parser.add_argument("--dir", type=Path, help="where to work (default: the system's temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as tmp:
        hf, megatron, out = (f"{tmp}/{name}" for name in ("hf", "megatron", "out"))
        num_bytes = write_checkpoint(Path(hf), args.layers)
        idle = run("interpreter", 0)["peak_mib"]
        results: dict[str, list[dict[str, float]]] = {"copy": [], "to-megatron": [], "to-hf": []}
        for _ in range(args.rounds):
            results["copy"].append(run("copy", num_bytes, hf, out))
            shutil.rmtree(out)
            results["to-megatron"].append(run("to-megatron", num_bytes, hf, megatron))
            forget(hf)  # memory for three checkpoints is more than many a machine has
            results["to-hf"].append(run("to-hf", num_bytes, megatron, out))
            same = same_bytes(Path(hf), Path(out))
            shutil.rmtree(out)
            shutil.rmtree(megatron)
    print(f"{num_bytes / 1e9:.2f} GB, {args.rounds} rounds; came back the same: {same}")
    print("| job | MB/s | of copy, by the clock | CPU s | peak MiB above an idle interpreter |\n|---|---|---|---|---|")
    for job, rows in results.items():
        rate = statistics.median(num_bytes / 1e6 / row["seconds"] for row in rows)
        share = statistics.median(c["seconds"] / row["seconds"] for c, row in zip(results["copy"], rows, strict=True))
        cpu = statistics.median(row["cpu"] for row in rows)
        peak = max(row["peak_mib"] for row in rows) - idle
        print(f"| {job} | {rate:.0f} | {share:.2f} | {cpu:.1f} | {peak:.0f} |")


def forget(folder: str) -> None:
    """Take its files out of the kernel's cache."""
    for path in Path(folder).iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def same_bytes(a: Path, b: Path) -> bool:
    left, right = HFFolder(a), HFFolder(b)
    return left.tensors == right.tensors and all(
        torch.equal(left.read(name).view(torch.uint8), right.read(name).view(torch.uint8)) for name in left.tensors
    )


if __name__ == "__main__":
    main()
