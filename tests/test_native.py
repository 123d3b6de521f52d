"""The native modules themselves: found or not, and said so; what they refuse; every instruction set they have."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_blocksparse as jbs
from jax_blocksparse import sddmm_layout
from jax_blocksparse.arrays import flat_size
from jax_blocksparse.plan_layout import choose_layout

TESTS = Path(__file__).parent


def run_python(code, **environment):
    """Runs code in a new process that fails on warnings; returns what it prints."""
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", **environment}
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_installation_has_what_the_machine_needs():
    assert jbs.has_cpu(), jbs.has_cpu().reason
    if any(device.platform == "gpu" for device in jax.devices()):
        assert jbs.has_cuda(), jbs.has_cuda().reason


@pytest.mark.parametrize(("availability", "module"), [(jbs.has_cpu, "_cpu"), (jbs.has_cuda, "_cuda")])
def test_availability_has_a_reason(availability, module):
    found = availability()
    assert bool(found) is found.available
    wanted = f"jax_blocksparse.{module} is registered" if found else "without CUDA: nvcc was not found"
    assert wanted in found.reason


# Makes the import of the CPU module do what {} says, then looks at everything that a user would see of it.
WITHOUT_CPU_MODULE = """
    import importlib.machinery, sys, warnings

    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "jax_blocksparse._cpu":
                return importlib.machinery.ModuleSpec(name, self)

        def create_module(self, spec):
            return None

        def exec_module(self, module):
            {body}

    {install}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import jax_blocksparse as jbs
    import jax.numpy as jnp

    print([(each.category.__name__, str(each.message)) for each in caught])
    print(jbs.has_cpu())
    pattern = jbs.BlockPattern.from_coordinates([0], [0], shape=(8, 8), block_size=8)
    w = jbs.BlockSparseMatrix(jnp.ones((1, 8, 8)), pattern)
    assert (jnp.ones((2, 8)) @ w == 8).all()
    try:
        jbs.matmul(jnp.ones((2, 8)), w, implementation="native")
    except NotImplementedError as error:
        print(error)
"""


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            "raise ImportError('libgone.so.1: cannot open shared object file')",
            "jax_blocksparse._cpu is installed but does not load: libgone.so.1: cannot open shared object file",
        ),
        (
            "module.XLA_FFI_API_VERSION = (0, 99)",
            "jax_blocksparse._cpu was built with XLA FFI headers 0.99, but jaxlib ",
        ),
    ],
    ids=["missing_library", "newer_headers"],
)
def test_broken_module_is_reported_and_done_without(body, reason):
    code = WITHOUT_CPU_MODULE.format(body=body, install="sys.meta_path.insert(0, Finder())")
    warned, availability, refused = run_python(code).splitlines()
    assert warned.count("RuntimeWarning") == 1
    assert "Falling back to plain XLA" in warned
    assert availability.startswith("Availability(available=False")
    for text in (warned, availability, refused):
        assert reason in text
    assert refused.startswith("implementation='native' was asked for, but ")


def test_absent_module_is_no_reason_to_warn():
    code = WITHOUT_CPU_MODULE.format(body="pass", install='sys.modules["jax_blocksparse._cpu"] = None')
    warned, availability, refused = run_python(code).splitlines()
    assert warned == "[]"
    assert "this installation has no CPU module" in availability
    assert "this installation has no CPU module" in refused


# Each operand's shape and dtype, those of the result, and attributes, for M = 5, a W of 24 x 16 in 4 blocks of 8.
GOOD = {
    "matmul": {
        "x": ((1, 5, 24), "f4"),
        "data": ((1, 4, 8, 8), "f4"),
        "ptr": ((1, 3), "i4"),
        "order": ((1, 4), "i4"),
        "inner": ((1, 4), "i4"),
        "y": ((1, 5, 16), "f4"),
        "transpose": False,
    },
    "sddmm": {
        "x": ((1, 5, 24), "f4"),
        "dy": ((1, 5, 16), "f4"),
        "rows": ((1, 4), "i4"),
        "cols": ((1, 4), "i4"),
        "data": ((1, 4, 8, 8), "f4"),
    },
}
MATMUL_LAYOUT = choose_layout(24, 16, 8, nnz=4)
SDDMM_LAYOUT = sddmm_layout.choose_layout(24, 16, 8, nnz=4)
# What the CUDA handlers take and give besides.
GOOD_CUDA = {
    "matmul": {
        "plan": ((1, flat_size(MATMUL_LAYOUT)), "i4"),
        "bias": ((1, 0), "f4"),
        "scale": ((1, 0, 0), "f4"),
        "slope": ((0,), "f4"),
        "column_sums": ((0, 0, 0), "f4"),
        "workspace": ((0,), "f4"),
        "tf32": False,
        "activation": np.int32(0),
        "tile_features": np.int32(MATMUL_LAYOUT.tile_features),
        "capacity": np.int32(MATMUL_LAYOUT.capacity),
    },
    "sddmm": {
        "plan": ((1, flat_size(SDDMM_LAYOUT)), "i4"),
        "tf32": False,
        "unit": np.int32(SDDMM_LAYOUT.unit),
        "split": np.int32(SDDMM_LAYOUT.split),
        "tiles": np.int32(SDDMM_LAYOUT.tiles),
    },
}
RESULTS = {"matmul": ("y", "slope", "column_sums", "workspace"), "sddmm": ("data",)}


def call(kind, platform, **changes):
    """Calls a target directly, past all checks in Python; returns its first result."""
    values = GOOD[kind] | (GOOD_CUDA[kind] if platform == "gpu" else {}) | changes
    arrays = {name: value for name, value in values.items() if isinstance(value, tuple)}
    attributes = {name: value for name, value in values.items() if name not in arrays}
    results = [jax.ShapeDtypeStruct(*arrays.pop(name)) for name in RESULTS[kind] if name in arrays]
    function = jax.ffi.ffi_call(f"jax_blocksparse.{kind}.v1", results)
    return function(*(jnp.zeros(*array) for array in arrays.values()), **attributes)[0]


@pytest.mark.parametrize("kind", GOOD)
def test_handler_takes_what_fits(kind, device):
    assert not call(kind, device.platform).any()


def check_refused(kind, platform, changes, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match=message) as raised:
        call(kind, platform, **changes).block_until_ready()
    assert "INVALID_ARGUMENT" in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("matmul", {"x": ((5, 24), "f4")}, r"x .*\(5, 24\).* rank 3"),
        ("matmul", {"data": ((4, 8, 8), "f4")}, r"data .*\(4, 8, 8\).* rank 4"),
        ("matmul", {"y": ((5, 16), "f4")}, r"y .*\(5, 16\).* rank 3"),
        ("matmul", {"data": ((1, 4, 12, 12), "f4")}, r"data .*12.*8, 16, 32, 64 or 128"),
        ("matmul", {"data": ((1, 4, 8, 16), "f4")}, r"data .*8.*16.*"),
        ("matmul", {"ptr": ((1, 4), "i4")}, r"ptr .*\(1, 4\).*\(1, 3\)"),
        ("matmul", {"order": ((1, 5), "i4")}, r"order .*\(1, 5\).*\(1, 4\)"),
        ("matmul", {"inner": ((1, 3), "i4")}, r"inner .*\(1, 3\).*\(1, 4\)"),
        ("matmul", {"x": ((2, 5, 24), "f4"), "y": ((3, 5, 16), "f4")}, r"x .*2.*3"),
        ("matmul", {"y": ((1, 6, 16), "f4")}, r"[xy] .*\(1, [56], \d+\).*\(1, [56], .*\)"),
        ("matmul", {"data": ((1, 4, 8, 8), "f2")}, r"data .*element type"),
        ("matmul", {"y": ((1, 5, 16), "f2")}, r"y must .*element type of x"),
        ("matmul", {"x": ((1, 5, 24), "i4"), "data": ((1, 4, 8, 8), "i4"), "y": ((1, 5, 16), "i4")}, r"x "),
        ("matmul", {"ptr": ((1, 3), "f4")}, r"(?i)ptr .*F32.*S32|wrong buffer dtype: expected S32 but got F32"),
        ("sddmm", {"x": ((5, 24), "f4")}, r"x .*\(5, 24\).* rank 3"),
        ("sddmm", {"data": ((4, 8, 8), "f4")}, r"data .*\(4, 8, 8\).* rank 4"),
        ("sddmm", {"data": ((1, 4, 12, 12), "f4")}, r"data .*12.*8, 16, 32, 64 or 128"),
        ("sddmm", {"dy": ((1, 6, 16), "f4")}, r"dy .*\(1, 6, 16\).*\(1, 5, .*\)"),
        ("sddmm", {"rows": ((1, 5), "i4")}, r"rows .*\(1, 5\).*\(1, 4\)"),
        ("sddmm", {"cols": ((1, 3), "i4")}, r"cols .*\(1, 3\).*\(1, 4\)"),
        ("sddmm", {"dy": ((2, 5, 16), "f4"), "data": ((3, 4, 8, 8), "f4")}, r"dy .*2.*3"),
        ("sddmm", {"dy": ((1, 5, 16), "f2")}, r"dy .*element type"),
        ("sddmm", {"data": ((1, 4, 8, 8), "f2")}, r"data must .*element type of x"),
    ],
)
def test_handler_refuses_what_does_not_fit(kind, changes, message, device):
    check_refused(kind, device.platform, changes, message)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("matmul", {"plan": ((1, 7), "i4")}, r"plan has another shape"),
        ("matmul", {"plan": ((2, *GOOD_CUDA["matmul"]["plan"][0][1:]), "i4")}, r"plan has another shape"),
        ("matmul", {"capacity": np.int32(1)}, r"plan has another shape"),
        ("matmul", {"capacity": np.int32(0)}, r"capacity positive"),
        ("matmul", {"tile_features": np.int32(64)}, r"tile_features must be 128 or 256"),
        ("matmul", {"activation": np.int32(5)}, r"no such activation"),
        ("matmul", {"activation": np.int32(-1)}, r"no such activation"),
        ("matmul", {"bias": ((1, 15), "f4")}, r"bias must have shape"),
        ("matmul", {"bias": ((2, 16), "f4")}, r"bias must have shape"),
        ("matmul", {"scale": ((5, 16), "f4")}, r"scale must have the shape"),
        ("matmul", {"scale": ((1, 5, 24), "f4")}, r"scale must have the shape"),
        ("matmul", {"scale": ((2, 5, 16), "f4")}, r"scale must have the shape"),
        ("matmul", {"scale": ((1, 5, 16), "f2")}, r"scale must have the .* element type"),
        ("matmul", {"slope": ((1, 5, 15), "f4")}, r"slope must have the shape"),
        ("matmul", {"slope": ((1, 5, 16), "f2")}, r"slope must have the .* element type"),
        ("matmul", {"column_sums": ((1, 1, 15), "f4")}, r"column_sums must have shape"),
        ("matmul", {"column_sums": ((1, 1, 16), "f4"), "bias": ((1, 16), "f4")}, r"column_sums .* no bias"),
        ("matmul", {"column_sums": ((1, 1, 16), "f4"), "activation": np.int32(1)}, r"column_sums .* no activation"),
        ("matmul", {"workspace": ((1, 3, 8, 8), "f4")}, r"workspace must be as large as data"),
        ("matmul", {"plan": ((1, GOOD_CUDA["matmul"]["plan"][0][1]), "f4")}, r"(?i)dtype.*S32.*F32|F32.*S32"),
        ("sddmm", {"plan": ((1, 7), "i4")}, r"plan has another shape"),
        ("sddmm", {"plan": ((2, *GOOD_CUDA["sddmm"]["plan"][0][1:]), "i4")}, r"plan has another shape"),
        ("sddmm", {"tiles": np.int32(SDDMM_LAYOUT.tiles + 1)}, r"plan has another shape"),
        ("sddmm", {"tiles": np.int32(-1)}, r"tiles not negative"),
        ("sddmm", {"unit": np.int32(8)}, r"unit must be"),
        ("sddmm", {"unit": np.int32(24)}, r"unit must be"),
        ("sddmm", {"split": np.int32(6)}, r"split 1 to 5"),
    ],
)
def test_cuda_handler_refuses_what_does_not_fit(kind, changes, message):
    with jax.default_device(jax.devices("cuda")[0]):
        check_refused(kind, "gpu", changes, message)


EVERY_KERNEL = """
    import cases, jax
    import jax_blocksparse as jbs
    from jax_blocksparse import _cpu

    def errors(case, dtype, out_dtype):
        @jax.jit
        def products(x, dy, w):
            options = dict(preferred_element_type=out_dtype, implementation="native")
            return [jbs.matmul(x, w, **options), jbs.matmul(dy, w.T, **options), jbs.sddmm(x, dy, w.pattern, **options)]

        x, dy, w = case.x(dtype), case.dy(dtype), case.w(dtype)
        dense, wide_x, wide_dy = cases.dense(w), cases.wide(x), cases.wide(dy)
        wanted = [wide_x @ dense, wide_dy @ dense.T, cases.sampled(wide_x.T @ wide_dy, w.pattern)]
        return [cases.relative_error(*each) for each in zip(products(x, dy, w), wanted)]

    for case in cases.BLOCKS:
        for dtype in cases.DTYPES:
            for out_dtype in {dtype, dtype if dtype == "float64" else "float32"}:
                with cases.enable_x64(dtype):
                    found = errors(case, dtype, out_dtype)
                    assert max(found) < 4 * jax.numpy.finfo(out_dtype).eps, (case.name, dtype, out_dtype, found)
    print(_cpu.isa())
"""


@pytest.mark.parametrize("wanted", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(wanted):
    """Where the machine has not got one, the next lower is run: the variable can only ask for less."""
    order = ["baseline", "avx2", "avx512"]
    used = run_python(EVERY_KERNEL, JAX_BLOCKSPARSE_CPU_ISA=wanted).strip()
    assert order.index(used) <= order.index(wanted)
