(function () {
  "use strict";
  const plots = document.getElementById("plots");
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  let figures = [], range = null, whole = null;

  function paint() {
    const style = getComputedStyle(document.documentElement);
    const text = style.getPropertyValue("--text").trim(), grid = style.getPropertyValue("--line").trim();
    for (const figure of figures) {
      figure.outline_line_color = grid;
      figure.title.text_color = text;
      for (const axis of [...figure.below, ...figure.left]) {
        axis.axis_label_text_color = text;
        axis.major_label_text_color = text;
        axis.axis_line_color = axis.major_tick_line_color = axis.minor_tick_line_color = grid;
      }
      for (const part of figure.center) {
        if (part.type === "Grid") part.grid_line_color = grid;
        if (part.type === "Legend") part.label_text_color = text;
      }
    }
  }

  function press(name, chosen) {
    for (const button of document.querySelectorAll(`button[data-${name}]`))
      button.setAttribute("aria-pressed", String(button.dataset[name] === chosen));
  }

  function show(mode) {
    for (const figure of figures)
      for (const renderer of figure.renderers) {
        const raw = renderer.tags.includes("raw"), smooth = renderer.tags.includes("smooth");
        if (raw) {
          renderer.visible = mode !== "smooth";
          renderer.glyph.line_alpha = mode === "raw" ? 1 : 0.5;
        }
        if (smooth) renderer.visible = mode !== "raw";
      }
    press("mode", mode);
  }

  function scale(chosen) {
    for (const figure of figures)
      if (figure.tags.includes("switches"))
        figure.visible = chosen === "auto" ? figure.tags.includes("first") : figure.tags[0] === chosen;
    press("scale", chosen);
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
    dark.addEventListener("change", paint);
  }

  Bokeh.embed.embed_item(JSON.parse(document.getElementById("figures").textContent)).then((views) => {
    const root = Bokeh.documents[0].roots()[0];
    figures = root.children;
    range = figures[0].x_range;
    whole = {start: range.start, end: range.end};
    for (const figure of figures) if (figure.visible) figure.tags = [...figure.tags, "first"];
    if (window.matchMedia("(pointer: coarse)").matches)  // a finger on a plot scrolls the page
      for (const figure of figures) figure.toolbar.active_drag = null;
    paint();
    listen();
    say();
    plots.dataset.ready = "true";
  });
})();
