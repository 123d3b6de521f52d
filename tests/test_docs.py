"""What is written is true: docstrings are whole, their examples and the README's run, and importing is cheap."""

import ast
import dataclasses
import doctest
import importlib
import importlib.metadata
import inspect
import pkgutil
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import matplotlib as mpl
import pytest

import jax_blocksparse

mpl.use("agg")

README = Path(__file__).parents[1] / "README.md"
MODULES = [
    importlib.import_module(module.name)
    for module in pkgutil.walk_packages(jax_blocksparse.__path__, "jax_blocksparse.")
]
PUBLIC_MODULES = [jax_blocksparse] + [
    getattr(jax_blocksparse, name) for name in ("initializers", "linen", "nnx", "patterns", "plot")
]


def doctests():
    found = (test for module in [jax_blocksparse, *MODULES] for test in doctest.DocTestFinder().find(module))
    return {test.name: test for test in found if test.examples}


def value_module(value):
    return getattr(value, "__module__", None) or ""


@pytest.mark.parametrize("test", doctests().values(), ids=doctests())
def test_examples_run(test):
    for example in test.examples:
        assert not example.options.get(doctest.SKIP), f"{test.name}: {example.source} is skipped"
    report = []
    doctest.DocTestRunner(optionflags=doctest.REPORT_NDIFF).run(test, out=report.append)
    assert not report, "".join(report)


def public():
    """Every public function, class and method, by its full name."""
    found = {}
    for module in PUBLIC_MODULES:
        for name, value in vars(module).items():
            ours = name in module.__all__ if module is jax_blocksparse else value_module(value) == module.__name__
            if ours and not name.startswith("_") and (inspect.isfunction(value) or inspect.isclass(value)):
                found[f"{value.__module__}.{value.__qualname__}"] = value
    for owner in [value for value in found.values() if inspect.isclass(value)]:
        for name, value in vars(owner).items():
            method = value.__func__ if isinstance(value, classmethod) else value
            written_here = inspect.isfunction(method) and method.__code__.co_filename == inspect.getfile(owner)
            if written_here and (name == "__call__" or not name.startswith("_")):
                found[f"{owner.__module__}.{method.__qualname__}"] = method
    return found


def sections(documented):
    """The Google-style sections of a docstring, by title."""
    parts = re.split(r"^(\w+):\n", inspect.getdoc(documented), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def entries(section):
    return re.findall(r"^  (\w+):", section, flags=re.MULTILINE)


FUNCTIONS = {name: value for name, value in public().items() if inspect.isfunction(value)}
CLASSES = {name: value for name, value in public().items() if inspect.isclass(value)}


def test_something_is_public():
    assert {"jax_blocksparse.ops.matmul", "jax_blocksparse.matrix.BlockSparseMatrix.fromdense"} <= FUNCTIONS.keys()
    assert {"jax_blocksparse.nnx.BlockSparseLinear", "jax_blocksparse.pattern.BlockPattern"} <= CLASSES.keys()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_documented_whole(name):
    function = FUNCTIONS[name]
    documented = sections(function)
    parameters = [each for each in inspect.signature(function).parameters if each not in ("self", "cls")]
    assert entries(documented.get("Args", "")) == parameters
    makes_its_class = inspect.signature(function).return_annotation == function.__qualname__.split(".")[0]
    assert "Returns" in documented or function.__doc__.startswith(("Returns", "Makes")) or makes_its_class
    body = ast.parse(textwrap.dedent(inspect.getsource(function)))
    if any(isinstance(node, ast.Raise) for node in ast.walk(body)):
        assert "Raises" in documented or function.__name__ == "__call__"
    if function.__name__ != "__call__":
        assert ">>> " in documented["Example"]


@pytest.mark.parametrize("name", CLASSES)
def test_classes_are_documented_whole(name):
    documented = sections(CLASSES[name])
    if dataclasses.is_dataclass(CLASSES[name]):
        fields = [field.name for field in dataclasses.fields(CLASSES[name]) if field.name not in ("parent", "name")]
        assert entries(documented["Attributes"]) == fields
    elif "__init__" in vars(CLASSES[name]):
        _, *parameters = inspect.signature(CLASSES[name].__init__).parameters
        assert entries(documented["Args"]) == parameters


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_modules_say_what_they_are_for(module):
    if module.__file__.endswith(".py"):
        assert module.__doc__.splitlines()[0].endswith((".", ":"))


def test_readme_runs():
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert blocks
    namespace = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"README.md, python block {number}", "exec"), namespace)


def test_readme_has_the_two_commands():
    commands = re.findall(r"^```bash\n(.*?)^```", README.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert 'pip install ".[examples]" && python examples/train_transformer.py\n' in commands
    assert 'pip install ".[test]" && pytest\n' in commands


def test_readme_names_what_exists():
    names = re.findall(r"\b(?:jax_blocksparse|jbs)((?:\.[A-Za-z_]\w*)+)", README.read_text())
    assert names
    for name in names:
        found = jax_blocksparse
        for part in name[1:].split("."):
            found = getattr(found, part)


def test_all_is_complete():
    ours = {
        name
        for name, value in vars(jax_blocksparse).items()
        if not name.startswith("_") and value_module(value).startswith("jax_blocksparse")
    }
    data = {"BLOCK_SIZES", "DISABLED_EXPORT_CHECKS"}
    assert set(jax_blocksparse.__all__) == ours | data | {"patterns"}
    assert sorted(jax_blocksparse.__all__, key=lambda name: (not name.isupper(), not name[0].isupper(), name)) == (
        jax_blocksparse.__all__
    )
    namespace = {}
    exec("from jax_blocksparse import *", namespace)
    assert set(jax_blocksparse.__all__) <= namespace.keys()


def test_version_is_that_of_the_distribution():
    assert jax_blocksparse.__version__ == importlib.metadata.version("jax_blocksparse")


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="module 'jax_blocksparse' has no attribute 'torch'"):
        jax_blocksparse.torch  # noqa: B018


def run_python(program):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True
    ).stdout


def test_import_needs_no_extras():
    program = """
        import sys, jax, jax.export

        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {"flax", "matplotlib", "scipy", "optax", "orbax"}:
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        for name in [name for name in sys.modules if name.split(".")[0] == "scipy"]:
            del sys.modules[name]
        sys.meta_path.insert(0, Absent())
        import jax_blocksparse as jbs
        import numpy as np
        w = jbs.BlockSparseMatrix.fromdense(np.eye(16), block_size=8)
        assert ((np.eye(16) @ w) == np.eye(16)).all()
        assert jbs.initializers.init_blocks(jax.nn.initializers.ones, jax.random.key(0), w.pattern).shape == (2, 8, 8)
        for module, missing in (("nnx", "flax"), ("linen", "flax")):
            try:
                getattr(jbs, module)
            except ModuleNotFoundError as error:
                assert error.name == missing, error
            else:
                raise AssertionError(module)
        try:
            w.to_scipy_sparse()
        except ModuleNotFoundError as error:
            assert error.name == "scipy"
        else:
            raise AssertionError("scipy")
        print("done")
    """
    assert run_python(textwrap.dedent(program)) == "done\n"


def test_import_is_cheap():
    program = """
        import sys, time, jax, jax.export, jax.numpy
        start = time.process_time()
        import jax_blocksparse
        print(time.process_time() - start)
        assert not {"flax", "matplotlib", "optax", "orbax"} & set(sys.modules)
        # JAX's backends have not started: settings like this one still take effect.
        jax.config.update("jax_num_cpu_devices", 3)
        assert len(jax.devices("cpu")) == 3
    """
    assert float(run_python(textwrap.dedent(program))) < 1
