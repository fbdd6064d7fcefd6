"""Signatures: who signed is said, and what was changed, signed by another or renamed is refused."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from edge_compress.pipeline.errors import InputError, UnavailableError, VerifyError
from edge_compress.pipeline.release import signing

minisign = pytest.importorskip("minisign", reason="signatures need the extra [release]")
TOOL = shutil.which("minisign")
PASSWORD = "correct horse"


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A folder with key, key.pub and, with a password, locked, and their bundle."""
    pair = minisign.KeyPair.generate()
    (tmp_path / "key.pub").write_bytes(bytes(pair.public_key) + b"\n")
    (tmp_path / "key").write_bytes(bytes(pair.secret_key) + b"\n")
    pair.secret_key.encrypt(PASSWORD)
    (tmp_path / "locked").write_bytes(bytes(pair.secret_key) + b"\n")
    (tmp_path / "x.tar.gz").write_bytes(b"a bundle")
    return tmp_path


def signed(folder: Path, key: str = "key", name: str = "x.tar.gz") -> Path:
    data = (folder / name).read_bytes()
    (folder / f"{name}.minisig").write_bytes(signing.signer(folder / key, lambda: PASSWORD)(name, data))
    return folder / name


def test_what_is_signed_says_by_whom(keys: Path) -> None:
    bundle = signed(keys)
    text = signing.check(bundle, str(keys / "key.pub"))
    bare = (keys / "key.pub").read_text().splitlines()[1]
    assert text.startswith("signed with key ")
    key_id = text.split()[3]
    assert len(key_id) == 16
    assert text.endswith("signed comment: file:x.tar.gz")
    assert key_id in signing.check(bundle, bare)  # the key itself, as in minisign's -P


def test_the_same_bytes_are_signed_alike(keys: Path) -> None:
    assert signed(keys).with_name("x.tar.gz.minisig").read_bytes() == signed(keys).with_name("x.tar.gz.minisig").read_bytes()


def test_a_key_with_a_password_asks_for_it(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signing.check(signed(keys, "locked"), str(keys / "key.pub"))
    with pytest.raises(InputError, match="--sign"):
        signing.signer(keys / "locked", lambda: "wrong")
    monkeypatch.setenv(signing.PASSWORD, PASSWORD)
    signing.signer(keys / "locked", lambda: pytest.fail("asked"))


def test_flipped_bits_of_bundle_and_signature_are_found(keys: Path) -> None:
    bundle = signed(keys)
    for path in (bundle, bundle.with_name("x.tar.gz.minisig")):
        whole = path.read_bytes()
        comment = whole.index(b"\n") if path != bundle else 0  # the first comment of a signature is not signed
        bits = random.Random(0).sample(range(8 * comment, 8 * len(whole)), 64 if path == bundle else 400)
        for bit in bits:
            changed = bytearray(whole)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            with pytest.raises(VerifyError):
                signing.check(bundle, str(keys / "key.pub"))
        path.write_bytes(whole)


def test_another_key_another_name_and_no_signature_are_refused(keys: Path) -> None:
    bundle = signed(keys)
    other = minisign.KeyPair.generate()
    (keys / "other.pub").write_bytes(bytes(other.public_key) + b"\n")
    with pytest.raises(VerifyError, match="does not hold"):
        signing.check(bundle, str(keys / "other.pub"))
    shutil.copy(bundle, keys / "y.tar.gz")
    shutil.copy(keys / "x.tar.gz.minisig", keys / "y.tar.gz.minisig")
    with pytest.raises(VerifyError, match="of another file"):
        signing.check(keys / "y.tar.gz", str(keys / "key.pub"))
    (keys / "x.tar.gz.minisig").unlink()
    with pytest.raises(VerifyError, match="is not signed"):
        signing.check(bundle, str(keys / "key.pub"))
    assert signing.seen(bundle) is None
    (keys / "x.tar.gz.minisig").write_text("nothing")
    with pytest.raises(VerifyError, match="not a signature"):
        signing.check(bundle, str(keys / "key.pub"))
    assert "not checked" in str(signing.seen(bundle))


@pytest.mark.parametrize("key", ["absent", "key.pub"])
def test_what_is_no_secret_key_is_wrong_input(key: str, keys: Path) -> None:
    with pytest.raises(InputError, match="--sign") as caught:
        signing.signer(keys / key, lambda: PASSWORD)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["absent", "key", "x.tar.gz", "RWQ"])
def test_what_is_no_public_key_is_wrong_input(key: str, keys: Path) -> None:
    bundle = signed(keys)
    with pytest.raises(InputError, match="--public-key"):
        signing.check(bundle, str(keys / key) if (keys / key).exists() else key)


def test_without_the_library_it_is_said_what_is_missing(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signing, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match=r"\[release\]"):
        signing.check(keys / "x.tar.gz", str(keys / "key.pub"))
    with pytest.raises(UnavailableError, match=r"\[release\]"):
        signing.signer(keys / "key", lambda: PASSWORD)


@pytest.mark.skipif(TOOL is None, reason="minisign itself is not installed")
def test_minisign_itself_checks_what_is_signed_here_and_the_other_way_round(keys: Path) -> None:
    assert TOOL is not None
    bundle = signed(keys)
    done = subprocess.run([TOOL, "-Vm", str(bundle), "-p", str(keys / "key.pub")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "file:x.tar.gz" in done.stdout
    subprocess.run([TOOL, "-GW", "-p", str(keys / "theirs.pub"), "-s", str(keys / "theirs")], check=True, capture_output=True)
    subprocess.run([TOOL, "-Sm", str(bundle), "-s", str(keys / "theirs"), "-t", "made by hand"], check=True, capture_output=True)
    text = signing.check(bundle, str(keys / "theirs.pub"))
    assert "made by hand" in text
    assert text.split()[3] in (keys / "theirs.pub").read_text()
    signed(keys, "theirs")
    subprocess.run([TOOL, "-Vm", str(bundle), "-p", str(keys / "theirs.pub")], check=True, capture_output=True)


def test_the_bytes_that_are_signed_are_the_ones_given_not_what_the_file_has_by_then(keys: Path) -> None:
    bundle = signed(keys)
    whole = bundle.read_bytes()
    bundle.write_bytes(b"another bundle")
    assert signing.check(bundle, str(keys / "key.pub"), whole).startswith("signed with key ")
    with pytest.raises(VerifyError, match="does not hold"):
        signing.check(bundle, str(keys / "key.pub"))


@pytest.mark.timeout(20)
def test_a_pipe_or_a_device_in_place_of_a_bundle_is_refused(keys: Path) -> None:
    bundle = signed(keys)
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        bundle.unlink()
        make(bundle)
        with pytest.raises(InputError, match="not a regular file"):
            signing.check(bundle, str(keys / "key.pub"))
