"""What is said of a model that the hub does not give: why, and what to do."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
from huggingface_hub import errors

from abliterate.errors import ModelError
from abliterate.model.hub import snapshot


def raised(kind: type[Exception]) -> Exception:
    """An error of the hub's library, made as it makes them, without an answer of a server."""
    error = kind.__new__(kind)
    Exception.__init__(error, "401 Client Error.\n\nCannot access gated repo")
    return error


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (errors.GatedRepoError, "accept the terms at https://huggingface.co/me/it, then log in with `hf auth login`"),
        (errors.RepositoryNotFoundError, "the hub has no such model, or shows it to its owner only"),
        (errors.RevisionNotFoundError, "no revision 'v2' of it; the branches and tags are at"),
        (errors.LocalEntryNotFoundError, "not in the cache, and the hub does not answer"),
        (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE is set"),
        (RuntimeError, "cannot be fetched from the hub"),
    ],
)
def test_why_a_model_cannot_be_had_is_said_in_a_line(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception], said: str
) -> None:
    fetch: Any = mock.Mock(side_effect=raised(kind))
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    with pytest.raises(ModelError) as caught:
        snapshot("me/it", False, "v2")
    assert said in str(caught.value)
    assert str(caught.value).startswith("model 'me/it': ")
    assert "\n" not in str(caught.value)
