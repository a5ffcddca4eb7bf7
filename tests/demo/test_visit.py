"""What the page says of a list is what the list is, and what it says has changed has."""

import re
from collections import Counter

import pytest

from pinrec_hf.demo import visit as visit_module
from pinrec_hf.demo.answer import add_event, name_of, time_after
from pinrec_hf.demo.explain import change, origin
from pinrec_hf.demo.render import text
from pinrec_hf.demo.visit import NOBODY, Demo, Visit, linked
from pinrec_hf.evaluation.ranker import load_model_ranker


@pytest.fixture
def ask(demo):
    """`ask(visit, control, surface=..., query=..., subject=..., steps=..., k=..., save=...)`; the rest is click's."""

    def ask(visit, control="", *, surface="homefeed", query="", subject="", steps=1, k=10, save=50, click=None):
        shares = {"save": save, "click": 100 - save if click is None else click}
        return demo.ask(control, visit, surface, query, subject, steps, k, *(shares[name] for name in demo.dials))

    return ask


@pytest.fixture
def visit(demo):
    return demo.with_user(Visit(), demo.users[0])


@pytest.mark.parametrize(
    ("shares", "moved", "expected"),
    [
        ([70, 50], 0, [70, 30]),
        ([100, 30], 0, [100, 0]),
        ([60, 0], 0, [60, 40]),
        ([40, 40, 20, 30], 3, [28, 28, 14, 30]),
        ([0, 0, 0], 1, [50, 0, 50]),
        ([30], 0, [30]),
    ],
)
def test_dials_sum_to_100_and_keep_the_proportions_of_those_not_moved(shares, moved, expected):
    assert linked(shares, moved) == expected


def test_dials_start_at_the_surface_budget(demo):
    for surface in [None, *demo.config.surfaces]:
        shares = demo.default_shares(surface)
        assert sum(shares) == 100
        budget = demo.config.outcome_budgets.get(surface, dict.fromkeys(demo.dials, 1))
        for outcome, share in zip(demo.dials, shares, strict=True):
            assert share == pytest.approx(100 * budget.get(outcome, 0) / sum(budget.values()), abs=1)


def test_why_counts_what_each_outcome_and_step_brought(ask, visit):
    now = ask(visit, steps=3, k=12, save=75).answer
    said = " ".join(origin(now))
    outcomes = Counter(candidate.outcome for candidate in now.candidates)
    assert len(now.candidates) == 12
    found = {name: int(count) for count, name in re.findall(r"(\d+)(?: of 12 come)? from `(\w+)`", said)}
    assert found == dict(outcomes)
    assert dict(re.findall(r"`(\w+)` \((\d+)% asked for", said)) == {"save": "75", "click": "25"}
    steps = Counter(candidate.step for candidate in now.candidates)
    for step in (1, 2, 3):
        assert re.search(rf"[Ss]tep {step} brought {steps[step] or 'none'}\b", said)


def test_turning_a_dial_changes_the_list_and_the_page_says_how(ask, visit):
    before = ask(visit, "k")
    after = ask(before, "save", save=100)
    assert after.before is before.answer
    old, new = ({candidate.row for candidate in one.answer.candidates} for one in (before, after))
    assert new != old
    said = " ".join(change(after.answer, before.answer))
    assert "`save` 50% → 100%" in said
    assert "`click` 50% → 0%" in said
    assert f"{len(new - old)} new against the last list, {len(old - new)} gone" in said
    for outcome in ("save", "click"):
        slots = [sum(c.outcome == outcome for c in one.answer.candidates) for one in (before, after)]
        assert f"`{outcome}` fills {slots[1]} slots instead of {slots[0]}" in said
    # one step: what an outcome points at does not depend on shares
    assert "What each step points at has not changed." in said


def test_the_step_from_which_the_path_is_another_is_the_first_that_differs(ask, visit):
    before = ask(visit, "k", steps=4, save=100)
    after = ask(before, "save", steps=4, save=30)
    pointed = [
        {one.step: one.nearest[0] for one in answered.traced if one.outcome == "save" and one.nearest}
        for answered in (before.answer, after.answer)
    ]
    differing = [step for step in (1, 2, 3, 4) if pointed[0][step].row != pointed[1][step].row]
    assert differing  # of fixed weights: another outcome is fed back
    said = change(after.answer, before.answer)
    step = differing[0]
    assert step > 1
    assert f"The path is another from step {step} on." in said
    assert f"`save` points at “{name_of(pointed[1][step])}” instead of “{name_of(pointed[0][step])}”." in said


def test_another_history_says_where_the_outcomes_point_now(ask, visit, demo):
    before = ask(visit, "k")
    item = before.answer.candidates[0].item_id
    longer = Visit(visit.user, None, add_event(visit.history, item, "save", "homefeed"), before.answer)
    after = ask(longer, "history")
    assert item not in [c.item_id for c in after.answer.candidates]
    said = change(after.answer, before.answer)
    count = len(visit.history["item_id"])
    assert said[0] == f"History {count} → {count + 1} events."
    first = [{one.outcome: one.nearest[0] for one in a.traced} for a in (before.answer, after.answer)]
    moved = [outcome for outcome in demo.dials if first[0][outcome].row != first[1][outcome].row]
    assert moved
    for outcome in demo.dials:
        line = f"`{outcome}` points first at “{name_of(first[1][outcome])}” instead of “{name_of(first[0][outcome])}”."
        assert (line in said) == (outcome in moved)


def test_the_same_request_is_said_to_be_the_same(ask, visit):
    once = ask(visit, "k")
    assert change(ask(once, "k").answer, once.answer) == ["The same request as the last, and the same list."]


def test_moves_of_one_control_in_one_go_are_held_against_the_list_before_it(ask, visit, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(visit_module.time, "monotonic", lambda: clock[0])
    first = ask(visit, "k", k=5)
    turning = ask(first, "save", save=60)
    clock[0] += 1
    turned = ask(turning, "save", save=90)
    assert turned.before is first.answer
    assert ask(turned, "click", save=80).before is turned.answer
    clock[0] += 60
    assert ask(turned, "save", save=80).before is turned.answer


def test_the_other_models_list_stands_beside_and_no_dial_moves_it(ask, visit, demo):
    one, other = ask(visit, save=100).answer, ask(visit, save=0).answer
    assert [c.row for c in one.candidates] != [c.row for c in other.candidates]
    assert [c.row for c in one.compared] == [c.row for c in other.compared]
    shared = len({c.row for c in one.candidates} & {c.row for c in one.compared})
    said = f"{shared or 'None'} of 10 {'is' if shared == 1 else 'are'} in the two-tower's list too"
    assert said in " ".join(origin(one, demo.compare_name))


def test_another_catalogue_beside_is_refused(demo, two_tower):
    compare = load_model_ranker(two_tower)
    compare.tokenizer.catalogue = compare.tokenizer.catalogue.append(["one more"], vectors=[[1.0] * 8])
    with pytest.raises(ValueError, match="another catalogue"):
        Demo(demo.retriever, "tiny", None, compare)


def test_a_history_is_written_by_titles(demo, ask):
    nobody = demo.with_user(Visit(), NOBODY)
    assert len(ask(nobody, query="blue sofa", surface="search").answer.compared) == 10
    assert "newcomer" in demo.show(ask(nobody))[-1]
    assert demo.titles.find("  ") == []
    assert demo.titles.find("of emoji title") == [("Title of emoji 🛋️", "emoji 🛋️")]
    assert len(demo.titles.find("TITLE of p", most=5)) == 5
    assert demo.titles.find("no such thing") == []
    written = add_event(add_event(nobody.history, "p3", "save", "homefeed"), "p4", "hide", "search")
    assert written["item_id"] == ["p3", "p4"]
    assert written["outcomes"] == [["save"], ["hide"]]
    visit = Visit(history=written)
    assert demo.subjects(visit) == [("nothing", ""), ("Title of p4", "p4"), ("Title of p3", "p3")]
    found = ask(visit, subject="p4", surface="related", steps=2)
    assert found.answer.request["context_item_id"] == "p4"
    assert not {"p3", "p4"} & {c.item_id for c in found.answer.candidates}


def test_an_added_event_keeps_every_column_and_comes_a_minute_later(ask, visit):
    longer = add_event(visit.history, "p3", "save", None)
    assert {len(column) for column in longer.values()} == {len(visit.history["item_id"]) + 1}
    assert longer["timestamp"][-1] == visit.history["timestamp"][-1] + 60
    assert time_after({}) is None
    assert ask(Visit(history=longer)).answer.candidates


def test_what_cannot_be_asked_is_said(ask, visit, demo):
    with pytest.raises(ValueError, match="turn one up"):
        ask(visit, save=0, click=0)
    with pytest.raises(ValueError, match="is in no split"):
        demo.with_user(visit, "nobody at all")


def test_what_is_shown_is_the_answer_escaped(demo, ask, visit):
    before = ask(visit, "k", steps=2)
    visit = ask(before, "save", steps=2, save=100)
    why, candidates, compared, path, history = demo.show(visit)
    assert why.index("new against the last list") < why.index("asked for")
    assert re.findall('data-item="([^"]*)"', candidates) == [text(c.item_id) for c in visit.answer.candidates]
    old = {c.row for c in before.answer.candidates}
    assert candidates.count(">new<") == sum(c.row not in old for c in visit.answer.candidates) > 0
    assert re.findall('data-item="([^"]*)"', compared) == [text(c.item_id) for c in visit.answer.compared]
    assert path.count("<svg") == 1
    assert 'role="img"' in path
    assert all(text(name_of(one.nearest[0])) in path for one in visit.answer.traced if one.nearest)
    assert "up to the end of test" in history
    assert "`" not in why
    assert text("<b>${1}{{2}}\"'") == "&lt;b&gt;&#36;&#123;1}&#123;&#123;2}}&quot;&#x27;"
    assert demo.show(Visit()) == [""] * 5
