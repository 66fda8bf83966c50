"""What the roles of a development stack find in their environment: the stack's word, then the user's where it may count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Final

from engine.settings import FILE_VARIABLE, Settings, given_variables, variable_of
from ops.cli.gateway import SHARED_VARIABLE
from ops.siblings import UP_VARIABLE

_NOT_FOR_ROLES: Final = frozenset(
    {
        "SEAMARK_JWKS_URL",  # the stack signs tokens with a secret of its own
        "SEAMARK_JWT_ISSUER",  # what tokens must carry: the stack's carry neither
        "SEAMARK_JWT_AUDIENCE",
        "SEAMARK_PARTITIONS",  # the stack has made its topology itself
        "SEAMARK_HEALTH_PORT",  # three roles cannot have one port
    }
)
"""Meant for something else, and left in the shell or the settings file: here they would stand against what the stack prints."""

_NOT_INHERITED: Final = frozenset({FILE_VARIABLE, "SEAMARK_FOLDER", SHARED_VARIABLE, UP_VARIABLE})


def roles_environment(ours: Mapping[str, str], env: Mapping[str, str]) -> dict[str, str]:
    """The environment of a role.

    Every setting is given as its value, whether it came from a variable, from a file or from the settings file, so that
    no other way to say it stands against `ours`.

    Args:
        ours: what the stack says; it wins.
        env: the stack's own environment.

    Raises:
        InvalidSetting: a file that `env` names cannot be read.
    """
    settings = {variable_of(entry.name) for entry in fields(Settings)}
    rest = {
        name: value
        for name, value in env.items()
        if name.removesuffix("_FILE") not in settings and name not in _NOT_INHERITED
    }
    given = {name: value for name, value in given_variables(env).items() if name not in _NOT_FOR_ROLES}
    return {**rest, **given, **ours}
