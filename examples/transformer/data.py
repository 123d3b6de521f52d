"""Text as bytes: where it comes from, which part is held out, and which windows a step sees."""

import dataclasses
import hashlib
import sysconfig
from pathlib import Path

import numpy as np

from transformer.settings import Settings

# Tests say little twice; generated tables would make held-out text look easy.
_STDLIB_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}
_ENWIK8_BYTES = 100_000_000


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Two disjoint texts.

    Attributes:
      name: what it is, for people.
      train: text to learn from.
      held_out: text to be judged on.
    """

    name: str
    train: bytes
    held_out: bytes

    def sha256(self) -> str:
        """A fingerprint of both texts and of the border between them."""
        parts = (hashlib.sha256(text).digest() for text in (self.train, self.held_out))
        return hashlib.sha256(b"".join(parts)).hexdigest()


def load(path: str) -> Corpus:
    """Read a corpus: a file, a folder, or Python's standard library when `path` is empty.

    Args:
      path: a file (split by position), a folder (split by whole files), or "".

    Raises:
      FileNotFoundError: there is nothing at `path`, or no text in it.
    """
    if not path:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [p for p in root.rglob("*.py") if not _STDLIB_LEFT_OUT.intersection(p.relative_to(root).parts)]
        return _split_files("source of Python's standard library", root, files)
    root = Path(path)
    if root.is_file():
        return _split_bytes(root.name, root.read_bytes())
    if root.is_dir():
        files = [p for p in root.rglob("*") if p.is_file() and not p.name.startswith(".")]
        return _split_files(root.name, root, files)
    raise FileNotFoundError(f"data must be a file or a folder, got {path!r}")


def _split_bytes(name: str, text: bytes) -> Corpus:
    """The first nine tenths to learn from, the last to be judged on; enwik8 by its usual 90/5/5 (the test 5 unused)."""
    border = len(text) * 9 // 10
    end = len(text) * 95 // 100 if len(text) == _ENWIK8_BYTES else len(text)
    return Corpus(name, text[:border], text[border:end])


def _split_files(name: str, root: Path, files: list[Path]) -> Corpus:
    """Hold out a tenth by whole files.

    Each file's place in line is the hash of its name, so that the order in which a file system lists a folder plays
    no part; a file is held out if it still fits within a tenth of all bytes.
    """
    texts = {path.relative_to(root).as_posix(): path.read_bytes() for path in files}
    texts = {key: text for key, text in texts.items() if text}
    if not texts:
        raise FileNotFoundError(f"no text found in {root}; name a file or folder with --data")
    if len(texts) == 1:
        return _split_bytes(name, *texts.values())
    room = sum(map(len, texts.values())) // 10
    held_out = set()
    for key in sorted(texts, key=lambda key: hashlib.sha256(key.encode()).digest()):
        if len(texts[key]) <= room:
            held_out.add(key)
            room -= len(texts[key])
    if not held_out:
        held_out = {min(texts, key=lambda key: (len(texts[key]), key))}
    ordered = sorted(texts)
    return Corpus(
        name,
        b"".join(texts[key] for key in ordered if key not in held_out),
        b"".join(texts[key] for key in ordered if key in held_out),
    )


def _windows(text: bytes, starts: np.ndarray, length: int) -> np.ndarray:
    return np.frombuffer(text, np.uint8)[starts[..., None] + np.arange(length)]


def _last_start(text: bytes, length: int) -> int:
    if len(text) < length:
        raise ValueError(f"the text has {len(text)} bytes, but one window has context + 1 = {length}")
    return len(text) - length


def training_batch(text: bytes, step: int, settings: Settings) -> np.ndarray:
    """The windows of one step: a pure function of its arguments, so that a resumed run sees what it would have seen.

    Returns:
      uint8 (batch_size, context + 1): inputs are all but the last column, targets all but the first.

    Raises:
      ValueError: the text is shorter than one window.
    """
    length = settings.context + 1
    random = np.random.default_rng((settings.seed, step))
    starts = random.integers(0, _last_start(text, length), size=settings.batch_size, endpoint=True)
    return _windows(text, starts, length)


def evaluation_batches(text: bytes, settings: Settings) -> np.ndarray:
    """The same windows at every evaluation, evenly spread over the text.

    Returns:
      uint8 (batches, batch_size, context + 1) with at least `settings.eval_windows` windows.

    Raises:
      ValueError: the text is shorter than one window.
    """
    length = settings.context + 1
    batches = -(-settings.eval_windows // settings.batch_size)
    starts = np.linspace(0, _last_start(text, length), batches * settings.batch_size).astype(np.int64)
    return _windows(text, starts.reshape(batches, settings.batch_size), length)
