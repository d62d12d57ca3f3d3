"""A process of its own: the cases on transformers' `generate`, one padded batch, random weights of the same geometry.

python -m serving.transformers_peer JSON    see `peers.py` for the fields
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import torch

from serving.cases import Case
from serving.children import emit, search_here_last
from serving.clock import spread


def main() -> None:
    begin = time.perf_counter()
    job = json.loads(sys.argv[1])
    search_here_last()
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device = torch.device("cuda", 0) if job["device"] == "cuda" else torch.device("cpu")
    dtype = getattr(torch, job["dtype"])
    config = transformers.AutoConfig.from_pretrained(job["folder"])
    with device, torch.inference_mode():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    if model.dtype != dtype:
        raise RuntimeError(f"the model is in {model.dtype}, not in {dtype}")
    loaded = time.perf_counter()
    _generate(model, [[1, 2, 3, 4, 5]], 1)
    end = time.perf_counter()
    emit(
        {
            "version": transformers.__version__,
            "engine_s": round(loaded - begin, 2),
            "first_token_s": round(end - loaded, 3),
            "total_s": round(end - begin, 2),
        }
    )
    for text in job["cases"]:
        case = Case.parse(text)
        one_s, whole_s = [], []
        for repetition in range(job["repetitions"]):
            prompts = case.prompts(job["vocab_size"], repetition)
            one_s.append(_generate(model, prompts, 1))
            whole_s.append(_generate(model, prompts, case.output_len))
        figures: dict[str, Any] = {
            "generate_s": spread(whole_s),
            "generate_one_token_s": spread(one_s),
            "output_tokens_per_s": round(case.batch * case.output_len / statistics.median(whole_s), 1),
        }
        if case.output_len > 1:
            pairs = zip(whole_s, one_s, strict=True)
            figures["tpot_generate_ms"] = spread([1e3 * (many - one) / (case.output_len - 1) for many, one in pairs])
        emit({"case": text, **figures})


@torch.inference_mode()
def _generate(model: Any, prompts: list[list[int]], count: int) -> float:
    """Seconds. The prompts have one length, so the batch has no padding."""
    begin = time.perf_counter()
    batch = torch.tensor(prompts, device=model.device)
    mask = torch.ones_like(batch)
    tokens = model.generate(
        batch, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
    )
    tokens = tokens[:, len(prompts[0]) :].tolist()  # waits for the device
    assert all(len(own) == count for own in tokens)
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
