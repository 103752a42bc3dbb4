"""The classes of sizes in which versions are checked and chosen: their arguments are of their class, and run every shipped tile."""

from collections import defaultdict

import pytest
import torch

from smi.kernels import matmul, tuned, versions
from smi.kernels.attention import tiles

pytestmark = pytest.mark.fast

CLASSES = [(operation, function, size) for operation in versions.OPERATIONS for function, classes in versions.sizes_of(operation).SIZES.items()
           for size in classes]  # fmt: skip


@pytest.fixture
def meta(monkeypatch):
    """The definitions give empty results, and what is made of random numbers has none: shapes alone."""
    for operation in ("attention", "cls_attention", "layer_norm"):
        op = pytest.importorskip(f"smi.kernels.{operation}.op")
        monkeypatch.setitem(versions._references[operation], "forward", op._forward_fake)
        versions.load.cache_clear()
    yield
    versions.load.cache_clear()


@pytest.mark.parametrize(("operation", "function", "size"), CLASSES, ids=lambda name: name.replace(" ", "-"))
def test_arguments_are_of_their_class(operation, function, size, meta):
    given = list(versions.sizes_of(operation).arguments(function, size, torch.bfloat16, "meta"))
    assert len(given) > 1
    assert {versions.size_class(operation, function, args) for args in given} == {size}


def test_every_function_of_every_operation_has_classes():
    for operation in versions.OPERATIONS:
        versions.load(operation, "reference")
        assert set(versions.sizes_of(operation).SIZES) == set(versions._references[operation])


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_gemm_tile_is_run_by_a_check(architecture, dtype, monkeypatch):
    monkeypatch.setattr(matmul, "limits", lambda device: tuned.Limits(architecture, 132, 227 * 1024))
    run = defaultdict(set)
    for operation in ("linear_gelu", "linear_residual"):
        kernel, sizes = versions.load(operation, "triton"), versions.sizes_of(operation)
        for function, classes in sizes.SIZES.items():
            for args in (args for size in classes for args in sizes.arguments(function, size, dtype, "meta")):
                rows, width = args[0].numel() // args[0].shape[-1], args[1 if function == "forward" or operation == "linear_residual" else 2].shape
                N, K = width if function == "forward" else width[::-1]
                run[operation, function].add(matmul.choose(table_of(kernel, function), rows, N, K, args[0].device, dtype))
        for function in classes_with_kernels(operation):
            assert run[operation, function] == set(table_of(kernel, function)[architecture, dtype.itemsize]), f"{operation} {function}"


def table_of(kernel, function):
    return kernel.BACKWARD_TILES if function != "forward" else getattr(kernel, "FORWARD_TILES", kernel.TILES)


def classes_with_kernels(operation):
    return ("forward", "backward") if operation == "linear_gelu" else ("forward", "backward_gelu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_attention_tile_is_run_by_a_check(dtype, monkeypatch, meta):
    taken = defaultdict(set)
    sizes = versions.sizes_of("attention")
    for size in sizes.SIZES["forward"]:
        for qkv, index, *_ in sizes.arguments("forward", size, dtype, "meta"):
            n, key = (qkv if index is None else index).shape[1], (tiles.padded_width(qkv.shape[-1]), dtype.itemsize)
            for name, table in (("forward", tiles.FORWARD), ("backward", tiles.BACKWARD)):
                taken[name, key].add(tiles.first(table[key], n, 90))
    for name, table in (("forward", tiles.FORWARD), ("backward", tiles.BACKWARD)):
        for key, entries in table.items():
            if key[1] == dtype.itemsize:
                shipped = {entry for entry in entries if tiles.first(entries, entry.n, 90) is entry}
                assert taken[name, key] - {None} == shipped
