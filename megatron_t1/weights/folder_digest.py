"""Which weights a folder holds, as a short digest, so that the results of others are not taken for theirs."""

from __future__ import annotations

import hashlib
from pathlib import Path

_BLOCKS, _BLOCK_BYTES = 64, 1 << 16


def weights_digest(model_dir: Path) -> str:
    """Digest of config.json and the safetensors: their names, sizes, headers and 64 blocks of each file.

    A training step changes nearly every number, so the blocks tell checkpoints apart at 4 MiB of reading a file; a copy
    of the folder has the same digest.

    Raises:
        ValueError: no config.json or no safetensors.
    """
    files = sorted(model_dir.glob("*.safetensors"))
    if not files or not (model_dir / "config.json").is_file():
        raise ValueError(f"{model_dir} has no config.json or no safetensors: give a Hugging Face model folder")
    digest = hashlib.blake2b((model_dir / "config.json").read_bytes(), digest_size=16)
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_BLOCK_BYTES))
            for block in range(_BLOCKS):
                file.seek(block * max(0, size - _BLOCK_BYTES) // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()
