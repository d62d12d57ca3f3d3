"""A rank's model on a GPU, from loading to sampled tokens. `worker/runner.py` is its counterpart on the CPU.

Runs in: worker.

`submit` launches a step and returns before the device has begun it; `Pending.result`, called from another thread,
waits. So the next step is launched while this one runs, and the device never waits for Python.

    decode step    one small copy to the device if its slots or blocks are not those of the last one, one graph, the
                   sampler, one small copy back; where all are greedy, by one call of our extension
    other steps    kernels launched one by one; prefills as `attention.py` says, or `deterministic.py`
    step in which a sequence wants what only the host's sampler can do (penalties, log-probabilities): waits for its
                   logits and samples on the host, exactly as on the CPU
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from zmqexec.bus.status import Phase
from zmqexec.errors import InternalError
from zmqexec.model_config import Sharding, check_tensor_parallel, load_model_config, padded_head_dim
from zmqexec.protocol import LoadModel, StepInput, StepOutput
from zmqexec.worker.batch import NO_BLOCKS, Batch, Prefill, Rows
from zmqexec.worker.check_ranks import check_ranks
from zmqexec.worker.gpu.attention import GatheredPrefills, PagedPrefills, Prefills
from zmqexec.worker.gpu.collectives import GpuCollectives
from zmqexec.worker.gpu.deterministic import FixedPrefills, split_tokens
from zmqexec.worker.gpu.device import Device
from zmqexec.worker.gpu.graphs import DecodeGraphs, ladder
from zmqexec.worker.gpu.host_sampling import HostCollectives, HostLogits
from zmqexec.worker.gpu.memory import free_bytes_for_cache, out_of_memory
from zmqexec.worker.gpu.model import GpuLlama
from zmqexec.worker.gpu.ops import SKINNY_ROWS, DecodeAttention, Ops, Places
from zmqexec.worker.gpu.pad_heads import pad_weights
from zmqexec.worker.gpu.sampler import DeviceSampler
from zmqexec.worker.gpu.staging import Buffer, DecodeSteps, Fetched, Results, Staging
from zmqexec.worker.gpu.streaming import StreamedSource
from zmqexec.worker.gpu.tune import tune
from zmqexec.worker.kernels.decode_state import DecodeRows, SlotState, step_ints, write_step
from zmqexec.worker.kernels.paged_prefill import supported as attends_pages
from zmqexec.worker.logprobs import POSITIONS_AT_ONCE
from zmqexec.worker.models.weights import LlamaWeights, RandomSource, TensorSource, load_weights, slices_of
from zmqexec.worker.outputs import PeerMissing
from zmqexec.worker.sampler import Sampled, Sampler

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

KNOWN = -1
"""As the index of an update: the value is the slot's number of known tokens, not a block."""

Int32Array = npt.NDArray[np.int32]
IntArray = npt.NDArray[np.int64]


class Pending(msgspec.Struct):
    """A step that has been launched. `result` waits for it, from any thread. A Struct is made without a call of Python.

    of_ranks  [tp_size, num_samples]  the tokens of every rank, where they are to be compared
    """

    step: StepInput
    fetched: Fetched
    num_samples: int
    collectives: GpuCollectives
    sampled: Sampled | None = None
    of_ranks: Int32Array | None = None

    def result(self) -> StepOutput:
        """What the step sampled. PeerMissing: a collective gave up on a peer. InternalError: as `check_ranks`."""
        self.fetched.event.synchronize()
        problem = self.collectives.health()
        if problem:
            raise PeerMissing(problem)
        if self.of_ranks is not None:
            check_ranks(self.step.step_id, self.of_ranks)
        return StepOutput(
            epoch=self.step.epoch,
            step_id=self.step.step_id,
            token_ids=self.fetched.ints[: self.num_samples].astype("<i4", copy=False).tobytes(),
            logprobs=self.sampled.logprobs if self.sampled else [],
            prompt_logprobs=self.sampled.prompt_logprobs if self.sampled else [],
        )


@dataclass(frozen=True)
class Decoding:
    """Slots that decode and how they are sampled: it holds until others decode, or one of them is admitted anew.

    bitmap     the slots, as a step names them
    on_host    a sequence wants what only the host's sampler can do
    is_greedy  all take their likeliest token
    graph      the cudaGraphExec_t that is the whole step; 0 where there is none
    """

    bitmap: bytes
    slots: IntArray
    num_rows: int
    on_host: bool
    is_greedy: bool
    graph: int


class GpuRunner:
    """One rank of the model. Call `load`, then `init_cache`, then `submit` for every step, all from one thread and
    on one stream. After an error of a launched step it is of no more use: the host has counted tokens that never were.
    """

    def __init__(
        self,
        load: LoadModel,
        collectives: GpuCollectives,
        device: Device,
        on_phase: Callable[[Phase], None] = lambda phase: None,
    ) -> None:
        self._load = load
        self._dtype = DTYPES[load.dtype]
        self._collectives = collectives
        self._device = device
        self._on_phase = on_phase
        self._config = load_model_config(Path(load.model_dir))
        check_tensor_parallel(self._config, collectives.tp_size)
        is_half = self._dtype != torch.float32
        self._head_dim = padded_head_dim(self._config.head_dim) if is_half else self._config.head_dim
        self._sharding = Sharding(self._config, collectives.rank, collectives.tp_size)
        self._ops = Ops(device)
        self._deterministic = load.config.deterministic
        self._checks_ranks = load.config.check_ranks and collectives.tp_size > 1
        self._host_sampler = Sampler(
            self._config.vocab_size,
            self._sharding.vocab.start,
            HostCollectives(collectives, device.torch_device),
            wants_logprobs=collectives.rank == 0,
            one_at_a_time=self._deterministic,
        )
        self._model: GpuLlama | None = None
        self._cache: list[torch.Tensor] = []
        self._batch: Batch | None = None

    # ── start-up ────────────────────────────────────────────────────────────────────────────────────────────────────

    def load(self, on_progress: Callable[[int, int], None] = lambda done, total: None) -> int:
        """Load this rank's shard, calling `on_progress(done_bytes, total_bytes)`; returns bytes for the KV cache.

        `CheckpointError` where the checkpoint lacks a tensor or has one of an unsupported type. `ConfigError` where
        the device's memory does not suffice, or its matrix library not for `deterministic`.
        """
        torch.set_num_threads(self._load.num_threads)
        config, collectives, device = self._config, self._collectives, self._device
        with torch.inference_mode(), out_of_memory(device, "loading the weights"):
            weights = self.load_weights(on_progress)
            if self._head_dim != config.head_dim:
                weights = pad_weights(weights, config.head_dim, self._head_dim)
            self._make_state()
            self._model = GpuLlama(
                config,
                self._sharding,
                weights,
                collectives,
                self._load.max_model_len,
                self._ops,
                self._decode_attention,
                self._head_dim,
                deterministic=self._deterministic,
            )
            if self._deterministic:
                self._model.check_products()
            self._logits = torch.zeros(
                (self._load.config.max_num_seqs, self._model.vocab_rows),
                dtype=torch.float32,
                device=device.torch_device,
            )
            return free_bytes_for_cache(device, self._load.config, self._measure)

    def load_weights(self, on_progress: Callable[[int, int], None]) -> LlamaWeights:
        """This rank's shard of the checkpoint, or a random one; `load` begins with it."""
        config, device = self._config, self._device
        ranks = self._collectives.rank, self._collectives.tp_size
        with contextlib.ExitStack() as stack:
            source: TensorSource
            if self._load.config.load_format == "dummy":
                source = RandomSource(config, device.torch_device)
            else:
                slices = slices_of(config, self._sharding, *ranks)
                source = stack.enter_context(StreamedSource(Path(self._load.model_dir), slices, device))
            return load_weights(config, self._sharding, *ranks, source, self._dtype, on_progress, device.torch_device)

    def _make_state(self) -> None:
        engine, device, sharding = self._load.config, self._device, self._sharding
        max_rows = engine.max_num_seqs
        where = device.torch_device
        self._state = SlotState.allocate(max_rows, self._load.max_model_len, engine.block_size, where)
        self._rows = DecodeRows.allocate(max_rows, where)
        self._step_buffer = torch.zeros(step_ints(max_rows, max_rows), dtype=torch.int32, device=where)
        self._out = torch.zeros(max_rows, dtype=torch.int32, device=where)
        self._staging = Staging(self._step_buffer, engine.run_ahead, device)
        self._results = Results(self._out, engine.run_ahead, device)
        of_ranks = max_rows * self._collectives.tp_size if self._checks_ranks else 0
        self._of_ranks = itertools.cycle([Buffer(of_ranks, device) for _ in range(engine.run_ahead + 2)])
        heads = (len(sharding.heads), len(sharding.kv_heads), self._head_dim)
        splits = split_tokens(self._state.token_ids.shape[1]) if self._deterministic else 0
        self._decode_attention = DecodeAttention(device, self._dtype, self._state, *heads, splits)
        self._prefills: Prefills = GatheredPrefills(
            max(self._load.max_model_len, engine.step_tokens), engine.block_size, self._to_device
        )
        if self._deterministic:
            self._prefills = FixedPrefills(device, self._dtype, self._state, *heads, self._to_device)
        elif attends_pages(self._head_dim, engine.block_size, self._dtype, where):
            self._prefills = PagedPrefills(self._state.block_tables, self._to_device)
        self._sampler = DeviceSampler(
            self._config.vocab_size, sharding.vocab.start, self._collectives, self._ops, max_rows, device
        )

    def _measure(self) -> None:
        """The step that needs the most memory: all the tokens a step may have, of sequences whose first one is cached,
        and a sample of every slot or a prompt's log-probabilities."""
        assert self._model is not None
        engine, device, longest = self._load.config, self._device.torch_device, self._load.max_model_len
        prefills, num_tokens = [], 0
        while num_tokens < engine.step_tokens:
            count = min(longest, engine.step_tokens - num_tokens)
            stop = longest if num_tokens == 0 else count
            start = max(stop - count, min(1, stop - 1))
            prefills.append(Prefill(0, start, stop, num_tokens, torch.zeros(stop, dtype=torch.int64)))
            num_tokens += stop - start
        zeros = torch.zeros(num_tokens, dtype=torch.int32, device=device)
        places = Places(torch.full_like(zeros, -1), zeros, self._model.cos, self._model.sin)
        shape = (1, 2, len(self._sharding.kv_heads), engine.block_size, self._head_dim)
        cache = [torch.empty(shape, dtype=self._dtype, device=device)] * self._config.num_layers
        contexts = self._prefills.contexts(prefills, torch.zeros(num_tokens, dtype=torch.int64))
        hidden = self._model.forward(zeros, places, cache, contexts)
        self._sampler.whole(self._model.logits(hidden[: max(engine.max_num_seqs, POSITIONS_AT_ONCE)]))

    def init_cache(self, num_blocks: int, on_progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Allocate a KV cache of `num_blocks` blocks and capture graphs, calling `on_progress(captured, all of them)`.

        `ConfigError` where the device's memory does not suffice.
        """
        assert self._model is not None
        engine, config, device = self._load.config, self._config, self._device
        shape = (num_blocks, 2, len(self._sharding.kv_heads), engine.block_size, self._head_dim)
        with torch.inference_mode():
            with out_of_memory(device, f"allocating a KV cache of {num_blocks} blocks"):
                self._cache = [
                    torch.empty(shape, dtype=self._dtype, device=device.torch_device) for _ in range(config.num_layers)
                ]
            self._batch = Batch(engine.max_num_seqs, self._load.max_model_len, engine.block_size, num_blocks)
            self._decode_steps = DecodeSteps(
                self._batch, num_blocks, engine.block_size, self._staging, self._results, engine.run_ahead, device
            )
            self._host_sampled = np.zeros(engine.max_num_seqs, np.bool_)
            self._decoding: Decoding | None = None
            with out_of_memory(device, "capturing CUDA graphs"):
                self._capture(on_progress)

    def _capture(self, on_progress: Callable[[int, int], None]) -> None:
        """Graphs of decode steps, where they can be had: one ladder ends with logits, the other with greedy tokens."""
        config, device = self._load.config, self._device
        sizes: list[int] = []
        if config.cuda_graphs and device.is_cuda and self._decode_attention.has_kernel:
            sizes = ladder(config.max_num_seqs)
        begin, num_graphs, captured = time.monotonic(), 2 * len(sizes), itertools.count(1)

        def on_captured() -> None:
            on_progress(next(captured), num_graphs)

        if sizes:
            on_progress(0, num_graphs)
        few = [size for size in sizes if size <= SKINNY_ROWS]
        if few:
            tune(device, self._ops, self._decode_attention, self._collectives, self._decode_forward, few[0])
        pool = device.graph_pool()
        self._logits_graphs = DecodeGraphs(device, self._decode_forward, sizes, pool, on_captured)
        self._greedy_graphs = DecodeGraphs(device, self._decode_greedily, sizes, pool, on_captured)
        if sizes and self._collectives.rank == 0:
            print(f"captured {num_graphs} CUDA graphs in {time.monotonic() - begin:.1f} s", file=sys.stderr)

    # ── steps ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def run(self, step: StepInput) -> StepOutput:
        """Compute one step and wait for it."""
        return self.submit(step).result()

    def submit(self, step: StepInput) -> Pending:
        """Launch one step. `InternalError` where it does not fit those before it; PeerMissing as `Pending.result`."""
        if self._batch is None:
            raise InternalError("a step came before load and init_cache")
        try:
            if step.prefills or step.admitted:
                return self._mixed(step)
            # As few calls of Python as can be: each takes 2 to 3 µs on cold caches (an AMD EPYC).
            decoding = self._decoding
            if decoding is None or decoding.bitmap != step.decodes:
                decoding = self._decoding = self._decoding_of(step.decodes)
            if decoding.on_host or (fetched := self._decode_steps.begin(step, decoding.graph)) is None:
                return self._mixed(step)
            if decoding.graph:
                return Pending(step, fetched, decoding.num_rows, self._collectives)
            return self._decode(step, decoding)
        except Exception as error:
            # The host's sampler may have choked on what a sum without that peer left.
            if problem := self._collectives.health():
                raise PeerMissing(problem) from error
            raise

    def _decoding_of(self, bitmap: bytes) -> Decoding:
        """The slots of a step with how they are sampled."""
        assert self._batch is not None
        slots = self._batch.decode_slots(bitmap)
        on_host, is_greedy = bool(self._host_sampled[slots].any()), self._sampler.is_greedy(slots)
        # Ranks are compared between a step's graph and the copy of its tokens.
        in_one = is_greedy and not self._checks_ranks
        graph = self._greedy_graphs.handle(len(slots)) if in_one else 0
        return Decoding(bitmap, slots, len(slots), on_host, is_greedy, graph)

    def _updates(self, step: StepInput, new_blocks: Int32Array) -> Int32Array:
        """What the device must learn: lengths and blocks of admitted sequences, and new blocks."""
        parts = []
        for admission in step.admitted:
            blocks = np.frombuffer(admission.block_table, "<i4")
            part = np.empty((len(blocks) + 1, 3), np.int32)
            part[:, 0] = admission.slot
            part[0, 1:] = KNOWN, len(admission.token_ids) // 4
            part[1:, 1] = np.arange(len(blocks))
            part[1:, 2] = blocks
            parts.append(part)
        return np.concatenate([*parts, new_blocks])

    def _decode(self, step: StepInput, decoding: Decoding) -> Pending:
        """Launch a step that only decodes and that the device has been sent."""
        num_rows = decoding.num_rows
        if decoding.is_greedy:
            self._greedy_graphs.run(num_rows)
        else:
            with torch.inference_mode():
                logits = self._logits_graphs.run(num_rows)
                rows = self._rows
                sampled = self._sampler.sample(logits[:num_rows], rows.row_slots, rows.context_lens, decoding.slots)
                self._ops.append(self._state, rows.row_slots, rows.context_lens, sampled, self._out)
        return self._pending(step, num_rows, None)

    def _decode_forward(self, num_rows: int) -> torch.Tensor:
        """From the staged step to logits [num_rows, vocab_rows]: what a graph of `num_rows` rows holds."""
        assert self._model is not None
        rows = self._rows.first(num_rows)
        self._ops.begin_decode(self._step_buffer, len(self._rows), self._state, rows)
        self._decode_attention.plan(rows.row_slots, rows.context_lens)
        places = Places(rows.slot_mapping, rows.positions, self._model.cos, self._model.sin)
        hidden = self._model.forward(rows.input_ids, places, self._cache, [])
        # Graphs of all sizes leave their logits in one place: a step's are consumed before the next step is launched.
        return self._model.logits(hidden, self._logits[:num_rows])

    def _decode_greedily(self, num_rows: int) -> torch.Tensor:
        """`_decode_forward`, then the likeliest tokens, appended to their sequences."""
        sampled = self._sampler.greedy(self._decode_forward(num_rows))
        rows, pdl = self._rows, self._ops.pdl
        self._ops.append(self._state, rows.row_slots, rows.context_lens, sampled, self._out, pdl=pdl)
        return sampled

    @torch.inference_mode()
    def _mixed(self, step: StepInput) -> Pending:
        """Launch a step with prefills, or one that the host samples."""
        assert self._model is not None and self._batch is not None
        taken = self._batch.take_in(step)
        for admission in step.admitted:
            self._host_sampled[admission.slot] = self._sampler.admit(admission.slot, admission.sampling)
            self._decoding = None
        rows = self._batch.rows(taken.chunks, taken.decodes)
        host_sampled = bool(self._host_sampled[np.concatenate([taken.chunks[:, 0], taken.decodes])].any())
        self._update(self._updates(step, taken.new_blocks))
        num_samples = len(rows.sample_slots)
        slots, known, sample_rows = self._to_device(
            rows.sample_slots, self._batch.num_known[rows.sample_slots], rows.sample_rows
        )
        host = None
        if host_sampled or any(self._wants_prompt_logprobs(prefill.slot) for prefill in rows.prefills):
            hidden = self._mixed_forward(rows)
            self._on_phase(Phase.SAMPLING)
            host = self._host_sampler.sample(HostLogits(self._model), hidden, rows, self._batch)
        else:
            hidden = self._mixed_forward(rows, sample_rows)
        sampled = slots
        if host is not None and not self._deterministic:
            (sampled,) = self._to_device(host.token_ids)
        elif num_samples:
            if host is not None:
                hidden = hidden.index_select(0, sample_rows)
            logits = self._model.logits(hidden)
            sampled = self._sampler.sample(logits, slots, known, rows.sample_slots)
            if host is not None:
                # The host's random choices are the device's but for rounding: each row keeps to one of them, whatever
                # its companions want.
                token_ids, is_host = self._to_device(host.token_ids, self._host_sampled[rows.sample_slots])
                sampled = torch.where(is_host.bool(), token_ids, sampled)
        if num_samples:
            self._ops.append(self._state, slots, known, sampled, self._out)
        self._batch.finish(rows, host.token_ids if host else np.zeros(num_samples, np.int64))
        return self._pending(step, num_samples, host)

    def _wants_prompt_logprobs(self, slot: int) -> bool:
        assert self._batch is not None
        sampling = self._batch.sampling[slot]
        return sampling is not None and sampling.prompt_logprobs is not None

    def _mixed_forward(self, rows: Rows, wanted: torch.Tensor | None = None) -> torch.Tensor:
        """[num_tokens, hidden] of any step's tokens, or of those that are wanted, as `GpuLlama.forward`."""
        assert self._model is not None and self._batch is not None
        num_decodes = len(rows.decode_slots)
        token_ids, positions, slot_mapping = self._to_device(
            rows.token_ids.numpy(), rows.positions.numpy(), rows.slot_mapping.numpy()
        )
        if num_decodes:
            decode_rows = self._rows.first(num_decodes)
            buffer = self._staging.take()
            self._staging.send(buffer, write_step(buffer.ints, len(self._rows), rows.decode_slots, NO_BLOCKS))
            self._ops.begin_decode(self._step_buffer, len(self._rows), self._state, decode_rows)
            # The device alone knows the tokens that were sampled last.
            token_ids[rows.num_prefill_tokens :] = decode_rows.input_ids
            self._decode_attention.plan(decode_rows.row_slots, decode_rows.context_lens)
        places = Places(slot_mapping, positions, self._model.cos, self._model.sin)
        own_angles = self._model.angles(rows.positions, rows.num_prompt) if rows.prefills else None
        if own_angles is not None:
            numbers = torch.arange(len(token_ids), dtype=torch.int32, device=token_ids.device)
            places = Places(slot_mapping, numbers, *own_angles)
        contexts = self._prefills.contexts(rows.prefills, rows.slot_mapping)
        return self._model.forward(token_ids, places, self._cache, contexts, wanted)

    def _update(self, updates: Int32Array) -> None:
        """Apply (slot, index, value) of any number. Of several for one place, the last."""
        if not len(updates):
            return
        known = updates[:, 1] == KNOWN
        tables = self._state.block_tables
        flat = updates[~known, 0].astype(np.int64) * tables.shape[1] + updates[~known, 1]
        places, index = np.unique(flat[::-1], return_index=True)
        where, values, slots, counts = self._to_device(
            places, updates[~known, 2][::-1][index], updates[known, 0], updates[known, 2]
        )
        tables.view(-1).index_copy_(0, where.long(), values)
        self._state.num_known.index_copy_(0, slots.long(), counts)

    def _to_device(self, *arrays: npt.NDArray[np.generic]) -> list[torch.Tensor]:
        """The arrays as int32 on the device, by one copy."""
        packed = torch.empty(sum(map(len, arrays)), dtype=torch.int32, pin_memory=self._device.is_cuda)
        np.concatenate([array.astype(np.int32, copy=False) for array in arrays], out=packed.numpy())
        copied = packed.to(self._device.torch_device, non_blocking=True)
        return list(torch.split(copied, [len(array) for array in arrays]))

    def _pending(self, step: StepInput, num_samples: int, host: Sampled | None) -> Pending:
        """Begin to copy the step's tokens back."""
        of_ranks = self._gather_tokens(num_samples)
        return Pending(step, self._results.fetch(num_samples), num_samples, self._collectives, host, of_ranks)

    def _gather_tokens(self, num_samples: int) -> Int32Array | None:
        """Begin to copy every rank's tokens to rank 0's host, where they are to be compared.

        The other ranks have no memory for them: what tells when it is free again is rank 0's reply.
        """
        if not self._checks_ranks or not num_samples:
            return None
        with torch.inference_mode():
            gathered = self._collectives.all_gather(self._out[:num_samples])
            if self._collectives.rank != 0:
                return None
            buffer = next(self._of_ranks)
            buffer.tensor[: gathered.numel()].copy_(gathered.view(-1), non_blocking=True)
        return buffer.ints[: gathered.numel()].reshape(gathered.shape)
