(function () {
  "use strict";
  const plots = document.getElementById("plots");
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const GREATEST = 1e250;  // of an axis, whose margins have to stay finite
  let figures = [], range = null, whole = null, mode = "both", waiting = false;

  function paint() {
    const style = getComputedStyle(document.documentElement), colour = (name) => style.getPropertyValue(`--${name}`).trim();
    const text = colour("text"), grid = colour("line"), back = colour("back");
    for (const figure of figures) {
      figure.outline_line_color = grid;
      figure.border_fill_color = figure.background_fill_color = back;  // without, ticks that have moved stay where they were, too
      figure.title.text_color = text;
      for (const axis of [...figure.below, ...figure.left]) {
        axis.axis_label_text_color = text;
        axis.major_label_text_color = text;
        axis.axis_line_color = axis.major_tick_line_color = axis.minor_tick_line_color = grid;
      }
      for (const part of figure.center) {
        const tone = part.tags.length ? colour(part.tags[0]) : "";  // of a finding, by its severity
        if (part.type === "Grid") part.grid_line_color = grid;
        if (part.type === "Legend") {
          part.label_text_color = text;
          part.background_fill_color = back;
          part.inactive_fill_color = back;  // over the name of a line that is hidden
        }
        if (part.type === "Span") part.line_color = tone;
        if (part.type === "BoxAnnotation") part.fill_color = tone;
        if (part.type === "Label") {
          part.text_color = tone;
          part.background_fill_color = back;
        }
      }
    }
  }

  // Which of a curve's two lines is shown is a matter of their ink: `visible` belongs to the legend.
  function drawn(renderer) {
    const other = {raw: "smooth", smooth: "raw"}[mode];
    return renderer.visible && !renderer.tags.includes(other);
  }

  function least_and_most(renderer, log, from, to) {
    const x = renderer.data_source.get("x"), y = renderer.data_source.get("y");
    let low = Infinity, high = -Infinity, before = NaN, after = NaN;
    for (let i = 0; i < x.length; i++) {
      if (!Number.isFinite(y[i]) || (log && y[i] <= 0)) continue;
      if (x[i] < from) before = y[i];
      else if (x[i] <= to) {
        low = Math.min(low, y[i]);
        high = Math.max(high, y[i]);
      } else {
        after = y[i];
        break;
      }
    }
    if (low > high && before === before && after === after)  // a line between points that are not seen
      return [Math.min(before, after), Math.max(before, after)];
    return [low, high];
  }

  function fit(figure) {
    const log = figure.tags[0] === "log", floor = figure.tags.find((tag) => typeof tag === "number");
    let low = Infinity, high = -Infinity;
    for (const renderer of figure.renderers) {
      if (!drawn(renderer)) continue;
      const ends = least_and_most(renderer, log, range.start, range.end);
      low = Math.min(low, ends[0]);
      high = Math.max(high, ends[1]);
    }
    if (low > high) return;  // nothing is seen
    low = Math.min(Math.max(low, log ? 1 / GREATEST : -GREATEST), GREATEST);
    high = Math.min(Math.max(high, low), GREATEST);
    let start, end;
    if (log) {
      const factor = Math.max(1.05, Math.exp(0.05 * (Math.log(high) - Math.log(low))));
      [start, end] = [low / factor, high * factor];
    } else {
      const size = Math.max(Math.abs(low), Math.abs(high));
      const margin = high - low > 1e-9 * size ? 0.05 * (high - low) : 0.05 * size || 1;
      [start, end] = [low - margin, high + margin];
    }
    if (floor !== undefined && low >= floor) start = Math.max(start, floor);
    figure.y_range.setv({start: start, end: end});
    const axis = figure.left[0];
    if (log) axis.ticker.ticks = log_ticks(start, end);
  }

  // Round values of a logarithmic axis: at most a dozen, at least three where the range has as many.
  function log_ticks(low, high) {
    const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
    const nine = [1, 2, 3, 4, 5, 6, 7, 8, 9], tenths = Array.from({length: 90}, (_, i) => (i + 10) / 10);
    let ticks = [];
    for (const mantissas of [[1], [1, 2, 5], nine, tenths]) {
      ticks = [];
      for (let power = first; power <= last; power++)
        for (const mantissa of mantissas) {
          const tick = Number(`${mantissa}e${power}`);
          if (low <= tick && tick <= high) ticks.push(tick);
        }
      if (ticks.length >= 3) break;
    }
    const each = Math.ceil(ticks.length / 12) || 1;
    return ticks.filter((_, i) => i % each === 0);
  }

  function fit_all() {
    waiting = false;
    for (const figure of figures) if (figure.visible) fit(figure);
  }

  function fit_soon() {
    if (!waiting) requestAnimationFrame(fit_all);
    waiting = true;
  }

  function press(name, chosen) {
    for (const button of document.querySelectorAll(`button[data-${name}]`))
      button.setAttribute("aria-pressed", String(button.dataset[name] === chosen));
  }

  function show(chosen) {
    mode = chosen;
    for (const figure of figures)
      for (const renderer of figure.renderers) {
        if (renderer.tags.includes("raw")) renderer.glyph.line_alpha = {raw: 1, smooth: 0, both: 0.5}[mode];
        if (renderer.tags.includes("smooth")) renderer.glyph.line_alpha = mode === "raw" ? 0 : 1;
      }
    press("mode", mode);
    fit_soon();
  }

  function scale(chosen) {
    for (const figure of figures)
      if (figure.tags.includes("switches"))
        figure.visible = chosen === "auto" ? figure.tags.includes("first") : figure.tags[0] === chosen;
    press("scale", chosen);
    fit_soon();
  }

  function set(start, end) {
    const least = Math.min(1, whole.end - whole.start), width = Math.min(Math.max(end - start, least), whole.end - whole.start);
    const middle = (start + end) / 2;
    start = Math.min(Math.max(middle - width / 2, whole.start), whole.end - width);
    range.setv({start: start, end: start + width});
  }

  function zoom(how) {
    const width = range.end - range.start;
    if (how === "in") set(range.start + width / 4, range.end - width / 4);
    if (how === "out") set(range.start - width / 2, range.end + width / 2);
    if (how === "left") set(range.start - width / 4, range.end - width / 4);
    if (how === "right") set(range.start + width / 4, range.end + width / 4);
    if (how === "all") set(whole.start, whole.end);
  }

  function say() {
    const from = Math.max(0, Math.ceil(range.start)).toLocaleString("en");
    document.getElementById("range").textContent = `Steps ${from} to ${Math.floor(range.end).toLocaleString("en")}.`;
  }

  // Bokeh makes every figure a tab stop without a name; the keys are those of the element around them all.
  function no_tab_stops(root) {
    for (const element of root.querySelectorAll("*")) {
      if (element.tabIndex >= 0) element.tabIndex = -1;
      if (element.shadowRoot) no_tab_stops(element.shadowRoot);
    }
  }

  const KEYS = {"+": "in", "=": "in", "-": "out", "ArrowLeft": "left", "ArrowRight": "right", "0": "all", "Home": "all"};

  function listen() {
    for (const button of document.querySelectorAll("button[data-mode]"))
      button.addEventListener("click", () => show(button.dataset.mode));
    for (const button of document.querySelectorAll("button[data-scale]"))
      button.addEventListener("click", () => scale(button.dataset.scale));
    for (const button of document.querySelectorAll("button[data-zoom]"))
      button.addEventListener("click", () => zoom(button.dataset.zoom));
    for (const button of document.querySelectorAll("button.show"))
      button.addEventListener("click", () => {
        const from = Number(button.dataset.from), to = Number(button.dataset.to);
        const margin = Math.max((to - from) / 2, (whole.end - whole.start) / 20);
        set(from - margin, to + margin);
        document.getElementById("curves").scrollIntoView();
        plots.focus({preventScroll: true});
      });
    plots.addEventListener("keydown", (event) => {
      const how = KEYS[event.key];
      if (!how || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      zoom(how);
    });
    range.change.connect(say);
    range.change.connect(fit_soon);
    for (const figure of figures) {
      const twin = figures.find((other) => other !== figure && other.tags[1] === figure.tags[1]);  // on the other scale
      figure.renderers.forEach((renderer, i) => renderer.properties.visible.change.connect(() => {
        if (twin) twin.renderers[i].visible = renderer.visible;
        fit_soon();
      }));
    }
    dark.addEventListener("change", paint);
  }

  Bokeh.embed.embed_item(JSON.parse(document.getElementById("figures").textContent)).then((views) => {
    const root = Bokeh.documents[0].roots()[0];
    figures = root.children;
    plots.dataset.ready = "true";
    if (!figures.length) return;
    range = figures[0].x_range;
    whole = {start: range.start, end: range.end};
    if (window.matchMedia("(pointer: coarse)").matches)  // a finger on a plot scrolls the page
      for (const figure of figures) figure.toolbar.active_drag = null;
    paint();
    listen();
    say();
    for (const figure of figures) {
      fit(figure);
      figure.visible = figure.tags.includes("first");
    }
    no_tab_stops(plots);
  });
})();
