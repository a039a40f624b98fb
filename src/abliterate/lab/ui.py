"""The page: components, and which of them tell `windows` what. Nothing is computed here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from abliterate.errors import AbliterateError, UsageError
from abliterate.lab import markup
from abliterate.lab.bench import Bench
from abliterate.lab.talking import Talk
from abliterate.lab.windows import ADD, FOUND, REMOVE, VARIANTS, Brake, Desk, Reporter, choices, one_line, told

#: A click on a cell of the map says which site it is.
_PICK = """
element.addEventListener('click', (event) => {
  const cell = event.target.closest('[data-site]');
  if (cell && !cell.disabled) trigger('click', {site: cell.dataset.site});
});
"""

#: Windows that may write replies at the same time; the bench interleaves them.
_WINDOWS = 8


def library() -> Any:
    """Gradio; raises `UsageError` where it is not installed."""
    try:
        import gradio
    except ImportError as error:
        raise UsageError("lab: it needs an extra; pip install 'abliterate[lab]'") from error
    return gradio


def build(bench: Bench) -> Any:
    """The page over a bench, as `gradio.Blocks` (not served yet)."""
    gr = library()
    with gr.Blocks(title="abliterate lab", analytics_enabled=False, delete_cache=(600, 600)) as page:
        _Page(gr, bench).lay_out()
    page.queue(api_open=False, default_concurrency_limit=_WINDOWS)
    return page


def look() -> dict[str, Any]:
    """Theme and style, for `launch`: fonts of the system, nothing fetched."""
    gr = library()
    theme = gr.themes.Base(
        primary_hue="cyan",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    return {"theme": theme, "css": (Path(__file__).parent / "style.css").read_text(encoding="utf-8")}


class _Page:
    """Components by name, and their connections."""

    def __init__(self, gr: Any, bench: Bench) -> None:
        self.gr, self.bench, self.desk = gr, bench, Desk(bench)

    def lay_out(self) -> None:
        gr = self.gr
        files = self.bench.loaded.files
        self.plan, self.talk, self.brake = gr.State(None), gr.State(Talk()), gr.State(Brake())
        gr.HTML(f"<h1>abliterate lab</h1>{markup.note(f'{Path(files.name).name} on {self.bench.loaded.device}')}")
        self._chats()
        with gr.Row():
            with gr.Column(min_width=320):
                self._knobs()
            with gr.Column(min_width=320):
                self._numbers()
        self._trace()
        self._plans()
        self._connect()

    def _chats(self) -> None:
        gr = self.gr
        plain = {"render_markdown": False, "latex_delimiters": [], "feedback_options": None, "buttons": []}
        plain |= {"height": 320, "allow_file_downloads": False, "layout": "bubble"}
        with gr.Row():
            self.original = gr.Chatbot(label="original", elem_id="original", min_width=300, **plain)
            self.edited = gr.Chatbot(label="plan", elem_id="edited", min_width=300, **plain)
        with gr.Row():
            self.prompt = gr.Textbox(
                show_label=False, placeholder="A prompt for both", elem_id="prompt", scale=6, min_width=240, max_lines=8
            )
            self.ask = gr.Button("Send", variant="primary", elem_id="send", min_width=80)
            self.stop = gr.Button("Stop", elem_id="stop", min_width=80)
            self.clear = gr.Button("Clear", elem_id="clear", min_width=80)

    def _knobs(self) -> None:
        gr, last = self.gr, self.bench.anatomy.layers - 1
        kinds = list(self.bench.components)
        self.mode = gr.Radio([REMOVE, ADD], value=REMOVE, label="What the plan does with the direction", elem_id="mode")
        self.strength = gr.Slider(
            -2, 2, 1, step=0.05, label="Strength (1 removes, 0 changes nothing)", elem_id="strength"
        )
        self.coefficient = gr.Slider(
            -4, 4, 1, step=0.05, label="Times the raw difference that is added", visible=False, elem_id="coefficient"
        )
        with gr.Row():
            self.first = gr.Slider(0, last, 0, step=1, label="First layer", min_width=130, elem_id="first")
            self.last = gr.Slider(0, last, last, step=1, label="Last layer", min_width=130, elem_id="last")
        self.components = gr.CheckboxGroup(kinds, value=kinds, label="Components", elem_id="components")
        self.variant = gr.Radio(list(VARIANTS), value="plain", label="Variant", elem_id="variant")
        self.limit = gr.Slider(8, 512, 128, step=8, label="Longest reply, in tokens", elem_id="limit")

    def _numbers(self) -> None:
        gr = self.gr
        self.measured = gr.HTML(self.desk.measure(None, Talk(), ""), elem_id="measured")
        self.site = gr.Dropdown(choices(self.bench), value=FOUND, label="Site of the direction", elem_id="site")
        self.map = gr.HTML(self.desk.heat(None, FOUND), elem_id="map", js_on_load=_PICK)

    def _trace(self) -> None:
        gr, layers = self.gr, self.bench.anatomy.layers
        chosen = self.bench.chosen
        start = layers if chosen is None else min(chosen[0], layers)
        with gr.Accordion("The last replies, token by token", open=True):
            self.layer = gr.Slider(
                0, layers, start, step=1, label="Layer whose stream is projected on the direction", elem_id="layer"
            )
            self.coloured = gr.HTML(self.desk.colour(None, Talk(), start), elem_id="coloured")

    def _plans(self) -> None:
        gr = self.gr
        with gr.Accordion("Keep this plan", open=True):
            gr.HTML(markup.note(f"Names are of new files and folders in {self.bench.root}."))
            with gr.Row():
                self.name = gr.Textbox(value="my-plan", show_label=False, elem_id="name", scale=3, min_width=200)
                self.save = gr.Button("Save plan", elem_id="save", min_width=150, size="md")
                self.upload = gr.UploadButton(
                    "Load plan", file_types=[".safetensors"], elem_id="load", min_width=150, size="md"
                )
                self.weights = gr.Button("Apply to weights", elem_id="weights", min_width=150, size="md")
                self.lora = gr.Button("Apply as LoRA", elem_id="lora", min_width=150, size="md")
            self.kept = gr.HTML("", elem_id="kept", min_height=24)

    @property
    def knobs(self) -> list[Any]:
        """The controls in the order of `windows.Knobs`."""
        return [
            self.site,
            self.strength,
            self.first,
            self.last,
            self.components,
            self.variant,
            self.mode,
            self.coefficient,
        ]

    def _told(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return told(function, self._error)

    @property
    def _error(self) -> Any:
        gr = self.gr
        return lambda text: gr.Error(markup.escape(text), print_exception=False, duration=None)

    def _connect(self) -> None:
        silent = {"show_progress": "hidden", "api_visibility": "private"}
        self._connect_numbers(silent)
        self._connect_chats(silent)
        self._connect_plans(silent)

    def _connect_numbers(self, silent: dict[str, Any]) -> None:
        gr = self.gr
        asked = [self.plan, self.talk, self.prompt, *self.knobs]
        measure = {"fn": self.desk.measure, "inputs": asked, "outputs": self.measured, **silent}
        for knob in self.knobs:
            knob.change(**measure, trigger_mode="always_last")
        self.prompt.blur(**measure, trigger_mode="always_last")
        shown = {"inputs": [self.plan, self.site], "outputs": self.map, **silent}
        self.site.change(self.desk.heat, trigger_mode="always_last", **shown)
        self.mode.change(
            lambda mode: (gr.Slider(visible=mode == REMOVE), gr.Slider(visible=mode == ADD)),
            self.mode,
            [self.strength, self.coefficient],
            **silent,
        )

        def picked(event: Any) -> str:
            return str(event.site)

        picked.__annotations__["event"] = gr.EventData  # by which Gradio knows what to hand over
        self.map.click(picked, None, self.site, **silent)
        said = {"inputs": [self.plan, self.talk, self.layer], "outputs": self.coloured, **silent}
        self.layer.change(self.desk.colour, trigger_mode="always_last", **said)

    def _connect_chats(self, silent: dict[str, Any]) -> None:
        def send(*values: Any) -> Iterator[Any]:
            box: Any = ""  # emptied once: the next prompt may be typed meanwhile
            try:
                for now in self.desk.send(*values):
                    yield (*now, box)
                    box = self.gr.skip()
            except AbliterateError as error:
                raise self._error(one_line(error)) from None

        asked = [self.plan, self.talk, self.brake, self.prompt, self.limit, *self.knobs]
        outputs = [self.talk, self.original, self.edited, self.prompt]
        said = {"inputs": [self.plan, self.talk, self.layer], "outputs": self.coloured, **silent}
        measured = {"inputs": [self.plan, self.talk, self.prompt, *self.knobs], "outputs": self.measured, **silent}
        sent = self.gr.on([self.ask.click, self.prompt.submit], send, asked, outputs, trigger_mode="once", **silent)
        sent.then(self.desk.measure, **measured)
        sent.then(self.desk.colour, **said)
        self.stop.click(self.desk.stop, self.brake, None, queue=False, **silent)
        for trigger in (self.clear.click, self.original.clear, self.edited.clear):
            trigger(self.desk.clear, self.brake, outputs[:3], **silent)

    def _connect_plans(self, silent: dict[str, Any]) -> None:
        gr = self.gr
        named = [self.plan, self.name, *self.knobs]
        self.save.click(self._told(self.desk.save), named, self.kept, **silent)
        kinds, last = list(self.bench.components), self.bench.anatomy.layers - 1

        def load(path: str) -> list[Any]:
            plan = self.desk.load(path)
            site = gr.Dropdown(choices=choices(self.desk.at(plan)), value=FOUND)
            shown = self.desk.heat(plan, FOUND)
            said = markup.note(f"Loaded {Path(path).name}; the controls are at its recipe.")
            return [plan, shown, said, site, 1, 0, last, kinds, "plain", REMOVE, 1]

        loaded = self.upload.upload(
            self._told(load), self.upload, [self.plan, self.map, self.kept, *self.knobs], **silent
        )
        asked = [self.plan, self.talk, self.prompt, *self.knobs]
        loaded.then(self.desk.measure, asked, self.measured, **silent)
        for button, realisation in ((self.weights, "weights"), (self.lora, "lora")):
            button.click(
                self._applying(realisation),
                named,
                self.kept,
                api_visibility="private",
                concurrency_id="apply",
                concurrency_limit=1,
            )

    def _applying(self, realisation: str) -> Callable[..., Any]:
        def apply(progress: Any = self.gr.Progress(), *values: Any) -> str:  # noqa: B008 - how Gradio hands it over
            def show(share: float | None, what: str) -> None:
                progress(share or 0.0, desc=what)

            plan, name, *knobs = values
            try:
                return self.desk.apply(plan, name, realisation, Reporter(show), *knobs)
            except AbliterateError as error:
                raise self._error(one_line(error)) from None

        return apply
