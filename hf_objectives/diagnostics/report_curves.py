"""The curves of a report: bokeh figures that a page draws by itself, and the same in figures for a table."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from hf_objectives.diagnostics.curves import Curves
from hf_objectives.diagnostics.findings import Finding
from hf_objectives.diagnostics.panels import SMOOTHED_FROM, Line, Panel, panels_of, spans_decades
from hf_objectives.diagnostics.reduction import reduce_points, smooth_points
from hf_objectives.errors import ConfigError

Scale = Literal["linear", "log"]
COLOURS = {"info": "#0072b2", "warning": "#b8860b", "error": "#d62728"}
#: Tags by which the page's script finds the renderers to switch.
RAW, SMOOTH = "raw", "smooth"
_MARKS_AT_MOST = 40  # findings that are drawn; more would hide the curves
_MARKERS_UP_TO = 200  # points of a validation curve
_NAME_AT_MOST = 36  # characters of a legend; the table has the whole name
_GREATEST = 1e250  # of an axis, whose margins have to stay finite
_DASHES = {"-": "solid", "--": "dashed"}


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

    Every panel of `panels_of`, linked in x, with the findings as bands. A panel that may be logarithmic is there twice,
    over the same points, tagged "log" and "linear"; one of the two is visible.

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
    figures = []
    for n, panel in enumerate(panels_of(runs)):
        lines = [_Drawn(line, panel) for line in panel.lines]
        log_first = panel.log or (panel.log is None and spans_decades([drawn.values for drawn in lines]))
        can_log = panel.log is not False and any((drawn.values > 0).any() for drawn in lines)
        scales: tuple[Scale, ...] = ("linear", "log") if can_log else ("linear",)
        for scale in scales:
            figure = _figure(panel, lines, scale, x_range)
            figure.tags = [scale, panel.name] + (["switches"] if can_log else [])
            figure.visible = not can_log or (scale == "log") == bool(log_first)
            _mark(figure, findings[:_MARKS_AT_MOST], named=n == 0)
            figures.append(figure)
    figures[-1].below[0].axis_label = "step"
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


def script_json(content: Any) -> str:
    """JSON that may stand in a `<script>` element: nothing in it ends the element or begins a comment."""
    text = json.dumps(content, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


class _Drawn:
    """A line's data, shared by the linear and the logarithmic figure."""

    def __init__(self, line: Line, panel: Panel) -> None:
        from bokeh.models import ColumnDataSource

        self.line = line
        steps, self.values = reduce_points(*line.series)
        self.source = ColumnDataSource({"x": steps.astype(float), "y": self.values})
        self.trend = None
        if line.smooth and not line.held_out and np.isfinite(line.series.values).sum() >= SMOOTHED_FROM:
            at, means = smooth_points(*line.series, geometric=panel.log is True)
            self.trend = ColumnDataSource({"x": at, "y": means})


def _figure(panel: Panel, lines: Sequence[_Drawn], scale: Scale, x_range: Any) -> Any:
    from bokeh.models import BoxZoomTool, HoverTool, PanTool, ResetTool, WheelZoomTool
    from bokeh.plotting import figure as new_figure

    wheel = WheelZoomTool(dimensions="width", modifiers={"ctrl": True})  # the bare wheel scrolls the page
    figure: Any = new_figure(
        title=panel.title,
        height=300 if panel.name == "loss" else 230,
        sizing_mode="stretch_width",
        x_range=x_range,
        y_range=_span([drawn.values for drawn in lines], scale),
        y_axis_type=scale,
        tools=[PanTool(dimensions="width"), wheel, BoxZoomTool(dimensions="width"), ResetTool(), "save"],
        active_scroll=wheel,
        background_fill_color=None,
        border_fill_color=None,
        min_border_right=12,
        toolbar_location="above",
    )
    figure.toolbar.logo = None
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
    for legend in figure.legend:
        legend.click_policy = "hide"
        legend.background_fill_alpha = 0
        legend.border_line_color = None
        legend.padding = 2
        legend.label_text_font_size = "11px"
    return figure


def _format_axes(figure: Any, panel: Panel, scale: str) -> None:
    from bokeh.models import FixedTicker, NumeralTickFormatter, PrintfTickFormatter

    figure.below[0].formatter = NumeralTickFormatter(format="0[.]0a")
    values = figure.left[0]
    if panel.share:
        values.formatter = NumeralTickFormatter(format="0%")
    elif panel.name == "learning_rate":
        values.formatter = PrintfTickFormatter(format="%.2g")
    elif scale == "log":
        values.ticker = FixedTicker(ticks=_log_ticks(figure.y_range.start, figure.y_range.end))
        values.formatter = PrintfTickFormatter(format="%.4g")
    else:
        values.formatter = NumeralTickFormatter(format="0.[000]a")


def _draw(figure: Any, drawn: _Drawn, *, legend: bool) -> Any:
    line = drawn.line
    label = {"legend_label": _short(line.label)} if legend and line.label else {}
    if line.held_out:
        renderer = figure.line(
            "x", "y", source=drawn.source, color=line.colour, line_width=2, line_dash="dashed", **label
        )
        if len(drawn.values) <= _MARKERS_UP_TO:
            figure.scatter("x", "y", source=drawn.source, color=line.colour, size=5, **label)
    else:
        pale = drawn.trend is not None
        renderer = figure.line(
            *("x", "y"),
            source=drawn.source,
            color=line.colour,
            alpha=0.5 if pale else 1.0,
            line_width=1.2 if pale else 2,
            line_dash=_DASHES.get(line.style, "solid"),
            **label,
        )
        if pale:
            renderer.tags = [RAW]  # as a keyword they would go to the glyph
            trend = figure.line("x", "y", source=drawn.trend, color=line.colour, line_width=2.4, **label)
            trend.tags = [SMOOTH]
        if len(drawn.values) == 1:  # no line has one point
            figure.scatter("x", "y", source=drawn.source, color=line.colour, size=6)
    renderer.name = _short(line.label) or "as asked"
    return renderer


def _span(values: Sequence[np.ndarray], scale: str) -> Any:
    """The range of the values; bokeh's own is not computed while a figure is hidden."""
    from bokeh.models import Range1d

    every = np.concatenate(values) if values else np.zeros(0)
    every = every[np.isfinite(every) & ((every > 0) | (scale == "linear"))]
    if not len(every):
        return Range1d(start=0.1, end=10)
    low, high = np.clip((every.min(), every.max()), -_GREATEST, _GREATEST).tolist()
    if scale == "log":
        low = max(low, 1 / _GREATEST)
        high = max(low, high)
        factor = max(1.05, math.exp(0.05 * (math.log(high) - math.log(low))))
        return Range1d(start=low / factor, end=high * factor)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return Range1d(start=low - margin, end=high + margin)


def _log_ticks(low: float, high: float) -> list[float]:
    """Round values of a logarithmic axis: at most a dozen, at least two where the range has any."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in ((1,), (1, 2, 5), range(1, 10), np.arange(10, 100) / 10):
        ticks = [float(f"{m * 10.0**power:.6g}") for power in powers for m in mantissas]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            break
    return ticks[:: math.ceil(len(ticks) / 12) or 1]


def _short(name: str) -> str:
    return name if len(name) <= _NAME_AT_MOST else f"{name[: _NAME_AT_MOST - 1]}…"


def _mark(figure: Any, findings: Sequence[Finding], *, named: bool) -> None:
    from bokeh.models.annotations import BoxAnnotation, Label, Span

    for i, one in enumerate(findings):
        colour = COLOURS[one.severity]
        if one.last_step > one.step:
            band = BoxAnnotation(left=one.step, right=one.last_step, fill_color=colour, fill_alpha=0.09)
            band.line_color, band.level = None, "underlay"
            figure.add_layout(band)
        # Under the curves: a line would hide a spike of one step.
        line = Span(location=one.step, dimension="height", line_color=colour, line_alpha=0.7, level="underlay")
        figure.add_layout(line)
        if named:
            label = Label(x=one.step, y=8 + 15 * (i % 5), y_units="screen", x_offset=4, text=one.kind)
            label.text_font_size, label.text_color = "11px", colour
            figure.add_layout(label)


def _need_bokeh() -> None:
    try:
        import bokeh  # noqa: F401
    except ImportError as error:
        raise ConfigError("a report draws with bokeh, which is not installed: pip install bokeh") from error
