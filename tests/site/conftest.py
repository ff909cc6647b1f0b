"""The finished site, served and opened in a real browser.

`make test` builds it anew and looks at a page of each kind; `--every-page` looks at
every page of ./site, which `make site` has just built.
"""

import functools
import gzip
import http.server
import io
import os
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from mkdocs.config import load_config

from tools import sources

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ["", "attention/dot-product/"]
LIVE = [
    sources.address(sources.name(path))
    for path in sources.pages()
    if "```live name=" in path.read_text(encoding="utf-8")
]
LIVE_SAMPLE = ["attention/dot-product/", "attention/residual/"]


def pytest_addoption(parser):
    parser.addoption(
        "--every-page", action="store_true", help="check every page of ./site"
    )


def every_page(config) -> bool:
    return config.getoption("--every-page", default=False)


def pytest_generate_tests(metafunc):
    if "page_path" in metafunc.fixturenames:
        pages = SAMPLE
        if every_page(metafunc.config):
            found = (ROOT / "site").rglob("*.html")
            names = sorted(path.relative_to(ROOT / "site").as_posix() for path in found)
            pages = [name.removesuffix("index.html") for name in names]
        metafunc.parametrize("page_path", pages, ids=lambda path: path or "home")
    if "figure_path" in metafunc.fixturenames:
        pages = LIVE if every_page(metafunc.config) else LIVE_SAMPLE
        metafunc.parametrize("figure_path", pages, ids=lambda path: path or "home")


@pytest.fixture(scope="session")
def site(request, tmp_path_factory) -> Path:
    """The folder of the built site."""
    if every_page(request.config):
        return ROOT / "site"
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]  # --quiet undoes it
    build = subprocess.run(
        [*command, "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert build.returncode == 0, build.stderr
    return folder


@pytest.fixture(scope="session")
def base_path() -> str:
    """Where the site lives on its host, such as /notes-that-run/."""
    return urlsplit(load_config(str(ROOT / "mkdocs.yml")).site_url).path


@pytest.fixture(scope="session")
def port(site, base_path):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def translate_path(self, path):
            if not path.startswith(base_path):  # the host has other sites there
                return str(site / "no such file")
            return super().translate_path("/" + path.removeprefix(base_path))

        def send_head(self):
            """As the host does: text goes out compressed."""
            path = Path(self.translate_path(self.path.partition("?")[0]))
            path = path / "index.html" if path.is_dir() else path
            kind = self.guess_type(str(path))
            if not path.is_file() or not kind.startswith(("text/", "application/j")):
                return super().send_head()
            body = gzip.compress(path.read_bytes())
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Encoding", "gzip")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            return io.BytesIO(body)

        def send_error(self, code, message=None, explain=None):
            if code != 404:
                return super().send_error(code, message, explain)
            body = (site / "404.html").read_bytes()  # as the host does
            self.send_response(404)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.fixture(scope="session")
def browser(launch, port):
    # Port 80, or Material's previews don't recognize the sitemap's addresses. No name
    # but localhost resolves: nothing can leave this machine.
    rules = f"MAP localhost:80 127.0.0.1:{port}, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    browser = launch(f"--host-resolver-rules={rules}")
    yield browser
    browser.close()


@pytest.fixture(scope="session")
def base(base_path) -> str:
    return f"http://localhost{base_path}"


class Visit:
    """A page that is open, with what it asked for and complained about."""

    def __init__(self, page, base):
        self.page, self.base = page, base
        self.requests: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("console", self._note)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def _note(self, message):
        if message.type in ("error", "warning"):
            self.complaints.append(f"{message.text} {message.location.get('url', '')}")

    def go(self, path: str):
        self.page.goto(self.base + path)
        self.page.wait_for_selector("html.js")
        self.page.evaluate("document.fonts.ready.then(() => true)")
        return self

    def strangers(self) -> list[str]:
        """Requests to any host but the site's own."""
        own = (self.base, "data:", "blob:")
        return [url for url in self.requests if not url.startswith(own)]

    def axe(self) -> list[str]:
        """What axe finds wrong, a line each."""
        found = Axe().run(self.page, options={"resultTypes": ["violations"]}).response
        return [
            f"{fault['id']}: {node['html'][:150]}"
            for fault in found["violations"]
            for node in fault["nodes"]
        ]

    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        return self.page.evaluate(
            "(all => all.scrollWidth - all.clientWidth)(document.documentElement)"
        )


@pytest.fixture(scope="session")
def shared(browser):
    """One profile for all visits that leave no trace in it."""
    with browser.new_context() as context:
        yield context


@pytest.fixture
def visit(browser, shared, base):
    """visit(path, width=…, scheme=…) opens a page; with options, in a fresh profile."""
    opened = []

    def open_page(path=None, *, width=1440, height=900, scheme="light", **options):
        context = shared
        if options:
            context = browser.new_context(**options)
            opened.append(context)
        page = context.new_page()
        opened.insert(0, page)
        page.set_default_timeout(10_000)
        page.set_viewport_size({"width": width, "height": height})
        page.emulate_media(color_scheme=scheme)
        made = Visit(page, base)
        return made if path is None else made.go(path)

    yield open_page
    for one in opened:
        one.close()
