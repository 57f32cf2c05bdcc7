"""Damage to texts that people write: YAML, and words of a command line."""

import json
from random import Random

INDEX = json.dumps(
    {
        "metadata": {"total_size": 1234},
        "weight_map": {f"model.layers.{n}.w": f"model-{n:05d}.safetensors" for n in range(5)},
        "numbers": [1, -2, 3.5, 1e-5, True, None],
    }
).encode()
WORDS = b"src.mesh={tp: 2}\ndst.mesh.tp=4\nengine.memory=256MiB\ndst.rope_interleaved=false"

LINES = (
    *("a: !!python/object/apply:os.system [id]", "a: !!binary aGk=", "a: !x y", "%TAG ! tag:x,1:"),
    *("a: &a [1]\nb: [*a, *a, *a, *a]", "<<: {engine: {}}", "a: " + "[" * 200, "a: " + "{x: " * 50),
    *("? [a, b]\n: 1", "- x", "a: 1\na: 2", "...", "---", "a: " + "9" * 5000, "a: 1:1:1:1:1:1"),
    *("a: " + "1:" * 3000 + "1", "\tx: 1", "a: 2001-01-01", "a: 0x" + "f" * 3000, "a: .inf"),
    *("a: ${oc.create:{b: 1}}", "a: ${oc.decode:'[1,2]'}", "a: ${oc.select:a}", "a: ${b:1}"),
    *("a: ${oc.dict.keys:engine}", "a: ${oc.env:HOME,${oc.env:PATH}}", "a: ${a}", "a: ${.a}"),
    *(r"a: \${oc.create:1}", r"a: \\\${oc.create:1}", "a: ???", 'a: "\\e[2J"', 'a: "\\uD800"'),
    *("src: {path: 5}", "src: {nope: 1}", "src: {mesh: {tp: 99999999999}}", "dst: {dtype: x}"),
    *("src: {topology: ../../x}", "src: {topology: meta999999}", "dst: {topology: tp0}", "\0"),
    "a: ${oc.env:" + "A" * 3000 + "}",
    "\n".join(f"a{n}: ${{a{n + 1}}}${{a{n + 1}}}" for n in range(30)) + "\na30: aaaaaaaa",
    "a: '" + "x" * 100_000 + "'",
    "a: [" + "1, " * 30_000 + "]",
)
VALUES = (
    *("{", "[", "]", "!!x", "&a", "*a", "${", "${oc.env:X}", "${nope}", "", "null", "1e999", "-1"),
    *(
        "[" * 100,
        "9" * 5000,
        "1:" * 2000 + "1",
        "a\x1b[2J",
        "\\${x}",
        "??? ",
        "%",
        "@",
        "`",
        "x: y",
    ),
)


def edit_yaml(rng: Random, data: bytes) -> bytes:
    """A line more, or another value behind a colon."""
    lines = data.decode().splitlines()
    if rng.random() < 0.7:
        line = rng.choice(LINES)
        if rng.random() < 0.3:
            line = line.replace("a:", rng.choice(("src:", "dst:", "engine:")), 1)
        lines.insert(rng.randint(0, len(lines)), line)
    else:
        place = rng.randrange(len(lines))
        key, colon, _ = lines[place].partition(":")
        lines[place] = f"{key}{colon} {rng.choice(VALUES)}"
    return "\n".join(lines).encode()


def edit_words(rng: Random, data: bytes) -> bytes:
    """Another value behind an equals sign, or another word."""
    words = data.decode().splitlines()
    place = rng.randrange(len(words))
    key, equals, _ = words[place].partition("=")
    key = rng.choice((key, key, "dst.dtype", "src.model", "src.nope", "dst.mesh.tp.x", "src[0]"))
    words[place] = key + (equals or "=") + rng.choice((*VALUES, *LINES))
    return "\n".join(words).encode()
