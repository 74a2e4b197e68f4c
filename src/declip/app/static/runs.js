import { find, make, say } from "./common.js";
import { chart } from "./chart.js";

const SOON = 2000; // milliseconds between two looks while a run trains
const LATER = 10000;

let wanted = new URLSearchParams(location.search).getAll("show");
let tag = "";
let now = null;

async function look() {
  let training = false;
  try {
    const asked = new URLSearchParams(wanted.map((id) => ["show", id]));
    const answer = await fetch(`/api/runs?${asked}`, { cache: "no-store", headers: tag ? { "If-None-Match": tag } : {} });
    if (answer.status !== 304) {
      const tree = await answer.json();
      if (!answer.ok) throw new Error(tree.error);
      tag = answer.headers.get("ETag");
      show(tree);
      now = tree;
    }
    training = now.runs.some((run) => run.state === "training");
    const many = now.runs.length;
    say(many ? `${many} ${many === 1 ? "run" : "runs"}${training ? ", followed while they train" : ""}` : "No run is there yet.");
  } catch (error) {
    tag = "";
    say(error instanceof TypeError ? "The server does not answer. Is declip app still running?" : error.message, "bad");
  }
  return training;
}

async function follow() {
  const training = document.hidden ? true : await look();
  setTimeout(follow, training ? SOON : LATER);
}

function show(tree) {
  const names = tree.shown.map((id) => name(tree, id));
  rows(tree);
  fill("results", tree.results, () => {
    const head = make("tr", {}, make("th", { scope: "col" }, "Measure"), ...names.map((each, place) => header(each, place)), make("th", { scope: "col", class: "number" }, "chance"));
    const body = tree.results.map(([on, measure, chance, values]) => make("tr", {}, make("th", { scope: "row" }, `${measure}, ${on}`), ...values.map((value) => make("td", { class: "number" }, percent(value))), make("td", { class: "number" }, percent(chance))));
    table("results", head, body);
  });
  fill("differences", tree.differences, () => {
    const head = make("tr", {}, make("th", { scope: "col" }, "Key"), ...names.map((each, place) => header(each, place)));
    table("differences", head, tree.differences.map(([key, values]) => make("tr", {}, make("th", { scope: "row" }, make("code", {}, key)), ...values.map((value) => make("td", { class: "value" }, value)))));
  });
  for (const part of ["measured", "curves"]) fill(part, tree[part], () => find(part).replaceChildren(...tree[part].map((each) => chart(each, names))));
}

function fill(part, rows, draw) {
  find(`${part}-section`).hidden = !rows.length;
  if (rows.length) draw();
}

function table(id, head, body) {
  find(id).tHead.replaceChildren(head);
  find(id).tBodies[0].replaceChildren(...body);
}

const percent = (share) => (share === null ? "–" : share && share < 0.001 ? `${(100 * share).toPrecision(2)} %` : `${(100 * share).toFixed(share < 0.01 ? 2 : 1)} %`);
const dot = (place) => make("span", { class: `dot ${place < 0 ? "" : `f${place}`}`, "aria-hidden": "true" });
const header = (text, place) => make("th", { scope: "col", class: "number" }, dot(place), text);

/** A run's name, with its folder's where two have the same. */
function name(tree, id) {
  const run = tree.runs.find((each) => each.id === id);
  const twice = tree.runs.filter((each) => each.name === run.name).length > 1;
  return twice ? `${run.in}/${run.name}` : run.name;
}

/** The table of runs; its boxes stay where they are while only numbers change, so that focus does. */
function rows(tree) {
  const body = find("runs").tBodies[0];
  const there = [...body.rows].map((row) => row.dataset.run).join();
  if (there !== tree.runs.map((run) => run.id).join()) {
    body.replaceChildren(...tree.runs.map((run) => {
      const input = make("input", { type: "checkbox", "aria-label": `Show ${name(tree, run.id)}` });
      input.addEventListener("change", chosen);
      return make("tr", { "data-run": run.id }, make("td", {}, input), make("th", { scope: "row" }), make("td"), make("td"), make("td", { class: "number" }));
    }));
  }
  tree.runs.forEach((run, at) => {
    const [box, title, recipe, state, step] = body.rows[at].cells;
    box.firstChild.checked = tree.shown.includes(run.id);
    title.replaceChildren(dot(tree.shown.indexOf(run.id)), name(tree, run.id));
    recipe.textContent = run.recipe;
    state.replaceChildren(make("span", { class: `badge ${run.state}` }, run.state));
    step.textContent = `${run.step.toLocaleString("en")}${run.steps ? ` of ${run.steps.toLocaleString("en")}` : ""}`;
  });
}

function chosen(event) {
  const boxes = [...find("runs").querySelectorAll("input:checked")];
  if (!boxes.length || boxes.length > 8) {
    event.target.checked = !event.target.checked;
    return say(boxes.length ? "Eight runs can be shown side by side." : "One run has to be shown.", "bad");
  }
  wanted = boxes.map((box) => box.closest("tr").dataset.run);
  history.replaceState(null, "", `?${new URLSearchParams(wanted.map((id) => ["show", id]))}`);
  tag = "";
  return look();
}

document.addEventListener("visibilitychange", () => !document.hidden && look());
follow();
