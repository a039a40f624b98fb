"""Stands in for llama.cpp: its converter and its quantiser for a tiny Llama, as programs in a folder.

What they were given is told in the file that STAND_IN_LOG names; STAND_IN says what goes wrong.
"""

from __future__ import annotations

import json
import os
import stat
import sys
import time
from pathlib import Path

import numpy as np

CLASSES = ("LlamaForCausalLM", "Qwen2ForCausalLM")
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def make(folder: Path) -> Path:
    """Put both programs into `folder`, laid out as a checkout that was built."""
    bin_folder = folder / "build" / "bin"
    bin_folder.mkdir(parents=True)
    for path, what in ((folder / "convert_hf_to_gguf.py", "convert"), (bin_folder / "llama-quantize", "quantise")):
        path.write_text(
            f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
            f"import converter_stand_in\nconverter_stand_in.{what}(sys.argv[1:])\n"
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return folder


def convert(arguments: list[str]) -> None:
    """What convert_hf_to_gguf.py does, as far as it is asked for."""
    folder = Path(arguments[0])
    options = dict(f"{argument.removeprefix('--')}=".split("=", 1) for argument in arguments[1:])
    options = {name: value.removesuffix("=") for name, value in options.items()}
    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    _tell(
        program="vocabulary" if "vocab-only" in options else "converter",
        **options,
        offline=os.environ.get("HF_HUB_OFFLINE"),
        files=sorted(path.name for path in folder.iterdir()),
        config=json.loads((folder / "config.json").read_text()),
    )
    if kind not in CLASSES:
        print(f"ERROR:hf-to-gguf:Model {kind} is not supported", file=sys.stderr)
        sys.exit(1)
    target = Path(options["outfile"])
    if "vocab-only" in options:
        target.write_bytes(b"GGUF")
        return
    _go_wrong(target)

    import gguf
    from safetensors.numpy import load_file

    writer = gguf.GGUFWriter(target, "llama")
    writer.add_name(options["model-name"])
    for path in sorted(folder.glob("model*.safetensors")):
        for name, value in load_file(path).items():
            writer.add_tensor(_name(name), value.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantise(arguments: list[str]) -> None:
    """What llama-quantize does, for types that the Python library can make."""
    import gguf

    source, target, kind = arguments
    _tell(program="quantiser", type=kind)
    if os.environ.get("STAND_IN") == "quantiser fails":
        print("llama_model_quantize: failed to quantize: no such type\nmain: failed to quantize model")
        sys.exit(1)
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    stored = gguf.GGMLQuantizationType[{"Q4_0": "Q4_0"}.get(kind, "Q5_0")]
    for tensor in reader.tensors:
        data = np.array(tensor.data)
        if data.ndim > 1 and data.shape[-1] % 32 == 0:
            writer.add_tensor(tensor.name, gguf.quants.quantize(data, stored), raw_dtype=stored)
        else:
            writer.add_tensor(tensor.name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _name(name: str) -> str:
    base, _, end = name.rpartition(".")
    if base in _WHOLE:
        return f"{_WHOLE[base]}.{end}"
    _, _, block, rest = base.split(".", 3)
    return f"blk.{block}.{_NAMES[rest]}.{end}"


def _tell(**told: object) -> None:
    if log := os.environ.get("STAND_IN_LOG"):
        with open(log, "a") as file:
            file.write(json.dumps(told) + "\n")


def _go_wrong(target: Path) -> None:
    what = os.environ.get("STAND_IN")
    if what == "converter fails":
        target.write_bytes(b"GGUF and then half of it")
        print("INFO: Loading model", file=sys.stderr)
        print("NotImplementedError: BPE pre-tokenizer was not recognized", file=sys.stderr)
        sys.exit(1)
    if what == "no GGUF":
        target.write_bytes(b"something else")
        sys.exit(0)
    if what == "never ends":
        target.write_bytes(b"GGUF and then half of it")
        time.sleep(60)
