"""Preference rows and prompts as sources."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from resilin.data.chat import encode_chat
from resilin.data.chat_templates import TULU
from resilin.data.errors import DataError
from resilin.data.mix import Mix
from resilin.data.preference_source import PairBatches, PreferenceSource
from resilin.data.prompt_source import PromptBatches, PromptSource, end_of_turn
from resilin.data.settings import SourceContext
from resilin.data.tokenizer import Tokenizer
from resilin.data.train_tokenizer import byte_tokenizer, character_tokenizer, train_bpe

QUESTIONS = ["What is 2 + 2?", "Say hi.", "Name a colour, naïvely 日本", "Count to three"]
ANSWERS = ["4", "hi", "red is a colour", "one two three"]
WORSE = ["5", "no thanks, I would rather not", "7", "one"]


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


FORMS = {
    "trl texts": [{"prompt": q, "chosen": a, "rejected": b} for q, a, b in zip(QUESTIONS, ANSWERS, WORSE, strict=True)],
    "trl messages": [
        {"prompt": [said("user", q)], "chosen": [said("assistant", a)], "rejected": [said("assistant", b)]}
        for q, a, b in zip(QUESTIONS, ANSWERS, WORSE, strict=True)
    ],
    "open-instruct": [
        {
            "prompt": q,
            "chosen": [said("user", q), said("assistant", a)],
            "rejected": [said("user", q), said("assistant", b)],
        }
        for q, a, b in zip(QUESTIONS, ANSWERS, WORSE, strict=True)
    ],
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    made = byte_tokenizer() if request.param == "bytes" else train_bpe([*QUESTIONS, *ANSWERS] * 3, 320)
    made.save(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def pairs(path: Path, tokenizer: Path, *, split: Any = "train", batch: int = 4, **kw: Any) -> PairBatches:
    settings = {
        "paths": [str(path)],
        "tokenizer": str(tokenizer),
        "held_out": {"fraction": 0.0},
        "shuffle": False,
        **kw,
    }
    return PreferenceSource.model_validate(settings).build(SourceContext(0, split, batch))


def prompts(path: Path, tokenizer: Path, *, split: Any = "train", batch: int = 4, **kw: Any) -> PromptBatches:
    settings = {
        "paths": [str(path)],
        "tokenizer": str(tokenizer),
        "held_out": {"fraction": 0.0},
        "shuffle": False,
        **kw,
    }
    return PromptSource.model_validate(settings).build(SourceContext(0, split, batch))


def learnt(source: PairBatches, side: str, b: int, batch: Any) -> str:
    labels = batch[f"{side}_labels"][b]
    return source.tokenizer.decode(labels[labels >= 0].tolist(), skip_special=False)


@pytest.mark.parametrize("form", FORMS)
def test_only_the_answers_are_learnt_whatever_the_form(form: str, tokenizer: Path, tmp_path: Path) -> None:
    source = pairs(write(tmp_path / "p.jsonl", FORMS[form]), tokenizer, chat_template="tulu")
    batch = source.fetch(0, range(4))
    end = "<|endoftext|>"
    assert [learnt(source, "chosen", b, batch) for b in range(4)] == [a + end for a in ANSWERS]
    assert [learnt(source, "rejected", b, batch) for b in range(4)] == [b + end for b in WORSE]
    assert batch["pair"].tolist() == [0, 1, 2, 3]
    assert batch["chosen_tokens"].shape == batch["rejected_tokens"].shape == batch["chosen_labels"].shape


def test_the_conversational_forms_give_the_same_tokens(tokenizer: Path, tmp_path: Path) -> None:
    one = pairs(write(tmp_path / "a.jsonl", FORMS["trl messages"]), tokenizer)
    two = pairs(write(tmp_path / "b.jsonl", FORMS["open-instruct"]), tokenizer)
    assert one.data_digest == two.data_digest
    plain = pairs(write(tmp_path / "c.jsonl", FORMS["trl texts"]), tokenizer)
    assert plain.data_digest != one.data_digest
    assert pairs(tmp_path / "a.jsonl", tokenizer, chat_template="tulu").data_digest != one.data_digest


def test_labels_are_what_follows_and_padding_is_no_unit(tokenizer: Path, tmp_path: Path) -> None:
    source = pairs(write(tmp_path / "p.jsonl", FORMS["trl messages"]), tokenizer)
    batch = source.fetch(0, range(4))
    for side in ("chosen", "rejected"):
        tokens, labels = batch[f"{side}_tokens"], batch[f"{side}_labels"]
        inner = labels[:, :-1]
        assert torch.equal(tokens[:, 1:][inner >= 0], inner[inner >= 0])
        alone = source.fetch(0, [1])[f"{side}_labels"][0]
        width = len(alone)
        assert torch.equal(labels[1, :width], alone)
        assert (labels[1, width:] == -100).all()


def test_a_pair_whose_answer_is_cut_away_is_dropped_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    byte_tokenizer().save(tmp_path / "tokenizer")
    rows = [
        {"prompt": "ab", "chosen": "cdefgh", "rejected": "xy"},
        {"prompt": "a" * 9, "chosen": "c", "rejected": "d"},
        {"prompt": "a" * 8, "chosen": "c", "rejected": "d"},
    ]
    path = write(tmp_path / "p.jsonl", rows)
    source = pairs(path, tmp_path / "tokenizer", sequence_length=8, batch=2)
    assert source.count == 2
    assert source.dropped == {"with an answer cut away": 1}
    assert "of 3 preference rows 2 are used; left out: 1 with an answer cut away" in capsys.readouterr().err
    assert source.pairs.rows == [0, 2]
    batch = source.fetch(0, [0, 1])
    assert learnt(source, "chosen", 1, batch) == "c"  # its end token is cut away, one token is left
    kept = pairs(path, tmp_path / "tokenizer", sequence_length=8, long_pairs="cut_start")
    assert kept.count == 3
    assert learnt(kept, "chosen", 1, kept.fetch(0, [0, 1])) == "c<|endoftext|>"
    assert pairs(path, tmp_path / "tokenizer", sequence_length=8, long_pairs="drop").dropped == {"too long": 2}
    with pytest.raises(DataError, match=r"p\.jsonl, line 2: has 11 tokens; a row holds 9"):
        pairs(path, tmp_path / "tokenizer", sequence_length=8, long_pairs="error")
    with pytest.raises(DataError, match="none of 3 preference rows fits"):
        pairs(path, tmp_path / "tokenizer", sequence_length=1)


def test_rows_of_one_prompt_stay_on_one_side_of_the_split_and_pair_numbers_hold_for_both(tmp_path: Path) -> None:
    byte_tokenizer().save(tmp_path / "tokenizer")
    rows = [{"prompt": f"q{n % 10}", "chosen": f"c{n}", "rejected": f"r{n}"} for n in range(40)]
    path = write(tmp_path / "p.jsonl", rows)
    keep = {"held_out": {"fraction": 0.2}, "shuffle": True}
    train = pairs(path, tmp_path / "tokenizer", **keep, epochs=1)
    held = pairs(path, tmp_path / "tokenizer", split="validation", **keep)
    assert train.data_digest == held.data_digest
    assert train.digest != held.digest
    seen = [{int(n) for s in range(len(x)) for n in x.fetch(s, range(x.slots(s)))["pair"]} for x in (train, held)]
    assert seen[0] | seen[1] == set(range(40))
    assert not seen[0] & seen[1]
    assert not {n % 10 for n in seen[0]} & {n % 10 for n in seen[1]}
    assert len({n % 10 for n in seen[1]}) == 2


def test_pairs_can_be_mixed_when_padded_to_their_length(tmp_path: Path) -> None:
    byte_tokenizer().save(tmp_path / "tokenizer")
    parts = []
    for name in ("a", "b"):
        path = write(tmp_path / f"{name}.jsonl", [{"prompt": name, "chosen": "x" * n, "rejected": "y"} for n in (1, 5)])
        use = "resilin.data.preference_source:PreferenceSource"
        part = {"use": use, "paths": [str(path)], "tokenizer": str(tmp_path / "tokenizer"), "sequence_length": 12}
        parts.append({"source": {**part, "pad": "length", "held_out": {"fraction": 0.0}}})
    mixed = Mix.model_validate({"parts": parts}).build(SourceContext(0, "train", 4))
    assert mixed.fetch(0, range(4))["chosen_tokens"].shape == (4, 12)


def test_pairs_are_read_from_a_mix_of_files_and_copies_stay_on_one_side(tmp_path: Path) -> None:
    byte_tokenizer().save(tmp_path / "tokenizer")
    names = []
    for name in ("a", "b"):
        rows = [{"prompt": f"{name}{n}", "chosen": "c", "rejected": "r"} for n in range(6)]
        names.append(str(write(tmp_path / f"{name}.jsonl", rows)))
    settings = {"mixer": [names[0], "3.0", names[1], "2"], "tokenizer": str(tmp_path / "tokenizer"), "epochs": 1}
    made = PreferenceSource.model_validate({**settings, "held_out": {"fraction": 0.3}})
    train, held = made.build(SourceContext(0, "train", 4)), made.build(SourceContext(0, "validation", 4))
    assert train.count == held.count == 20
    sides = [{source.pairs.prompts[n] for n in source.mine} for source in (train, held)]
    assert not sides[0] & sides[1]
    assert len(train.mine) + len(held.mine) == 20
    assert train.pool_parts == (len(train.mine),)
    assert train.read([0, 0])["pair"].tolist() == [int(train.mine[0])] * 2
    with pytest.raises(ValueError, match="either paths or mixer"):
        PreferenceSource.model_validate({**settings, "paths": names})


def test_resuming_on_other_pairs_is_refused(tmp_path: Path) -> None:
    byte_tokenizer().save(tmp_path / "tokenizer")
    path = write(tmp_path / "p.jsonl", FORMS["trl texts"])
    state = pairs(path, tmp_path / "tokenizer").state_dict()
    pairs(path, tmp_path / "tokenizer").load_state_dict(state)
    write(path, [*FORMS["trl texts"][:-1], {**FORMS["trl texts"][-1], "chosen": "one two  three"}])
    with pytest.raises(DataError, match="made on other data"):
        pairs(path, tmp_path / "tokenizer").load_state_dict(state)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "the rejected answer is missing .*columns here: chosen, prompt"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "the rejected answer is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": "  "}, "the rejected answer holds only white space"),
        ({"prompt": "a", "chosen": "b", "rejected": [said("assistant", "c")]}, "both be texts or both be messages"),
        ({"chosen": [said("assistant", "b")], "rejected": [said("assistant", "c")]}, "there is no prompt column"),
        (
            {
                "chosen": [said("user", "a"), said("assistant", "b")],
                "rejected": [said("user", "z"), said("assistant", "c")],
            },
            "do not begin with the same prompt",
        ),
        (
            {"chosen": [said("user", "a"), said("assistant", "b")], "rejected": [said("user", "a"), said("user", "c")]},
            "rejected ends with a message of 'user'",
        ),
        ({"prompt": "a", "chosen": [{"role": 5}], "rejected": [said("assistant", "c")]}, r"chosen: messages\[0\]"),
        ({"chosen": "xyz", "rejected": "abc"}, "do not begin with the same prompt"),
    ],
)
def test_what_is_no_preference_is_told_with_file_and_line(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    byte_tokenizer().save(tmp_path / "tokenizer")
    path = write(tmp_path / "p.jsonl", [FORMS["trl texts"][0], row])
    with pytest.raises(DataError, match=rf"p\.jsonl, line 2: .*{message}"):
        pairs(path, tmp_path / "tokenizer")


def test_a_broken_line_is_told(tmp_path: Path) -> None:
    byte_tokenizer().save(tmp_path / "tokenizer")
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": \n')
    with pytest.raises(DataError, match=r"p\.jsonl, line 2: not valid JSON"):
        pairs(path, tmp_path / "tokenizer")


RL_FORMS = {
    "open-instruct": [
        {"messages": [said("user", q)], "ground_truth": a, "dataset": "gsm8k"}
        for q, a in zip(QUESTIONS, ANSWERS, strict=True)
    ],
    "with the answer": [
        {"messages": [said("user", q), said("assistant", a)], "ground_truth": a, "dataset": "gsm8k"}
        for q, a in zip(QUESTIONS, ANSWERS, strict=True)
    ],
    "verl": [
        {
            "data_source": "gsm8k",
            "prompt": [said("user", q)],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": a},
            "extra_info": {"index": 1},
        }
        for q, a in zip(QUESTIONS, ANSWERS, strict=True)
    ],
}


@pytest.mark.parametrize("form", RL_FORMS)
def test_prompts_end_where_the_answer_begins_and_are_padded_in_front(
    form: str, tokenizer: Path, tmp_path: Path
) -> None:
    source = prompts(write(tmp_path / "p.jsonl", RL_FORMS[form]), tokenizer, chat_template="tulu")
    batch = source.fetch(0, range(4))
    texts = [
        source.tokenizer.decode(tokens[mask].tolist())
        for tokens, mask in zip(batch["prompt_tokens"], batch["prompt_mask"], strict=True)
    ]
    assert texts == [f"<|user|>\n{q}\n<|assistant|>\n" for q in QUESTIONS]
    assert batch["prompt_mask"][:, -1].all()
    assert (batch["prompt_tokens"][~batch["prompt_mask"]] == source.tokenizer.pad_id).all()
    assert source.row(2) == RL_FORMS[form][2]
    assert source.prompt(2).ground_truth == ANSWERS[2]
    assert source.prompt(2).dataset == "gsm8k"
    assert source.prompt(2).query == QUESTIONS[2]
    assert source.end_ids == {source.tokenizer.eos_id}


def test_prompts_are_prefixes_of_the_conversations_they_begin(tokenizer: Path, tmp_path: Path) -> None:
    source = prompts(write(tmp_path / "p.jsonl", RL_FORMS["verl"]), tokenizer)
    batch = source.fetch(0, range(4))
    for b in range(4):
        prompt = batch["prompt_tokens"][b][batch["prompt_mask"][b]].tolist()
        whole = encode_chat(source.tokenizer, [said("user", QUESTIONS[b]), said("assistant", ANSWERS[b])])
        assert whole.ids[: len(prompt)] == prompt
        assert not any(whole.units[: len(prompt)])
        assert whole.units[len(prompt)]
    end = source.tokenizer.inner.token_to_id("<|im_end|>")
    assert source.end_ids == {source.tokenizer.eos_id, end}


def test_plain_prompts_are_continued_as_they_are(tmp_path: Path) -> None:
    made = character_tokenizer(["0123456789+= "])
    made.save(tmp_path / "tokenizer")
    rows = [
        {"prompt": "12+7=", "ground_truth": "19", "dataset": "gsm8k"},
        {"prompt": "1+1=", "ground_truth": "2", "dataset": "x"},
    ]
    source = prompts(write(tmp_path / "p.jsonl", rows), tmp_path / "tokenizer", batch=2)
    batch = source.fetch(0, [1, 0])
    assert batch["row"].tolist() == [1, 0]
    assert made.decode(batch["prompt_tokens"][0].tolist()) == "1+1="
    assert source.end_ids == {made.eos_id}


def test_long_prompts_are_never_cut(tmp_path: Path) -> None:
    byte_tokenizer().save(tmp_path / "tokenizer")
    rows = [{"prompt": "a" * n, "ground_truth": "", "dataset": "x"} for n in (3, 9, 4)]
    path = write(tmp_path / "p.jsonl", rows)
    source = prompts(path, tmp_path / "tokenizer", prompt_length=5, batch=2)
    assert source.dropped == {"too long": 1}
    assert source.row(1) == rows[2]
    with pytest.raises(DataError, match=r"line 2: the prompt has 9 tokens, more than prompt_length = 5"):
        prompts(path, tmp_path / "tokenizer", prompt_length=5, long_prompts="error")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"ground_truth": "1", "dataset": "gsm8k"}, "no prompt: expected messages or prompt"),
        ({"prompt": "a", "dataset": "gsm8k"}, "no ground_truth"),
        ({"prompt": "a", "ground_truth": "1"}, "no dataset"),
        ({"messages": [said("assistant", "x")], "ground_truth": "1", "dataset": "d"}, "no user message"),
        ({"prompt": "a", "ground_truth": "1", "dataset": ["d", "e"]}, "names 2 verifiers"),
        ({"prompt": "a", "ground_truth": "1", "dataset": 5}, "should name a verifier"),
    ],
)
def test_what_is_no_prompt_is_told_with_file_and_line(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    byte_tokenizer().save(tmp_path / "tokenizer")
    path = write(tmp_path / "p.jsonl", [{"prompt": "a", "ground_truth": "1", "dataset": "d"}, row])
    with pytest.raises(DataError, match=rf"p\.jsonl, line 2: .*{message}"):
        prompts(path, tmp_path / "tokenizer")


def test_a_template_that_ends_with_text_has_no_end_of_turn() -> None:
    made = byte_tokenizer()
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    plain = Tokenizer(made.json, {**made.config, "chat_template": template})
    assert end_of_turn(plain) == frozenset()
    tulu = Tokenizer(made.json, {**made.config, "chat_template": TULU})
    assert end_of_turn(tulu) == {made.eos_id}
