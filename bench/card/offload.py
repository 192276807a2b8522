"""Block offload beside all-resident and beside its peers, in one run: time, peak, bytes, overlap, and equality to the bit."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from bench.card import peers
from bench.card.forecasts import plans_of, shrunk
from bench.card.rig import Cell, rigged
from bench.card.session import Session, failures, goal, rows
from memory.cards import Card
from trainer.clock import WAITING

SECONDS = 390
EQUAL_STEPS = 20
_SHORT = 17  # frames
_SMALL = (256, 384)  # pixels: steps of which many are taken
_EQUAL: dict[str, dict[str, Any]] = {
    "all resident": {}, "ring, boundaries on host": dict(resident_blocks=0, boundaries="host"), "resident again": {},
    "ring in lockstep": dict(resident_blocks=0, passes="lockstep"), "3 buffers, a third resident": dict(resident_blocks=10, offload_buffers=3)}
"""What is compared to the bit, the first with all others."""


def _ours(num_blocks: int) -> dict[str, dict[str, Any]]:
    """Variants of our own, the plain one first."""
    third = num_blocks // 3
    return {"all resident": {}, "ring": dict(resident_blocks=0), "ring in lockstep": dict(resident_blocks=0, passes="lockstep"),
            "ring, boundaries on host": dict(resident_blocks=0, boundaries="host"),
            "ring in lockstep, boundaries on host": dict(resident_blocks=0, boundaries="host", passes="lockstep"),
            "3 buffers": dict(resident_blocks=0, offload_buffers=3), "a third resident": dict(resident_blocks=third),
            "two thirds resident": dict(resident_blocks=2 * third)}


def _residency(session: Session) -> tuple[Cell, tuple[Card, ...], tuple[str, ...]]:
    """What to ask the planner: how many blocks stay at 17 frames on a card that does not hold all, all else as it is."""
    return session.cell("5b", _SHORT), (shrunk(session.card, 12.0),), ("resident_blocks",)


def prepare(session: Session) -> None:
    """Ask for all predictions ahead."""
    session.forecaster.ask(plans_of, *_residency(session))


_COPIED = "5b-17f ring, boundaries on host"
"""Of which the copies are looked at: everything on the host that can be there."""
PEERS = ("diffusers group offload, block level, streams", "torch save_on_cpu", "sequential, layer by layer")


def _peers(session: Session) -> dict[str, dict[str, Any]]:
    return dict(zip(PEERS, (
        dict(peer=peers.group_offload, around_student=peers.whole_recomputation),
        dict(around_student=peers.save_on_host(session.gauge.device)),
        dict(peer=peers.leaf_offload, around_student=peers.whole_recomputation))))


def _equality(session: Session, skipped: list[str]) -> dict[str, Any]:
    """Losses, last gradients and weights of the 2b after 20 steps of streaming variants against all-resident, bit for bit."""
    def cell(**plan: Any) -> Cell:
        found = session.cell("2b", 9, **plan)
        return found if session.dry else dataclasses.replace(found, side=_SMALL)

    def run(cell: Cell) -> dict[str, torch.Tensor]:
        with rigged(cell, session.gauge) as rig:
            gradients: dict[str, torch.Tensor] = {}
            losses = []
            # What the optimizer is given at a step; the last one stays.
            rig.optimizer.register_step_pre_hook(lambda *_: gradients.update(
                {f"gradient {n}": p.grad.detach().clone() for n, p in rig.erasers.named_parameters()}))
            for _ in range(3 if session.dry else EQUAL_STEPS):
                rig.step()
                losses.append(rig.loss.clone())
            return rig.erasers.state_dict() | {n: g.cpu() for n, g in gradients.items()} | {"losses": torch.stack(losses).cpu()}

    result: dict[str, Any] = {}
    plain: dict[str, torch.Tensor] = {}
    for name, fields in session.within_budget(_EQUAL.items(), skipped, name=lambda variant: f"equality of {variant[0]}"):
        attempt = session.gauge.attempt(lambda fields=fields: run(cell(**fields)))
        if not attempt.worked:
            result[name] = attempt.as_json()
        elif name == "all resident":
            plain = attempt.value
        elif plain:
            differing = [n for n, tensor in plain.items() if not torch.equal(tensor, attempt.value[n])]
            result[name] = {"equal": not differing, "num_tensors": len(plain), "differing": differing[:5]}
    return result


def _activity(session: Session, cell: Cell) -> dict[str, float]:
    with rigged(cell, session.gauge) as rig:
        rig.step()
        return session.gauge.activity(rig.step)


def _cells(session: Session) -> list[tuple[str, Cell, dict[str, Any]]]:
    """(name, cell, settings of the rig). At 49 frames a step is the student's pass alone; at 17 it is whole.

    What is needed most comes first: what runs out of time is at the end. Sequential offload takes so long that it runs on the 2b.
    """
    ours, peer = _ours(42), _peers(session)
    *_, sequential = PEERS
    long = [(f"5b-49f {name}", session.cell("5b", 49, student_only=True, **ours[name]), {})
            for name in ("all resident", "ring", "ring, boundaries on host")]
    short = [(f"5b-17f {name}", session.cell("5b", _SHORT, **fields), {}) for name, fields in ours.items()]
    best, _ = session.plans(*_residency(session))[0]
    if best is not None:
        short[2:2] = [("5b-17f planner's residency", session.cell("5b", _SHORT, resident_blocks=best.plan.resident_blocks), {})]
    beside = [(f"5b-17f {name}", session.cell("5b", 17), more) for name, more in peer.items() if name != sequential]
    slow = [(f"2b-17f {name}", session.cell("2b", 17, **ours[name]), {}) for name in ("all resident", "ring", "ring, boundaries on host")]
    slow += [(f"2b-17f {sequential}", session.cell("2b", 17), peer[sequential])]
    if session.dry:
        return long[:2] + short[:6] + beside + slow  # one of each kind, so that every goal is computed
    return long + short[:6] + beside + slow + short[6:]


def hidden(session: Session, skipped: list[str]) -> dict[str, float]:
    """What is copied beside computation in a step, by the profiler."""
    ring = session.cell("5b", _SHORT, resident_blocks=0, boundaries="host")
    for _ in session.within_budget(["overlap"], skipped):
        return session.gauge.attempt(lambda: _activity(session, ring)).as_json()
    return {}


def side_by_side(session: Session, skipped: list[str]) -> dict[str, Any]:
    """Time and peaks of ours and of peers. A peer may fail; its error is written down."""
    return {name: session.measure(cell, num_steps=1 if more or session.dry else 2, num_warm=2, **more)
            for name, cell, more in session.within_budget(_cells(session), skipped, name=lambda entry: entry[0])}


def measure(session: Session, out: Path) -> dict[str, Any]:
    """The part's result."""
    skipped: list[str] = []
    with session.gauge.reproducible():
        equality = _equality(session, skipped)
    found = side_by_side(session, skipped)
    overlap = hidden(session, skipped)
    return {"cells": found, "equality": equality, "overlap": overlap, "skipped": skipped,
            "goals": goals(found, equality, overlap), "table": rows(found)}


_NOISE = 0.01
"""Of a step's time: ours is not taken to add less."""


def _added(found: dict[str, Any], name: str) -> float | None:
    """Time that a variant adds to all-resident, as a share."""
    base, cell = found.get(name.split()[0] + " all resident", {}), found.get(name, {})
    if "step_seconds" not in base or "step_seconds" not in cell:
        return None
    return cell["step_seconds"] / base["step_seconds"] - 1


def _loads(ours: dict[str, Any], group: str) -> float | None:
    """How often what streams crosses the link in a step, at most."""
    return max((cell["bytes_streamed_a_step"] / cell["streamed_bytes"] for name, cell in ours.items()
                if name.startswith(group) and cell.get("streamed_bytes")), default=None)


def whole_steps(session: Session) -> dict[str, Cell]:
    """Those of `side_by_side` that the planner can be asked about: ours, the teacher with them."""
    return {name: cell for name, cell, more in _cells(session) if not more and not cell.student_only}


def _match(found: dict[str, Any], ours: dict[str, Any], peer: str) -> tuple[float, float, float | None] | None:
    """Seconds of a peer, of the fastest of ours that holds no more (None without one), and of all resident."""
    name, theirs = next(((n, cell) for n, cell in found.items() if peer in n), ("", {}))
    if "step_seconds" not in theirs:
        return None
    group = name.split()[0]
    fitting = [cell["step_seconds"] for n, cell in ours.items() if n.split()[0] == group and "step_seconds" in cell
               and cell["allocated_bytes"] <= theirs["allocated_bytes"]]
    return (theirs["step_seconds"], min(fitting), found.get(f"{group} all resident", {}).get("step_seconds")) if fitting else None


def goals(found: dict[str, Any], equality: dict[str, Any], overlap: dict[str, Any]) -> list[dict[str, Any]]:
    """The goals of the part, of what `side_by_side`, `_equality` and `hidden` found; what is empty leaves its goals without a measurement."""
    ours = {name: cell for name, cell in found.items() if any(word in name for word in ("ring", "buffers", "residen"))}
    steady = [cell["num_retries"] + cell["num_driver_allocations"] + max(0, cell["grown_bytes"])
              for name, cell in ours.items() if "step_seconds" in cell]
    matches = {peer: _match(found, ours, peer) for peer in PEERS}
    over = {peer: match and match[1] / match[0] - 1 for peer, match in matches.items()}
    theirs, own, plain = matches[PEERS[-1]] or (None, None, None)
    added = (theirs / plain - 1) / max(own / plain - 1, _NOISE) if plain else None
    copied, waited = overlap.get("to device seconds"), found.get(_COPIED, {}).get("seconds_by_phase", {}).get(WAITING)
    equal = [not entry["equal"] for entry in equality.values() if "equal" in entry]
    return [
        goal("time that the ring adds at 49 frames", _added(found, "5b-49f ring"), 0.015, unit="%"),
        goal("time that the ring with the planner's residency adds at 17 frames", _added(found, "5b-17f planner's residency"), 0.03, unit="%"),
        goal("time that the ring in lockstep adds at 17 frames", _added(found, "5b-17f ring in lockstep"), 0.03, unit="%"),
        *(goal(f"time of the fastest of ours that holds no more, against {peer}", over[peer], 0, unit="%") for peer in PEERS),
        goal("time that sequential offload adds, over the fastest of ours that holds no more", added, 20, at_least=True),
        goal("variants that differ from all-resident after the steps", failures(equal, complete=len(equal) == len(_EQUAL) - 1), 0),
        goal("weight bytes copied in a student's pass, over those that stream", _loads(ours, "5b-49f"), 2),
        goal("weight bytes copied in a step in lockstep, over those that stream", _loads(ours, "5b-17f ring in lockstep"), 2),
        goal("retries, driver allocations and growth after step 2", max(steady, default=None), 0),
        # By events on the compute stream. The profiler's record counts as not hidden what is copied while the host is late with kernels,
        # which the profiler makes it.
        goal("share of copies to the device that computation does not wait for",
             1 - waited / copied if copied and waited is not None else None, 0.95, at_least=True, unit="%"),
    ]
