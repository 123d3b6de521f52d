"""The benchmark program on tiny cases: are its figures consistent, and does it refuse what is wrong?"""

import dataclasses
import json
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from benchmarks import __main__ as program
from benchmarks import checking, contenders, loop, mlp, tasks, timing
from benchmarks.cases import PATTERNS, PRESETS, Shape, Workload
from benchmarks.inputs import Inputs

TINY = ["--preset", "cpu", "--shapes", "64x90x75", "--blocks", "16", "--densities", "0.25", "--repeats", "3"]
TINY += ["--timer", "call"]


def run(path, *options):
    status = program.main([*TINY, "--output", str(path), *options])
    return status, json.loads(path.read_text())


def elements(record):
    """Entries of W in its blocks, the slow way."""
    if record["contender"] == "dense":
        return record["k"] * record["n"]
    b = record["block_size"]
    mask = PATTERNS[record["pattern"]]((record["k"], record["n"]), b, record["density"]).mask()
    return int(np.kron(mask, np.ones((b, b), int))[: record["k"], : record["n"]].sum())


def test_results_are_complete_and_consistent(tmp_path, capsys):
    path = tmp_path / "results.json"
    status, report = run(path, "--products", "y,dw", "--densities", "0.5,0.2", "--contenders", "native,xla")
    assert status == 0
    assert report["schema"] == 2
    assert report["complete"] is True
    assert report["settings"]["repetitions"] == 3
    assert report["missing"] == {}
    assert report["left_out"] == []
    environment = report["environment"]
    assert environment["device"]
    assert environment["platform"] == jax.default_backend()
    assert environment["versions"]["jax"] == jax.__version__
    assert set(environment["revision"]) == {"commit", "dirty"}

    # For each product: dense, and two implementations at two densities.
    assert len(report["results"]) == 2 * 5
    groups = {}
    for record in report["results"]:
        groups.setdefault(record["group"], []).append(record)
    for dense, *others in groups.values():
        assert [dense["contender"], *(each["contender"] for each in others)] == ["dense"] + 2 * ["native", "xla"]
        for record in (dense, *others):
            assert record["status"] == "ok"
            assert record["repetitions"] == 3
            assert 0 <= record["error"] <= record["tolerance"]
            assert 0 < record["p10_s"] <= record["median_s"] <= record["p90_s"]
            assert record["flops"] == 2 * record["m"] * elements(record)
            assert record["flops_per_s"] == pytest.approx(record["flops"] / record["median_s"])
            assert record["speedup_over_dense"] == pytest.approx(dense["median_s"] / record["median_s"])
            fraction = record["flops_per_s"] / dense["flops_per_s"]
            assert record["fraction_of_dense_flops"] == pytest.approx(fraction)

    printed = capsys.readouterr().out
    assert len(re.findall(r"\| +native \|", printed)) == 2 * 2
    assert program.main(["show", str(path)]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize("l2_bytes", [None, 60_000])
def test_loop_on_the_device_times_the_same_product(tmp_path, monkeypatch, l2_bytes):
    monkeypatch.setattr(program, "l2_bytes", lambda device: l2_bytes)
    options = ("--timer", "loop", "--densities", "0.5", "--products", "dx,dw", "--contenders", "native,xla")
    _, results = run(tmp_path / "results.json", *options)
    assert len(results["results"]) == 6
    for record in results["results"]:
        if record["status"] == "error":  # a machine that is busy with something else
            assert "not in proportion" in record["message"]
            continue
        assert record["cache"] == (l2_bytes and "cold")
        assert record["input_copies"] > 1 if l2_bytes else record["input_copies"] == 1
        others = record["working_set_bytes"] * (1 - 1 / record["input_copies"])  # between two uses of one
        assert others >= 2 * (l2_bytes or 0)
        assert record["calls_per_repetition"] % record["input_copies"] == 0
        assert record["calls_per_repetition"] >= loop.LEAST_TRIPS * record["input_copies"]
        assert record["flops_per_s"] == pytest.approx(record["flops"] / record["median_s"])


def test_others_are_shown_where_dense_failed(tmp_path, capsys, monkeypatch):
    failing = dataclasses.replace(contenders.CONTENDERS["dense"], task=lambda *_: 1 / 0)
    monkeypatch.setitem(contenders.CONTENDERS, "dense", failing)
    status, results = run(tmp_path / "results.json", "--products", "y", "--contenders", "native,xla")
    assert status == 1
    assert [record["status"] for record in results["results"]] == ["error", "ok", "ok"]
    assert re.search(r"\| y, 64x90x75, f32, random 16, 0.25 \| +\| +xla \| +\| +\d+\.\d\d \|", capsys.readouterr().out)


def test_missing_peers_are_named(tmp_path, capsys, monkeypatch):
    absent = dataclasses.replace(contenders.CONTENDERS["stk"], needs=("no_such_module",))
    monkeypatch.setitem(contenders.CONTENDERS, "stk", absent)
    status, results = run(tmp_path / "results.json", "--products", "y", "--contenders", "native,stk")
    assert status == 0
    assert results["missing"] == {"stk": "ModuleNotFoundError: No module named 'no_such_module'"}
    assert [record["contender"] for record in results["results"]] == ["dense", "native"]
    assert "* stk: ModuleNotFoundError" in capsys.readouterr().out


def test_jax_bcoo_computes_the_same(tmp_path):
    status, results = run(tmp_path / "results.json", "--contenders", "jax-bcoo", "--products", "y,dx")
    assert status == 0
    assert [record["contender"] for record in results["results"]] == ["dense", "jax-bcoo"] * 2


def test_budget_leaves_a_whole_file(tmp_path, capsys):
    status, results = run(tmp_path / "results.json", "--products", "y,dx", "--budget", "0.001")
    assert status == 0
    assert results["complete"] is False
    assert results["left_out"] == ["dx 64x90x75 f32, 1 cases"]
    assert len(results["results"]) == 2
    assert "dx 64x90x75 f32, 1 cases: the time was up" in capsys.readouterr().out


def test_presets_are_what_they_say():
    def wanted(name):
        return {
            (group.workload, case, group.cache)
            for selection in PRESETS[name]
            for group in selection.groups()
            for case in group.cases
        }

    assert wanted("quick") <= wanted("standard")
    assert {case.contender for _, case, _ in wanted("full")} == contenders.CONTENDERS.keys() - {"dense"}
    assert {case.sparsity.pattern for _, case, _ in wanted("full")} == PATTERNS.keys()


def replace_native(monkeypatch, change):
    original = contenders.CONTENDERS["native"]
    changed = dataclasses.replace(original, task=lambda *case: change(original.task(*case)))
    monkeypatch.setitem(contenders.CONTENDERS, "native", changed)


@pytest.mark.parametrize(
    ("timer", "damage"), [("call", lambda y: y * 1.05), ("loop", lambda y: y.at[-1, 0].set(jnp.nan))]
)
def test_wrong_result_is_refused(tmp_path, capsys, monkeypatch, timer, damage):
    def wrong(task):
        return dataclasses.replace(task, function=lambda *arguments: damage(task.function(*arguments)))

    replace_native(monkeypatch, wrong)
    path = tmp_path / "results.json"
    status, report = run(path, "--products", "y", "--timer", timer)
    dense, native = report["results"]
    assert status == 1
    assert dense["status"] == "ok"
    assert native["status"] == "wrong"
    assert native["error"] is None or native["error"] > native["tolerance"]
    assert native["median_s"] is native["flops_per_s"] is native["speedup_over_dense"] is None
    assert "### Not measured" in capsys.readouterr().out


def test_contender_that_raises_does_not_stop_the_others(tmp_path, monkeypatch):
    def broken(task):
        raise NotImplementedError("no such kernel")

    replace_native(monkeypatch, broken)
    status, report = run(tmp_path / "results.json", "--products", "y", "--contenders", "native,xla")
    dense, native, xla = report["results"]
    assert status == 1
    assert (dense["status"], native["status"], xla["status"]) == ("ok", "error", "ok")
    assert native["message"] == "NotImplementedError: no such kernel"


@pytest.fixture
def hoisting_device():
    """The CPU, for which XLA hoists what does not change out of a loop; for a GPU it may not."""
    with jax.default_device(jax.devices("cpu")[0]):
        yield


@pytest.mark.usefixtures("hoisting_device")
def test_calls_hoisted_out_of_a_loop_are_noticed():
    def hlo(prepare):
        def iteration(_, state):
            x = prepare(state[0])
            return x, x @ x

        def program(x, rounds):
            return jax.lax.fori_loop(0, rounds, lambda _, state: jax.lax.fori_loop(0, 10, iteration, state), (x, x))

        return jax.jit(program).lower(jnp.ones((64, 64)), 3).compile().as_text()

    single = jax.jit(lambda x: x @ x).lower(jnp.ones((64, 64))).compile().as_text()
    work = loop.work_in_program(single)
    assert work >= 1
    assert loop.work_in_inner_loops(hlo(jax.lax.optimization_barrier)) == work
    assert loop.work_in_inner_loops(hlo(lambda x: x)) == 0


@pytest.mark.usefixtures("hoisting_device")
def test_hoisted_calls_are_not_timed(monkeypatch):
    monkeypatch.setattr(jax.lax, "optimization_barrier", lambda operands: operands)
    program = loop.LoopProgram(tasks.dense(Inputs(Workload(Shape(64, 64, 64), "f32", "y"))), cold_bytes=0)
    assert program.fit()
    with pytest.raises(loop.NotTimedError, match="merged or hoisted"):
        program.build()


def test_slow_programs_are_run_less_often():
    class Clock:
        calls = 1

        def __init__(self, seconds):
            self.seconds = seconds

        def run(self):
            return self.seconds

    times = timing.measure([Clock(0.001), Clock(0.1), Clock(10.0)], repetitions=20, seconds=1.05)
    assert [each.repetitions for each in times] == [20, 10, timing.LEAST_REPETITIONS]
    assert [each.median for each in times] == pytest.approx([0.001, 0.1, 10.0])


def test_check_looks_at_every_row_for_what_is_not_finite():
    a, b = np.random.default_rng(0).normal(size=(2, 500, 500)).astype(np.float32)
    product = jnp.asarray(a) @ b
    assert checking.relative_error(jnp.asarray(a), jnp.asarray(b), product) < checking.tolerance("f32")
    for row in range(0, 500, 99):
        damaged = product.at[row, 3].set(jnp.inf)
        assert checking.relative_error(jnp.asarray(a), jnp.asarray(b), damaged) == np.inf


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--shapes", "64x64"], "a shape is written MxKxN"),
        (["--shapes", "0x64x64"], "positive sizes"),
        (["--blocks", "24"], "choose from 8, 16, 32, 64, 128"),
        (["--densities", "1.5"], "a density is in (0, 1]"),
        (["--products", "y,z"], "choose from y, dx, dw"),
        (["--contenders", "dense"], "choose from native, xla"),
        (["show"], "the following arguments are required: file"),
    ],
)
def test_bad_options_are_named(capsys, options, complaint):
    with pytest.raises(SystemExit) as exit_:
        program.main(options)
    assert exit_.value.code == 2
    assert complaint in capsys.readouterr().err


def test_mlp(tmp_path, capsys):
    sizes = ["--tokens", "8", "--features", "32", "--hidden", "64", "--density", "0.5", "--blocks", "16"]
    mlp.main([*sizes, "--repeats", "2", "--output", str(tmp_path / "mlp.json")])
    results = json.loads((tmp_path / "mlp.json").read_text())["results"]
    assert [record["model"] for record in results] == ["dense", "block 16"]
    assert results[0]["speedup"] == 1
    assert all(record["min_s"] <= record["median_s"] <= record["max_s"] for record in results)
    assert "block 16" in capsys.readouterr().out
