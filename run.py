"""Parse, dispatch, and turn exceptions into exit codes: 0 done, 1 bug, 2 usage, 3 does not fit or out of memory,
4 non-finite, 5 checkpoint, 6 input/output, 130/143 interrupted after saving."""

import logging
import os
import sys


def main() -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
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


if __name__ == "__main__":
    sys.exit(main())
