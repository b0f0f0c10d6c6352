from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from resilin.cli.main import app
from resilin.config import parse_settings
from resilin.config.errors import UserError
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


def test_a_setting_in_the_file_or_an_override_wins() -> None:
    out = call("dpo", str(EXAMPLES / "dpo.toml"), "objective.loss=simpo", "--print-config")
    assert 'loss = "simpo"' in out
    assert "lr = 1e-06" in out
    assert "warmup = 0.1" in out
