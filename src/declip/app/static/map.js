// The map of the pairs on a canvas: hovered, tapped, or walked through with the arrow keys.

import { apart, ask, card, count, find, finished, make, say } from "./common.js";
import { box, has, put, take } from "./list.js";

const GRID = 10000;
const NEAR = 14; // pixels from the pointer to the chosen point at most
const LOW = -3;
const SOME = -2;

const canvas = find("canvas");
let points = null; // ids, x, y, deviations
let view = { x: GRID / 2, y: GRID / 2, zoom: 1 };
let chosen = -1;
let asked = 0;
let drag = null;
const narrow = matchMedia("(max-width: 720px)");

let frame = 0;
function redraw() {
  cancelAnimationFrame(frame);
  frame = requestAnimationFrame(draw);
}

export async function showMap() {
  const over = find("over").value;
  const method = find("method").value;
  const mine = ++asked;
  points = null;
  redraw();
  const found = await finished(`/api/pairs/map?over=${over}&method=${method}`, "Laying out the map", () => mine === asked);
  if (mine !== asked) return;
  points = found;
  chosen = -1;
  everything();
  const part = points.ids.length < points.images ? ` of ${count(points.images, "image")}, evenly chosen` : "";
  const variance = points.explained === null ? "" : ` The two directions have ${(100 * points.explained).toFixed(0)} % of the variance: points that lie together may differ in others.`;
  find("map-said").textContent = `${count(points.ids.length, "point")}${part}.${variance}`;
  say(`The map is ready: ${count(points.ids.length, "point")}`);
}

const scale = () => (Math.min(canvas.clientWidth, canvas.clientHeight) / GRID) * 0.94 * view.zoom;
const across = (place) => canvas.clientWidth / 2 + (points.x[place] - view.x) * scale();
const down = (place) => canvas.clientHeight / 2 - (points.y[place] - view.y) * scale();
const deviations = (place) => (points.deviations ? points.deviations[place] : null);
const visible = (place) => find("shown").value === "all" || (deviations(place) !== null && deviations(place) <= SOME);

function draw() {
  const width = canvas.clientWidth;
  const height = canvas.clientHeight;
  const density = window.devicePixelRatio || 1;
  canvas.width = width * density;
  canvas.height = height * density;
  const pen = canvas.getContext("2d");
  pen.scale(density, density);
  if (!points) return;
  const styles = getComputedStyle(document.documentElement);
  const color = (name) => styles.getPropertyValue(name).trim();
  const size = Math.max(1.4, Math.min(5, 60 / Math.sqrt(points.ids.length))) * Math.min(2, Math.sqrt(view.zoom));
  const layers = [
    ["--c0", size, 0.45, (value) => value === null || value > SOME],
    ["--c3", size * 1.15, 0.9, (value) => value !== null && value <= SOME && value > LOW],
    ["--c1", size * 1.3, 1, (value) => value !== null && value <= LOW],
  ];
  for (const [name, radius, opacity, belongs] of layers) {
    pen.fillStyle = color(name);
    pen.globalAlpha = opacity;
    for (let place = 0; place < points.ids.length; place++) {
      if (!visible(place) || !belongs(deviations(place))) continue;
      const x = across(place);
      const y = down(place);
      if (x < -5 || y < -5 || x > width + 5 || y > height + 5) continue;
      pen.beginPath();
      pen.arc(x, y, radius, 0, 2 * Math.PI);
      pen.fill();
    }
  }
  pen.globalAlpha = 1;
  if (chosen >= 0) {
    pen.strokeStyle = color("--ink");
    pen.lineWidth = 2.5;
    pen.beginPath();
    pen.arc(across(chosen), down(chosen), size + 5, 0, 2 * Math.PI);
    pen.stroke();
  }
}

/** The visible point with the smallest measure; Infinity excludes a point. */
function best(measure) {
  let found = -1;
  let least = Infinity;
  for (let place = 0; points && place < points.ids.length; place++) {
    if (!visible(place)) continue;
    const value = measure(across(place), down(place), place);
    if (value < least) [found, least] = [place, value];
  }
  return found;
}

const under = (x, y, reach) => best((px, py) => ((px - x) ** 2 + (py - y) ** 2 <= reach ** 2 ? (px - x) ** 2 + (py - y) ** 2 : Infinity));

let timer = 0;
function choose(place) {
  if (place < 0 || place === chosen) return;
  chosen = place;
  redraw();
  clearTimeout(timer);
  timer = setTimeout(async () => {
    const id = points.ids[place];
    const hit = await ask(`/api/images/${id}`).catch(() => null);
    if (hit === null || place !== chosen) return;
    const value = deviations(place);
    const facts = value === null ? [] : [apart(value)];
    const list = make("ul", {}, card(hit, { row: narrow.matches, facts: [...facts, hit.key], more: [box(id, "hand")] }));
    find("point").replaceChildren(list);
  }, 90);
}

function step(dx, dy) {
  const middle = chosen < 0 ? [canvas.clientWidth / 2, canvas.clientHeight / 2] : [across(chosen), down(chosen)];
  const next = best((x, y, place) => {
    const along = (x - middle[0]) * dx + (y - middle[1]) * dy;
    const aside = Math.abs((x - middle[0]) * dy - (y - middle[1]) * dx);
    return place !== chosen && along > 0.5 && aside <= 2 * along ? along + 2 * aside : Infinity;
  });
  choose(chosen < 0 ? best((x, y) => (x - middle[0]) ** 2 + (y - middle[1]) ** 2) : next);
  if (chosen >= 0) keepInside();
}

function keepInside() {
  const x = across(chosen);
  const y = down(chosen);
  if (x < 20 || y < 20 || x > canvas.clientWidth - 20 || y > canvas.clientHeight - 20) {
    [view.x, view.y] = [points.x[chosen], points.y[chosen]];
    redraw();
  }
}

function zoom(factor, x = canvas.clientWidth / 2, y = canvas.clientHeight / 2) {
  const before = scale();
  view.zoom = Math.max(1, Math.min(200, view.zoom * factor));
  const change = 1 / before - 1 / scale();
  view.x += (x - canvas.clientWidth / 2) * change;
  view.y -= (y - canvas.clientHeight / 2) * change;
  redraw();
}

function everything() {
  view = { x: GRID / 2, y: GRID / 2, zoom: 1 };
  redraw();
}

canvas.addEventListener("pointermove", (event) => {
  if (!points) return;
  if (drag && (drag.moved || Math.hypot(event.offsetX - drag.x, event.offsetY - drag.y) > 4)) {
    view.x -= (event.offsetX - drag.x) / scale();
    view.y += (event.offsetY - drag.y) / scale();
    drag = { x: event.offsetX, y: event.offsetY, moved: true };
    return redraw();
  }
  return choose(under(event.offsetX, event.offsetY, NEAR));
});
canvas.addEventListener("pointerdown", (event) => {
  if (event.pointerType === "mouse") drag = { x: event.offsetX, y: event.offsetY, moved: false };
  if (points) choose(under(event.offsetX, event.offsetY, 2 * NEAR));
});
for (const kind of ["pointerup", "pointerleave", "pointercancel"]) canvas.addEventListener(kind, () => (drag = null));
canvas.addEventListener("wheel", (event) => {
  if (!points || !(event.ctrlKey || document.activeElement === canvas)) return; // the page itself scrolls otherwise
  event.preventDefault();
  zoom(event.deltaY < 0 ? 1.25 : 0.8, event.offsetX, event.offsetY);
}, { passive: false });
canvas.addEventListener("keydown", (event) => {
  const keys = {
    ArrowLeft: () => step(-1, 0), ArrowRight: () => step(1, 0), ArrowUp: () => step(0, -1), ArrowDown: () => step(0, 1),
    "+": () => zoom(1.5), "=": () => zoom(1.5), "-": () => zoom(1 / 1.5), "0": everything, Enter: toggle,
  };
  if (!points || !keys[event.key]) return;
  event.preventDefault();
  keys[event.key]();
});

function toggle() {
  if (chosen < 0) return;
  const id = points.ids[chosen];
  if (has(id)) take(id);
  else put([id], "hand");
}

find("zoom-in").addEventListener("click", () => points && zoom(1.6));
find("zoom-out").addEventListener("click", () => points && zoom(1 / 1.6));
find("zoom-all").addEventListener("click", () => points && everything());
find("shown").addEventListener("change", redraw);
for (const id of ["over", "method"]) find(id).addEventListener("change", () => showMap().catch((error) => say(error.message, "bad")));
new ResizeObserver(redraw).observe(canvas);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
