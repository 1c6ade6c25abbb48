"use strict";
const data = JSON.parse(document.getElementById("data").textContent), $ = id => document.getElementById(id);
const box = $("tokens"), search = $("search"), filter = $("filter");
const lower = data.pieces.map(piece => piece[0].toLowerCase()), number = value => value.toLocaleString("en");
let packed = false, at = 0, shown = []; // which rows are shown: their numbers, and the place of the one on the page
let tokens = [], current = -1; // the tokens on the page: {piece, on, span}, and the one whose ids are told
let hits = [], hit = -1; // the first token of each place found, and the place shown

const documents = row => packed ? data.packed[row] : [data.examples[row]];
const textOf = document => document.p.map(i => lower[i]).join("");

function element(tag, name, text) {
  const made = document.createElement(tag);
  made.className = name; made.textContent = text;
  return made;
}
function select() {
  const asked = search.value.toLowerCase(), kind = filter.value;
  const rows = [...(packed ? data.packed : data.examples).keys()];
  const matches = row => packed || !kind || (kind === "*" ? data.examples[row].f : data.examples[row].w.includes(kind));
  shown = rows.filter(row => matches(row) && (!asked || documents(row).some(part => textOf(part).includes(asked))));
  at = 0; draw();
}
function draw(backwards = false) {
  box.textContent = ""; $("status").textContent = ""; tokens = []; hits = []; current = hit = -1;
  $("previous").disabled = at <= 0; $("next").disabled = at >= shown.length - 1;
  if (!shown.length) { $("head").textContent = "No row matches."; return; }
  const page = document.createDocumentFragment();
  for (const part of documents(shown[at])) {
    if (packed) page.append(element("span", "doc", `${part.s} ${part.r}`));
    const first = tokens.length;
    let on = false, place = 0;
    for (const run of part.m) { // lengths of runs of tokens, in turn untrained and trained
      for (let k = 0; k < run; k++) page.append(add(part.p[place++], on));
      on = !on;
    }
    if (search.value) find(first, search.value.toLowerCase());
  }
  box.append(page);
  if (hits.length) { hit = backwards ? hits.length - 1 : 0; showHit(); } else head();
}
function add(piece, on) {
  const text = data.pieces[piece][0], span = element("span", on ? "on" : "", text);
  if (/^[␍\n]+$/.test(text)) span.classList.add("nl");
  if (/^[\u00ad\u061c\u200b-\u200f\u2060-\u2064\ufeff]*$/.test(text)) span.classList.add("thin");
  span.dataset.i = tokens.length;
  tokens.push({piece, on, span}); span.title = about(tokens.length - 1);
  return span;
}
function find(first, asked) { // mark what was searched for in the document that begins with a token
  const part = tokens.slice(first), text = part.map(token => lower[token.piece]).join("");
  let i = 0, end = lower[part[0]?.piece]?.length;
  for (let from = text.indexOf(asked); from >= 0; from = text.indexOf(asked, from + asked.length)) {
    while (end <= from) end += lower[part[++i].piece].length;
    hits.push(first + i); part[i].span.classList.add("found");
    while (end < from + asked.length) { end += lower[part[++i].piece].length; part[i].span.classList.add("found"); }
  }
}
function head() {
  const row = shown[at], one = data.examples[row], more = packed ? 0 : one.x;
  const ids = tokens.reduce((sum, token) => sum + data.pieces[token.piece][1].length, 0);
  const what = packed ? `packed row ${row}, ${data.packed[row].length} documents` : `${one.s} ${one.r}${one.f ? `: ${one.f}` : ""}`;
  $("head").textContent = `${at + 1} of ${shown.length}: ${what}, ${number(ids + more)} tokens`
    + (more ? `, of which the last ${number(more)} are not on this page` : "")
    + (hit >= 0 ? `; place ${number(hit + 1)} of ${number(hits.length)} found here` : "");
}
function about(i) {
  const token = tokens[i], [text, ids, name] = data.pieces[token.piece];
  return `${ids.length > 1 ? "ids" : "id"} ${ids.join(" ")}  ${JSON.stringify(text)}${name && name !== text ? "  " + name : ""}  ${token.on ? "trained" : "not trained"}`;
}
function reveal(element) { // not under the bars that stay at the top and at the bottom, however high these are
  const [top, bottom] = [$("tools"), $("status")].map(bar => bar.offsetHeight + 8);
  document.documentElement.style.scrollPadding = `${top}px 0 ${bottom}px`;
  element.scrollIntoView({block: "nearest"});
}
function showHit() {
  box.querySelector(".here")?.classList.remove("here");
  const span = tokens[hits[hit]].span;
  span.classList.add("here"); head();
  $("status").textContent = `${number(hit + 1)} of ${number(hits.length)}: ${about(hits[hit])}`;
  reveal(span);
}
function seek(by) { // the next place found; after the last one of a row, in the next row
  if (hit < 0) return;
  if (hits[hit + by] !== undefined) { hit += by; showHit(); return; }
  at = (at + by + shown.length) % shown.length; draw(by < 0);
}
function point(i) {
  if (!tokens[i]) return;
  tokens[current]?.span.classList.remove("at");
  current = i; tokens[i].span.classList.add("at");
  $("status").textContent = about(i); reveal(tokens[i].span);
}
function step(by) { point(current >= 0 ? current + by : hit >= 0 ? hits[hit] : 0); }
function go(by) { if (shown[at + by] !== undefined) { at += by; draw(); } }
function mode(on) {
  packed = filter.disabled = on;
  $("show-examples").setAttribute("aria-pressed", String(!on)); $("show-packed").setAttribute("aria-pressed", String(on));
  select();
}
box.onclick = event => { if (event.target.dataset.i) point(Number(event.target.dataset.i)); };
box.onkeydown = event => {
  const by = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  if (by) { event.preventDefault(); step(by); }
};
if ($("show-packed")) { $("show-examples").onclick = () => mode(false); $("show-packed").onclick = () => mode(true); }
$("previous").onclick = () => go(-1); $("next").onclick = () => go(1);
search.oninput = filter.onchange = select;
search.onkeydown = event => { if (event.key === "Enter") { event.preventDefault(); seek(event.shiftKey ? -1 : 1); } };
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT)$/.test(event.target.tagName)) return;
  if (event.key === "n") go(1); else if (event.key === "p") go(-1);
  else if (event.key === "/") { event.preventDefault(); search.focus(); }
});
for (const links of document.querySelectorAll(".links")) {
  if (!data.examples.some(row => row.w.includes(links.dataset.kind))) continue;
  const button = element("button", "", "show them");
  button.onclick = () => {
    if (packed) mode(false);
    filter.value = links.dataset.kind; search.value = ""; select(); $("tools").scrollIntoView({block: "start"});
  };
  links.append(button);
}
select();
