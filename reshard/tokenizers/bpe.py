"""A tiktoken file, as Llama 3 has it, for transformers: run in a process of its own."""

from collections.abc import Mapping
from pathlib import Path

from tiktoken import Encoding, load
from tokenizers import processors
from transformers.convert_slow_tokenizer import TikTokenConverter

from reshard.errors import CheckpointError
from reshard.tokenizers import huggingface, readable
from reshard.tokenizers.huggingface import Converted


def _read(blobpath: str, expected_hash: str | None = None) -> bytes:
    return Path(blobpath).read_bytes()


# tiktoken keeps a copy of every file that it reads, known by its path alone: an older file of the
# same path would be taken for this one.
load.read_file_cached = _read
# Merging within a token takes the square of its length; Llama's longest has 128 bytes.
MAX_TOKEN_BYTES = 1 << 10
# What may end a text: its own end, that of a message, and that of a turn.
ENDS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")


def run(arguments: Mapping[str, object], folder: Path) -> None:
    """Write the files of transformers to `folder`."""
    path, specials = Path(str(arguments["file"])), huggingface.texts(arguments["specials"])
    with readable(path, "tiktoken"):
        ranks = load.load_tiktoken_bpe(str(path))
        count = len(ranks)
        if sorted(ranks.values()) != list(range(count)):
            raise CheckpointError(
                f"`{path.name}`: the ranks of {count} tokens are not 0 to {count - 1}; "
                "complete the download"
            )
        if (longest := max(map(len, ranks))) > MAX_TOKEN_BYTES:
            raise CheckpointError(
                f"`{path.name}`: a token of {longest} bytes, expected {MAX_TOKEN_BYTES} at most; "
                "complete the download"
            )
        # The name of the argument has changed between 4.x and 5.x, where the other is ignored.
        converter = TikTokenConverter(  # type: ignore[no-untyped-call]
            str(path), additional_special_tokens=[], extra_special_tokens=[]
        )
        tokenizer = converter.converted()
    huggingface.add_specials(tokenizer, specials)
    begin = specials[0]
    template = processors.TemplateProcessing(
        single=f"{begin} $A",
        pair=f"{begin} $A {begin}:1 $B:1",
        special_tokens=[(begin, count)],
    )
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), template]
    )
    encoding = Encoding(
        path.name,
        pat_str=converter.pattern,
        mergeable_ranks=ranks,
        special_tokens={text: count + place for place, text in enumerate(specials)},
    )

    def expected(text: str) -> list[int]:
        return encoding.encode(text, allowed_special="all")

    huggingface.check(tokenizer, expected, (begin, *specials[-1:]), path)
    ends = {count + place for place, text in enumerate(specials) if text in ENDS}
    bos, eos = huggingface.tokens_of(tokenizer, arguments, path, {count}, ends)
    converted = Converted(tokenizer, {"bos_token": bos, "eos_token": eos}, {})
    huggingface.write(converted, arguments, path, folder)
