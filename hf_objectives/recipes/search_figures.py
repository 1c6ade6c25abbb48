"""The result of a search of mixture weights, as tables and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from hf_objectives.mixture import COMBINED, LAWS, MEAN
from hf_objectives.recipes.tables import table

_COLOURS = {"natural": "tab:gray", "recommended": "tab:red"}


def print_tables(results: Mapping[str, Any], console: Console) -> None:
    """Print shares, losses, and how well the laws hold."""
    shares = [
        (row[0], *(f"{share:.1%}" for share in row[1:]))
        for row in zip(*(results[key] for key in ("sources", *_COLOURS, "recommended_error")), strict=True)
    ]
    console.print(table("Share of tokens", ("source", *_COLOURS, "±"), shares))
    kinds = [f"{kind}\n{figure}" for kind in _COLOURS for figure in ("predicted", "measured")]
    columns = ("evaluation", "weight", *kinds, "difference")
    console.print(table("Loss, nats a token", columns, [_losses(*item) for item in results["evaluation"].items()]))
    forms = (*LAWS, MEAN)
    errors = [
        (name, *(f"{found['cv_rmse'][form]:.4f}" for form in forms), f"{found['p_value']:.2g}", found["law"])
        for name, found in results["evaluation"].items()
        if "law" in found
    ]
    console.print(table("Error of each law in cross-validation", ("evaluation", *forms, "p", "chosen"), errors))
    for note in results["notes"]:
        console.print(f"Note: {note}.", highlight=False, markup=False)


def _losses(name: str, found: Mapping[str, Any]) -> list[str]:
    """A row of the table of losses."""
    cells = [name, "" if found["weight"] is None else f"{found['weight']:g}"]
    for kind in (found[kind] for kind in _COLOURS):
        measured = f"{np.mean(kind['measured']):.4f}" if kind["measured"] else "-"
        cells += ["{:.4f} ± {:.4f}".format(*kind["predicted"]), measured]
    gaps = np.subtract(found["recommended"]["measured"], found["natural"]["measured"])
    return [*cells, f"{gaps.mean():+.4f}\n{gaps.min():+.4f} to {gaps.max():+.4f}" if len(gaps) else "-"]


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Draw trials as predicted and as measured, shares, and the loss over the share of the most influential source."""
    from matplotlib.figure import Figure

    sets = results["evaluation"]
    shown = sorted((name for name in sets if "law" in sets[name]), key=lambda name: -sets[name]["weight"])[:4]
    figure = Figure(figsize=(11, 8), layout="constrained")
    rows: Any = figure.subfigures(2, 1)
    above, (left, right) = rows[0].subplots(1, len(shown), squeeze=False)[0], rows[1].subplots(1, 2)
    for name, axes in zip(shown, above, strict=True):
        found = sets[name]
        axes.scatter(found["held_out"], found["trials"], s=22, label="trials, each left out of the fit")
        ends = [end(end(found["held_out"]), end(found["trials"])) for end in (min, max)]
        axes.plot(ends, ends, color="black", lw=0.8, alpha=0.5)
        for kind, colour in _COLOURS.items():
            seen, predicted = found[kind]["measured"], found[kind]["predicted"][0]
            axes.scatter([predicted] * len(seen), seen, marker="D", color=colour, label=f"{kind}, checked")
        axes.set(title=f"{name}: {found['law']}", xlabel="predicted loss", ylabel="measured loss")
    above[0].legend(frameon=False)
    places = np.arange(len(results["sources"]))
    most, combined = results["influential"], sets[COMBINED]
    right.scatter([row[most["source"]] for row in results["trials"]], combined["trials"], s=22, label="trials")
    right.plot(most["shares"], most["combined"], label="laws, other sources in natural proportion")
    for kind, colour in _COLOURS.items():
        errors = results["recommended_error"] if kind == "recommended" else None
        left.bar(places + (0.2 if errors else -0.2), results[kind], 0.4, yerr=errors, color=colour, label=kind)
        seen = combined[kind]["measured"] or combined[kind]["predicted"][:1]
        right.scatter([results[kind][most["source"]]] * len(seen), seen, marker="D", color=colour, label=kind)
    left.set_xticks(places, results["sources"], rotation=40, ha="right")
    left.set(title="Share of tokens")
    right.set(title="Combined loss", xlabel=f"share of {results['sources'][most['source']]}")
    for axes in (*above, left, right):
        axes.grid(alpha=0.25)
    for axes in (left, right):
        axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
