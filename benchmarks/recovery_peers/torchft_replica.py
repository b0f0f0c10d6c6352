"""One replica of a torchft job: the decoder of the benchmark under torchft's own wrappers, over gloo.

    RANK=0 WORLD_SIZE=1 TORCHFT_LIGHTHOUSE=http://... python torchft_replica.py SETTINGS.json NUMBER OUTPUT.jsonl

Every step that it commits is a line of the output: when, which step, how many replicas took part.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torchft
from torch import nn

from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.settings import ModelContext
from resilin.run.device import set_threads


class Logits(nn.Module):
    """Tokens to logits in one call, as DDP wants it."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """(B, T) -> (B, T, V)."""
        return self.decoder.logits(self.decoder(tokens_BT).hidden_BTD)


def main(settings_file: str, number: str, output: str) -> None:
    told = json.loads(Path(settings_file).read_text())
    set_threads(1)
    model = DecoderSettings(**told["model"]).build(ModelContext(0, None))
    assert isinstance(model, Decoder)
    store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), wait_for_workers=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def load(state: dict) -> None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    manager = torchft.Manager(
        pg=torchft.ProcessGroupGloo(timeout=timedelta(seconds=told["timeout"])),
        load_state_dict=load,
        state_dict=lambda: {"model": model.state_dict(), "optimizer": optimizer.state_dict()},
        min_replica_size=1,
        rank=0,
        world_size=1,
        store_addr="127.0.0.1",
        store_port=store.port,
        replica_id=f"replica_{number}",
        heartbeat_interval=timedelta(milliseconds=told["beat_ms"]),
    )
    wrapped = torchft.DistributedDataParallel(manager, Logits(model))
    managed = torchft.Optimizer(manager, optimizer)
    rows, length = told["batch"] // told["replicas"], told["length"]
    with Path(output).open("a", buffering=1) as out:
        while manager.current_step() < told["steps"]:
            step = manager.current_step()
            draw = torch.Generator().manual_seed(1000 * step + int(number))
            tokens = torch.randint(0, told["model"]["vocab_size"], (rows, length + 1), generator=draw)
            managed.zero_grad()
            logits = wrapped(tokens[:, :-1])
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
            managed.step()
            if manager.current_step() > step:
                line = {"time": time.time(), "step": manager.current_step(), "took_part": manager.num_participants()}
                out.write(json.dumps(line) + "\n")
    manager.shutdown(wait=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
