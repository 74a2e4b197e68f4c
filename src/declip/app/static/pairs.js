import { ask, card, count, find, make, say, sendJson } from "./common.js";

// Reasons in the list of pairs to exclude.
const DISAGREE = "image and caption disagree";
const DUPLICATE = "near-duplicate image";

const guarded = (work) => (...given) => work(...given).catch((error) => say(error.message, "bad"));

// --- the list: reasons by pair, which stay in this browser under the name of the index

const NAME = `declip-list-${document.body.dataset.list}`;
const marked = new Map(JSON.parse(localStorage.getItem(NAME) || "[]"));

/** Adds pairs to the list; a pair that is on it keeps its first reason. */
function add(ids, reason) {
  for (const id of ids) if (!marked.has(id)) marked.set(id, reason);
  changed();
}

/** A checkbox that adds a pair to the list or removes it; an image with other captions is excluded with them. */
function box(id, reason, others = 0) {
  const input = make("input", { type: "checkbox", "data-pair": id });
  input.checked = marked.has(id);
  input.addEventListener("change", () => {
    if (!input.checked) marked.delete(id);
    add(input.checked ? [id] : [], reason);
  });
  return make("label", { class: "take" }, input, others ? `exclude the image, with ${count(others, "other caption")}` : "exclude");
}

function changed() {
  try {
    localStorage.setItem(NAME, JSON.stringify([...marked]));
  } catch {
    // Too long for the browser's storage: the list is lost when the page is closed.
  }
  find("list-count").textContent = count(marked.size, "pair");
  find("save").disabled = find("clear").disabled = !marked.size;
  for (const input of document.querySelectorAll("[data-pair]")) input.checked = marked.has(Number(input.dataset.pair));
}

find("save").addEventListener("click", guarded(async () => {
  const tree = {};
  for (const [id, reason] of marked) (tree[reason] ||= []).push(id);
  const written = await sendJson("/api/pairs/list", tree);
  say(`Written: ${written.drop}, and the other ${count(written.count, "pair")} in ${written.rest}. Train on them: declip finetune ${written.rest}`);
}));
find("clear").addEventListener("click", () => {
  marked.clear();
  changed();
  say("The list is empty.");
});
changed();

// --- the pairs

/** A part of the page: a list that grows by a page; `row` makes an element of a row, `submit` is what its form does. */
function watchPart(name, { doing, limits, row, told, submit }) {
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
    const answer = await get(start);
    if (mine !== run || start !== rows.childElementCount) return;
    rows.append(...answer.rows.map((each) => row(each, answer)));
    more.hidden = rows.childElementCount >= answer.total;
    if (!reset) (rows.children[start]?.querySelector("a, input") || more).focus();
    say(told(answer, rows.childElementCount));
  });

  const begin = () => find(name).open && !run && load(true);
  more.addEventListener("click", () => load(false));
  find(name).addEventListener("toggle", begin);
  find(`${name}-form`).addEventListener("submit", guarded(async (event) => {
    event.preventDefault();
    await submit({ get, load });
  }));
  begin();
  return load;
}

/** Bars of the values of all pairs; those worse than the limit stand out. */
function histogram({ counts, edges, median, captions, without, ranked, limit }) {
  const most = Math.max(...counts);
  const bars = counts.map((value, number) => {
    const bar = make("span", { class: (ranked ? edges[number] >= limit : edges[number + 1] <= limit) ? "low" : "" });
    bar.style.height = `${value ? Math.max(1, (100 * value) / most) : 0}%`;
    return bar;
  });
  const name = ranked ? "rank" : "cosine";
  const ends = [edges[0], edges.at(-1)].map((value) => value.toFixed(2));
  const missing = without ? `; ${count(without, "image")} without a ${ranked ? "rank" : "caption"}` : "";
  return [
    make("div", { class: "columns", role: "img", "aria-label": `Histogram of ${name}s, from ${ends[0]} to ${ends[1]}` }, ...bars),
    make("div", { class: "ends" }, ...ends.map((end) => make("span", {}, end))),
    make("figcaption", { class: "hint" }, `${count(captions, "caption")}: median ${name} ${median.toFixed(3)}${missing}`),
  ];
}

function disagreeingRow(row, { ranked }) {
  const value = `${ranked ? "rank" : "cosine"} ${row.value.toFixed(3)}`;
  // The model has learned the captions of ranked pairs, so which one is nearest says nothing.
  const nearest = row.nearest === row.captions[0] ? "no other caption is nearer" : `nearest caption: “${row.nearest}”`;
  return card(row, { row: true, facts: [value, ...(ranked ? [] : [nearest]), row.key], more: [box(row.id, DISAGREE, row.others)] });
}

function groupRow(group) {
  const hidden = group.size - group.members.length;
  const head = `${count(group.size, "image")}, cosine up to ${group.cosine.toFixed(3)}${hidden > 0 ? `, ${hidden} more not shown` : ""}`;
  const members = group.members.map((member) => card(member, { more: [box(member.id, DUPLICATE)] }));
  return make("li", {}, make("p", { class: "facts" }, head), make("ul", { class: "members" }, ...members));
}

const threshold = () => Number(find("threshold").value).toFixed(3);

watchPart("disagreeing", {
  doing: "Comparing images with their captions",
  limits: () => (find("limit").value ? { limit: find("limit").value } : {}),
  row: disagreeingRow,
  told(answer, shown) {
    find("limit").value ||= answer.limit.toFixed(3);
    find("histogram").replaceChildren(...histogram(answer));
    const side = answer.ranked ? "above" : "below";
    if (!answer.total) return `No caption has a ${answer.ranked ? "rank" : "cosine"} ${side} ${answer.limit.toFixed(3)}.`;
    return `${shown} of ${count(answer.total, "caption")} ${side} ${answer.limit.toFixed(3)}, the worst first`;
  },
  submit: ({ load }) => load(true),
});
const loadGroups = watchPart("duplicates", {
  doing: "Comparing images with each other",
  limits: () => ({ threshold: threshold() }),
  row: groupRow,
  told(answer, shown) {
    find("duplicates-said").textContent = `${count(answer.total, "group")}: ${count(answer.marked.length, "image")} not counting the first of each.`;
    return answer.total ? `${shown} of ${count(answer.total, "group")}, the most similar first` : "No two images are that similar. Lower the cosine.";
  },
  async submit({ get }) {
    const ids = (await get(0)).marked;
    add(ids, DUPLICATE);
    say(`${count(ids.length, "pair")} added to the list`);
  },
});
find("threshold").addEventListener("input", () => (find("threshold-said").textContent = threshold()));
find("threshold").addEventListener("change", () => loadGroups(true));
