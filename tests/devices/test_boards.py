"""Boards are found by file, and a wrong file is named."""

from pathlib import Path

import pytest
from edge_compress.devices import board as boards
from edge_compress.devices.folders import user_cache
from edge_compress.pipeline.errors import InputError, UnavailableError

GOOD = 'targets = ["x86"]\ntransport = "local"\n'


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    folder = tmp_path / "edge-compress" / "devices"
    folder.mkdir(parents=True)
    return folder


def test_every_shipped_board_can_be_read():
    assert "local" in boards.names()
    for name in boards.names():
        assert boards.load(name).name == name


def test_local_is_this_machine_with_one_thread():
    board = boards.load("local")
    assert (board.transport, board.runtime, board.threads, board.affinity) == ("local", "onnxruntime", 1, None)
    assert "x86" in board.targets
    assert board.file.endswith("local.toml")


def test_own_boards_are_found_and_win_over_shipped_ones(own_folder):
    (own_folder / "bench.toml").write_text(GOOD + "threads = 2\naffinity = [0, 1]\n")
    (own_folder / "local.toml").write_text(GOOD + "threads = 4\n")
    assert {"bench", "local"} < set(boards.names())
    assert boards.load("bench").affinity == (0, 1)
    assert boards.load("local").threads == 4


def test_board_by_path(tmp_path):
    path = tmp_path / "my-board.toml"
    path.write_text(GOOD)
    assert boards.load(path).name == "my-board"
    assert boards.load(str(path)).file == str(path)


def test_unknown_board_names_those_that_are_known():
    with pytest.raises(InputError, match=r"'nope'.*local"):
        boards.load("nope")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"gone\.toml"):
        boards.load(tmp_path / "gone.toml")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (GOOD + 'colour = "red"\n', "colour"),
        ('transport = "local"\n', "targets"),
        ('targets = "x86"\ntransport = "local"\n', "targets"),
        ('targets = ["x86"]\n', "transport"),
        (GOOD + "threads = true\n", "threads"),
        (GOOD + "threads = 0\n", "threads"),
        (GOOD + "affinity = []\n", "affinity"),
        (GOOD + 'affinity = ["0"]\n', "affinity"),
        (GOOD + 'precisions = ["int3"]\n', "precisions"),
        (GOOD + 'memory_mib = "8"\n', "memory_mib"),
        (GOOD + "emulated = 1\n", "emulated"),
        (GOOD + 'address = "-oProxyCommand=touch x"\n', "address"),
        (GOOD + 'address = "a; touch x"\n', "address"),
        (GOOD + 'address = "me@-oProxyCommand"\n', "address"),
        (GOOD + 'python = "python3 -c"\n', "python"),
        (GOOD + 'class = "a class"\n', "class"),
        (GOOD + 'folder = "$(touch x)"\n', "folder"),
        (GOOD + "memory_mib = -1\n", "memory_mib"),
        ("targets = [", "TOML"),
    ],
)
def test_wrong_file_is_named_with_the_key(own_folder, text, named):
    (own_folder / "odd.toml").write_text(text)
    with pytest.raises(InputError, match=rf"odd\.toml.*{named}"):
        boards.load("odd")


LONG = "0x" + "f" * 5000  # Python reads it, and prints no number of so many digits


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (GOOD + "notes = " + "[" * 3000 + "]" * 3000, "not TOML"),
        (GOOD + "notes = " + "{a = " * 3000 + "1" + "}" * 3000, "not TOML"),
        (GOOD + "threads = " + "9" * 5000, "not TOML"),
        (GOOD + f"threads = {LONG}", "threads: found a value of thousands"),
        (GOOD + f"threads = -{'9' * 400}", "threads: found -9999"),
        (GOOD + f"memory_mib = {LONG}", "memory_mib: found a value of thousands"),
        (GOOD + f"memory_mib = {'9' * 400}", "memory_mib: found 9999"),
        (GOOD + f"affinity = [0, {LONG}]", "affinity: found a value of thousands"),
        (GOOD + f"affinity = [{1 << 40}]", "affinity: found .1099511627776"),
        ('transport = "local"\n' + f"targets = {LONG}", "targets: found a value of thousands"),
        (GOOD + "threads." + "a." * 3000 + "a = 1", "threads: found a value of thousands"),
        (GOOD + "a." * 3000 + "a = 1", "unknown key 'a'"),
    ],
    ids=range(12),
)
def test_a_file_that_is_too_deep_or_has_numbers_without_end_is_named_in_one_line(own_folder, text, named):
    (own_folder / "odd.toml").write_text(text)
    with pytest.raises(InputError, match=rf"odd\.toml.*{named}") as raised:
        boards.load("odd")
    assert len(str(raised.value)) < 1000


def test_board_that_cannot_be_reached_is_not_measured_somewhere_else(own_folder):
    (own_folder / "far.toml").write_text('targets = ["phone"]\ntransport = "pigeon"\n')
    with pytest.raises(UnavailableError, match=r"far.*pigeon"):
        boards.load("far")


def test_templates_say_what_is_known_and_leave_the_address_to_the_user():
    shipped = {name: boards.load(name) for name in boards.names()}
    expected = {
        "local",
        "jetson-orin-nano",
        "jetson-agx-orin",
        "jetson-thor",
        "raspberry-pi-4",
        "raspberry-pi-5",
        "android-phone",
    }
    assert set(shipped) == expected
    for board in shipped.values():
        assert board.source
        assert board.notes
        assert board.address == ""
    assert shipped["jetson-orin-nano"].memory_mib == 8192
    assert shipped["android-phone"].transport == "adb"


@pytest.mark.parametrize("address", ["pi@raspberrypi.local", "orin", "10.0.0.2", "10.99.0.2:5555", "R58M123ABC"])
def test_addresses_of_hosts_and_phones_are_read(own_folder, address):
    (own_folder / "mine.toml").write_text(
        f'targets = ["x86"]\ntransport = "ssh"\naddress = "{address}"\nfolder = "/data/local/x"\n'
    )
    board = boards.load("mine")
    assert (board.address, board.folder, board.python) == (address, "/data/local/x", "python3")


@pytest.mark.parametrize(("place", "variable"), [(boards.user_folder, "XDG_CONFIG_HOME"), (user_cache, "XDG_CACHE_HOME")])
def test_a_user_without_a_home_folder_is_told_what_to_set(place, variable, tmp_path, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    for name in (variable, "EDGE_COMPRESS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match=f"home folder.*{variable}"):
        place()
    monkeypatch.setenv(variable, str(tmp_path))
    assert place().is_relative_to(tmp_path)
