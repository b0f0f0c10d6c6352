"""A shuffle that needs no index in memory: a keyed permutation of [0, n).

A Feistel network over Z_a x Z_b with a * b just above n, walked until it lands below n (Black and Rogaway, "Ciphers
with arbitrary finite domains", CT-RSA 2002: the generalised-Feistel and the cycle-walking constructions). The round
function is the 64-bit finaliser of SplitMix64, so a batch of positions is a few vectorised integer operations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from resilin.keys import hash64

_ROUNDS = 8
_MULTIPLY_1, _MULTIPLY_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_LARGEST = 2**62

Indices = NDArray[np.int64]


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * _MULTIPLY_1
    x = (x ^ (x >> np.uint64(27))) * _MULTIPLY_2
    mixed: NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed


@dataclass(frozen=True)
class Permutation:
    """A bijection of [0, n) chosen by a key.

    Attributes:
        n: size of the domain, at least 1.
        key: any 64-bit number; equal keys give equal permutations on every machine.
    """

    n: int
    key: int
    _sides: tuple[np.uint64, np.uint64] = field(init=False, repr=False)
    _round_keys: tuple[np.uint64, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.n <= _LARGEST:
            raise ValueError(f"a permutation needs between 1 and 2**62 elements, not {self.n}")
        a = math.isqrt(self.n - 1) + 1
        b = -(-self.n // a)
        object.__setattr__(self, "_sides", (np.uint64(a), np.uint64(b)))
        keys = tuple(np.uint64(hash64("permutation round", self.key, i)) for i in range(_ROUNDS))
        object.__setattr__(self, "_round_keys", keys)

    def _forward(self, x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        a, b = self._sides
        left, right = x // b, x % b  # in Z_a, Z_b
        for i, key in enumerate(self._round_keys):
            if i % 2 == 0:
                left = (left + _mix(right ^ key) % a) % a
            else:
                right = (right + _mix(left ^ key) % b) % b
        return left * b + right

    def _backward(self, x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        a, b = self._sides
        left, right = x // b, x % b
        for i in reversed(range(_ROUNDS)):
            key = self._round_keys[i]
            if i % 2 == 0:
                left = (left + (a - _mix(right ^ key) % a)) % a
            else:
                right = (right + (b - _mix(left ^ key) % b)) % b
        return left * b + right

    def _walk(self, indices: Indices, inverse: bool) -> Indices:
        x = np.asarray(indices, dtype=np.int64)
        if x.size and (int(x.min()) < 0 or int(x.max()) >= self.n):
            raise IndexError(f"positions {int(x.min())} to {int(x.max())} are not all in [0, {self.n})")
        step = self._backward if inverse else self._forward
        y = step(x.astype(np.uint64))
        while (outside := y >= self.n).any():
            y[outside] = step(y[outside])
        return y.astype(np.int64)

    def __call__(self, positions: Indices) -> Indices:
        """Where each position of the shuffled order reads: int64, the shape of `positions`.

        Raises:
            IndexError: for a position outside [0, n).
        """
        return self._walk(positions, inverse=False)

    def inverse(self, values: Indices) -> Indices:
        """The positions that these values stand at: `inverse(p(x)) == x`."""
        return self._walk(values, inverse=True)
