"""MoRALinear and ReMoRA: what the module trains, saves, loads, merges, switches; merge_error."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable

import bounds
import pytest
import torch
from cases import MORA_TYPES, fitting
from torch import Tensor, nn

import peftkern
from peftkern import QuantizedWeight, merge, merge_error, mora_delta, mora_linear, mora_rank, reference
from peftkern.nn import LoRALinear, MoRALinear, remora_merge_

K, N, R = 96, 40, 4  # r̂ = 23: ragged in both directions; 22 for type 6
KINDS = pytest.mark.parametrize("kind", ["plain", "nested", "dense"])
EACH_BACKEND = pytest.mark.usefixtures("each_backend")
TYPES = pytest.mark.parametrize("mora_type", MORA_TYPES)
Weight = Tensor | QuantizedWeight


def layer(kind: str = "nested", mora_type: int | str = 1, seed: int = 0, **options: object) -> MoRALinear:
    torch.manual_seed(seed)
    W = torch.randn(N, K)
    weight = W if kind == "dense" else peftkern.quantize_4bit(W, double_quant=kind == "nested")
    bias = torch.randn(N)
    module = MoRALinear(K, N, r=R, mora_type=mora_type, weight=weight, bias=bias, **options)  # type: ignore[arg-type]
    nn.init.normal_(module.matrix, std=0.3)
    return module


def bytes_of(weight: Weight) -> list[Tensor]:
    return [leaf.detach().clone() for leaf in torch.utils._pytree.tree_leaves(weight) if leaf is not None]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@EACH_BACKEND
@TYPES
@KINDS
def test_forward_is_the_op(kind: str, mora_type: int | str) -> None:
    module, x = layer(kind, mora_type), torch.randn(2, 5, K)
    size = mora_rank(K, N, R, mora_type)
    assert tuple(module.matrix.shape) == (size, size) == ((22, 22) if mora_type == 6 else (23, 23))
    expected = mora_linear(x, module.weight, module.matrix, mora_type, 1.0, module.bias)
    assert torch.equal(module(x), expected)
    assert torch.equal(module.delta(), mora_delta(module.matrix, K, N, mora_type))


@EACH_BACKEND
@KINDS
def test_only_the_matrix_trains(kind: str) -> None:
    module = layer(kind)
    assert [name for name, p in module.named_parameters() if p.requires_grad] == ["matrix"]
    module(torch.randn(5, K)).sum().backward()
    assert [name for name, p in module.named_parameters() if p.grad is not None] == ["matrix"]


@EACH_BACKEND
def test_starts_as_the_base_and_shares_it() -> None:
    linear = nn.Linear(K, N)
    module = MoRALinear.from_linear(linear, r=R, mora_type="rotation")
    x = torch.randn(5, K)
    assert not bool(module.matrix.any())
    bounds.check("y", module(x), bounds.linear(x, linear.weight, linear.bias)["y"])
    assert module.weight.data_ptr() == linear.weight.data_ptr()  # type: ignore[union-attr]
    assert linear.weight.requires_grad
    assert not module.weight.requires_grad  # type: ignore[union-attr]
    weight = peftkern.quantize_4bit(torch.randn(N, K))
    module = MoRALinear.from_quantized(weight, r=R, mora_type=3, adapter_dtype=torch.bfloat16)
    assert module.weight is weight
    assert (module.matrix.dtype, module.mora_type, module.bias) == (torch.bfloat16, 3, None)
    assert torch.equal(module(x), peftkern.linear_4bit(x, weight))
    assert MoRALinear(K, N, mora_type="sharing").mora_type == 1


def test_names_of_types_are_one() -> None:
    for name, kind in (("sharing", 1), ("rotation", 6), ("truncation", "truncation")):
        assert MoRALinear(8, 8, mora_type=name).mora_type == kind


@EACH_BACKEND
@KINDS
def test_dropout_in_training_only(kind: str) -> None:
    """On the adapter's input alone, with its scale, and the base untouched: y, and each gradient."""
    module, x = layer(kind, dropout=0.5), torch.randn(5, K, requires_grad=True)
    torch.manual_seed(3)
    y = module(x)
    torch.manual_seed(3)
    assert torch.equal(module(x), y)
    assert not torch.equal(module(x), y)
    torch.manual_seed(3)
    kept = torch.nn.functional.dropout(torch.ones(5, K), 0.5)  # 2 or 0: exact
    W, b, grad = module.weight, module.bias, torch.randn(5, N)
    assert isinstance(W, (Tensor, QuantizedWeight))
    assert b is not None
    base = bounds.linear(x.detach(), W, b, grad)
    adapter = bounds.mora(x.detach() * kept, module.matrix, 1, N, grad=grad)

    def total(name: str, scale: Tensor) -> bounds.Approx:
        one, two = base[name], adapter[name]
        return bounds.Approx(
            one.value + scale * two.value,
            one.error + scale * two.error,
            (one.typical.square() + (scale * two.typical).square()).sqrt(),
        ).rounded(torch.float32)

    bounds.check("y", y, total("y", torch.ones(())))
    dX, dM = torch.autograd.grad(y, (x, module.matrix), grad)
    bounds.check("x", dX, total("x", kept))
    bounds.check("matrix", dM, adapter["matrix"])
    module.eval()
    assert torch.equal(module(x), layer(kind)(x))


@EACH_BACKEND
@TYPES
@KINDS
def test_state_dict_round_trip(kind: str, mora_type: int | str) -> None:
    """Through a file, into a module of other weights and another type: the same output bits, memory of its
    own; the type comes with it."""
    module = layer(kind, mora_type)
    for assign in (False, True):
        other = layer(kind, 6 if mora_type == 6 else 2, seed=1)
        file = io.BytesIO()
        torch.save({f"block.{key}": value for key, value in module.state_dict().items()}, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        nn.ModuleDict({"block": other}).load_state_dict(state, assign=assign)
        x = torch.randn(5, K)
        assert other.mora_type == mora_type
        assert torch.equal(other(x), module(x))
        for value in state.values():
            if not assign and value.is_floating_point():
                value.fill_(torch.nan)
        assert assign or bool(other(x).isfinite().all())


def test_state_dict_keys() -> None:
    assert set(layer("dense").state_dict()) == {"matrix", "mora_type", "bias", "weight"}
    assert set(layer("nested").state_dict()) == {
        "matrix", "mora_type", "bias", "weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax",
        "weight.nested_quant_map", "weight.quant_state.bitsandbytes__nf4",
    }  # fmt: skip
    name = layer("dense", "truncation").state_dict()["mora_type"]
    assert (name.dtype, bytes(name.tolist())) == (torch.uint8, b"truncation")


@pytest.mark.parametrize("mora_type", [1, 6])
@pytest.mark.parametrize("names", [
    ("lora_A.weight", "lora_B.weight"),
    ("lora_A.default.weight", "lora_B.default.weight"),
    ("lora_A.weight",),
    ("lora_B.other.weight",),
])  # fmt: skip
def test_reads_the_authors_adapters(names: tuple[str, ...], mora_type: int) -> None:
    """They hold M twice, as lora_A and lora_B; the base and the type stand elsewhere."""
    size = mora_rank(K, N, R, mora_type)
    M = torch.randn(size, size)
    module = layer("nested", mora_type)
    before = bytes_of(module.weight)
    prefix = "base_model.model.q_proj."
    parent = nn.ModuleDict({"q_proj": module})
    state = {f"{prefix}{name}": M.clone() for name in names}
    state = {key.removeprefix("base_model.model."): value for key, value in state.items()}
    result = parent.load_state_dict(state, strict=False)
    assert result.unexpected_keys == []
    assert sorted(result.missing_keys) == ["q_proj.bias", "q_proj.weight"]
    assert torch.equal(module.matrix, M)
    assert module.mora_type == mora_type
    assert same(bytes_of(module.weight), before)
    whole = {**layer("nested", mora_type, seed=2).state_dict(), **dict.fromkeys(names, M)}
    del whole["matrix"], whole["mora_type"]
    module.load_state_dict(whole)
    assert torch.equal(module.matrix, M)


def test_loading_refuses_what_does_not_fit() -> None:
    state = layer().state_dict()
    M = state["matrix"]
    bare = {key: value for key, value in state.items() if key not in ("matrix", "mora_type")}
    cases: list[tuple[dict[str, object], str]] = [
        ({**bare, "lora_A.weight": M, "lora_B.weight": M + 1}, "expected one square matrix under every name"),
        ({**bare, "lora_A.weight": M, "lora_B.weight": M[:-1]}, "expected one square matrix"),
        ({**bare, "lora_A.weight": torch.zeros(R, K)}, "size mismatch for matrix"),
        ({**bare, "lora_A.weight": M[:22, :22], "lora_B.weight": M[:22, :22]}, "size mismatch for matrix"),
        (bare, "Missing key"),
        ({**state, "lora_A.weight": M}, "Unexpected key"),
        ({**state, "bogus": M}, "Unexpected key"),
        ({key: value for key, value in state.items() if key != "mora_type"}, "Missing key.*mora_type"),
        ({**state, "mora_type": torch.tensor(6)}, "mora_type: expected a type's name"),
        ({**state, "mora_type": torch.tensor(list(b"6"), dtype=torch.uint8)}, "mora_type: .* even"),
        ({**state, "mora_type": torch.tensor(list(b"5"), dtype=torch.uint8)}, "mora_type: .* got 5"),
        ({**state, "mora_type": torch.tensor([255], dtype=torch.uint8)}, "mora_type: "),
        ({**state, "weight.absmax": state["weight.absmax"][:-1]}, r"weight\.absmax: expected shape"),
    ]
    for bad, message in cases:
        module = layer(mora_type=2)
        with pytest.raises(RuntimeError, match=message):
            module.load_state_dict(bad)
        if "key" not in message:  # torch's strict complaint comes after it has loaded the rest
            assert module.mora_type == 2, message


@EACH_BACKEND
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("merged", [False, True])
@KINDS
def test_copies(kind: str, merged: bool, duplicate: Callable[[MoRALinear], MoRALinear]) -> None:
    """A copy computes the same and shares nothing."""
    module, x = layer(kind, 6), torch.randn(5, K)
    if merged:
        module.merge()
    expected = module(x)
    twin = duplicate(module)
    with torch.no_grad():
        module.matrix.zero_()
        (module.weight.packed if isinstance(module.weight, QuantizedWeight) else module.weight).zero_()
    assert (twin.merged, twin.mora_type) == (merged, 6)
    assert torch.equal(twin(x), expected)
    twin.unmerge()
    assert torch.equal(twin(x), layer(kind, 6)(x))


def test_change_of_dtype_and_device() -> None:
    module = layer("nested")
    weight = module.weight
    module.bfloat16()
    assert module.weight is weight
    x = torch.randn(5, K).bfloat16()
    assert module(x).dtype == torch.bfloat16
    module.merge()
    module.to("meta")
    module.unmerge()
    assert module.weight.device.type == module.matrix.device.type == "meta"
    assert module(x.to("meta")).shape == (5, N)
    dense = layer("dense")
    dense.merge()
    dense.half()
    dense.unmerge()
    assert dense.weight.dtype == torch.float16


# ---- merging


@EACH_BACKEND
@TYPES
@KINDS
def test_merge_and_unmerge(kind: str, mora_type: int | str) -> None:
    """Merged, the base alone gives the adapted product, within the rounding of W + ΔW to W's kind; the state
    stays the unmerged module's; unmerge brings back the very bytes."""
    module, x = layer(kind, mora_type), torch.randn(5, K)
    original, before, state = module.weight, module(x), module.state_dict()
    kept = bytes_of(original)
    for _ in range(2):
        module.merge()
        module.merge()
        assert module.merged
        expected = merge(layer(kind, mora_type).weight, module.delta())
        assert same(bytes_of(module.weight), bytes_of(expected))
        bounds.check("merged", module(x), bounds.linear(x, expected, module.bias)["y"])
        assert [name for name, _ in module.named_parameters()] == [
            name for name, _ in layer(kind).named_parameters()
        ]
        for key, value in module.state_dict().items():
            assert torch.equal(value, state[key]), key
        module.unmerge()
        module.unmerge()
        assert not module.merged
        assert module.weight is original
        assert same(bytes_of(module.weight), kept)
        assert torch.equal(module(x), before)
    module.merge()
    module.load_state_dict(layer(kind, mora_type, seed=1).state_dict())
    assert torch.equal(module(x), layer(kind, mora_type, seed=1)(x))


@EACH_BACKEND
@KINDS
def test_remora(kind: str) -> None:
    """ΔW into the base, M to zero in place, the next type, as the state says. A merge before is undone."""
    module, x = layer(kind), torch.randn(5, K)
    matrix, shared = module.matrix, module.weight
    kept = bytes_of(shared)
    for step, following in enumerate((2, 3, 4, 1, 2)):
        weight, delta = module.weight, module.delta()
        with torch.no_grad():
            expected = merge(weight, delta)
        if step == 1:
            module.merge()
        remora_merge_(module)
        assert not module.merged
        assert module.matrix is matrix
        assert matrix.requires_grad
        assert not bool(matrix.any())
        assert same(bytes_of(module.weight), bytes_of(expected))
        assert module.mora_type == following
        assert bytes(module.state_dict()["mora_type"].tolist()) == str(following).encode()
        bounds.check("y", module(x), bounds.linear(x, expected, module.bias)["y"])
        nn.init.normal_(matrix)
        assert torch.equal(module.delta(), mora_delta(matrix, K, N, following))
    assert same(bytes_of(shared), kept)  # another module may have it


def test_remoras_types() -> None:
    module = layer("dense")
    for following in (2, 1, 2):
        remora_merge_(module, types=(1, 2))
        assert module.mora_type == following
    remora_merge_(module, types=(3,))
    assert module.mora_type == 2
    for kind in (6, "decoupling", "truncation"):
        module = layer("dense", kind)
        remora_merge_(module)
        assert module.mora_type == kind
        assert not bool(module.matrix.any())
    with pytest.raises(TypeError, match="layer: expected a MoRALinear, got LoRALinear"):
        remora_merge_(LoRALinear(K, N))  # type: ignore[arg-type]
    for types, error, message in (
        ((1, 6), ValueError, "types: expected different ones of 1, 2, 3, 4, got"),
        ((1, 1), ValueError, "types: expected different ones of 1, 2, 3, 4, got"),
        ((2, True), ValueError, "types: expected different ones of 1, 2, 3, 4, got"),
        (3, TypeError, "types: expected a sequence, got int"),
    ):
        module = layer("dense")
        before = module.matrix.clone()
        with pytest.raises(error, match=message):
            remora_merge_(module, types)  # type: ignore[arg-type]
        assert torch.equal(module.matrix, before)


@EACH_BACKEND
def test_two_updates_add_up_to_a_higher_rank() -> None:
    """The point of ReMoRA: each ΔW has rank r̂ at most, their sum more."""
    module = layer("dense")
    first = module.weight.detach().clone()  # type: ignore[union-attr]
    for _ in range(2):
        nn.init.normal_(module.matrix)
        assert int(torch.linalg.matrix_rank(module.delta().double())) == 23
        remora_merge_(module)
    total = (module.weight - first).detach()  # type: ignore[operator]
    # W rounds at 2^-24 of its elements: far below the singular values of a random ΔW
    assert int(torch.linalg.matrix_rank(total, atol=1e-3)) == 40


def errors_by_hand(W: Tensor, delta: Tensor, merged: Tensor) -> tuple[float, float, float, float]:
    W, delta, merged = (tensor.detach().double() for tensor in (W, delta, merged))
    E = merged - (W + delta)
    moved = float(((merged - W) * delta).sum())
    size = float(delta.square().sum())
    return (
        float(E.abs().max()),
        math.sqrt(float(E.square().sum()) / E.numel()),
        math.sqrt(float(E.square().sum()) / size),
        moved / size,
    )


@EACH_BACKEND
@pytest.mark.parametrize("kind", ["plain", "nested", "dense", "bf16"])
def test_merge_error(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its four numbers by hand, over more than a chunk of elements; the reference's too."""
    monkeypatch.setattr("peftkern.ops.merge._CHUNK", fitting(1 << 20, 1 << 12))
    rows, columns = fitting((1100, 1000), (61, 75)) if kind in ("plain", "nested") else (33, 70)
    W = torch.randn(rows, columns)
    weight: Weight = W
    if kind == "bf16":
        weight = W.bfloat16()
    elif kind != "dense":
        weight = peftkern.quantize_4bit(W, "nf4", 64, kind == "nested")

    def values(w: Weight) -> Tensor:
        return w if isinstance(w, Tensor) else peftkern.dequantize_4bit(w, torch.float32)

    for size in (1e-3, 0.3):
        delta = torch.randn(rows, columns) * size
        merged = merge(weight, delta)
        found = merge_error(weight, delta, merged)
        expected = errors_by_hand(values(weight), delta, values(merged))
        # sums of a million products in fp64, in another order
        assert tuple(found) == pytest.approx(expected, rel=1e-9, abs=1e-14)
        assert tuple(reference.merge_error(weight, delta, merged)) == pytest.approx(
            expected, rel=1e-9, abs=1e-14
        )
        if kind == "plain":
            # a code moves only past half a gap, which is 0.1 and more: 0.001 leaves nearly all as they were
            assert (found.relative > 0.9, found.kept < 0.1) == (size < 0.01, size < 0.01)
    unmoved = merge_error(weight, delta, weight)
    assert unmoved.kept == 0.0
    assert unmoved.relative == pytest.approx(1.0, rel=1e-12)


def test_merge_error_of_special_cases() -> None:
    W, delta = torch.randn(5, 7), torch.zeros(5, 7)
    found = merge_error(W, delta, W)
    assert found[:2] == (0.0, 0.0)
    assert math.isnan(found.relative)
    assert math.isnan(found.kept)
    empty = torch.zeros(0, 7)
    assert merge_error(empty, empty, empty)[:2] == (0.0, 0.0)
    bad = W.clone()
    bad[1, 2] = torch.nan
    assert all(math.isnan(value) for value in merge_error(W, torch.ones(5, 7), bad))
    trained, grad = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    assert isinstance(merge_error(trained, grad, merge(trained, grad)).rms, float)
    mixed = peftkern.quantize_4bit(W)  # a dense merge of a 4-bit weight: no code's error left
    exact = peftkern.dequantize_4bit(mixed, torch.float32) + 0.5
    assert merge_error(mixed, torch.full((5, 7), 0.5), exact).maximum <= 2.0**-22
    for arguments, error, message in (
        ((torch.zeros(3), delta, W), ValueError, "weight: expected a QuantizedWeight or shape"),
        ((W, torch.zeros(7, 5), W), ValueError, r"delta: expected shape \[5, 7\], got shape \[7, 5\]"),
        ((W, delta, torch.zeros(7, 5)), ValueError, r"merged: expected shape \[5, 7\].* got shape \[7, 5\]"),
        ((W, delta, W.to("meta")), ValueError, "merged: expected device cpu"),
        ((W, delta, None), TypeError, "merged: expected a tensor, got NoneType"),
        ((W, delta.double(), W), TypeError, "delta: expected dtype .* got float64"),
    ):
        with pytest.raises(error, match=message):
            merge_error(*arguments)  # type: ignore[arg-type]
        with pytest.raises(error, match=message):
            peftkern.explain("merge_error", *arguments)


# ---- everything else


@EACH_BACKEND
@KINDS
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, kind: str) -> None:
    module, x = layer(kind, 6, dropout=0.3), torch.randn(5, K, requires_grad=True)
    gradients = []
    for run in (module, lambda x: torch.utils.checkpoint.checkpoint(module, x, use_reentrant=reentrant)):
        torch.manual_seed(7)
        y = run(x)
        assert isinstance(y, Tensor)
        module.zero_grad()
        x.grad = None
        y.square().sum().backward()
        gradients.append([p.grad.clone() for p in (x, module.matrix) if p.grad is not None])
    assert len(gradients[0]) == 2
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@EACH_BACKEND
@TYPES
def test_trains(mora_type: int | str) -> None:
    """Ten optimizer steps towards a target that the adapter can reach: the loss falls, the base stays."""
    module, target = layer("nested", mora_type), layer("nested", mora_type)
    nn.init.normal_(target.matrix)
    before = bytes_of(module.weight)
    x = torch.randn(fitting(256, 64), K)
    wanted = target(x).detach()
    optimizer = torch.optim.Adam([module.matrix], lr=0.1)
    losses = []
    for _ in range(10):
        loss = (module(x) - wanted).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # ten steps leave 0.18 to 0.23 of it, over types and seeds; an M that does not move leaves 1
    assert losses[-1] < 0.5 * losses[0]
    assert same(bytes_of(module.weight), before)


def test_repr_says_what_it_is() -> None:
    assert repr(layer("nested", 6)) == (
        "MoRALinear(in_features=96, out_features=40, r=4, mora_type=6, size=22, dropout=0, bias=True, "
        "weight=nf4, blocksize=64, double_quant=True)"
    )
    module = layer("dense", "decoupling")
    module.merge()
    assert "mora_type='decoupling', size=23" in repr(module)
    assert repr(module).endswith("weight=float32, merged)")


@pytest.mark.parametrize(("build", "error", "message"), [
    (lambda: MoRALinear(0, N), ValueError, "in_features: expected at least 1, got 0"),
    (lambda: MoRALinear(K, 2.0), TypeError, "out_features: expected an integer, got float"),
    (lambda: MoRALinear(K, N, r=True), TypeError, "r: expected an integer, got bool"),
    (lambda: MoRALinear(K, N, mora_type=5), ValueError, "mora_type: expected one of 1, 2, .*, got 5"),
    (lambda: MoRALinear(K, N, mora_type="lora"), ValueError, "mora_type: expected one of .* got 'lora'"),
    (lambda: MoRALinear(K, N, dropout=1.5), ValueError, "dropout: expected a probability"),
    (lambda: MoRALinear(K, N, weight=torch.zeros(K, N)), ValueError, "weight: expected shape .* got"),
    (lambda: MoRALinear(K, N, weight=[1]), TypeError, "weight: expected a tensor or a Quantized.* got list"),
    (lambda: MoRALinear(K, N, bias=torch.zeros(K)), ValueError, r"bias: expected .* got shape \[96\]"),
    (lambda: MoRALinear(K, N, adapter_dtype=torch.int8), TypeError, "adapter_dtype: expected .* torch.int8"),
    (lambda: MoRALinear(K, N, weight=torch.zeros(N, K), device="meta"), ValueError, "device: expected None"),
    (lambda: MoRALinear.from_linear(nn.Conv2d(1, 1, 1)), TypeError, "linear: expected .* got Conv2d"),
    (lambda: MoRALinear.from_quantized(torch.zeros(N, K)), TypeError, "weight: expected .* got Tensor"),
])  # fmt: skip
def test_bad_arguments(build: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()
