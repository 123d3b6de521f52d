"""Train a byte-level Transformer whose large matrices are block-sparse.

    python examples/train_transformer.py                  # a small model, minutes on two CPU cores
    python examples/train_transformer.py --dense          # its dense twin
    python examples/train_transformer.py --preset gpu     # about 100 million parameters when dense
    python examples/train_transformer.py --help

A run keeps everything in its folder below runs/: settings, checkpoints, results.json, loss.png and patterns.png.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Sequence
from typing import Any

from flax import nnx
from transformer import baselines, data, device, plots, report
from transformer.checkpoints import Checkpoints
from transformer.loop import Loop, new_history
from transformer.sampling import sample
from transformer.settings import SETTINGS_FILE, Run, Settings, parse
from transformer.training import create, evaluate, train_step


def open_run(run: Run, settings: Settings, corpus: data.Corpus) -> None:
    """Start the folder of a new run, or make sure that a resumed one goes on with the text it has learnt from.

    Raises:
      SystemExit: the text has changed since the run was started.
    """
    path, sha256 = run.folder / SETTINGS_FILE, corpus.sha256()
    if not run.resume:
        run.folder.mkdir(parents=True, exist_ok=True)
        report.write_json(path, {"settings": dataclasses.asdict(settings), "data_sha256": sha256})
    elif (started_with := json.loads(path.read_text())["data_sha256"]) != sha256:
        raise SystemExit(f"--resume: the text has sha256 {sha256}, but this run was started with {started_with}")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Do what the command line says; returns what results.json holds."""
    began = time.perf_counter()
    settings, run = parse(argv)
    corpus = data.load(settings.data)
    open_run(run, settings, corpus)
    weak = baselines.bits_per_byte(corpus)
    environment = report.environment()
    print(f"run: {run.folder}, {settings.kind()}, on {environment['device']} (jax {environment['jax']})")

    graph, state = create(settings)
    size = report.model_size(nnx.merge(graph, state)[0], settings)
    print(report.describe(corpus, weak, size))

    batch, held_out = data.training_batch(corpus.train, 0, settings), data.evaluation_batches(corpus.held_out, settings)
    step = device.compile_for(settings, functools.partial(train_step, graph), state, batch, donate=(0,))
    judge = device.compile_for(settings, functools.partial(evaluate, graph), state, held_out)
    native_calls = device.native_calls(step)
    print(f"native kernels called by a compiled training step: {native_calls or 'none'}")

    with Checkpoints(run.folder / "checkpoints") as checkpoints:
        state, history = (checkpoints.restore(state) if run.resume else None) or (state, new_history())
        state = Loop(settings, corpus.train, held_out, step, judge, checkpoints, history).run(state)

    prompt = corpus.held_out[: settings.context // 2]
    text = sample(graph, state, settings, prompt)
    print(f"\n{prompt.decode(errors='replace')}[model goes on]{text.decode(errors='replace')}\n")

    outcome = report.summary(history, settings)
    title = f"{settings.kind()}, {size['model']['parameters']:,} parameters, {corpus.name}"
    plots.loss_curve(run.folder / "loss.png", history, weak, title)
    if not settings.dense:
        plots.pattern_picture(run.folder / "patterns.png", nnx.merge(graph, state)[0])
    results = {
        "settings": dataclasses.asdict(settings),
        "environment": environment,
        "data": {
            "name": corpus.name,
            "sha256": corpus.sha256(),
            "train_bytes": len(corpus.train),
            "held_out_bytes": len(corpus.held_out),
        },
        "baselines_bits_per_byte": weak,
        "size": size,
        "native_calls": native_calls,
        "device_memory": device.memory(),
        "outcome": outcome,
        "seconds": time.perf_counter() - began,
        "sample": text.decode(errors="replace"),
        "history": history,
    }
    report.write_json(run.folder / "results.json", results)
    print(report.verdict(outcome, weak, results["device_memory"], run.folder, results["seconds"]))
    return results


if __name__ == "__main__":
    main()
