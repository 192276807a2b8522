"""One step down after another, each valid, until nothing is left."""

import itertools
import subprocess
import sys

import pytest

from memory.advice import flag_of, next_cheaper
from memory.plan import MemoryPlan, resolve_keeps

LAVISH = MemoryPlan(
    backbone_copies=2, text_encoder_resident=True, guidance="batched", passes="lockstep", checkpoint="none", resident_blocks=None
)


def one_step(plan, num_blocks=30, **options):
    """The next step down, where every plan is predicted to need less than the one before."""
    less = itertools.count(0, -1)
    return next_cheaper(plan, num_blocks, needed_bytes=lambda plan: next(less), **options)


def test_steps_lead_from_lavish_to_frugal_and_end():
    plan, seen = LAVISH, []
    while (advice := one_step(plan)) is not None:
        assert advice.plan not in seen and len(seen) < 40
        assert advice.change == {name: value for name, value in vars(advice.plan).items() if value != getattr(plan, name)}
        assert advice.why and advice.needed_bytes == -1
        resolve_keeps(advice.plan, 30)
        plan = advice.plan
        seen.append(plan)
    assert plan == MemoryPlan(
        resident_blocks=0, boundaries="host", feed_forward_chunks=8, guidance="sequential", optimizer="adamw8bit"
    )


def test_the_waste_goes_first():
    assert one_step(LAVISH).change == {"backbone_copies": 1}
    assert one_step(MemoryPlan()).change == {"resident_blocks": 15}


def test_kept_activations_on_the_host_are_given_up_with_what_was_kept():
    advice = one_step(MemoryPlan(num_keep_everything=1, kept="host"), num_blocks=5)
    assert advice.plan.kept == "device" and advice.plan.num_keep_everything == 0


def test_where_less_on_the_host_would_be_more_on_the_device_nothing_is_kept():
    def needed(plan):
        return 5 + (plan.num_keep_attention + plan.num_keep_everything if plan.kept == "device" else 1)

    frugal = {"resident_blocks": 0, "boundaries": "host", "feed_forward_chunks": 8, "optimizer": "adamw8bit"}
    parked = MemoryPlan(**frugal, kept="host", num_keep_attention=15, num_keep_everything=15)
    advice = next_cheaper(parked, 30, needed_bytes=needed)
    assert advice.plan == MemoryPlan(**frugal) and advice.needed_bytes == 5


def test_of_many_buffers_two_are_left_where_blocks_stream():
    assert one_step(MemoryPlan(resident_blocks=8, offload_buffers=4)).change == {"offload_buffers": 2}
    assert one_step(MemoryPlan(offload_buffers=4)).change == {"resident_blocks": 15}


def test_steps_that_save_nothing_are_passed_over():
    def needed(plan):  # only the boundaries matter
        return 5 if plan.boundaries == "device" else 4

    advice = next_cheaper(MemoryPlan(), 30, needed_bytes=needed)
    assert advice.change == {"boundaries": "host"} and advice.needed_bytes == 4
    assert next_cheaper(advice.plan, 30, needed_bytes=needed) is None


def test_steps_are_taken_until_the_prediction_is_within_the_limit():
    def needed(plan):
        return 30 if plan.resident_blocks is None else plan.resident_blocks

    for limit in (5, 3):
        advice = next_cheaper(MemoryPlan(), 30, needed_bytes=needed, limit_bytes=limit)
        assert advice.plan.resident_blocks == 3 and advice.needed_bytes == 3
        assert advice.why == "27 of 30 blocks stream from host memory"


def test_each_of_several_steps_needs_less_than_the_one_before():
    def needed(plan):
        return 4 if plan.boundaries == "host" else {None: 30, 15: 10}.get(plan.resident_blocks, 20)

    advice = next_cheaper(MemoryPlan(), 30, needed_bytes=needed, limit_bytes=5)
    assert advice.change == {"resident_blocks": 15, "boundaries": "host"}


def test_what_fewer_blocks_keep_is_kept_on_the_device():
    assert one_step(MemoryPlan(num_keep_attention=3, num_keep_everything=6)).change == {"num_keep_attention": 6, "num_keep_everything": 3}
    parked = MemoryPlan(resident_blocks=0, boundaries="host", kept="host", num_keep_attention=8)
    assert one_step(parked).change == {"num_keep_attention": 4, "kept": "device"}


@pytest.mark.parametrize(
    "command, expected",
    [
        (["run.py", "--seed", "1"], "run.py --seed 1 --boundaries host"),
        (["run.py", "--boundaries", "device", "--out", "my run"], "run.py --out 'my run' --boundaries host"),
        (["run.py", "--boundaries=device"], "run.py --boundaries host"),
    ],
)
def test_the_command_can_be_pasted(command, expected):
    advice = one_step(MemoryPlan(resident_blocks=0))
    assert advice.command(command) == expected
    assert flag_of("num_keep_attention") == "--num-keep-attention"


def test_fields_that_are_fixed_stay():
    assert one_step(MemoryPlan(), fixed=["resident_blocks"]).change == {"boundaries": "host"}
    assert one_step(MemoryPlan(checkpoint="none"), fixed=["kept"]).change == {"checkpoint": "all"}
    frugal = MemoryPlan(resident_blocks=0, boundaries="host", feed_forward_chunks=8)
    assert one_step(frugal).change == {"optimizer": "adamw8bit"}
    assert one_step(frugal, fixed=["optimizer"]) is None


def test_switches_are_pasted_as_switches():
    advice = one_step(MemoryPlan(text_encoder_resident=True))
    assert advice.command(["run.py", "--text-encoder-resident", "--rank", "4"]) == "run.py --rank 4 --no-text-encoder-resident"
    assert advice.command(["run.py", "--text_encoder_resident"]) == "run.py --no-text-encoder-resident"


def test_advice_does_not_import_torch():
    program = "import sys, memory.advice; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
