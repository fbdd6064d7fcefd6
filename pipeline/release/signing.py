"""Signatures of bundles in minisign's format (Ed25519 over BLAKE2b): a file NAME.minisig beside the bundle.

Keys are made with `minisign -G`; the same tool checks what is signed here, and the other way round. Format: Denis 2015,
https://jedisct1.github.io/minisign/.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import InputError, UnavailableError, VerifyError, install_hint
from ..files import read_regular
from .archive import read_whole

SUFFIX = ".minisig"
PASSWORD = "EDGE_COMPRESS_KEY_PASSWORD"  # noqa: S105 - the variable's name
_MOST = 1 << 20  # bytes of a key, or of a signature
Sign = Callable[[str, bytes], bytes]  # (file name, its bytes) -> the signature file


def signer(key: Path, ask: Callable[[], str]) -> Sign:
    """Returns a function that signs with a secret key file; the trusted comment is the signed file's name.

    `ask` gives the key's password where it has one and the environment variable is not set.

    Raises:
        UnavailableError: the library is not installed.
        InputError: no key, or the wrong password.
    """
    _require()
    import minisign

    try:
        secret = minisign.SecretKey.from_bytes(read_regular(key, _MOST))
        if secret.is_encrypted():
            secret.decrypt(os.environ.get(PASSWORD) or ask())
    except (OSError, ValueError, minisign.Error) as error:
        found = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(
            f"--sign {key}", found=found or type(error).__name__, expected="a minisign secret key and its password"
        ) from error

    def sign(name: str, data: bytes) -> bytes:
        return bytes(secret.sign(data, trusted_comment=f"file:{name}", untrusted_comment="signature of an edge-compress bundle"))

    return sign


def check(bundle: Path, public_key: str, data: bytes | None = None) -> str:
    """Checks the signature beside a bundle against a public key (a file, or the key itself); names the signer.

    `data` is what is to be signed: the bundle's bytes, which must not be read from the file again afterwards.

    Raises:
        UnavailableError: the library is not installed.
        InputError: no such key, or no such bundle.
        VerifyError: there is no signature, or it is another key's, or of other bytes, or of a file with another name.
    """
    _require()
    import minisign

    try:
        file = Path(public_key)
        key = minisign.PublicKey.from_file(file) if file.is_file() else minisign.PublicKey.from_base64(public_key)
    except (OSError, ValueError, minisign.Error) as error:
        raise InputError(
            f"--public-key {public_key}", found=str(error), expected="a minisign public key, or a file with one"
        ) from error
    signature = _signature(bundle)
    data = read_whole(bundle) if data is None else data
    try:
        key.verify(data, signature)
    except minisign.Error as error:
        raise VerifyError(f"{bundle.name}: the signature does not hold", found=str(error), do="do not use it") from error
    said = signature.trusted_comment
    if said.startswith("file:") and said.removeprefix("file:").partition("\t")[0] != bundle.name:
        raise VerifyError(f"{bundle.name}: the signature is of another file", found=said)
    named = f" ({key.untrusted_comment})" if key.untrusted_comment else ""
    return f"signed with key {_key_id(bytes(signature))}{named}; signed comment: {said}"


def seen(bundle: Path) -> str | None:
    """A remark on a signature that is not checked for lack of a key; None without a signature."""
    if not bundle.with_name(bundle.name + SUFFIX).is_file():
        return None
    return "there is a signature, which was not checked: give --public-key"


def _signature(bundle: Path) -> Any:
    import minisign

    file = bundle.with_name(bundle.name + SUFFIX)
    try:
        data = read_regular(file, _MOST)
        signature = minisign.Signature.from_bytes(data)
        if bytes(signature) != data.removesuffix(b"\n"):  # base64 has spare bits, and the parser is lenient
            raise ValueError("not written as minisign writes it")
        return signature
    except FileNotFoundError as error:
        raise VerifyError(f"{bundle.name} is not signed", expected=f"{file.name} beside it") from error
    except (OSError, ValueError, minisign.Error) as error:
        raise VerifyError(f"{file.name} is not a signature", found=str(error)) from error


def _key_id(signature: bytes) -> str:
    """As minisign prints it: the eight bytes after the algorithm, last one first."""
    return base64.b64decode(signature.splitlines()[1])[2:10][::-1].hex().upper()


def _require() -> None:
    if find_spec("minisign") is None:
        raise UnavailableError("signatures need py-minisign", do=install_hint("release"))
