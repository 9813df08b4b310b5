"""Import names are unique, the lock matches pyproject.toml, and the wheel is complete."""

import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINNED = re.compile(r"^(\S+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", re.MULTILINE)
LOCKED = (ROOT / "requirements.lock").read_text()
LOCK = {canonicalize_name(name): version for name, version, _ in PINNED.findall(LOCKED)}


@pytest.mark.parametrize("name", ["cli", "pipelines", "components", "model"])
def test_no_other_distribution_owns_our_import_names(name: str) -> None:
    assert set(packages_distributions()[name]) == {"mplug-video"}


@pytest.mark.parametrize(
    "wanted",
    [*PROJECT["dependencies"], *(item for extra in PROJECT["optional-dependencies"].values() for item in extra)],
)
def test_the_lock_satisfies_pyproject(wanted: str) -> None:
    requirement = Requirement(wanted)
    assert LOCK[canonicalize_name(requirement.name)] in requirement.specifier


def test_the_lock_pins_one_version_with_hashes() -> None:
    assert PINNED.sub("", LOCKED).strip() == ""
    assert len(PINNED.findall(LOCKED)) == len(LOCK)
    assert all(re.fullmatch(r"[0-9][0-9a-z.!]*", version) for version in LOCK.values())
    assert LOCK["torch"] == "2.13.0"


def test_the_wheel_contains_every_module_preset_and_template(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        ".",
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    sources = {
        path.relative_to(ROOT).as_posix()
        for package in ("cli", "pipelines", "components", "model")
        for path in (ROOT / package).rglob("*")
        if path.suffix in {".py", ".yaml", ".j2", ".json"}
    }
    assert sources <= packed
