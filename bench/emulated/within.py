"""Python on the emulated card: `python -m bench.emulated -- ARGUMENTS` runs it with the arguments of Python itself.

Triton's kernels are not launched there, and would not be found right. What stands in for them takes the memory they take.
"""

import runpy
import sys
from types import SimpleNamespace

from memory import environment

environment.prepare()  # before torch is imported: as a run does

import torch

from trainer.backbones import norm_rotate


def stand_in() -> None:
    """Have the operator allocate as with Triton's kernels, from now on."""
    kernels = SimpleNamespace(norm_rotate=lambda x, *_: torch.empty_like(x), norm_rotate_backward=lambda grad, x, *_: torch.empty_like(x))
    norm_rotate.working_kernels = lambda device: kernels


def main(arguments: list[str]) -> None:
    stand_in()
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    elif arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
