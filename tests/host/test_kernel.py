"""Which row of the kernel table a device and a key get."""

import re

import pytest
from host.harness import ARCHS, BF16, FP16, FP32, SHARED, calls, row, start


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


def test_a_tile_may_take_all_of_the_shared_memory(host):
    start(host, [86])
    host.set_table([row("sm_80", shared=SHARED[86] + 1), row("sm_80", shared=SHARED[86], name="all")])
    assert host.KernelFamily("scale_fwd").find(0, BF16, 64).name == "all"


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


def test_a_kernel_on_trial_takes_the_place_of_its_row(host):
    """What benchmarks/tune.py times: rows of another table, one after the other, in one process."""
    host.set_param_sizes([8, 8])
    [first, second, other, new] = host.set_table(
        [
            row(name=n, tile=[("BLOCK_M", m)], dim=d)
            for n, m, d in (("a", 32, 64), ("b", 16, 64), ("c", 8, 32), ("d", 4, 96))
        ]
    )
    host.set_table([row(), row(dim=32)])
    family = host.KernelFamily("scale_fwd")
    assert family.find(0, BF16, 64)["BLOCK_M"] == 128
    for kernel, block in ((first, 32), (second, 16)):
        assert not host.try_kernel(kernel)
        assert family.find(0, BF16, 64)["BLOCK_M"] == block
        assert family.find(0, BF16, 32)["BLOCK_M"] == 128, "another key"
        host.launch(family.find(0, BF16, 64), 0, 0, [1, 1, 1], [])
        assert calls(host, "cuLibraryLoadData")[-1]["code"] == kernel.cubin
        assert host.try_kernel(None), "it was launched"
    host.try_kernel(new)
    assert family.find(0, BF16, 96)["BLOCK_M"] == 4, "a key that our table does not have"
    host.try_kernel(other)
    assert not host.try_kernel(None), "never launched"
    assert family.find(0, BF16, 64)["BLOCK_M"] == 128
    with pytest.raises(RuntimeError, match="no architecture has this combination"):
        family.find(0, BF16, 96)


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
