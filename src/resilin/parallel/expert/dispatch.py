"""Tokens' rows to the ranks that hold their experts, and what the experts make of them back.

Shapes: N tokens of this rank, k choices per token, R = N * k rows, A rows that arrive, D hidden size, E experts,
P ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from resilin.models.grouped import gather, group_choices, spread
from resilin.parallel.errors import ParallelError
from resilin.parallel.expert.exchange import Exchange, send, send_back
from resilin.parallel.expert.table import ExpertTable

Local = Callable[[Tensor, None, Tensor], Tensor]


class Dispatch:
    """What `Experts` computes where its experts are divided among ranks: no token is dropped, whatever is chosen.

    Every rank has tokens of its own, any number of them. Rows go sorted by expert; an owner computes them sorted by
    expert, sender and token, which is the order of one process that has all tokens. So an expert's gradient is already
    the sum over the tokens of all these ranks.

    Args:
        table: who holds which experts.
        exchange: carries the rows.

    Raises:
        ParallelError: the table is for another number of ranks.
    """

    def __init__(self, table: ExpertTable, exchange: Exchange) -> None:
        if table.ranks != exchange.group.size:
            raise ParallelError(f"a table of {table.ranks} ranks ({table.counts}) is given {exchange.group.size} ranks")
        self.table, self.exchange = table, exchange
        # Experts by owner: as rows are sent, a run to each rank.
        order = [expert for rank in range(table.ranks) for expert in table.held(rank)]
        self._owner_E = torch.tensor([table.owners[expert] for expert in order])
        self._place_E = torch.tensor([place for count in table.counts for place in range(count)])
        self._number_E = None if order == sorted(order) else torch.tensor(order).argsort()

    def __deepcopy__(self, memo: dict[int, object]) -> Dispatch:
        return self  # process groups cannot be copied, and nothing here changes

    def __call__(self, local: Local, x_ND: Tensor, weights_Nk: Tensor | None, chosen_Nk: Tensor) -> Tensor:
        """(N, D) -> (N, D); all ranks of the group call together.

        Args:
            local: `local(x_AD, None, chosen_A1)` computes this rank's experts, numbered from 0.
            x_ND: tokens.
            weights_Nk: of their choices; None: each has one, which counts as it is.
            chosen_Nk: numbers of experts of the whole layer.
        """
        if self._number_E is not None:
            chosen_Nk = self._number_E.to(chosen_Nk.device)[chosen_Nk]
        groups = group_choices(chosen_Nk, self.table.experts)
        counts_PC = torch.zeros(self.table.ranks, self.table.most, dtype=torch.int64)
        counts_PC[self._owner_E, self._place_E] = groups.sizes_G.cpu()
        received_PC, route = self.exchange.route(counts_PC)
        arrived_AD = send(spread(x_ND, groups), route)
        places = torch.arange(self.table.most).repeat(self.table.ranks)
        of_A = torch.repeat_interleave(places, received_PC.reshape(-1)).to(x_ND.device)
        mixed_RD = send_back(local(arrived_AD, None, of_A[:, None]), route)
        by_token_NkD = gather(mixed_RD, groups, chosen_Nk.shape[1])
        if weights_Nk is None:
            return by_token_NkD.squeeze(1)
        return (weights_Nk[:, None].to(by_token_NkD.dtype) @ by_token_NkD).squeeze(1)
