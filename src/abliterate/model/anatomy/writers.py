"""The words for what writes to the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from jaxtyping import Float
from torch import Tensor, nn


class Kind(StrEnum):
    """What part of the network a writer belongs to."""

    EMBEDDING = "embedding"
    ATTENTION = "attention"
    STATE_SPACE = "state_space"
    MLP = "mlp"
    EXPERTS = "experts"


@dataclass(frozen=True, slots=True)
class Writer:
    """Parameters whose product is added to the residual stream.

    The output of `module` is linear in what is written: hooks go there. `weight` is the map, with the stream on `axis`
    (Linear [d, n]: 0; Conv1D and embedding [n, d]: 1; experts [E, d, n]: 1, [E, n, d]: 2), `bias` [d] or [E, d] what is
    added to it. A norm's bias is a writer without a weight; fixed positions are one without either. `inner` is the
    constant by which an embedding's module multiplies its weight, `multiplier` the one between module and stream
    (of embeddings and the first block; None where it differs from token to token).
    `gain` [d] is set when a norm y ↦ gain ⊙ y / rms(y) stands between module and stream, with `centred` when that norm
    subtracts the mean first; `post_norms` names it, or several one behind the other, and `gain` is then their product.
    `tied` marks an embedding that is also the head.
    """

    module: str
    kind: Kind
    block: int | None
    weight: str | None
    axis: int
    bias: str | None
    inner: float = 1.0
    multiplier: float | None = 1.0
    post_norms: tuple[str, ...] = ()
    gain: Float[Tensor, " d"] | None = None
    centred: bool = False
    tied: bool = False

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names in the model of the tensors an edit of this writer changes."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)

    @property
    def name(self) -> str:
        """By which it is told from all others: its map's parameter, else its bias, else its module."""
        return self.weight or self.bias or self.module


@dataclass(frozen=True, slots=True)
class Anatomy:
    """All writers of a model in stream order, and what residual accounting leaves unexplained.

    `closure` holds one relative error for the embedding and one per block.
    """

    d_model: int
    blocks: tuple[str, ...]
    writers: tuple[Writer, ...]
    closure: tuple[float, ...]

    @property
    def layers(self) -> int:
        """Number of blocks L; sites are 0..L."""
        return len(self.blocks)


#: Parts of class and module names → the kind of what stands in them; the innermost name that says something decides.
_HINTS: tuple[tuple[tuple[str, ...], Kind], ...] = (
    (("sharedexpert", "shared_expert", "sharedmlp", "shared_mlp"), Kind.MLP),
    (("expert",), Kind.EXPERTS),
    (("att", "deltanet", "deltarule"), Kind.ATTENTION),
    (("mamba", "recurrent", "rwkv", "shortconv", "mlstm", "ssm"), Kind.STATE_SPACE),
    (("mlp", "ffn", "feedforward", "feed_forward", "moe"), Kind.MLP),
)


def kind_of(block: nn.Module, module: str) -> Kind:
    """What a module of a block belongs to, by its names and those of what it stands in."""
    if "expert" in module.lower():
        return Kind.MLP if "shared" in module.lower() else Kind.EXPERTS
    parts = module.split(".") if module else []
    for end in range(len(parts), 0, -1):
        # Names come before classes, which have the family's name in them.
        for said in (parts[end - 1], type(block.get_submodule(".".join(parts[:end]))).__name__):
            for words, kind in _HINTS:
                if any(word in said.lower() for word in words):
                    return kind
    return Kind.MLP
