"""A certificate of Amazon's is kept only if it came whole: what is kept decides on every report from then on."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from engine.channels.exchange import open_http
from gateway.providers import certificates
from gateway.providers.certificates import CERTIFICATE_BYTES_MAX, Certificates, Unfetched

Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture(scope="module")
def pem() -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "sns.amazonaws.com")])
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
    now = datetime.now(UTC)
    dated = made.not_valid_before(now - timedelta(days=9)).not_valid_after(now + timedelta(days=9))
    return dated.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@asynccontextmanager
async def amazon(*answers: Answer) -> AsyncIterator[tuple[Certificates, str]]:
    """What asks, and where: each request gets the next answer, over a connection of its own."""
    left, serving = list(answers), set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.add(asyncio.current_task())
        try:
            await reader.readuntil(b"\r\n\r\n")
            await left.pop(0)(writer)
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    asking = Certificates(open_http(connections_max=4))
    try:
        yield asking, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/x.pem"
    finally:
        await asking.close()
        server.close()
        await asyncio.gather(*serving)


def saying(*parts: bytes, length: int | None = None, status: str = "200 OK") -> Answer:
    async def say(writer: asyncio.StreamWriter) -> None:
        said = sum(len(part) for part in parts) if length is None else length
        writer.write(b"HTTP/1.1 %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % (status.encode(), said))
        for part in parts:
            if writer.is_closing():  # who asked has gone: uvloop's transport would raise a RuntimeError
                return
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.05)  # so that it is another segment

    return say


async def test_a_certificate_that_comes_in_pieces_is_read_to_its_end(pem: bytes) -> None:
    async with amazon(saying(pem[:100], pem[100:300], pem[300:])) as (asking, url):
        assert await asking.get(url) == pem
        assert await asking.get(url) == pem  # of which the second asks nobody


@pytest.mark.parametrize("bad", ["cut", "no certificate", "cut PEM", "too large", "error"])
async def test_what_is_no_whole_certificate_is_not_kept(pem: bytes, bad: str) -> None:
    answer = {
        "cut": saying(pem[:300], length=len(pem)),
        "no certificate": saying(b"<html>come again</html>"),
        "cut PEM": saying(pem[:300]),
        "too large": saying(pem + b"\n" * CERTIFICATE_BYTES_MAX),
        "error": saying(pem, status="503 Slow Down"),
    }[bad]
    async with amazon(answer, saying(pem)) as (asking, url):
        with pytest.raises(Unfetched):
            await asking.get(url)
        assert await asking.get(url) == pem


async def test_whoever_sends_a_certificate_byte_by_byte_is_not_waited_for(
    pem: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificates, "FETCH_SECONDS", 0.3)
    async with amazon(saying(*(pem[at : at + 1] for at in range(40))), saying(pem)) as (asking, url):
        with pytest.raises(Unfetched):
            await asking.get(url)
        assert await asking.get(url) == pem


async def test_a_topic_is_confirmed_by_the_status_of_the_answer() -> None:
    async with amazon(saying(b"<ConfirmSubscriptionResponse>", b"</...>"), saying(b"", status="404 Not Found")) as (
        asking,
        url,
    ):
        await asking.confirm(url)
        with pytest.raises(Unfetched):
            await asking.confirm(url)
