"""Who is measured: the dense product, ours, and the peers where they are installed."""

import dataclasses
import importlib
from collections.abc import Callable

from benchmarks import peers, tasks
from benchmarks.cases import Sparsity, Workload
from benchmarks.inputs import Inputs
from benchmarks.tasks import Task

DENSE = "dense"


@dataclasses.dataclass(frozen=True)
class Contender:
    """Somebody to measure.

    Attributes:
      task: makes the task for the inputs of a product, and for a sparsity (None for dense).
      needs: the modules that must be installed.
      offers: whether there is such a task; what is not offered is no failure.
    """

    task: Callable[[Inputs, Sparsity | None], Task]
    needs: tuple[str, ...] = ()
    offers: Callable[[Workload, Sparsity], bool] = lambda workload, sparsity: True

    def missing(self) -> str | None:
        """Returns why this contender cannot be measured here, if so."""
        for name in self.needs:
            try:
                importlib.import_module(name)
            except Exception as problem:  # Whatever a broken installation raises.
                return f"{type(problem).__name__}: {problem}"
        if "torch" in self.needs and not importlib.import_module("torch").cuda.is_available():
            return "PyTorch sees no GPU"
        return None


CONTENDERS = {
    DENSE: Contender(lambda inputs, _: tasks.dense(inputs)),
    "native": Contender(lambda inputs, sparsity: tasks.ours(inputs, sparsity, "native")),
    "xla": Contender(lambda inputs, sparsity: tasks.ours(inputs, sparsity, "xla")),
    "torch-bsr": Contender(peers.torch_bsr, needs=("torch", "triton")),
    "cusparse-bell": Contender(
        peers.cusparse_bell,
        needs=("torch", "benchmarks.cusparse"),
        offers=lambda workload, sparsity: workload.product != "dw",
    ),
    "cusparse-bsr": Contender(peers.cusparse_bsr, needs=("torch", "benchmarks.cusparse")),
    "stk": Contender(
        peers.stk,
        needs=("torch", "stk"),
        offers=lambda workload, sparsity: sparsity.block_size == 128 and workload.shape.m % 128 == 0,
    ),
    # Its sampled product gathers a row of x and a column of dy for every single entry of W.
    "jax-bcoo": Contender(peers.jax_bcoo, offers=lambda workload, sparsity: workload.product != "dw"),
}
"""By name. All but dense, the measure of the others, are made for a sparsity."""
