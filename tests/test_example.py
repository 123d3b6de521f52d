"""The example as a user runs it, only smaller; and the parts of it that could be wrong without anyone noticing."""

import json
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import train_transformer
from transformer import baselines, data, loop
from transformer.model import Transformer, linear_factory, rotate
from transformer.sampling import sample
from transformer.settings import PATTERNS, PRESETS, Settings, parse
from transformer.training import create

TINY = {"block_size": 8, "d_model": 32, "layers": 1, "heads": 2, "mlp_ratio": 2, "context": 16, "batch_size": 4}
STEPS, EVAL, CHECKPOINT = 25, 10, 6


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    """Six files of text that is easy to learn."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "deep" / "er").mkdir(parents=True)
    for number, where in enumerate(["a", "b", "c", "deep/d", "deep/e", "deep/er/f"]):
        (folder / f"{where}.txt").write_text(f"{number}: the same few words over and over\n" * (20 if number else 200))
    return folder


def arguments(text_folder, run_dir, *more):
    sizes = [part for name, value in TINY.items() for part in ("--" + name.replace("_", "-"), str(value))]
    intervals = f"--steps {STEPS} --eval-interval {EVAL} --checkpoint-interval {CHECKPOINT} --eval-windows 8".split()
    rest = ["--warmup", "5", "--sample-bytes", "20", "--data", str(text_folder), "--run-dir", str(run_dir)]
    return [*sizes, *intervals, *rest, *more]


@pytest.fixture(scope="module")
def finished(text_folder, tmp_path_factory):
    """A run that nothing has interrupted: its folder and results."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, train_transformer.main(arguments(text_folder, folder))


def with_opinions(model):
    """The model with other logits than the zeros it starts with."""
    model.logits.kernel[...] = jax.random.normal(jax.random.key(1), model.logits.kernel.shape)
    return model


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_run_learns_and_leaves_its_files(finished):
    folder, results = finished
    loss = results["history"]["loss"]
    assert len(loss) == len(results["history"]["step_seconds"]) == STEPS
    assert np.mean(loss[-5:]) < np.mean(loss[:5]) - 1
    assert [step for step, _ in results["history"]["held_out"]] == [10, 20, 25]
    assert results["outcome"]["held_out_bits_per_byte"] < results["history"]["held_out"][0][1]
    assert json.loads((folder / "results.json").read_text()) == results
    assert is_png(folder / "loss.png")
    assert is_png(folder / "patterns.png")


def test_run_reports_what_it_trained(finished):
    _, results = finished
    d, layers, context, vocabulary = TINY["d_model"], TINY["layers"], TINY["context"], 256
    dense_matrices = layers * (4 * d * d + 2 * d * 2 * d)
    rest = 2 * vocabulary * d + (2 * layers + 1) * d
    model, dense = results["size"]["model"], results["size"]["dense_equivalent"]
    assert dense["parameters"] == dense_matrices + rest
    assert model["parameters"] == dense_matrices // 4 + rest
    assert model["parameter_bytes"] == 4 * model["parameters"]
    attention = sum(4 * d * (position + 1) for position in range(context)) // context * layers
    assert dense["forward_flops_per_token"] == 2 * (dense_matrices + vocabulary * d) + attention
    assert dense["training_flops_per_token"] == 3 * dense["forward_flops_per_token"]


def test_training_step_calls_the_native_kernels(finished):
    matrices = 6 * TINY["layers"]
    expected = {"jax_blocksparse.matmul.v1": 2 * matrices, "jax_blocksparse.sddmm.v1": matrices}
    assert finished[1]["native_calls"] == expected


def test_resumed_run_equals_an_uninterrupted_one(finished, text_folder, tmp_path, monkeypatch):
    _, whole = finished
    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:

        def power_cut(text, step, settings):
            if step == 2 * CHECKPOINT + 3:
                raise KeyboardInterrupt
            return data.training_batch(text, step, settings)

        patch.setattr(loop, "training_batch", power_cut)
        with pytest.raises(KeyboardInterrupt):
            train_transformer.main(arguments(text_folder, run_dir))
    resumed_at = []
    monkeypatch.setattr(
        loop,
        "training_batch",
        lambda text, step, settings: resumed_at.append(step) or data.training_batch(text, step, settings),
    )
    resumed = train_transformer.main(["--run-dir", str(run_dir), "--resume"])
    assert resumed_at[0] == 2 * CHECKPOINT
    assert resumed["settings"] == whole["settings"]
    assert resumed["history"]["loss"] == whole["history"]["loss"]
    assert resumed["history"]["held_out"] == whole["history"]["held_out"]
    assert resumed["sample"] == whole["sample"]


def test_dense_twin_runs_by_the_same_code(finished, text_folder, tmp_path):
    results = train_transformer.main(arguments(text_folder, tmp_path / "run", "--dense"))
    assert results["native_calls"] == {}
    assert results["size"]["model"] == results["size"]["dense_equivalent"] == finished[1]["size"]["dense_equivalent"]
    assert np.mean(results["history"]["loss"][-5:]) < np.mean(results["history"]["loss"][:5]) - 1
    assert not (tmp_path / "run" / "patterns.png").exists()


def test_resume_refuses_what_would_change_the_run(finished, text_folder, tmp_path, capsys):
    folder, _ = finished
    with pytest.raises(SystemExit):
        parse(["--run-dir", str(folder), "--resume", "--lr", "0.5"])
    assert "started with lr = 0.006, got 0.5" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(["--run-dir", str(folder)])
    assert "holds a run already" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(["--run-dir", str(tmp_path), "--resume"])
    assert "needs --run-dir with a folder that holds a run" in capsys.readouterr().err
    (text_folder / "new.txt").write_text("something else")
    try:
        with pytest.raises(SystemExit, match="this run was started with"):
            train_transformer.main(["--run-dir", str(folder), "--resume"])
    finally:
        (text_folder / "new.txt").unlink()


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings, run = parse([])
    assert settings == Settings()
    assert run.folder == Path("runs/cpu-random-0.25-1")
    run.folder.mkdir(parents=True)
    settings, run = parse(["--preset", "gpu", "--steps", "7", "--dense", "--no-deterministic"])
    assert settings == Settings(**PRESETS["gpu"] | {"steps": 7, "dense": True, "deterministic": False})
    assert run.folder == Path("runs/gpu-dense-1")
    assert parse([])[1].folder == Path("runs/cpu-random-0.25-2")
    with pytest.raises(SystemExit):
        parse(["--heads", "5"])
    assert "d_model must be a multiple of 2 * heads = 10" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["batch_size", "steps", "layers", "eval_interval"])
def test_settings_must_be_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        Settings(**{name: 0})


def test_folder_is_split_by_whole_files(text_folder):
    corpus = data.load(str(text_folder))
    files = {path.read_bytes() for path in text_folder.rglob("*.txt")}
    held_out = {text for text in files if text in corpus.held_out}
    assert sum(map(len, held_out)) == len(corpus.held_out)
    assert len(corpus.held_out) + len(corpus.train) == sum(map(len, files))
    assert not any(text in corpus.train for text in held_out)
    assert 0 < len(corpus.held_out) <= sum(map(len, files)) / 10


def test_folder_split_does_not_depend_on_the_order_of_listing(text_folder):
    files = [path for path in text_folder.rglob("*") if path.is_file()]
    splits = {data._split_files("x", text_folder, order) for order in (files, files[::-1], files[3:] + files[:3])}
    assert len(splits) == 1


def test_standard_library_is_a_large_text():
    corpus = data.load("")
    assert len(corpus.train) > 3_000_000
    assert 0.09 < len(corpus.held_out) / (len(corpus.train) + len(corpus.held_out)) <= 0.1
    assert corpus == data.load("")


def test_single_file_is_split_by_position(tmp_path, monkeypatch):
    path = tmp_path / "text"
    path.write_bytes(bytes(range(200)))
    corpus = data.load(str(path))
    assert (corpus.train, corpus.held_out) == (bytes(range(180)), bytes(range(180, 200)))
    monkeypatch.setattr(data, "_ENWIK8_BYTES", 200)
    assert data.load(str(path)).held_out == bytes(range(180, 190))


def test_missing_text_is_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        data.load(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="no text found"):
        data.load(str(tmp_path))


def test_batches_follow_from_seed_and_step():
    text = bytes(range(256)) * 4
    settings = Settings(**TINY)
    batch = data.training_batch(text, 3, settings)
    assert batch.shape == (4, 17)
    assert batch.dtype == np.uint8
    assert np.all(np.diff(batch.astype(int)) % 256 == 1)
    assert np.array_equal(batch, data.training_batch(text, 3, settings))
    assert not np.array_equal(batch, data.training_batch(text, 4, settings))
    with pytest.raises(ValueError, match="16 bytes, but one window has context \\+ 1 = 17"):
        data.training_batch(text[:16], 0, settings)


def test_evaluation_reaches_from_the_first_to_the_last_byte():
    text = np.random.default_rng(0).bytes(1000)
    batches = data.evaluation_batches(text, Settings(**TINY, eval_windows=10))
    assert batches.shape == (3, 4, 17)
    assert batches[0, 0].tobytes() == text[:17]
    assert batches[-1, -1].tobytes() == text[-17:]


def test_baselines_of_a_text_with_known_entropy():
    corpus = data.Corpus("toy", train=b"abcd" * 50_000, held_out=b"aabb" * 1000)
    bits = baselines.bits_per_byte(corpus)
    assert bits["static bytes (best possible)"] == pytest.approx(1)
    assert bits["static bytes (training text)"] == pytest.approx(2, abs=0.01)
    assert 0 < bits["zlib -9 (gzip)"] < 0.1
    assert 0 < bits["lzma -9 (xz)"] < 0.5
    assert baselines.entropy_bits(b"aaab") == pytest.approx(-(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)))


@pytest.mark.parametrize("name", PATTERNS)
def test_every_pattern_makes_a_layer(name):
    linear = linear_factory(Settings(d_model=128, block_size=16, density=0.5, pattern=name), nnx.Rngs(0))
    layer = linear(128, 256)
    assert layer(jnp.ones((2, 3, 128))).shape == (2, 3, 256)
    assert 0 < layer.pattern.get_value().density < 1


def test_random_patterns_differ_between_layers_and_follow_from_the_seed():
    def masks(seed):
        blocks = Transformer(Settings(**TINY | {"layers": 3}, seed=seed)).blocks
        return [block.attention.query.pattern.get_value().mask().tobytes() for block in blocks]

    assert len(set(masks(0))) == 3
    assert masks(0) == masks(0)
    assert masks(0) != masks(1)


def test_model_is_causal():
    model = with_opinions(Transformer(Settings(**TINY)))
    text = jnp.arange(32, dtype=jnp.uint8).reshape(2, 16)
    before, after = model(text), model(text.at[:, 9].set(200))
    np.testing.assert_array_equal(before[:, :9], after[:, :9])
    assert np.all(np.any(before[:, 9:] != after[:, 9:], axis=-1))


def test_rotation_depends_on_distance_only():
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    rotated = [np.asarray(rotate(jnp.broadcast_to(x, (1, 12, 1, 8))))[0, :, 0] for x in (query, key)]
    scores = rotated[0] @ rotated[1].T
    for distance in (0, 3):
        np.testing.assert_allclose(np.diagonal(scores, distance), scores[0, distance], rtol=1e-4)
    assert abs(scores[0, 3] - scores[0, 0]) > 1e-3


def test_sample_equals_a_plain_loop_with_a_sliding_window():
    settings = Settings(**TINY, sample_bytes=12)
    graph, state = create(settings)
    model, optimizer = nnx.merge(graph, state)
    graph, state = nnx.split((with_opinions(model), optimizer))
    prompt = b"ten bytes."
    text, predict = prompt, nnx.jit(model)
    for key in jax.random.split(jax.random.key(settings.seed), 12):
        window = np.frombuffer(text[-settings.context :], np.uint8)
        text += bytes([int(jax.random.categorical(key, predict(window[None])[0, -1] / 0.8))])
    assert sample(graph, state, settings, prompt) == text[len(prompt) :]
