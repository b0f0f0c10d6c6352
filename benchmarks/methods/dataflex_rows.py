"""Steered data: every sample's gradient in one pass, against a loop over samples and against torch.func.

On a CPU the small decoder of the recipe `dataflex` at the width of `one-epoch`: 3 layers of width 64 over bytes, rows
of 32 tokens; on a GPU a larger one. The peers compute the same gradients of the same losses and keep them the same way.
Once for all parameters, and once for those of LoRA adapters alone (rank 8 on every linear map), as selection takes them
in a fine-tuning run.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SHAPES = {
    "cpu": {"hidden": 64, "layers": 3, "heads": 4, "tokens": 32, "samples": 64},
    "cuda": {"hidden": 512, "layers": 6, "heads": 8, "tokens": 128, "samples": 64},
}
VOCABULARY, RANK = 260, 8
TARGET = 3.0


def rows(options: argparse.Namespace) -> Iterator[Any]:
    import torch

    from resilin.adapt.adapted import Adapted
    from resilin.models.decoder_settings import DecoderSettings
    from resilin.models.settings import ModelContext
    from resilin.nouns import Batch

    device = torch.device(options.device)
    shape = SHAPES[options.device]
    samples, tokens = shape["samples"], shape["tokens"]
    settings = DecoderSettings(
        vocab_size=VOCABULARY, hidden_size=shape["hidden"], layers=shape["layers"], heads=shape["heads"]
    )
    adapted = Adapted(model=settings, adapters={"default": {"method": "lora", "rank": RANK}})
    text = torch.tensor(list(Path(__file__).read_bytes())) + 4
    starts = torch.arange(samples) * ((len(text) - tokens - 1) // samples)
    block = torch.stack([text[start : start + tokens + 1] for start in starts.tolist()]).to(device)
    batch = Batch(torch.arange(samples), {"tokens": block[:, :-1], "labels": block[:, 1:]})
    for made, what in ((settings, "all parameters"), (adapted, f"LoRA of rank {RANK} alone")):
        model = made.build(ModelContext(0, None)).to(device)
        title = f"per-sample gradients, decoder {shape['layers']} x {shape['hidden']}, rows of {tokens}, {what}"
        yield from _compared(model, batch, title, options.rounds)


def _compared(model: Any, batch: Any, title: str, rounds: int) -> Iterator[Any]:
    import torch
    import torch.nn.functional as F
    from torch.func import functional_call, grad, vmap

    from resilin.bench.results import Row
    from resilin.objective.next_token import NextToken
    from resilin.steer.sample_gradients import sample_gradients, trainable

    parameters, cuda = trainable(model), batch["tokens"].is_cuda
    objective, samples = NextToken().build(), len(batch.slots_B)

    def one_pass() -> dict[str, Any]:
        return sample_gradients(model, objective, batch, way="batched")

    def loop() -> dict[str, Any]:
        found = []
        for row in range(samples):
            logits = model.logits(model(batch["tokens"][row : row + 1]).hidden_BTD)[0]
            loss = F.cross_entropy(logits, batch["labels"][row])
            found.append(torch.autograd.grad(loss, list(parameters.values())))
        return {name: torch.stack(parts) for name, parts in zip(parameters, zip(*found, strict=True), strict=True)}

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens_T: Any, labels_T: Any) -> Any:
            return F.cross_entropy(self.model.logits(self.model(tokens_T[None]).hidden_BTD)[0], labels_T)

    whole = Whole()
    values = {f"model.{name}": parameter.detach() for name, parameter in parameters.items()}

    def of_one(given: Any, tokens_T: Any, labels_T: Any) -> Any:
        return functional_call(whole, given, (tokens_T, labels_T))

    mapped = vmap(grad(of_one), in_dims=(None, 0, 0))

    def functorch() -> dict[str, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # operations without a batching rule: that is what is measured
            found = mapped(values, batch["tokens"], batch["labels"])
        return {name.removeprefix("model."): value for name, value in found.items()}

    ways: dict[str, Callable[[], dict[str, Any]]] = {"ours": one_pass, "loop": loop, "vmap": functorch}
    expected = loop()
    for name, found in one_pass().items():
        torch.testing.assert_close(found, expected[name], rtol=1e-3, atol=1e-5)
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            if cuda:
                torch.cuda.synchronize()
            began = time.perf_counter()
            way()
            if cuda:
                torch.cuda.synchronize()
            if turn:  # the first turn warms up
                speeds[name].append(samples / (time.perf_counter() - began))
    yield Row.from_turns(title, "samples/s", speeds["ours"], speeds["loop"], "loop over samples", target=TARGET)
    yield Row.from_turns(title, "samples/s", speeds["ours"], speeds["vmap"], "torch.func.vmap(grad)")
