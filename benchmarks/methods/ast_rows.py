"""The step of a sparse model against the dense one's: masks and decay, SLoRB, the teacher; each its own row.

A step is a whole step of a run: source, forward, backward, clipping, optimizer, hooks. A turn is ten steps, so the mask
update every tenth step is in each. The teacher is measured for itself: the target is for the masked step.

On a GPU, what the masks are for: a forward pass of a wide sparse model whose weights are in the compressed form that
its sparse tensor cores read, against the same model with its zeros stored.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resilin.bench.results import Row

BLOCK = 10
SMALL = {"vocab_size": 4096, "hidden_size": 256, "layers": 6, "heads": 4, "mlp_size": 688}
LARGE = {"vocab_size": 32000, "hidden_size": 768, "layers": 12, "heads": 12, "mlp_size": 2048}
SHAPES = {"cpu": {**SMALL, "batch": 8, "length": 256}, "cuda": {**LARGE, "batch": 16, "length": 1024}}
WIDE = {"vocab_size": 32000, "hidden_size": 4096, "layers": 4, "heads": 32, "mlp_size": 11008}
PREFILL = (8, 2048)
MOST = 1.35


class Rows:
    """Random tokens, a function of the step and the slot."""

    def __init__(self, shape: dict[str, int]) -> None:
        self.vocab_size, self.sequence_length, self.batch = shape["vocab_size"], shape["length"], shape["batch"]

    def slots(self, step: int) -> int:
        return self.batch

    def fetch(self, step: int, slots: Sequence[int]) -> Any:
        import torch

        from resilin.nouns import Batch

        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(0, self.vocab_size, (len(slots), self.sequence_length + 1), generator=generator)
        return Batch(torch.tensor(list(slots)), {"tokens": rows[:, :-1], "labels": rows[:, 1:]})

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None: ...


def run_of(device: str, *, sparse: bool, slorb: bool = False, teacher: bool = False) -> Any:
    import torch

    from resilin.models.decoder_settings import DecoderSettings
    from resilin.models.settings import ModelContext
    from resilin.objective.distill import Distilled
    from resilin.objective.next_token import NextToken
    from resilin.objective.settings import ObjectiveContext
    from resilin.optim.adamw import AdamW
    from resilin.precision.autocast import choose_precision
    from resilin.precision.settings import PrecisionSettings
    from resilin.run.run import Pace, Run
    from resilin.sparsity.adamw import SparseAdamW
    from resilin.sparsity.decay import Ramp
    from resilin.sparsity.low_rank import LowRankBoost
    from resilin.sparsity.settings import Sparse

    shape = SHAPES[device]
    dense = DecoderSettings(**{k: v for k, v in shape.items() if k not in ("batch", "length")}, tie_embeddings=True)
    boost = LowRankBoost(k=16) if slorb else None
    settings: Any = Sparse(model=dense, update_every=BLOCK, slorb=boost) if sparse else dense
    model = settings.build(ModelContext(0, None)).to(device)
    source: Any = Rows(shape)
    context = ObjectiveContext(
        0, torch.device(device), source, lambda: settings.build(ModelContext(0, None)).to(device)
    )
    # The decay is on from the first step: while lambda is 0 the optimizer is torch's kernel.
    optimizer: Any = SparseAdamW(lr=1e-4, ramp=Ramp(maximum=1e-3, steps=0)) if sparse else AdamW(lr=1e-4)
    compute = "fp32" if device == "cpu" else "bf16"
    return Run(
        source=source,
        model=model,
        objective=(Distilled() if teacher else NextToken()).build(context),
        optimizer=optimizer.build(model, 10**6),
        pace=Pace(steps=10**6, micro_batch_size=shape["batch"], clip_norm=1.0),
        seed=0,
        device=torch.device(device),
        autocast=choose_precision(PrecisionSettings(compute=compute), torch.device(device)).autocast,
    )


def turn(run: Any) -> float:
    """Seconds a step over ten of them."""
    began = time.perf_counter()
    for _ in range(BLOCK):
        run._take_step()  # `train` would take the tenth for the last, and make the masks once more
    return (time.perf_counter() - began) / BLOCK  # each step ends by reading the loss from the device


def kernels(rounds: int) -> Iterator[Row]:
    """2:4 kernels against the same weights with their zeros, in a forward pass without the head."""
    import torch

    from resilin.bench.results import Row
    from resilin.models.decoder_settings import DecoderSettings
    from resilin.models.settings import ModelContext
    from resilin.sparsity.export import zeroed
    from resilin.sparsity.kernels import semi_structured
    from resilin.sparsity.settings import Sparse

    dtype = torch.bfloat16
    model: Any = Sparse(model=DecoderSettings(**WIDE)).build(ModelContext(0, None)).to("cuda", dtype)
    contenders = {"ours": semi_structured(model, dtype=dtype), "dense": zeroed(model).eval().requires_grad_(False)}
    del model
    generator = torch.Generator("cuda").manual_seed(0)
    tokens = torch.randint(WIDE["vocab_size"], PREFILL, generator=generator, device="cuda")
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    with torch.no_grad():
        for index in range(rounds + 1):
            for name, contender in contenders.items():
                torch.cuda.synchronize()
                began = time.perf_counter()
                for _ in range(BLOCK):
                    contender(tokens)
                torch.cuda.synchronize()
                if index:  # the first round warms up
                    seconds[name].append((time.perf_counter() - began) / BLOCK)
    yield Row.from_turns(
        f"2:4 kernels, forward pass of {PREFILL[0]} x {PREFILL[1]} tokens, hidden size {WIDE['hidden_size']}, bf16",
        "s",
        seconds["ours"],
        seconds["dense"],
        "the same weights, zeros stored",
        better="lower",
        target=1.0,
    )


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """Compare with the dense step, all in turns."""
    from resilin.bench.results import Row
    from resilin.run.allocator import keep_freed_memory

    if options.device == "cpu":
        keep_freed_memory()  # as a run does
    kinds: dict[str, dict[str, bool]] = {
        "dense": {"sparse": False},
        "ast": {"sparse": True},
        "slorb": {"sparse": True, "slorb": True},
        "dense, teacher": {"sparse": False, "teacher": True},
        "ast, teacher": {"sparse": True, "teacher": True},
    }
    runs = {name: run_of(options.device, **kind) for name, kind in kinds.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(options.rounds + 1):
        order = list(runs) if index % 2 else list(reversed(runs))
        for name in order:
            found = turn(runs[name])
            if index:  # the first turn warms up
                seconds[name].append(found)
    lower: dict[str, Any] = {"unit": "s/step", "better": "lower"}
    dense, taught = seconds["dense"], seconds["dense, teacher"]
    note = f"mask update every {BLOCK} steps and decay included; the target is a step at most {MOST} times as long"
    name = "2:4 masks and decay against the dense step"
    yield Row.from_turns(name, ours=seconds["ast"], peer=dense, peer_name="dense", target=1 / MOST, note=note, **lower)
    name = "the same with SLoRB, k = 16"
    yield Row.from_turns(name, ours=seconds["slorb"], peer=dense, peer_name="dense", **lower)
    name = "a dense step with a teacher against one without"
    yield Row.from_turns(name, ours=taught, peer=dense, peer_name="dense", **lower)
    name = "masks and teacher against the dense step with a teacher"
    yield Row.from_turns(name, ours=seconds["ast, teacher"], peer=taught, peer_name="dense with teacher", **lower)
    if options.device == "cuda":
        runs.clear()
        yield from kernels(options.rounds)
