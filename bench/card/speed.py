"""How much of the card's measured matrix rate a step reaches, where the time goes, and what changes it."""

import dataclasses
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.card.forecasts import peaks_of, plans_of
from bench.card.rig import Cell, measured, rigged
from bench.card.session import Session, goal, rows
from bench.naive import Naive
from trainer.backbones import norm_rotate
from trainer.backbones.norm_rotate import RotatingNorm

SECONDS = 260
_SUSTAINED_S = 1.5


def _rates(session: Session) -> dict[str, float]:
    """FLOP/s of a large 16-bit product, in a burst and as long as clocks take to settle, and of copies over the host link (pinned, bytes/s)."""
    gauge, side = session.gauge, 64 if session.dry else 8192
    x = torch.randn(side, side, device=gauge.device, dtype=torch.bfloat16)
    y = torch.empty_like(x)
    def product() -> None:
        torch.mm(x, x, out=y)

    burst = gauge.seconds(product, repeats=20)
    num_products = 20 if session.dry else max(20, round(_SUSTAINED_S / burst))
    seconds = gauge.seconds(lambda: [product() for _ in range(num_products)], repeats=1) / num_products
    host = torch.empty(2**20 if session.dry else 2**28, dtype=torch.uint8, pin_memory=gauge.is_card)
    there = torch.empty_like(host, device=gauge.device)
    copied = gauge.seconds(lambda: there.copy_(host, non_blocking=True), repeats=5)
    back = gauge.seconds(lambda: host.copy_(there, non_blocking=True), repeats=5)
    around = gauge.seconds(lambda: torch.add(there, 1, out=there), repeats=5)
    return {"side": side, "matrix_flops_per_second": 2 * side**3 / seconds, "burst_flops_per_second": 2 * side**3 / burst,
            "to_device_bytes_per_second": host.nbytes / copied,
            "to_host_bytes_per_second": host.nbytes / back, "element_wise_bytes_per_second": 2 * there.nbytes / around}


def _norm_seconds(session: Session) -> dict[str, float]:
    """Seconds of norming and rotating a 5b block's queries at 49 frames, forward and backward: by Triton's kernel where there is one, and by
    torch's operators with float32 copies of a few MiB at a time, from less to more than a cache holds."""
    num_heads, num_tokens = (2, 8) if session.dry else (48, 17_550)
    norm = RotatingNorm(64, device=session.gauge.device, dtype=torch.bfloat16).requires_grad_(False)
    x, grad = torch.randn(2, 1, num_tokens, num_heads, 64, dtype=torch.bfloat16, device=session.gauge.device)
    angles = torch.rand(num_tokens, 32, device=x.device).repeat_interleave(2, -1)
    positions = angles.cos(), angles.sin()

    def seconds() -> float:
        return session.gauge.seconds(lambda: torch.autograd.grad(norm(x.requires_grad_(), positions), x, grad), repeats=5)

    found = {"as in a run": seconds()}
    with patch.object(norm_rotate, "_kernels_for", return_value=None):
        for mib in (5, 16, 32, 64, 206):
            with patch.object(norm_rotate, "CHUNK_BYTES", mib * 2**20):
                found[f"torch, {mib} MiB"] = seconds()
    return found


def _kernels(session: Session) -> list[dict[str, Any]]:
    """Where the time of the student's pass goes, 5b at 49 frames."""
    with rigged(session.cell("5b", 49, student_only=True), session.gauge) as rig:
        rig.step()
        return session.gauge.kernels(rig.step)


def _picked_attention(session: Session) -> SDPBackend:
    """The kernel that torch picks for the models' attention on this device."""
    q = torch.empty(1, 1, 128, 64, dtype=torch.bfloat16, device=session.gauge.device)
    return SDPBackend(torch._fused_sdp_choice(q, q, q))


def _with_backend(session: Session, cell: Cell, backend: SDPBackend) -> dict[str, Any]:
    with sdpa_kernel(backend):
        return measured(cell, session.gauge, num_steps=2)


def _naive(session: Session) -> dict[str, Any]:
    """The naive recipe on the 2b at 17 frames, without a cap."""
    gauge = session.gauge
    naive = Naive(session.cell("2b", 17, dtype="float32").config(), gauge.device, session.recipe(), lambda stage: None)
    try:
        naive.step()
        gauge.begin()
        gauge.phase("step")
        seconds = gauge.seconds(naive.step, repeats=1)
        peak = gauge.end()["step"]
    finally:
        naive.__dict__.clear()
    return {"step_seconds": seconds, **peak}


def _variants(session: Session, picked: SDPBackend) -> list[tuple[str, Any]]:
    small, plain, streamed = session.cell("2b", 17), session.cell("5b", 49), dict(resident_blocks=0, boundaries="host")
    backends = (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH) if session.dry else (
        SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
    other = next(backend for backend in backends if backend != picked)

    def run(cell: Cell):
        return lambda: measured(cell, session.gauge, num_steps=2, num_warm=2 if cell.plan.compile else 1)

    def filled():
        best, why = session.plans(plain, (session.card,))[0]
        if best is None:
            raise RuntimeError(why)
        return measured(dataclasses.replace(plain, plan=best.plan), session.gauge, num_steps=2)

    # Short steps come when the forecasts are done, which take the host's cores.
    return [("5b 49f", run(plain)), (f"5b 49f {other.name.lower()}", lambda: _with_backend(session, plain, other)), ("5b 49f filling the card", filled),
            ("2b 17f", run(small)), ("naive 2b 17f", lambda: _naive(session)),
            ("2b 17f smallest", run(session.cell("2b", 17, resident_blocks=0, boundaries="host", feed_forward_chunks=8))),
            *[(f"2b 17f {backend.name.lower()}", lambda backend=backend: _with_backend(session, small, backend)) for backend in backends],
            ("2b 17f 8-bit Adam", run(session.cell("2b", 17, optimizer="adamw8bit"))),
            ("2b 17f student only, teacher cached", run(session.cell("2b", 17, student_only=True))),
            ("2b 17f streamed", run(session.cell("2b", 17, **streamed))),
            # What takes longest to begin comes last.
            ("5b 49f compiled", run(session.cell("5b", 49, compile=True))), ("2b 17f compiled", run(session.cell("2b", 17, compile=True))),
            ("2b 17f streamed, compiled", run(session.cell("2b", 17, compile=True, **streamed)))]


def prepare(session: Session) -> None:
    """Ask for all predictions ahead."""
    session.forecaster.ask(peaks_of, session.cell("5b", 49), session.workspace_bytes)
    session.forecaster.ask(plans_of, session.cell("5b", 49), (session.card,))


def measure(session: Session, out: Path) -> dict[str, Any]:
    """The part's result. Variants may fail for want of a kernel or a compiler; that is written down."""
    picked = _picked_attention(session)  # now: the device may be gone at the end
    rate, norms = session.gauge.attempt(lambda: _rates(session)).as_json(), session.gauge.attempt(lambda: _norm_seconds(session)).as_json()
    found, skipped = {}, []
    for name, run in session.within_budget(_variants(session, picked), skipped, name=lambda pair: pair[0]):
        beside = session.forecaster.num_under_way()
        found[name] = {"num_forecasts_beside": beside, **session.gauge.attempt(run).as_json()}
    kernels = [session.gauge.attempt(lambda: _kernels(session)).as_json() for _ in session.within_budget(["kernels"], skipped)]
    told = session.forecast(peaks_of, session.cell("5b", 49), session.workspace_bytes)
    flops = told.value[1] if told.worked else None
    small, naive = (found.get(name, {}) for name in ("2b 17f smallest", "naive 2b 17f"))
    # One and the same work; filling the card does less of it.
    shares = {name: flops / cell["step_seconds"] / rate["matrix_flops_per_second"] for name, cell in found.items()
              if name.startswith("5b 49f") and "filling" not in name and "step_seconds" in cell and flops and "matrix_flops_per_second" in rate}
    others = [share for name, share in shares.items() if name != "5b 49f"]
    both = "step_seconds" in small and "step_seconds" in naive
    return {
        "rates": rate, "norm_seconds": norms, "kernels_5b_49f_student_only": kernels and kernels[0], "picked_attention": picked.name.lower(),
        "flops_5b_49f": flops, "share_of_matrix_rate": shares,
        "share_of_burst_rate": {name: share * rate["matrix_flops_per_second"] / rate["burst_flops_per_second"] for name, share in shares.items()},
        "cells": found, "skipped": skipped,
        "goals": [goal(f"share of the matrix rate that lasts for {_SUSTAINED_S} s, 5b at 49 frames, products of recomputation counted",
                       shares.get("5b 49f"), 0.55, at_least=True, unit="%"),
                  goal("the same with other attention kernels, or compiled", max(others, default=None), 0.55, at_least=True, unit="%"),
                  # by one and the same plan: the smallest
                  goal("times faster than the naive recipe, 2b at 17 frames",
                       naive["step_seconds"] / small["step_seconds"] if both else None, 5, at_least=True),
                  goal("times smaller than the naive recipe, 2b at 17 frames",
                       naive["allocated_bytes"] / small["allocated_bytes"] if both else None, 10, at_least=True)],
        "table": rows(found),
    }
