"""Log-probabilities that a model gives to tokens of given texts, in batches of similar length.

Shape suffixes: B sequences, T positions, N scored tokens of a batch, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resilin.models.decoder import Decoder

LOGITS_AT_ONCE = 2**24
"""How many logits exist at a time (64 MiB in float32)."""


@dataclass(frozen=True, slots=True)
class Passage:
    """Tokens of which some are scored, each given all before it.

    Attributes:
        tokens: at least two.
        first: index of the first scored token, in [1, len(tokens)]; those before it are only context.
    """

    tokens: Sequence[int]
    first: int

    def __post_init__(self) -> None:
        if not 1 <= self.first <= len(self.tokens):
            raise ValueError(f"first scored token {self.first} should be in [1, {len(self.tokens)}]")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the model's own mode returns afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def head_logprobs(model: Decoder, hidden_ND: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and whether it is the most probable token, without all logits at once.

    Returns:
        float32 (N,) and bool (N,).
    """
    rows = max(1, LOGITS_AT_ONCE // model.settings.vocab_size)
    logprobs, best = [], []
    for start in range(0, len(targets_N), rows):
        logits_NV = model.logits(hidden_ND[start : start + rows]).float()
        part_N = targets_N[start : start + rows]
        chosen_N = logits_NV.gather(1, part_N[:, None])[:, 0]
        logprobs.append(chosen_N - logits_NV.logsumexp(1))
        best.append(chosen_N == logits_NV.amax(1))
    if not logprobs:
        return torch.empty(0, device=hidden_ND.device), torch.empty(0, dtype=torch.bool, device=hidden_ND.device)
    return torch.cat(logprobs), torch.cat(best)


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in groups of similar length, longest first, whose padded size stays within `batch_tokens`."""
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if group and lengths[group[0]] * (len(group) + 1) > batch_tokens:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def score(
    model: Decoder,
    passages: Iterable[Passage],
    *,
    batch_tokens: int = 4096,
    progress: Callable[[int], None] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Log-probabilities of the scored tokens of each passage.

    Args:
        model: on any device; its mode is left as it was.
        passages: in any order; batches are made of similar lengths and the result is in the given order.
        batch_tokens: positions in a batch, padding counted; one longer passage is a batch of its own.
        progress: called after each batch with the number of passages it held.

    Returns:
        for each passage float32 (len(tokens) - first,) on the CPU, and bool: whether each token was the model's
        most probable one.
    """
    passages = list(passages)
    device = next(model.parameters()).device
    results: list[tuple[Tensor, Tensor]] = [(torch.empty(0), torch.empty(0, dtype=torch.bool))] * len(passages)
    with evaluating(model):
        for group in _batches([len(passage.tokens) for passage in passages], batch_tokens):
            picked = [passages[index] for index in group]
            counts = [len(passage.tokens) - passage.first for passage in picked]
            # The last token of a passage predicts nothing that is scored, so it is not fed. A causal model's
            # earlier positions do not see what pads the end.
            width = max(len(passage.tokens) for passage in picked) - 1
            tokens_BT = torch.zeros(len(picked), max(width, 1), dtype=torch.int64)
            scored_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
            for row, passage in enumerate(picked):
                fed = len(passage.tokens) - 1
                tokens_BT[row, :fed] = torch.as_tensor(passage.tokens[:-1])
                scored_BT[row, passage.first - 1 : fed] = True
            targets_N = torch.cat([torch.as_tensor(p.tokens[p.first :], dtype=torch.int64) for p in picked])
            hidden_BTD = model(tokens_BT.to(device)).hidden_BTD
            logprobs_N, best_N = head_logprobs(model, hidden_BTD[scored_BT.to(device)], targets_N.to(device))
            for index, *parts in zip(group, logprobs_N.cpu().split(counts), best_N.cpu().split(counts), strict=True):
                results[index] = (parts[0], parts[1])
            if progress is not None:
                progress(len(group))
    return results
