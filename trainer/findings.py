"""What can be wrong, by name: the codes, what causes each, what to do about it; and how findings are shown.

Imports no torch: the README's table is generated from CODES.
"""

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO

from trainer.errors import InputOutputError, NonFinite
from trainer.run_files import FINDINGS, write_json

logger = logging.getLogger(__name__)

Severity = Literal["fatal", "warning", "expected"]


class Code(NamedTuple):
    severity: Severity
    cause: str
    fix: str


CODES: dict[str, Code] = {
    # The frozen model and its inputs.
    "non-finite-weight": Code("fatal",
        "a weight holds NaN or infinity: the file is damaged, or was written by a run that diverged",
        "copy the weights again; of a run that diverged, a new run with a lower --lr"),
    "wiped-attention": Code("fatal",
        "attention gives the same for every token: its weights were wiped, as by to_empty() or a move through the "
        "meta device after loading",
        "load the weights after the last to_empty(), transformer.load_state_dict(state, assign=True), make anew what is not saved with them, and put "
        "the erasers in after that; copy the model again if its file is at fault"),
    "wiped-weights": Code("fatal",
        "a weight or a table of positions is constant: it was created but never loaded, or wiped by to_empty()",
        "load the weights after the last to_empty(), make anew what is not saved with them, and put the erasers in after that; copy the model again "
        "if its file is at fault"),
    "frozen-weights-changed": Code("fatal",
        "something writes into the frozen model, such as an optimizer that has its weights: the erasers fit a model that is gone",
        "freeze it before the erasers are put in, transformer.requires_grad_(False), give the optimizer erasers.parameters() alone, and look "
        "for in-place operations on its weights"),
    "non-finite-embedding": Code("fatal",
        "a prompt's cached text embedding holds NaN or infinity",
        "delete the cached embeddings (rm -r ${XDG_CACHE_HOME:-~/.cache}/eraser-trainer/embeddings) and start again"),
    "non-native-dtype": Code("fatal",
        "the model was published in bfloat16, and its activations leave float16's range of 65504",
        "--dtype bfloat16"),
    "half-precision-overflow": Code("fatal",
        "an activation leaves float16's range of 65504",
        "--dtype bfloat16, or --dtype float32"),
    "near-overflow": Code("warning",
        "an activation of the frozen model comes within a factor of 8 of float16's range of 65504",
        "--dtype bfloat16, or --dtype float32, should it overflow"),
    "non-finite-latents": Code("fatal",
        "the latents that the model is given hold NaN or infinity: the scheduler made them",
        "look at the scheduler's configuration (scheduler/scheduler_config.json); if that is sound, --latents noise, fewer --trajectory-steps, or "
        "a lower --trajectory-guidance"),
    "non-finite-activation": Code("fatal",
        "finite inputs and weights give NaN or infinity in this module",
        "--dtype float32 tells whether precision is the cause; if it is not, and the largest input is huge, a weight before this module is damaged: "
        "copy the model again; along a trajectory, a lower --trajectory-guidance may help"),
    # The erasers and who trains them.
    "half-precision-adapters": Code("fatal",
        "in float16 Adam's eps of 1e-8 is 0: a zero gradient gives 0/0 = NaN in the first step; in bfloat16 most updates are rounded away",
        "keep the erasers in float32: for p in erasers.parameters(): p.data = p.data.float(), before the optimizer "
        "is made"),
    "frozen-eraser": Code("fatal",
        "erasers do not require a gradient: the whole model was frozen after they were put in",
        "freeze first, inject after; or: for p in erasers.parameters(): p.requires_grad_(True)"),
    "not-in-optimizer": Code("fatal",
        "the optimizer was made without these parameters, so they can never move",
        "make_optimizer(erasers.parameters(), ...) after the erasers were injected"),
    "replaced-parameters": Code("fatal",
        "something, such as an offload hook, put other Parameter objects into the erasers: the optimizer moves the "
        "old ones",
        "move data, not objects (p.data = ...), or make the optimizer after the hooks are in place"),
    "no-op-adapter": Code("warning",
        "the eraser changes nothing: it is untrained, switched off, or not injected",
        "train it (python run.py --concept WORD), or load a trained file; in training, look at what takes its output away again"),
    "untrained-eraser-acts": Code("fatal",
        "with `up` at zero the output with erasers must equal the output without, and does not",
        "look at what the hooks around attn1 do besides h + adapter(h); a model with dropout wants transformer.eval()"),
    "weights-never-move": Code("fatal",
        "gradients arrive, the optimizer has the parameters, and yet a step leaves them as they were",
        "a new run with a higher --lr; look for a learning rate of 0, or an optimizer step that is skipped"),
    "eraser-diverged": Code("fatal",
        "the eraser's output has run away: it is many times as large as what it is added to, or makes a model overflow that is sound without",
        "a new run with a lower --lr"),
    "learning-rate-too-high": Code("warning",
        "one optimizer step moves every weight by about the learning rate, which is as much as the weights are large",
        "--lr 1e-4"),
    "eta-too-large": Code("warning",
        "the target lies far outside of what the model ever predicts",
        "--eta 5"),
    # Teacher and student.
    "teacher-with-erasers": Code("fatal",
        "the teacher ran with erasers on, so the student chases itself",
        "run the teacher inside `with erasers.switched(False):`"),
    "student-without-erasers": Code("fatal",
        "the student ran without its erasers: switched off, or not injected",
        "run the student inside `with erasers.switched(True):`, erasers injected before"),
    "switched-before-recompute": Code("fatal",
        "the erasers were switched between the forward pass and its recomputation in backward",
        "run backward() inside the same `with erasers.switched(True):` as the forward pass"),
    "no-grad-student": Code("fatal",
        "the student's forward pass ran under no_grad, so nothing can be learned",
        "run the student outside of torch.no_grad() and torch.inference_mode()"),
    "detached-eraser": Code("fatal",
        "the eraser's output was cut off from the graph, so no gradient reaches it, or its gradient was dropped before the step",
        "remove .detach(), .data, .item() or no_grad between the eraser and the loss, and zero_grad() between backward() and the step"),
    "reentrant-checkpointing": Code("fatal",
        "reentrant checkpointing needs an input that requires a gradient, and a frozen model has none",
        "checkpoint(..., use_reentrant=False), or --checkpoint all"),
    "checkpointing-off": Code("warning",
        "checkpointed blocks were not recomputed: checkpointing is silently off and saves no memory",
        "--checkpoint all; do not make it depend on module.training, the frozen model is in eval mode"),
    "slow-steps": Code("warning",
        "steps take more than three times as long as predicted: something else uses the card, it is throttled or another one than was planned for, its "
        "link to the host is slow, its driver moves what does not fit to the host, as under WSL, or short steps wait for a slow host",
        "look at nvidia-smi; python run.py doctor measures the link and tries Triton's kernels; a run goes on with --resume RUN --profile auto"),
    # Latents, losses and gradients.
    "trajectory-not-advanced": Code("fatal",
        "the sampler step is skipped: every timestep trains on the same latents, pure noise",
        "latents = scheduler.step(velocity, t, latents).prev_sample after every teacher prediction; in a run of run.py, look at the scheduler's "
        "configuration (scheduler/scheduler_config.json)"),
    "nothing-to-learn": Code("warning",
        "the teacher predicts the same with the concept as without: the target is what the model does already",
        "use prompts that name the concept, and safe prompts that differ from them"),
    "non-finite-target": Code("fatal",
        "the teacher's predictions are finite, and the target made of them leaves float32's range, itself or squared",
        "--eta 5"),
    "swallowed-loss": Code("fatal",
        "the loss is exactly 0 though prediction and target differ: something replaced a NaN",
        "remove nan_to_num and the like between the prediction and the loss; never replace a NaN"),
    "non-finite-loss": Code("fatal",
        "predictions are finite and the loss is not",
        "--dtype float32, or a lower --lr; compute the loss in float32"),
    "non-finite-gradient": Code("fatal",
        "forward is finite and a gradient is not",
        "--dtype bfloat16 or float32; look at hooks on gradients and at custom autograd functions"),
    "loss-scale-collapse": Code("fatal",
        "no loss scale gives finite gradients: they overflow float16 at any scale, or hold a NaN of their own",
        "--dtype bfloat16, or --dtype float32"),
    "gradient-underflow": Code("fatal",
        "gradients fall below float16's smallest number on their way back and become 0",
        "--dtype bfloat16, or an autocast to it, or a loss scaler: torch.amp.GradScaler"),
    "dead-gelu": Code("fatal",
        "every unit of the eraser's inner layer is below GELU's range, so only up.bias gets a gradient",
        "a new run with a lower --lr, or another --seed, which draws other weights for `down`"),
    "gradients-not-zeroed": Code("warning",
        "backward() began with gradients of an earlier step still there: they pile up from step to step",
        "optimizer.zero_grad() after every step, or before the first backward() of the next one"),
    "zero-gradient": Code("fatal",
        "the gradient is exactly 0 though the eraser is part of the graph",
        "look for a loss that does not depend on the prediction, a gate of 0 after the eraser, or zero_grad() between backward() and the step"),
    # Not trouble.
    "zero-down-gradient": Code("expected",
        "`up` starts at zero, so `down` gets its first gradient in the second step",
        "nothing to do"),
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing found. `evidence` holds the figures behind it."""

    code: str
    severity: Severity
    phase: str
    """weights, embeddings, adapters, optimizer, latents, teacher, student, backward, recompute, training."""
    block: int | None = None
    """The first block concerned in order of execution."""
    module: str | None = None
    """Where, in the names of the transformer's modules."""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    cause: str
    fix: str

    def __str__(self) -> str:
        where = "".join(f", {what}" for what in (self.block is not None and f"block {self.block}", self.module) if what)
        return f"{self.code} ({self.phase}{where}): {self.cause}. {evidence_text(self.evidence)}. Fix: {self.fix}"

    def as_json(self) -> dict[str, Any]:
        """Plain values; figures that JSON cannot hold become words."""
        return asdict(self) | {"evidence": {k: _plain(v) for k, v in self.evidence.items()}}


class Unhealthy(NonFinite):
    """A fatal finding; nothing was applied to the weights. `findings` has them all."""

    def __init__(self, message: str, findings: Sequence[Finding]):
        super().__init__(message)
        self.findings = list(findings)


def finding(code: str, phase: str, *, block: int | None = None, module: str | None = None,
            severity: Severity | None = None, **evidence: Any) -> Finding:
    """A finding of a known code, with its cause and fix from CODES."""
    known = CODES[code]
    return Finding(code=code, severity=severity or known.severity, phase=phase, block=block, module=module,
                   evidence=evidence, cause=known.cause, fix=known.fix)


def from_json(values: Mapping[str, Any]) -> Finding:
    """The inverse of `Finding.as_json`. Raises TypeError for anything else."""
    found = Finding(**values)
    texts = (found.code, found.severity, found.phase, found.cause, found.fix)
    if not (all(isinstance(text, str) for text in texts) and isinstance(found.block, int | None)
            and isinstance(found.module, str | None) and isinstance(found.evidence, Mapping)):
        raise TypeError(f"a field of the finding {found.code!r} is of another type")
    return found


def earlier_findings(content: Mapping[str, Any]) -> list[Finding]:
    """The findings in findings.json of a run that goes on: it did go on, so what was fatal then is a warning now."""
    found, listed = [], content.get("findings", [])
    for values in listed if isinstance(listed, list) else [listed]:
        try:
            f = from_json(values)
        except TypeError as e:
            logger.warning("an earlier finding is left out, it cannot be read (%s)", e)
            continue
        past = {"severity": "warning", "evidence": {**f.evidence, "stopped_an_earlier_start": True}}
        found.append(replace(f, **past) if f.severity == "fatal" else f)
    return found


@dataclass(frozen=True, kw_only=True)
class Bill:
    """The result of an examination: what was found, and what was looked at."""

    findings: tuple[Finding, ...] = ()
    checked: tuple[str, ...] = ()

    @property
    def healthy(self) -> bool:
        return all(f.severity == "expected" for f in self.findings)

    @property
    def fatal(self) -> list[Finding]:
        return [f for f in self.findings if f.severity == "fatal"]

    def with_findings(self, findings: Iterable[Finding]) -> "Bill":
        """This bill and more findings; one of a code and a block that is there already is left out, unless it alone is fatal."""
        kept = {(f.code, f.block): f for f in self.findings}
        for f in findings:
            key = f.code, f.block
            if key not in kept or f.severity == "fatal" != kept[key].severity:
                kept[key] = f
        return replace(self, findings=tuple(kept.values()))

    def raise_if_fatal(self, where: str) -> None:
        """Raises Unhealthy with the first fatal finding."""
        if self.fatal:
            raise Unhealthy(f"{where}: {self.fatal[0]}", self.findings)

    def as_json(self) -> dict[str, Any]:
        return {"healthy": self.healthy, "findings": [f.as_json() for f in self.findings],
                "checked": list(self.checked)}


def keep_findings(run_dir: Path, bill: Bill) -> None:
    """Write RUN/findings.json. Where a full disk does not take it, that is a warning: what was found is said all the same."""
    try:
        write_json(run_dir / FINDINGS, bill.as_json())
    except InputOutputError as e:
        logger.warning("%s", e)


def print_bill(bill: Bill, file: TextIO, *, as_json: bool = False) -> None:
    """Write the bill: a table and what was checked, or JSON."""
    if as_json:
        print(json.dumps(bill.as_json(), indent=2), file=file)
        return
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    console = Console(file=file, width=None if file.isatty() else 10**4)
    if bill.findings:
        table = Table(Column("finding", no_wrap=True), Column("evidence", overflow="fold"), Column("cause and fix", overflow="fold"), show_lines=True)
        for f in bill.findings:
            where = f.phase if f.block is None else f"{f.phase}, block {f.block}"
            evidence = "\n".join(filter(None, (f.module, evidence_text(f.evidence))))
            table.add_row(Text(f"{f.code}\n{f.severity}\n{where}"), Text(evidence), Text(f"{f.cause}\nFix: {f.fix}"))
        console.print(table)
    console.print("Healthy." if bill.healthy else "Not healthy.", "Checked:" if bill.checked else "")
    for line in bill.checked:
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)


def evidence_text(evidence: Mapping[str, Any]) -> str:
    """`{"gradient_norm": 0.125}` as `gradient norm 0.125`."""
    return ", ".join(f"{k.replace('_', ' ')} {f'{v:.4g}' if isinstance(v, float) else v}" for k, v in evidence.items() if v is not None)


def blocks_text(blocks: Sequence[int]) -> str:
    """[3] as block 3, [0, …, 9] as blocks 0, 1, 2, 3, 4, 5 and 4 more."""
    shown = ", ".join(map(str, blocks[:6]))
    more = f" and {len(blocks) - 6} more" if len(blocks) > 6 else ""
    return f"block{'s' if len(blocks) > 1 else ''} {shown}{more}"


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, int | float | bool | str | None) else str(value)
