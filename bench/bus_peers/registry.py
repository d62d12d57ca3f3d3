"""The transports by name: what each is, what it needs, what is measured of it.

Runs in: the benchmark.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Any

OURS = "zmqexec"
BARE_PREFIX = "c-"


@dataclass(frozen=True)
class Entry:
    """A transport.

    title     as tables and plots call it
    target    "module:class" of its `Peer`
    needs     modules that must be there
    settle_s  how long after having been stopped it catches up with itself
    silent    whether it is measured paced, idle and after silence
    near      whether that is done with two readers as well as with one
    """

    title: str
    target: str
    needs: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    settle_s: float = 0.05
    silent: bool = True
    near: bool = False

    def missing(self) -> str | None:
        """Why it cannot be measured here, None if it can."""
        absent = [name for name in self.needs if importlib.util.find_spec(name) is None]
        return f"{', '.join(absent)} cannot be imported" if absent else None


PEERS = {
    OURS: Entry("zmqexec", "bus_peers.zmqexec_bus:Zmqexec", near=True),
    "reference": Entry("shared memory in pure Python", "bus_peers.reference:Reference", near=True),
    "vllm": Entry("vLLM MessageQueue", "bus_peers.vllm_queue:VllmQueue", ("vllm", "torch"), near=True),
    "ray-graph": Entry("Ray compiled graph", "bus_peers.ray_peers:RayGraph", ("ray",), settle_s=0.5),
    "pipe": Entry("multiprocessing Pipe", "bus_peers.mp:Pipes"),
    "queue": Entry("multiprocessing Queue", "bus_peers.mp:Queues"),
    "zmq-pub": Entry("ZeroMQ PUB/SUB", "bus_peers.zeromq:ZeroMQ", ("zmq",), {"pattern": "pub"}),
    "zmq-push": Entry("ZeroMQ PUSH", "bus_peers.zeromq:ZeroMQ", ("zmq",), {"pattern": "push"}),
    "shm-event": Entry("shared memory + Event + pickle", "bus_peers.mp:SharedMemoryEvents"),
    "torch-rpc": Entry("torch.distributed.rpc", "bus_peers.torch_rpc:TorchRpc", ("torch",)),
    "ray-actors": Entry("Ray actor calls", "bus_peers.ray_peers:RayActors", ("ray",), settle_s=0.5),
    "c-spin": Entry("C, spinning", "bus_peers.bare:BareC", (), {"wait": "spin"}, silent=False),
    "c-yield": Entry("C, spinning with yield", "bus_peers.bare:BareC", (), {"wait": "yield"}, silent=False),
    "c-futex": Entry("C, futex both ways", "bus_peers.bare:BareC", (), {"wait": "futex"}, near=True),
    "c-wake": Entry("C, futex wake", "bus_peers.bare:BareC", (), {"wait": "wake"}, near=True),
    "c-python": Entry("C called from Python", "bus_peers.bare:BareFromPython", (), {"wait": "busy"}, silent=False),
    "c-python-structs": Entry(
        "C called from Python + structs", "bus_peers.bare:BareWithStructs", (), {"wait": "busy"}, silent=False
    ),
    "c-python-wake": Entry(
        "C from Python, futex wake", "bus_peers.bare:BareFromPython", (), {"wait": "wake"}, near=True
    ),
    "c-python-structs-wake": Entry(
        "C from Python + structs, futex wake", "bus_peers.bare:BareWithStructs", (), {"wait": "wake"}, near=True
    ),
}


def is_rival(name: str) -> bool:
    """Whether it is something that a user could pick instead of ours."""
    return not name.startswith((OURS, BARE_PREFIX)) and name != "reference"


def with_policies(peers: dict[str, Entry], policies: list[str]) -> dict[str, Entry]:
    """`peers` with ours under the first of `policies`, and once more under each of the others."""
    ours = peers.get(OURS)
    if ours is None or not policies:
        return peers
    first, *others = policies
    found = {OURS: Entry(f"{ours.title} ({first})", ours.target, options={"wait_policy": first}, near=True)}
    for policy in others:
        title = f"{ours.title} ({policy})"
        found[f"{OURS}-{policy}"] = Entry(title, ours.target, options={"wait_policy": policy}, near=True)
    return found | {name: entry for name, entry in peers.items() if name != OURS}
