"""A process of its own: how fast the first GPU, or the CPU, copies memory. Bytes read and bytes written both count.

python bench/serving/copy_bandwidth.py cuda | cpu
"""

from __future__ import annotations

import sys
import time

import torch

from serving.children import emit

GPU_BYTES = 4 << 30
CPU_BYTES = 64 << 20
"""Larger than the caches: 4 GiB against 50 MB of L2."""
REPETITIONS = 12


def main() -> None:
    is_cuda = sys.argv[1] == "cuda"
    device = torch.device("cuda", 0) if is_cuda else torch.device("cpu")
    num_bytes = GPU_BYTES if is_cuda else CPU_BYTES
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = [_copy_s(source, target) for _ in range(REPETITIONS)][2:]
    emit(
        {
            "device": torch.cuda.get_device_name(0) if is_cuda else "cpu",
            "num_gpus": torch.cuda.device_count() if is_cuda else 0,
            "copied_bytes": num_bytes,
            "bytes_per_s": round(2 * num_bytes / sorted(seconds)[len(seconds) // 2]),
            "torch": torch.__version__,
        }
    )


def _copy_s(source: torch.Tensor, target: torch.Tensor) -> float:
    if not source.is_cuda:
        begin = time.perf_counter()
        target.copy_(source)
        return time.perf_counter() - begin
    begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin_event.record()
    target.copy_(source)
    end_event.record()
    end_event.synchronize()
    return begin_event.elapsed_time(end_event) / 1e3


if __name__ == "__main__":
    main()
