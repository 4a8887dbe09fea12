"""The emulator itself: what it runs is what CUDA's documents say, and what is wrong is found."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

from tests.cuda.library import Launched, Library, build

pytestmark = pytest.mark.xdist_group("emulated_emulator")  # the library is compiled once
FULL = 0xFFFFFFFF


@pytest.fixture(scope="module")
def library() -> Library:
    return build("emulator", "tests/cuda/emulator_cases.cu")


@pytest.fixture(params=[False, True], ids=["forwards", "backwards"])
def either(request: pytest.FixtureRequest, library: Library) -> Library:
    return library.on(90, backwards=request.param)


def test_shuffles_and_votes(either: Library) -> None:
    out = np.zeros((64, 6), np.int32)
    either.call("case_shuffles", out)
    for thread, found in enumerate(out):
        lane, first = thread % 32, thread // 32 * 32
        down = lane + 3 if lane + 3 < 32 else lane
        up = lane - 2 if lane % 8 >= 2 else lane
        assert found[:4].tolist() == [10 * (first + i) for i in (lane ^ 5, down, up, lane // 16 * 16 + 9)]
        assert int(found[4]) & FULL == sum(1 << i for i in range(0, 32, 3))
        assert found[5] == (10 * (first + (lane ^ 1)) + 1 if lane < 8 else 0)


def test_barriers_and_traffic(either: Library) -> None:
    x, out = np.arange(256, dtype=np.float32), np.zeros(2, np.float32)
    either.call("case_block_sum", x, out, 5)
    assert out.tolist() == [x[:128].sum() + 5, x[128:].sum() + 5]
    assert (either.bytes_read, either.bytes_written) == (1024, 8)
    assert either.launches == [Launched(2, 128, 1, 512)]


def test_clusters(either: Library) -> None:
    out = np.zeros(8, np.int32)
    either.call("case_cluster", out)
    assert out.tolist() == [406 + 100 + i for i in range(4)] + [422 + 104 + i for i in range(4)]
    with pytest.raises(RuntimeError, match="in a block of the cluster that has returned"):
        either.call("case_cluster_gone", out)
    with pytest.raises(RuntimeError, match="clusters need sm_90"):
        either.on(80).call("case_cluster", out)


def test_tensor_core_fragments(either: Library) -> None:
    """Fragments gathered by the layout that the PTX manual prints, element by element."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(16, 16, generator=g).bfloat16(), torch.randn(16, 8, generator=g).bfloat16()
    lane = np.arange(32)
    group, in_group = lane >> 2, lane % 4
    fa, fb = np.zeros((32, 8), np.uint16), np.zeros((32, 4), np.uint16)
    bits_a, bits_b = a.view(torch.uint16).numpy(), b.view(torch.uint16).numpy()
    for i in range(8):  # a_i
        row = np.where((0 <= i < 2) | (4 <= i < 6), group, group + 8)
        column = in_group * 2 + (i & 1) + (8 if i >= 4 else 0)
        fa[:, i] = bits_a[row, column]
    for i in range(4):  # b_i
        row = in_group * 2 + (i & 1) + (8 if i >= 2 else 0)
        fb[:, i] = bits_b[row, group]
    out = np.zeros((32, 4), np.float32)
    either.call("case_product", fa, fb, out)
    expected = (a.double() @ b.double()).numpy()
    for i in range(4):
        row, column = np.where(i < 2, group, group + 8), in_group * 2 + (i & 1)
        np.testing.assert_allclose(out[:, i], expected[row, column] + i + 1, rtol=1e-5, atol=1e-5)


def test_ldmatrix(either: Library) -> None:
    m = np.arange(1000, 1256, dtype=np.uint16).reshape(4, 8, 8)
    out = np.zeros((32, 8), np.uint32)
    either.call("case_matrices", m, out)
    for lane in range(32):
        g, t = lane // 4, 2 * (lane % 4)
        for i in range(4):
            assert out[lane, i] == int(m[i, g, t]) | int(m[i, g, t + 1]) << 16
            assert out[lane, 4 + i] == int(m[i, t, g]) | int(m[i, t + 1, g]) << 16


def test_asynchronous_copies(either: Library) -> None:
    x, out = either.copy(np.arange(128, dtype=np.uint32)), either.array(128, np.uint32)
    either.call("case_copies", x, out, 1)
    assert (out == x).all()
    assert either.bytes_read == 512
    with pytest.raises(RuntimeError, match="never waited for"):
        either.call("case_copies", x, out, 0)


def test_conversions_are_torchs(library: Library) -> None:
    bits = np.arange(65536, dtype=np.uint16)
    bf16, fp16 = np.zeros(65536, np.float32), np.zeros(65536, np.float32)
    library.handle.case_widen(*(a.ctypes.data_as(ctypes.c_void_p) for a in (bits, bf16, fp16)), 65536)
    for dtype, found in ((torch.bfloat16, bf16), (torch.float16, fp16)):
        np.testing.assert_array_equal(found, torch.from_numpy(bits.copy()).view(dtype).float().numpy())
    bf16, fp16 = bf16[np.isfinite(bf16)], fp16[np.isfinite(fp16)]
    x = np.concatenate([bf16, fp16, bf16[1:] / 2 + bf16[:-1] / 2, (fp16[1:] + fp16[:-1]) / 2])
    x = np.concatenate([x, np.nextafter(x, np.float32(0)), np.nextafter(x, np.float32(1e38))])
    a, b = np.zeros(len(x), np.uint16), np.zeros(len(x), np.uint16)
    library.handle.case_narrow(*(v.ctypes.data_as(ctypes.c_void_p) for v in (x, a, b)), len(x))
    np.testing.assert_array_equal(a, torch.from_numpy(x).bfloat16().view(torch.uint16).numpy())
    np.testing.assert_array_equal(b, torch.from_numpy(x).half().view(torch.uint16).numpy())


def test_a_race_depends_on_the_order_of_threads(library: Library) -> None:
    found = []
    for backwards in (False, True):
        out = np.zeros(64, np.int32)
        library.on(backwards=backwards).call("case_race", out)
        found.append(out)
    assert (found[0] == 1).all()
    assert (found[1][1:] == -1).all()  # the poison


@pytest.mark.parametrize(
    ("case", "arguments", "message"),
    [
        ("barrier_for_some", (), r"deadlock: .* waits in __syncthreads of line \d+;.* 24 of 64 threads have returned"),
        ("shuffle_for_some", (), r"a shuffle: lane 7 of the mask has returned|deadlock: .* waits in a shuffle"),
        ("outside", (4, 16), r"outside of dynamic shared memory: offset 16 of 16 bytes.*block 0 thread 3"),
        ("outside", (3, 12), "a write outside of dynamic shared memory"),
        ("outside", (-1, 16), "a write outside of dynamic shared memory"),
        ("global_outside", (None,), "an invalid access of global memory"),
        ("misaligned", (np.zeros(8, np.float32), np.zeros(1, np.float32)), "misaligned access of 16 bytes"),
        ("shape", (1025, 16, 1), "launch refused: 1025 threads"),
        ("shape", (32, 228 * 1024, 1), "launch refused: 233472 bytes"),
        ("shape", (32, 16, 3), "launch refused: cluster of 3"),
    ],
)
def test_what_is_wrong_is_found(either: Library, case: str, arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        either.call(f"case_{case}", *arguments)
    out = np.zeros(8, np.int32)
    either.call("case_cluster", out)  # and the next launch is none the worse
