"""`resilin rl` from a settings file to rewards: every kind of verifier, a judge that dies, a reward model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from resilin.checkpoint.folder import CheckpointFolder
from resilin.cli.main import app
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.huggingface import save_pretrained
from resilin.models.settings import ModelContext
from resilin.models.weight_files import ModelFolderError
from resilin.posttrain.verifiers.verifier import VerifierError

from ..teacher.conftest import Server, completion, send

SETTINGS = """
name = "rl"
[source]
samples_per_prompt = 2
updates = 1
max_new_tokens = 4
non_stop_penalty = "verifier"
prompts = { paths = ["prompts.jsonl"], tokenizer = "base", held_out = { fraction = 0.0 } }
[model]
path = "base"
[objective]
beta = 0.0
[optimizer]
lr = 0.01
[evaluation]
every = 0
[precision]
compute = "fp32"
[log]
live = false
tensorboard = false
[train]
steps = 1
batch_size = 4
micro_batch_size = 4
device = "cpu"
threads = 1
"""


def call(*arguments: str) -> str:
    result = CliRunner().invoke(app, [*arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def saved_with_tokenizer(model: Decoder, folder: Path) -> None:
    from resilin.data.train_tokenizer import byte_tokenizer

    save_pretrained(model, folder)
    byte_tokenizer().save(folder)


def decoder(**changes: Any) -> Decoder:
    from resilin.data.train_tokenizer import byte_tokenizer

    settings = {"hidden_size": 16, "layers": 1, "heads": 2, "max_positions": 128, "init_std": 0.3, **changes}
    return DecoderSettings(**settings).build(ModelContext(0, byte_tokenizer().vocab_size))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with settings and a model that always writes ones: so what it is given can be foretold."""
    from resilin.data.train_tokenizer import byte_tokenizer

    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # as the command itself does
    model = decoder(tie_embeddings=False)
    with torch.no_grad():
        model.embed.weight.fill_(1.0)
        model.blocks[0].attention.o.weight.zero_()
        model.blocks[0].mlp.down.weight.zero_()
        model.head.weight.zero_()
        model.head.weight[byte_tokenizer().encode("1")[0]] = 4.0
    saved_with_tokenizer(model, tmp_path / "base")
    return tmp_path


def write(place: Path, dataset: Any, truth: Any, more: str = "") -> None:
    rows = [{"prompt": f"{n}+{n}=", "ground_truth": truth, "dataset": dataset} for n in range(8)]
    (place / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (place / "rl.toml").write_text(SETTINGS + more)


def logged(place: Path, name: str = "rl") -> list[dict[str, Any]]:
    lines = (place / f"runs/{name}/events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == "step"]


def verified(place: Path) -> float:
    (step,) = logged(place)
    assert step["logs"]["score"] == pytest.approx(10 * step["logs"]["verified"])
    return float(step["logs"]["verified"])


def test_known_verifiers_are_reached_by_the_names_that_rows_give(place: Path) -> None:
    write(place, ["gsm8k", "string_f1", "max_length"], ["1111", "nothing", 4])
    call("rl", "rl.toml")
    assert verified(place) == pytest.approx(2.0)  # right, not at all, just as long


def test_an_entry_brings_options_and_a_weight(place: Path) -> None:
    table = """
[source.verifiers]
known = false
[source.verifiers.verifiers.brief]
use = "resilin.posttrain.verifiers.length:UpToLength"
weight = 0.25
"""
    write(place, "brief", 100, table)
    call("rl", "rl.toml")
    assert verified(place) == pytest.approx(0.25)
    call("rl", "rl.toml", "source.verifiers.verifiers.brief.weight=0.5", "--folder", "runs/again")
    assert logged(place, "again")[0]["logs"]["verified"] == pytest.approx(0.5)


def test_a_users_own_verifier_is_found_by_its_import_path(place: Path) -> None:
    (place / "my_rules.py").write_text(
        "from resilin.posttrain.verifiers.verifier import Answer, Verifier\n\n\n"
        "class Counts(Verifier):\n"
        "    letter: str = 'a'\n\n"
        "    def score(self, answer: Answer) -> float:\n"
        "        with open('asked.txt', 'a') as file:\n"
        "            file.write(f'{answer.query}|{answer.text}|{answer.label}|{len(answer.token_ids)}\\n')\n"
        "        return answer.text.count(self.letter) / 8\n"
    )
    write(place, "mine", "x", '[source.verifiers.verifiers.mine]\nuse = "my_rules:Counts"\nletter = "1"\n')
    call("rl", "rl.toml")
    assert verified(place) == pytest.approx(0.5)
    asked = (place / "asked.txt").read_text().splitlines()
    assert len(asked) == 4
    assert all(line.endswith("=|1111|x|4") for line in asked)


def test_programs_run_only_where_that_is_allowed(place: Path) -> None:
    write(place, "code", ["assert True", "assert False", "assert 1 == 1", "assert __name__"])
    with pytest.raises(VerifierError, match="execute = true"):
        call("rl", "rl.toml")
    assert not list((place / "runs/rl/checkpoints").glob("step*"))
    with (place / "rl.toml").open("a") as file:
        file.write('[source.verifiers.verifiers.code]\nuse = "resilin.posttrain.verifiers.code:Code"\nexecute = true\n')
    call("rl", "rl.toml", "--folder", "runs/allowed")
    assert logged(place, "allowed")[0]["logs"]["verified"] == pytest.approx(0.75)


def test_a_row_with_an_unknown_verifier_is_refused_before_anything_is_written(place: Path) -> None:
    write(place, "gsm9k", "1")
    with pytest.raises(VerifierError, match=r"prompt row 0: no verifier is called 'gsm9k'; did you mean 'gsm8k'\?"):
        call("rl", "rl.toml")
    assert not list((place / "runs/rl/checkpoints").glob("step*"))
    assert not (place / "runs/rl/events.jsonl").exists() or not logged(place)


@pytest.fixture
def judge() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def judged(server: Server, tries: int = 1, cache: str = "replies.jsonl") -> str:
    return f"""
[source.verifiers.verifiers.judge]
use = "resilin.posttrain.verifiers.judged:Judged"
teacher = {{ base_url = "{server.url}", model = "judge", tries = {tries}, max_concurrency = 1, cache = "{cache}" }}
"""


Reply = Callable[[Server, BaseHTTPRequestHandler, dict[str, Any]], None]


def rating(of: Callable[[str], int]) -> Reply:
    """A judge who rates what stands under '## Answer'."""

    def respond(server: Server, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        said = body["messages"][-1]["content"].split("## Answer\n")[1].split("\n\n## Your rating")[0]
        send(handler, completion(f"I see.\nRating: {of(said)}"))

    return respond


def test_a_judge_behind_an_endpoint_rates_answers_against_the_reference(place: Path, judge: Server) -> None:
    judge.respond = rating(len)
    write(place, "judge", "a good sum", judged(judge))
    call("rl", "rl.toml")
    assert verified(place) == pytest.approx(0.4)
    asked = judge.asked[0]["messages"][-1]["content"]
    assert "## Reference\na good sum\n" in asked
    assert "## Answer\n1111\n" in asked
    # Equal answers to one prompt are one question: two prompts were asked about.
    assert len(judge.asked) == 2


def test_a_judge_that_dies_half_way_costs_nothing(place: Path, judge: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_with_tokenizer(decoder(tie_embeddings=True), place / "base")  # writes anything
    likes = rating(lambda said: sum(map(ord, said)) % 11)
    judge.respond = likes
    wanted = ["train.steps=4", "source.prompts.epochs=4", "source.verifiers.verifiers.judge.teacher.cache"]
    write(place, "judge", "any", judged(judge))
    call("rl", "rl.toml", *wanted[:2], f"{wanted[2]}=whole.jsonl", "--folder", "runs/whole")
    calls = len(judge.asked)
    assert calls > 12

    judge.asked.clear()

    def until_it_dies(server: Server, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        if len(server.asked) > 10:  # in the third of four steps
            send(handler, {"error": "out of memory"}, status=500)
        else:
            likes(server, handler, body)

    judge.respond = until_it_dies
    with pytest.raises(VerifierError, match=r"the judge gave no verdict: .*status 500"):
        call("rl", "rl.toml", *wanted[:2])
    assert CheckpointFolder(place / "runs/rl/checkpoints").latest() == 2
    answered = {json.dumps(body["messages"]) for body in judge.asked[:10]}

    judge.asked.clear()
    judge.respond = likes
    monkeypatch.setattr("resilin.posttrain.verifiers.judged._teachers", {})  # as in a new process: from the file
    call("rl", "rl.toml", *wanted[:2], "--resume")
    assert not answered & {json.dumps(body["messages"]) for body in judge.asked}
    assert len(judge.asked) == calls - 10
    one, other = (load_file(place / f"runs/{name}/model/model.safetensors") for name in ("whole", "rl"))
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def test_a_judge_that_dies_in_an_evaluation_costs_no_step(place: Path, judge: Server) -> None:
    write(place, "judge", "any", judged(judge))
    held_out = [{"prompt": f"{n}-{n}=", "ground_truth": "any", "dataset": "judge"} for n in range(4)]
    (place / "held_out.jsonl").write_text("\n".join(json.dumps(row) for row in held_out))

    def only_sums(server: Server, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        if "-" in body["messages"][-1]["content"].split("## Reference")[0].split("## What was asked")[1]:
            send(handler, {"error": "busy"}, status=503)
        else:
            rating(len)(server, handler, body)

    judge.respond = only_sums
    options = ["train.steps=5", "evaluation.every=3", "source.prompts.validation_paths=['held_out.jsonl']"]
    with pytest.raises(VerifierError, match=r"the judge gave no verdict: .*status 503"):
        call("rl", "rl.toml", *options)
    assert CheckpointFolder(place / "runs/rl/checkpoints").latest() == 3
    judge.respond = rating(len)
    call("rl", "rl.toml", *options, "--resume")
    assert CheckpointFolder(place / "runs/rl/checkpoints").latest() == 5


def test_a_reward_model_is_added_to_the_verifiers_reward(place: Path) -> None:
    from resilin.posttrain.reward_model import load_reward_model

    pairs = [{"prompt": f"{n}+{n}=", "chosen": "1111", "rejected": "no"} for n in range(8)]
    (place / "pairs.jsonl").write_text("\n".join(json.dumps(pair) for pair in pairs))
    saved_with_tokenizer(decoder(tie_embeddings=True), place / "small")
    common = ["precision.compute=fp32", "log.live=false", "log.tensorboard=false", "train.device=cpu"]
    common += [
        "train.threads=1",
        "train.steps=3",
        "train.batch_size=4",
        "train.micro_batch_size=4",
        "evaluation.every=0",
        "optimizer.lr=0.01",
    ]
    rows = ["source.paths=['pairs.jsonl']", "source.tokenizer=small", "source.held_out.fraction=0.0"]
    call("reward", "model.model.path=small", *rows, *common)
    write(place, "gsm8k", "1111")
    added = ["source.reward_model=runs/reward/model", "source.reward_model_multiplier=-3.0"]
    call("rl", "rl.toml", *added)
    logs = logged(place)[0]["logs"]
    assert logs["score"] == pytest.approx(10 * logs["verified"] - 3 * logs["reward_model"])
    model = load_reward_model(place / "runs/reward/model")
    from resilin.data.tokenizer import Tokenizer

    words = Tokenizer.load(place / "small")
    with torch.no_grad():  # ones that did not end are judged at their last token
        judged = [float(model(torch.tensor([words.encode(f"{n}+{n}=1111")]))[0, -1]) for n in range(8)]
    assert min(judged) - 1e-5 <= logs["reward_model"] <= max(judged) + 1e-5
    assert abs(logs["reward_model"]) > 1e-3
    # Without a row's truth, only the reward model says what an answer is worth.
    (place / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"{n}+{n}="}) for n in range(8)))
    call("rl", "rl.toml", *added, "source.prompts.needs_truth=false", "--folder", "runs/liked")
    logs = logged(place, "liked")[0]["logs"]
    assert logs["verified"] == 0
    assert logs["score"] == pytest.approx(-3 * logs["reward_model"])
    with pytest.raises(ValueError, match="nothing rewards answers"):
        call("rl", "rl.toml", "source.prompts.needs_truth=false", "--folder", "runs/nothing")


def test_what_is_no_reward_model_is_refused_before_training(place: Path) -> None:
    write(place, "gsm8k", "1111")
    options = ["source.reward_model=base", "source.reward_model_multiplier=1.0"]
    with pytest.raises(ModelFolderError, match="base: holds no reward model"):
        call("rl", "rl.toml", *options)
    with pytest.raises(ValueError, match="reward_model_multiplier needs reward_model"):
        call("rl", "rl.toml", "source.reward_model_multiplier=1.0")
    call("rl", "rl.toml", options[0], "--folder", "runs/off")  # 0: never opened
    from resilin.posttrain.reward_model import RewardModel, save_reward_model

    save_reward_model(RewardModel(decoder()), place / "bare")
    with pytest.raises(ModelFolderError, match=r"bare: holds a reward model but no tokenizer\.json"):
        call("rl", "rl.toml", "source.reward_model=bare", options[1], "--folder", "runs/bare")
    call(
        "rl", "rl.toml", "source.reward_model=bare", options[1], "source.reward_model_tokenizer=base",
        "--folder", "runs/given",
    )  # fmt: skip


def test_a_stop_string_ends_answers_of_a_run(place: Path) -> None:
    write(place, "string_f1", "11")
    call("rl", "rl.toml", "source.stop=['11']", "source.non_stop_penalty=-10.0")
    logs = logged(place)[0]["logs"]
    assert (logs["verified"], logs["length"], logs["stopped"]) == (1.0, 2.0, 1.0)
