"""Fixtures of all tests: which implementation computes a product, and on which device."""

import os

# Tests start further processes, which need room on the GPU beside this one.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import hypothesis
import jax
import pytest

# Enough CPU devices for the sharding tests; must be set before JAX looks for its devices.
jax.config.update("jax_num_cpu_devices", 4)

# The same examples on every machine; `device` is as good for a second example as for the first.
hypothesis.settings.register_profile(
    "jax_blocksparse",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("jax_blocksparse")


def _platforms():
    platforms = [pytest.param("cpu", id="cpu")]
    try:
        jax.devices("cuda")
    except RuntimeError:
        return platforms
    return [*platforms, pytest.param("cuda", id="gpu", marks=pytest.mark.gpu)]


PLATFORMS = _platforms()


def pytest_collection_modifyitems(config, items):
    """Leaves out what was written for a GPU only where there is none."""
    if len(PLATFORMS) == 1:
        needing_gpu = [item for item in items if item.get_closest_marker("gpu")]
        items[:] = [item for item in items if item not in needing_gpu]
        config.hook.pytest_deselected(items=needing_gpu)


@pytest.fixture(params=PLATFORMS)
def device(request):
    """The device everything runs on by default during the test: the CPU, then the GPU where there is one."""
    chosen = jax.devices(request.param)[0]
    with jax.default_device(chosen):
        yield chosen


@pytest.fixture(params=PLATFORMS)
def devices(request):
    """Up to four devices of one platform."""
    return jax.devices(request.param)[:4]


@pytest.fixture(params=["native", "xla"])
def implementation(request):
    """The `implementation` argument of the products; where "native" is missing, that is an error and not a skip."""
    return request.param
