"use strict";
// Charts of a page: values under the pointer, and zoom into a stretch by dragging, of all charts over tokens at once.
// A chart is an SVG that Matplotlib drew; `data-chart` says where its axes are and what their lines are called.
// Coordinates are those of the SVG. Without this script the charts are what they were.

const NAMESPACE = document.querySelector("svg")?.namespaceURI;
const page = document.querySelector("[data-steps]");
const steps = page ? JSON.parse(page.dataset.steps) : []; // [million tokens, step], where their ratio changes
const tooltip = document.body.appendChild(document.createElement("div"));
tooltip.className = "tooltip";
tooltip.hidden = true;

const charts = [...document.querySelectorAll("svg[data-chart]")].map((svg) => {
  const axes = JSON.parse(svg.dataset.chart).map((axis) => prepare(svg, axis));
  const overlay = svg.appendChild(document.createElementNS(NAMESPACE, "g"));
  return { svg, axes, overlay };
});
const canZoom = charts.filter((chart) => chart.axes.every((axis) => axis.zooms));

function prepare(svg, axis) {
  const found = (id) => svg.querySelector(`[id="${id}"]`);
  const group = found(axis.id);
  axis.lines = axis.lines.map((line) => {
    const element = found(line.id);
    const path = element.querySelector(":scope > path");
    const pieces = path ? path.getAttribute("d").trim().split(/(?=M)/).map(pairs) : [];
    const markers = [...element.querySelectorAll("use")].map((use) => [use, +use.getAttribute("x"), +use.getAttribute("y")]);
    const vertices = path ? pieces.flat() : markers.map(([, x, y]) => [x, y]);
    return { ...line, path, d: path && path.getAttribute("d"), pieces, markers, points: vertices.map(([x, y]) => [toX(axis, x), toY(axis, y)]) };
  });
  axis.marks = axis.marks.map((mark) => ({ ...mark, element: found(mark.id) }));
  axis.levels = axis.levels.map((level) => ({ ...level, element: found(level.id) }));
  axis.ticks = [...group.querySelectorAll('[id^="xtick_"], [id^="ytick_"]')];
  axis.ticks.push(...[...group.querySelectorAll('[id^="text_"]')].filter((text) => /^\s*1e/.test(text.textContent)));
  axis.labelled = axis.ticks.some((tick) => tick.id.startsWith("xtick_") && tick.querySelector("text"));
  axis.now = { x: axis.x, y: axis.y };
  return axis;
}

function pairs(text) {
  return [...text.matchAll(/(-?[\d.e+-]+) (-?[\d.e+-]+)/g)].map(([, x, y]) => [+x, +y]);
}

// From coordinates to values, as drawn at first, and from values to coordinates, as zoomed.
function toX(axis, at) {
  return axis.x[0] + ((at - axis.box[0]) / axis.box[2]) * (axis.x[1] - axis.x[0]);
}
function scaled(axis, value) {
  return axis.log ? Math.log10(value) : value;
}
function toY(axis, at) {
  const [low, high] = axis.y.map((value) => scaled(axis, value));
  const value = high - ((at - axis.box[1]) / axis.box[3]) * (high - low);
  return axis.log ? 10 ** value : value;
}
function fromX(axis, value, [first, last] = axis.now.x) {
  return axis.box[0] + ((value - first) / (last - first)) * axis.box[2];
}
function fromY(axis, value, range = axis.now.y) {
  const [low, high] = range.map((end) => scaled(axis, end));
  return axis.box[1] + ((high - scaled(axis, value)) / (high - low)) * axis.box[3];
}

// Zoom.
function zoomTo(range) {
  for (const chart of canZoom) {
    chart.overlay.replaceChildren();
    for (const axis of chart.axes) draw(chart, axis, range);
  }
  document.body.classList.toggle("zoomed", range !== null);
}

function draw(chart, axis, range) {
  axis.now = range ? { x: range, y: heights(axis, range) } : { x: axis.x, y: axis.y };
  for (const line of axis.lines) {
    if (line.path) line.path.setAttribute("d", range ? zoomedPath(axis, line) : line.d);
    line.markers.forEach(([use, x, y]) => {
      use.setAttribute("x", range ? fromX(axis, toX(axis, x)) : x);
      use.setAttribute("y", range ? fromY(axis, toY(axis, y)) : y);
    });
  }
  const inside = (at, start, length) => at >= start - 0.5 && at <= start + length + 0.5;
  for (const mark of axis.marks) {
    const x = fromX(axis, mark.x);
    mark.element.setAttribute("transform", `translate(${x - fromX(axis, mark.x, axis.x)} 0)`);
    mark.element.style.display = inside(x, axis.box[0], axis.box[2]) ? "" : "none";
  }
  for (const level of axis.levels) {
    const y = fromY(axis, level.y);
    level.element.setAttribute("transform", `translate(0 ${y - fromY(axis, level.y, axis.y)})`);
    level.element.style.display = inside(y, axis.box[1], axis.box[3]) ? "" : "none";
  }
  for (const tick of axis.ticks) tick.style.display = range ? "none" : "";
  if (range) drawTicks(chart.overlay, axis);
}

function zoomedPath(axis, line) {
  return line.pieces
    .map((piece) => piece.map(([x, y], n) => `${n ? "L" : "M"}${fromX(axis, toX(axis, x)).toFixed(2)} ${fromY(axis, toY(axis, y)).toFixed(2)}`).join(""))
    .join("");
}

function heights(axis, [first, last]) {
  const seen = axis.lines.flatMap((line) => line.points.filter(([x]) => x >= first && x <= last).map(([, y]) => scaled(axis, y)));
  if (!seen.length) return axis.y;
  const [low, high] = [Math.min(...seen), Math.max(...seen)];
  const margin = (high - low || Math.abs(high) || 1) * 0.06;
  const ends = axis.y[0] === 0 ? [0, high + margin] : [low - margin, high + margin];
  return axis.log ? ends.map((end) => 10 ** end) : ends;
}

function round(low, high) {
  const step = 10 ** Math.floor(Math.log10((high - low) / 4));
  const size = [1, 2, 5, 10].map((factor) => factor * step).find((each) => (high - low) / each <= 6);
  const first = Math.ceil(low / size);
  return Array.from({ length: Math.floor(high / size) - first + 1 }, (_, n) => (first + n) * size);
}

function drawTicks(overlay, axis) {
  const [left, top, width, height] = axis.box;
  for (const value of round(...axis.now.x)) {
    const x = fromX(axis, value);
    addLine(overlay, x, top, x, top + height);
    if (axis.labelled) addText(overlay, x, top + height + 13, "middle", shown(value));
  }
  for (const value of round(...axis.now.y)) {
    if (axis.log && value <= 0) continue;
    const y = fromY(axis, value);
    addLine(overlay, left, y, left + width, y);
    addText(overlay, left + 3, y - 2.5, "start", shown(value)); // inside: a longer number would lie on the axis' name
  }
}

function addLine(parent, x1, y1, x2, y2, opacity = 0.12) {
  const line = parent.appendChild(document.createElementNS(NAMESPACE, "line"));
  for (const [name, value] of Object.entries({ x1, y1, x2, y2, stroke: "currentColor", "stroke-width": 0.6, opacity }))
    line.setAttribute(name, value);
  return line;
}
function addText(parent, x, y, anchor, text) {
  const element = parent.appendChild(document.createElementNS(NAMESPACE, "text"));
  for (const [name, value] of Object.entries({ x, y, "text-anchor": anchor, "font-size": 9.5 })) element.setAttribute(name, value);
  element.textContent = text;
}

function shown(value) {
  const size = Math.abs(value);
  if (size && (size < 1e-3 || size >= 1e7)) return value.toExponential(2);
  return value.toLocaleString("en", { maximumSignificantDigits: size >= 1000 ? 7 : 4 });
}

function stepAt(x) {
  const next = steps.findIndex(([tokens]) => tokens >= x);
  if (next < 1) return steps.length ? steps[next === 0 ? 0 : steps.length - 1][1] : null;
  const [[before, first], [after, last]] = [steps[next - 1], steps[next]];
  return Math.round(first + ((x - before) / (after - before)) * (last - first));
}

// Pointer.
function place(svg, event) {
  const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
  return [point.x, point.y];
}

function nearest(points, x) {
  return points.reduce((best, point) => (Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best), points[0]);
}

function describe(axis, x, y) {
  const named = axis.lines.filter((line) => line.points.length && line.label).map((line) => ({ line, point: nearest(line.points, x) }));
  const close = named.sort((a, b) => Math.abs(fromY(axis, a.point[1]) - y) - Math.abs(fromY(axis, b.point[1]) - y)).slice(0, 8);
  const at = close.length ? nearest(close.map(({ point }) => point), x)[0] : x;
  const step = stepAt(at);
  const rows = [[null, `${step === null ? "" : `step ${step.toLocaleString("en")}, `}${shown(at)} million tokens`]];
  const own = (point) => (Math.abs(point[0] - at) < (axis.x[1] - axis.x[0]) * 1e-5 ? "" : ` (at ${shown(point[0])})`);
  for (const { line, point } of close) rows.push([line.colour, `${line.label}: ${shown(point[1])}${own(point)}`]);
  const reach = ((axis.now.x[1] - axis.now.x[0]) / axis.box[2]) * 6;
  for (const mark of axis.marks) if (Math.abs(mark.x - x) < reach) rows.push([mark.colour, mark.text]);
  return [at, rows];
}

function hover(chart, event) {
  chart.svg.querySelectorAll(".cross").forEach((line) => line.remove());
  const [px, py] = place(chart.svg, event);
  const axis = chart.axes.find(({ box: [left, top, width, height] }) => px >= left && px <= left + width && py >= top && py <= top + height);
  tooltip.hidden = !axis;
  if (!axis) return;
  const x = axis.now.x[0] + ((px - axis.box[0]) / axis.box[2]) * (axis.now.x[1] - axis.now.x[0]);
  const [at, rows] = describe(axis, x, py);
  for (const each of chart.axes) {
    const cross = addLine(chart.svg, fromX(each, at), each.box[1], fromX(each, at), each.box[1] + each.box[3], 0.6);
    cross.setAttribute("class", "cross");
  }
  tooltip.replaceChildren(
    ...rows.map(([colour, text]) => {
      const row = document.createElement("div");
      if (colour) Object.assign(row.appendChild(document.createElement("i")), { className: "swatch" }).style.background = colour;
      row.append(text);
      return row;
    }),
  );
  const { offsetWidth, offsetHeight } = tooltip;
  const right = event.clientX + 14 + offsetWidth < innerWidth ? event.clientX + 14 : event.clientX - 14 - offsetWidth;
  tooltip.style.left = `${Math.max(4, right) + scrollX}px`;
  tooltip.style.top = `${Math.min(event.clientY + 14, innerHeight - offsetHeight - 4) + scrollY}px`;
}

for (const chart of charts) {
  let start = null;
  let shade = null;
  const first = chart.axes[0];
  const bounded = (x) => Math.min(Math.max(x, first.box[0]), first.box[0] + first.box[2]);
  const value = (x) => first.now.x[0] + ((bounded(x) - first.box[0]) / first.box[2]) * (first.now.x[1] - first.now.x[0]);
  chart.svg.addEventListener("pointermove", (event) => {
    hover(chart, event);
    if (start === null) return;
    const ends = [start, bounded(place(chart.svg, event)[0])].sort((a, b) => a - b);
    shade ??= chart.svg.appendChild(document.createElementNS(NAMESPACE, "rect"));
    const last = chart.axes.at(-1).box;
    const form = { x: ends[0], y: first.box[1], width: ends[1] - ends[0], height: last[1] + last[3] - first.box[1], fill: "currentColor", opacity: 0.12 };
    for (const [name, each] of Object.entries(form)) shade.setAttribute(name, each);
  });
  chart.svg.addEventListener("pointerleave", () => {
    tooltip.hidden = true;
    chart.svg.querySelectorAll(".cross").forEach((line) => line.remove());
  });
  if (!canZoom.includes(chart)) continue;
  chart.svg.classList.add("zooms");
  chart.svg.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || event.pointerType === "touch") return;
    start = bounded(place(chart.svg, event)[0]);
    chart.svg.setPointerCapture(event.pointerId);
    event.preventDefault();
  });
  const end = (event) => {
    shade?.remove();
    const stop = bounded(place(chart.svg, event)[0]);
    if (start !== null && event.type === "pointerup" && Math.abs(stop - start) > 4) zoomTo([value(start), value(stop)].sort((a, b) => a - b));
    start = shade = null;
  };
  chart.svg.addEventListener("pointerup", end);
  chart.svg.addEventListener("pointercancel", end);
  chart.svg.addEventListener("dblclick", () => zoomTo(null));
}
document.querySelector("#unzoom")?.addEventListener("click", () => zoomTo(null));
addEventListener("keydown", (event) => event.key === "Escape" && zoomTo(null));
