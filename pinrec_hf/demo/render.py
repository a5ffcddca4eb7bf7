"""Answers as HTML: lists, the map, steps, history. All text is escaped here."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

from pinrec_hf.demo.answer import Answer, name_of
from pinrec_hf.demo.titles import TitleSearch
from pinrec_hf.retrieval.retriever import Candidate, PinRecRetriever
from pinrec_hf.retrieval.trace import MAP_EVENTS, outcome_colour, plot_trace

SHOWN_EVENTS = 6


class Renderer:
    """What the page shows of a retriever's answers."""

    def __init__(self, retriever: PinRecRetriever, titles: TitleSearch) -> None:
        self.retriever, self.titles = retriever, titles
        self.outcomes = retriever.model.config.positive_outcomes

    def chip(self, outcome: str | None) -> str:
        negative = outcome is not None and outcome not in self.outcomes
        colour = "#71717a" if negative else outcome_colour(outcome, self.outcomes)
        return f'<span class="chip" style="--chip:{colour}">{text(outcome or "any outcome")}</span>'

    def candidates(self, name: str, now: Answer, before: Answer | None) -> str:
        """The list, each item with its outcome, step and score, and whether the list before had it."""
        old = {candidate.row: rank for rank, candidate in enumerate(before.candidates)} if before else {}
        items = []
        for rank, candidate in enumerate(now.candidates):
            badge = ""
            if before and candidate.row not in old:
                badge = '<span class="badge">new</span>'
            elif before and old[candidate.row] != rank:
                up = old[candidate.row] - rank
                said = f"{'up' if up > 0 else 'down'} {abs(up)}"
                badge = (
                    f'<span class="move" title="{said}" aria-label="{said}">{"↑" if up > 0 else "↓"}{abs(up)}</span>'
                )
            about = f"{self.chip(candidate.outcome)}<span>step {candidate.step}</span>{_score(candidate)}"
            items.append(_item(rank, candidate, about, badge))
        return _list(name, items)

    def compared(self, name: str, now: Answer) -> str:
        """The other model's list, each item with its rank in ours."""
        ranks = {candidate.row: rank for rank, candidate in enumerate(now.candidates, start=1)}
        items = []
        for rank, candidate in enumerate(now.compared or []):
            ours = ranks.get(candidate.row)
            badge = f'<span class="move">PinRec\'s {ours}</span>' if ours else ""
            items.append(_item(rank, candidate, _score(candidate), badge))
        return _list(name, items)

    def path(self, now: Answer) -> str:
        """The map as SVG, and the same in words: what each step's embeddings point at."""
        acted = acted_on(now.request["history"])
        rows = self.retriever.tokenizer.catalogue.rows(acted)
        figure = plot_trace(self.retriever, rows[rows >= 0], now.traced, small=True)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", transparent=True)
        svg = drawn.getvalue()
        svg = svg[svg.index("<svg") :].replace("<svg", '<svg role="img" aria-labelledby="path-caption"', 1)
        svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
        svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
        steps: dict[int, list[str]] = {}
        for one in now.traced:
            if one.offset == 0 and one.nearest:
                fed = '<span class="fed" title="fed back as the next event">fed back</span>' if one.is_fed else ""
                entry = f"{self.chip(one.outcome)}<span>{text(name_of(one.nearest[0]))}{fed}</span>"
                steps.setdefault(one.step, []).append(f'<div class="pointed">{entry}</div>')
        told = "".join(f"<li><b>{step}</b><div>{''.join(lines)}</div></li>" for step, lines in steps.items())
        return (
            f'<section class="card path"><h2>Path of interests</h2><figure>{svg}<figcaption id="path-caption">'
            f"A dot is an item. Grey: the last {MAP_EVENTS} items of the history, older is fainter. Numbers: the item "
            "each step points at, in its outcome's colour. Dashed: what is fed back.</figcaption></figure>"
            f"<ol>{told}</ol></section>"
        )

    def history(self, history: Mapping[str, Sequence[Any]], split: str | None) -> str:
        """The newest events that the model reads: items acted on and queries."""
        items, outcomes = history.get("item_id", ()), history.get("outcomes", ())
        queries = history.get("query", [None] * len(items))
        read = [i for i in range(len(items)) if outcomes[i] or items[i] is None]
        if not read:
            note = "Empty: the list is for a newcomer. Find items below to write one."
            return f'<section class="card"><h2>History</h2><p class="note">{note}</p></section>'
        lines = []
        for i in reversed(read[-SHOWN_EVENTS:]):
            row = self.retriever.tokenizer.catalogue.rows([items[i]] if items[i] is not None else [])
            known = row[row >= 0]
            what = (
                f"search: {queries[i]}" if items[i] is None else self.titles.names(known)[0] if len(known) else items[i]
            )
            time = history["timestamp"][i]
            stamp = "" if time is None else f"<span>{datetime.fromtimestamp(time, UTC):%d %b %H:%M}</span>"
            chips = "".join(map(self.chip, outcomes[i] or ()))
            where = history["surface"][i] or "unknown surface"
            lines.append(
                f'<li><div><div class="title">{text(what)}</div>'
                f'<div class="about">{chips}<span>{text(where)}</span>{stamp}</div></div></li>'
            )
        more = len(read) - len(lines)
        rest = f'<p class="note">and {more:,} earlier</p>' if more else ""
        of = f", up to the end of {split}" if split else ""
        events = f'<ol class="history">{"".join(lines)}</ol>{rest}'
        return f'<section class="card"><h2>History, newest first{of}</h2>{events}</section>'


def acted_on(history: Mapping[str, Sequence[Any]]) -> list[Any]:
    """Item ids of a history that were acted on, oldest first."""
    pairs = zip(history.get("item_id", ()), history.get("outcomes", ()), strict=True)
    return [item for item, outcomes in pairs if item is not None and outcomes]


def sentences(*groups: Sequence[str]) -> str:
    """Paragraphs of sentences; names between backticks as code."""
    paragraphs = [re.sub(r"`([^`]*)`", r"<b>\1</b>", text(" ".join(group))) for group in groups if group]
    return "".join(f"<p>{paragraph}</p>" for paragraph in paragraphs)


def text(value: Any) -> str:
    """Escaped, also for the templates that Gradio and Handlebars would see in it."""
    return escape(str(value)).replace("{", "&#123;").replace("$", "&#36;")


def _score(candidate: Candidate) -> str:
    return f'<span title="inner product; comparable within one outcome">score {candidate.score:.2f}</span>'


def _item(rank: int, candidate: Candidate, about: str, badge: str) -> str:
    return (
        f'<li data-item="{text(candidate.item_id)}"><span class="rank">{rank + 1}</span><div><div class="title">'
        f'{text(name_of(candidate))}</div><div class="about">{about}</div></div>{badge}</li>'
    )


def _list(name: str, items: Sequence[str]) -> str:
    head = text(name.removeprefix("the ").capitalize() if name.startswith("the ") else name)
    return f'<section class="card"><h2>{head}</h2><ol class="items">{"".join(items)}</ol></section>'
