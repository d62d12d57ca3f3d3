"""What a driver's channel over ZeroMQ is made of: the sockets, who uses each, and in which order they are closed.

Runs in: driver.
"""

from __future__ import annotations

import contextlib

from zmqexec.bus.zeromq import control as control
from zmqexec.bus.zeromq.driver_service import DriverService, Listener, Rank
from zmqexec.bus.zeromq.endpoints import (
    CONTROL,
    DOWN,
    MAX_CONTROL_BYTES,
    NAMES,
    UP,
    bind,
    check_descriptors,
    destroy,
    lane_name,
    make_place,
    open_context,
    open_socket,
)
from zmqexec.bus.zeromq.frames import HEADER_BYTES
from zmqexec.bus.zeromq.keys import DriverKeys
from zmqexec.bus.zeromq.lane import Counters, LaneReceiver, LaneSender, Socket, Window
from zmqexec.bus.zeromq.wake import WakePipe


class DriverEnd:
    """The driver's sockets and who uses them. Knows no channel, so that a forgotten channel can close it.

    sequence  number of the next message to all; the publishing thread's
    woken     a `receive` should return; cleared by the receiving thread
    """

    def __init__(
        self,
        num_workers: int,
        epoch: int,
        listen: str | None,
        keys: DriverKeys | None,
        window: Window,
        max_message_bytes: int,
        lost_after_s: float,
        linger_s: float,
    ) -> None:
        self.sequence = 0
        self.woken = False
        self.counters = (Counters(), Counters())  # of the publishing and the receiving thread
        self.outboxes: list[LaneSender] = []
        self.inboxes: list[LaneReceiver] = []
        self.endpoints: list[str] = []
        self._ranks: list[Rank] = []
        self._linger_s = linger_s
        self._place = make_place(listen, keys, num_workers)
        self._keys = keys
        self._window = window
        self._max_message_bytes = max_message_bytes
        self._lost_after_s = None if listen is None else lost_after_s
        with contextlib.ExitStack() as opened:
            opened.callback(self._place.close)
            check_descriptors(num_workers)
            self._context = open_context(listen is not None)
            self._lanes: list[tuple[Socket, Socket]] = []
            opened.callback(self._close_lanes)
            early = opened.enter_context(contextlib.ExitStack())  # until everything is there
            listeners = [self._listen(rank, num_workers, epoch, early) for rank in range(num_workers)]
            self.space_wake = WakePipe()
            opened.callback(self.space_wake.close)
            self.reply_wake = WakePipe()
            opened.callback(self.reply_wake.close)
            note = "its connection ended"
            if listen is not None:
                note += f", or it was not heard of for {lost_after_s:g} s"
            self.service = DriverService(self._context, listeners, keys, note, self._rank_changed, linger_s)
            early.pop_all()
            self._ranks = self.service.ranks
            opened.callback(self.service.stop)
            self._opened = opened.pop_all()

    def _listen(self, rank: int, num_workers: int, epoch: int, early: contextlib.ExitStack) -> Listener:
        """Bind the three endpoints of a rank."""
        control_socket, address, monitor = self._bind(rank, CONTROL, early)
        down, down_address, down_monitor = self._bind(rank, DOWN, early)
        up, up_address, up_monitor = self._bind(rank, UP, early)
        self._lanes.append((down, up))
        monitors = [one for one in (monitor, down_monitor, up_monitor) if one is not None]
        peer = f"rank {rank}"
        self.endpoints.append(address)
        self.outboxes.append(LaneSender(down, peer, epoch, self._window, self.counters[0], joined=False))
        self.inboxes.append(LaneReceiver(up, peer, epoch, self._window, self.counters[1]))
        welcome = control.Welcome(
            epoch,
            num_workers,
            lane_name(down_address),
            lane_name(up_address),
            self._window.messages,
            self._window.max_bytes,
            self._max_message_bytes,
        )
        return Listener(control_socket, monitors, welcome)

    def _bind(self, rank: int, kind: int, early: contextlib.ExitStack) -> tuple[Socket, str, control.Monitor | None]:
        """A socket, its address, and over TCP its monitor; control always has one."""
        limit = MAX_CONTROL_BYTES if kind == CONTROL else HEADER_BYTES + self._max_message_bytes
        socket = open_socket(self._context, kind, self._window.high_water_mark, limit, self._lost_after_s)
        early.callback(socket.close)
        monitor = None
        if kind == CONTROL or self._keys is not None:
            monitor = control.Monitor(self._context, socket, f"{rank}-{NAMES[kind]}")
            early.callback(monitor.close)
        return socket, bind(socket, self._place.endpoint(rank, kind), rank, self._keys), monitor

    def wake(self) -> None:
        """End the waits of both threads."""
        self.space_wake.ring()
        self.reply_wake.ring()

    def _rank_changed(self, is_lost: bool) -> None:
        self.woken = self.woken or is_lost
        self.wake()

    def tear_down(self) -> None:
        """Close everything, when nobody uses it any more."""
        self._opened.close()

    def _close_lanes(self) -> None:
        """What was published may still arrive, where somebody is; credits need not."""
        lingers: list[tuple[Socket, float]] = [(up, 0.0) for _, up in self._lanes]
        for rank, lane in zip(self._ranks, self.outboxes, strict=False):
            if not (rank.lost or rank.left):
                lane.send_close(self.sequence)
                lingers.append((lane.socket, self._linger_s))
        closing = {id(socket) for socket, _ in lingers}
        lingers += [(down, 0.0) for down, _ in self._lanes if id(down) not in closing]
        destroy(self._context, lingers)
