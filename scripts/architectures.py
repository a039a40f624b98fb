"""Write docs/supported-models.md: every causal language model of the installed transformers, tried on a tiny one.

python scripts/architectures.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parents[1]

TEXT = """# Architectures

Every class that `AutoModelForCausalLM` of transformers {version} knows, and some models of text and images of which
the text half is used, tried on tiny random models with three or four layers in which every kind of layer occurs:

{figures}

`python scripts/architectures.py` writes this page and `tests/model/test_zoo.py` checks it.

- **closes**: every writer to the residual stream is found and proved, so the model can be edited.
- **hooks = weights**: logits under hooks and those of the edited checkpoint, loaded again, agree to 1e-4 of their size
  in float32; and under hooks less than 1e-3 of the direction is left anywhere in the stream (with embeddings untied).
- **writers**: how many there are in the tiny model.

A class that is not listed here is tried in the same way when it is loaded. What does not close is refused by name.

| class | model types | closes | hooks = weights | writers | remarks |
| --- | --- | --- | --- | --- | --- |
{rows}
"""


def main() -> None:
    """Examine every model of the zoo and write the table."""
    sys.path.insert(0, str(ROOT / "tests"))
    from zoo import ENTRIES
    from zoo_verdicts import examine, figures, read_table, table

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    examined = []
    for number, entry in enumerate(ENTRIES, 1):
        print(f"{number}/{len(ENTRIES)} {entry}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            examined.append((entry, examine(entry, Path(folder))))
    rows = table(examined)
    text = TEXT.format(
        version=transformers.__version__, figures="\n".join(figures(read_table(rows))), rows="\n".join(rows)
    )
    (ROOT / "docs" / "supported-models.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
