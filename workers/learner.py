"""Finding the user's learner and checking that it has the functions which a worker calls.

Knows names, files and modules, and how an exception of the user's is told in one line. Does not know torch, tasks or
weights: what the functions take and give is checked where they are called (`task.py`).
"""

import importlib
import importlib.util
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

import workers.learners
from broker.errors import FluffleError, LearnerFailed, OutOfMemory, UsageError

EXAMPLES = tuple(sorted(module.name for module in pkgutil.iter_modules(workers.learners.__path__)))
FUNCTIONS = ("model", "data", "train", "evaluate")
EXTRAS = {"sklearn": "demo", "matplotlib": "demo", "opacus": "dp"}  # module → the extra of ours that brings it
TEXT_LENGTH_MAX = 2000
FRAMES_MAX = 4


@dataclass(frozen=True, slots=True)
class Learner:
    """What is learned and how: the functions of the user's file.

    Attributes:
        name: the example's, file's or module's own name, without folder or package.
        model: () → a fresh torch module, the same shape every time.
        data: (source) → whatever train and evaluate want; called once for each source in a process.
        train: (model, data, settings) → examples, or (examples, metrics); changes the model in place.
        evaluate: (model, data) → metrics, such as loss, accuracy and examples.
        file: SHA-256 of its file, in hex; empty if it has none. What it imports is not in it.
        demo: (workers, seed) → the sources and settings of a demonstration, where the file offers one.
    """

    name: str
    model: Callable[[], Any]
    data: Callable[[str], Any]
    train: Callable[[Any, Any, dict[str, Any]], Any]
    evaluate: Callable[[Any, Any], Any]
    file: str = ""
    demo: Callable[[int, int], dict[str, Any]] | None = None


def load(where: str) -> Learner:
    """The learner called `where`: an example's name, a file ending in .py, or a module's dotted name.

    Runs the file. Its folder (for a module: the current one) joins the end of `sys.path`, so that it can import what
    lies beside it but never hides an installed package.

    Raises:
        UsageError: not found, cannot be imported, or lacks one of the four functions.
    """
    with blaming(f"the learner {where!r} cannot be imported:"):
        module = _module(where)
    missing = [name for name in FUNCTIONS if not callable(getattr(module, name, None))]
    if missing:
        raise UsageError(f"the learner {where!r} has no function {', '.join(missing)}: see workers/learners/.")
    functions = {name: getattr(module, name) for name in FUNCTIONS}
    if hasattr(functions["model"], "state_dict") and not isinstance(functions["model"], type):
        raise UsageError(f"the model of the learner {where!r} is a module already: write `def model(): return …`.")
    demo = getattr(module, "demo", None)
    file = sha256(Path(module.__file__).read_bytes()).hexdigest() if module.__file__ else ""
    return Learner(name=learner_name(where), **functions, file=file, demo=demo if callable(demo) else None)


@contextmanager
def blaming(what: str, error: type[FluffleError] = UsageError) -> Iterator[None]:
    """Turn whatever the user's code raises in here into an error that begins with `what` and says where that was.

    Ctrl-C stays what it is: where a learner is called at the command line, it is no failure of the learner's.
    """
    try:
        yield
    except (FluffleError, KeyboardInterrupt):
        raise
    except BaseException as problem:  # noqa: BLE001 (sys.exit in a learner is its failure, not the process's end)
        kind = OutOfMemory if error is LearnerFailed and out_of_memory(problem) else error
        raise kind(f"{what} {told(problem)}") from None


def learner_name(where: str) -> str:
    """What a learner is called on the wire: the last word of its path or dotted name."""
    return Path(where).stem if where.endswith(".py") else where.rpartition(".")[2]


def told(problem: BaseException) -> str:
    """The exception in one line: its type, its message, and where in the user's code it was raised.

    The text is valid UTF-8 and has at most 2000 characters.
    """
    package = str(getattr(problem, "name", "")).partition(".")[0]
    if isinstance(problem, ModuleNotFoundError) and package in EXTRAS:
        return f"it needs {package}, install it with: pip install 'fluffle[{EXTRAS[package]}]'"
    kind = type(problem).__name__ + (" (it ran out of memory)" if out_of_memory(problem) else "")
    try:
        message = " ".join(str(problem).split())
    except Exception:  # noqa: BLE001 (an exception of the user's may fail even at this)
        message = "its message cannot be read"
    text = f"{kind}: {message[: TEXT_LENGTH_MAX // 2]}" if message else kind
    text += "".join(f" ← {where}" for where in _frames(problem))
    return text.encode("utf-8", "replace").decode()[:TEXT_LENGTH_MAX]


def out_of_memory(problem: BaseException) -> bool:
    """Whether there was no memory for what the user's code wanted; torch says so in several ways."""
    if isinstance(problem, MemoryError) or type(problem).__name__ == "OutOfMemoryError":
        return True
    try:
        said = str(problem) if isinstance(problem, RuntimeError) else ""
    except Exception:  # noqa: BLE001 (an exception of the user's may fail even at this)
        return False
    return any(words in said for words in ("can't allocate memory", "not enough memory", "out of memory"))


def _module(where: str) -> ModuleType:
    if where in EXAMPLES:
        return importlib.import_module(f"workers.learners.{where}")
    if where.endswith(".py"):
        return _module_of_file(Path(where))
    _let_import_from(Path.cwd())
    try:
        return importlib.import_module(where)
    except (ModuleNotFoundError, TypeError, ValueError) as problem:
        # a dotted name fails with the first word that is not there; any other name is what the learner itself lacks
        absent = problem.name if isinstance(problem, ModuleNotFoundError) else where
        if absent is None or not f"{where}.".startswith(f"{absent}."):
            raise
    raise UsageError(f"there is no learner {where!r}: name an example ({', '.join(EXAMPLES)}), a file.py or module.")


def _module_of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError(f"there is no learner file {str(path)!r}: check the path, seen from {str(Path.cwd())!r}.")
    _let_import_from(path.resolve().parent)
    # never the name of another module; its own, if that leads here, so that processes it starts find what it defines
    name = path.stem if _leads_to(path) else f"learner_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a module up by its name
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _leads_to(path: Path) -> bool:
    """Whether whoever imports the file's name gets this file."""
    with suppress(ImportError, ValueError, TypeError, OSError):  # a name with a dot, a module without a file
        return path.samefile(getattr(importlib.util.find_spec(path.stem), "origin", ""))
    return False


def _let_import_from(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _frames(problem: BaseException) -> list[str]:
    """Where it was raised, innermost first, in the user's own files where they appear at all."""
    frames = traceback.extract_tb(problem.__traceback__)
    ours, pythons = Path(__file__).parent, str(Path(traceback.__file__).parent)
    theirs = [f for f in frames if Path(f.filename).parent != ours and "importlib" not in f.filename]
    users = [f for f in theirs if "site-packages" not in f.filename and pythons not in f.filename] or theirs
    return [_told_frame(frame) for frame in reversed(users[-FRAMES_MAX:])]


def _told_frame(frame: traceback.FrameSummary) -> str:
    place = f"{Path(frame.filename).name} line {frame.lineno}, in {frame.name}"
    code = " ".join((frame.line or "").split())
    # a raise says nothing that the message has not said
    return place if not code or code.startswith("raise ") else f"{place}: {code[:160]}"
