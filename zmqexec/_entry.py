"""First code of every process that zmqexec starts: become exactly the files that the parent runs.

Runs in: driver | worker. Started by path, as `python -P _entry.py ROLE ARGUMENTS`, never imported.

`python -m zmqexec.worker` would look for the package on the new interpreter's own path and could find another copy.
Here the package is the folder this file lies in, and everything else comes from the parent's `sys.path`.
"""

import importlib
import importlib.util
import json
import os
import sys

ROLES = {"worker": "zmqexec.worker.__main__", "driver": "zmqexec.driver.process"}


def main() -> None:
    """Load the package and run the role's `main(arguments)`."""
    role, arguments = sys.argv[1], json.loads(sys.argv[2])
    sys.path[:] = arguments.pop("sys_path")
    folder = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120  (pathlib would be a slower import)
    spec = importlib.util.spec_from_file_location(
        "zmqexec", f"{folder}/__init__.py", submodule_search_locations=[folder]
    )
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["zmqexec"] = package
    spec.loader.exec_module(package)
    importlib.import_module(ROLES[role]).main(arguments)


if __name__ == "__main__":
    main()
