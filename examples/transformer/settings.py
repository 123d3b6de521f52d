"""Settings of a run: one dataclass, its presets, and the command line made from both."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PATTERNS = ("random", "banded", "butterfly", "block_diagonal")
DTYPES = ("float32", "bfloat16", "float16")
ATTENTION = ("xla", "cudnn")

SETTINGS_FILE = "settings.json"


def _option(default: Any, text: str, **kwargs: Any) -> Any:
    """A dataclass field that carries what argparse needs to know about it."""
    return dataclasses.field(default=default, metadata={"help": text, **kwargs})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides the losses of a run; the defaults are the preset `cpu`."""

    data: str = _option("", "file or folder to learn from (default: the source of Python's standard library)")
    dense: bool = _option(False, "train the dense twin: the same code with ordinary linear layers")
    density: float = _option(0.25, "fraction of the blocks that each sparse matrix keeps")
    block_size: int = _option(32, "side of a block", choices=(8, 16, 32, 64, 128))
    pattern: str = _option("random", "which blocks are kept", choices=PATTERNS)
    d_model: int = _option(256, "width of the residual stream")
    layers: int = _option(3, "number of blocks of attention and MLP")
    heads: int = _option(4, "attention heads")
    mlp_ratio: int = _option(4, "hidden width of the MLP over d_model")
    context: int = _option(128, "bytes that the model sees at once")
    batch_size: int = _option(8, "windows per step")
    steps: int = _option(1400, "training steps")
    lr: float = _option(6e-3, "peak learning rate")
    warmup: int = _option(50, "steps until the learning rate peaks; afterwards it follows a cosine down to a tenth")
    weight_decay: float = _option(0.1, "decoupled weight decay of every matrix")
    clip: float = _option(1.0, "largest global norm of a gradient")
    dtype: str = _option("float32", "dtype of the computation; parameters stay float32", choices=DTYPES)
    attention: str = _option("xla", "attention kernel; cudnn needs a GPU and a 16-bit dtype", choices=ATTENTION)
    deterministic: bool = _option(True, "on a GPU, exclude autotuning and kernels that differ between runs")
    seed: int = _option(0, "seed of patterns, initial values and batches")
    eval_interval: int = _option(100, "steps between evaluations on the held-out text")
    eval_windows: int = _option(256, "windows of the held-out text in an evaluation")
    checkpoint_interval: int = _option(200, "steps between checkpoints")
    sample_bytes: int = _option(400, "length of the text generated at the end")

    def __post_init__(self) -> None:
        """Refuse settings that no model can have.

        Raises:
          ValueError: a setting is out of its range; the message names it, its value and what is wanted.
        """
        for name in (
            *("d_model", "layers", "heads", "mlp_ratio", "context", "batch_size", "steps"),
            *("eval_interval", "eval_windows", "checkpoint_interval"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.d_model % (2 * self.heads):
            raise ValueError(f"d_model must be a multiple of 2 * heads = {2 * self.heads}, got {self.d_model}")
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be in (0, 1], got {self.density}")

    def kind(self) -> str:
        """A short name of what is trained, e.g. `random-0.25` or `dense`."""
        return "dense" if self.dense else f"{self.pattern}-{self.density:g}"


PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {},
    # About 100 million parameters when dense.
    "gpu": {
        "block_size": 64,
        "d_model": 768,
        "layers": 14,
        "heads": 12,
        "context": 1024,
        "batch_size": 16,
        "steps": 2000,
        "lr": 1e-3,
        "warmup": 200,
        "dtype": "bfloat16",
        "eval_interval": 200,
        "eval_windows": 128,
        "checkpoint_interval": 500,
    },
}


@dataclasses.dataclass(frozen=True)
class Run:
    """Where a run is kept, and whether it goes on from its last checkpoint."""

    folder: Path
    resume: bool


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train_transformer.py",
        description="Train a byte-level Transformer with block-sparse layers on real text.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="settings to start from")
    parser.add_argument("--run-dir", type=Path, help="folder of the run (default: runs/PRESET-KIND-N, N a free number)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of --run-dir")
    for field in dataclasses.fields(Settings):
        options = {"default": field.default, **field.metadata}
        if field.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = field.type
        parser.add_argument("--" + field.name.replace("_", "-"), **options)
    return parser


def _free_folder(name: str) -> Path:
    number = 1
    while (folder := Path("runs", f"{name}-{number}")).exists():
        number += 1
    return folder


def parse(argv: Sequence[str] | None = None) -> tuple[Settings, Run]:
    """Read the command line; a resumed run brings the settings that it was started with.

    Args:
      argv: arguments without the program's name; `None` takes those of the process.

    Raises:
      SystemExit: the arguments contradict each other, themselves or the run to resume (as argparse does).
    """
    parser = _parser()
    given, _ = parser.parse_known_args(argv)
    stored = None
    if given.resume:
        if given.run_dir is None or not (given.run_dir / SETTINGS_FILE).is_file():
            parser.error(f"--resume needs --run-dir with a folder that holds a run, got {given.run_dir}")
        stored = json.loads((given.run_dir / SETTINGS_FILE).read_text())["settings"]
    elif given.run_dir is not None and (given.run_dir / SETTINGS_FILE).exists():
        parser.error(f"{given.run_dir} holds a run already: add --resume or choose another --run-dir")
    parser.set_defaults(**(stored or PRESETS[given.preset]))
    values = vars(parser.parse_args(argv))
    preset, folder, resume = values.pop("preset"), values.pop("run_dir"), values.pop("resume")
    if stored is not None:
        for name in [name for name in values if values[name] != stored[name]]:
            parser.error(f"--resume: this run was started with {name} = {stored[name]!r}, got {values[name]!r}")
    try:
        settings = Settings(**values)
    except ValueError as error:
        parser.error(str(error))
    return settings, Run(folder or _free_folder(f"{preset}-{settings.kind()}"), resume)
