"""Run by torchrun: opens a run of Resilin, converted, with the real DeepSpeed, and takes one step.

deepspeed_open_run.py RUN zero|universal:stage=CONVERTED ...
    each engine has what the run saved, and its next step is that of torch's AdamW
"""

from __future__ import annotations

import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from end_of_ranks import leave
from torch import Tensor, nn

from resilin.checkpoint.foreign.convert import open_stored
from resilin.run.open_model import open_model

# It would compile an extension for faster messages; tests should need no compiler, and not wait for its lock file.
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None


class WithLoss(nn.Module):
    """The model as an engine calls it; its parameters keep their names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.__dict__["inner"] = model
        for name, child in model.named_children():
            self.add_module(name, child)

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.inner.logits(self.inner(tokens[:, :-1]).hidden_BTD)
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def main(run: str, *converted: str) -> None:
    deepspeed.init_distributed("gloo")
    for one in converted:
        told, _, folder = one.partition("=")
        kind, _, stage = told.partition(":")
        check(run, folder, int(stage), kind)


def check(run: str, converted: str, stage: int, kind: str) -> None:
    stored = open_stored(Path(run))
    names = [name for group in stored.groups for name in group["parameters"]]
    tokens = torch.arange(24).reshape(2, 12)

    expected = WithLoss(open_model(Path(run)).model)
    found = dict(expected.named_parameters())
    optimizer = torch.optim.AdamW([{**g, "params": [found[n] for n in g["parameters"]]} for g in stored.groups])
    for name in names:
        states = ("step", "exp_avg", "exp_avg_sq")
        optimizer.state[found[name]] = {s: stored.tensor(f"optimizer/{s}/{name}").clone() for s in states}
    expected(tokens).backward()
    optimizer.step()

    model = WithLoss(open_model(Path(run)).model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    named = dict(model.named_parameters())
    groups = [{"params": [named[name] for name in g["parameters"]], "lr": 0.5} for g in stored.groups]
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.5, "torch_adam": True}},
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "checkpoint": {"load_universal": kind == "universal"},
    }
    engine = deepspeed.initialize(model=model, model_parameters=groups, config=settings)[0]
    path, state = engine.load_checkpoint(converted)
    assert path is not None
    assert state["run"]["step"] == engine.global_steps == stored.step
    for group, given in zip(engine.optimizer.param_groups, stored.groups, strict=True):
        for key in ("lr", "weight_decay", "betas", "eps"):
            value = list(group[key]) if key == "betas" else group[key]
            assert value == given[key], (key, value, given[key])
    if hasattr(engine.optimizer, "_hp_optimizer_states_linked") and kind == "zero":
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name in names:
        parameter = named[name]
        assert torch.equal(safe_get_full_fp32_param(parameter).flatten(), stored.tensor(f"model/{name}").flatten()), (
            name
        )
        for moment in ("exp_avg", "exp_avg_sq"):
            row = safe_get_full_optimizer_state(parameter, moment).flatten()
            assert torch.equal(row, stored.tensor(f"optimizer/{moment}/{name}").flatten()), (moment, name)
    engine.backward(engine(tokens))
    engine.step()
    for name in names:
        after = safe_get_full_fp32_param(named[name]).flatten()
        torch.testing.assert_close(after, found[name].detach().flatten(), rtol=1e-5, atol=1e-7)
        assert not torch.equal(after, stored.tensor(f"model/{name}").flatten()), name


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
