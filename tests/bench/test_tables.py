"""Documents say what the committed results say, and every claim of the source documents has a verdict."""

import json
import math
from types import SimpleNamespace

import pytest

from bench import claims, planning, rank, tables

CLAIMS = """rank-params rank-total rank-fp16 rank-train 5b-shape 5b-summary rank-delta rank-choice 2b-total 2b-layer tokens offload fp16
    batch train-total infer-total 24gb-oom 96gb-ok 96gb-cfg full-ft step-time fp16-nan wiped latent-shape erase preserve""".split()


MARKED = [(name, m["name"]) for name in tables.DOCUMENTS for m in tables.MARK.finditer((tables.ROOT / name).read_text())]


@pytest.mark.parametrize("document, table", MARKED)
def test_documents_are_what_the_results_say(document, table):
    written = [m[0] for m in tables.MARK.finditer((tables.ROOT / document).read_text()) if m["name"] == table]
    try:
        wanted = f"<!-- table: {table} -->\n{tables.TABLES[table]()}<!-- end -->"
    except FileNotFoundError as e:
        pytest.skip(f"no result yet: {e.filename}")
    assert written == [wanted], "run `python -m bench.tables`"


def test_the_documents_have_what_needs_no_measurement():
    assert {("README.md", "codes"), ("MEMORY.md", "overlap"), ("MEMORY.md", "claims")} <= set(MARKED)


def test_every_claim_has_a_verdict_from_the_current_results():
    assert list(claims.VERDICTS) == CLAIMS
    assert tables.load("claims")["claims"] == claims.collect(), "run `python -m bench.claims`"
    assert all(c["verdict"] in ("holds", "contradicted", "predicted here", "measured here") for c in claims.collect().values())


def test_rank_figures_by_hand():
    assert [rank.costs(41, 1152, r)["params_per_block"] for r in (64, 128, 256, 512)] == [148_672, 296_192, 591_232, 1_181_312]
    assert rank.costs(30, 1920, 128)["params"] == 14_807_040
    assert rank.costs(42, 3072, 128)["params"] == 33_164_544
    # weight, gradient and two moments of 4 bytes, and a step count of 4 bytes a tensor
    assert rank.costs(30, 1920, 128)["train_adamw_bytes"] == 16 * 14_807_040 + 4 * 4 * 30


def test_a_result_that_is_not_there_leaves_its_claims_open(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    (tmp_path / "rank.json").write_text(json.dumps(tables.load("rank")))
    found = claims.collect()
    assert found["erase"]["verdict"] == "open" and "bench.erasure" in found["erase"]["figure"]
    assert found["offload"]["verdict"] == "open" and "bench.card --only offload" in found["offload"]["figure"]
    assert found["2b-total"] == {"document": "002", "claim": "14,807,040 parameters (2b, rank 128)", "verdict": "holds",
                                 "figure": "14,807,040"}


@pytest.mark.parametrize("seconds, regret", [((3.0, 2.0), 0.5), ((None, 2.0), math.inf), ((None, None), None)])
def test_regret_of_a_search_that_finds_nothing(monkeypatch, seconds, regret):
    found = iter(None if s is None else SimpleNamespace(time=SimpleNamespace(seconds=s)) for s in seconds)
    monkeypatch.setattr("trainer.planning.forecast", lambda config, card: SimpleNamespace(result=SimpleNamespace(best=next(found))))
    assert planning.regret("cogvideox-2b", 9, "4gb") == regret
