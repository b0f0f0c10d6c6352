"""`resilin sft`, `reward`, `dpo` and `rl`: `resilin train` with the usual settings of a stage of post-training.

Every setting can be written in the file or as an override, and wins over the stage's own. At the end the model lies in
`<run>/model` as a folder that the next stage's `model.path` names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from resilin.cli.arguments import split_settings
from resilin.cli.train import finish

if TYPE_CHECKING:
    from resilin.run.run import Run

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
    "train": {"batch_size": 128, "micro_batch_size": 8},
}
"""Supervised fine-tuning, as Tulu 3 does it with 8 billion parameters."""

REWARD: dict[str, Any] = {
    "name": "reward",
    "source": {"use": "resilin.data.preference_source:PreferenceSource", "sequence_length": 2048, "epochs": 1},
    "model": {"use": "resilin.posttrain.reward_model:Reward", "model": _PRETRAINED},
    "objective": {"use": "resilin.posttrain.reward_loss:PairwiseReward"},
    "optimizer": _adam(3e-6, 0.03),
    "train": {"batch_size": 256, "micro_batch_size": 8},
}

DPO: dict[str, Any] = {
    "name": "dpo",
    "source": {"use": "resilin.data.preference_source:PreferenceSource", "sequence_length": 2048, "epochs": 1},
    "model": _PRETRAINED,
    "objective": {"use": "resilin.posttrain.preference_loss:Preference"},
    "optimizer": _adam(5e-7, 0.1),
    "train": {"batch_size": 128, "micro_batch_size": 8},
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

Arguments = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SETTINGS.toml] [KEY=VALUE]...", help="A settings file and dotted overrides."),
]
Folder = Annotated[Path | None, typer.Option(help="Where the run lives. Default: runs/<name>.")]
Resume = Annotated[bool, typer.Option(help="Continue the run in the folder; start one where there is none.")]
PrintConfig = Annotated[bool, typer.Option(help="Write the complete resolved settings and stop.")]
AcceptChanges = Annotated[bool, typer.Option(help="With --resume: go on although settings have changed.")]
Export = Annotated[bool, typer.Option(help="Write the model at the end as a folder, <run>/model.")]


def _stage(
    defaults: Mapping[str, Any],
    arguments: list[str] | None,
    folder: Path | None,
    resume: bool,
    print_config: bool,
    accept_changes: bool,
    export: bool,
) -> None:
    from resilin.config import parse_settings, settings_to_toml
    from resilin.config.load import apply_override, merge, read_toml
    from resilin.run.settings import RunSettings

    file, overrides = split_settings(arguments or [])
    tree = merge(defaults, read_toml(file) if file is not None else {})
    for override in overrides:
        apply_override(tree, override)
    settings = parse_settings(RunSettings, tree, str(file) if file is not None else "command line")
    if print_config:
        typer.echo(settings_to_toml(settings), nl=False)
        return
    from resilin.run.start import start_run

    path = folder or settings.default_folder()
    run, outcome = start_run(settings, path, resume=resume, accept_changes=accept_changes)
    if export and outcome.reason == "completed":
        _export(run, path)
    finish(path, outcome)


def _export(run: Run, path: Path) -> None:
    """The model of a finished run as `<run>/model`; a sentence where its form has no such folder."""
    from resilin.config.errors import UserError
    from resilin.posttrain.reward_model import RewardModel, save_reward_model
    from resilin.run.export import export_model
    from resilin.run.open_model import open_model

    target = path / "model"
    try:
        if isinstance(run.model, RewardModel):
            save_reward_model(run.model, target)
            run.source.tokenizer.save(target)  # type: ignore[attr-defined]  # of pairs, which are read with one
        else:
            opened = open_model(path, device="cpu")
            export_model(opened.model, opened.tokenizer, target, force=True)
    except UserError as error:
        typer.secho(f"note: the model was not written as a folder: {error}", err=True)
        return
    typer.echo(f"the model is in {target}")


def sft(
    arguments: Arguments = None,
    folder: Folder = None,
    resume: Resume = False,
    print_config: PrintConfig = False,
    accept_changes: AcceptChanges = False,
    export: Export = True,
) -> None:
    """Fine-tune on conversations; only what the assistant wrote is learnt, every token counts the same.

    \b
    resilin sft examples/sft.toml
    resilin sft source.paths='["chats.jsonl"]' source.tokenizer.path=base model.path=base train.steps=500
    """
    _stage(SFT, arguments, folder, resume, print_config, accept_changes, export)


def reward(
    arguments: Arguments = None,
    folder: Folder = None,
    resume: Resume = False,
    print_config: PrintConfig = False,
    accept_changes: AcceptChanges = False,
    export: Export = True,
) -> None:
    """Train a reward model on pairs of answers; PPO's value model can start from it.

    \b
    resilin reward source.paths='["pairs.jsonl"]' source.tokenizer=runs/sft/model model.model.path=runs/sft/model
    """
    _stage(REWARD, arguments, folder, resume, print_config, accept_changes, export)


def dpo(
    arguments: Arguments = None,
    folder: Folder = None,
    resume: Resume = False,
    print_config: PrintConfig = False,
    accept_changes: AcceptChanges = False,
    export: Export = True,
) -> None:
    """Learn from pairs of answers: DPO, length-normalised unless objective.loss says otherwise.

    \b
    resilin dpo examples/dpo.toml
    resilin dpo examples/dpo.toml objective.loss=simpo
    """
    _stage(DPO, arguments, folder, resume, print_config, accept_changes, export)


def rl(
    arguments: Arguments = None,
    algorithm: Annotated[Literal["grpo", "ppo"], typer.Option(help="Groups of answers, or a value model.")] = "grpo",
    folder: Folder = None,
    resume: Resume = False,
    print_config: PrintConfig = False,
    accept_changes: AcceptChanges = False,
    export: Export = True,
) -> None:
    """Learn from answers that verifiers check.

    \b
    resilin rl examples/grpo.toml
    resilin rl examples/ppo.toml --algorithm ppo
    """
    _stage(GRPO if algorithm == "grpo" else PPO, arguments, folder, resume, print_config, accept_changes, export)
