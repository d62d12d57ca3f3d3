"""`zmqexec-serve` as a user starts it, in a process of its own."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import psutil

from tests.procs import wait_for, wait_gone

START_TIMEOUT_S = 60.0


def command():
    installed = Path(sys.executable).parent / "zmqexec-serve"
    return [str(installed)] if installed.exists() else [sys.executable, "-m", "zmqexec.server.cli"]


class RealServer:
    """The process and what it prints. `wait_ready` waits for its banner."""

    def __init__(self, *flags, port="0"):
        self.popen = subprocess.Popen(
            [*command(), "--port", port, *flags],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        self.process = psutil.Process(self.popen.pid)
        self.lines = []
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.popen.stdout), daemon=True)
        self._reader.start()
        self._family = {}

    @property
    def said(self):
        return "".join(self.lines)

    def wait_ready(self):
        wait_for(lambda: "Stop with Ctrl-C" in self.said or self.popen.poll() is not None, START_TIMEOUT_S, "ready")
        assert self.popen.poll() is None, self.said
        self.url = re.search(r"http://\S+:\d+", self.said)[0]
        self.http = httpx.Client(base_url=self.url, timeout=30)
        return self

    def family(self):
        """The server and everyone below it that was ever seen here."""
        for process in [self.process, *self.process.children(recursive=True)]:
            self._family[process.pid] = process
        return list(self._family.values())

    def wait_exit(self, timeout_s):
        """Exit code; everyone it started must be gone by then too."""
        code = self.popen.wait(timeout_s)
        wait_gone(self._family.values(), timeout_s)
        self._reader.join(timeout_s)
        return code

    def metric(self, name):
        lines = self.http.get("/metrics").text.splitlines()
        return float(next(line.split()[-1] for line in lines if line.startswith(name + " ")))

    def close(self):
        if self.popen.poll() is None:
            self.family()
            os.killpg(self.popen.pid, signal.SIGTERM)
            try:
                self.wait_exit(20)
            finally:
                if self.popen.poll() is None:
                    os.killpg(self.popen.pid, signal.SIGKILL)
        if hasattr(self, "http"):
            self.http.close()
