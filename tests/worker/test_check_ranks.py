"""With `check_ranks`, a rank that samples other tokens than its peers ends the engine with an error that names both."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from tests.checkpoints import make_checkpoint, random_prompts
from tests.worker.gpu.emulation import make_gpu_runner
from tests.worker.step_driver import StepDriver, ThreadCollectives, make_runner
from zmqexec.errors import InternalError
from zmqexec.protocol import Admission, Sampling, StepInput, pack
from zmqexec.worker.check_ranks import check_ranks
from zmqexec.worker.outputs import OutputThread

PROMPTS = random_prompts(128, [5, 12, 3], seed=1)


def test_the_first_row_that_differs_is_named_with_all_tokens():
    same = np.array([[3, 4, 5], [3, 4, 5]])
    check_ranks(7, same)
    check_ranks(7, same[:, :0])
    with pytest.raises(InternalError) as caught:
        check_ranks(7, np.array([[3, 4, 5], [3, 9, 5], [3, 4, 5]]))
    assert str(caught.value) == (
        "step 7: the ranks sampled different tokens in row 1 (rank 0: 4, rank 1: 9, rank 2: 4)"
    )
    with pytest.raises(InternalError, match=r"in row 0 .*, and in 2 more rows other ones too$"):
        check_ranks(7, np.array([[3, 4, 5], [0, 0, 0]]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(path)
    return path


def admit_all(driver):
    for slot, prompt in enumerate(PROMPTS):
        driver.admit(slot, prompt, Sampling(temperature=0.9, seed=slot) if slot == 1 else None)


class Wrong(ThreadCollectives):
    """Of rank 1: the next `all_gather` of integers says something else in `row`."""

    row: int | None = None

    def all_gather(self, tensor):
        if self.row is not None and not tensor.is_floating_point():
            tensor = tensor.clone()
            tensor[self.row] = 100
        return super().all_gather(tensor)


def ranks(make, folder, **config):
    members = Wrong.group(2)
    with ThreadPoolExecutor(2) as pool:
        runners = list(pool.map(lambda member: make(folder, member, **config), members))
    return StepDriver(runners, 16 if make is make_gpu_runner else 8, 256), members


@pytest.mark.parametrize("make", [make_runner, make_gpu_runner])
def test_ranks_that_agree_go_on(make, folder):
    outputs = []
    for checks in (False, True):
        driver, _ = ranks(make, folder, check_ranks=checks)
        admit_all(driver)
        outputs.append(driver.generate(5))
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("make", [make_runner, make_gpu_runner])
def test_a_rank_that_differs_is_named_with_step_and_row(make, folder):
    driver, members = ranks(make, folder, check_ranks=True)
    admit_all(driver)
    driver.generate(3)
    members[1].row = 2
    with pytest.raises(InternalError, match=r"step 3: .* in row 2 \(rank 0: \d+, rank 1: 100\)$"):
        driver.step({}, [0, 1, 2])


def test_one_rank_has_nothing_to_compare(folder):
    for make in (make_runner, make_gpu_runner):
        driver = StepDriver([make(folder, check_ranks=True)], 16 if make is make_gpu_runner else 8, 256)
        admit_all(driver)
        driver.generate(2)


def test_on_a_gpu_the_error_comes_from_the_output_thread_and_launching_goes_on(folder):
    driver, members = ranks(make_gpu_runner, folder, check_ranks=True)
    members[1].row = 0
    admission = Admission(0, pack(PROMPTS[0]), len(PROMPTS[0]), 0, pack([1]))
    steps = [
        StepInput(1, 0, prefills=pack([0, len(PROMPTS[0])]), admitted=[admission]),
        StepInput(1, 1, decodes=b"\1"),
    ]
    caught: list[tuple[str, BaseException]] = []
    failed = threading.Event()

    def on_error(error):
        caught.append((threading.current_thread().name, error))
        failed.set()

    outputs = OutputThread(lambda pending: pending.result(), on_error)
    with ThreadPoolExecutor(1) as other:
        for step in steps:
            of_other = other.submit(driver.runners[1].submit, step)
            outputs.put(lambda step=step: driver.runners[0].submit(step))
            of_other.result(30)
    assert failed.wait(30)
    ((thread, error),) = caught
    assert thread == "zmqexec-outputs" and isinstance(error, InternalError)
    assert str(error).startswith("step 0: the ranks sampled different tokens in row 0 (rank 0: ")


@pytest.mark.gpu
def test_on_a_gpu_tokens_are_gathered_behind_the_step_without_waiting_for_it(folder):
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    from zmqexec.worker.gpu.device import CudaDevice

    driver, members = ranks(make_gpu_runner, folder, check_ranks=True, device=CudaDevice(0), dtype="bfloat16")
    admit_all(driver)
    driver.generate(3)
    members[1].row = 1
    with pytest.raises(InternalError, match=r"step 3: .* in row 1 \(rank 0: \d+, rank 1: 100\)$"):
        driver.step({}, [0, 1, 2])
