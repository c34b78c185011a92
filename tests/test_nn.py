"""LoRALinear: what it trains, saves, loads, moves and merges."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import bounds
import pytest
import torch
from torch import Tensor, nn

import peftkern
from peftkern import QuantizedWeight, lora_linear
from peftkern.nn import LoRALinear, MoRALinear

K, N, R = 96, 40, 4


def layer(kind: str = "nested", bias: bool = True, seed: int = 0, **options: object) -> LoRALinear:
    torch.manual_seed(seed)
    W = torch.randn(N, K)
    b = torch.randn(N) if bias else None
    weight = W if kind == "dense" else peftkern.quantize_4bit(W, double_quant=kind == "nested")
    module = LoRALinear(K, N, r=R, alpha=8, weight=weight, bias=b, **options)  # type: ignore[arg-type]
    nn.init.normal_(module.lora_B)
    return module


KINDS = pytest.mark.parametrize("kind", ["plain", "nested", "dense"])
EACH_BACKEND = pytest.mark.usefixtures("each_backend")


def test_is_there_without_an_import_of_its_own() -> None:
    assert peftkern.nn.LoRALinear is LoRALinear


@EACH_BACKEND
@KINDS
def test_forward_is_the_op(kind: str) -> None:
    module = layer(kind)
    x = torch.randn(5, K)
    assert torch.equal(
        module(x), lora_linear(x, module.weight, module.lora_A, module.lora_B, 2.0, module.bias)
    )
    assert module.scaling == 2.0


@EACH_BACKEND
@KINDS
def test_only_adapters_train(kind: str) -> None:
    module = layer(kind)
    assert {name for name, p in module.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    module(torch.randn(5, K)).sum().backward()
    assert {name for name, p in module.named_parameters() if p.grad is not None} == {"lora_A", "lora_B"}


@EACH_BACKEND
def test_starts_as_the_base() -> None:
    """B = 0: the adapter adds nothing at first. A is Kaiming-uniform with a = √5: |A| <= 1/√K."""
    base = nn.Linear(K, N)
    module = LoRALinear.from_linear(base, r=R)
    x = torch.randn(5, K)
    expected = bounds.linear(x, base.weight, base.bias)["y"]
    bounds.check("base", base(x), expected)
    bounds.check("module", module(x), expected)
    assert not bool(module.lora_B.any())
    assert 0.9 * K**-0.5 < module.lora_A.abs().max().item() <= K**-0.5
    assert module.weight.data_ptr() == base.weight.data_ptr()  # type: ignore[union-attr]
    assert base.weight.requires_grad
    assert not module.weight.requires_grad  # type: ignore[union-attr]


@EACH_BACKEND
def test_from_quantized_shares() -> None:
    weight = peftkern.quantize_4bit(torch.randn(N, K))
    module = LoRALinear.from_quantized(weight, r=R, alpha=16, dropout=0.1, adapter_dtype=torch.bfloat16)
    assert module.weight is weight
    assert (module.lora_A.dtype, module.scaling, module.dropout) == (torch.bfloat16, 4.0, 0.1)
    assert module.bias is None


@EACH_BACKEND
def test_dropout_in_training_only() -> None:
    module = layer(dropout=0.5)
    x = torch.randn(5, K)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


@EACH_BACKEND
@KINDS
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(kind: str, assign: bool) -> None:
    """Through a file, into a module of other weights: the same output bits, and memory of its own."""
    module, other = layer(kind), layer(kind, seed=1)
    file = io.BytesIO()
    torch.save({f"block.{key}": value for key, value in module.state_dict().items()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    parent = nn.ModuleDict({"block": other})
    parent.load_state_dict(state, assign=assign)
    x = torch.randn(5, K)
    assert torch.equal(other(x), module(x))
    for value in state.values():
        if not assign and value.is_floating_point():
            value.fill_(torch.nan)
    assert bool(other(x).isfinite().all())


def test_state_dict_has_bitsandbytes_keys() -> None:
    keys = set(layer("nested").state_dict())
    assert keys == {
        "lora_A", "lora_B", "bias", "weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax",
        "weight.nested_quant_map", "weight.quant_state.bitsandbytes__nf4",
    }  # fmt: skip
    assert set(layer("dense").state_dict()) == {"lora_A", "lora_B", "bias", "weight"}


def test_loads_what_bitsandbytes_saved() -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    K = 128  # a multiple of blocksize: bitsandbytes 0.50.2 dequantizes wrongly on AVX-512 otherwise
    linear = bnb.nn.Linear4bit(K, N, bias=True, quant_type="nf4", compress_statistics=True)
    linear.weight = bnb.nn.Params4bit(torch.randn(N, K), requires_grad=False, quant_type="nf4").to("cpu")
    linear.bias.data.normal_()
    state = linear.state_dict()
    module = LoRALinear.from_quantized(peftkern.quantize_4bit(torch.randn(N, K)), torch.zeros(N), r=R)
    result = module.load_state_dict(state, strict=False)
    assert result.unexpected_keys == []
    assert sorted(result.missing_keys) == ["lora_A", "lora_B"]
    assert isinstance(module.weight, QuantizedWeight)
    assert module.weight.nested is not None
    dense = bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    assert torch.equal(peftkern.dequantize_4bit(module.weight, dense.dtype), dense)


def test_loading_refuses_what_does_not_fit() -> None:
    state = layer("nested").state_dict()
    missing = {key: value for key, value in state.items() if not key.startswith("weight")}
    assert layer("nested").load_state_dict(missing, strict=False).missing_keys == ["weight"]
    with pytest.raises(RuntimeError, match="Missing key"):
        layer("nested").load_state_dict(missing)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        layer("nested").load_state_dict({**state, "lora_C": torch.zeros(1)})
    more = {**state, "weight.bogus": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight\.bogus"):
        layer("nested").load_state_dict(more)
    assert layer("nested").load_state_dict(more, strict=False).missing_keys == []
    broken = {**state, "weight.absmax": state["weight.absmax"][:-1]}
    with pytest.raises(RuntimeError, match=r"weight\.absmax: expected shape"):
        layer("nested").load_state_dict(broken)
    wide = peftkern.quantize_4bit(torch.randn(N, 2 * K), double_quant=True)
    other = LoRALinear.from_quantized(wide, torch.randn(N), r=R)
    sizes = {**state, **{key: value for key, value in other.state_dict().items() if key.startswith("weight")}}
    with pytest.raises(RuntimeError, match=r"weight: expected shape \[40, 96\], got \[40, 192\]"):
        layer("nested").load_state_dict(sizes)
    with pytest.raises(RuntimeError, match=r"weight\.quant_state.*: expected exactly one"):
        layer("nested").load_state_dict(layer("dense").state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        layer("dense").load_state_dict(state)


@EACH_BACKEND
@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.bfloat16(),
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.double().float(),
    ],
)
def test_change_of_dtype_leaves_the_bytes(convert: Callable[[nn.Module], nn.Module]) -> None:
    module = layer("nested")
    weight = module.weight
    convert(module)
    assert module.weight is weight
    assert isinstance(weight, QuantizedWeight)
    assert (weight.packed.dtype, weight.nested.absmax.dtype) == (torch.uint8, torch.float32)  # type: ignore[union-attr]
    x = torch.randn(5, K, dtype=module.lora_A.dtype)
    assert module(x).dtype == x.dtype


def test_change_of_device() -> None:
    module = layer("nested").to("meta")
    assert isinstance(module.weight, QuantizedWeight)
    assert module.weight.device.type == module.lora_A.device.type == "meta"
    assert module(torch.randn(5, K, device="meta")).shape == (5, N)
    empty = module.to_empty(device="cpu")
    assert isinstance(empty.weight, QuantizedWeight)
    assert empty.weight.device.type == "cpu"
    assert empty.weight.packed.dtype == torch.uint8


def test_loading_on_the_meta_device_warns() -> None:
    """As torch warns of each parameter; assign=True brings the data."""
    state = {key: value for key, value in layer().state_dict().items() if key.startswith("weight")}
    module = layer(bias=False).to("meta")
    with pytest.warns(UserWarning, match="weight: the module is on the meta device and stays without data"):
        module.load_state_dict(state, strict=False)
    assert module.weight.device.type == "meta"
    module.load_state_dict(state, strict=False, assign=True)
    assert module.weight.device.type == "cpu"


@pytest.mark.parametrize("module", [layer(), MoRALinear(K, N)], ids=["lora", "mora"])
def test_state_dict_under_a_default_device(module: nn.Module) -> None:
    with torch.device("meta"):
        state = module.state_dict()
    assert {value.device.type for value in state.values()} == {"cpu"}


@EACH_BACKEND
@KINDS
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("merged", [False, True])
def test_copies(merged: bool, duplicate: Callable[[LoRALinear], LoRALinear], kind: str) -> None:
    """A copy computes the same and shares nothing."""
    module = layer(kind)
    x = torch.randn(5, K)
    if merged:
        module.merge()
    expected = module(x)
    twin = duplicate(module)
    with torch.no_grad():
        module.lora_A.zero_()
        (module.weight.packed if isinstance(module.weight, QuantizedWeight) else module.weight).zero_()
    assert torch.equal(twin(x), expected)
    assert twin.merged is merged
    twin.unmerge()
    assert torch.equal(twin(x), layer(kind)(x))


@EACH_BACKEND
@KINDS
def test_merge_and_unmerge(kind: str) -> None:
    """Merged, the base alone gives the adapted product, within the rounding of W + ΔW to W's kind; unmerge is
    exact."""
    module = layer(kind)
    x = torch.randn(5, K)
    before, state = module(x), module.state_dict()
    module.merge()
    module.merge()
    assert module.merged
    merged = peftkern.merge(layer(kind).weight, layer(kind).delta())
    bounds.check("merged", module(x), bounds.linear(x, merged, module.bias)["y"])
    A, B = bounds.exact(module.lora_A), bounds.exact(module.lora_B)
    W = bounds.merged(layer(kind).weight, bounds.matmul(B, A.t(), torch.float32, module.scaling))
    b = None if module.bias is None else bounds.exact(module.bias)
    bounds.check("merged", module(x), bounds.matmul(bounds.exact(x), W, torch.float32, bias=b))
    assert [name for name, _ in module.named_parameters()] == [
        name for name, _ in layer(kind).named_parameters()
    ]
    for key, value in module.state_dict().items():
        assert torch.equal(value, state[key]), key
    module.unmerge()
    module.unmerge()
    assert not module.merged
    assert torch.equal(module(x), before)
    module.merge()
    module.load_state_dict(layer(kind, seed=1).state_dict())
    assert torch.equal(module(x), layer(kind, seed=1)(x))


@EACH_BACKEND
@KINDS
def test_absorb(kind: str) -> None:
    module = layer(kind)
    x = torch.randn(5, K)
    module.merge()
    merged, expected = module.weight, module(x)
    module.absorb()
    assert not module.merged
    assert not bool(module.lora_B.any())
    if isinstance(merged, QuantizedWeight):
        assert torch.equal(module(x), expected)  # a zero product is added, to the same bytes
    else:
        assert torch.equal(module.weight, merged)  # type: ignore[arg-type]
        bounds.check("y", module(x), bounds.linear(x, merged, module.bias)["y"])


def test_merged_module_changes_dtype() -> None:
    module = layer("dense")
    module.merge()
    module.bfloat16()
    module.unmerge()
    assert isinstance(module.weight, nn.Parameter)
    assert module.weight.dtype == torch.bfloat16
    assert not module.weight.requires_grad


@EACH_BACKEND
def test_merged_takes_the_same_dtypes() -> None:
    """An fp32 bias beside a bf16 weight: merged as unmerged."""
    module = LoRALinear(K, N, weight=torch.randn(N, K).bfloat16(), bias=torch.randn(N))
    x = torch.randn(5, K).bfloat16()
    assert isinstance(module.weight, Tensor)
    expected = bounds.linear(x, module.weight, module.bias)["y"]  # ΔW is zero
    bounds.check("unmerged", module(x), expected)
    module.merge()
    bounds.check("merged", module(x), expected)


@KINDS
def test_merged_module_changes_device(kind: str) -> None:
    """What unmerge brings back has moved with the rest."""
    module = layer(kind)
    module.merge()
    module.to("meta")
    assert module.weight.device.type == "meta"
    module.unmerge()
    assert module.weight.device.type == "meta"


@EACH_BACKEND
@KINDS
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, kind: str) -> None:
    module = layer(kind, dropout=0.3)
    x = torch.randn(5, K, requires_grad=True)
    gradients = []
    for run in (module, lambda x: torch.utils.checkpoint.checkpoint(module, x, use_reentrant=reentrant)):
        torch.manual_seed(7)
        y = run(x)
        assert isinstance(y, Tensor)
        module.zero_grad()
        x.grad = None
        y.square().sum().backward()
        gradients.append([p.grad.clone() for p in (x, module.lora_A, module.lora_B) if p.grad is not None])
    assert len(gradients[0]) == 3
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_repr_says_what_it_is() -> None:
    assert repr(layer("nested")) == (
        "LoRALinear(in_features=96, out_features=40, r=4, alpha=8, dropout=0, bias=True, "
        "weight=nf4, blocksize=64, double_quant=True)"
    )
    module = layer("dense", bias=False)
    module.merge()
    assert repr(module).endswith("bias=False, weight=float32, merged)")


@EACH_BACKEND
def test_draws_a_weight() -> None:
    module = LoRALinear(K, N, dtype=torch.bfloat16)
    assert isinstance(module.weight, nn.Parameter)
    assert (module.weight.dtype, module.weight.requires_grad) == (torch.bfloat16, False)
    assert module.scaling == 1.0
    assert module(torch.randn(2, K).bfloat16()).shape == (2, N)


@pytest.mark.parametrize(("build", "error", "message"), [
    (lambda: LoRALinear(0, N), ValueError, "in_features: expected at least 1, got 0"),
    (lambda: LoRALinear(K, 2.0), TypeError, "out_features: expected an integer, got float"),
    (lambda: LoRALinear(K, N, r=True), TypeError, "r: expected an integer, got bool"),
    (lambda: LoRALinear(K, N, r=-1), ValueError, "r: expected at least 1, got -1"),
    (lambda: LoRALinear(K, N, alpha=torch.nan), ValueError, "scaling: expected a finite number"),
    (lambda: LoRALinear(K, N, alpha=10**400), ValueError, "alpha: expected a finite number, got an integer"),
    (lambda: LoRALinear(K, N, dropout=1.5), ValueError, "dropout: expected a probability"),
    (lambda: LoRALinear(K, N, weight=torch.zeros(K, N)), ValueError, "weight: expected shape .* got"),
    (lambda: LoRALinear(K, N, weight=[1]), TypeError, "weight: expected a tensor or a Quantized.* got list"),
    (lambda: LoRALinear(K, N, bias=torch.zeros(K)), ValueError, r"bias: expected .* got shape \[96\]"),
    (lambda: LoRALinear(K, N, bias=True), TypeError, "bias: expected a tensor, got bool"),
    (lambda: LoRALinear(K, N, bias=torch.zeros(N).long()), TypeError, "bias: expected dtype .* got int64"),
    (lambda: LoRALinear(K, N, bias=torch.zeros(N, device="meta")), ValueError, "bias: expected device cpu"),
    (lambda: LoRALinear(K, N, weight=torch.zeros(N, K).char()), TypeError, "weight: expected dtype .* int8"),
    (lambda: LoRALinear(K, N, alpha="8"), TypeError, "alpha: expected a number or None, got str"),
    (lambda: LoRALinear(K, N, adapter_dtype=torch.int8), TypeError, "adapter_dtype: expected .* torch.int8"),
    (lambda: LoRALinear(K, N, dtype=torch.float64), TypeError, "dtype: expected .* got torch.float64"),
    (lambda: LoRALinear(K, N, weight=torch.zeros(N, K), dtype=torch.half), ValueError, "dtype: .* None"),
    (lambda: LoRALinear(K, N, weight=torch.zeros(N, K), device="meta"), ValueError, "device: expected None"),
    (lambda: LoRALinear.from_linear(nn.Conv2d(1, 1, 1)), TypeError, "linear: expected .* got Conv2d"),
    (lambda: LoRALinear.from_quantized(torch.zeros(N, K)), TypeError, "weight: expected .* got Tensor"),
])  # fmt: skip
def test_bad_arguments(build: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()
