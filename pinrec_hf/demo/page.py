"""The page in Gradio: controls on one side; why, candidates and the path of interests on the other."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported

import gradio as gr

from pinrec_hf.demo.answer import add_event
from pinrec_hf.demo.render import text
from pinrec_hf.demo.visit import MOST_ITEMS, MOST_STEPS, NOBODY, Demo, Visit, linked
from pinrec_hf.retrieval.trace import outcome_colour

# the words are announced when they change, which Gradio's wrapper does not say by itself
ON_LOAD = """() => {
    document.documentElement.lang = "en";
    const why = document.querySelector("#why .html-container");
    why.setAttribute("role", "status");
    why.setAttribute("aria-live", "polite");
}"""
FONT = gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700))  # comes with Gradio: nothing is fetched


def create_page(demo: Demo) -> gr.Blocks:
    """The page's components and what moves them; `launch` shows it with its style."""
    names, config = demo.titles, demo.config
    outcomes = [*demo.dials, *(config.negative_outcomes or [])]
    surfaces = list(config.surfaces or [])
    surface_at_first = surfaces[0] if surfaces else None
    about = [f"{len(demo.retriever.tokenizer.catalogue):,} items", ", ".join(surfaces), ", ".join(outcomes)]
    dial_colours = "".join(
        f"#dial-{i} {{ --slider-color: {outcome_colour(name, demo.dials)}; }}" for i, name in enumerate(demo.dials)
    )
    with gr.Blocks(title=f"PinRec: {demo.title}", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(
            f"<style>{dial_colours}</style><header><h1>PinRec</h1>"
            f"<p><b>{text(demo.title)}</b>{text(' · '.join(filter(None, about)))}</p></header>",
            padding=False,
        )
        visit = gr.State(Visit())
        with gr.Row(elem_id="page"):
            with gr.Column(elem_id="controls"):
                with gr.Group():
                    first = demo.users[0] if demo.users else NOBODY
                    more = f"The first {len(demo.users)}; type any other id" if len(demo.users) > 1 else None
                    user = gr.Dropdown(
                        [NOBODY, *demo.users], value=first, label="User", info=more, allow_custom_value=bool(demo.users)
                    )
                    surface = gr.Radio(surfaces, value=surface_at_first, label="Surface")
                    reads = demo.retriever.tokenizer.contexts
                    query = gr.Textbox(label="Search query", placeholder="none", max_lines=1, visible=reads)
                    subject = gr.Dropdown([("nothing", "")], value="", label="Look beside", visible=reads)
                with gr.Group():
                    shares = demo.default_shares(surface_at_first)
                    dials = [
                        gr.Slider(
                            0,
                            100,
                            value=share,
                            step=1,
                            label=f"{outcome}, % of the slots",
                            buttons=[],
                            elem_id=f"dial-{i}",
                        )
                        for i, (outcome, share) in enumerate(zip(demo.dials, shares, strict=True))
                    ]
                    steps = gr.Slider(1, MOST_STEPS, value=4, step=1, label="Steps ahead", buttons=[])
                    k = gr.Slider(1, MOST_ITEMS, value=10, step=1, label="Candidates", buttons=[])
            with gr.Column(elem_id="writing"):
                history = gr.HTML(elem_id="history", padding=False)
                with gr.Group():
                    words = gr.Textbox(
                        label="Add to the history: find by title"
                        if names.has_titles
                        else "Add to the history: find by id",
                        placeholder="words of a title",
                        max_lines=1,
                    )
                    found = gr.Radio([], label="Items found", visible=False)
                    with gr.Row(elem_id="add"):
                        adds = [gr.Button(f"Add as {outcome}", size="sm", interactive=False) for outcome in outcomes]
            with gr.Column(elem_id="results"):
                why = gr.HTML(elem_id="why", padding=False)
                with gr.Row(elem_id="lists"):
                    candidates = gr.HTML(elem_id="candidates", padding=False)
                    compared = gr.HTML(elem_id="compared", padding=False, visible=demo.compare is not None)
                path = gr.HTML(elem_id="path", padding=False)

        controls = [surface, query, subject, steps, k, *dials]
        shown = [visit, why, candidates, compared, path, history]

        def ask(control: str, visit: Visit, *values: Any) -> list[Any]:
            try:
                visit = demo.ask(control, visit, *values)
            except ValueError as error:  # a gr.Error would cover the last answer, which still stands
                gr.Warning(str(error))
                return [gr.skip()] * len(shown)
            return [visit, *demo.show(visit)]

        def choose_user(visit: Visit, user: str | None, *values: Any) -> list[Any]:
            try:
                visit = demo.with_user(visit, user)
            except ValueError as error:
                gr.Warning(str(error))
                return [gr.skip()] * (len(shown) + 1)
            answered = ask("user", visit, *values[:2], None, *values[3:])
            return [*answered, gr.Dropdown(demo.subjects(visit), value="")]

        def choose_surface(visit: Visit, surface: str | None, *values: Any) -> list[Any]:
            shares = demo.default_shares(surface)
            return [*ask("surface", visit, surface, *values[: len(values) - len(dials)], *shares), *shares]

        def turn(dial: int, visit: Visit, *values: Any) -> list[Any]:
            others, shares = values[: -len(dials)], linked(values[-len(dials) :], dial)
            return [*ask(demo.dials[dial], visit, *others, *shares), *shares[:dial], *shares[dial + 1 :]]

        def find(words: str) -> list[Any]:
            items = names.find(words)
            label = "Items found" if items or not words.strip() else "No title holds all of these words"
            return [
                gr.Radio(items, value=items[0][1] if items else None, label=label, visible=bool(words.strip())),
                *(gr.Button(interactive=bool(items)) for _ in adds),
            ]

        def add(outcome: str, visit: Visit, item: Any, *values: Any) -> list[Any]:
            visit = replace(visit, history=add_event(visit.history, item, outcome, values[0]), split=None)
            return [*ask("history", visit, *values), gr.Dropdown(demo.subjects(visit))]

        moves: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last", "api_visibility": "private"}
        page.load(choose_user, [visit, user, *controls], [*shown, subject], **moves)
        page.load(None, js=ON_LOAD, api_visibility="private")
        user.input(choose_user, [visit, user, *controls], [*shown, subject], **moves)
        surface.input(choose_surface, [visit, *controls], [*shown, *dials], **moves)
        for control, moved in {"steps": steps, "k": k}.items():
            moved.input(partial(ask, control), [visit, *controls], shown, **moves)
        for i, dial in enumerate(dials):
            # the moved one is left alone: it may be elsewhere by the time the answer comes
            dial.input(partial(turn, i), [visit, *controls], [*shown, *dials[:i], *dials[i + 1 :]], **moves)
        # a request is about a query or a subject: the one that is given last
        query.submit(lambda: "", None, subject, **moves).then(partial(ask, "query"), [visit, *controls], shown, **moves)
        subject.input(lambda: "", None, query, **moves).then(
            partial(ask, "subject"), [visit, *controls], shown, **moves
        )
        words.input(find, words, [found, *adds], **moves)
        for outcome, button in zip(outcomes, adds, strict=True):
            button.click(partial(add, outcome), [visit, found, *controls], [*shown, subject], **moves)
    return page


def launch(demo: Demo, **options: Any) -> None:
    """Show the page; `options` go to Gradio's `launch`, such as `server_name`, `server_port`."""
    theme = gr.themes.Base(primary_hue="zinc", neutral_hue="zinc", font=[FONT, "system-ui", "sans-serif"])
    theme.set(  # Base's own grey is too faint to read
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        checkbox_label_background_fill_selected="*neutral_800",
        checkbox_label_background_fill_selected_dark="*neutral_100",
        checkbox_label_text_color_selected="white",
        checkbox_label_text_color_selected_dark="*neutral_900",
        block_label_text_color="*neutral_700",
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_200",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        input_placeholder_color="*neutral_500",
    )
    create_page(demo).launch(
        theme=theme, css_paths=Path(__file__).with_name("page.css"), footer_links=[], ssr_mode=False, **options
    )
