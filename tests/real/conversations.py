"""What the goldens of prompts and tokenizers are made from."""

CONVERSATIONS = {
    "one turn": [("user", "Who are you?")],
    "system": [("system", "You are a helpful assistant"), ("user", " Who are you? ")],
    "turns": [
        ("system", "Be brief.\n"),
        ("user", "1 + 1?"),
        ("assistant", "2"),
        ("user", "Sure?\n\nReally?"),
        ("assistant", " Yes.\n"),
        ("user", "Thanks"),
    ],
}
MERGES, SEED, TEXTS = 60, 3, 40


def messages(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    """A conversation as transformers takes it."""
    return [{"role": role, "content": content} for role, content in turns]
