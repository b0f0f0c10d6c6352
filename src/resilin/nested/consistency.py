"""How a sub-model's predictions compare with the whole model's: loss, agreement, divergence.

Shapes: B rows, T tokens, N valid tokens, C tokens of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resilin.inference.scoring import LOGITS_AT_ONCE, evaluating
from resilin.models.decoder import Decoder
from resilin.nested.budgets import Budget
from resilin.nested.in_place import budget, decoder_in, full
from resilin.nouns import Batch
from resilin.objective.next_token import IGNORE


@dataclass(frozen=True, slots=True)
class Consistency:
    """Of one sub-model, over some held-out tokens.

    Attributes:
        tokens: how many labels were foretold.
        loss: nats per token.
        agreement: share of tokens for which its most probable next token is the whole model's (MatFormer, section 3.2).
        kl: KL(whole model || sub-model) in nats per token.
    """

    tokens: int
    loss: float
    agreement: float
    kl: float


def _hidden(decoder: Decoder, batch: Batch, valid_BT: Tensor) -> Tensor:
    output = decoder(batch["tokens"], batch.get("positions"), batch.get("documents"))
    hidden_ND: Tensor = output.hidden_BTD[valid_BT]
    return hidden_ND


def consistency(
    model: nn.Module,
    members: Sequence[Budget],
    batches: Iterable[Batch],
    progress: Callable[[int], None] | None = None,
) -> list[Consistency]:
    """Compare sub-models with the whole model, all on the same prefixes.

    Args:
        model: with a decoder; its mode is left as it was.
        members: the sub-models.
        batches: with `tokens` and `labels`, -100 where none is foretold.
        progress: called after each batch with how many are done.

    Raises:
        BudgetError: a budget does not fit.
    """
    decoder = decoder_in(model)
    device = decoder.embed.weight.device
    sums = torch.zeros(len(members), 3, dtype=torch.float64)
    rows, tokens = max(1, LOGITS_AT_ONCE // decoder.settings.vocab_size // 4), 0
    with evaluating(decoder):
        for number, batch in enumerate(batches):
            batch = batch.to(device)
            valid_BT = batch["labels"] != IGNORE
            labels_N = batch["labels"][valid_BT]
            tokens += len(labels_N)
            with full(decoder):
                whole_ND = _hidden(decoder, batch, valid_BT)
            for member, wanted in enumerate(members):
                with budget(decoder, wanted):
                    part_ND = _hidden(decoder, batch, valid_BT)
                for start in range(0, len(labels_N), rows):
                    chunk = slice(start, start + rows)
                    with full(decoder):
                        whole_CV = decoder.logits(whole_ND[chunk]).log_softmax(-1)
                    with budget(decoder, wanted):
                        part_CV = decoder.logits(part_ND[chunk]).log_softmax(-1)
                    sums[member] += _sums(whole_CV, part_CV, labels_N[chunk]).cpu()
            if progress is not None:
                progress(number + 1)
    count = max(tokens, 1)
    return [Consistency(tokens, *(row / count).tolist()) for row in sums]


def _sums(whole_CV: Tensor, part_CV: Tensor, labels_C: Tensor) -> Tensor:
    """Sums over tokens of the loss, of agreements, and of the divergence."""
    loss = -part_CV.gather(1, labels_C[:, None]).double().sum()
    agreed = (whole_CV.argmax(-1) == part_CV.argmax(-1)).double().sum()
    kl = (whole_CV.exp() * (whole_CV - part_CV)).double().sum()
    return torch.stack([loss, agreed, kl])
