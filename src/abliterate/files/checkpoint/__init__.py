"""Safetensors checkpoints as bytes on disk: read their layout, write an edited copy, put it in place.

Nothing here knows a model, computes with numbers or loads a pickle; every size and offset is in bytes.
Every function raises CheckpointError for files that are damaged, missing or cannot be written, and
UsageError where what was asked for is not allowed.

    reading   headers and indexes, checked against the files
    outputs   which files the copy has
    growing   a file while it is written, with its hash behind it
    writing   the copy
    journal   what a killed run had finished
    staging   the folder that becomes OUT in one step
    messages  the wording of errors
"""

from abliterate.files.checkpoint.journal import Finished, Journal, Note
from abliterate.files.checkpoint.outputs import CARD, DIRECTION, FRONT, JOURNAL, Changes
from abliterate.files.checkpoint.reading import (
    ADAPTER_CONFIG,
    ADAPTER_NAME,
    BITS,
    INDEX_NAME,
    OWN_RESULTS,
    SINGLE_NAME,
    Checkpoint,
    Shard,
    TensorInfo,
    TensorReader,
    open_checkpoint,
    open_tensor,
    read_shard,
    same_bytes,
    sha256,
)
from abliterate.files.checkpoint.staging import Staging, check_output, ensure_space, left_bytes, resumable, staged
from abliterate.files.checkpoint.writing import Chunk, EditedFiles, Noter, Rewriter, bytes_to_write, write_edited

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_NAME",
    "BITS",
    "CARD",
    "DIRECTION",
    "FRONT",
    "INDEX_NAME",
    "JOURNAL",
    "OWN_RESULTS",
    "SINGLE_NAME",
    "Changes",
    "Checkpoint",
    "Chunk",
    "EditedFiles",
    "Finished",
    "Journal",
    "Note",
    "Noter",
    "Rewriter",
    "Shard",
    "Staging",
    "TensorInfo",
    "TensorReader",
    "bytes_to_write",
    "check_output",
    "ensure_space",
    "left_bytes",
    "open_checkpoint",
    "open_tensor",
    "read_shard",
    "resumable",
    "same_bytes",
    "sha256",
    "staged",
    "write_edited",
]
