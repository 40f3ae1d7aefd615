"""What runs on a GPU, run to its end on a made-up one: see support/gpu_standin.c for what of it is real.

torch's CUDA code is: its allocator, streams, loss scaling, choice of kernels, errors. Numbers are not: nothing is computed.
"""

import json
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.support.gpu_standin import NoStandinError, build_standin

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.gpu_standin
# On tiny towers from random weights, with batches that the few photos fill.
TINY = ("--set", "model.pretrained=none", "--set", "training.batch_size=12", "--set", "training.num_workers=0")

# Of the published models' sizes: numbers are none on the card, and drawing them takes half of the time.
QUICK_WEIGHTS = """
import torch
for name in dir(torch.nn.init):
    if name.endswith(("normal_", "uniform_")):
        setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor)
"""


class Card:
    """Starts Python on the made-up card."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def run(self, *arguments: object, **settings: object) -> str:
        """What a process that ends well prints; ``settings`` are of the card, such as ``bytes``."""
        environment = {f"GPU_STANDIN_{name.upper()}": str(value) for name, value in settings.items()}
        done = subprocess.run(
            [sys.executable, "-X", "faulthandler", *map(str, arguments)],
            cwd=ROOT,
            env={**self._environment, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Card:
    try:
        return Card(build_standin(tmp_path_factory.mktemp("card")))
    except NoStandinError as error:
        pytest.skip(f"no made-up GPU: {error}")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """72 photos to train on and 9 to evaluate on: an odd number, so that the card says of each that it counts."""
    from fashionclip_tune.synthetic import GarmentRecipe, render_dataset

    folder = tmp_path_factory.mktemp("photos")
    render_dataset(folder, GarmentRecipe(num_products=90, views_per_product=1, image_size=48))
    return folder


def test_what_the_made_up_card_needs_is_said_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.cuda", None)
    with pytest.raises(NoStandinError, match=r"^torch \S+ is no CUDA build$"):
        build_standin(tmp_path)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoStandinError, match=r"^there is no gcc$"):
        build_standin(tmp_path)


def test_running_out_of_memory_is_recognised_in_the_words_of_this_torch(card: Card) -> None:
    """Of its allocator, of CUDA, and of cuBLAS, for whose handle the rest of the card is too small."""
    code = """
import torch
from fashionclip_tune.errors import UnavailableError
from fashionclip_tune.training.device import ran_out_of_memory
from fashionclip_tune.tuning.backend.worker import claim_gpu_share

def fill():
    global numbers, rest
    numbers = torch.ones(8, 8, device="cuda")
    rest = torch.empty((torch.cuda.mem_get_info()[0] >> 21) - 2 << 21, dtype=torch.uint8, device="cuda")

def says(action):
    try:
        action()
    except Exception as error:
        assert isinstance(error, UnavailableError) or ran_out_of_memory(error), error
        print(str(error).splitlines()[0])

"""
    in_use = """
says(lambda: torch.empty(2**40, device="cuda"))
says(lambda: torch.empty(2**47, dtype=torch.uint8, pin_memory=True))
fill()
says(lambda: numbers @ numbers)
"""
    full = """
says(lambda: torch.cuda.mem_get_info())
says(lambda: claim_gpu_share(8 * 10**9, 6 * 10**9, wait_s=0))
"""
    allocator, pinned, cublas = card.run("-c", code + in_use).splitlines()
    assert allocator.startswith("CUDA out of memory. Tried to allocate 4096.00 GiB")
    assert pinned == "CUDA error: out of memory"
    assert "CUBLAS_STATUS_NOT_INITIALIZED" in cublas
    context, claimed = card.run("-c", code + full, taken=15_800_000_000).splitlines()
    assert context == "CUDA error: out of memory"
    assert claimed.startswith("the card has 0.0 GiB free after 0 s, this trial needs 5.0: another program holds the rest")


def test_matrix_products_may_be_strict_without_a_variable_that_torch_would_parse_at_each(card: Card) -> None:
    """Left in the environment it cost a third of a step on an H200. The first product of all may have been an earlier run's."""
    code = """
import os
import torch
from fashionclip_tune.training.device import StrictPasses, repeatable
name, device = "CUBLAS_WORKSPACE_CONFIG", torch.device("cuda", 0)
for given in (None, None, ":16:8"):
    if given is not None:
        os.environ[name] = given
    with repeatable(True, device), StrictPasses().strictly():
        numbers = torch.ones(8, 8, device=device, requires_grad=True)
        torch.nn.functional.linear(numbers, numbers, numbers[0]).sum().backward()
    print(os.environ.get(name))
"""
    assert card.run("-c", code).split() == ["None", "None", ":16:8"]


def test_a_search_of_the_openclip_models_is_planned(card: Card, garments: Path, tmp_path: Path) -> None:
    options = ("--data", garments, "--results", tmp_path, "--preset", "quick")
    planned = card.run("sweeps/run_sweep.py", "--space", "openclip", "--dry-run", *options)
    assert "side by side, on cuda" in planned
    for model in ("ViT-B-32", "ViT-B-16", "ViT-B-16-SigLIP2-256"):
        assert f"{model}: " in planned
    assert "of 15.8 GB (estimate)" in planned


def used_at_most(shared: Path) -> int:
    """Bytes that all processes together have had of a shared card at their most."""
    _, most = struct.unpack("NN", shared.read_bytes())  # what they have now is wrong where one was killed
    return int(most)


def test_a_sweep_measures_what_two_trials_gain_once_and_probe_knows_it(card: Card, photos: Path, tmp_path: Path) -> None:
    space = tmp_path / "one.py"
    space.write_text('BASE = {"clip_model": "ViT-B-32", "training.batch_size": 2}\ndef space(trial):\n    return {}\n')
    code = f"""
import logging
from fashionclip_tune.tuning.console.plan_text import plan_lines
from fashionclip_tune.tuning.planning.plan import plan_sweep
from fashionclip_tune.tuning.planning.settings import SweepSettings
logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[logging.FileHandler({str(tmp_path / "log")!r})])
for _ in range(2):
    plan = plan_sweep(SweepSettings(data={str(photos)!r}, space={str(space)!r}, budget_examples=576, num_trials=4))
    print(*[line for line in plan_lines(plan) if line.startswith(("shares", "rates"))], sep="\\n")
"""
    printed = card.run("-c", code, shared=tmp_path / "card").splitlines()
    first, rate, *again = [line for line in printed if line.startswith(("shares", "rates"))]
    assert again == [first, rate]
    assert "(measured by probe)" in rate
    gain = first.partition("; two side by side: ")[2].removesuffix(" (measured)")
    assert f" GPU, {1 if int(gain.rstrip('%')) < 10 else 2} side by side" in first
    assert (tmp_path / "log").read_text().count("measuring ViT-B-32 on this card") == 1
    probed = ("probe", "--set", "clip_model=ViT-B-32", "--set", "training.batch_size=2")
    said = card.run("-m", "fashionclip_tune", *probed)
    assert "measured on Tesla T4, 14.7 GiB\nmicro-batch     2  estimate " in said
    assert " GiB  measured " in said
    assert f"two trials side by side: {gain} trials an hour" in said
    alone_gib = float(said.partition(" GiB  measured ")[2].split()[0])
    assert 1.2 * alone_gib * 2**30 < used_at_most(tmp_path / "card") < 15_835_660_288


def test_the_memory_of_the_larger_models_is_measured_and_a_batch_that_does_not_fit_is_halved(card: Card) -> None:
    """In one process, and without the pace, whose processes take a minute a model here."""
    code = """
from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.profiling.probe import probe
for model, batch_size in (("ViT-B-16", 2), ("ViT-B-16-SigLIP2-256", 128)):
    found = probe(ProjectConfig(clip_model=model).with_overrides({"training.batch_size": batch_size}))
    print(found.card, [each.micro_batch_size for each in found.probes], [each.fits for each in found.probes])
"""
    b16, siglip2 = card.run("-c", code).splitlines()
    assert b16 == "Tesla T4 [2] [True]"
    assert siglip2 == "Tesla T4 [128, 64] [False, True]"


def test_a_micro_batch_is_measured_whatever_smaller_one_was_measured_before(card: Card) -> None:
    code = """
from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.profiling.probe import probe
for size in (16, 64, 16):
    settings = {"training.batch_size": 64, "training.micro_batch_size": size}
    found = probe(ProjectConfig(clip_model="tiny-clip").with_overrides(settings))
    print(found.best.micro_batch_size, [each.micro_batch_size for each in found.probes])
"""
    assert card.run("-c", code).splitlines() == ["16 [16]", "64 [64]", "16 [16]"]


def test_no_step_waits_for_the_card_whatever_is_switched_on(card: Card) -> None:
    """But the first of a run, which makes what is kept. What is drawn on the CPU goes there from pinned memory alone."""
    code = """
import ctypes
from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.models.openclip import load_random_model
from fashionclip_tune.models.precision import plan_precision
from fashionclip_tune.models.token_rows import use_token_rows
from fashionclip_tune.profiling.probe import random_batch
from fashionclip_tune.training.device import repeatable
from fashionclip_tune.training.trainer import Trainer
made_up = ctypes.CDLL(None)
options = {
    "training.batch_size": 16, "training.micro_batch_size": 8, "device": "cuda", "loss.positives": "mask",
    "optimizer.ema_decay": 0.99, "model.patch_dropout": 0.5, "augmentation.rand_augment": True, "augmentation.erasing": True,
    "hardware.gradient_checkpointing": True,
}
for model, loss in (("tiny-clip", "contrastive"), ("tiny-sig", "siglip"), ("tiny-clip", "siglip")):
    for strength in (1.0, 0.0):
        changes = {"loss_function": loss, "augmentation.image_strength": strength}
        config = ProjectConfig(clip_model=model).with_overrides(options | changes)
        plan, loaded, counts = plan_precision(config), load_random_model(config), []
        use_token_rows(loaded.network, config, 100)
        batch = random_batch(config, loaded).pin_memory()
        note = lambda batch: counts.append((made_up.gpu_standin_waits(), made_up.gpu_standin_pageable_copies()))
        with repeatable(config.hardware.deterministic):
            Trainer(loaded, config, 5, plan).run_stage(iter([batch] * 5), 5, note)
        (waits, copies), (last_waits, last_copies) = counts[1], counts[-1]
        print(loss, strength, len(counts), last_waits - waits, last_copies - copies, waits > 0)
"""
    found = [line.split() for line in card.run("-c", code).splitlines()]
    assert [each[0] for each in found] == ["contrastive"] * 2 + ["siglip"] * 4
    for loss, strength, steps, waits, copies, counted in found:
        assert (steps, counted) == ("5", "True")
        assert (waits, copies) == ("0", "0"), f"{loss} at {strength}: {waits} waits, {copies} copies from memory not pinned"


def test_on_a_small_card_a_batch_is_cut_and_attention_is_memory_efficient(card: Card) -> None:
    """A T4 has no flash attention; its kernel of last resort would keep a matrix of weights for each head."""
    code = f"""{QUICK_WEIGHTS}
import warnings
from torch.utils._python_dispatch import TorchDispatchMode
from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.models.openclip import load_random_model
from fashionclip_tune.models.precision import plan_precision
from fashionclip_tune.profiling.probe import random_batch
from fashionclip_tune.training.trainer import Trainer

class Attention(TorchDispatchMode):
    found = set()
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found |= {{func.name()}} if "attention" in func.name() else set()
        return func(*args, **(kwargs or {{}}))

config = ProjectConfig(clip_model="ViT-B-32", device="cuda")
loaded = load_random_model(config)
trainer = Trainer(loaded, config, 1, plan_precision(config))
with Attention() as attention, warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    trainer.run_stage(iter([random_batch(config, loaded).pin_memory()]), 1, lambda batch: None)
print(trainer.step, trainer.micro_batch_size, torch.cuda.get_device_capability(), *sorted(attention.found))
print([str(warning.message)[:60] for warning in said])
"""
    ran, said = card.run("-c", code, bytes=3_600_000_000).splitlines()
    efficient = "aten::_scaled_dot_product_efficient_attention"
    assert ran == f"1 8 (7, 5) {efficient} {efficient}_backward"
    for size in (64, 32, 16):
        assert f"out of memory at step 1 with a micro-batch of {size}" in said


def test_no_step_of_the_published_models_takes_more_memory_than_is_estimated(card: Card) -> None:
    """Whole batches and micro-batches of 64, blocks kept and computed again; by at most 15 % less, with the context."""
    code = f"""{QUICK_WEIGHTS}
from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.profiling.probe import probe
cases = [
    ("ViT-B-32", 16, False, False), ("ViT-B-32", 64, True, False), ("ViT-B-16", 64, False, False),
    ("ViT-B-16-SigLIP2-256", 64, True, True), ("ViT-B-16-SigLIP2-256", 32, False, False),
    ("ViT-B-16-SigLIP2-256", 64, True, False),
]
for model, size, again, frozen in cases:
    settings = {{"training.micro_batch_size": size, "hardware.gradient_checkpointing": again, "freeze.token_embedding": frozen}}
    (found,) = probe(ProjectConfig(clip_model=model).with_overrides(settings)).probes
    print(found.micro_batch_size, found.estimate.total_bytes / found.measured_bytes, model, again, frozen)
"""
    found = [line.split(maxsplit=2) for line in card.run("-c", code).splitlines()]
    assert [int(size) for size, _, _ in found] == [16, 64, 64, 64, 32, 64]
    for size, share, what in found:
        assert 1 <= float(share) < 1.18, f"{what}, micro-batch {size}: {share}"


def test_rows_that_do_not_occur_stay_on_the_host_and_nothing_waits_for_the_card(card: Card) -> None:
    """In training, that is; to evaluate, rows that are not trained are fetched."""
    code = """
import os
import torch
from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.models.openclip import load_random_model
from fashionclip_tune.models.token_rows import untrained_tables, use_token_rows
config = ProjectConfig(clip_model="tiny-clip")
network = load_random_model(config).network
plain_bytes = sum(each.nbytes for each in (*network.parameters(), *network.buffers()))
use_token_rows(network, config, 100)
network.to("cuda")
((name, table),) = untrained_tables(network).items()
print(name, table.device, torch.cuda.memory_allocated() < plain_bytes - table.nbytes + 2**20)
tokens_BL = torch.zeros(2, network.context_length, dtype=torch.long).pin_memory().to("cuda", non_blocking=True)
torch.cuda.set_sync_debug_mode("error")
network.train().encode_text(tokens_BL, normalize=True).sum().backward()
print(network.token_embedding.trained_UD.grad.shape[0], flush=True)
os._exit(0)  # as the stand-in's own trial does, and why
"""
    assert card.run("-c", code).splitlines() == ["token_embedding.weight cpu True", "100"]


@pytest.mark.parametrize("loss", ["contrastive", "siglip"])
def test_six_steps_of_training(card: Card, photos: Path, tmp_path: Path, loss: str) -> None:
    steps = ("--set", "training.max_steps=6", "--set", "training.checkpoint_interval=3", "--set", "device=cuda")
    options = ("--data", photos, "--out", tmp_path / "run", "--set", "clip_model=tiny-clip", *TINY, *steps)
    said = card.run("-m", "fashionclip_tune", "train", *options, "--set", f"loss_function={loss}")
    assert "step      6         72 examples  recall_at_10 1.0000" in said
    assert (tmp_path / "run" / "checkpoints" / "step_00000006").is_dir()


def test_a_sweep_of_tiny_towers_runs_to_its_end_two_at_a_time(card: Card, photos: Path, tmp_path: Path) -> None:
    options = ("--num-trials", 3, "--budget-examples", 48, "--grace-examples", 24, "--name", "tiny", *TINY)
    where = ("--data", photos, "--results", tmp_path, "--device", "cuda", "--max-concurrent", 2)
    said = card.run("sweeps/run_sweep.py", "--space", "tiny", *where, *options, shared=tmp_path / "card")
    assert "3, at most 2 side by side, on cuda" in said
    sweep = json.loads((tmp_path / "tiny" / "sweep.json").read_text())
    assert sweep["state"] == "FINISHED"
    assert len(sweep["trials"]) == 3
    ends = {(row["state"], row["stop_reason"]) for row in sweep["trials"]}
    assert ("COMPLETE", "budget") in ends
    assert ends <= {("COMPLETE", "budget"), ("PRUNED", "rung_1")}  # which of them go on is the model's to say
    assert (tmp_path / "tiny" / "best" / "open_clip_model.safetensors").is_file()
    assert 2 * 250 * 2**20 < used_at_most(tmp_path / "card") < 15_835_660_288  # a context each


def test_an_evaluation_waits_for_the_device_at_its_end_only(card: Card, photos: Path) -> None:
    """Three blocks of pixels and of captions, of which the last are cut; the first time, constants are brought to the card."""
    code = f"""
from pathlib import Path
import torch
from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.data.shards import find_dataset
from fashionclip_tune.evaluation.dataset import evaluation_set
from fashionclip_tune.evaluation.encode import embed
from fashionclip_tune.models.openclip import load_model
from fashionclip_tune.models.precision import plan_precision
config = ProjectConfig(clip_model="tiny-clip").with_overrides({{"model.pretrained": None}})
loaded, plan = load_model(config), plan_precision(config)
loaded.network.to(plan.device)
photos = evaluation_set(find_dataset(Path({str(photos)!r})).valid, loaded.preprocessing)
for mode in ("default", "error"):
    torch.cuda.set_sync_debug_mode(mode)
    pool, *_ = embed(loaded, photos, all_captions=False, batch_size=4, plan=plan, max_bad_share=0)
print(*pool.images_ND.shape)
"""
    assert card.run("-c", code).split()[0] == "9"


def test_the_benchmark_of_a_card_runs_on_the_made_up_one(card: Card, tmp_path: Path) -> None:
    out, parts = tmp_path / "gpu.json", ("card", "peaks", "run")
    said = card.run("-m", "benchmarks", "gpu", "--models", "tiny-clip", "--out", out, "--parts", *parts)
    found = json.loads(out.read_text())
    assert [result["failed"] for result in found.values() if "failed" in result] == []
    assert set(found) == {"card", "peaks tiny-clip", "run tiny-clip"}
    assert [row["step"] for row in found["run tiny-clip"]["rows"]] == [0, 30, 60]
    assert said.count("\n| tiny-clip | ") == 6
