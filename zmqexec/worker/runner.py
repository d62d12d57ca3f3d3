"""A rank's model from loading to sampled tokens: what the worker's loop calls for each message.

Runs in: worker.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from zmqexec.bus.status import Phase
from zmqexec.cache_size import cpu_cache_bytes
from zmqexec.errors import ConfigError, InternalError
from zmqexec.model_config import Sharding, check_tensor_parallel, load_model_config
from zmqexec.protocol import LoadModel, StepInput, StepOutput
from zmqexec.worker.batch import Batch, Rows
from zmqexec.worker.check_ranks import check_ranks
from zmqexec.worker.collectives import Collectives, PhasedCollectives
from zmqexec.worker.kernels.plan import DecodePlanner
from zmqexec.worker.kv_cache import KVCache
from zmqexec.worker.models.llama import LlamaModel
from zmqexec.worker.models.weights import LlamaWeights, RandomSource, SafetensorsSource, TensorSource, load_weights
from zmqexec.worker.sampler import HasLogits, Sampled, Sampler

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class RowByRow:
    """The logits of `inner`, each row computed by itself."""

    def __init__(self, inner: HasLogits) -> None:
        self._inner = inner

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """As `HasLogits.logits`, of at least one row."""
        return torch.cat([self._inner.logits(row) for row in torch.split(hidden, 1)])


class ModelRunner:
    """One rank of the model. Call `load`, then `init_cache`, then `run` for every step, all from one thread.

    Every rank runs every step and gets the same token ids; log-probabilities are built on rank 0 alone. `collectives`
    stays the caller's to close. `on_phase` is told what the rank is doing.

    A deterministic one computes every token as a decode step of its own: torch's products and attention, and even the
    elements of one tensor, are then computed by the same calls with the same shapes, whatever the step.
    """

    def __init__(
        self, load: LoadModel, collectives: Collectives, on_phase: Callable[[Phase], None] = lambda phase: None
    ) -> None:
        if load.dtype not in DTYPES:
            raise ConfigError(f"dtype={load.dtype!r}: a worker computes in {', '.join(DTYPES)}", "dtype")
        self._load = load
        self._dtype = DTYPES[load.dtype]
        self._collectives = PhasedCollectives(collectives, on_phase)
        self._model_config = load_model_config(Path(load.model_dir))
        check_tensor_parallel(self._model_config, collectives.tp_size)
        self._sharding = Sharding(self._model_config, collectives.rank, collectives.tp_size)
        self._sampler = Sampler(
            self._model_config.vocab_size,
            self._sharding.vocab.start,
            self._collectives,
            wants_logprobs=collectives.rank == 0,
            one_at_a_time=load.config.deterministic,
        )
        self._model: LlamaModel | None = None
        self._cache: KVCache | None = None
        self._planner: DecodePlanner | None = None
        self._batch: Batch | None = None

    def load(self, on_progress: Callable[[int, int], None] = lambda done, total: None) -> int:
        """Load this rank's shard, calling `on_progress(done_bytes, total_bytes)`; returns bytes for the KV cache.

        `CheckpointError` where the checkpoint lacks a tensor or has one of an unsupported type.
        """
        torch.set_num_threads(self._load.num_threads)
        with torch.inference_mode():
            weights = self.load_weights(on_progress)
            self._model = LlamaModel(
                self._model_config, self._sharding, weights, self._collectives, self._load.max_model_len
            )
        return cpu_cache_bytes(self._load.config, self._model_config, self._load.max_model_len, self._dtype.itemsize)

    def load_weights(self, on_progress: Callable[[int, int], None]) -> LlamaWeights:
        """This rank's shard of the checkpoint, or a random one; `load` begins with it."""
        config, collectives = self._model_config, self._collectives
        dummy = self._load.config.load_format == "dummy"
        source: TensorSource = RandomSource(config) if dummy else SafetensorsSource(Path(self._load.model_dir))
        return load_weights(
            config, self._sharding, collectives.rank, collectives.tp_size, source, self._dtype, on_progress
        )

    def init_cache(self, num_blocks: int, on_progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Allocate a KV cache of `num_blocks` blocks and the state of `max_num_seqs` slots: nothing to report on."""
        config, block_size = self._model_config, self._load.config.block_size
        num_kv_heads = len(self._sharding.kv_heads)
        self._cache = KVCache(config.num_layers, num_blocks, block_size, num_kv_heads, config.head_dim, self._dtype)
        self._planner = DecodePlanner(block_size, num_kv_heads, config.head_dim, self._dtype)
        self._batch = Batch(self._load.config.max_num_seqs, self._load.max_model_len, block_size, num_blocks)

    def run(self, step: StepInput) -> StepOutput:
        """Compute one step. `InternalError` where the step does not fit the steps before it, or as `check_ranks`."""
        with torch.inference_mode():
            sampled = self._run(step)
            if self._load.config.check_ranks and self._collectives.tp_size > 1:
                of_ranks = self._collectives.all_gather(torch.from_numpy(sampled.token_ids))
                check_ranks(step.step_id, of_ranks.numpy())
        return StepOutput(
            epoch=step.epoch,
            step_id=step.step_id,
            token_ids=sampled.token_ids.astype("<i4").tobytes(),
            logprobs=sampled.logprobs,
            prompt_logprobs=sampled.prompt_logprobs,
        )

    def _run(self, step: StepInput) -> Sampled:
        if self._model is None or self._cache is None or self._planner is None or self._batch is None:
            raise InternalError("a step came before load and init_cache")
        batch = self._batch
        rows = batch.begin(step)
        self._collectives.enter(Phase.PREFILL if rows.prefills else Phase.DECODE)
        hidden = self._forward(rows, self._model, self._cache, self._planner, batch)
        self._collectives.enter(Phase.SAMPLING)
        model = RowByRow(self._model) if self._load.config.deterministic else self._model
        sampled = self._sampler.sample(model, hidden, rows, batch)
        batch.finish(rows, sampled.token_ids)
        return sampled

    def _forward(
        self, rows: Rows, model: LlamaModel, cache: KVCache, planner: DecodePlanner, batch: Batch
    ) -> torch.Tensor:
        """[num_tokens, hidden] of the step's tokens."""
        decodes = rows.decode_slots
        if not self._load.config.deterministic:
            return model.forward(rows, cache, planner.plan(batch.block_tables[decodes], batch.num_known[decodes]))
        hidden = []
        for one in rows.one_by_one():
            contexts = one.positions.numpy() + 1
            hidden.append(model.forward(one, cache, planner.plan(batch.block_tables[one.decode_slots], contexts)))
        return torch.cat(hidden)
