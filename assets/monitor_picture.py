"""Draw the live view as it stood at the end of a stored run: python assets/monitor_picture.py RUN OUT.svg [columns]"""

import io
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from rich.console import Console

from trainer.live_view import view
from trainer.memory_file import facts
from trainer.run_files import RunFiles


def main(run: Path, out: Path, columns: int = 100) -> None:
    files = RunFiles.read(run)
    seconds = [record["seconds"] for record in files.records]
    pace = sum(seconds[-20:]) / len(seconds[-20:])
    planned = files.setting("optim.steps")
    state = {"title": files.setting("data.concept"), "num_steps": planned, "done": files.num_steps(),
             "records": files.records, "elapsed": sum(seconds), "seconds_per_step": pace,
             "eta": pace * (planned - files.num_steps()), "stopping": False, "memory": files.records[-1]["memory"],
             "facts": facts(files.memory), "findings": files.findings.get("findings")}
    console = Console(record=True, width=columns, force_terminal=True, color_system="truecolor", file=io.StringIO())
    console.print(view(state, columns))
    svg = console.export_svg(title="python run.py")
    out.write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL))  # no font from the network


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
