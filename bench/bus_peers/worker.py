"""Entry of a worker process that a transport starts by exec: `python -m bus_peers.worker MODULE:FUNCTION ARGUMENTS`.

Runs in: worker.
"""

import importlib
import json
import sys

from bus_peers.peer import die_with_parent

if __name__ == "__main__":
    die_with_parent()
    module, _, function = sys.argv[1].partition(":")
    getattr(importlib.import_module(module), function)(*json.loads(sys.argv[2]))
