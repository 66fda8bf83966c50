"""What the roles of a development stack are told: the stack's word first, and nothing that stands against it."""

from pathlib import Path

import pytest

from engine.settings import load_settings
from ops.dev.environment import roles_environment

OURS = {"SEAMARK_NATS_URL": "nats://ours", "SEAMARK_JWT_SECRET": "ours", "SEAMARK_PROFILE": "dev"}
IN_THE_WAY = {
    "SEAMARK_HEALTH_PORT": "9100",
    "SEAMARK_JWT_ISSUER": "issuer",
    "SEAMARK_JWT_AUDIENCE": "audience",
    "SEAMARK_JWKS_URL": "https://issuer/jwks",
    "SEAMARK_PARTITIONS": "8",
}


def as_files(folder: Path) -> dict[str, str]:
    for name, value in IN_THE_WAY.items():
        (folder / name).write_text(value)
    return {f"{name}_FILE": str(folder / name) for name in IN_THE_WAY}


def as_settings_file(folder: Path) -> dict[str, str]:
    lines = [f'{name.removeprefix("SEAMARK_").lower()} = "{value}"\n' for name, value in IN_THE_WAY.items()]
    (folder / "settings.toml").write_text("".join(lines))
    return {"SEAMARK_SETTINGS": str(folder / "settings.toml")}


@pytest.mark.parametrize("left", [lambda _: IN_THE_WAY, as_files, as_settings_file], ids=["values", "files", "toml"])
def test_what_was_left_in_the_shell_does_not_reach_the_roles(left, tmp_path: Path) -> None:
    env = roles_environment(OURS, {"PATH": "/bin", **left(tmp_path)})
    assert env == {"PATH": "/bin", **OURS}


def test_the_stack_is_believed_before_whatever_else_says_the_same(tmp_path: Path) -> None:
    secret, file = tmp_path / "secret", tmp_path / "settings.toml"
    secret.write_text("theirs")
    file.write_text('nats_url = "nats://theirs"\n')
    env = roles_environment(OURS, {"SEAMARK_JWT_SECRET_FILE": str(secret), "SEAMARK_SETTINGS": str(file)})
    found = load_settings(env)
    assert found.jwt_secret is not None
    assert (found.nats_url.reveal(), found.jwt_secret.reveal()) == ("nats://ours", "ours")


def test_what_may_count_is_passed_on_however_it_was_said(tmp_path: Path) -> None:
    password, file = tmp_path / "password", tmp_path / "settings.toml"
    password.write_text("pw\n")
    file.write_text('origins = ["https://a", "https://b"]\nhandshakes_per_minute = 5\n')
    env = roles_environment(
        OURS,
        {
            "SEAMARK_NATS_USER": "dev",
            "SEAMARK_NATS_PASSWORD_FILE": str(password),
            "SEAMARK_NATS_FILES": "/files",
            "SEAMARK_SETTINGS": str(file),
        },
    )
    found = load_settings(env)
    assert found.nats_password is not None
    assert (found.nats_user, found.nats_password.reveal()) == ("dev", "pw")
    assert (found.origins, found.handshakes_per_minute) == (("https://a", "https://b"), 5)
    assert env["SEAMARK_NATS_FILES"] == "/files"
