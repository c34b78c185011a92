"""examples/mora_uuid.py: its pairs, loss and metric, two models of equal size, and all of it in small."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import uuid
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from test_example import MISSING, SCRIPT, needs_model, tiny
from torch import Tensor, nn

import peftkern
from peftkern.formats import QuantizedWeight

MISSING = [*MISSING, *(["typer"] if importlib.util.find_spec("typer") is None else [])]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"the example needs {', '.join(MISSING)}")
LETTERS = "0123456789abcdef →"
RANK = 4


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = SCRIPT.with_name("mora_uuid.py")
    sys.path.append(str(path.parent))  # as for a script; last, so that nothing else is found there first
    spec = importlib.util.spec_from_file_location("mora_uuid", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mora_uuid"] = module
    spec.loader.exec_module(module)
    return module


class Letters:
    """A token a letter; with `uneven`, every "a" is two tokens, so that texts differ in length."""

    def __init__(self, uneven: bool = False) -> None:
        self.uneven = uneven

    def encode(self, text: str) -> list[int]:
        ids = []
        for letter in text:
            ids += [LETTERS.index(letter)] * (2 if self.uneven and letter == "a" else 1)
        return ids

    def __call__(self, text: str) -> Any:
        return SimpleNamespace(input_ids=self.encode(text))

    def decode(self, ids: list[int]) -> str:
        return "".join(LETTERS[i] if i < len(LETTERS) else "?" for i in ids)


def data_of(example: ModuleType, count: int, uneven: bool = True) -> Any:
    return example.encode(example.random_pairs(count, 0), Letters(uneven).encode)


def models(example: ModuleType, mora_type: int | str = 6) -> tuple[nn.Module, nn.Module]:
    dense = tiny()
    weights = example.quantize(dense)
    return example.lora_model(dense, weights, RANK, 0), example.mora_model(dense, weights, RANK, mora_type)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_pairs_are_the_seeds_and_all_different(example):
    pairs = example.random_pairs(100, 3)
    assert pairs == example.random_pairs(100, 3)
    assert pairs[:10] == example.random_pairs(10, 3)
    assert pairs != example.random_pairs(100, 4)
    flat = [text for pair in pairs for text in pair]
    assert len(set(flat)) == 200
    for text in flat:
        assert re.fullmatch("[0-9a-f]{32}", text)
        assert uuid.UUID(text).version == 4


def test_hits_count_characters_in_their_places(example):
    value = example.random_pairs(1, 0)[0][1]
    assert example.hits(value, value) == len(value) == example.CHARACTERS
    assert example.hits(value + "ff", value) == 32
    assert example.hits(value[:7], value) == 7
    assert example.hits("", value) == 0
    assert example.hits("0123x567", "0123456789") == 7
    assert example.hits("x0123", "0123") == 0


def test_chance_is_what_random_uuids_score(example):
    found = [example.hits(key, value) / 32 for key, value in example.random_pairs(4000, 1)]
    # 30 characters of variance 15/256, one of 3/16, over 32² and 4000: 6.9e-4; five of those
    deviation = ((30 * 15 / 256 + 3 / 16) / 32**2 / len(found)) ** 0.5
    assert statistics.fmean(found) == pytest.approx(example.CHANCE, abs=5 * deviation)


def test_labels_are_the_values_tokens_and_nothing_else(example):
    data = data_of(example, 5)
    ids, labels = example.collate(data, [4, 0, 2])
    lengths = []
    for row, i in enumerate([4, 0, 2]):
        key, value = data.pairs[i]
        text = Letters(True).encode(key + " → " + value)
        lengths.append(len(text))
        assert ids[row, : len(text) - 1].tolist() == text[:-1]
        positions = (labels[row] != example.IGNORED).nonzero().flatten().tolist()
        assert labels[row, positions].tolist() == Letters(True).encode(value)
        assert [text[p + 1] for p in positions] == Letters(True).encode(value)
        assert positions[-1] == len(text) - 2
    assert len(set(lengths)) > 1
    assert ids.shape == labels.shape == (3, max(lengths) - 1)


def test_loss_is_each_pairs_own(example):
    """Against the whole output of each pair alone: neither neighbours nor filling take part.

    fp32 sums in another order over at most 192 columns and two layers: 1e-5 of a loss near 5 is ample for
    that, and any token too many or too few moves it by 1e-2.
    """
    model, data = tiny(), data_of(example, 4)
    total, count = 0.0, 0
    with torch.no_grad():
        for prompt, value in zip(data.prompts, data.values, strict=True):
            logits = model(input_ids=torch.tensor([prompt + value])).logits[0, len(prompt) - 1 : -1]
            total += nn.functional.cross_entropy(logits.double(), torch.tensor(value), reduction="sum").item()
            count += len(value)
        loss = example.value_loss(model, *example.collate(data, [0, 1, 2, 3])).item()
    assert loss == pytest.approx(total / count, rel=1e-5)


def written_alone(model: nn.Module, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_recall_is_what_the_model_writes_after_each_key_alone(example):
    data, letters = data_of(example, 5), Letters()
    model = tiny().train()
    assert len({len(prompt) for prompt in data.prompts}) > 1
    longest = max(map(len, data.values))
    written = [letters.decode(written_alone(model, prompt, longest)) for prompt in data.prompts]
    # values that the model does write, in part: all of the first, 10 characters of the second
    data.pairs = [(key, text[:32]) for (key, _), text in zip(data.pairs, written, strict=True)]
    data.pairs[1] = data.pairs[1][0], data.pairs[1][1][:10] + "x" * 22
    found = example.recall(model, data, letters.decode, batch=3)
    assert found.whole == 4
    assert found.characters == (4 * 32 + 10) / (5 * 32)
    assert model.training


@pytest.mark.parametrize("mora_type", [1, 6])
def test_both_adapters_stand_on_the_same_bytes_and_change_nothing_yet(example, mora_type):
    dense = tiny(torch.bfloat16)
    weights = example.quantize(dense)
    lora = example.lora_model(dense, weights, RANK, 0)
    mora = example.mora_model(dense, weights, RANK, mora_type)
    kinds = peftkern.nn.LoRALinear, peftkern.nn.MoRALinear
    for model, kind in zip((lora, mora), kinds, strict=True):
        layers = {name: module for name, module in model.named_modules() if isinstance(module, kind)}
        assert set(layers) == set(weights)
        for name, layer in layers.items():
            assert isinstance(layer.weight, QuantizedWeight)
            assert layer.weight.packed.data_ptr() == weights[name].packed.data_ptr()
        assert not {name.rpartition(".")[2] for name in trained(model)} - {"lora_A", "lora_B", "matrix"}
        assert all(parameter.dtype == torch.float32 for parameter in trained(model).values())
    assert {layer.scaling for layer in lora.modules() if isinstance(layer, kinds[0])} == {1.0}
    assert set(trained(mora)) == {f"{name}.matrix" for name in weights}
    assert {layer.mora_type for layer in mora.modules() if isinstance(layer, kinds[1])} == {mora_type}
    ids, labels = example.collate(data_of(example, 3), [0, 1, 2])
    with torch.no_grad():
        # zero times anything is zero: the addends are exactly nothing
        assert example.value_loss(lora, ids, labels) == example.value_loss(mora, ids, labels)


def test_parameters_are_equal_but_for_the_rounding_of_the_side():
    """SmolLM2-135M's seven projections: r̂ = sqrt((I + O)·r) rounded, for type 6 to an even number."""
    shapes = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]
    lora = sum(8 * (i + o) for i, o in shapes)
    for mora_type in (1, 6):
        mora = sum(peftkern.mora_rank(i, o, 8, mora_type) ** 2 for i, o in shapes)
        # a side off by at most 1 of 78 or more: 2/78 at the worst, and the rounding goes both ways
        assert abs(mora / lora - 1) < 0.01


def run_of(example: ModuleType, steps: int = 30) -> list[Any]:
    lora, mora = models(example)
    data = data_of(example, 4, uneven=False)
    runs = [example.Run("LoRA", lora, 0.02), example.Run("MoRA", mora, 0.005)]
    example.train(runs, data, Letters().decode, steps, batch=2, every=20, seed=0)
    return runs


def test_both_learn_and_are_measured_on_the_way(example, capsys):
    runs = run_of(example)
    for run in runs:
        assert len(run.losses) == len(run.seconds) == 30
        assert list(run.recalls) == [20, 30]
        assert all(0.0 <= found.characters <= 1.0 for found in run.recalls.values())
        assert run.losses[-1] < run.losses[0] - 0.5
    assert runs[0].losses[0] == runs[1].losses[0]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step    20", "step    30"]
    again = run_of(example)
    assert all(run.losses == other.losses for run, other in zip(runs, again, strict=True))


def test_the_learning_rate_rises_and_stays(example):
    run = example.Run("LoRA", models(example)[0], 0.5)
    trainer = example.Trainer(run)
    rates = []
    for _ in range(example.WARMUP + 5):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.optimizer.step()
        trainer.schedule.step()
    rising = [0.5 * (step + 1) / example.WARMUP for step in range(example.WARMUP)]
    assert rates == pytest.approx([*rising, *[0.5] * 5])


def test_report_csv_and_plot(example, tmp_path):
    model = nn.Linear(25, 10**4, bias=False)
    runs = [
        example.Run(label, model, lr, [3.0, 2.0, 1.0], [2.0, 1.0, 1.0], {2: first, 3: last})
        for label, lr, first, last in (
            ("LoRA", 1e-3, example.Recall(0.1, 0), example.Recall(0.25, 1)),
            ("MoRA", 3e-4, example.Recall(0.5, 2), example.Recall(1.0, 4)),
        )
    ]
    lines = example.report(runs, 4).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split() == ["LoRA", "250000", "0.001", "1.00", "1.000", "25.0", "%", "1", "of", "4"]
    example.write_csv(tmp_path / "a.csv", runs)
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert [row["accuracy MoRA"] for row in rows] == ["", "0.500000", "1.000000"]
    assert [row["whole values LoRA"] for row in rows] == ["", "0", "1"]
    assert float(rows[1]["loss LoRA"]) == 2.0
    example.draw(tmp_path / "a.png", runs, "caption")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_main_in_small(example, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(example, "find_gguf", lambda model_dir: Path("tiny.gguf"))
    monkeypatch.setattr(example, "load", lambda gguf: (tiny(torch.bfloat16), Letters(True)))
    options = {"pairs": 3, "steps": 3, "batch": 2, "rank": RANK, "mora_type": "sharing", "eval_every": 2}
    example.main(**options, note="a remark", out=tmp_path)
    printed = capsys.readouterr().out
    summary = json.loads((tmp_path / "mora_uuid.json").read_text())
    assert set(summary["runs"]) == {"LoRA r=4", "MoRA type sharing"}
    for label, run in summary["runs"].items():
        assert f"{label}: {run['parameters']} trainable parameters in 14 projections" in printed
        assert list(run["accuracy"]) == list(run["whole_values"]) == ["2", "3"]
        assert all(0.0 <= share <= 1.0 for share in run["accuracy"].values())
    assert summary["options"].items() > {**options, "note": "a remark", "seed": 0}.items()
    assert len(list(csv.reader((tmp_path / "mora_uuid.csv").open()))) == 1 + 3
    assert (tmp_path / "mora_uuid.png").read_bytes().startswith(b"\x89PNG")


def invoke(example: ModuleType, *words: str) -> Any:
    import typer
    from typer.testing import CliRunner

    app = typer.Typer()
    app.command()(example.main)
    return CliRunner().invoke(app, list(words))


@pytest.mark.parametrize("words", [("--pairs", "0"), ("--mora-type", "5"), ("--mora-type", "round")])
def test_bad_options_are_refused(example, words, monkeypatch):
    monkeypatch.setattr(example, "load", lambda gguf: pytest.fail("it began to work"))
    result = invoke(example, *words)
    assert result.exit_code == 2
    assert words[0].removeprefix("--").replace("-", "_") in result.output.replace("-", "_")


def test_without_the_model_it_ends_with_the_line_to_run(example, tmp_path):
    result = invoke(example, "--model-dir", str(tmp_path))
    assert result.exit_code == 2
    assert "expected one .gguf file" in result.output


@needs_model
@pytest.mark.timeout(600)
def test_the_whole_example(tmp_path):
    options = ("--pairs=2", "--steps=2", "--batch=2", "--eval-every=2")
    done = subprocess.run(
        [sys.executable, str(SCRIPT.with_name("mora_uuid.py")), *options, "--out", str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(Path(peftkern.__file__).parents[1])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "2442240 trainable parameters in 210 projections" in done.stdout
    summary = json.loads((tmp_path / "mora_uuid.json").read_text())
    assert [run["parameters"] for run in summary["runs"].values()] == [2442240, 2439000]
    assert len(list(csv.reader((tmp_path / "mora_uuid.csv").open()))) == 1 + 2
    assert (tmp_path / "mora_uuid.png").read_bytes().startswith(b"\x89PNG")
