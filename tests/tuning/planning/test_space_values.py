"""What a space may draw: values as the journal stores them, and errors at the user's own line."""

from pathlib import Path

import optuna
import pytest

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.errors import UserError
from fashionclip_tune.tuning.planning.space import SpaceCheck, check_space, load_space


def checked(tmp_path: Path, body: str) -> SpaceCheck:
    file = tmp_path / "mine.py"
    file.write_text(f"import numpy as np\nfrom pathlib import Path\n\n\ndef space(trial):\n{body}")
    return check_space(load_space(str(file)), ProjectConfig(clip_model="tiny-clip").with_overrides, 0)


def test_numpys_scalars_and_paths_are_taken_as_what_they_are(tmp_path: Path) -> None:
    body = (
        '    rate = trial.suggest_float("rate", np.float64(1e-4), np.float32(1e-2), log=True)\n'
        '    return {"training.learning_rate": np.float32(rate), "training.batch_size": np.int64(32), '
        '"augmentation.erasing": np.bool_(rate > 1e-3), "model.cache_dir": Path("cache/x")}\n'
    )
    for settings in checked(tmp_path, body).settings:
        assert [type(value) for value in settings.values()] == [float, int, bool, str]
    study = optuna.create_study()
    load_space(str(tmp_path / "mine.py")).draw(study.ask())


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('trial.suggest_categorical("batch", list(np.array([16, 32])))', r"parameter batch has a choice .*\(int64\).*tolist"),
        ('trial.suggest_categorical("batch", [(1, 2), (3, 4)])', r"parameter batch has a choice .*\(tuple\)"),
        ('trial.suggest_categorical("batch", [Path("a")])', r"parameter batch has a choice .*Path\)"),
    ],
)
def test_choices_that_cannot_be_stored_are_named(tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        checked(tmp_path, f'    return {{"training.batch_size": {line}}}\n')


def test_settings_that_cannot_be_stored_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"training.batch_size = \{32\} cannot be stored"):
        checked(tmp_path, '    trial.suggest_float("x", 0, 1)\n    return {"training.batch_size": {32}}\n')


def test_errors_are_at_the_users_own_line(tmp_path: Path) -> None:
    body = (
        '    model = trial.suggest_categorical("clip_model", ["tiny-clip", "tiny-sig"])\n'
        '    size = trial.suggest_categorical("batch", [16] if model == "tiny-clip" else [32])\n'
        '    return {"clip_model": model, "training.batch_size": size}\n'
    )
    with pytest.raises(UserError, match=r'give each set of choices a name of its own \(line 7 of mine.py: size = .*"batch"'):
        checked(tmp_path, body)
