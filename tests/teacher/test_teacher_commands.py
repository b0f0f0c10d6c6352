"""`resilin data complete | synthesize | respond | judge` against a real server, which also behaves badly."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from resilin.cli.main import main
from resilin.data.preference_rows import read_preference
from resilin.data.row_files import read_rows, write_rows
from resilin.posttrain.evaluations import answers

from .conftest import Server, completion, half_an_answer, send

Respond = Callable[[Server, BaseHTTPRequestHandler, dict[str, Any]], None]


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


@pytest.fixture
def resilin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """`resilin ARGUMENTS` through its real entry point, in a folder of its own; without a command it is `data`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> Done:
        out, err, code = io.StringIO(), io.StringIO(), 0
        command = [] if arguments[0] == "evaluate" else ["data"]
        monkeypatch.setattr(sys, "argv", ["resilin", *command, *map(str, arguments)])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as end:
                code = int(end.code or 0)
        return Done(code, out.getvalue(), err.getvalue())

    return run


def teacher(server: Server, path: str = "teacher.toml", **settings: Any) -> str:
    given = {"base_url": server.url, "model": "big", "first_wait": 0.01, "longest_wait": 0.05, "seconds": 5.0}
    lines = [f"{key} = {json.dumps(value)}" for key, value in {**given, "cache": "cache.jsonl", **settings}.items()]
    Path(path).write_text("\n".join(lines) + "\n")
    return path


def asked(body: dict[str, Any]) -> str:
    return str(body["messages"][-1]["content"])


def answer(server: Server, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    send(handler, completion(*(f"The answer to {asked(body)} is {n}." for n in range(body["n"]))))


def rows(path: str) -> list[dict[str, Any]]:
    return [row.value for row in read_rows([path])]


def said(path: str) -> list[str]:
    return [row["messages"][-1]["content"] for row in rows(path)]


def reset(handler: BaseHTTPRequestHandler) -> None:
    """Half a body, and then the connection is not closed but reset."""
    half_an_answer(handler)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def drip(handler: BaseHTTPRequestHandler) -> None:
    """A body without end, a byte now and then."""
    handler.send_response(200)
    handler.end_headers()
    while True:  # until the client has gone
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.02)


def save_tiny(seed: int) -> None:
    """A tiny random model as the folder `mine`."""
    import torch

    from resilin.data.train_tokenizer import byte_tokenizer
    from resilin.models.decoder_settings import DecoderSettings
    from resilin.models.huggingface import save_pretrained
    from resilin.models.settings import ModelContext

    torch.set_num_threads(1)
    settings = DecoderSettings(hidden_size=16, layers=1, heads=2, max_positions=96, init_std=0.4)
    save_pretrained(settings.build(ModelContext(seed, byte_tokenizer().vocab_size)), Path("mine"))
    byte_tokenizer().save(Path("mine"))


MISBEHAVIOUR: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {
    "nonsense JSON": lambda handler: send(handler, b'{"choices": [{"mess'),
    "no choices": lambda handler: send(handler, {"choices": []}),
    "HTML instead of JSON": lambda handler: send(handler, b"<html><body>Welcome</body></html>"),
    "HTML error page": lambda handler: send(handler, b"<html>502 Bad Gateway</html>", 502),
    "reset in the middle of the body": reset,
    "too many requests": lambda handler: send(handler, {"error": "slow down"}, 429, Retry_After="0.02"),
    "a body without end": drip,
    "a null for an answer": lambda handler: send(handler, {"choices": [{"message": {"content": None}}]}),
}


@pytest.mark.parametrize("how", MISBEHAVIOUR)
def test_an_endpoint_that_misbehaves_at_first_is_asked_again_and_nothing_is_lost(
    how: str, server: Server, resilin: Callable[..., Done]
) -> None:
    write_rows(Path("p.jsonl"), [{"prompt": f"q{n}"} for n in range(6)])
    begun: set[str] = set()

    def at_first(server: Server, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        if asked(body) not in begun and asked(body) in ("q1", "q4"):
            begun.add(asked(body))
            MISBEHAVIOUR[how](handler)
        else:
            answer(server, handler, body)

    server.respond = at_first
    done = resilin("complete", "p.jsonl", "-o", "o.jsonl", "--teacher", teacher(server, seconds=0.5))
    assert done.code == 0, done.err
    assert said("o.jsonl") == [f"The answer to q{n} is 0." for n in range(6)]
    assert len(server.asked) == 8


@pytest.mark.parametrize("how", MISBEHAVIOUR)
def test_an_endpoint_that_goes_on_misbehaving_costs_only_those_rows_and_is_told(
    how: str, server: Server, resilin: Callable[..., Done]
) -> None:
    write_rows(Path("p.jsonl"), [{"prompt": f"q{n}"} for n in range(5)])

    def always(server: Server, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        MISBEHAVIOUR[how](handler) if asked(body) == "q2" else answer(server, handler, body)

    server.respond = always
    command = ("complete", "p.jsonl", "-o", "o.jsonl", "--teacher", teacher(server, tries=2, seconds=0.3))
    done = resilin(*command)
    assert done.code == 1
    assert "p.jsonl, line 3: " in done.err
    assert "(tried 2 times)" in done.err
    assert "1 could not be had: the same command asks for these alone" in done.err
    assert "Traceback" not in done.err
    assert said("o.jsonl") == [f"The answer to q{n} is 0." for n in (0, 1, 3, 4)]
    (failure,) = rows("cache.failures.jsonl")
    assert failure["tag"] == "p.jsonl, line 3"
    server.respond, before = answer, len(server.asked)
    assert resilin(*command).code == 0
    assert len(server.asked) == before + 1
    assert said("o.jsonl") == [f"The answer to q{n} is 0." for n in range(5)]


def test_an_endpoint_that_dies_half_way_leaves_what_it_gave_and_another_goes_on(
    server: Server, resilin: Callable[..., Done]
) -> None:
    write_rows(Path("p.jsonl"), [{"prompt": f"q{n}"} for n in range(8)])

    def dies(server: Server, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        if len(server.asked) > 3:
            handler.connection.close()
        else:
            answer(server, handler, body)

    server.respond = dies
    done = resilin("complete", "p.jsonl", "-o", "o.jsonl", "--teacher", teacher(server, tries=2, max_concurrency=1))
    assert done.code == 1
    assert len(said("o.jsonl")) == 3
    assert "... and" not in done.err  # five failures are shown
    assert "5 could not be had" in done.err
    other = Server()
    other.respond = answer
    again = resilin("complete", "p.jsonl", "-o", "o.jsonl", "--teacher", teacher(other))
    other.close()
    assert again.code == 0, again.err
    assert sorted(asked(body) for body in other.asked) == [f"q{n}" for n in range(3, 8)]
    assert said("o.jsonl") == [f"The answer to q{n} is 0." for n in range(8)]


def test_no_answer_at_all_leaves_an_earlier_file_as_it_is(server: Server, resilin: Callable[..., Done]) -> None:
    write_rows(Path("p.jsonl"), [{"prompt": f"q{n}"} for n in range(9)])
    Path("o.jsonl").write_text('{"earlier": 1}\n')
    server.respond = lambda server, handler, body: send(handler, {"error": "down"}, 503)
    done = resilin("complete", "p.jsonl", "-o", "o.jsonl", "--teacher", teacher(server, tries=1))
    assert done.code == 2
    assert "o.jsonl: not written: there is not one row" in done.err
    assert "9 could not be had" in done.err
    assert "... and 4 more" in done.err
    assert Path("o.jsonl").read_text() == '{"earlier": 1}\n'


def test_a_redirection_is_not_followed_and_the_key_stays_here(
    server: Server, resilin: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    write_rows(Path("p.jsonl"), [{"prompt": "q"}])
    other = Server()
    server.respond = lambda server, handler, body: send(handler, b"", 307, Location=f"{other.url}/chat/completions")
    done = resilin("complete", "p.jsonl", "-o", "o.jsonl", "--teacher", teacher(server))
    other.close()
    assert other.asked == []
    assert done.code == 2
    assert "status 307" in done.err
    server.respond = lambda server, handler, body: send(handler, {"error": "bad key sk-very-secret"}, 401)
    done = resilin("complete", "p.jsonl", "-o", "o.jsonl", "--teacher", teacher(server))
    assert "is the key right?" in done.err
    kept = "".join(path.read_text() for path in Path().iterdir())
    assert "very-secret" not in done.err + done.out + kept


def test_a_killed_command_asks_only_for_what_it_had_not(server: Server, resilin: Callable[..., Done]) -> None:
    write_rows(Path("p.jsonl"), [{"prompt": f"q{n}"} for n in range(6)])

    def stuck(server: Server, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        if len(server.asked) > 3:
            time.sleep(60)
        answer(server, handler, body)

    server.respond = stuck
    path = teacher(server, max_concurrency=1, seconds=100.0)
    command = ["complete", "p.jsonl", "-o", "o.jsonl", "--teacher", path]
    child = subprocess.Popen([sys.executable, "-m", "resilin", "data", *command], env={**os.environ})
    ends = time.monotonic() + 200
    while len(server.asked) < 4 and time.monotonic() < ends:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not Path("o.jsonl").exists()
    server.respond, before = answer, len(server.asked)
    assert resilin(*command).code == 0
    assert len(server.asked) == before + 3
    assert len(said("o.jsonl")) == 6


def test_a_dry_run_says_what_it_would_cost_and_asks_nothing(server: Server, resilin: Callable[..., Done]) -> None:
    write_rows(Path("p.jsonl"), [{"prompt": "x" * 400}] * 2 + [{"prompt": "y"}])
    Path("personas.txt").write_text("a nurse\na cook\n")
    Path("tasks.toml").write_text(
        '[[tasks]]\nname = "t"\nprompt = "For {persona}"\nmax_task_tokens = 10\nmax_tokens = 50\n'
    )
    path = teacher(server)
    told = resilin("complete", "p.jsonl", "-o", "o.jsonl", "--teacher", path, "--max-tokens", 10, "--dry-run")
    assert told.out.startswith("2 calls for 3 requests (1 answers are cached)")
    assert "at most 20 to come back" in told.out
    told = resilin(
        "synthesize", "tasks.toml", "--personas", "personas.txt", "-o", "o.jsonl", "--teacher", path, "--dry-run"
    )
    assert re.search(
        r"tasks: 2 calls .* at most 20 to come back\nanswers: 2 calls .* at most 100 to come back", told.out
    )
    assert server.asked == []
    assert not Path("o.jsonl").exists()


# ---------------------------------------------------------------- synthesis


TASKS = """
[[tasks]]
name = "sums"
prompt = "A sum for {persona}."
starts_with = "Problem:"
verifier = "gsm8k"
votes = 3
[[tasks]]
name = "forms"
prompt = "A wish of {persona}; then: {constraint}"
constrained = true
constraints = [{ text = "Use no comma.", check = { func_name = "validate_no_commas" } }]
"""


def inventor(server: Server, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    """Invents sums and wishes; solves sums well twice of three times, and gives one vote a call."""
    text = asked(body)
    if text.startswith("A sum"):
        send(handler, completion(f"Problem: {text[10:-1]} has 3 nails and 4 more: how many?"))
    elif text.startswith("A wish"):
        send(handler, completion(f"Please help {text[10:].split(';')[0]} to rest."))
    elif text.endswith("how many?"):
        number = sum(asked(one) == text for one in server.asked)
        send(handler, completion(f"So {8 if number == 1 else 7}"))
    else:
        send(handler, completion("Rest, rest" if "smith" in text else "Rest now"))


def test_rows_for_skills_are_made_from_personas(server: Server, resilin: Callable[..., Done]) -> None:
    Path("tasks.toml").write_text(TASKS)
    Path("personas.txt").write_text("a smith\na cook\n")
    server.respond = inventor
    command = ("synthesize", "tasks.toml", "--personas", "personas.txt", "-o", "o.jsonl", "--teacher", teacher(server))
    done = resilin(*command)
    assert done.code == 0, done.err
    assert "o.jsonl: 3 rows for 2 personas; left out: 1 answer: does not follow the constraint" in done.out
    first, second, third = rows("o.jsonl")
    assert [first["ground_truth"], second["ground_truth"]] == ["7", "7"]
    assert first["messages"][1]["content"] == "So 7"
    assert first["messages"][0]["content"] == "a smith has 3 nails and 4 more: how many?"
    assert third["messages"][0]["content"] == "Please help a cook to rest. Use no comma."
    assert third["dataset"] == "ifeval"
    assert len(server.asked) == 4 + 2 * 3 + 2
    assert "(4 answers are cached)" in resilin(*command, "--dry-run").out
    before = Path("o.jsonl").read_bytes()
    assert resilin(*command).code == 0
    assert len(server.asked) == 12
    assert Path("o.jsonl").read_bytes() == before
    assert resilin(*command, "--limit", 1).out.startswith("o.jsonl: 1 rows for 1 personas")


# ---------------------------------------------------------------- from prompts to pairs


def several(server: Server, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    """Three models that write at different lengths, and a judge who likes length."""
    if body["model"] == "judge":
        texts = asked(body).split("### Text ")[1:]
        lengths = [len(text.split("\n\n")[0].split()) for text in texts]
        send(
            handler,
            completion("\n".join(f"Text {n}: {max(1, min(5, length - 3))}" for n, length in enumerate(lengths, 1))),
        )
    else:
        words = {"short": 2, "middle": 4, "long": 6}[body["model"]]
        send(handler, completion(*(f"{asked(body)} " + "word " * words for _ in range(body["n"]))))


def pool(server: Server, *others: str) -> str:
    ends = 'first_wait = 0.01\ntries = 2\ncache = "pool.jsonl"\n'
    models = [f'[models.{name}]\nbase_url = "{server.url}"\nmodel = "{name}"\n{ends}' for name in ("short", *others)]
    Path("pool.toml").write_text('own = "short"\ncount = 3\n' + "\n".join(models))
    return "pool.toml"


def test_prompts_become_pairs_by_two_commands(server: Server, resilin: Callable[..., Done]) -> None:
    write_rows(
        Path("p.jsonl"), [{"messages": [{"role": "user", "content": f"q{n}"}], "source": "mine"} for n in range(4)]
    )
    server.respond = several
    respond = ("respond", "p.jsonl", "-o", "answers.jsonl", "--pool", pool(server, "middle", "long"))
    assert "short: 4 calls for 4 requests" in resilin(*respond, "--dry-run").out
    done = resilin(*respond)
    assert done.code == 0, done.err
    assert {body["model"] for body in server.asked} == {"short", "middle", "long"}
    judge = ("judge", "answers.jsonl", "-o", "pairs.parquet", "--teacher", teacher(server, model="judge"))
    done = resilin(*judge, "--own-model", "short")
    assert done.code == 0, done.err
    assert "pairs.parquet: 4 pairs of 4 prompts" in done.out
    for row in read_rows(["pairs.parquet"]):
        pair = read_preference(row)
        assert row.value["chosen_model"] == "long"
        assert row.value["rejected_model"] in ("short", "middle")
        assert row.value["source"] == "mine"
        assert row.value["chosen_ratings"]["honesty"] == 5.0
        assert len(pair.chosen[0]["content"].split()) == 7  # type: ignore[index]


def test_a_model_in_this_process_answers_beside_others_and_is_kept_by_its_weights(
    server: Server, resilin: Callable[..., Done]
) -> None:
    save_tiny(0)
    write_rows(Path("p.jsonl"), [{"prompt": f"q{n}"} for n in range(3)])
    server.respond = several
    own = 'own = "mine"\ncount = 3\nmax_tokens = 5\n[models.mine]\npath = "mine"\ncache = "local.jsonl"\n'
    use = 'use = "resilin.posttrain.local_teacher:LocalTeacher"\n'
    Path("pool.toml").write_text(own + use + f'[models.short]\nbase_url = "{server.url}"\nmodel = "short"\n')
    command = ("respond", "p.jsonl", "-o", "a.jsonl", "--pool", "pool.toml")
    done = resilin(*command)
    assert done.code == 0, done.err
    first = rows("a.jsonl")
    assert [[one["model"] for one in row["responses"]] for row in first] == [["mine", "mine", "short"]] * 3
    assert resilin(*command).code == 0
    assert rows("a.jsonl") == first
    assert len(list(Path().glob("local-*.jsonl"))) == 1
    save_tiny(1)  # trained further: it answers anew
    assert resilin(*command).code == 0
    assert rows("a.jsonl") != first
    assert len(list(Path().glob("local-*.jsonl"))) == 2
    assert len(server.asked) == 3


def test_more_choices_than_were_asked_for_are_left_alone(server: Server, resilin: Callable[..., Done]) -> None:
    write_rows(Path("p.jsonl"), [{"prompt": "q"}])
    server.respond = lambda server, handler, body: send(handler, completion("first", "second", "third"))
    assert resilin("complete", "p.jsonl", "-o", "o.jsonl", "--teacher", teacher(server)).code == 0
    assert said("o.jsonl") == ["first"]
    assert len(rows("cache.jsonl")) == 1


def test_a_model_of_the_pool_that_is_down_is_told_and_asked_again_alone(
    server: Server, resilin: Callable[..., Done]
) -> None:
    write_rows(Path("p.jsonl"), [{"prompt": f"q{n}"} for n in range(3)])

    def one_down(server: Server, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        send(handler, {}, 500) if body["model"] == "long" else several(server, handler, body)

    server.respond = one_down
    command = ("respond", "p.jsonl", "-o", "a.jsonl", "--pool", pool(server, "middle", "long"))
    done = resilin(*command)
    assert done.code == 1
    assert "p.jsonl, line 1: long: status 500" in done.err
    assert [len(row["responses"]) for row in rows("a.jsonl")] == [2, 2, 2]
    server.respond, before = several, len(server.asked)
    assert resilin(*command).code == 0
    assert [body["model"] for body in server.asked[before:]] == ["long"] * 3
    assert [len(row["responses"]) for row in rows("a.jsonl")] == [3, 3, 3]


def test_a_judge_who_says_nonsense_costs_its_prompts_and_not_the_exit_code(
    server: Server, resilin: Callable[..., Done]
) -> None:
    write_rows(Path("r.jsonl"), [{"prompt": f"q{n}", "responses": ["a b", "a b c d e"]} for n in range(3)])

    def mumbles(server: Server, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        if "## What was asked\nq1\n" in asked(body):
            send(handler, completion("Both are lovely."))
        elif "## What was asked\nq2\n" in asked(body):
            send(handler, {}, 503)
        else:
            several(server, handler, body)

    server.respond = mumbles
    command = ("judge", "r.jsonl", "-o", "o.jsonl", "--teacher", teacher(server, model="judge", tries=1))
    done = resilin(*command)
    assert done.code == 1
    assert "o.jsonl: 1 pairs of 3 prompts; left out: 2 could not be judged" in done.out
    assert "r.jsonl, line 2: helpfulness: the judge rated the texts [] of 1 to 2: 'Both are lovely.'" in done.err
    assert "1 could not be had" in done.err
    server.respond = lambda server, handler, body: (
        several(server, handler, body) if "\nq2\n" in asked(body) else send(handler, completion("again?"))
    )
    done = resilin(*command)
    assert done.code == 0, done.err  # nothing is left to ask for: the nonsense was an answer
    assert "o.jsonl: 2 pairs of 3 prompts; left out: 1 could not be judged" in done.out


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "responses": ["a"]}, "r.jsonl, line 2: responses should be a list of at least two answers"),
        ({"prompt": "q"}, "r.jsonl, line 2: responses should be a list"),
        ({"responses": ["a", "b"]}, "r.jsonl, line 2: no prompt"),
    ],
)
def test_rows_that_cannot_be_judged_stop_before_anything_is_asked(
    row: dict[str, Any], message: str, server: Server, resilin: Callable[..., Done]
) -> None:
    write_rows(Path("r.jsonl"), [{"prompt": "q", "responses": ["a", "b"]}, row])
    done = resilin("judge", "r.jsonl", "-o", "o.jsonl", "--teacher", teacher(server))
    assert done.code == 2
    assert message in done.err
    assert server.asked == []


def test_settings_that_are_wrong_are_told_by_file_and_key(server: Server, resilin: Callable[..., Done]) -> None:
    write_rows(Path("p.jsonl"), [{"prompt": "q"}])
    Path("t.toml").write_text('base_url = "localhost"\nmodle = "x"\n')
    done = resilin("complete", "p.jsonl", "-o", "o.jsonl", "--teacher", "t.toml")
    assert done.code == 2
    assert "did you mean 'model'" in done.err
    Path("pool.toml").write_text('own = "me"\n[models.you]\nbase_url = "http://x/v1"\nmodel = "m"\n')
    done = resilin("respond", "p.jsonl", "-o", "o.jsonl", "--pool", "pool.toml")
    assert "own = 'me' is none of the models: you" in done.err
    Path("tasks.toml").write_text('[[tasks]]\nname = "t"\nprompt = "hello"\n')
    Path("p.txt").write_text("a nurse\n")
    done = resilin("synthesize", "tasks.toml", "--personas", "p.txt", "-o", "o.jsonl", "--teacher", teacher(server))
    assert "prompt should hold {persona}" in done.err


# ---------------------------------------------------------------- a suite with a judge


SUITE = """
[[evaluations]]
name = "wins"
skill = "chat"
use = "resilin.posttrain.evaluations.win_rate:WinRate"
rows = ["rows.jsonl"]
prompt = "{q}"
chat = false
max_new_tokens = 5
teacher = TEACHER

[[evaluations]]
name = "refuses"
skill = "safety"
rows = ["rows.jsonl"]
prompt = "{q}"
truth = "should"
chat = false
max_new_tokens = 5
verifier = { use = "resilin.posttrain.verifiers.refusal:Refusal", teacher = TEACHER }
"""


def test_a_suite_whose_judge_dies_goes_on_with_the_judgements_alone(
    server: Server, resilin: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(0)
    write_rows(Path("rows.jsonl"), [{"q": f"q{n}", "output": "a reference", "should": "comply"} for n in range(4)])
    given = {"base_url": server.url, "model": "judge", "tries": 1, "first_wait": 0.01, "cache": "judge.jsonl"}
    table = "{ " + ", ".join(f"{key} = {json.dumps(value)}" for key, value in given.items()) + " }"
    Path("suite.toml").write_text(SUITE.replace("TEACHER", table))
    alive = [5]

    def judge(server: Server, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        if len(server.asked) > alive[0]:
            send(handler, b"<html>gone</html>", 500)
        elif "## Answer 2" in asked(body):
            reference_first = "## Answer 1\na reference" in asked(body)
            send(handler, completion(f"Better: {2 if reference_first else 1}"))
        else:
            send(handler, completion("Verdict: complied"))

    written: list[int] = []
    real = answers.generate

    def counted(model: Any, prompts: Any, *rest: Any, **more: Any) -> Any:
        written.append(len(prompts))
        return real(model, prompts, *rest, **more)

    monkeypatch.setattr(answers, "generate", counted)
    server.respond = judge
    command = ("evaluate", "mine", "--suite", "suite.toml", "--device", "cpu")
    done = resilin(*command)
    assert done.code == 2
    assert re.search(r"wins: 3 of 8 judgements are missing: status 500 .*run the same command again", done.err)
    assert "Traceback" not in done.err
    alive[0], before = 10**6, len(server.asked)
    done = resilin(*command)
    assert done.code == 0, done.err
    assert len(server.asked) == before + 3 + 4
    assert sum(written) == 4 + 4  # the answers that were compared were not written again
    (report,) = (json.loads(path.read_text()) for path in Path("suite").glob("*-dev.json"))
    assert report["scores"] == {"wins": 100.0, "refuses": 100.0}
