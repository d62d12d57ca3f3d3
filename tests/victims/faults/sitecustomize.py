"""Put on PYTHONPATH by a test: makes the model of one rank raise, or hang, once and while a trigger file exists.

Real processes and the real error path, without a hook in the product.
"""

import importlib.abc
import importlib.util
import json
import os
import sys
import time


class Saboteur(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):  # type: ignore[no-untyped-def]
        if name != "zmqexec.worker.runner":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):  # type: ignore[no-untyped-def]
            load(module)
            run = module.ModelRunner.run

            def sabotaged(self, step):  # type: ignore[no-untyped-def]
                if os.path.exists(trigger):  # noqa: PTH110  (as little as possible is imported here)
                    if os.environ.get("FAULT_KIND") == "hang":
                        hang_in_the_model()
                    else:
                        raise ArithmeticError("sabotage in the model")
                return run(self, step)

            module.ModelRunner.run = sabotaged

        spec.loader.exec_module = exec_module
        return spec


def hang_in_the_model():  # type: ignore[no-untyped-def]
    while os.path.exists(trigger):  # noqa: PTH110
        time.sleep(0.01)


trigger = os.environ.get("FAULT_TRIGGER", "")
arguments = sys.orig_argv
is_worker = len(arguments) > 4 and arguments[3] == "worker"
if trigger and is_worker and json.loads(arguments[4])["rank"] == int(os.environ["FAULT_RANK"]):
    sys.meta_path.insert(0, Saboteur())
