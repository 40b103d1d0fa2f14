"""Log-mel spectrograms of sounds, in NumPy: what a Transformer over spectrogram patches reads (AST; Gong et al. 2021).

Mel is O'Shaughnessy's formula as HTK has it, mel(f) = 2595 log10(1 + f / 700); filters are triangles of height 1
between neighbouring centres, which are evenly spaced in mel from 0 to half of the rate.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import scipy.signal

FRAMES_PER_SECOND = 50  # hop of 20 ms
_WINDOWS_PER_SECOND = 20  # window of 50 ms
_FLOOR = 1e-10  # of the power: silence has a logarithm
_RANGE = 8.0 * math.log(10.0)  # 80 dB: what is softer than a sound's loudest cell by more is cut off


def hz_to_mel(hz: np.ndarray | float) -> np.ndarray:
    """HTK's mel of a frequency."""
    return 2595.0 * np.log10(1.0 + np.asarray(hz, np.float64) / 700.0)


def mel_to_hz(mel: np.ndarray | float) -> np.ndarray:
    """The inverse of `hz_to_mel`."""
    return 700.0 * (10.0 ** (np.asarray(mel, np.float64) / 2595.0) - 1.0)


@functools.lru_cache(maxsize=8)
def mel_filters(rate: int, n_fft: int, mels: int) -> np.ndarray:
    """[mels, n_fft / 2 + 1] float64: the weight of each frequency bin in each mel band."""
    centres = mel_to_hz(np.linspace(0.0, hz_to_mel(rate / 2), mels + 2))  # [mels + 2], both ends included
    bins = np.arange(n_fft // 2 + 1) * (rate / n_fft)
    width = np.diff(centres)
    rise = (bins[None] - centres[:-2, None]) / width[:-1, None]
    fall = (centres[2:, None] - bins[None]) / width[1:, None]
    return np.maximum(0.0, np.minimum(rise, fall))


def window_size(rate: int) -> tuple[int, int]:
    """(samples of a window, size of its Fourier transform: the power of two above it)."""
    window = rate // _WINDOWS_PER_SECOND
    return window, 1 << window.bit_length()


def samples_of(frames: int, rate: int) -> int:
    """Samples that so many frames cover."""
    return (frames - 1) * (rate // FRAMES_PER_SECOND) + window_size(rate)[0]


def log_mel(signal: np.ndarray, rate: int, mels: int, frames: int) -> np.ndarray:
    """[frames, mels] float32: the natural logarithm of the mel power of a signal [T].

    A frame begins every 20 ms and sees 50 ms under a Hann window; a signal that is too short is filled with silence, a
    longer one is cut. Values are at most 80 dB below the highest.
    """
    window, n_fft = window_size(rate)
    hop, length = rate // FRAMES_PER_SECOND, samples_of(frames, rate)
    padded = np.zeros(length, np.float64)
    padded[:min(len(signal), length)] = signal[:length]
    framed = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop]  # [frames, window]
    hann = scipy.signal.get_window("hann", window)
    power = np.square(np.abs(np.fft.rfft(framed * hann, n_fft)))  # [frames, n_fft / 2 + 1]
    logs = np.log(np.maximum(power @ mel_filters(rate, n_fft, mels).T, _FLOOR))
    return np.maximum(logs, logs.max() - _RANGE).astype(np.float32)


def resampled(signal: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """A signal [T] at another rate, by a polyphase filter."""
    if rate == wanted:
        return signal
    common = math.gcd(rate, wanted)
    return scipy.signal.resample_poly(signal, wanted // common, rate // common)
