"use strict";
// Draws the map and the list of documents. The selection is kept in the address after `#`, so that a view can be
// bookmarked and shared.
const data = JSON.parse(document.getElementById("data").textContent);
const controls = Object.fromEntries(
  ["q", "domain", "cluster", "language", "order", "colour", "scored", "score", "bound", "at"]
    .map((id) => [id, document.getElementById(id)]).filter(([id, it]) => it));
const map = document.getElementById("map"), list = document.getElementById("list");
const PAGE_ROWS = 20, SVG = "http://www.w3.org/2000/svg", WIDTH = 900, HEIGHT = 540, MARGIN = 16;
const haystack = data.documents.map((it) => (it.name + "\n" + it.text).toLowerCase());
const orders = {
  drawn: () => 0,
  rarest: (a, b) => data.documents[b].surprisal - data.documents[a].surprisal,
  plainest: (a, b) => data.documents[a].surprisal - data.documents[b].surprisal,
  longest: (a, b) => data.documents[b].tokens - data.documents[a].tokens,
  shortest: (a, b) => data.documents[a].tokens - data.documents[b].tokens,
};
let shown = PAGE_ROWS, chosen = -1;

function element(tag, text, parent, name) {
  const made = document.createElement(tag);
  if (text) made.textContent = text;
  if (name) made.className = name;
  if (parent) parent.append(made);
  return made;
}

function colour(kind, value) {
  const at = data.values[kind].indexOf(value);
  return at < 0 ? "currentColor" : `hsl(${(at * 137.5 + 215) % 360} 65% ${at % 2 ? 62 : 50}%)`;
}

function place(it) {
  return [MARGIN + it.x * (WIDTH - 2 * MARGIN), MARGIN + it.y * (HEIGHT - 2 * MARGIN)];
}

// Appends text with the search terms marked; as text nodes, never as markup.
function marked(text, words, parent) {
  const lower = text.toLowerCase();
  for (let at = 0; at < text.length;) {
    let next = text.length, size = 0;
    for (const word of words) {
      const found = lower.indexOf(word, at);
      if (found >= 0 && found < next) [next, size] = [found, word.length];
    }
    parent.append(text.slice(at, next));
    if (size) element("mark", text.slice(next, next + size), parent);
    at = next + size;
  }
}

// Appends a document's text; of a conversation, what has a loss stands out.
function excerpt(it, words, parent) {
  for (const [text, has_loss] of it.parts ?? [[it.text, false]])
    marked(text, words, has_loss ? element("span", "", parent, "trained") : parent);
  if (it.is_cut) parent.append(" …");
}

function row(number, words) {
  const it = data.documents[number], made = element("article", "", list);
  const head = element("header", "", made);
  element("i", "", head).style.background = colour(controls.colour.value, it[controls.colour.value]);
  marked(it.name, words, element("b", "", head));
  const copy = it.copy_of === null ? "" : `, copy of ${data.documents[it.copy_of].name}`;
  element("span", ` ${it.domain}/${it.split} · ${it.tokens.toLocaleString()} tokens · ${it.language} · ` +
    `${it.surprisal.toFixed(2)} nats per token · ${it.cluster}${copy}`, head);
  excerpt(it, words, element("pre", "", made));
}

function draw() {
  const words = controls.q.value.toLowerCase().split(/\s+/).filter(Boolean);
  const wanted = ["domain", "cluster", "language"].filter((key) => controls[key].value);
  const matches = data.documents.map((it, n) =>
    wanted.every((key) => it[key] === controls[key].value) && words.every((word) => haystack[n].includes(word)));
  const kind = controls.colour.value;
  [...map.querySelectorAll("circle")].forEach((dot, n) => {
    dot.setAttribute("fill", colour(kind, data.documents[n][kind]));
    dot.setAttribute("class", (matches[n] ? "" : "off") + (n === chosen ? " chosen" : ""));
  });
  const key = document.getElementById("key");
  key.replaceChildren();
  for (const value of data.values[kind]) {
    const entry = element("button", "", key);
    element("i", "", entry).style.background = colour(kind, value);
    entry.append(`${value} ${data.documents.filter((it) => it[kind] === value).length}`);
    entry.onclick = () => {
      controls[kind].value = controls[kind].value === value ? "" : value;
      changed();
    };
  }
  const numbers = [...data.documents.keys()].filter((n) => matches[n] && n !== chosen).sort(orders[controls.order.value]);
  document.getElementById("count").textContent =
    `${numbers.length + (chosen >= 0 && matches[chosen] ? 1 : 0)} of ${data.documents.length} documents`;
  list.replaceChildren();
  if (chosen >= 0) row(chosen, words);
  numbers.slice(0, shown).forEach((number) => row(number, words));
  document.getElementById("more").hidden = numbers.length <= shown;
}

// Shows what a threshold would remove: its share of all documents, and those of the sample that are nearest to it.
function drawScores() {
  const domain = data.scores[controls.scored.value], name = controls.score.value, score = domain?.scores[name];
  const out = document.getElementById("out"), inside = document.getElementById("in");
  const bins = document.getElementById("bins"), text = document.getElementById("removed");
  for (const it of [out, inside, bins]) it.replaceChildren();
  if (!score) {
    text.textContent = `documents of ${controls.scored.value} have no ${name}`;
    return;
  }
  const place = Math.round((controls.at.value / 1000) * (score.at.length - 1)), at = score.at[place];
  const is_least = controls.bound.value === "at_least", few = (n) => n.toLocaleString("en");
  const removed = (is_least ? score.below : score.above)[place];
  const of_kept = (is_least ? score.kept_below : score.kept_above)[place];
  const shown = Number(at.toPrecision(5));
  text.textContent = `{ score: ${name}, ${controls.bound.value}: ${shown} } removes ${few(removed)} of ${few(domain.rows)} ` +
    `documents (${(100 * removed / domain.rows).toFixed(1)}%), of the ${few(domain.kept)} in the shards ${few(of_kept)}`;
  const most = Math.max(...score.bins), wide = WIDTH / score.bins.length;
  const [low, high] = [score.edges[0], score.edges.at(-1)];
  const mark = (tag, attributes, words) => {
    const made = document.createElementNS(SVG, tag);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.textContent = words ?? "";
    bins.append(made);
  };
  score.bins.forEach((count, n) => {
    const middle = (score.edges[n] + score.edges[n + 1]) / 2, height = (128 * count) / most;
    mark("rect", { x: n * wide + 1, y: 136 - height, width: wide - 2, height, class: (is_least ? middle < at : middle > at) ? "off" : "" });
  });
  const x = Math.min(Math.max((at - low) / (high - low), 0), 1) * WIDTH;
  mark("line", { x1: x, x2: x, y1: 4, y2: 140 });
  mark("text", { x: 2, y: 154 }, `${Number(low.toPrecision(4))}`);
  mark("text", { x: WIDTH - 2, y: 154, "text-anchor": "end" }, `${Number(high.toPrecision(4))}`);
  const is_out = (it) => it[name] !== null && (is_least ? it[name] < shown : it[name] > shown);
  for (const [list, wanted] of [[out, true], [inside, false]]) {
    const near = domain.sample.filter((it) => it[name] !== null && is_out(it) === wanted)
      .sort((a, b) => Math.abs(a[name] - at) - Math.abs(b[name] - at));
    for (const it of near.slice(0, 6)) {
      const made = element("article", "", list), head = element("header", "", made);
      element("b", it.place, head);
      element("span", ` ${name} ${it[name]} · ${it.language}${it.reason ? ` · removed now: ${it.reason}` : ""}`, head);
      element("pre", it.excerpt, made);
    }
    if (!near.length) element("p", "none of the sample", list);
  }
}

function changed() {
  shown = PAGE_ROWS;
  const set = Object.entries(controls).filter(([id, it]) => it.value && it.value !== it.dataset.usual);
  history.replaceState(null, "", "#" + new URLSearchParams(set.map(([id, it]) => [id, it.value])));
  draw();
  if (controls.scored) drawScores();
}

function read() {
  const asked = new URLSearchParams(location.hash.slice(1));
  for (const [id, it] of Object.entries(controls)) it.value = asked.get(id) ?? it.dataset.usual ?? "";
  draw();
  if (controls.scored) drawScores();
}

if (controls.scored) {
  const domains = Object.keys(data.scores), names = new Set(domains.flatMap((it) => Object.keys(data.scores[it].scores)));
  for (const [control, values] of [[controls.scored, domains], [controls.score, [...names]]]) {
    for (const value of values) element("option", value, control).value = value;
    control.dataset.usual = values[0];
  }
}
for (const kind of ["domain", "cluster", "language"])
  for (const value of data.values[kind]) element("option", value, controls[kind]).value = value;
data.documents.forEach((it, n) => {
  const dot = document.createElementNS(SVG, "circle"), [x, y] = place(it);
  for (const [key, value] of Object.entries({ cx: x.toFixed(1), cy: y.toFixed(1), r: 3.4 })) dot.setAttribute(key, value);
  dot.append(document.createElementNS(SVG, "title"));
  dot.firstChild.textContent = `${it.name}\n${it.cluster}\n${it.text.slice(0, 160)}`;
  dot.onclick = () => { chosen = chosen === n ? -1 : n; draw(); };
  map.append(dot);
});
const boxes = [];
for (const it of data.labels.toSorted((a, b) => a.y - b.y)) {
  const label = document.createElementNS(SVG, "text"), [x, y] = place(it);
  label.setAttribute("x", x.toFixed(1));
  // Near an edge, a label extends inwards.
  label.style.textAnchor = it.x < 0.15 ? "start" : it.x > 0.85 ? "end" : "middle";
  label.textContent = it.label;
  map.append(label);
  // Moves it below labels that it would overlap.
  for (let at = y; ; at += 2) {
    label.setAttribute("y", at.toFixed(1));
    const box = label.getBBox();
    if (boxes.some((b) => box.x < b.x + b.width && b.x < box.x + box.width && box.y < b.y + b.height && b.y < box.y + box.height)) continue;
    boxes.push(box);
    break;
  }
}
for (const it of Object.values(controls)) it.oninput = changed;
document.getElementById("more").onclick = () => { shown += PAGE_ROWS; draw(); };
window.onhashchange = read;
read();
