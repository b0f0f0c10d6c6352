"""A small codec of sound: short-time spectra, quantised level by level.

A frame stacks the log magnitudes of a few neighbouring short-time spectra. Level 0 is the nearest of K centres, level
q the nearest centre of what the levels before it left (residual vector quantisation; Zeghidour et al., SoundStream,
2021).
Centres are found by k-means, each level on the residuals of those before. Sound comes back from magnitudes by iterating
phases (Griffin and Lim, 1984). It stands in for a trained codec: its first level is the coarsest spectrum, and was not
distilled from a model of speech as that of ERNIE 5.0 was.

Shapes: L samples, S spectra, Z frequencies, A frames, E = stack * Z values of a frame, Q levels, K codes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from resilin.data.errors import DataError
from resilin.keys import Keys

_QUIET = 1e-3  # added to magnitudes: what is softer is silence
_SWEEPS = 12  # of k-means


@dataclass(frozen=True)
class SoundCodec:
    """See the module. Made by `fit`.

    Attributes:
        rate: samples a second.
        window: samples of a spectrum; the next one begins half a window later.
        stack: spectra of a frame.
        mean_E: of frames.
        centres_QKE: of each level.
    """

    rate: int
    window: int
    stack: int
    mean_E: Tensor
    centres_QKE: Tensor

    @property
    def levels(self) -> int:
        """Q."""
        return self.centres_QKE.shape[0]

    @property
    def codes(self) -> int:
        """K."""
        return self.centres_QKE.shape[1]

    @property
    def frame(self) -> int:
        """Samples from one frame to the next."""
        return self.window // 2 * self.stack

    @property
    def frames_a_second(self) -> float:
        """How many frames a second of sound has."""
        return self.rate / self.frame

    def encode(self, sound_L: Tensor) -> Tensor:
        """(A, Q) int64: the codes of whole frames; what is left of the last one is dropped."""
        rest_AE = frames_of(sound_L, self.window, self.stack) - self.mean_E
        found = []
        for centres_KE in self.centres_QKE:
            codes_A = _nearest(rest_AE, centres_KE)
            found.append(codes_A)
            rest_AE = rest_AE - centres_KE[codes_A]
        return torch.stack(found, 1)

    def spectra(self, codes_AQ: Tensor, levels: int | None = None) -> Tensor:
        """(A, E): the log magnitudes that codes stand for.

        Args:
            codes_AQ: int64.
            levels: only so many, from the first; None: all.
        """
        used = range(self.levels if levels is None else levels)
        total_AE = self.mean_E.expand(len(codes_AQ), -1)
        for level in used:
            total_AE = total_AE + self.centres_QKE[level][codes_AQ[:, level]]
        return total_AE

    def decode(self, codes_AQ: Tensor, sweeps: int = 32) -> Tensor:
        """(L,) float32: sound with these spectra, its phases found by iteration."""
        magnitude_ZS = (self.spectra(codes_AQ).view(-1, self.window // 2 + 1).exp() - _QUIET).clamp(min=0).t()
        hop, shape = self.window // 2, torch.hann_window(self.window)
        phase_ZS = torch.ones_like(magnitude_ZS, dtype=torch.complex64)
        length = hop * (magnitude_ZS.shape[1] - 1)
        sound_L = torch.zeros(max(length, 1))
        for _ in range(sweeps):
            sound_L = torch.istft(magnitude_ZS * phase_ZS, self.window, hop, window=shape, length=length)
            again_ZS = torch.stft(sound_L, self.window, hop, window=shape, return_complex=True)
            phase_ZS = again_ZS / again_ZS.abs().clamp(min=1e-8)
        return sound_L

    def save(self, path: Path) -> None:
        """Write it to a safetensors file."""
        from safetensors.torch import save_file

        facts = {"rate": self.rate, "window": self.window, "stack": self.stack}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"mean": self.mean_E, "centres": self.centres_QKE}, path, {"sound_codec": json.dumps(facts)})

    @classmethod
    def load(cls, path: Path) -> SoundCodec:
        """Read it back.

        Raises:
            DataError: the file is none.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                facts = json.loads((file.metadata() or {})["sound_codec"])
                return cls(**facts, mean_E=file.get_tensor("mean"), centres_QKE=file.get_tensor("centres"))
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise DataError(f"{path}: holds no codec of sound: {error}") from None


def frames_of(sound_L: Tensor, window: int, stack: int) -> Tensor:
    """(A, E): the log magnitudes of whole frames.

    Args:
        sound_L: float32 in [-1, 1].
        window: samples of a spectrum.
        stack: spectra of a frame.
    """
    if len(sound_L) <= window:
        return sound_L.new_zeros(0, stack * (window // 2 + 1))
    shape = torch.hann_window(window)
    spectra_ZS = torch.stft(sound_L, window, window // 2, window=shape, return_complex=True).abs()
    count = spectra_ZS.shape[1] // stack
    return (spectra_ZS.t()[: count * stack] + _QUIET).log().reshape(count, -1)


def _nearest(x_AE: Tensor, centres_KE: Tensor) -> Tensor:
    return (centres_KE.square().sum(1) - 2 * x_AE @ centres_KE.t()).argmin(1)


@torch.no_grad()
def fit(sounds: Sequence[Tensor], rate: int, window: int, stack: int, levels: int, codes: int) -> SoundCodec:
    """A codec for sounds like these.

    Args:
        sounds: (L,) float32 each, of the same rate.
        rate: samples a second.
        window: samples of a spectrum, even.
        stack: spectra of a frame.
        levels: Q.
        codes: K.

    Raises:
        DataError: there are fewer frames than codes.
    """
    frames_AE = torch.cat([frames_of(sound, window, stack) for sound in sounds])
    if len(frames_AE) < codes:
        raise DataError(
            f"{len(frames_AE)} frames of sound for {codes} codes: give more sound, or fewer codes (source.sound.codes)"
        )
    mean_E = frames_AE.mean(0)
    rest_AE, centres = frames_AE - mean_E, []
    for level in range(levels):
        keys = Keys.of_step(0, 0).fold("codes").fold(level)
        centres_KE = _centres(rest_AE, codes, keys)
        centres.append(centres_KE)
        rest_AE = rest_AE - centres_KE[_nearest(rest_AE, centres_KE)]
    return SoundCodec(rate, window, stack, mean_E, torch.stack(centres))


def _centres(x_AE: Tensor, count: int, keys: Keys) -> Tensor:
    """(count, E): k-means, begun with drawn frames; a centre that loses all frames stays where it is."""
    chosen = keys.uniform((len(x_AE),))[0].argsort()[:count]
    centres_KE = x_AE[chosen].clone()
    for _ in range(_SWEEPS):
        codes_A = _nearest(x_AE, centres_KE)
        counts_K1 = torch.bincount(codes_A, minlength=count)[:, None]
        sums_KE = torch.zeros_like(centres_KE).index_add_(0, codes_A, x_AE)
        centres_KE = torch.where(counts_K1 > 0, sums_KE / counts_K1.clamp(min=1), centres_KE)
    return centres_KE
