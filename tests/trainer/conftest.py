"""Fixtures: real but tiny CogVideoX pipelines on disk, one of each published kind, and settings to train on them."""

import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import SafetensorsFileMetadata, TensorInfo
from projection_models import save_encoder
from safetensors import safe_open
from tiny_pipelines import KINDS, build_pipeline

from trainer.backbones.cogvideox import CogVideoX
from trainer.config import TrainConfig, replaced


@pytest.fixture(scope="session", autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Cached embeddings of tests stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def full_disk() -> Callable[[], AbstractContextManager[None]]:
    """Within what it returns, files take no more than 100 bytes of this process: the system refuses the rest, as of a disk without room."""
    @contextmanager
    def limited() -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories by kind. Read only: a test that damages one takes `copied`."""
    root = tmp_path_factory.mktemp("pipelines")
    found = {kind: build_pipeline(root / kind, kind) for kind in KINDS}
    found["5b-bf16"] = build_pipeline(root / "5b-bf16", "5b", dtype=torch.bfloat16)
    found["1.5-ofs"] = build_pipeline(root / "1.5-ofs", "1.5", ofs=True)
    return found


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of encoders of `forget`, by name. Read only."""
    root = tmp_path_factory.mktemp("encoders")
    return {name: save_encoder(root / name, name) for name in ("clip", "qwen3-vl")}


@pytest.fixture
def copied(pipelines: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one pipeline that a test may damage."""
    return lambda kind: Path(shutil.copytree(pipelines[kind], tmp_path / f"copy-{kind}"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[dict[str, Path]], list[tuple]]:
    """Makes the hub have models, by id: the list of (id, revision, patterns) that downloads will be noted in, and headers that are read,
    as (id, revision, file)."""
    def have(models: dict[str, Path]) -> list[tuple]:
        calls: list[tuple] = []

        def download(hub_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
            calls.append((hub_id, revision, allow_patterns))
            into = tmp_path / "hub" / hub_id / "revision"
            for pattern in allow_patterns:
                for file in models[hub_id].rglob(pattern):
                    copy = into / file.relative_to(models[hub_id])
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(file, copy)
            return str(into)

        def read_header(hub_id: str, file: str, *, revision: str) -> SafetensorsFileMetadata:
            calls.append((hub_id, revision, file))
            with safe_open(models[hub_id] / file, framework="pt") as f:
                slices = {name: f.get_slice(name) for name in f.keys()}
            return SafetensorsFileMetadata({}, {name: TensorInfo(s.get_dtype(), s.get_shape(), (0, 0)) for name, s in slices.items()})

        monkeypatch.setattr("huggingface_hub.snapshot_download", download)
        monkeypatch.setattr("huggingface_hub.parse_safetensors_file_metadata", read_header)
        return calls

    return have


@pytest.fixture(params=KINDS)
def backbone(request: pytest.FixtureRequest, pipelines: dict[str, Path]) -> CogVideoX:
    return CogVideoX(str(pipelines[request.param]))


@pytest.fixture
def sincos(pipelines: dict[str, Path]) -> CogVideoX:
    """The 2b-like one, where the kind does not matter."""
    return CogVideoX(str(pipelines["2b"]))


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts of `tiny_config`, read only: one file for all tests, so that the planner has traced what another test asked for."""
    file = tmp_path_factory.mktemp("prompts") / "prompts.csv"
    file.write_text("prompt,safe\na red circle moving left,a circle moving left\nthe square is red and goes up,the square goes up\n"
                    "a video of a red ball heading down,a video of a ball heading down\n")
    return file


@pytest.fixture
def tiny_config(pipelines: dict[str, Path], prompts: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Settings of a run of 6 steps on the 2b-like pipeline, with settings by dotted path on top."""
    def make(**overrides) -> TrainConfig:
        values = {"model.model": str(pipelines["2b"]), "model.device": "cpu", "data.prompts": prompts,
                  "data.preserve": ("a blue circle moving left", "a green square moving up"),
                  "data.trajectory_steps": 4, "data.batch_size": 2, "optim.rank": 4, "optim.steps": 6, "optim.warmup": 2,
                  "optim.lr": 1e-2, "output.out": tmp_path / "run", "output.save_every": 3, "output.sample_steps": 2,
                  "output.sample_prompts": ("a red circle",)}
        return replaced(TrainConfig(), values | {name.replace("__", "."): v for name, v in overrides.items()})

    return make
