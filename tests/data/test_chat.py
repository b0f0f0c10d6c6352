"""Conversations: the ids that transformers gives, and a mask of exactly what the assistant wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilin.data.chat import CHATML, encode_chat
from resilin.data.chat_source import ChatSource
from resilin.data.errors import DataError
from resilin.data.packed import PackedSource
from resilin.data.settings import SourceContext
from resilin.data.tokenizer import Tokenizer
from resilin.data.train_tokenizer import byte_tokenizer, train_bpe

quick = settings(deadline=None, max_examples=50)

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And twice that? 日本"},
    {"role": "assistant", "content": " Eight, naïve friend.\n"},
]
# Templates in the manner of well-known models: without marks, with their own turn signs, with a begin token.
PLAIN_CHATML = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %}{{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
THINKING = (  # drops what earlier assistant turns thought, as reasoning models do
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last %}<think></think>{% endif %}{{ m.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKENIZERS = {
    "bytes": byte_tokenizer(),
    "bpe": train_bpe([m["content"] for m in TALK] * 3 + ["user assistant system\n"], 320),
}


def with_template(tokenizer: Tokenizer, template: str, **config: Any) -> Tokenizer:
    return Tokenizer(tokenizer.json, {**tokenizer.config, **config, "chat_template": template})


def learnt(tokenizer: Tokenizer, messages: list[dict[str, str]], **kw: Any) -> list[str]:
    """The stretches of text under the mask."""
    chat = encode_chat(tokenizer, messages, **kw)
    stretches: list[list[int]] = []
    before = False
    for token, unit in zip(chat.ids, chat.units, strict=True):
        if unit:
            if not before:
                stretches.append([])
            stretches[-1].append(token)
        before = unit
    return [tokenizer.decode(ids, skip_special=False) for ids in stretches]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("template", [None, PLAIN_CHATML], ids=["own ChatML", "without marks"])
def test_the_mask_is_what_the_assistant_wrote_and_its_end_of_turn(name: str, template: str | None) -> None:
    tokenizer = TOKENIZERS[name] if template is None else with_template(TOKENIZERS[name], template)
    first, second = "4<|im_end|>", " Eight, naïve friend.\n<|im_end|>"
    assert learnt(tokenizer, TALK) == [first, second]
    assert learnt(tokenizer, TALK, train_on="last") == [second]
    (everything,) = learnt(tokenizer, TALK, train_on="all")
    assert everything.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")


@quick
@given(contents=st.lists(st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=12), min_size=1, max_size=4))
def test_any_contents_are_found_again_under_the_mask(contents: list[str]) -> None:
    messages = [
        message
        for content in contents
        for message in ({"role": "user", "content": content[::-1]}, {"role": "assistant", "content": content})
    ]
    assert learnt(TOKENIZERS["bytes"], messages) == [f"{content}<|im_end|>" for content in contents]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("template", [CHATML, PLAIN_CHATML, BRACKETS, THINKING])
def test_ids_and_marked_masks_are_those_of_transformers(name: str, template: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = with_template(TOKENIZERS[name], template, bos_token="<|im_start|>")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = TALK[1:]
    train_on = "all" if template is THINKING else "assistant"
    chat = encode_chat(tokenizer, messages, train_on=train_on)  # type: ignore[arg-type]
    expected = theirs.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask="{% generation" in template
    )
    assert chat.ids == expected["input_ids"]
    if "{% generation" in template:
        assert [int(unit) for unit in chat.units] == expected["assistant_masks"]
    prompt = encode_chat(tokenizer, messages[:1], add_generation_prompt=True)
    assert prompt.ids == theirs.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    assert not any(prompt.units)


def test_a_template_of_brackets_is_masked_by_its_turns() -> None:
    tokenizer = with_template(TOKENIZERS["bpe"], BRACKETS, bos_token="<|im_start|>")
    assert learnt(tokenizer, TALK[1:]) == ["4<|endoftext|>", "Eight, naïve friend.<|endoftext|>"]


def test_a_template_that_rewrites_earlier_turns_is_refused_unless_all_is_learnt() -> None:
    tokenizer = with_template(TOKENIZERS["bpe"], THINKING)
    with pytest.raises(DataError, match="changes earlier turns once later ones follow"):
        encode_chat(tokenizer, TALK)
    assert all(encode_chat(tokenizer, TALK, train_on="all").units)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "not valid Jinja"),
        ("{{ messages.nothing.deeper }}", "fails on this conversation"),
        ("{{ raise_exception('no system turn, please') }}", "refuses the conversation: no system turn, please"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "fails on this conversation"),
        ("{% set x = messages.append('y') %}", "fails on this conversation"),
    ],
)
def test_bad_or_hostile_templates_are_told(template: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode_chat(with_template(TOKENIZERS["bpe"], template), TALK)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ("hello", "list of at least one message"),
        ([{"content": "x"}], r"messages\[0\] should be an object with role and content"),
        ([{"role": "user"}], r"messages\[0\] \(user\) should have text"),
        ([{"role": "user", "content": 5}], "should have text"),
        ([{"role": "user", "content": "a\ufdd0b"}], "noncharacter"),
    ],
)
def test_what_is_no_conversation_is_told(messages: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode_chat(TOKENIZERS["bpe"], messages)


def test_chatml_without_its_tokens_is_refused() -> None:
    tree = json.loads(TOKENIZERS["bytes"].json)
    tree["added_tokens"] = [token for token in tree["added_tokens"] if not token["content"].startswith("<|im_")]
    for name in ("<|im_start|>", "<|im_end|>"):
        tree["model"]["vocab"][name.upper()] = tree["model"]["vocab"].pop(name)
    with pytest.raises(DataError, match="lacks ChatML's tokens"):
        encode_chat(Tokenizer(json.dumps(tree)), TALK)


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    talks = [[{"role": "user", "content": "x" * n}, {"role": "assistant", "content": "y" * n}] for n in range(1, 41)]
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(json.dumps({"messages": talk}) for talk in talks))
    return file


def build(path: Path, **kw: Any) -> PackedSource:
    settings = {"paths": [str(path)], "cache": path.parent / "cache", "tokenizer": {"kind": "bytes"}, "epochs": 1}
    settings |= {"held_out": {"fraction": 0.0}, "shuffle": False, **kw}
    return ChatSource.model_validate(settings).build(SourceContext(0, "train", 4))


@pytest.mark.parametrize("packing", ["documents", "pad"])
def test_a_chat_source_learns_each_answer_once_and_keeps_conversations_apart(chats: Path, packing: str) -> None:
    source = build(chats, sequence_length=160, packing=packing)
    answers = []
    for step in range(len(source)):
        batch = source.fetch(step, range(source.slots(step)))
        for labels, documents, positions in zip(batch["labels"], batch["documents"], batch["positions"], strict=True):
            answers += source.tokenizer.decode(  # type: ignore[union-attr]
                labels[labels != -100].tolist(), skip_special=False
            ).split("<|im_end|>")[:-1]
            assert torch_restarts(documents.tolist(), positions.tolist())
            padding = int((documents == -1).sum())
            assert documents[len(documents) - padding :].eq(-1).all()
            assert padding > 0 or packing == "documents"
    assert answers == ["y" * n for n in range(1, 41)]


def torch_restarts(documents: list[int], positions: list[int]) -> bool:
    """Positions count up inside a document and restart with the next."""
    return all(
        position == (0 if t == 0 or documents[t] != documents[t - 1] else positions[t - 1] + 1)
        for t, position in enumerate(positions)
    )


def test_long_conversations_follow_the_policy_with_counts(chats: Path) -> None:
    with pytest.raises(DataError, match="a row holds 65"):
        build(chats, sequence_length=64)
    skipped = build(chats, sequence_length=64, long_documents="skip")
    truncated = build(chats, sequence_length=64, long_documents="truncate")
    assert skipped.rows.skipped == truncated.rows.truncated > 0  # type: ignore[union-attr]


def test_flawed_conversations_are_told_or_counted(tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    good = json.dumps({"messages": TALK})
    file.write_text(f'{good}\n{{"messages": [{{"role": "user"}}]}}\n{json.dumps({"messages": TALK[:2]})}\n')
    with pytest.raises(DataError, match=r"line 2, byte \d+: messages\[0\] \(user\) should have text"):
        build(file)
    source = build(file, on_error="skip")
    assert source.stream.shards.index["skipped"] == {"bad conversation": 1, "nothing to learn": 1}


def test_a_template_file_replaces_the_tokenizers_own(chats: Path, tmp_path: Path) -> None:
    (tmp_path / "brackets.jinja").write_text(BRACKETS)
    source = build(chats, sequence_length=200, chat_template=tmp_path / "brackets.jinja", packing="pad")
    text = source.tokenizer.decode(source.fetch(0, [0])["tokens"][0].tolist())  # type: ignore[union-attr]
    assert text.startswith("[INST] x [/INST]y")
    assert source.tokenizer.chat_template == BRACKETS  # type: ignore[union-attr]
