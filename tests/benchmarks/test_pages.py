"""Tables, and their places in pages."""

import pages
import pytest

from mixlm.errors import UserError

PAGE = "Before.\n\n<!-- first -->\n\nold\n\n<!-- end -->\n\n<!-- second -->\n<!-- end -->\n\nAfter.\n"


def test_a_grid():
    rows = [{"a|b": "c|d", "value": 1}, {"a|b": "e", "value": 2.5}]
    assert pages.grid(rows, numbers={"value"}) == "| a\\|b | value |\n|---|--:|\n| c\\|d | 1 |\n| e | 2.5 |"


@pytest.mark.parametrize("name", ["first", "second"])
def test_what_stands_in_a_place_is_replaced_and_nothing_else(name):
    text = PAGE
    for block in ("one", "two"):
        text = pages.replaced(text, name, block)
    assert (
        text
        == {
            "first": PAGE.replace("old", "two"),
            "second": PAGE.replace("<!-- second -->\n<!-- end -->", "<!-- second -->\n\ntwo\n\n<!-- end -->"),
        }[name]
    )


def test_a_page_of_a_file(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE, "utf-8")
    pages.replace(page, "first", "문단")
    assert page.read_text("utf-8") == PAGE.replace("old", "문단")


@pytest.mark.parametrize("name", ["none", "endless", "last"])
def test_a_lost_place_is_named_and_the_page_stays(tmp_path, name):
    text = f"<!-- endless -->\n\n{PAGE}<!-- last -->"
    page = tmp_path / "page.md"
    page.write_text(text, "utf-8")
    with pytest.raises(UserError, match=rf"page.md: the place of {name} is lost; put the lines <!-- {name} --> and"):
        pages.replace(page, name, "new")
    assert page.read_text("utf-8") == text
