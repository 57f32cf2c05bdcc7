"""llama.cpp itself on our GGUF files: the ids of real and trained tokenizers, and greedy texts.

python -m tests.real.llamacpp prepare DIR    make the files, and what transformers and others expect
python tests/real/llamacpp.py check DIR      in llama-cpp-python's environment, which has no torch
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import takewhile
from operator import eq
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village,",
    "def fibonacci(n):\n",
    "Water boils at 100 degrees Celsius, which is",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
    "1, 2, 3, 4,",
)
NEW_TOKENS = 32
STRINGS = 400
# How far the logit of another token may be from the best: llama.cpp rounds activations too.
NEAR = {"float32": 0.001, "float16": 0.05, "bfloat16": 0.1, "q8_0": 1.0}
BEST = 10
FILE = "vocabulary.gguf"


@dataclass(frozen=True)
class Case:
    """A tokenizer: its directory and rows, and how the library that it is of encodes.

    `specials` stand in its texts; where they are None, special tokens are plain text.
    """

    name: str
    source: Path
    rows: int
    encode: Callable[[str], list[int]]
    specials: tuple[str, ...] | None = ()


def prepare(folder: Path) -> None:
    """Everything that takes our environment."""
    from tests.real import smollm2

    hf = folder / "hf"
    if not (hf / "config.json").exists():
        smollm2.make(hf)
    split_digits(hf)
    for dtype in NEAR:
        target = folder / dtype
        if not list(target.glob("*.gguf")):
            paths = (f"src.path={hf}", f"dst.path={target}", f"dst.dtype={dtype}")
            command = ("-m", "reshard", "--src", "hf", "--dst", "gguf", *paths)
            subprocess.run([sys.executable, *command], check=True)
        # q8_0 has other weights; the rest has those of the source, float16 all but exactly.
        texts = greedy(target if dtype == "q8_0" else hf, hf)
        (target / "expected.json").write_text(json.dumps(texts))
    for case in tokenizers(folder, hf):
        vocabulary(folder / "tokenizers" / case.name, case)
    compare_keys(
        folder / "tokenizers" / "smollm2" / FILE, next(smollm2.package_dir().glob("*.gguf"))
    )


def split_digits(hf: Path) -> None:
    """Give SmolLM2's tokenizer.json back what transformers leaves out when it reads a GGUF file."""
    path = hf / "tokenizer.json"
    record = json.loads(path.read_text())
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    digits = {"type": "Digits", "individual_digits": True}
    steps = [digits, {**level, "use_regex": True}]
    record["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    path.write_text(json.dumps(record, ensure_ascii=False))


@cache
def greedy(source: Path, hf: Path) -> list[dict[str, object]]:
    """What transformers says in float32 after each prompt, and how near other tokens were.

    `source` may have a GGUF file, which transformers reads; the tokenizer is that of `hf`.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = next((file.name for file in source.glob("*.gguf")), None)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, gguf_file=file)
    tokenizer = AutoTokenizer.from_pretrained(hf)
    options = {"return_dict_in_generate": True, "output_logits": True, "do_sample": False}
    found = []
    for prompt in PROMPTS:
        given = tokenizer(prompt, return_tensors="pt")
        said = model.generate(**given, max_new_tokens=NEW_TOKENS, eos_token_id=None, **options)
        ids, first = said.sequences[0].tolist(), given["input_ids"].shape[1]
        gaps = []
        for logits in said.logits:
            values, tokens = logits[0].topk(BEST)
            gaps.append(dict(zip(tokens.tolist(), (values[0] - values).tolist(), strict=True)))
        found.append({"prompt": prompt, "ids": ids[:first], "said": ids[first:], "gaps": gaps})
    return found


def tokenizers(folder: Path, hf: Path) -> Iterator[Case]:
    """Real tokenizers, and trained ones for each way to split that llama.cpp has a name for."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(hf)
    yield Case("smollm2", hf, 49152, theirs.encode, ("<|im_start|>", "<|im_end|>"))
    yield llama3(folder / "llama3")
    yield from trained(folder / "trained")
    yield from pieces(folder / "pieces")


def llama3(folder: Path) -> Case:
    """Llama 3's own, converted by us; tiktoken encodes."""
    from importlib.util import find_spec

    import tiktoken
    from tiktoken.load import load_tiktoken_bpe

    from reshard import tokenizers as ours
    from reshard.families.prompts import SPECIALS_3_1
    from reshard.tokenizers import child
    from tests.oracles.texts import PATTERN

    spec = find_spec("llama_models")
    if spec is None or spec.origin is None:
        raise SystemExit("llama_models is not installed: pip install --no-deps llama-models")
    file = Path(spec.origin).parent / "llama3" / "tokenizer.model"
    folder.mkdir(exist_ok=True)
    ranks = load_tiktoken_bpe(str(file))
    specials = {text: len(ranks) + number for number, text in enumerate(SPECIALS_3_1)}
    arguments = {"file": str(file), "vocab": 128256, "bos": 128000, "eos": [128001, 128008, 128009]}
    more = {"pad": None, "positions": 8192, "specials": list(specials), "template": None}
    child.run_child(ours.TIKTOKEN, {**arguments, **more}, folder, "tokenizer.json")
    theirs = tiktoken.Encoding(
        "llama3", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=specials
    )

    def encode(text: str) -> list[int]:
        return [128000, *theirs.encode(text, allowed_special="all")]

    return Case("llama3", folder, 128256, encode, tuple(SPECIALS_3_1[:12]))


def trained(folder: Path) -> Iterator[Case]:
    """A small byte-level tokenizer for each way to split that llama.cpp has, and has exactly."""
    from tests import test_tokenizers_gguf as made
    from tests.oracles.texts import texts

    ways = {
        "llama-bpe": (made.split(made.LLAMA3), True),
        "smaug-bpe": (made.split(made.LLAMA3), False),
        "qwen2": (made.split(made.QWEN2), False),
        "gpt-2": (made.pre_tokenizers.ByteLevel(add_prefix_space=False), False),
        "smollm": (made.digits_first(), False),
    }
    folder.mkdir(exist_ok=True)
    corpus = texts(2_000, seed=1)
    for name, (splitter, whole) in ways.items():
        tokenizer = made.byte_level(splitter, whole=whole, corpus=corpus, size=2_000)
        made.save(folder / name, tokenizer)
        rows = tokenizer.get_vocab_size() + 5
        encode = partial(encoded, tokenizer)
        yield Case(name, folder / name, rows, encode, tuple(made.SPECIALS))


def encoded(tokenizer: "Tokenizer", text: str) -> list[int]:
    return tokenizer.encode(text).ids


def pieces(folder: Path) -> Iterator[Case]:
    """A sentencepiece model as Llama 2's: as its own file, and as a tokenizer.json."""
    import sentencepiece

    from tests import test_tokenizers_gguf as made
    from tests.oracles.texts import texts

    model = made.train_pieces(texts(2_000, seed=1), 2_000)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    (folder / "model").mkdir(parents=True, exist_ok=True)
    (folder / "model" / "tokenizer.model").write_bytes(model)
    rows = processor.vocab_size()
    encode = partial(processor.encode, add_bos=True)
    yield Case("sentencepiece", folder / "model", rows, encode, None)
    converted = made.as_tokenizer_json(processor)
    made.save(folder / "json", converted, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    yield Case("byte fallback", folder / "json", rows, partial(encoded, converted))


def vocabulary(target: Path, case: Case) -> None:
    """A GGUF file without weights, and the ids that texts are expected to have."""
    from reshard import conversions
    from reshard import tokenizers as ours
    from reshard.containers import pieces_of
    from reshard.containers.gguffile import Fields, Value, skeleton
    from reshard.families.model import ModelConfig
    from tests.oracles.texts import texts

    target.mkdir(parents=True, exist_ok=True)
    held = {path.name: path for path in case.source.iterdir()}
    sizes = dict.fromkeys(("hidden", "layers", "heads", "kv_heads", "head_dim", "intermediate"), 1)
    model = ModelConfig("other", **sizes, vocab=case.rows, bos=None, eos=None)
    (count, _), notes = conversions.to_header(held, model, target)
    if notes:
        raise SystemExit(f"{case.source}: {notes}")
    fields = Fields(count, (target / ours.HEADER).read_bytes())
    start = {"general.architecture": Value("string", "llama"), "": fields}
    file = b"".join(piece for _, chunk in skeleton([], start).chunks for piece in pieces_of(chunk))
    (target / FILE).write_bytes(file)
    strings = [text for text in texts(STRINGS, 2, case.specials or ()) if text]
    expected = [[text, list(case.encode(text))] for text in strings]
    record = {"special": case.specials is not None, "texts": expected}
    (target / "expected.json").write_text(json.dumps(record))


def compare_keys(ours: Path, theirs: Path) -> None:
    """Stop with a message where a published file has another key of its tokenizer than ours."""
    from gguf import GGUFReader

    found, expected = (GGUFReader(path).fields for path in (ours, theirs))
    keys = [key for key in expected if key.startswith("tokenizer.")]
    wrong = [
        key
        for key in keys
        if key not in found
        or found[key].types != expected[key].types
        or found[key].contents() != expected[key].contents()
    ]
    if wrong:
        raise SystemExit(f"{ours}: other than {theirs.name} in {', '.join(wrong)}")
    print(f"smollm2: all {len(keys)} keys of the published tokenizer are the same")


def check(folder: Path) -> None:
    """What takes llama.cpp: stop with a message where its ids or texts are others."""
    failures = []
    for target in sorted((folder / "tokenizers").iterdir()):
        failures += check_tokenizer(target)
    for dtype in NEAR:
        failures += check_texts(folder / dtype, dtype)
    if failures:
        raise SystemExit("\n".join(failures))
    print("llama.cpp: passed")


def check_tokenizer(target: Path) -> list[str]:
    """The ids of all texts, special tokens and what is put around a text included."""
    import llama_cpp

    llama = llama_cpp.Llama(str(target / FILE), vocab_only=True, verbose=False)
    expected = json.loads((target / "expected.json").read_text())
    found = [
        (text, ids, llama.tokenize(text.encode(), special=expected["special"]))
        for text, ids in expected["texts"]
    ]
    wrong = [item for item in found if item[1] != item[2]]
    print(f"{target.name}: {len(found) - len(wrong)} of {len(found)} texts have the same ids")
    return [f"{target.name}: {text!r} is {got}, expected {ids}" for text, ids, got in wrong[:3]]


def check_texts(target: Path, dtype: str) -> list[str]:
    """The greedy texts; another token is right only where the two best are all but equal."""
    import llama_cpp

    # A cache in float32, as that of transformers is.
    file, kinds = next(target.glob("*.gguf")), {"type_k": 0, "type_v": 0}
    llama = llama_cpp.Llama(str(file), n_ctx=128, verbose=False, **kinds)
    failures = []
    for expected in json.loads((target / "expected.json").read_text()):
        prompt = expected["prompt"]
        ids = llama.tokenize(prompt.encode(), special=True)
        if ids != expected["ids"]:
            failures.append(f"{dtype}: {prompt!r} is {ids}, expected {expected['ids']}")
            continue
        llama.reset()
        stream = llama.generate(ids, temp=0.0, repeat_penalty=1.0)
        said = [token for _, token in zip(range(NEW_TOKENS), stream, strict=False)]
        same = sum(takewhile(bool, map(eq, said, expected["said"])))
        text = llama.detokenize(said).decode(errors="replace")
        print(f"{dtype}: {prompt!r}: {same} of {NEW_TOKENS} tokens: {text!r}")
        if same < NEW_TOKENS:
            gap = expected["gaps"][same].get(str(said[same]), float("inf"))
            print(f"    token {same} has a logit {gap:.4f} below the best of transformers")
            if gap > NEAR[dtype]:
                failures.append(f"{dtype}: {prompt!r}: token {same} is {gap:.4f} below the best")
    return failures


if __name__ == "__main__":
    verb, where = sys.argv[1:]
    {"prepare": prepare, "check": check}[verb](Path(where))
