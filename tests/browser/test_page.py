"""The page of `mixlm serve` in a real browser; README.md here says which."""

import json
import shutil

import pytest
from answering import StubReader
from local_server import running
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from mixlm.data.passages import Passage
from mixlm.open_qa import OpenQA
from mixlm.retrieval.analysers import BigramAnalyser
from mixlm.retrieval.index import build_index, open_index
from mixlm.serving import ENGLISH, KOREAN, build_app

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
SECONDS = 60  # for a page or an answer, on a busy machine
EVIL = "<img src=x onerror=\"document.title = 'ran'\">"
PASSAGES = [
    Passage("hangul", "한글", "한글은 1443년에 만들어졌다."),
    Passage("evil", "<script>document.title = 'ran'</script>", f"한국의 {EVIL} 7"),
]

pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="Chromium or its driver is not installed (README.md)")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    build_index(PASSAGES, folder / "index", BigramAnalyser())
    with running(
        build_app(OpenQA(open_index(folder / "index"), StubReader()), ["한글은 언제 만들어졌나?", EVIL])
    ) as address:
        yield address


@pytest.fixture
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1000,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(DRIVER)) as browser:
        yield browser


def find(browser, selector: str):
    """The first element that is shown, as soon as it is."""
    return WebDriverWait(browser, SECONDS).until(
        lambda _: next(
            (each for each in browser.find_elements(By.CSS_SELECTOR, selector) if each.is_displayed()), None
        )
    )


def ask(browser, question: str) -> None:
    find(browser, "#ask textarea, #ask input").send_keys(question, Keys.ENTER)


def test_a_question_is_answered_in_its_passage(browser, address, tmp_path):
    browser.get(address)
    assert find(browser, "#head h1").text == KOREAN.title
    ask(browser, "한글은 언제 만들어졌나?")
    assert find(browser, "#result .answer b").text == find(browser, "#result .with-answer mark").text == "1443"
    assert browser.save_screenshot(str(tmp_path / "page.png"))


def test_an_example_is_asked_by_a_click(browser, address):
    browser.get(f"{address}/en")
    assert find(browser, "#head h1").text == ENGLISH.title
    (example,) = browser.find_elements(By.XPATH, "//button[contains(., '한글은 언제 만들어졌나?')]") or [
        find(browser, ".gallery-item, td")
    ]
    example.click()
    assert find(browser, "#result .answer b").text == "1443"


def test_no_text_of_a_passage_becomes_code(browser, address):
    browser.get(address)
    ask(browser, "한국의?")
    assert "<script>" in find(browser, "#result .title").text
    assert "<img src=x" in find(browser, "#result .with-answer p").text
    assert browser.title == "mixlm"


def test_no_question_or_example_becomes_code(browser, address):
    browser.get(address)
    find(browser, "#head h1")
    assert any(EVIL in each.text for each in browser.find_elements(By.CSS_SELECTOR, "button, td"))
    ask(browser, EVIL)
    assert find(browser, "#result .with-answer mark").text == "7"
    assert browser.title == "mixlm" and not browser.find_elements(By.CSS_SELECTOR, "img[src='x']")


def test_the_page_asks_no_other_server(browser, address):
    """By the log of all requests of the browser."""
    browser.get(address)
    ask(browser, "한글은 언제 만들어졌나?")
    find(browser, "#result .answer b")
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]
    asked = [url for url in urls if url.startswith(("http:", "https:", "ws:", "wss:"))]
    assert asked and all(url.removeprefix("http").startswith(address.removeprefix("http")) for url in asked), asked


def test_an_empty_question_is_told_so(browser, address):
    browser.get(address)
    ask(browser, " ")
    assert find(browser, "#result .notice").text == KOREAN.empty
