"""What the benchmark program makes of its results: pictures, documents, and what the package ships."""

import json
import pathlib
import re
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from benchmarks import figures, fractions, readme, report, shipping


def record(**change):
    """A record as a run on a GPU makes it."""
    what = {"contender": "native", "product": "y", "dtype": "bf16", "pattern": "random", "block_size": 32, "m": 4096}
    what |= {"k": 1024, "n": 1024, "density": 0.1, "cache": "cold", "status": "ok", "speedup": 2.0} | change
    speedup = what.pop("speedup")
    return what | {
        "actual_density": what["density"],
        "speedup_over_dense": speedup,
        "fraction_of_dense_flops": speedup * what["density"],
        "flops_per_s": speedup * what["density"] * 8e14,
    }


def some_results():
    records = [
        record(product=product, block_size=block, density=density, contender=who, speedup=gain / density / 64)
        for product in ("y", "dx", "dw")
        for block in (16, 32)
        for density in (1.0, 0.5, 0.1)
        for who, gain in (("native", block), ("torch-bsr", block / 4))
    ]
    dense = record(contender="dense", density=1.0, speedup=1.0, pattern=None, block_size=None)
    versions = {"jax_blocksparse": "1", "jax": "2"}
    environment = {
        "device": "a chip",
        "date": "2026-11-22T10:00:00",
        "revision": {"commit": None, "dirty": None},
        "versions": versions,
    }
    return {"environment": environment, "results": [dense, *records]}


def test_pictures_are_drawn(tmp_path):
    files = figures.draw(some_results(), tmp_path)
    assert [file.name for file in files] == ["speedup.png", "peers.png", "throughput.png", "break_even.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_readme_shows_speedups():
    text = readme.section(some_results())
    assert re.search(r"\| block size \| +density 1 \| +density 0.5 \| +density 0.1 \|", text)
    assert re.search(r"\| +32 \| +0.50 / 0.50 / 0.50 \| +1.0 / 1.0 / 1.0 \| +5.0 / 5.0 / 5.0 \|", text)
    assert "docs/figures/peers.png" in text
    assert "In the 18 cases measured beside other libraries (PyTorch BSR (Triton)),\n" in text
    assert "the fastest of those takes 4.0 to 4.0 times as long." in text


def test_readme_shows_a_layer():
    settings = {"tokens": 8, "features": 16, "hidden": 64, "density": 0.25, "dtype": "bfloat16"}
    models = [("dense", 0.004, 1.0), ("block 64", 0.001, 4.0), ("block 8", 0.008, 0.5)]
    results = [{"model": model, "median_s": seconds, "speedup": gain} for model, seconds, gain in models]
    text = readme.section(some_results(), {"settings": settings, "results": results})
    assert "16 -> 64 -> 16 with biases and gelu, 8 tokens,\nbfloat16" in text
    assert "takes 4.0 ms in dense Flax" in text
    assert re.search(r"\| block 64 \| block 8 \|\n.*\n\| +4.0 \| +0.50 \|", text)


def test_fastest_peer_is_found():
    slow, fast = (record(contender=who, speedup=gain) for who, gain in (("torch-bsr", 0.5), ("cusparse-bell", 1.5)))
    elsewhere = [record(contender="stk", speedup=3.0, **change) for change in ({"product": "dx"}, {"block_size": 64})]
    ours = record()
    pairs = report.against_best_peer([record(contender="dense", speedup=1.0), slow, ours, fast, *elsewhere])
    assert pairs == [(ours, fast)]


@pytest.mark.parametrize("document", readme.SECTIONS, ids=lambda document: document.stem)
def test_documents_are_what_the_command_makes(document):
    files, text = readme.current(document)
    assert text == readme.SECTIONS[document](*readme.load(files)) + "\n"
    for picture in re.findall(r"\]\((.*?\.png)\)", text):
        assert (readme.ROOT / picture).is_file()


def test_fractions():
    results = some_results()
    results["environment"]["copy_bytes_per_s"] = 2e12
    few = record(m=16, density=0.1) | {"median_s": 6e-6, "flops": 2 * 16 * 1.6e6}
    floats = [
        record(dtype="f32", speedup=gain, contender=who) | {"median_s": 1 / gain}
        for who, gain in (("native", 3.0), ("xla", 0.5))
    ]
    others = [record(pattern="banded", speedup=6.0), record(pattern="butterfly") | {"actual_density": 0.03}]
    results["results"] += [few, *others, record(dtype="f16", speedup=3.0), *floats]
    text = fractions.section(results)
    assert re.search(r"\| dw 32 \| 0.50 \(0.12\) \| +0.50 \(0.12\) \|", text)
    assert re.search(r"\| 16 x 1024 x 1024, 32 \| 6.0 us \(1.20\) \|", text)
    assert re.search(r"\| banded 32 \| 1.20 \|", text)
    assert "butterfly" not in text  # too few blocks to compare
    assert re.search(r"\| f16 y 32 \| +0.30 \|", text)
    assert re.search(r"\| f32 y 32 \| +0.30 \(6.0\) \|", text)


def test_benchmark_writes_what_is_shipped(tmp_path, monkeypatch):
    file = tmp_path / "measurements.json"
    monkeypatch.setattr(shipping, "SHIPPED", file)
    environment = {"platform": "gpu", "device": "chip", "date": "today", "revision": {"commit": "abc"}}
    environment["versions"] = {"jax_blocksparse": "1", "jax": "2"}
    records = [record(product="y", density=density, speedup=1 / density) for density in (0.5, 0.1)]
    records += [record(product="y", cache="warm"), record(product="dx", dtype="tf32"), record(pattern="banded")]
    for device in ("chip", "other", "chip"):
        shipping.write({"environment": environment | {"device": device}, "results": records})
    devices = json.loads(file.read_text())["devices"]
    assert set(devices) == {"chip", "other"}
    assert [(entry["product"], entry["dtype"]) for entry in devices["chip"]["entries"]] == [
        ("y", "bfloat16"),
        ("dx", "float32"),
    ]
    assert devices["chip"]["entries"][0]["curve"] == [[0.1, 10.0], [0.5, 2.0]]
    with pytest.raises(ValueError, match="only measurements of GPUs"):
        shipping.write({"environment": environment | {"platform": "cpu"}, "results": records})
