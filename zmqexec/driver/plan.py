"""From settings to what will be run: everything that can be refused is refused here, before any process starts.

Runs in: driver.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from zmqexec.cache_size import cpu_cache_bytes
from zmqexec.checkpoint import Checkpoint
from zmqexec.config import EngineConfig
from zmqexec.demo import CHECKPOINT as DEMO_CHECKPOINT
from zmqexec.driver.gpus import choose_device
from zmqexec.errors import ConfigError
from zmqexec.model_config import (
    GPU_HEAD_DIMS,
    ModelConfig,
    check_tensor_parallel,
    load_model_config,
    padded_head_dim,
)
from zmqexec.protocol import LoadModel

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
GPU_BLOCK_STEP = 16
MAX_GPU_SEQS = 1024
GPU_STEP_TOKENS = 8192
"""Of prompts, beside one of every running sequence, which wait for it: half as many took 89 ms of an H100, with 7B.
Whole prompts fill such a step whatever runs."""


@dataclass(frozen=True)
class Plan:
    """A checked engine configuration, with the values that follow from the model and the machine filled in."""

    config: EngineConfig
    model_dir: Path
    model: ModelConfig
    dtype: str
    device: Literal["cpu", "cuda"]
    max_model_len: int
    num_threads: int

    @property
    def block_bytes(self) -> int:
        """Bytes of one block on one rank."""
        model = self.model
        if self.device == "cuda" and self.dtype != "float32":
            model = msgspec.structs.replace(model, head_dim=padded_head_dim(model.head_dim))
        per_token = model.kv_bytes_per_token(self.config.tensor_parallel_size, DTYPE_BYTES[self.dtype])
        return self.config.block_size * per_token

    @property
    def longest_shared_prompt(self) -> int | None:
        """Longer prompts share cached blocks only with prompts of their own length; None: there is no such limit.

        Dynamic NTK rotates the keys of a prompt beyond the model's own length by angles that depend on its length.
        """
        return self.model.max_position_embeddings if self.model.rope.rope_type == "dynamic" else None

    def load_message(self, epoch: int) -> LoadModel:
        """What the workers need to load."""
        return LoadModel(
            epoch, self.config, str(self.model_dir), self.dtype, self.max_model_len, self.num_threads, self.device
        )

    def num_blocks(self, kv_cache_bytes: int) -> int:
        """Blocks that fit; `ConfigError` if a single sequence of the longest length would not."""
        num_blocks = kv_cache_bytes // self.block_bytes
        needed = -(-self.max_model_len // self.config.block_size)
        if num_blocks < needed:
            num_tokens = num_blocks * self.config.block_size
            given = self.config.kv_cache_memory_bytes is not None
            room = f"kv_cache_memory_bytes={kv_cache_bytes}" if given else f"the free memory, {kv_cache_bytes} bytes,"
            param, remedy = "kv_cache_memory_bytes", f"{'raise' if given else 'set'} kv_cache_memory_bytes to that"
            if self.device == "cuda" and not given:
                param, remedy = "gpu_memory_utilization", "raise gpu_memory_utilization, use more GPUs"
            shorter = f", or lower max_model_len to at most {num_tokens}" if num_tokens >= 2 else ""
            raise ConfigError(
                f"{room} holds {num_tokens} tokens of KV cache, but one sequence of max_model_len={self.max_model_len} "
                f"needs {needed * self.block_bytes} bytes; {remedy}{shorter}",
                param,
            )
        return num_blocks


def make_plan(config: EngineConfig) -> Plan:
    """Check `config` against the checkpoint and the machine. Raises `ConfigError` or `CheckpointError`."""
    model_dir = DEMO_CHECKPOINT if config.model is None else Path(config.model).expanduser().absolute()
    model = load_model_config(model_dir)
    check_tensor_parallel(model, config.tensor_parallel_size)
    device = choose_device(config)
    if config.tensor_parallel_size > 1 and not Path("/proc/self/fd").exists():
        raise ConfigError(
            f"tensor_parallel_size={config.tensor_parallel_size}: on this platform ranks cannot exchange their partial "
            "sums, for it has no /proc/PID/fd; use tensor_parallel_size=1",
            "tensor_parallel_size",
        )
    if config.load_format == "auto":
        Checkpoint(model_dir).check(model)
    max_model_len = config.max_model_len or model.max_position_embeddings
    if max_model_len > model.max_position_embeddings and model.rope.rope_type != "dynamic":
        raise ConfigError(
            f"max_model_len={max_model_len} is more than the model's max_position_embeddings="
            f"{model.max_position_embeddings}; lower it to that",
            "max_model_len",
        )
    if device == "cuda" and config.max_num_batched_tokens is None:
        config = msgspec.structs.replace(config, max_num_batched_tokens=GPU_STEP_TOKENS + config.max_num_seqs)
    if not config.enable_chunked_prefill and config.step_tokens < max_model_len:
        raise ConfigError(
            f"max_num_batched_tokens={config.step_tokens} is less than max_model_len={max_model_len} and "
            "enable_chunked_prefill is off: a long prompt could never run; raise it, or turn chunking on",
            "max_num_batched_tokens",
        )
    plan = Plan(
        config=config,
        model_dir=model_dir,
        model=model,
        dtype=_auto_dtype(model, device) if config.dtype == "auto" else config.dtype,
        device=device,
        max_model_len=max_model_len,
        num_threads=config.num_threads or max(1, _num_cores() // config.tensor_parallel_size),
    )
    if device == "cuda":
        _check_for_gpu(plan)
        if config.kv_cache_memory_bytes is not None:
            plan.num_blocks(config.kv_cache_memory_bytes)
    else:
        # The workers say the last word, when their weights are loaded; what cannot fit even now is refused now.
        plan.num_blocks(cpu_cache_bytes(config, model, max_model_len, DTYPE_BYTES[plan.dtype]))
    return plan


def _auto_dtype(model: ModelConfig, device: str) -> str:
    """float32 on the CPU. On a GPU the checkpoint's own type, and bfloat16 for a float32 one, as in vLLM."""
    if device == "cpu":
        return "float32"
    return "float16" if model.dtype == "float16" else "bfloat16"


def _check_for_gpu(plan: Plan) -> None:
    """`ConfigError` for what the kernels cannot do."""
    if plan.config.max_num_seqs > MAX_GPU_SEQS:
        raise ConfigError(
            f"max_num_seqs={plan.config.max_num_seqs}: on a GPU it must be at most {MAX_GPU_SEQS}", "max_num_seqs"
        )
    if plan.dtype == "float32":
        return  # plain torch
    if plan.config.block_size % GPU_BLOCK_STEP:
        raise ConfigError(
            f"block_size={plan.config.block_size}: on a GPU it must be a multiple of {GPU_BLOCK_STEP}", "block_size"
        )
    if plan.model.head_dim > GPU_HEAD_DIMS[-1]:
        raise ConfigError(
            f"the model's head_dim={plan.model.head_dim} is not supported on a GPU in {plan.dtype}: it must be at most "
            f"{GPU_HEAD_DIMS[-1]}; use dtype='float32' or device='cpu'",
            "device",
        )


def _num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
