"""Templates by name, and what no template may do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilin.data.chat import encode_chat, encode_text_answer
from resilin.data.chat_templates import CHATML, TULU, find_template
from resilin.data.errors import DataError
from resilin.data.preference_rows import read_preference, write_preference
from resilin.data.prompt_rows import read_prompt, write_prompt
from resilin.data.row_files import Row
from resilin.data.tokenizer import Tokenizer
from resilin.data.train_tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
END = "<|endoftext|>"
quick = settings(deadline=None, max_examples=60)
content = st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=8)


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


TALK = [said("system", "S"), said("user", "U"), said("assistant", "A"), said("user", "V"), said("assistant", "B")]


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special=False)


def test_tulu_is_the_published_text_with_a_line_end_only_where_more_follows() -> None:
    chat = encode_chat(TOKENIZER, TALK, template=TULU)
    assert text_of(TOKENIZER, chat.ids) == (
        f"<|system|>\nS\n<|user|>\nU\n<|assistant|>\nA{END}\n<|user|>\nV\n<|assistant|>\nB{END}"
    )
    learnt = [token for token in chat.labels if token != -100]
    assert text_of(TOKENIZER, learnt) == f"A{END}B{END}"
    assert all(label in (-100, token) for token, label in zip(chat.ids, chat.labels, strict=True))
    prompt = encode_chat(TOKENIZER, TALK[:2], template=TULU, add_generation_prompt=True)
    assert text_of(TOKENIZER, prompt.ids).endswith("<|user|>\nU\n<|assistant|>\n")
    assert set(prompt.labels) == {-100}


@quick
@given(texts=st.lists(st.tuples(content, content), min_size=1, max_size=4), template=st.sampled_from([TULU, CHATML]))
def test_every_prompt_is_a_prefix_of_the_conversation(texts: list[tuple[str, str]], template: str) -> None:
    messages = [message for u, a in texts for message in (said("user", u), said("assistant", a))]
    whole = encode_chat(TOKENIZER, messages, template=template)
    for turn in range(len(texts)):
        number = 2 * turn + 1
        prompt = encode_chat(TOKENIZER, messages[:number], template=template, add_generation_prompt=True)
        assert whole.ids[: len(prompt.ids)] == prompt.ids
        assert whole.units[len(prompt.ids)]
        assert not whole.units[len(prompt.ids) - 1]
    from_last = encode_chat(TOKENIZER, messages, template=template, train_on=len(messages) - 1)
    assert from_last == encode_chat(TOKENIZER, messages, template=template, train_on="last")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages[1:] %}{{ m.role + m.content }}{% endfor %}",
            r"messages\[0\] .* loses its text 'S'",
        ),
        ("{% for m in messages %}{{ m.role }}: {{ m.content[:1] * (loop.index < 5) }};{% endfor %}", r"messages\[4\]"),
        (
            "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}!{% endgeneration %}{% endif %}"
            "{{ m.role + m.content }}{% endfor %}",
            "marks leave out what the assistant wrote",
        ),
        (
            "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<think>' if loop.last }}{% generation %}"
            "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
            "changes earlier turns once later ones follow",
        ),
    ],
    ids=["drops a role", "drops a turn", "marks the wrong text", "rewrites earlier turns"],
)
def test_templates_that_lose_or_rewrite_are_refused(template: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode_chat(TOKENIZER, TALK, template=template)


def test_a_template_that_rewrites_earlier_turns_can_learn_the_last_one() -> None:
    template = (
        "{% for m in messages %}{{ m.role + ':' }}{% if m.role == 'assistant' %}{{ '<t>' if loop.last }}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant:<t>{% endif %}"
    )
    chat = encode_chat(TOKENIZER, TALK, template=template, train_on="last")
    assert text_of(TOKENIZER, [token for token in chat.labels if token != -100]) == "B"


def test_roles_tulu_does_not_know_are_refused() -> None:
    with pytest.raises(DataError, match="tulu has no role tool"):
        encode_chat(TOKENIZER, [*TALK, said("tool", "x")], template=TULU)


def test_a_tokenizer_that_drops_characters_is_refused() -> None:
    tree = json.loads(TOKENIZER.json)
    tree["pre_tokenizer"] = {"type": "Split", "pattern": {"String": "Q"}, "behavior": "Removed", "invert": False}
    broken = Tokenizer(json.dumps(tree), TOKENIZER.config)
    with pytest.raises(DataError, match=r"the tokenizer loses '.*Q'"):
        encode_chat(broken, [said("user", "aQb"), said("assistant", "c")], template=TULU)
    with pytest.raises(DataError, match=r"the tokenizer loses '.*Q'"):
        encode_text_answer(broken, "a", "Q")


def test_templates_are_found_by_name_or_file(tmp_path: Path) -> None:
    assert find_template("tulu") == TULU
    assert find_template("chatml") == CHATML
    (tmp_path / "mine.jinja").write_text("x")
    assert find_template(str(tmp_path / "mine.jinja")) == "x"
    with pytest.raises(DataError, match="known names are chatml, tulu"):
        find_template("tullu")


TRL = {"prompt": [said("user", "q")], "chosen": [said("assistant", "a")], "rejected": [said("assistant", "b")]}
TEXTS = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize("form", ["trl", "open-instruct", "verl"])
@pytest.mark.parametrize("row", [TRL, TEXTS], ids=["messages", "texts"])
def test_preferences_go_from_form_to_form_and_back(form: str, row: dict[str, object]) -> None:
    first = read_preference(Row(dict(row), ""))
    written = write_preference(first, form)  # type: ignore[arg-type]
    again = read_preference(Row(written, ""))
    expected = row if form == "trl" or (row is TEXTS and form == "verl") else TRL
    assert write_preference(again, "trl") == expected


def test_whole_conversations_that_go_on_differently_keep_their_common_prompt() -> None:
    chosen = [said("user", "q"), said("assistant", "a"), said("user", "more"), said("assistant", "x")]
    rejected = [*chosen[:3], said("assistant", "y")]
    found = read_preference(Row({"chosen": chosen, "rejected": rejected}, ""))
    assert (found.prompt, found.chosen, found.rejected) == (chosen[:3], chosen[3:], rejected[3:])
    same = read_preference(Row({"chosen": chosen, "rejected": list(chosen)}, ""))
    assert same.chosen == same.rejected == chosen[3:]


def test_texts_without_a_prompt_column_share_their_beginning() -> None:
    row = {"chosen": "Q: hi? A: yes", "rejected": "Q: hi? A: no"}
    found = read_preference(Row(row, ""))
    assert (found.prompt, found.chosen, found.rejected) == ("Q: hi? A:", " yes", " no")


def test_prompts_go_from_form_to_form_and_back() -> None:
    row = {"messages": [said("user", "q")], "ground_truth": "4", "dataset": "gsm8k"}
    first = read_prompt(Row(row, ""), needs_truth=True)
    for form in ("trl", "verl", "open-instruct"):
        written = write_prompt(first, form, ability="math", extra={"split": "train"})  # type: ignore[arg-type]
        again = read_prompt(Row(written, ""), needs_truth=True)
        assert write_prompt(again, "open-instruct") == row
    verl = write_prompt(first, "verl", ability="math", extra={"split": "train"})
    assert verl == {
        "data_source": "gsm8k",
        "prompt": [said("user", "q")],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "4"},
        "extra_info": {"split": "train"},
    }
