"""The program that measures jax_blocksparse beside the dense product on the present device.

Run `python -m benchmarks` from the root of the repository, with the package installed; `--help` lists the options. It
prints tables in Markdown and writes a JSON file to `benchmarks/results`. No time counts before its result is checked.

* `cases`: what is measured. `contenders`: who is measured, and on which inputs.
* `timing` and `loop`: how, on the CPU and on accelerators. `checking`: whether the result is right.
* `runner`: one group of cases. `environment` and `report`: what is written down.
"""
