"""Put on PYTHONPATH by a test: takes away what only Linux has, in this process and in those that it starts.

Real processes and the real fallbacks, on the one platform there is to test on. Not taken away: /proc.
"""

import importlib.abc
import os
import sys

for name in ("memfd_create", "pidfd_open", "eventfd", "eventfd_write", "sched_getaffinity", "sched_setaffinity"):
    vars(os).pop(name, None)


class Elsewhere:
    """`sys`, with another answer to which platform this is."""

    platform = "darwin"

    def __getattr__(self, name):  # type: ignore[no-untyped-def]
        return getattr(sys, name)


class Absence(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):  # type: ignore[no-untyped-def]
        if name == "zmqexec._bus":
            raise ModuleNotFoundError("no such extension on this platform", name=name)
        for module in ("zmqexec", "zmqexec.bus.zeromq.endpoints"):
            if module in sys.modules:
                vars(sys.modules[module])["sys"] = Elsewhere()


sys.meta_path.insert(0, Absence())
