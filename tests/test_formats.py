"""QuantizedWeight: its checks, its ways in and out, and what a malformed state_dict meets."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
import subprocess
import sys
import tracemalloc
import warnings
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as F
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

from peftkern import DoubleQuant, QuantizedWeight, dequantize_4bit, linear_4bit, quantize_4bit, reference
from peftkern.formats import BLOCKSIZES, CODES, DTYPE_NAMES, DYNAMIC_CODE, code_table

PREFIX = "model.layers.0.self_attn.q_proj.weight"
STATE = ".quant_state.bitsandbytes__nf4"
with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # nested tensors are a prototype
    RAGGED = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.strided)
LET_GO = torch.zeros(80, dtype=torch.uint8)
LET_GO.untyped_storage().resize_(0)
SHAPES = [(64, 64), (3, 5), (7, 33), (1, 1), (16, 100), (130, 257)]


def leaves(weight: QuantizedWeight) -> list[Tensor]:
    found: list[Tensor] = pytree.tree_leaves(weight)
    return found


def assert_same(a: QuantizedWeight, b: QuantizedWeight) -> None:
    assert (a.shape, a.quant_type, a.blocksize, a.dtype) == (b.shape, b.quant_type, b.blocksize, b.dtype)
    assert (a.nested is None) == (b.nested is None)
    for one, other in zip(leaves(a), leaves(b), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def make(
    shape: tuple[int, int] = (16, 100), quant_type: str = "nf4", blocksize: int = 64, nested: bool = False
) -> QuantizedWeight:
    return reference.quantize_4bit(torch.randn(shape), quant_type, blocksize, nested)


# ---- the tables


@pytest.mark.parametrize("quant_type", CODES)
def test_code_tables_are_those_of_bitsandbytes_bit_for_bit(quant_type: str) -> None:
    theirs = F.get_4bit_type(quant_type, device="cpu")
    assert torch.equal(code_table(quant_type).view(torch.int32), theirs.view(torch.int32))


def test_dynamic_map_is_that_of_bitsandbytes_bit_for_bit() -> None:
    ours = torch.tensor(DYNAMIC_CODE, dtype=torch.float32)
    assert torch.equal(ours.view(torch.int32), F.create_dynamic_map().view(torch.int32))


# ---- bitsandbytes' objects and state_dict keys


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", CODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip_through_bitsandbytes_objects(
    shape: tuple[int, int], quant_type: str, nested: bool
) -> None:
    dense = torch.randn(shape, dtype=torch.bfloat16)
    packed, state = F.quantize_4bit(dense, quant_type=quant_type, compress_statistics=nested)
    weight = QuantizedWeight.from_bitsandbytes(packed, state)
    assert weight.shape == shape
    assert weight.dtype == torch.bfloat16
    assert weight.packed.data_ptr() == packed.data_ptr()
    assert_same(weight, reference.quantize_4bit(dense, quant_type, 64, nested))

    back, state_back = weight.to_bitsandbytes()
    assert back.shape == packed.shape
    assert torch.equal(back, packed)
    assert state_back == state
    if shape[1] % 64 == 0:  # elsewhere its AVX-512 decoder may be wrong: test_quantize.py
        assert torch.equal(F.dequantize_4bit(back, state_back), dequantize_4bit(weight))


def test_one_element_has_any_stride() -> None:
    """Contiguous, so torch says, but no view by bytes."""
    dense = torch.randn(2, 4)
    packed, state = F.quantize_4bit(dense, quant_type="nf4", quant_storage=torch.float32)
    weight = QuantizedWeight.from_bitsandbytes(packed.as_strided((1,), (0,)), state)
    assert_same(weight, reference.quantize_4bit(dense, "nf4", 64, False))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.float16, torch.bfloat16, torch.float32])
def test_quant_storage_reinterprets_the_bytes(storage: torch.dtype, nested: bool) -> None:
    dense = torch.randn(24, 64)
    packed, state = F.quantize_4bit(
        dense, quant_type="nf4", quant_storage=storage, compress_statistics=nested
    )
    assert packed.dtype == storage
    weight = QuantizedWeight.from_bitsandbytes(packed, state)
    assert_same(weight, reference.quantize_4bit(dense, "nf4", 64, nested))
    assert_same(QuantizedWeight.from_bitsandbytes(packed.t(), state), weight)
    tensors = {PREFIX: packed} | {
        f"{PREFIX}.{key}": value for key, value in state.as_dict(packed=True).items()
    }
    assert_same(QuantizedWeight.from_state_dict(tensors, PREFIX), weight)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", CODES)
@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_state_dict_is_bitsandbytes_own(dtype: torch.dtype, quant_type: str, nested: bool) -> None:
    dense = torch.randn(33, 70).to(dtype)
    packed, state = F.quantize_4bit(dense, quant_type=quant_type, compress_statistics=nested, blocksize=128)
    theirs = {PREFIX: packed} | {
        f"{PREFIX}.{key}": value for key, value in state.as_dict(packed=True).items()
    }
    weight = quantize_4bit(dense, quant_type, 128, nested)
    ours = weight.state_dict(PREFIX)
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype
        assert ours[key].shape == value.shape
        assert torch.equal(ours[key].contiguous().view(torch.uint8), value.contiguous().view(torch.uint8)), (
            key
        )

    stripped = {key.removeprefix(f"{PREFIX}."): value for key, value in ours.items() if key != PREFIX}
    assert F.QuantState.from_dict(stripped, torch.device("cpu")) == state
    assert_same(QuantizedWeight.from_state_dict(theirs, PREFIX), weight)
    assert_same(QuantizedWeight.from_state_dict(ours | {"other": torch.ones(1)}, PREFIX), weight)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", CODES)
def test_linear4bit_state_dict(quant_type: str, nested: bool) -> None:
    layer = bnb.nn.Linear4bit(96, 40, bias=True, quant_type=quant_type, compress_statistics=nested)
    dense = layer.weight.detach().clone()
    layer = layer.to("cpu")  # this quantizes
    tensors = layer.state_dict()
    weight = QuantizedWeight.from_state_dict(tensors, "weight")
    assert_same(weight, quantize_4bit(dense, quant_type, 64, nested))
    assert_same(QuantizedWeight.from_bitsandbytes(layer.weight, layer.weight.quant_state), weight)
    assert type(weight.packed) is Tensor
    assert tensors["bias"].shape == (40,)

    saved = {name.removeprefix("weight."): value for name, value in weight.state_dict("weight").items()}
    again = bnb.nn.Params4bit.from_prequantized(saved.pop("weight"), saved, device="cpu")
    assert torch.equal(again.data.flatten(), weight.packed)
    assert again.quant_state == layer.weight.quant_state


def test_cpu_inference_packing_is_refused() -> None:
    packed, state = F.quantize_4bit(torch.randn(64, 64), quant_type="nf4")
    state.packing_format_for_cpu = True
    with pytest.raises(
        ValueError, match=r"quant_state: expected plain packed bytes, got .*CPU inference packing"
    ):
        QuantizedWeight.from_bitsandbytes(packed, state)


def test_bitsandbytes_objects_that_disagree() -> None:
    packed, state = F.quantize_4bit(torch.randn(64, 64), quant_type="nf4")
    with pytest.raises(ValueError, match=r"packed: expected shape \[2048\], got \[2047\]"):
        QuantizedWeight.from_bitsandbytes(packed[:-1], state)
    with pytest.raises(ValueError, match="packed: expected a contiguous tensor"):
        QuantizedWeight.from_bitsandbytes(packed[::2], state)
    with pytest.raises(TypeError, match=r"packed: expected one of .*, got torch.int32"):
        QuantizedWeight.from_bitsandbytes(packed.int(), state)
    with pytest.raises(TypeError, match=r"quant_state.absmax: expected a value, got None"):
        QuantizedWeight.from_bitsandbytes(packed, None)
    for name, value, message in [
        (
            "shape",
            torch.Size([64, 8, 8]),
            r"quant_state.shape: expected two dimensions .*, got torch.Size\(\[64, 8, 8\]\)",
        ),
        ("code", F.get_4bit_type("fp4", device="cpu"), "quant_state.code: expected the nf4 code table"),
        ("quant_type", "int4", r"quant_state.quant_type: expected one of \('nf4', 'fp4'\), got int4"),
        ("absmax", torch.ones(63), r"absmax: expected shape \[64\], got \[63\]"),
        ("blocksize", 48, r"blocksize: expected one of .*, got 48"),
    ]:
        other = copy.copy(state)
        setattr(other, name, value)
        with pytest.raises(ValueError, match=message):
            QuantizedWeight.from_bitsandbytes(packed, other)
    packed, state = F.quantize_4bit(torch.randn(64, 64), quant_type="nf4", compress_statistics=True)
    del state.offset
    with pytest.raises(TypeError, match=r"quant_state\.offset: expected a tensor, got NoneType"):
        QuantizedWeight.from_bitsandbytes(packed, state)


# ---- the record itself


def test_fields_and_sizes() -> None:
    weight = make((16, 100), nested=True)
    assert (weight.out_features, weight.in_features) == (16, 100)
    assert weight.device == torch.device("cpu")
    assert weight.nested is not None
    assert weight.nbytes == 800 + 25 + 4 + 4 * 256 + 4
    assert repr(weight) == "QuantizedWeight([16, 100], nf4, blocksize 64, double quantization, float32, cpu)"
    assert weight.kernel_args is weight.kernel_args
    nested = weight.nested
    assert weight.kernel_args[1:] == (
        weight.absmax,
        (nested.absmax, nested.code, nested.offset, 256),
        "nf4",
        64,
        16,
        100,
    )
    with pytest.raises(AttributeError):
        weight.blocksize = 128  # type: ignore[misc]


def test_double_quantization_costs_the_stated_bits() -> None:
    weight = make((1024, 1024), nested=True)
    # 4 + 8/64 + 32/(64·256) bits, and the table of 256 numbers and the offset
    assert weight.nbytes * 8 / 2**20 == pytest.approx(4.127 + (257 * 32) / 2**20, abs=5e-4)
    assert make((1024, 1024)).nbytes * 8 / 2**20 == 4.5


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("packed", [1, 2], TypeError, "packed: expected a tensor, got list"),
        ("packed", RAGGED.byte(), TypeError, "packed: expected a strided tensor, got a nested one"),
        ("packed", torch.zeros(800), TypeError, "packed: expected torch.uint8, got torch.float32"),
        (
            "packed",
            torch.zeros(799, dtype=torch.uint8),
            ValueError,
            r"packed: expected shape \[800\], got \[799\]",
        ),
        (
            "packed",
            torch.zeros(800, 1, dtype=torch.uint8),
            ValueError,
            r"packed: expected shape \[800\], got \[800, 1\]",
        ),
        (
            "packed",
            torch.zeros(1600, dtype=torch.uint8)[::2],
            ValueError,
            "packed: expected a contiguous tensor",
        ),
        (
            "packed",
            torch.zeros(800, dtype=torch.uint8, device="meta"),
            ValueError,
            r"absmax: expected device meta",
        ),
        (
            "packed",
            torch.zeros(800, dtype=torch.uint8).to_sparse(),
            ValueError,
            "packed: expected a contiguous",
        ),
        (
            "absmax",
            torch.zeros(25, dtype=torch.uint8),
            TypeError,
            "absmax: expected torch.float32, got torch.uint8",
        ),
        ("absmax", torch.zeros(24), ValueError, r"absmax: expected shape \[25\], got \[24\]"),
        ("absmax", torch.zeros(25, dtype=torch.bfloat16), TypeError, "absmax: expected torch.float32"),
        ("shape", (16, 101), ValueError, r"packed: expected shape \[808\], got \[800\]"),
        ("shape", (1600,), ValueError, r"shape: expected two dimensions .* got \(1600,\)"),
        ("shape", (-16, -100), ValueError, r"shape: expected no negative size, got \(-16, -100\)"),
        ("shape", (16.0, 100), TypeError, r"shape: expected integers, got \(16.0, 100\)"),
        ("shape", (True, 1600), TypeError, r"shape: expected integers, got \(True, 1600\)"),
        ("shape", (0, 2**62), ValueError, r"shape: expected fewer than 2\^62 weights"),
        ("shape", "16x100", TypeError, r"shape: expected \(out_features, in_features\), got str"),
        ("quant_type", "int4", ValueError, r"quant_type: expected one of \('nf4', 'fp4'\), got int4"),
        ("quant_type", None, TypeError, "quant_type: expected a string, got NoneType"),
        ("quant_type", ["nf4"], TypeError, "quant_type: expected a string, got list"),
        ("blocksize", 63, ValueError, "blocksize: expected one of .*, got 63"),
        ("blocksize", 0, ValueError, "blocksize: expected one of .*, got 0"),
        ("blocksize", 64.0, TypeError, "blocksize: expected an integer, got 64.0"),
        ("dtype", torch.float64, TypeError, "dtype: expected one of .*, got torch.float64"),
        ("dtype", "bfloat16", TypeError, "dtype: expected a torch.dtype, got str"),
        ("nested", 3, TypeError, "nested: expected a DoubleQuant or None, got int"),
    ],
)
def test_fields_that_disagree(field: str, value: Any, error: type[Exception], message: str) -> None:
    weight = make()
    fields = dict(weight.__dict__) | {field: value}
    with pytest.raises(error, match=message):
        QuantizedWeight(**fields)


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("absmax", torch.zeros(2), ValueError, r"nested.absmax: expected shape \[1\], got \[2\]"),
        ("code", torch.zeros(255), ValueError, r"nested.code: expected shape \[256\], got \[255\]"),
        ("code", torch.zeros(256, dtype=torch.float64), TypeError, "nested.code: expected torch.float32"),
        ("offset", torch.zeros(1), ValueError, r"nested.offset: expected a scalar tensor, got shape \[1\]"),
        ("offset", 0.5, TypeError, "nested.offset: expected a tensor, got float"),
        ("blocksize", 100, ValueError, "nested.blocksize: expected one of .*, got 100"),
        ("blocksize", True, TypeError, "nested.blocksize: expected an integer, got True"),
    ],
)
def test_nested_fields_that_disagree(field: str, value: Any, error: type[Exception], message: str) -> None:
    weight = make(nested=True)
    assert weight.nested is not None
    nested = DoubleQuant(**(dict(weight.nested.__dict__) | {field: value}))
    fields = dict(weight.__dict__) | {"nested": nested}
    with pytest.raises(error, match=message):
        QuantizedWeight(**fields)


@pytest.mark.parametrize("nested", [False, True])
def test_pytree(nested: bool) -> None:
    weight = make(nested=nested)
    flat, spec = pytree.tree_flatten(weight)
    assert [leaf.dtype for leaf in flat[:2]] == [torch.uint8, torch.uint8 if nested else torch.float32]
    assert len(flat) == (5 if nested else 2)
    assert_same(pytree.tree_unflatten(flat, spec), weight)
    # torch unflattens with placeholders: no check may refuse them
    placeholder = pytree.tree_map(lambda leaf: None, weight)
    assert placeholder.packed is None
    assert placeholder.shape == weight.shape
    names = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(weight)[0]]
    assert names[:2] == [".packed", ".absmax"]
    assert spec == pytree.treespec_loads(pytree.treespec_dumps(spec))
    assert hash(weight) == hash(weight)


@pytest.mark.parametrize("nested", [False, True])
def test_copies(nested: bool) -> None:
    weight = make(nested=nested)
    assert len(weight.kernel_args) == 7
    assert weight.to("cpu") is weight
    for again in (copy.copy(weight), copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert_same(again, weight)
        assert "kernel_args" not in vars(again)  # a file outlives what the kernels take
        assert again.kernel_args[0] is again.packed
    made = weight.to("cpu", copy=True)
    assert_same(made, weight)
    assert not {leaf.data_ptr() for leaf in leaves(made)} & {leaf.data_ptr() for leaf in leaves(weight)}
    assert weight.to("cpu:0") is weight
    meta = weight.to("meta")
    assert {leaf.device.type for leaf in leaves(meta)} == {"meta"}
    assert meta.kernel_args[0] is meta.packed
    for bad in (torch.float32, None, 1.5, True):
        with pytest.raises(TypeError, match="device: expected a device"):
            weight.to(bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="device: expected a device of this machine, got 'cpuu'"):
        weight.to("cpuu")
    with pytest.raises(TypeError, match="copy: expected True or False, got 1"):
        weight.to("cpu", copy=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("nested", [False, True])
def test_a_copy_under_tracing(nested: bool) -> None:
    """No hint for the memory of what only stands for memory, and none in a compiled graph."""
    weight = make(nested=nested)
    x = torch.ones(())

    def scaled(x: Tensor) -> Tensor:
        return x * reference.dequantize_4bit(weight.to("cpu", copy=True))

    expected = reference.dequantize_4bit(weight)
    assert torch.equal(torch.compile(scaled, fullgraph=True, backend="eager")(x), expected)
    assert torch.equal(torch.func.vmap(scaled)(x[None])[0], expected)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert scaled(torch.ones(())).shape == weight.shape


def test_compiled_and_exported_code_sees_the_tensors() -> None:
    weight = make((16, 64), nested=True)

    def decode(weight: QuantizedWeight) -> Tensor:
        return reference.dequantize_4bit(weight)

    assert torch.equal(torch.compile(decode, fullgraph=True, backend="eager")(weight), decode(weight))

    class Decode(torch.nn.Module):
        def forward(self, weight: QuantizedWeight) -> Tensor:
            return decode(weight)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(Decode(), (weight,))
    assert torch.equal(program.module()(weight), decode(weight))
    other = make((16, 64), nested=True)
    assert torch.equal(program.module()(other), decode(other))


def test_construction_inside_a_compiled_function() -> None:
    packed, absmax = torch.zeros(32, dtype=torch.uint8), torch.ones(1)

    def build(packed: Tensor, absmax: Tensor) -> Tensor:
        return reference.dequantize_4bit(QuantizedWeight(packed, absmax, (8, 8), "nf4", 64, torch.float32))

    assert torch.equal(
        torch.compile(build, fullgraph=True, backend="eager")(packed, absmax), build(packed, absmax)
    )


# ---- state_dicts: files, odd addresses, and what does not agree


def test_safetensors_file(tmp_path: Any) -> None:
    weights = {"a.weight": make(nested=True), "b.weight": make((3, 5), "fp4", 32)}
    tensors: dict[str, Tensor] = {}
    for name, weight in weights.items():
        tensors |= weight.state_dict(name)
    safetensors.torch.save_file(tensors, tmp_path / "weights.safetensors")
    loaded = safetensors.torch.load_file(tmp_path / "weights.safetensors")
    for name, weight in weights.items():
        again = QuantizedWeight.from_state_dict(loaded, name)
        assert_same(again, weight)
        assert torch.equal(dequantize_4bit(again), dequantize_4bit(weight))


def test_a_file_of_the_object_itself() -> None:
    """As state_dict's docstring says: with the two classes named, weights_only=True loads it."""
    weight, file = make(nested=True), io.BytesIO()
    torch.save(weight, file)
    file.seek(0)
    with torch.serialization.safe_globals([QuantizedWeight, DoubleQuant]):
        assert_same(torch.load(file, weights_only=True), weight)


def test_under_a_default_device() -> None:
    """What has data has all of it on its own device, in a context that draws up models on another one."""
    weight = make(nested=True)
    with torch.device("meta"):
        state = weight.state_dict("w")
    assert {tensor.device.type for tensor in state.values()} == {"cpu"}
    assert_same(QuantizedWeight.from_state_dict(state, "w"), weight)
    code = "import torch\nwith torch.device('meta'):\n    import peftkern"
    subprocess.run([sys.executable, "-c", code], check=True)


def at_address(tensor: Tensor, address: int) -> Tensor:
    """The same tensor with its data at `address` mod 64, as a memory-mapped file may place it."""
    raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    buffer = bytearray(len(raw) + 128)
    start = (address - torch.frombuffer(buffer, dtype=torch.uint8).data_ptr()) % 64
    buffer[start : start + len(raw)] = raw
    moved = torch.frombuffer(buffer, dtype=tensor.dtype, count=tensor.numel(), offset=start).view(
        tensor.shape
    )
    assert moved.data_ptr() % 64 == address
    return moved


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("address", [1, 2, 3, 39])
def test_odd_addresses(address: int, nested: bool, backend: str) -> None:
    """Bytes are read where they lie; a number at an address that is no multiple of its size is moved."""
    weight = make((33, 70), nested=nested)
    tensors = {name: at_address(tensor, address) for name, tensor in weight.state_dict("w").items()}
    stripped = {name.removeprefix("w."): tensor for name, tensor in tensors.items() if name != "w"}
    for moved in (
        QuantizedWeight.from_state_dict(tensors, "w"),
        QuantizedWeight.from_bitsandbytes(
            tensors["w"], F.QuantState.from_dict(stripped, torch.device("cpu"))
        ),
    ):
        assert moved.packed.data_ptr() == tensors["w"].data_ptr()
        for dtype in DTYPE_NAMES:
            assert torch.equal(dequantize_4bit(moved, dtype), reference.dequantize_4bit(weight, dtype))
        x = torch.randn(3, 70)
        assert torch.equal(linear_4bit(x, moved), linear_4bit(x, weight))


def edited(weight: QuantizedWeight, edit: Callable[[dict[str, Any]], Any]) -> dict[str, Tensor]:
    """The state_dict with its JSON record edited in place, or replaced by what `edit` returns."""
    tensors = weight.state_dict(PREFIX)
    key = next(key for key in tensors if "quant_state" in key)
    record = json.loads(bytes(tensors[key].tolist()))
    changed = edit(record)
    content = record if changed is None else changed
    if not isinstance(content, (str, bytes)):
        content = json.dumps(content)
    raw = content if isinstance(content, bytes) else content.encode()
    tensors[key] = torch.tensor(list(raw), dtype=torch.uint8)
    return tensors


def refuse(tensors: Any, message: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises((ValueError, TypeError), match=message):
            QuantizedWeight.from_state_dict(tensors, PREFIX)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


RECORD = rf"{PREFIX}.quant_state.bitsandbytes__nf4".replace(".", r"\.")


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        (
            "shape",
            [[10**30, 10**30], [2**31, 2**31], [0, 2**63]],
            r"shape: expected fewer than 2\^62 weights",
        ),
        ("shape", [[2**30, 2**20], [16, 101], [100, 15], [0, 0]], r"expected shape \[\d+\], got \[800\]"),
        ("shape", [[-16, -100], [16, -1]], "shape: expected no negative size"),
        (
            "shape",
            [[16.0, 100], [True, 1600], ["16", 100], [None, 1], [[16], 100]],
            "shape: expected integers",
        ),
        ("shape", [[1600], [], [16, 10, 10]], "shape: expected two dimensions"),
        ("shape", [None, 1600, "16, 100", {"0": 16}], r"shape: expected \(out_features, in_features\)"),
        ("blocksize", [0, -64, 63, 16, 8192, 2**70], "blocksize: expected one of"),
        ("blocksize", [64.0, True, None, "64", [64]], "blocksize: expected an integer"),
        ("blocksize", [32, 128], r"absmax: expected shape"),
        ("quant_type", ["fp4", "int4", ""], "quant_type: expected 'nf4'"),
        ("quant_type", [4, None, ["nf4"]], "quant_type: expected a string"),
        ("dtype", ["float64", "uint8", "", "__class__", 32, None, ["float32"]], "dtype: expected one of"),
        ("nested_offset", ["0.5", None, True, [0.5]], "nested_offset: expected a number"),
        ("nested_offset", [1e39, -1e300, 10**400], "nested_offset: expected a finite fp32 number"),
        ("nested_blocksize", [0, -256, 255, 1 << 40], "nested_blocksize: expected one of"),
        ("nested_blocksize", [256.0, False, None], "nested_blocksize: expected an integer"),
        ("nested_dtype", ["bfloat16", None, 7], "nested_dtype: expected 'float32'"),
        ("unheard_of", [1], "expected the names"),
    ],
)
def test_record_values(name: str, values: list[Any], message: str) -> None:
    weight = make((16, 100), nested=True)
    for value in values:
        refuse(edited(weight, lambda record, value=value: record.update({name: value})), message)


@pytest.mark.parametrize(
    "name", ["quant_type", "blocksize", "dtype", "shape", "nested_dtype", "nested_offset"]
)
def test_record_without(name: str) -> None:
    def drop(record: dict[str, Any]) -> None:
        record.pop(name)

    refuse(edited(make(nested=True), drop), rf"{RECORD}: expected the names")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00",
        b"\xed\xa0\x80",
        b"\x00" * 8,
        "{",
        "null",
        "[]",
        "17",
        '"nf4"',
        "NaN",
        "[" * 60000,
        '{"shape":' * 7000,
        "9" * 6000,
        '{"shape": [NaN, 1]}',
        '{"nested_offset": Infinity}',
        '{"quant_type": "nf4", "quant_type": "nf4"}',
        b" " * ((1 << 16) + 1),
    ],
    ids=lambda content: repr(content[:16]),
)
def test_record_that_is_no_record(content: bytes | str) -> None:
    refuse(edited(make(), lambda record: content), rf"{RECORD}: expected")


def test_nested_record_says_infinity() -> None:
    for word in ("NaN", "Infinity", "-Infinity", "1e999"):
        text = json.dumps({"nested_offset": 0.25})[1:-1].replace("0.25", word)

        def write(record: dict[str, Any], text: str = text) -> str:
            record.pop("nested_offset")
            return json.dumps(record)[:-1] + ", " + text + "}"

        refuse(edited(make(nested=True), write), RECORD)


@pytest.mark.parametrize(
    ("suffix", "value", "message"),
    [
        ("", torch.zeros(799, 1, dtype=torch.uint8), r": expected shape \[800\], got \[799\]"),
        ("", torch.zeros(801, 1, dtype=torch.uint8), r": expected shape \[800\], got \[801\]"),
        (
            "",
            torch.zeros(40, 20, dtype=torch.uint8),
            r": expected shape \[n\], \[n, 1\] or \[1, n\], got \[40, 20\]",
        ),
        ("", torch.zeros(800, 1), r": expected shape \[800\], got \[3200\]"),
        ("", torch.zeros(800, 1, dtype=torch.int8), r": expected one of .*, got torch.int8"),
        ("", torch.zeros(1, 1, dtype=torch.uint8).expand(800, 1), r": expected a contiguous tensor"),
        ("", torch.zeros((), dtype=torch.uint8), r": expected shape \[n\]"),
        ("", [0] * 800, r": expected a tensor, got list"),
        ("", None, r": expected a tensor, got NoneType"),
        (".absmax", torch.zeros(26, dtype=torch.uint8), r"\.absmax: expected shape \[25\], got \[26\]"),
        (".absmax", torch.zeros(25), r"\.absmax: expected torch.uint8, got torch.float32"),
        (".absmax", torch.zeros(25, 1, dtype=torch.uint8), r"\.absmax: expected shape \[25\], got \[25, 1\]"),
        (".quant_map", torch.zeros(16), r"\.quant_map: expected the nf4 code table"),
        (".quant_map", torch.zeros(15), r"\.quant_map: expected shape \[16\], got \[15\]"),
        (".quant_map", torch.tensor(CODES["fp4"]), r"\.quant_map: expected the nf4 code table"),
        (".quant_map", torch.full((16,), math.nan), r"\.quant_map: expected the nf4 code table"),
        (".quant_map", torch.zeros(16, dtype=torch.float64), r"\.quant_map: expected torch.float32"),
        (".nested_absmax", torch.zeros(2), r"\.nested_absmax: expected shape \[1\], got \[2\]"),
        (".nested_absmax", torch.zeros(1, dtype=torch.int32), r"\.nested_absmax: expected torch.float32"),
        (".nested_quant_map", torch.zeros(255), r"\.nested_quant_map: expected shape \[256\], got \[255\]"),
        (".quant_state.bitsandbytes__nf4", torch.zeros(8), r"bitsandbytes__nf4: expected torch.uint8"),
        (
            ".quant_state.bitsandbytes__nf4",
            torch.zeros(2, 8, dtype=torch.uint8),
            r"bitsandbytes__nf4: expected 1…",
        ),
        (".quant_state.bitsandbytes__nf4", "{}", r"bitsandbytes__nf4: expected a tensor, got str"),
        (
            ".quant_state.bitsandbytes__nf4",
            torch.empty(80, dtype=torch.uint8, device="meta"),
            r"bitsandbytes__nf4: expected a tensor with data",
        ),
        (".absmax", torch.empty(25, dtype=torch.uint8, device="meta"), r"\.absmax: expected device cpu"),
        *((suffix, RAGGED, ": expected a strided tensor, got a nested one") for suffix in (
            "", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATE)),
        (".quant_map", torch.zeros(16).to_sparse(), r"\.quant_map: expected a tensor with data, .*sparse"),
        (STATE, torch.zeros(80, dtype=torch.uint8).to_sparse(), "expected a tensor with data, .*sparse"),
        (STATE, LET_GO, "bitsandbytes__nf4: expected a tensor with data"),
    ],
)  # fmt: skip
def test_tensors_that_disagree(suffix: str, value: Any, message: str) -> None:
    tensors: dict[str, Any] = dict(make((16, 100), nested=True).state_dict(PREFIX))
    tensors[PREFIX + suffix] = value
    refuse(tensors, PREFIX.replace(".", r"\.") + ".*" + message if suffix else message)


def test_names_that_are_missing_or_double() -> None:
    tensors = make(nested=True).state_dict(PREFIX)
    for key in tensors:
        refuse(
            {name: value for name, value in tensors.items() if name != key},
            key.removesuffix("nf4").replace(".", r"\."),
        )
    state = f"{PREFIX}.quant_state.bitsandbytes__"
    refuse(tensors | {f"{state}fp4": tensors[f"{state}nf4"]}, "expected exactly one of")
    refuse(tensors | {f"{state}nf4": tensors[PREFIX]}, "bitsandbytes__nf4")
    plain = make().state_dict(PREFIX)
    refuse(plain | {f"{PREFIX}.nested_absmax": torch.zeros(1)}, r"nested_absmax: expected no tensor")
    refuse({}, "expected exactly one of")
    refuse([], "tensors: expected a mapping")
    for prefix, error in ((None, TypeError), ("", ValueError), (3, TypeError)):
        with pytest.raises(error, match="prefix: expected the weight's name"):
            QuantizedWeight.from_state_dict(tensors, prefix)  # type: ignore[arg-type]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NAMES = ["quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset"]


@settings(max_examples=100)
@given(
    changes=st.dictionaries(st.sampled_from([*NAMES, "more"]), JSON, min_size=1, max_size=3),
    nested=st.booleans(),
)
def test_any_record_is_taken_or_refused(changes: dict[str, Any], nested: bool) -> None:
    tensors = edited(make((4, 8), blocksize=32, nested=nested), lambda record: record.update(changes))
    try:
        weight = QuantizedWeight.from_state_dict(tensors, PREFIX)
    except (ValueError, TypeError):
        refuse(tensors, RECORD.partition("quant_state")[0])
    else:
        assert weight.shape[0] * weight.shape[1] in (31, 32)


@settings(max_examples=100)
@given(raw=st.binary(min_size=1, max_size=64))
def test_any_bytes_are_taken_or_refused(raw: bytes) -> None:
    with pytest.raises((ValueError, TypeError), match=RECORD):
        QuantizedWeight.from_state_dict(edited(make((4, 8)), lambda record: raw), PREFIX)


@settings(max_examples=50)
@given(
    rows=st.integers(0, 40),
    columns=st.integers(0, 70),
    blocksize=st.sampled_from(BLOCKSIZES),
    quant_type=st.sampled_from(sorted(CODES)),
    dtype=st.sampled_from(list(DTYPE_NAMES)),
    nested=st.booleans(),
)
def test_any_shape_survives_the_round_trip(
    rows: int, columns: int, blocksize: int, quant_type: str, dtype: torch.dtype, nested: bool
) -> None:
    weight = quantize_4bit(torch.randn(rows, columns).to(dtype), quant_type, blocksize, nested)
    assert_same(QuantizedWeight.from_state_dict(weight.state_dict("w"), "w"), weight)
    assert_same(QuantizedWeight.from_bitsandbytes(*weight.to_bitsandbytes()), weight)
