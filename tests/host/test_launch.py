"""What reaches the driver: parameters, grids, attributes and TMA descriptors; and what never does."""

import re
import struct

import pytest
from host.harness import (
    DRIVER_13_1,
    DRIVER_13_2,
    calls,
    launch_map,
    launched,
    map_kernel,
    row,
    simple_arguments,
    simple_kernel,
    start,
)


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


@pytest.mark.parametrize(("change", "message"), WRONG_NAMES[:1])
def test_names_are_compared_until_a_launch_got_them_right(host, change, message):
    kernel = simple_kernel(host)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=EXPECTED + message):
            host.launch(kernel, 0, 0, [1, 1, 1], change(host, simple_arguments(host)))
    host.launch(kernel, 0, 0, [1, 1, 1], simple_arguments(host))
    host.launch(kernel, 0, 0, [1, 1, 1], change(host, simple_arguments(host)))
    assert len(calls(host, "cuLaunchKernelEx")) == 2


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
