"""A worker of a plain FSDP2 job that saves with torch's DCP after every step, and begins at its newest checkpoint.

    torchrun --nproc-per-node 4 --max-restarts 3 --standalone fsdp_dcp.py SETTINGS.json FOLDER OUTPUT.jsonl

Every step that is committed, its checkpoint written, is a line of the output.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.settings import ModelContext
from resilin.run.device import set_threads

KEPT = 2


def newest(folder: Path) -> int:
    """The newest step with a whole checkpoint; 0: there is none."""
    return max((int(path.parent.name) for path in folder.glob("*/.metadata")), default=0)


def main(settings_file: str, where: str, output: str) -> None:
    told, folder = json.loads(Path(settings_file).read_text()), Path(where)
    set_threads(1)
    rank, workers = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    # The agent's store outlives an attempt, with the addresses of processes that are gone.
    store = dist.PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=workers)
    model = DecoderSettings(**told["model"]).build(ModelContext(0, None))
    assert isinstance(model, Decoder)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    begun = newest(folder)
    if begun:
        weights, moments = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": moments}
        dcp.load(state, checkpoint_id=folder / str(begun))
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    rows, length = told["batch"] // workers, told["length"]
    with Path(output).open("a", buffering=1) as out:
        for step in range(begun, told["steps"]):
            draw = torch.Generator().manual_seed(1000 * step + rank)
            tokens = torch.randint(0, told["model"]["vocab_size"], (rows, length + 1), generator=draw)
            optimizer.zero_grad()
            logits = model.logits(model(tokens[:, :-1]).hidden_BTD)
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
            optimizer.step()
            weights, moments = get_state_dict(model, optimizer)
            dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder / str(step + 1))
            if rank == 0:
                out.write(json.dumps({"time": time.time(), "step": step + 1}) + "\n")
                shutil.rmtree(folder / str(step + 1 - KEPT), ignore_errors=True)
    sys.stdout.flush()
    os._exit(0)  # every step is on disk


if __name__ == "__main__":
    main(*sys.argv[1:])
