"""The inventory and NOTICE list the codecs in wheels."""

import ctypes
import importlib.util
import json
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

from tests.helpers.paths import ROOT

SITE_PACKAGES = Path(sysconfig.get_path("purelib"))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bundled_libraries", ROOT / "docker" / "bundled_libraries.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_inventory_names_codecs_with_their_licences(script: ModuleType, tmp_path: Path) -> None:
    sbom = tmp_path / "sbom.json"
    sbom.write_text('{"components": [{"name": "av"}]}')
    script.main(SITE_PACKAGES, sbom)
    found = json.loads(sbom.read_text())["components"]
    named = {
        (item["name"], item["properties"][0]["value"]): item["licenses"][0]["expression"]
        for item in found
        if "licenses" in item
    }
    assert found[0] == {"name": "av"}
    assert named["libx264", "av"] == named["libx264", "decord"] == named["libx265", "av"] == "GPL-2.0-or-later"
    assert named["libavcodec", "decord"] == "LicenseRef-nonfree-and-unredistributable"


def test_notice_lists_every_bundled_library_and_licence(script: ModuleType) -> None:
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    inside = {item["name"]: item for item in script.bundled(SITE_PACKAGES)}
    for name, license in script.LICENSES.items():
        assert name in inside, name
        if "webp" not in name and "sharpyuv" not in name:
            assert name in notice
        assert license.split(" ")[0] in notice


def test_the_licence_of_ffmpeg_matches_notice() -> None:
    for wheel, license in {"av": "LGPL version 3 or later", "decord": "nonfree and unredistributable"}.items():
        importlib.import_module(wheel)  # loads the libraries that libavcodec needs
        (library,) = (SITE_PACKAGES / f"{wheel}.libs").glob("libavcodec*")
        function = ctypes.CDLL(str(library)).avcodec_license
        function.restype = ctypes.c_char_p
        assert function().decode() == license
        assert license in (ROOT / "NOTICE").read_text(encoding="utf-8")
