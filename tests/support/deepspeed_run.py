"""Run by torchrun: trains a small model with the real DeepSpeed, saves it, and says what its ranks then hold.

deepspeed_run.py save OUT stage:dtype ...      checkpoint in OUT/stage-dtype, its values in OUT/stage-dtype.safetensors
                                               and after two steps more in OUT/stage-dtype-later.safetensors
deepspeed_run.py resume OUT stage:dtype=FOLDER ...    opens ZeRO folders and goes on; values in OUT as those of `save`
deepspeed_run.py experts OUT stage:dtype:EP:ORDER ...  a mixture of experts over EP ranks, in OUT/stage-dtype-EP-ORDER;
                                                    beside it what each rank holds, in the same with -RANK.safetensors
deepspeed_run.py load OUT UNIVERSAL stage:dtype ...   opens a universal folder, the values of every parameter in OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from end_of_ranks import leave
from safetensors.torch import save_file
from torch import Tensor, nn


class Model(nn.Module):
    """Sizes that divide by nothing, tied embeddings, frozen parameters, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 7)
        self.up = nn.Linear(7, 5)
        self.down = nn.Linear(5, 7)
        self.norm = nn.LayerNorm(7)
        self.frozen = nn.Linear(7, 7)
        self.frozen.requires_grad_(False)
        self.head = nn.Linear(7, 13, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.arange(1.0, 4.0))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.down(torch.relu(self.up(self.norm(x)))) + self.frozen(x) * self.scale[0]
        return nn.functional.cross_entropy(self.head(x).float(), targets)


def start(stage: int, dtype: str, universal: bool = False) -> deepspeed.DeepSpeedEngine:
    torch.manual_seed(0)
    model = Model()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for _, p in trained if p.dim() > 1], "weight_decay": 0.1, "lr": 1e-2},
        {"params": [p for _, p in trained if p.dim() == 1], "weight_decay": 0.0, "lr": 2e-2},
    ]
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "sub_group_size": 60},
        **({"bf16": {"enabled": True}} if dtype == "bf16" else {}),
        **({"checkpoint": {"load_universal": True}} if universal else {}),
    }
    return deepspeed.initialize(model=model, model_parameters=groups, config=settings)[0]


def values(engine: deepspeed.DeepSpeedEngine, link: bool) -> dict[str, Tensor]:
    """The masters and moments that all ranks together hold, by the names that Resilin gives them."""
    found = {}
    if link and hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        # DeepSpeed links states to parameters after the first group's first step, when the others have none yet,
        # and not at all when it has opened a ZeRO folder.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad and not engine.zero_optimization():
            found[f"model/{name}"] = parameter.detach().clone()
        elif parameter.requires_grad:
            found[f"model/{name}"] = safe_get_full_fp32_param(parameter).reshape(_shape(parameter)).clone()
            for state in ("exp_avg", "exp_avg_sq"):
                row = safe_get_full_optimizer_state(parameter, state)
                found[f"optimizer/{state}/{name}"] = row.reshape(_shape(parameter)).clone()
        else:
            with deepspeed.zero.GatheredParameters([parameter]):
                found[f"model/{name}"] = parameter.detach().clone()
    found.update({f"model/{name}": buffer.clone() for name, buffer in engine.module.named_buffers()})
    return found


def _shape(parameter: Tensor) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def train(engine: deepspeed.DeepSpeedEngine, steps: int) -> None:
    generator = torch.Generator().manual_seed(engine.global_rank + 100 * engine.global_steps)
    for _ in range(steps):
        tokens = torch.randint(0, 13, (8,), generator=generator)
        engine.backward(engine(tokens, torch.randint(0, 13, (8,), generator=generator)))
        engine.step()


# It would compile an extension for faster messages; tests should need no compiler, and not wait for its lock file.
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(13, 7))

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.embedding(tokens, self.weight)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(7)
        self.inner = nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.norm(x))


def pipeline(out: Path) -> None:
    torch.manual_seed(0)
    tied = {"forward_fn": lambda module, x: x @ module.weight.t(), "tied_weight_attr": "weight"}
    layers = [
        TiedLayerSpec("embed", Embedding, tied_weight_attr="weight"),
        *(LayerSpec(Layer) for _ in range(3)),
        TiedLayerSpec("embed", Embedding, **tied),
    ]
    model = PipelineModule(
        layers=layers,
        num_stages=2,
        loss_fn=lambda x, y: nn.functional.cross_entropy(x.view(-1, 13).float(), y.view(-1)),
        partition_method="uniform",
    )
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
    }
    engine = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=settings)[0]
    generator = torch.Generator().manual_seed(0)
    batches = iter([torch.randint(0, 13, (2, 2, 4), generator=generator) for _ in range(4)])
    pairs = ((batch[0], batch[1]) for batch in batches)
    for _ in range(2):
        engine.train_batch(pairs)
    engine.save_checkpoint(str(out), tag="global_step2")
    found = {}
    for name, parameter in engine.module.named_parameters():
        found[f"model/{name}"] = safe_get_full_fp32_param(parameter)
        found[f"optimizer/exp_avg/{name}"] = safe_get_full_optimizer_state(parameter, "exp_avg")
    save_file(found, out / f"rank-{engine.global_rank}.safetensors")


class Mixture(nn.Module):
    """Four experts of two layers each, twice, between layers that every rank has."""

    def __init__(self, ep_size: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 6)
        expert = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 6))
        self.first = MoE(6, expert, num_experts=4, ep_size=ep_size, k=1, use_rts=False)
        self.second = MoE(6, expert, num_experts=4, ep_size=ep_size, k=1, use_rts=False)
        self.head = nn.Linear(6, 13)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x, lost = self.embed(tokens), 0.0
        for layer in (self.first, self.second):
            y, one, _ = layer(x)
            x, lost = x + y, lost + one
        return nn.functional.cross_entropy(self.head(x).float(), targets) + 0.1 * lost


def experts(out: Path, stage: int, dtype: str, ep_size: int, order: str) -> None:
    torch.manual_seed(deepspeed.comm.get_rank())  # experts differ from rank to rank; the engine makes the rest equal
    for table in ("_EXPERT_PARALLEL_GROUP", "_EXPERT_DATA_PARALLEL_GROUP"):  # kept by EP alone, whatever the order
        getattr(deepspeed.utils.groups, table).clear()
    model = Mixture(ep_size)
    group = {"params": list(model.parameters()), "name": "all", "lr": 1e-2}
    groups = split_params_into_different_moe_groups_for_optimizer(group)
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "use_data_before_expert_parallelism": order == "consecutive",
        **({"bf16": {"enabled": True}} if dtype == "bf16" else {}),
    }
    engine = deepspeed.initialize(model=model, model_parameters=groups, config=settings)[0]
    train(engine, 3)
    name = f"{stage}-{dtype}-{ep_size}-{order}"
    engine.save_checkpoint(str(out / name), tag="global_step3")
    save_file(values(engine, link=True), out / f"{name}-{engine.global_rank}.safetensors")


def _tell(engine: deepspeed.DeepSpeedEngine, path: Path, link: bool) -> None:
    found = values(engine, link)
    if engine.global_rank == 0:
        save_file({key: value.contiguous() for key, value in found.items()}, path)


def main(mode: str, out: Path, *rest: str) -> None:
    deepspeed.init_distributed("gloo")
    out.mkdir(exist_ok=True)
    if mode == "pipeline":
        pipeline(out)
        return
    if mode == "experts":
        for kind in rest:
            stage, dtype, ep_size, order = kind.split(":")
            experts(out, int(stage), dtype, int(ep_size), order)
        return
    source, kinds = (rest[0], rest[1:]) if mode == "load" else ("", rest)
    for kind in kinds:
        kind, _, folder = kind.partition("=")
        stage, _, dtype = kind.partition(":")
        engine = start(int(stage), dtype, universal=mode == "load")
        name = f"{stage}-{dtype}"
        if mode == "save":
            train(engine, 3)
            engine.save_checkpoint(str(out / name), tag="global_step3", client_state={"seen": {"tokens": 48}})
        else:
            path, state = engine.load_checkpoint(folder or source)
            assert path is not None
            assert state["seen"] == {"tokens": 48}
            assert engine.global_steps == 3
            groups = engine.optimizer.param_groups
            # Stage 3 of DeepSpeed gives every group the first one's settings when it opens a universal folder.
            shared = mode == "load" and stage == "3"
            assert [g["lr"] for g in groups] == ([1e-2, 1e-2] if shared else [1e-2, 2e-2]), groups
        _tell(engine, out / f"{name}.safetensors", link=mode != "load")
        train(engine, 2)
        _tell(engine, out / f"{name}-later.safetensors", link=mode != "load")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
    leave()
