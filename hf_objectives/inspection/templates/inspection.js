"use strict";
const data = JSON.parse(document.getElementById("data").textContent), $ = id => document.getElementById(id);
const box = $("tokens"), search = $("search"), filter = $("filter"), spans = new Map(), cache = new Map();
const CHUNK = 4000, BEFORE = 200; // tokens that are drawn at once, and of these before a place that was searched for
let packed = false, at = 0, shown = [], tokens = [], first = 0, end = 0, current = -1;
let starts = [], found = new Set(), hit = -1; // the first token of each place found, all tokens of them, the place shown
const low = data.pieces.map(piece => piece[0].toLowerCase());
const number = value => value.toLocaleString("en");
const documents = row => packed ? data.packed[row] : [data.examples[row]];

function textOf(row) {
  const key = (packed ? "p" : "e") + row;
  if (!cache.has(key)) cache.set(key, documents(row).map(one => one.p.map(i => low[i]).join("")).join("\n"));
  return cache.get(key);
}
function select() {
  const asked = search.value.toLowerCase(), kind = filter.value, count = packed ? data.packed.length : data.examples.length;
  shown = [];
  for (let row = 0; row < count; row++) {
    const one = packed ? null : data.examples[row];
    if (one && kind === "*" && !one.f) continue;
    if (one && kind && kind !== "*" && !one.w.includes(kind)) continue;
    if (asked && !textOf(row).includes(asked)) continue;
    shown.push(row);
  }
  at = 0; draw();
}
function flat(row) {
  const all = [];
  for (const one of documents(row)) {
    let place = 0, on = false;
    all.push({doc: `${one.s} ${one.r}`});
    for (const run of one.m) { for (let k = 0; k < run; k++) all.push({piece: one.p[place++], on}); on = !on; }
  }
  return all;
}
function find() {
  const asked = search.value.toLowerCase();
  starts = []; found = new Set();
  if (!asked) return;
  let text = "", ends = [];
  const look = () => {
    for (let from = text.indexOf(asked), i = 0; from >= 0; from = text.indexOf(asked, from + asked.length)) {
      while (ends[i] && ends[i][0] <= from) i++;
      starts.push(ends[i][1]);
      for (let j = i; ends[j] && ends[j][0] - ends[j][2] < from + asked.length; j++) found.add(ends[j][1]);
    }
    text = ""; ends = [];
  };
  tokens.forEach((token, i) => {
    if (token.doc !== undefined) return look();
    text += low[token.piece]; ends.push([text.length, i, low[token.piece].length]);
  });
  look();
}
function draw(backwards = false) {
  box.textContent = ""; $("status").textContent = ""; spans.clear(); tokens = []; starts = []; current = hit = -1;
  $("previous").disabled = at <= 0; $("next").disabled = at >= shown.length - 1;
  if (!shown.length) { $("head").textContent = "No row matches."; return; }
  tokens = flat(shown[at]); find();
  if (!starts.length) { paint(0, CHUNK); head(); return; }
  hit = backwards ? starts.length - 1 : 0;
  showHit();
}
function head() {
  const row = shown[at], one = packed ? null : data.examples[row], more = one ? one.x : 0;
  const ids = tokens.reduce((sum, token) => sum + (token.doc === undefined ? data.pieces[token.piece][1].length : 0), 0);
  const what = packed ? `packed row ${row}, ${documents(row).length} documents` : `${one.s} ${one.r}` + (one.f ? `: ${one.f}` : "");
  $("head").textContent = `${at + 1} of ${shown.length}: ${what}, ${number(ids + more)} tokens`
    + (more ? `, of which the last ${number(more)} are not on this page` : "")
    + (hit >= 0 ? `; place ${number(hit + 1)} of ${number(starts.length)} found here` : "");
}
function button(text, act) {
  const made = document.createElement("button");
  made.textContent = text; made.onclick = act;
  return made;
}
function paint(from, to) {
  first = Math.max(0, from); end = Math.min(tokens.length, to);
  box.textContent = ""; spans.clear();
  const part = document.createDocumentFragment();
  if (first) part.append(button(`Show ${number(Math.min(CHUNK, first))} of ${number(first)} tokens before`, () => paint(first - CHUNK, end)));
  for (let i = first; i < end; i++) {
    const token = tokens[i], span = document.createElement("span");
    if (token.doc !== undefined) {
      if (packed) { span.className = "doc"; span.textContent = token.doc; part.append(span); }
      continue;
    }
    const text = data.pieces[token.piece][0];
    span.textContent = text;
    span.className = [token.on ? "on" : "", found.has(i) ? "found" : "", /^[␍\n]+$/.test(text) ? "nl" : "",
      /^[\u00ad\u061c\u200b-\u200f\u2060-\u2064\ufeff]*$/.test(text) ? "thin" : ""].filter(Boolean).join(" ");
    span.title = about(token); span.dataset.i = i;
    spans.set(i, span); part.append(span);
  }
  const left = tokens.length - end;
  if (left) part.append(button(`Show ${number(Math.min(CHUNK, left))} of ${number(left)} tokens more`, () => paint(first, end + CHUNK)));
  box.append(part);
  if (spans.has(current)) spans.get(current).classList.add("at");
  if (hit >= 0 && spans.has(starts[hit])) spans.get(starts[hit]).classList.add("here");
}
function reveal(element) { // not under the bars that stay at the top and at the bottom, however high these are
  const bars = [$("tools"), $("status")].map(bar => bar.offsetHeight + 8);
  document.documentElement.style.scrollPadding = `${bars[0]}px 0 ${bars[1]}px`;
  element.scrollIntoView({block: "nearest"});
}
function showHit() {
  const start = starts[hit];
  for (const span of box.querySelectorAll(".here")) span.classList.remove("here");
  if (spans.has(start)) spans.get(start).classList.add("here");
  else { const from = start < CHUNK - BEFORE ? 0 : start - BEFORE; paint(from, from + CHUNK); }
  head(); $("status").textContent = `${number(hit + 1)} of ${number(starts.length)}: ${about(tokens[start])}`;
  reveal(spans.get(start));
}
function seek(by) { // the next place found, in the next row after the last of this one
  if (hit < 0) return;
  if (starts[hit + by] !== undefined) { hit += by; showHit(); return; }
  at = (at + by + shown.length) % shown.length; draw(by < 0);
}
function about(token) {
  const [text, ids, name] = data.pieces[token.piece];
  return `${ids.length > 1 ? "ids" : "id"} ${ids.join(" ")}  ${JSON.stringify(text)}${name && name !== text ? "  " + name : ""}  ${token.on ? "trained" : "not trained"}`;
}
function point(i) {
  if (!spans.has(i)) return;
  if (spans.has(current)) spans.get(current).classList.remove("at");
  current = i; spans.get(i).classList.add("at");
  $("status").textContent = about(tokens[i]);
  reveal(spans.get(i));
}
function step(by) {
  let i = current >= 0 ? current + by : hit >= 0 ? starts[hit] : first;
  while (tokens[i] && tokens[i].doc !== undefined) i += by;
  if (!tokens[i]) return;
  if (i >= end) paint(first, end + CHUNK); else if (i < first) paint(first - CHUNK, end);
  point(i);
}
function go(by) { if (at + by >= 0 && at + by < shown.length) { at += by; draw(); } }
function mode(on) {
  packed = on; filter.disabled = on;
  $("show-examples").setAttribute("aria-pressed", String(!on)); $("show-packed").setAttribute("aria-pressed", String(on));
  select();
}
box.addEventListener("click", event => { if (event.target.dataset.i !== undefined) point(Number(event.target.dataset.i)); });
box.addEventListener("keydown", event => {
  const by = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  if (by) { event.preventDefault(); step(by); }
});
if ($("show-packed")) { $("show-examples").onclick = () => mode(false); $("show-packed").onclick = () => mode(true); }
$("previous").onclick = () => go(-1); $("next").onclick = () => go(1);
search.addEventListener("input", select); filter.addEventListener("change", select);
search.addEventListener("keydown", event => { if (event.key === "Enter") { event.preventDefault(); seek(event.shiftKey ? -1 : 1); } });
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT)$/.test(event.target.tagName)) return;
  if (event.key === "n") go(1); else if (event.key === "p") go(-1);
  else if (event.key === "/") { event.preventDefault(); search.focus(); }
});
for (const links of document.querySelectorAll(".links")) {
  const kind = links.dataset.kind;
  if (!data.examples.some(one => one.w.includes(kind))) continue;
  links.append(button("show them", () => {
    if (packed) mode(false);
    filter.value = kind; search.value = ""; select(); $("tools").scrollIntoView({block: "start"});
  }));
}
select();
