"""A sentencepiece model, as Llama 1 and 2 have it, for transformers: run in its own process."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

from sentencepiece import SentencePieceProcessor
from tokenizers import processors
from transformers.convert_slow_tokenizer import LlamaConverter, generate_merges

from reshard.tokenizers import huggingface, readable
from reshard.tokenizers.huggingface import Converted

Scores = list[tuple[str, float]]


class _Merges:
    """The vocabulary and its merges, as transformers 4.x asked for them; in 5.x, nobody answers."""

    def __init__(self, file: str) -> None:
        self.file = file

    def extract(self, scores: Scores) -> tuple[dict[str, int], list[tuple[str, str]]]:
        """The id of each piece, and the pairs that make one, best first."""
        vocabulary = {piece: number for number, (piece, _) in enumerate(scores)}
        return vocabulary, generate_merges(vocabulary, scores)


def run(arguments: Mapping[str, object], folder: Path) -> None:
    """Write the files of transformers to `folder`."""
    path = Path(str(arguments["file"]))
    with readable(path, "sentencepiece"):
        pieces = SentencePieceProcessor(model_file=str(path))
        # `legacy`: a blank goes before every text, even one that begins with a blank.
        original = SimpleNamespace(
            vocab_file=str(path),
            convert_ids_to_tokens=pieces.id_to_piece,
            legacy=True,
            add_prefix_space=True,
        )
        converter = LlamaConverter(original)  # type: ignore[no-untyped-call]
        converter.SpmExtractor = _Merges  # type: ignore[assignment]  # no subclass of theirs
        tokenizer = converter.converted()
        named = {
            "unk_token": pieces.id_to_piece(pieces.unk_id()),
            "bos_token": pieces.id_to_piece(pieces.bos_id()),
            "eos_token": pieces.id_to_piece(pieces.eos_id()),
        }
    huggingface.add_specials(tokenizer, list(named.values()))
    begin = named["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A",
        pair=f"{begin} $A {begin}:1 $B:1",
        special_tokens=[(begin, pieces.bos_id())],
    )
    huggingface.check(tokenizer, pieces.encode, (), path)
    huggingface.tokens_of(tokenizer, arguments, path, {pieces.bos_id()}, {pieces.eos_id()})
    further = {"add_bos_token": True, "add_eos_token": False}
    huggingface.write(Converted(tokenizer, named, further), arguments, path, folder)
