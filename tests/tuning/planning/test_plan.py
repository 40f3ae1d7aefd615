from pathlib import Path

from fashionclip_tune.tuning.planning.plan import plan_sweep
from fashionclip_tune.tuning.planning.settings import SweepSettings


def cache_dir(garments: Path, **settings) -> Path:
    chosen = SweepSettings(
        data=str(garments), space="tiny", budget_examples=1152, device="cpu", samples_per_second=100.0, **settings
    )
    return plan_sweep(chosen, lambda text: None).base.model_cache_dir


def test_base_weights_are_kept_on_the_local_disk_unless_they_are_here(garments, tmp_path, monkeypatch):
    (tmp_path / "drive").mkdir()
    monkeypatch.chdir(tmp_path / "drive")
    scratch = str(tmp_path / "scratch")
    assert cache_dir(garments) == tmp_path / "drive" / "openclip_cache"
    assert cache_dir(garments, scratch=scratch) == tmp_path / "scratch" / "openclip_cache"
    (tmp_path / "drive" / "openclip_cache").mkdir()
    assert cache_dir(garments, scratch=scratch) == tmp_path / "drive" / "openclip_cache"


def test_a_sweep_says_that_captions_have_a_gap(many_captions):
    settings = SweepSettings(
        data=str(many_captions), space="tiny", budget_examples=1152, device="cpu", samples_per_second=100.0
    )
    said = []
    plan_sweep(settings, said.append)
    (line,) = (line for line in said if "gap" in line)
    assert line.startswith("warning: 1 photo has a gap in the numbers of its captions, such as clip_dataset_train")
