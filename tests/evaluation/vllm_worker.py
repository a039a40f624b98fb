"""Runs in the interpreter that has vLLM: replies of one model before, inside and after `VllmEngine.edited`.

    python vllm_worker.py JOB.json OUT.json

The job: `model` and `edited` (folders), `prompts` (lists of tokens), `ends`, `new_tokens`, and `options` for vLLM. The
result: `name`, and tokens per prompt as `original`, `edited`, `again`; or `error`, the line that was raised.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from abliterate.errors import AbliterateError
from abliterate.evaluation.engines import Pair, open_engine


def main(job: Mapping[str, Any]) -> dict[str, Any]:
    folder, tokenizer = Path(job["model"]), AutoTokenizer.from_pretrained(job["model"])
    pair = Pair(tokenizer, frozenset(job["ends"]), folder=folder, edited=Path(job["edited"]))
    try:
        engine = open_engine("vllm", pair, **job["options"])
        prompts, new = job["prompts"], job["new_tokens"]
        original = [reply.tokens for reply in engine.complete(prompts, new)]
        with engine.edited():
            edited = [reply.tokens for reply in engine.complete(prompts, new)]
        again = [reply.tokens for reply in engine.complete(prompts, new)]
    except AbliterateError as error:
        return {"error": str(error)}
    return {"name": engine.name, "original": original, "edited": edited, "again": again}


if __name__ == "__main__":
    result = main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")
