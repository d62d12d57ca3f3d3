"""Checkpoints without tokenizer.json: transformers converts their tokenizer once, in a process of its own.

Runs in: driver | server; run by path, this file is the child process. The child imports transformers, which takes
seconds and pulls in torch; the parent never does. The result is kept by the contents of the files it was made from.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

CONVERT_TIMEOUT_S = 180.0
SOURCES = (
    "vocab.json", "merges.txt", "tokenizer.model", "vocab.txt", "added_tokens.json", "special_tokens_map.json",
    "tokenizer_config.json", "chat_template.jinja", "config.json",
)  # fmt: skip
VOCABULARIES = ("vocab.json", "tokenizer.model", "vocab.txt")


def converted_tokenizer(folder: Path, cache_dir: Path | None = None) -> Path:
    """The folder with the tokenizer.json made from the slow tokenizer in `folder`; made now if it is not cached.

    `CheckpointError` where `folder` holds no tokenizer, or transformers cannot convert it.
    """
    from zmqexec.errors import CheckpointError  # not at the top: the child runs this file without the package

    if not any((folder / name).exists() for name in VOCABULARIES):
        raise CheckpointError(
            f"{folder} has no tokenizer: neither tokenizer.json nor one of {', '.join(VOCABULARIES)}; "
            "copy tokenizer.json into it, or name a folder that has one with `tokenizer`"
        )
    cache = cache_dir or Path.home() / ".cache" / "zmqexec"
    target = cache / "tokenizers" / _fingerprint(folder)
    if not (target / "tokenizer.json").exists():
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            made = Path(scratch) / "made"
            _convert(folder, made)
            if not target.exists():
                # Atomic; of two processes that convert at once, the later finds the folder there and leaves it.
                try:
                    made.rename(target)
                except OSError:
                    if not (target / "tokenizer.json").exists():
                        raise
    return target


def _fingerprint(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in SOURCES:
        path = folder / name
        if path.exists():
            data = path.read_bytes()
            digest.update(f"{name} {len(data)}\n".encode() + data)
    return digest.hexdigest()[:32]


def _convert(folder: Path, made: Path) -> None:
    from zmqexec.errors import CheckpointError

    # -P: the script's own folder, this package, must not be on the child's path, where it would hide other modules.
    command = [sys.executable, "-P", __file__, str(folder.resolve()), str(made)]
    try:
        child = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=CONVERT_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        raise CheckpointError(
            f"converting the tokenizer of {folder} took more than {CONVERT_TIMEOUT_S:.0f} s"
        ) from None
    if child.returncode or not (made / "tokenizer.json").exists():
        last = "\n".join(child.stderr.strip().splitlines()[-5:])
        raise CheckpointError(
            f"{folder} has no tokenizer.json and transformers cannot make one "
            f"(sentencepiece models need `pip install sentencepiece protobuf`):\n{last}"
        )


def _main(folder: str, made: str) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True).save_pretrained(made)


if __name__ == "__main__":
    _main(*sys.argv[1:])
