"""Adapters against peft: step time, peak memory and generation at equal rank, on the same model and batch.

The base is one small Llama in a folder that both sides open: ours as a decoder, theirs as a transformers model under
`peft`. A step is forward, loss, backward and a fused AdamW on the adapter alone. Both sides live in one process and
take a block of steps each in turn. Peak memory is each side's own: on a CPU of a process that holds nothing but it, on
a GPU what the allocator counted above what was held before the step. On a CPU all is float32; on a GPU the base is
larger, and products are in bfloat16, by autocast.

Every pair is measured twice: each side as it comes (our decoder, their transformers model), and the adapters alone,
both on the very same transformers model, so that the second tells the adapter's part from the model's. All contenders
take turns with each other, so that our methods can be compared too: Bone's paper calls its block (miss) quicker and
leaner than LoRA, and peft's own benchmark has Bat (bat_col) 1.5 times slower.

Last, our miss with its base stored in bfloat16 against float32, products in the quicker of both.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resilin.bench.results import Row

RANK, BATCH, BLOCK = 32, 8, 3
SMALL = {"vocab_size": 8192, "hidden_size": 256, "layers": 6, "heads": 8, "mlp_size": 768, "max_positions": 1024}
LARGE = {**SMALL, "vocab_size": 32000, "hidden_size": 1024, "layers": 12, "heads": 16, "mlp_size": 2816}
SIZES = {"cpu": SMALL, "cuda": LARGE}
LENGTHS = {"cpu": 256, "cuda": 512}
NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
METHODS = {"lora": "peft LoRA", "miss": "peft MiSS", "bat_col": "peft MiSS (bat)", "dora": "peft DoRA"}
TARGETS = {"lora": 1.0, "miss": 1.0, "bat_col": 1.0, "dora": None}

Step = Callable[[], None]


def prepare(folder: Path, device: str) -> None:
    """The base, as a folder that both sides open."""
    from resilin.models.decoder_settings import DecoderSettings
    from resilin.models.huggingface import save_pretrained
    from resilin.models.settings import ModelContext

    save_pretrained(DecoderSettings(**SIZES[device]).build(ModelContext(0, None)), folder)


def tokens(device: str) -> Any:
    import torch

    shape, generator = (BATCH, LENGTHS[device] + 1), torch.Generator().manual_seed(0)
    return torch.randint(0, SIZES[device]["vocab_size"], shape, generator=generator).to(device)


def stepper(model: Any, loss: Callable[[], Any], device: str) -> Step:
    """A training step of whatever is trainable."""
    import torch

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def ours_of(method: str, folder: Path, device: str, base: str | None = None) -> tuple[Any, Step]:
    """Our adapters on our decoder, our loss; with `base`, stored in that format and computed as a run would."""
    import torch

    from resilin.adapt.attach import attach
    from resilin.adapt.settings import AdapterSettings
    from resilin.adapt.stored import store_frozen
    from resilin.models.huggingface import load_pretrained
    from resilin.nouns import Batch
    from resilin.objective.next_token import NextToken
    from resilin.precision.autocast import choose_precision
    from resilin.precision.settings import PrecisionSettings
    from resilin.run.allocator import keep_freed_memory

    if device == "cpu":
        keep_freed_memory()  # as a run does
    model = load_pretrained(folder).to(device)
    attach(model, {"a": AdapterSettings(method=method, rank=RANK)})
    if base == "bfloat16":
        store_frozen(model, torch.bfloat16, ["a"])
    compute = "auto" if base else "bf16" if device == "cuda" else "fp32"
    precision = choose_precision(PrecisionSettings(compute=compute), device)
    rows, objective = tokens(device), NextToken().build()
    batch = Batch(torch.arange(BATCH), {"tokens": rows[:, :-1], "labels": rows[:, 1:]})

    def loss() -> Any:
        with precision.autocast():
            got = objective(model, batch, None)
        return got.sum / got.units

    return model, stepper(model, loss, device)


def ours(method: str, folder: Path, device: str) -> Step:
    """Our adapters on our decoder; the base is stored in float32."""
    return ours_of(method, folder, device)[1]


def llama(folder: Path, device: str) -> Any:
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)


def of_transformers(model: Any, device: str) -> Step:
    import torch

    rows = tokens(device)

    def loss() -> Any:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            return model(input_ids=rows[:, :-1], labels=rows[:, :-1]).loss

    return stepper(model, loss, device)


def ours_on_llama(method: str, folder: Path, device: str) -> Step:
    """Our adapters on the transformers model."""
    from resilin.adapt.attach import attach
    from resilin.adapt.settings import AdapterSettings

    model = llama(folder, device)
    attach(model, {"a": AdapterSettings(method=method, rank=RANK, exclude=("lm_head",))})
    return of_transformers(model, device)


def peers(method: str, folder: Path, device: str) -> Step:
    """Peft's adapters on the transformers model."""
    import peft

    if method in ("lora", "dora"):
        config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=NAMES, use_dora=method == "dora")
    else:
        variant: Any = "bat" if method == "bat_col" else True
        config = peft.MissConfig(r=RANK, init_weights=variant, target_modules=NAMES)
    return of_transformers(peft.get_peft_model(llama(folder, device), config), device)


MAKERS: dict[str, Callable[[str, Path, str], Step]] = {"ours": ours, "alone": ours_on_llama, "peft": peers}


def timed(step: Step, count: int) -> float:
    began = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - began) / count


def in_turns(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds a step by contender; the order turns round with each round."""
    for step in steps.values():
        timed(step, 2)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        order = list(steps) if number % 2 == 0 else list(steps)[::-1]
        for name in order:
            seconds[name].append(timed(steps[name], BLOCK))
    return seconds


def peak_on_gpu(step: Step) -> float:
    """Bytes at the peak of three steps, above what was held before them; the first has made the optimizer's state."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    timed(step, 3)
    return float(torch.cuda.max_memory_allocated() - before)


def peak(who: str, method: str, folder: Path, options: argparse.Namespace) -> float:
    """Bytes at the peak of three steps, in a process of its own: above what the model and its set-up take."""
    command = [sys.executable, __file__, who, method, str(folder), options.device, str(options.threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def _peak_here(who: str, method: str, folder: str, device: str, threads: str) -> None:
    import torch

    torch.set_num_threads(int(threads))
    step = MAKERS[who](method, Path(folder), device)
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's own peak counter starts anew
    before = _status("VmRSS")
    timed(step, 3)
    print(json.dumps(_status("VmHWM") - before))


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def against_peft(
    seconds: dict[str, list[float]], memory: dict[str, list[float]], method: str, device: str
) -> Iterator[Row]:
    """Step time and peak memory of a method against peft's."""
    from resilin.bench.results import Row

    peer, target = METHODS[method], TARGETS[method]
    note = f"rank {RANK}, all linear maps, {BATCH} x {LENGTHS[device]} tokens"
    for who, where in (("ours", "each on its own model"), ("alone", "both on transformers' model")):
        yield Row.from_turns(
            f"{method} step, {where}", "s", seconds[f"{who} {method}"], seconds[f"peft {method}"], peer,
            better="lower", target=target, note=note,
        )  # fmt: skip
        yield Row.from_turns(
            f"{method} peak memory of a step, {where}", "MiB", memory[f"{who} {method}"], memory[f"peft {method}"],
            peer, better="lower", target=target, note="above the model and its set-up",
        )  # fmt: skip


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """Each method against peft's, the methods against each other, and a base in half the bytes."""
    from resilin.bench.results import Row

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder, options.device)
        steps = {
            f"{who} {method}": make(method, folder, options.device)
            for method in METHODS
            for who, make in MAKERS.items()
        }
        bytes_of: dict[str, float] = {}
        for base in ("float32", "bfloat16"):
            model, steps[base] = ours_of("miss", folder, options.device, base)
            bytes_of[base] = sum(p.nbytes for p in model.parameters() if not p.requires_grad) / 2**20
        seconds = in_turns(steps, options.rounds)
        pairs = [(who, method) for method in METHODS for who in MAKERS]
        memory: dict[str, list[float]] = {}
        if options.device == "cuda":
            memory = {f"{who} {method}": [peak_on_gpu(steps[f"{who} {method}"]) / 2**20] for who, method in pairs}
        del steps, model
        if not memory:
            memory = {f"{who} {method}": [peak(who, method, folder, options) / 2**20] for who, method in pairs}
        for method in METHODS:
            yield from against_peft(seconds, memory, method, options.device)
        for method, said in (("miss", "897 s against 942 s"), ("bat_col", "1409 s against 942 s")):
            for what, unit, found in (("step", "s", seconds), ("peak memory of a step", "MiB", memory)):
                yield Row.from_turns(
                    f"{method} {what} against LoRA of the same rank", unit, found[f"ours {method}"], found["ours lora"],
                    "our LoRA", better="lower", note=f"peft's own benchmark, of equal size: {said}",
                )  # fmt: skip
        yield Row.from_turns(
            "miss, base stored in bfloat16: bytes of the frozen base", "MiB", [bytes_of["bfloat16"]],
            [bytes_of["float32"]], "base stored in float32", better="lower", target=1.9,
        )  # fmt: skip
        yield Row.from_turns(
            "miss, base stored in bfloat16: step", "s", seconds["bfloat16"], seconds["float32"],
            "base stored in float32", better="lower", target=1.0, note="products in the quicker of fp32 and bf16",
        )  # fmt: skip


if __name__ == "__main__":
    _peak_here(*sys.argv[1:])
