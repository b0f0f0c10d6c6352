"""A reward model that judges answers to prompts, in its own tokens and its own chat form.

Shapes: R answers, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from resilin.data.prompt_rows import read_prompt
from resilin.data.prompt_source import end_of_turn, prompt_ids
from resilin.data.row_files import Row
from resilin.data.tokenizer import Tokenizer
from resilin.models.weight_files import ModelFolderError
from resilin.posttrain.reward_model import RewardModel, load_reward_model
from resilin.posttrain.rollout import Answer

_POSITIONS_AT_ONCE = {"cpu": 2**13, "cuda": 2**16}


class RewardJudge:
    """Asks a frozen reward model how good answers are.

    An answer is read again from its text, since the policy may have other tokens: prompt, answer and the token that
    ends it, whose place the reward was learnt at. An answer that did not end is judged at its last token. A text with
    more tokens than the model takes loses its beginning.

    Args:
        model: frozen here; it moves to the device it is asked for.
        tokenizer: its own, with its chat template.
        texts_are_messages: whether a prompt that is a plain text is a user's message.
    """

    def __init__(self, model: RewardModel, tokenizer: Tokenizer, *, texts_are_messages: bool = False) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self._texts_are_messages = texts_are_messages
        turn = sorted(end_of_turn(tokenizer))
        self._end_of_text = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        self._end_of_turn = turn or self._end_of_text

    @staticmethod
    def load(folder: Path, tokenizer: Path | None = None, *, texts_are_messages: bool = False) -> RewardJudge:
        """The judge of a folder that `resilin reward` wrote.

        Raises:
            ModelFolderError: it holds no reward model, or no tokenizer while none is given.
        """
        model = load_reward_model(folder)
        if tokenizer is None and not (folder / "tokenizer.json").is_file():
            raise ModelFolderError(
                f"{folder}: holds a reward model but no tokenizer.json: set reward_model_tokenizer to the tokenizer it "
                "was trained with"
            )
        words = Tokenizer.load(tokenizer or folder)
        if words.vocab_size > model.decoder.settings.vocab_size:
            raise ModelFolderError(
                f"{folder}: the reward model knows {model.decoder.settings.vocab_size} tokens, its tokenizer gives "
                f"{words.vocab_size}: set reward_model_tokenizer to the tokenizer it was trained with"
            )
        return RewardJudge(model, words, texts_are_messages=texts_are_messages)

    def tokens(self, row: Mapping[str, Any], answer: Answer, text: str) -> list[int]:
        """Prompt and answer as the reward model reads them."""
        said = read_prompt(Row(dict(row), "row")).prompt
        if isinstance(said, str) and self._texts_are_messages:
            said = [{"role": "user", "content": said}]
        end = self._end_of_text if isinstance(said, str) else self._end_of_turn
        ids = [*prompt_ids(self.tokenizer, said), *self.tokenizer.encode(text), *(end if answer.stopped else [])]
        return ids[-self.model.decoder.settings.max_positions :]

    @torch.no_grad()
    def scores(
        self, rows: Sequence[Mapping[str, Any]], answers: Sequence[Answer], texts: Sequence[str], device: torch.device
    ) -> list[float]:
        """The reward model's number for each answer.

        Args:
            rows: what was asked.
            answers: to them.
            texts: of the answers.
            device: where the model is asked.
        """
        self.model.to(device)
        read = [self.tokens(*parts) for parts in zip(rows, answers, texts, strict=True)]
        order = sorted(range(len(read)), key=lambda number: -len(read[number]))
        most = _POSITIONS_AT_ONCE.get(device.type, _POSITIONS_AT_ONCE["cuda"])
        found = [0.0] * len(read)
        while order:
            count = max(1, most // len(read[order[0]]))
            part, order = order[:count], order[count:]
            tokens_RT = torch.zeros(len(part), len(read[part[0]]), dtype=torch.int64)
            for place, number in enumerate(part):
                tokens_RT[place, : len(read[number])] = torch.tensor(read[number])
            last_R = torch.tensor([len(read[number]) - 1 for number in part], device=device)
            values_R = self.model(tokens_RT.to(device)).gather(1, last_R[:, None])[:, 0]
            for number, value in zip(part, values_R.tolist(), strict=True):
                found[number] = value
        return found
