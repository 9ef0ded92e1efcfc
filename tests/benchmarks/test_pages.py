"""Tables, and their places in pages."""

import pages
import pytest

from mixlm.errors import UserError

PAGE = "Before.\n\n<!-- first -->\n\nold\n\n<!-- end -->\n\n<!-- second -->\n<!-- end -->\n\nAfter.\n"


def test_a_grid():
    rows = [{"name": "a|b", "value": 1}, {"name": "c", "value": 2.5}]
    assert pages.grid(rows, numbers={"value"}) == "| name | value |\n|---|--:|\n| a\\|b | 1 |\n| c | 2.5 |"


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


@pytest.mark.parametrize("name", ["third", "last"])
def test_a_lost_place_is_named_and_the_page_stays(tmp_path, name):
    page = tmp_path / "page.md"
    page.write_text(PAGE + "<!-- last -->", "utf-8")
    with pytest.raises(UserError, match=rf"page.md: the place of {name} is lost; put the lines <!-- {name} --> and"):
        pages.replace(page, name, "new")
    assert page.read_text("utf-8") == PAGE + "<!-- last -->"
