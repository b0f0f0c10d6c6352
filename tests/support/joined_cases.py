"""Small anchors and experts trained beside them for some steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resilin.joined import Anchor, Expert, beside_anchor, expert_of, make_anchor
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings
from resilin.nouns import Batch
from resilin.objective.next_token import NextToken

SIZES: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "layers": 2, "heads": 2, "mlp_size": 24}
KINDS: dict[str, dict[str, Any]] = {
    "norms before": {},
    "norms after": {"norm_place": "after", "qk_norm": "rms", "qk_norm_over": "width"},
    "tied, norms of heads": {"activation": "gelu_tanh", "tie_embeddings": True, "qk_norm": "rms"},
}
IN_MEMORY: dict[str, dict[str, Any]] = {
    **KINDS,
    "no gate": {"gated": False, "activation": "gelu"},
    "looped": {"loop": {"times": 2, "condition": "time_and_step"}},
}
"""And what no stock architecture has."""


def anchor_model(kind: str = "norms before", seed: int = 0, **more: Any) -> Decoder:
    """A dense decoder whose norms are no ones."""
    model = Decoder(DecoderSettings(**{**SIZES, **IN_MEMORY[kind], "init_std": 0.3, **more}), seed=seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    return model


def rows_of(number: int, scale: float = 0.5, **sizes: int) -> Tensor:
    """(L, D) random rows."""
    generator = torch.Generator().manual_seed(100 + number)
    shape = (sizes.get("layers", SIZES["layers"]), sizes.get("width", SIZES["hidden_size"]))
    return scale * torch.randn(shape, generator=generator)


def tokens(seed: int = 0, batch: int = 3, length: int = 12) -> Tensor:
    """(B, T) random ids."""
    return torch.randint(0, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Decoder, ids: Tensor) -> Tensor:
    """Of all positions."""
    return model.logits(model(ids).hidden_BTD)


def train(model: Decoder, seed: int, steps: int = 4) -> Decoder:
    """Train what has a gradient, with momentum and weight decay, on tokens of its own."""
    loss_of = NextToken(load_balance=0.0).build()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.1, betas=(0.9, 0.95)
    )
    for step in range(steps):
        ids = tokens(1000 * seed + step, length=13)
        loss = loss_of(model, Batch(torch.arange(len(ids)), {"tokens": ids[:, :-1], "labels": ids[:, 1:]}), None)
        optimizer.zero_grad()
        (loss.sum / loss.units).backward()
        optimizer.step()
    return model


def trained_expert(name: str, number: int, kind: str = "norms before", offset: float | None = -0.1) -> Expert:
    """An expert that was trained beside `anchor_model(kind)` with rows 0 and `number`."""
    model = beside_anchor(anchor_model(kind), rows_of(0), rows_of(number), offset)
    return expert_of(train(model, number), name)


def written_anchor(folder: Path, kind: str = "norms before") -> Anchor:
    """Its folder."""
    return make_anchor(anchor_model(kind), None, rows_of(0), folder)


def weights(folder: Path) -> dict[str, bytes]:
    """The bytes of a folder's files of weights, by name."""
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}
