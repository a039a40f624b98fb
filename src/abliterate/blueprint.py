"""The anatomy of a checkpoint that is not loaded: names from a skeleton, the proof from a small copy.

A skeleton on torch's meta device has every name and shape and no numbers. Residual accounting needs numbers: it is
done on a copy of the same class with one block, a small vocabulary and narrow MLPs, and holds for the whole
because all blocks of the skeleton are built alike, which is checked. Gains of post-norms are read from the files.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from abliterate.anatomy import Anatomy, Writer, find_blocks, names_on_disk, norm_gain, study
from abliterate.checkpoint import Checkpoint, open_tensor
from abliterate.errors import AbliterateError, AnatomyError, ModelError
from abliterate.models import ModelFiles, quiet_transformers, refuse_quantised
from abliterate.surgery import STORED

_SMALL_VOCABULARY = 64
_SMALL_MLP = 64


def study_files(files: ModelFiles, checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> tuple[Anatomy, Any]:
    """Every writer of a model on disk, and its skeleton (on the meta device).

    Raises `AnatomyError` when the blocks are not built alike or a writer is not known.
    """
    import transformers

    auto = transformers.AutoModelForCausalLM
    options = {"trust_remote_code": trust_remote_code}
    try:
        with quiet_transformers():
            config = transformers.AutoConfig.from_pretrained(files.folder, **options)
            refuse_quantised(files, config)
            with torch.device("meta"):
                skeleton = auto.from_config(config, **options)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                small = auto.from_config(_small(config), dtype=torch.float32, **options).eval()
    except AbliterateError:
        raise
    except Exception as error:  # configurations are checked by many hands in many ways
        reason = " ".join(str(error).split())[:240]
        raise ModelError(f"model '{files.name}': cannot be built from its configuration ({reason})") from error
    names, blocks = find_blocks(skeleton)
    _check_alike(names, blocks)
    proof = study(small)
    writers = [_whole(writer, skeleton) for writer in proof.writers if writer.block is None]
    pattern = [writer for writer in proof.writers if writer.block == 0]
    for index, name in enumerate(names):
        writers += [_with_gain(_moved(w, proof.blocks[0], name, index), small, skeleton, checkpoint) for w in pattern]
    return Anatomy(proof.d_model, tuple(names), tuple(writers), proof.closure), skeleton


def _small(config: Any) -> Any:
    """The configuration of a copy that costs little and has the same kinds of modules."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    layers = text.num_hidden_layers
    for name, value in vars(text).items():
        if isinstance(value, list | tuple) and len(value) == layers:
            setattr(text, name, value[:1])
        elif name.endswith("_token_id"):
            setattr(text, name, None)
    text.num_hidden_layers = 1
    text.vocab_size = _SMALL_VOCABULARY
    for name in ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner"):
        if getattr(text, name, None):
            setattr(text, name, _SMALL_MLP)
    return small


def _check_alike(names: list[str], blocks: list[nn.Module]) -> None:
    def build(block: nn.Module) -> list[tuple[str, str, tuple[int, ...]]]:
        return [(name, type(module).__name__, _shape(module)) for name, module in block.named_modules()]

    first = build(blocks[0])
    for name, block in zip(names, blocks, strict=True):
        if build(block) != first:
            raise AnatomyError(f"block {name} ({type(block).__name__}): expected it to be built like {names[0]}")


def _shape(module: nn.Module) -> tuple[int, ...]:
    weight = getattr(module, "weight", None)
    return tuple(weight.shape) if isinstance(weight, Tensor) else ()


def _whole(writer: Writer, skeleton: Any) -> Writer:
    head = skeleton.get_output_embeddings()
    weight = skeleton.get_submodule(writer.module).weight
    return replace(writer, tied=head is not None and head.weight is weight)


def _moved(writer: Writer, old: str, new: str, index: int) -> Writer:
    post_norm = None if writer.post_norm is None else new + writer.post_norm.removeprefix(old)
    return replace(writer, module=new + writer.module.removeprefix(old), block=index, post_norm=post_norm)


def _with_gain(writer: Writer, small: Any, skeleton: Any, checkpoint: Checkpoint) -> Writer:
    """Put the stored weight of a post-norm into the small copy's norm and ask it for its gain."""
    if writer.post_norm is None:
        return writer
    parameter = f"{writer.post_norm}.weight"
    info = checkpoint.tensors[names_on_disk(skeleton, [parameter], list(checkpoint.tensors))[parameter]]
    with open_tensor(info) as reader:
        stored = torch.frombuffer(reader.read(0, info.nbytes), dtype=STORED[info.dtype])
    name = find_blocks(small)[0][0] + writer.post_norm.removeprefix(find_blocks(skeleton)[0][writer.block or 0])
    norm = small.get_submodule(name)
    norm.weight.data.copy_(stored)
    gain, centred = norm_gain(norm, stored.shape[0])
    return replace(writer, gain=gain, centred=centred)
