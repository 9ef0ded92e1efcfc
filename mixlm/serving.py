"""A web page, and an interface for programs, that answer questions from an index (`mixlm serve`).

`POST /api/answer` with the JSON object {"question": "..."} gives what `result_of` returns, as JSON. Otherwise there is
{"error": "..."}: with status 400 what cannot be answered, see `problem_of`, 413 a body of more than 64 KiB or one
whose Content-Length does not say its size, and 503 a question where 200 are waiting.

The page is at / in Korean and at /en in English. It asks nothing of any other server.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio
from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, Request
from fastapi.datastructures import Headers
from fastapi.responses import JSONResponse

from .open_qa import OpenQA
from .retrieval.fusion import fuse
from .retrieval.hits import PassageHit
from .retrieval.search import CANDIDATES
from .retrieval.shards import ShardedIndex

LONGEST_QUESTION = 1000  # characters
MOST_WAITING = 200  # questions; one is answered at a time, and none should wait for minutes
LARGEST_BODY = 64 * 1024  # bytes of a request: the longest question in any encoding, and what the page sends with it

# The page could not ask another server even if somebody's text got that far.
_ONLY_FROM_HERE = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
_FONTS = ("Apple SD Gothic Neo", "Malgun Gothic", "Noto Sans CJK KR", "NanumGothic", "system-ui", "sans-serif")


@dataclass(frozen=True)
class Labels:
    """What the page says in a language; `{count}` stands for a number."""

    title: str
    subtitle: str
    question: str
    placeholder: str
    ask: str
    examples: str
    answer: str
    no_answer: str
    nothing_found: str
    passages: str
    legend: str
    dense: str
    lexical: str
    hybrid: str
    reader: str
    busy: str
    empty: str
    too_long: str
    not_text: str


KOREAN = Labels(
    title="글에서 답을 찾아 드립니다",
    subtitle="문단 {count:,}개 가운데 질문과 관련된 것을 찾아 읽고, 답이 되는 대목을 짚어 드립니다.",
    question="질문",
    placeholder="궁금한 것을 적어 주세요 (1,000자까지)",
    ask="답 찾기",
    examples="예시 질문",
    answer="답",
    no_answer="찾은 문단에는 답이 없습니다.",
    nothing_found="질문과 관련된 문단을 찾지 못했습니다.",
    passages="찾아 읽은 문단 {count:,}개",
    legend="벡터, 어휘(BM25), 하이브리드는 문단이 질문에 맞는 정도, 독해는 표시한 대목이 답으로 알맞은 정도입니다.",
    dense="벡터",
    lexical="어휘",
    hybrid="하이브리드",
    reader="독해",
    busy="지금은 질문이 너무 많습니다. 잠시 뒤에 다시 물어 주세요.",
    empty="질문을 적어 주세요.",
    too_long="질문은 1,000자까지 적을 수 있습니다. 지금은 {count:,}자입니다.",
    not_text="질문에 온전하지 않은 글자가 들어 있습니다. UTF-8로 적어 주세요.",
)
ENGLISH = Labels(
    title="Answers from your texts",
    subtitle="Finds what is about your question among {count:,} passages, reads it, and points at the answer.",
    question="Question",
    placeholder="What would you like to know? (up to 1,000 characters)",
    ask="Ask",
    examples="Examples",
    answer="Answer",
    no_answer="The passages that were found have no answer.",
    nothing_found="No passage was found for this question.",
    passages="Passages that were read: {count:,}",
    legend="Dense, lexical (BM25) and hybrid: how well a passage was found. Reader: how good an answer its mark is.",
    dense="dense",
    lexical="lexical",
    hybrid="hybrid",
    reader="reader",
    busy="Too many questions are waiting; ask again in a while.",
    empty="The question is empty; ask something.",
    too_long="A question has at most 1,000 characters; this one has {count:,}.",
    not_text="The question holds half of a character; write it in UTF-8.",
)

# In the order in which they are shown; by reciprocal rank fusion, hybrid scores are small.
_SCORE_FORMATS = {"hybrid": ".4f", "dense": ".2f", "lexical": ".2f", "reader": ".2f"}


def problem_of(question: str, labels: Labels) -> str | None:
    """Why a question cannot be answered, in one line; None if it can.

    It is empty, has more than `LONGEST_QUESTION` characters, or has half of a surrogate pair.
    """
    if not question.strip():
        return labels.empty
    if len(question) > LONGEST_QUESTION:
        return labels.too_long.format(count=len(question))
    try:
        question.encode()
    except UnicodeEncodeError:
        return labels.not_text
    return None


def result_of(answering: OpenQA, question: str) -> dict[str, Any]:
    """The answer to a question, and the passages that were read for it.

    Args:
        answering: what answers it.
        question: one that `problem_of` has nothing against.

    Returns:
        What `OpenAnswer.record` returns; "answer" is "" for "no answer". Each of its "candidates" has "lexical_score"
        too, and where search is by vectors "dense_score" and "hybrid_score": those of `mixlm search`. Several indexes
        have "dense_score" alone. A score is None where the passage is not among the first 200 of that search.
    """
    result = answering.answer(question).record(question)
    id_of_row = answering.index.passages.id_of_row
    for name, hits in _rankings(answering, question).items():
        scores = {id_of_row(row): score for row, score in hits}
        for candidate in result["candidates"]:
            candidate[f"{name}_score"] = scores.get(candidate["passage"]["id"])
    return result


def _rankings(answering: OpenQA, question: str) -> dict[str, list[PassageHit]]:
    """What each search that there is finds for a question."""
    index, search = answering.index, answering.search
    if isinstance(index, ShardedIndex):
        return {"dense": next(search.dense([question], CANDIDATES)).hits}
    lexical = next(index.find([question], CANDIDATES)).hits
    if search is None:
        return {"lexical": lexical}
    dense = next(search.dense([question], CANDIDATES)).hits
    return {
        "dense": dense,
        "lexical": lexical,
        "hybrid": fuse(dense, lexical, index.weight, CANDIDATES, index.passages.id_of_row),
    }


def build_app(answering: OpenQA, examples: Sequence[str]) -> FastAPI:
    """The page and the interface for programs, as an application for any ASGI server.

    Args:
        answering: what answers; one question at a time.
        examples: questions that a visitor can click on.
    """
    app = FastAPI(openapi_url=None)  # whose pages would come with scripts from elsewhere
    one_at_a_time = CapacityLimiter(1)  # threads cannot share a tokenizer, and would only share the cores
    accepted = 0  # counted here, since the limiter hears of a question only some turns of the event loop later

    async def ask(question: str) -> dict[str, Any] | None:
        """None where too many are waiting."""
        nonlocal accepted
        if accepted > MOST_WAITING:  # one of them is being answered
            return None
        accepted += 1
        try:
            return await to_thread.run_sync(result_of, answering, question, limiter=one_at_a_time)
        finally:
            accepted -= 1

    @app.middleware("http")
    async def guard(request: Request, handle):
        if "upload" in request.url.path.split("/"):  # Gradio would keep any file of anybody, and show it to all
            return JSONResponse({"error": "files are not taken"}, 404)
        if request.method == "POST" and not _is_small(request.headers):
            problem = (
                f"a request has at most {LARGEST_BODY:,} bytes, says how many in Content-Length, and is not in chunks"
            )
            return JSONResponse({"error": problem}, 413)
        response = await handle(request)
        response.headers["Content-Security-Policy"] = _ONLY_FROM_HERE
        return response

    @app.post("/api/answer")
    async def answer(request: Request) -> JSONResponse:
        try:
            question = (await request.json())["question"]
        except (ValueError, LookupError, TypeError, RecursionError):
            question = None
        if not isinstance(question, str):
            return JSONResponse({"error": 'send a JSON object: {"question": "..."}'}, 400)
        if (problem := problem_of(question, ENGLISH)) is not None:
            return JSONResponse({"error": problem}, 400)
        result = await ask(question)
        return JSONResponse({"error": ENGLISH.busy}, 503) if result is None else JSONResponse(result)

    def add_page(labels: Labels) -> None:
        async def show(question: str) -> str:
            if (problem := problem_of(question, labels)) is not None:
                return f'<p class="notice">{escape(problem)}</p>'
            result = await ask(question)
            return f'<p class="notice">{escape(labels.busy)}</p>' if result is None else result_html(result, labels)

        gradio.Navbar(main_page_name="한국어")
        gradio.HTML(_head_html(labels, len(answering.index.passages)), elem_id="head")
        with gradio.Row(elem_id="ask"):
            question = gradio.Textbox(
                show_label=False, container=False, placeholder=labels.placeholder, autofocus=True, scale=5
            )
            button = gradio.Button(labels.ask, variant="primary", scale=1, min_width=110)
        # Made before the examples, which fill it, and shown below them.
        result = gradio.HTML(render=False, elem_id="result")
        if examples:
            gradio.Examples(
                [[example] for example in examples],
                question,
                result,
                show,
                cache_examples=False,
                label=labels.examples,
                run_on_click=True,
                api_visibility="private",
            )
        result.render()
        gradio.on([button.click, question.submit], show, question, result, api_visibility="private")

    with gradio.Blocks(title="mixlm", analytics_enabled=False) as page:
        page.queue(max_size=MOST_WAITING)
        add_page(KOREAN)
    with page.route("English", "en"):
        add_page(ENGLISH)
    theme = gradio.themes.Default(font=_FONTS, font_mono=("ui-monospace", "monospace"), primary_hue="teal")
    theme.set(button_primary_background_fill="*primary_700", button_primary_background_fill_hover="*primary_800")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="SSR mode")  # it is off in any case
        return gradio.mount_gradio_app(
            app, page, "", footer_links=[], run_history=False, ssr_mode=False, theme=theme, css=_STYLE
        )


def _is_small(headers: Headers) -> bool:
    """Whether a body is known to be small before it comes."""
    # Where there is a Transfer-Encoding, the body is as long as its chunks are, and the Content-Length says nothing.
    length = headers.get("content-length", "")
    return "transfer-encoding" not in headers and length.isdecimal() and int(length) <= LARGEST_BODY


def result_html(result: dict[str, Any], labels: Labels) -> str:
    """What `result_of` returns, as HTML. Text of questions and passages is escaped."""
    candidates = result["candidates"]
    if not candidates:
        return f'<p class="notice">{escape(labels.nothing_found)}</p>'
    if result["answer"]:
        head = f'<div class="answer"><span>{escape(labels.answer)}</span><b>{escape(result["answer"])}</b></div>'
    else:
        head = f'<p class="notice no-answer">{escape(labels.no_answer)}</p>'
    passages = "".join(
        _passage_html(candidate, labels, is_answer=bool(result["answer"]) and not place)
        for place, candidate in enumerate(candidates)
    )
    count = escape(labels.passages.format(count=len(candidates)))
    return f'{head}<h2>{count}</h2><p class="legend">{escape(labels.legend)}</p>{passages}'


def _passage_html(candidate: dict[str, Any], labels: Labels, is_answer: bool) -> str:
    passage, start, end = candidate["passage"], candidate["start"], candidate["end"]
    before, marked, after = (
        escape(part) for part in (passage["text"][:start], passage["text"][start:end], passage["text"][end:])
    )
    scores = "".join(
        f"<span>{escape(getattr(labels, name))} <b>{candidate[key]:{form}}</b></span>"
        for name, form in _SCORE_FORMATS.items()
        if candidate.get(key := f"{name}_score") is not None
    )
    mark = f"<mark>{marked}</mark>" if marked else ""
    return (
        f'<details class="passage{" with-answer" if is_answer else ""}"{" open" if is_answer else ""}>'
        f'<summary><span class="title">{escape(passage["title"] or passage["id"])}</span>'
        f'<span class="scores">{scores}</span></summary>'
        f'<p dir="auto">{before}{mark}{after}</p></details>'
    )


def _head_html(labels: Labels, passages: int) -> str:
    subtitle = escape(labels.subtitle.format(count=passages))
    return f"<h1>{escape(labels.title)}</h1><p>{subtitle}</p>"


_STYLE = """
.gradio-container { max-width: 860px !important; margin: 0 auto !important; }
#head, #result { --muted: color-mix(in srgb, var(--body-text-color) 68%, transparent); }
#head .html-container, #result .html-container { padding: 10px 0; }
#head h1 { font-size: 28px; font-weight: 700; margin: 12px 0 4px; }
#head p, #result .legend { color: var(--muted); }
#result .notice { font-size: 17px; padding: 12px 0; }
#result .answer { border-left: 4px solid var(--color-accent); padding: 4px 0 4px 16px; margin: 12px 0 24px; }
#result .answer span { display: block; font-size: 14px; color: var(--muted); }
#result .answer b { font-size: 26px; line-height: 1.35; overflow-wrap: anywhere; }
#result h2 { font-size: 17px; font-weight: 700; margin: 0; }
#result .legend { font-size: 13px; margin: 2px 0 8px; }
#result .passage { border-top: 1px solid var(--border-color-primary); padding: 10px 0; }
#result summary { cursor: pointer; display: flex; flex-wrap: wrap; gap: 2px 14px; align-items: baseline; }
#result summary::before { content: "▸"; color: var(--muted); width: 10px; }
#result [open] summary::before { content: "▾"; }
#result .title { flex: 1 1 180px; font-weight: 600; overflow-wrap: anywhere; }
#result .scores span { font-size: 13px; color: var(--muted); margin-left: 14px; white-space: nowrap; }
#result .scores b { color: var(--body-text-color); font-variant-numeric: tabular-nums; font-weight: 500; }
#result .passage p { line-height: 1.75; white-space: pre-line; overflow-wrap: anywhere; margin: 8px 0 4px 24px; }
#result .passage p { max-height: 340px; overflow-y: auto; }
#result mark { background: none; color: inherit; border-bottom: 2px dotted var(--muted); }
#result .with-answer mark {
  background: #ffe58a; color: #1c1917; border: 0; border-radius: 3px; padding: 2px 3px; font-weight: 600;
}
"""
