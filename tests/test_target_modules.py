"""The command that names a backbone's linear maps; what it names is there, and PEFT finds it."""

import json
from collections.abc import Callable

import pytest
from tiny import tiny_clip, tiny_pair, tiny_siglip

from hf_glovlm import load_backbone, target_modules
from hf_glovlm.cli import main


@pytest.mark.parametrize("backbone", [tiny_clip, tiny_siglip, tiny_pair])
@pytest.mark.parametrize(
    ("options", "keywords"),
    [
        ((), {}),
        (
            ("--towers", "vision", "--projections", "qv", "--mlp", "--last", "1"),
            {"towers": "vision", "projections": "qv", "mlp": True, "last": 1},
        ),
    ],
)
def test_the_command_names_what_is_there(
    backbone: Callable[[], object],
    options: tuple[str, ...],
    keywords: dict[str, object],
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = str(backbone())
    command = ["backbones", "modules", name, *options]
    assert main([*command, "--json"]) == 0
    names = json.loads(capsys.readouterr().out)
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines() == names
    towers = load_backbone(name)[0].backbone
    assert names == target_modules(towers, **keywords)  # type: ignore[arg-type]
    # Two towers of two blocks with q, k, v and o; or one block with q, v and both maps of its MLP.
    assert len(names) == len(set(names)) == (4 if options else 16)
    assert all(hasattr(towers.get_submodule(name), "weight") for name in names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--towers", "visoin"), "found 'visoin'"),
        (("--projections", "qx"), "found 'x'"),
        (("--last", "-1"), "--last"),
    ],
)
def test_wrong_options_are_named(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["backbones", "modules", str(tiny_clip()), *options]) == 2
    assert message in capsys.readouterr().err
