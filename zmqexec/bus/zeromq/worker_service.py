"""The worker's side of the control connection: how it joins, and a thread that answers for it from then on.

Runs in: worker.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import zmq

from zmqexec.bus.status import Phase
from zmqexec.bus.zeromq import control as control
from zmqexec.bus.zeromq.endpoints import DOWN, NAMES
from zmqexec.bus.zeromq.lane import Socket, readable
from zmqexec.bus.zeromq.wake import WakePipe, poll_ms
from zmqexec.errors import BusError, BusTimeout
from zmqexec.version import __version__

JOIN_S = 10.0
ERROR_BYTES = 232  # as much as the status page of the shared-memory bus holds


@dataclass(slots=True)
class WorkerState:
    """What the service and the rest of the worker tell each other. Each word has one writer and stands for itself.

    status      phase, step id, and CLOCK_MONOTONIC in ns when it was set; by `set_status`
    error       by `set_error`
    closed      why nothing more can be replied, or ""; by the service
    down_ended  why nothing more can come, once what is here has been read, or ""; by the service
    """

    status: tuple[int, int, int] = field(default_factory=lambda: (Phase.STARTING, -1, time.monotonic_ns()))
    error: str = ""
    closed: str = ""
    down_ended: str = ""


def join(socket: Socket, monitor: control.Monitor, endpoint: str, rank: int, deadline: float) -> control.Welcome:
    """Say who we are at the driver's `endpoint`, to which `socket` is connecting; what it answers.

    BusError: we are not admitted. BusTimeout: nobody answered.
    """
    poller = zmq.Poller()
    poller.register(socket, zmq.POLLIN)
    poller.register(monitor.socket, zmq.POLLIN)
    trouble = "nobody listens there, or another connection of this rank is still open"
    begin = time.monotonic()
    while True:
        for event, _ in monitor.events():
            if event == zmq.Event.HANDSHAKE_SUCCEEDED:
                # Only now, and each time: what is sent to a connection that fails is lost.
                control.say(socket, control.Hello(__version__, rank, os.getpid()))
            elif event == zmq.Event.HANDSHAKE_FAILED_AUTH:
                raise BusError(f"the driver at {endpoint} does not admit this key as that of rank {rank}")
            elif event & control.FAILURES:
                trouble = "the handshake failed: its key is another one, or it is no driver, or needs keys"
        if readable(socket):
            message = control.decode_to_worker(socket.recv(zmq.NOBLOCK))
            if isinstance(message, control.Welcome):
                return message
            reason = message.reason if isinstance(message, control.Refused) else "the bus is being closed"
            raise BusError(f"the driver at {endpoint} refused rank {rank}: {reason}")
        if time.monotonic() >= deadline:
            waited_s = time.monotonic() - begin
            raise BusTimeout(f"no answer from a driver at {endpoint} within {waited_s:.2g} s: {trouble}")
        poller.poll(poll_ms(deadline))


class WorkerService:
    """Answers the driver's questions from `state`, notices the end of the bus, and says `Bye`.

    `on_change` is called from its thread when the bus has ended. The sockets are its own from now on.
    """

    def __init__(
        self,
        socket: Socket,
        monitors: list[control.Monitor],
        state: WorkerState,
        lost_note: str,
        on_change: Callable[[], None],
        linger_s: float,
    ) -> None:
        """monitors: of the control socket and both lanes, in this order. lost_note: what a connection's end means."""
        self._socket: Socket | None = socket
        self._monitors = monitors
        self._state = state
        self._lost_note = lost_note
        self._on_change = on_change
        self._linger_s = linger_s
        self._told_error = ""
        self._is_stopped = False
        self.wake = WakePipe()
        self._poller = zmq.Poller()
        for waited in (self.wake.fd, socket, *(monitor.socket for monitor in monitors)):
            self._poller.register(waited, zmq.POLLIN)
        self._thread = threading.Thread(target=self._run, name="zmqexec-zmq", daemon=True)
        self._thread.start()

    @property
    def is_own_thread(self) -> bool:
        """Whether the caller is the service's thread: a finaliser may run in any."""
        return threading.current_thread() is self._thread

    def stop(self) -> None:
        """Say `Bye` and end. Everything of its own is closed then."""
        self._is_stopped = True
        self.wake.ring()
        self._thread.join(JOIN_S)

    # ── in the thread ───────────────────────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        try:
            while not self._is_stopped:
                self._poller.poll()
                self.wake.clear()
                self._listen()
                for kind, monitor in enumerate(self._monitors):
                    if any(event == zmq.Event.DISCONNECTED for event, _ in monitor.events()):
                        self._end(kind)
                if self._state.error != self._told_error and self._socket is not None:
                    self._told_error = self._state.error
                    self._answer(self._socket, 0)
        except BaseException as error:
            if not self._is_stopped:  # a bug; without this thread nobody would notice the end of the bus
                self._close(f"the worker's control thread failed: {error!r}")
                raise
        finally:
            for monitor in self._monitors:
                monitor.close()
            if self._socket is not None:
                control.say(self._socket, control.Bye())
                self._socket.close(linger=int(self._linger_s * 1e3))
            self.wake.close()

    def _listen(self) -> None:
        while self._socket is not None and readable(self._socket):
            match control.decode_to_worker(self._socket.recv(zmq.NOBLOCK)):
                case control.Ask(number):
                    self._answer(self._socket, number)
                case control.Closing():
                    self._state.closed = self._state.closed or "the driver closed the bus"
                    self._on_change()
                case _:
                    pass  # a second Welcome changes nothing

    def _answer(self, socket: Socket, number: int) -> None:
        phase, step_id, since_ns = self._state.status
        age_ns = max(0, time.monotonic_ns() - since_ns)
        control.say(socket, control.Answer(number, os.getpid(), phase, step_id, age_ns, self._state.error))

    def _end(self, kind: int) -> None:
        """One of our connections has ended. The driver's last words on the control connection came before that."""
        self._listen()
        if kind == DOWN:
            self._state.down_ended = self._lost_note
        if kind != 0 and not self._state.closed and self._socket is not None:
            control.say(self._socket, control.Broken(NAMES[kind]))
        if kind == 0 and self._socket is not None:
            self._poller.unregister(self._socket)
            self._socket.close(linger=0)  # at once: it must not connect again, perhaps to a later driver
            self._socket = None
            if not self._state.closed:
                # A vanished host ends no lane: nothing more will come there either.
                self._state.down_ended = self._lost_note
        self._close(self._lost_note)

    def _close(self, reason: str) -> None:
        self._state.closed = self._state.closed or reason
        self._on_change()
