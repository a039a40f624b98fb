"""Settings for all tests."""

from __future__ import annotations

import functools
import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import typer.main
from hypothesis import settings
from transformers.utils import logging

from abliterate.config import cache_folder

pytest_plugins = ["calling"]

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # background shells ignore it, and so would what tests start
logging.disable_progress_bar()
# Beside another busy process what takes milliseconds may take a second.
settings.register_profile("beside others", deadline=None)
settings.load_profile("beside others")

#: Files that take longest, the longest first; and those after which other libraries are not as they were.
LONG = ("test_notebooks.py", "test_real_model.py", "test_pipeline.py", "test_zoo.py", "test_zoo_adapters.py")
LAST = ("test_interop.py",)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where several processes share the files, long ones come first: none is left alone with one at the end.

    A process is given files in this order, so that nothing comes after the last ones in theirs.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    items.sort(key=lambda item: item.path.name in LAST)


def pytest_collection_finish() -> None:
    """All libraries and tests stay: whoever looks for what can go need not look at them again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def replies_are_kept_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Answers of the tests' models do not go into the user's cache."""
    folder: Path = tmp_path_factory.mktemp("kept")

    def place() -> Path:
        return cache_folder() if "ABLITERATE_CACHE" in os.environ else folder

    with mock.patch("abliterate.files.cache.cache_folder", place):
        yield


@pytest.fixture(autouse=True, scope="session")
def options_are_made_once() -> Iterator[None]:
    """Tests call the command line many hundred times; what it takes is the same each time."""
    with mock.patch("typer.main.get_command", functools.cache(typer.main.get_command)):
        yield
