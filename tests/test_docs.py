"""The documentation is held to the program: every command is in the README, every line shown parses."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from sdlab.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "recipes" / "mini" / "README.md"]


def shown() -> list[tuple[str, str]]:
    """(page, line) of every ``sdlab …`` line in a code block."""
    lines = []
    for page in PAGES:
        for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M):
            for line in block.replace("\\\n", " ").splitlines():
                match = re.match(r"\s*(?:\$ )?(?:accelerate launch .*-m )?(sdlab .*)", line)
                if match:
                    lines.append((page.name, match[1]))
    return lines


@pytest.mark.parametrize(("page", "line"), shown())
def test_every_line_shown_parses(page, line, monkeypatch):
    command, *args = shlex.split(line, comments=True)[1:]
    if command.startswith("-"):
        return
    group = typer.main.get_command(app)
    chosen = group.commands[command.replace("_", "-")]
    context = group.make_context("sdlab", ["--verbose", command, *args])
    chosen.make_context(command, [a for a in args if a not in ("--help",)], parent=context)


def test_every_command_is_in_the_readme_and_every_option_has_help():
    readme = PAGES[0].read_text(encoding="utf-8")
    group = typer.main.get_command(app)
    for name, command in group.commands.items():
        assert f"sdlab {name}" in readme
        assert command.help
        assert all(getattr(p, "help", None) for p in command.params if p.name != "help"), name


def test_no_command_has_more_than_sixty_options():
    for name, command in typer.main.get_command(app).commands.items():
        assert len(command.params) <= 60, name


def test_pages_link_to_files_that_exist():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
