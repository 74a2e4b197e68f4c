import { ask, card, count, find, make, say } from "./common.js";
import { add, box, watchList } from "./list.js";

// Reasons in the list of pairs to exclude.
const DISAGREE = "image and caption disagree";
const DUPLICATE = "near-duplicate image";

const guarded = (work) => (...given) => work(...given).catch((error) => say(error.message, "bad"));

/** A part of the page: a list that grows by a page, and a form that marks pairs; `row` makes an element of a row. */
function watchPart(name, { reason, doing, limits, row, told }) {
  const rows = find(`${name}-rows`);
  const more = find(`${name}-more`);
  let run = 0;

  function get(start) {
    say(`${doing} …`, "busy");
    return ask(`/api/pairs/${name}?${new URLSearchParams({ start, ...limits() })}`);
  }

  const load = guarded(async (reset) => {
    const mine = reset ? ++run : run;
    if (reset) rows.replaceChildren();
    const start = rows.childElementCount;
    const found = await get(start);
    if (mine !== run || start !== rows.childElementCount) return;
    rows.append(...found.rows.map((each) => row(each, found)));
    more.hidden = rows.childElementCount >= found.total;
    if (!reset) (rows.children[start]?.querySelector("a, input") || more).focus();
    say(told(found, rows.childElementCount));
  });

  const mark = guarded(async () => {
    const { marked } = await get(0);
    add(marked, reason);
    say(`${count(marked.length, "pair")} added to the list`);
  });

  const begin = () => find(name).open && !run && load(true);
  more.addEventListener("click", () => load(false));
  find(name).addEventListener("toggle", begin);
  find(`${name}-form`).addEventListener("submit", (event) => {
    event.preventDefault();
    mark();
  });
  begin();
  return load;
}

/** Bars of the values of all pairs; those worse than the limit stand out. */
function histogram({ counts, edges, median, spread, total, without, ranked, limit }) {
  const most = Math.max(...counts);
  const bars = counts.map((value, place) => {
    const bar = make("span", { class: (ranked ? edges[place] >= limit : edges[place + 1] <= limit) ? "low" : "" });
    bar.style.height = `${value ? Math.max(1, (100 * value) / most) : 0}%`;
    return bar;
  });
  const name = ranked ? "rank" : "cosine";
  const ends = [edges[0], edges.at(-1)].map((value) => value.toFixed(2));
  const label = `Histogram of ${name}s, from ${ends[0]} to ${ends[1]}`;
  const missing = without ? `; ${count(without, "image")} without a ${ranked ? "rank" : "caption"}` : "";
  const width = ranked ? "" : `, standard deviation ${spread.toFixed(3)}`;
  return [
    make("div", { class: "columns", role: "img", "aria-label": label }, ...bars),
    make("div", { class: "ends" }, ...ends.map((end) => make("span", {}, end))),
    make("figcaption", { class: "hint" }, `${count(total, "pair")}: median ${name} ${median.toFixed(3)}${width}${missing}`),
  ];
}

function disagreeingRow(row, { ranked }) {
  const apart = `${Math.abs(row.deviations).toFixed(1)} standard deviations ${row.deviations < 0 ? "below" : "above"} the median`;
  const value = ranked ? `rank ${row.value.toFixed(3)}` : `cosine ${row.value.toFixed(3)}, ${apart}`;
  const nearest = row.captions.includes(row.nearest) ? "no other caption is nearer" : `nearest caption: “${row.nearest}”`;
  // The model has learned the captions of ranked pairs, so which one is nearest says nothing.
  const facts = ranked ? [value, row.key] : [value, nearest, row.key];
  return card(row, { row: true, facts, more: [box(row.id, DISAGREE)] });
}

function groupRow(group) {
  const hidden = group.size - group.members.length;
  const head = `${count(group.size, "image")}, cosine up to ${group.cosine.toFixed(3)}${hidden > 0 ? `, ${hidden} more not shown` : ""}`;
  const members = group.members.map((member) => card(member, { more: [box(member.id, DUPLICATE)] }));
  return make("li", {}, make("p", { class: "facts" }, head), make("ul", { class: "members" }, ...members));
}

const threshold = () => Number(find("threshold").value).toFixed(3);

watchList();
if (location.hash === "#duplicates") find("duplicates").open = true;
watchPart("disagreeing", {
  reason: DISAGREE,
  doing: "Comparing images with their captions",
  limits: () => (find("limit").value ? { limit: find("limit").value } : {}),
  row: disagreeingRow,
  told(found, shown) {
    find("limit").value ||= found.limit.toFixed(3);
    find("histogram").replaceChildren(...histogram(found));
    return `${shown} of ${count(found.total, "pair")}, the worst first`;
  },
});
const loadGroups = watchPart("duplicates", {
  reason: DUPLICATE,
  doing: "Comparing images with each other",
  limits: () => ({ threshold: threshold() }),
  row: groupRow,
  told(found, shown) {
    find("duplicates-said").textContent = `${count(found.total, "group")}: ${count(found.marked.length, "image")} not counting the first of each.`;
    return found.total ? `${shown} of ${count(found.total, "group")}, the most similar first` : "No two images are that similar. Lower the cosine.";
  },
});
find("threshold").addEventListener("input", () => (find("threshold-said").textContent = threshold()));
find("threshold").addEventListener("change", () => loadGroups(true));
