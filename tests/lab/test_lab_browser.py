"""In a real browser: both sides answer, controls act, plans are kept, windows keep apart, nothing is fetched."""

from __future__ import annotations

import gc
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest
from test_lab import ANSWER, BAD_PROMPT, GOOD_PROMPT, REFUSAL, first_probabilities

import browser
from abliterate import lab
from abliterate.config import MeasureSettings, ModelSettings, PromptSettings
from abliterate.errors import UsageError
from abliterate.lab import Bench
from abliterate.lab.markup import escape
from abliterate.record import read_record
from planted import plant

#: In the server's threads a warning of the libraries below the page would end their work.
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(find_spec("gradio") is None, reason="the extra lab is not installed"),
]

#: Everything in the lab here takes well under a second, applying a plan a few.
_PATIENCE = 60_000


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser.chromium() as found:
        yield found


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    planted = plant(tmp_path_factory.mktemp("planted"))
    prompts = PromptSettings(
        harmful=str(planted.harmful), harmless=str(planted.harmless), borderline=str(planted.borderline)
    )
    measuring = MeasureSettings(loading=ModelSettings(device="cpu", batch_size="64"), prompts=prompts)
    return lab.open_bench(str(planted.folder), measuring, root=tmp_path_factory.mktemp("root"))


@pytest.fixture(scope="module")
def url(bench: Bench) -> Iterator[str]:
    with lab.running(bench) as address:
        yield address
    gc.collect()  # event loops that Gradio leaves open are warnings when they go, which must be here, not at the end


class Window:
    """A page of the lab that is watched: requests to elsewhere and complaints end the test."""

    def __init__(self, browser: Any, url: str) -> None:
        self.url, self.elsewhere, self.complaints = url, list[str](), list[str]()
        self.page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
        self.page.set_default_timeout(_PATIENCE)
        self.page.on("request", self._request)
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(url)
        self.page.wait_for_selector("#prompt textarea")

    def _request(self, request: Any) -> None:
        if not request.url.startswith((self.url, "data:", "blob:")):
            self.elsewhere.append(request.url)

    def expect(self, selector: str, text: str) -> None:
        self.page.wait_for_function(
            "([selector, text]) => document.querySelector(selector)?.innerText.includes(text)", arg=[selector, text]
        )

    def send(self, prompt: str) -> None:
        self.page.fill("#prompt textarea", prompt)
        self.page.click("#send")

    def strength(self, value: float) -> None:
        self.page.fill("#strength input[type=number]", str(value))
        self.page.press("#strength input[type=number]", "Tab")

    def number(self, of: str) -> float:
        return float(self.page.get_attribute(f'#measured [data-of="{of}"]', "data-value"))

    def measured(self, of: str, change: Callable[[], None]) -> float:
        """The number `of`, once it has changed with `change`."""
        before = self.page.get_attribute(f'#measured [data-of="{of}"]', "data-value")
        change()
        self.page.wait_for_function(
            "([of, before]) => ![undefined, before].includes("
            "document.querySelector(`#measured [data-of=${of}]`)?.dataset.value)",
            arg=[of, before],
        )
        return self.number(of)

    def close(self) -> None:
        self.page.context.close()
        assert self.elsewhere == []
        assert self.complaints == []


@pytest.fixture
def opened(chromium: Any, url: str) -> Iterator[Callable[[], Window]]:
    """Opens windows; at the end each must have kept to this machine and been silent."""
    windows: list[Window] = []

    def another() -> Window:
        windows.append(Window(chromium, url))
        return windows[-1]

    yield another
    for window in windows:
        window.close()


def test_both_sides_answer_and_their_tokens_are_coloured(opened: Callable[[], Window]) -> None:
    window = opened()
    window.send(BAD_PROMPT)
    window.expect("#original", REFUSAL)
    window.expect("#edited", ANSWER)
    window.expect("#coloured", REFUSAL)
    window.expect("#coloured", ANSWER)
    window.expect("#measured", "KL of the first token")
    assert window.number("original") > 0.9
    assert window.number("plan") < 0.1


def test_strength_changes_numbers_and_answers(opened: Callable[[], Window]) -> None:
    window = opened()
    window.send(BAD_PROMPT)
    window.expect("#edited", ANSWER)
    window.expect("#measured", "KL of the first token")
    assert window.measured("kl", lambda: window.strength(0)) == 0
    window.page.click("#clear")
    window.send(BAD_PROMPT)
    window.expect("#edited", REFUSAL)
    assert ANSWER not in window.page.inner_text("#edited")


def test_adding_makes_it_refuse(opened: Callable[[], Window]) -> None:
    window = opened()
    window.page.click("#mode label:has-text('add')")
    window.page.wait_for_selector("#coefficient", state="visible")
    window.send(GOOD_PROMPT)
    window.expect("#original", ANSWER)
    window.expect("#edited", REFUSAL)


def test_a_click_on_the_map_takes_the_site(opened: Callable[[], Window]) -> None:
    window = opened()
    assert window.page.locator('#map [data-site="2:-3"][aria-pressed]').count() == 0
    window.page.click('#map [data-site="2:-3"]')
    window.page.wait_for_selector('#map [data-site="2:-3"][aria-pressed]')
    assert window.page.input_value("#site input") == "layer 2, position -3"
    assert window.page.locator("#map [aria-pressed]").count() == 1


def test_a_plan_is_saved_loaded_and_applied(opened: Callable[[], Window], bench: Bench) -> None:
    window = opened()
    window.send(BAD_PROMPT)
    window.expect("#measured", "KL of the first token")
    partly = window.measured("plan", lambda: window.strength(0.6))
    window.page.fill("#name input, #name textarea", "six")
    window.page.click("#save")
    window.expect("#kept", "Saved as")
    window.page.fill("#name input, #name textarea", "six-weights")
    window.page.click("#weights")
    window.expect("#kept", "Written to")
    out = bench.root / "six-weights"
    assert read_record(out).plan is not None
    written = first_probabilities(out, BAD_PROMPT)[list(bench.tokens)].sum()
    assert float(written) == pytest.approx(partly, abs=1e-4)
    unedited = first_probabilities(bench.loaded.files.folder, BAD_PROMPT)[list(bench.tokens)].sum()
    assert abs(float(unedited) - partly) > 1e-3

    other = opened()
    other.send(BAD_PROMPT)
    other.expect("#measured", "KL of the first token")

    def load() -> None:
        with other.page.expect_file_chooser() as chooser:
            other.page.click("#load")
        chooser.value.set_files(bench.root / "six.safetensors")

    assert other.measured("plan", load) == pytest.approx(partly, abs=1e-6)
    other.expect("#kept", "Loaded six.safetensors")


def test_an_adapter_is_written(opened: Callable[[], Window], bench: Bench) -> None:
    window = opened()
    window.page.fill("#name input, #name textarea", "adapter")
    window.page.click("#lora")
    window.expect("#kept", "Written to")
    assert (bench.root / "adapter" / "adapter_config.json").is_file()


@pytest.mark.parametrize("button", ["#save", "#weights"])
def test_a_path_for_a_name_is_refused_in_one_line(button: str, opened: Callable[[], Window], bench: Bench) -> None:
    window = opened()
    before = sorted(bench.root.parent.rglob("*"))
    window.page.fill("#name input, #name textarea", "../elsewhere")
    window.page.click(button)
    window.expect(".toast-body", "a name, no path")
    assert sorted(bench.root.parent.rglob("*")) == before


def test_two_windows_do_not_disturb_each_other(opened: Callable[[], Window]) -> None:
    one, other = opened(), opened()
    one.strength(0)
    one.page.fill("#prompt textarea", BAD_PROMPT)
    other.page.fill("#prompt textarea", BAD_PROMPT)
    one.page.click("#send")
    other.page.click("#send")
    one.expect("#edited", REFUSAL)
    other.expect("#edited", ANSWER)
    for window in (one, other):
        window.expect("#original", REFUSAL)
        window.expect("#measured", "KL of the first token")
        assert window.page.locator("#edited .user").count() == 1
    assert one.page.input_value("#strength input[type=number]") == "0"
    assert other.page.input_value("#strength input[type=number]") == "1"


def test_stop_ends_a_reply(opened: Callable[[], Window], monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(self: Bench, *_: Any) -> Iterator[tuple[int, ...]]:
        said: tuple[int, ...] = ()
        for _step in range(400):
            time.sleep(0.05)
            said = (*said, 7 + len(said) % 2)
            yield said

    monkeypatch.setattr(Bench, "reply", slowly)
    window = opened()
    window.send(BAD_PROMPT)
    window.page.wait_for_selector("#edited .bot")
    window.page.fill("#prompt textarea", GOOD_PROMPT)
    window.page.wait_for_timeout(300)
    assert window.page.input_value("#prompt textarea") == GOOD_PROMPT  # typed while the reply goes on
    window.page.click("#stop")
    window.page.wait_for_selector("#coloured .lab-tokens")
    assert "Error" not in window.page.inner_text("#edited")
    length = len(window.page.inner_text("#edited"))
    window.page.wait_for_timeout(600)
    assert len(window.page.inner_text("#edited")) == length
    monkeypatch.undo()
    window.page.click("#clear")
    window.send(BAD_PROMPT)
    window.expect("#edited", ANSWER)


HOSTILE = "<img src=x onerror=document.title='owned'>![x](http://evil.example/x.png)${1+1}{{1+1}}<script>1</script>"


def test_what_a_model_says_is_text(opened: Callable[[], Window], bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bench, "text", lambda _, tokens: HOSTILE if tokens else "")
    window = opened()
    window.send(BAD_PROMPT)
    window.expect("#edited", HOSTILE)
    window.expect("#coloured", HOSTILE)
    for place in ("#edited", "#original", "#coloured"):
        assert window.page.locator(f"{place} img, {place} script").count() == 0
    assert "owned" not in window.page.title()
    assert "<" not in escape(HOSTILE)


def test_what_an_error_says_is_text(opened: Callable[[], Window], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise UsageError(HOSTILE)

    monkeypatch.setattr("abliterate.lab.windows.save_plan", refuse)
    window = opened()
    window.page.click("#save")
    window.expect(".toast-body", HOSTILE)
    assert window.page.locator(".toast-body img, .toast-body script").count() == 0


def test_the_page_holds_on_a_narrow_screen(opened: Callable[[], Window]) -> None:
    window = opened()
    window.page.set_viewport_size({"width": 390, "height": 844})
    window.send(BAD_PROMPT)
    window.expect("#coloured", ANSWER)
    assert window.page.evaluate("document.documentElement.scrollWidth") <= 390


def test_another_host_or_origin_is_refused(url: str) -> None:
    def status(**headers: str) -> int:
        try:
            with urllib.request.urlopen(urllib.request.Request(url + "config", headers=headers)) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    assert status() == 200
    assert status(Host="evil.example") == 403
    assert status(Origin="http://evil.example") == 403


@pytest.mark.parametrize("path", ["/etc/hostname", "pyproject.toml", "../pyproject.toml"])
def test_files_are_not_handed_out(path: str, url: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(f"{url}gradio_api/file={path}")
    with error.value:
        assert error.value.code in (403, 404)
