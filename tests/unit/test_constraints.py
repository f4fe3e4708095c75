"""What is installed for tests and users is pinned, exactly, and nothing else is."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PINS = {
    canonicalize_name(line.split("==")[0]): line.split("==")[1].strip()
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
}
CUDA = re.compile(r"nvidia|cuda|triton|pip$|setuptools$")  # what torch's builds differ in, and what venv brings


def test_every_pin_is_one_exact_version() -> None:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line), line


def test_everything_that_a_requirement_brings_is_pinned_and_within_what_pyproject_allows() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [
        Requirement(line) for line in [*project["dependencies"], *extras["demo"], *extras["dp"], *extras["dev"]]
    ]
    seen = set()
    while wanted:
        each = wanted.pop()
        name = canonicalize_name(each.name)
        if (each.marker and not each.marker.evaluate({"extra": ""})) or CUDA.match(name):
            continue
        assert name in PINS, f"{name} is not pinned"
        assert each.specifier.contains(PINS[name]), f"{name} {PINS[name]} is not {each.specifier}"
        if name in seen:
            continue
        seen.add(name)
        wanted += map(Requirement, metadata.requires(name) or [])
    assert seen <= PINS.keys()
