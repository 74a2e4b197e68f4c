// Charts as SVG: lines of several runs over their steps, and a histogram.

import { make } from "./common.js";

const WIDTH = 380;
const HEIGHT = 200;
const LEFT = 46;
const RIGHT = 10;
const TOP = 8;
const BOTTOM = 24;

function shape(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Round numbers that cover a span: 1, 2 or 5 times a power of ten apart. */
export function ticks(low, high, wanted = 4) {
  const rough = (high - low) / wanted || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= rough * 0.999);
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-9; at += step) found.push(Math.abs(at) < step * 1e-9 ? 0 : at);
  return found;
}

const short = (value) => (value !== 0 && (Math.abs(value) < 0.001 || Math.abs(value) >= 1e5) ? value.toExponential(0) : String(Number(value.toPrecision(4))));
const steps = (value) => (value >= 1e6 ? `${value / 1e6}M` : value >= 1e4 ? `${value / 1e3}k` : String(value));
const shown = (value, share) => (share ? `${(100 * value).toFixed(1)} %` : Number(value.toPrecision(4)).toString());

/** A chart of lines; `lines` has one for each name, perhaps empty, of [step, value]. */
export function chart({ title, note, share, lines }, names) {
  const points = lines.flat();
  let low = Math.min(...points.map((point) => point[1]));
  let high = Math.max(...points.map((point) => point[1]));
  if (share) low = 0;
  if (low === high) [low, high] = [low - Math.abs(low || 1) * 0.1, high + Math.abs(high || 1) * 0.1];
  const last = Math.max(1, ...points.map((point) => point[0]));
  const x = (step) => LEFT + (step / last) * (WIDTH - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - ((value - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);
  const ends = lines.map((line, place) => (line.length ? `${names[place]} ${shown(line.at(-1)[1], share)} at step ${line.at(-1)[0]}` : "")).filter(Boolean);
  const drawing = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${title}: ${ends.join("; ")}` });
  for (const value of ticks(low, high)) {
    drawing.append(shape("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }));
    drawing.append(shape("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, share ? `${short(100 * value)} %` : short(value)));
  }
  for (const step of ticks(0, last)) drawing.append(shape("text", { x: x(step), y: HEIGHT - 6, "text-anchor": step === 0 ? "start" : x(step) > WIDTH - 30 ? "end" : "middle" }, steps(step)));
  lines.forEach((line, place) => {
    if (line.length > 1) drawing.append(shape("path", { class: `s${place}`, d: `M${line.map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`).join("L")}` }));
    if (line.length === 1 || (share && line.length < 30)) for (const [step, value] of line) drawing.append(shape("circle", { class: `f${place}`, cx: x(step), cy: y(value), r: 3 }));
  });
  const readout = make("p", { class: "readout" }, ends.length === 1 ? ends[0].slice(names[lines.findIndex((line) => line.length)].length + 1) : "");
  watch(drawing, readout, lines, names, share, x, last);
  return make("figure", { class: "chart" }, make("figcaption", {}, make("b", {}, title), note), drawing, readout);
}

/** Reads the values at the pointer out below the chart. */
function watch(drawing, readout, lines, names, share, x, last) {
  const cross = shape("line", { class: "cross", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  const usual = readout.textContent;
  drawing.append(cross);
  drawing.addEventListener("pointermove", (event) => {
    const box = drawing.getBoundingClientRect();
    const step = (((event.clientX - box.left) / box.width) * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT) * last;
    const near = (line) => line.reduce((one, other) => (Math.abs(other[0] - step) < Math.abs(one[0] - step) ? other : one));
    const read = lines.map((line, place) => [names[place], line.length ? near(line) : null]).filter(([, point]) => point);
    if (!read.length) return;
    cross.setAttribute("x1", x(read[0][1][0]));
    cross.setAttribute("x2", x(read[0][1][0]));
    cross.setAttribute("visibility", "visible");
    readout.textContent = read.map(([name, point]) => `${read.length > 1 ? `${name} ` : ""}${shown(point[1], share)} at step ${point[0].toLocaleString("en")}`).join(" · ");
  });
  drawing.addEventListener("pointerleave", () => {
    cross.setAttribute("visibility", "hidden");
    readout.textContent = usual;
  });
}

/** The cosines of all pairs; bars below a value stand out. */
export function histogram({ counts, edges }, below) {
  const width = 640;
  const height = 150;
  const most = Math.max(1, ...counts);
  const low = edges[0];
  const span = edges.at(-1) - low || 1;
  const drawing = shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Histogram of the cosines, from ${low.toFixed(2)} to ${edges.at(-1).toFixed(2)}` });
  counts.forEach((value, place) => {
    const left = ((edges[place] - low) / span) * width;
    const right = ((edges[place + 1] - low) / span) * width;
    const tall = value ? Math.max(1.5, (value / most) * (height - 28)) : 0;
    drawing.append(shape("rect", { class: edges[place + 1] <= below ? "low" : "", x: left + 1, y: height - 22 - tall, width: Math.max(1, right - left - 2), height: tall }));
  });
  for (const value of ticks(low, edges.at(-1), 6)) {
    const at = ((value - low) / span) * width;
    drawing.append(shape("text", { x: at, y: height - 6, "text-anchor": at < 15 ? "start" : at > width - 15 ? "end" : "middle" }, short(value)));
  }
  return drawing;
}
