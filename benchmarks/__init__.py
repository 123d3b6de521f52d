"""The program that measures jax_blocksparse beside the dense product and its peers on the present device.

Run `python -m benchmarks` from the root of the repository, with the package installed; `--help` lists the options. It
prints tables in Markdown and writes a JSON file to `benchmarks/results`. No time counts before its result is checked.

* `cases`: what is measured, and `inputs`: on what. `contenders`: who is measured; `tasks`, `peers` and `cusparse`: how
  they compute.
* `timing`, `loop` and `graph`: how they are timed on the CPU, on accelerators in JAX, and outside it.
* `checking`: whether a result is right. `runner`: one group of cases, which share a run of dense.
* `environment` and `report`: what is written down. `tables`, `figures`, `readme` and `shipping`: what is made of it.
"""
