"""Recorded traces against the allocator's own account of a real run, and spliced traces against full ones."""

import dataclasses
from contextlib import nullcontext
from functools import cache, partial

import pytest
import torch
from tiny_transformer import BOUNDARY_NAMES, _make
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.card.gauge import predicted_peak, profiled_peak
from memory.checkpointing import _KeepAttention
from memory.fake import FakeMode
from memory.growth import _carried_on, grow
from memory.lockstep import Pass
from memory.plan import MemoryPlan, apply_plan, resolve_keeps
from memory.simulate import recording
from memory.ranking import SPREAD
from memory.splice import Cell, Recipe, SpliceError, _keys
from memory.timeline import BACKWARD, CATEGORIES, FORWARD, OPTIMIZER, Visit, pinned_bytes
from memory.work import Work, column_sum_scratch_bytes, flash_backward_scratch_bytes

MIB = 1 << 20


class Block(nn.Module):
    """Attention and feed-forward with an adapter, wide enough for the scratch of CPU kernels to be small beside it."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm, self.mix = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.ff = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.requires_grad_(False)
        self.adapter = nn.Linear(width, width)

    def forward(self, hidden):
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.mix(self.norm(hidden)).chunk(3, dim=-1)
        )  # (B, heads, N, width)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        hidden = hidden + mixed + self.adapter(mixed)
        return hidden + self.ff(hidden)


class Stack(nn.Module):
    def __init__(self, num_blocks=4, width=64):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, 2) for _ in range(num_blocks))

    def forward(self, hidden):
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


class Small:
    """A stack and its inputs, with the face of the tiny transformer."""

    def __init__(self, num_blocks):
        self.model = Stack(num_blocks, width=512)
        self.blocks = self.model.blocks
        self.feed_forwards = [block.ff for block in self.blocks]
        self.adapters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.embeds = torch.randn(2, 2000, 512)  # costs nothing: never but fake
        self.predict = self.model


@cache
def tiny_trace(plan, num_blocks=8, kind="stack"):
    """A step under `plan` on the planner's fake tensors: of a stack of small blocks, or of the tiny transformer ("sincos", "rope")."""
    with FakeMode():
        tiny = Small(num_blocks) if kind == "stack" else _make(rotary=kind == "rope", num_blocks=num_blocks)
        applied = apply_plan(tiny.model, tiny.blocks, plan, device="cpu", feed_forwards=tiny.feed_forwards,
                             boundary_names=("hidden",) if kind == "stack" else BOUNDARY_NAMES)  # fmt: skip
        return recorded_step(tiny, applied)


def recorded_step(tiny, applied=None):
    optimizer = torch.optim.AdamW(tiny.adapters, fused=True)
    with recording() as recorder:
        recorder.adopt_model(tiny.model, tiny.blocks, applied)
        lockstep = applied and applied.lockstep
        recorder.watch(tiny.blocks, together=bool(lockstep))
        if lockstep:
            passes = [Pass(partial(tiny.predict, tiny.embeds[:1]), torch.no_grad)]
            passes += [Pass(partial(tiny.predict, tiny.embeds[i : i + 1]), nullcontext) for i in (1, 0)]
            with recorder.phase(FORWARD):
                target, *students = lockstep(passes)
                loss = sum((student - target).square().mean() for student in students)
                del target, students
            with recorder.phase(BACKWARD):
                loss.backward()
        else:
            with recorder.phase("teacher"), torch.no_grad():
                target = tiny.predict(tiny.embeds[:1])
            for number in (1, 0):
                with recorder.phase(FORWARD):
                    loss = (tiny.predict(tiny.embeds[number : number + 1]) - target).square().mean()
                with recorder.phase(BACKWARD):
                    loss.backward()
            del target
        with recorder.phase(OPTIMIZER):
            optimizer.step()
            optimizer.zero_grad()
        if applied is not None and applied.activations:
            recorder.adopt(applied.activations.host_buffers, "saved activations", place="pinned")
    return recorder.trace()


def test_categories_add_up_to_the_total_throughout():
    trace = tiny_trace(MemoryPlan(resident_blocks=3, num_keep_attention=2))
    for place in ("device", "pinned"):
        for _, total, live in trace.timeline(place=place):
            assert sum(live.values()) == total >= 0 and min(live.values()) >= 0
    prediction = trace.prediction(workspace_bytes=8 * MIB)
    assert sum(prediction.by_category.values()) == prediction.peak_bytes == max(prediction.by_phase.values())
    assert set(prediction.by_category) == set(CATEGORIES)
    assert prediction.reserved_bytes >= prediction.allocator.peak_allocated_bytes >= prediction.peak_bytes


def test_categories_are_what_their_names_say():
    with FakeTensorMode():
        tiny = _make(rotary=False, num_blocks=5)
        trace = recorded_step(tiny)
        adapters = sum(parameter.nbytes for parameter in tiny.adapters)
        weights = sum(p.nbytes for p in tiny.model.parameters() if not p.requires_grad)
    assert trace.standing_bytes("adapters") == adapters
    assert trace.standing_bytes("weights") == weights + sum(b.nbytes for b in tiny.model.buffers())
    assert 2 * adapters <= trace.standing_bytes("optimizer") < 2.1 * adapters  # two moments and the step counts
    gradients = [trace.storages[e].num_bytes for e in trace.events if e >= 0 and trace.storages[e].category == "gradients"]
    assert sum(gradients) == adapters
    saved = sum(s.num_bytes for s in trace.storages if s.category == "saved activations")
    assert saved > 5 * 20 * tiny.latents[0, 0, 0].numel() * 4  # nothing is checkpointed: many tensors a block


def test_every_event_is_paired_and_spans_cover_the_step():
    trace = tiny_trace(MemoryPlan(checkpoint="none"), 5, "rope")
    births = [event for event in trace.events if event >= 0]
    assert sorted(births) == sorted(~event for event in trace.events if event < 0)
    assert len(set(births)) == len(births)
    assert [span.start for span in trace.spans[1:]] == [span.stop for span in trace.spans[:-1]]
    assert trace.spans[0].start == 0 and trace.spans[-1].stop == len(trace.events)
    walks = {}
    for span in trace.spans:
        if span.visit:
            walks.setdefault(span.visit.walk, []).append(span.visit.block)
    there, back = [0, 1, 2, 3, 4], [4, 3, 2, 1, 0]
    assert walks == {0: there, 1: there, 2: back, 3: there, 4: back}


def test_passes_in_lockstep_are_one_walk_there_and_one_back():
    """A walk more would be taken to stream all blocks once more. Of three passes the first records no graph."""
    walks = {}
    for span in tiny_trace(MemoryPlan(passes="lockstep")).spans:
        if span.visit:
            walks.setdefault(span.visit.walk, []).append(span.visit[1:])
    there = [(block, part) for block in range(8) for part in (0, 1, 2)]
    assert walks == {0: there, 1: [(block, part) for block, part in reversed(there) if part > 0]}


def test_what_forward_leaves_to_backward_is_saved_and_what_it_frees_is_not():
    with FakeTensorMode(), recording() as recorder:
        x = torch.empty(100, requires_grad=True)
        recorder.adopt([x], "other")
        with recorder.phase(FORWARD):
            loss = (x * 2).sin().sum()
        with recorder.phase(BACKWARD):
            loss.backward()
    trace = recorder.trace()
    doubled, *others = [trace.storages[event].category for event in trace.events if event >= 0]
    assert doubled == "saved activations" and set(others) == {"working set"}


def test_work_that_makes_nothing_is_counted():
    with FakeTensorMode():
        x = torch.empty(100)
        with recording() as recorder, recorder.phase(OPTIMIZER):
            x.mul_(2)
    assert [(span.phase, span.work) for span in recorder.trace().spans] == [(OPTIMIZER, (Work("memory", 0.0, 800),))]


PLANS = [
    MemoryPlan(checkpoint="none"),
    MemoryPlan(),
    MemoryPlan(checkpoint="every:2"),
    MemoryPlan(num_keep_attention=2),
    MemoryPlan(num_keep_attention=1, num_keep_everything=2),
    MemoryPlan(resident_blocks=0),
    MemoryPlan(resident_blocks=1, num_keep_attention=4),
    MemoryPlan(boundaries="host"),
    MemoryPlan(resident_blocks=0, boundaries="host", feed_forward_chunks=4),
    MemoryPlan(num_keep_everything=2, kept="host"),
    MemoryPlan(feed_forward_chunks=4),
    MemoryPlan(passes="lockstep"),
    MemoryPlan(passes="lockstep", resident_blocks=0, boundaries="host", num_keep_attention=1),
]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: ",".join(f"{k}={v}" for k, v in changed(plan).items()) or "default")
def test_predicted_peak_is_the_allocators_within_one_percent(plan):
    def run(profiling):
        torch.manual_seed(0)
        model = Stack()
        hidden = torch.randn(1, 1000, 64)
        applied = apply_plan(model, model.blocks, plan, device="cpu", boundary_names=("hidden",),
                             feed_forwards=[block.ff for block in model.blocks])  # fmt: skip
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)

        def step():
            if applied.lockstep:
                passes = [Pass(partial(model, hidden), context) for context in (torch.no_grad, nullcontext)]
                loss = sum(output.square().mean() for output in applied.lockstep([*passes, passes[-1]]))
            else:
                loss = model(hidden).square().mean()
            loss.backward()
            del loss
            optimizer.step()
            optimizer.zero_grad()

        step()  # the first step makes what stands: optimizer state, host slabs
        if profiling:
            return profiled_peak(step)
        with recording(device="cpu") as recorder:
            recorder.adopt_model(model, model.blocks, applied)
            step()
        levels = {place: recorder.trace().timeline(place=place, rounded=False) for place in ("device", "pinned")}
        first = next(levels["device"])[1]
        assert len({level for _, level, _ in levels["pinned"]}) == 1  # host buffers stand; all that moves is on the device
        return max(level for _, level, _ in levels["device"]) - first

    with FakeTensorMode():
        predicted = run(profiling=False)
    assert predicted == pytest.approx(run(profiling=True), rel=0.01)


def changed(plan):
    default = MemoryPlan()
    return {name: value for name, value in vars(plan).items() if value != getattr(default, name)}


def test_flash_backward_scratch_of_published_shapes():
    for heads, mib in ((30, 130), (48, 209)):  # 2b and 5b at 49 frames
        assert sum(flash_backward_scratch_bytes((1, heads, 17776, 64))) / MIB == pytest.approx(mib * 65 / 64, abs=1)


def test_attention_work_and_scratch_are_counted():
    def run(dtype, device):
        with FakeTensorMode(), recording(device=device) as recorder:
            query, key, value = (torch.empty(1, 2, 256, 64, dtype=dtype, requires_grad=True) for _ in range(3))
            nn.functional.scaled_dot_product_attention(query, key, value).sum().backward()
        return recorder.trace()

    trace = run(torch.bfloat16, "cuda")
    flops = {work.kind: work.flops for work in trace.work if work.flops}
    assert flops == {"attention": 4 * 256 * 256 * 64 * 2, "attention backward": 10 * 256 * 256 * 64 * 2}
    rows, dq = 2 * 256 * 4, 2 * 256 * 64 * 4

    def takes(trace, *scratch):
        born = [trace.storages[event].num_bytes for event in trace.events if event >= 0]
        return any(born[i : i + len(scratch)] == list(scratch) for i in range(len(born)))

    assert takes(trace, rows, dq) and not takes(run(torch.bfloat16, "cpu"), rows, dq)
    assert takes(run(torch.float32, "cuda"), dq, rows, rows) and not takes(run(torch.float32, "cpu"), dq, rows, rows)


@pytest.mark.parametrize("is_strided", [False, True])
def test_a_norm_copies_what_is_strided_and_so_does_its_backward(is_strided):
    """As torch's kernels do on a CPU, whose allocations the profiler shows."""
    def run(base, gradient):
        given, gradient = (t[:, 100:] if is_strided else t[:, :200].contiguous() for t in (base, gradient))
        output = nn.functional.layer_norm(given, (512,))
        torch.autograd.grad(output, given, gradient)

    real = [torch.randn(2, 300, 512, requires_grad=True), torch.randn(2, 300, 512)]
    with FakeTensorMode() as mode, recording(device="cpu") as recorder:
        fake = [mode.from_tensor(tensor) for tensor in real]
        recorder.adopt(fake, "other")
        run(*fake)
    peaks = recorder.trace().peaks()
    assert max(peaks.values()) - peaks["load"] == pytest.approx(profiled_peak(lambda: run(*real)), rel=1e-3)


def test_convolutions_over_frames_copy_what_they_work_on():
    def scratch(dtype, device, *, dims=3):
        with FakeTensorMode(), recording(device=device) as recorder:
            conv = (nn.Conv3d if dims == 3 else nn.Conv2d)(4, 8, 3, padding=1, bias=False, dtype=dtype)
            x = torch.empty(1, 4, *(6, 16, 16)[3 - dims :], dtype=dtype)
            recorder.adopt([conv.weight, x], "weights")
            conv(x)
        trace = recorder.trace()
        return [trace.storages[event].num_bytes for event in trace.events if event >= 0]

    made, given, weight = 8 * 6 * 16 * 16 * 2, 4 * 6 * 16 * 16 * 2, 4 * 8 * 27 * 2
    assert scratch(torch.bfloat16, "cuda") == [made, given, made, weight]
    assert scratch(torch.bfloat16, "cpu") == [made] and scratch(torch.float32, "cuda") == [2 * made]
    assert len(scratch(torch.bfloat16, "cuda", dims=2)) == 1


# Recorded on cards (bench.recordings): rows and columns of a sum over rows, and what its kernel took; on an H100 where the card matters.
@pytest.mark.parametrize("rows, columns, num_bytes", [
    (512, 1024, 0), (1024, 1024, 8_388_608), (2048, 1024, 16_777_216), (4096, 1024, 33_554_432), (2560, 512, 10_485_760),
    (2560, 1024, 20_971_520), (2560, 2048, 41_943_040), (10_000, 512, 41_156_608), (10_000, 1024, 82_313_216),
    (10_000, 2048, 138_412_032)])  # fmt: skip
def test_column_sums_take_what_cards_were_seen_to_take(rows, columns, num_bytes):
    assert column_sum_scratch_bytes(rows, columns, num_threads=132 * 2048) == num_bytes


@pytest.mark.parametrize("columns", [1, 3, 6, 128, 1920, 1922])
def test_column_sums_of_any_width(columns):
    taken = [column_sum_scratch_bytes(rows, columns) for rows in (1, 255, 256, 5000, 20_000)]
    assert taken[:2] == [0, 0] and max(taken) < 200 * MIB


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_a_column_sum_of_nothing_takes_nothing(shape):
    with FakeTensorMode(), recording() as recorder:
        total = torch.empty(shape).sum(0)
    assert [s.num_bytes for s in recorder.trace().storages] == [0, total.nbytes]


def test_the_gradient_of_a_bias_is_a_column_sum():
    def storages(device):
        with FakeTensorMode(), recording(device=device) as recorder:
            nn.Linear(8, 64)(torch.empty(1, 5000, 8)).sum().backward()
        return [s.num_bytes for s in recorder.trace().storages]

    scratch = column_sum_scratch_bytes(5000, 64)
    assert scratch > 0 and storages("cuda").count(scratch) == 1 and scratch not in storages("cpu")


def test_autograd_adds_gradients_in_place():
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, gradient):
            return gradient + gradient.new_zeros(gradient.shape)  # written by hand: not in place

    def run(x):
        h = x.sin()
        loss = (h.cos() + Doubled.apply(h)).sum()
        del h
        loss.backward()

    with FakeTensorMode(), recording(device="cpu") as recorder:
        run(torch.empty(1000, requires_grad=True))
    trace = recorder.trace()
    in_place = [i for i, s in enumerate(trace.storages) if s.in_place]
    assert len(in_place) == 1
    assert trace.events[trace.events.index(in_place[0]) - 1] < 0
    events, _ = trace.device_events()
    assert in_place[0] not in events and len(events) == len(set(events)) == len(trace.events) - 2
    real = torch.ones(1000, requires_grad=True)
    predicted = max(level for _, level, _ in trace.timeline(rounded=False)) - real.nbytes
    assert predicted == profiled_peak(lambda: run(real))


@pytest.mark.parametrize("around, in_place", [(nullcontext, True), (lambda: _KeepAttention([]), False)], ids=["plain", "under a mode"])
def test_a_linear_layer_adds_its_bias_in_place_to_what_is_not_contiguous(around, in_place):
    """Unless torch's dispatch is looked at, as by what keeps attention: then a real layer makes another tensor, too."""
    def run(layer):
        with around():
            return layer(torch.ones(2, 200, 64)[:, :100])

    with FakeTensorMode(), recording(device="cpu") as recorder:
        layer = nn.Linear(64, 512).requires_grad_(False)
        recorder.adopt([*layer.parameters()], "weights")
        run(layer)
    trace, real = recorder.trace(), nn.Linear(64, 512).requires_grad_(False)
    assert sum(s.in_place for s in trace.storages) == in_place
    assert profiled_peak(lambda: run(real)) == predicted_peak(trace, on_card=False)


@pytest.mark.parametrize("shape, num_in_place", [((10, 64), 2), ((2, 5, 64), 1)])
def test_autograd_adds_nothing_in_place_to_a_view(shape, num_in_place):
    """What a linear layer's backward returns for an input of three dimensions is a view, to which the next gradient is added."""
    layers = [nn.Linear(64, 64).requires_grad_(False) for _ in range(3)]

    def run(x):
        y = x * 2
        losses = [layer(y).square().sum() for layer in layers]
        del y
        sum(losses).backward()

    with FakeTensorMode(allow_non_fake_inputs=True), recording(device="cpu") as recorder:
        recorder.adopt([p for layer in layers for p in layer.parameters()], "weights")
        run(torch.empty(shape, requires_grad=True))
    assert sum(s.in_place and s.num_bytes > 4 for s in recorder.trace().storages) == num_in_place
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        run(torch.ones(shape, requires_grad=True))
    assert sum(event.name == "aten::add_" for event in profile.events()) == num_in_place


def test_what_blocks_keep_waits_where_the_plan_says():
    def moved(**fields):
        trace = tiny_trace(keeping(8, 0, **fields))
        return sum(work.num_bytes for work in trace.work if work.kind == "to host")

    boundaries, kept = moved(boundaries="host"), moved(kept="host")
    assert moved() == 0 < min(boundaries, kept) and moved(boundaries="host", kept="host") == boundaries + kept


def test_a_card_keeps_the_statistics_of_a_norm_in_float32():
    def statistics(device):
        with FakeTensorMode(), recording(device=device) as recorder:
            nn.functional.layer_norm(torch.empty(7, 64, dtype=torch.bfloat16), (64,))
        return sorted(s.num_bytes for s in recorder.trace().storages)[:2]

    assert statistics("cuda") == [7 * 4, 7 * 4] and statistics("cpu") == [7 * 2, 7 * 2]


@pytest.mark.parametrize("num_bytes, taken", [(0, 0), (1, 1), (4096, 4096), (107 * MIB, 128 * MIB), (252 * MIB, 256 * MIB)])
def test_pinned_memory_rounds_up_to_powers_of_two(num_bytes, taken):
    assert pinned_bytes(num_bytes) == taken


def test_a_view_of_an_undeclared_tensor_is_no_birth():
    with FakeTensorMode():
        before = torch.empty(1000)
        with recording() as recorder:
            before.view(10, 100).add_(1)
    trace = recorder.trace()
    assert trace.events == () and trace.standing_bytes("other") == 4000


def test_wrong_declarations_are_refused():
    with recording() as recorder, pytest.raises(ValueError, match="categories are"):
        recorder.adopt([torch.empty(1)], "wieghts")


def test_a_step_that_fails_leaves_no_hook_behind():
    layer = nn.Linear(2, 2)
    with pytest.raises(ZeroDivisionError), recording() as recorder:
        recorder.adopt_model(layer)
        recorder.watch([layer])
        raise ZeroDivisionError
    assert not layer._forward_hooks and not layer._forward_pre_hooks
    assert not any(parameter._post_accumulate_grad_hooks for parameter in layer.parameters())


# ---- splicing ----------------------------------------------------------------------------------------------------------


def events_by_position(trace):
    """Births by size, category and place; deaths by the number of the birth."""
    number, found = {}, []
    for event in trace.events:
        if event >= 0:
            number[event] = len(number)
            storage = trace.storages[event]
            found.append((storage.num_bytes, storage.category, storage.place))
        else:
            found.append(~number[~event])
    return found


def standing_storages(trace):
    return sorted((s.num_bytes, s.category, s.place) for s in (trace.storages[index] for index in trace.standing))


def computed(trace):
    """What is computed, span by span. Copies of weights are not spliced: the clock knows which blocks stream."""
    return [(span.visit, [work for work in span.work if work.kind != "weights"]) for span in trace.spans]


def keeping(num_attention, num_everything, **fields):
    return MemoryPlan(num_keep_attention=num_attention, num_keep_everything=num_everything, **fields)


def learn(recipe, layouts, kind, **fields):
    for num_blocks, num_attention, num_everything in layouts:
        plan = keeping(num_attention, num_everything, **fields)
        recipe.learn(tiny_trace(plan, num_blocks, kind), resolve_keeps(plan, num_blocks))


def assert_splice_is_exact(recipe, plan, num_blocks, kind):
    keeps = resolve_keeps(plan, num_blocks)
    full = tiny_trace(plan, num_blocks, kind)
    spliced = recipe.splice(keeps, num_resident=plan.resident_blocks)
    assert events_by_position(spliced) == events_by_position(full)
    assert standing_storages(spliced) == standing_storages(full)
    assert computed(spliced) == computed(full)
    assert spliced.prediction().peak_bytes == full.prediction().peak_bytes
    level = next(iter(spliced.timeline()))[1]
    assert recipe.peak_bytes(keeps) == max(total for _, total, _ in spliced.timeline()) - level


CASES = [(0, 0, None), (8, 0, 0), (1, 7, 5), (3, 2, 1), (0, 3, 8)]


@pytest.mark.parametrize("fields", [{}, {"feed_forward_chunks": 2}, {"passes": "lockstep"}], ids=str)
def test_spliced_and_full_traces_are_the_same(fields):
    recipe = Recipe.of(tiny_trace(MemoryPlan(**fields)), ["inputs"] * 8)
    learn(recipe, [(5, 5, 0), (5, 0, 5)], "stack", **fields)
    for num_attention, num_everything, num_resident in CASES:
        plan = keeping(num_attention, num_everything, resident_blocks=num_resident, **fields)
        assert_splice_is_exact(recipe, plan, 8, "stack")


@pytest.mark.parametrize("kind", ["sincos", "rope"])
@pytest.mark.parametrize("passes", ["sequential", "lockstep"])
def test_spliced_and_full_traces_of_the_real_transformer_are_the_same(kind, passes):
    recipe = Recipe.of(tiny_trace(MemoryPlan(passes=passes), 7, kind), ["inputs"] * 7)
    learn(recipe, [(5, 5, 0), (5, 0, 5)], kind, passes=passes)
    assert_splice_is_exact(recipe, keeping(2, 2, resident_blocks=3, passes=passes), 7, kind)


@pytest.mark.parametrize("kind, keep, fields", [
    ("stack", "inputs", {}), ("rope", "attention", {}), ("stack", "everything", {"checkpoint": "none", "passes": "lockstep"})])
def test_the_trace_of_a_long_model_grows_from_two_short_ones(kind, keep, fields):
    plans = {n: keeping(n if keep == "attention" else 0, 0, **fields) for n in (5, 6, 9)}
    short, longer = (tiny_trace(plans[n], n, kind) for n in (5, 6))
    assert_splice_is_exact(grow(short, longer, keep, 9), plans[9], 9, kind)
    with pytest.raises(ValueError, match="traces of 6 and 5 blocks"):
        grow(longer, short, keep, 9)


@pytest.mark.parametrize("fields, message", [({"passes": "lockstep"}, "one more block changes what is walked over"),
                                             ({"feed_forward_chunks": 2}, "blocks differ in walk 0")])  # fmt: skip
def test_a_trace_does_not_grow_where_one_more_block_changes_more_than_counts(fields, message):
    short, other = tiny_trace(MemoryPlan(), 5), tiny_trace(MemoryPlan(**fields), 6)
    with pytest.raises(SpliceError, match=message):
        grow(short, other, "inputs", 9)


def test_work_grows_where_storages_do_not():
    """As a fused optimizer's does."""
    short, longer = (Cell(storages=(), deaths=(), work=(Work("memory", 0.0, num_bytes),), phase=OPTIMIZER, records_graph=False,
                          net_bytes=0, peak_bytes=0) for num_bytes in (500, 600))  # fmt: skip
    assert _carried_on(short, longer, 4, []).work == (Work("memory", 0.0, 900),)


def test_a_plan_that_was_traced_in_full_is_known_whatever_others_are_like():
    """Where blocks of a pattern are not alike, nothing else can be spliced; the pattern itself need not be."""
    recipe = Recipe.of(tiny_trace(MemoryPlan()), ["inputs"] * 8)
    recipe.learn(tiny_trace(MemoryPlan(feed_forward_chunks=4)), ["inputs"] * 8)  # visits of the same kinds that differ
    assert_splice_is_exact(recipe, MemoryPlan(resident_blocks=3), 8, "stack")
    with pytest.raises(SpliceError, match="differ among blocks"):
        recipe.splice(["inputs"] * 7 + ["everything"])


@pytest.mark.parametrize("passes", ["sequential", "lockstep"])
def test_spliced_and_full_traces_are_the_same_with_boundaries_on_the_host(passes):
    fields = {"boundaries": "host", "passes": passes}
    recipe = Recipe.of(tiny_trace(MemoryPlan(**fields)), ["inputs"] * 8)
    learn(recipe, [(5, 5, 0), (8, 4, 0)], "stack", **fields)
    for num_attention, num_resident in [(0, 0), (8, None), (1, 3), (4, 0), (7, 7)]:
        assert_splice_is_exact(recipe, keeping(num_attention, 0, resident_blocks=num_resident, **fields), 8, "stack")


@pytest.mark.parametrize("boundaries", ["device", "host"])
def test_spliced_and_full_traces_are_the_same_where_some_blocks_keep_everything_on_the_host(boundaries):
    fields = {"kept": "host", "boundaries": boundaries}
    recipe = Recipe.of(tiny_trace(keeping(12, 0, **fields), 12), ["attention"] * 12)
    learn(recipe, [(n, n - number, number) for n, number in SPREAD], "stack", **fields)
    for number, num_resident in [(1, None), (4, 0), (5, 3), (7, 0), (9, None), (11, 2)]:
        assert_splice_is_exact(recipe, keeping(12 - number, number, resident_blocks=num_resident, **fields), 12, "stack")


def test_short_traces_have_all_neighbourhoods_of_blocks_that_are_spread_evenly():
    """Of longer models than theirs: otherwise each plan in which some blocks keep everything on the host would be traced in full."""
    def neighbourhoods(num_blocks, number):
        keeps = resolve_keeps(keeping(num_blocks - number, number, kept="host"), num_blocks)
        return {_keys(Visit(0, block, 0), keeps, True)[0] for block in range(num_blocks)}

    known = neighbourhoods(6, 0).union(*(neighbourhoods(*layout) for layout in SPREAD))
    assert all(neighbourhoods(num_blocks, number) <= known for num_blocks in range(10, 50) for number in range(1, num_blocks))


@pytest.mark.parametrize("kind", ["stack", "sincos"])
@pytest.mark.parametrize("fields", [{"feed_forward_chunks": 2}, {"boundaries": "host"},
                                    {"boundaries": "host", "passes": "lockstep"}], ids=str)  # fmt: skip
def test_a_variant_needs_no_full_trace(kind, fields):
    plain = MemoryPlan(passes=fields.get("passes", "sequential"))
    base = Recipe.of(tiny_trace(plain, 7, kind), ["inputs"] * 7)
    short, variant = (tiny_trace(plan, 5, kind) for plan in (plain, MemoryPlan(**fields)))
    recipe = base.with_visits_of(short, variant, ["inputs"] * 5)
    assert_splice_is_exact(recipe, MemoryPlan(resident_blocks=2, **fields), 7, kind)


def test_a_variant_that_changes_what_the_blocks_number_changes_is_refused():
    base = Recipe.of(tiny_trace(MemoryPlan(), 7), ["inputs"] * 7)
    short = tiny_trace(MemoryPlan(), 5)
    assert base.with_visits_of(short, tiny_trace(MemoryPlan(), 6), ["inputs"] * 6) is None


def test_splicing_refuses_what_it_has_not_seen():
    recipe = Recipe.of(tiny_trace(MemoryPlan(), 5), ["inputs"] * 5)
    with pytest.raises(SpliceError, match="block 4 of 5 keeping attention were not recorded"):
        recipe.splice(["inputs"] * 4 + ["attention"])
    with pytest.raises(SpliceError, match="trace this plan in full"):
        recipe.splice(["everything"] * 5)


@pytest.mark.parametrize("changed", [lambda deaths: deaths[:-1], lambda deaths: deaths[:-2] + 2 * deaths[-1:]], ids=["not freed", "freed twice"])
def test_a_splice_that_does_not_free_all_just_once_is_refused(changed):
    recipe = Recipe.of(tiny_trace(MemoryPlan(), 5), ["inputs"] * 5)
    at, (visit, cell) = next((at, entry) for at, entry in enumerate(recipe._layout) if len(entry[1].deaths) > 1)
    recipe._layout[at] = visit, dataclasses.replace(cell, deaths=changed(cell.deaths))
    with pytest.raises(SpliceError, match="not all that is made is freed once"):
        recipe.splice(["inputs"] * 5)


def test_what_follows_backward_is_no_part_of_a_visit():
    with FakeTensorMode():
        small = Small(3)
        with recording() as recorder:
            recorder.adopt_model(small.model, small.blocks)
            recorder.watch(small.blocks)
            prediction = small.predict(small.embeds[:1])
            loss = prediction.sum()
            with recorder.phase(BACKWARD):
                loss.backward()
                torch.empty(3)  # a tail whose size may depend on the number of blocks
    spans = recorder.trace().spans
    assert [span.visit for span in spans if span.visit][-1] == Visit(1, 0)
    assert spans[-1].visit is None and spans[-1].stop - spans[-1].start >= 2


def test_the_first_declaration_of_a_tensor_holds():
    with FakeTensorMode(), recording() as recorder:
        master = torch.empty(100)
        recorder.adopt([master], "weights", place="pinned")
        recorder.adopt([master], "saved activations", place="pinned")
    assert recorder.trace().standing_bytes("weights", "pinned") == 400


def test_workspaces_are_there_before_the_first_step():
    with FakeTensorMode(), recording() as recorder:
        weight = torch.empty(100, requires_grad=True)
        recorder.adopt([weight], "weights")
        with recorder.phase(FORWARD):
            loss = weight.square().sum()
        with recorder.phase(BACKWARD):
            loss.backward()
        del loss
    trace = recorder.trace()
    plain, sizes = trace.device_events(num_steps=2)
    events, with_workspaces = trace.device_events(num_steps=2, workspace_bytes=2000)
    ahead, back = len(sizes), len(sizes) + 1
    assert with_workspaces == [*sizes, 1000, 1000]
    num_standing = len([i for i in trace.standing if trace.storages[i].place == "device"])
    assert events == [*plain[:num_standing], ahead, back, *plain[num_standing:]]
