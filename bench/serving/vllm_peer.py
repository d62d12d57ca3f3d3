"""A process of its own: the cases on vLLM, with random weights of the same geometry.

python -m serving.vllm_peer JSON    see `peers.py` for the fields
"""

from __future__ import annotations

import json
import sys
import time

from serving.cases import Case
from serving.children import emit, search_here_last
from serving.clock import measure_case


def main() -> None:
    begin = time.perf_counter()
    job = json.loads(sys.argv[1])
    search_here_last()
    import vllm

    imported = time.perf_counter()
    llm = vllm.LLM(
        job["folder"],
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype=job["dtype"],
        tensor_parallel_size=job["tp"],
        max_model_len=job["max_model_len"],
        max_num_seqs=job["max_num_seqs"],
        gpu_memory_utilization=0.9,
        enable_prefix_caching=False,
        seed=0,
        **({"enforce_eager": True} if not job["cuda_graphs"] else {}),
    )
    loaded = time.perf_counter()

    def params(count: int) -> vllm.SamplingParams:
        return vllm.SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)

    llm.generate([{"prompt_token_ids": [1, 2, 3, 4, 5]}], params(1), use_tqdm=False)
    end = time.perf_counter()
    emit(
        {
            "version": vllm.__version__,
            "import_s": round(imported - begin, 2),
            "engine_s": round(loaded - imported, 2),
            "first_token_s": round(end - loaded, 3),
            "total_s": round(end - begin, 2),
        }
    )
    stepped = None if job["whole_only"] else llm.llm_engine
    for text in job["cases"]:
        case = Case.parse(text)
        try:
            figures = measure_case(case, job["vocab_size"], job["repetitions"], params, llm.generate, stepped)
        except (AttributeError, TypeError, KeyError):  # another version's engine: `generate` is what stays the same
            if stepped is None:
                raise
            stepped = None
            while llm.llm_engine.has_unfinished_requests():
                llm.llm_engine.step()
            figures = measure_case(case, job["vocab_size"], job["repetitions"], params, llm.generate, None)
        emit({"case": text, **figures})


if __name__ == "__main__":
    main()
