"""The all-to-all in two steps, within nodes and then between them (SE-MoE, Shen et al., 2022, section 4.3).

Rank (i, k) is number k of node i. Step A, within node i: (i, k) gives (i, l) what it has for every (j, l). Step B,
between ranks of equal number: (i, l) gives (j, l) what the whole of node i has for it. Messages between nodes are fewer
and larger: n - 1 of p times the size, for (n - 1) * p. The result is that of the all-to-all in one step, to the bit.
Shapes: n nodes, p ranks per node, P = n * p, C kinds of rows, S rows sent, R rows received, M rows after step A.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resilin.parallel.errors import ParallelError
from resilin.parallel.exchange import swapped
from resilin.parallel.expert.exchange import Route, swap_equal
from resilin.parallel.group import Group


class TwoLevelExchange:
    """All-to-all within nodes, then between them.

    Args:
        group: all ranks, node after node.
        node: those of this rank's node.
        peers: those with this rank's number on all nodes.

    Raises:
        ParallelError: the three groups do not fit.
    """

    def __init__(self, group: Group, node: Group, peers: Group) -> None:
        p = node.size
        at, number = divmod(group.index, p)
        fits = group.size == p * peers.size
        fits = fits and node.ranks == group.ranks[at * p : (at + 1) * p] and peers.ranks == group.ranks[number::p]
        if not fits:
            raise ParallelError(
                f"ranks {group.ranks} are not nodes of {p} such as {node.ranks}, with {peers.ranks} of equal number"
            )
        self.group, self.node, self.peers = group, node, peers

    def route(self, counts_PC: Tensor) -> tuple[Tensor, Route]:
        """See `Exchange.route`."""
        n, p = self.peers.size, self.node.size
        counts_npC = counts_PC.view(n, p, -1)
        through_pnC = swap_equal(counts_npC.transpose(0, 1), self.node)  # from each of the node, for each node
        received_npC = swap_equal(through_pnC.transpose(0, 1), self.peers)  # from each node and its ranks
        route = _TwoLevelRoute(self.node, self.peers, counts_npC.sum(-1), through_pnC.sum(-1), received_npC.sum(-1))
        return received_npC.reshape(n * p, -1), route


class _TwoLevelRoute:
    """Rows for (j, l) go to (i, l) first.

    Args:
        node: this rank's.
        peers: of equal number.
        sent_np: rows for each node and number.
        through_pn: rows that pass here, from each of the node for each node.
        received_np: rows from each node and number.
    """

    def __init__(self, node: Group, peers: Group, sent_np: Tensor, through_pn: Tensor, received_np: Tensor) -> None:
        self.node, self.peers = node, peers
        self.by_number, self.to_node = _transposed(sent_np)
        self.by_node, self.to_pass = _transposed(through_pn)
        self.sent_a, self.received_a = sent_np.sum(0).tolist(), through_pn.sum(1).tolist()
        self.sent_b, self.received_b = through_pn.sum(0).tolist(), received_np.sum(1).tolist()

    def there(self, rows_SD: Tensor) -> Tensor:
        """(S, D) by receiver -> (R, D) by sender."""
        near = rows_SD.index_select(0, self.by_number.to(rows_SD.device))
        passing = swapped(near, self.sent_a, self.received_a, self.node)
        passing = passing.index_select(0, self.by_node.to(rows_SD.device))
        return swapped(passing, self.sent_b, self.received_b, self.peers)

    def back(self, rows_RD: Tensor) -> Tensor:
        """(R, D) by sender -> (S, D) by receiver."""
        passing = swapped(rows_RD, self.received_b, self.sent_b, self.peers)
        passing = passing.index_select(0, self.to_pass.to(rows_RD.device))
        near = swapped(passing, self.received_a, self.sent_a, self.node)
        return near.index_select(0, self.to_node.to(rows_RD.device))


def _transposed(counts_XY: Tensor) -> tuple[Tensor, Tensor]:
    """Where rows that lie by (x, y) come from when they lie by (y, x), and the inverse.

    Args:
        counts_XY: how many rows each (x, y) has.
    """
    block = torch.repeat_interleave(torch.arange(counts_XY.numel()), counts_XY.reshape(-1))
    y = block % counts_XY.shape[1]
    order = y.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order))
    return order, inverse
