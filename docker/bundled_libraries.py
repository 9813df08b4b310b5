"""Adds shared libraries in wheels to a CycloneDX inventory: `bundled_libraries.py SITE_PACKAGES SBOM.json`.

The licence of a wheel does not cover the codecs that it contains. NOTICE lists their licences.
"""

import json
import re
import sys
from pathlib import Path

LICENSES = {
    "libx264": "GPL-2.0-or-later",
    "libx265": "GPL-2.0-or-later",
    "libvpx": "BSD-3-Clause",
    "libwebp": "BSD-3-Clause",
    "libwebpmux": "BSD-3-Clause",
    "libsharpyuv": "BSD-3-Clause",
    "libopus": "BSD-3-Clause",
    "libdav1d": "BSD-2-Clause",
    "libSvtAv1Enc": "BSD-3-Clause-Clear",
    "libmp3lame": "LGPL-2.0-or-later",
    "libopencore-amrnb": "Apache-2.0",
    "libopencore-amrwb": "Apache-2.0",
    "libvpl": "MIT",
    "libgnutls": "LGPL-2.1-or-later",
    "libnettle": "LGPL-3.0-or-later OR GPL-2.0-or-later",
    "libhogweed": "LGPL-3.0-or-later OR GPL-2.0-or-later",
    "libgmp": "LGPL-3.0-or-later OR GPL-2.0-or-later",
    "libunistring": "LGPL-3.0-or-later OR GPL-2.0-or-later",
}
FFMPEG = re.compile(r"lib(av(codec|device|filter|format|util)|swscale|swresample|postproc)")
FFMPEG_LICENSES = {"av": "LGPL-3.0-or-later", "decord": "LicenseRef-nonfree-and-unredistributable"}
"""Licences that `avcodec_license()` of the bundled FFmpeg reports."""
FILE = re.compile(r"(?P<name>lib[A-Za-z0-9+-]+?)(-[0-9a-f]{8})?\.so\.?(?P<version>[0-9.]*)")


def bundled(site_packages: Path) -> list[dict[str, object]]:
    """A component for each shared library in a folder <wheel>.libs."""
    found = []
    for path in sorted(site_packages.glob("*.libs/*.so*")):
        wheel, match = path.parent.name.removesuffix(".libs"), FILE.fullmatch(path.name)
        name, version = (match["name"], match["version"]) if match else (path.name, "")
        component: dict[str, object] = {"type": "library", "name": name, "version": version}
        component["properties"] = [{"name": "bundled-in-wheel", "value": wheel}]
        license = FFMPEG_LICENSES.get(wheel) if FFMPEG.fullmatch(name) else LICENSES.get(name)
        if license:
            component["licenses"] = [{"expression": license}]
        found.append(component)
    return found


def main(site_packages: Path, sbom: Path) -> None:
    inventory = json.loads(sbom.read_text(encoding="utf-8"))
    inventory.setdefault("components", []).extend(bundled(site_packages))
    sbom.write_text(json.dumps(inventory, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
