"""What a worker's channel over ZeroMQ is made of: the sockets, who uses each, and in which order they are closed.

Runs in: worker.
"""

from __future__ import annotations

import contextlib

from zmqexec.bus.zeromq import control as control
from zmqexec.bus.zeromq.endpoints import (
    CONTROL,
    DOWN,
    MAX_CONTROL_BYTES,
    NAMES,
    UP,
    check_descriptors,
    connect,
    destroy,
    lane_endpoint,
    open_context,
    open_socket,
)
from zmqexec.bus.zeromq.frames import HEADER_BYTES
from zmqexec.bus.zeromq.keys import WorkerKeys
from zmqexec.bus.zeromq.lane import Counters, LaneReceiver, LaneSender, Socket, Window
from zmqexec.bus.zeromq.wake import WakePipe
from zmqexec.bus.zeromq.worker_service import WorkerService, WorkerState, join


class WorkerEnd:
    """The worker's sockets and who uses them. Knows no channel, so that a forgotten channel can close it."""

    def __init__(
        self,
        endpoint: str,
        rank: int,
        keys: WorkerKeys | None,
        deadline: float,
        lost_after_s: float | None,
        linger_s: float,
    ) -> None:
        self.counters = (Counters(), Counters())  # of the receiving and the replying thread
        self.state = WorkerState()
        check_descriptors(1)
        with contextlib.ExitStack() as opened:
            context = open_context(lost_after_s is not None)
            lanes: list[Socket] = []

            def close_all() -> None:
                # Credits need not arrive, and where a connection has ended nothing can.
                lingers = (0.0, 0.0 if self.state.closed else linger_s)
                destroy(context, list(zip(lanes, lingers, strict=False)))

            opened.callback(close_all)
            early = opened.enter_context(contextlib.ExitStack())  # what the service closes once it is there
            control_socket = open_socket(context, CONTROL, 64, MAX_CONTROL_BYTES, lost_after_s)
            early.callback(control_socket.close)
            monitors = [control.Monitor(context, control_socket, NAMES[CONTROL])]
            early.callback(monitors[0].close)
            connect(control_socket, endpoint, keys)
            self.welcome = welcome = join(control_socket, monitors[0], endpoint, rank, deadline)
            window = Window(welcome.window_messages, welcome.window_bytes)
            limit = HEADER_BYTES + welcome.max_message_bytes
            for kind, lane in ((DOWN, welcome.down), (UP, welcome.up)):
                socket = open_socket(context, kind, window.high_water_mark, limit, lost_after_s)
                lanes.append(socket)
                monitors.append(control.Monitor(context, socket, NAMES[kind]))
                early.callback(monitors[-1].close)
                connect(socket, lane_endpoint(endpoint, lane), keys)
            down, up = lanes
            self.inbox = LaneReceiver(down, "the driver", welcome.epoch, window, self.counters[0])
            self.outbox = LaneSender(up, "the driver", welcome.epoch, window, self.counters[1], joined=True)
            self.inbox.join()
            self.message_wake, self.space_wake = WakePipe(), WakePipe()
            opened.callback(self.message_wake.close)
            opened.callback(self.space_wake.close)
            if lost_after_s is None:
                note = "the connection to the driver ended"
            else:
                note = f"the connection to the driver ended, or it was not heard of for {lost_after_s:g} s"
            self.service = WorkerService(control_socket, monitors, self.state, note, self.wake, linger_s)
            early.pop_all()
            opened.callback(self.service.stop)
            self._opened = opened.pop_all()

    @property
    def why_closed(self) -> str:
        """Why nothing more can be replied, or "". The closing frame and the service's news come in either order."""
        return "the driver closed the bus" if self.inbox.closed else self.state.closed

    def wake(self) -> None:
        """End the waits of both threads."""
        self.message_wake.ring()
        self.space_wake.ring()

    def tear_down(self) -> None:
        """Close everything, when nobody uses it any more."""
        self._opened.close()
