"""What the simulated worlds say of each claim: rows of benchmarks/results/surfaces.json."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

NO_WORSE = -2
"""Percent, below which the interval of what is at least as good must not reach."""


def row(claim: str, target: str, value: Any, met: bool | None) -> dict[str, Any]:
    return {"claim": claim, "target": target, "value": value, "met": None if met is None else bool(met)}


def world_rows(found: dict[int, dict[str, Any]], null: dict[str, dict[str, Any]], needed: int) -> list[dict[str, Any]]:
    """A row a claim about the simulated worlds, from those that have been measured."""

    def holding(*path: str) -> dict[str, Any]:
        """A relative gain in every world: how many have their interval above 0."""
        gains = {seed: at(world, *path) for seed, world in found.items()}
        known = [gain for gain in gains.values() if gain["percent"] is not None]
        return {
            "worlds above 0": sum(gain["low"] > 0 for gain in known),
            "mean percent": float(np.mean([gain["percent"] for gain in known])) if known else None,
            "worlds": gains,
        }

    def made(section: str, claim: str, target: str, value: Any, met: bool) -> dict[str, Any]:
        commits = {world["commits"][section] for world in (*found.values(), *null.values())}
        return {**row(claim, target, value, met), "commit": ", ".join(sorted(commits))}

    rows = []
    for peer in ("pretrained", "all-surface"):
        value: dict[str, Any] = {
            kind: holding("finetuning", f"{kind} against {peer}", "all") for kind in ("full", "adapters")
        }
        value["null world: identical surfaces"] = at(
            null["identical_surfaces"], "finetuning", f"full against {peer}", "all"
        )
        met = value["full"]["worlds above 0"] >= needed
        if peer == "all-surface":
            gone = null["identical_surfaces"]["finetuning"]["full against all-surface"]["all"]
            met = met and gone["low"] >= -2 and gone["high"] <= 2
        rows.append(
            made(
                "finetuning",
                f"simulator: finetuned per surface over {peer}, recall@10",
                f"above 0 in >= {needed} worlds",
                value,
                met,
            )
        )
    apart = {s: holding("finetuning", "adapters against apart", s) for s in ("all", "homefeed", "search", "related")}
    for figures in apart.values():
        figures["lower end"] = lower_end([gain["percent"] for gain in figures["worlds"].values()])
    rows.append(
        made(
            "finetuning",
            "simulator: one model with three adapters against three trained apart",
            f"at least as good on each surface: the mean's interval (Student's t over worlds) not below {NO_WORSE} %",
            apart,
            all(figures["lower end"] >= NO_WORSE for figures in apart.values()),
        )
    )
    beyond = {seed: world["outcomes"]["beyond popularity"] for seed, world in found.items()}
    one_taste = null["one_taste"]["outcomes"]["beyond popularity"]
    above = sum(b["low"] > 0 for b in beyond.values())
    rows.append(
        made(
            "outcomes",
            "simulator: outcome control beyond popularity's, condition x outcome at equal slots",
            f"diagonal above 0 in >= {needed} worlds; gone in the world of one taste",
            {"worlds above 0": above, "worlds": beyond, "null world: one taste": one_taste},
            above >= needed and one_taste["low"] <= 0,
        )
    )
    dials = {seed: world["online"]["dial: saves and clicks a request"] for seed, world in found.items()}
    rows.append(made("online", *dial_row(dials, needed).values()))
    several = {f"over {peer}": holding("steps", f"against {peer}") for peer in ("one", "one + MMR", "noise copies")}
    gone = null["no_drift"]["steps"]["against one"]
    rows.append(
        made(
            "steps",
            "simulator: several steps against one, next 10 positives, equal total slots",
            f"above 0 in >= {needed} worlds; gone without drift",
            {**several, "null world: no drift": gone},
            all(v["worlds above 0"] >= needed for v in several.values()) and gone["low"] <= 0,
        )
    )
    search = holding("online", "saves against two-tower", "search")
    reached = sum(g["percent"] >= 4 and g["low"] > 0 for g in search["worlds"].values())
    rows.append(
        made(
            "online",
            "simulator: search saves, PinRec against two-tower, online test",
            f">= +4 % in >= {needed} worlds",
            {**search, "all surfaces": holding("online", "saves against two-tower", "all"), "worlds at +4 %": reached},
            reached >= needed,
        )
    )
    return rows


def lower_end(percents: Sequence[float | None]) -> float:
    """Of the 95 % interval of the worlds' mean, by Student's t; NaN of less than two worlds."""
    known = [percent for percent in percents if percent is not None]
    if len(known) < 2:
        return math.nan
    t = np.quantile(np.random.default_rng(0).standard_t(len(known) - 1, 1_000_000), 0.975)
    return float(np.mean(known) - t * np.std(known, ddof=1) / np.sqrt(len(known)))


def dial_row(dials: Mapping[int, Mapping[str, list[list[float]]]], needed: int) -> dict[str, Any]:
    """True saves rise and clicks fall at every step; what a click given up buys in saves, against the other dials."""
    monotone, better, worlds = [], [], {}
    for seed, dial in dials.items():
        saves, clicks = np.array(dial["pinrec"]).T
        monotone.append(bool((np.diff(saves) > 0).all() and (np.diff(clicks) < 0).all()))
        prices = {name: saves_a_click(curve) for name, curve in dial.items()}
        known = {name: -np.inf if price is None else price for name, price in prices.items()}
        better.append(known["pinrec"] > max(known["popularity"], known["two-tower"]))
        worlds[seed] = {
            "monotone": monotone[-1],
            "saves gained per click lost": prices,
            "saves and clicks a request, from all-click to all-save": dial,
        }
    return row(
        "simulator: budget moved from all-click to all-save in 5 steps",
        f"saves rise and clicks fall at every step, more saves a click lost than other dials, in >= {needed} worlds",
        {"monotone": sum(monotone), "better than the other dials": sum(better), "worlds": worlds},
        sum(m and b for m, b in zip(monotone, better, strict=True)) >= needed,
    )


def saves_a_click(curve: Sequence[Sequence[float]]) -> float | None:
    """Saves that the whole turn of a dial gains per click that it loses; None where it loses no click."""
    (saves_before, clicks_before), (saves_after, clicks_after) = curve[0], curve[-1]
    lost = clicks_before - clicks_after
    return (saves_after - saves_before) / lost if lost > 0 else None


def at(figures: Any, *path: str) -> Any:
    for name in path:
        figures = figures[name]
    return figures
