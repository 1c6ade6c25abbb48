"""The curves of a report: bokeh figures that a page draws by itself, and the same in figures for a table."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from hf_objectives.diagnostics.curves import Curves
from hf_objectives.diagnostics.panels import (
    FINDING_COLOURS,
    SMOOTHED_FROM,
    Line,
    Panel,
    panels_of,
    shortened,
    shown_in,
    spans_decades,
)
from hf_objectives.diagnostics.reduction import reduce_points, smooth_points
from hf_objectives.errors import ConfigError
from hf_objectives.inspection import Finding, visible

Scale = Literal["linear", "log"]
#: Tags by which the page's script finds the renderers and the figures to switch.
RAW, SMOOTH, FIRST = "raw", "smooth", "first"
_MARKS_AT_MOST = 40  # findings that are drawn; more would hide the curves
_MARKERS_UP_TO = 200  # points of a validation curve
_VALIDATION = ", validation"
# Bokeh sets what stands between these as TeX.
_TEX = re.compile(r"\$(?=\$)|\\(?=[()\[\]])")


@dataclass(frozen=True)
class Row:
    """A curve in figures.

    Attributes:
        panel: where it is drawn.
        label: its name there.
        points: how many were logged, before any reduction.
        first, last: its first and last finite values.
        least, least_at: its minimum and the step of it.
        most, most_at: its maximum and the step of it.
    """

    panel: str
    label: str
    points: int
    first: float
    last: float
    least: float
    least_at: int
    most: float
    most_at: int


def bokeh_script() -> str:
    """The JavaScript that draws: bokeh's core, minified, no more of it than needed.

    Raises:
        ConfigError: bokeh is not installed.
    """
    _need_bokeh()
    from bokeh.resources import Resources

    return "\n".join(Resources(mode="inline", components=["bokeh"]).js_raw)


def figures_of(runs: list[Curves], findings: Sequence[Finding]) -> dict[str, Any]:
    """The figures as JSON for `Bokeh.embed.embed_item`.

    Every panel of `panels_of`, linked in x, with the findings as bands, named in the panels that show them. A panel that
    may be logarithmic is there twice, over the same points, tagged "log" and "linear"; one of the two is tagged "first".
    The page's script makes these visible, fits the values' axes to what is seen, and gives all the page's colours.

    Args:
        runs: the run, and those to compare it with.
        findings: of the run.

    Raises:
        ConfigError: bokeh is not installed.
    """
    _need_bokeh()
    from bokeh.core.serialization import Serialized
    from bokeh.core.types import ID
    from bokeh.embed import json_item
    from bokeh.models import Column, Range1d

    series = [one.steps for run in runs for one in run.series.values() if len(one.steps)]
    low, high = min(int(steps[0]) for steps in series), max(int(steps[-1]) for steps in series)
    margin = max(1.0, (high - low) * 0.02)
    x_range = Range1d(start=low - margin, end=high + margin)
    panels = panels_of(runs)
    labels = _labels(panels)
    names = [panel.name for panel in panels]
    figures = []
    for panel in panels:
        lines = [_Drawn(line, panel, labels[line.label, line.held_out]) for line in panel.lines]
        log_first = panel.log or (panel.log is None and spans_decades([drawn.values for drawn in lines]))
        can_log = panel.log is not False and any((drawn.values > 0).any() for drawn in lines)
        scales: tuple[Scale, ...] = ("linear", "log") if can_log else ("linear",)
        for scale in scales:
            figure = _figure(panel, lines, scale, x_range)
            figure.tags = [scale, panel.name] + (["switches"] if can_log else [])
            figure.tags += [] if panel.least is None else [panel.least]
            figure.tags += [FIRST] if not can_log or (scale == "log") == bool(log_first) else []
            figure.visible = False  # until the page's script has fitted and coloured it: what it paints first may stay
            _mark(figure, [(one, panel.name in shown_in(one.kind, names)) for one in findings[:_MARKS_AT_MOST]])
            figures.append(figure)
    for figure in figures[-2:]:  # the last panel, on either scale
        figure.below[0].axis_label = "step" if figure.tags[1] == names[-1] else None
    item = json_item(Column(children=figures, sizing_mode="stretch_width", spacing=8), ID("plots"))
    assert not isinstance(item, Serialized)
    return dict(item)


def rows_of(runs: list[Curves]) -> list[Row]:
    """First, last, least and greatest values of every curve that is drawn."""
    rows: list[Row] = []
    for panel in panels_of(runs):
        for line in panel.lines:
            steps, values = line.series
            good = np.flatnonzero(np.isfinite(values))
            if not len(good):
                continue
            least, most = good[values[good].argmin()], good[values[good].argmax()]
            rows.append(
                Row(
                    panel=panel.title,
                    label=line.label or "as asked",
                    points=len(values),
                    first=float(values[good[0]]),
                    last=float(values[good[-1]]),
                    least=float(values[least]),
                    least_at=int(steps[least]),
                    most=float(values[most]),
                    most_at=int(steps[most]),
                )
            )
    return rows


class _Drawn:
    """A line's data, shared by the linear and the logarithmic figure."""

    def __init__(self, line: Line, panel: Panel, label: str) -> None:
        from bokeh.models import ColumnDataSource

        self.line, self.label = line, label
        steps, self.values = reduce_points(*line.series)
        self.source = ColumnDataSource({"x": steps.astype(float), "y": self.values})
        self.trend = None
        if line.smooth and not line.held_out and np.isfinite(line.series.values).sum() >= SMOOTHED_FROM:
            at, means = smooth_points(*line.series, geometric=panel.log is True)
            self.trend = ColumnDataSource({"x": at, "y": means})


def _figure(panel: Panel, lines: Sequence[_Drawn], scale: Scale, x_range: Any) -> Any:
    from bokeh.models import HoverTool, PanTool, Range1d, WheelZoomTool
    from bokeh.plotting import figure as new_figure

    wheel = WheelZoomTool(dimensions="width", modifiers={"ctrl": True})  # the bare wheel scrolls the page
    figure: Any = new_figure(
        title=_drawn_text(panel.title),
        height=300 if panel.name == "loss" else 230,
        sizing_mode="stretch_width",
        x_range=x_range,
        y_range=Range1d(start=1, end=10),  # until the page's script fits it
        y_axis_type=scale,
        tools=[PanTool(dimensions="width"), wheel],
        active_scroll=wheel,
        background_fill_color=None,  # until the page's script sets its own
        border_fill_color=None,
        min_border_right=12,
        toolbar_location=None,  # its buttons would be a dozen tab stops a panel; the page has its own
    )
    _format_axes(figure, panel, scale)
    hovered = [_draw(figure, drawn, legend=len(lines) > 1) for drawn in lines]
    number = "@y{0.00%}" if panel.share else "@y{%.5g}"
    figure.add_tools(
        HoverTool(
            renderers=hovered,
            tooltips=[("curve", "$name"), ("step", "@x{0,0}"), ("value", number)],
            formatters={} if panel.share else {"@y": "printf"},
            mode="vline" if len(lines) <= 2 else "mouse",  # more tooltips at once would hide each other
            point_policy="snap_to_data",
            line_policy="nearest",
        )
    )
    for legend in figure.legend if len(lines) > 1 else ():
        legend.click_policy = "hide"
        legend.background_fill_alpha = 0.7
        legend.border_line_color = None
        legend.padding = 2
        legend.label_text_font_size = "11px"
    return figure


def _format_axes(figure: Any, panel: Panel, scale: str) -> None:
    from bokeh.models import FixedTicker, NumeralTickFormatter, PrintfTickFormatter

    figure.below[0].formatter = NumeralTickFormatter(format="0[.]0a")
    values = figure.left[0]
    if scale == "log":
        values.ticker = FixedTicker(ticks=[])  # the page's script sets them
    if panel.share:
        values.formatter = NumeralTickFormatter(format="0%")
    elif panel.name == "learning_rate":
        values.formatter = PrintfTickFormatter(format="%.2g")
    elif scale == "log":
        values.formatter = PrintfTickFormatter(format="%.4g")
    else:
        values.formatter = NumeralTickFormatter(format="0.[000]a")


def _draw(figure: Any, drawn: _Drawn, *, legend: bool) -> Any:
    line = drawn.line
    label = {"legend_label": drawn.label} if legend and line.label else {}
    dash: Any = [round(1.7 * length) for length in line.dashes] or "solid"  # in pixels
    shared = {"x": "x", "y": "y", "color": line.colour, **label}
    pale = drawn.trend is not None
    width = 1.2 if pale else 2
    renderer = figure.line(
        **shared, source=drawn.source, alpha=0.5 if pale else 1.0, line_width=width, line_dash="solid" if pale else dash
    )
    if pale:
        renderer.tags = [RAW]  # as a keyword they would go to the glyph
        figure.line(**shared, source=drawn.trend, line_width=2.4, line_dash=dash).tags = [SMOOTH]
    if len(drawn.values) <= (_MARKERS_UP_TO if line.held_out else 1):  # no line has one point
        figure.scatter(**shared, source=drawn.source, size=5 if line.held_out else 6)
    renderer.name = drawn.label or "as asked"
    return renderer


def _labels(panels: Sequence[Panel]) -> dict[tuple[str, bool], str]:
    """What stands in legends for a line's label, by it and whether it is held out: the name within it short."""
    pairs = list(dict.fromkeys((line.label, line.held_out) for panel in panels for line in panel.lines))
    ends = [_VALIDATION if held_out and label.endswith(_VALIDATION) else "" for label, held_out in pairs]
    names = [visible(label.removesuffix(end)) for (label, _), end in zip(pairs, ends, strict=True)]
    short = shortened(names)
    return {pair: _drawn_text(name + end) for pair, name, end in zip(pairs, short, ends, strict=True)}


def _drawn_text(text: str) -> str:
    """Text that bokeh draws as it stands, and no more of it than control characters' pictures."""
    return _TEX.sub(lambda found: f"{found[0]}\u200b", visible(text))


def _mark(figure: Any, findings: Sequence[tuple[Finding, bool]]) -> None:
    """Bands and lines of findings, and the names of those that this figure shows."""
    from bokeh.models.annotations import BoxAnnotation, Label, Span

    named = 0
    for one, here in findings:
        colour = FINDING_COLOURS[one.severity][0]
        if one.last_step > one.step:
            band = BoxAnnotation(left=one.step, right=one.last_step, fill_color=colour, fill_alpha=0.09)
            band.line_color, band.level, band.tags = None, "underlay", [one.severity]
            figure.add_layout(band)
        # Under the curves: a line would hide a spike of one step.
        line = Span(location=one.step, dimension="height", line_color=colour, line_alpha=0.7, level="underlay")
        line.tags = [one.severity]
        figure.add_layout(line)
        if here:
            label = Label(x=one.step, y=8 + 17 * (named % 5), y_units="screen", x_offset=4, text=_drawn_text(one.kind))
            label.text_font_size, label.text_color, label.background_fill_alpha = "11px", colour, 0.85
            label.tags = [one.severity]
            figure.add_layout(label)
            named += 1


def _need_bokeh() -> None:
    try:
        import bokeh  # noqa: F401
    except ImportError as error:
        raise ConfigError("a report draws with bokeh, which is not installed: pip install bokeh") from error
