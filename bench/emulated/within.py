"""Python on the emulated card: `python -m bench.emulated -- ARGUMENTS` runs it with the arguments of Python itself.

Triton compiles its kernels and launches them there, as it would on that card. They compute nothing either, so they are not asked
whether they compute what torch does.
"""

import runpy
import sys

from memory import environment

environment.prepare()  # before torch is imported: as a run does

import torch

from trainer.backbones import kernels, norm_rotate


def main(arguments: list[str]) -> None:
    norm_rotate.working_kernels = lambda device: kernels
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
