"""Every error zmqexec raises, split by cause: you, a peer, or us.

Runs in: driver | worker | server.

    ZmqexecError
    ├── UserError (also ValueError)     the caller can mend it; nothing was started or lost
    │   ├── ConfigError                 a setting, or two settings that do not go together
    │   ├── CheckpointError             the model folder: missing, truncated, unsupported, shapes that disagree
    │   ├── RequestError                a prompt or a sampling value
    │   └── EngineClosed                the engine was closed before, or by, this call
    ├── ExecutorError                   a peer process failed; the engine is closed and says why
    │   ├── StartupError                a worker or the driver process did not become ready
    │   ├── WorkerFailed                an exception on a rank; carries its traceback
    │   ├── WorkerDied                  a worker process exited
    │   ├── WorkerStalled               no reply within `step_timeout_s`
    │   ├── DriverDied                  the driver process of an AsyncEngine or server exited
    │   └── BusError                    the message bus
    │       ├── BusClosed               the other end closed it
    │       └── BusTimeout              the deadline of a publish or reply passed
    └── InternalError                   our bug; please report it
        └── ProtocolError               bytes that are not a message of this version

An error that happened in another process travels as `protocol.ErrorInfo` and is raised again here by
`from_info`, as the same class with the same text.
"""

from __future__ import annotations

import signal


class ZmqexecError(Exception):
    """Base of everything zmqexec raises on purpose."""


class UserError(ZmqexecError, ValueError):
    """The caller's mistake. `param` names the field at fault, where there is one."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ConfigError(UserError):
    """A setting has a value that cannot work; the message names it, its range and the remedy."""


class CheckpointError(UserError):
    """The checkpoint cannot be served: missing, truncated, unsupported, or inconsistent."""


class RequestError(UserError):
    """A prompt or sampling value is invalid; other requests are not affected."""


class EngineClosed(UserError):
    """The engine has been closed, so the call cannot be served."""


class ExecutorError(ZmqexecError):
    """A process of the engine failed. Open requests end with this error."""


class StartupError(ExecutorError):
    """A process of the engine did not become ready."""


class WorkerFailed(ExecutorError):
    """An exception on a worker, with that rank's traceback in the text."""

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


class WorkerDied(ExecutorError):
    """A worker process exited while the engine was open."""

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank

    @classmethod
    def of(cls, rank: int, pid: int, exitcode: int | None, where: str, log_tail: str) -> WorkerDied:
        """`exitcode` as in subprocess (negative: a signal); `where` is the phase and step the rank was in."""
        cause = describe_exit(exitcode)
        hint = " SIGKILL is usually the out-of-memory killer: check `dmesg`." if cause == "SIGKILL" else ""
        tail = f"\nIts last output:\n{log_tail}" if log_tail else ""
        return cls(f"worker {rank} (pid {pid}) died {where}: {cause}.{hint}{tail}", rank)


class WorkerStalled(ExecutorError):
    """A worker did not reply within the step's deadline."""

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


class DriverDied(ExecutorError):
    """The driver process exited while requests were open."""


class BusError(ExecutorError):
    """The message bus between driver and workers failed."""


class BusClosed(BusError):
    """The other end closed the bus, or it was closed here before the call."""


class BusTimeout(BusError):
    """The deadline passed before the record could be published."""


class InternalError(ZmqexecError):
    """A broken invariant of zmqexec itself: please report it with this text."""


class ProtocolError(InternalError):
    """Bytes on the bus that are no message of this version."""


def describe_exit(exitcode: int | None) -> str:
    """`subprocess`'s return code in words: a signal's name, or `exit code N`."""
    if exitcode is None:
        return "exit code unknown"
    if exitcode < 0:
        try:
            return signal.Signals(-exitcode).name
        except ValueError:
            return f"signal {-exitcode}"
    return f"exit code {exitcode}"


def from_info(kind: str, message: str, param: str | None = None) -> ZmqexecError:
    """The error that another process reported, as the class of that name (`InternalError` for any other)."""
    cls = BY_NAME.get(kind)
    if cls is None:
        return InternalError(f"{kind}: {message}")
    if issubclass(cls, UserError):
        return cls(message, param)
    return cls(message)


def _tree(root: type[ZmqexecError]) -> list[type[ZmqexecError]]:
    return [root, *(cls for child in root.__subclasses__() for cls in _tree(child))]


BY_NAME = {cls.__name__: cls for cls in _tree(ZmqexecError)}
