"""The bundled model, end to end by the command line: whatever plan a profile chooses or flags name, the same eraser comes out."""

import json

import pytest
from safetensors.torch import load_file

from trainer import cli

WORDS = ["--steps", "3", "--batch-size", "2", "--rank", "4", "--trajectory-steps", "4", "--sample-steps", "1", "--no-evaluate",
         "--device", "cpu", "--monitor", "off"]
PLANS = {
    "without checkpointing": ["--checkpoint", "none"],
    "every other block": ["--checkpoint", "every:2"],
    "attention kept": ["--num-keep-attention", "6"],
    "streamed": ["--resident-blocks", "0"],
    "some resident, some kept": ["--resident-blocks", "2", "--num-keep-attention", "2", "--num-keep-everything", "1"],
    "boundaries on the host": ["--resident-blocks", "0", "--boundaries", "host"],
    "all on the host": ["--checkpoint", "none", "--kept", "host"],
    "in lockstep": ["--passes", "lockstep"],
    "in lockstep, streamed": ["--passes", "lockstep", "--resident-blocks", "1", "--boundaries", "host", "--num-keep-attention", "2"],
    "in lockstep, without checkpointing": ["--passes", "lockstep", "--resident-blocks", "0", "--checkpoint", "none"],
    "planned for a 4090": ["--profile", "4090"],
    "planned for 0.8 GB": ["--profile", "0.8gb"],
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    out = tmp_path_factory.mktemp("plain") / "run"
    cli.main([*WORDS, "--out", str(out)])
    return out


def losses(run_dir):
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(r["loss"], r["unlearn"], r["loc"], r["pre"]) for r in records if "loss" in r]


@pytest.mark.parametrize("plan", PLANS)
def test_the_same_eraser_bitwise(plain, plan, tmp_path, capsys):
    cli.main([*WORDS, *PLANS[plan], "--out", str(tmp_path / "run")])
    assert capsys.readouterr().out.splitlines()[-1] == f"run: {tmp_path / 'run'}"
    expected, found = (load_file(run / "eraser.safetensors") for run in (plain, tmp_path / "run"))
    assert expected.keys() == found.keys() and all(expected[name].equal(found[name]) for name in expected)
    assert losses(tmp_path / "run") == losses(plain) and len(losses(plain)) == 3
    memory = json.loads((tmp_path / "run" / "config.json").read_text())["config"]["memory"]
    for flag, value in zip(PLANS[plan][::2], PLANS[plan][1::2]):
        assert flag == "--profile" or str(memory[flag[2:].replace("-", "_")]) == value


def test_what_fits_no_plan_ends_before_anything_is_written(tmp_path):
    from trainer.errors import DoesNotFit

    with pytest.raises(DoesNotFit, match="gb|GB") as raised:
        cli.main([*WORDS, "--profile", "0.3gb", "--out", str(tmp_path / "run")])
    assert raised.value.exit_code == 3 and not (tmp_path / "run").exists()
