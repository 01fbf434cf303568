"""The driver and the life of a kernel: loading, contexts, captures, threads, devices, failures, cost of a launch."""

import pytest
from host.harness import (
    ARCHS,
    BF16,
    FP16,
    FP32,
    calls,
    in_threads,
    launch_map,
    map_kernel,
    row,
    simple_arguments,
    simple_kernel,
    start,
)

INVALID_VALUE, NO_DEVICE = 1, 100


def test_a_driver_that_is_not_there(host):
    with pytest.raises(RuntimeError, match=r"cannot load the NVIDIA driver libnothing\.so\.1: .*No such file"):
        host.load_driver("libnothing.so.1")


def test_a_library_that_is_no_driver(host):
    with pytest.raises(RuntimeError, match=r"libm\.so\.6 has no cuInit: the kernels need an NVIDIA driver"):
        host.load_driver("libm.so.6")


def test_a_driver_that_does_not_start(host):
    host.fail("cuInit", NO_DEVICE)
    with pytest.raises(RuntimeError, match="does not start: CUDA_ERROR_NO_DEVICE"):
        host.load_driver(host.__file__)


@pytest.mark.parametrize(
    "function",
    ["cuLibraryLoadData", "cuLibraryGetKernel", "cuKernelGetFunction", "cuKernelSetAttribute", "cuLaunchKernelEx"],
)
def test_a_failing_driver_call_is_named_and_can_be_tried_again(host, function):
    kernel = simple_kernel(host, shared=100_000)
    host.fail(function, INVALID_VALUE)
    message = rf"^scale_fwd-2-64-sm_90a.*: {function} failed: CUDA_ERROR_INVALID_VALUE \(invalid argument\)$"
    with pytest.raises(RuntimeError, match=message):
        host.launch(kernel, 0, 0, [1, 1, 1], simple_arguments(host))
    host.fail(function, 0)
    host.launch(kernel, 0, 0, [1, 1, 1], simple_arguments(host))


def test_a_failed_launch_says_what_was_launched(host):
    kernel = simple_kernel(host)
    host.fail("cuLaunchKernelEx", 719)  # an error that the driver has no text for
    message = r"on CUDA device 0, grid \[7, 5, 3\], 128 threads, 1024 bytes of shared memory: .* unknown \(unknown\)"
    with pytest.raises(RuntimeError, match=message):
        host.launch(kernel, 0, 0, [7, 5, 3], simple_arguments(host))


def test_a_failed_descriptor_names_its_argument(host):
    host.fail("cuTensorMapEncodeTiled", INVALID_VALUE)
    with pytest.raises(RuntimeError, match="sm_90a: argument x_desc: cuTensorMapEncodeTiled failed: CUDA_ERROR_"):
        launch_map(host, map_kernel(host), 0x100, (64, 32), (32, 1))


def test_loading_is_allowed_inside_a_capture_and_the_mode_is_given_back(host):
    host.launch(simple_kernel(host), 0, 0, [1, 1, 1], simple_arguments(host))
    relaxed, thread_default = 2, 0
    assert [c["capture_mode"] for c in calls(host, "cuLibraryLoadData")] == [relaxed]
    assert [c["capture_mode"] for c in calls(host, "cuKernelGetFunction")] == [relaxed]
    assert [c["mode"] for c in calls(host, "cuThreadExchangeStreamCaptureMode")] == [relaxed, thread_default]


def test_the_capture_mode_is_given_back_when_loading_fails(host):
    host.fail("cuLibraryLoadData", INVALID_VALUE)
    with pytest.raises(RuntimeError, match="cuLibraryLoadData"):
        host.launch(simple_kernel(host), 0, 0, [1, 1, 1], simple_arguments(host))
    assert [c["mode"] for c in calls(host, "cuThreadExchangeStreamCaptureMode")] == [2, 0]


@pytest.mark.parametrize(("shared", "expected"), [(48 * 1024, []), (48 * 1024 + 1, [(8, 48 * 1024 + 1)])])
def test_large_shared_memory_is_opted_in_to(host, shared, expected):
    kernel = simple_kernel(host, shared=shared)
    for _ in range(2):
        host.launch(kernel, 0, 0, [1, 1, 1], simple_arguments(host))
    assert [(c["attribute"], c["value"]) for c in calls(host, "cuKernelSetAttribute")] == expected  # MAX_DYNAMIC_SHARED


def test_a_fresh_thread_gets_the_primary_context_and_keeps_it(host):
    start(host, [90] * 4)
    kernel = simple_kernel(host)

    def work(_):
        for _ in range(3):
            host.launch(kernel, 3, 0, [1, 1, 1], simple_arguments(host))

    in_threads(1, work)
    in_threads(1, work)
    assert [c["device"] for c in calls(host, "cuDevicePrimaryCtxRetain")] == [3]  # one reference for the process
    assert [c["context"] for c in calls(host, "cuCtxSetCurrent")] == [0x1003, 0x1003]  # each thread once, never reset
    assert {c["context"] for c in calls(host, "cuLaunchKernelEx")} == {0x1003}


def test_a_cubin_is_loaded_once_by_all_threads(host):
    kernel = simple_kernel(host, shared=100_000)
    in_threads(8, lambda _: host.launch(kernel, 0, 0, [1, 1, 1], simple_arguments(host)))
    assert [c["code"] for c in calls(host, "cuLibraryLoadData")] == [kernel.cubin]
    assert len(calls(host, "cuKernelSetAttribute")) == 1
    assert len(calls(host, "cuLaunchKernelEx")) == 8


def test_threads_that_look_for_a_kernel_at_once_find_the_same(host):
    kernels = host.set_table([row(dim=d) for d in (32, 64, 128)])
    family = host.KernelFamily("scale_fwd")
    found = {}
    in_threads(8, lambda i: found.setdefault(i, family.find(0, BF16, 64).cubin))
    assert list(found.values()) == [kernels[1].cubin] * 8
    assert len(calls(host, "cuDeviceGetAttribute")) == 3


def test_two_devices_share_one_load(host):
    start(host, [90, 90])
    kernel = simple_kernel(host, shared=100_000)
    for device in (0, 1, 0, 1):
        host.launch(kernel, device, 0, [1, 1, 1], simple_arguments(host))
    assert len(calls(host, "cuLibraryLoadData")) == 1
    assert [c["device"] for c in calls(host, "cuKernelSetAttribute")] == [0, 1]
    assert [c["context"] for c in calls(host, "cuKernelGetFunction")] == [0x1000, 0x1001]
    assert [c["context"] for c in calls(host, "cuLaunchKernelEx")] == [0x1000, 0x1001, 0x1000, 0x1001]
    # The thread was on device 0 and is given it back after each launch on device 1.
    assert [c["context"] for c in calls(host, "cuCtxSetCurrent")] == [0x1001, 0x1000] * 2


def test_a_warm_launch_allocates_nothing_and_is_fast(host):
    t = host.ParamType
    params = [(f"p{i}", t.Pointer, 16) for i in range(10)] + [(f"s{i}", t.I64, 8) for i in range(20)]
    archs = [(a, dtype, d) for a in ARCHS for dtype in (FP32, FP16, BF16) for d in (16, 32, 64, 96, 128, 192, 256)]
    host.set_table([row(a, dtype, d, params=params) for a, dtype, d in archs])
    args = [(name, kind, 16) for name, kind, _ in params]
    family = host.KernelFamily("scale_fwd")
    _, first_allocations = family.cost(0, BF16, 256, args, 1)
    nanoseconds, allocations = family.cost(0, BF16, 256, args, 20_000)
    assert first_allocations > 0  # the counter counts
    assert allocations == 0
    assert nanoseconds < 5_000  # a fraction of a microsecond by itself; the machine may be busy
