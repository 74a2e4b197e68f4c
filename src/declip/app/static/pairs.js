import { apart, card, count, find, finished, make, say } from "./common.js";
import { box, put, watchList } from "./list.js";
import { watchTabs } from "./tabs.js";

// Reasons in the list of pairs to exclude.
const DISAGREE = "image and caption disagree";
const DUPLICATE = "near-duplicate image";

const guarded = (work) => (...given) => work(...given).catch((error) => say(error.message, "bad"));

/** A list that grows by a page: `address(start)` gives rows, `row` makes an element of one. */
function growing(name, part, row, address, doing, told) {
  const rows = find(`${name}-${part}`);
  const more = find(`${name}-more`);
  let run = 0;
  async function load(anew) {
    const mine = anew ? ++run : run;
    if (anew) rows.replaceChildren();
    const found = await finished(address(rows.childElementCount), doing);
    if (mine !== run) return;
    const start = rows.childElementCount;
    rows.append(...found[part].map(row));
    more.hidden = rows.childElementCount >= found.total;
    if (!anew) (rows.children[start]?.querySelector("a, input") || more).focus();
    say(told(found, rows.childElementCount));
  }
  more.addEventListener("click", () => guarded(load)(false));
  return guarded(load);
}

/** Bars of the cosines of all pairs; those below a value stand out. */
function histogram({ counts, edges }, below) {
  const most = Math.max(1, ...counts);
  const bars = counts.map((value, place) => {
    const bar = make("span", { class: edges[place + 1] <= below ? "low" : "" });
    bar.style.height = `${value ? Math.max(1, (100 * value) / most) : 0}%`;
    return bar;
  });
  const label = `Histogram of the cosines, from ${edges[0].toFixed(2)} to ${edges.at(-1).toFixed(2)}`;
  const ends = [edges[0], edges.at(-1)].map((value) => make("span", {}, value.toFixed(2)));
  return [make("div", { class: "columns", role: "img", "aria-label": label }, ...bars), make("div", { class: "ends" }, ...ends)];
}

function disagreeingRow(row) {
  const nearest = row.nearest === row.captions[0] ? "its own caption is the nearest of all" : `nearest caption: “${row.nearest}”`;
  const facts = [`cosine ${row.cosine.toFixed(3)}, ${apart(row.deviations)}`, nearest, row.key];
  return card(row, { row: true, facts, more: [box(row.id, DISAGREE)] });
}

function groupRow(group) {
  const hidden = group.size - group.members.length;
  const head = `${count(group.size, "image")}, cosine up to ${group.cosine.toFixed(3)}${hidden > 0 ? `, ${hidden} more not shown` : ""}`;
  const members = group.members.map((member) => card(member, { more: [box(member.id, DUPLICATE)] }));
  return make("li", {}, make("p", { class: "facts" }, head), make("ul", { class: "members" }, ...members));
}

const threshold = () => Number(find("threshold").value).toFixed(3);
const parts = {
  disagreeing: growing("disagreeing", "rows", disagreeingRow, (start) => `/api/pairs/disagreeing?start=${start}`, "Comparing images with their captions", (found, shown) => `${shown} of ${count(found.total, "pair")}, the least agreeing first`),
  duplicates: growing("duplicates", "groups", groupRow, (start) => `/api/pairs/duplicates?start=${start}&threshold=${threshold()}`, "Comparing images with each other", (found, shown) => {
    find("duplicates-said").textContent = `${count(found.total, "group")}: ${count(found.extra, "image")} besides the first of each.`;
    return found.total ? `${shown} of ${count(found.total, "group")}, the most alike first` : "No two images are that much alike. Lower the cosine.";
  }),
};

const begin = guarded(async (name) => {
  const state = await finished("/api/pairs", "Comparing images with their captions");
  const usual = state.median - 3 * state.spread;
  find("below").value ||= usual.toFixed(3);
  find("histogram").replaceChildren(...histogram(state, usual), make("figcaption", { class: "hint" }, `${count(state.pairs, "pair")}: usual cosine ${state.median.toFixed(3)}, deviation ${state.spread.toFixed(3)}${state.without ? `; ${count(state.without, "image")} without a caption` : ""}`));
  await parts[name](true);
});

const began = new Set();
watchList();
watchTabs((name) => {
  if (began.has(name)) return;
  began.add(name);
  // Groups do not need captions, so they begin without the comparison.
  if (name === "disagreeing") begin(name);
  else guarded(async () => parts[name](true))();
});
find("threshold").addEventListener("input", () => (find("threshold-said").textContent = threshold()));
find("threshold").addEventListener("change", () => parts.duplicates(true));
find("threshold-form").addEventListener("submit", guardedSubmit(async () => {
  const found = await finished(`/api/pairs/duplicates/ids?threshold=${threshold()}`, "Comparing images with each other");
  put(found.ids, DUPLICATE);
  return found.ids.length;
}));
find("below-form").addEventListener("submit", guardedSubmit(async () => {
  const found = await finished(`/api/pairs/disagreeing/ids?below=${find("below").value}`, "Comparing");
  put(found.ids, DISAGREE);
  return found.ids.length;
}));

function guardedSubmit(work) {
  return (event) => {
    event.preventDefault();
    guarded(async () => say(`${count(await work(), "pair")} put on the list`))();
  };
}
