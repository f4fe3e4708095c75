"""What a server reads off updates, and what it does not: the numbers that the README repeats."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from typer.testing import CliRunner

from broker.tensors import Layout
from fluffle import app
from workers import weights
from workers.attack import CLEAR_DB, Found, Scene, classroom, delta, imprinted, network
from workers.attack_cli import _lines, _picture
from workers.imprint import suspicion
from workers.learners.toy import ROWS

X, Y = load_digits(return_X_y=True)
X = X / 16.0


def played(trials: int, *scene: Any, **more: Any) -> Found:
    return Scene(*scene, **more).play(X, Y, trials=trials, seed=0)


@pytest.mark.parametrize("model", ["linear", "mlp"])
@pytest.mark.parametrize("more", [{}, {"steps": 20}])
def test_a_single_row_is_read_off_a_plain_update_exactly(model: Any, more: dict[str, Any]) -> None:
    found = played(40, model, 1, 1, **more)
    assert found.exact >= 0.95 * found.rows
    assert found.claimed == found.right >= 0.95 * found.rows, "and whoever does not know the rows can tell"


@pytest.mark.parametrize("form", ["bfloat16", "int8"])
def test_rounding_is_no_defence(form: str) -> None:
    assert played(20, "mlp", 1, 1, format=form).median_db > 25


def test_an_average_of_ten_on_the_mlp_gives_somebodys_row_away_all_the_same() -> None:
    found = played(10, "mlp", 10, 1)
    assert found.rounds == 1.0
    assert found.exact >= 1
    assert found.right >= 1


def test_an_average_of_ten_hides_rows_in_a_linear_model() -> None:
    assert played(20, "linear", 10, 1).top_db < 25


def test_this_attack_finds_nothing_in_an_average_of_ten_times_sixty_four_rows_without_an_oracle() -> None:
    found = played(3, "mlp", 10, 64)
    assert (found.exact, found.claimed) == (0, 0)


@pytest.mark.parametrize("model", ["linear", "mlp"])
def test_of_a_masked_update_no_row_comes_back(model: Any) -> None:
    found = played(100, model, 1, 1, "secure")
    assert found.top_db < 9
    assert found.claimed == 0


@pytest.mark.parametrize("scene", [("linear", 1, 1), ("mlp", 1, 1), ("mlp", 10, 1), ("linear", 10, 1)])
def test_with_noise_of_differential_privacy_no_row_comes_back(scene: Any) -> None:
    found = played(30, *scene, "dp", z=1.0)
    assert found.top_db < 15
    assert found.right == 0


def test_a_malicious_server_reads_averages_unless_there_is_noise() -> None:
    found = played(3, "mlp", 10, 8, imprint=True)
    assert found.clear > 0.5 * found.rows
    assert played(2, "mlp", 10, 8, "dp", imprint=True).top_db < 15


def test_the_classrooms_columns_are_read_off() -> None:
    said = dict(classroom({name: ROWS[name] for name in ("bob", "alice")}))
    assert "first column -0.0000" in said["bob"] or "first column 0.0000" in said["bob"]
    assert "first column 1.0000" in said["alice"]


# -- the guard ----------------------------------------------------------------------------------------------------


def raw(model: torch.nn.Module) -> tuple[Layout, memoryview]:
    layout = weights.layout_of(model)
    return layout, memoryview(weights.read(model, layout))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_model_made_for_reading_rows_off_is_suspicious(dtype: torch.dtype) -> None:
    assert "point the same way" in suspicion(*raw(imprinted(64, X.mean(1)).to(dtype)))
    scaled = imprinted(64, X.mean(1)).to(dtype)
    with torch.no_grad():
        scaled[0].weight *= torch.rand(len(scaled[0].weight), 1) + 0.5  # type: ignore[operator,arg-type]
    assert "of 0.weight point the same way" in suspicion(*raw(scaled))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zero", [False, True])
def test_honest_models_are_not(zero: bool, dtype: torch.dtype) -> None:
    convolutional = torch.nn.Sequential(
        torch.nn.Conv2d(1, 32, 5), torch.nn.BatchNorm2d(32), torch.nn.Flatten(), torch.nn.LazyLinear(300),
        torch.nn.LayerNorm(300), torch.nn.Embedding(50, 16, padding_idx=0),
    )  # fmt: skip
    convolutional[3](torch.zeros(1, 32 * 24 * 24))
    for model in (network("linear", 64), network("mlp", 64, width=1024), convolutional):
        if zero:
            for parameter in model.parameters():
                torch.nn.init.zeros_(parameter)
        assert suspicion(*raw(model.to(dtype))) == ""


def test_a_trained_model_is_not_suspicious() -> None:
    model = network("mlp", 64)
    for parameter, moved in zip(model.parameters(), delta(model, X[:500], Y[:500], steps=50), strict=True):
        with torch.no_grad():
            parameter.add_(torch.from_numpy(moved).float())
    assert suspicion(*raw(model)) == ""


# -- the command --------------------------------------------------------------------------------------------------


def run(*words: str) -> str:
    done = CliRunner().invoke(app, ["attack", *words], env={"COLUMNS": "200"})
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


def test_the_command_shows_a_table_and_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = {"model": "mlp", "workers": 1, "rows": 1}
    lines = [("one update", one), ("one masked update", {**one, "defence": "secure"})]
    monkeypatch.setattr("workers.attack_cli._lines", lambda: lines)
    said = run("--out", str(tmp_path))
    assert "one masked update" in said
    assert "off alice's delta: first column 1.0000" in said
    assert (tmp_path / "attack.png").read_bytes().startswith(b"\x89PNG")
    told = {line["what"]: line for line in json.loads((tmp_path / "attack.json").read_text())}
    assert told["one update"]["exact"] >= 0.95 * told["one update"]["rows"]
    assert told["one masked update"]["top_db"] < 9 < CLEAR_DB < told["one update"]["median_db"]


def test_the_picture_of_all_scenes_is_no_strip_that_nobody_can_read(tmp_path: Path) -> None:
    scene = Scene(model="linear", workers=1, rows=1, what="one update, noise z = 0.01")
    one = scene, scene.play(X, Y, trials=1, seed=0)
    _picture([one] * 36, tmp_path / "attack.png")
    width, height = struct.unpack(">II", (tmp_path / "attack.png").read_bytes()[16:24])
    assert width < 2 * height < 4 * width


def test_every_line_of_the_table_is_a_scene() -> None:
    scenes = [Scene(**facts) for _, facts in _lines()]
    assert len(set(scenes)) == len(scenes) == 36
    assert max(scene.workers * scene.rows for scene in scenes) <= len(X)


def test_a_picture_of_chance_is_between_three_and_nine_db() -> None:
    dice = np.random.default_rng(0)
    from workers.attack import psnr

    found = [psnr(dice.random(64), row) for row in X[:50]]
    assert 3 < min(found) < max(found) < 9


def test_a_folder_that_cannot_be_written_is_found_out_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("workers.attack_cli._extra", lambda *_: pytest.fail("the work was begun"))
    with pytest.raises(OSError, match="Not a directory"):
        run("--out", str(tmp_path / "file" / "folder"))
