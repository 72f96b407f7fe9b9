"""The plots of docs/physics.md: the page names those that are drawn, and drawing them again gives the same."""

from __future__ import annotations

from pathlib import Path

from simulator.physics_plots import FOLDER, draw

PAGE = FOLDER.parent / "physics.md"


def test_the_page_shows_every_plot_and_each_is_there(tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    for file in draw(tmp_path):
        assert f"(img/{file.name})" in text
        assert (FOLDER / file.name).read_text(encoding="utf-8").startswith("<svg")


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = draw(tmp_path / "a"), draw(tmp_path / "b")
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]
