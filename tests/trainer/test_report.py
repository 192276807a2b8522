"""The report is one file without a network, shows what is there, and does without what is not."""

import base64
import errno
import io
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from test_cli import call  # noqa: F401  fixture

from trainer import cli
from trainer.checkpoint import save_checkpoint
from trainer.config import TrainConfig, leaves, replaced
from trainer.config_file import as_json
from trainer.errors import CheckpointError, InputOutputError, UsageError
from trainer.findings import Bill, finding
from trainer.report import write_report
from trainer.run_directory import require_place, write_config
from trainer.run_files import RunFiles, read_metrics, read_object

GIB = 2**30


def png() -> bytes:
    """A picture of one pixel."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(b"\0\xff\0\0")) + chunk(b"IEND", b""))


def record(step, **more):
    return {"step": step, "loss": 1 / (step + 1), "unlearn": 1 / (step + 1), "gradient_norm": 0.25, "lr": 1e-3, "seconds": 2.0,
            "blocks": {"gradient": [1e-3, 2e-3, 0.0], "update": [1e-4] * 3}, "memory": {"process_bytes": 2 * GIB},
            "phase_seconds": {"teacher": 1.5, "backward": 0.5}, "peak_bytes_by_phase": {"backward": 3 * GIB}, **more}


def row(name, before, after):
    return {"name": name, "kind": "color", "num_videos": 64, "before": before, "before_interval": [before, before],
            "after": after, "after_interval": [max(0.0, after - 0.05), min(1.0, after + 0.05)]}


@pytest.fixture
def run(tmp_path):
    """A complete run directory."""
    run = tmp_path / "red-1"
    (run / "samples").mkdir(parents=True)
    config = replaced(TrainConfig(), {"optim.rank": 32, "optim.steps": 60})
    origins = dict.fromkeys(leaves(config), "default") | {"optim.rank": "flag"}
    write_config(run, config, origins, base_model={"name": "shapes"}, first_step=0)
    (run / "metrics.jsonl").write_text("".join(json.dumps(record(i)) + "\n" for i in range(60)))
    (run / "evaluation.json").write_text(json.dumps({
        "concept": "red", "target": row("red", 1.0, 0.0), "synonyms": {**row("", 0.98, 0.125), "names": ["crimson"]},
        "preserved": [row("blue", 1.0, 0.97)], "motion": {"before": 10.0, "after": 9.5},
        "distance": {"preserved_rms": 0.02}}))
    bill = Bill(findings=(finding("dead-gelu", "training", block=7, norm=0.5),), checked=("weights are finite",))
    (run / "findings.json").write_text(json.dumps(bill.as_json()))
    timeline = [["teacher", [GIB, 0]], ["backward", [GIB, 2 * GIB]], ["optimizer", [GIB, GIB]]]
    (run / "memory.json").write_text(json.dumps({"predicted": {
        "peak_bytes": 3 * GIB, "peak_bytes_by_phase": {"backward": 3.5 * GIB}, "categories": ["weights", "working set"],
        "timeline": timeline}}))
    for name in ("before-after.png", "samples/step-000000.png", "samples/step-000060.png"):
        (run / name).write_bytes(png())
    return run


def test_the_picture_of_the_live_view_is_drawn_from_a_run(run, tmp_path):
    script = Path(__file__).parents[2] / "assets" / "monitor_picture.py"
    subprocess.run([sys.executable, script, run, tmp_path / "view.svg"], check=True)
    drawn = (tmp_path / "view.svg").read_text()
    assert "60/60" in drawn and "url(http" not in drawn


class _Page(HTMLParser):
    """Checks that elements are closed in order, and collects text and addresses."""

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.addresses, self.tags = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [v for k, v in attributes if k in ("src", "href", "srcset", "action", "xlink:href")]
        if tag not in ("meta", "img", "br", "link", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)


def read(path):
    page = _Page(path.read_text())
    return page, " ".join(page.words)


def test_a_complete_run(run, caplog):
    path = write_report(run)
    assert path == run / "report.html" and not caplog.records
    page, text = read(path)
    for wanted in ("Erasing red", "60 of 60", "100% → 0%", "dead-gelu", "block 7", "weights are finite", "crimson",
                   "7.5% to 17.5%", "L_unlearn", "Gradient norm by block", "Update norm by block", "teacher 75%",
                   "One step by category, predicted", "working set", "3.50 GiB", "3.00 GiB", "optim.rank", "flag",
                   "Sample at step 0", "Sample at step 60", "Before and after", "10.0 pixels before, 9.5 after",
                   "shapes · rank 32 · run red-1", "Preserved videos moved by 0.020 (RMS of 0..1).", "First block at the bottom",
                   "Loss, median of the last 20 steps 0.0198 ", "Peak memory, measured (process) 3.00 GiB", "Peak memory, predicted (tensors alone) 3.00 GiB"):
        assert wanted in text, wanted
    assert page.tags.count("img") == 3 and "Cannot be shown" not in text
    assert set(leaves(TrainConfig())) <= set(page.words)


def test_tables_that_a_phone_shows_otherwise_are_marked(run):
    html = write_report(run).read_text()
    style, body = html.split("</style>")
    for kind, heading in (("stacked", "Finding"), ("settings", "setting")):
        assert f"<table class={kind}><tr><th>{heading}</th>" in body and f".{kind} td" in style


def test_what_is_expected_is_healthy_and_named_still(run):
    (run / "findings.json").write_text(json.dumps(Bill(findings=(finding("zero-down-gradient", "training"),), checked=()).as_json()))
    _, text = read(write_report(run))
    assert "● Healthy." in text and "zero-down-gradient" in text and "What was checked" not in text


def test_of_many_samples_the_first_and_the_last_are_shown(run):
    for step in (20, 40):
        (run / "samples" / f"step-{step:06}.png").write_bytes(png())
    page, text = read(write_report(run))
    assert page.tags.count("img") == 3 and text.index("Before and after, from") < text.index("Sample at step 0") < text.index("Sample at step 60")


def test_without_predictions_and_plans_it_says_what_is_there(run):
    (run / "memory.json").unlink()
    config = json.loads((run / "config.json").read_text())
    del config["config"]["optim"]
    (run / "config.json").write_text(json.dumps(config))
    _, text = read(write_report(run))
    assert "No prediction is stored with this run." in text and "Steps 60 " in text and "Peak memory, predicted" not in text


def test_a_run_that_is_not_measured_says_how(run):
    (run / "evaluation.json").unlink()
    assert "Not measured. There is no eraser.safetensors yet." in write_report(run).read_text()
    (run / "eraser.safetensors").touch()
    assert f"run.py evaluate {run} does it; of other models than the bundled one it wants a --rater" in write_report(run).read_text()
    _, text = read(write_report(run.rename(run.with_name("my run"))))
    assert f"run.py evaluate '{run.with_name('my run')}' does it" in text


def test_a_run_with_steps_left_says_how_it_goes_on(run):
    def says(num_steps: int, *findings) -> bool:
        (run / "metrics.jsonl").write_text("".join(json.dumps(record(i)) + "\n" for i in range(num_steps)))
        (run / "findings.json").write_text(json.dumps(Bill(findings=findings).as_json()))
        return f"Unless it is still running, python run.py --resume {run} goes on from step 20." in read(write_report(run))[1]

    assert not says(25)  # without a checkpoint
    save_checkpoint(run, 20, tensors={}, state={})
    assert says(25) and not says(60)
    assert says(25, finding("dead-gelu", "training", severity="warning")) and not says(25, finding("non-finite-loss", "training"))
    (run / "ckpt" / "step-000020" / "state.json").unlink()
    assert not says(25)


def test_sheets_of_large_videos_are_shown_as_wide_as_a_page(run):
    noise = Image.effect_noise((6000, 500), 100)
    noise.save(run / "samples" / "step-000060.png")
    data = [base64.b64decode(text) for text in re.findall(r'src="data:image/png;base64,([^"]*)"', write_report(run).read_text())]
    assert sorted(Image.open(io.BytesIO(d)).size for d in data) == [(1, 1), (1, 1), (1600, 133)]
    for path in [*(run / "samples").iterdir(), run / "before-after.png"]:
        path.write_bytes(b"no picture")
    assert "No sample can be read" in write_report(run).read_text()


def test_nothing_comes_from_the_network(run):
    text = write_report(run).read_text()
    page = _Page(text)
    assert page.addresses and all(a.startswith("data:image/png;base64,") for a in page.addresses)
    assert not re.search(r"https?:|//\w+\.|@import|url\(|fetch\(|XMLHttpRequest", text)
    assert "default-src 'none'" in text and page.tags.count("script") == 1


@pytest.mark.parametrize("missing", ["config.json", "metrics.jsonl", "findings.json", "evaluation.json", "memory.json",
                                     "before-after.png", "samples"])
@pytest.mark.parametrize("how", ["absent", "cut", "empty", "pipe"])
def test_missing_and_damaged_parts_leave_the_others(run, missing, how):
    path = run / missing
    if path.is_dir():
        shutil.rmtree(path)
    elif how in ("absent", "pipe"):
        path.unlink()
        if how == "pipe":  # which nobody writes to
            os.mkfifo(path)
    else:
        path.write_bytes(path.read_bytes()[:len(path.read_bytes()) // 2 if how == "cut" else 0])
    page, text = read(write_report(run))
    expected = {"Erasing red": "config.json", "L_unlearn": "metrics.jsonl", "dead-gelu": "findings.json",
                "crimson": "evaluation.json", "working set": "memory.json", "Sample at step 60": "samples"}
    for words, source in expected.items():
        assert (words in text) == (source != missing or (how, source) == ("cut", "metrics.jsonl")), words


@pytest.mark.parametrize("name, content", [
    ("evaluation.json", {"target": {"name": "red"}}), ("evaluation.json", {"target": 3}), ("config.json", {"config": []}),
    ("config.json", {"config": {"optim": None}, "origins": []}), ("findings.json", {"findings": [1]}),
    ("memory.json", {"predicted": {"timeline": [["teacher", [1]]]}}), ("memory.json", {"predicted": [1]}),
    ("metrics.jsonl", {"step": 0, "blocks": {"gradient": ["x"]}}), ("metrics.jsonl", {"no": "step"}),
    ("metrics.jsonl", {"step": 0, "blocks": 5, "peak_bytes_by_phase": 3})])
def test_parts_that_are_not_what_they_should_be(run, name, content):
    (run / name).write_text(json.dumps(content) + "\n")
    _, text = read(write_report(run))
    assert "Samples" in text and "Settings" in text


def test_metrics_that_cannot_be_read_leave_the_other_parts(run, caplog):
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    assert "crimson" in read(write_report(run))[1]
    assert caplog.messages[0].startswith(f"{run / 'metrics.jsonl'}: left out, it cannot be read (") and len(caplog.messages) == 1


def test_a_file_that_cannot_be_looked_at_is_left_out(tmp_path, caplog):
    assert read_object(tmp_path / ("x" * 300)) == {}
    assert "left out, it cannot be read ([Errno 36] File name too long" in caplog.text


def test_a_file_that_holds_no_object_is_said_to_be_left_out(run, caplog):
    (run / "config.json").write_text("[1]\n")
    write_report(run)
    assert [r.getMessage() for r in caplog.records] == [f"{run / 'config.json'}: left out, it cannot be read (it holds no object)"]


def test_a_run_that_became_non_finite(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record(60, loss=math.nan, gradient_norm=math.inf,
                                     blocks={"gradient": [math.nan, 1e-3, 0.0]})) + "\n")
    _, text = read(write_report(run))
    assert "step 61: not finite" in text and "Cannot be shown" not in text
    assert RunFiles.read(run).num_steps() == 60  # the last was not applied
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record(61, gradient_norm=math.inf, skipped=True)) + "\n")
    assert RunFiles.read(run).num_steps() == 62


@pytest.mark.parametrize("losses, shown", [([1e308, -1e308], True), ([10**400], False)])
def test_numbers_beyond_floats_leave_the_other_parts(run, losses, shown):
    (run / "metrics.jsonl").write_text("".join(json.dumps(record(i, loss=loss)) + "\n" for i, loss in enumerate(losses)))
    _, text = read(write_report(run))
    assert ("Cannot be shown: OverflowError" in text) != shown and "Gradient norm by block" in text and "crimson" in text


def test_what_a_run_says_is_text(run):
    hostile = '<script>alert(1)</script><img src=x onerror="alert(2)">'
    config = json.loads((run / "config.json").read_text())
    config["config"]["data"]["concept"] = config["base_model"]["name"] = hostile
    (run / "config.json").write_text(json.dumps(config))
    (run / "metrics.jsonl").write_text(json.dumps(record(0, phase_seconds={hostile: 1.0},
                                                         peak_bytes_by_phase={hostile: 1})) + "\n")
    (run / "findings.json").write_text(json.dumps({"findings": [dict.fromkeys(
        ("code", "severity", "phase", "module", "cause", "fix"), hostile) | {"evidence": {hostile: hostile}}]}))
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["target"]["name"] = evaluation["concept"] = hostile
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    page, text = read(write_report(run))
    assert page.tags.count("script") == 1 and hostile in text
    assert all(a.startswith("data:image/png") for a in page.addresses)


def test_names_of_code_in_a_cause_are_set_as_code(run):
    bill = Bill(findings=(finding("zero-down-gradient", "backward", up=1.0, down=0.0),), checked=())
    (run / "findings.json").write_text(json.dumps(bill.as_json()))
    content = write_report(run).read_text()
    assert "<code>up</code> starts at zero" in content and "`" not in content


def test_what_a_prediction_counts_besides_depends_on_the_device(run):
    content = json.loads((run / "memory.json").read_text())
    content["predicted"]["needed_bytes"], content["budget_bytes"] = 4 * GIB, 16 * GIB
    for card, besides in (("rtx-4090", "what the allocator reserves and the card's context included."),
                          ("cpu", "interpreter and libraries (assumed) included.")):
        (run / "memory.json").write_text(json.dumps(content | {"card": card}))
        assert f"Predicted for {card}: 4.00 GiB of 16.00 GiB usable, {besides}" in read(write_report(run))[1]


def test_numbers_that_are_text_are_shown_as_text(run):
    script = "<script>alert(1)</script>"
    records = [r | {"step": script} for r in read_metrics(run)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["target"]["num_videos"] = script
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    assert script not in write_report(run).read_text()


def test_a_long_run_stays_a_small_file(run):
    with (run / "metrics.jsonl").open("w") as file:
        for i in range(5000):
            file.write(json.dumps(record(i, blocks={"gradient": [1e-3 * (1 + (i * 7 + b) % 11) for b in range(42)]})) + "\n")
    assert write_report(run).stat().st_size < 2**20


def test_the_command(run, tmp_path, capsys):
    for page in (tmp_path / "page.html", tmp_path / "new" / "directory" / "page.html"):
        cli.main(["report", str(run), "--out", str(page)])
        assert capsys.readouterr().out == f"{page}\n" and page.exists()


def test_a_name_that_is_no_text_is_shown_as_far_as_it_is(run, tmp_path):
    odd = Path(shutil.copytree(run, tmp_path / os.fsdecode(b"caf\xe9")))
    assert "caf?" in write_report(odd).read_text(encoding="utf-8")
    with pytest.raises(UsageError, match="--out .*caf.*: the name is not UTF-8; choose another directory"):
        require_place(odd / "run")


def test_a_run_without_a_concept_is_titled_by_its_directory(tmp_path, monkeypatch):
    (directory := tmp_path / "golf-1").mkdir()
    (directory / "findings.json").write_text(json.dumps(Bill(findings=()).as_json()))
    monkeypatch.chdir(directory)
    assert "<title>Run golf-1" in write_report(Path(".")).read_text()


def test_a_run_that_the_preflight_stopped_is_one(tmp_path):
    bill = Bill(findings=(finding("wiped-weights", "weights", module="proj_out.weight"),))
    (tmp_path / "findings.json").write_text(json.dumps(bill.as_json()))
    assert "proj_out.weight" in write_report(tmp_path).read_text() and RunFiles.read(tmp_path).num_steps() == 0


def test_no_run_and_no_place(run, tmp_path):
    with pytest.raises(CheckpointError, match="not a run directory"):
        write_report(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "CogVideoXTransformer3DModel"}')
    with pytest.raises(CheckpointError, match="not a run directory .none of a run's config.json, "):
        write_report(tmp_path)
    for place in (run / "config.json", run / "config.json" / "sub"):
        with pytest.raises(InputOutputError, match=f"^{place / 'page.html'} cannot be written .Not a directory.; choose another --out"):
            write_report(run, place / "page.html")


@pytest.mark.parametrize("out", ["", ".", "-"])
def test_a_page_needs_a_name(run, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"--out {Path(out)}: name a file, such as report.html"):
        write_report(run, Path(out))
    assert sorted(tmp_path.iterdir()) == [run]


def test_a_device_or_a_pipe_is_not_replaced_and_a_link_is_followed(run, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to pipe").symlink_to(tmp_path / "pipe")
    for out in (tmp_path / "pipe", tmp_path / "to pipe"):
        with pytest.raises(InputOutputError, match=f"{out} cannot be written .not a regular file.; choose another --out"):
            write_report(run, out)
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "to pipe").is_symlink()
    (tmp_path / "link").symlink_to(tmp_path / "page.html")
    assert write_report(run, tmp_path / "link") == tmp_path / "link" and (tmp_path / "link").is_symlink()
    assert "Erasing red" in (tmp_path / "page.html").read_text()


LONG = 300 * "x"


@pytest.mark.parametrize("argv", [["report", LONG], ["diagnose", LONG], ["export", LONG, "--out", "x"],
                                  ["generate", "--eraser", LONG, "--prompt", "x"], ["plan", "--model", LONG, "--profile", "24gb"]],
                         ids=lambda argv: argv[0])
def test_names_that_are_too_long_are_one_clear_line(call, argv):  # noqa: F811
    code, out, lines = call(*argv)
    assert code in (2, 5, 6) and out == "" and len(lines) == 1  # newer Pythons say of such a name that nothing is there


@pytest.mark.parametrize("number, advice", [(errno.ENOTDIR, "name another path"), (errno.EISDIR, "name another path"),
                                            (errno.ENAMETOOLONG, "name another path"), (errno.ELOOP, "name another path"),
                                            (errno.EACCES, "choose a place that you may read and write, or have its permissions changed")])
def test_a_path_that_is_none_is_an_input_output_error(call, monkeypatch, number, advice):  # noqa: F811
    def fail(argv):
        raise OSError(number, os.strerror(number), "some/place")

    monkeypatch.setattr(cli, "main", fail)
    code, _, (line,) = call()
    assert code == 6 and line == f"error: some/place: {os.strerror(number)}; {advice}"


def chromium():
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(chromium() is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [1200, 500])
def test_in_a_real_browser(run, tmp_path, width):
    """Scripts run, pointing at a chart shows its value, the policy against the network is in force, and no picture is cut off."""
    path = write_report(run)
    probe = """<script>
      const chart = document.querySelector("svg.chart"), box = chart.getBoundingClientRect();
      chart.dispatchEvent(new PointerEvent("pointermove", {clientX: box.right - box.width / 100, clientY: box.top + 50}));
      document.title = "tip " + chart.querySelector(".tip").textContent + " width " + document.body.scrollWidth + " beyond its section " +
        Math.max(...[...document.querySelectorAll("figure, svg.chart")].map(e => e.getBoundingClientRect().right - e.closest("section").getBoundingClientRect().right));
    </script></body>"""
    path.write_text(path.read_text().replace("</body>", probe))
    done = subprocess.run(
        [chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900",
         "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    title = re.search(r"<title>(.*?)</title>", done.stdout)[1]
    assert title.startswith("tip step 60: 0.01667")
    assert int(re.search(r"width (\d+)", title)[1]) <= width  # no sideways scrolling
    assert float(title.split()[-1]) <= 0


def test_the_settings_of_the_report_are_those_of_the_run(run):
    stored = json.loads((run / "config.json").read_text())["config"]
    assert stored == as_json(replaced(TrainConfig(), {"optim.rank": 32, "optim.steps": 60}))
    bold = re.findall(r"<tr class=set><td><code>(.*?)</code>", write_report(run).read_text())
    assert sorted(bold) == ["optim.rank", "optim.steps"]
