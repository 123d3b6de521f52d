"""The command line: `python -m jax_blocksparse advise --M 8192 --K 4096 --N 4096 --block-size 32 --density 0.1`."""

import argparse
from collections.abc import Sequence

from jax_blocksparse.advice import advise
from jax_blocksparse.geometry import BLOCK_SIZES


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command that the arguments name, by default those of the process."""
    parser = argparse.ArgumentParser(prog="python -m jax_blocksparse")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("advise", help="tell how much faster than dense a block-sparse weight is here")
    command.add_argument("--M", type=int, required=True, help="rows of x: tokens")
    command.add_argument("--K", type=int, required=True, help="input features")
    command.add_argument("--N", type=int, required=True, help="output features")
    command.add_argument("--block-size", type=int, required=True, choices=BLOCK_SIZES)
    command.add_argument("--density", type=float, required=True, help="fraction of the blocks that are kept")
    command.add_argument("--dtype", default="bfloat16", help="default: bfloat16")
    command.add_argument("--measure", action="store_true", help="measure here and now")
    options = parser.parse_args(arguments)
    try:
        print(advise(**vars(options)))
    except (TypeError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
