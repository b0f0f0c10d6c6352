"""`resilin sft`, `reward`, `dpo` and `rl`: `resilin train` with the usual settings of a stage of post-training.

Every setting can be written in the file or as an override, and wins over the stage's own. At the end the model lies in
`<run>/model` as a folder that the next stage's `model.path` names, and adapters lie in `<run>/adapter` as PEFT folders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from resilin.cli.arguments import RunArguments
from resilin.cli.option_groups import with_option_groups
from resilin.cli.train import finish, here_or_launched

if TYPE_CHECKING:
    from torch import nn

    from resilin.posttrain.reward_model import RewardModel
    from resilin.run.settings import RunSettings

_LINEAR = "resilin.optim.schedule:Linear"
_ADAM = {"weight_decay": 0.0, "betas": [0.9, 0.999]}
_PRETRAINED = {"use": "resilin.models.pretrained:Pretrained"}
_ROLLOUTS = {"use": "resilin.posttrain.rollouts:Rollouts"}


def _adam(lr: float, warmup: float, schedule: str = _LINEAR) -> dict[str, Any]:
    return {**_ADAM, "lr": lr, "schedule": {"use": schedule, "warmup": warmup}}


SFT: dict[str, Any] = {
    "name": "sft",
    "source": {"use": "resilin.data.chat_source:ChatSource", "sequence_length": 4096, "epochs": 2},
    "model": _PRETRAINED,
    "objective": {"use": "resilin.objective.next_token:NextToken"},
    "optimizer": _adam(5e-6, 0.03),
    "train": {"steps": 0, "batch_size": 128, "micro_batch_size": 8},
}
"""Supervised fine-tuning, as Tulu 3 does it with 8 billion parameters."""

REWARD: dict[str, Any] = {
    "name": "reward",
    "source": {"use": "resilin.data.preference_source:PreferenceSource", "sequence_length": 2048, "epochs": 1},
    "model": {"use": "resilin.posttrain.reward_model:Reward", "model": _PRETRAINED},
    "objective": {"use": "resilin.posttrain.reward_loss:PairwiseReward"},
    "optimizer": _adam(3e-6, 0.03),
    "train": {"steps": 0, "batch_size": 256, "micro_batch_size": 8},
}

DPO: dict[str, Any] = {
    "name": "dpo",
    "source": {"use": "resilin.data.preference_source:PreferenceSource", "sequence_length": 2048, "epochs": 1},
    "model": _PRETRAINED,
    "objective": {"use": "resilin.posttrain.preference_loss:Preference"},
    "optimizer": _adam(5e-7, 0.1),
    "train": {"steps": 0, "batch_size": 128, "micro_batch_size": 8},
}

GRPO: dict[str, Any] = {
    "name": "rl",
    "source": {
        **_ROLLOUTS, "samples_per_prompt": 16, "updates": 2, "max_new_tokens": 2048, "non_stop_penalty": 0.0,
    },
    "model": _PRETRAINED,
    "objective": {"use": "resilin.posttrain.grpo:Grpo"},
    "optimizer": _adam(5e-7, 0, "resilin.optim.schedule:Constant"),
    "train": {"batch_size": 768, "micro_batch_size": 8},
}  # fmt: skip

PPO: dict[str, Any] = {
    "name": "rl",
    "source": {**_ROLLOUTS, "updates": 4, "max_new_tokens": 2048},
    "model": {"use": "resilin.posttrain.actor_critic:ActorCritic", "model": _PRETRAINED},
    "objective": {"use": "resilin.posttrain.ppo:Ppo"},
    "optimizer": _adam(3e-7, 0),
    "train": {"batch_size": 224, "micro_batch_size": 8},
}


STAGES: dict[str, dict[str, Any]] = {"sft": SFT, "reward": REWARD, "dpo": DPO, "rl": GRPO, "ppo": PPO}
StageName = Literal["sft", "reward", "dpo", "rl", "ppo"]


@dataclass(frozen=True, slots=True)
class StageArguments(RunArguments):
    """What every stage is given."""

    export: Annotated[
        bool, typer.Option(help="Write the model at the end as a folder, <run>/model, and adapters as <run>/adapter.")
    ] = True


def stage_settings(defaults: Mapping[str, Any], file: Path | None, overrides: Sequence[str]) -> RunSettings:
    """The settings of a stage: those of a file and the overrides, over the stage's own.

    Where the stage's own would not fit what was asked for they give way: the innermost model (`model.model` of an
    adapted one) is a pretrained one unless it says otherwise; a number of steps takes as many epochs as it needs; a
    batch smaller than the stage's micro-batch is computed at once.

    Raises:
        SettingsError: for what cannot be used.
    """
    from resilin.config import parse_settings
    from resilin.config.load import apply_override, merge, read_toml
    from resilin.run.settings import RunSettings

    own = deepcopy(dict(defaults))
    micro, epochs = own["train"].pop("micro_batch_size"), own["source"].pop("epochs", None)
    tree = merge(own, read_toml(file) if file is not None else {})
    for override in overrides:
        apply_override(tree, override)
    model, train, source = tree.get("model"), tree.get("train"), tree.get("source")
    while isinstance(model, dict) and isinstance(model.get("model"), dict):
        model = model["model"]
    if isinstance(model, dict):
        model.setdefault("use", _PRETRAINED["use"])
    if isinstance(train, dict) and isinstance(batch := train.get("batch_size"), int):
        train.setdefault("micro_batch_size", max(min(micro, batch), 0))
        if epochs is not None and not train.get("steps") and isinstance(source, dict):
            source.setdefault("epochs", epochs)
    return parse_settings(RunSettings, tree, str(file) if file is not None else "command line")


def _stage(defaults: Mapping[str, Any], given: StageArguments) -> None:
    from resilin.config import settings_to_toml

    settings = stage_settings(defaults, *given.split())
    if given.print_config:
        typer.echo(settings_to_toml(settings), nl=False)
        return
    path = given.folder or settings.default_folder()
    place = here_or_launched(settings, path)
    from resilin.run.start import start_run

    run, outcome = start_run(settings, path, resume=given.resume, accept_changes=given.accept_changes, place=place)
    if given.export and outcome.reason == "completed" and (place is None or place.rank == 0):
        from resilin.posttrain.reward_model import RewardModel

        _export_adapters(run.model, settings, path)
        reward_model = run.model if isinstance(run.model, RewardModel) else None
        del run  # exporting makes copies of its own
        _export(reward_model, path)
    finish(path, outcome, place)


def _export(reward_model: RewardModel | None, path: Path) -> None:
    """The model of a finished run as `<run>/model`; a sentence where its form has no such folder."""
    from resilin.config.errors import UserError
    from resilin.data.tokenizer import Tokenizer
    from resilin.posttrain.reward_model import save_reward_model
    from resilin.run.export import export_model
    from resilin.run.folder import RunFolder
    from resilin.run.open_model import open_model

    target = path / "model"
    try:
        if reward_model is not None:
            save_reward_model(reward_model, target)
            Tokenizer.load(RunFolder(path).tokenizer).save(target)
        else:
            opened = open_model(path, device="cpu")
            export_model(opened.model, opened.tokenizer, target, force=True)
    except UserError as error:
        typer.secho(f"note: the model was not written as a folder: {error}", err=True)
        return
    typer.echo(f"the model is in {target}")


def _export_adapters(model: nn.Module, settings: RunSettings, path: Path) -> None:
    """The adapters that were trained as `<run>/adapter` (of several: a folder each inside it), where PEFT has them."""
    from resilin.adapt.attach import adapted_maps, adapter_parameters, attached_to
    from resilin.adapt.peft_folder import save_adapter
    from resilin.adapt.targets import AdapterError
    from resilin.cli.adapter import base_of
    from resilin.models.decoder import Decoder

    if not (isinstance(model, Decoder) and adapted_maps(model)):
        return
    trained = [
        name
        for name in attached_to(model).settings
        if any(parameter.requires_grad for _, parameter in adapter_parameters(model, name))
    ]
    for name in trained:
        target = path / "adapter" / name if len(trained) > 1 else path / "adapter"
        try:
            save_adapter(model, target, name, base=base_of(settings))
        except AdapterError as error:
            typer.secho(f"note: the adapter was not written as a PEFT folder: {error}", err=True)
        else:
            typer.echo(f"the adapter is in {target}")


@with_option_groups
def sft(given: StageArguments) -> None:
    """Fine-tune on conversations; only what the assistant wrote is learnt, every token counts the same.

    \b
    resilin sft examples/sft.toml
    resilin sft source.paths='["chats.jsonl"]' source.tokenizer.path=base model.path=base train.steps=500
    """
    _stage(SFT, given)


@with_option_groups
def reward(given: StageArguments) -> None:
    """Train a reward model on pairs of answers; PPO's value model can start from it.

    \b
    resilin reward source.paths='["pairs.jsonl"]' source.tokenizer=runs/sft/model model.model.path=runs/sft/model
    """
    _stage(REWARD, given)


@with_option_groups
def dpo(given: StageArguments) -> None:
    """Learn from pairs of answers: DPO, length-normalised unless objective.loss says otherwise.

    \b
    resilin dpo examples/dpo.toml
    resilin dpo examples/dpo.toml objective.loss=simpo
    """
    _stage(DPO, given)


@with_option_groups
def rl(
    given: StageArguments,
    algorithm: Annotated[Literal["grpo", "ppo"], typer.Option(help="Groups of answers, or a value model.")] = "grpo",
) -> None:
    """Learn from answers that verifiers check.

    \b
    resilin rl examples/grpo.toml
    resilin rl examples/ppo.toml --algorithm ppo
    """
    _stage(GRPO if algorithm == "grpo" else PPO, given)
