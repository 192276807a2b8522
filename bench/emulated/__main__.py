"""A card where there is none: torch's CUDA build on a card that has memory and computes nothing.

    python -m bench.emulated                       all parts, into bench/results/emulated.json
    python -m bench.emulated --card h100 --only peaks                       the same with a Hopper's kernels, into emulated-h100.json
    python -m bench.emulated -- -m pytest tests/memory/test_contract.py -m gpu -k steady_state
                                                   anything else that Python runs, on that card

Allocations are those of torch's own allocator and operators; no kernel runs, so there are no values, and times are those of a clock
that takes rates from cards.toml (parts schedule and buffers). Needs a CUDA build of torch (Linux, x86-64) and a C++ compiler; about an hour
on two cores.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from bench.emulated.library import DEFAULT_CARD, CannotEmulate, environment
from bench.provenance import RESULTS
from memory.cards import UnknownCard, lookup


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.emulated", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", default=DEFAULT_CARD, help="whose name and capability it has: torch takes the kernels that it takes there (%(default)s)")
    parser.add_argument("--gib", type=float, default=96, help="its memory (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the result")
    parser.add_argument("--only", nargs="+", metavar="PART", default=[],
                        help="some of peaks, minimum, feasibility, drawn, runs, steps, compiled, schedule, buffers; the others stay as they are in the result")
    parser.add_argument("--toy", action="store_true", help="toy models: the code runs, the figures mean nothing")
    parser.add_argument("python", nargs="*", help="after --: arguments for Python, in place of measuring")
    options = parser.parse_args()
    if not 0 < options.gib <= 4096:
        parser.error(f"--gib {options.gib:g}: more than 0, and at most 4096")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        print(f"error: --out {options.out}: cannot be written ({e.strerror})", file=sys.stderr)
        return 6
    try:
        card = lookup(options.card)
        emulated = environment(card, options.gib)
    except (CannotEmulate, UnknownCard) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    measuring = ["-m", "bench.emulated.measure", "--card", card.name, "--out", str(options.out),
                 *["--toy"] * options.toy, *["--only"] * bool(options.only), *options.only]
    return subprocess.call([sys.executable, "-m", "bench.emulated.within", *(options.python or measuring)], env=os.environ | emulated)


if __name__ == "__main__":
    sys.exit(main())
