"""Parse, dispatch, and turn exceptions into exit codes: 0 done, 1 bug, 2 usage, 3 does not fit or out of memory,
4 non-finite, 5 checkpoint, 6 input/output, 130/143 interrupted after saving."""

import logging
import os
import runpy
import sys


def main() -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.getLogger("bitsandbytes.backends").setLevel(logging.ERROR)  # it warns of kernels that are not used here
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # Read when torch's allocator and cuBLAS start. Growing segments waste least, and the workspace is what is planned for.
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")
    if sys.argv[1:3] == ["bench", "card"]:  # by name: nothing imports the benchmarks
        sys.argv[1:3] = []
        runpy.run_module("bench.card", run_name="__main__", alter_sys=True)
    from memory.plan import PlanError
    from trainer.cli import main as run
    from trainer.errors import TrainerError

    try:
        run(sys.argv[1:])
        return 0
    except TrainerError as e:
        print(f"{'interrupted' if e.exit_code > 128 else 'error'}: {e}", file=sys.stderr)
        return e.exit_code
    except PlanError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as e:
        # torch is imported by then if the error is its own, and must not be imported for --help
        out_of_memory = (MemoryError, *([sys.modules["torch"].OutOfMemoryError] if "torch" in sys.modules else []))
        if not isinstance(e, out_of_memory):
            raise
        print(f"error: out of memory ({str(e).splitlines()[0] if str(e) else 'on the host'}); fewer --frames, a smaller "
              "--batch-size, --boundaries host or --resident-blocks 0 need less", file=sys.stderr)
        return 3


if __name__ == "__main__":
    sys.exit(main())
