"""A decoder with one number a token in place of words: a reward model, and the value model that starts from it.

Shapes: B rows, T positions, D hidden size.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from resilin.config import component
from resilin.keys import Keys
from resilin.models.decoder import Decoder
from resilin.models.linear import Linear
from resilin.models.pretrained import Pretrained
from resilin.models.settings import ModelContext, ModelSettings
from resilin.models.tensor_plan import TensorPlan
from resilin.models.weight_files import ModelFolderError, read_json
from resilin.objective.next_token import IGNORE

HEAD_FILE, ABOUT_FILE = "reward_head.safetensors", "reward_model.json"


class RewardModel(nn.Module):
    """`score(hidden)` of every position, in float32.

    Attributes:
        decoder: gives the hidden states; its own head is not used and not trained.
        score: (1, D), no bias.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder
        if decoder.head is not None:
            decoder.head.requires_grad_(False)
        self.score = Linear(decoder.settings.hidden_size, 1, bias=False, device=decoder.embed.weight.device)
        with torch.no_grad():
            self.score.weight.zero_()

    def tensor_plan(self) -> TensorPlan:
        """How the decoder is cut over the ranks of tensor parallelism; every rank has all of the score."""
        return replace(self.decoder.tensor_plan(), root="decoder")

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        *,
        keys: Keys | None = None,
        continues_BT: Tensor | None = None,
    ) -> Tensor:
        """(B, T): the number at each position, which sees what the decoder lets it see."""
        output = self.decoder(tokens_BT, positions_BT, documents_BT, keys=keys, continues_BT=continues_BT)
        hidden_BTD = output.hidden_BTD
        with torch.autocast(hidden_BTD.device.type, enabled=False):
            wide = torch.promote_types(hidden_BTD.dtype, torch.float32)
            values: Tensor = (hidden_BTD.to(wide) @ self.score.weight[0].to(wide)).to(wide)
        return values


def with_end(tokens_RT: Tensor, labels_RT: Tensor) -> tuple[Tensor, Tensor]:
    """The rows with their last label (the token that ends the answer) as a token, and where it stands.

    Returns:
        (R, T + 1) tokens and (R,) positions; 0 for a row without labels.
    """
    valid_RT = labels_RT != IGNORE
    place_T = torch.arange(1, labels_RT.shape[1] + 1, device=labels_RT.device)
    last_R = (valid_RT * place_T).amax(1)
    end_R1 = labels_RT.gather(1, (last_R - 1).clamp(min=0)[:, None]).clamp(min=0)
    longer = torch.nn.functional.pad(tokens_RT, (0, 1))
    end_R1 = torch.where(last_R[:, None] > 0, end_R1, longer[:, :1])
    return longer.scatter(1, last_R[:, None], end_R1), last_R


class Reward(ModelSettings):
    """A reward model: a decoder, usually one that was fine-tuned, and a head that starts at zero."""

    model: Annotated[ModelSettings, component("resilin.models.pretrained:Pretrained")]
    """The decoder."""
    freeze_embeddings: bool = Field(default=False)
    """Whether the embedding table stays as it is."""

    def build(self, context: ModelContext) -> RewardModel:
        """The model; nobody is preferred before it learns.

        Raises:
            ValueError: `model` builds no decoder.
        """
        decoder = self.model.build(context)
        if not isinstance(decoder, Decoder):
            raise ValueError(f"a reward model needs a decoder, and model.model builds a {type(decoder).__name__}")
        model = RewardModel(decoder)
        if self.freeze_embeddings:
            decoder.embed.requires_grad_(False)
        return model


class PretrainedReward(ModelSettings):
    """A reward model from a folder that `save_reward_model` wrote."""

    path: Path
    """The folder."""

    def build(self, context: ModelContext) -> RewardModel:
        """The model, in float32 on the CPU."""
        return load_reward_model(self.path, context)


def save_reward_model(model: RewardModel, folder: Path, **options: Any) -> list[Path]:
    """Write the decoder as a Hugging Face folder, and the head beside it.

    Args:
        model: on any device.
        folder: made where it does not exist.
        options: of `resilin.models.huggingface.save_pretrained`.
    """
    from resilin.models.huggingface import save_pretrained

    written = save_pretrained(model.decoder, folder, **options)
    save_file({"score.weight": model.score.weight.detach().cpu().contiguous()}, folder / HEAD_FILE)
    about = {"head": HEAD_FILE, "hidden_size": model.decoder.settings.hidden_size}
    (folder / ABOUT_FILE).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return [*written, folder / HEAD_FILE, folder / ABOUT_FILE]


def load_reward_model(folder: Path, context: ModelContext | None = None) -> RewardModel:
    """The reward model of a folder.

    Raises:
        ModelFolderError: it holds none, or a head of another width.
    """
    about = read_json(folder / ABOUT_FILE) if (folder / ABOUT_FILE).is_file() else {}
    if not (folder / HEAD_FILE).is_file() or about.get("head") != HEAD_FILE:
        raise ModelFolderError(f"{folder}: holds no reward model: {ABOUT_FILE} and {HEAD_FILE} were looked for")
    decoder = Pretrained(path=folder).build(context or ModelContext(0, None))
    assert isinstance(decoder, Decoder)
    model = RewardModel(decoder)
    weight = load_file(folder / HEAD_FILE).get("score.weight")
    if weight is None or weight.shape != model.score.weight.shape:
        found = "none" if weight is None else tuple(weight.shape)
        raise ModelFolderError(
            f"{folder / HEAD_FILE}: score.weight should have shape {tuple(model.score.weight.shape)}, found {found}"
        )
    with torch.no_grad():
        model.score.weight.copy_(weight)
    return model
