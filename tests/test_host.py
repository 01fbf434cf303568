"""Host logic without a GPU: the choice of a kernel, its arguments and its launch, through a fake CUDA driver."""

import importlib.util
import re
import struct
import sys
import threading
from pathlib import Path

import pytest

for module in ("pybind11", "ninja", "triton"):
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"needs {module} to compile the host logic for Python", allow_module_level=True)

FP32, FP16, BF16 = 0, 1, 2
INVALID_VALUE, NO_DEVICE = 1, 100
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376, 75: 65536, 110: 232448}
DRIVER_13_1, DRIVER_13_2 = 13010, 13020


def load_extension(path):
    spec = importlib.util.spec_from_file_location("simplex_host", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def extension():
    sys.path.insert(0, str(Path(__file__).parent / "host"))
    try:
        from build import build
    finally:
        sys.path.pop(0)
    return load_extension(build())


@pytest.fixture
def host(extension):
    """The extension with one H100, whose context is current."""
    start(extension, [90])
    return extension


def start(host, capabilities, version=DRIVER_13_1):
    host.reset(version, [(*divmod(c, 10), SHARED[c]) for c in capabilities])
    host.load_driver(host.__file__)  # the extension exports the functions of libcuda
    host.set_thread(0x1000, 0)


def row(arch="sm_90a", dtype=BF16, dim=64, **changes):
    number, suffix = re.fullmatch(r"sm_(\d+)([af]?)", arch).groups()
    return {
        "name": f"scale_fwd-{dtype}-{dim}-{arch}", "family": "scale_fwd", "symbol": "scale_fwd", "arch": int(number),
        "arch_suffix": suffix or "\0", "num_warps": 4, "num_ctas": 1, "shared": 1024, "cooperative": 0, "pdl": 0,
        "key": [("dtype", dtype), ("HEAD_DIM", dim)], "tile": [("BLOCK_M", 128)], "params": [], "tensor_maps": [],
    } | changes  # fmt: skip


def calls(host, function):
    return [values for name, values in host.calls() if name == function]


def launched(host):
    [values] = calls(host, "cuLaunchKernelEx")
    return values


# Choosing a row.

ARCHS = ["sm_80", "sm_90a", "sm_100f", "sm_120f"]


@pytest.mark.parametrize(
    ("capability", "expected"),
    [(80, "sm_80"), (86, "sm_80"), (89, "sm_80"), (90, "sm_90a"), (100, "sm_100f"), (103, "sm_100f"), (120, "sm_120f")],
)
def test_each_capability_gets_its_architecture(host, capability, expected):
    start(host, [capability])
    host.set_table([row(arch) for arch in ARCHS])
    assert host.KernelFamily("scale_fwd").find(0, BF16, 64).name.endswith(expected)


@pytest.mark.parametrize(("capability", "text"), [(75, "7.5"), (110, "11.0")])
def test_an_unknown_capability_is_refused_with_what_there_is(host, capability, text):
    start(host, [capability])
    host.set_table([row(arch) for arch in ARCHS])
    message = (
        rf"scale_fwd: no kernel for dtype=bf16 HEAD_DIM=64 on CUDA device 0 \(compute capability {re.escape(text)}, "
        rf"{SHARED[capability]} bytes of shared memory\); this build has kernels for sm_100f, sm_120f, sm_80, sm_90a$"
    )
    with pytest.raises(RuntimeError, match=message):
        host.KernelFamily("scale_fwd").find(0, BF16, 64)


@pytest.mark.parametrize(
    ("capability", "archs", "expected"),
    [
        (89, ["sm_80", "sm_89", "sm_86"], "sm_89"),  # the newest that runs
        (86, ["sm_89", "sm_80"], "sm_80"),  # a newer minor does not
        (90, ["sm_90", "sm_90a"], "sm_90a"),  # the most specific
        (100, ["sm_100", "sm_100f", "sm_100a"], "sm_100a"),
        (103, ["sm_100a", "sm_100f"], "sm_100f"),  # `a` runs on nothing but its own chip
        (103, ["sm_100f", "sm_103a"], "sm_103a"),
    ],
)
def test_the_best_of_several_architectures(host, capability, archs, expected):
    start(host, [capability])
    host.set_table([row(arch) for arch in archs])
    assert host.KernelFamily("scale_fwd").find(0, BF16, 64).name.endswith("-" + expected)


def test_the_key_selects_dtype_and_head_dim(host):
    keys = [(dtype, dim) for dtype in (FP32, FP16, BF16) for dim in (32, 64, 128)]
    host.set_table([row(dtype=t, dim=d) for t, d in keys] + [row(family="other", name="other")])
    family = host.KernelFamily("scale_fwd")
    for dtype, dim in keys:
        kernel = family.find(0, dtype, dim)
        assert (kernel["dtype"], kernel["HEAD_DIM"], kernel["BLOCK_M"]) == (dtype, dim, 128)
    with pytest.raises(RuntimeError, match=r"dtype=fp16 HEAD_DIM=96 .*; no architecture has this combination"):
        family.find(0, FP16, 96)
    with pytest.raises(RuntimeError, match="scale_fwd-2-64-sm_90a: has no constant named BLOCK_K"):
        family.find(0, BF16, 64)["BLOCK_K"]


@pytest.mark.parametrize(("capability", "expected"), [(80, 256), (86, 128), (89, 128)])
def test_the_first_tile_that_fits_shared_memory(host, capability, expected):
    tiles = {512: 200_000, 256: 160_000, 128: 90_000, 64: 40_000}
    start(host, [capability])
    host.set_table([row("sm_80", tile=[("BLOCK_M", m)], shared=shared) for m, shared in tiles.items()])
    assert host.KernelFamily("scale_fwd").find(0, BF16, 64)["BLOCK_M"] == expected


def test_no_tile_fits_shared_memory(host):
    start(host, [86])
    host.set_table([row("sm_80", shared=s) for s in (160_000, 120_000)])
    with pytest.raises(RuntimeError, match=r"101376 bytes of shared memory\); the smallest one needs 120000 bytes"):
        host.KernelFamily("scale_fwd").find(0, BF16, 64)


def test_devices_of_different_kinds_get_different_kernels(host):
    start(host, [90, 80])
    host.set_table([row(arch) for arch in ARCHS])
    family = host.KernelFamily("scale_fwd")
    assert [family.find(d, BF16, 64).name[-4:] for d in (0, 1, 0)] == ["_90a", "m_80", "_90a"]


def test_a_family_that_is_not_in_the_table(host):
    host.set_table([row()])
    with pytest.raises(RuntimeError, match=r"^gone: no kernel for .* this build has kernels for none$"):
        host.KernelFamily("gone").find(0, BF16, 64)


def test_a_family_keyed_by_something_else(host):
    host.set_table([row(key=[("HEAD_DIM", 64), ("dtype", BF16)])])
    with pytest.raises(RuntimeError, match="expected a kernel of this family to be keyed by dtype, HEAD_DIM"):
        host.KernelFamily("scale_fwd").find(0, BF16, 64)


@pytest.mark.parametrize("device", [-1, 64])
def test_a_device_out_of_range(host, device):
    host.set_table([row()])
    with pytest.raises(RuntimeError, match=f"expected a CUDA device index below 64, got {device}"):
        host.KernelFamily("scale_fwd").find(device, BF16, 64)
    [kernel] = host.set_table([row()])
    with pytest.raises(RuntimeError, match=f"expected device to be a CUDA device index below 64, got {device}"):
        host.launch(kernel, device, 0, [1, 1, 1], [])


# Arguments.


def simple_kernel(host, **changes):
    t = host.ParamType
    params = [("x_ptr", t.Pointer, 16), ("n", t.I32, 1), ("stride", t.I64, 8), ("scale", t.F32, 1)]
    host.set_param_sizes([8, 4, 8, 4, 8, 8])
    [kernel] = host.set_table([row(params=params, **changes)])
    return kernel


def simple_arguments(host, **changes):
    t = host.ParamType
    values = {"x_ptr": (t.Pointer, 0x7F0000000010), "n": (t.I32, -5), "stride": (t.I64, 1 << 40), "scale": (t.F32, 0.1)}
    return [(name, *value) for name, value in (values | changes).items()]


def test_arguments_reach_the_kernel_in_order_with_two_null_pointers_behind(host):
    host.launch(simple_kernel(host), 0, 0xABC0, [7, 5, 3], simple_arguments(host))
    values = launched(host)
    expected = [struct.pack(f, v) for f, v in zip("QiqfQQ", (0x7F0000000010, -5, 1 << 40, 0.1, 0, 0), strict=True)]
    assert values["params"] == expected
    assert (values["grid"], values["block"], values["shared"]) == ([7, 5, 3], [128, 1, 1], 1024)
    assert (values["stream"], values["attributes"]) == (0xABC0, [])


def test_the_null_stream_and_null_pointers_are_fine(host):
    host.launch(simple_kernel(host), 0, 0, [1, 1, 1], simple_arguments(host, x_ptr=(host.ParamType.Pointer, 0)))
    assert launched(host)["stream"] == 0
    assert launched(host)["params"][0] == bytes(8)


def test_clusters_cooperation_and_programmatic_launch(host):
    kernel = simple_kernel(host, num_ctas=16, cooperative=1, pdl=1)
    host.launch(kernel, 0, 0, [7, 5, 3], simple_arguments(host))
    values = launched(host)
    assert values["grid"] == [7 * 16, 5, 3]
    assert (values["cluster"], values["cooperative"], values["pdl"]) == ([16, 1, 1], 1, 1)
    assert 5 in values["attributes"]  # CU_LAUNCH_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE
    attributes = [(c["attribute"], c["value"]) for c in calls(host, "cuKernelSetAttribute")]
    assert attributes == [(14, 1)]  # CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED


def with_argument(name, kind, value):
    return lambda host, args: [(name, getattr(host.ParamType, kind), value) if a[0] == name else a for a in args]


EXPECTED = "scale_fwd-2-64-sm_90a: expected "
WRONG_NAMES = [
    (lambda host, args: [args[0], ("m", *args[1][1:]), *args[2:]], "n to be argument 1, got m"),
    (lambda host, args: [args[1], args[0], *args[2:]], "x_ptr to be argument 0, got n"),
]
WRONG_VALUES = [
    (lambda host, args: args[:-1], r"4 arguments \(x_ptr, n, stride, scale\), got 3"),
    (lambda host, args: [*args, args[-1]], r"4 arguments \(x_ptr, n, stride, scale\), got 5"),
    (with_argument("n", "I64", 5), "n to be an int32, got an int64"),
    (with_argument("stride", "I32", 8), "stride to be an int64, got an int32"),
    (with_argument("scale", "Pointer", 0), "scale to be a float32, got a pointer"),
    (with_argument("x_ptr", "F32", 1.0), "x_ptr to be a pointer, got a float32"),
    (with_argument("x_ptr", "Pointer", 0x1008), "x_ptr to be aligned to 16 bytes, got 0x1008"),
    (with_argument("stride", "I64", 12), "stride to be a multiple of 8, got 12"),
    (with_argument("stride", "I64", -4), "stride to be a multiple of 8, got -4"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_NAMES + WRONG_VALUES)
def test_wrong_arguments_never_reach_the_driver(host, change, message):
    with pytest.raises(RuntimeError, match=EXPECTED + message):
        host.launch(simple_kernel(host), 0, 0, [1, 1, 1], change(host, simple_arguments(host)))
    assert host.calls() == [("cuInit", {})]


@pytest.mark.parametrize(("change", "message"), WRONG_VALUES)
def test_all_but_names_is_checked_at_every_launch(host, change, message):
    kernel = simple_kernel(host)
    host.launch(kernel, 0, 0, [1, 1, 1], simple_arguments(host))
    with pytest.raises(RuntimeError, match=EXPECTED + message):
        host.launch(kernel, 0, 0, [1, 1, 1], change(host, simple_arguments(host)))
    assert len(calls(host, "cuLaunchKernelEx")) == 1


def test_the_last_good_alignment_and_multiple(host):
    t = host.ParamType
    args = simple_arguments(host, x_ptr=(t.Pointer, 0x1010), stride=(t.I64, -8))
    host.launch(simple_kernel(host), 0, 0, [1, 1, 1], args)
    assert launched(host)["params"][2] == struct.pack("q", -8)


@pytest.mark.parametrize("grid", [[0, 1, 1], [1, 0, 1], [1, 1, 0]])
def test_an_empty_grid_launches_nothing(host, grid):
    host.launch(simple_kernel(host), 0, 0, grid, simple_arguments(host))
    assert host.calls() == [("cuInit", {})]


@pytest.mark.parametrize("grid", [[1, 65536, 1], [1, 1, 65536], [1 << 31, 1, 1]])
def test_a_grid_past_the_hardware_limits(host, grid):
    message = re.escape(f"the grid to be at most [2^31 - 1, 65535, 65535], got {grid}")
    with pytest.raises(RuntimeError, match=message):
        host.launch(simple_kernel(host), 0, 0, grid, simple_arguments(host))
    assert not calls(host, "cuLaunchKernelEx")


def test_the_largest_grid(host):
    host.launch(simple_kernel(host), 0, 0, [(1 << 31) - 1, 65535, 65535], simple_arguments(host))
    assert launched(host)["grid"] == [(1 << 31) - 1, 65535, 65535]


# TMA descriptors.


def map_kernel(host, block_size=(64, 32), elem_size=2, elem_type=10, fp4_padded=False):
    t = host.ParamType
    meta = dict(swizzle=3, elem_size=elem_size, elem_type=elem_type, fp4_padded=fp4_padded, block_size=block_size)
    params = [("x_desc", t.TensorMap, 1), ("n", t.I32, 1)]
    rank = len(block_size)
    host.set_param_sizes([128, *[4] * rank, *[8] * rank, 4, 8, 8])
    [kernel] = host.set_table([row(params=params, tensor_maps=[meta])])
    return kernel


def launch_map(host, kernel, data, shape, strides):
    t = host.ParamType
    args = [("x_desc", t.TensorMap, host.TensorDescriptor(data, shape, strides)), ("n", t.I32, 9)]
    host.launch(kernel, 0, 0, [1, 1, 1], args)


@pytest.mark.parametrize(
    ("shape", "strides", "box"),
    [((1000, 72), (80, 1), (64, 32)), ((3, 1000, 72), (80000, 80, 1), (1, 64, 32)), ((3, 5, 8), (0, 8, 1), (1, 4, 8))],
)
def test_a_descriptor_is_encoded_from_its_fastest_dimension_on(host, shape, strides, box):
    launch_map(host, map_kernel(host, box), 0x7F0000000100, shape, strides)
    [encoded] = calls(host, "cuTensorMapEncodeTiled")
    expected = {
        "type": 9,  # CU_TENSOR_MAP_DATA_TYPE_BFLOAT16; the device calls it 10
        "address": 0x7F0000000100,
        "aligned": 1,
        "shape": list(shape[::-1]),
        "strides": [2 * s for s in strides[-2::-1]],
        "box": list(box[::-1]),
        "steps": [1] * len(shape),
        "interleave": 0,
        "swizzle": 3,
        "promotion": 2,  # CU_TENSOR_MAP_L2_PROMOTION_L2_128B
        "fill": 0,
    }
    assert encoded == expected
    got = launched(host)["params"]
    sizes = [struct.pack("i", n) for n in shape] + [struct.pack("q", s) for s in strides]
    assert len(got[0]) == 128
    assert got[1:] == [*sizes, struct.pack("i", 9), bytes(8), bytes(8)]


@pytest.mark.parametrize(("device_type", "host_type"), [(0, 0), (6, 6), (7, 7), (8, 10), (9, 8), (10, 9), (11, 11)])
def test_element_types_are_translated(host, device_type, host_type):
    launch_map(host, map_kernel(host, elem_type=device_type), 0x100, (64, 32), (32, 1))
    assert calls(host, "cuTensorMapEncodeTiled")[0]["type"] == host_type


def test_padded_fp4_doubles_the_encoded_row_only(host):
    launch_map(host, map_kernel(host, elem_size=1, elem_type=0, fp4_padded=True), 0x100, (64, 32), (32, 1))
    assert calls(host, "cuTensorMapEncodeTiled")[0]["shape"] == [64, 64]
    assert launched(host)["params"][2] == struct.pack("i", 32)


@pytest.mark.parametrize(
    ("version", "rows", "cleared"),
    [(DRIVER_13_1, 1023, True), (DRIVER_13_1, 1025, False), (DRIVER_13_2, 1023, False)],
)
def test_old_drivers_get_the_small_tensor_bit_cleared(host, version, rows, cleared):
    start(host, [90], version)
    launch_map(host, map_kernel(host), 0x100, (rows, 64), (64, 1))  # 128 bytes a row
    words = struct.unpack("16Q", launched(host)["params"][0])
    ones = (1 << 64) - 1
    assert words == (ones, ones & ~(1 << 21) if cleared else ones, *[ones] * 14)


@pytest.mark.parametrize(
    ("data", "shape", "strides", "message"),
    [
        (0x108, (64, 32), (32, 1), "aligned to 16 bytes, got 0x108"),
        (0x100, (64, 32), (36, 1), "of strides of whole 16 bytes, got stride 36 in dimension 0"),
        (0x100, (64, 32), (-32, 1), "of strides of whole 16 bytes, got stride -32 in dimension 0"),
        (0x100, (64, 32), (32, 2), "contiguous, got stride 2 in dimension 1"),
        (0x100, (0, 32), (32, 1), r"of sizes from 1 to 2\^31 - 1, got 0 in dimension 0"),
        (0x100, (1 << 31, 32), (32, 1), r"of sizes from 1 to 2\^31 - 1, got 2147483648 in dimension 0"),
        (0x100, (2, 64, 32), (2048, 32, 1), "of rank 2, got rank 3"),
    ],
)
def test_a_descriptor_that_the_hardware_cannot_take(host, data, shape, strides, message):
    with pytest.raises(RuntimeError, match=f"scale_fwd-2-64-sm_90a: expected x_desc to be {message}"):
        launch_map(host, map_kernel(host), data, shape, strides)
    assert not calls(host, "cuTensorMapEncodeTiled")


def test_a_descriptor_with_too_few_strides(host):
    with pytest.raises(RuntimeError, match="expected 1 to 5 sizes and as many strides, got 2 and 1"):
        host.TensorDescriptor(0x100, (64, 32), (32,))


def test_a_table_that_forgot_a_tensor_map(host):
    t = host.ParamType
    [kernel] = host.set_table([row(params=[("x_desc", t.TensorMap, 1)])])
    args = [("x_desc", t.TensorMap, host.TensorDescriptor(0x100, (64, 32), (32, 1)))]
    with pytest.raises(RuntimeError, match="the kernel table describes 0 tensor maps for 1 such parameters"):
        host.launch(kernel, 0, 0, [1, 1, 1], args)


# The driver.


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


def in_threads(number, work):
    errors = []
    barrier = threading.Barrier(number)

    def run(index):
        try:
            barrier.wait()
            work(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


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
