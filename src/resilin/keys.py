"""Randomness that belongs to the work, not to the worker.

Every random number is a pure function of (seed, step, slot, layer, call, element): Philox4x32-10 (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011) with

    key     = a 64-bit hash of the seed, the layer names and the calls
    counter = (element block, slot, step's low 32 bits, step's high 32 bits)

written in integer tensor operations, so the same bits come out on every device, in any micro-batch and on any rank,
and a recomputed activation draws the same mask again without saved generator state.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_FEW = 24  # blocks of four numbers that Python draws as fast as tensors are made for them


def philox(counter_N4: Tensor, key: tuple[int, int]) -> Tensor:
    """Philox4x32-10 of each 128-bit counter.

    Args:
        counter_N4: (..., 4) int64, each word in [0, 2**32).
        key: two words in [0, 2**32).

    Returns:
        (..., 4) int64, each word uniform in [0, 2**32).
    """
    c0, c1, c2, c3 = counter_N4.unbind(-1)
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The 64-bit products wrap, yet their bits are right: the arithmetic shift's sign bits are masked away.
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


def philox_of(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 of one counter in Python's own numbers: what `philox` gives, sooner where there are few."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def hash64(*parts: int | str | bytes) -> int:
    """A stable 64-bit hash of some parts, the same on every machine and in every process."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        raw = part if isinstance(part, bytes) else str(part).encode()
        digest.update(f"{type(part).__name__}:{len(raw)}:".encode() + raw)
    return int.from_bytes(digest.digest(), "little")


@dataclass(frozen=True, slots=True)
class Keys:
    """The random numbers of some slots of one step.

    Attributes:
        seed: the run's seed, any non-negative integer.
        step: from 0.
        slots_B: int64 (B,), the slots whose numbers are drawn; (1,) holding 0 for step-wide choices.
        path: the layers and calls folded in so far.
        steps_B: int64 (B,), the step of each slot, where they are of several; the numbers are those of each step.
        places_T: int64 (T,), where the rows of a sample's numbers stand in the whole sample, for whoever computes only
            some of its tokens; None: 0, 1, 2, ...
    """

    seed: int
    step: int
    slots_B: Tensor
    path: tuple[int | str, ...] = ()
    steps_B: Tensor | None = None
    places_T: Tensor | None = None

    @staticmethod
    def of_step(seed: int, step: int) -> Keys:
        """Keys for choices that all slots of a step share (a sampled budget, say)."""
        return Keys(seed, step, torch.zeros(1, dtype=torch.int64))

    def fold(self, name: int | str) -> Keys:
        """Keys of a named part: a layer, the n-th call of a shared block, one purpose among several."""
        return replace(self, path=(*self.path, name))

    def rows(self, start: int, stop: int) -> Keys:
        """The keys of samples `start` to `stop`."""
        steps_B = self.steps_B[start:stop] if self.steps_B is not None else None
        return replace(self, slots_B=self.slots_B[start:stop], steps_B=steps_B)

    def at(self, places_T: Tensor) -> Keys:
        """The keys of some tokens of each sample: numbers of shape (T, ...) are those rows of the whole sample's."""
        return replace(self, places_T=places_T)

    def within(self, places_T: Tensor) -> Keys:
        """The same where these keys are already of some tokens (or all) of the T whose places are given."""
        return self.at(places_T if self.places_T is None else places_T[self.places_T.to(places_T.device)])

    def bits(self, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
        """Uniform 32-bit words.

        Args:
            shape: the shape of one sample's numbers.
            device: where to compute them; the words do not depend on it.

        Returns:
            (B, *shape) int64 in [0, 2**32).
        """
        numel = math.prod(shape)
        if self.places_T is not None:
            return self._bits_at(shape, self.places_T.to(device), device)
        blocks = -(-numel // 4)
        if blocks > _MASK:
            raise ValueError(f"shape {shape} asks for {numel} numbers a sample; at most 2**34 can be drawn at once")
        words = self._words(torch.arange(blocks, device=device))
        return words.flatten(1)[:, :numel].reshape(len(words), *shape)

    def _words(self, block_N: Tensor) -> Tensor:
        """(B, N, 4): the words of some blocks of four numbers of each sample."""
        if self._are_few(block_N):
            return self._few_words(block_N.tolist())
        slots_B = self.slots_B.to(block_N.device)
        counter = torch.empty(len(slots_B), len(block_N), 4, dtype=torch.int64, device=block_N.device)
        counter[..., 0] = block_N
        counter[..., 1] = (slots_B & _MASK)[:, None]
        step = self.step if self.steps_B is None else self.steps_B.to(block_N.device)[:, None]
        counter[..., 2] = step & _MASK
        counter[..., 3] = (step >> 32) & _MASK
        key = hash64(self.seed, *self.path)
        return philox(counter, (key & _MASK, key >> 32))

    def _are_few(self, block_N: Tensor) -> bool:
        """Whether Python may draw them: few, of one step, in this process's memory, and nobody traces what is done."""
        if self.steps_B is not None or len(self.slots_B) * len(block_N) > _FEW or torch.compiler.is_compiling():
            return False
        return all(type(one) is Tensor and one.device.type == "cpu" for one in (self.slots_B, block_N))

    def _few_words(self, blocks: list[int]) -> Tensor:
        """The same on the CPU, one by one: a step's choices (a budget, a size) are drawn in microseconds."""
        hashed = hash64(self.seed, *self.path)
        key, step = (hashed & _MASK, hashed >> 32), (self.step & _MASK, (self.step >> 32) & _MASK)
        slots = self.slots_B.tolist()
        words = [[philox_of((block, slot & _MASK, *step), key) for block in blocks] for slot in slots]
        return torch.tensor(words, dtype=torch.int64).reshape(len(slots), len(blocks), 4)

    def _bits_at(self, shape: tuple[int, ...], places_T: Tensor, device: torch.device | str) -> Tensor:
        if shape[:1] != places_T.shape:
            raise ValueError(f"keys of {len(places_T)} tokens were asked for numbers of shape {shape}: they have rows")
        row = math.prod(shape[1:])
        if row % 4 == 0:
            block_N = (places_T[:, None] * (row // 4) + torch.arange(row // 4, device=device)).flatten()
            return self._words(block_N).reshape(len(self.slots_B), *shape)
        index_N = (places_T[:, None] * row + torch.arange(row, device=device)).flatten()
        lane_N1 = (index_N % 4)[:, None]
        words = self._words(index_N // 4)
        return words.gather(-1, lane_N1.expand(*words.shape[:-1], 1)).reshape(len(words), *shape)

    def uniform(self, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
        """(B, *shape) float32, uniform in [0, 1): the top 24 bits of each word, exact in float32."""
        return (self.bits(shape, device) >> 8).to(torch.float32) * 2.0**-24

    def normal(self, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
        """(B, *shape) float32, standard normal, by Box and Muller."""
        u = self.uniform((2, *shape), device)
        radius = torch.sqrt(-2.0 * torch.log1p(-u[:, 0]))
        return radius * torch.cos(2 * math.pi * u[:, 1])

    def integer(self, high: int) -> int:
        """One number in [0, high) for the first of these slots; with `of_step`, every rank draws the same."""
        words = self.rows(0, 1).bits((4,)).flatten().tolist()
        number: int = words[0] << 64 | words[1] << 32 | words[2]
        return number % high

    def generator(self) -> torch.Generator:
        """A CPU generator for library code that insists on one, seeded from these keys (first slot)."""
        words = self.rows(0, 1).bits((4,)).flatten().tolist()
        return torch.Generator().manual_seed(words[0] << 31 | words[1] >> 1)


def dropout(x_B: Tensor, p: float, keys: Keys | None) -> Tensor:
    """Zero each element with probability `p` and scale the rest by `1 / (1 - p)`, drawn from `keys`.

    Args:
        x_B: (B, ...) activations of the slots of `keys`.
        p: in [0, 1).
        keys: None (evaluation) leaves `x_B` as it is.
    """
    if keys is None or p == 0.0:
        return x_B
    return drop(x_B, p, kept(x_B, p, keys))


def kept(x_B: Tensor, p: float, keys: Keys) -> Tensor:
    """Which elements `dropout` keeps, (B, ...) bool."""
    return keys.bits(tuple(x_B.shape[1:]), x_B.device) >= int(p * 2**32)


def drop(x_B: Tensor, p: float, keep_B: Tensor) -> Tensor:
    """What `dropout` makes of `x_B` where these elements are kept."""
    return x_B * keep_B.to(x_B.dtype) * (1.0 / (1.0 - p))
