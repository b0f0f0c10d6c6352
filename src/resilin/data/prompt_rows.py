"""Rows that hold a prompt and what its answers are checked against, in the forms other trainers use.

| form | columns |
|---|---|
| open-instruct | `messages`, `ground_truth`, `dataset` (the verifier's name) |
| TRL | `prompt` (text or messages), any further columns |
| verl | `prompt` (messages), `data_source`, `ability`, `reward_model.ground_truth`, `extra_info` |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from resilin.data.row_files import Row
from resilin.data.row_messages import messages_in

PromptForm = Literal["open-instruct", "trl", "verl"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt and how its answers are checked.

    Attributes:
        prompt: a text, or messages that end before the assistant's turn.
        ground_truth: what the verifier compares with; None where the row has none.
        dataset: which verifier; several where the row names several.
    """

    prompt: str | list[dict[str, Any]]
    ground_truth: Any
    dataset: str | list[str] | None

    @property
    def query(self) -> str:
        """The prompt as plain text: the last user message."""
        if isinstance(self.prompt, str):
            return self.prompt
        said = [message.get("content") for message in self.prompt if message["role"] == "user"]
        return str(said[-1]) if said else ""


def read_prompt(row: Row, *, needs_truth: bool = False) -> Prompt:
    """The prompt a row holds, whatever its form.

    Args:
        row: the row; messages that end with an answer lose it.
        needs_truth: refuse rows without `ground_truth` and `dataset`.

    Raises:
        DataError: with file and line, for a row without a prompt, with broken messages, or without its truth.
    """
    value = row.value
    given = value.get("messages") if value.get("messages") is not None else value.get("prompt")
    if given is None or given == "" or given == []:
        keys = ", ".join(sorted(value)) or "none"
        raise row.error(f"no prompt: expected messages or prompt; columns here: {keys}")
    prompt: str | list[dict[str, Any]]
    if isinstance(given, str):
        prompt = given
    else:
        prompt = messages_in(row, "messages" if value.get("messages") is not None else "prompt", given)
        if prompt[-1]["role"] == "assistant":
            prompt.pop()
        if not any(message["role"] == "user" for message in prompt):
            raise row.error("the messages hold no user message before the answer")
    rule = value.get("reward_model")
    truth = value.get("ground_truth", rule.get("ground_truth") if isinstance(rule, dict) else None)
    dataset = value.get("dataset", value.get("data_source"))
    if dataset is not None and not (
        isinstance(dataset, str) or (isinstance(dataset, list) and all(isinstance(name, str) for name in dataset))
    ):
        raise row.error(f"dataset should name a verifier, or list several, not {dataset!r:.60}")
    if isinstance(dataset, list) and not (isinstance(truth, list) and len(truth) == len(dataset)):
        raise row.error(f"dataset names {len(dataset)} verifiers: ground_truth should list as many values")
    if needs_truth and (truth is None or not dataset):
        missing = "ground_truth" if truth is None else "dataset"
        raise row.error(f"no {missing}: an answer can be checked only with both ground_truth and dataset")
    return Prompt(prompt, truth, dataset)


def write_prompt(
    prompt: Prompt, form: PromptForm, *, ability: str = "", extra: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A prompt as a row in the form of another trainer.

    Args:
        prompt: what to write.
        form: the trainer's.
        ability: verl's column of that name.
        extra: verl's `extra_info`.
    """
    messages = [{"role": "user", "content": prompt.prompt}] if isinstance(prompt.prompt, str) else prompt.prompt
    if form == "open-instruct":
        return {"messages": messages, "ground_truth": prompt.ground_truth, "dataset": prompt.dataset}
    if form == "trl":
        return {"prompt": prompt.prompt, "ground_truth": prompt.ground_truth, "dataset": prompt.dataset}
    return {
        "data_source": prompt.dataset,
        "prompt": messages,
        "ability": ability,
        "reward_model": {"style": "rule", "ground_truth": prompt.ground_truth},
        "extra_info": dict(extra or {}),
    }


_READ = {"messages", "prompt", "ground_truth", "dataset", "data_source", "reward_model", "ability", "extra_info"}


def convert_prompt(row: Row, form: PromptForm, number: int) -> dict[str, Any]:
    """A row in the form of another trainer, with all its further columns.

    In verl's form these stand in `extra_info`, beside `index`; from there they become columns again.

    Args:
        row: in any form.
        form: the trainer's.
        number: verl's `index`, where the row has none.

    Raises:
        DataError: with file and line, as `read_prompt`; or for several verifiers, of which verl's rows name one.
    """
    prompt, value = read_prompt(row), row.value
    info = value.get("extra_info")
    rest = {key: field for key, field in value.items() if key not in _READ}
    rest = {**(info if isinstance(info, dict) else {}), **rest}
    ability = value.get("ability")
    if form != "verl":
        return {**rest, **({"ability": ability} if ability else {}), **write_prompt(prompt, form)}
    if isinstance(prompt.dataset, list):
        raise row.error(f"dataset names {len(prompt.dataset)} verifiers; a row of verl names one data_source")
    return write_prompt(prompt, form, ability=str(ability or ""), extra={"index": number, **rest})
