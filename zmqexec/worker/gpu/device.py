"""One GPU as the runner sees it: kernels, streams, events, graphs.

Runs in: worker. Tests put an emulation on the CPU in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol

import torch

from zmqexec.errors import ConfigError

MIN_CAPABILITY = 8
"""The oldest GPUs that setup.py compiles for."""


class Event(Protocol):
    """Something that happens on the device. May be recorded again once nobody waits for what was recorded before.

    handle  its cudaEvent_t; 0 in an emulation
    """

    @property
    def handle(self) -> int: ...

    def record(self) -> None:
        """Stand behind everything launched so far on the current stream."""

    def synchronize(self) -> None:
        """Wait until it has happened."""


class Graph(Protocol):
    """Work on the device that was recorded once.

    handle  its cudaGraphExec_t: to launch that is to replay it; 0 in an emulation
    """

    @property
    def handle(self) -> int: ...

    def replay(self) -> None:
        """Launch it again."""


class Device(Protocol):
    """Where a rank computes.

    native     the extension with the kernels
    is_cuda    False in an emulation: no streams, no pinned memory, no graphs
    """

    torch_device: torch.device
    native: ModuleType
    is_cuda: bool
    num_sms: int

    def use(self) -> None:
        """Make it the calling thread's device, as it is that of the thread that opened it."""

    def stream(self) -> int:
        """The current stream, as the kernels take it."""

    def event(self) -> Event:
        """One that sleeps while it waits."""

    def graph_pool(self) -> Any:
        """Memory that graphs can share."""

    def capture(self, launch: Callable[[], torch.Tensor], pool: Any) -> tuple[Graph, torch.Tensor]:
        """What `launch` launches as a graph, and the tensor that it fills."""

    def time_ms(self, work: Callable[[], None]) -> float:
        """How long the device takes for `work`."""

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes."""

    def peak_bytes(self, work: Callable[[], None]) -> int:
        """The most that `work` had allocated beyond what there was before."""


class SleepingEvent:
    """A wait for it costs no CPU."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self.record()  # it has no handle before
        self.handle = int(self._event.cuda_event)

    def record(self) -> None:
        self._event.record()

    def synchronize(self) -> None:
        self._event.synchronize()


class CapturedGraph:
    """A graph of torch's. Beside the launch of its handle, torch's replay sets torch's random numbers: ours draw their
    own, so that whoever launches the handle replays it."""

    def __init__(self, graph: torch.cuda.CUDAGraph) -> None:
        self._graph = graph  # which owns the handle
        self.handle = graph.raw_cuda_graph_exec()

    def replay(self) -> None:
        self._graph.replay()


class CudaDevice:
    """GPU `index` of those visible to this process."""

    is_cuda = True

    def __init__(self, index: int) -> None:
        """ConfigError: torch or our extension was built without CUDA, or the GPU is too old for our kernels."""
        if torch.version.cuda is None:
            raise ConfigError(
                f"device='cuda' needs a torch with CUDA, and torch {torch.__version__} has none; install another build "
                "of it, or use device='cpu'",
                "device",
            )
        try:
            from zmqexec import _cuda
        except ImportError as error:
            raise ConfigError(
                f"device='cuda': zmqexec was built without its CUDA kernels ({error}); install nvcc and build it again "
                "with ZMQEXEC_REQUIRE_CUDA=1, or use device='cpu'",
                "device",
            ) from None
        self.native: ModuleType = _cuda
        self.torch_device = torch.device("cuda", index)
        self.use()
        major, minor = torch.cuda.get_device_capability(index)
        if major < MIN_CAPABILITY:
            raise ConfigError(
                f"device='cuda': GPU {index}, {torch.cuda.get_device_name(index)}, has compute capability "
                f"{major}.{minor}, and the kernels need {MIN_CAPABILITY}.0; use another GPU, or device='cpu'",
                "device",
            )
        self.num_sms = torch.cuda.get_device_properties(index).multi_processor_count

    def use(self) -> None:
        torch.cuda.set_device(self.torch_device)

    def stream(self) -> int:
        return int(torch.cuda.current_stream().cuda_stream)

    def event(self) -> Event:
        return SleepingEvent()

    def graph_pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def capture(self, launch: Callable[[], torch.Tensor], pool: Any) -> tuple[Graph, torch.Tensor]:
        # Once without recording: libraries set themselves up on first use, which a capture forbids.
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            launch()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # NCCL has threads of its own, which may call what a capture forbids.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = launch()
        return CapturedGraph(graph), result

    def time_ms(self, work: Callable[[], None]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    def memory(self) -> tuple[int, int]:
        return torch.cuda.mem_get_info()

    def peak_bytes(self, work: Callable[[], None]) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        torch.cuda.empty_cache()
        return peak
