"""Finding the user's learner: what is found, and the one sentence that says why not."""

import json
import sys
from io import StringIO
from pathlib import Path

import pytest

from broker.errors import UsageError
from fluffle_demo import _cast, _compare, make_run
from workers.learner import EXAMPLES, learner_name, load, told

GOOD = """
def model(): ...
def data(source): return source
def train(model, data, settings): return 1
def evaluate(model, data): return {}
"""


@pytest.fixture(autouse=True)
def _own_import_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)


def written(path: Path, text: str) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return str(path)


def why_not(where: str) -> str:
    with pytest.raises(UsageError) as caught:
        load(where)
    return str(caught.value)


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_is_a_learner(name: str) -> None:
    found = load(name)
    assert found.name == name
    assert callable(found.train)


def test_the_examples_are_the_files_beside_the_learner() -> None:
    assert {"toy", "digits", "line"} <= set(EXAMPLES)


@pytest.mark.parametrize("name", ["toy", "digits"])
def test_a_demo_names_workers_and_sources_that_exist(name: str) -> None:
    found = load(name)
    assert found.demo is not None
    plan = found.demo(3, 5)
    assert set(plan) == {"workers", "held_out", "pooled", "settings", "rounds"}
    for source in (*plan["workers"].values(), plan["held_out"], plan["pooled"]):
        assert len(found.data(source)[0]) > 0


def test_a_file_is_a_learner_and_may_import_what_lies_beside_it(tmp_path: Path) -> None:
    written(tmp_path / "deep" / "besides_it.py", "ANSWER = 42")
    found = load(written(tmp_path / "deep" / "mine.py", GOOD + "from besides_it import ANSWER\n"))
    assert found.name == "mine"
    assert found.data("x") == "x"
    assert found.demo is None


def test_a_file_may_hold_dataclasses_and_be_named_like_an_installed_module(tmp_path: Path) -> None:
    text = GOOD + "from dataclasses import dataclass\n@dataclass\nclass Row:\n    x: 'int'\n"
    assert load(written(tmp_path / "torch.py", text)).name == "torch"
    import torch

    assert hasattr(torch, "nn")


def test_a_module_of_the_current_folder_is_a_learner(tmp_path: Path) -> None:
    written(tmp_path / "my_package" / "my_learner.py", GOOD)
    assert load("my_package.my_learner").name == "my_learner"


def test_the_current_folder_never_hides_an_installed_module(tmp_path: Path) -> None:
    written(tmp_path / "json.py", "raise RuntimeError('this file must not be run')")
    assert "has no function model, data, train, evaluate" in why_not("json")


@pytest.mark.parametrize("where", ["nonesuch", "nonesuch.deeper", "workers.nonesuch", "", "..", ".dotted", "a b/c"])
def test_an_unknown_learner_is_told_which_there_are(where: str) -> None:
    text = why_not(where)
    assert f"there is no learner {where!r}" in text
    assert "digits, line, toy" in text


def test_a_file_that_is_not_there_is_said_to_be_absent(tmp_path: Path) -> None:
    assert "there is no learner file 'gone.py'" in why_not("gone.py")
    (tmp_path / "folder.py").mkdir()
    assert "there is no learner file 'folder.py'" in why_not("folder.py")


def test_missing_functions_are_named(tmp_path: Path) -> None:
    where = written(tmp_path / "half.py", "def model(): ...\ntrain = 3\ndef data(source): ...\n")
    assert "has no function train, evaluate:" in why_not(where)


def test_a_model_that_is_a_module_and_no_function_is_told_what_to_write(tmp_path: Path) -> None:
    instance = GOOD + "\nfrom torch import nn\nmodel = nn.Linear(2, 1)\n"
    assert "is a module already: write `def model(): return" in why_not(written(tmp_path / "made.py", instance))
    kind = GOOD + "\nfrom torch import nn\nclass model(nn.Linear):\n    def __init__(self): super().__init__(2, 1)\n"
    assert load(written(tmp_path / "kind.py", kind)).name == "kind"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1 / 0", "ZeroDivisionError: division by zero ← bad.py line 1, in <module>: x = 1 / 0"),
        ("def f(:", "SyntaxError: invalid syntax (bad.py, line 1)"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("import no_such_thing", "ModuleNotFoundError: No module named 'no_such_thing'"),
    ],
)
def test_a_learner_that_raises_on_import_says_where(tmp_path: Path, text: str, said: str) -> None:
    assert said in why_not(written(tmp_path / "bad.py", text))


def test_a_missing_extra_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "workers.learners.digits", raising=False)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    text = why_not("digits")
    assert "sklearn" in text
    assert "pip install 'fluffle[demo]'" in text


def test_a_learner_is_called_by_the_last_word_of_its_path() -> None:
    assert [learner_name(w) for w in ("toy", "a/b/mine.py", "pack.mod")] == ["toy", "mine", "mod"]


def test_what_is_told_of_an_error_is_short_and_valid_text() -> None:
    def deep(n: int) -> None:
        if n:
            deep(n - 1)
        raise ValueError("bad \udcff byte\n" * 1000)

    with pytest.raises(ValueError, match="bad") as caught:
        deep(20)
    text = told(caught.value)
    assert len(text) <= 2000
    assert len(text.encode()) >= len(text)
    assert "\n" not in text
    assert text.startswith("ValueError: bad ? byte bad")
    assert text.count("←") == 4


def test_an_error_deep_in_pythons_own_library_is_told_by_the_users_line() -> None:
    with pytest.raises(ValueError, match="Expecting") as caught:
        json.load(StringIO('{"x": 3,}'))
    (place,) = told(caught.value).split(" ← ")[1:]
    assert place.startswith("test_learner.py line ")
    assert "json.load(" in place


def test_an_error_without_a_message_is_told_by_its_type() -> None:
    assert told(KeyError()) == "KeyError"
    assert told(MemoryError()) == "MemoryError (it ran out of memory)"


MODEL = "import os\nfrom torch import nn\n" + GOOD + "def model(): return Odd(2, 1)\n"


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ("def state_dict(self): raise ValueError('no state')", "no state ← odd.py line 10, in state_dict"),
        ("def state_dict(self): return [1]", "state_dict() of the learner's model failed: AttributeError"),
        ("def __init__(self, *_): raise OSError('no weights')", "no weights ← odd.py line 10, in __init__"),
        ("def __init__(self, *_): raise BaseException('odd')", "odd ← odd.py line 10, in __init__"),
    ],
)
def test_whatever_a_model_does_when_a_run_is_made_is_one_sentence(tmp_path: Path, odd: str, said: str) -> None:
    learner = written(tmp_path / "odd.py", MODEL + f"class Odd(nn.Linear):\n    {odd}\n")
    with pytest.raises(UsageError) as caught:
        make_run(learner, tmp_path / "run", {})
    assert said in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("demo", "said"),
    [
        ("raise ValueError('no demo')", "failed: ValueError: no demo ← odd.py line 6, in demo"),
        ("return None", "failed: TypeError: 'NoneType' object is not iterable"),
        ("return {'workers': {'a': 'b'}}", "demo() of the learner odd: held_out is missing."),
        ("return {'workers': 3}", "demo() of the learner odd: workers must be a table of names and values."),
        (
            "return dict(workers={}, held_out=None, pooled=None, settings={}, rounds=1)",
            "workers must not be empty",
        ),
    ],
)
def test_whatever_a_demo_says_that_is_none_is_one_sentence(tmp_path: Path, demo: str, said: str) -> None:
    learner = written(tmp_path / "odd.py", f"{GOOD}def demo(workers, seed): {demo}\n")
    with pytest.raises(UsageError) as caught:
        _cast(learner, 2, [], 0)
    assert said in str(caught.value)


def test_a_learner_that_goes_elsewhere_leaves_us_where_we_were(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    written(tmp_path / "odd.py", "import os\nos.chdir('elsewhere')\n" + MODEL + "Odd = nn.Linear\n")
    cast = _cast("odd.py", 2, ["here", "there"], 0)
    assert cast.workers == {"worker-1": "here", "worker-2": "there"}
    store = make_run("odd.py", Path("run"), {"rounds": 1})
    assert _compare(store, cast) == {"alone": {"worker-1": {}, "worker-2": {}}, "pooled": None}
    assert Path.cwd() == tmp_path
    assert (tmp_path / "run" / "plan.toml").exists()
