"""Shared by all tests: a cache of their own, a small data set, a configuration that trains in a second."""

import io
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.register_assert_rewrite("tests.support")  # what its helpers assert is explained as in a test
os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's client is imported: no test reaches out
# Read when torch is imported, and inherited: threads that wait for others do not spin. Tests share their cores, and a short
# run that takes 52 s so, beside another one, took 184 s.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with sweeps come first: they take longest, and two processes that share the tests are to end together."""
    files_with_ray = {item.path for item in items if item.get_closest_marker("ray") is not None}
    items.sort(key=lambda item: item.path not in files_with_ray)


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Nothing is read from or left in the user's cache; subprocesses inherit it."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASHIONCLIP_CACHE", str(folder))
        yield folder


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Sequence[str]:
    """What the package has logged so far in the test."""
    caplog.set_level("INFO", "fashionclip_tune")
    return Logged(caplog)


class Logged(Sequence[str]):
    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog

    def __len__(self) -> int:
        return len(self._messages())

    def __getitem__(self, place: Any) -> Any:
        return self._messages()[place]

    def __eq__(self, other: object) -> bool:
        return self._messages() == other

    def _messages(self) -> list[str]:
        return [record.getMessage() for record in self._caplog.records if record.name.startswith("fashionclip_tune")]


@pytest.fixture(scope="session")
def garments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 100 synthetic products with 2 photos each: 160 photos to train on, 20 to evaluate on. Do not change it."""
    from fashionclip_tune.synthetic import GarmentRecipe, render_dataset

    folder = tmp_path_factory.mktemp("garments")
    render_dataset(folder, GarmentRecipe(num_products=100, views_per_product=2, image_size=48))
    return folder


@pytest.fixture
def tiny_config(garments: Path) -> Any:
    """``tiny-clip`` from random weights, 10 steps of 16 photos in stages of 2, on one thread."""
    from fashionclip_tune.config.project import ProjectConfig

    return ProjectConfig(clip_model="tiny-clip", dataset_root=garments, device="cpu").with_overrides(
        {
            "model.pretrained": None,
            "training.batch_size": 16,
            "training.num_workers": 0,
            "training.learning_rate": 1e-3,
            "training.budget_examples": 160,
            "training.stage_examples": 32,
            "training.checkpoint_minutes": 0,
            "hardware.threads": 1,
        }
    )


@pytest.fixture(scope="session")
def many_captions(garments: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``garments`` with 1 to 7 captions a photo, of their own; of the first photo to train on ``txt2`` is missing."""
    folder = tmp_path_factory.mktemp("many_captions")
    for path in sorted(garments.glob("*.tar")):
        first = dict[Any, Any]()
        with tarfile.open(path) as tar, tarfile.open(folder / path.name, "w") as written:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                data = tar.extractfile(member).read()
                if suffix == "jpg":
                    first[key] = len(first)
                elif suffix == "txt0.txt":
                    for number in range(1 + first[key] % 7 if first[key] else 5):
                        if number != 2 or first[key] or "train" not in path.name:
                            caption = data if number == 0 else f"{key} in other words, {number}".encode()
                            info = tarfile.TarInfo(f"{key}.txt{number}.txt")
                            info.size = len(caption)
                            written.addfile(info, io.BytesIO(caption))
                    continue
                elif suffix.startswith("txt"):
                    continue
                written.addfile(member, io.BytesIO(data))
    return folder


@pytest.fixture(scope="session")
def real_photos() -> Path:
    """The folder fpi60 of real catalogue photos, kept outside the repository; tests that need it are skipped without."""
    folder = Path(__file__).parents[2] / "shared" / "data" / "fpi60"
    if not folder.is_dir():
        pytest.skip(f"real photos are not at {folder}")
    return folder


@pytest.fixture(scope="session")
def small_sweep(garments: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep's folder as an engine leaves it, without Ray: five short trials, one after the other. Do not change it.

    The second one is stopped at a rung, the last one fails.
    """
    return make_small_sweep(garments, tmp_path_factory.mktemp("results") / "small")


def make_small_sweep(garments: Path, folder: Path) -> Path:
    from optuna.trial import TrialState

    from fashionclip_tune import train
    from fashionclip_tune.config.project import ProjectConfig
    from fashionclip_tune.evaluation.metric import DEFAULT_METRIC
    from fashionclip_tune.tuning.persistence.hparams import HParamsTab
    from fashionclip_tune.tuning.persistence.record import SweepRecord
    from fashionclip_tune.tuning.study.study import SweepStudy
    from fashionclip_tune.tuning.trial import trial_dir

    def space(trial: Any) -> Any:
        drawn = {
            "clip_model": trial.suggest_categorical("clip_model", ["tiny-clip", "tiny-sig"]),
            "loss_function": trial.suggest_categorical("loss_function", ["contrastive", "siglip"]),
            "training.learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True),
        }
        if trial.suggest_categorical("augment_images", [False, True]):
            drawn["augmentation.image_strength"] = trial.suggest_float("image_strength", 0.1, 1.0)
        return drawn

    fixed = {
        "model.pretrained": None,
        "training.batch_size": 16,
        "training.num_workers": 0,
        "training.budget_examples": 96,
        "training.stage_examples": 32,
        "training.checkpoint_minutes": 0,
        "hardware.threads": 1,
    }
    base = ProjectConfig(dataset_root=garments, device="cpu").with_overrides(fixed)
    folder.mkdir(parents=True)
    study = SweepStudy(folder / "study.journal", seed=3, num_startup_trials=5)
    header = {"name": folder.name, "space": "small", "settings": {"num_trials": 5, "budget_examples": 96}}
    record = SweepRecord(folder, study, header)
    for _ in range(5):
        number, settings = study.suggest(space)
        if number == 4:
            study.end(number, TrialState.FAIL, "bad_data", "no photo left <at all> to train on")
            continue
        stage_examples = {"training.budget_examples": 32} if number == 1 else {}
        result = train(
            base.with_overrides({**settings, **stage_examples}),
            trial_dir(folder, number, settings["clip_model"], settings["loss_function"]),
        )
        for row in result.history:
            study.record_stage(number, row["examples_seen"], row["recall_at_10"])
        if number == 1:
            study.end(number, TrialState.PRUNED, "rung_1")
        else:
            study.pass_rung(number, 32)
            study.end(number, TrialState.COMPLETE, "budget")
    result = record.write("FINISHED")
    HParamsTab(folder, [row["config"] for row in result["trials"]], DEFAULT_METRIC).add(result["trials"])
    return folder


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Object storage that speaks S3, on this machine."""
    server_module = pytest.importorskip("moto.server", reason="a server of S3 is pip install 'moto[server]'")
    from pyarrow import fs

    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name, value in (("ACCESS_KEY_ID", "any"), ("SECRET_ACCESS_KEY", "any"), ("REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    fs.S3FileSystem(endpoint_override=f"http://{host}:{port}", allow_bucket_creation=True).create_dir("bucket")
    yield "s3://bucket/results"
    server.stop()
