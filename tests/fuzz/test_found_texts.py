"""What YAML and a command line may not ask for, and what they may."""

import re

import pytest
from omegaconf import OmegaConf

from reshard import config, yamltext
from tests.fuzz.harness import refusal

REFUSED = {
    "a tag": ("src: !!python/object/apply:os.system [id]", "line 1 has a tag"),
    "a tag of YAML": ("a: 1\nsrc: !!binary aGk=", "line 2 has a tag"),
    "a tag of one's own": ("src: !x y", "has a tag"),
    "an anchor": ("src: &a {}", "has an anchor"),
    "an alias": ("src: *a", "has an alias"),
    "a directive": ("%TAG ! tag:x,1:\n---\nsrc: {}", "has a directive"),
    "depth": ("src: " + "[" * 17 + "]" * 17, "nested deeper than 16 levels"),
    "depth in blocks": ("".join(" " * n + "a:\n" for n in range(20)), "nested deeper than 16"),
    "a long value": ("src: " + "x" * 5000, "line 1 has a value of 5000 characters"),
    "many values": ("src: [" + "1," * 20_000 + "1]", "longer than any configuration"),
    "a text that cannot be printed": ('src: {path: "\\e[2J"}', r"`\x1b[2J` has characters"),
    "oc.create": ("src: {path: '${oc.create:{a: 1}}'}", "the resolver `oc.create` of"),
    "oc.decode": ("src: {path: '${oc.decode:1}'}", "the resolver `oc.decode` of"),
    "oc.select": ("src: {path: '${oc.select:dst}'}", "the resolver `oc.select` of"),
    "oc.dict": ("src: {path: '${oc.dict.keys:dst}'}", "the resolver `oc.dict.keys` of"),
    "of another package": ("src: {path: '${mine:1}'}", "the resolver `mine` of"),
    "with spaces": ("src: {path: '${ oc.decode : 1}'}", "is not allowed"),
    "inside a variable": ("src: {path: '${oc.env:A,${oc.decode:1}}'}", "is not allowed"),
    "inside a reference": ("src: {path: '${${oc.decode:x}}'}", "is not allowed"),
    "escaped": (r"src: {path: '\${oc.decode:1}'}", "is not allowed"),
    "escaped twice": (r"src: {path: '\\\${oc.env:HOME}'}", "is left of what was resolved"),
    "references that double": (
        "\n".join(f"a{n}: ${{a{n + 1}}}${{a{n + 1}}}" for n in range(5)) + "\na5: x",
        "has 10 references to keys",
    ),
    "many variables": ("src: ['" + "${oc.env:A,b}" * 65 + "']", "and 65 to the environment"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_yaml_that_no_configuration_needs(tmp_path, fault):
    text, message = REFUSED[fault]
    file = tmp_path / "job.yaml"
    file.write_text(text)
    assert message in refusal(lambda: config.load(None, None, [], str(file)))


@pytest.mark.parametrize("character", ["\t", "\x7f", "\x85", "\u200f", "\u202e", "\ufeff"])
def test_a_path_with_what_moves_the_text_around_it(character):
    said = refusal(lambda: yamltext.container(OmegaConf.create({"a": f"x{character}y"}), "job"))
    assert "has characters that cannot be printed" in said


@pytest.mark.parametrize("character", ["\u00a0", "\u3000", " ", "\u00e9", "\U0001f600"])
def test_a_path_in_any_script(character, tmp_path):
    path = f"{tmp_path}/x{character}y"
    (tmp_path / "job.yaml").write_text(f'src: {{path: "{path}"}}', encoding="utf-8")
    assert yamltext.read(tmp_path / "job.yaml") == {"src": {"path": path}}
    assert yamltext.container(yamltext.dotlist([f"src.path={path}"], "job"), "job") == {
        "src": {"path": path}
    }


def test_a_file_of_more_than_a_mebibyte(tmp_path):
    (tmp_path / "job.yaml").write_text("#" * ((1 << 20) + 1))
    assert "1048577 bytes, expected 1048576 at most" in refusal(
        lambda: yamltext.read(tmp_path / "job.yaml")
    )


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("src.mesh=!!python/name:os.system", "has a tag"),
        ("src.mesh=${oc.create:{tp: 2}}", "the resolver `oc.create` of"),
        ("src.path=${oc.decode:'[1]'}", "the resolver `oc.decode` of"),
        ("src.mesh=" + "[" * 100, "nested deeper"),
        ("src.model=${", "is not allowed|no viable|missing"),
        ("src.path=" + "x" * 300, "has a part of more than 255 bytes"),
        ("src.path=~nobody-of-this-name/x", "home directory"),
        ("src.model=" + "x" * 300, "is neither a file nor a known model"),
        ("src.a\nb=1", r"`src.a\\nb=1` is not KEY=VALUE"),
        ("dst.dtype=" + "x" * 3000, "dst.dtype: "),
        ("src." + "x" * 3000 + "=1", "unknown key"),
    ],
)
def test_words_that_no_command_needs(item, message):
    found = refusal(lambda: config.load("hf", "tp4", [item], None))
    assert re.search(message, found), found


def test_a_topology_with_a_name_that_no_file_can_have():
    assert "topology `xxx" in refusal(lambda: config.load("x" * 300, "tp4", [], None))


def test_variables_and_references_are_resolved(tmp_path, monkeypatch):
    monkeypatch.setenv("RESHARD_TEST", "/here")
    file = tmp_path / "job.yaml"
    file.write_text(
        "src: {topology: hf, path: '${oc.env:RESHARD_TEST}/a'}\n"
        "dst: {topology: tp4, path: '${src.path}/b'}\n"
        "engine: {memory: '${oc.env:RESHARD_NONE,64MiB}'}\n"
    )
    job = config.load(None, None, [], str(file))
    assert (str(job.source.path), str(job.target.path)) == ("/here/a", "/here/a/b")
    assert job.engine.memory == 64 << 20


def test_a_variable_is_not_resolved_again(tmp_path, monkeypatch):
    monkeypatch.setenv("RESHARD_TEST", "${oc.decode:1}")
    message = refusal(lambda: config.load("hf", "tp4", ["src.path=${oc.env:RESHARD_TEST}"], None))
    assert "is left of what was resolved" in message


def test_resolvers_of_the_process_are_left_alone():
    refusal(lambda: config.load("hf", "tp4", ["src.path=${oc.create:1}"], None))
    assert OmegaConf.has_resolver("oc.create")
