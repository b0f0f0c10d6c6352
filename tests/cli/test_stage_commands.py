from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from resilin.cli.main import app
from resilin.config import UserError, parse_settings
from resilin.config.load import merge, read_toml
from resilin.run.settings import RunSettings

SAID = {"role": "assistant", "content": "5"}
TALK = [{"role": "user", "content": "2+3"}, SAID]
EXAMPLES = Path(__file__).parents[2] / "examples"
COMMON = ["log.live=false", "log.tensorboard=false", "train.device=cpu", "train.threads=1", "precision.compute=fp32"]
COMMON += ["evaluation.every=0", "train.steps=2", "train.batch_size=4", "train.micro_batch_size=2"]


def call(*arguments: str) -> str:
    result = CliRunner().invoke(app, [*arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from resilin.data.train_tokenizer import byte_tokenizer
    from resilin.models.decoder_settings import DecoderSettings
    from resilin.models.huggingface import save_pretrained
    from resilin.models.settings import ModelContext

    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    tokenizer = byte_tokenizer()
    settings = DecoderSettings(hidden_size=16, layers=1, heads=2, tie_embeddings=True, max_positions=128)
    save_pretrained(settings.build(ModelContext(0, tokenizer.vocab_size)), tmp_path / "base")
    tokenizer.save(tmp_path / "base")
    ask = [{"role": "user", "content": "2+3"}]
    say = [[{"role": "assistant", "content": text}] for text in ("5", "it is 6")]
    files: dict[str, list[dict[str, Any]]] = {
        "chats": [{"messages": [*ask, *say[n % 2]]} for n in range(12)],
        "pairs": [{"prompt": ask, "chosen": say[0], "rejected": say[1], "n": n} for n in range(8)],
        "prompts": [{"messages": ask, "ground_truth": "5", "dataset": "gsm8k", "n": n} for n in range(8)],
    }
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path


def test_four_stages_one_from_the_other(place: Path) -> None:
    no_split = ["source.held_out.fraction=0.0"]
    tokens = ["source.sequence_length=64", *no_split]
    out = call("sft", "source.paths=['chats.jsonl']", "source.tokenizer.path=base", "model.path=base", *tokens, *COMMON)
    assert "runs/sft/model" in out
    pairs = ["source.paths=['pairs.jsonl']", "source.tokenizer=runs/sft/model", *tokens, *COMMON]
    call("reward", "model.model.path=runs/sft/model", *pairs)
    call("dpo", "model.path=runs/sft/model", *pairs)
    assert (place / "runs/dpo/reference.safetensors").is_file()
    prompts = ["source.prompts.paths=['prompts.jsonl']", "source.prompts.tokenizer=runs/dpo/model"]
    prompts += ["source.max_new_tokens=4", "source.prompts.held_out.fraction=0.0", *COMMON]
    call("rl", "model.path=runs/dpo/model", "source.samples_per_prompt=2", "--folder", "runs/grpo", *prompts)
    ppo = ["model.model.path=runs/dpo/model", "model.value.path=runs/reward/model", "--folder", "runs/ppo", *prompts]
    call("rl", "--algorithm", "ppo", *ppo)
    for name in ("sft", "dpo", "grpo", "ppo"):
        assert (place / f"runs/{name}/model/config.json").is_file(), name
    assert (place / "runs/reward/model/reward_head.safetensors").is_file()


def refused(*arguments: str) -> str:
    """What a command tells that ends with something the user can mend."""
    result = CliRunner().invoke(app, [*arguments])
    assert isinstance(result.exception, UserError), result.output
    return str(result.exception)


def test_a_pair_without_its_rejected_answer_is_told_and_mending_it_is_enough(place: Path) -> None:
    rows = [json.loads(line) for line in (place / "pairs.jsonl").read_text().splitlines()]
    broken = [{key: value for key, value in row.items() if key != "rejected" or row["n"] != 5} for row in rows]
    (place / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in broken))
    command = ["dpo", "model.path=base", "source.paths=['pairs.jsonl']", "source.tokenizer=base"]
    command += ["source.sequence_length=64", "source.held_out.fraction=0.0", *COMMON]
    told = refused(*command)
    assert (
        "pairs.jsonl, line 6: the rejected answer is missing (column 'rejected'; columns here: chosen, n, prompt)"
        in told
    )
    assert "mend or leave out the row" in told
    assert not list(place.glob("runs/dpo/checkpoints/step-*"))
    (place / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    call(*command)
    assert (place / "runs/dpo/model/config.json").is_file()


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "loses its text '5'"),
        ("{% for m in messages %}{{ m.role + m.content }}{% endfor %}{{ messages | length }}", "changes earlier turns"),
        ("{{ messages[0].nothing.at.all }}", "the chat template fails on this conversation"),
        ("{% for m in messages %}{{ m.content[:0] }}{% endfor %}", "loses its text '2+3'"),
        ("{% for %}", "is not valid Jinja"),
    ],
)
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_template_that_loses_what_was_said_is_told_before_training(
    place: Path, stage: str, template: str, says: str
) -> None:
    (place / "t.jinja").write_text(template)
    (place / "chats.jsonl").write_text(
        "\n".join(json.dumps({"messages": [*TALK, {"role": "user", "content": "more"}, SAID]}) for _ in range(4))
    )
    settings = ["model.path=base", "source.chat_template=t.jinja", "source.sequence_length=64", *COMMON]
    if stage == "sft":
        told = refused("sft", "source.paths=['chats.jsonl']", "source.tokenizer.path=base", *settings)
        assert "chats.jsonl" in told
    else:
        told = refused("dpo", "source.paths=['pairs.jsonl']", "source.tokenizer=base", *settings)
        assert "pairs.jsonl, line 1" in told or "not valid Jinja" in told
        if "changes earlier turns" in says:
            return
    assert says in told
    assert not list(place.glob("runs/*/checkpoints/step-*"))


@pytest.mark.parametrize("name", ["sft", "dpo", "grpo", "ppo"])
def test_the_examples_are_settings(name: str) -> None:
    from resilin.cli import stages

    defaults = getattr(stages, name.upper())
    settings = parse_settings(RunSettings, merge(defaults, read_toml(EXAMPLES / f"{name}.toml")), name)
    again = parse_settings(RunSettings, settings.model_dump(mode="json"), "again")
    assert again == settings


def adapted(method: str = "miss", **more: str) -> list[str]:
    given = {"use": "resilin.adapt.adapted:Adapted", "model.path": "base", "adapters.default.method": method}
    given |= {"adapters.default.rank": "4", **more}
    return [f"model.{name}={value}" for name, value in given.items() if value]


def test_an_adapter_goes_from_stage_to_stage(place: Path) -> None:
    """SFT with an adapter, DPO from it in both ways, shown, saved, merged: the same numbers each time."""
    from resilin.models.huggingface import load_pretrained

    data = ["source.sequence_length=64", "source.held_out.fraction=0.0"]
    sft = ["source.paths=['chats.jsonl']", "source.tokenizer.path=base", *data, *COMMON, "optimizer.lr=0.01"]
    out = call("sft", *sft, *adapted())
    assert "the adapter is in runs/sft/adapter" in out
    assert "resilin generate runs/sft --prompt" in out  # this tokenizer has no form for conversations
    assert "the model is in runs/sft/model" in out
    assert json.loads(Path("runs/sft/adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        place / "base"
    )
    call("adapter", "save", "runs/sft", "saved")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (place / "saved" / file).read_bytes() == (place / "runs/sft/adapter" / file).read_bytes()
    merged = call("adapter", "merge", "base", "runs/sft/adapter", "merged")
    assert "the same weights and logits" in merged
    one, other = load_pretrained("merged").state_dict(), load_pretrained("runs/sft/model").state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)

    pairs = ["source.paths=['pairs.jsonl']", "source.tokenizer=base", *data, *COMMON, "optimizer.lr=0.01"]
    old = {"adapters.default.method": "", "adapters.default.rank": "", "load.default": "runs/sft/adapter"}
    path = place / "runs/sft/tokenizer/tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": "{{ messages }}"}))
    assert "resilin generate runs/sft --chat -p '...'" in call("inspect", "runs/sft")
    call("dpo", *pairs, *adapted(**old), "--folder", "runs/further")
    beside = {"load.sft": "runs/sft/adapter", "frozen": "['sft']"}
    call("dpo", *pairs, *adapted(**beside), "objective.reference=adapters_off", "--folder", "runs/beside")
    for run in ("further", "beside"):
        first = [json.loads(line) for line in Path(f"runs/{run}/events.jsonl").read_text().splitlines()]
        losses = [event["loss"] for event in first if event.get("step") == 1 and "loss" in event]
        assert losses[0] == pytest.approx(0.6931, abs=1e-4), run  # policy and reference are the same at first
    shown = call("adapter", "show", "runs/beside")
    assert "in use   yes" in shown
    assert "trained  no" in shown
    assert shown.count("o, q") <= 2
    assert not (place / "runs/beside/adapter/sft").exists()
    with pytest.raises(UserError, match=r"'default' was loaded with values and is trained further"):
        call("dpo", *pairs, *adapted(**old), "objective.reference=adapters_off", "--folder", "runs/wrong")
    with pytest.raises(UserError, match=r"runs/sft: is not a PEFT folder.*it is a run.*adapter save runs/sft"):
        call("dpo", *pairs, *adapted(**{**old, "load.default": "runs/sft"}), "--folder", "runs/run")


def test_what_peft_lacks_is_said_and_the_merged_model_is_there(place: Path) -> None:
    data = ["source.sequence_length=64", "source.held_out.fraction=0.0"]
    out = call("sft", "source.paths=['chats.jsonl']", "source.tokenizer.path=base", *data, *COMMON, *adapted("bat_row"))
    assert "note: the adapter was not written as a PEFT folder: PEFT has no bat_row" in out
    assert (place / "runs/sft/model/config.json").is_file()
    assert not (place / "runs/sft/adapter").exists()


def stage_tree(*arguments: str) -> RunSettings:
    from resilin.cli.arguments import split_settings
    from resilin.cli.stages import SFT, stage_settings

    return stage_settings(SFT, *split_settings(["source.paths=['chats.jsonl']", *arguments]))


def test_the_stages_own_settings_give_way_where_they_would_not_fit() -> None:
    from resilin.cli import stages

    plain = stage_tree("model.path=base")
    assert (plain.train.steps, plain.source.epochs) == (0, 2)
    assert (plain.train.batch_size, plain.train.micro_batch_size) == (128, 8)
    few = stage_tree("model.path=base", "train.batch_size=4", "train.steps=40")
    assert (few.train.steps, few.source.epochs, few.train.micro_batch_size) == (40, None, 4)
    both = stage_tree("model.path=base", "train.steps=40", "source.epochs=3", "train.micro_batch_size=2")
    assert (both.source.epochs, both.train.micro_batch_size) == (3, 2)
    wrapped = stage_tree("model.use=resilin.adapt.adapted:Adapted", "model.model.path=base")
    assert str(wrapped.model.model.path) == "base"
    scratch = stage_tree("model.use=resilin.models.decoder_settings:DecoderSettings", "model.layers=2")
    assert scratch.model.layers == 2
    assert stages.SFT["train"] == {"steps": 0, "batch_size": 128, "micro_batch_size": 8}  # nothing leaked into it


def test_a_stage_without_steps_takes_those_of_its_epochs_and_its_schedule_ends_there(place: Path) -> None:
    data = ["source.paths=['chats.jsonl']", "source.tokenizer.path=base", "source.sequence_length=64"]
    data += ["source.packing=pad", "source.held_out.fraction=0.0", "model.path=base", *COMMON, "train.steps=0"]
    shown = call("inspect", "--stage", "sft", *_as_file(place, data))
    assert "6, with which the source ends" in shown
    call("sft", *data)
    events = [json.loads(line) for line in Path("runs/sft/events.jsonl").read_text().splitlines()]
    rates = [event["lr"] for event in events if "lr" in event]
    assert len(rates) == 6  # 12 conversations, twice, 4 at a time
    assert rates[-1] < rates[0] / 3
    uses = ["source.use=resilin.data.chat_source:ChatSource", "model.use=resilin.models.pretrained:Pretrained"]
    with pytest.raises(UserError, match=r"train\.steps = 0 .*does not end"):
        call("train", *data, *uses, "--folder", "runs/endless")


def _as_file(place: Path, overrides: list[str], name: str = "s.toml") -> list[str]:
    """Settings as a file, which `inspect` needs."""
    given = dict(override.split("=", 1) for override in overrides)
    as_is = re.compile(r"\[.*|\d.*|true|false")
    plain = {key: value if as_is.fullmatch(value) else json.dumps(value) for key, value in given.items()}
    (place / name).write_text("\n".join(f"{key} = {value}" for key, value in plain.items()))
    return [name]


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_the_examples_for_smollm2_are_settings_and_their_data_are_there(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from resilin.cli.stages import STAGES, stage_settings

    monkeypatch.chdir(EXAMPLES.parent)
    settings = stage_settings(STAGES[name], EXAMPLES / "smollm2" / f"{name}.toml", [])
    assert settings.train.steps
    rows = [json.loads(line) for line in Path(settings.source.paths[0]).read_text().splitlines()]
    assert len(rows) == {"sft": 36, "dpo": 24}[name]


def test_a_setting_in_the_file_or_an_override_wins() -> None:
    out = call("dpo", str(EXAMPLES / "dpo.toml"), "objective.loss=simpo", "--print-config")
    assert 'loss = "simpo"' in out
    assert "lr = 1e-06" in out
    assert "warmup = 0.1" in out
