"""Keys and values of the tokens a batch of texts has so far, for decoding one token at a time.

Rows may have different lengths. Padding (marked by document -1), on whichever side, is never stored, so a row's
tokens lie densely from slot 0 and the slot of a token is its position.
Shapes: B rows, T new tokens, K key heads, C capacity, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from resilin.models.decoder import Decoder
    from resilin.models.row_states import RowStates

T = TypeVar("T")


class KVCache:
    """Preallocated keys and values of every layer, of a looped decoder in every loop.

    Attributes:
        layers: of one loop.
        length_B: int64 (B,), tokens held by each row.
        reach: no row holds more than this many tokens; known without asking the device.
        ragged: whether rows may differ in length.
        states: what recurrent layers remember of each row, which cannot be taken back; None: there are none.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        heads: int,
        capacity: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
        loops: int = 1,
        states: RowStates | None = None,
    ) -> None:
        self.capacity, self.layers, self.states = capacity, layers, states
        # One slot more than the capacity: padding is written there and never read.
        shape = (layers * loops, batch, heads, capacity + 1, head_size)
        self.keys_LBKCD = torch.zeros(shape, dtype=dtype, device=device)
        self.values_LBKCD = torch.zeros(shape, dtype=dtype, device=device)
        self.length_B = torch.zeros(batch, dtype=torch.int64, device=device)
        self.reach = 0
        self.ragged = False
        self._first = 0  # entry of the first layer in the loop that is now computed
        self._loops = 1
        self._kept: dict[tuple[Hashable, ...], Any] = {}
        self._chains = 1
        self._read_with: list[tuple[int, int, int]] = []  # (tokens before, loops and chains from there on), ever fewer

    @staticmethod
    def of(model: Decoder, batch: int, capacity: int, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache for `batch` rows of at most `capacity` tokens, on the model's device."""
        settings, device = model.settings, model.embed.weight.device
        layers = settings.attention_layers
        return KVCache(
            len(layers),
            batch,
            max((settings.at(layer).key_heads for layer in layers), default=0),
            capacity,
            settings.head_width,
            dtype or model.stream_dtype,
            device,
            len(model.trajectory),
            model.row_states(batch),
        )

    def begin_loop(self, loop: int, *, of: int) -> None:
        """What is stored and read next belongs to this loop.

        Args:
            loop: its number, from 0.
            of: how many loops there are.

        Raises:
            ValueError: the cache has fewer, or some of its tokens were read with fewer: their keys are missing.
        """
        entries = len(self.keys_LBKCD) // self.layers
        if of > entries:
            raise ValueError(
                f"the cache was made for {entries} loops and the model is run with {of}: make it with KVCache.of "
                "inside the same budget"
            )
        if self._read_with and of > self._read_with[-1][1]:
            raise ValueError(
                f"{of} loops cannot go on from tokens that were read with {self._read_with[-1][1]}: the keys of "
                "further loops are missing; read the text anew"
            )
        self._first, self._loops = loop * self.layers, of

    def begin_chains(self, chains: int) -> None:
        """The tokens that follow are read with the first so many chains, each of which stores keys of its own.

        Raises:
            ValueError: some of the cache's tokens were read with fewer: keys of further chains are missing.
        """
        if self._read_with and chains > self._read_with[-1][2]:
            raise ValueError(
                f"{chains} chains cannot go on from tokens that were read with {self._read_with[-1][2]}: the keys of "
                "further chains are missing; read the text anew, or train with model.chains.share_keys, where the "
                "first chain makes all keys"
            )
        self._chains = chains

    def once(self, key: tuple[Hashable, ...], make: Callable[[], T]) -> T:
        """What is the same for every token, such as what a looped block is told: made for the first one and kept.

        Weights do not change while a cache is in use: its keys are theirs. Nothing is kept that a gradient may flow to.

        Args:
            key: of what is made; the loop that was begun is part of it.
            make: it.
        """
        if torch.is_grad_enabled():
            return make()
        key = (*key, self._first)
        if key not in self._kept:
            self._kept[key] = make()
        found: T = self._kept[key]
        return found

    @property
    def length(self) -> Tensor:
        """int64 (B,): tokens held by each row."""
        return self.length_B

    def slots_of(self, real_BT: Tensor | None, tokens: int) -> Tensor:
        """Where each new token will be stored: (B, T); padding goes to the slot past the end.

        Raises:
            ValueError: the cache is too small for them.
        """
        if self.reach + tokens > self.capacity:
            # `reach` counts padding; only the true lengths decide.
            self.reach = int(self.length_B.max())
            most = tokens if real_BT is None else int(real_BT.sum(1).max())
            if self.reach + most > self.capacity:
                raise ValueError(
                    f"the cache holds {self.capacity} tokens a row; {self.reach} are used and {most} more were "
                    f"given: make it with KVCache.of(model, batch, {self.reach + most} or more)"
                )
        if real_BT is None:
            return self.length_B[:, None] + torch.arange(tokens, device=self.length_B.device)
        slots_BT = self.length_B[:, None] + real_BT.cumsum(1) - 1
        self.ragged = True
        return torch.where(real_BT, slots_BT, self.capacity)

    def store(self, layer: int, slots_BT: Tensor, k_BTKD: Tensor, v_BTKD: Tensor) -> None:
        """Write one layer's new keys and values; of a layer that has, or is run with, fewer key heads, the first."""
        T, heads = slots_BT.shape[1], k_BTKD.shape[2]
        layer += self._first
        if not self.ragged:  # every row has `reach` tokens
            new = slice(self.reach, self.reach + T)
            self.keys_LBKCD[layer, :, :heads, new] = k_BTKD.transpose(1, 2)
            self.values_LBKCD[layer, :, :heads, new] = v_BTKD.transpose(1, 2)
            return
        if T == 1 and heads == self.keys_LBKCD.shape[2]:  # whole vectors are copied, as quick as a slice
            heads_BK = torch.arange(k_BTKD.shape[0] * k_BTKD.shape[2], device=slots_BT.device).view(len(slots_BT), -1)
            places = (heads_BK * (self.capacity + 1) + slots_BT).flatten()
            for stored, new_BTKD in ((self.keys_LBKCD, k_BTKD), (self.values_LBKCD, v_BTKD)):
                flat = stored[layer].view(-1, stored.shape[-1])
                flat.index_copy_(0, places, new_BTKD.reshape(-1, stored.shape[-1]).to(stored.dtype))
            return
        rows = torch.arange(slots_BT.shape[0], device=slots_BT.device)[:, None]
        self.keys_LBKCD[layer, :, :heads].transpose(1, 2)[rows, slots_BT] = k_BTKD.to(self.keys_LBKCD.dtype)
        self.values_LBKCD[layer, :, :heads].transpose(1, 2)[rows, slots_BT] = v_BTKD.to(self.values_LBKCD.dtype)

    def read(self, layer: int, slots: int, heads: int) -> tuple[Tensor, Tensor]:
        """One layer's keys and values of the first `slots` slots and `heads` key heads: (B, K, slots, D), views."""
        layer += self._first
        return self.keys_LBKCD[layer, :, :heads, :slots], self.values_LBKCD[layer, :, :heads, :slots]

    def advance(self, real_BT: Tensor | None, tokens: int) -> None:
        """Count the tokens just stored."""
        self._note(self.reach, self._loops, self._chains)
        self.reach = min(self.reach + tokens, self.capacity)
        if real_BT is None:
            self.length_B = self.length_B + tokens
        else:
            self.length_B = self.length_B + real_BT.sum(1)

    def _note(self, reach: int, loops: int, chains: int) -> None:
        """Tokens from here on were read with so many loops and chains, or with fewer."""
        if self._read_with:
            _, before, others = self._read_with[-1]
            loops, chains = min(loops, before), min(chains, others)
        if not self._read_with or (loops, chains) != self._read_with[-1][1:]:
            self._read_with.append((reach, loops, chains))

    def take_back(self, tokens: int) -> None:
        """Forget the last tokens of every row: what is stored next takes their places.

        Raises:
            ValueError: some row may hold fewer, or layers have states.
        """
        if self.states is not None:
            raise ValueError("tokens cannot be taken back from the states of recurrent layers: read the text anew")
        if tokens > self.reach or (self.ragged and tokens > int(self.length_B.min())):
            raise ValueError(f"{tokens} tokens cannot be taken back: the cache holds at most {self.reach} a row")
        self.length_B = self.length_B - tokens
        self.reach -= tokens
        while self._read_with and self._read_with[-1][0] >= self.reach:
            self._read_with.pop()

    def enlarge(self, capacity: int) -> None:
        """Make room for `capacity` tokens a row."""
        for name in ("keys_LBKCD", "values_LBKCD"):
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:3], capacity + 1, old.shape[4])
            new[..., : self.capacity, :] = old[..., : self.capacity, :]
            setattr(self, name, new)
        self.capacity = capacity

    def free(self, rows: Tensor) -> None:
        """Forget what these rows hold; they are read and written like the others until they are filled again."""
        self.length_B = self.length_B.index_fill(0, rows, 0)
        self.ragged = True
        if self.states is not None:
            self.states.free(rows)

    def fill(self, rows: Tensor, source: KVCache, of_source: Tensor, width: int) -> None:
        """Put the first `width` tokens (fewer where there are fewer) of other rows in place of what these hold.

        Args:
            rows: of this cache.
            source: a cache of the same model, or this one.
            of_source: for each of `rows`, the row of `source`.
            width: at most the capacity of either cache.

        Raises:
            ValueError: layers have states, which are of all tokens of a row, and a row has more than `width`.
        """
        if self.states is not None:
            assert source.states is not None
            longest = int(source.length_B[of_source].max())
            if longest > width:
                raise ValueError(
                    f"a row of {longest} tokens was to be cut to {width}: the states of recurrent layers are of all of "
                    "it; read the text anew"
                )
            self.states.fill(rows, source.states, of_source)
        for one in source._read_with:
            self._note(*one)
        self.keys_LBKCD[:, rows, :, :width] = source.keys_LBKCD[:, of_source, :, :width]
        self.values_LBKCD[:, rows, :, :width] = source.values_LBKCD[:, of_source, :, :width]
        self.length_B = self.length_B.index_copy(0, rows, source.length_B[of_source].clamp(max=width))
        self.ragged = True
        self.reach = max(self.reach, width)

    def keep_rows(self, rows: Tensor) -> None:
        """Keep (or repeat, or reorder) the rows at these indices; the others' memory is released."""
        self.keys_LBKCD = self.keys_LBKCD.index_select(1, rows)
        self.values_LBKCD = self.values_LBKCD.index_select(1, rows)
        self.length_B = self.length_B[rows]
        if self.states is not None:
            self.states.keep_rows(rows)
