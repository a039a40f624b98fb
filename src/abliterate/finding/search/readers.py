"""What reads in a writer how much is to be taken out, and hardly reads what harmless prompts make it write.

An oblique edit y − s (y Rᵀ) L leaves y alone where R reads nothing. With C the mean of y yᵀ over what a writer writes
for harmless prompts, in units of `RIDGE` times the mean square of its entries, the rows of

    R = A⁻¹ L (1 + C)⁻¹        with A = L (1 + C)⁻¹ Lᵀ

read one of L and, of all that do, least of harmless prompts (least squares with a ridge; compare the whitened
projection of LEACE, Belrose et al. 2023). Here searches begin. They go on in r = R K with K Kᵀ = 1 + C, where a step of
one length costs about the same in every direction.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from abliterate.model.anatomy import stream_out
from abliterate.model.batches import ends, hooked

#: What is written counts from this share of the mean square on.
RIDGE = 0.01
#: Tokens for each number of an activation from which C is known well enough: of fewer, readers learn the sample.
ENOUGH_TOKENS = 2


@contextlib.contextmanager
def written_by(
    model: Any, modules: Mapping[str, str], width: int, *, skip: int = 0
) -> Iterator[dict[str, Float[Tensor, "d d"]]]:
    """Sum y yᵀ over what modules give for the prompts that are run inside, by the keys of `modules`.

    The first `skip` tokens of each prompt, those that all share, are left out. Zero remains of modules that do not give
    a vector of this width for each token (experts that see only the tokens routed to them).
    """
    found = {key: torch.zeros(width, width) for key in modules}
    shape = [0, 0]

    def begin(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        shape[:] = args[0].shape[:2]

    def look(key: str, output: object) -> None:
        y, (rows, tokens) = stream_out(output).detach(), shape
        last = ends(rows, tokens)
        if last is None or y.numel() != rows * tokens * width or y.shape[-1] != width:
            return
        places = torch.arange(tokens, device=y.device)
        prompt = (places <= last.to(y.device)[:, None]) & (places >= skip)
        own = y.reshape(rows, tokens, width)[prompt].float()
        found[key] += (own.T @ own).cpu()

    handles = [model.get_input_embeddings().register_forward_pre_hook(begin)] if modules else []
    for key, name in modules.items():
        handles.append(model.get_submodule(name).register_forward_hook(lambda _, __, out, key=key: look(key, out)))
    with hooked(handles):
        yield found


@dataclass(frozen=True, slots=True)
class Readers:
    """R of w writers from rows r of any length: R = scale · r̂ K⁻¹, where K Kᵀ = 1 + C (see the module).

    `roots` are K, None where nothing is known of what a writer writes.
    """

    roots: Sequence[Float[Tensor, "d d"] | None]
    scale: Float[Tensor, "w k 1"]

    def __call__(self, rows: Float[Tensor, "w k d"]) -> Float[Tensor, "w k d"]:
        """R, differentiable in the rows."""
        unit = self.scale * rows / rows.norm(dim=-1, keepdim=True)
        return torch.stack([_solved(root, one) for one, root in zip(unit, self.roots, strict=True)])


def begun(
    basis: Float[Tensor, "w k d"], written: Sequence[Float[Tensor, "d d"]]
) -> tuple[Readers, Float[Tensor, "w k d"]]:
    """Readers of writers of which `basis` is taken out, and the rows to begin with (see the module).

    `written` is the sum of y yᵀ over what each writes for harmless prompts; where that is nothing, R = A⁻¹ L.
    """
    roots, rows = [], []
    for out, squares in zip(basis, written, strict=True):
        roots.append(_root(squares))
        white = out if roots[-1] is None else torch.linalg.solve_triangular(roots[-1], out.T, upper=False).T
        rows.append(torch.linalg.solve(white @ white.T, white))
    first = torch.stack(rows)
    return Readers(roots, first.norm(dim=-1, keepdim=True)), first


def _root(squares: Float[Tensor, "d d"]) -> Float[Tensor, "d d"] | None:
    """K; None for a writer that writes nothing."""
    unit = RIDGE * squares.diagonal().mean()
    if not bool(unit > 0):
        return None
    root: Tensor = torch.linalg.cholesky(squares / unit + torch.eye(len(squares)))
    return root


def _solved(root: Float[Tensor, "d d"] | None, rows: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
    if root is None:
        return rows
    solved: Tensor = torch.linalg.solve_triangular(root, rows, upper=False, left=False)
    return solved
