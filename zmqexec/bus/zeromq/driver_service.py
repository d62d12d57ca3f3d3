"""The driver's side of the control connections: a thread that knows which ranks are there, and lets nobody else in.

Runs in: driver.
"""

from __future__ import annotations

import hmac
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import zmq
from zmq.utils import z85

from zmqexec.bus.status import Phase, WorkerStatus
from zmqexec.bus.zeromq import control as control
from zmqexec.bus.zeromq.keys import DriverKeys
from zmqexec.bus.zeromq.lane import Context, Socket, readable
from zmqexec.bus.zeromq.wake import WakePipe
from zmqexec.errors import ProtocolError
from zmqexec.version import __version__

ZAP_ENDPOINT = "inproc://zeromq.zap.01"  # RFC 27
JOIN_S = 10.0


@dataclass(frozen=True, slots=True)
class OldStatus(WorkerStatus):
    """What a rank was doing when it last said so; `note` says why there is nothing newer."""

    note: str = ""

    def where(self) -> str:
        """In words, with the note."""
        return f"{WorkerStatus.where(self)} ({self.note})"


@dataclass(slots=True)
class Rank:
    """What the driver knows about a rank. Written by the service thread, under its condition.

    connection  file descriptor of its control connection; -1 before it joined
    left        it said `Bye`
    lost        why it cannot take part any more, or ""
    answered    number of the last `Ask` that it answered
    """

    status: WorkerStatus
    connection: int = -1
    left: bool = False
    lost: str = ""
    answered: int = 0


@dataclass(slots=True)
class Listener:
    """The control socket of a rank, and the monitors of all its sockets, the control socket's first."""

    socket: Socket
    monitors: list[control.Monitor]
    welcome: control.Welcome
    old_refused: int = field(default=0)


class DriverService:
    """Answers `Hello`, asks for `status`, decides who is admitted, notices who is lost.

    `on_change` is called from its thread when a rank was lost (True) or left (False). The sockets of `listeners` are
    its own from now on; it never uses the channel, which may so be forgotten by its last user and then closes.
    """

    def __init__(
        self,
        context: Context,
        listeners: Sequence[Listener],
        keys: DriverKeys | None,
        lost_note: str,
        on_change: Callable[[bool], None],
        linger_s: float,
    ) -> None:
        """lost_note: what the end of a connection means."""
        self.ranks = [Rank(WorkerStatus(rank, 0, Phase.STARTING, -1, 0, "")) for rank in range(len(listeners))]
        self.refused_peers = 0
        self.is_stopped = False
        self._listeners = listeners
        self._keys = keys
        self._lost_note = lost_note
        self._on_change = on_change
        self._linger_s = linger_s
        self._condition = threading.Condition(threading.RLock())
        self._number = 0
        self._asked: dict[int, int] = {}
        self._wake = WakePipe()
        self._poller = zmq.Poller()
        self._poller.register(self._wake.fd, zmq.POLLIN)
        self._zap: Socket | None = None
        if keys is not None:
            # A handshake waits for this socket's answer; streams do not.
            self._zap = context.socket(zmq.REP)
            self._zap.linger = 0
            self._zap.bind(ZAP_ENDPOINT)
            self._poller.register(self._zap, zmq.POLLIN)
        for listener in listeners:
            for socket in (listener.socket, *(monitor.socket for monitor in listener.monitors)):
                self._poller.register(socket, zmq.POLLIN)
        self._thread = threading.Thread(target=self._run, name="zmqexec-zmq", daemon=True)
        self._thread.start()

    @property
    def is_own_thread(self) -> bool:
        """Whether the caller is the service's thread: a finaliser may run in any."""
        return threading.current_thread() is self._thread

    def lost(self) -> dict[int, str]:
        """Ranks that cannot take part any more, and why."""
        return {rank: state.lost for rank, state in enumerate(self.ranks) if state.lost}

    def status(self, rank: int, timeout_s: float) -> WorkerStatus:
        """Ask a rank what it is doing. Without an answer in time, an `OldStatus`."""
        with self._condition:
            state = self.ranks[rank]
            if state.connection < 0 and not state.lost:
                return state.status  # not yet there
            if not state.lost and not state.left:
                self._number += 1
                number = self._asked[rank] = self._number
                self._wake.ring()
                self._condition.wait_for(
                    lambda: state.answered >= number or state.lost or state.left or self.is_stopped, timeout_s
                )
                if state.answered >= number:
                    return state.status
            note = state.lost or ("it has left the bus" if state.left else f"it has not answered for {timeout_s:g} s")
            old = state.status
            return OldStatus(old.rank, old.pid, old.phase, old.step_id, old.heartbeat_ns, old.error, note)

    def stop(self) -> None:
        """Tell the workers that the bus closes, and end. Everything of its own is closed then."""
        with self._condition:
            self.is_stopped = True
            self._condition.notify_all()
        self._wake.ring()
        self._thread.join(JOIN_S)

    # ── in the thread ───────────────────────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        try:
            while not self.is_stopped:
                ready = {socket for socket, _ in self._poller.poll()}
                self._wake.clear()
                if self._zap is not None and self._zap in ready:
                    self._admit(self._zap)
                for rank, listener in enumerate(self._listeners):
                    if listener.socket in ready:
                        self._listen(rank, listener)
                    if any(monitor.socket in ready for monitor in listener.monitors):
                        self._look(rank, listener)
                self._ask()
        except BaseException as error:
            if not self.is_stopped:  # a bug; without this thread nobody would notice who dies
                for rank in range(len(self.ranks)):
                    self._lose(rank, f"the driver's control thread failed: {error!r}")
                raise
        finally:
            for listener in self._listeners:
                for monitor in listener.monitors:
                    monitor.close()
                control.say(listener.socket, control.Closing())
                listener.socket.close(linger=int(self._linger_s * 1e3))
            if self._zap is not None:
                self._zap.close(linger=0)
            self._wake.close()

    def _listen(self, rank: int, listener: Listener) -> None:
        """Take what a rank says."""
        while readable(listener.socket):
            received = listener.socket.recv(zmq.NOBLOCK, copy=False)
            try:
                message = control.decode_to_driver(received.bytes, f"rank {rank}")
            except ProtocolError as error:
                self._lose(rank, str(error))
                continue
            state = self.ranks[rank]
            match message:
                case control.Hello():
                    self._greet(rank, listener, message, received.get(zmq.SRCFD))
                case control.Answer():
                    self._note(rank, message)
                case control.Broken():
                    if not state.left:
                        self._lose(rank, f"the connection of its {message.lane} lane ended")
                case control.Bye():
                    with self._condition:
                        state.left = True
                        self._condition.notify_all()
                    self._on_change(False)

    def _greet(self, rank: int, listener: Listener, hello: control.Hello, connection: object) -> None:
        state = self.ranks[rank]
        reason = ""
        if hello.version != __version__:
            reason = f"the driver runs zmqexec {__version__}, the worker {hello.version}: install the same"
        elif hello.rank != rank:
            reason = f"this is the endpoint of rank {rank}, not of rank {hello.rank}"
        elif state.connection >= 0:
            reason = f"rank {rank} (pid {state.status.pid}) has joined before: a new one needs a new bus"
        if reason:
            control.say(listener.socket, control.Refused(reason))
            return
        # A report of an earlier connection that had the same descriptor must not be taken for this one's end.
        self._look(rank, listener)
        with self._condition:
            state.connection = int(str(connection))
            state.status = replace(state.status, pid=hello.pid, heartbeat_ns=time.monotonic_ns())
        if state.connection not in listener.monitors[0].open:
            self._lose(rank, self._lost_note)
            return
        control.say(listener.socket, listener.welcome)

    def _note(self, rank: int, answer: control.Answer) -> None:
        state = self.ranks[rank]
        try:
            phase = Phase(answer.phase)
        except ValueError:
            self._lose(rank, f"it reports a phase {answer.phase}, which there is none of in this version")
            return
        with self._condition:
            since_ns = time.monotonic_ns() - answer.age_ns
            state.status = WorkerStatus(rank, answer.pid, phase, answer.step_id, since_ns, answer.error)
            state.answered = max(state.answered, answer.number)
            self._condition.notify_all()

    def _look(self, rank: int, listener: Listener) -> None:
        """Take libzmq's reports about a rank's connections."""
        state = self.ranks[rank]
        ended = listener.monitors[0].ended()
        for monitor in listener.monitors[1:]:
            monitor.ended()
        refused = sum(monitor.refused for monitor in listener.monitors)
        self.refused_peers += refused - listener.old_refused
        listener.old_refused = refused
        if state.connection in ended:
            self._listen(rank, listener)  # its last words, if it left any, came before
            if not state.left:
                self._lose(rank, self._lost_note)

    def _lose(self, rank: int, reason: str) -> None:
        with self._condition:
            if self.ranks[rank].lost:
                return
            self.ranks[rank].lost = reason
            self._condition.notify_all()
        self._on_change(True)

    def _ask(self) -> None:
        with self._condition:
            asked, self._asked = self._asked, {}
        for rank, number in asked.items():
            control.say(self._listeners[rank].socket, control.Ask(number))

    def _admit(self, zap: Socket) -> None:
        """Answer one handshake: on a rank's endpoints only that rank's key is admitted."""
        version, request_id, domain, _address, _identity, mechanism, *credentials = zap.recv_multipart()
        assert self._keys is not None
        admitted = False
        if mechanism == b"CURVE" and len(credentials) == 1 and domain.isdigit() and int(domain) < len(self.ranks):
            expected = z85.decode(self._keys.worker_public[int(domain)].encode())
            admitted = hmac.compare_digest(expected, credentials[0])
        verdict = (b"200", b"OK") if admitted else (b"400", b"this key is not admitted here")
        zap.send_multipart([version, request_id, *verdict, b"", b""])
