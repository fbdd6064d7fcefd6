"""What the user's code and data are told apart by."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from edge_compress.pipeline.data.code_digest import Content, code_digest, function_digest
from edge_compress.pipeline.data.user_code import user_factory
from edge_compress.pipeline.task.recipe import Recipe
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from torch import nn
from torch.utils.data import default_collate


@pytest.fixture
def fresh_modules() -> Iterator[None]:
    """Modules that a test imports are forgotten after it."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_the_digest_of_code_covers_the_file_and_what_it_imports_beside_it(tmp_path: Path) -> None:
    (tmp_path / "net_with_parts.py").write_text("import parts_of_it\ndef factory(): return parts_of_it.made()\n")
    (tmp_path / "parts_of_it.py").write_text("def made(): return 1\n")
    (tmp_path / "not_imported.py").write_text("x = 1\n")

    def digest() -> str:
        return code_digest(user_factory(f"{tmp_path}/net_with_parts.py:factory", "model").module)

    first = digest()
    assert digest() == first
    (tmp_path / "not_imported.py").write_text("x = 2\n")
    assert digest() == first
    (tmp_path / "net_with_parts.py").write_text("import parts_of_it\ndef factory(): return -parts_of_it.made()\n")
    second = digest()
    assert second != first
    (tmp_path / "parts_of_it.py").write_text("def made(): return 2\n")
    assert digest() not in (first, second)


@pytest.mark.usefixtures("fresh_modules")
@pytest.mark.parametrize("place", ["mypkg_of_a_user.blocks", ".blocks", "..common"])
def test_the_digest_of_a_package_covers_its_own_modules(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "mypkg_of_a_user" / "nets"
    inner.mkdir(parents=True)
    for folder in (inner.parent, inner):
        (folder / "__init__.py").write_text("")
    (inner / "net.py").write_text(f"from {place} import ACT\ndef make(): return ACT\n")
    helpers = [inner.parent / "blocks.py", inner / "blocks.py", inner.parent / "common.py"]
    for helper in helpers:
        helper.write_text("ACT = 'relu'\n")
    monkeypatch.chdir(tmp_path)

    def digest() -> str:
        return code_digest(user_factory("mypkg_of_a_user.nets.net:make", "model").module)

    first = digest()
    for helper in helpers:
        helper.write_text("ACT = 'gelu'\n")
    assert digest() != first


@pytest.mark.usefixtures("fresh_modules")
def test_the_digest_covers_modules_found_elsewhere_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, library = tmp_path / "project", tmp_path / "library"
    for place in (folder, library):
        place.mkdir()
    (folder / "uses_library.py").write_text("import common_to_projects\ndef make(): return 1\n")
    monkeypatch.syspath_prepend(library)
    digests = set()
    for text in ("ACT = 1\n", "ACT = 2\n"):
        (library / "common_to_projects.py").write_text(text)
        digests.add(code_digest(user_factory(f"{folder}/uses_library.py:make", "model").module))
    assert len(digests) == 2


def content_of(value: Any) -> str:
    """The digest of one value."""
    found = Content()
    found.add(value)
    return found.hexdigest()


def _weighted(weight: int) -> Callable[[], int]:
    return lambda: weight


def _sum(a: int, b: int) -> int:
    return a + b


class _Called:
    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self) -> int:
        return self.size

    def method(self) -> int:
        return self.size


@pytest.mark.parametrize(
    ("one", "same", "other"),
    [
        (_weighted(1), _weighted(1), _weighted(5)),
        (partial(_sum, b=1), partial(_sum, b=1), partial(_sum, b=5)),
        (_Called(1), _Called(1), _Called(5)),
        (_Called(1).method, _Called(1).method, _Called(5).method),
    ],
)
def test_functions_are_told_apart_by_the_values_they_were_given(one: Any, same: Any, other: Any) -> None:
    assert function_digest(one) == function_digest(same) != function_digest(other)


def _in_a_notebook(source: str, name: str) -> FunctionType:
    """A function of a module without a file."""
    space: dict[str, Any] = {"__name__": "a_module_without_a_file"}
    exec(source, space)
    return space[name]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("def loss(a): return a + 1", "def loss(a): return a + 2"),
        ("W = 1\ndef loss(a): return a * W", "W = 2\ndef loss(a): return a * W"),
        ("def part(a): return a\ndef loss(a): return part(a)", "def part(a): return -a\ndef loss(a): return part(a)"),
    ],
)
def test_a_notebooks_functions_are_told_apart_without_a_file(before: str, after: str) -> None:
    digest, again, other = (function_digest(_in_a_notebook(text, "loss")) for text in (before, before, after))
    assert digest == again != other


@given(st.data(), npst.arrays(st.sampled_from([np.int64, np.float32, np.uint8]), npst.array_shapes(max_dims=3, max_side=3)))
def test_content_differs_where_one_element_does(data: st.DataObject, array: Any) -> None:
    other = array.copy()
    at = tuple(data.draw(st.integers(0, size - 1)) for size in array.shape)
    other[at] = 1 if other[at] == 0 else 0
    assert content_of(array) == content_of(array.copy()) != content_of(other)
    assert content_of(torch.from_numpy(array)) != content_of(torch.from_numpy(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (np.int64(1), np.int64(2)),
        (np.zeros(2, np.float32), np.zeros(1, np.float64)),
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.ones(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.bfloat16)),
        ((1, 2), (12,)),
        (SimpleNamespace(box=1), SimpleNamespace(box=2)),
        ({"a": 1}, {"a": 2}),
        ({1, 2}, {1, 3}),
        (torch.float16, torch.float32),
        (np.float32, np.float64),
        (range(3), range(4)),
        (Path("a"), Path("b")),
    ],
)
def test_values_of_a_sample_are_told_apart(one: Any, other: Any) -> None:
    assert content_of(one) == content_of(one) != content_of(other)


def _recursive(step: int) -> Callable[[int], int]:
    def down(n: int) -> int:
        return n if n <= 0 else down(n - step)

    return down


class _Looping:
    def __init__(self, gamma: float) -> None:
        self.gamma, self.loss = gamma, self.focal
        self.itself, self.module = self, np

    def focal(self) -> float:
        return self.gamma


@pytest.mark.parametrize(
    ("one", "same", "other"),
    [(_recursive(1), _recursive(1), _recursive(2)), (_Looping(1.0).loss, _Looping(1.0).loss, _Looping(2.0).loss)],
)
def test_values_that_hold_themselves_or_modules_end(one: Any, same: Any, other: Any) -> None:
    assert function_digest(one) == function_digest(same) != function_digest(other)


def test_a_notebooks_class_is_told_apart_by_its_methods() -> None:
    texts = [f"class Top1:\n    def compute(self): return {value}" for value in (1, 1, 2)]
    digest, again, other = (function_digest(_in_a_notebook(text, "Top1")) for text in texts)
    assert digest == again != other


def test_a_librarys_loss_is_not_read_file_by_file() -> None:
    recipe = Recipe(nn.Identity, dict, loss=nn.MSELoss(), collate=default_collate)
    start = time.perf_counter()
    assert recipe.digest != Recipe(nn.Identity, dict, loss=nn.L1Loss(), collate=default_collate).digest
    assert time.perf_counter() - start < 5.0
