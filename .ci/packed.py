"""What the wheel and the sdist in a folder hold: all of the package, nothing else by chance, no path of this machine.

python .ci/packed.py FOLDER_OF_BOTH
"""

import email
import re
import sys
import tarfile
import zipfile
from pathlib import Path

from readme_renderer import markdown

ROOT = Path(__file__).parents[1]
BESIDE = {"CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md", "SECURITY.md", "constraints.txt", "pyproject.toml"}
MADE = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}


def require(what: str, names: set[str], expected: set[str]) -> None:
    """End unless `what` holds the files expected."""
    if names != expected:
        sys.exit(f"{what} lacks {sorted(expected - names)} and must not hold {sorted(names - expected)}")


def main(folder: str) -> None:
    """Look into both."""
    [wheel], [sdist] = Path(folder).glob("*.whl"), Path(folder).glob("*.tar.gz")
    name, version = wheel.name.split("-")[:2]
    with zipfile.ZipFile(wheel) as file:
        in_wheel = {each: file.read(each) for each in file.namelist()}
    with tarfile.open(sdist) as file:
        files = [each for each in file.getmembers() if each.isfile()]
        in_sdist = {each.name.removeprefix(f"{name}-{version}/"): file.extractfile(each).read() for each in files}

    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    require(wheel.name, set(in_wheel), package | {f"{name}-{version}.dist-info/{each}" for each in MADE})
    require(sdist.name, set(in_sdist), package | BESIDE | {"PKG-INFO", ".gitignore"})
    for each, content in [*in_wheel.items(), *in_sdist.items()]:
        if str(ROOT).encode() in content:
            sys.exit(f"{each} must not name {ROOT}")
    page = markdown.render(email.message_from_bytes(in_wheel[f"{name}-{version}.dist-info/METADATA"]).get_payload())
    if broken := re.findall(r'(?:href|src)="(?!https?:|#)([^"]*)"', page):
        sys.exit(f"the long description must link to no file, got {broken}")
    print(f"{wheel.name}, {sdist.name}: {len(package)} files of the package in both")


if __name__ == "__main__":
    main(*sys.argv[1:])
