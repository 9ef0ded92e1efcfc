"""`mixlm serve`: a web page that answers questions from an index."""

import argparse
import socket
from contextlib import closing

from ..errors import UserError, file_error
from .ask import add_answering_arguments, open_answering

_EXAMPLES = (  # about the articles in mixlm/sample
    "태양계에서 가장 뜨거운 행성은 무엇인가?",
    "제주도에 늘 물이 흐르는 하천이 드문 까닭은 무엇인가?",
    "직지가 인쇄된 절의 이름은 무엇인가?",
    "목화씨를 원나라에서 들여온 사람은 누구인가?",
)
_SECONDS_TO_END = 3  # for what is being answered after Ctrl-C


def add_serve_parser(subparsers) -> None:
    """Add `mixlm serve`."""
    parser = subparsers.add_parser(
        "serve",
        help="answer questions from an index on a web page",
        description=(
            "Serve a page where questions are asked and answers are shown in their passages, in Korean at / and in "
            'English at /en, until Ctrl-C. Programs send {"question": "..."} to /api/answer, and get as JSON what '
            "mixlm ask --json prints, with the scores of each search. Anybody who reaches the address may ask; it is "
            "reached from this machine alone, unless --host says otherwise."
        ),
        epilog=(
            "examples:\n  mixlm serve --index index --reader my-reader\n"
            '  curl --json \'{"question": "한글은 누가 만들었나?"}\' http://127.0.0.1:7860/api/answer'
        ),
    )
    add_answering_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at (default: %(default)s)")
    parser.add_argument(
        "--port", type=int, default=7860, metavar="N", help="the port; 0 is a free one (default: %(default)s)"
    )
    parser.add_argument(
        "--examples",
        nargs="*",
        default=_EXAMPLES,
        metavar="QUESTION",
        help="questions to click on (default: four about mixlm's bundled articles)",
    )
    parser.set_defaults(run=serve_verb)


def serve_verb(arguments: argparse.Namespace) -> None:
    """`mixlm serve`."""
    if not 0 <= arguments.port <= 65_535:
        raise UserError(f"--port {arguments.port}: must be 0 to 65535")
    from ..data.packages import required

    required("gradio", "demo")
    with closing(_bind(arguments.host, arguments.port)) as listener:
        import uvicorn

        from ..serving import build_app

        app = build_app(open_answering(arguments), arguments.examples)
        listener.listen()
        host, port = listener.getsockname()[:2]
        print(f"http://{f'[{host}]' if ':' in host else host}:{port}/  (Ctrl-C ends it)", flush=True)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=_SECONDS_TO_END)
        uvicorn.Server(config).run(sockets=[listener])


def _bind(host: str, port: int) -> socket.socket:
    """A socket that does not listen yet: an address that is taken is told before anything is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except UnicodeError as error:  # of what cannot be a name at all, before it is looked up
        raise UserError(f"--host {host}: is no name of a machine; give an address, such as 127.0.0.1") from error
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: cannot listen there ({file_error(error)})") from error
    return listener
