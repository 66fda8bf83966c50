"""`seamark token`: a user's token of the development stack."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from ops.cli.output import print_json
from ops.cli.target import DATA_FOLDER, Folder, Json, Tenant, read_dev_file
from seamark.protocol.subjects import encode_user


def token(
    user: Annotated[str, typer.Argument(help="Whose token.")],
    seconds: Annotated[int, typer.Option("--seconds", help="How long it is valid.", min=1)] = 86_400,
    tenant: Tenant = None,
    folder: Folder = DATA_FOLDER,
    as_json: Json = False,
) -> None:
    """Print a token that the development stack's gateway accepts."""
    stack = read_dev_file(folder)
    signed = sign(stack.jwt_secret, tenant or stack.tenant, user, seconds)
    if as_json:
        print_json({"token": signed, "user": user, "tenant": tenant or stack.tenant, "expires_in_seconds": seconds})
    else:
        typer.echo(signed)


def sign(secret: str, tenant: str, user: str, seconds: int) -> str:
    """A JWT as the gateway takes it (HS256).

    Raises:
        InvalidToken: no user can be called so.
    """
    import jwt

    encode_user(user)  # a gateway would refuse the token
    now = int(time.time())
    return jwt.encode({"sub": user, "tenant": tenant, "iat": now, "exp": now + seconds}, secret, algorithm="HS256")
