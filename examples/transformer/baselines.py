"""What a learned model has to beat: static byte frequencies and general-purpose compressors."""

import lzma
import zlib

import numpy as np

from transformer.data import Corpus


def _counts(text: bytes) -> np.ndarray:
    return np.bincount(np.frombuffer(text, np.uint8), minlength=256).astype(np.float64)


def static_bits(text: bytes, learned_from: bytes) -> float:
    """Bits per byte of `text` under the byte frequencies of `learned_from` (each count one too high, so none is 0)."""
    frequencies = _counts(learned_from) + 1
    return float(-_counts(text) @ np.log2(frequencies / frequencies.sum()) / len(text))


def entropy_bits(text: bytes) -> float:
    """Bits per byte of `text` under its own byte frequencies: no static distribution does better."""
    frequencies = _counts(text) / len(text)
    seen = frequencies[frequencies > 0]
    return float(-seen @ np.log2(seen))


def bits_per_byte(corpus: Corpus) -> dict[str, float]:
    """Every baseline on the held-out text, by name, the weakest first."""
    text = corpus.held_out
    return {
        "static bytes (training text)": static_bits(text, corpus.train),
        "static bytes (best possible)": entropy_bits(text),
        "zlib -9 (gzip)": 8 * len(zlib.compress(text, 9)) / len(text),
        "lzma -9 (xz)": 8 * len(lzma.compress(text, preset=9)) / len(text),
    }
