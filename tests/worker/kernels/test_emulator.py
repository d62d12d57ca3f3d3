"""What the emulator must find: each mistake that a GPU would forgive, hang on, or answer with garbage."""

from __future__ import annotations

import pytest
import torch

from tests import cuda_emulator


@pytest.fixture(scope="module")
def module():
    try:
        return cuda_emulator.load()
    except cuda_emulator.NoCompiler as missing:
        pytest.skip(str(missing))


def run(module, kind, *, shared_bytes=1024, pdl=False):
    word = torch.zeros(1, dtype=torch.int32)
    out = torch.zeros(256)
    module.emulator_fault(kind, word.data_ptr(), out.data_ptr(), shared_bytes, pdl)
    return out


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (0, r"no thread can go on: block \(0, 0, 0\), 32 of 64 .* 32 to 63 wait in __syncthreads \(32 of 64 there\)"),
        (1, r"33 of 64 threads have exited; 0 to 4 wait in __shfl_xor_sync with mask 0xffffffff; 6 to 31 wait in"),
        (6, r"thread 0: ldmatrix_x4 of shared byte 2, which is not a multiple of 16"),
        (7, r"no thread can go on: .*; 0 to 15 wait in __syncwarp with mask 0xffffffff"),
        (10, r"thread 3: __shfl_sync: mask 0x1 lacks the calling lane 3"),
        (11, r"load_cg_16 of 0x[0-9a-f]+, which is not a multiple of 16"),
        (13, r"cp_async_16 of byte 1024 of the block's 1024 bytes"),
        (14, r"0 to 0 wait in __syncwarp with mask 0x3; 1 to 1 wait in __ballot_sync with mask 0x3"),
        (15, r"barrier_wait of what is no barrier"),
        (16, r"barrier_init of a barrier that is in use"),
        (17, r"wgmma before wgmma_fence"),
        (18, r"cluster_address in block 1 of 1"),
        (19, r"load_box to an address that is not a multiple of 1024"),
        (20, r"more than 1 arrivals in a phase of a barrier"),
        (21, r"cluster_wait without a cluster_arrive"),
        (22, r"cluster_arrive without a cluster_wait"),
        (23, r"store_cluster to no block that is there"),
    ],
)
def test_a_mistake_ends_the_launch_with_its_place(module, kind, text):
    with pytest.raises(RuntimeError, match=text):
        run(module, kind)
    assert run(module, 99).eq(0).all()  # and the next launch is as good as ever


def test_a_write_past_the_shared_memory_is_found(module):
    with pytest.raises(RuntimeError, match="wrote byte 256 of its 256 bytes of shared memory"):
        run(module, 2, shared_bytes=256)
    run(module, 2, shared_bytes=320)


def test_shared_memory_begins_as_nan(module):
    assert run(module, 4)[:64].isnan().all()


def test_a_copy_arrives_only_when_it_is_waited_for(module):
    assert run(module, 3)[4:68].isnan().all()


def test_a_neighbour_value_read_without_a_barrier_is_seen(module):
    assert run(module, 12).isnan().any()


def test_polling_for_what_never_comes_ends(module):
    with pytest.raises(RuntimeError, match="polls memory that nobody writes"):
        run(module, 5)


def test_a_block_that_never_waits_or_launches_is_found_in_a_dependent_launch(module):
    for kind in (8, 99):  # 8 launches alone
        with pytest.raises(RuntimeError, match="never called pdl_wait"):
            run(module, kind, pdl=True)
    with pytest.raises(RuntimeError, match="never called pdl_launch_dependents"):
        run(module, 9, pdl=True)


def test_launches_of_a_group_run_at_the_same_time(module):
    flags = torch.zeros(3, dtype=torch.int32)
    failed = torch.zeros(2, dtype=torch.int32)
    own, peer = flags.data_ptr(), flags.data_ptr() + 4
    module.emulator_begin_group()
    module.primitive_answer(own, peer, 50, 10**9, failed.data_ptr(), 0)
    module.primitive_answer(peer, own, 50, 10**9, failed.data_ptr() + 4, 0)
    module.emulator_run_group()
    assert flags.tolist() == [50, 50, 0] and failed.tolist() == [0, 0]


def test_the_clock_runs_so_that_bounded_waits_end(module):
    flags = torch.zeros(2, dtype=torch.int32)
    failed = torch.zeros(1, dtype=torch.int32)
    module.primitive_answer(flags.data_ptr(), flags.data_ptr() + 4, 3, 10**6, failed.data_ptr(), 0)
    assert failed.item() == 1
